//! Damage to frames that were right, and what keeps it comparable: a station
//! that both kernels learn must have one place, whichever bits were changed.

use vtep_common::{MacAddr, checksum};

use super::header::{name_of, udp_checksum};
use super::{BEHIND, FROM_VM, KNOWN, Rng, Station};

/// Change a frame of at least 14 bytes to one of `14..=longest`; what was done.
pub(super) fn damage(frame: &mut Vec<u8>, longest: usize, rng: &mut Rng) -> &'static str {
    // Where the headers are.
    let head = frame.len().min(120);
    let part = |frame: &[u8], rng: &mut Rng| {
        let start = rng.below(frame.len());
        start..start + 1 + rng.below((frame.len() - start).min(64))
    };
    let what = match rng.below(12) {
        0..4 => {
            for _ in 0..=rng.below(4) {
                frame[rng.below(head)] ^= 1 << rng.below(8);
            }
            "bits flipped"
        }
        4..6 => {
            frame[rng.below(head)] = rng.pick(&[0, 1, 0x7f, 0x80, 0xfe, 0xff]);
            "a byte replaced"
        }
        6..8 => {
            frame.truncate(14 + rng.below(head - 13));
            "cut in the headers"
        }
        8 => {
            frame.truncate(14 + rng.below(frame.len() - 13));
            "cut"
        }
        9 => {
            let part = part(frame, rng);
            let copy = frame[part.clone()].to_vec();
            frame.splice(part.start..part.start, copy);
            "a part twice"
        }
        10 => {
            frame.drain(part(frame, rng));
            "a part left out"
        }
        _ => {
            let more = 1 + rng.below(40);
            frame.extend((0..more).map(|_| rng.byte()));
            "bytes added"
        }
    };
    frame.resize(frame.len().clamp(14, longest), 0);
    what
}

/// Where the kernel would look for a tunnelled frame.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tunnel {
    is_v6: bool,
    /// Where the IP and UDP headers start.
    ip: usize,
    udp: usize,
}

impl Tunnel {
    /// In a frame from the wire, whatever its other fields say.
    pub fn of(frame: &[u8]) -> Option<Self> {
        let mut at = 12;
        while matches!(frame.get(at..at + 2)?, [0x81, 0] | [0x88, 0xa8]) {
            at += 4;
        }
        let ip = at + 2;
        let (is_v6, udp) = match frame[at..ip] {
            [8, 0] => (false, ip + usize::from(frame.get(ip)? & 15) * 4),
            [0x86, 0xdd] => (true, after_extensions(frame, ip)?),
            _ => return None,
        };
        let is_whole = udp >= ip + 20 && frame.len() >= udp;
        is_whole.then_some(Self { is_v6, ip, udp })
    }

    fn addresses(self, frame: &[u8]) -> [&[u8]; 2] {
        let at = self.ip + if self.is_v6 { 8 } else { 12 };
        let bytes = if self.is_v6 { 16 } else { 4 };
        [&frame[at..at + bytes], &frame[at + bytes..at + 2 * bytes]]
    }

    /// The outer source, or its name.
    pub fn source(self, frame: &[u8]) -> [u8; 4] {
        match self.addresses(frame)[0] {
            [a, b, c, d] => [*a, *b, *c, *d],
            v6 => name_of(v6),
        }
    }

    fn inner(self) -> usize {
        self.udp + 16
    }

    /// The inner source.
    pub fn station(self, frame: &[u8]) -> Option<MacAddr> {
        station(frame, self.inner() + 6)
    }

    /// Give the inner source the place of the outer one; in a tunnel in the tunnel
    /// too, which reaches this host's device where it is sent to a group.
    pub fn settle(self, frame: &mut [u8], rng: &mut Rng) {
        let place = Station::Behind(self.source(frame));
        settle(frame, self.inner() + 6, place, rng);
        if let Some(within) = frame.get_mut(self.inner()..)
            && let Some(tunnel) = Self::of(within)
        {
            tunnel.settle(within, rng);
        }
    }

    /// Make lengths and checksums right, as far as there are fields for them.
    pub fn repair(self, frame: &mut [u8]) {
        let (ip, udp) = (self.ip, self.udp);
        let total = (frame.len() - ip) as u16;
        if self.is_v6 {
            frame[ip + 4..ip + 6].copy_from_slice(&total.wrapping_sub(40).to_be_bytes());
        } else {
            frame[ip + 2..ip + 4].copy_from_slice(&total.to_be_bytes());
            frame[ip + 10..ip + 12].fill(0);
            let sum = !checksum::bytes(&frame[ip..udp]);
            frame[ip + 10..ip + 12].copy_from_slice(&sum.to_ne_bytes());
        }
        if frame.len() < udp + 8 {
            return;
        }
        let length = (frame.len() - udp) as u16;
        frame[udp + 4..udp + 6].copy_from_slice(&length.to_be_bytes());
        if frame[udp + 6..udp + 8] != [0, 0] {
            frame[udp + 6..udp + 8].fill(0);
            let addresses = self.addresses(frame).map(checksum::bytes).map(u64::from);
            let sum = match udp_checksum(addresses.iter().sum(), length, &frame[udp..]) {
                0 => 0xffff,
                sum => sum,
            };
            frame[udp + 6..udp + 8].copy_from_slice(&sum.to_ne_bytes());
        }
    }
}

/// What follows the IPv6 header and its extension headers.
fn after_extensions(frame: &[u8], ip: usize) -> Option<usize> {
    let (mut next, mut at) = (*frame.get(ip + 6)?, ip + 40);
    while let 0 | 43 | 44 | 60 = next {
        let bytes = if next == 44 {
            8
        } else {
            8 + 8 * usize::from(*frame.get(at + 1)?)
        };
        next = *frame.get(at)?;
        at += bytes;
    }
    Some(at)
}

fn station(frame: &[u8], at: usize) -> Option<MacAddr> {
    let bytes = frame.get(at..at + 6)?;
    Some(MacAddr(std::array::from_fn(|i| bytes[i])))
}

/// A source address that would be learned becomes one whose place it names.
pub(super) fn settle(frame: &mut [u8], at: usize, place: Station, rng: &mut Rng) {
    let Some(mac) = station(frame, at) else {
        return;
    };
    let is_placed = match place {
        Station::Behind(from) => mac.0[0] == BEHIND && mac.0[1..5] == from,
        Station::FromVm(vm) => mac.0[..5] == [2, 0, 0, 0, FROM_VM + vm],
        _ => true,
    };
    if !is_placed && !mac.is_multicast() && mac != MacAddr::ZERO && !KNOWN.contains(&mac) {
        frame[at..at + 6].copy_from_slice(&place.mac(rng).0);
    }
}
