//! Which devices carry our programs and may be redirected to: bridge ports of
//! segments, and uplinks. Only ports whose owner sends plain frames: XDP on
//! others would corrupt checksums and break up GSO.

use std::collections::{BTreeMap, BTreeSet};

use vtep_common::MacAddr;
use vtep_common::layout::UPLINKS_MAX;

use super::remotes::{RouteQuery, Routes};
use super::segments::{Segments, Shortage, port_flags};
use super::world::World;
use super::{HookChoice, Reason, Refusals, Settings};
use crate::kernel::{IfIndex, Link, LinkKind, Tun};

/// Outer IPv4, UDP, VXLAN and inner Ethernet header: what a tunnel takes from
/// the MTU of an uplink, bytes.
pub(super) const OVERHEAD_V4_BYTES: u32 = 20 + 8 + 8 + 14;
/// Ethernet header, bytes.
pub(super) const ETHERNET_BYTES: u32 = 14;

/// A member of a bridge that has a VXLAN device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PortPlan {
    pub bridge: IfIndex,
    /// VXLAN device of its segment.
    pub vxlan: IfIndex,
    pub mtu: u32,
    pub accelerated: Result<(), Reason>,
}

/// A device towards the underlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Uplink {
    pub ifindex: IfIndex,
    pub mac: MacAddr,
    pub mtu: u32,
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
) -> BTreeMap<IfIndex, PortPlan> {
    let by_bridge: BTreeMap<IfIndex, _> = segments
        .values()
        .filter_map(|s| Some((s.bridge?, s)))
        .collect();
    // Uplinks are targets too, old and new ones at the same time.
    let capacity = settings
        .capacity
        .ports
        .saturating_sub(2 * UPLINKS_MAX as u32);
    let mut room = capacity.saturating_sub(current.len() as u32);
    let mut ports = BTreeMap::new();
    for link in world.links.values() {
        let Some(bridge) = link.master else { continue };
        let Some(segment) = by_bridge.get(&bridge) else {
            continue;
        };
        if matches!(link.kind, LinkKind::Vxlan(_)) {
            continue;
        }
        let mut accelerated = match (&segment.id, refusals.devices.get(&link.ifindex)) {
            (Err(_), _) => Err("its segment is left to the kernel".into()),
            (_, Some(reason)) => Err(reason.clone()),
            _ => eligible(world, settings, link),
        };
        if accelerated.is_ok() && !current.contains(&link.ifindex) {
            if room == 0 {
                shortage.ports += 1;
                accelerated = Err(format!("port table full ({capacity} ports)").into());
            }
            room = room.saturating_sub(1);
        }
        ports.insert(
            link.ifindex,
            PortPlan {
                bridge,
                vxlan: segment.vxlan,
                mtu: link.mtu,
                accelerated,
            },
        );
    }
    ports
}

fn eligible(world: &World, settings: &Settings, link: &Link) -> Result<(), Reason> {
    if !link.up {
        return Err("the device is down".into());
    }
    no_tc(world, link)?;
    port_flags(link.bridge_port.as_ref())?;
    hook(settings, link)?;
    // Other drivers may only begin to take frames when they run a program.
    if link.kind == LinkKind::Veth && !world.takes_redirected(link.ifindex) {
        return Err(
            "redirected frames would be lost: the other end of the veth does not poll; \
                    turn GRO on there (`ethtool -K DEVICE gro on`)"
                .into(),
        );
    }
    Ok(())
}

/// Redirected frames would not pass tc (R41).
fn no_tc(world: &World, link: &Link) -> Result<(), Reason> {
    match world.tc.get(&link.ifindex) {
        Some(filter) => Err(filter.clone().into()),
        None => Ok(()),
    }
}

/// Whether XDP may run on a port.
fn hook(settings: &Settings, link: &Link) -> Result<(), Reason> {
    let what = match (choice(settings, link), &link.kind) {
        (HookChoice::Kernel, _) => return Err(LEFT.into()),
        (HookChoice::Xdp, _) => return Ok(()),
        (
            _,
            LinkKind::Tun(Tun {
                tap: true,
                vnet_hdr: false,
            }),
        ) => return Ok(()),
        (
            _,
            LinkKind::Tun(Tun {
                tap: true,
                vnet_hdr: true,
            }),
        ) => {
            return Err("tap with virtio-net header: the owner uses offloads".into());
        }
        (_, LinkKind::Tun(_)) => return Err("tun device: it carries no Ethernet frames".into()),
        (_, LinkKind::Veth) => "veth",
        (_, LinkKind::Plain) => "device",
        (_, LinkKind::Bridge(_)) => "bridge",
        (_, LinkKind::Vxlan(_)) => "vxlan",
        (_, LinkKind::Other(kind)) => kind,
    };
    Err(format!(
        "{what}: the owner may use checksum offload or GSO; set hook = xdp if it sends plain frames"
    )
    .into())
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
            let local = std::net::IpAddr::V4(segment.policy.local);
            let owners = world.addresses.iter().filter(move |(_, ip)| *ip == local);
            segment
                .policy
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
        HookChoice::Auto | HookChoice::Xdp => no_tc(world, link),
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
