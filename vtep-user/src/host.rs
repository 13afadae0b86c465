//! What this host gives us, checked before anything is touched: kernel,
//! capabilities, network namespace. Called by `cli`.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use crate::instance::reason;

/// First kernel with everything the programs use.
const KERNEL_MIN: (u32, u32) = (5, 15);

/// Bits of `CapEff` (include/uapi/linux/capability.h).
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;

/// What is missing.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error("kernel {0} is too old: vtep needs {major}.{minor} or newer", major = KERNEL_MIN.0, minor = KERNEL_MIN.1)]
    Kernel(String),
    #[error("missing {0}: run vtep as root")]
    Capabilities(String),
    #[error("cannot read {}: {}", path.display(), reason(source))]
    Read { path: PathBuf, source: io::Error },
    #[error(
        "network namespace {name} does not exist ({}: {}): `ip netns` lists them",
        path.display(), reason(source)
    )]
    NoNetns {
        name: String,
        path: PathBuf,
        source: io::Error,
    },
    #[error("cannot enter network namespace {name} ({}: {}): {hint}", path.display(), reason(source))]
    Netns {
        name: String,
        path: PathBuf,
        source: io::Error,
        hint: &'static str,
    },
}

fn read(path: &str) -> Result<String, HostError> {
    std::fs::read_to_string(path).map_err(|source| HostError::Read {
        path: path.into(),
        source,
    })
}

/// Release of the running kernel, as `uname -r` prints it.
pub fn kernel_release() -> Result<String, HostError> {
    Ok(read("/proc/sys/kernel/osrelease")?.trim().to_owned())
}

/// Whether this process may load and unload programs on this kernel.
pub fn check() -> Result<(), HostError> {
    check_capabilities(&read("/proc/self/status")?)?;
    check_kernel(&kernel_release()?)
}

fn check_kernel(release: &str) -> Result<(), HostError> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= KERNEL_MIN => Ok(()),
        _ => Err(HostError::Kernel(release.to_owned())),
    }
}

/// `status` is the text of `/proc/self/status`.
fn check_capabilities(status: &str) -> Result<(), HostError> {
    let bits = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    let has = |bit: u32| bits & (1 << bit) != 0;
    // CAP_SYS_ADMIN includes the newer, narrower two.
    let missing: Vec<&str> = [
        ("CAP_NET_ADMIN", has(CAP_NET_ADMIN)),
        ("CAP_BPF", has(CAP_BPF) || has(CAP_SYS_ADMIN)),
        ("CAP_PERFMON", has(CAP_PERFMON) || has(CAP_SYS_ADMIN)),
    ]
    .iter()
    .filter_map(|(name, held)| (!held).then_some(*name))
    .collect();
    if missing.is_empty() {
        Ok(())
    } else {
        Err(HostError::Capabilities(missing.join(", ")))
    }
}

/// Move the calling thread into a network namespace, given by its name under
/// `/run/netns` or by a path. Has to happen before any other thread exists:
/// threads inherit the namespace, they do not share it. The mounts stay, so
/// `/sys/fs/bpf` remains visible and `/sys/class/net` remains the old one.
pub fn enter_netns(name: &str) -> Result<(), HostError> {
    let path = netns_path(name);
    let file = File::open(&path).map_err(|source| {
        let (name, path) = (name.to_owned(), path.clone());
        if source.kind() == io::ErrorKind::NotFound {
            HostError::NoNetns { name, path, source }
        } else {
            HostError::Netns {
                name,
                path,
                source,
                hint: "run as root",
            }
        }
    })?;
    // SAFETY: setns takes a descriptor that is open during the call, and no memory.
    if unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) } == 0 {
        return Ok(());
    }
    let source = io::Error::last_os_error();
    let hint = match source.raw_os_error() {
        Some(libc::EINVAL) => "it is no network namespace; `ip netns` lists them",
        _ => "run as root",
    };
    Err(HostError::Netns {
        name: name.to_owned(),
        path,
        source,
        hint,
    })
}

fn netns_path(name: &str) -> PathBuf {
    if name.contains('/') {
        name.into()
    } else {
        Path::new("/run/netns").join(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_before_5_15_are_too_old() {
        for good in ["5.15.0-91-generic", "5.15", "6.1.0", "6.18.5+", "10.0-rc1"] {
            assert!(check_kernel(good).is_ok(), "{good}");
        }
        for bad in ["5.14.21", "5.9.0", "4.19.0", "", "unknown"] {
            let error = check_kernel(bad).unwrap_err().to_string();
            assert_eq!(
                error,
                format!("kernel {bad} is too old: vtep needs 5.15 or newer")
            );
        }
        check_kernel(&kernel_release().unwrap()).unwrap();
    }

    #[test]
    fn missing_capabilities_are_named() {
        let status = |bits: &str| format!("Name:\tvtep\nCapEff:\t{bits}\nCapBnd:\t0\n");
        assert!(check_capabilities(&status("000001ffffffffff")).is_ok());
        // NET_ADMIN and SYS_ADMIN; NET_ADMIN, BPF and PERFMON.
        assert!(check_capabilities(&status("0000000000201000")).is_ok());
        assert!(check_capabilities(&status("000000c000001000")).is_ok());
        let error = check_capabilities(&status("0")).unwrap_err().to_string();
        assert_eq!(
            error,
            "missing CAP_NET_ADMIN, CAP_BPF, CAP_PERFMON: run vtep as root"
        );
        let error = check_capabilities(&status("0000008000001000"))
            .unwrap_err()
            .to_string();
        assert_eq!(error, "missing CAP_PERFMON: run vtep as root");
        assert!(check_capabilities("").is_err());
    }

    #[test]
    fn a_namespace_is_a_name_or_a_path() {
        assert_eq!(netns_path("blue"), Path::new("/run/netns/blue"));
        assert_eq!(netns_path("/proc/1/ns/net"), Path::new("/proc/1/ns/net"));
        let error = enter_netns("vtep-none").unwrap_err().to_string();
        assert!(
            error.starts_with("network namespace vtep-none does not exist"),
            "{error}"
        );
        assert!(
            error.contains("/run/netns/vtep-none: No such file"),
            "{error}"
        );
        let error = enter_netns("/dev/null").unwrap_err().to_string();
        assert!(
            error.starts_with("cannot enter network namespace /dev/null"),
            "{error}"
        );
    }

    #[test]
    fn enters_the_namespace_of_another_thread_and_only_with_this_one() {
        use std::sync::mpsc::channel;
        use std::thread;

        let here = || std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let (tell, told) = channel();
        let (stop, stopped) = channel::<()>();
        let other = thread::spawn(move || {
            // SAFETY: unshare takes no memory; only this thread moves.
            let made = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0;
            let thread = std::fs::read_link("/proc/thread-self").unwrap();
            tell.send(made.then(|| (Path::new("/proc").join(thread).join("ns/net"), here())))
                .unwrap();
            // Ends when the test drops its side.
            let _ = stopped.recv();
        });
        if let Some((path, namespace)) = told.recv().unwrap() {
            let before = here();
            let path = path.to_str().unwrap().to_owned();
            let entered = thread::spawn(move || enter_netns(&path).map(|()| here()));
            assert_eq!(entered.join().unwrap().unwrap(), namespace);
            assert_eq!(here(), before);
            assert_ne!(before, namespace);
        } else {
            assert!(
                !std::env::var("VTEP_TESTS_REQUIRE").is_ok_and(|what| what.contains("root")),
                "needs root"
            );
            eprintln!("SKIPPED: making a network namespace needs root");
        }
        drop(stop);
        other.join().unwrap();
    }
}
