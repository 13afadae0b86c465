//! From the wire towards a VM: check the outer headers, find the segment, know
//! the sender, find the receiver, strip, redirect. TCP for a port with offloads
//! takes the second half of its way through the stack, where GRO merges it.

use vtep_common::Outcome::{self, *};
use vtep_common::decap::{self, Inner, Outer};
use vtep_common::ecn;
use vtep_common::layout::{
    Config, FdbKey, Location, Mark, PeerKey, SEGMENT_LEARNING, SEGMENT_STRICT, Segment, SegmentId,
};
use vtep_common::wire::{
    ETH_P_IP, ETH_P_IPV6, Ethernet, InnerHead, InnerIpv4, InnerIpv6, Ipv4, OuterV4, OuterV6, Wire,
};

use crate::Verdict;
use crate::maps;
use crate::packet::Packet;
use crate::xdp::XdpPacket;

/// What is left to do when every decision is made.
struct Way {
    /// Outer headers to strip, bytes.
    outer_bytes: usize,
    /// ECN bits that the inner header gets.
    ecn: Option<u8>,
    /// Through the stack, to this port; else to the device that was chosen.
    stack: Option<Mark>,
}

#[inline(always)]
pub fn forward(packet: &mut XdpPacket<'_>) -> Verdict {
    let frame_bytes = packet.len();
    let mut segment = 0;
    let (outcome, bytes) = match lookup(packet, frame_bytes, &mut segment) {
        Ok(way) => (strip(packet, &way), frame_bytes - way.outer_bytes as u32),
        Err(IngressPassMalformed) if packet.has_frags() => (IngressPassFrags, frame_bytes),
        Err(outcome) => (outcome, frame_bytes),
    };
    Verdict {
        outcome,
        segment,
        bytes,
    }
}

#[inline(always)]
fn strip(packet: &mut XdpPacket<'_>, way: &Way) -> Outcome {
    // First, because it can be refused; nobody reads it before it is filled.
    if way.stack.is_some() && !packet.make_room_for_mark() {
        return IngressPassNoHeadroom;
    }
    let stripped = if way.outer_bytes == OuterV6::LEN {
        packet.adjust_head(OuterV6::LEN as i32)
    } else {
        packet.adjust_head(OuterV4::LEN as i32)
    };
    if !stripped {
        return IngressPassNoHeadroom;
    }
    if let Some(mark) = way.ecn {
        set_ecn(packet, mark);
    }
    match way.stack {
        None => IngressLocal,
        // Cannot fail: the room has just been made.
        Some(mark) if packet.mark(mark) => IngressLocalStack,
        Some(_) => IngressPassNoHeadroom,
    }
}

#[inline(always)]
fn set_ecn(packet: &mut XdpPacket<'_>, mark: u8) {
    let ethertype = packet.get::<InnerHead>(0).map(|head| head.eth.ethertype());
    match ethertype {
        Some(ETH_P_IP) => {
            if let Some(inner) = packet.get_mut::<InnerIpv4>(0) {
                ecn::set_v4(&mut inner.ip, mark);
            }
        }
        Some(ETH_P_IPV6) => {
            if let Some(inner) = packet.get_mut::<InnerIpv6>(0) {
                ecn::set_v6(&mut inner.ip, mark);
            }
        }
        _ => {}
    }
}

/// Everything up to the choice of the device; the frame is only read.
#[inline(always)]
fn lookup(packet: &XdpPacket<'_>, frame_bytes: u32, id: &mut SegmentId) -> Result<Way, Outcome> {
    let config = maps::config().ok_or(IngressPassNotVxlan)?;
    let eth = packet.get::<Ethernet>(0).ok_or(IngressPassNotVxlan)?;
    match eth.ethertype() {
        ETH_P_IP => lookup_in::<OuterV4>(packet, frame_bytes, id, config),
        ETH_P_IPV6 => lookup_in::<OuterV6>(packet, frame_bytes, id, config),
        _ => Err(IngressPassNotVxlan),
    }
}

#[inline(always)]
fn lookup_in<O: Outer>(
    packet: &XdpPacket<'_>,
    frame_bytes: u32,
    id: &mut SegmentId,
    config: &Config,
) -> Result<Way, Outcome> {
    let outer = packet.get::<O>(0).ok_or(IngressPassNotVxlan)?;
    decap::addressed_to_vtep(outer, config)?;

    // The reserved byte is part of the key: a frame that sets it finds nothing.
    let segment = maps::segment(outer.key()).ok_or(IngressPassUnknownVni)?;
    *id = segment.id;
    // Before what passes for other reasons: the kernel takes frames of strangers.
    if segment.flags & SEGMENT_STRICT != 0
        && outer.is_to(segment)
        && !maps::is_peer(&peer(outer, segment))
    {
        return Err(IngressDropUnknownPeer);
    }
    decap::well_formed(outer, segment, frame_bytes)?;
    if outer.udp().checksum != [0, 0] {
        let sum = packet.sum_from(O::UDP).ok_or(IngressPassChecksum)?;
        if !decap::udp_checksum_is_right(outer, sum) {
            return Err(IngressPassChecksum);
        }
    }

    let head = packet
        .get::<InnerHead>(O::LEN)
        .ok_or(IngressPassMalformed)?;
    let network = O::LEN + Ethernet::LEN;
    let (ipv4, ipv6) = (packet.get::<Ipv4>(network), packet.get(network));
    match decap::classify(head, ipv4, ipv6) {
        Inner::Plain => {}
        Inner::Multicast => return Err(IngressPassMulticast),
        Inner::Control => return Err(IngressPassInnerType),
        Inner::Truncated => return Err(IngressPassMalformed),
    }
    let ecn = match decap::ecn(outer.tos(), head) {
        ecn::Decap::Keep => None,
        ecn::Decap::Set(mark) => Some(mark),
        ecn::Decap::Refuse => return Err(IngressPassEcn),
    };
    if segment.flags & SEGMENT_LEARNING != 0 {
        know_sender(head, segment, outer, config)?;
    }

    let key = FdbKey::from_bits(segment.id, head.destination_bits());
    let entry = maps::fdb(key, config).ok_or(IngressPassUnknownDestination)?;
    let location = entry.location().ok_or(IngressPassKernelDestination)?;
    let stack = match location.kind() {
        Location::KIND_PORT => false,
        Location::KIND_PORT_GRO => decap::is_tcp(head, ipv4, ipv6),
        Location::KIND_PORT_STACK => true,
        Location::KIND_REMOTE => return Err(IngressPassRemoteDestination),
        _ => return Err(IngressPassKernelDestination),
    };
    if frame_bytes - O::LEN as u32 > segment.local_max_bytes as u32 {
        return Err(IngressPassTooLong);
    }
    if !stack && !maps::redirect(location.index()) {
        return Err(IngressPassNoTarget);
    }
    Ok(Way {
        outer_bytes: O::LEN,
        ecn,
        stack: stack.then_some(Mark {
            cookie: config.cookie,
            ifindex: location.index(),
        }),
    })
}

#[inline(always)]
fn peer<O: Outer>(outer: &O, segment: &Segment) -> PeerKey {
    PeerKey {
        address: outer.source(),
        segment: segment.id,
        pad: [0; 2],
    }
}

/// R7: the kernel must not miss a MAC that is new or has moved.
#[inline(always)]
fn know_sender<O: Outer>(
    head: &InnerHead,
    segment: &Segment,
    outer: &O,
    config: &Config,
) -> Result<(), Outcome> {
    let key = FdbKey::from_bits(segment.id, head.source_bits());
    let entry = maps::fdb(key, config).ok_or(IngressPassLearn)?;
    let location = entry.location().ok_or(IngressPassLearn)?;
    if location.kind() != Location::KIND_REMOTE {
        return Err(IngressPassLearn);
    }
    let remote = maps::remote(location.index()).ok_or(IngressPassLearn)?;
    if !outer.is_from(remote) {
        return Err(IngressPassLearn);
    }
    entry.mark(config.epoch);
    Ok(())
}
