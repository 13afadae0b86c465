//! A host in values: builders for kernel facts, a simulation of the maps that
//! checks every step of every update list, and the cases.

mod adoption;
mod cases;
mod devices;
mod host;
mod limits;
mod oracle;
mod peers;
mod random;
mod refusals;
mod remotes;
mod v6;
mod vlan_reasons;
mod vlans;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use vtep_common::layout::{FdbKey, Location, Place, PortKey, Remote, SegmentId, Via};
use vtep_common::{MacAddr, Vni};

use oracle::{Meaning, reached};

use super::locations::QUARANTINE;
use super::{Model, Settings};
use crate::kernel::{
    Address, Bridge, BridgePort, Event, FdbEntry, FdbTable, IfIndex, Link, LinkKind, Neighbour,
    Route, Snapshot, Tun, VlanRange, VniRange, VxlanDevice, bits,
};
use crate::tables::{Program, Refused, TableUpdate, Tables};

pub const LO: IfIndex = 1;
pub const ETH0: IfIndex = 2;
pub const ETH1: IfIndex = 3;
pub const BR0: IfIndex = 10;
pub const BR1: IfIndex = 11;
pub const VX0: IfIndex = 20;
pub const VX1: IfIndex = 21;
pub const TAP0: IfIndex = 30;
pub const TAP1: IfIndex = 31;
pub const TAP2: IfIndex = 32;

pub const LOCAL: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
pub const GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 254));
pub const REMOTE1: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1));
pub const REMOTE2: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 2));
pub const REMOTE3: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 3));

const fn documentation(network: u16, host: u16) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, network, 0, 0, 0, 0, host)
}
pub const LOCAL_V6: Ipv6Addr = documentation(0, 1);
/// Link-local, as routers announce themselves.
pub const GATEWAY_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0xfe));
pub const REMOTE1_V6: IpAddr = IpAddr::V6(documentation(1, 1));
pub const REMOTE2_V6: IpAddr = IpAddr::V6(documentation(1, 2));
pub const REMOTE3_V6: IpAddr = IpAddr::V6(documentation(2, 3));

pub fn mac(n: u8) -> MacAddr {
    MacAddr([0x02, 0, 0, 0, 0, n])
}

pub fn vni(n: u32) -> Vni {
    Vni::new(n).unwrap()
}

pub fn link(ifindex: IfIndex, name: &str, kind: LinkKind) -> Link {
    Link {
        ifindex,
        name: name.to_owned(),
        mac: Some(MacAddr([0x0a, 0, 0, 0, 0, ifindex as u8])),
        mtu: 1500,
        up: true,
        loopback: false,
        master: None,
        kind,
        bridge_port: None,
        xdp: None,
        hop_limit_v6: None,
    }
}

pub fn bridge(ifindex: IfIndex, name: &str) -> Link {
    let kind = Bridge {
        vlan_filtering: false,
        default_pvid: 1,
        service_vlans: false,
        mst: false,
        ageing_ms: 300_000,
        nf_call: false,
    };
    link(ifindex, name, LinkKind::Bridge(kind))
}

pub const FORWARDING: BridgePort = BridgePort {
    state: 3,
    learning: false,
    unicast_flood: true,
    hairpin: false,
    isolated: false,
    locked: false,
    mab: false,
    neigh_suppress: false,
    neigh_vlan_suppress: false,
    vlan_tunnel: false,
    proxy_arp: false,
    backup_port: None,
};

pub fn member(mut link: Link, bridge: IfIndex) -> Link {
    link.master = Some(bridge);
    link.bridge_port = Some(FORWARDING);
    link
}

pub fn vxlan_device(n: u32) -> VxlanDevice {
    VxlanDevice {
        vni: vni(n),
        local: Some(LOCAL.into()),
        group: None,
        link: None,
        udp_port: 4789,
        source_ports: (0, 0),
        learning: false,
        ageing_s: 300,
        ttl: 0,
        ttl_inherit: false,
        tos: 0,
        df: 0,
        udp_checksum: false,
        udp6_zero_checksum_tx: false,
        udp6_zero_checksum_rx: false,
        flow_label: 0,
        collect_metadata: false,
        vnifilter: false,
        foreign_options: Vec::new(),
    }
}

pub fn vxlan(ifindex: IfIndex, name: &str, device: VxlanDevice, bridge: IfIndex) -> Link {
    let mut link = link(ifindex, name, LinkKind::Vxlan(Box::new(device)));
    link.mtu = 1450;
    member(link, bridge)
}

/// One VLAN of a port, tagged.
pub fn tagged(vlan: u16) -> VlanRange {
    VlanRange {
        first: vlan,
        last: vlan,
        pvid: false,
        untagged: false,
        state: 3,
        tunnel: None,
    }
}

/// The VLAN of a port's untagged frames.
pub fn pvid(vlan: u16) -> VlanRange {
    VlanRange {
        pvid: true,
        untagged: true,
        ..tagged(vlan)
    }
}

/// Make a bridge VLAN-aware, and all others a member of the first one.
pub fn make_vlan_aware(link: &mut Link) {
    if let LinkKind::Bridge(bridge) = &mut link.kind {
        bridge.vlan_filtering = true;
    }
    if link.master.is_some() {
        link.master = Some(BR0);
    }
}

/// Make a device a single VXLAN device.
pub fn make_single(link: &mut Link) {
    if let LinkKind::Vxlan(device) = &mut link.kind {
        device.vni = vni(0);
        device.collect_metadata = true;
        device.vnifilter = true;
    }
    if let Some(port) = &mut link.bridge_port {
        port.vlan_tunnel = true;
    }
}

pub fn tap(ifindex: IfIndex, name: &str, bridge: IfIndex) -> Link {
    let kind = Tun {
        tap: true,
        vnet_hdr: false,
    };
    member(link(ifindex, name, LinkKind::Tun(kind)), bridge)
}

fn entry(table: FdbTable, ifindex: IfIndex, mac: MacAddr) -> FdbEntry {
    FdbEntry {
        table,
        ifindex,
        bridge: None,
        mac,
        vlan: None,
        dst: None,
        udp_port: None,
        vni: None,
        source_vni: None,
        via: None,
        nexthop_id: None,
        state: bits::NUD_REACHABLE,
        flags: 0,
    }
}

/// Entry of a bridge's table, learned.
pub fn bridged(bridge: IfIndex, port: IfIndex, mac: MacAddr) -> FdbEntry {
    FdbEntry {
        bridge: Some(bridge),
        flags: bits::NTF_MASTER,
        ..entry(FdbTable::Bridge, port, mac)
    }
}

/// Entry of a VXLAN device's table, learned.
pub fn tunnelled(vxlan: IfIndex, mac: MacAddr, dst: IpAddr) -> FdbEntry {
    FdbEntry {
        dst: Some(dst),
        flags: bits::NTF_SELF,
        ..entry(FdbTable::Vxlan, vxlan, mac)
    }
}

pub fn neighbour(ifindex: IfIndex, address: IpAddr, n: u8) -> Neighbour {
    Neighbour {
        ifindex,
        address,
        mac: Some(MacAddr([0x06, 0, 0, 0, 0, n])),
        state: bits::NUD_REACHABLE,
    }
}

pub fn via(ifindex: IfIndex, gateway: IpAddr) -> Route {
    Route {
        ifindex,
        gateway: Some(gateway),
        source: None,
        mtu: None,
        hop_limit: None,
    }
}

/// lo, eth0 with the VTEP's address, br0 with vxlan100 and two taps, a gateway
/// that is resolved.
pub fn small_host() -> Snapshot {
    let mut lo = link(LO, "lo", LinkKind::Plain);
    lo.loopback = true;
    Snapshot {
        links: vec![
            lo,
            link(ETH0, "eth0", LinkKind::Plain),
            bridge(BR0, "br0"),
            vxlan(VX0, "vxlan100", vxlan_device(100), BR0),
            tap(TAP0, "tap0", BR0),
            tap(TAP1, "tap1", BR0),
        ],
        addresses: vec![Address {
            ifindex: ETH0,
            address: LOCAL.into(),
        }],
        neighbours: vec![neighbour(ETH0, GATEWAY, 1)],
        ..Snapshot::default()
    }
}

/// The same with a second segment: br1, vxlan200, tap2.
pub fn two_segments() -> Snapshot {
    let mut host = small_host();
    host.links.extend([
        bridge(BR1, "br1"),
        vxlan(VX1, "vxlan200", vxlan_device(200), BR1),
        tap(TAP2, "tap2", BR1),
    ]);
    host
}

/// Model, maps and kernel routing together. Every update is applied to `tables`
/// and checked on the way.
pub struct Sim {
    pub model: Model,
    pub tables: Tables,
    pub now: Instant,
    pub routes: BTreeMap<IpAddr, Option<Route>>,
    /// Devices whose driver takes no program.
    pub refusing: BTreeSet<IfIndex>,
    /// Devices that XDP cannot redirect to.
    pub losing: BTreeSet<IfIndex>,
    slot_freed: HashMap<u32, Instant>,
    /// When the last entry left a location, and in which list.
    unnamed: HashMap<u32, (Instant, u32)>,
    lists: u32,
}

impl Sim {
    pub fn new(settings: Settings) -> Self {
        let v4 = [REMOTE1, REMOTE2, REMOTE3].map(|remote| (remote, GATEWAY));
        let v6 = [REMOTE1_V6, REMOTE2_V6, REMOTE3_V6].map(|remote| (remote, GATEWAY_V6));
        let routes = v4.into_iter().chain(v6);
        Self {
            model: Model::new(settings),
            tables: Tables::default(),
            now: Instant::now(),
            routes: routes.map(|(to, hop)| (to, Some(via(ETH0, hop)))).collect(),
            refusing: BTreeSet::new(),
            losing: BTreeSet::new(),
            slot_freed: HashMap::new(),
            unnamed: HashMap::new(),
            lists: 0,
        }
    }

    pub fn started(host: Snapshot) -> Self {
        Self::with(Settings::default(), host)
    }

    pub fn with(settings: Settings, host: Snapshot) -> Self {
        let mut sim = Self::new(settings);
        sim.model.replace(host);
        sim.run();
        sim
    }

    pub fn apply(&mut self, events: impl IntoIterator<Item = Event>) -> Vec<TableUpdate> {
        events.into_iter().for_each(|event| self.model.apply(event));
        self.run()
    }

    pub fn wait(&mut self, time: Duration) -> Vec<TableUpdate> {
        self.now += time;
        self.run()
    }

    /// Another controller takes over the same maps.
    pub fn restart(&mut self, settings: Settings, host: Snapshot) {
        self.model = Model::new(settings);
        self.model.adopt(self.tables.clone());
        self.model.replace(host);
        // As long as a restart takes.
        self.now += QUARANTINE;
    }

    /// What the controller does after a batch of events.
    pub fn run(&mut self) -> Vec<TableUpdate> {
        let mut all = Vec::new();
        for round in 0.. {
            assert!(round < 10, "the model does not settle: {all:?}");
            for query in self.model.wanted_routes() {
                let route = self.routes.get(&query.remote).cloned().flatten();
                self.model.route(&query, route);
            }
            let updates = self.model.updates(self.now);
            if updates.is_empty() {
                break;
            }
            let refused = self.write(&updates);
            self.model.refused(refused);
            all.extend(updates);
        }
        all
    }

    fn write(&mut self, updates: &[TableUpdate]) -> Vec<Refused> {
        let mut refused = Vec::new();
        let mut deleted = BTreeSet::new();
        self.lists += 1;
        let mut states = vec![reached(&self.tables)];
        for update in updates {
            match update {
                TableUpdate::Attach { ifindex, .. } if self.refusing.contains(ifindex) => {
                    refused.push(Refused {
                        update: update.clone(),
                        reason: "Operation not supported (os error 95)".to_owned(),
                    });
                    continue;
                }
                TableUpdate::FdbDel(key) => {
                    deleted.insert(*key);
                }
                // The number may go to another segment.
                TableUpdate::SegmentDel(key) => {
                    let id = self.tables.segments[key].id;
                    deleted.retain(|key: &FdbKey| key.segment() != id);
                }
                TableUpdate::Fdb { key, .. } => {
                    assert!(!deleted.contains(key), "R37: {key:?} deleted, then written");
                }
                _ => {}
            }
            self.write_one(update);
            self.check(update);
            states.push(reached(&self.tables));
        }
        // Nobody is sent to a wrong place on the way.
        let (before, after) = (states.first().unwrap(), states.last().unwrap());
        for state in &states {
            for (key, place) in state {
                let (vni, meaning) = place;
                let was = before.get(key);
                let right = after.get(key) == Some(place)
                    || was.is_some_and(|(was, before)| was == vni && before.is_same_place(meaning));
                let kernel = *meaning == Meaning::Kernel;
                assert!(right || kernel, "{key:?} {place:?} in {updates:?}");
            }
        }
        refused
    }

    fn write_one(&mut self, update: &TableUpdate) {
        let tables = &mut self.tables;
        match update.clone() {
            TableUpdate::Config(value) => tables.config = Some(value),
            TableUpdate::Remote { slot, value } => {
                let named = tables
                    .locations
                    .values()
                    .any(|l| l.place() == Place::Remote(slot));
                assert!(!named, "slot {slot} is live");
                let freed = self.slot_freed.get(&slot);
                assert!(
                    freed.is_none_or(|at| self.now - *at >= QUARANTINE),
                    "slot {slot} rests"
                );
                tables.remotes.insert(slot, value);
            }
            TableUpdate::Location { index, value } => {
                assert_ne!(index, Location::NONE);
                let old = tables.locations.insert(index, value).unwrap_or(Location(0));
                assert_ne!(old.place(), value.place(), "an update that changes nothing");
                let next = old.generation().wrapping_add(1) & Location::GENERATION_MAX;
                assert_eq!(value.generation(), next);
                if let Place::Remote(slot) = old.place() {
                    self.slot_freed.insert(slot, self.now);
                }
            }
            TableUpdate::TargetAdd(ifindex) => {
                tables.targets.retain(|known| *known != ifindex);
                tables.targets.push(ifindex);
            }
            TableUpdate::TargetDel(ifindex) => tables.targets.retain(|known| *known != ifindex),
            TableUpdate::Segment { key, value } => {
                assert_ne!(tables.segments.insert(key, value), Some(value));
            }
            TableUpdate::SegmentDel(key) => assert!(tables.segments.remove(&key).is_some()),
            TableUpdate::Peer(key) => assert!(tables.peers.insert(key), "{key:?} is there"),
            TableUpdate::PeerDel(key) => assert!(tables.peers.remove(&key), "{key:?} is gone"),
            TableUpdate::Port { key, value } => {
                assert_ne!(tables.ports.insert(key, value), Some(value));
            }
            TableUpdate::PortDel(key) => assert!(tables.ports.remove(&key).is_some()),
            TableUpdate::Fdb { key, value } => {
                let index = value.location();
                if index != Location::NONE && !self.is_named(index) {
                    // Left and named again by one list: it was never given up.
                    let left = self.unnamed.get(&index).filter(|left| left.1 != self.lists);
                    let rested = left.is_none_or(|left| self.now - left.0 >= QUARANTINE);
                    assert!(rested, "location {index} rests");
                }
                let old = self.tables.fdb.insert(key, value);
                assert_ne!(old, Some(value), "an update that changes nothing");
                self.note_unnamed(old.map(|value| value.location()));
            }
            TableUpdate::FdbDel(key) => {
                let old = self.tables.fdb.remove(&key);
                assert!(old.is_some(), "{key:?} was not there");
                self.note_unnamed(old.map(|value| value.location()));
            }
            TableUpdate::Attach {
                ifindex,
                program,
                hook,
            } => {
                assert_eq!(tables.hooks.insert(ifindex, (program, hook)), None);
            }
            TableUpdate::Detach(ifindex) => assert!(tables.hooks.remove(&ifindex).is_some()),
        }
    }

    fn is_named(&self, index: u32) -> bool {
        self.tables
            .fdb
            .values()
            .any(|value| value.location() == index)
    }

    fn note_unnamed(&mut self, index: Option<u32>) {
        if let Some(index) = index.filter(|index| !self.is_named(*index)) {
            self.unnamed.insert(index, (self.now, self.lists));
        }
    }

    /// Nothing in the maps names something that is not there.
    fn check(&self, after: &TableUpdate) {
        let tables = &self.tables;
        for (index, location) in &tables.locations {
            let target = match location.place() {
                Place::Kernel => continue,
                Place::Port(ifindex, _) => ifindex,
                Place::Remote(slot) => tables.remotes[&slot].ifindex,
            };
            let by_xdp = !matches!(location.place(), Place::Port(_, Via::Stack | Via::Kernel));
            assert!(
                !by_xdp || self.losing.contains(&target) || tables.targets.contains(&target),
                "location {index} after {after:?}"
            );
        }
        let ids: BTreeSet<SegmentId> = tables.segments.values().map(|s| s.id).collect();
        assert_eq!(
            ids.len(),
            tables.segments.len(),
            "a number twice after {after:?}"
        );
        for key in tables.fdb.keys() {
            assert!(ids.contains(&key.segment()), "{key:?} after {after:?}");
        }
        for (key, port) in &tables.ports {
            assert!(ids.contains(&port.segment), "{key:?} after {after:?}");
        }
        for (ifindex, (program, _)) in &tables.hooks {
            assert!(
                *program == Program::Egress
                    || self.losing.contains(ifindex)
                    || tables.targets.contains(ifindex),
                "hook {ifindex} after {after:?}"
            );
        }
    }

    pub fn id(&self, n: u32) -> SegmentId {
        let mut segments = self.tables.segments.iter();
        segments
            .find(|(key, _)| key.vni() == n)
            .expect("no such segment")
            .1
            .id
    }

    /// What the programs would do with a frame to a MAC; `None`: not in the FDB.
    pub fn place(&self, n: u32, mac: MacAddr) -> Option<Place> {
        let id = self
            .tables
            .segments
            .iter()
            .find(|(key, _)| key.vni() == n)?
            .1
            .id;
        let index = self.tables.fdb.get(&FdbKey::new(id, mac))?.location();
        let location = self
            .tables
            .locations
            .get(&index)
            .copied()
            .unwrap_or(Location(0));
        Some(location.place())
    }

    /// Destination of the remote a MAC is at.
    pub fn remote(&self, n: u32, mac: MacAddr) -> Option<IpAddr> {
        match self.place(n, mac)? {
            Place::Remote(slot) => Some(destination(&self.tables.remotes[&slot])),
            _ => None,
        }
    }

    pub fn reason(&self, n: u32, mac: MacAddr) -> String {
        let rows = self.model.fdb_rows(Some(vni(n)), Some(mac));
        rows[0].reason.clone().expect("accelerated")
    }
}

/// The address in a header, of either family.
pub fn destination(remote: &Remote) -> IpAddr {
    let v6: [u8; 16] = remote.header[38..54].try_into().unwrap();
    if remote.is_destination_v6(&v6) {
        v6.into()
    } else {
        remote.destination_v4().into()
    }
}

/// Entries that put a MAC behind a remote, as `bridge fdb add` with `master`
/// and `self` does.
pub fn behind_remote(bridge: IfIndex, vxlan: IfIndex, mac: MacAddr, dst: IpAddr) -> [Event; 2] {
    [
        Event::Fdb(tunnelled(vxlan, mac, dst)),
        Event::Fdb(bridged(bridge, vxlan, mac)),
    ]
}
