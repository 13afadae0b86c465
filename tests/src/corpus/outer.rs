//! Frames from the wire: outer headers that are right or wrong in every field,
//! around the inner frames of the parent module.

use vtep_common::{MacAddr, ecn};

use super::header::{Outer, UdpChecksum, in_two};
use super::{
    A, A2, C, Case, FAR, FAR_IP, GATEWAY_IP, HOST_IP, HOST_IP2, Inner, KINDS, LONGEST, NEAR,
    NEAR_IP, PLAIN_KINDS, Rng, Station, Way, World, any_kind, any_length, inner, is_learned,
    payload, stations,
};
use crate::lab::Family;
use crate::vnet::Header;

pub(super) type Change = fn(&mut Outer, &mut Rng);

/// What is done to the outer headers, and whether the frame may still be fast.
pub(super) const CHANGES: &[(&str, Way, Change)] = &[
    ("as it is", Way::Fast, |_, _| {}),
    ("UDP checksum", Way::Fast, |o, _| {
        o.udp_checksum = UdpChecksum::Right;
    }),
    ("wrong UDP checksum", Way::Pass, |o, _| {
        o.udp_checksum = UdpChecksum::Wrong;
    }),
    ("wrong IP checksum", Way::Pass, |o, r| {
        o.ip_checksum_off = 1 + r.below(255) as u8;
    }),
    ("DSCP", Way::Fast, |o, r| o.tos = r.byte() & !3),
    ("TTL", Way::Fast, |o, r| o.ttl = r.pick(&[0, 1, 2, 255])),
    ("don't fragment", Way::Fast, |o, _| o.fragment = 0x4000),
    ("reserved IP bit", Way::Fast, |o, _| o.fragment = 0x8000),
    ("source port", Way::Fast, |o, r| {
        o.udp_ports[0] = r.pick(&[0, 1, 53, 4789, 65535]);
    }),
    ("source MAC", Way::Fast, |o, r| {
        let odd = [MacAddr::ZERO, MacAddr([0xff; 6]), o.macs[1], super::A];
        o.macs[0] = if r.percent(50) {
            r.pick(&odd)
        } else {
            MacAddr([2, 9, 9, 9, 9, r.byte()])
        };
    }),
    ("tag of the underlay", Way::Pass, |o, r| {
        o.tag = Some(r.pick(&[0, 0x2000, 1, 100]));
    }),
    ("IP version or header length", Way::Pass, |o, r| {
        o.first = Some(r.pick(&[0x05, 0x40, 0x44, 0x46, 0x4f, 0x55, 0x65]));
    }),
    ("no-op options", Way::Pass, |o, _| {
        o.options = &[1, 1, 1, 0];
    }),
    ("router alert", Way::Pass, |o, _| {
        o.options = &[0x94, 4, 0, 0];
    }),
    ("source route", Way::Pass, |o, _| {
        o.options = &[0x83, 7, 4, 192, 0, 2, 9, 0];
    }),
    ("bad options", Way::Pass, |o, _| {
        o.options = &[7, 2, 9, 9];
    }),
    ("first fragment", Way::Pass, |o, _| o.fragment = 0x2000),
    ("last fragment", Way::Pass, |o, _| o.fragment = 150),
    ("total length", Way::Pass, |o, r| {
        o.total_off = r.pick(&[-60, -9, -8, -1, 1, 2, 400]);
    }),
    ("UDP length", Way::Pass, |o, r| {
        o.udp_off = r.pick(&[-60, -16, -9, -8, -1, 1, 2, 400]);
    }),
    ("UDP length and checksum", Way::Pass, |o, r| {
        o.udp_off = r.pick(&[-20, -8, -1]);
        o.udp_checksum = UdpChecksum::Right;
    }),
    ("both lengths", Way::Pass, |o, r| {
        o.udp_off = r.pick(&[-30, -20, -8, -1, 1, 8]);
        o.total_off = o.udp_off;
    }),
    ("trailing bytes", Way::Pass, |o, r| {
        o.trailing = 1 + r.below(20);
    }),
    ("short payload", Way::Pass, |o, r| o.cut = Some(r.below(22))),
    ("no I flag", Way::Pass, |o, _| o.vxlan[0] = 0),
    ("group policy flag", Way::Pass, |o, r| {
        o.vxlan = [0x88, 0, 0, r.byte(), o.vxlan[4], o.vxlan[5], o.vxlan[6], 0];
    }),
    ("group policy identifier", Way::Pass, |o, _| o.vxlan[3] = 7),
    ("one flag or reserved bit", Way::Pass, |o, r| {
        let byte = r.below(4);
        // Bit 3 of the first byte is the I flag.
        let bits: &[u8] = if byte == 0 {
            &[0, 1, 2, 4, 5, 6, 7]
        } else {
            &[0, 1, 2, 3, 4, 5, 6, 7]
        };
        o.vxlan[byte] |= 1 << r.pick(bits);
    }),
    ("all flags", Way::Pass, |o, _| o.vxlan[..4].fill(0xff)),
    ("reserved byte", Way::Pass, |o, r| o.vxlan[7] = r.byte() | 1),
    ("other VNI", Way::Pass, |o, r| {
        let vni = r.pick(&[0u32, 1, 99, 101, 200, 0xff_ffff]);
        o.vxlan[4..].copy_from_slice(&(vni << 8).to_be_bytes());
    }),
    ("other UDP port", Way::Pass, |o, r| {
        o.udp_ports[1] = r.pick(&[0, 1, 4788, 4790, 8473, 65535]);
    }),
    ("other protocol", Way::Pass, |o, r| {
        o.protocol = r.pick(&[1, 4, 6, 47, 132, 136]);
    }),
    ("other address", Way::Pass, |o, r| {
        o.addresses[1] = r.pick(&[
            HOST_IP2,
            GATEWAY_IP,
            NEAR_IP,
            [192, 0, 2, 255],
            [192, 0, 2, 0],
            [224, 0, 0, 1],
            [239, 1, 1, 1],
            [127, 0, 0, 1],
            [255; 4],
            [0; 4],
        ]);
    }),
    ("other MAC", Way::Pass, |o, r| {
        o.macs[1] = r.pick(&[
            MacAddr([2, 8, 8, 8, 8, 8]),
            MacAddr([0xff; 6]),
            MacAddr([1, 0, 0x5e, 0, 0, 1]),
            MacAddr([0x33, 0x33, 0, 0, 0, 1]),
            super::BRIDGE_MAC,
            super::A,
        ]);
    }),
    ("second remote", Way::Fast, |o, _| o.addresses[0] = FAR_IP),
    ("own source", Way::Pass, |o, _| o.addresses[0] = HOST_IP),
    ("second own source", Way::Pass, |o, _| {
        o.addresses[0] = HOST_IP2;
    }),
    ("no remote", Way::Fast, |o, r| {
        o.addresses[0] = r.pick(&[[198, 51, 100, 77], GATEWAY_IP, [8, 8, 8, 8]]);
    }),
    ("martian source", Way::Pass, |o, r| {
        o.addresses[0] = r.pick(&[
            [0; 4],
            [0, 1, 2, 3],
            [127, 0, 0, 1],
            [127, 9, 9, 9],
            [224, 0, 0, 5],
            [239, 9, 9, 9],
            [240, 0, 0, 1],
            [255; 4],
        ]);
    }),
    ("no UDP checksum", Way::Fast, |o, _| {
        o.udp_checksum = UdpChecksum::None;
    }),
    ("broadcast source", Way::Fast, |o, r| {
        o.addresses[0] = r.pick(&[[192, 0, 2, 255], [192, 0, 2, 0]]);
    }),
];

/// Frames that arrive at the uplink.
pub fn ingress(world: &World, seed: u64, generated: usize) -> Vec<Case> {
    let mut rng = Rng(seed);
    let mut all = Cases {
        world,
        cases: Vec::new(),
    };
    let plain = CHANGES[0];
    for change in CHANGES {
        for kind in ["udp4", "udp6", "tcp4", "arp request", "vlan", "odd type"] {
            for destination in [
                Station::Known(A),
                Station::Unknown,
                Station::Group([0xff; 6]),
            ] {
                let packet = payload(kind, 90, 0, &mut rng);
                all.add(change, None, destination, packet, 0, &mut rng);
            }
        }
    }
    for destination in stations(Station::FromVm(0)) {
        for kind in KINDS {
            let packet = payload(kind, 86, 0, &mut rng);
            all.add(&plain, None, destination, packet, 0, &mut rng);
        }
    }
    for source in stations(Station::Behind(NEAR_IP)) {
        for change in ["as it is", "second remote", "no remote"] {
            let change = CHANGES.iter().find(|c| c.0 == change).unwrap_or(&plain);
            for kind in ["udp4", "tcp6", "arp reply"] {
                let packet = payload(kind, 86, 0, &mut rng);
                let to = Station::Known(A);
                all.add(change, Some(source), to, packet, 0, &mut rng);
            }
        }
    }
    // Every cell of the ECN table, with and without checksums.
    for outer_tos in [0, 1, 2, 3, 0xb8, 0xb9, 0xba, 0xbb] {
        for inner_tos in [0, 1, 2, 3, 0x28, 0x29, 0x2a, 0x2b] {
            for kind in [
                "udp4",
                "udp6",
                "tcp4",
                "bad checksum4",
                "options4",
                "vlan",
                "odd type",
            ] {
                for change in &CHANGES[..2] {
                    let packet = payload(kind, 86, inner_tos, &mut rng);
                    let to = Station::Known(A);
                    all.add(change, None, to, packet, outer_tos, &mut rng);
                }
            }
        }
    }
    for limit in [world.local_max, 1464, 1468] {
        for length in limit - 6..=(limit + 6).min(LONGEST - 50) {
            for kind in ["udp4", "udp6", "vlan", "odd type"] {
                for to in [A, C] {
                    let packet = payload(kind, length - 14, 0, &mut rng);
                    all.add(&plain, None, Station::Known(to), packet, 0, &mut rng);
                }
            }
        }
    }
    all.cut_short(&mut rng);
    all.in_two_fragments(&mut rng);

    let sources = stations(Station::Behind(NEAR_IP));
    let destinations = stations(Station::FromVm(0));
    let usual = [A, A, A2, C].map(Station::Known);
    for _ in 0..generated {
        let change = if rng.percent(50) {
            rng.below(2)
        } else {
            rng.below(CHANGES.len())
        };
        let source = rng.percent(10).then(|| rng.pick(&sources));
        let destination = if rng.percent(80) {
            rng.pick(&usual)
        } else {
            rng.pick(&destinations)
        };
        // Changed headers may be longer.
        let longest = LONGEST - 64 - if change < 2 { 0 } else { 40 };
        let bytes = (any_length(world, &mut rng) - 14).clamp(8, longest);
        let (tos, outer_tos) = (rng.byte(), if rng.percent(30) { rng.byte() } else { 0 });
        let packet = payload(any_kind(&mut rng), bytes, tos, &mut rng);
        let change = &CHANGES[change];
        all.add(change, source, destination, packet, outer_tos, &mut rng);
    }
    all.cases
}

/// Frames to the VM with certain changes of the outer headers, `each` of every
/// one, which are listed in [`CHANGES`].
pub fn ingress_changed(world: &World, changes: &[&str], each: usize) -> Vec<Case> {
    let mut rng = Rng(each as u64);
    let mut all = Cases {
        world,
        cases: Vec::new(),
    };
    for name in changes {
        let change = CHANGES.iter().find(|change| change.0 == *name);
        let change = change.unwrap_or_else(|| panic!("no change is named {name}"));
        for i in 0..each {
            let packet = payload(KINDS[i % PLAIN_KINDS], 90, 0, &mut rng);
            all.add(change, None, Station::Known(A), packet, 0, &mut rng);
        }
    }
    all.cases
}

/// Frames of some kinds from the first remote to some stations, `each` of every
/// combination.
pub fn ingress_to(world: &World, to: &[MacAddr], kinds: &[&'static str], each: usize) -> Vec<Case> {
    let mut rng = Rng(to.len() as u64);
    let mut all = Cases {
        world,
        cases: Vec::new(),
    };
    for destination in to {
        for kind in kinds {
            assert!(KINDS.contains(kind), "no kind of packet is named {kind}");
            for _ in 0..each {
                let packet = payload(kind, 86, 0, &mut rng);
                let to = Station::Known(*destination);
                all.add(&CHANGES[0], None, to, packet, 0, &mut rng);
            }
        }
    }
    all.cases
}

/// Frames in two parts that follow each other.
pub fn ingress_in_two_fragments(world: &World) -> Vec<Case> {
    let mut all = Cases {
        world,
        cases: Vec::new(),
    };
    all.in_two_fragments(&mut Rng(6));
    all.cases
}

struct Cases<'w> {
    world: &'w World,
    cases: Vec<Case>,
}

impl Cases<'_> {
    /// `source`: of the inner frame; a station behind the outer source if `None`.
    fn add(
        &mut self,
        (name, way, change): &(&str, Way, Change),
        source: Option<Station>,
        destination: Station,
        packet: super::Payload,
        outer_tos: u8,
        rng: &mut Rng,
    ) {
        let number = self.cases.len();
        let mut outer = Outer::new(self.world, number);
        outer.tos = outer_tos;
        change(&mut outer, rng);
        let source = match (source, outer.addresses[0]) {
            // Never two places for one learned station.
            (Some(Station::Behind(_)), from) => Station::Behind(from),
            (Some(source), _) => source,
            (None, NEAR_IP) => Station::Known(rng.pick(&NEAR)),
            (None, FAR_IP) => Station::Known(FAR),
            (None, from) => Station::Behind(from),
        };
        let inner = inner(source.mac(rng), destination.mac(rng), packet, number);
        if differs_on_purpose(self.world, outer.addresses[0], inner.source) {
            return;
        }
        let way = match way {
            Way::Pass => Way::Pass,
            _ => ingress_way(self.world, &outer, &inner),
        };
        self.cases.push(Case {
            vnet: Header::default(),
            what: format!("{name}, tos {:#04x}: {}", outer.tos, inner.what),
            frame: outer.build(&inner.frame),
            way,
            flow: inner.flow,
        });
    }

    /// Right outer headers around inner frames that end anywhere.
    fn cut_short(&mut self, rng: &mut Rng) {
        for kind in ["udp4", "udp6", "options4", "tcp4"] {
            for length in 14..=64 {
                let number = self.cases.len();
                let outer = Outer::new(self.world, number);
                let packet = payload(kind, 40, 0, rng);
                let mut inner = inner(NEAR[0], A, packet, number);
                inner.frame.truncate(length);
                inner.plain &= length >= if kind == "udp6" { 58 } else { 34 };
                self.cases.push(Case {
                    vnet: Header::default(),
                    what: format!("cut to {length}: {}", inner.what),
                    way: ingress_way(self.world, &outer, &inner),
                    frame: outer.build(&inner.frame),
                    // What is cut off cannot name the flow.
                    flow: number as u64,
                });
            }
        }
    }

    /// The kernel puts them together; the fast path must not touch either.
    fn in_two_fragments(&mut self, rng: &mut Rng) {
        for i in 0..20 {
            let number = self.cases.len();
            let outer = Outer::new(self.world, number);
            let packet = payload(KINDS[i % PLAIN_KINDS], 300, 0, rng);
            let inner = inner(NEAR[0], A, packet, number);
            for frame in in_two(&outer.build(&inner.frame), 1 + i * 2) {
                self.cases.push(Case {
                    vnet: Header::default(),
                    what: format!("fragment {:02x?} of {}", &frame[20..22], inner.what),
                    frame,
                    way: Way::Pass,
                    flow: inner.flow,
                });
            }
        }
    }
}

/// The intended differences: frames with forged senders.
///
/// Where nothing is learned, the kernel drops inner frames from the VXLAN device's
/// own MAC (vxlan_set_mac in drivers/net/vxlan/vxlan_core.c) and outer packets from
/// any other IPv4 address of this host (fib_validate_source in
/// net/ipv4/fib_frontend.c). With learning, the sender has to be known behind that
/// very remote, and both pass. Without, the fast path asks nothing of the sender:
/// stations behind several VTEPs and gateway addresses that every host has would
/// otherwise be slow, and a forger can as well take the address of a real remote,
/// which the kernel accepts too.
///
/// Packets from this VTEP's own address are dropped (R12), as the kernel does over
/// IPv4; over IPv6 it looks at no source.
pub(super) fn differs_on_purpose(world: &World, outer: [u8; 4], inner: MacAddr) -> bool {
    let own = world.underlay == Family::V6 && outer == HOST_IP;
    own || !world.learning && (outer == HOST_IP2 || inner == super::VXLAN_MAC)
}

pub(super) fn ingress_way(world: &World, outer: &Outer, inner: &Inner) -> Way {
    let local = [A, A2, C].contains(&inner.destination);
    let behind = match outer.addresses[0] {
        NEAR_IP => NEAR.contains(&inner.source),
        FAR_IP => inner.source == FAR,
        _ => false,
    };
    let fits = (16..=world.local_max).contains(&inner.frame.len());
    let ecn_is_merged = inner
        .tos
        .is_none_or(|tos| ecn::decap(outer.tos, tos) != ecn::Decap::Refuse);
    let checksum = outer.udp_checksum != UdpChecksum::None || world.takes_zero_checksum;
    match () {
        () if !inner.plain || !fits || !ecn_is_merged || !checksum => Way::Pass,
        () if is_learned(inner.source) || is_learned(inner.destination) => Way::Either,
        () if !local || world.leaves_local() => Way::Pass,
        () if behind => Way::Fast,
        () if world.learning => Way::Pass,
        () => Way::Either,
    }
}
