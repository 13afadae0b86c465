//! One pass from decisions to updates: what every location says, the values of
//! segments and ports, programs and targets; all compared with what is written,
//! and put in an order that is safe at every step.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use vtep_common::layout::{
    Config, Place, Port, PortKey, SEGMENT_LEARNING, SEGMENT_STRICT, SEGMENT_ZERO_CHECKSUM,
    Segment as SegmentValue, UDP_PORTS_MAX, UPLINKS_MAX, Via, VniKey, vni_word,
};

use super::locations::Owner;
use super::ports::{self, ETHERNET_BYTES, Member, ONE_BUFFER_MTU, PortPlan};
use super::remotes::{self, RemoteKey, RouteQuery};
use super::segments::Segment;
use super::world::{Domain, Tunnel};
use super::{Model, fdb::FdbChanges, header};
use crate::kernel::IfIndex;
use crate::tables::{Hook, Program, TableUpdate};

/// Updates of one pass by kind.
#[derive(Debug, Default)]
struct Pass {
    detach: Vec<TableUpdate>,
    ports_gone: Vec<TableUpdate>,
    config: Vec<TableUpdate>,
    remotes: Vec<TableUpdate>,
    targets: Vec<TableUpdate>,
    locations: Vec<TableUpdate>,
    peers: Vec<TableUpdate>,
    segments: Vec<TableUpdate>,
    ports: Vec<TableUpdate>,
    fdb: FdbChanges,
    locations_late: Vec<TableUpdate>,
    ports_new: Vec<TableUpdate>,
    segments_gone: Vec<TableUpdate>,
    peers_gone: Vec<TableUpdate>,
    locations_gone: Vec<TableUpdate>,
    targets_gone: Vec<TableUpdate>,
    attach: Vec<TableUpdate>,
}

impl Pass {
    /// What is named comes before what names it, and leaves after it. Programs
    /// are the last to come and the first to go; ports are next, so that frames of a
    /// port that comes to a segment, or that a segment leaves for another VLAN, never
    /// meet entries that are not meant for them.
    fn into_order(self) -> impl Iterator<Item = TableUpdate> {
        [
            self.detach,
            self.ports_gone,
            self.config,
            self.remotes,
            self.targets,
            self.locations,
            self.peers,
            self.segments,
            self.ports,
            self.fdb.withdrawals,
            self.fdb.writes,
            self.fdb.deletes,
            self.locations_late,
            self.ports_new,
            self.segments_gone,
            self.peers_gone,
            self.locations_gone,
            self.targets_gone,
            self.attach,
        ]
        .into_iter()
        .flatten()
    }
}

impl Model {
    /// What has to be written now.
    pub(super) fn pass(&mut self, now: Instant) -> Vec<TableUpdate> {
        let mut pass = Pass {
            fdb: self.decide_fdb(now),
            ..Pass::default()
        };
        self.place(now, &mut pass);
        self.devices(&mut pass);
        self.dirty.values |= self.world.peers.changed;
        if self.dirty.values {
            self.world.peers.changed = false;
            (pass.peers, pass.peers_gone) = self.peer_changes();
            self.segment_values(&mut pass);
            self.port_values(&mut pass);
        }
        self.dirty.values = false;
        self.config(&mut pass);
        self.clean_up(now, &mut pass);
        let repeated = self.repeated_removals();
        pass.into_order().chain(repeated).collect()
    }

    /// Make every location say what it has to.
    fn place(&mut self, now: Instant, pass: &mut Pass) {
        let mut fresh = self.locations.take_fresh();
        fresh.sort_unstable();
        let unknown = fresh
            .iter()
            .any(|index| match self.locations.owner(*index) {
                Some(Owner::Remote(key)) => self
                    .device_of(*index, &key)
                    .is_none_or(|device| !self.uplinks.contains_key(&device)),
                _ => false,
            });
        self.dirty.places |= unknown || (self.slots.short && self.slots.has_free(now));
        self.dirty.places |= self.leaving_changes_uplinks();
        let mut indexes = fresh.clone();
        if self.dirty.places {
            self.dirty.places = false;
            self.dirty.values = true;
            self.slots.short = false;
            self.plan_uplinks();
            self.hops.clear();
            indexes = self.locations.owned().map(|(index, _)| index).collect();
            indexes.sort_unstable();
        }
        for index in indexes {
            let Some(owner) = self.locations.owner(index) else {
                continue;
            };
            if self.locations.references(index) == 0 {
                continue;
            }
            let place = match owner {
                Owner::Port { domain, ifindex } => self.place_of_port(index, domain, ifindex),
                Owner::Remote(key) => self.place_of_remote(index, &key, now, &mut pass.remotes),
            };
            let before = self.locations.value(index).place();
            if let Some(store) = self.locations.store(index, place) {
                // Entries that leave it in this pass were the kernel's until now:
                // they must not be sent to their former place once more.
                if before == Place::Kernel && fresh.binary_search(&index).is_err() {
                    pass.locations_late.push(store);
                } else {
                    pass.locations.push(store);
                }
                if let Place::Remote(slot) = before {
                    self.slots.release(slot, now);
                }
            }
        }
    }

    fn place_of_port(&self, index: u32, domain: Domain, ifindex: IfIndex) -> Place {
        let vlan = domain.vlan;
        match self.ports.get(&Member { ifindex, vlan }) {
            Some(port)
                if port.bridge == domain.bridge
                    && port.accelerated.is_ok()
                    && !self.refusals.places.contains_key(&index) =>
            {
                Place::Port(ifindex, self.via(port).unwrap_or(Via::Kernel))
            }
            _ => Place::Kernel,
        }
    }

    /// How frames from the wire reach a port; `None`: it is not accelerated.
    pub(super) fn via(&self, port: &PortPlan) -> Option<Via> {
        let via = port.accelerated.as_ref().ok()?.via;
        // The programs do not see all of a jumbo frame, so they would pass it, while the small
        // ones of the same flow overtake it.
        let jumbo = |mtu: u32| mtu > ONE_BUFFER_MTU;
        let mut uplinks = self.uplinks.values();
        let v6 = self
            .segments
            .get(&port.tunnel)
            .is_some_and(|segment| segment.key.is_v6());
        if jumbo(port.mtu + ports::overhead_bytes(v6))
            && uplinks.any(|uplink| uplink.accelerated.is_ok() && jumbo(uplink.mtu))
        {
            return Some(Via::Kernel);
        }
        Some(via)
    }

    fn place_of_remote(
        &mut self,
        index: u32,
        key: &RemoteKey,
        now: Instant,
        written: &mut Vec<TableUpdate>,
    ) -> Place {
        let ttl = self.settings.default_ttl;
        let mut way = remotes::way(key, &self.world, &self.routes, &self.uplinks, ttl);
        self.hops.extend(way.ifindex.zip(way.next_hop));
        let before = self.locations.value(index).place();
        let live = match before {
            Place::Remote(slot) => self.slots.get(slot),
            _ => None,
        };
        if let Some(reason) = self.refusals.places.get(&index) {
            way.header = Err(reason.clone());
            way.pending = false;
        }
        let place = match (&way.header, live) {
            (Ok(header), Some(live)) if **header == *live => before,
            (Ok(header), _) => match self.slots.put(**header, now) {
                Some(slot) => {
                    let value = **header;
                    written.push(TableUpdate::Remote { slot, value });
                    Place::Remote(slot)
                }
                None => {
                    self.map_full += 1;
                    way.header = Err("table of remotes full".into());
                    Place::Kernel
                }
            },
            // After a restart: what stands is as good as it was.
            (Err(_), Some(live)) if way.pending && self.is_uplink(live.ifindex) => before,
            (Err(_), _) => Place::Kernel,
        };
        self.ways.insert(*key, way);
        place
    }

    fn is_uplink(&self, ifindex: IfIndex) -> bool {
        self.uplinks
            .get(&ifindex)
            .is_some_and(|uplink| uplink.accelerated.is_ok())
    }

    /// Device that frames to a remote leave by, as far as is known.
    fn device_of(&self, index: u32, key: &RemoteKey) -> Option<IfIndex> {
        match (
            self.routes.get(&key.query()),
            self.locations.value(index).place(),
        ) {
            (Some(route), _) => Some(route.as_ref()?.ifindex),
            (None, Place::Remote(slot)) => Some(self.slots.get(slot)?.ifindex),
            (None, _) => None,
        }
    }

    /// Devices of remotes that entries name.
    fn devices_in_use(&self) -> BTreeSet<IfIndex> {
        let remotes = self
            .locations
            .owned()
            .filter_map(|(index, owner)| match owner {
                Owner::Remote(key) if self.locations.references(index) > 0 => {
                    self.device_of(index, &key)
                }
                _ => None,
            });
        remotes.collect()
    }

    /// Whether a remote that nothing names any more was the last reason for an
    /// uplink, or may have set the smallest MTU.
    fn leaving_changes_uplinks(&self) -> bool {
        let mut leaving = self.locations.leaving().peekable();
        if leaving.peek().is_none() {
            return false;
        }
        let in_use = self.devices_in_use();
        leaving.any(|(index, key)| {
            let mtu = self
                .routes
                .get(&key.query())
                .and_then(|route| route.as_ref()?.mtu);
            let device = self.device_of(index, &key);
            mtu.is_some() || device.is_some_and(|device| !in_use.contains(&device))
        })
    }

    fn plan_uplinks(&mut self) {
        let hooks = self.written.hooks.iter();
        let current = hooks.filter(|(_, (program, _))| *program == Program::Ingress);
        let current = current.map(|(ifindex, _)| *ifindex).collect();
        self.uplinks = ports::uplinks(
            &self.world,
            &self.settings,
            &self.refusals,
            &self.segments,
            &self.devices_in_use(),
            &current,
        );
    }

    /// Programs and redirect targets.
    fn devices(&mut self, pass: &mut Pass) {
        let xdp = Hook::Xdp(self.settings.xdp_mode);
        let ports = self.ports.iter().filter_map(|(member, port)| {
            let fast = port.accelerated.as_ref().ok()?;
            Some((member.ifindex, (Program::Egress, fast.hook)))
        });
        let uplinks = self.uplinks.iter().filter_map(|(ifindex, uplink)| {
            let hook = uplink
                .accelerated
                .is_ok()
                .then_some((Program::Ingress, xdp));
            Some((*ifindex, hook?))
        });
        let wanted: BTreeMap<IfIndex, (Program, Hook)> = ports.chain(uplinks).collect();
        let targets = self.targets();
        let written = &mut self.written;

        let gone = std::mem::take(&mut self.dirty.gone);
        written.hooks.retain(|ifindex, hook| {
            let keep = wanted.get(ifindex) == Some(hook) && !gone.contains(ifindex);
            if !keep {
                pass.detach.push(TableUpdate::Detach(*ifindex));
            }
            keep
        });
        // The kernel takes a device that goes away out of the map itself.
        written
            .targets
            .retain(|ifindex| !(gone.contains(ifindex) && targets.contains(ifindex)));
        written.targets.retain(|ifindex| {
            let keep = targets.contains(ifindex);
            if !keep {
                pass.targets_gone.push(TableUpdate::TargetDel(*ifindex));
            }
            keep
        });
        for ifindex in targets {
            if written.targets.insert(ifindex) {
                pass.targets.push(TableUpdate::TargetAdd(ifindex));
            }
        }
        for (&ifindex, &(program, hook)) in &wanted {
            if written.hooks.insert(ifindex, (program, hook)).is_none() {
                pass.attach.push(TableUpdate::Attach {
                    ifindex,
                    program,
                    hook,
                });
            }
        }
    }

    /// Devices that XDP redirects to.
    fn targets(&self) -> BTreeSet<IfIndex> {
        let ports = self.ports.iter().filter(|(_, port)| {
            let via = self.via(port);
            matches!(via, Some(Via::Xdp | Via::Gro))
        });
        let uplinks = self
            .uplinks
            .iter()
            .filter(|(_, uplink)| uplink.accelerated.is_ok() && uplink.is_target);
        let ports = ports.map(|(member, _)| member.ifindex);
        ports.chain(uplinks.map(|(ifindex, _)| *ifindex)).collect()
    }

    /// Largest frame that every port takes which frames reach fast, bytes, by
    /// segment.
    fn local_max_bytes(&self) -> BTreeMap<Tunnel, u16> {
        let mut largest = BTreeMap::new();
        let fast = |port: &&PortPlan| self.via(port).is_some_and(|via| via != Via::Kernel);
        for port in self.ports.values().filter(fast) {
            let bytes = frame_bytes(port.mtu);
            let largest = largest.entry(port.tunnel).or_insert(bytes);
            *largest = bytes.min(*largest);
        }
        largest
    }

    fn segment_flags(&self, segment: &Segment) -> u16 {
        let flags = [
            (segment.learning, SEGMENT_LEARNING),
            (self.is_strict(segment) == Ok(true), SEGMENT_STRICT),
            (segment.zero_checksum, SEGMENT_ZERO_CHECKSUM),
        ];
        flags.iter().filter(|(on, _)| *on).map(|(_, bit)| bit).sum()
    }

    fn segment_values(&mut self, pass: &mut Pass) {
        let local_max = self.local_max_bytes();
        let mut wanted: BTreeMap<VniKey, SegmentValue> = BTreeMap::new();
        for segment in self.segments.values() {
            if let Ok(id) = segment.id {
                wanted.insert(
                    segment.key,
                    SegmentValue {
                        local: header::address_bytes(segment.policy.local),
                        id,
                        flags: self.segment_flags(segment),
                        local_max_bytes: local_max.get(&segment.tunnel).copied().unwrap_or(0),
                        pad: [0; 2],
                    },
                );
            }
        }
        for (&key, &value) in &wanted {
            if self.written.segments.get(&key) != Some(&value) {
                pass.segments.push(TableUpdate::Segment { key, value });
            }
        }
        for key in self
            .written
            .segments
            .keys()
            .filter(|key| !wanted.contains_key(key))
        {
            pass.segments_gone.push(TableUpdate::SegmentDel(*key));
        }
        self.written.segments = wanted;
    }

    fn port_values(&mut self, pass: &mut Pass) {
        let underlay = ports::underlay_mtu(&self.uplinks, &self.routes, self.queries());
        let mut wanted: BTreeMap<PortKey, Port> = BTreeMap::new();
        let local_max = self.local_max_bytes();
        for (&Member { ifindex, vlan }, port) in self
            .ports
            .iter()
            .filter(|(_, port)| port.accelerated.is_ok())
        {
            let Some(segment) = self.segments.get(&port.tunnel) else {
                continue;
            };
            let Ok(id) = segment.id else { continue };
            let bridge = port.bridge;
            let owner = Owner::Port {
                domain: Domain { bridge, vlan },
                ifindex,
            };
            let first = self
                .locations
                .find(&owner)
                .and_then(|index| self.locations.first(index));
            let tunnel = underlay.map_or(segment.mtu, |mtu| {
                let overhead = ports::overhead_bytes(segment.key.is_v6());
                segment.mtu.min(mtu.saturating_sub(overhead))
            });
            let local_max_bytes = local_max.get(&port.tunnel).copied().unwrap_or(0);
            wanted.insert(
                PortKey::new(ifindex, 0),
                Port {
                    first_key: first.map_or(0, |key| key.word()),
                    vni_word: vni_word(segment.vni),
                    segment: id,
                    tunnel_max_bytes: frame_bytes(tunnel),
                    local_max_bytes,
                    pad: [0; 5],
                    epoch: self.idle_epoch(),
                },
            );
        }
        for (&key, value) in &mut wanted {
            let old = self.written.ports.get(&key);
            // The epoch is the program's.
            let epoch = old.map_or(value.epoch, |old| old.epoch);
            if old == Some(&Port { epoch, ..*value }) {
                value.epoch = epoch;
                continue;
            }
            let value = *value;
            let written = TableUpdate::Port { key, value };
            match old {
                Some(old) if old.segment == value.segment => pass.ports.push(written),
                Some(_) => {
                    pass.ports_gone.push(TableUpdate::PortDel(key));
                    pass.ports_new.push(written);
                }
                None => pass.ports_new.push(written),
            }
        }
        for key in self
            .written
            .ports
            .keys()
            .filter(|key| !wanted.contains_key(key))
        {
            pass.ports_gone.push(TableUpdate::PortDel(*key));
        }
        self.written.ports = wanted;
    }

    fn config(&mut self, pass: &mut Pass) {
        let (kernel_port_min, last) = self.settings.local_ports;
        let mut config = Config {
            epoch: self.epoch,
            fdb_mask: self.fdb_mask,
            kernel_port_min,
            // The upper bound is exclusive (udp_flow_src_port).
            kernel_port_count: last.saturating_sub(kernel_port_min).max(1),
            ..Config::EMPTY
        };
        let accelerated = self
            .uplinks
            .values()
            .filter(|uplink| uplink.accelerated.is_ok());
        let macs: BTreeSet<u64> = accelerated.map(|uplink| uplink.mac.to_bits()).collect();
        for (place, mac) in config
            .uplink_macs
            .iter_mut()
            .zip(macs.iter().take(UPLINKS_MAX))
        {
            *place = *mac;
        }
        let segments = self.segments.values().filter(|segment| segment.id.is_ok());
        let ports: BTreeSet<u16> = segments.map(|segment| segment.key.udp_port()).collect();
        for (place, port) in config
            .udp_ports
            .iter_mut()
            .zip(ports.iter().take(UDP_PORTS_MAX))
        {
            *place = port.to_be_bytes();
        }
        if self.written.config != Some(config) {
            self.written.config = Some(config);
            pass.config.push(TableUpdate::Config(config));
        }
    }

    /// Give back what nothing names any more, and note what there is room for
    /// now.
    fn clean_up(&mut self, now: Instant, pass: &mut Pass) {
        let mut remote_left = false;
        for (index, owner) in self.locations.free_idle(now) {
            if let Place::Remote(slot) = self.locations.value(index).place() {
                self.slots.release(slot, now);
            }
            pass.locations_gone
                .extend(self.locations.store(index, Place::Kernel));
            self.refusals.places.remove(&index);
            if let Some(Owner::Remote(key)) = owner {
                self.ways.remove(&key);
                remote_left = true;
            }
        }
        if remote_left {
            let used: BTreeSet<RouteQuery> = self.queries().collect();
            self.routes.keep(&used);
            let hops = self
                .ways
                .values()
                .filter_map(|way| way.ifindex.zip(way.next_hop));
            self.hops = hops.collect();
        }
        let (live, written) = (&self.by_id, &self.written.fdb);
        let before = self.ids.taken.len();
        self.ids
            .taken
            .retain(|id, _| live.contains_key(id) || written.contains_key(id));
        let segments = self.shortage.segments > 0 && self.ids.taken.len() < before;
        let ports = self.shortage.ports > 0 && !pass.ports_gone.is_empty();
        self.dirty.structure |= segments || ports;
        if !pass.fdb.deletes.is_empty() {
            self.waiting.refused = false;
        }
    }
}

/// MTU to frame length, Ethernet header included, as the maps keep it.
fn frame_bytes(mtu: u32) -> u16 {
    u16::try_from(mtu.saturating_add(ETHERNET_BYTES)).unwrap_or(u16::MAX)
}
