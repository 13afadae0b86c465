//! Connects the kernel, the model and the data plane: one loop, one thread.
//! Events go into the model, its updates into the maps; requests of the control
//! interface become kernel writes and are answered when the maps follow. Run by
//! `daemon`; decides nothing itself.

mod commands;
mod ports;
mod rows;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use crate::api::types::PortHook;
use crate::api::{ApiError, Command};
use crate::daemon::RunOptions;
use crate::dataplane::{Dataplane, DataplaneError, LogLevel};
use crate::instance::Instance;
use crate::kernel::{Event, IfIndex};
use crate::model::{Model, Settings, Strict};
use crate::netlink::{Events, Netlink, NetlinkError};
use crate::tables::{Capacity, TableUpdate};

use commands::Pending;

/// How often next hops in use are confirmed: below the kernel's gc_stale_time
/// (60 s), so that a neighbour that only XDP uses never looks unused. Filters
/// that change in silence are looked for at the same time.
const CONFIRM_INTERVAL: Duration = Duration::from_secs(25);
/// How often routes in use are looked up again: the kernel tells nobody when it
/// learns the MTU of a path (R31).
const ROUTES_INTERVAL: Duration = Duration::from_secs(2);
/// Less often where this is more, to keep look-ups below 1 % of a CPU.
const ROUTE_PAUSE: Duration = Duration::from_millis(5);
/// TCM_IFINDEX_MAGIC_BLOCK (rtnetlink.h): a tc filter of several devices.
const SHARED_TC_BLOCK: IfIndex = u32::MAX;
/// Refused hooks are tried again after this, then after twice the time, ...
const RETRY_FIRST: Duration = Duration::from_millis(20);
/// ... up to this.
const RETRY_LAST: Duration = Duration::from_secs(60);
/// The eBPF object, or nothing where there was none when this was compiled.
const OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/vtep.o"));

/// Why the daemon cannot work.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    #[error("this vtep was built without its eBPF object: build it with `cargo xtask build`")]
    NoObject,
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
}

/// Mirror the kernel until told to stop. May be dropped at any moment: what is
/// in the maps stays and forwards (R39).
pub async fn run(
    options: RunOptions,
    mut commands: mpsc::Receiver<Command>,
) -> Result<(), ControllerError> {
    let mut controller = Controller::start(options).await?;
    loop {
        let deadline = controller.next_deadline();
        let timer = async {
            match deadline {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            events = controller.events.next() => controller.on_events(events?).await?,
            command = commands.recv() => match command {
                Some(Command::Unload(reply)) => {
                    // Its descriptors would keep alive what is to go.
                    let instance = controller.options.instance.clone();
                    drop(controller);
                    let result =
                        unload(&instance).map_err(|error| ApiError::internal(error.to_string()));
                    // The client may have left; the programs are gone all the same.
                    let _ = reply.send(result);
                    return Ok(());
                }
                Some(command) => controller.on_command(command).await?,
                None => return Ok(()),
            },
            () = timer => controller.on_timer().await?,
        }
        controller.answer_pending();
    }
}

/// Events that are counted for `status` (R40).
#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    overruns: u64,
    resyncs: u64,
    updates: u64,
}

/// When something is to be done without an event. `None`: never; an idle
/// daemon without remotes sleeps.
#[derive(Debug, Default)]
struct Timers {
    confirm: Option<Instant>,
    routes: Option<Instant>,
    epoch: Option<Instant>,
    retry: Option<(Instant, Duration)>,
}

struct Controller {
    options: RunOptions,
    netlink: Netlink,
    events: Events,
    dataplane: Dataplane,
    model: Model,
    counts: Counts,
    ready: bool,
    /// Requests that wait for the maps.
    pending: Vec<Pending>,
    timers: Timers,
    /// Hooks chosen by `port add`, by device name.
    port_choices: BTreeMap<String, PortHook>,
}

impl Controller {
    async fn start(options: RunOptions) -> Result<Self, ControllerError> {
        if OBJECT.is_empty() {
            return Err(ControllerError::NoObject);
        }
        // Before the first dump, so that no change falls between the two.
        let events = Events::open()?;
        let netlink = Netlink::open()?;
        let settings = settings(&options);
        let (dataplane, tables) = Dataplane::open(
            OBJECT,
            &options.instance.pin_dir(),
            settings.capacity,
            LogLevel::Off,
        )?;
        let mut model = Model::new(settings);
        model.adopt(tables);
        let mut controller = Self {
            options,
            netlink,
            events,
            dataplane,
            model,
            counts: Counts::default(),
            ready: false,
            pending: Vec::new(),
            timers: Timers::default(),
            port_choices: BTreeMap::new(),
        };
        controller.load_port_choices();
        controller.dump().await?;
        controller.ready = true;
        info!(
            "ready: {} updates after the first dump",
            controller.counts.updates
        );
        Ok(controller)
    }

    async fn on_events(&mut self, events: Vec<Event>) -> Result<(), ControllerError> {
        let mut lost = false;
        let mut filters = false;
        let mut targets = false;
        let mut tc = BTreeSet::new();
        for event in events {
            match event {
                Event::Overrun => lost = true,
                Event::FiltersChanged => filters = true,
                Event::TargetsChanged => targets = true,
                Event::TcChanged(ifindex) => drop(tc.insert(ifindex)),
                event => self.model.apply(event),
            }
        }
        if lost {
            self.counts.overruns += 1;
            warn!("netlink notifications were lost: reading everything again");
            return self.resync().await;
        }
        if filters {
            let filters = self.netlink.filters().await?;
            self.model.set_filters(filters);
        }
        if targets {
            let targets = self.netlink.redirect_targets().await?;
            self.model.set_redirect_targets(targets);
        }
        let mut hooked = self.model.hooked();
        if !tc.contains(&SHARED_TC_BLOCK) {
            hooked.retain(|ifindex| tc.contains(ifindex));
        }
        self.look_at_tc(hooked);
        self.settle().await
    }

    /// A full dump after the first one.
    async fn resync(&mut self) -> Result<(), ControllerError> {
        self.counts.resyncs += 1;
        self.dump().await
    }

    async fn dump(&mut self) -> Result<(), ControllerError> {
        let snapshot = self.netlink.snapshot().await?;
        self.model.replace(snapshot);
        self.settle().await?;
        // Only now it is known which devices matter.
        self.look_at_tc(self.model.hooked());
        self.settle().await
    }

    /// Who else looks at the frames of these devices with tc (R41)? A device
    /// that cannot be asked is gone or about to go.
    fn look_at_tc(&mut self, devices: Vec<IfIndex>) {
        for ifindex in devices {
            match self.dataplane.foreign_tc(ifindex) {
                Ok(filter) => self.model.set_tc(ifindex, filter),
                Err(error) => debug!("{error}"),
            }
        }
    }

    /// Filters that change without a notification: the switches of br_netfilter,
    /// legacy tables, tcx programs.
    async fn look_at_silent_filters(&mut self) -> Result<(), ControllerError> {
        let filters = self.netlink.filters().await?;
        self.model.set_filters(filters);
        self.look_at_tc(self.model.hooked());
        Ok(())
    }

    /// Bring the maps to what the model wants: resolve next hops, write, tell
    /// the model what was refused, until nothing is left to do.
    async fn settle(&mut self) -> Result<(), ControllerError> {
        loop {
            for query in self.model.wanted_routes() {
                let route = self
                    .netlink
                    .route(query.remote, query.link, query.source)
                    .await?;
                self.model.route(&query, route);
            }
            let updates = self.model.updates(Instant::now());
            if updates.is_empty() {
                break;
            }
            self.write(&updates);
        }
        self.set_timers();
        Ok(())
    }

    fn write(&mut self, updates: &[TableUpdate]) {
        self.counts.updates += updates.len() as u64;
        for update in updates {
            debug!("{update:?}");
        }
        let refused = self.dataplane.apply(updates);
        if refused.is_empty() {
            return;
        }
        for refusal in &refused {
            warn!("{:?}: {}", refusal.update, refusal.reason);
        }
        self.model.refused(refused);
    }

    fn set_timers(&mut self) {
        let now = Instant::now();
        let in_use = !self.model.wanted_neighbours().is_empty();
        match (in_use, self.timers.confirm) {
            // At once, so that an unresolved next hop is asked for.
            (true, None) => self.timers.confirm = Some(now),
            (false, Some(_)) => self.timers.confirm = None,
            _ => {}
        }
        let routes = self.model.routes_in_use();
        self.timers.routes = (routes > 0).then(|| {
            let interval = ROUTES_INTERVAL.max(ROUTE_PAUSE * routes);
            self.timers.routes.unwrap_or(now + interval)
        });
        self.timers.epoch = match (self.model.refresh_interval(), self.timers.epoch) {
            (None, _) => None,
            (Some(interval), Some(at)) => Some(at.min(now + interval)),
            (Some(interval), None) => Some(now + interval),
        };
        if !self.model.has_refused() {
            self.timers.retry = None;
        } else if self.timers.retry.is_none() {
            self.timers.retry = Some((now + RETRY_FIRST, RETRY_FIRST));
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let now = Instant::now();
        let pending = self.pending.iter().map(|p| p.wake_at(now)).min();
        let retry = self.timers.retry.map(|(at, _)| at);
        [
            self.timers.confirm,
            self.timers.routes,
            self.timers.epoch,
            retry,
            pending,
            self.model.wake_at(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    async fn on_timer(&mut self) -> Result<(), ControllerError> {
        let now = Instant::now();
        let due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if due(self.timers.confirm) {
            self.timers.confirm = Some(now + CONFIRM_INTERVAL);
            self.confirm_next_hops().await;
            self.look_at_silent_filters().await?;
        }
        if due(self.timers.routes) {
            self.timers.routes = None;
            self.model.ask_routes();
        }
        if due(self.timers.epoch) {
            self.timers.epoch = None;
            self.refresh_busy().await?;
        }
        if let Some((at, delay)) = self.timers.retry
            && at <= now
        {
            self.model.retry();
            let delay = (delay * 2).min(RETRY_LAST);
            self.timers.retry = Some((now + delay, delay));
        }
        self.settle().await
    }

    /// As traffic through the kernel would do. A next hop that cannot be asked
    /// for now is asked for again next time.
    async fn confirm_next_hops(&self) {
        let next_hops: Vec<(IfIndex, IpAddr)> = self.model.wanted_neighbours();
        for (ifindex, address) in next_hops {
            if let Err(error) = self.netlink.neighbour_use(ifindex, address).await {
                debug!("next hop {address}: {error}");
            }
        }
    }

    /// Entries that XDP kept busy in the last epoch must not age out of the
    /// kernel; then a new epoch begins.
    async fn refresh_busy(&mut self) -> Result<(), ControllerError> {
        let ports = self.dataplane.read_ports()?;
        let entries = self.model.busy(self.dataplane.fdb(), &ports);
        if !entries.is_empty() {
            let refreshed = self.netlink.fdb_refresh(&entries).await?;
            debug!("{refreshed} of {} busy entries refreshed", entries.len());
        }
        self.model.next_epoch();
        Ok(())
    }
}

/// The configuration as the model wants it.
fn settings(options: &RunOptions) -> Settings {
    let config = &options.config;
    let names = |list: &Option<Vec<crate::api::values::IfName>>| {
        list.as_ref()
            .map(|names| names.iter().map(ToString::to_string).collect())
    };
    let daemon = &config.daemon;
    Settings {
        vxlan: names(&config.vxlan),
        uplinks: names(&config.uplinks),
        xdp_mode: config.xdp.mode.into(),
        hooks: config
            .ports
            .iter()
            .map(|(name, port)| (name.to_string(), rows::hook_choice(port.hook)))
            .collect(),
        strict: Strict {
            all: config.strict,
            vnis: config
                .vnis
                .iter()
                .filter_map(|(vni, options)| Some((*vni, options.strict?)))
                .collect(),
        },
        default_ttl: default_ttl(),
        local_ports: local_ports(),
        tcx: Dataplane::has_tcx(),
        capacity: Capacity {
            fdb: daemon.fdb_entries,
            // Each remote and each port has one; the rest is for endpoints.
            locations: (daemon.remotes + daemon.ports) * 4,
            remotes: daemon.remotes,
            segments: daemon.segments,
            // A remote is a peer of each segment that it has entries in.
            peers: daemon.remotes * 4,
            ports: daemon.ports,
        },
    }
}

/// What the kernel writes where neither device nor route name a TTL. Per network
/// namespace; the file shows that of the reading thread.
fn default_ttl() -> u8 {
    std::fs::read_to_string("/proc/sys/net/ipv4/ip_default_ttl")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(64)
}

/// Source ports of the kernel's own driver, first and last.
fn local_ports() -> (u16, u16) {
    let read = || {
        let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?;
        let mut numbers = text.split_whitespace().map(str::parse);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    };
    read().unwrap_or((32768, 60999))
}

/// Detach and unpin everything of an instance, and forget choices made by hand.
pub fn unload(instance: &Instance) -> Result<(), DataplaneError> {
    Dataplane::unload(&instance.pin_dir())?;
    ports::forget_port_choices(instance);
    Ok(())
}
