//! Connects the kernel, the model and the data plane: one loop, one thread.
//! Events go into the model, its updates into the maps; requests of the control
//! interface become kernel writes and are answered when the maps follow. Run by
//! `daemon`; decides nothing itself.

mod commands;
mod rows;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::time::sleep_until;
use tracing::{debug, info, warn};

use crate::api::Command;
use crate::config::Config;
use crate::dataplane::{Dataplane, DataplaneError};
use crate::instance::Instance;
use crate::kernel::Event;
use crate::model::Model;
use crate::netlink::{Events, Netlink, NetlinkError};
use crate::tables::TableUpdate;

use commands::Pending;

/// How often next hops in use are confirmed: below the kernel's
/// gc_stale_time (60 s), so that a neighbour XDP keeps busy never looks unused.
const CONFIRM_INTERVAL: Duration = Duration::from_secs(25);
/// Refused hooks are tried again after this, twice as long each time.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_LAST: Duration = Duration::from_secs(60);

/// Why the daemon cannot work.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
}

/// Events that are counted for `status` (R40).
#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    overruns: u64,
    resyncs: u64,
    updates: u64,
}

pub struct Controller {
    instance: Instance,
    netns: Option<String>,
    netlink: Netlink,
    events: Events,
    dataplane: Dataplane,
    model: Model,
    counts: Counts,
    ready: bool,
    /// Requests that wait for the maps.
    pending: Vec<Pending>,
    timers: Timers,
}

/// When something is to be done without an event. `None`: never; an idle
/// daemon sleeps.
#[derive(Debug, Default)]
struct Timers {
    confirm: Option<Instant>,
    epoch: Option<Instant>,
    retry: Option<(Instant, Duration)>,
}

impl Timers {
    fn next(&self) -> Option<Instant> {
        [self.confirm, self.epoch, self.retry.map(|(at, _)| at)].into_iter().flatten().min()
    }
}
