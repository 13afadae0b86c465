//! What inner frames carry: a packet of every kind, right or wrong.

use vtep_common::checksum;

use super::Rng;

/// What follows an Ethernet header.
pub(super) struct Payload {
    pub what: &'static str,
    pub ethertype: u16,
    pub bytes: Vec<u8>,
    /// Nothing in it needs the bridge.
    pub plain: bool,
    /// Of an IP header that is complete.
    pub tos: Option<u8>,
    /// IP addresses, protocol and ports, as far as they name a flow.
    pub flow: u64,
}

pub(super) const KINDS: &[&str] = &[
    "udp4",
    "tcp4",
    "sctp4",
    "icmp4",
    "gre4",
    "udp6",
    "tcp6",
    "sctp6",
    "icmp6",
    "options4",
    "first fragment4",
    "later fragment4",
    "bad checksum4",
    "bad version4",
    "bad length4",
    "igmp report4",
    "truncated4",
    "truncated6",
    "nd6",
    "mld report6",
    "extension headers6",
    "bad version6",
    "arp request",
    "arp reply",
    "rarp",
    "vlan",
    "priority tag",
    "qinq",
    "llc",
    "snap",
    "odd type",
];
/// Those that make up most traffic, and the fast path's.
pub(super) const PLAIN_KINDS: usize = 9;

const ODD_TYPES: &[u16] = &[
    0x88b5, 0x8808, 0x88cc, 0x888e, 0x8847, 0x8863, 0x8864, 0x9100, 0x9000, 0x88e3, 0x8902, 0x88f7,
    0x0600, 0xffff, 0x6558, 0x894f, 0x22f0, 0x88e5,
];

/// A packet of a kind, `bytes` long where the kind lets it.
pub(super) fn payload(kind: &'static str, bytes: usize, tos: u8, rng: &mut Rng) -> Payload {
    let mut plain = true;
    let mut keeps_tos = true;
    let (ethertype, mut packet);
    let mut flow = 1 << 63;
    let protocol = match kind.trim_end_matches(['4', '6']) {
        "tcp" => 6,
        "sctp" => 132,
        "icmp" if kind.ends_with('6') => 58,
        "icmp" => 1,
        "gre" => 47,
        "igmp report" => 2,
        "nd" | "mld report" => 58,
        _ => 17,
    };
    if kind.ends_with('4') {
        ethertype = 0x0800;
        (packet, flow) = ipv4(kind, protocol, bytes, tos, rng);
        if kind == "truncated4" {
            packet.truncate(rng.below(24));
            plain = packet.len() >= 20;
            keeps_tos = plain;
            // Without the bytes that ports would be in: a flow of addresses only.
            flow = 1 << 61;
        }
    } else if kind.ends_with('6') {
        ethertype = 0x86dd;
        (packet, flow) = ipv6(kind, protocol, bytes, tos, rng);
        plain = kind != "nd6";
        if kind == "truncated6" {
            packet.truncate(rng.below(48));
            plain = packet.len() >= 44;
            keeps_tos = packet.len() >= 40;
        }
    } else {
        keeps_tos = false;
        plain = matches!(kind, "llc" | "snap" | "odd type");
        (ethertype, packet) = match kind {
            "arp request" | "arp reply" => {
                let operation = if kind == "arp reply" { 2 } else { 1 };
                let mut arp = vec![0, 1, 8, 0, 6, 4, 0, operation];
                arp.extend((0..20).map(|_| rng.byte()));
                // Nobody's address: no stack answers.
                arp[14..18].copy_from_slice(&[10, 9, 0, 1]);
                arp[24..28].copy_from_slice(&[10, 9, 0, 2]);
                (0x0806, arp)
            }
            "rarp" => (0x8035, [&[0, 1, 8, 0, 6, 4, 0, 3][..], &[7; 20]].concat()),
            "vlan" | "priority tag" | "qinq" => {
                let inner = payload(rng.pick(&KINDS[..PLAIN_KINDS]), bytes - 8, tos, rng);
                let id = match kind {
                    "vlan" => rng.pick(&[1u16, 100, 4094]),
                    _ => rng.pick(&[0x2000, 0xe000]),
                };
                let mut tagged = id.to_be_bytes().to_vec();
                if kind == "qinq" {
                    tagged.extend([0x81, 0, 0, 7]);
                }
                tagged.extend(inner.ethertype.to_be_bytes());
                tagged.extend(inner.bytes);
                (if kind == "qinq" { 0x88a8 } else { 0x8100 }, tagged)
            }
            "llc" => (rng.below(0x600) as u16, vec![0x42, 0x42, 3, 0, 0, 0, 0]),
            "snap" => (
                (bytes as u16).min(1500),
                vec![0xaa, 0xaa, 3, 0, 0, 0x0c, 0x20, 0],
            ),
            _ => (rng.pick(ODD_TYPES), Vec::new()),
        };
    }
    if kind == "odd type" || !kind.contains("truncated") {
        packet.resize(packet.len().max(bytes), 0x5a);
    }
    // A PPPoE session without room for its headers.
    plain &= ethertype != 0x8864 || packet.len() >= 20;
    Payload {
        what: kind,
        ethertype,
        bytes: packet,
        plain,
        tos: keeps_tos.then_some(tos),
        flow,
    }
}

/// Ports of few flows, so that each has many frames.
fn ports(rng: &mut Rng) -> [u8; 4] {
    let source = 40_000 + rng.below(6) as u16;
    let [a, b] = source.to_be_bytes();
    [a, b, 0x30, rng.below(2) as u8]
}

fn ipv4(kind: &str, protocol: u8, bytes: usize, tos: u8, rng: &mut Rng) -> (Vec<u8>, u64) {
    let option_words = match kind {
        "options4" => rng.pick(&[1u8, 3, 10]),
        "igmp report4" => 1,
        _ => 0,
    };
    let header = 20 + 4 * option_words as usize;
    let total = bytes.max(header + 8);
    let mut packet = vec![0x45 + option_words, tos];
    packet.extend((total as u16).to_be_bytes());
    packet.extend([rng.byte(), rng.byte()]);
    let fragment: u16 = match kind {
        "first fragment4" => 0x2000,
        "later fragment4" => rng.pick(&[0x2000 | 100, 185]),
        _ => rng.pick(&[0, 0x4000]),
    };
    packet.extend(fragment.to_be_bytes());
    let ttl = if kind == "igmp report4" {
        1
    } else {
        rng.pick(&[0u8, 1, 64, 255])
    };
    packet.extend([ttl, protocol, 0, 0]);
    packet.extend([10, 9, 0, rng.below(3) as u8]);
    packet.extend([10, 9, 1, rng.below(3) as u8]);
    packet.extend(std::iter::repeat_n(1, 4 * option_words as usize));
    match kind {
        "bad version4" => packet[0] = rng.pick(&[0x65, 0x55, 0x44, 0x40, 0x05, 0x4f]),
        "bad length4" => {
            let wrong = rng.pick(&[0, 19, total as u16 + 1, 65535]);
            packet[2..4].copy_from_slice(&wrong.to_be_bytes());
        }
        _ => {}
    }
    let sum = !checksum::bytes(&packet);
    packet[10..12].copy_from_slice(&sum.to_ne_bytes());
    if kind == "bad checksum4" {
        packet[10] ^= 0x55;
    }
    let ports = ports(rng);
    // Fragments and packets with options hash without ports.
    let named = if packet[0] == 0x45 && fragment & 0x3fff == 0 && matches!(protocol, 6 | 17 | 132) {
        u64::from(u32::from_be_bytes(ports))
    } else {
        0
    };
    let flow = named
        | u64::from(packet[15]) << 32
        | u64::from(packet[19]) << 40
        | u64::from(protocol) << 48;
    if kind == "igmp report4" {
        packet.extend([0x16, 0, 0, 0, 239, 1, 2, rng.byte()]);
    } else if protocol == 1 {
        packet.extend([8, 0, 0, 0, 1, 2, 3, 4]);
    } else {
        packet.extend(ports);
        packet.extend((0..4).map(|_| rng.byte()));
    }
    // Never two TCP segments that GRO would join.
    packet.extend((0..(total - packet.len()).min(16)).map(|_| rng.byte()));
    packet.resize(total, 0xa5);
    (packet, flow)
}

fn ipv6(kind: &str, protocol: u8, bytes: usize, tos: u8, rng: &mut Rng) -> (Vec<u8>, u64) {
    let total = bytes.max(48);
    let version = if kind == "bad version6" { 4 } else { 6 };
    let mut packet = vec![version << 4 | tos >> 4, tos << 4 | 3, 0, 0];
    packet.extend(((total - 40) as u16).to_be_bytes());
    let (source, destination) = (rng.below(3) as u8, rng.below(3) as u8);
    let next = match kind {
        "extension headers6" => rng.pick(&[0, 43, 44, 60]),
        _ => protocol,
    };
    packet.extend([next, rng.pick(&[1, 64, 255])]);
    for last in [source, destination] {
        packet.extend([0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
    }
    let mut named = 0;
    match kind {
        "nd6" => packet.extend([rng.pick(&[133, 134, 135, 136, 137]), 0, 0, 0]),
        "mld report6" => packet.extend([143, 0, 0, 0]),
        "icmp6" => packet.extend([rng.pick(&[1, 128, 129, 132, 138, 255]), 0, 0, 0]),
        // Inside: an ICMPv6 neighbour solicitation, where the programs do not look.
        "extension headers6" => packet.extend([58, 0, 1, 4, 0, 0, 0, 0, 135, 0, 0, 0]),
        _ => {
            let ports = ports(rng);
            named = u64::from(u32::from_be_bytes(ports));
            packet.extend(ports);
        }
    }
    let flow = named
        | u64::from(source) << 32
        | u64::from(destination) << 40
        | u64::from(next) << 48
        | 1 << 62;
    let total = total.max(packet.len());
    packet.extend((0..(total - packet.len()).min(16)).map(|_| rng.byte()));
    packet.resize(total, 0xa5);
    (packet, flow)
}

/// Right lengths and checksum of TCP or UDP, if the frame is long enough.
pub(super) fn finish(frame: &mut [u8]) -> bool {
    let is_v4 = frame[12..14] == [8, 0];
    let (at, protocol) = if is_v4 {
        (34, frame[23])
    } else {
        (54, frame[20])
    };
    let addresses = if is_v4 { 26..34 } else { 22..54 };
    let (header, field) = if protocol == 6 { (20, 16) } else { (8, 6) };
    if frame.len() < at + header {
        return false;
    }
    let length = (frame.len() - at) as u16;
    if protocol == 6 {
        frame[at + 12] = 0x50;
    } else {
        frame[at + 4..at + 6].copy_from_slice(&length.to_be_bytes());
    }
    frame[at + field..at + field + 2].fill(0);
    let pseudo = u64::from(checksum::bytes(&frame[addresses]))
        + u64::from(u16::from(protocol).to_be())
        + u64::from(length.to_be());
    let sum = match !checksum::fold(pseudo + u64::from(checksum::bytes(&frame[at..]))) {
        0 => 0xffff,
        sum => sum,
    };
    frame[at + field..at + field + 2].copy_from_slice(&sum.to_ne_bytes());
    true
}
