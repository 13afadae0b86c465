//! Which VXLAN devices are mirrored, as what, and why the others are not. A
//! segment is (bridge, VLAN) <-> VNI <-> VXLAN device. Whatever the fast path
//! does not do exactly as the kernel leaves the whole segment to the kernel (R41).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use vtep_common::Vni;
use vtep_common::layout::{SegmentId, UDP_PORTS_MAX, VniKey};

use super::header::{self, Policy};
use super::world::{Domain, World};
use super::{Reason, Refusals, Settings};
use crate::kernel::{Bridge, BridgePort, IfIndex, Link, LinkKind, VxlanDevice};

/// BR_STATE_FORWARDING (include/uapi/linux/if_bridge.h).
const FORWARDING: u8 = 3;

/// A VXLAN device and what it is mapped to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Segment {
    pub vxlan: IfIndex,
    pub vni: Vni,
    pub bridge: Option<IfIndex>,
    pub vlan: u16,
    pub key: VniKey,
    /// Underlay device, if one is named.
    pub link: Option<IfIndex>,
    pub policy: Policy,
    /// Bytes behind the inner Ethernet header.
    pub mtu: u32,
    pub learning: bool,
    /// Frames from strangers are to be dropped.
    pub strict: bool,
    /// IPv6 frames without a UDP checksum are taken.
    pub zero_checksum: bool,
    /// Number in the maps, or why the segment is left to the kernel.
    pub id: Result<SegmentId, Reason>,
}

impl Segment {
    pub fn domain(&self) -> Option<Domain> {
        let vlan = self.vlan;
        self.bridge.map(|bridge| Domain { bridge, vlan })
    }

    /// Whether every forwarding entry may have to be decided again.
    pub fn leads_elsewhere(&self, other: &Self) -> bool {
        (self.vxlan, self.vni, self.domain(), self.policy, &self.id)
            != (
                other.vxlan,
                other.vni,
                other.domain(),
                other.policy,
                &other.id,
            )
    }
}

/// Numbers of the segments. A number stays taken until the last FDB entry
/// under it is gone.
#[derive(Debug)]
pub(super) struct Ids {
    pub taken: BTreeMap<SegmentId, VniKey>,
    end: u32,
}

impl Ids {
    pub fn new(capacity: u32) -> Self {
        Self {
            taken: BTreeMap::new(),
            end: capacity.min(u32::from(SegmentId::MAX) + 1),
        }
    }

    fn find(&self, key: VniKey) -> Option<SegmentId> {
        let mut taken = self.taken.iter();
        taken.find(|(_, owner)| **owner == key).map(|(id, _)| *id)
    }

    fn take(&mut self, key: VniKey) -> Option<SegmentId> {
        let mut free = (1..self.end).map_while(|id| SegmentId::try_from(id).ok());
        let id = free.find(|id| !self.taken.contains_key(id))?;
        self.taken.insert(id, key);
        Some(id)
    }
}

/// All segments, by VXLAN device.
pub(super) type Segments = BTreeMap<IfIndex, Segment>;

/// What a plan could not do for lack of room.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shortage {
    pub segments: u32,
    pub ports: u32,
}

/// Decide about every VXLAN device. `udp_ports`: those the programs compare
/// against now, kept where there are too many.
pub(super) fn plan(
    world: &World,
    settings: &Settings,
    refusals: &Refusals,
    ids: &mut Ids,
    udp_ports: &[u16],
    shortage: &mut Shortage,
) -> Segments {
    let mut segments = Segments::new();
    let mut by_bridge: HashMap<IfIndex, Vec<&str>> = HashMap::new();
    let mut by_key: HashMap<VniKey, Vec<&str>> = HashMap::new();
    for (link, device) in devices(world) {
        if let Some(bridge) = link.master {
            by_bridge.entry(bridge).or_default().push(&link.name);
        }
        let key = key_of(world, link, device);
        by_key.entry(key).or_default().push(&link.name);
    }
    for (link, device) in devices(world) {
        let key = key_of(world, link, device);
        let local = local_address(world, device, key.is_v6());
        let other = |names: &[&str]| {
            names
                .iter()
                .find(|n| **n != link.name)
                .map(|n| n.to_string())
        };
        let alone = match (
            link.master.and_then(|b| other(&by_bridge[&b])),
            other(&by_key[&key]),
        ) {
            (Some(other), _) => {
                Err(format!("its bridge has a second VXLAN device, {other}").into())
            }
            (_, Some(other)) => {
                Err(format!("{other} has the same VNI and UDP port, which is ambiguous").into())
            }
            _ => Ok(()),
        };
        let verdict = named(settings, link)
            .and_then(|()| device_options(device))
            .and_then(|()| membership(world, link))
            .and(alone)
            .and_then(|()| local.clone().map(|_| ()))
            .and_then(|()| match refusals.segments.get(&key) {
                Some(reason) => Err(reason.clone()),
                None => Ok(()),
            });
        let learns = link.bridge_port.is_some_and(|port| port.learning);
        segments.insert(
            link.ifindex,
            Segment {
                vxlan: link.ifindex,
                vni: device.vni,
                bridge: link.master.filter(|bridge| world.is_bridge(*bridge)),
                vlan: 0,
                key,
                link: device.link,
                policy: Policy::of(
                    device,
                    local.unwrap_or(unspecified(key.is_v6())),
                    device.link.and_then(|link| world.vrf_of(link)),
                ),
                mtu: link.mtu,
                learning: device.learning || learns,
                strict: settings.strict.of(device.vni),
                zero_checksum: key.is_v6() && device.udp6_zero_checksum_rx,
                id: verdict.map(|()| 0),
            },
        );
    }
    limit_udp_ports(&mut segments, udp_ports);
    number(&mut segments, ids, shortage);
    segments
}

fn devices(world: &World) -> impl Iterator<Item = (&Link, &VxlanDevice)> {
    world.links.values().filter_map(|link| match &link.kind {
        LinkKind::Vxlan(device) => Some((link, &**device)),
        _ => None,
    })
}

fn named(settings: &Settings, link: &Link) -> Result<(), Reason> {
    match &settings.vxlan {
        Some(names) if !names.contains(&link.name) => Err("not named in the configuration".into()),
        _ => Ok(()),
    }
}

fn device_options(device: &VxlanDevice) -> Result<(), Reason> {
    if device.collect_metadata || device.vnifilter {
        Err("single VXLAN device (external): not accelerated yet".into())
    } else if !device.foreign_options.is_empty() {
        let options = device.foreign_options.join(", ");
        Err(format!("option {options} changes frames in a way that is not mirrored").into())
    } else {
        Ok(())
    }
}

/// What a device receives. It is of one family, told by its addresses (without
/// any, the kernel takes IPv4 unless the device was made with `local ::`, which
/// it does not report; but then it takes entries of that family only).
fn key_of(world: &World, link: &Link, device: &VxlanDevice) -> VniKey {
    let v6 = match device.local.or(device.group) {
        Some(address) => address.is_ipv6(),
        None => world.has_v6_entries(link.ifindex),
    };
    if v6 {
        VniKey::v6(device.vni, device.udp_port)
    } else {
        VniKey::v4(device.vni, device.udp_port)
    }
}

const fn unspecified(v6: bool) -> IpAddr {
    if v6 {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    } else {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    }
}

/// The address frames are sent from and received on.
fn local_address(world: &World, device: &VxlanDevice, v6: bool) -> Result<IpAddr, Reason> {
    match device.local {
        Some(local) if header::is_host(local) => return Ok(local),
        Some(local) => return Err(format!("its local address {local} cannot be used").into()),
        None => {}
    }
    let Some(link) = device.link else {
        return Err("no local address: set `local` of the VXLAN device".into());
    };
    let usable = |ip: &IpAddr| ip.is_ipv6() == v6 && header::is_host(*ip) && !is_link_local(*ip);
    let of_link = world.addresses_of(link);
    let mut candidates = of_link.filter(usable);
    match (candidates.next(), candidates.next()) {
        (Some(only), None) => Ok(only),
        (None, _) => {
            let name = world.name(link);
            let family = if v6 { "IPv6" } else { "IPv4" };
            Err(format!("no local address: {name} has no {family} address").into())
        }
        _ => {
            let name = world.name(link);
            Err(format!("no local address, and {name} has several: set `local`").into())
        }
    }
}

/// Every device has one of these (RFC 4291); used as a source only if named.
pub(super) const fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(_) => false,
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

fn membership(world: &World, link: &Link) -> Result<(), Reason> {
    if !link.up {
        return Err("the VXLAN device is down".into());
    }
    let Some(master) = link.master else {
        return Err("not in a bridge".into());
    };
    let Some(bridge_link) = world.links.get(&master) else {
        return Err("its bridge is gone".into());
    };
    let LinkKind::Bridge(bridge) = bridge_link.kind else {
        return Err(format!("{} is not a bridge", bridge_link.name).into());
    };
    if !bridge_link.up {
        return Err(format!("bridge {} is down", bridge_link.name).into());
    }
    if bridge.vlan_filtering {
        return Err("VLAN-aware bridge: not accelerated yet".into());
    }
    filters(world, &bridge)?;
    port_flags(link.bridge_port.as_ref()).map_err(|reason| format!("bridge port: {reason}").into())
}

/// A filter is never bypassed.
fn filters(world: &World, bridge: &Bridge) -> Result<(), Reason> {
    let filters = &world.filters;
    if let Some(chain) = filters.bridge_chains.first() {
        return Err(format!("chain {chain} filters bridged frames").into());
    }
    if (filters.bridge_nf_call || bridge.nf_call)
        && let Some(chain) = filters.ip_chains.first()
    {
        return Err(format!("bridge-nf-call is on: chain {chain} filters bridged frames").into());
    }
    Ok(())
}

/// Whether the bridge forwards through this port without further conditions.
pub(super) fn port_flags(port: Option<&BridgePort>) -> Result<(), &'static str> {
    match port {
        None => Err("its state is not known"),
        Some(port) if port.state != FORWARDING => Err("not forwarding"),
        Some(port) if port.isolated => Err("isolated"),
        Some(port) if port.locked => Err("locked"),
        Some(port) if port.mab => Err("MAC authentication (mab)"),
        Some(port) if port.vlan_tunnel => Err("vlan_tunnel"),
        Some(port) if port.proxy_arp => Err("proxy ARP"),
        Some(port) if port.backup_port.is_some() => Err("has a backup port"),
        Some(_) => Ok(()),
    }
}

fn limit_udp_ports(segments: &mut Segments, current: &[u16]) {
    let accepted = segments.values().filter(|segment| segment.id.is_ok());
    let wanted: BTreeSet<u16> = accepted.map(|segment| segment.key.udp_port()).collect();
    let kept = current.iter().filter(|port| wanted.contains(port));
    let new = wanted.iter().filter(|port| !current.contains(port));
    let ports: BTreeSet<u16> = kept.chain(new).take(UDP_PORTS_MAX).copied().collect();
    for segment in segments.values_mut() {
        if segment.id.is_ok() && !ports.contains(&segment.key.udp_port()) {
            let reason = format!("more than {UDP_PORTS_MAX} different UDP ports");
            segment.id = Err(reason.into());
        }
    }
}

/// Give every accepted segment a number; those that have one keep it.
fn number(segments: &mut Segments, ids: &mut Ids, shortage: &mut Shortage) {
    for segment in segments.values_mut().filter(|segment| segment.id.is_ok()) {
        if let Some(id) = ids.find(segment.key) {
            segment.id = Ok(id);
        }
    }
    let mut rest: Vec<&mut Segment> = segments
        .values_mut()
        .filter(|segment| segment.id == Ok(0))
        .collect();
    rest.sort_by_key(|segment| (segment.vni, segment.vxlan));
    for segment in rest {
        segment.id = match ids.take(segment.key) {
            Some(id) => Ok(id),
            None => {
                shortage.segments += 1;
                Err(format!(
                    "segment table full ({} segments)",
                    ids.end.saturating_sub(1)
                )
                .into())
            }
        };
    }
}
