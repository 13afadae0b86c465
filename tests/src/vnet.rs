//! The header in front of frames that owners of taps exchange with the kernel
//! (linux/virtio_net.h): what is still to be done to a frame. And the doing of
//! it, as a NIC would, so that tests know what has to appear on a wire.

use vtep_common::checksum;

/// Bytes in front of each frame.
pub const HEADER_BYTES: usize = 10;

const NEEDS_CHECKSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_ECN: u8 = 0x80;

/// How far a transport checksum is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Checksum {
    /// Nothing is said: it is in the frame.
    #[default]
    Complete,
    /// It was verified.
    Verified,
    /// The field holds the pseudo header's sum: what is from `start` on is to be
    /// added, the complement to be stored `offset` bytes behind `start`.
    Partial { start: u16, offset: u16 },
}

/// Transport of a superframe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Transport {
    TcpV4 = 1,
    TcpV6 = 4,
    Udp = 5,
}

/// How to cut a superframe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gso {
    pub transport: Transport,
    /// The first segment alone keeps CWR.
    pub ecn: bool,
    /// All headers; a hint.
    pub header_bytes: u16,
    /// Payload of a segment.
    pub segment_bytes: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    pub checksum: Checksum,
    pub gso: Option<Gso>,
}

/// A type of superframe that nobody asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnknownGso(pub u8);

impl std::fmt::Display for UnknownGso {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "superframe of the unknown type {:#x}", self.0)
    }
}

impl std::error::Error for UnknownGso {}

impl Header {
    /// Words are in the machine's order, as taps have them by default.
    pub fn encode(self) -> [u8; HEADER_BYTES] {
        let (flags, start, offset) = match self.checksum {
            Checksum::Complete => (0, 0, 0),
            Checksum::Verified => (DATA_VALID, 0, 0),
            Checksum::Partial { start, offset } => (NEEDS_CHECKSUM, start, offset),
        };
        let (kind, header_bytes, segment_bytes) = self.gso.map_or((0, 0, 0), |gso| {
            let ecn = if gso.ecn { GSO_ECN } else { 0 };
            let kind = gso.transport as u8 | ecn;
            (kind, gso.header_bytes, gso.segment_bytes)
        });
        let mut bytes = [0; HEADER_BYTES];
        bytes[..2].copy_from_slice(&[flags, kind]);
        let words = [header_bytes, segment_bytes, start, offset];
        for (to, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, UnknownGso> {
        let word = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        let checksum = match bytes[0] {
            flags if flags & NEEDS_CHECKSUM != 0 => Checksum::Partial {
                start: word(6),
                offset: word(8),
            },
            flags if flags & DATA_VALID != 0 => Checksum::Verified,
            _ => Checksum::Complete,
        };
        let transport = match bytes[1] & !GSO_ECN {
            0 => None,
            1 => Some(Transport::TcpV4),
            4 => Some(Transport::TcpV6),
            5 => Some(Transport::Udp),
            _ => return Err(UnknownGso(bytes[1])),
        };
        let gso = transport.map(|transport| Gso {
            transport,
            ecn: bytes[1] & GSO_ECN != 0,
            header_bytes: word(2),
            segment_bytes: word(4),
        });
        Ok(Self { checksum, gso })
    }

    /// What a NIC puts on the wire for `frame`: cut and summed. Ethernet without
    /// tags, IPv4 or IPv6 without extension headers.
    pub fn segments(&self, frame: &[u8]) -> Vec<Vec<u8>> {
        let mut frames = match self.gso {
            None => vec![frame.to_vec()],
            Some(gso) => cut(frame, gso),
        };
        if let Checksum::Partial { start, offset } = self.checksum {
            let start = usize::from(start);
            for frame in &mut frames {
                finish_checksum(frame, start, start + usize::from(offset));
            }
        }
        frames
    }
}

/// The checksum of everything from `start` on, pseudo header included in `at`.
fn finish_checksum(frame: &mut [u8], start: usize, at: usize) {
    let sum = !checksum::bytes(&frame[start..]);
    // Of UDP alone, whose zero means "none" (RFC 768); to TCP both are the same.
    let sum = if sum == 0 { 0xffff } else { sum };
    frame[at..at + 2].copy_from_slice(&sum.to_ne_bytes());
}

fn word(frame: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([frame[at], frame[at + 1]])
}

/// Segments whose transport checksum is still that of a pseudo header.
fn cut(frame: &[u8], gso: Gso) -> Vec<Vec<u8>> {
    const IP: usize = 14;
    let ip_v4 = frame[12..14] == [8, 0];
    let transport = IP + if ip_v4 { 20 } else { 40 };
    let tcp = gso.transport != Transport::Udp;
    let header = transport
        + if tcp {
            usize::from(frame[transport + 12] >> 4) * 4
        } else {
            8
        };
    let checksum_at = transport + if tcp { 16 } else { 6 };
    let old_length = (frame.len() - transport) as u16;
    let payload = &frame[header..];
    let size = usize::from(gso.segment_bytes);
    let count = payload.len().div_ceil(size).max(1);
    let one = |i: usize, part: &[u8]| {
        let mut segment = [&frame[..header], part].concat();
        let length = (segment.len() - transport) as u16;
        if ip_v4 {
            let identification = word(frame, IP + 4).wrapping_add(i as u16);
            put(&mut segment, IP + 2, 20 + length);
            put(&mut segment, IP + 4, identification);
            put(&mut segment, IP + 10, 0);
            let sum = !checksum::bytes(&segment[IP..IP + 20]);
            segment[IP + 10..IP + 12].copy_from_slice(&sum.to_ne_bytes());
        } else {
            put(&mut segment, IP + 4, length);
        }
        if tcp {
            let at = transport + 4;
            let sequence =
                u32::from_be_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]]);
            let sequence = sequence.wrapping_add((i * size) as u32);
            segment[at..at + 4].copy_from_slice(&sequence.to_be_bytes());
            const FIN_PSH: u8 = 0x09;
            const CWR: u8 = 0x80;
            if i + 1 < count {
                segment[transport + 13] &= !FIN_PSH;
            }
            if i > 0 {
                segment[transport + 13] &= !CWR;
            }
        } else {
            put(&mut segment, transport + 4, length);
        }
        // The length in the pseudo header (RFC 1624).
        let old = u64::from(u16::from_ne_bytes([
            frame[checksum_at],
            frame[checksum_at + 1],
        ]));
        let sum = checksum::fold(old + u64::from(!old_length.to_be()) + u64::from(length.to_be()));
        segment[checksum_at..checksum_at + 2].copy_from_slice(&sum.to_ne_bytes());
        segment
    };
    payload
        .chunks(size)
        .enumerate()
        .map(|(i, part)| one(i, part))
        .collect()
}

fn put(frame: &mut [u8], at: usize, word: u16) {
    frame[at..at + 2].copy_from_slice(&word.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segments::{Addresses, Inner, check};

    const MACS: [vtep_common::MacAddr; 2] = [
        vtep_common::MacAddr([2, 0, 0, 0, 0, 1]),
        vtep_common::MacAddr([2, 0, 0, 0, 0, 2]),
    ];
    const V4: Addresses = Addresses::V4([10, 0, 0, 1], [10, 0, 0, 2]);
    const V6: Addresses = Addresses::V6([0xfd; 16], [0xfe; 16]);

    #[test]
    fn headers_survive_the_way_there_and_back() {
        let gso = |transport, ecn| Gso {
            transport,
            ecn,
            header_bytes: 54,
            segment_bytes: 1448,
        };
        let partial = Checksum::Partial {
            start: 34,
            offset: 16,
        };
        for checksum in [Checksum::Complete, Checksum::Verified, partial] {
            for gso in [
                None,
                Some(gso(Transport::TcpV4, false)),
                Some(gso(Transport::TcpV6, true)),
                Some(gso(Transport::Udp, false)),
            ] {
                let header = Header { checksum, gso };
                assert_eq!(Header::decode(&header.encode()), Ok(header));
            }
        }
    }

    #[test]
    fn the_layout_is_that_of_virtio_net() {
        let header = Header {
            checksum: Checksum::Partial {
                start: 34,
                offset: 16,
            },
            gso: Some(Gso {
                transport: Transport::TcpV4,
                ecn: true,
                header_bytes: 66,
                segment_bytes: 1398,
            }),
        };
        let mut bytes = vec![1, 0x81];
        for word in [66u16, 1398, 34, 16] {
            bytes.extend(word.to_ne_bytes());
        }
        assert_eq!(header.encode()[..], bytes[..]);
        assert_eq!(Header::decode(&[0; 10]), Ok(Header::default()));
        assert_eq!(
            Header::decode(&[0, 3, 0, 0, 0, 0, 0, 0, 0, 0]),
            Err(UnknownGso(3))
        );
    }

    #[test]
    fn segments_are_whole_and_their_checksums_right() {
        for addresses in [V4, V6] {
            for tcp in [true, false] {
                for payload in [1usize, 999, 1000, 1001, 2000, 60_001] {
                    let data: Vec<u8> = (0..payload).map(|i| (i * 7 + i / 251) as u8).collect();
                    let inner = Inner {
                        macs: MACS,
                        addresses,
                        ports: [1000, 2000],
                        tcp,
                    };
                    let (header, frame) = inner.superframe(&data, 1000);
                    let segments = header.segments(&frame);
                    assert_eq!(segments.len(), payload.div_ceil(1000));
                    let mut joined: Vec<u8> = Vec::new();
                    for segment in &segments {
                        let seen = check(segment).unwrap();
                        joined.extend(&segment[seen.payload..]);
                    }
                    assert_eq!(joined, data, "{addresses:?} tcp {tcp} {payload}");
                }
            }
        }
    }

    #[test]
    fn a_wrong_bit_anywhere_behind_the_macs_is_noticed() {
        for addresses in [V4, V6] {
            for tcp in [true, false] {
                let inner = Inner {
                    macs: MACS,
                    addresses,
                    ports: [1000, 2000],
                    tcp,
                };
                let (header, unfinished) = inner.partial(&[1, 2, 3, 4, 5]);
                assert!(check(&unfinished).is_err());
                let frame = header.segments(&unfinished).remove(0);
                assert!(check(&frame).is_ok());
                // IPv6 has no sum over traffic class, flow label and hop limit.
                let free = |at: usize| addresses == V6 && ([15, 16, 17, 21].contains(&at));
                for at in (14..frame.len()).filter(|at| !free(*at)) {
                    let mut wrong = frame.clone();
                    wrong[at] ^= 0x10;
                    let found = check(&wrong);
                    // Another protocol is nothing that is looked into.
                    let other = found.as_ref().is_ok_and(|seen| seen.protocol == 0);
                    assert!(found.is_err() || other, "{addresses:?} {tcp} {at}");
                }
            }
        }
    }
}
