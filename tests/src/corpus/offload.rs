//! What guests with offloads exchange: frames with unfinished checksums,
//! superframes, and on the wire the trains that superframes become.

use vtep_common::{MacAddr, checksum};

use super::{MAGIC, Rng, World};
use crate::frames::ipv4_udp;
use crate::segments::{Addresses, Inner};
use crate::vnet::{Checksum, Header};

/// A frame and what is still to be done to it.
pub(super) struct Unfinished {
    pub what: &'static str,
    pub header: Header,
    pub frame: Vec<u8>,
    /// Longest frame that it becomes.
    pub longest: usize,
    /// The sum of what it becomes is known from its headers.
    pub summed: bool,
}

/// From one station to another, with a number at its end.
fn flow(ends: [MacAddr; 2], rng: &mut Rng) -> Inner {
    let addresses = if rng.percent(50) {
        let host = |subnet: u8, rng: &mut Rng| [10, 9, subnet, rng.below(3) as u8];
        Addresses::V4(host(0, rng), host(1, rng))
    } else {
        let host = |rng: &mut Rng| {
            let mut address = [0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            address[15] = rng.below(3) as u8;
            address
        };
        Addresses::V6(host(rng), host(rng))
    };
    Inner {
        macs: ends,
        addresses,
        ports: [40_000 + rng.below(6) as u16, 0x3000],
        tcp: rng.percent(60),
    }
}

fn data(bytes: usize, number: usize, rng: &mut Rng) -> Vec<u8> {
    let start = rng.below(1 << 16);
    let mut data: Vec<u8> = (start..start + bytes)
        .map(|i| (i * 7 + i / 251) as u8)
        .collect();
    if let Some(at) = bytes.checked_sub(12) {
        data[at..at + 8].copy_from_slice(&MAGIC);
        data[at + 8..].copy_from_slice(&(number as u32).to_be_bytes());
    }
    data
}

/// A single frame or a superframe as a guest hands it over.
pub(super) fn unfinished(
    world: &World,
    ends: [MacAddr; 2],
    number: usize,
    rng: &mut Rng,
) -> Unfinished {
    let flow = flow(ends, rng);
    let tos = rng.byte();
    if rng.percent(60) {
        let bytes = match rng.below(3) {
            0 => rng.below(100),
            1 => rng.below(1380),
            _ => world.tunnel_max - 80 + rng.below(40),
        };
        let (mut header, mut frame) = flow.partial(&data(bytes, number, rng));
        set_tos(&mut frame, tos);
        let is_tunnel = frame.len() < 1300 && rng.percent(15);
        if is_tunnel {
            (header, frame) = tunnelled(header, &frame, rng.percent(50));
        }
        return Unfinished {
            what: if is_tunnel {
                "unfinished checksum in a tunnel"
            } else {
                "unfinished checksum"
            },
            longest: frame.len(),
            header,
            frame,
            summed: !is_tunnel,
        };
    }
    let (segment, segments) = match rng.below(4) {
        0 => (100 + rng.below(400), 2 + rng.below(20)),
        1 => (world.tunnel_max - 80 + rng.below(40), 2 + rng.below(4)),
        2 => (1300 + rng.below(60), 40),
        _ => (500 + rng.below(870), 2 + rng.below(8)),
    };
    let bytes = segment * segments - rng.below(segment);
    let (header, mut frame) = flow.superframe(&data(bytes, number, rng), segment as u16);
    set_tos(&mut frame, tos);
    let headers = frame.len() - bytes;
    Unfinished {
        what: "superframe",
        longest: headers + segment,
        header,
        frame,
        // Nobody but the kernel can ask for outer checksums of segments.
        summed: false,
    }
}

/// What a guest makes of its own frame that is a tunnel's end itself. With a
/// checksum of the tunnel, it is right when the one inside has been finished.
fn tunnelled(header: Header, inner: &[u8], with_checksum: bool) -> (Header, Vec<u8>) {
    let Checksum::Partial { start, offset } = header.checksum else {
        return (header, inner.to_vec());
    };
    let wrap = |inner: &[u8]| {
        let payload = [&[8, 0, 0, 0, 0, 0, 7, 0], inner].concat();
        let packet = ipv4_udp([10, 9, 0, 1], [10, 9, 1, 1], [50_000, 4790], &payload);
        [&inner[..12], &[8, 0], &packet].concat()
    };
    let mut frame = wrap(inner);
    let finished: Vec<Vec<u8>> = header.segments(inner).iter().map(|f| wrap(f)).collect();
    frame[40..42].copy_from_slice(if with_checksum {
        &finished[0][40..42]
    } else {
        &[0, 0]
    });
    let header = Header {
        checksum: Checksum::Partial {
            start: start + 50,
            offset,
        },
        ..header
    };
    (header, frame)
}

/// One of several TCP frames on the wire that GRO may merge.
pub(super) fn of_train(
    ends: [MacAddr; 2],
    position: usize,
    frames: usize,
    number: usize,
    rng: &mut Rng,
) -> Vec<u8> {
    let flow = Inner {
        tcp: true,
        ..flow(ends, rng)
    };
    let segment = 100 + rng.below(1200);
    let data = data(segment * frames, number, rng);
    let (header, frame) = flow.superframe(&data, segment as u16);
    header.segments(&frame).swap_remove(position)
}

fn set_tos(frame: &mut [u8], tos: u8) {
    if frame[12..14] == [8, 0] {
        frame[15] = tos;
        frame[24..26].fill(0);
        let sum = !checksum::bytes(&frame[14..34]);
        frame[24..26].copy_from_slice(&sum.to_ne_bytes());
    } else {
        frame[14] = 0x60 | tos >> 4;
        frame[15] = tos << 4;
    }
}
