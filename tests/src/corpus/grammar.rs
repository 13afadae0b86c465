//! A corpus without end: every frame is made from a seed and its number alone,
//! so that any one can be made again. Of eight blocks, four are of frames whose
//! way is known, most of them plain known unicast, and four of frames with
//! everything combined and damaged.

use vtep_common::MacAddr;

use super::header::{Outer, in_two};
use super::mutate::{Tunnel, damage, settle};
use super::offload::{of_train, unfinished};
use super::outer::{CHANGES, differs_on_purpose, ingress_way};
use super::{
    A, A2, C, Case, FAR, FAR_IP, Inner, KINDS, NEAR, NEAR_IP, PLAIN_KINDS, Rng, Station, Way,
    World, any_kind, any_length, egress_way, inner, payload, stations,
};
use crate::twins::Tap;
use crate::vnet::Header;

/// Frames with consecutive numbers that go in at one place and are of one sort.
pub const BLOCK: u32 = 256;

/// What all of it depends on.
pub struct Grammar {
    world: World,
    seed: u64,
    /// All that can be an address, from the wire and from either VM.
    stations: [Vec<Station>; 3],
}

impl Grammar {
    /// `device` tells the corpora of different devices apart.
    pub fn new(world: World, seed: u64, device: &str) -> Self {
        // FNV-1a.
        let name = device.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        });
        let places = [
            Station::Behind(NEAR_IP),
            Station::FromVm(0),
            Station::FromVm(1),
        ];
        Self {
            world,
            seed: Rng(seed ^ name).word(),
            stations: places.map(stations),
        }
    }

    /// Where the frames of a block go in, and whether their way is known.
    pub fn block(number: u32) -> (Tap, bool) {
        let taps = [Tap::Wire, Tap::A, Tap::Wire, Tap::C];
        (taps[number as usize % 4], number % 8 < 4)
    }

    fn rng(&self, number: u32) -> Rng {
        Rng(Rng(self.seed ^ u64::from(number)).word())
    }

    pub fn case(&self, number: u32) -> Case {
        let mut rng = self.rng(number);
        let rng = &mut rng;
        let number_word = number as usize;
        loop {
            let case = match Self::block(number / BLOCK) {
                (Tap::Wire, true) => match self.train(number) {
                    Some(case) => return case,
                    None => self.plain_from_wire(number_word, rng),
                },
                (Tap::Wire, false) => match self.half(number) {
                    Some(case) => return case,
                    None => self.any_from_wire(number_word, rng),
                },
                (tap, true) => Some(self.plain_from_vm(tap, number_word, rng)),
                (tap, false) => Some(self.any_from_vm(tap, number_word, rng)),
            };
            match case {
                Some(case) if case.way != Way::Either || number / BLOCK % 8 >= 4 => return case,
                _ => {}
            }
        }
    }

    fn longest(&self, tap: Tap) -> usize {
        match tap {
            // As much longer as the header is.
            Tap::Wire => self.world.tunnel_max + 4 + self.world.underlay.overhead() as usize,
            Tap::A => self.world.longest,
            // As far as its own MTU lets it.
            Tap::C => self.world.longest.min(self.world.local_max + 4),
        }
    }

    /// Addresses that nothing has to be learned of.
    fn fixed_station(&self, rng: &mut Rng) -> Station {
        loop {
            match rng.pick(&self.stations[0]) {
                Station::Unknown | Station::Behind(_) | Station::FromVm(_) => {}
                station => return station,
            }
        }
    }

    fn plain_from_vm(&self, tap: Tap, number: usize, rng: &mut Rng) -> Case {
        let (own, others): (&[MacAddr], &[MacAddr]) = match tap {
            Tap::C => (&[C], &[A, A2, NEAR[0], NEAR[1], FAR]),
            _ => (&[A, A2], &[C, C, NEAR[0], NEAR[1], FAR]),
        };
        if self.world.offloads && rng.percent(60) {
            let ends = [rng.pick(own), rng.pick(others)];
            return self.unfinished(ends, number, rng);
        }
        let source = if rng.percent(95) {
            Station::Known(rng.pick(own))
        } else {
            self.fixed_station(rng)
        };
        let destination = match rng.below(100) {
            0..92 => Station::Known(rng.pick(others)),
            92..94 => Station::Unknown,
            _ => self.fixed_station(rng),
        };
        let kind = usual_kind(rng);
        let bytes = any_length(&self.world, rng).min(self.longest(tap)) - 14;
        let tos = rng.byte();
        let packet = payload(kind, bytes.max(8), tos, rng);
        let inner = inner(source.mac(rng), destination.mac(rng), packet, number);
        let mut way = egress_way(&self.world, own, &inner);
        if tap == Tap::C && inner.frame.len() > self.world.local_max {
            // More than the port's own MTU: the kernel may take it or not.
            way = Way::Either;
        }
        case(inner, way)
    }

    /// From a known station to another.
    fn unfinished(&self, ends: [MacAddr; 2], number: usize, rng: &mut Rng) -> Case {
        let unfinished = unfinished(&self.world, ends, number, rng);
        let is_local = [A, A2, C].contains(&ends[1]);
        let is_unknown = !unfinished.summed && self.world.sends_checksum;
        let way = match unfinished.longest {
            _ if is_local && self.world.leaves_local() => Way::Pass,
            longest if is_local && longest <= self.world.local_max => Way::Fast,
            longest if !is_local && longest <= self.world.tunnel_max && !is_unknown => Way::Fast,
            _ => Way::Pass,
        };
        Case {
            vnet: unfinished.header,
            what: format!(
                "{} of {} bytes: {} > {}",
                unfinished.what,
                unfinished.frame.len(),
                ends[0],
                ends[1]
            ),
            frame: unfinished.frame,
            way,
            flow: number as u64,
        }
    }

    /// Some frames are of a train of four, which the stack may merge.
    fn train(&self, number: u32) -> Option<Case> {
        const FRAMES: u32 = 4;
        let first = number & !(FRAMES - 1);
        let mut rng = self.rng(first | 1 << 30);
        let rng = &mut rng;
        if !self.world.offloads || !rng.percent(25) {
            return None;
        }
        let mut outer = Outer::new(&self.world, number as usize);
        outer.udp_ports[0] = 50_000;
        outer.tos = rng.byte() & 0xfc;
        let ends = [rng.pick(&NEAR), rng.pick(&[A, A2, C])];
        let (position, last) = ((number - first) as usize, first + FRAMES - 1);
        let frame = of_train(ends, position, FRAMES as usize, last as usize, rng);
        Some(Case {
            vnet: Header::default(),
            what: format!("of a train, {position}: {} > {}", ends[0], ends[1]),
            frame: outer.build(&frame),
            way: if self.world.leaves_local() {
                Way::Pass
            } else {
                Way::Fast
            },
            flow: u64::from(first),
        })
    }

    fn plain_from_wire(&self, number: usize, rng: &mut Rng) -> Option<Case> {
        let change = loop {
            let change = &CHANGES[if rng.percent(40) {
                rng.below(2)
            } else {
                rng.below(CHANGES.len())
            }];
            // One in ten is not to be fast.
            if change.1 == Way::Fast || rng.percent(25) {
                break change;
            }
        };
        let mut outer = Outer::new(&self.world, number);
        let tos = rng.byte();
        outer.tos = match rng.below(3) {
            0 => rng.byte(),
            // The same mark outside and inside changes nothing.
            _ => rng.byte() & 0xfc | tos & 3,
        };
        change.2(&mut outer, rng);
        let source = match outer.addresses[0] {
            _ if rng.percent(3) => self.fixed_station(rng),
            NEAR_IP => Station::Known(rng.pick(&NEAR)),
            FAR_IP => Station::Known(FAR),
            _ => self.fixed_station(rng),
        };
        let destination = match rng.below(100) {
            0..90 => Station::Known(rng.pick(&[A, A, A2, C])),
            90..93 => Station::Unknown,
            _ => self.fixed_station(rng),
        };
        let longest = self.world.longest - 64 - if change.0 == "as it is" { 0 } else { 40 };
        let bytes = (any_length(&self.world, rng) - 14).clamp(8, longest);
        let packet = payload(usual_kind(rng), bytes, tos, rng);
        let inner = inner(source.mac(rng), destination.mac(rng), packet, number);
        if differs_on_purpose(&self.world, outer.addresses[0], inner.source) {
            return None;
        }
        let way = match change.1 {
            Way::Pass => Way::Pass,
            _ => ingress_way(&self.world, &outer, &inner),
        };
        Some(Case {
            vnet: Header::default(),
            what: format!("{}, tos {:#04x}: {}", change.0, outer.tos, inner.what),
            frame: outer.build(&inner.frame),
            way,
            flow: inner.flow,
        })
    }

    fn any_from_vm(&self, tap: Tap, number: usize, rng: &mut Rng) -> Case {
        let vm = u8::from(tap == Tap::C);
        let stations = &self.stations[1 + usize::from(vm)];
        let source = match rng.below(10) {
            0..6 => Station::Known(if vm == 0 { A } else { C }),
            _ => rng.pick(stations),
        };
        let destination = match rng.below(10) {
            0..4 => Station::Known(rng.pick(&[A, C, NEAR[0], FAR])),
            4 => Station::Behind(rng.pick(&[NEAR_IP, FAR_IP])),
            5 => Station::FromVm(1 - vm),
            _ => rng.pick(stations),
        };
        if self.world.offloads && rng.percent(40) {
            let ends = [source.mac(rng), destination.mac(rng)];
            let mut case = self.unfinished(ends, number, rng);
            settle(&mut case.frame, 6, Station::FromVm(vm), rng);
            case.way = Way::Either;
            return case;
        }
        let mut inner = self.any_inner([source, destination], self.longest(tap), number, rng);
        if rng.percent(60) {
            let done = damage(&mut inner.frame, self.longest(tap), rng);
            inner.what = format!("{done}: {}", inner.what);
        }
        settle(&mut inner.frame, 6, Station::FromVm(vm), rng);
        case(inner, Way::Either)
    }

    fn any_from_wire(&self, number: usize, rng: &mut Rng) -> Option<Case> {
        let mut outer = Outer::new(&self.world, number);
        let mut what = Vec::new();
        if rng.percent(50) {
            outer.tos = rng.byte();
        }
        for _ in 0..rng.pick(&[0, 0, 0, 0, 1, 1, 2, 3]) {
            let change = rng.pick(CHANGES);
            change.2(&mut outer, rng);
            what.push(change.0);
        }
        let source = match (rng.below(10), outer.addresses[0]) {
            (0..6, NEAR_IP) => Station::Known(rng.pick(&NEAR)),
            (0..6, FAR_IP) => Station::Known(FAR),
            (0..8, from) => Station::Behind(from),
            _ => rng.pick(&self.stations[0]),
        };
        let destination = match rng.below(10) {
            0..5 => Station::Known(rng.pick(&[A, A2, C])),
            5 => Station::FromVm(rng.below(2) as u8),
            _ => rng.pick(&self.stations[1]),
        };
        let mut inner =
            self.any_inner([source, destination], self.world.longest - 114, number, rng);
        if rng.percent(8) {
            // A tunnel in the tunnel.
            inner.frame.truncate(self.world.longest - 164);
            let mut within = Outer::new(&self.world, number);
            within.macs = [source.mac(rng), destination.mac(rng)];
            inner.frame = within.build(&inner.frame);
            what.push("tunnel in tunnel");
        }
        if rng.percent(50) {
            what.push(damage(&mut inner.frame, self.world.longest - 100, rng));
        }
        let mut frame = outer.build(&inner.frame);
        if rng.percent(40) {
            what.push(damage(&mut frame, self.longest(Tap::Wire), rng));
        }
        if let Some(tunnel) = Tunnel::of(&frame) {
            tunnel.settle(&mut frame, rng);
            if rng.percent(50) {
                tunnel.repair(&mut frame);
            }
            let (from, station) = (tunnel.source(&frame), tunnel.station(&frame));
            if differs_on_purpose(&self.world, from, station.unwrap_or(A)) {
                return None;
            }
        }
        Some(Case {
            vnet: Header::default(),
            what: format!("{what:?}, tos {:#04x}: {}", outer.tos, inner.what),
            frame,
            way: Way::Either,
            flow: inner.flow,
        })
    }

    /// Some frames are one half of a packet in two fragments; the other half has
    /// the neighbouring number.
    fn half(&self, number: u32) -> Option<Case> {
        let mut rng = self.rng(number & !1 | 1 << 31);
        let rng = &mut rng;
        if !rng.percent(3) {
            return None;
        }
        let mut outer = Outer::new(&self.world, number as usize);
        // The kernel must not be left with many that never become whole.
        outer.identification = (number >> 1 & 0xff) as u16;
        outer.udp_ports[0] = outer.identification;
        let ends = [NEAR[0], rng.pick(&[A, C, A2, FAR])].map(Station::Known);
        let inner = self.any_inner(ends, self.world.longest - 100, number as usize & !1, rng);
        let whole = outer.build(&inner.frame);
        let units = 1 + rng.below((whole.len() - 56) / 8);
        let in_order = usize::from(rng.percent(20));
        let half = (number as usize & 1) ^ in_order;
        let [first, last] = in_two(&whole, units);
        Some(Case {
            vnet: Header::default(),
            what: format!("half {half} of {}", inner.what),
            frame: if half == 0 { first } else { last },
            way: Way::Pass,
            flow: inner.flow,
        })
    }

    fn any_inner(
        &self,
        [source, destination]: [Station; 2],
        longest: usize,
        number: usize,
        rng: &mut Rng,
    ) -> Inner {
        let bytes = any_length(&self.world, rng).min(longest) - 14;
        let (kind, tos) = (any_kind(rng), rng.byte());
        let packet = payload(kind, bytes.max(8), tos, rng);
        let mut inner = inner(source.mac(rng), destination.mac(rng), packet, number);
        inner.frame.truncate(longest);
        inner
    }
}

fn usual_kind(rng: &mut Rng) -> &'static str {
    if rng.percent(95) {
        rng.pick(&KINDS[..PLAIN_KINDS])
    } else {
        rng.pick(KINDS)
    }
}

fn case(inner: Inner, way: Way) -> Case {
    Case {
        vnet: Header::default(),
        what: inner.what,
        frame: inner.frame,
        way,
        flow: inner.flow,
    }
}
