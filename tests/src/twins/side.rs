//! One host of the twins: how it is made, and how it is emptied of frames.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use vtep_common::MacAddr;

use super::{Device, TAPS, Tap, encapsulated};
use crate::corpus::{self, World};
use crate::frames::{Inbox, Socket, ethernet, ipv4_udp};
use crate::lab::{BRIDGE, Family, Guest, Lab, Options, UPLINK, VXLAN};
use crate::vnet::Header;

/// For everything that has to come.
pub(super) const DEADLINE: Duration = Duration::from_secs(10);
/// Longer than any run, seconds: what a clock decides would differ between the
/// hosts.
const AGES: u32 = 36_000;
/// Limits of rate, time and memory in the host that a long run would meet, in
/// either host at another frame.
const STEADY: [(&str, &str); 7] = [
    // No type of ICMP message is limited in rate.
    ("ipv4/icmp_ratemask", "0"),
    ("ipv6/icmp/ratemask", "\n"),
    ("ipv4/ipfrag_time", "36000"),
    ("ipv6/ip6frag_time", "36000"),
    ("ipv4/ipfrag_high_thresh", "1000000000"),
    ("ipv6/ip6frag_high_thresh", "1000000000"),
    ("ipv4/ipfrag_max_dist", "0"),
];
/// In frames that mark the end of a chunk, followed by its number and a letter.
const MARK: [u8; 8] = *b"\xf1vtepEND";

/// One host and all that can be seen of it.
pub(super) struct Side {
    pub lab: Lab,
    pub taps: [Socket; 3],
    pub out: BTreeMap<Tap, Vec<Vec<u8>>>,
    inbox: Inbox,
}

impl Side {
    pub fn new(device: &Device) -> Result<Self> {
        let options = Options {
            hosts: 1,
            underlay: device.underlay,
            underlay_mtu: (device.mtu != 1500).then_some(device.mtu),
            vxlan: format!("{} ageing {AGES}", device.vxlan),
            udp_port: device.udp_port,
            ..Options::default()
        };
        let mut lab = Lab::with(&options)?;
        lab.add_guest(0, device.guest)?;
        lab.add_guest(0, device.guest)?;
        let ip = |address| match device.underlay {
            Family::V4 => IpAddr::from(address),
            Family::V6 => IpAddr::from(corpus::v6(address)),
        };
        lab.add_address(0, ip(corpus::HOST_IP2))?;
        let host = &lab.hosts[0];
        // Nobody answers, asks or forwards on its own.
        lab.router.enter(|| {
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "0")?;
            Ok(std::fs::write(
                "/proc/sys/net/ipv6/conf/all/disable_ipv6",
                "1",
            )?)
        })?;
        let mtu = lab.vm_mtu + device.underlay.overhead() + 8;
        lab.router.run(&format!("ip link set to1 mtu {mtu}"))?;
        host.netns.enter(|| {
            for (key, value) in STEADY {
                let path = Path::new("/proc/sys/net").join(key);
                std::fs::write(&path, value).with_context(|| path.display().to_string())?;
            }
            Ok(())
        })?;
        let snooping = u8::from(device.snooping);
        host.netns.run(&format!(
            "ip link set {BRIDGE} type bridge ageing_time {AGES}00 mcast_snooping {snooping}
             mcast_membership_interval {AGES}00 mcast_querier_interval {AGES}00
             mcast_last_member_interval {AGES}00"
        ))?;
        let mtus = [device.mtu, device.small_mtu];
        for ((vm, mtu), mac) in lab.vms.iter().zip(mtus).zip(corpus::PORT_MACS) {
            // The VMs and the router can send more than the host's ends take.
            vm.netns.run_all(&format!(
                "ip addr flush dev eth0
                 ip link set eth0 mtu {}",
                mtu + 8
            ))?;
            host.netns
                .run(&format!("ip link set {} mtu {mtu} address {mac}", vm.port))?;
        }
        let (a, c) = (&lab.vms[0].port, &lab.vms[1].port);
        ensure!(
            (lab.vms[0].mac, lab.vms[1].mac) == (corpus::A, corpus::C),
            "the laboratory numbers its VMs in another way"
        );
        let learning = if device.bridge_learning { "on" } else { "off" };
        host.netns.run_all(&format!(
            "ip neigh replace {} lladdr {} dev {UPLINK} nud permanent
             ip link set {BRIDGE} address {}
             ip link set {VXLAN} address {}
             bridge link set dev {VXLAN} learning {learning}
             bridge fdb append 00:00:00:00:00:00 dev {VXLAN} dst {}
             bridge fdb append 00:00:00:00:00:00 dev {VXLAN} dst {}",
            host.gateway,
            host.gateway_mac,
            corpus::BRIDGE_MAC,
            corpus::VXLAN_MAC,
            ip(corpus::NEAR_IP),
            ip(corpus::FAR_IP),
        ))?;
        // Sticky: frames with forged sources do not move the known stations, so that nothing
        // depends on how soon the maps follow.
        for (mac, port) in [(corpus::A, a), (corpus::A2, a), (corpus::C, c)] {
            host.netns.run(&format!(
                "bridge fdb replace {mac} dev {port} master static sticky"
            ))?;
        }
        for (mac, remote) in remote_stations() {
            host.netns.run_all(&format!(
                "bridge fdb replace {mac} dev {VXLAN} self static dst {}
                 bridge fdb replace {mac} dev {VXLAN} master static sticky",
                ip(remote)
            ))?;
        }
        let open = match device.guest {
            Guest::Plain => Socket::open,
            _ => Socket::with_headers,
        };
        let taps = [
            lab.router.enter(|| Socket::open("to1"))?,
            lab.vms[0].netns.enter(|| open("eth0"))?,
            lab.vms[1].netns.enter(|| open("eth0"))?,
        ];
        Ok(Self {
            lab,
            taps,
            out: BTreeMap::new(),
            inbox: Inbox::default(),
        })
    }

    /// Send what the tap takes.
    pub fn send<'f>(
        &self,
        tap: Tap,
        frames: impl IntoIterator<Item = (Header, &'f [u8])>,
    ) -> Result<()> {
        let socket = &self.taps[tap as usize];
        let frames = frames.into_iter();
        let bytes: Vec<Vec<u8>> = frames.map(|(h, frame)| socket.bytes(h, frame)).collect();
        socket.send_batch(&bytes)?;
        Ok(())
    }

    /// Send marks through every way of both directions and keep what comes out
    /// before the last of them.
    pub fn drain(&mut self, world: &World, chunk: u32) -> Result<()> {
        for stage in [&MARKS[..3], &MARKS[3..]] {
            for mark in stage {
                let frame = mark.frame(world, chunk);
                self.send(mark.from, [(Header::default(), &*frame)])?;
            }
            for tap in TAPS {
                let mut missing: Vec<u8> = stage
                    .iter()
                    .flat_map(|mark| mark.to.iter().filter(|to| **to == tap).map(|_| mark.letter))
                    .collect();
                let out = self.out.entry(tap).or_default();
                let deadline = Instant::now() + DEADLINE;
                while !missing.is_empty() {
                    let left = deadline.saturating_duration_since(Instant::now());
                    let socket = &self.taps[tap as usize];
                    let some = self.inbox.receive(socket, left, |frame| {
                        if let Some((number, letter)) = mark_in(&frame) {
                            let at = missing.iter().position(|l| *l == letter);
                            ensure!(
                                number == chunk && at.is_some(),
                                "{tap:?}: unexpected mark {} of chunk {number}",
                                char::from(letter)
                            );
                            missing.swap_remove(at.unwrap_or_default());
                        } else if !is_noise(tap, &frame, world) {
                            out.push(frame);
                        }
                        Ok(())
                    })?;
                    if !some {
                        let letters = String::from_utf8_lossy(&missing).into_owned();
                        bail!("{tap:?}: marks {letters} of chunk {chunk} did not arrive");
                    }
                }
            }
        }
        Ok(())
    }

    /// Keep what comes within `time` after everything should have come: frames that
    /// a device held back to merge them with others (GRO).
    pub fn collect_late(&mut self, world: &World, time: Duration) -> Result<()> {
        for tap in TAPS {
            let out = self.out.entry(tap).or_default();
            let socket = &self.taps[tap as usize];
            while self.inbox.receive(socket, time, |frame| {
                if !is_noise(tap, &frame, world) {
                    out.push(frame);
                }
                Ok(())
            })? {}
        }
        Ok(())
    }

    pub fn fdb(&self) -> Result<Vec<String>> {
        let text = self.lab.hosts[0].netns.run("bridge fdb show")?;
        let mut lines: Vec<String> = text.lines().map(|l| l.trim().to_owned()).collect();
        lines.sort();
        Ok(lines)
    }
}

pub(super) fn remote_stations() -> impl Iterator<Item = (MacAddr, [u8; 4])> {
    let near = corpus::NEAR.into_iter().map(|mac| (mac, corpus::NEAR_IP));
    near.chain([(corpus::FAR, corpus::FAR_IP)])
}

/// A frame that shows that everything before it on its way has arrived. Fast
/// frames are forwarded in bulk at the end of a poll, so both ways need one.
pub(super) struct Mark {
    letter: u8,
    from: Tap,
    source: MacAddr,
    destination: MacAddr,
    /// Where copies arrive.
    to: &'static [Tap],
    fast: bool,
}

const fn mark(letter: u8, from: Tap, ends: [MacAddr; 2], to: &'static [Tap], fast: bool) -> Mark {
    let [source, destination] = ends;
    Mark {
        letter,
        from,
        source,
        destination,
        to,
        fast,
    }
}

const ALL: MacAddr = MacAddr([0xff; 6]);
/// From the wire, then from the VMs. A broadcast goes to both remotes.
pub(super) const MARKS: &[Mark] = &[
    mark(
        b'a',
        Tap::Wire,
        [corpus::NEAR[0], corpus::A],
        &[Tap::A],
        true,
    ),
    mark(
        b'b',
        Tap::Wire,
        [corpus::NEAR[0], corpus::C],
        &[Tap::C],
        true,
    ),
    mark(
        b'c',
        Tap::Wire,
        [corpus::NEAR[0], ALL],
        &[Tap::A, Tap::C],
        false,
    ),
    mark(
        b'd',
        Tap::A,
        [corpus::A, corpus::NEAR[0]],
        &[Tap::Wire],
        true,
    ),
    mark(b'e', Tap::A, [corpus::A, corpus::C], &[Tap::C], true),
    mark(
        b'f',
        Tap::A,
        [corpus::A, ALL],
        &[Tap::Wire, Tap::Wire, Tap::C],
        false,
    ),
    mark(b'g', Tap::C, [corpus::C, corpus::A], &[Tap::A], true),
];

impl Mark {
    pub fn is_fast(&self, world: &World) -> bool {
        let is_local = self.to != [Tap::Wire];
        self.fast && !(is_local && world.leaves_local())
    }

    fn frame(&self, world: &World, chunk: u32) -> Vec<u8> {
        let mut payload = MARK.to_vec();
        payload.extend(chunk.to_be_bytes());
        payload.push(self.letter);
        payload.resize(18, 0);
        // Some ways take only this, finished.
        let packet = ipv4_udp([10, 9, 0, 9], [10, 9, 1, 9], [9, 9], &payload);
        let inner = ethernet(self.source, self.destination, 0x0800, &packet);
        if self.from == Tap::Wire {
            encapsulated(world, corpus::NEAR_IP, &inner)
        } else {
            inner
        }
    }
}

/// Behind the UDP header, alone or inside a tunnel.
fn mark_in(frame: &[u8]) -> Option<(u32, u8)> {
    let is_at = |at: &usize| frame.get(*at..at + 8) == Some(&MARK[..]);
    let at = [42, 92, 112].into_iter().find(is_at)?;
    let rest = frame.get(at + 8..at + 13)?;
    Some((
        u32::from_be_bytes([rest[0], rest[1], rest[2], rest[3]]),
        rest[4],
    ))
}

/// What hosts send at times of their own: to groups of the underlay, in which
/// they look for neighbours that the corpus has asked for an answer, and reports
/// of a bridge that snoops, to a group that the corpus leaves out (RFC 4286).
fn is_noise(tap: Tap, frame: &[u8], world: &World) -> bool {
    let reports = [1, 0, 0x5e, 0, 0, 0x16];
    let inner = match (tap, world.underlay) {
        (Tap::Wire, _) if frame[0] & 1 != 0 => return true,
        (Tap::Wire, Family::V4) => 50,
        (Tap::Wire, Family::V6) => 70,
        _ => 0,
    };
    frame.get(inner..inner + 6) == Some(&reports[..])
}
