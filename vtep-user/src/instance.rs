//! An instance: the name under which one daemon, its control socket, its lock
//! and its pinned programs and maps belong together. Names and checks only;
//! `daemon` opens, `dataplane` pins.

use std::ffi::CString;
use std::fmt;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Control sockets and locks.
const RUN_DIR: &str = "/run/vtep";
/// Where the kernel expects the BPF file system.
const BPF_DIR: &str = "/sys/fs/bpf";

/// `f_type` of a BPF file system (include/uapi/linux/magic.h).
const BPF_FS_MAGIC: u32 = 0xcafe_4a11;

/// Name and places of one daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    name: String,
    run_dir: PathBuf,
    bpf_dir: PathBuf,
}

/// A text that names no instance.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an instance name: 1 to 64 of the characters A-Z a-z 0-9 _ -")]
pub struct NameError(String);

/// Why nothing can be pinned.
#[derive(Debug, thiserror::Error)]
pub enum BpfFsError {
    #[error(
        "{} is not a BPF file system: mount it with `mount -t bpf bpf {}`, or, \
         instead of `ip netns exec` (which hides it), use the option --netns",
        .0.display(), .0.display()
    )]
    Missing(PathBuf),
    #[error("cannot look at {}: {}", path.display(), reason(source))]
    Io { path: PathBuf, source: io::Error },
}

impl Instance {
    /// Name where none is given.
    pub const DEFAULT: &'static str = "default";

    /// The instance in other places than the usual ones, for tests.
    pub fn in_dirs(
        name: &str,
        run_dir: impl Into<PathBuf>,
        bpf_dir: impl Into<PathBuf>,
    ) -> Result<Self, NameError> {
        let good = (1..=64).contains(&name.len())
            && name
                .bytes()
                .all(|c| c.is_ascii_alphanumeric() || b"_-".contains(&c));
        if !good {
            return Err(NameError(name.to_owned()));
        }
        Ok(Self {
            name: name.to_owned(),
            run_dir: run_dir.into(),
            bpf_dir: bpf_dir.into(),
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Directory of socket and lock.
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// Control socket.
    pub fn socket_path(&self) -> PathBuf {
        self.run_dir.join(format!("{}.sock", self.name))
    }

    /// Locked for the daemon's life; holds its process id as text.
    pub fn lock_path(&self) -> PathBuf {
        self.run_dir.join(format!("{}.lock", self.name))
    }

    /// Where everything of this instance is pinned.
    pub fn pin_dir(&self) -> PathBuf {
        self.bpf_dir.join("vtep").join(&self.name)
    }

    /// Whether pinning can work.
    pub fn check_bpffs(&self) -> Result<(), BpfFsError> {
        let path = self.bpf_dir.clone();
        match file_system(&path) {
            Ok(BPF_FS_MAGIC) => Ok(()),
            Ok(_) => Err(BpfFsError::Missing(path)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(BpfFsError::Missing(path)),
            Err(source) => Err(BpfFsError::Io { path, source }),
        }
    }
}

impl FromStr for Instance {
    type Err = NameError;

    fn from_str(name: &str) -> Result<Self, NameError> {
        Self::in_dirs(name, RUN_DIR, BPF_DIR)
    }
}

impl fmt::Display for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// Magic number of the file system that holds `path`.
fn file_system(path: &Path) -> io::Result<u32> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut buffer = std::mem::MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the path is a C string, and the buffer is as large as statfs writes.
    let result = unsafe { libc::statfs(path.as_ptr(), buffer.as_mut_ptr()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: statfs succeeded and all of it is plain integers, zeroed before.
    let buffer = unsafe { buffer.assume_init() };
    // The field's type differs between architectures; the magic has 32 bits.
    Ok(buffer.f_type as u32)
}

/// The reason of an I/O error without Rust's "(os error N)".
pub fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error ") {
        Some((reason, _)) => reason.to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_the_directory_are_refused() {
        for good in ["default", "a", "host1-lab_2-x", &"x".repeat(64)] {
            assert_eq!(good.parse::<Instance>().unwrap().name(), good);
        }
        for bad in [
            "",
            // The BPF file system takes no dots.
            "a.b",
            ".",
            "..",
            "...",
            "a/b",
            "../x",
            "a b",
            "ü",
            "a\0",
            &"x".repeat(65),
        ] {
            let error = bad.parse::<Instance>().unwrap_err().to_string();
            assert!(error.contains("is not an instance name"), "{error}");
        }
    }

    #[test]
    fn paths_follow_the_name() {
        let instance: Instance = "blue".parse().unwrap();
        assert_eq!(instance.socket_path(), Path::new("/run/vtep/blue.sock"));
        assert_eq!(instance.lock_path(), Path::new("/run/vtep/blue.lock"));
        assert_eq!(instance.pin_dir(), Path::new("/sys/fs/bpf/vtep/blue"));
    }

    #[test]
    fn a_directory_without_bpf_file_system_is_named_with_both_cures() {
        for dir in ["/proc", "/nonexistent"] {
            let instance = Instance::in_dirs("x", "/run/vtep", dir).unwrap();
            let error = instance.check_bpffs().unwrap_err().to_string();
            assert!(
                error.contains(&format!("mount -t bpf bpf {dir}")),
                "{error}"
            );
            assert!(error.contains("--netns"), "{error}");
        }
    }
}
