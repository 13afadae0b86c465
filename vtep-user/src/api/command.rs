//! The seam between the control interface and the controller: one enum of
//! commands, each with a typed reply. The server sends, the controller receives
//! and answers when the kernel and the maps hold what was asked for.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use vtep_common::Vni;

use super::types::{
    FdbFilter, FdbRow, FdbSpec, PortSpec, PortStatus, RemoteRow, ResyncReport, Stats, Status,
    VniRow, VniSpec, WriteMode,
};
use super::values::{IfName, StationMac};

/// Where an answer goes. Sending fails when the client has left: ignore that.
pub type Reply<T> = oneshot::Sender<Result<T, ApiError>>;

/// One request to the controller.
#[derive(Debug)]
pub enum Command {
    Status(Reply<Status>),
    /// Make bridge and VXLAN device. `Conflict`: one of them exists and differs.
    VniAdd(VniSpec, Reply<()>),
    /// Remove what `VniAdd` made.
    VniDel(Vni, Reply<()>),
    VniShow(Reply<Vec<VniRow>>),
    /// Make a device a port of the segment's bridge.
    PortAdd(PortSpec, Reply<()>),
    PortDel(IfName, Reply<()>),
    PortShow(Reply<Vec<PortStatus>>),
    FdbShow(FdbFilter, Reply<Vec<FdbRow>>),
    /// Write the kernel's FDB; answered when the maps hold the entry.
    FdbWrite(FdbSpec, WriteMode, Reply<()>),
    FdbDel(Vni, StationMac, Reply<()>),
    RemoteShow(Reply<Vec<RemoteRow>>),
    Stats(Reply<Stats>),
    /// Full dump now; answered when it is applied.
    Resync(Reply<ResyncReport>),
    /// Detach and unpin everything; the controller ends after its answer.
    Unload(Reply<()>),
}

/// What kind of failure; decides the HTTP status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    BadRequest,
    NotFound,
    Conflict,
    Unsupported,
    Timeout,
    Internal,
}

impl ErrorKind {
    const HTTP: [(Self, u16); 6] = [
        (Self::BadRequest, 400),
        (Self::NotFound, 404),
        (Self::Conflict, 409),
        (Self::Internal, 500),
        (Self::Unsupported, 501),
        (Self::Timeout, 504),
    ];

    /// Status code of the HTTP answer.
    pub fn http_status(self) -> u16 {
        let found = Self::HTTP.iter().find(|(kind, _)| *kind == self);
        found.map_or(500, |(_, status)| *status)
    }

    /// Inverse of [`ErrorKind::http_status`]; foreign codes are `Internal`.
    pub fn from_http_status(status: u16) -> Self {
        let found = Self::HTTP.iter().find(|(_, code)| *code == status);
        found.map_or(Self::Internal, |(kind, _)| *kind)
    }
}

/// Why a command was not carried out: one line that names the thing, the
/// reason and the next step.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    pub kind: ErrorKind,
    pub message: String,
}

impl ApiError {
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    /// The request itself is wrong.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::BadRequest, message)
    }

    /// It names something that does not exist.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, message)
    }

    /// Something that exists is in the way.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Conflict, message)
    }

    /// Right, but not possible with this program or this kernel.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, message)
    }

    /// Not finished in time; it may still happen.
    pub fn timeout(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Timeout, message)
    }

    /// Not the caller's fault.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, message)
    }
}

/// The sending side, as the server holds it.
#[derive(Debug, Clone)]
pub struct Commands {
    queue: mpsc::Sender<Command>,
    timeout: Duration,
}

impl Commands {
    /// Commands that wait while the controller is busy; more clients wait too.
    const QUEUE: usize = 64;
    /// Time for one command, waiting included.
    const TIMEOUT: Duration = Duration::from_secs(10);

    /// Both ends.
    pub fn channel() -> (Self, mpsc::Receiver<Command>) {
        Self::channel_with_timeout(Self::TIMEOUT)
    }

    pub fn channel_with_timeout(timeout: Duration) -> (Self, mpsc::Receiver<Command>) {
        let (queue, receiver) = mpsc::channel(Self::QUEUE);
        (Self { queue, timeout }, receiver)
    }

    /// Ask and wait for the answer: `commands.ask(Command::Status)`, or with
    /// arguments `commands.ask(|reply| Command::VniDel(vni, reply))`.
    /// `Timeout` when there is none in time, `Internal` when the controller is gone.
    pub async fn ask<T>(&self, make: impl FnOnce(Reply<T>) -> Command) -> Result<T, ApiError> {
        let (reply, answer) = oneshot::channel();
        let gone = || ApiError::internal("the controller has stopped: see the daemon's log");
        let exchange = async {
            self.queue.send(make(reply)).await.map_err(|_| gone())?;
            answer.await.map_err(|_| gone())?
        };
        match tokio::time::timeout(self.timeout, exchange).await {
            Ok(result) => result,
            Err(_) => Err(ApiError::timeout(format!(
                "the daemon did not finish within {} s: see its log and `vtep status`",
                self.timeout.as_secs_f32()
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_own_status_code() {
        for (kind, status) in ErrorKind::HTTP {
            assert_eq!(kind.http_status(), status);
            assert_eq!(ErrorKind::from_http_status(status), kind);
        }
        assert_eq!(ErrorKind::from_http_status(418), ErrorKind::Internal);
    }

    #[tokio::test]
    async fn a_controller_that_is_gone_or_slow_is_an_error() {
        let (commands, receiver) = Commands::channel_with_timeout(Duration::from_millis(20));
        let error = commands.ask(Command::Status).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Timeout);
        drop(receiver);
        let error = commands.ask(Command::Status).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Internal);
    }
}
