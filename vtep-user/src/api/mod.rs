//! The control interface: what may be asked of a running daemon, as types
//! (`types`, `values`), as commands to the controller (`command`), as HTTP over
//! a Unix socket (`server`, `client`) and as Prometheus text (`metrics`).
//! It decides nothing and touches no kernel state.

pub mod client;
pub mod command;
pub mod metrics;
pub mod server;
pub mod types;
pub mod values;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use client::{Client, ClientError};
pub use command::{ApiError, Command, Commands, ErrorKind, Reply};
