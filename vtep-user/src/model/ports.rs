//! Which devices carry our programs and may be redirected to: bridge ports of
//! segments, and uplinks. A port of a VLAN-aware bridge is a member of several
//! segments; the fast path takes its untagged frames, tagged ones are the
//! kernel's. XDP only on ports whose owner sends plain frames: on others it would
//! corrupt checksums and break up GSO, so they get tcx.

use std::collections::{BTreeMap, BTreeSet};

use vtep_common::MacAddr;
use vtep_common::layout::{UPLINKS_MAX, Via};

use super::remotes::{RouteQuery, Routes};
use super::segments::{Segment, Segments, Shortage, port_flags, vlan_forwards};
use super::world::{Domain, Tunnel, World};
use super::{HookChoice, Reason, Refusals, Settings};
use crate::kernel::{IfIndex, Link, LinkKind, Tun, VlanRange};
use crate::tables::Hook;

/// Outer IP, UDP, VXLAN and inner Ethernet header: what a tunnel takes from the
/// MTU of an uplink, bytes.
pub const fn overhead_bytes(v6: bool) -> u32 {
    let ip_bytes = if v6 { 40 } else { 20 };
    ip_bytes + 8 + 8 + 14
}

/// Ethernet header, bytes.
pub(super) const ETHERNET_BYTES: u32 = 14;
/// Largest MTU of an underlay whose frames lie in one buffer of XDP: a page
/// less headroom and what the kernel keeps behind the data.
pub(super) const ONE_BUFFER_MTU: u32 = 3498;

/// A bridge port in one VLAN (0: bridge that is not VLAN-aware).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Member {
    pub ifindex: IfIndex,
    pub vlan: u16,
}

/// A member of a segment. Only in the VLAN of its untagged frames can a port be
/// accelerated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PortPlan {
    pub bridge: IfIndex,
    /// Of its segment.
    pub tunnel: Tunnel,
    pub mtu: u32,
    pub accelerated: Result<Fast, Reason>,
}

/// How frames of a port go, in both directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fast {
    /// Where the program runs that sees what the owner sends.
    pub hook: Hook,
    /// How frames reach the owner.
    pub via: Via,
}

/// A device towards the underlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Uplink {
    pub ifindex: IfIndex,
    pub mac: MacAddr,
    pub mtu: u32,
    /// XDP may redirect to it.
    pub is_target: bool,
    pub accelerated: Result<(), Reason>,
}

/// Decide about every port. `current`: ports that are in the map now; they go
/// first where there is not room for all, and count until they are removed.
pub(super) fn plan(
    world: &World,
    settings: &Settings,
    refusals: &Refusals,
    segments: &Segments,
    current: &BTreeSet<IfIndex>,
    shortage: &mut Shortage,
) -> BTreeMap<Member, PortPlan> {
    let mut by_domain: BTreeMap<Domain, &Segment> = BTreeMap::new();
    for segment in segments.values() {
        let Some(domain) = segment.domain() else {
            continue;
        };
        let known = by_domain.entry(domain).or_insert(segment);
        if segment.id.is_ok() {
            *known = segment;
        }
    }
    // Uplinks are targets too, old and new ones at the same time.
    let capacity = settings
        .capacity
        .ports
        .saturating_sub(2 * UPLINKS_MAX as u32);
    let mut room = capacity.saturating_sub(current.len() as u32);
    let mut ports = BTreeMap::new();
    for link in world.links.values() {
        let Some(bridge) = link.master else { continue };
        if matches!(link.kind, LinkKind::Vxlan(_)) {
            continue;
        }
        for (segment, membership) in memberships(world, link, bridge, &by_domain) {
            let mut accelerated = match (&segment.id, refusals.devices.get(&link.ifindex)) {
                (Err(_), _) => Err("its segment is left to the kernel".into()),
                (_, Some(reason)) => Err(reason.clone()),
                _ => membership.and_then(|()| eligible(world, settings, link)),
            };
            if accelerated.is_ok() && !current.contains(&link.ifindex) {
                if room == 0 {
                    shortage.ports += 1;
                    accelerated = Err(format!("port table full ({capacity} ports)").into());
                }
                room = room.saturating_sub(1);
            }
            let member = Member {
                ifindex: link.ifindex,
                vlan: segment.vlan,
            };
            ports.insert(
                member,
                PortPlan {
                    bridge,
                    tunnel: segment.tunnel,
                    mtu: link.mtu,
                    accelerated,
                },
            );
        }
    }
    ports
}

/// The segments a port is a member of, and whether its untagged frames are theirs.
fn memberships<'a>(
    world: &World,
    link: &Link,
    bridge: IfIndex,
    by_domain: &BTreeMap<Domain, &'a Segment>,
) -> Vec<(&'a Segment, Result<(), Reason>)> {
    if !world.bridge(bridge).is_some_and(|b| b.vlan_filtering) {
        let only = by_domain.get(&Domain { bridge, vlan: 0 });
        return only.map(|segment| (*segment, Ok(()))).into_iter().collect();
    }
    let ranges = world.port_vlans(link).iter();
    ranges
        .flat_map(|range| {
            let domain = |vlan| Domain { bridge, vlan };
            let segments = by_domain.range(domain(range.first)..=domain(range.last));
            segments.map(move |(domain, segment)| (*segment, untagged(range, domain.vlan)))
        })
        .collect()
}

/// Whether all frames of a port without a tag, and no others, are of this VLAN.
fn untagged(range: &VlanRange, vlan: u16) -> Result<(), Reason> {
    match (range.pvid, range.untagged) {
        (true, true) => vlan_forwards(range, vlan),
        (false, false) => Err(format!("tagged in VLAN {vlan}").into()),
        (true, false) => Err(format!("frames to it are tagged with VLAN {vlan}, its PVID").into()),
        (false, true) => Err(format!("untagged in VLAN {vlan}, which is not its PVID").into()),
    }
}

fn eligible(world: &World, settings: &Settings, link: &Link) -> Result<Fast, Reason> {
    if !link.up {
        return Err("the device is down".into());
    }
    no_tc(world, link)?;
    port_flags(link.bridge_port.as_ref())?;
    let hook = hook(settings, link)?;
    let via = match hook {
        _ if !takes_redirected(world, link, hook) => Via::Stack,
        Hook::Xdp(_) => Via::Xdp,
        Hook::Tcx => Via::Gro,
    };
    if via == Via::Stack && !settings.tcx {
        return Err(
            "redirected frames would be lost: the other end of the veth does not poll; \
                    turn GRO on there (`ethtool -K DEVICE gro on`)"
                .into(),
        );
    }
    Ok(Fast { hook, via })
}

/// Whether frames that XDP redirects to a device arrive. A veth takes them only
/// if its peer polls; other drivers may only begin to when they run a program.
fn takes_redirected(world: &World, link: &Link, hook: Hook) -> bool {
    world.takes_redirected(link) || (link.kind != LinkKind::Veth && hook != Hook::Tcx)
}

/// Redirected frames would not pass tc (R41).
fn no_tc(world: &World, link: &Link) -> Result<(), Reason> {
    match world.tc.get(&link.ifindex) {
        Some(filter) => Err(filter.clone().into()),
        None => Ok(()),
    }
}

/// Which hook a port gets.
fn hook(settings: &Settings, link: &Link) -> Result<Hook, Reason> {
    let xdp = Hook::Xdp(settings.xdp_mode);
    let hook = match (choice(settings, link), &link.kind) {
        (HookChoice::Kernel, _) => return Err(LEFT.into()),
        (_, LinkKind::Tun(Tun { tap: false, .. })) => {
            return Err("tun device: it carries no Ethernet frames".into());
        }
        (_, LinkKind::Bridge(_) | LinkKind::Vxlan(_)) => {
            return Err("a virtual device of this host cannot be a port".into());
        }
        (HookChoice::Xdp, _) => xdp,
        (HookChoice::Tcx, _) => Hook::Tcx,
        (
            HookChoice::Auto,
            LinkKind::Tun(Tun {
                vnet_hdr: false, ..
            }),
        ) => xdp,
        // The owner may use checksum offload or GSO.
        (HookChoice::Auto, _) => Hook::Tcx,
    };
    if hook == Hook::Tcx && !settings.tcx {
        return Err(
            "the owner may use checksum offload or GSO, and the kernel has no tcx (Linux 6.6): \
                    set hook = xdp if it sends plain frames"
                .into(),
        );
    }
    Ok(hook)
}

const LEFT: &str = "left to the kernel by configuration";

fn choice(settings: &Settings, link: &Link) -> HookChoice {
    settings.hooks.get(&link.name).copied().unwrap_or_default()
}

/// Decide about the uplinks: those named, or else those that the segments and
/// the routes of their remotes use. `current`: as for ports.
pub(super) fn uplinks(
    world: &World,
    settings: &Settings,
    refusals: &Refusals,
    segments: &Segments,
    in_use: &BTreeSet<IfIndex>,
    current: &BTreeSet<IfIndex>,
) -> BTreeMap<IfIndex, Uplink> {
    let mut candidates: BTreeSet<IfIndex> = match &settings.uplinks {
        Some(names) => {
            let named = world
                .links
                .values()
                .filter(|link| names.contains(&link.name));
            named.map(|link| link.ifindex).collect()
        }
        None => derived(world, segments)
            .chain(in_use.iter().copied())
            .collect(),
    };
    // Devices that only hold addresses carry no frames.
    candidates.retain(|ifindex| {
        let link = world.links.get(ifindex);
        link.is_some_and(|link| !link.loopback && !is_kind(link, &["dummy", "vrf"]))
    });
    let mut order: Vec<IfIndex> = candidates.into_iter().collect();
    order.sort_by_key(|ifindex| (!current.contains(ifindex), *ifindex));
    let mut room = UPLINKS_MAX;
    let mut uplinks = BTreeMap::new();
    for link in order.iter().filter_map(|ifindex| world.links.get(ifindex)) {
        let mut accelerated = match refusals.devices.get(&link.ifindex) {
            Some(reason) => Err(reason.clone()),
            None => uplink_eligible(world, settings, link),
        };
        if accelerated.is_ok() {
            if room == 0 {
                accelerated = Err(format!("more than {UPLINKS_MAX} uplinks").into());
            }
            room = room.saturating_sub(1);
        }
        uplinks.insert(
            link.ifindex,
            Uplink {
                ifindex: link.ifindex,
                mac: link.mac.unwrap_or(MacAddr::ZERO),
                mtu: link.mtu,
                is_target: world.takes_redirected(link),
                accelerated,
            },
        );
    }
    uplinks
}

fn derived(world: &World, segments: &Segments) -> impl Iterator<Item = IfIndex> {
    segments
        .values()
        .filter(|segment| segment.id.is_ok())
        .flat_map(|segment| {
            let local = segment.policy.local;
            let owners = world.addresses.iter().filter(move |(_, ip)| *ip == local);
            segment
                .link
                .into_iter()
                .chain(owners.map(|(ifindex, _)| *ifindex))
        })
}

fn uplink_eligible(world: &World, settings: &Settings, link: &Link) -> Result<(), Reason> {
    if let Some(master) = link.master.filter(|master| world.is_bridge(*master)) {
        return Err(format!("it is a port of bridge {}", world.name(master)).into());
    }
    if let Some(master) = link.master.and_then(|master| world.links.get(&master)) {
        // Our look-ups do not tell VRFs apart, and several may hold one address.
        if is_kind(master, &["vrf"]) {
            return Err(format!("it is in VRF {}", master.name).into());
        }
        if is_kind(master, &["bond", "team"]) {
            return Err(format!("it is a link of {}: that is the uplink", master.name).into());
        }
    }
    if matches!(link.kind, LinkKind::Bridge(_) | LinkKind::Vxlan(_)) {
        return Err("a virtual device of this host cannot be an uplink".into());
    }
    if is_kind(link, &["vlan"]) {
        return Err("VLAN devices have no XDP hook; frames pass to the kernel".into());
    }
    if !link.mac.is_some_and(MacAddr::is_station) {
        return Err("it has no Ethernet address".into());
    }
    match choice(settings, link) {
        HookChoice::Kernel => Err(LEFT.into()),
        HookChoice::Auto | HookChoice::Xdp | HookChoice::Tcx => no_tc(world, link),
    }
}

fn is_kind(link: &Link, kinds: &[&str]) -> bool {
    matches!(&link.kind, LinkKind::Other(kind) if kinds.contains(&kind.as_str()))
}

/// Smallest MTU on the way to any remote, bytes; `None` without uplinks. Path
/// MTUs count: what does not fit has to be answered by the kernel (R31).
pub(super) fn underlay_mtu(
    uplinks: &BTreeMap<IfIndex, Uplink>,
    routes: &Routes,
    queries: impl Iterator<Item = RouteQuery>,
) -> Option<u32> {
    let devices = uplinks.values().filter(|uplink| uplink.accelerated.is_ok());
    let paths = queries.filter_map(|query| routes.get(&query)?.as_ref()?.mtu);
    devices
        .map(|uplink| uplink.mtu)
        .min()
        .map(|mtu| paths.fold(mtu, u32::min))
}
