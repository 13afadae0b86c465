//! Frames for the comparison with the kernel's driver: tables of everything that
//! has a name, and as many more as one likes, generated from a seed. Pure; what
//! it is told is where the stations are ([`World`]).

use vtep_common::MacAddr;

use crate::frames::ethernet;
use crate::lab::Family;
use crate::twins::Hook;
use crate::vnet::Header;

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
    pub underlay: Family,
    pub hook: Hook,
    /// The VMs' frames have virtio-net headers.
    pub offloads: bool,
    /// The device sends UDP checksums.
    pub sends_checksum: bool,
    /// The device takes packets without them.
    pub takes_zero_checksum: bool,
    pub udp_port: u16,
    /// Largest frames of the tunnel and of the local ports, Ethernet header
    /// included, bytes.
    pub tunnel_max: usize,
    pub local_max: usize,
    /// What the first VM's port takes: room for one VLAN tag.
    pub longest: usize,
    /// The device or its bridge port learns from frames.
    pub learning: bool,
    pub uplink_mac: MacAddr,
    pub gateway_mac: MacAddr,
}

impl World {
    /// Frames to local ports are left to the kernel, because XDP does not see all
    /// of a large frame.
    pub fn leaves_local(&self) -> bool {
        self.longest > 3500
    }
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
    /// What is left to do to it, where the sender can say that.
    pub vnet: Header,
    pub what: String,
    pub frame: Vec<u8>,
    pub way: Way,
    /// Frames of one number belong to one flow, which keeps order and source port.
    pub flow: u64,
}

/// What a veth of MTU 1500 takes: room for one VLAN tag.
const LONGEST: usize = 1518;

/// Frame lengths: small, any, full, and around every limit.
fn any_length(world: &World, rng: &mut Rng) -> usize {
    match rng.below(10) {
        0 | 1 => 14 + rng.below(60),
        2 | 3 => rng.pick(&[world.tunnel_max, world.local_max, 1464]) - 5 + rng.below(11),
        4 => 1400 + rng.below(60),
        5 | 6 if world.longest > LONGEST => 60 + rng.below(world.longest - 60),
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
    /// The sum of all its bytes is final, and known from its headers or few bytes.
    summed: bool,
}

fn inner(source: MacAddr, destination: MacAddr, payload: Payload, number: usize) -> Inner {
    let mut frame = ethernet(source, destination, payload.ethertype, &payload.bytes);
    // Headers, ports and types stay.
    let keep = if payload.ethertype == 0x86dd { 66 } else { 54 };
    stamp(&mut frame, keep, number);
    let summed = match payload.what {
        // A few keep a wrong checksum.
        "udp4" | "tcp4" | "udp6" | "tcp6" => number % 16 != 15 && finish(&mut frame),
        "icmp4" | "icmp6" | "mld report6" | "first fragment4" | "later fragment4" => true,
        _ => false,
    };
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
        summed,
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
            vnet: Header::default(),
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
                    vnet: Header::default(),
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
    // Room for other headers can be made in front of IP only, and their checksum without a
    // look at everything only where the inner one is right.
    let ip = matches!(inner.frame.get(12..14), Some([8, 0] | [0x86, 0xdd]));
    let tunnel = world.hook == Hook::Xdp || ip && (inner.summed || !world.sends_checksum);
    match inner.destination {
        _ if !inner.plain => Way::Pass,
        _ if learned => Way::Either,
        to if known && local(to) && world.leaves_local() => Way::Pass,
        to if known && local(to) && fits(world.local_max) => Way::Fast,
        to if known && tunnel && (NEAR.contains(&to) || to == FAR) && fits(world.tunnel_max) => {
            Way::Fast
        }
        _ => Way::Pass,
    }
}

mod header;
pub use header::{encapsulated, v6};
mod payload;
use payload::{KINDS, PLAIN_KINDS, Payload, finish, payload};
mod rng;
pub use rng::Rng;
mod outer;
pub use outer::{ingress, ingress_changed, ingress_in_two_fragments, ingress_to};
mod grammar;
pub use grammar::{BLOCK, Grammar};
mod mutate;
mod offload;
