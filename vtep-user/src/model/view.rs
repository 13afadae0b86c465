//! The model for people: what is accelerated, where entries point, and why
//! something is left to the kernel. The API gives these structs their JSON.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use vtep_common::layout::{FdbKey, Location, Place, SegmentId, Via};
use vtep_common::{MacAddr, Vni};

use super::fdb::{Decision, decide};
use super::locations::Owner;
use super::ports::{Member, PortPlan};
use super::remotes::RemoteKey;
use super::segments::{Segment, is_link_local};
use super::world::Tunnel;
use super::{Model, Reason};
use crate::kernel::{IfIndex, Link, bits};
use crate::tables::Hook;

/// A NIC towards the underlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UplinkRow {
    pub ifindex: IfIndex,
    pub name: String,
    /// Set where it is accelerated.
    pub hook: Option<Hook>,
    pub reason: Option<String>,
}

/// A VXLAN device and what it is mapped to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentRow {
    pub vni: Vni,
    /// Set where it is accelerated.
    pub segment: Option<SegmentId>,
    pub vxlan: IfIndex,
    pub vxlan_name: String,
    /// The VNI again where the device is a single VXLAN device, whose entries name
    /// it.
    pub source_vni: Option<Vni>,
    pub bridge: Option<IfIndex>,
    pub bridge_name: Option<String>,
    /// Of a VLAN-aware bridge.
    pub vlan: Option<u16>,
    pub local: Option<IpAddr>,
    pub udp_port: u16,
    pub learning: bool,
    /// Frames from strangers are dropped.
    pub strict: bool,
    pub reason: Option<String>,
}

/// A bridge port as member of a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortRow {
    pub ifindex: IfIndex,
    pub name: String,
    pub vni: Vni,
    /// Of a VLAN-aware bridge.
    pub vlan: Option<u16>,
    /// Set where it is accelerated.
    pub hook: Option<Hook>,
    /// How frames from the wire reach it, where it is accelerated.
    pub via: Option<Via>,
    pub reason: Option<String>,
}

/// Where the kernel's tables say a MAC is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RowPlace {
    /// Behind a port, by name; or behind the VXLAN device, without a remote of
    /// its own.
    Port(String),
    Remote(IpAddr),
}

/// Who made an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowOwner {
    /// Learned, or installed by a routing daemon.
    Kernel,
    /// NUD_NOARP or NUD_PERMANENT: set by hand.
    Static,
    Api,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FdbRow {
    pub vni: Vni,
    /// Of a VLAN-aware bridge.
    pub vlan: Option<u16>,
    pub mac: MacAddr,
    pub place: RowPlace,
    pub owner: RowOwner,
    /// Changes of the entry in the map; 0: not in the map.
    pub generation: u64,
    pub accelerated: bool,
    pub reason: Option<String>,
}

/// A peer as one VXLAN device reaches it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteRow {
    pub remote: IpAddr,
    /// The VNI the peer expects.
    pub vni: Vni,
    pub udp_port: u16,
    pub local: Option<IpAddr>,
    /// Underlay device.
    pub dev: Option<String>,
    pub next_hop: Option<IpAddr>,
    pub mac: Option<MacAddr>,
    /// FDB entries of this VXLAN device that point here.
    pub fdb_entries: u64,
    pub accelerated: bool,
    pub reason: Option<String>,
}

/// Health of the mirror (R40).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Losses of notifications since the start.
    pub overruns: u64,
    /// Entries and remotes left to the kernel because a map was full, since the
    /// start.
    pub map_full: u64,
    /// Entries left to the kernel for that reason now.
    pub waiting: u64,
    /// In the map.
    pub fdb_entries: u64,
    pub fdb_capacity: u64,
    /// In the tables of bridges and VXLAN devices, all of them.
    pub kernel_fdb_entries: u64,
}

/// The reason of a refusal, for people.
fn text<T>(verdict: &Result<T, Reason>) -> Option<String> {
    verdict
        .as_ref()
        .err()
        .map(|reason| reason.clone().into_owned())
}

impl Model {
    fn name(&self, ifindex: IfIndex) -> String {
        self.world.name(ifindex).to_owned()
    }

    pub fn uplinks(&self) -> Vec<UplinkRow> {
        let uplinks = self.uplinks.values().map(|uplink| UplinkRow {
            ifindex: uplink.ifindex,
            name: self.name(uplink.ifindex),
            hook: (uplink.accelerated.is_ok()).then_some(Hook::Xdp(self.settings.xdp_mode)),
            reason: text(&uplink.accelerated),
        });
        uplinks.collect()
    }

    /// In the order of VNIs.
    pub fn segments(&self) -> Vec<SegmentRow> {
        let mut views: Vec<SegmentRow> = self
            .segments
            .values()
            .map(|segment| self.segment_row(segment))
            .collect();
        views.sort_by_key(|view| (view.vni, view.vxlan, view.vlan));
        views
    }

    fn segment_row(&self, segment: &Segment) -> SegmentRow {
        let device = self
            .world
            .vxlan(segment.tunnel.vxlan)
            .map(|(_, device)| device);
        let derived = Some(segment.policy.local).filter(|ip| !ip.is_unspecified());
        SegmentRow {
            vni: segment.vni,
            segment: segment.id.as_ref().ok().copied(),
            vxlan: segment.tunnel.vxlan,
            vxlan_name: self.name(segment.tunnel.vxlan),
            source_vni: segment.tunnel.source_vni,
            bridge: segment.bridge,
            bridge_name: segment.bridge.map(|bridge| self.name(bridge)),
            vlan: (segment.vlan != 0).then_some(segment.vlan),
            local: derived.or_else(|| device?.local),
            udp_port: segment.policy.udp_port,
            learning: segment.learning,
            strict: self.is_strict(segment) == Ok(true),
            reason: text(&segment.id),
        }
    }

    fn segment_of_vni(&self, vni: Vni) -> Option<&Segment> {
        let segments = self.segments.values().filter(|segment| segment.vni == vni);
        segments.min_by_key(|segment| (segment.id.is_err(), segment.tunnel))
    }

    /// The segment of a VNI; the accelerated one where several share it.
    pub fn segment(&self, vni: Vni) -> Option<SegmentRow> {
        self.segment_of_vni(vni)
            .map(|segment| self.segment_row(segment))
    }

    pub fn ports(&self) -> Vec<PortRow> {
        let ports = self.ports.iter();
        ports
            .filter_map(|(member, port)| self.port_row(*member, port))
            .collect()
    }

    fn port_row(&self, member: Member, port: &PortPlan) -> Option<PortRow> {
        let ifindex = member.ifindex;
        Some(PortRow {
            ifindex,
            name: self.name(ifindex),
            vni: self.segments.get(&port.tunnel)?.vni,
            vlan: (member.vlan != 0).then_some(member.vlan),
            hook: port.accelerated.as_ref().ok().map(|fast| fast.hook),
            via: self.via(port),
            reason: text(&port.accelerated),
        })
    }

    /// The segments that a port is a member of.
    pub fn port(&self, name: &str) -> Vec<PortRow> {
        let members = self.ports.iter();
        members
            .filter(|(member, _)| self.world.name(member.ifindex) == name)
            .filter_map(|(member, port)| self.port_row(*member, port))
            .collect()
    }

    /// Forwarding entries of all segments, or of one; of all MACs, or of one.
    pub fn fdb_rows(&self, vni: Option<Vni>, mac: Option<MacAddr>) -> Vec<FdbRow> {
        if let (Some(vni), Some(mac)) = (vni, mac) {
            return self
                .segment_of_vni(vni)
                .and_then(|s| self.row(s, mac))
                .into_iter()
                .collect();
        }
        let mut rows = Vec::new();
        for segment in self
            .segments
            .values()
            .filter(|s| vni.is_none_or(|vni| s.vni == vni))
        {
            let bridge = segment
                .domain()
                .and_then(|domain| self.world.bridges.get(&domain));
            let vxlan = self.world.vxlans.get(&segment.tunnel);
            let known = bridge.into_iter().flat_map(|table| table.keys());
            let macs: BTreeSet<MacAddr> = known
                .chain(vxlan.into_iter().flat_map(|table| table.keys()))
                .copied()
                .collect();
            let macs = macs
                .into_iter()
                .filter(|known| mac.is_none_or(|mac| mac == *known));
            rows.extend(macs.filter_map(|mac| self.row(segment, mac)));
        }
        rows.sort_by_key(|row| (row.vni, row.mac));
        rows
    }

    /// Port a MAC is behind, as the bridge of a VNI has it.
    pub fn bridge_port_of(&self, vni: Vni, mac: MacAddr) -> Option<IfIndex> {
        let domain = self.segment_of_vni(vni)?.domain()?;
        self.world.bridge_entry(domain, mac).map(|entry| entry.port)
    }

    /// Whether a MAC is one of the host's own in a VNI: a device of the bridge
    /// has it, and frames to it end here.
    pub fn is_of_host(&self, vni: Vni, mac: MacAddr) -> bool {
        let domain = self.segment_of_vni(vni).and_then(Segment::domain);
        domain.is_some_and(|domain| {
            let entry = self.world.bridge_entry(domain, mac);
            entry.is_some_and(|entry| entry.is_local(domain))
        })
    }

    /// Whether the kernel has learned all it knows of a MAC by itself.
    pub fn is_learned(&self, vni: Vni, mac: MacAddr) -> bool {
        let Some(segment) = self.segment_of_vni(vni) else {
            return false;
        };
        let bridge = segment
            .domain()
            .and_then(|d| self.world.bridge_entry(d, mac));
        let vxlan = self.world.vxlan_entry(segment.tunnel, mac);
        bridge.is_none_or(|entry| entry.ages()) && vxlan.is_none_or(|entry| entry.ages())
    }

    /// Whether the VXLAN device finds a MAC by a nexthop object.
    pub fn has_nexthop(&self, vni: Vni, mac: MacAddr) -> bool {
        let segment = self.segment_of_vni(vni);
        let entry = segment.and_then(|s| self.world.vxlan_entry(s.tunnel, mac));
        entry.is_some_and(|entry| entry.to.nexthop_id.is_some())
    }

    /// Whether an entry only waits for the answer of its next hop.
    pub fn is_resolving(&self, vni: Vni, mac: MacAddr) -> bool {
        let segment = self.segment_of_vni(vni).filter(|s| s.id.is_ok());
        match segment.map(|segment| decide(&self.world, segment, mac)) {
            Some(Decision::At(Owner::Remote(key))) => {
                self.ways.get(&key).is_some_and(|way| way.resolving)
            }
            _ => false,
        }
    }

    /// What the host itself needs a device for, as a sentence without subject.
    pub fn use_of_host(&self, ifindex: IfIndex) -> Option<String> {
        if self.uplinks.contains_key(&ifindex) {
            return Some("is an uplink".to_owned());
        }
        let mut addresses = self.world.addresses_of(ifindex);
        let own = addresses.find(|ip| !is_link_local(*ip));
        own.map(|ip| format!("has the address {ip}"))
    }

    /// Default destinations of a VNI: who gets broadcast and unknown unicast.
    pub fn flood_list(&self, vni: Vni) -> Vec<IpAddr> {
        let segment = self.segment_of_vni(vni);
        let flood = segment.and_then(|segment| self.world.floods.get(&segment.tunnel));
        flood
            .into_iter()
            .flatten()
            .filter_map(|to| to.dst)
            .collect()
    }

    /// A device, as the kernel described it last.
    pub fn link(&self, ifindex: IfIndex) -> Option<&Link> {
        self.world.links.get(&ifindex)
    }

    /// `None` for what neither table knows, and for the host's own addresses.
    fn row(&self, segment: &Segment, mac: MacAddr) -> Option<FdbRow> {
        let domain = segment.domain();
        let entry = domain.and_then(|domain| self.world.bridge_entry(domain, mac));
        if entry
            .zip(domain)
            .is_some_and(|(entry, domain)| entry.is_local(domain))
        {
            return None;
        }
        let vxlan = self.world.vxlan_entry(segment.tunnel, mac);
        let place = match (entry, vxlan) {
            (Some(entry), _) if entry.port != segment.tunnel.vxlan => {
                RowPlace::Port(self.name(entry.port))
            }
            (_, Some(vxlan)) => match vxlan.to.dst {
                Some(dst) => RowPlace::Remote(dst),
                None => RowPlace::Port(self.name(segment.tunnel.vxlan)),
            },
            (Some(_), None) => RowPlace::Port(self.name(segment.tunnel.vxlan)),
            (None, None) => return None,
        };
        let state = entry
            .map(|entry| entry.state)
            .or(vxlan.map(|entry| entry.state))?;
        let owner = if self.api.contains(&(segment.vni, mac)) {
            RowOwner::Api
        } else if state & (bits::NUD_NOARP | bits::NUD_PERMANENT) != 0 {
            RowOwner::Static
        } else {
            RowOwner::Kernel
        };
        let written = segment
            .id
            .as_ref()
            .ok()
            .and_then(|id| self.written.fdb.get(id)?.get(&mac));
        let location = written.map_or(Location::NONE, |written| written.location);
        let accelerated = self.locations.value(location).place() != Place::Kernel;
        Some(FdbRow {
            vni: segment.vni,
            vlan: (segment.vlan != 0).then_some(segment.vlan),
            mac,
            place,
            owner,
            generation: written.map_or(0, |written| written.generation.into()),
            accelerated,
            reason: (!accelerated).then(|| self.reason(segment, mac).into_owned()),
        })
    }

    /// Why an entry is left to the kernel.
    fn reason(&self, segment: &Segment, mac: MacAddr) -> Reason {
        let id = match &segment.id {
            Ok(id) => *id,
            Err(reason) => return format!("segment: {reason}").into(),
        };
        let key = FdbKey::new(id, mac);
        if self.waiting.room.contains(&key) {
            return "the FDB map is full".into();
        }
        if self.waiting.location.contains(&key) {
            return "the map of locations is full".into();
        }
        match decide(&self.world, segment, mac) {
            Decision::Absent(reason) | Decision::Kernel(reason) => reason.into(),
            Decision::At(Owner::Port { domain, ifindex }) => {
                let member = Member {
                    ifindex,
                    vlan: domain.vlan,
                };
                match self.ports.get(&member).map(|port| &port.accelerated) {
                    Some(Err(reason)) => format!("port: {reason}").into(),
                    Some(Ok(_)) => "not written yet".into(),
                    None if domain.vlan == 0 => "its port is not a member of the bridge".into(),
                    None => "its port is not a member of the VLAN".into(),
                }
            }
            Decision::At(Owner::Remote(key)) => self.remote_reason(&key),
        }
    }

    fn remote_reason(&self, key: &RemoteKey) -> Reason {
        match self.ways.get(key).map(|way| &way.header) {
            Some(Err(reason)) => reason.clone(),
            _ => "not written yet".into(),
        }
    }

    /// The remotes that entries point to, by VXLAN device.
    pub fn remotes(&self) -> Vec<RemoteRow> {
        let mut counts: BTreeMap<(Tunnel, u32), u64> = BTreeMap::new();
        for (id, table) in &self.written.fdb {
            let Some(segment) = self.segment_by_id(*id) else {
                continue;
            };
            for entry in table
                .values()
                .filter(|entry| entry.location != Location::NONE)
            {
                *counts.entry((segment.tunnel, entry.location)).or_default() += 1;
            }
        }
        let mut rows: Vec<RemoteRow> = counts
            .into_iter()
            .filter_map(|((tunnel, index), entries)| self.remote_row(tunnel, index, entries))
            .collect();
        rows.sort_by_key(|row| (row.vni, row.remote));
        rows
    }

    fn remote_row(&self, tunnel: Tunnel, index: u32, fdb_entries: u64) -> Option<RemoteRow> {
        let Owner::Remote(key) = self.locations.owner(index)? else {
            return None;
        };
        let way = self.ways.get(&key);
        let accelerated = self.locations.value(index).place() != Place::Kernel;
        Some(RemoteRow {
            remote: key.remote,
            vni: key
                .vni()
                .or_else(|| Some(self.segments.get(&tunnel)?.vni))?,
            udp_port: key.policy.udp_port,
            local: Some(key.policy.local),
            dev: way
                .and_then(|way| way.ifindex)
                .map(|ifindex| self.name(ifindex)),
            next_hop: way.and_then(|way| way.next_hop),
            mac: way.and_then(|way| way.mac),
            fdb_entries,
            accelerated,
            reason: (!accelerated).then(|| self.remote_reason(&key).into_owned()),
        })
    }

    pub fn counters(&self) -> Counters {
        Counters {
            overruns: self.overruns,
            map_full: self.map_full,
            waiting: (self.waiting.room.len() + self.waiting.location.len()) as u64,
            fdb_entries: self.written.fdb_entries.into(),
            fdb_capacity: self.settings.capacity.fdb.into(),
            kernel_fdb_entries: self.world.fdb_entries(),
        }
    }

    /// What is wrong and belongs to no row, one sentence each.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if let Some(reason) = &self.refusals.config {
            warnings.push(format!("the programs cannot be configured: {reason}"));
        }
        for (update, reason) in &self.refusals.removals {
            warnings.push(format!("{update:?} failed: {reason}"));
        }
        for segment in self.segments.values().filter(|s| s.id.is_ok()) {
            if let Err(reason) = self.is_strict(segment) {
                warnings.push(format!("VNI {} is not strict: {reason}", segment.vni));
            }
        }
        if self.waiting.refused {
            warnings.push("the kernel takes no more FDB entries".to_owned());
        }
        warnings
    }
}
