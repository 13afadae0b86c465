//! From a VM towards the wire or another port: know the sender, find the
//! receiver, put the outer header in front, redirect.

use vtep_common::Outcome::{self, *};
use vtep_common::decap::{self, Inner};
use vtep_common::encap::{self, Frame};
use vtep_common::layout::{Config, FdbKey, Location, Port, PortKey, Remote, SegmentId};
use vtep_common::wire::{Ethernet, InnerHead, OuterV4, Wire};
use vtep_common::{ecn, flow};

use crate::Verdict;
use crate::maps;
use crate::packet::Packet;

/// What is left to do when every decision is made.
enum Way {
    /// As it is, to the chosen device.
    Local,
    /// Behind the headers of a remote.
    Remote(&'static Remote, Frame),
}

#[inline(always)]
pub fn forward(packet: &mut Packet<'_>) -> Verdict {
    let bytes = packet.len();
    let mut segment = 0;
    let outcome = match lookup(packet, bytes, &mut segment) {
        Ok(Way::Local) => EgressLocal,
        Ok(Way::Remote(remote, frame)) => encapsulate(packet, remote, &frame),
        Err(outcome) => outcome,
    };
    Verdict {
        outcome,
        segment,
        bytes,
    }
}

#[inline(always)]
fn encapsulate(packet: &mut Packet<'_>, remote: &Remote, frame: &Frame) -> Outcome {
    if !packet.adjust_head(-(OuterV4::LEN as i32)) {
        return EgressPassNoHeadroom;
    }
    // Cannot fail: the room has just been made. The verifier wants to see it.
    let Some(outer) = packet.get_mut::<OuterV4>(0) else {
        return EgressPassNoHeadroom;
    };
    encap::write_v4(outer, remote, frame);
    EgressRemote
}

/// Everything up to the choice of the device; the frame is only read.
#[inline(always)]
fn lookup(packet: &Packet<'_>, bytes: u32, segment: &mut SegmentId) -> Result<Way, Outcome> {
    let ifindex = packet.ifindex();
    let port = maps::port(PortKey::new(ifindex, 0)).ok_or(EgressPassUnconfigured)?;
    *segment = port.segment;
    let head = packet.get::<InnerHead>(0).ok_or(EgressPassMalformed)?;
    match decap::classify(head, packet.get(Ethernet::LEN), packet.get(Ethernet::LEN)) {
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
        Location::KIND_REMOTE => to_remote(packet, head, port, location.index(), bytes),
        Location::KIND_PORT => to_port(port, ifindex, location.index(), bytes),
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
fn to_remote(
    packet: &Packet<'_>,
    head: &InnerHead,
    port: &Port,
    slot: u32,
    bytes: u32,
) -> Result<Way, Outcome> {
    let remote = maps::remote(slot).ok_or(EgressPassKernelDestination)?;
    if bytes > port.tunnel_max_bytes as u32 {
        return Err(EgressPassTooLong);
    }
    let hash = flow::hash(head, packet.get(Ethernet::LEN), packet.get(Ethernet::LEN));
    let inner_sum = if remote.wants_udp_checksum() {
        packet.sum_from(0).ok_or(EgressPassTooLong)?
    } else {
        0
    };
    if !maps::redirect(remote.ifindex) {
        return Err(EgressPassNoTarget);
    }
    let frame = Frame {
        inner_bytes: bytes as u16,
        vni_word: port.vni_word,
        ecn: head.traffic_class().map_or(0, ecn::encap),
        source_port: flow::source_port(hash, remote.port_min, remote.port_count),
        // Unique in a flow while its fragments may be under way (RFC 6864 section 4.2); the hash
        // keeps flows of several CPUs apart.
        identification: (hash ^ maps::encapsulated_frames(port.segment)) as u16,
        inner_sum,
    };
    Ok(Way::Remote(remote, frame))
}

#[inline(always)]
fn to_port(port: &Port, from: u32, to: u32, bytes: u32) -> Result<Way, Outcome> {
    if from == to {
        return Err(EgressPassSamePort);
    }
    if bytes > port.local_max_bytes as u32 {
        return Err(EgressPassTooLong);
    }
    if !maps::redirect(to) {
        return Err(EgressPassNoTarget);
    }
    Ok(Way::Local)
}
