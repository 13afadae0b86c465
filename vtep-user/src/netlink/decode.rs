//! Reads rtnetlink messages into facts: forwarding entries, neighbours,
//! addresses, routes, and what each notification means. Pure functions over
//! bytes; links are in `link`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::codec::{
    NDA_NH_ID, array, attributes, index_of, ip_of, mac_of, u8_of, u16_be_of, u16_of, u32_of, vni_of,
};
use super::link::{IFINFO_BYTES, link};
use super::vlan::{self, RTM_DELTUNNEL, RTM_DELVLAN, RTM_NEWTUNNEL, RTM_NEWVLAN};
use crate::kernel::{Address, Event, FdbEntry, FdbTable, IfIndex, Neighbour, Route, bits};

const AF_BRIDGE: u8 = libc::AF_BRIDGE as u8;
const AF_INET6: u8 = libc::AF_INET6 as u8;
const NDMSG_BYTES: usize = 12;
const IFADDRMSG_BYTES: usize = 8;
const RTMSG_BYTES: usize = 12;
/// NTF_PROXY: an address answered for, not a neighbour.
const NTF_PROXY: u8 = 0x08;

/// RTM_*NEXTHOP (rtnetlink.h); not in libc.
const RTM_NEWNEXTHOP: u16 = 104;
const RTM_DELNEXTHOP: u16 = 105;

/// What one notification says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Notice {
    Fact(Event),
    /// Something changed, but the message has only part of it: it has to be asked for.
    Partial(Part),
}

/// What a notification may tell only in part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// The link, and the VLANs of a bridge port.
    Link(IfIndex),
    /// The VLANs of a bridge port.
    Vlans(IfIndex),
    /// The VNIs of a VXLAN device with `vnifilter`.
    Vnis(IfIndex),
}

/// Translates one message of the NETLINK_ROUTE groups; `None` if it is of no
/// interest or cut short.
///
/// What Linux 6.18 sends for a bridge port: port flags and STP states come as
/// AF_BRIDGE RTM_NEWLINK without IFLA_LINKINFO and, with `bridge link set`, as
/// nothing else. AF_BRIDGE RTM_DELLINK means "left the bridge". AF_INET6 messages
/// announce what a router advertisement changed, the hop limit among it.
pub(super) fn notice(kind: u16, body: &[u8]) -> Option<Notice> {
    let family = u8_of(body)?;
    let event = match kind {
        libc::RTM_NEWLINK | libc::RTM_DELLINK => return link_notice(kind, family, body),
        libc::RTM_NEWNEIGH | libc::RTM_DELNEIGH if family == AF_BRIDGE => {
            let entry = fdb_entry(body)?;
            match kind {
                libc::RTM_NEWNEIGH => Event::Fdb(entry),
                _ => Event::FdbGone(entry),
            }
        }
        libc::RTM_NEWNEIGH => Event::Neighbour(neighbour(body)?),
        libc::RTM_DELNEIGH => Event::NeighbourGone(neighbour(body)?),
        libc::RTM_NEWADDR => Event::Address(address(body)?),
        libc::RTM_DELADDR => Event::AddressGone(address(body)?),
        libc::RTM_NEWROUTE
        | libc::RTM_DELROUTE
        | libc::RTM_NEWRULE
        | libc::RTM_DELRULE
        | RTM_NEWNEXTHOP
        | RTM_DELNEXTHOP => Event::RoutesChanged,
        RTM_NEWVLAN | RTM_DELVLAN => {
            return Some(Notice::Partial(Part::Vlans(vlan::device(body)?)));
        }
        RTM_NEWTUNNEL | RTM_DELTUNNEL => {
            return Some(Notice::Partial(Part::Vnis(vlan::device(body)?)));
        }
        libc::RTM_NEWQDISC | libc::RTM_DELQDISC | libc::RTM_NEWTFILTER | libc::RTM_DELTFILTER => {
            // `struct tcmsg`: the device stands where ndmsg has it. A block that
            // several devices share has a number of its own.
            Event::TcChanged(index_of(body.get(4..)?)?)
        }
        _ => return None,
    };
    Some(Notice::Fact(event))
}

fn link_notice(kind: u16, family: u8, body: &[u8]) -> Option<Notice> {
    let header: [u8; IFINFO_BYTES] = array(body)?;
    let ifindex = index_of(&header[4..])?;
    if [AF_BRIDGE, AF_INET6].contains(&family) {
        return Some(Notice::Partial(Part::Link(ifindex)));
    }
    if family != libc::AF_UNSPEC as u8 {
        return None;
    }
    if kind == libc::RTM_DELLINK {
        return Some(Notice::Fact(Event::LinkGone(ifindex)));
    }
    Some(match link(body) {
        Some(link) => Notice::Fact(Event::Link(link)),
        None => Notice::Partial(Part::Link(ifindex)),
    })
}

/// `struct ndmsg` (neighbour.h).
struct NeighbourHeader {
    family: u8,
    ifindex: IfIndex,
    state: u16,
    flags: u8,
}

fn neighbour_header(body: &[u8]) -> Option<NeighbourHeader> {
    let header: [u8; NDMSG_BYTES] = array(body)?;
    Some(NeighbourHeader {
        family: header[0],
        ifindex: index_of(&header[4..])?,
        state: u16_of(&header[8..])?,
        flags: header[10],
    })
}

/// An AF_BRIDGE neighbour message of a bridge or a VXLAN device. `None` for the
/// `self` entries of all other devices: those are their unicast and multicast
/// receive filters. They are told apart by NDA_CACHEINFO, which bridges
/// (br_fdb.c, fdb_fill_info) and vxlan (vxlan_core.c, vxlan_fdb_info) always
/// write and the common code (rtnetlink.c, nlmsg_populate_fdb_fill) never does;
/// the same test drops the extra, destination-less notification that rtnetlink
/// itself sends for vxlan entries on kernels before 6.15.
pub(super) fn fdb_entry(body: &[u8]) -> Option<FdbEntry> {
    let header = neighbour_header(body)?;
    let (mut mac, mut aged) = (None, false);
    let mut entry = FdbEntry {
        table: FdbTable::Vxlan,
        ifindex: header.ifindex,
        bridge: None,
        mac: Default::default(),
        vlan: None,
        dst: None,
        udp_port: None,
        vni: None,
        source_vni: None,
        via: None,
        nexthop_id: None,
        state: header.state,
        flags: header.flags,
    };
    for (kind, value) in attributes(&body[NDMSG_BYTES..]) {
        match kind {
            libc::NDA_LLADDR => mac = mac_of(value),
            libc::NDA_DST => entry.dst = ip_of(value),
            libc::NDA_CACHEINFO => aged = true,
            libc::NDA_VLAN => entry.vlan = u16_of(value).filter(|&vlan| vlan != 0),
            libc::NDA_PORT => entry.udp_port = u16_be_of(value),
            libc::NDA_VNI => entry.vni = vni_of(value),
            libc::NDA_SRC_VNI => entry.source_vni = vni_of(value),
            libc::NDA_IFINDEX => entry.via = index_of(value),
            libc::NDA_MASTER => entry.bridge = index_of(value),
            NDA_NH_ID => entry.nexthop_id = index_of(value),
            _ => {}
        }
    }
    if entry.bridge.is_some() {
        entry.table = FdbTable::Bridge;
    } else if !aged || header.flags & bits::NTF_SELF == 0 {
        return None;
    }
    entry.mac = mac?;
    Some(entry)
}

/// An ARP or ND entry; `None` for proxy entries and other families.
pub(super) fn neighbour(body: &[u8]) -> Option<Neighbour> {
    let header = neighbour_header(body)?;
    let (mut destination, mut mac) = (None, None);
    for (kind, value) in attributes(&body[NDMSG_BYTES..]) {
        match kind {
            libc::NDA_DST => destination = ip_of(value),
            libc::NDA_LLADDR => mac = mac_of(value),
            _ => {}
        }
    }
    let address = destination.filter(|address| family_of(*address) == header.family)?;
    (header.flags & NTF_PROXY == 0).then_some(Neighbour {
        ifindex: header.ifindex,
        address,
        mac,
        state: header.state,
    })
}

/// RTM_NEWADDR, RTM_DELADDR. With a peer address (IFA_ADDRESS), ours is
/// IFA_LOCAL.
pub(super) fn address(body: &[u8]) -> Option<Address> {
    let header: [u8; IFADDRMSG_BYTES] = array(body)?;
    let (mut address, mut local) = (None, None);
    for (kind, value) in attributes(&body[IFADDRMSG_BYTES..]) {
        match kind {
            libc::IFA_ADDRESS => address = ip_of(value),
            libc::IFA_LOCAL => local = ip_of(value),
            _ => {}
        }
    }
    Some(Address {
        ifindex: index_of(&header[4..])?,
        address: local.or(address)?,
    })
}

/// The answer to RTM_GETROUTE; `None` unless frames leave through a device as
/// plain IP: local, broadcast, multicast, blackhole, unreachable and prohibit
/// routes, and routes that encapsulate (RTA_ENCAP), are none.
pub(super) fn route(body: &[u8]) -> Option<Route> {
    let header: [u8; RTMSG_BYTES] = array(body)?;
    if header[7] != libc::RTN_UNICAST {
        return None;
    }
    let mut ifindex = None;
    let mut route = Route {
        ifindex: 0,
        gateway: None,
        source: None,
        mtu: None,
        hop_limit: None,
    };
    for (kind, value) in attributes(&body[RTMSG_BYTES..]) {
        match kind {
            libc::RTA_OIF => ifindex = index_of(value),
            libc::RTA_GATEWAY => route.gateway = ip_of(value),
            // struct rtvia: a gateway of the other family.
            libc::RTA_VIA => route.gateway = value.get(2..).and_then(ip_of),
            libc::RTA_PREFSRC => route.source = ip_of(value),
            libc::RTA_METRICS => metrics(value, &mut route),
            libc::RTA_ENCAP | libc::RTA_MULTIPATH => return None,
            _ => {}
        }
    }
    route.ifindex = ifindex?;
    Some(route)
}

fn metrics(bytes: &[u8], route: &mut Route) {
    /// RTAX_* (rtnetlink.h).
    const RTAX_MTU: u16 = 2;
    const RTAX_HOPLIMIT: u16 = 10;
    for (kind, value) in attributes(bytes) {
        let value = u32_of(value).filter(|&value| value != 0);
        match kind {
            RTAX_MTU => route.mtu = value,
            RTAX_HOPLIMIT => route.hop_limit = value.and_then(|value| value.try_into().ok()),
            _ => {}
        }
    }
}

pub(super) fn family_of(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => libc::AF_INET as u8,
        IpAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

/// Prefix length of a single address.
pub(super) fn host_bits(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => Ipv4Addr::BITS as u8,
        IpAddr::V6(_) => Ipv6Addr::BITS as u8,
    }
}
