//! Ways to remote VTEPs: which next hops have to be resolved, and the outer
//! header a resolved one leads to. A live slot is never edited: a changed header
//! goes to a new slot, and the location is switched.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Instant;

use vtep_common::layout::{
    HEADER_V4_LEN, REMOTE_NO_PORT_RANGE, REMOTE_UDP_CHECKSUM, Remote, vni_word,
};
use vtep_common::wire::{ETH_P_IP, Ethernet, IPPROTO_UDP, Ipv4, Wire};
use vtep_common::{MacAddr, Vni, checksum};

use super::Reason;
use super::locations::Allocator;
use super::ports::Uplink;
use super::segments::Segment;
use super::world::{Destination, World};
use crate::kernel::{IfIndex, Route, VxlanDevice};

/// Source ports where the device names no range. RFC 7348 section 5 recommends
/// this one; the kernel would take net.ipv4.ip_local_port_range (udp_flow_src_port
/// in include/net/udp.h), which other sockets of the host share.
const DEFAULT_PORTS: (u16, u16) = (49152, 16384);

/// Don't fragment, in the IPv4 fragment word (RFC 791).
const DF: u16 = 0x4000;

/// What a VXLAN device puts into every outer header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Policy {
    pub local: Ipv4Addr,
    pub link: Option<IfIndex>,
    pub udp_port: u16,
    pub port_min: u16,
    pub port_count: u16,
    /// The device names that range.
    pub has_port_range: bool,
    /// 0: the route's hop limit.
    pub ttl: u8,
    /// DSCP bits only.
    pub tos: u8,
    pub df: bool,
    pub udp_checksum: bool,
}

impl Policy {
    pub fn of(device: &VxlanDevice, local: Ipv4Addr) -> Self {
        // The upper bound is exclusive, and an empty range means the default
        // (udp_flow_src_port).
        let (min, max) = device.source_ports;
        let has_port_range = min < max;
        let (port_min, port_count) = if has_port_range {
            (min, max - min)
        } else {
            DEFAULT_PORTS
        };
        Self {
            local,
            link: device.link,
            udp_port: device.udp_port,
            port_min,
            port_count,
            has_port_range,
            ttl: device.ttl,
            tos: device.tos & !3,
            df: device.df == 1,
            udp_checksum: device.udp_checksum,
        }
    }
}

/// What makes two remotes different. Segments that agree in all of it share one
/// location: a host that moves is one store, whatever the number of VNIs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct RemoteKey {
    /// With the UDP port of the entry, where it has one of its own.
    pub policy: Policy,
    pub remote: Ipv4Addr,
    /// See `Remote::vni_word`; 0: the segment's VNI.
    pub vni_word: u32,
}

impl RemoteKey {
    /// The remote an entry of the VXLAN device's table leads to, or why it is
    /// left to the kernel.
    pub fn of(segment: &Segment, to: &Destination) -> Result<Self, &'static str> {
        if to.nexthop_id.is_some() {
            return Err("goes to a nexthop group, which is not accelerated yet");
        }
        let remote = match to.dst {
            None => return Err("has no destination of its own: the default destination takes it"),
            Some(IpAddr::V6(_)) => return Err("IPv6 remotes are not accelerated yet"),
            Some(IpAddr::V4(remote)) => remote,
        };
        if to.via.is_some() {
            return Err("names an outgoing device (via), which is not accelerated yet");
        }
        if remote.is_unspecified() || remote.is_loopback() || remote.is_multicast() {
            return Err("its destination is not the address of another host");
        }
        if remote == segment.policy.local {
            return Err("its destination is this host");
        }
        Ok(Self {
            policy: Policy {
                udp_port: to.udp_port.unwrap_or(segment.policy.udp_port),
                ..segment.policy
            },
            remote,
            vni_word: to.vni.filter(|vni| *vni != segment.vni).map_or(0, vni_word),
        })
    }

    /// VNI the remote expects, where it is not the segment's.
    pub fn vni(&self) -> Option<Vni> {
        (self.vni_word != 0).then(|| Vni::new(u32::from_be(self.vni_word) >> 8))?
    }

    pub fn query(&self) -> RouteQuery {
        RouteQuery {
            remote: IpAddr::V4(self.remote),
            link: self.policy.link,
            source: Some(IpAddr::V4(self.policy.local)),
        }
    }

    /// The outer header, with `hop_limit` where the device leaves the TTL open.
    pub fn template(&self, uplink: &Uplink, next_hop: MacAddr, hop_limit: u8) -> Remote {
        let policy = &self.policy;
        let mut header = [0; 112];
        let (eth, rest) = header.split_at_mut(Ethernet::LEN);
        eth[..6].copy_from_slice(&next_hop.0);
        eth[6..12].copy_from_slice(&uplink.mac.0);
        eth[12..].copy_from_slice(&ETH_P_IP.to_be_bytes());
        let (ip, rest) = rest.split_at_mut(Ipv4::LEN);
        ip[0] = 0x45;
        ip[1] = policy.tos;
        ip[6..8].copy_from_slice(&if policy.df { DF } else { 0 }.to_be_bytes());
        ip[8] = if policy.ttl == 0 {
            hop_limit
        } else {
            policy.ttl
        };
        ip[9] = IPPROTO_UDP;
        ip[12..16].copy_from_slice(&policy.local.octets());
        ip[16..20].copy_from_slice(&self.remote.octets());
        let ip_sum = checksum::bytes(ip);
        rest[2..4].copy_from_slice(&policy.udp_port.to_be_bytes());
        let flag = |on: bool, flag: u16| if on { flag } else { 0 };
        Remote {
            ifindex: uplink.ifindex,
            flags: flag(policy.udp_checksum, REMOTE_UDP_CHECKSUM)
                | flag(!policy.has_port_range, REMOTE_NO_PORT_RANGE),
            ip_sum,
            vni_word: self.vni_word,
            port_min: policy.port_min,
            port_count: policy.port_count,
            header,
        }
    }

    /// Whether a slot written by an earlier run leads to this remote. The next
    /// hop and the route's hop limit may have changed since.
    pub fn is_described_by(&self, value: &Remote) -> bool {
        let uplink = Uplink {
            ifindex: value.ifindex,
            mac: MacAddr::ZERO,
            mtu: 0,
            is_target: true,
            accelerated: Ok(()),
        };
        let mut mine = self.template(&uplink, MacAddr::ZERO, value.header[Ethernet::LEN + 8]);
        mine.header[..12].copy_from_slice(&value.header[..12]);
        mine == *value
    }
}

const _: () = assert!(HEADER_V4_LEN == Ethernet::LEN + Ipv4::LEN + 8);

/// A question to the kernel's routing: how would it reach `remote`?
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouteQuery {
    pub remote: IpAddr,
    /// Underlay device the VXLAN device is bound to.
    pub link: Option<IfIndex>,
    /// Address the VXLAN device sends from.
    pub source: Option<IpAddr>,
}

#[derive(Debug, Default)]
struct Answer {
    asked: bool,
    /// Outer `None`: never answered. Inner: unreachable.
    route: Option<Option<Route>>,
}

/// The routes in use. Answers stand until another one arrives: a change of the
/// routing table asks again, but withdraws nothing.
#[derive(Debug, Default)]
pub(super) struct Routes(BTreeMap<RouteQuery, Answer>);

impl Routes {
    pub fn want(&mut self, query: RouteQuery) {
        self.0.entry(query).or_default();
    }

    pub fn ask_all(&mut self) {
        for answer in self.0.values_mut() {
            answer.asked = false;
        }
    }

    /// Questions not asked yet.
    pub fn take_open(&mut self) -> Vec<RouteQuery> {
        let open = self.0.iter_mut().filter(|(_, answer)| !answer.asked);
        open.map(|(query, answer)| {
            answer.asked = true;
            *query
        })
        .collect()
    }

    /// Whether the answer is news.
    pub fn answer(&mut self, query: &RouteQuery, route: Option<Route>) -> bool {
        let Some(answer) = self.0.get_mut(query) else {
            return false;
        };
        let news = answer.route.as_ref() != Some(&route);
        answer.route = Some(route);
        news
    }

    pub fn get(&self, query: &RouteQuery) -> Option<&Option<Route>> {
        self.0.get(query)?.route.as_ref()
    }

    pub fn keep(&mut self, used: &BTreeSet<RouteQuery>) {
        self.0.retain(|query, _| used.contains(query));
    }
}

/// The slots of `REMOTES`, with what was last written to them.
#[derive(Debug)]
pub(super) struct Slots {
    contents: Vec<Remote>,
    allocator: Allocator,
    /// A way had to be left to the kernel because no slot was free.
    pub short: bool,
}

impl Slots {
    pub fn new(capacity: u32) -> Self {
        Self {
            contents: Vec::new(),
            allocator: Allocator::new(0, capacity),
            short: false,
        }
    }

    pub fn get(&self, slot: u32) -> Option<&Remote> {
        self.contents.get(slot as usize)
    }

    pub fn put(&mut self, value: Remote, now: Instant) -> Option<u32> {
        let Some(slot) = self.allocator.take(now) else {
            self.short = true;
            return None;
        };
        self.set(slot, value);
        Some(slot)
    }

    fn set(&mut self, slot: u32, value: Remote) {
        let slot = slot as usize;
        if slot >= self.contents.len() {
            self.contents.resize(slot + 1, Remote::EMPTY);
        }
        self.contents[slot] = value;
    }

    pub fn release(&mut self, slot: u32, now: Instant) {
        self.allocator.release(slot, now);
    }

    pub fn has_free(&self, now: Instant) -> bool {
        self.allocator.has_free(now)
    }

    pub fn free_at(&self) -> Option<Instant> {
        self.allocator.free_at()
    }

    /// Take over slots; `used` are those that a location names.
    pub fn adopt(&mut self, contents: BTreeMap<u32, Remote>, used: &BTreeSet<u32>) {
        for (slot, value) in contents {
            self.set(slot, value);
        }
        self.allocator.adopt(used);
    }
}

/// How far the way to a remote is known.
#[derive(Debug, Clone)]
pub(super) struct Way {
    pub ifindex: Option<IfIndex>,
    pub next_hop: Option<Ipv4Addr>,
    pub mac: Option<MacAddr>,
    /// The header, or why there is none.
    pub header: Result<Box<Remote>, Reason>,
    /// The kernel has not been asked yet: nothing is known against what stands.
    pub pending: bool,
    /// Only the next hop's link-layer address is missing.
    pub resolving: bool,
}

impl Way {
    fn closed(reason: impl Into<Cow<'static, str>>) -> Self {
        Self {
            ifindex: None,
            next_hop: None,
            mac: None,
            header: Err(reason.into()),
            pending: false,
            resolving: false,
        }
    }
}

/// Follow the route to the neighbour and the uplink.
pub(super) fn way(
    key: &RemoteKey,
    world: &World,
    routes: &Routes,
    uplinks: &BTreeMap<IfIndex, Uplink>,
    default_ttl: u8,
) -> Way {
    let route = match routes.get(&key.query()) {
        None => {
            return Way {
                pending: true,
                ..Way::closed("its route has not been looked up yet")
            };
        }
        Some(None) => return Way::closed("no route to it"),
        Some(Some(route)) => route,
    };
    let mut way = Way {
        ifindex: Some(route.ifindex),
        ..Way::closed("")
    };
    let link = world.links.get(&route.ifindex);
    if link.is_some_and(|link| link.loopback) {
        way.header = Err("it is an address of this host".into());
        return way;
    }
    let next_hop = match route.gateway {
        None => key.remote,
        Some(IpAddr::V4(gateway)) => gateway,
        Some(IpAddr::V6(_)) => {
            way.header = Err("its next hop has an IPv6 address".into());
            return way;
        }
    };
    way.next_hop = Some(next_hop);
    way.mac = world.neighbours.get(&(route.ifindex, next_hop)).copied();
    let name = world.name(route.ifindex);
    way.header = match (uplinks.get(&route.ifindex), way.mac) {
        (None, _) => Err(format!("{name} is not one of the uplinks").into()),
        (
            Some(Uplink {
                accelerated: Err(reason),
                ..
            }),
            _,
        ) => Err(format!("uplink {name}: {reason}").into()),
        _ if !link.is_some_and(|link| link.up) => Err(format!("uplink {name} is down").into()),
        (_, None) => {
            way.resolving = true;
            Err(format!("next hop {next_hop} on {name} is not resolved").into())
        }
        (Some(uplink), Some(mac)) => {
            let hop_limit = route
                .hop_limit
                .filter(|limit| *limit != 0)
                .unwrap_or(default_ttl);
            Ok(Box::new(key.template(uplink, mac, hop_limit)))
        }
    };
    way
}

/// Last known ways, by remote.
pub(super) type Ways = HashMap<RemoteKey, Way>;
