//! From the wire towards a VM: check the outer headers, find the segment, know
//! the sender, find the receiver, strip, redirect.

use vtep_common::Outcome::{self, *};
use vtep_common::decap::{self, Inner};
use vtep_common::layout::{Config, FdbKey, Location, SEGMENT_LEARNING, Segment, SegmentId, VniKey};
use vtep_common::wire::{Ethernet, InnerHead, Ipv4, OuterV4, Wire};

use crate::Verdict;
use crate::maps;
use crate::packet::Packet;

/// Offset of the inner frame.
const INNER: usize = OuterV4::LEN;
/// Offset of the UDP header.
const UDP: usize = Ethernet::LEN + Ipv4::LEN;

#[inline(always)]
pub fn forward(packet: &mut Packet<'_>) -> Verdict {
    let frame_bytes = packet.len();
    let mut segment = 0;
    match lookup(packet, frame_bytes, &mut segment) {
        Ok(()) if packet.adjust_head(OuterV4::LEN as i32) => {
            let bytes = frame_bytes - OuterV4::LEN as u32;
            Verdict {
                outcome: IngressLocal,
                segment,
                bytes,
            }
        }
        Ok(()) => Verdict {
            outcome: IngressPassNoHeadroom,
            segment,
            bytes: frame_bytes,
        },
        Err(outcome) => Verdict {
            outcome,
            segment,
            bytes: frame_bytes,
        },
    }
}

/// Everything up to the choice of the device; the frame is only read.
#[inline(always)]
fn lookup(packet: &Packet<'_>, frame_bytes: u32, id: &mut SegmentId) -> Result<(), Outcome> {
    let config = maps::config().ok_or(IngressPassNotVxlan)?;
    let outer = packet.get::<OuterV4>(0).ok_or(IngressPassNotVxlan)?;
    decap::addressed_to_vtep(outer, config)?;

    let vni_word = u32::from_ne_bytes(outer.vxlan.vni);
    let udp_port = u16::from_ne_bytes(outer.udp.destination);
    // The reserved byte is part of the key: a frame that sets it finds nothing.
    let segment =
        maps::segment(VniKey::from_words(vni_word, udp_port)).ok_or(IngressPassUnknownVni)?;
    *id = segment.id;
    decap::well_formed(outer, segment, frame_bytes)?;
    if outer.udp.checksum != [0, 0] {
        let sum = packet.sum_from(UDP).ok_or(IngressPassChecksum)?;
        if !decap::udp_checksum_is_right(&outer.ip, &outer.udp, sum) {
            return Err(IngressPassChecksum);
        }
    }

    let head = packet.get::<InnerHead>(INNER).ok_or(IngressPassMalformed)?;
    let network = INNER + Ethernet::LEN;
    match decap::classify(head, packet.get(network), packet.get(network)) {
        Inner::Plain => {}
        Inner::Multicast => return Err(IngressPassMulticast),
        Inner::Control => return Err(IngressPassInnerType),
        Inner::Truncated => return Err(IngressPassMalformed),
    }
    if !decap::ecn_unchanged(outer, head) {
        return Err(IngressPassEcn);
    }
    if segment.flags & SEGMENT_LEARNING != 0 {
        know_sender(head, segment, outer.ip.source, config)?;
    }

    let key = FdbKey::from_bits(segment.id, head.destination_bits());
    let entry = maps::fdb(key, config).ok_or(IngressPassUnknownDestination)?;
    let location = entry.location().ok_or(IngressPassKernelDestination)?;
    match location.kind() {
        Location::KIND_PORT => {}
        Location::KIND_REMOTE => return Err(IngressPassRemoteDestination),
        _ => return Err(IngressPassKernelDestination),
    }
    if frame_bytes - INNER as u32 > segment.local_max_bytes as u32 {
        return Err(IngressPassTooLong);
    }
    if !maps::redirect(location.index()) {
        return Err(IngressPassNoTarget);
    }
    Ok(())
}

/// R7: the kernel must not miss a MAC that is new or has moved.
#[inline(always)]
fn know_sender(
    head: &InnerHead,
    segment: &Segment,
    from: [u8; 4],
    config: &Config,
) -> Result<(), Outcome> {
    let key = FdbKey::from_bits(segment.id, head.source_bits());
    let entry = maps::fdb(key, config).ok_or(IngressPassLearn)?;
    let location = entry.location().ok_or(IngressPassLearn)?;
    if location.kind() != Location::KIND_REMOTE {
        return Err(IngressPassLearn);
    }
    let remote = maps::remote(location.index()).ok_or(IngressPassLearn)?;
    if remote.destination_v4() != from {
        return Err(IngressPassLearn);
    }
    entry.mark(config.epoch);
    Ok(())
}
