//! From a VM towards the wire or another port: know the sender, find the
//! receiver, put the outer header in front, redirect. The same at both hooks;
//! what differs is in `xdp` and `skb`.

use vtep_common::Outcome::{self, *};
use vtep_common::decap::{self, Inner};
use vtep_common::encap::{Frame, Marks};
use vtep_common::flow;
use vtep_common::layout::{Config, FdbKey, Location, Port, PortKey, Remote, SegmentId};
use vtep_common::wire::{Ethernet, InnerHead, Wire};

use crate::Verdict;
use crate::maps;
use crate::packet::Packet;

/// A frame at a port, at one of the hooks.
pub trait FromPort: Packet {
    /// Carries a VLAN tag that is not among its bytes.
    fn has_tag(&self) -> bool;
    /// Length of the longest frame that will be on the wire; `None` where it
    /// cannot be told.
    fn longest_bytes(&self, head: &InnerHead) -> Option<u32>;
    /// Whether the hook can do it for this kind of frame.
    fn can_encapsulate(&self, head: &InnerHead, remote: &Remote) -> Result<(), Outcome>;
    /// The kernel takes the frame, towards the same remote: it must give it the
    /// same source port.
    fn hand_over(&self, hash: u32);
    /// UDP source port, host order.
    fn source_port(&self, hash: u32, remote: &Remote, config: &Config) -> u16;
    /// Folded sum of the frame as it will be on the wire.
    fn inner_sum(&self, head: &InnerHead) -> Result<u16, Outcome>;
    /// Name the device the frame leaves by; false where it is no target.
    #[must_use]
    fn choose(&self, ifindex: u32) -> bool;
    /// Put the headers in front. An outcome that passes leaves the frame as it was.
    fn encapsulate(&mut self, remote: &Remote, frame: &Frame) -> Outcome;
}

/// What is left to do when every decision is made.
enum Way {
    /// As it is, to the device.
    Local(u32),
    /// Behind the headers of a remote.
    Remote(&'static Remote, Frame),
}

/// Where the frame ended, and the device that was chosen.
#[inline(always)]
pub fn forward<P: FromPort>(packet: &mut P) -> (Verdict, u32) {
    let bytes = packet.len();
    let mut segment = 0;
    let mut target = 0;
    let outcome = match lookup(packet, bytes, &mut segment) {
        Ok(Way::Local(ifindex)) => {
            target = ifindex;
            EgressLocal
        }
        Ok(Way::Remote(remote, frame)) => {
            target = remote.ifindex;
            packet.encapsulate(remote, &frame)
        }
        Err(outcome) => outcome,
    };
    let verdict = Verdict {
        outcome,
        segment,
        bytes,
    };
    (verdict, target)
}

/// Everything up to the choice of the device; the frame is only read.
#[inline(always)]
fn lookup<P: FromPort>(packet: &P, bytes: u32, segment: &mut SegmentId) -> Result<Way, Outcome> {
    let ifindex = packet.ingress_ifindex();
    let port = maps::port(PortKey::new(ifindex, 0)).ok_or(EgressPassUnconfigured)?;
    *segment = port.segment;
    let head = packet.get::<InnerHead>(0).ok_or(EgressPassMalformed)?;
    match decap::classify(head, packet.get(Ethernet::LEN), packet.get(Ethernet::LEN)) {
        Inner::Plain if packet.has_tag() => return Err(EgressPassInnerType),
        Inner::Plain => {}
        Inner::Multicast => return Err(EgressPassMulticast),
        Inner::Control => return Err(EgressPassInnerType),
        Inner::Truncated => return Err(EgressPassMalformed),
    }
    let config = maps::config().ok_or(EgressPassUnconfigured)?;
    know_sender(head, port, ifindex, config)?;

    let key = FdbKey::from_bits(port.segment, head.destination_bits());
    let entry = maps::fdb(key, config).ok_or(EgressPassUnknownDestination)?;
    let location = entry.location().ok_or(EgressPassKernelDestination)?;
    match location.kind() {
        Location::KIND_REMOTE => to_remote(packet, head, port, location.index(), bytes, config),
        Location::KIND_PORT | Location::KIND_PORT_GRO | Location::KIND_PORT_STACK => {
            to_port(packet, head, port, ifindex, location)
        }
        _ => Err(EgressPassKernelDestination),
    }
}

/// R7: the kernel must not miss a MAC that is new or has moved.
#[inline(always)]
fn know_sender(
    head: &InnerHead,
    port: &mut Port,
    ifindex: u32,
    config: &Config,
) -> Result<(), Outcome> {
    let epoch = config.epoch;
    let key = FdbKey::from_bits(port.segment, head.source_bits());
    if key.word() == port.first_key {
        if port.epoch != epoch {
            port.epoch = epoch;
        }
        return Ok(());
    }
    let entry = maps::fdb(key, config).ok_or(EgressPassUnknownSource)?;
    match entry.location() {
        Some(location) if location.is_at_port(ifindex) => {
            entry.mark(epoch);
            Ok(())
        }
        _ => Err(EgressPassUnknownSource),
    }
}

#[inline(always)]
fn to_remote<P: FromPort>(
    packet: &P,
    head: &InnerHead,
    port: &Port,
    slot: u32,
    bytes: u32,
    config: &Config,
) -> Result<Way, Outcome> {
    let remote = maps::remote(slot).ok_or(EgressPassKernelDestination)?;
    let hash = flow::hash(head, packet.get(Ethernet::LEN), packet.get(Ethernet::LEN));
    let way = behind_headers(packet, head, port, remote, hash, bytes, config);
    if way.is_err() {
        packet.hand_over(hash);
    }
    way
}

#[inline(always)]
fn behind_headers<P: FromPort>(
    packet: &P,
    head: &InnerHead,
    port: &Port,
    remote: &'static Remote,
    hash: u32,
    bytes: u32,
    config: &Config,
) -> Result<Way, Outcome> {
    let longest = packet.longest_bytes(head).ok_or(EgressPassTooLong)?;
    if longest > port.tunnel_max_bytes as u32 {
        return Err(EgressPassTooLong);
    }
    packet.can_encapsulate(head, remote)?;
    let inner_sum = if remote.wants_udp_checksum() {
        packet.inner_sum(head)?
    } else {
        0
    };
    if !packet.choose(remote.ifindex) {
        return Err(EgressPassNoTarget);
    }
    let frame = Frame {
        // Of a superframe not more than its lower bits; the segments get their own.
        inner_bytes: bytes as u16,
        vni_word: port.vni_word,
        marks: Marks::of(
            remote,
            head,
            packet.get(Ethernet::LEN),
            packet.get(Ethernet::LEN),
        ),
        source_port: packet.source_port(hash, remote, config),
        // Unique in a flow while its fragments may be under way (RFC 6864 section 4.2); the hash
        // keeps flows of several CPUs apart.
        identification: (hash ^ maps::encapsulated_frames(port.segment)) as u16,
        inner_sum,
    };
    Ok(Way::Remote(remote, frame))
}

#[inline(always)]
fn to_port<P: FromPort>(
    packet: &P,
    head: &InnerHead,
    port: &Port,
    from: u32,
    location: Location,
) -> Result<Way, Outcome> {
    let to = location.index();
    if from == to {
        return Err(EgressPassSamePort);
    }
    let longest = packet.longest_bytes(head).ok_or(EgressPassTooLong)?;
    if longest > port.local_max_bytes as u32 {
        return Err(EgressPassTooLong);
    }
    // A port that takes no frames from XDP is no target of it.
    if !packet.choose(to) {
        return Err(EgressPassNoTarget);
    }
    Ok(Way::Local(to))
}
