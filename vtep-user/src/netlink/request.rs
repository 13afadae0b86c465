//! `Netlink`: questions to the kernel. Full dump, route lookup, neighbour
//! resolution. Writing is in `fdb` and `manage`, filters in `filters`.

use std::collections::HashSet;
use std::hash::Hash;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_DUMP, NetlinkSerializable};
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::{LinkAttribute, LinkExtentMask, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::{NETLINK_GENERIC, NETLINK_NETFILTER, NETLINK_ROUTE};
use tokio::sync::{Mutex, MutexGuard};

use super::codec::{Message, messages};
use super::decode::{address, family_of, fdb_entry, host_bits, neighbour, route};
use super::error::{Failure, NetlinkError};
use super::link::link;
use super::netdev::{self, Family};
use super::socket::{Channel, DATAGRAM_BYTES, KernelSocket, Request};
use super::vlan;
use crate::kernel::{FdbEntry, IfIndex, Link, Neighbour, Route, Snapshot, bits};

/// How often a dump is repeated that the kernel says is not consistent.
const DUMP_ATTEMPTS: usize = 4;
/// Buffer sizes of the dumps of a table from which entries are being removed. An
/// entry is skipped where one datagram ends and the next begins, so the borders
/// are put elsewhere each time.
const DATAGRAM_SIZES: [usize; 5] = [DATAGRAM_BYTES, 27_000, 19_000, 31_000, 23_000];

/// Requests to the kernel in the network namespace of the thread that opened
/// it. A clone shares the sockets; requests of several tasks queue up.
#[derive(Clone)]
pub struct Netlink {
    route: Arc<Mutex<Channel>>,
    /// `None` where the kernel has no nfnetlink.
    pub(super) netfilter: Option<Arc<Mutex<Channel>>>,
    /// `None` where the kernel has no netdev family.
    pub(super) netdev: Option<(Family, Arc<Mutex<Channel>>)>,
}

impl Netlink {
    /// Must be called inside a tokio runtime.
    pub fn open() -> Result<Self, NetlinkError> {
        let failed = |error| Failure::Socket(error).during("open", "a netlink socket");
        let netfilter = match Channel::open(NETLINK_NETFILTER) {
            Ok(channel) => Some(Arc::new(Mutex::new(channel))),
            Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => None,
            Err(error) => return Err(failed(error)),
        };
        let netdev = match netdev::family().map_err(failed)? {
            Some(family) => {
                let channel = Channel::open(NETLINK_GENERIC).map_err(failed)?;
                Some((family, Arc::new(Mutex::new(channel))))
            }
            None => None,
        };
        let route = Channel::open(NETLINK_ROUTE).map_err(failed)?;
        Ok(Self {
            route: Arc::new(Mutex::new(route)),
            netfilter,
            netdev,
        })
    }

    pub(super) async fn channel(&self) -> MutexGuard<'_, Channel> {
        self.route.lock().await
    }

    /// Everything the mirror needs, read table by table. With an `Events` opened
    /// before, snapshot and later events together miss nothing: the forwarding
    /// and neighbour tables are read again while entries are being removed from
    /// them, since such a dump may skip entries that stay.
    pub async fn snapshot(&self) -> Result<Snapshot, NetlinkError> {
        let mut snapshot = Snapshot {
            links: self.links().await?,
            ..Snapshot::default()
        };
        snapshot.vlans = vlan::all_vlans(&mut *self.channel().await).await?;
        snapshot.vnis = vlan::all_vnis(&mut *self.channel().await).await?;
        let get = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let get = encode(&get, NLM_F_DUMP);
        snapshot.addresses = dump(&mut *self.channel().await, "addresses", &get, |message| {
            (message.kind == libc::RTM_NEWADDR).then(|| address(message.body))?
        })
        .await?;
        snapshot.fdb = self.forwarding().await?;
        snapshot.neighbours = self.neighbours().await?;
        snapshot.filters = self.filters().await?;
        snapshot.redirect_targets = self.redirect_targets().await?;
        Ok(snapshot)
    }

    /// Every link, complete.
    pub async fn links(&self) -> Result<Vec<Link>, NetlinkError> {
        let mut get = LinkMessage::default();
        get.attributes
            .push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let get = encode(&RouteNetlinkMessage::GetLink(get), NLM_F_DUMP);
        dump(&mut *self.channel().await, "links", &get, |message| {
            (message.kind == libc::RTM_NEWLINK).then(|| link(message.body))?
        })
        .await
    }

    async fn forwarding(&self) -> Result<Vec<FdbEntry>, NetlinkError> {
        self.dump_watched("the forwarding tables", AddressFamily::Bridge, fdb_entry)
            .await
    }

    async fn neighbours(&self) -> Result<Vec<Neighbour>, NetlinkError> {
        self.dump_watched("neighbours", AddressFamily::Unspec, neighbour)
            .await
    }

    /// Dumps a table that the kernel walks by position without noticing
    /// removals (no NLM_F_DUMP_INTR): a removal before the position makes it
    /// skip one entry. Removals are watched for, and the dump repeated; entries
    /// of repeated dumps are united, the newest last.
    async fn dump_watched<T: Eq + Hash + Clone>(
        &self,
        object: &'static str,
        family: AddressFamily,
        read: fn(&[u8]) -> Option<T>,
    ) -> Result<Vec<T>, NetlinkError> {
        let failed = |error: io::Error| Failure::Socket(error).during("read", object);
        let mut watch =
            KernelSocket::open(NETLINK_ROUTE, &[libc::RTNLGRP_NEIGH], 1 << 20).map_err(failed)?;
        let mut get = NeighbourMessage::default();
        get.header.family = family;
        let get = encode(&RouteNetlinkMessage::GetNeighbour(get), NLM_F_DUMP);
        let read = |message: &Message<'_>| {
            (message.kind == libc::RTM_NEWNEIGH).then(|| read(message.body))?
        };
        let mut parts: Vec<Vec<T>> = Vec::new();
        for datagram_bytes in DATAGRAM_SIZES {
            let mut channel =
                Channel::with_datagrams(NETLINK_ROUTE, datagram_bytes).map_err(failed)?;
            let entries = dump(&mut channel, object, &get, read).await?;
            if !saw_removal(&mut watch).map_err(failed)? {
                return Ok(entries);
            }
            parts.push(entries);
        }
        Ok(unite(parts))
    }

    /// How the kernel would send a UDP datagram to `remote`, through `link` and
    /// from `source` if given. `None` if it would not, or not as plain IP through
    /// a device: no route, blackhole, unreachable, prohibited, an address of this
    /// host, a broadcast or multicast address, a route that encapsulates.
    pub async fn route(
        &self,
        remote: IpAddr,
        link: Option<IfIndex>,
        source: Option<IpAddr>,
    ) -> Result<Option<Route>, NetlinkError> {
        let mut get = RouteMessage::default();
        get.header.address_family = family(remote);
        get.header.destination_prefix_length = host_bits(remote);
        get.attributes
            .push(RouteAttribute::Destination(RouteAddress::from(remote)));
        get.attributes
            .push(RouteAttribute::IpProto(libc::IPPROTO_UDP as u8));
        if let Some(source) = source {
            get.header.source_prefix_length = host_bits(source);
            get.attributes
                .push(RouteAttribute::Source(RouteAddress::from(source)));
        }
        get.attributes.extend(link.map(RouteAttribute::Oif));
        let mut found = None;
        let request = encode(&RouteNetlinkMessage::GetRoute(get), 0);
        let asked = self
            .channel()
            .await
            .request(&request, |message| {
                if message.kind == libc::RTM_NEWROUTE {
                    found = route(message.body);
                }
            })
            .await;
        match asked {
            Ok(_) => Ok(found),
            Err(failure)
                if failure
                    .errno()
                    .is_some_and(|errno| NO_ROUTE.contains(&errno)) =>
            {
                Ok(None)
            }
            Err(failure) => Err(failure.during("look up", format!("the route to {remote}"))),
        }
    }

    /// Asks the kernel to resolve or confirm a neighbour, as traffic to it would
    /// (NTF_USE). Does nothing for permanent and NOARP entries: NTF_USE would make
    /// a permanent entry an ordinary one (neighbour.c, NEIGH_UPDATE_F_USE).
    ///
    /// IPv6 asks from the device's link-local address; without one (addrgenmode
    /// none) only a packet of its own makes the kernel ask (ndisc.c, ndisc_send_ns).
    pub async fn neighbour_use(
        &self,
        ifindex: IfIndex,
        neighbour_address: IpAddr,
    ) -> Result<(), NetlinkError> {
        let object = || format!("neighbour {neighbour_address} on link {ifindex}");
        let mut about = NeighbourMessage::default();
        about.header.family = family(neighbour_address);
        about.header.ifindex = ifindex;
        about
            .attributes
            .push(NeighbourAttribute::Destination(NeighbourAddress::from(
                neighbour_address,
            )));
        let mut state = 0;
        let mut channel = self.channel().await;
        let get = encode(&RouteNetlinkMessage::GetNeighbour(about.clone()), 0);
        let asked = channel
            .request(&get, |message| {
                state = neighbour(message.body).map_or(0, |entry| entry.state);
            })
            .await;
        match asked {
            Err(failure) if failure.errno() != Some(libc::ENOENT) => {
                return Err(failure.during("read", object()));
            }
            Ok(_) | Err(_) => {}
        }
        if state & (bits::NUD_PERMANENT | bits::NUD_NOARP) != 0 {
            return Ok(());
        }
        about.header.flags = NeighbourFlags::Use;
        let resolve = encode(&RouteNetlinkMessage::NewNeighbour(about), NLM_F_CREATE);
        channel
            .request(&resolve, |_| {})
            .await
            .map(|_| ())
            .map_err(|failure| failure.during("resolve", object()))
    }
}

/// What RTM_GETROUTE answers where it has no route to offer: ENETUNREACH (none),
/// EHOSTUNREACH (unreachable), EACCES (prohibit), EINVAL (blackhole), ENODEV (no
/// such link).
const NO_ROUTE: [i32; 5] = [
    libc::ENETUNREACH,
    libc::EHOSTUNREACH,
    libc::EACCES,
    libc::EINVAL,
    libc::ENODEV,
];

pub(super) fn family(address: IpAddr) -> AddressFamily {
    AddressFamily::from(family_of(address))
}

/// Dumps and, if the kernel says the result is not consistent, again.
async fn dump<T>(
    channel: &mut Channel,
    object: &'static str,
    request: &Request,
    read: impl Fn(&Message<'_>) -> Option<T>,
) -> Result<Vec<T>, NetlinkError> {
    let mut entries = Vec::new();
    for _ in 0..DUMP_ATTEMPTS {
        entries.clear();
        let completion = channel
            .request(request, |message| entries.extend(read(&message)))
            .await
            .map_err(|failure| failure.during("read", object))?;
        if !completion.interrupted {
            break;
        }
    }
    Ok(entries)
}

/// Turns a typed message into bytes.
pub(super) fn encode(message: &RouteNetlinkMessage, flags: u16) -> Request {
    let mut body = vec![0; NetlinkSerializable::buffer_len(message)];
    message.serialize(&mut body);
    Request {
        kind: message.message_type(),
        flags,
        body,
    }
}

/// Asks for one link, complete, without counters.
pub(super) fn link_by_index(ifindex: IfIndex) -> Request {
    let mut get = LinkMessage::default();
    get.header.index = ifindex;
    get.attributes
        .push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    encode(&RouteNetlinkMessage::GetLink(get), 0)
}

/// Whether a neighbour or forwarding entry went away since the last call, or
/// notifications were lost.
fn saw_removal(watch: &mut KernelSocket) -> io::Result<bool> {
    let mut seen = false;
    loop {
        match watch.try_receive() {
            Ok(false) => return Ok(seen),
            Ok(true) => {
                seen |= messages(watch.datagram()).any(|m| m.kind == libc::RTM_DELNEIGH);
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => seen = true,
            Err(error) => return Err(error),
        }
    }
}

/// All entries once, each where it was seen last.
fn unite<T: Eq + Hash + Clone>(parts: Vec<Vec<T>>) -> Vec<T> {
    let mut seen = HashSet::new();
    let mut newest_first: Vec<T> = parts
        .into_iter()
        .rev()
        .flat_map(|part| part.into_iter().rev())
        .filter(|entry| seen.insert(entry.clone()))
        .collect();
    newest_first.reverse();
    newest_first
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Requests are made from spawned tasks and HTTP handlers.
    #[test]
    fn requests_can_move_between_threads() {
        fn check<T: Send>(_: impl FnOnce(&'static Netlink) -> T) {}
        fn check_events<T: Send>(_: impl FnOnce(&'static mut super::super::Events) -> T) {}
        check(|netlink| netlink.snapshot());
        check(|netlink| netlink.route([192, 0, 2, 1].into(), None, None));
        check(|netlink| netlink.neighbour_use(1, [192, 0, 2, 1].into()));
        check(|netlink| netlink.fdb_refresh(&[]));
        check(|netlink| netlink.link_by_name("lo"));
        check_events(|events| events.next());
    }

    #[test]
    fn united_dumps_keep_everything_once_with_the_newest_last() {
        assert_eq!(
            unite(vec![vec!["a", "b", "c"], vec!["b", "d"]]),
            ["a", "c", "b", "d"]
        );
        assert_eq!(unite::<u8>(vec![]), [0; 0]);
    }
}
