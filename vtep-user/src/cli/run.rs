//! `vtep run` and `vtep unload`: everything is checked before anything is
//! touched, then `daemon` and the engine take over.

use std::io::{self, IsTerminal};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::runtime::Runtime;
use tracing_subscriber::EnvFilter;

use crate::api::{Client, ClientError};
use crate::config::Config;
use crate::daemon::{self, DaemonError, Engine, Lock, RunOptions};
use crate::host;
use crate::instance::Instance;

/// What is logged, in the syntax of `tracing_subscriber::EnvFilter`.
const LOG_VARIABLE: &str = "VTEP_LOG";

/// Time for a daemon to end after it has unloaded.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// Run the daemon until it is told to end.
pub fn run(
    runtime: &Runtime,
    instance: Instance,
    config: Option<&Path>,
    netns: Option<String>,
    engine: Engine,
) -> anyhow::Result<()> {
    let config = config.map(Config::read).transpose()?.unwrap_or_default();
    host::check()?;
    instance.check_bpffs()?;
    start_log()?;
    let options = RunOptions {
        instance: instance.clone(),
        config,
        netns,
    };
    runtime.block_on(daemon::serve(&instance, |commands| {
        (engine.run)(options, commands)
    }))?;
    Ok(())
}

fn start_log() -> anyhow::Result<()> {
    let text = std::env::var(LOG_VARIABLE).unwrap_or_default();
    let text = if text.is_empty() { "info" } else { &text };
    let filter = EnvFilter::try_new(text).with_context(|| {
        format!("{LOG_VARIABLE}=`{text}` is no log filter such as `info` or `vtep_user=debug`")
    })?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal() && super::colours_wanted())
        .init();
    Ok(())
}

/// Ask the daemon to unload and wait for its end; without a daemon, unload here.
pub fn unload(runtime: &Runtime, instance: &Instance, engine: Engine) -> anyhow::Result<()> {
    match runtime.block_on(unload_by_daemon(instance)) {
        Err(ClientError::NoDaemon { .. }) => {}
        Err(error) => return Err(error.into()),
        Ok(()) => {
            drop(wait_for_lock(instance)?);
            return Ok(());
        }
    }
    host::check()?;
    instance.check_bpffs()?;
    unload_here(instance, engine)
}

fn unload_here(instance: &Instance, engine: Engine) -> anyhow::Result<()> {
    // No daemon may start meanwhile.
    let lock = match Lock::acquire(instance) {
        Err(DaemonError::AlreadyRunning { instance, pid }) => {
            let pid = pid.map_or_else(|| "PID".to_owned(), |pid| pid.to_string());
            anyhow::bail!(
                "the daemon of instance {instance} does not answer: end it with `kill {pid}`, then unload again"
            );
        }
        result => result?,
    };
    (engine.unload)(instance).map_err(anyhow::Error::from_boxed)?;
    // Left by a daemon that was killed; absent after any other.
    let _ = std::fs::remove_file(instance.socket_path());
    drop(lock);
    Ok(())
}

async fn unload_by_daemon(instance: &Instance) -> Result<(), ClientError> {
    Client::connect(instance).await?.unload().await
}

/// So that `vtep unload && vtep run` works.
fn wait_for_lock(instance: &Instance) -> Result<Lock, DaemonError> {
    let deadline = Instant::now() + END_TIMEOUT;
    loop {
        match Lock::acquire(instance) {
            Err(DaemonError::AlreadyRunning { .. }) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::testing;
    use tempfile::TempDir;

    fn instance(dir: &TempDir) -> Instance {
        Instance::in_dirs("blue", dir.path().join("run"), dir.path().join("bpf")).unwrap()
    }

    fn runtime() -> Runtime {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    }

    /// Unloading removes the pin directory, as far as these tests look.
    const ENGINE: Engine = Engine {
        run: |_, commands| {
            Box::pin(async {
                testing::controller(commands).await;
                Ok(())
            })
        },
        unload: |instance| std::fs::remove_dir(instance.pin_dir()).map_err(Into::into),
    };

    #[test]
    fn a_living_daemon_unloads_itself_and_has_ended_when_the_command_returns() {
        let dir = TempDir::new().unwrap();
        let instance = instance(&dir);
        let serving = {
            let instance = instance.clone();
            std::thread::spawn(move || {
                let options = RunOptions {
                    instance: instance.clone(),
                    config: Config::default(),
                    netns: None,
                };
                runtime().block_on(daemon::serve(&instance, |commands| {
                    (ENGINE.run)(options, commands)
                }))
            })
        };
        let deadline = Instant::now() + END_TIMEOUT;
        while !instance.socket_path().exists() && Instant::now() < deadline {
            std::thread::yield_now();
        }
        // No pin directory: unloading from here would fail.
        unload(&runtime(), &instance, ENGINE).unwrap();
        Lock::acquire(&instance).unwrap();
        assert_eq!(serving.join().unwrap().unwrap(), daemon::End::Unloaded);
    }

    #[test]
    fn without_a_daemon_the_engine_unloads_and_its_error_is_kept() {
        let dir = TempDir::new().unwrap();
        let instance = instance(&dir);
        std::fs::create_dir_all(instance.pin_dir()).unwrap();
        unload_here(&instance, ENGINE).unwrap();
        assert!(!instance.pin_dir().exists());
        let error = unload_here(&instance, ENGINE).unwrap_err();
        assert!(error.to_string().contains("No such file"), "{error}");
    }

    #[test]
    fn a_daemon_that_does_not_answer_is_named_and_nothing_is_unloaded() {
        let dir = TempDir::new().unwrap();
        let instance = instance(&dir);
        std::fs::create_dir_all(instance.pin_dir()).unwrap();
        let lock = Lock::acquire(&instance).unwrap();
        let error = unload_here(&instance, ENGINE).unwrap_err().to_string();
        assert!(
            error.contains(&format!("`kill {}`", std::process::id())),
            "{error}"
        );
        assert!(instance.pin_dir().exists());
        drop(lock);
    }
}
