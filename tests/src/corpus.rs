//! Frames for the comparison with the kernel's driver: tables of everything that
//! has a name, and as many more as one likes, generated from a seed. Pure; what
//! it is told is where the stations are ([`World`]).

use vtep_common::{MacAddr, checksum};

use crate::frames::ethernet;
use crate::lab::VNI;
use crate::twins::Hook;

/// In every frame that has room, followed by the frame's number.
pub const MAGIC: [u8; 8] = *b"\xf0vtepLAB";

const fn mac(last: [u8; 2]) -> MacAddr {
    MacAddr([2, 0, 0, 0, last[0], last[1]])
}

/// The VM under test, a second station behind the same port, another local VM.
pub const A: MacAddr = mac([0, 1]);
pub const A2: MacAddr = mac([0xa, 2]);
pub const C: MacAddr = mac([0, 2]);
/// Stations behind the first and the second remote.
pub const NEAR: [MacAddr; 2] = [mac([0x10, 1]), mac([0x10, 2])];
pub const FAR: MacAddr = mac([0x20, 1]);
/// Devices of the host.
pub const BRIDGE_MAC: MacAddr = mac([0xbb, 1]);
pub const VXLAN_MAC: MacAddr = mac([0xbb, 2]);
pub const PORT_MACS: [MacAddr; 2] = [mac([0xbb, 3]), mac([0xbb, 4])];
pub const NEAR_IP: [u8; 4] = [198, 51, 100, 2];
pub const FAR_IP: [u8; 4] = [203, 0, 113, 2];
/// The host's, and a second address of it.
pub const HOST_IP: [u8; 4] = [192, 0, 2, 2];
pub const HOST_IP2: [u8; 4] = [192, 0, 2, 3];
pub const GATEWAY_IP: [u8; 4] = [192, 0, 2, 1];

/// What the frames depend on beside the constants above.
#[derive(Debug, Clone, Copy)]
pub struct World {
    pub hook: Hook,
    pub udp_port: u16,
    /// Largest frames of the tunnel and of the local ports, Ethernet header
    /// included, bytes.
    pub tunnel_max: usize,
    pub local_max: usize,
    /// The device or its bridge port learns from frames.
    pub learning: bool,
    pub uplink_mac: MacAddr,
    pub gateway_mac: MacAddr,
}

/// Which way a frame has to take in an accelerated host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Fast,
    /// The kernel's.
    Pass,
    /// Depends on what was learned meanwhile.
    Either,
}

#[derive(Debug, Clone)]
pub struct Case {
    pub what: String,
    pub frame: Vec<u8>,
    pub way: Way,
    /// Frames of one number belong to one flow, which keeps order and source port.
    pub flow: u64,
}

/// What follows an Ethernet header.
struct Payload {
    what: &'static str,
    ethertype: u16,
    bytes: Vec<u8>,
    /// Nothing in it needs the bridge.
    plain: bool,
    /// Of an IP header that is complete.
    tos: Option<u8>,
    /// IP addresses, protocol and ports, as far as they name a flow.
    flow: u64,
}

const KINDS: &[&str] = &[
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
const PLAIN_KINDS: usize = 9;

const ODD_TYPES: &[u16] = &[
    0x88b5, 0x8808, 0x88cc, 0x888e, 0x8847, 0x8863, 0x8864, 0x9100, 0x9000, 0x88e3, 0x8902, 0x88f7,
    0x0600, 0xffff, 0x6558, 0x894f, 0x22f0, 0x88e5,
];

/// A packet of a kind, `bytes` long where the kind lets it.
fn payload(kind: &'static str, bytes: usize, tos: u8, rng: &mut Rng) -> Payload {
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

/// What a veth of MTU 1500 takes: room for one VLAN tag.
const LONGEST: usize = 1518;

/// Frame lengths: small, any, full, and around every limit.
fn any_length(world: &World, rng: &mut Rng) -> usize {
    match rng.below(10) {
        0 | 1 => 14 + rng.below(60),
        2 | 3 => rng.pick(&[world.tunnel_max, world.local_max, 1464]) - 5 + rng.below(11),
        4 => 1400 + rng.below(60),
        _ => 60 + rng.below(1340),
    }
}

/// A number into the frame's tail, where it has room behind `keep` bytes.
fn stamp(frame: &mut [u8], keep: usize, number: usize) {
    let Some(at) = frame.len().checked_sub(12).filter(|at| *at >= keep) else {
        return;
    };
    frame[at..at + 8].copy_from_slice(&MAGIC);
    frame[at + 8..].copy_from_slice(&(number as u32).to_be_bytes());
}

/// The number in a frame.
pub fn number(frame: &[u8]) -> Option<usize> {
    let at = frame.windows(8).rposition(|window| window == MAGIC)?;
    let number = frame.get(at + 8..at + 12)?;
    Some(u32::from_be_bytes([number[0], number[1], number[2], number[3]]) as usize)
}

/// Who a destination or source can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Station {
    Known(MacAddr),
    Unknown,
    /// Seen as a source only from this VM.
    FromVm(u8),
    /// Seen as a source only behind this address.
    Behind([u8; 4]),
    Group([u8; 6]),
    Zero,
}

const GROUPS: &[[u8; 6]] = &[
    [0xff; 6],
    [1, 0, 0x5e, 0, 0, 1],
    [1, 0, 0x5e, 1, 2, 3],
    [0x33, 0x33, 0, 0, 0, 1],
    [0x33, 0x33, 0xff, 1, 2, 3],
    [1, 0x80, 0xc2, 0, 0, 0],
    [1, 0x80, 0xc2, 0, 0, 1],
    [1, 0x80, 0xc2, 0, 0, 0x0e],
    [1, 0x80, 0xc2, 0, 0, 0x21],
    [1, 0, 0x0c, 0xcc, 0xcc, 0xcd],
    [3, 0, 0, 0, 0, 1],
];

/// Stations that never move.
const KNOWN: [MacAddr; 10] = [
    A,
    A2,
    C,
    NEAR[0],
    NEAR[1],
    FAR,
    BRIDGE_MAC,
    VXLAN_MAC,
    PORT_MACS[0],
    PORT_MACS[1],
];

/// Everything that can be written into an address field.
fn stations(learned: Station) -> Vec<Station> {
    let mut all: Vec<Station> = KNOWN.into_iter().map(Station::Known).collect();
    all.extend(GROUPS.iter().copied().map(Station::Group));
    all.extend([Station::Unknown, Station::Zero, learned]);
    all
}

impl Station {
    fn mac(self, rng: &mut Rng) -> MacAddr {
        let n = rng.below(8) as u8;
        match self {
            Self::Known(mac) => mac,
            Self::Unknown => mac([0xee, rng.byte()]),
            Self::FromVm(vm) => mac([FROM_VM + vm, n]),
            Self::Behind([a, b, c, d]) => MacAddr([BEHIND, a, b, c, d, n]),
            Self::Group(mac) => MacAddr(mac),
            Self::Zero => MacAddr::ZERO,
        }
    }
}

/// In the addresses of [`Station::FromVm`] (and one more a VM) and [`Station::Behind`].
const FROM_VM: u8 = 0xe0;
const BEHIND: u8 = 6;

/// Whether the kernel has learned the station in this run, if it has sent yet.
fn is_learned(mac: MacAddr) -> bool {
    mac.0[0] == BEHIND || (mac.0[0] == 2 && [FROM_VM, FROM_VM + 1].contains(&mac.0[4]))
}

struct Inner {
    what: String,
    frame: Vec<u8>,
    source: MacAddr,
    destination: MacAddr,
    plain: bool,
    tos: Option<u8>,
    flow: u64,
}

fn inner(source: MacAddr, destination: MacAddr, payload: Payload, number: usize) -> Inner {
    let mut frame = ethernet(source, destination, payload.ethertype, &payload.bytes);
    // Headers, ports and types stay.
    let keep = if payload.ethertype == 0x86dd { 66 } else { 54 };
    stamp(&mut frame, keep, number);
    let low = |mac: MacAddr| u64::from(mac.0[4]) << 8 | u64::from(mac.0[5]);
    Inner {
        what: format!(
            "{source} > {destination} {} {} bytes",
            payload.what,
            frame.len()
        ),
        flow: payload
            .flow
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .wrapping_add(low(source) << 16 | low(destination))
            ^ u64::from(payload.ethertype) << 48,
        frame,
        source,
        destination,
        plain: payload.plain,
        tos: payload.tos,
    }
}

fn any_kind(rng: &mut Rng) -> &'static str {
    if rng.percent(60) {
        rng.pick(&KINDS[..PLAIN_KINDS])
    } else {
        rng.pick(KINDS)
    }
}

/// Frames that the VM behind the first port sends.
pub fn egress(world: &World, seed: u64, generated: usize) -> Vec<Case> {
    let mut rng = Rng(seed);
    let mut cases: Vec<Case> = Vec::new();
    let mut add = |source: Station, destination: Station, payload: Payload, rng: &mut Rng| {
        let (source, destination) = (source.mac(rng), destination.mac(rng));
        let inner = inner(source, destination, payload, cases.len());
        cases.push(Case {
            way: egress_way(world, &[A, A2], &inner),
            what: inner.what,
            frame: inner.frame,
            flow: inner.flow,
        });
    };
    let near = Station::Known(NEAR[0]);
    for destination in stations(Station::Behind(NEAR_IP)) {
        for kind in KINDS {
            let packet = payload(kind, 86, 0, &mut rng);
            add(Station::Known(A), destination, packet, &mut rng);
        }
    }
    for source in stations(Station::FromVm(0)) {
        for kind in ["udp4", "tcp6", "arp reply"] {
            let packet = payload(kind, 86, 0, &mut rng);
            add(source, near, packet, &mut rng);
        }
    }
    for tos in 0..=255 {
        for kind in ["udp4", "udp6"] {
            let packet = payload(kind, 60, tos, &mut rng);
            add(Station::Known(A), near, packet, &mut rng);
        }
    }
    for limit in [world.tunnel_max, world.local_max, 1514] {
        for length in limit - 6..=(limit + 6).min(LONGEST) {
            for kind in ["udp4", "udp6", "vlan", "odd type"] {
                for destination in [near, Station::Known(C)] {
                    let packet = payload(kind, length - 14, 0, &mut rng);
                    add(Station::Known(A), destination, packet, &mut rng);
                }
            }
        }
    }
    let (sources, destinations) = (
        stations(Station::FromVm(0)),
        stations(Station::Behind(NEAR_IP)),
    );
    let usual = [NEAR[0], NEAR[0], NEAR[1], FAR, C].map(Station::Known);
    for _ in 0..generated {
        let source = match rng.below(20) {
            0 | 1 => Station::Known(A2),
            2 => rng.pick(&sources),
            _ => Station::Known(A),
        };
        let destination = if rng.percent(80) {
            rng.pick(&usual)
        } else {
            rng.pick(&destinations)
        };
        let bytes = any_length(world, &mut rng).min(LONGEST) - 14;
        let tos = rng.byte();
        let packet = payload(any_kind(&mut rng), bytes.max(8), tos, &mut rng);
        add(source, destination, packet, &mut rng);
    }
    cases
}

/// Frames of some kinds from the VM to some stations, `each` of every
/// combination.
pub fn egress_to(world: &World, to: &[MacAddr], kinds: &[&'static str], each: usize) -> Vec<Case> {
    let mut rng = Rng(to.len() as u64);
    let mut cases = Vec::new();
    for destination in to {
        for kind in kinds {
            assert!(KINDS.contains(kind), "no kind of packet is named {kind}");
            for _ in 0..each {
                let packet = payload(kind, 86, 0, &mut rng);
                let inner = inner(A, *destination, packet, cases.len());
                cases.push(Case {
                    way: egress_way(world, &[A, A2], &inner),
                    what: inner.what,
                    frame: inner.frame,
                    flow: inner.flow,
                });
            }
        }
    }
    cases
}

/// `own`: the stations at the port that the frame comes from.
fn egress_way(world: &World, own: &[MacAddr], inner: &Inner) -> Way {
    let fits = |limit| inner.frame.len() >= 16 && inner.frame.len() <= limit;
    let known = own.contains(&inner.source);
    let learned = is_learned(inner.source) || is_learned(inner.destination);
    let local = |to| [A, A2, C].contains(&to) && !own.contains(&to);
    // Room for other headers can be made in front of IP only.
    let ip = matches!(inner.frame.get(12..14), Some([8, 0] | [0x86, 0xdd]));
    let tunnel = world.hook == Hook::Xdp || ip;
    match inner.destination {
        _ if !inner.plain => Way::Pass,
        _ if learned => Way::Either,
        to if known && local(to) && fits(world.local_max) => Way::Fast,
        to if known && tunnel && (NEAR.contains(&to) || to == FAR) && fits(world.tunnel_max) => {
            Way::Fast
        }
        _ => Way::Pass,
    }
}

mod rng;
pub use rng::Rng;
mod outer;
pub use outer::{ingress, ingress_changed, ingress_in_two_fragments, ingress_to};
mod grammar;
pub use grammar::{BLOCK, Grammar};
mod mutate;
