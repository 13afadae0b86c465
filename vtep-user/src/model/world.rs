//! What the kernel has said, kept in a form that answers the model's questions
//! at once. Facts only: no decision is made here. Forwarding entries come by the
//! hundred thousand, so they are small and an update of one is O(1).

use std::collections::hash_map::Entry as Slot;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use vtep_common::{MacAddr, Vni};

use super::peers::Peers;
use crate::kernel::{
    Address, Bridge, FdbEntry, FdbTable, Filters, IfIndex, Link, LinkKind, Neighbour, Snapshot,
    VlanRange, VniRange, VxlanDevice, bits,
};

/// What a forwarding table of a bridge is about: the bridge and the VLAN the
/// kernel looks addresses up in (0: bridge that is not VLAN-aware).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Domain {
    pub bridge: IfIndex,
    pub vlan: u16,
}

/// What a forwarding table of a VXLAN device is about: the device, and the VNI on
/// a single VXLAN device (`external`), whose table has an extra key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Tunnel {
    pub vxlan: IfIndex,
    pub source_vni: Option<Vni>,
}

/// Entry of a bridge's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BridgeEntry {
    pub port: IfIndex,
    /// NUD_* bits.
    pub state: u16,
    /// NTF_* bits.
    pub flags: u8,
}

impl BridgeEntry {
    /// BR_FDB_LOCAL, shown as NUD_PERMANENT (net/bridge/br_fdb.c, fdb_to_nud):
    /// frames to it end in this host.
    pub fn is_local(self, domain: Domain) -> bool {
        self.state & bits::NUD_PERMANENT != 0 || self.port == domain.bridge
    }

    pub fn ages(self) -> bool {
        ages(self.state, self.flags)
    }
}

/// Entry of a VXLAN device's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct VxlanEntry {
    pub to: Destination,
    /// NUD_* bits.
    pub state: u16,
    /// NTF_* bits.
    pub flags: u8,
    /// A dump showed more than one destination. The kernel keeps lists for
    /// group addresses only (vxlan_core.c, vxlan_fdb_update_existing), so a
    /// notification about a station replaces what is known.
    pub several: bool,
}

impl VxlanEntry {
    pub fn ages(self) -> bool {
        ages(self.state, self.flags)
    }
}

/// br_fdb_cleanup and vxlan_cleanup spare the same entries.
fn ages(state: u16, flags: u8) -> bool {
    state & (bits::NUD_PERMANENT | bits::NUD_NOARP) == 0 && flags & bits::NTF_EXT_LEARNED == 0
}

impl Tunnel {
    fn of(entry: &FdbEntry) -> Self {
        Self {
            vxlan: entry.ifindex,
            source_vni: entry.source_vni,
        }
    }
}

/// Where a VXLAN device sends frames for an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Destination {
    pub dst: Option<IpAddr>,
    pub nexthop_id: Option<u32>,
    pub via: Option<IfIndex>,
    pub vni: Option<Vni>,
    pub udp_port: Option<u16>,
}

impl Destination {
    fn of(entry: &FdbEntry) -> Self {
        Self {
            dst: entry.dst,
            nexthop_id: entry.nexthop_id,
            via: entry.via,
            vni: entry.vni,
            udp_port: entry.udp_port,
        }
    }
}

/// The entry after which a forwarding decision has to be made again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Touched {
    Bridge(Domain, MacAddr),
    Vxlan(Tunnel, MacAddr),
}

#[derive(Debug, Default)]
pub(super) struct World {
    pub links: BTreeMap<IfIndex, Link>,
    /// VLANs of bridge ports.
    pub vlans: BTreeMap<IfIndex, Vec<VlanRange>>,
    /// VNIs of VXLAN devices with `vnifilter`.
    pub vnis: BTreeMap<IfIndex, Vec<VniRange>>,
    pub addresses: BTreeSet<(IfIndex, IpAddr)>,
    /// Neighbours with a usable address.
    pub neighbours: HashMap<(IfIndex, IpAddr), MacAddr>,
    pub filters: Filters,
    /// Devices that take redirected frames, where the kernel tells.
    pub redirect_targets: Option<BTreeSet<IfIndex>>,
    /// tc programs and filters of somebody else, in words, by device.
    pub tc: BTreeMap<IfIndex, String>,
    pub bridges: HashMap<Domain, HashMap<MacAddr, BridgeEntry>>,
    pub vxlans: HashMap<Tunnel, HashMap<MacAddr, VxlanEntry>>,
    /// VXLAN devices that have, or had, remotes with IPv6 addresses.
    v6_devices: BTreeSet<IfIndex>,
    /// Default destinations of VXLAN devices (the all-zero entries).
    pub floods: HashMap<Tunnel, Vec<Destination>>,
    /// Entries of VXLAN devices for multicast addresses.
    groups: HashMap<Tunnel, Vec<(MacAddr, Destination)>>,
    /// Addresses of all entries of VXLAN devices.
    pub peers: Peers,
}

impl World {
    pub fn from_snapshot(snapshot: Snapshot) -> Self {
        let mut world = Self {
            links: snapshot.links.into_iter().map(|l| (l.ifindex, l)).collect(),
            vlans: snapshot.vlans,
            vnis: snapshot.vnis,
            filters: snapshot.filters,
            redirect_targets: snapshot.redirect_targets,
            ..Self::default()
        };
        for address in &snapshot.addresses {
            world.add_address(address);
        }
        for neighbour in &snapshot.neighbours {
            world.set_neighbour(neighbour);
        }
        for entry in &snapshot.fdb {
            world.note_family(entry);
            let tunnel = Tunnel::of(entry);
            let seen = world.vxlan_entry(tunnel, entry.mac).copied();
            world.set_fdb(entry);
            if entry.table == FdbTable::Vxlan
                && seen.is_some_and(|old| old.to != Destination::of(entry))
                && let Some(now) = world.vxlans.get_mut(&tunnel)
                && let Some(now) = now.get_mut(&entry.mac)
            {
                now.several = true;
            }
        }
        world
    }

    /// Whether frames redirected to a device arrive, as far as the kernel tells.
    pub fn takes_redirected(&self, link: &Link) -> bool {
        match &self.redirect_targets {
            Some(targets) => targets.contains(&link.ifindex),
            // Nobody tells (before Linux 6.3); with a veth it depends on its peer.
            None => link.kind != LinkKind::Veth,
        }
    }

    /// Name of a device, for people.
    pub fn name(&self, ifindex: IfIndex) -> &str {
        self.links
            .get(&ifindex)
            .map_or("a device that is gone", |l| &l.name)
    }

    pub fn vxlan(&self, ifindex: IfIndex) -> Option<(&Link, &VxlanDevice)> {
        let link = self.links.get(&ifindex)?;
        match &link.kind {
            LinkKind::Vxlan(device) => Some((link, device)),
            _ => None,
        }
    }

    pub fn bridge(&self, ifindex: IfIndex) -> Option<&Bridge> {
        match &self.links.get(&ifindex)?.kind {
            LinkKind::Bridge(bridge) => Some(bridge),
            _ => None,
        }
    }

    /// The VLANs of a bridge port; none on a bridge that is not VLAN-aware, where
    /// they mean nothing.
    pub fn port_vlans(&self, port: &Link) -> &[VlanRange] {
        let bridge = port.master.and_then(|bridge| self.bridge(bridge));
        match self.vlans.get(&port.ifindex) {
            Some(vlans) if bridge.is_some_and(|bridge| bridge.vlan_filtering) => vlans,
            _ => &[],
        }
    }

    /// Lifetime of idle dynamic entries of a bridge.
    pub fn bridge_ageing(&self, ifindex: IfIndex) -> Option<Duration> {
        let bridge = self.bridge(ifindex)?;
        Some(Duration::from_millis(bridge.ageing_ms))
    }

    pub fn is_bridge(&self, ifindex: IfIndex) -> bool {
        self.bridge(ifindex).is_some()
    }

    /// The VRF a device is in.
    pub fn vrf_of(&self, ifindex: IfIndex) -> Option<IfIndex> {
        let master = self.links.get(&ifindex)?.master?;
        let kind = &self.links.get(&master)?.kind;
        matches!(kind, LinkKind::Other(kind) if kind == "vrf").then_some(master)
    }

    pub fn addresses_of(&self, ifindex: IfIndex) -> impl Iterator<Item = IpAddr> + '_ {
        let first = (ifindex, IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let from = self.addresses.range(first..);
        from.take_while(move |(device, _)| *device == ifindex)
            .map(|(_, ip)| *ip)
    }

    /// Whether the table of a VXLAN device has remotes with IPv6 addresses.
    pub fn has_v6_entries(&self, vxlan: IfIndex) -> bool {
        self.v6_devices.contains(&vxlan)
    }

    /// Note the family of a VXLAN device's remotes; whether it is news.
    pub fn note_family(&mut self, entry: &FdbEntry) -> bool {
        entry.table == FdbTable::Vxlan
            && matches!(entry.dst, Some(IpAddr::V6(_)))
            && self.v6_devices.insert(entry.ifindex)
    }

    pub fn bridge_entry(&self, domain: Domain, mac: MacAddr) -> Option<&BridgeEntry> {
        self.bridges.get(&domain)?.get(&mac)
    }

    pub fn vxlan_entry(&self, tunnel: Tunnel, mac: MacAddr) -> Option<&VxlanEntry> {
        self.vxlans.get(&tunnel)?.get(&mac)
    }

    pub fn add_address(&mut self, address: &Address) -> bool {
        self.addresses.insert((address.ifindex, address.address))
    }

    pub fn remove_address(&mut self, address: &Address) -> bool {
        self.addresses.remove(&(address.ifindex, address.address))
    }

    /// The key of the neighbour if its usable address changed.
    pub fn set_neighbour(&mut self, neighbour: &Neighbour) -> Option<(IfIndex, IpAddr)> {
        let usable = neighbour
            .mac
            .filter(|mac| neighbour.state & bits::NUD_VALID != 0 && mac.is_station());
        self.change_neighbour(neighbour, usable)
    }

    pub fn remove_neighbour(&mut self, neighbour: &Neighbour) -> Option<(IfIndex, IpAddr)> {
        self.change_neighbour(neighbour, None)
    }

    fn change_neighbour(
        &mut self,
        neighbour: &Neighbour,
        usable: Option<MacAddr>,
    ) -> Option<(IfIndex, IpAddr)> {
        let key = (neighbour.ifindex, neighbour.address);
        let before = match usable {
            Some(mac) => self.neighbours.insert(key, mac),
            None => self.neighbours.remove(&key),
        };
        (before != usable).then_some(key)
    }

    /// Take in a forwarding entry; what has to be decided again, if anything.
    pub fn set_fdb(&mut self, entry: &FdbEntry) -> Option<Touched> {
        match entry.table {
            FdbTable::Bridge => {
                let domain = self.domain_of(entry)?;
                let new = BridgeEntry {
                    port: entry.ifindex,
                    state: entry.state,
                    flags: entry.flags,
                };
                if !entry.mac.is_station() {
                    return None;
                }
                let old = self
                    .bridges
                    .entry(domain)
                    .or_default()
                    .insert(entry.mac, new);
                let same = old.is_some_and(|old| {
                    old.port == new.port && old.is_local(domain) == new.is_local(domain)
                });
                (!same).then_some(Touched::Bridge(domain, entry.mac))
            }
            FdbTable::Vxlan => {
                let to = Destination::of(entry);
                let tunnel = Tunnel::of(entry);
                if entry.mac == MacAddr::ZERO {
                    let flood = self.floods.entry(tunnel).or_default();
                    if !flood.contains(&to) {
                        flood.push(to);
                        self.peers.add(tunnel, &to);
                    }
                    return None;
                }
                if !entry.mac.is_station() {
                    let group = self.groups.entry(tunnel).or_default();
                    if !group.contains(&(entry.mac, to)) {
                        group.push((entry.mac, to));
                        self.peers.add(tunnel, &to);
                    }
                    return None;
                }
                let new = VxlanEntry {
                    to,
                    state: entry.state,
                    flags: entry.flags,
                    several: false,
                };
                let table = self.vxlans.entry(tunnel).or_default();
                let old = table.insert(entry.mac, new);
                if let Some(old) = &old {
                    self.peers.remove(tunnel, &old.to);
                }
                self.peers.add(tunnel, &to);
                match old {
                    Some(old) if old.to == to && !old.several => None,
                    _ => Some(Touched::Vxlan(tunnel, entry.mac)),
                }
            }
        }
    }

    /// Forget a forwarding entry, unless a newer one has taken its place (F1).
    pub fn remove_fdb(&mut self, entry: &FdbEntry) -> Option<Touched> {
        match entry.table {
            FdbTable::Bridge => {
                let domain = self.domain_of(entry)?;
                let table = self.bridges.get_mut(&domain)?;
                match table.entry(entry.mac) {
                    // Local entries go by any name: see `Event::FdbGone`.
                    Slot::Occupied(old)
                        if old.get().port == entry.ifindex || old.get().is_local(domain) =>
                    {
                        old.remove()
                    }
                    _ => return None,
                };
                if table.is_empty() {
                    self.bridges.remove(&domain);
                }
                Some(Touched::Bridge(domain, entry.mac))
            }
            FdbTable::Vxlan => {
                let (tunnel, to) = (Tunnel::of(entry), Destination::of(entry));
                if entry.mac == MacAddr::ZERO {
                    let flood = self.floods.get_mut(&tunnel)?;
                    let at = flood.iter().position(|known| *known == to)?;
                    flood.remove(at);
                    self.peers.remove(tunnel, &to);
                    return None;
                }
                if !entry.mac.is_station() {
                    let group = self.groups.get_mut(&tunnel)?;
                    let known = (entry.mac, to);
                    let at = group.iter().position(|entry| *entry == known)?;
                    group.swap_remove(at);
                    self.peers.remove(tunnel, &to);
                    return None;
                }
                let table = self.vxlans.get_mut(&tunnel)?;
                match table.entry(entry.mac) {
                    Slot::Occupied(old) if old.get().to == to => old.remove(),
                    _ => return None,
                };
                self.peers.remove(tunnel, &to);
                if table.is_empty() {
                    self.vxlans.remove(&tunnel);
                }
                Some(Touched::Vxlan(tunnel, entry.mac))
            }
        }
    }

    /// Entries of all tables.
    pub fn fdb_entries(&self) -> u64 {
        let bridges = self.bridges.values().map(HashMap::len);
        let vxlans = self.vxlans.values().map(HashMap::len);
        let floods = self.floods.values().map(Vec::len);
        bridges.chain(vxlans).chain(floods).sum::<usize>() as u64
    }

    /// Forget a device and all that stood in its tables. Entries that named it
    /// as their port are told apart by the caller's next look at its segment.
    pub fn remove_link(&mut self, ifindex: IfIndex) -> Option<Link> {
        self.bridges.retain(|domain, _| domain.bridge != ifindex);
        self.vxlans.retain(|tunnel, _| tunnel.vxlan != ifindex);
        self.floods.retain(|tunnel, _| tunnel.vxlan != ifindex);
        self.v6_devices.remove(&ifindex);
        self.groups.retain(|tunnel, _| tunnel.vxlan != ifindex);
        self.peers.remove_device(ifindex);
        self.tc.remove(&ifindex);
        self.vlans.remove(&ifindex);
        self.vnis.remove(&ifindex);
        let link = self.links.remove(&ifindex)?;
        if let Some(bridge) = link.master {
            for (domain, table) in &mut self.bridges {
                if domain.bridge == bridge {
                    table.retain(|_, entry| entry.port != ifindex);
                }
            }
        }
        Some(link)
    }

    fn domain_of(&self, entry: &FdbEntry) -> Option<Domain> {
        let master = || self.links.get(&entry.ifindex).and_then(|l| l.master);
        Some(Domain {
            bridge: entry.bridge.or_else(master)?,
            vlan: entry.vlan.unwrap_or(0),
        })
    }
}
