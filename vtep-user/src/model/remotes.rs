//! Ways to remote VTEPs: which next hops have to be resolved, and the outer
//! header a resolved one leads to. A live slot is never edited: a changed header
//! goes to a new slot, and the location is switched.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::Instant;

use vtep_common::layout::{Remote, vni_word};
use vtep_common::{MacAddr, Vni};

use super::Reason;
use super::header::{self, Policy};
use super::locations::Allocator;
use super::ports::Uplink;
use super::segments::Segment;
use super::world::{Destination, World};
use crate::kernel::{IfIndex, Route};

/// IPV6_DEFAULT_HOPLIMIT and IPDEFTTL, where the device does not say.
const DEFAULT_HOP_LIMIT: u8 = 64;

/// What makes two remotes different. Segments that agree in all of it share one
/// location: a host that moves is one store, whatever the number of VNIs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct RemoteKey {
    /// With the UDP port of the entry, where it has one of its own.
    pub policy: Policy,
    pub remote: IpAddr,
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
            Some(remote) => remote,
        };
        if !header::is_host(remote) {
            return Err("its destination is not the address of another host");
        }
        if remote.is_ipv4() != segment.policy.local.is_ipv4() {
            return Err("its destination is of another IP family than the local address");
        }
        if remote == segment.policy.local {
            return Err("its destination is this host");
        }
        Ok(Self {
            policy: Policy {
                udp_port: to.udp_port.unwrap_or(segment.policy.udp_port),
                link: to.via.or(segment.policy.link),
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
            remote: self.remote,
            link: self.policy.link,
            source: Some(self.policy.local),
        }
    }

    /// The outer header, with `hop_limit` where the device leaves the TTL open.
    pub fn template(&self, uplink: &Uplink, next_hop: MacAddr, hop_limit: u8) -> Remote {
        let mut value = self.policy.header(self.remote, hop_limit);
        value.header[..6].copy_from_slice(&next_hop.0);
        value.header[6..12].copy_from_slice(&uplink.mac.0);
        Remote {
            ifindex: uplink.ifindex,
            vni_word: self.vni_word,
            ..value
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
        let hop_limit = value.header[header::hop_limit_at(self.remote)];
        let mut mine = self.template(&uplink, MacAddr::ZERO, hop_limit);
        mine.header[..12].copy_from_slice(&value.header[..12]);
        mine == *value
    }
}

/// A question to the kernel's routing: how would it reach `remote`?
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouteQuery {
    pub remote: IpAddr,
    /// Device it has to lead through.
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

    pub fn len(&self) -> u32 {
        self.0.len().try_into().unwrap_or(u32::MAX)
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
    pub next_hop: Option<IpAddr>,
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
    // Of either family: an IPv4 route may lead through an IPv6 neighbour.
    let next_hop = route.gateway.unwrap_or(key.remote);
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
            let default = match key.remote {
                IpAddr::V4(_) => Some(default_ttl),
                IpAddr::V6(_) => link.and_then(|link| link.hop_limit_v6),
            };
            let hop_limit = route.hop_limit.or(default).unwrap_or(DEFAULT_HOP_LIMIT);
            Ok(Box::new(key.template(uplink, mac, hop_limit)))
        }
    };
    way
}

/// Last known ways, by remote.
pub(super) type Ways = HashMap<RemoteKey, Way>;
