//! The frame around the controller: one lock and one control socket for the
//! daemon's life, signals, and an orderly end. The controller itself is a
//! parameter. Programs stay pinned when the daemon ends: the data path outlives
//! it. Called by `cli run`.

use std::error::Error;
use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::future::Future;
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use crate::api::{Command, Commands, server};
use crate::config::Config;
use crate::instance::{Instance, reason};

/// Time for answers that are under way when the daemon ends.
const GRACE: Duration = Duration::from_secs(1);

/// Any error of the parts the daemon frames.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// What the controller is started with.
#[derive(Debug, Clone)]
pub struct RunOptions {
    pub instance: Instance,
    pub config: Config,
    /// As the user named it; `status` shows it. Already entered.
    pub netns: Option<String>,
}

/// The two things that command line and daemon do not do themselves.
#[derive(Clone, Copy)]
pub struct Engine {
    /// Mirror the kernel and answer commands. Ends after `Command::Unload`, or
    /// with an error; may be dropped at any moment (R39).
    pub run: fn(RunOptions, mpsc::Receiver<Command>) -> Running,
    /// Detach and unpin everything of an instance that no daemon runs on.
    pub unload: fn(&Instance) -> Result<(), BoxError>,
}

/// The controller at work.
pub type Running = Pin<Box<dyn Future<Output = Result<(), BoxError>>>>;

/// Why a daemon does not run, or not any more.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    #[error(
        "instance {instance} is already running ({}): stop it or choose another with --instance",
        holder(*pid)
    )]
    AlreadyRunning { instance: String, pid: Option<u32> },
    #[error("cannot {what} {}: {}", path.display(), reason(source))]
    Io {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("cannot catch signals: {}", reason(.0))]
    Signals(io::Error),
    #[error("{0}")]
    Controller(BoxError),
}

fn holder(pid: Option<u32>) -> String {
    pid.map_or_else(|| "pid unknown".to_owned(), |pid| format!("pid {pid}"))
}

/// Held while a daemon runs on an instance, or something else must keep
/// daemons away. The kernel releases it with the process.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// `AlreadyRunning` when another process holds it.
    pub fn acquire(instance: &Instance) -> Result<Self, DaemonError> {
        make_run_dir(instance)?;
        let path = instance.lock_path();
        let failed = |what, source| DaemonError::Io {
            what,
            path: path.clone(),
            source,
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|source| failed("open", source))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => {
                let mut text = String::new();
                let read = file.read_to_string(&mut text);
                let pid = read.ok().and_then(|_| text.trim().parse().ok());
                let instance = instance.name().to_owned();
                return Err(DaemonError::AlreadyRunning { instance, pid });
            }
            Err(std::fs::TryLockError::Error(source)) => return Err(failed("lock", source)),
        }
        file.set_len(0)
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(|source| failed("write", source))?;
        Ok(Self { _file: file })
    }
}

/// The directory is for everybody to see, its sockets for root.
fn make_run_dir(instance: &Instance) -> Result<(), DaemonError> {
    let path = instance.run_dir();
    let made = DirBuilder::new().mode(0o755).create(path).and_then(|()| {
        // Whatever the umask says.
        std::fs::set_permissions(path, Permissions::from_mode(0o755))
    });
    match made {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(DaemonError::Io {
            what: "create",
            path: path.to_owned(),
            source: error,
        }),
        _ => Ok(()),
    }
}

/// The control socket; removes its file at the end.
#[derive(Debug)]
struct Socket {
    path: PathBuf,
}

impl Socket {
    /// The lock is held, so a file that exists belongs to a dead daemon.
    fn bind(instance: &Instance, _lock: &Lock) -> Result<(Self, UnixListener), DaemonError> {
        let path = instance.socket_path();
        let failed = |what, source| DaemonError::Io {
            what,
            path: path.clone(),
            source,
        };
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(failed("replace", source));
            }
            _ => {}
        }
        // Not even for a moment may others connect.
        let mask = Umask::set(0o077);
        let listener = UnixListener::bind(&path).map_err(|source| failed("listen on", source))?;
        drop(mask);
        std::fs::set_permissions(&path, Permissions::from_mode(0o600))
            .map_err(|source| failed("protect", source))?;
        Ok((Self { path }, listener))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!("cannot remove {}: {}", self.path.display(), reason(&error));
        }
    }
}

/// A file mode mask, undone at the end of its scope.
struct Umask(libc::mode_t);

impl Umask {
    fn set(mask: libc::mode_t) -> Self {
        // SAFETY: umask has no memory effects and cannot fail.
        Self(unsafe { libc::umask(mask) })
    }
}

impl Drop for Umask {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { libc::umask(self.0) };
    }
}

/// How a daemon ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// SIGTERM or SIGINT: programs stay attached.
    Signal,
    /// The controller is done: everything is unloaded.
    Unloaded,
}

/// Run `controller` behind the instance's control socket until it ends or a
/// signal comes.
pub async fn serve<F, Fut, E>(instance: &Instance, controller: F) -> Result<End, DaemonError>
where
    F: FnOnce(mpsc::Receiver<Command>) -> Fut,
    Fut: Future<Output = Result<(), E>>,
    E: Into<BoxError>,
{
    let lock = Lock::acquire(instance)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(DaemonError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(DaemonError::Signals)?;
    let (socket, listener) = Socket::bind(instance, &lock)?;
    let (commands, receiver) = Commands::channel();
    let (stop, stopped) = oneshot::channel::<()>();
    let mut answering = tokio::spawn(server::serve(listener, commands, async {
        // An error is the sender's end, which means the same.
        let _ = stopped.await;
    }));
    tracing::info!("instance {instance} listens on {}", socket.path.display());

    let end = tokio::select! {
        result = controller(receiver) => match result {
            Ok(()) => Ok(End::Unloaded),
            Err(error) => Err(DaemonError::Controller(error.into())),
        },
        _ = terminate.recv() => Ok(End::Signal),
        _ = interrupt.recv() => Ok(End::Signal),
    };
    drop(stop);
    if tokio::time::timeout(GRACE, &mut answering).await.is_err() {
        answering.abort();
    }
    match &end {
        Ok(End::Signal) => tracing::info!("stopped; the programs stay attached"),
        Ok(End::Unloaded) => tracing::info!("unloaded"),
        Err(_) => {}
    }
    drop(socket);
    drop(lock);
    end
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Client, testing};
    use tempfile::TempDir;

    fn instance(dir: &TempDir) -> Instance {
        Instance::in_dirs("blue", dir.path().join("run"), "/sys/fs/bpf").unwrap()
    }

    async fn controller(commands: mpsc::Receiver<Command>) -> Result<(), BoxError> {
        testing::controller(commands).await;
        Ok(())
    }

    async fn client(instance: &Instance) -> Client {
        let connect = async {
            loop {
                match Client::connect(instance).await {
                    Ok(client) => break client,
                    Err(_) => tokio::task::yield_now().await,
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(5), connect)
            .await
            .unwrap()
    }

    fn mode(path: PathBuf) -> u32 {
        path.metadata().unwrap().permissions().mode() & 0o777
    }

    #[tokio::test]
    async fn serves_until_unload_and_leaves_no_socket() {
        let dir = TempDir::new().unwrap();
        let instance = instance(&dir);
        let serve = serve(&instance, controller);
        let ask = async {
            let mut client = client(&instance).await;
            assert_eq!(client.status().await.unwrap(), testing::status());
            assert_eq!(mode(instance.socket_path()), 0o600);
            assert_eq!(mode(instance.run_dir().to_owned()), 0o755);
            client.unload().await.unwrap();
        };
        let (end, ()) = tokio::join!(serve, ask);
        assert_eq!(end.unwrap(), End::Unloaded);
        assert!(!instance.socket_path().exists());
    }

    #[tokio::test]
    async fn refuses_a_second_daemon_and_names_the_first() {
        let dir = TempDir::new().unwrap();
        let instance = instance(&dir);
        let lock = Lock::acquire(&instance).unwrap();
        let error = serve(&instance, controller).await.unwrap_err().to_string();
        let pid = std::process::id();
        assert_eq!(
            error,
            format!(
                "instance blue is already running (pid {pid}): stop it or choose another with --instance"
            )
        );
        assert!(!instance.socket_path().exists());
        drop(lock);
        Lock::acquire(&instance).unwrap();
    }

    #[tokio::test]
    async fn replaces_the_socket_of_a_dead_daemon() {
        let dir = TempDir::new().unwrap();
        let instance = instance(&dir);
        std::fs::create_dir(instance.run_dir()).unwrap();
        drop(UnixListener::bind(instance.socket_path()).unwrap());
        std::fs::write(instance.lock_path(), "4194304\nlonger than a pid").unwrap();
        let serve = serve(&instance, controller);
        let ask = async {
            let mut client = client(&instance).await;
            let pid = std::fs::read_to_string(instance.lock_path()).unwrap();
            assert_eq!(pid, format!("{}\n", std::process::id()));
            client.unload().await.unwrap();
        };
        let (end, ()) = tokio::join!(serve, ask);
        assert_eq!(end.unwrap(), End::Unloaded);
    }

    #[tokio::test]
    async fn a_failing_controller_ends_the_daemon_with_its_reason() {
        let dir = TempDir::new().unwrap();
        let instance = instance(&dir);
        let end = serve(&instance, async |_| Err("eth1: gone: bring it back")).await;
        assert_eq!(end.unwrap_err().to_string(), "eth1: gone: bring it back");
        assert!(!instance.socket_path().exists());
    }
}
