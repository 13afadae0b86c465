//! Which VXLAN devices are mirrored, as what, and why the others are not. A
//! segment is (bridge, VLAN) <-> VNI <-> VXLAN device. Whatever the fast path
//! does not do exactly as the kernel leaves the whole segment to the kernel (R41).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use vtep_common::Vni;
use vtep_common::layout::{SegmentId, UDP_PORTS_MAX, VniKey};

use super::header::{self, Policy};
use super::world::{Domain, Tunnel, World};
use super::{Reason, Refusals, Settings};
use crate::kernel::{
    Bridge, BridgePort, IfIndex, Link, LinkKind, VlanRange, VniRange, VxlanDevice,
};

/// BR_STATE_FORWARDING (include/uapi/linux/if_bridge.h).
const FORWARDING: u8 = 3;

/// A VXLAN device, or one VNI of a single VXLAN device, and what it is mapped to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Segment {
    pub tunnel: Tunnel,
    pub vni: Vni,
    pub bridge: Option<IfIndex>,
    /// 0: bridge that is not VLAN-aware.
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
        (self.vni, self.domain(), self.policy, &self.id)
            != (other.vni, other.domain(), other.policy, &other.id)
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

    fn by_key(&self) -> HashMap<VniKey, SegmentId> {
        self.taken.iter().map(|(id, key)| (*key, *id)).collect()
    }

    fn free(&self) -> Vec<SegmentId> {
        let all = (1..self.end).map_while(|id| SegmentId::try_from(id).ok());
        all.filter(|id| !self.taken.contains_key(id)).collect()
    }
}

/// All segments, by VXLAN table.
pub(super) type Segments = BTreeMap<Tunnel, Segment>;

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
    let mut rivals = Rivals::default();
    for (link, device) in devices(world) {
        rivals.add_domains(world, link, device);
        let verdict = named(settings, link)
            .and_then(|()| device_options(device))
            .and_then(|()| membership(world, link, device));
        let v6 = is_v6(world, link, device);
        let local = local_address(world, device, v6).unwrap_or(unspecified(v6));
        let vrf = device.link.and_then(|link| world.vrf_of(link));
        let learns = link.bridge_port.is_some_and(|port| port.learning);
        for mapping in mappings(world, link, device) {
            let key = key_of(v6, mapping.vni, device.udp_port);
            rivals.by_key.entry(key).or_default().push(&link.name);
            let id = verdict.clone().and(mapping.verdict);
            let segment = Segment {
                tunnel: Tunnel {
                    vxlan: link.ifindex,
                    source_vni: mapping.source_vni,
                },
                vni: mapping.vni,
                bridge: link.master.filter(|bridge| world.is_bridge(*bridge)),
                vlan: mapping.vlan,
                key,
                link: device.link,
                policy: Policy::of(device, local, vrf),
                mtu: link.mtu,
                learning: device.learning || learns,
                strict: settings.strict.of(mapping.vni),
                zero_checksum: v6 && device.udp6_zero_checksum_rx,
                id: id.map(|()| 0),
            };
            segments.insert(segment.tunnel, segment);
        }
    }
    for segment in segments.values_mut().filter(|segment| segment.id.is_ok()) {
        let Some((link, device)) = world.vxlan(segment.tunnel.vxlan) else {
            continue;
        };
        let verdict = rivals
            .alone(link, segment)
            .and_then(|()| local_address(world, device, segment.key.is_v6()).map(|_| ()))
            .and_then(|()| match refusals.segments.get(&segment.key) {
                Some(reason) => Err(reason.clone()),
                None => Ok(()),
            });
        segment.id = verdict.map(|()| 0);
    }
    limit_udp_ports(&mut segments, udp_ports);
    number(&mut segments, ids, shortage);
    segments
}

/// Names of the VXLAN devices in one place.
#[derive(Default)]
struct Rivals<'a> {
    by_domain: HashMap<Domain, Vec<&'a str>>,
    by_key: HashMap<VniKey, Vec<&'a str>>,
}

impl<'a> Rivals<'a> {
    /// Every VLAN that the bridge sends frames of to this device counts.
    fn add_domains(&mut self, world: &World, link: &'a Link, device: &VxlanDevice) {
        let Some(bridge) = link.master else { return };
        let aware = world.bridge(bridge).is_some_and(|b| b.vlan_filtering);
        let vlans = world.port_vlans(link).iter();
        let vlans = vlans
            .filter(|range| !device.collect_metadata || range.tunnel.is_some())
            .flat_map(|range| range.first..=range.last);
        let unaware = (!aware).then_some(0);
        for vlan in vlans.chain(unaware) {
            let domain = Domain { bridge, vlan };
            self.by_domain.entry(domain).or_default().push(&link.name);
        }
    }

    fn alone(&self, link: &Link, segment: &Segment) -> Result<(), Reason> {
        let other = |names: Option<&Vec<&'a str>>| {
            let mut names = names.into_iter().flatten();
            names.find(|name| **name != link.name).copied()
        };
        let domain = segment.domain();
        if let Some(other) = other(domain.and_then(|domain| self.by_domain.get(&domain))) {
            let what = match segment.vlan {
                0 => "its bridge".to_owned(),
                vlan => format!("VLAN {vlan} of its bridge"),
            };
            return Err(format!("{what} has a second VXLAN device, {other}").into());
        }
        if let Some(other) = other(self.by_key.get(&segment.key)) {
            let reason = format!("{other} has the same VNI and UDP port, which is ambiguous");
            return Err(reason.into());
        }
        Ok(())
    }
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
    if !device.foreign_options.is_empty() {
        let options = device.foreign_options.join(", ");
        Err(format!("option {options} changes frames in a way that is not mirrored").into())
    } else {
        Ok(())
    }
}

/// Whether a device's remotes have IPv6 addresses: it is of one family, told by
/// its addresses. Without any it is IPv4, unless it was made with `local ::`,
/// which the kernel does not report; but then it takes entries of that family
/// only.
fn is_v6(world: &World, link: &Link, device: &VxlanDevice) -> bool {
    match device.local.or(device.group) {
        Some(address) => address.is_ipv6(),
        None => world.has_v6_entries(link.ifindex),
    }
}

const fn key_of(v6: bool, vni: Vni, udp_port: u16) -> VniKey {
    if v6 {
        VniKey::v6(vni, udp_port)
    } else {
        VniKey::v4(vni, udp_port)
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

fn membership(world: &World, link: &Link, device: &VxlanDevice) -> Result<(), Reason> {
    if !link.up {
        return Err("the VXLAN device is down".into());
    }
    let Some(master) = link.master else {
        return Err("not in a bridge".into());
    };
    let Some(bridge_link) = world.links.get(&master) else {
        return Err("its bridge is gone".into());
    };
    let Some(bridge) = world.bridge(master) else {
        return Err(format!("{} is not a bridge", bridge_link.name).into());
    };
    if !bridge_link.up {
        return Err(format!("bridge {} is down", bridge_link.name).into());
    }
    if bridge.mst {
        return Err("multiple spanning trees (mst) on its bridge".into());
    }
    if bridge.vlan_filtering && bridge.service_vlans {
        return Err("its bridge filters service VLANs (802.1ad)".into());
    }
    filters(world, bridge)?;
    let mut port = link.bridge_port;
    if device.collect_metadata {
        if !bridge.vlan_filtering {
            return Err(
                "single VXLAN device (external) in a bridge that is not VLAN-aware: \
                        nothing maps a VNI to it"
                    .into(),
            );
        }
        if let Some(port) = &mut port
            && !std::mem::take(&mut port.vlan_tunnel)
        {
            return Err("single VXLAN device (external) without vlan_tunnel on".into());
        }
    }
    port_flags(port.as_ref()).map_err(|reason| format!("bridge port: {reason}").into())
}

/// What a VXLAN device maps to a VLAN, and whether the fast path can do the same.
struct Mapping {
    vni: Vni,
    /// On a single VXLAN device.
    source_vni: Option<Vni>,
    vlan: u16,
    verdict: Result<(), Reason>,
}

/// One for a device with a VNI of its own; one for each mapped VNI of a single
/// VXLAN device, and one that says why where there is none.
fn mappings(world: &World, link: &Link, device: &VxlanDevice) -> Vec<Mapping> {
    if !device.collect_metadata {
        let (vlan, verdict) = only_vlan(world, link);
        return vec![Mapping {
            vni: device.vni,
            source_vni: None,
            vlan,
            verdict,
        }];
    }
    let mut found = Vec::new();
    for range in world.port_vlans(link) {
        let Some(first) = range.tunnel else { continue };
        for (vlan, vni) in (range.first..=range.last).zip(first..) {
            // Zero is the kernel's "none" (br_handle_egress_vlan_tunnel).
            let Some(vni) = Vni::new(vni).filter(|vni| vni.get() != 0) else {
                continue;
            };
            found.push(Mapping {
                vni,
                source_vni: Some(vni),
                vlan,
                verdict: mapped(world, link, device, range, vlan, vni),
            });
        }
    }
    if found.is_empty() {
        found.push(Mapping {
            vni: device.vni,
            source_vni: None,
            vlan: 0,
            verdict: Err("single VXLAN device (external): no VLAN is mapped to a VNI".into()),
        });
    }
    found
}

/// The VLAN of a device with a VNI of its own: frames in the tunnel have no tag.
fn only_vlan(world: &World, link: &Link) -> (u16, Result<(), Reason>) {
    let aware = link.master.and_then(|bridge| world.bridge(bridge));
    if !aware.is_some_and(|bridge| bridge.vlan_filtering) {
        return (0, Ok(()));
    }
    let vlans = world.port_vlans(link);
    let pvid = vlans.iter().find(|range| range.pvid);
    let vlan = pvid.or(vlans.first()).map_or(0, |range| range.first);
    let verdict = match vlans {
        [] => Err("a member of no VLAN of its bridge".into()),
        [only] if only.first == only.last => match only {
            VlanRange {
                untagged: false, ..
            } => Err(format!("tagged in VLAN {vlan}: the tunnel carries the tag").into()),
            VlanRange { pvid: false, .. } => {
                Err(format!("VLAN {vlan} is not its PVID: what arrives is dropped").into())
            }
            only => vlan_forwards(only, vlan),
        },
        _ => Err("a member of several VLANs of its bridge".into()),
    };
    (vlan, verdict)
}

/// Whether the kernel uses this mapping in both directions.
fn mapped(
    world: &World,
    link: &Link,
    device: &VxlanDevice,
    range: &VlanRange,
    vlan: u16,
    vni: Vni,
) -> Result<(), Reason> {
    let passes = |range: &VniRange| (range.first..=range.last).contains(&vni.get());
    let filter = world.vnis.get(&link.ifindex).map_or(&[][..], Vec::as_slice);
    if device.vnifilter && !filter.iter().any(passes) {
        let name = &link.name;
        return Err(format!("not in the filter: `bridge vni add dev {name} vni {vni}`").into());
    }
    if range.untagged {
        // The kernel takes the tag off before it looks for the mapping (br_handle_vlan).
        return Err(format!("untagged in VLAN {vlan}: the mapping is not used").into());
    }
    vlan_forwards(range, vlan)
}

/// Whether the spanning tree lets frames through in these VLANs.
pub(super) fn vlan_forwards(range: &VlanRange, vlan: u16) -> Result<(), Reason> {
    match range.state {
        FORWARDING => Ok(()),
        _ => Err(format!("not forwarding in VLAN {vlan}").into()),
    }
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
    let known = ids.by_key();
    let mut rest = Vec::new();
    for segment in segments.values_mut().filter(|segment| segment.id.is_ok()) {
        match known.get(&segment.key) {
            Some(id) => segment.id = Ok(*id),
            None => rest.push(segment),
        }
    }
    rest.sort_by_key(|segment| (segment.vni, segment.tunnel));
    let mut free = ids.free().into_iter();
    for segment in rest {
        segment.id = match free.next() {
            Some(id) => {
                ids.taken.insert(id, segment.key);
                Ok(id)
            }
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
