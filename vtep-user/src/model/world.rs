//! What the kernel has said, kept in a form that answers the model's questions
//! at once. Facts only: no decision is made here. Forwarding entries come by the
//! hundred thousand, so they are small and an update of one is O(1).

use std::collections::hash_map::Entry as Slot;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use vtep_common::{MacAddr, Vni};

use crate::kernel::{
    Address, FdbEntry, FdbTable, Filters, IfIndex, Link, LinkKind, Neighbour, Snapshot,
    VxlanDevice, bits,
};

/// What a forwarding table of a bridge is about: the bridge and the VLAN the
/// kernel looks addresses up in (0: bridge that is not VLAN-aware).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Domain {
    pub bridge: IfIndex,
    pub vlan: u16,
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

/// A forwarding decision that has to be made again.
pub(super) type Touched = (Domain, MacAddr);

#[derive(Debug, Default)]
pub(super) struct World {
    pub links: BTreeMap<IfIndex, Link>,
    pub addresses: BTreeSet<(IfIndex, IpAddr)>,
    /// IPv4 neighbours with a usable address.
    pub neighbours: HashMap<(IfIndex, Ipv4Addr), MacAddr>,
    pub filters: Filters,
    /// Devices that take redirected frames, where the kernel tells.
    pub redirect_targets: Option<BTreeSet<IfIndex>>,
    /// tc programs and filters of somebody else, in words, by device.
    pub tc: BTreeMap<IfIndex, String>,
    pub bridges: HashMap<Domain, HashMap<MacAddr, BridgeEntry>>,
    pub vxlans: HashMap<IfIndex, HashMap<MacAddr, VxlanEntry>>,
    /// Default destinations of VXLAN devices (the all-zero entries).
    pub floods: HashMap<IfIndex, Vec<Destination>>,
}

impl World {
    pub fn from_snapshot(snapshot: Snapshot) -> Self {
        let mut world = Self {
            links: snapshot.links.into_iter().map(|l| (l.ifindex, l)).collect(),
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
            let seen = world.vxlan_entry(entry.ifindex, entry.mac).copied();
            world.set_fdb(entry);
            if entry.table == FdbTable::Vxlan
                && seen.is_some_and(|old| old.to != Destination::of(entry))
                && let Some(now) = world.vxlans.get_mut(&entry.ifindex)
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

    /// Lifetime of idle dynamic entries of a bridge.
    pub fn bridge_ageing(&self, ifindex: IfIndex) -> Option<Duration> {
        match self.links.get(&ifindex)?.kind {
            LinkKind::Bridge(bridge) => Some(Duration::from_millis(bridge.ageing_ms)),
            _ => None,
        }
    }

    pub fn is_bridge(&self, ifindex: IfIndex) -> bool {
        matches!(
            self.links.get(&ifindex).map(|l| &l.kind),
            Some(LinkKind::Bridge(_))
        )
    }

    pub fn bridge_entry(&self, domain: Domain, mac: MacAddr) -> Option<&BridgeEntry> {
        self.bridges.get(&domain)?.get(&mac)
    }

    pub fn vxlan_entry(&self, ifindex: IfIndex, mac: MacAddr) -> Option<&VxlanEntry> {
        self.vxlans.get(&ifindex)?.get(&mac)
    }

    pub fn add_address(&mut self, address: &Address) -> bool {
        self.addresses.insert((address.ifindex, address.address))
    }

    pub fn remove_address(&mut self, address: &Address) -> bool {
        self.addresses.remove(&(address.ifindex, address.address))
    }

    /// The key of the neighbour if its usable address changed.
    pub fn set_neighbour(&mut self, neighbour: &Neighbour) -> Option<(IfIndex, Ipv4Addr)> {
        let usable = neighbour
            .mac
            .filter(|mac| neighbour.state & bits::NUD_VALID != 0 && mac.is_station());
        self.change_neighbour(neighbour, usable)
    }

    pub fn remove_neighbour(&mut self, neighbour: &Neighbour) -> Option<(IfIndex, Ipv4Addr)> {
        self.change_neighbour(neighbour, None)
    }

    fn change_neighbour(
        &mut self,
        neighbour: &Neighbour,
        usable: Option<MacAddr>,
    ) -> Option<(IfIndex, Ipv4Addr)> {
        let IpAddr::V4(address) = neighbour.address else {
            return None;
        };
        let key = (neighbour.ifindex, address);
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
                (!same).then_some((domain, entry.mac))
            }
            FdbTable::Vxlan => {
                let to = Destination::of(entry);
                // Entries of a single VXLAN device: not mirrored, see `segments`.
                if entry.source_vni.is_some() {
                    return None;
                }
                if entry.mac == MacAddr::ZERO {
                    let flood = self.floods.entry(entry.ifindex).or_default();
                    if !flood.contains(&to) {
                        flood.push(to);
                    }
                    return None;
                }
                if !entry.mac.is_station() {
                    return None;
                }
                let new = VxlanEntry {
                    to,
                    state: entry.state,
                    flags: entry.flags,
                    several: false,
                };
                let table = self.vxlans.entry(entry.ifindex).or_default();
                match table.insert(entry.mac, new) {
                    Some(old) if old.to == to && !old.several => None,
                    _ => self.touched_behind(entry),
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
                Some((domain, entry.mac))
            }
            FdbTable::Vxlan => {
                let to = Destination::of(entry);
                if entry.mac == MacAddr::ZERO {
                    if let Some(flood) = self.floods.get_mut(&entry.ifindex) {
                        flood.retain(|known| *known != to);
                    }
                    return None;
                }
                let table = self.vxlans.get_mut(&entry.ifindex)?;
                match table.entry(entry.mac) {
                    Slot::Occupied(old) if old.get().to == to => old.remove(),
                    _ => return None,
                };
                if table.is_empty() {
                    self.vxlans.remove(&entry.ifindex);
                }
                self.touched_behind(entry)
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
        self.vxlans.remove(&ifindex);
        self.floods.remove(&ifindex);
        self.tc.remove(&ifindex);
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

    fn touched_behind(&self, entry: &FdbEntry) -> Option<Touched> {
        let bridge = self.links.get(&entry.ifindex)?.master?;
        Some((Domain { bridge, vlan: 0 }, entry.mac))
    }
}
