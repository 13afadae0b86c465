//! Log lines of the eBPF programs. The level is set when they are loaded, as a
//! constant: a line above it is not even in the loaded program. Whoever runs
//! the event loop polls the descriptor and calls `flush`.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use aya::Ebpf;
use aya_log::EbpfLogger;

use super::DataplaneError;

pub(super) const MAP: &str = "AYA_LOGS";

/// What the programs say, from nothing to everything.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum LogLevel {
    #[default]
    Off = 0,
    Error = 1,
    Warn = 2,
    Info = 3,
    Debug = 4,
    Trace = 5,
}

/// The programs' ring buffer; readable when there is something to flush.
pub struct ProgramLog(EbpfLogger<ToTracing>);

impl ProgramLog {
    /// Before the programs are loaded. `None`: the object has no log lines.
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Option<Self>, DataplaneError> {
        if ebpf.map(MAP).is_none() {
            return Ok(None);
        }
        EbpfLogger::init_with_logger(ebpf, ToTracing)
            .map(|logger| Some(Self(logger)))
            .map_err(|e| DataplaneError::load(&e))
    }

    /// Pass on what is there, to `tracing`, target `vtep_ebpf`.
    pub fn flush(&mut self) {
        self.0.flush();
    }
}

impl AsFd for ProgramLog {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for ProgramLog {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

struct ToTracing;

impl log::Log for ToTracing {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let text = record.args();
        match record.level() {
            log::Level::Error => tracing::error!(target: "vtep_ebpf", "{text}"),
            log::Level::Warn => tracing::warn!(target: "vtep_ebpf", "{text}"),
            log::Level::Info => tracing::info!(target: "vtep_ebpf", "{text}"),
            log::Level::Debug => tracing::debug!(target: "vtep_ebpf", "{text}"),
            log::Level::Trace => tracing::trace!(target: "vtep_ebpf", "{text}"),
        }
    }

    fn flush(&self) {}
}
