//! What can go wrong when talking to the kernel, with the facts a user needs:
//! what was tried, on which object, the error number, and the kernel's own
//! explanation (extended acknowledgement) where it gave one.

use std::ffi::CStr;
use std::fmt;
use std::io;

use crate::instance::reason;
use crate::kernel::IfIndex;

/// A request or notification socket failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The kernel answered with an error.
    #[error("cannot {operation} {object}: {}{explanation}", reason(source))]
    Refused {
        /// Verb, for example "create".
        operation: &'static str,
        /// For example "vxlan device vx100".
        object: String,
        source: io::Error,
        explanation: Explanation,
    },
    /// The socket itself failed: the kernel's opinion is not known.
    #[error("cannot {operation} {object}: netlink socket: {}", reason(source))]
    Socket {
        operation: &'static str,
        object: String,
        source: io::Error,
    },
}

impl NetlinkError {
    /// The kernel's error number, for callers that treat some of them as an
    /// answer (EEXIST, ENOENT, ENODEV).
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused { source, .. } | Self::Socket { source, .. } => source.raw_os_error(),
        }
    }
}

/// The kernel's NLMSGERR_ATTR_MSG text, printed as ": text", or nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Explanation(pub Option<String>);

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(text) => write!(f, ": {text}"),
            None => Ok(()),
        }
    }
}

/// A device for people: its name in this thread's network namespace, or its
/// number where there is none.
pub(super) fn device(ifindex: IfIndex) -> String {
    let mut name = [0; libc::IF_NAMESIZE];
    // SAFETY: `name` has the size if_indextoname may write, with its final zero.
    let found = unsafe { libc::if_indextoname(ifindex, name.as_mut_ptr()) };
    if found.is_null() {
        return format!("link {ifindex}");
    }
    let name = name.map(|c| c as u8);
    CStr::from_bytes_until_nul(&name).map_or_else(
        |_| format!("link {ifindex}"),
        |name| name.to_string_lossy().into_owned(),
    )
}

/// A failure before it is known what it was for.
#[derive(Debug)]
pub(super) enum Failure {
    Socket(io::Error),
    Refused(io::Error, Explanation),
}

impl Failure {
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Socket(_) => None,
            Self::Refused(error, _) => error.raw_os_error(),
        }
    }

    /// An error that the kernel's answer amounts to.
    pub fn refused(errno: i32) -> Self {
        Self::Refused(io::Error::from_raw_os_error(errno), Explanation::default())
    }

    pub fn during(self, operation: &'static str, object: impl Into<String>) -> NetlinkError {
        let object = object.into();
        match self {
            Self::Socket(source) => NetlinkError::Socket {
                operation,
                object,
                source,
            },
            Self::Refused(source, explanation) => NetlinkError::Refused {
                operation,
                object,
                source,
                explanation,
            },
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Socket(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named() {
        assert_eq!(device(1), "lo");
        assert_eq!(device(u32::MAX), "link 4294967295");
    }

    #[test]
    fn a_refusal_reads_as_one_line_with_object_reason_and_explanation() {
        let refusal = |text: Option<&str>| {
            Failure::Refused(
                io::Error::from_raw_os_error(libc::EEXIST),
                Explanation(text.map(str::to_owned)),
            )
            .during("create", "vxlan device vx100")
        };
        assert_eq!(
            refusal(None).to_string(),
            "cannot create vxlan device vx100: File exists"
        );
        let told = refusal(Some("A VXLAN device with the specified VNI already exists"));
        assert_eq!(
            told.to_string(),
            "cannot create vxlan device vx100: File exists: \
             A VXLAN device with the specified VNI already exists"
        );
        assert_eq!(told.errno(), Some(libc::EEXIST));
    }
}
