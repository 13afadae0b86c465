//! Notifications: three multicast sockets (rtnetlink, nftables, netdev) made one
//! stream of `Event`s. Waits without polling, reads in batches, completes
//! partial link messages by asking, and never hides a loss.

use std::io;

use netlink_sys::protocols::{NETLINK_GENERIC, NETLINK_NETFILTER, NETLINK_ROUTE};

use super::codec::{Message, messages};
use super::decode::{Notice, Part, notice};
use super::error::{Failure, NetlinkError, device};
use super::link::link;
use super::netdev;
use super::request::link_by_index;
use super::socket::{Channel, KernelSocket};
use super::vlan;
use crate::kernel::{Event, IfIndex};

/// Enough for some 40,000 forwarding entries while the daemon is busy.
const RECEIVE_BYTES: u32 = 32 << 20;
/// One `next()` returns about this many events at most.
const BATCH_EVENTS: usize = 4096;
/// Datagrams thrown away after a loss before other tasks get their turn.
const DISCARD_DATAGRAMS: usize = 1024;

const ROUTE_GROUPS: [u32; 13] = [
    libc::RTNLGRP_LINK,
    libc::RTNLGRP_TC,
    libc::RTNLGRP_NEIGH,
    libc::RTNLGRP_IPV4_IFADDR,
    libc::RTNLGRP_IPV6_IFADDR,
    libc::RTNLGRP_IPV4_ROUTE,
    libc::RTNLGRP_IPV6_ROUTE,
    libc::RTNLGRP_IPV6_IFINFO,
    libc::RTNLGRP_IPV4_RULE,
    libc::RTNLGRP_IPV6_RULE,
    libc::RTNLGRP_NEXTHOP,
    vlan::RTNLGRP_BRVLAN,
    vlan::RTNLGRP_TUNNEL,
];
/// NFNLGRP_NFTABLES (nfnetlink.h).
const NFTABLES_GROUPS: [u32; 1] = [7];

/// Notifications of one network namespace. Open it before the first snapshot,
/// so that nothing falls between the two.
pub struct Events {
    route: KernelSocket,
    /// `None` where the kernel has no nfnetlink.
    netfilter: Option<KernelSocket>,
    /// `None` where the kernel has no netdev family.
    netdev: Option<KernelSocket>,
    /// For what a notification tells only in part.
    requests: Channel,
    ready: Vec<Event>,
    partial: Vec<Part>,
    /// Notifications were lost, and the rest of the queue is being thrown away.
    discarding: bool,
}

impl Events {
    /// Joins all groups in the network namespace of the calling thread. Must be
    /// called inside a tokio runtime.
    pub fn open() -> Result<Self, NetlinkError> {
        let failed = |error| Failure::Socket(error).during("watch", "network changes");
        let netfilter = match KernelSocket::open(NETLINK_NETFILTER, &NFTABLES_GROUPS, RECEIVE_BYTES)
        {
            Ok(socket) => Some(socket),
            Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => None,
            Err(error) => return Err(failed(error)),
        };
        let netdev = match netdev::family().map_err(failed)? {
            Some(family) => Some(
                KernelSocket::open(NETLINK_GENERIC, &[family.group], RECEIVE_BYTES)
                    .map_err(failed)?,
            ),
            None => None,
        };
        Ok(Self {
            netdev,
            route: KernelSocket::open(NETLINK_ROUTE, &ROUTE_GROUPS, RECEIVE_BYTES)
                .map_err(failed)?,
            netfilter,
            requests: Channel::open(NETLINK_ROUTE).map_err(failed)?,
            ready: Vec::new(),
            partial: Vec::new(),
            discarding: false,
        })
    }

    /// Waits for at least one event, then takes what is already there without
    /// waiting further, up to about 4096 events, in the kernel's order. What was
    /// told only in part comes last, complete, and at least as new as the rest. Runs of `RoutesChanged` or `FiltersChanged` are folded into one.
    ///
    /// After a loss the result is `[Overrun]` alone, and only once the queue is
    /// empty (until then the kernel keeps dropping): a snapshot taken from then
    /// on misses nothing.
    ///
    /// Cancel safe: events read so far are returned by the next call.
    pub async fn next(&mut self) -> Result<Vec<Event>, NetlinkError> {
        loop {
            if self.ready.is_empty() && self.partial.is_empty() && !self.discarding {
                self.wait().await.map_err(failed)?;
            }
            let events = self.take().await?;
            if !events.is_empty() {
                return Ok(events);
            }
        }
    }

    /// As `next`, but only what is there already, perhaps nothing.
    pub async fn take(&mut self) -> Result<Vec<Event>, NetlinkError> {
        self.drain().map_err(failed)?;
        if self.discarding {
            self.discard().await.map_err(failed)?;
            return Ok(vec![Event::Overrun]);
        }
        self.complete().await?;
        Ok(std::mem::take(&mut self.ready))
    }

    async fn wait(&self) -> io::Result<()> {
        tokio::select! {
            ready = self.route.readable() => ready,
            ready = readable(self.netfilter.as_ref()) => ready,
            ready = readable(self.netdev.as_ref()) => ready,
        }
    }

    fn drain(&mut self) -> io::Result<()> {
        while !self.discarding && self.ready.len() + self.partial.len() < BATCH_EVENTS {
            match self.route.try_receive() {
                Ok(false) => break,
                Ok(true) => {
                    for message in messages(self.route.datagram()) {
                        add(&message, &mut self.ready, &mut self.partial);
                    }
                }
                Err(error) if is_loss(&error) => self.discarding = true,
                Err(error) => return Err(error),
            }
        }
        // These are read again as a whole, so a loss here loses nothing.
        for (socket, event) in [
            (&mut self.netfilter, Event::FiltersChanged),
            (&mut self.netdev, Event::TargetsChanged),
        ] {
            let Some(socket) = socket else { continue };
            for _ in 0..BATCH_EVENTS {
                match socket.try_receive() {
                    Ok(false) => break,
                    Err(error) if !is_loss(&error) => return Err(error),
                    Ok(true) | Err(_) => push(&mut self.ready, event.clone()),
                }
            }
        }
        Ok(())
    }

    /// Empties the queue. The kernel reports a loss once and drops everything
    /// until the reader has caught up (af_netlink.c, NETLINK_S_CONGESTED), so only
    /// then does it make sense to start over.
    async fn discard(&mut self) -> io::Result<()> {
        loop {
            for _ in 0..DISCARD_DATAGRAMS {
                match self.route.try_receive() {
                    Ok(false) => {
                        self.ready.clear();
                        self.partial.clear();
                        self.discarding = false;
                        return Ok(());
                    }
                    Err(error) if !is_loss(&error) => return Err(error),
                    Ok(true) | Err(_) => {}
                }
            }
            tokio::task::yield_now().await;
        }
    }

    async fn complete(&mut self) -> Result<(), NetlinkError> {
        while let Some(&part) = self.partial.last() {
            match part {
                Part::Link(ifindex) => {
                    self.complete_link(ifindex).await?;
                    self.complete_vlans(ifindex).await?;
                }
                Part::Vlans(ifindex) => self.complete_vlans(ifindex).await?,
                Part::Vnis(ifindex) => self.complete_vnis(ifindex).await?,
            }
            self.partial.pop();
        }
        Ok(())
    }

    async fn complete_link(&mut self, ifindex: IfIndex) -> Result<(), NetlinkError> {
        let mut found = None;
        let asked = self
            .requests
            .request(&link_by_index(ifindex), |message| {
                found = link(message.body)
            })
            .await;
        match asked {
            // Gone, or moved to another namespace: RTM_DELLINK says so.
            Err(failure) if failure.errno() == Some(libc::ENODEV) => {}
            Err(failure) => return Err(failure.during("read", device(ifindex))),
            Ok(_) => self.ready.extend(found.map(Event::Link)),
        }
        Ok(())
    }

    async fn complete_vlans(&mut self, ifindex: IfIndex) -> Result<(), NetlinkError> {
        let vlans = vlan::vlans_of(&mut self.requests, ifindex).await?;
        self.ready
            .extend(vlans.map(|vlans| Event::Vlans(ifindex, vlans)));
        Ok(())
    }

    async fn complete_vnis(&mut self, ifindex: IfIndex) -> Result<(), NetlinkError> {
        let vnis = vlan::vnis_of(&mut self.requests, ifindex).await?;
        self.ready
            .extend(vnis.map(|vnis| Event::Vnis(ifindex, vnis)));
        Ok(())
    }
}

fn failed(error: io::Error) -> NetlinkError {
    Failure::Socket(error).during("watch", "network changes")
}

async fn readable(socket: Option<&KernelSocket>) -> io::Result<()> {
    match socket {
        Some(socket) => socket.readable().await,
        None => std::future::pending().await,
    }
}

/// ENOBUFS: the kernel dropped notifications. EMSGSIZE: one was cut short.
fn is_loss(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::EMSGSIZE))
}

fn add(message: &Message<'_>, ready: &mut Vec<Event>, partial: &mut Vec<Part>) {
    match notice(message.kind, message.body) {
        Some(Notice::Fact(event)) => push(ready, event),
        Some(Notice::Partial(part)) if !partial.contains(&part) => partial.push(part),
        Some(Notice::Partial(_)) | None => {}
    }
}

fn push(ready: &mut Vec<Event>, event: Event) {
    let signal = matches!(
        event,
        Event::RoutesChanged | Event::FiltersChanged | Event::TargetsChanged
    );
    let repeats = signal && ready.last() == Some(&event);
    if !repeats {
        ready.push(event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_signals_without_contents_are_folded() {
        let mut ready = Vec::new();
        for event in [
            Event::RoutesChanged,
            Event::RoutesChanged,
            Event::FiltersChanged,
            Event::RoutesChanged,
            Event::LinkGone(3),
            Event::LinkGone(3),
        ] {
            push(&mut ready, event);
        }
        assert_eq!(
            ready,
            [
                Event::RoutesChanged,
                Event::FiltersChanged,
                Event::RoutesChanged,
                Event::LinkGone(3),
                Event::LinkGone(3)
            ]
        );
    }
}
