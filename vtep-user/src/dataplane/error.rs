//! What can go wrong when the data path is opened, read or removed. One line
//! each: the thing, the reason, the next step.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// See the variants; refused single updates are `tables::Refused` instead.
#[derive(Debug, Error)]
pub enum DataplaneError {
    #[error(
        "{path}: not in a BPF file system: mount one (`mount -t bpf bpf /sys/fs/bpf`), and use \
         `--netns NAME` instead of `ip netns exec`, which hides it"
    )]
    NoBpffs { path: PathBuf },

    #[error(
        "{path}: names in a BPF file system must not contain dots: choose another instance name"
    )]
    BadName { path: PathBuf },

    #[error(
        "{path}: pinned by another version of vtep (map layout {found}, this one has {ours}): \
         run `vtep unload` first"
    )]
    OtherLayout {
        path: PathBuf,
        found: String,
        ours: String,
    },

    #[error(
        "{path}: the pinned map has room for {found} entries, {wanted} are configured: \
         configure {found}, or run `vtep unload` first"
    )]
    OtherCapacity {
        path: PathBuf,
        found: u32,
        wanted: u32,
    },

    #[error(
        "{path}: the pinned object is not the map expected here ({found}; expected {wanted}): run `vtep unload` first"
    )]
    OtherShape {
        path: PathBuf,
        found: String,
        wanted: String,
    },

    #[error(
        "the eBPF object does not belong to this vtep ({what}): build both from the same source"
    )]
    OtherObject { what: String },

    #[error(
        "{path}: the devices of this instance (ifindex {ifindexes}) are in another network \
         namespace: name it with `--netns`, or run `vtep unload` first"
    )]
    OtherNamespace { path: PathBuf, ifindexes: String },

    #[error("{path}: not a link of this vtep ({reason}): remove it, or run `vtep unload` first")]
    ForeignLink { path: PathBuf, reason: String },

    #[error("not permitted to {what}: run as root (CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON)")]
    NotPermitted { what: String },

    #[error("loading the eBPF object: {reason}")]
    Load { reason: String },

    #[error("{what}: {source}")]
    Kernel {
        what: String,
        #[source]
        source: io::Error,
    },
}

impl DataplaneError {
    /// A system call failed; `what` names what was being done, with the path or map.
    pub(super) fn kernel(what: impl Into<String>, source: io::Error) -> Self {
        let what = what.into();
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted { what },
            _ => Self::Kernel { what, source },
        }
    }

    /// aya's own errors, shortened to one line; all of it goes to the log.
    pub(super) fn load(error: &(dyn std::error::Error + 'static)) -> Self {
        tracing::debug!("loading the eBPF object: {error:?}");
        let mut reason = error.to_string();
        let mut cause = error.source();
        while let Some(inner) = cause {
            if let Some(io) = inner.downcast_ref::<io::Error>()
                && matches!(io.raw_os_error(), Some(libc::EPERM | libc::EACCES))
                && !reason.contains("Verifier output: \"")
                && reason.lines().count() <= 1
            {
                return Self::NotPermitted {
                    what: format!("load the eBPF object ({reason})"),
                };
            }
            let text = inner.to_string();
            if !reason.contains(&text) {
                reason = format!("{reason}: {text}");
            }
            cause = inner.source();
        }
        Self::Load {
            reason: one_line(&reason),
        }
    }
}

/// First and last line that say something: the verifier puts its reason last.
fn one_line(text: &str) -> String {
    let mut lines = text.lines().map(str::trim).filter(|line| {
        !line.is_empty()
            && !line.starts_with("processed ")
            && !line.starts_with("verification time")
            && !line.starts_with("stack depth")
    });
    let first = lines.next().unwrap_or_default();
    match lines.next_back() {
        Some(last) => format!("{first} ... {last}"),
        None => first.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verifier_log_becomes_one_line_with_its_reason() {
        let log = "the BPF_PROG_LOAD syscall returned EACCES. Verifier output: 0: (b7) r0 = 1\n\
                   1: (95) exit\nR1 invalid mem access\nprocessed 2 insns\n\n";
        let line = one_line(log);
        assert!(line.starts_with("the BPF_PROG_LOAD"), "{line}");
        assert!(line.ends_with("R1 invalid mem access"), "{line}");
    }

    #[test]
    fn missing_privilege_names_the_capabilities() {
        let error = DataplaneError::kernel("pin a map", io::Error::from_raw_os_error(libc::EPERM));
        assert!(error.to_string().contains("CAP_BPF"), "{error}");
    }
}
