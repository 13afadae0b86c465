//! Decides what the BPF maps have to say: kernel state in (`kernel::Event`),
//! `Vec<TableUpdate>` out. Pure: no I/O, no clock, no async, no panics. The
//! controller calls it; what to do is in `segments`, `ports`, `fdb`, `remotes`,
//! what is done is kept in `Applied`.
//! Rule: what the fast path cannot handle completely is left to the kernel.

mod adopt;
mod ageing;
mod emit;
mod fdb;
mod header;
mod locations;
mod peers;
mod ports;
mod refusals;
mod remotes;
mod segments;
mod view;
mod world;

#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::time::Instant;

use vtep_common::fdb::Value;
use vtep_common::layout::{
    Config, FdbKey, PeerKey, Port, PortKey, Segment as SegmentValue, SegmentId, VniKey,
};
use vtep_common::{MacAddr, Vni};

use crate::kernel::{Event, Filters, IfIndex, Link, Route, Snapshot};
use crate::tables::{Capacity, Hook, Program, TableUpdate, XdpMode};

pub use ageing::SHORTEST_INTERVAL;
pub use peers::Strict;
pub use ports::overhead_bytes;
pub use remotes::RouteQuery;
pub use view::{Counters, FdbRow, PortRow, RemoteRow, RowOwner, RowPlace, SegmentRow, UplinkRow};

use locations::Locations;
use ports::{Member, PortPlan, Uplink};
use refusals::Refusals;
use remotes::{Routes, Slots, Ways};
use segments::{Ids, Segment, Segments, Shortage};
use world::{Domain, Touched, Tunnel, World};

/// Why something is left to the kernel, for people: a sentence without its
/// subject ("not in a bridge").
pub type Reason = Cow<'static, str>;

/// What the user wants at a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HookChoice {
    /// XDP where the owner is known to send plain frames, else tcx.
    #[default]
    Auto,
    Xdp,
    Tcx,
    Kernel,
}

/// What the model is told once.
#[derive(Debug, Clone)]
pub struct Settings {
    /// VXLAN devices to accelerate; `None`: all.
    pub vxlan: Option<BTreeSet<String>>,
    /// Underlay devices; `None`: those that remotes are reached by.
    pub uplinks: Option<BTreeSet<String>>,
    pub xdp_mode: XdpMode,
    /// By interface name; `Auto` for those not listed.
    pub hooks: BTreeMap<String, HookChoice>,
    pub strict: Strict,
    /// net.ipv4.ip_default_ttl.
    pub default_ttl: u8,
    /// net.ipv4.ip_local_port_range: first and last.
    pub local_ports: (u16, u16),
    /// Whether the kernel has tcx.
    pub tcx: bool,
    pub capacity: Capacity,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            vxlan: None,
            uplinks: None,
            xdp_mode: XdpMode::Native,
            hooks: BTreeMap::new(),
            strict: Strict::default(),
            default_ttl: 64,
            local_ports: (32768, 60999),
            tcx: true,
            capacity: Capacity::default(),
        }
    }
}

/// An FDB entry as it is in the map.
#[derive(Debug, Clone, Copy)]
struct Applied {
    location: u32,
    /// Writes of this entry since it came into the map.
    generation: u32,
    flags: u8,
}

/// All that was given out as updates and not refused: the content of the maps.
#[derive(Debug, Default)]
struct Written {
    config: Option<Config>,
    targets: BTreeSet<IfIndex>,
    peers: BTreeSet<PeerKey>,
    segments: BTreeMap<VniKey, SegmentValue>,
    ports: BTreeMap<PortKey, Port>,
    hooks: BTreeMap<IfIndex, (Program, Hook)>,
    fdb: BTreeMap<SegmentId, HashMap<MacAddr, Applied>>,
    /// Entries in all of `fdb`.
    fdb_entries: u32,
}

/// What has to be thought about at the next [`Model::updates`].
#[derive(Debug, Default)]
struct Dirty {
    /// Segments and ports.
    structure: bool,
    /// Uplinks, remotes, and what locations say.
    places: bool,
    /// Values that depend on MTUs and first MACs.
    values: bool,
    /// Whole forwarding tables.
    domains: BTreeSet<Domain>,
    /// Single forwarding entries.
    entries: Vec<Touched>,
    /// Marks of the API whose entries may be gone.
    api: bool,
    /// Devices that went away; another may have come under the same number.
    gone: BTreeSet<IfIndex>,
}

/// FDB entries that are wanted and could not be written as such.
#[derive(Debug, Default)]
struct Waiting {
    /// Not in the map: it is full.
    room: BTreeSet<FdbKey>,
    /// In the map as "kernel": no location was free.
    location: BTreeSet<FdbKey>,
    /// The kernel said "full" before our own count did.
    refused: bool,
}

#[derive(Debug)]
pub struct Model {
    settings: Settings,
    world: World,
    segments: Segments,
    ids: Ids,
    /// Accelerated segments by what their forwarding table is.
    domains: HashMap<Domain, Tunnel>,
    /// The same by number.
    by_id: HashMap<SegmentId, Tunnel>,
    ports: BTreeMap<Member, PortPlan>,
    uplinks: BTreeMap<IfIndex, Uplink>,
    routes: Routes,
    ways: Ways,
    /// Next hops of all ways.
    hops: BTreeSet<(IfIndex, IpAddr)>,
    locations: Locations,
    slots: Slots,
    written: Written,
    refusals: Refusals,
    waiting: Waiting,
    shortage: Shortage,
    /// Entries made through the API.
    api: HashSet<(Vni, MacAddr)>,
    epoch: u8,
    /// The data plane's: handed back as it came.
    fdb_mask: u32,
    dirty: Dirty,
    /// Refused removals that `retry` wants to see again.
    repeat: Vec<(TableUpdate, Reason)>,
    /// Locations of an earlier run have to be recognised first.
    adopting: bool,
    overruns: u64,
    map_full: u64,
}

impl Model {
    pub fn new(settings: Settings) -> Self {
        let capacity = settings.capacity;
        Self {
            settings,
            world: World::default(),
            segments: Segments::new(),
            ids: Ids::new(capacity.segments),
            domains: HashMap::new(),
            by_id: HashMap::new(),
            ports: BTreeMap::new(),
            uplinks: BTreeMap::new(),
            routes: Routes::default(),
            ways: Ways::new(),
            hops: BTreeSet::new(),
            locations: Locations::new(capacity.locations.min(Value::LOCATION_MAX + 1)),
            slots: Slots::new(capacity.remotes),
            written: Written::default(),
            refusals: Refusals::default(),
            waiting: Waiting::default(),
            shortage: Shortage::default(),
            api: HashSet::new(),
            epoch: 0,
            fdb_mask: 0,
            dirty: Dirty {
                structure: true,
                ..Dirty::default()
            },
            repeat: Vec::new(),
            adopting: false,
            overruns: 0,
            map_full: 0,
        }
    }

    /// Take in a full dump: at the start, after an overrun, at a resync.
    pub fn replace(&mut self, snapshot: Snapshot) {
        let mut old = std::mem::replace(&mut self.world, World::from_snapshot(snapshot));
        self.world.tc = std::mem::take(&mut old.tc);
        let links = &self.world.links;
        self.world
            .tc
            .retain(|ifindex, _| links.contains_key(ifindex));
        for (ifindex, link) in &old.links {
            match self.world.links.get(ifindex) {
                Some(new) if new.name == link.name && new.mac == link.mac => {
                    if new != link {
                        self.refusals.forget(new);
                    }
                }
                other => {
                    // Another device, or none, has this number now.
                    self.dirty.gone.insert(*ifindex);
                    self.refusals.forget(other.unwrap_or(link));
                }
            }
        }
        let tables = old.bridges.keys().chain(self.world.bridges.keys());
        self.dirty.domains.extend(tables.copied());
        self.dirty.domains.extend(self.domains.keys());
        self.dirty.structure = true;
        self.dirty.api = true;
        self.routes.ask_all();
    }

    /// Take in one notification. Cheap: the thinking is done by `updates`.
    pub fn apply(&mut self, event: Event) {
        match event {
            Event::Link(link) => self.apply_link(link),
            Event::LinkGone(ifindex) => {
                self.dirty.gone.insert(ifindex);
                if let Some(link) = self.world.remove_link(ifindex) {
                    self.refusals.forget(&link);
                    let bridge = link.master.unwrap_or(ifindex);
                    let lost = self.domains.keys().filter(|domain| domain.bridge == bridge);
                    self.dirty.domains.extend(lost);
                    self.dirty.structure = true;
                    self.ask_routes_if_underlay(&link);
                }
            }
            Event::Fdb(entry) => {
                self.dirty.structure |= self.world.note_family(&entry);
                self.dirty.entries.extend(self.world.set_fdb(&entry));
            }
            Event::FdbGone(entry) => {
                if let Some(touched) = self.world.remove_fdb(&entry) {
                    self.forget_api_mark(touched);
                    self.dirty.entries.push(touched);
                }
            }
            Event::Neighbour(neighbour) => {
                let changed = self.world.set_neighbour(&neighbour);
                self.dirty.places |= changed.is_some_and(|hop| self.hops.contains(&hop));
            }
            Event::NeighbourGone(neighbour) => {
                let changed = self.world.remove_neighbour(&neighbour);
                self.dirty.places |= changed.is_some_and(|hop| self.hops.contains(&hop));
            }
            Event::Address(address) => {
                if self.world.add_address(&address) {
                    self.dirty.structure = true;
                    self.routes.ask_all();
                }
            }
            Event::AddressGone(address) => {
                if self.world.remove_address(&address) {
                    self.dirty.structure = true;
                    self.routes.ask_all();
                }
            }
            Event::RoutesChanged => self.routes.ask_all(),
            Event::Vlans(ifindex, vlans) => {
                let old = self.world.vlans.insert(ifindex, vlans);
                self.dirty.structure |= old.as_ref() != self.world.vlans.get(&ifindex);
            }
            Event::Vnis(ifindex, vnis) => {
                let old = self.world.vnis.insert(ifindex, vnis);
                self.dirty.structure |= old.as_ref() != self.world.vnis.get(&ifindex);
            }
            // The controller looks, for `set_filters`, `set_redirect_targets`, `set_tc`.
            Event::FiltersChanged | Event::TargetsChanged | Event::TcChanged(_) => {}
            Event::Overrun => self.overruns += 1,
        }
    }

    fn apply_link(&mut self, link: Link) {
        let Some(old) = self.world.links.get(&link.ifindex) else {
            self.dirty.structure = true;
            self.ask_routes_if_underlay(&link);
            self.world.links.insert(link.ifindex, link);
            return;
        };
        if *old == link {
            return;
        }
        self.refusals.forget(old);
        // The kernel drops IPv4 routes of a device that goes down without a
        // notification (fib_frontend.c, fib_disable_ip).
        let moved = old.master != link.master;
        if (old.up, old.mtu) != (link.up, link.mtu) {
            self.ask_routes_if_underlay(&link);
        }
        // The VLANs of a port are those of its bridge; the new ones are told next.
        if moved {
            self.world.vlans.remove(&link.ifindex);
        }
        self.dirty.structure = true;
        self.world.links.insert(link.ifindex, link);
    }

    fn ask_routes_if_underlay(&mut self, link: &Link) {
        if link.bridge_port.is_none() {
            self.routes.ask_all();
        }
    }

    /// Take in the packet filters, after [`Event::FiltersChanged`].
    pub fn set_filters(&mut self, filters: Filters) {
        if self.world.filters != filters {
            self.world.filters = filters;
            self.dirty.structure = true;
        }
    }

    /// Take in the redirect targets, after [`Event::TargetsChanged`].
    pub fn set_redirect_targets(&mut self, targets: Option<BTreeSet<IfIndex>>) {
        if self.world.redirect_targets != targets {
            self.world.redirect_targets = targets;
            self.dirty.structure = true;
        }
    }

    /// Take in who else looks at a device's frames with tc, in words; after
    /// [`Event::TcChanged`] and after [`Model::replace`].
    pub fn set_tc(&mut self, ifindex: IfIndex, filter: Option<String>) {
        let before = match filter {
            Some(filter) => self.world.tc.insert(ifindex, filter.clone()) != Some(filter),
            None => self.world.tc.remove(&ifindex).is_some(),
        };
        if before {
            self.refusals.devices.remove(&ifindex);
            self.dirty.structure = true;
        }
    }

    /// Devices whose tc filters matter: ports and uplinks.
    pub fn hooked(&self) -> Vec<IfIndex> {
        let ports = self.ports.keys().map(|member| member.ifindex);
        let mut devices: Vec<IfIndex> = ports.chain(self.uplinks.keys().copied()).collect();
        devices.dedup();
        devices
    }

    /// What the user wants at a port, by name.
    pub fn set_hook(&mut self, name: &str, hook: HookChoice) {
        let before = self.settings.hooks.insert(name.to_owned(), hook);
        self.dirty.structure |= before.unwrap_or_default() != hook;
    }

    /// Next hops to look up: those of new remotes, and all after a change of
    /// the routing table. Each is returned once; answer with [`Model::route`].
    /// Call it before [`Model::updates`], so that new remotes are complete when
    /// they are first written, and after it: entries that waited may need more.
    pub fn wanted_routes(&mut self) -> Vec<RouteQuery> {
        self.settle();
        let mut queries: Vec<RouteQuery> = self.queries().collect();
        for (segment, mac) in self.touched_stations() {
            if let Some(key) = self.remote_of(segment, mac) {
                queries.push(key.query());
            }
        }
        for query in queries {
            self.routes.want(query);
        }
        self.routes.take_open()
    }

    /// Look up all routes again: something may have changed without a notification.
    pub fn ask_routes(&mut self) {
        self.routes.ask_all();
    }

    pub fn routes_in_use(&self) -> u32 {
        self.routes.len()
    }

    /// How the kernel would reach a remote; `None`: not at all.
    pub fn route(&mut self, query: &RouteQuery, route: Option<Route>) {
        self.dirty.places |= self.routes.answer(query, route);
    }

    /// Next hops in use. The kernel forgets neighbours that it does not send to
    /// itself, so it has to be asked to confirm them, and to resolve new ones.
    pub fn wanted_neighbours(&self) -> Vec<(IfIndex, IpAddr)> {
        self.hops.iter().copied().collect()
    }

    /// Note that an entry was made through the API, or is no longer. Call it
    /// when the kernel has taken the entry.
    pub fn mark_api(&mut self, vni: Vni, mac: MacAddr, on: bool) {
        let changed = if on {
            self.api.insert((vni, mac))
        } else {
            self.api.remove(&(vni, mac))
        };
        if changed {
            let domains = self.segments.values().filter(|s| s.vni == vni);
            let touched = domains.map(|segment| Touched::Vxlan(segment.tunnel, mac));
            self.dirty.entries.extend(touched);
        }
    }

    /// The kernel's entry is gone, so nobody's mark is left on it.
    fn forget_api_mark(&mut self, touched: Touched) {
        if self.api.is_empty() {
            return;
        }
        let (Touched::Bridge(_, mac) | Touched::Vxlan(_, mac)) = touched;
        let concerned = self.segments.values().filter(|segment| match touched {
            Touched::Bridge(domain, _) => segment.domain() == Some(domain),
            Touched::Vxlan(tunnel, _) => segment.tunnel == tunnel,
        });
        let gone = concerned.filter(|segment| !self.is_known(segment, mac));
        let gone: Vec<Vni> = gone.map(|segment| segment.vni).collect();
        for vni in gone {
            self.api.remove(&(vni, mac));
        }
    }

    fn forget_stale_api_marks(&mut self) {
        let mut marks = std::mem::take(&mut self.api);
        marks.retain(|(vni, mac)| {
            let mut segments = self.segments.values().filter(|segment| segment.vni == *vni);
            segments.any(|segment| self.is_known(segment, *mac))
        });
        self.api = marks;
    }

    /// Whether the kernel has an entry for a MAC, in either table.
    fn is_known(&self, segment: &Segment, mac: MacAddr) -> bool {
        let domain = segment.domain();
        domain.is_some_and(|domain| self.world.bridge_entry(domain, mac).is_some())
            || self.world.vxlan_entry(segment.tunnel, mac).is_some()
    }

    /// The difference between what is wanted and what is written, in an order
    /// in which no entry ever names something that is not there. From here on
    /// it counts as written; what the kernel refuses comes back through
    /// [`Model::refused`]. Call it after a whole batch of events, as states
    /// within a batch are never written, and until it returns nothing: one list
    /// may make the room for what comes in the next.
    pub fn updates(&mut self, now: Instant) -> Vec<TableUpdate> {
        self.settle();
        if std::mem::take(&mut self.adopting) {
            self.recognise();
        }
        self.pass(now)
    }

    /// When [`Model::updates`] has to be called although nothing happens:
    /// something waits for a number that rests.
    pub fn wake_at(&self) -> Option<Instant> {
        let locations = match self.waiting.location.is_empty() {
            true => None,
            false => self.locations.free_at(),
        };
        let slots = if self.slots.short {
            self.slots.free_at()
        } else {
            None
        };
        locations.into_iter().chain(slots).min()
    }

    /// Bring segments and ports up to date.
    fn settle(&mut self) {
        if !self.dirty.structure {
            return;
        }
        self.dirty.structure = false;
        self.dirty.places = true;
        self.dirty.values = true;
        self.shortage = Shortage::default();
        let udp_ports = self
            .written
            .config
            .map_or([[0; 2]; 4], |config| config.udp_ports);
        let udp_ports = udp_ports.map(u16::from_be_bytes);
        let segments = segments::plan(
            &self.world,
            &self.settings,
            &self.refusals,
            &mut self.ids,
            &udp_ports,
            &mut self.shortage,
        );
        let current = self.written.ports.keys().map(|key| key.ifindex()).collect();
        self.ports = ports::plan(
            &self.world,
            &self.settings,
            &self.refusals,
            &segments,
            &current,
            &mut self.shortage,
        );
        for (tunnel, segment) in &segments {
            let old = self.segments.get(tunnel);
            if old.is_none_or(|old| old.leads_elsewhere(segment)) {
                self.dirty.domains.extend(segment.domain());
            }
        }
        self.segments = segments;
        self.domains.clear();
        self.by_id.clear();
        for segment in self.segments.values() {
            if let (Ok(id), Some(domain)) = (&segment.id, segment.domain()) {
                self.domains.insert(domain, segment.tunnel);
                self.by_id.insert(*id, segment.tunnel);
            }
        }
        let live = |key: &FdbKey| self.by_id.contains_key(&key.segment());
        self.waiting.room.retain(live);
        self.waiting.location.retain(live);
        if std::mem::take(&mut self.dirty.api) {
            self.forget_stale_api_marks();
        }
    }

    /// Routes of all remotes that entries name.
    fn queries(&self) -> impl Iterator<Item = RouteQuery> + '_ {
        self.locations
            .owned()
            .filter_map(|(index, owner)| match owner {
                locations::Owner::Remote(key) if self.locations.references(index) > 0 => {
                    Some(key.query())
                }
                _ => None,
            })
    }
}
