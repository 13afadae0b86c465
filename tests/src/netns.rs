//! Named network namespaces, removed when dropped. Commands are started inside
//! with setns, not with `ip netns exec`, which hides the BPF file system.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, bail, ensure};

use crate::complain;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// One host. The name carries our process id, so that leftovers of a killed
/// process can be told.
#[derive(Debug)]
pub struct Netns {
    name: String,
    file: File,
}

impl Netns {
    /// Loopback up, no IPv6 noise, bridged frames not given to iptables (both
    /// are per namespace and on by default).
    pub fn new(role: &str) -> Result<Self> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vt-{}-{number}-{role}", std::process::id());
        execute(Command::new("ip").args(["netns", "add", &name]))?;
        let path = Path::new("/run/netns").join(&name);
        let file = File::open(&path).with_context(|| path.display().to_string())?;
        let this = Self { name, file };
        this.run("ip link set lo up")?;
        this.enter(|| {
            for (key, value) in [
                ("net/ipv6/conf/all/disable_ipv6", "1"),
                ("net/ipv6/conf/default/disable_ipv6", "1"),
                ("net/bridge/bridge-nf-call-iptables", "0"),
                ("net/bridge/bridge-nf-call-ip6tables", "0"),
                ("net/bridge/bridge-nf-call-arptables", "0"),
            ] {
                let path = Path::new("/proc/sys").join(key);
                // Not every kernel has br_netfilter.
                if path.exists() {
                    std::fs::write(&path, value).with_context(|| path.display().to_string())?;
                }
            }
            Ok(())
        })?;
        Ok(this)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// Run `work` in a thread inside the namespace.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                self.enter_thread()?;
                work()
            });
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Move the calling thread into the namespace, for good.
    pub fn enter_thread(&self) -> Result<()> {
        setns(self.file.as_raw_fd()).with_context(|| format!("enter {}", self.name))
    }

    /// A command that will run inside.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let fd = self.file.as_raw_fd();
        // SAFETY: setns is async-signal-safe; the descriptor is open until the command has started,
        // because it borrows nothing but lives in `self`, which callers keep.
        unsafe { command.pre_exec(move || setns(fd)) };
        command.stdin(Stdio::null());
        command
    }

    /// Run a line of words inside; the error carries the line and what it said.
    pub fn run(&self, line: &str) -> Result<String> {
        let mut words = line.split_whitespace();
        let mut command = self.command(words.next().context("empty command")?);
        let output = execute(command.args(words)).with_context(|| self.name.clone())?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Several lines.
    pub fn run_all(&self, lines: &str) -> Result<()> {
        lines
            .lines()
            .map(str::trim)
            .filter(|l| !l.is_empty())
            .try_for_each(|l| self.run(l).map(drop))
    }

    pub fn ifindex(&self, device: &str) -> Result<u32> {
        let name = std::ffi::CString::new(device)?;
        self.enter(move || {
            // SAFETY: a valid C string.
            let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
            ensure!(index != 0, "no device {name:?}");
            Ok(index)
        })
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if let Err(error) = execute(Command::new("ip").args(["netns", "del", &self.name])) {
            complain(&format!("namespace {} is left: {error:#}", self.name));
        }
    }
}

fn setns(fd: libc::c_int) -> std::io::Result<()> {
    // SAFETY: changes the calling thread's namespace only.
    match unsafe { libc::setns(fd, libc::CLONE_NEWNET) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Run to the end; the error carries the command line and its stderr.
pub fn execute(command: &mut Command) -> Result<Output> {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let line = words
        .map(|w| w.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ");
    let output = command
        .output()
        .with_context(|| format!("cannot start `{line}`"))?;
    if !output.status.success() {
        bail!(
            "`{line}`: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(output)
}
