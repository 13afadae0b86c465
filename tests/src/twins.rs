//! Two hosts that are alike to the last MAC address, one with the daemon and
//! one without. The same frames go into both; what comes out is compared.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use vtep_common::{MacAddr, Outcome, checksum};

pub use crate::corpus::encapsulated;
use crate::corpus::{self, Case, Way, World};
use crate::daemon::Daemon;
use crate::lab::{Family, Guest};
use crate::netns::Netns;
use crate::wait_until;

mod side;
use side::{DEADLINE, MARKS, Side, remote_stations};

/// Frames in flight at once: a quarter of the ring of a veth.
const CHUNK: usize = 32;

/// For frames that were held back.
const LATE: Duration = Duration::from_millis(30);

/// How the hosts are made.
#[derive(Debug, Clone)]
pub struct Device {
    pub underlay: Family,
    /// Options of the VXLAN device.
    pub vxlan: &'static str,
    pub udp_port: u16,
    /// What the device's bridge port learns.
    pub bridge_learning: bool,
    /// MTU of the ports, and of the underlay if that is IPv4.
    pub mtu: u32,
    /// MTU of the second VM and its port.
    pub small_mtu: u32,
    /// The bridge listens to IGMP and MLD.
    pub snooping: bool,
    /// Of both ports.
    pub hook: Hook,
    /// How the VMs are connected.
    pub guest: Guest,
}

impl Default for Device {
    fn default() -> Self {
        Self {
            underlay: Family::V4,
            vxlan: "",
            udp_port: 4789,
            bridge_learning: true,
            mtu: 1500,
            small_mtu: 1500,
            snooping: true,
            hook: Hook::Xdp,
            guest: Guest::Plain,
        }
    }
}

/// Where frames from the VMs meet the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    Xdp,
    Tcx,
}

/// Where frames go in and come out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tap {
    /// The router's end of the uplink.
    Wire,
    /// The first VM's card and the second's.
    A,
    C,
}

const TAPS: [Tap; 3] = [Tap::Wire, Tap::A, Tap::C];

pub struct Twins {
    pub world: World,
    kernel: Side,
    fast: Side,
    pub daemon: Daemon,
    chunks: u32,
    /// Source ports of the accelerated host.
    source_ports: std::ops::Range<u16>,
    /// Frames put in since the start, and those of them that are marks.
    seen_frames: u64,
    fast_marks: u64,
}

/// What became of one run.
#[derive(Debug)]
pub struct Report {
    pub frames: usize,
    pub expected_fast: u64,
    pub fast: u64,
    /// By tap: frames that came out of either host.
    pub out: BTreeMap<Tap, usize>,
    /// Growth of every outcome that grew.
    pub outcomes: BTreeMap<&'static str, u64>,
}

impl Twins {
    pub fn new(device: &Device) -> Result<Self> {
        let (kernel, fast) = std::thread::scope(|scope| {
            let kernel = scope.spawn(|| Side::new(device));
            let fast = Side::new(device);
            let joined = kernel.join();
            (
                joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                fast,
            )
        });
        let (kernel, fast) = (kernel?, fast?);
        let vms = &fast.lab.vms;
        let host = &fast.lab.hosts[0];
        let hook = match device.hook {
            Hook::Xdp => "xdp",
            Hook::Tcx => "tcx",
        };
        let ports = [&vms[0].port, &vms[1].port];
        let config = ports.map(|port| format!("[ports.{port}]\nhook = \"{hook}\"\n"));
        let daemon = Daemon::with_config(host, &config.concat())?;
        for mac in [corpus::A, corpus::A2, corpus::C] {
            // What is left to the kernel is known, too.
            let known = || Ok(daemon.fdb(mac)?.is_some());
            match device.mtu {
                1500 => daemon.wait_accelerated(mac)?,
                _ => wait_until(DEADLINE, &format!("{mac} is known"), known)?,
            };
        }
        for (mac, _) in remote_stations() {
            daemon.wait_accelerated(mac)?;
        }
        let mut words = device.vxlan.split_whitespace();
        let source_ports = match words.find(|word| *word == "srcport") {
            Some(_) => {
                let mut bound = || {
                    words
                        .next()
                        .context("srcport MIN MAX")?
                        .parse()
                        .context("port")
                };
                bound()?..bound()?
            }
            // At tcx the kernel's range (ip_local_port_range).
            None if device.hook == Hook::Tcx => 32768..61000,
            None => 49152..u16::MAX,
        };
        let world = World {
            hook: device.hook,
            offloads: device.guest != Guest::Plain,
            underlay: device.underlay,
            sends_checksum: !["noudpcsum", "udp6zerocsumtx"]
                .iter()
                .any(|none| device.vxlan.contains(none)),
            takes_zero_checksum: device.underlay == Family::V4
                || device.vxlan.contains("udp6zerocsumrx"),
            udp_port: device.udp_port,
            tunnel_max: fast.lab.vm_mtu as usize + 14,
            local_max: device.small_mtu.min(device.mtu) as usize + 14,
            longest: device.mtu as usize + 18,
            learning: device.bridge_learning || !device.vxlan.contains("nolearning"),
            uplink_mac: host.uplink_mac,
            gateway_mac: host.gateway_mac,
        };
        Ok(Self {
            world,
            kernel,
            fast,
            daemon,
            chunks: 0,
            source_ports,
            seen_frames: 0,
            fast_marks: 0,
        })
    }

    /// Put the cases into both hosts at `tap`, take everything that comes out.
    /// `Err` where the hosts differ, or a frame was not counted once.
    pub fn run(&mut self, tap: Tap, cases: &[Case]) -> Result<Report> {
        let before = self.outcomes()?;
        let (seen, marks) = (self.seen_frames, self.fast_marks);
        self.exchange(tap, cases)?;
        self.compare(cases)?;
        self.flows(cases, 0)?;
        let (seen, marks) = (self.seen_frames - seen, self.fast_marks - marks);
        self.report(cases, before, seen, marks)
    }

    /// Put the cases into both hosts at `tap` and keep what comes out. The hosts
    /// have nothing in common, so both work at the same time.
    pub fn exchange(&mut self, tap: Tap, cases: &[Case]) -> Result<()> {
        let (first, world) = (self.chunks, &self.world);
        let chunks = chunks(cases);
        let work = |side: &mut Side| -> Result<()> {
            side.out.clear();
            for (number, chunk) in chunks.iter().enumerate() {
                side.send(tap, chunk.iter().map(|case| (case.vnet, &*case.frame)))?;
                side.drain(world, first + number as u32)?;
            }
            Ok(())
        };
        let (kernel, fast) = (&mut self.kernel, &mut self.fast);
        std::thread::scope(|scope| {
            let kernel = scope.spawn(|| work(kernel).context("kernel-only host"));
            let fast = work(fast).context("accelerated host");
            let joined = kernel.join();
            fast.and(joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })?;
        let chunks = chunks.len();
        self.chunks += chunks as u32;
        let unseen = match (tap, self.world.hook) {
            (Tap::A | Tap::C, Hook::Tcx) => cases.iter().filter(|c| is_cut_tag(&c.frame)).count(),
            _ => 0,
        };
        self.seen_frames += (cases.len() - unseen + chunks * MARKS.len()) as u64;
        let fast_marks = MARKS.iter().filter(|m| m.is_fast(&self.world)).count();
        self.fast_marks += (chunks * fast_marks) as u64;
        // Waiting longer can only explain a difference, never hide one.
        if !self.differences().is_empty() {
            for side in [&mut self.kernel, &mut self.fast] {
                side.collect_late(&self.world, LATE)?;
            }
        }
        Ok(())
    }

    /// R42: every frame in exactly one outcome.
    fn report(
        &self,
        cases: &[Case],
        before: BTreeMap<&'static str, u64>,
        seen: u64,
        marks: u64,
    ) -> Result<Report> {
        let mut after = self.outcomes()?;
        for (name, count) in &mut after {
            *count -= before.get(name).copied().unwrap_or(0);
        }
        after.retain(|_, count| *count > 0);
        let sum: u64 = after.values().sum();
        ensure!(
            sum == seen,
            "{seen} frames went in, {sum} outcomes were counted: {after:?}"
        );
        let fast: u64 = Outcome::ALL
            .iter()
            .filter(|outcome| outcome.is_fast())
            .filter_map(|outcome| after.get(outcome.name()))
            .sum();
        let count = |way| cases.iter().filter(|case| case.way == way).count() as u64;
        let out = self.fast.out.iter().map(|(tap, out)| (*tap, out.len()));
        let report = Report {
            frames: cases.len(),
            expected_fast: count(Way::Fast),
            fast: fast - marks,
            out: out.collect(),
            outcomes: after,
        };
        ensure!(
            report.fast * 100 >= report.expected_fast * 99
                && report.fast <= report.expected_fast + count(Way::Either),
            "the fast path took {} of {} frames: {report:?}",
            report.fast,
            report.expected_fast
        );
        Ok(report)
    }

    pub fn outcomes(&self) -> Result<BTreeMap<&'static str, u64>> {
        let stats = self.daemon.json(&["stats"])?;
        let frames = |outcome: &Outcome| {
            let name = outcome.name();
            let frames = stats["outcomes"][name]["frames"].as_u64();
            Ok((name, frames.with_context(|| format!("no outcome {name}"))?))
        };
        Outcome::ALL.iter().map(frames).collect()
    }

    /// The same frames at every tap, byte for byte but for what may differ.
    fn compare(&self, cases: &[Case]) -> Result<()> {
        let differences = self.differences();
        if differences.is_empty() {
            return Ok(());
        }
        let lines = differences.iter().take(12).map(|difference| {
            let number = corpus::number(&difference.frame);
            let case = number.and_then(|number| cases.get(number));
            let what = case.map_or("", |case| &case.what);
            format!("case {number:?} {what}\n  {difference}")
        });
        let lines: Vec<String> = lines.collect();
        bail!(
            "{} differences, the first of them:\n{}",
            differences.len(),
            lines.join("\n")
        )
    }

    /// What only one of the hosts emitted in the last exchange, in normal form.
    pub fn differences(&self) -> Vec<Difference> {
        let mut differences = Vec::new();
        for tap in TAPS {
            let mut balance: HashMap<Vec<u8>, i32> = HashMap::new();
            for (side, sign) in [(&self.kernel, 1), (&self.fast, -1)] {
                for frame in side.out.get(&tap).into_iter().flatten() {
                    let normal = normal_form(tap, frame, &self.world);
                    *balance.entry(normal).or_default() += sign;
                }
            }
            let unequal = balance.into_iter().filter(|(_, surplus)| *surplus != 0);
            differences.extend(unequal.map(|(frame, surplus)| Difference {
                tap,
                frame,
                surplus,
            }));
        }
        differences.sort();
        differences
    }

    /// Within a flow, frames of one way keep their order, fast ones their source
    /// port too (R4). `first`: number of the first case.
    pub fn flows(&self, cases: &[Case], first: usize) -> Result<()> {
        for tap in TAPS {
            let mut last: HashMap<(u64, bool), usize> = HashMap::new();
            let mut ports: HashMap<u64, u16> = HashMap::new();
            for frame in self.fast.out.get(&tap).into_iter().flatten() {
                let case = corpus::number(frame)
                    .and_then(|number| Some((number, cases.get(number.checked_sub(first)?)?)));
                let Some((number, case)) = case else {
                    continue;
                };
                let fast = case.way == Way::Fast;
                if case.way != Way::Either
                    && let Some(before) = last.insert((case.flow, fast), number)
                {
                    // Flooded frames leave several times.
                    ensure!(
                        before <= number,
                        "{tap:?}: frame {number} came after {before}: {}",
                        case.what
                    );
                }
                if !fast || tap != Tap::Wire {
                    continue;
                }
                let udp = match self.world.underlay {
                    Family::V4 => 34,
                    Family::V6 => 54,
                };
                let port = u16::from_be_bytes([frame[udp], frame[udp + 1]]);
                ensure!(
                    self.source_ports.contains(&port),
                    "source port {port} not in {:?}",
                    self.source_ports
                );
                let before = *ports.entry(case.flow).or_insert(port);
                ensure!(
                    before == port,
                    "source ports {before} and {port} in one flow: {}",
                    case.what
                );
            }
        }
        Ok(())
    }

    /// R7: both kernels know the same stations at the same places.
    pub fn compare_fdb(&self) -> Result<Vec<String>> {
        let (kernel, fast) = (self.kernel.fdb()?, self.fast.fdb()?);
        let missing: Vec<&String> = kernel.iter().filter(|l| !fast.contains(l)).collect();
        let added: Vec<&String> = fast.iter().filter(|l| !kernel.contains(l)).collect();
        ensure!(
            kernel == fast,
            "missing in the accelerated host: {missing:#?}, additional: {added:#?}"
        );
        Ok(kernel)
    }

    /// Frames that came out of the accelerated host in the last run.
    pub fn out(&self, tap: Tap) -> &[Vec<u8>] {
        self.fast.out.get(&tap).map_or(&[], Vec::as_slice)
    }

    /// All that either host emitted in the last exchange.
    pub fn emitted(&self) -> impl Iterator<Item = (&'static str, Tap, &Vec<u8>)> {
        let hosts = [("kernel-only", &self.kernel), ("accelerated", &self.fast)];
        hosts.into_iter().flat_map(|(name, side)| {
            let taps = side.out.iter();
            taps.flat_map(move |(tap, frames)| frames.iter().map(move |f| (name, *tap, f)))
        })
    }

    /// The namespace of the host without daemon.
    pub fn kernel_only(&self) -> &Netns {
        &self.kernel.lab.hosts[0].netns
    }

    /// Frames put in since the start, and those that took the fast path although
    /// nobody compares them.
    pub fn put_in(&self) -> (u64, u64) {
        (self.seen_frames, self.fast_marks)
    }

    /// Wait until the maps say about a station what the kernel's FDB says.
    pub fn wait_place(&self, mac: MacAddr, place: &str) -> Result<()> {
        wait_until(DEADLINE, &format!("{mac} at {place}"), || {
            Ok(self
                .daemon
                .fdb(mac)?
                .is_some_and(|row| row["location"].to_string().contains(place)))
        })?;
        Ok(())
    }
}

/// Cases that can be in flight together: superframes count as what becomes of them.
fn chunks(cases: &[Case]) -> Vec<&[Case]> {
    let (mut chunks, mut start, mut frames) = (Vec::new(), 0, 0);
    for (i, case) in cases.iter().enumerate() {
        let segments = case.vnet.gso.map_or(1, |gso| {
            1 + case.frame.len() / usize::from(gso.segment_bytes.max(1))
        });
        if i > start && frames + segments > CHUNK {
            chunks.push(&cases[start..i]);
            (start, frames) = (i, 0);
        }
        frames += segments;
    }
    chunks.push(&cases[start..]);
    chunks
}

/// The stack drops frames that end in their VLAN tag before any hook of it sees
/// them (skb_vlan_untag in net/core/skbuff.c).
fn is_cut_tag(frame: &[u8]) -> bool {
    matches!(frame[12..14], [0x81, 0] | [0x88, 0xa8]) && frame.len() < 20
}

/// A frame that one host emitted more often than the other.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Difference {
    pub tap: Tap,
    pub frame: Vec<u8>,
    /// How much more often by the kernel; negative: by the accelerated host.
    pub surplus: i32,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let host = if self.surplus > 0 {
            "kernel-only"
        } else {
            "accelerated"
        };
        write!(
            f,
            "{:?}: {} more from the {host} host: {}",
            self.tap,
            self.surplus.abs(),
            hex(&self.frame)
        )
    }
}

/// What may differ set to zero where it is right: outer source port, IPv4
/// identification and the checksums over them. A wrong checksum stays as it is.
fn normal_form(tap: Tap, frame: &[u8], world: &World) -> Vec<u8> {
    let mut frame = frame.to_vec();
    if tap != Tap::Wire || frame.len() < 34 {
        return frame;
    }
    let (addresses, udp) = match frame[12..14] {
        [8, 0] => {
            let header = 14..14 + 4 * usize::from(frame[14] & 15);
            // Of what the kernel answers to options, the header has options too.
            if frame.get(header).map(checksum::bytes) == Some(0xffff) {
                frame[18..20].fill(0);
                frame[24..26].fill(0);
            }
            let fragment = u16::from_be_bytes([frame[20], frame[21]]) & 0x3fff != 0;
            // Fragments are always the kernel's, on both hosts; the port in the first is made of
            // the hash that tcx hands over, and nothing else of the checksum is here.
            if fragment || frame[23] != 17 {
                let first = frame[20] & 0x1f == 0 && frame[21] == 0;
                if first && frame[14] == 0x45 && frame[23] == 17 {
                    clear_port(&mut frame, 34, world);
                }
                return frame;
            }
            (26..34, 34)
        }
        // A fragment header, offset zero.
        [0x86, 0xdd]
            if frame[20] == 44
                && frame.len() > 70
                && frame[54] == 17
                && frame[56] == 0
                && frame[57] & 0xf8 == 0 =>
        {
            clear_port(&mut frame, 62, world);
            return frame;
        }
        [0x86, 0xdd] if frame[20] == 17 => (22..54, 54),
        _ => return frame,
    };
    let port = world.udp_port.to_be_bytes();
    if frame.len() < udp + 8 || frame[udp + 2..udp + 4] != port {
        return frame;
    }
    if frame[udp + 6..udp + 8] != [0, 0] {
        let pseudo = u64::from(checksum::bytes(&frame[addresses]))
            + u64::from(17u16.to_be())
            + u64::from(((frame.len() - udp) as u16).to_be());
        let sum = pseudo + u64::from(checksum::bytes(&frame[udp..]));
        if checksum::fold(sum) != 0xffff {
            return frame;
        }
        frame[udp + 6..udp + 8].fill(0xff);
    }
    frame[udp..udp + 2].fill(0);
    frame
}

/// Source port of a VXLAN packet, and the checksum over it.
fn clear_port(frame: &mut [u8], udp: usize, world: &World) {
    if frame.len() >= udp + 8 && frame[udp + 2..udp + 4] == world.udp_port.to_be_bytes() {
        frame[udp..udp + 2].fill(0);
        frame[udp + 6..udp + 8].fill(0);
    }
}

fn hex(frame: &[u8]) -> String {
    let shown = &frame[..frame.len().min(120)];
    let text: String = shown.iter().map(|byte| format!("{byte:02x}")).collect();
    let more = frame.len() - shown.len();
    if more == 0 {
        text
    } else {
        format!("{text} and {more} more")
    }
}
