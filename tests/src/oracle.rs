//! The kernel's driver as oracle, at length: a generated corpus goes through a
//! host without and a host with the daemon; every difference is traced to the
//! frame that makes it, and can be repeated with that frame alone.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use vtep_common::Outcome;

use crate::corpus::{BLOCK, Case, Grammar, Way};
use crate::lab::{Family, Guest};
use crate::maps::Counters;
use crate::twins::{Device, Hook, Tap, Twins};

/// Of the frames that are meant to be fast, those that have to be, in percent.
const FAST_PERCENT: u64 = 99;
/// At most one block in so many frames may differ once, and one more.
const ONCE_FRAMES: u64 = 1_000_000;
/// Frames that are described of those that should have been fast and were not.
const SLOW_DESCRIBED: usize = 5;
/// Differences that are traced and described; all are counted.
const DESCRIBED: usize = 20;

/// What is compared: every option that changes what either way does.
fn devices() -> Vec<(&'static str, Device)> {
    let with = |vxlan| Device {
        vxlan,
        snooping: false,
        ..Device::default()
    };
    let v6 = |device| Device {
        underlay: Family::V6,
        ..device
    };
    let offloads = |vxlan| Device {
        hook: Hook::Tcx,
        guest: Guest::PollingVeth,
        ..with(vxlan)
    };
    vec![
        ("default", Device::default()),
        ("noudpcsum", with("noudpcsum")),
        ("nolearning", with("nolearning")),
        (
            "static",
            Device {
                bridge_learning: false,
                ..with("nolearning")
            },
        ),
        (
            "fields",
            Device {
                udp_port: 8472,
                ..with("srcport 50000 50100 tos 0x10 ttl 5 df set")
            },
        ),
        ("inherit", with("ttl inherit tos inherit df inherit")),
        (
            "small-mtu",
            Device {
                small_mtu: 1400,
                ..with("")
            },
        ),
        ("ipv6", v6(with(""))),
        (
            "ipv6-zero-checksums",
            v6(with("udp6zerocsumtx udp6zerocsumrx")),
        ),
        (
            "ipv6-inherit",
            v6(with("nolearning ttl inherit tos inherit flowlabel 0x12345")),
        ),
        ("offloads", offloads("")),
        ("offloads-noudpcsum", offloads("noudpcsum")),
        ("offloads-ipv6", v6(offloads(""))),
        (
            "offloads-ipv6-zero-checksums",
            v6(offloads("udp6zerocsumtx udp6zerocsumrx")),
        ),
        (
            "tap",
            Device {
                guest: Guest::Tap,
                ..offloads("noudpcsum ttl inherit tos inherit df inherit")
            },
        ),
        (
            "jumbo",
            Device {
                mtu: 9000,
                small_mtu: 9000,
                ..offloads("noudpcsum")
            },
        ),
    ]
}

/// What to send.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Over all devices.
    pub frames: u64,
    pub seed: u64,
    /// This device alone.
    pub device: Option<String>,
    /// This frame alone.
    pub only: Option<u32>,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Summary {
    pub frames: u64,
    pub differences: u64,
    pub meant_fast: u64,
    pub fast: u64,
    /// The first differences, in full.
    pub descriptions: Vec<String>,
    /// Blocks that differed and did not when all of them came again: how GRO
    /// merges what a stack has in hand is a matter of time. Shown, and few.
    pub once: u64,
    /// Some frames that should have been fast and were not.
    pub slow: Vec<String>,
    /// Growth of every outcome that grew.
    pub outcomes: BTreeMap<&'static str, u64>,
}

impl Summary {
    /// Of the frames that were meant to be fast.
    pub fn fast_percent(&self) -> f64 {
        100.0 * self.fast as f64 / self.meant_fast.max(1) as f64
    }

    pub fn is_good(&self) -> bool {
        self.differences == 0
            && self.once <= 1 + self.frames / ONCE_FRAMES
            && self.fast * 100 >= self.meant_fast * FAST_PERCENT
    }

    fn difference(&mut self, text: impl FnOnce() -> String) {
        self.differences += 1;
        if self.descriptions.len() < DESCRIBED {
            self.descriptions.push(text());
        }
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} frames, {} differences, {:.2} % of {} that were meant to be fast were",
            self.frames,
            self.differences,
            self.fast_percent(),
            self.meant_fast,
        )?;
        match self.once {
            0 => Ok(()),
            once => write!(f, "; {once} blocks differed once and not again"),
        }
    }
}

/// Send the plan; `progress` sees the summary as it grows.
pub fn run(plan: &Plan, progress: &mut dyn FnMut(&str, &Summary)) -> Result<Summary> {
    let mut devices = devices();
    if let Some(name) = &plan.device {
        let names: Vec<&str> = devices.iter().map(|(name, _)| *name).collect();
        let names = names.join(", ");
        devices.retain(|(known, _)| known == name);
        ensure!(
            !devices.is_empty(),
            "no device is named {name}; there are {names}"
        );
    }
    ensure!(
        plan.only.is_none() || devices.len() == 1,
        "the number of a frame means something together with a device only"
    );
    let blocks = plan
        .frames
        .div_ceil(devices.len() as u64 * u64::from(BLOCK));
    let blocks = u32::try_from(blocks).context("too many frames")?;
    let mut summary = Summary::default();
    std::thread::scope(|scope| {
        // While one device works, the next is made and the one before is removed.
        let mut benches = devices
            .iter()
            .map(|(name, device)| scope.spawn(|| Bench::new(plan.seed, name, device)));
        let mut next = benches.next();
        while let Some(bench) = next.take() {
            let bench = bench.join();
            let mut bench = bench.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            next = benches.next();
            match plan.only {
                Some(number) => bench.repeat(number, &mut summary)?,
                None => {
                    for block in 0..blocks {
                        progress(bench.device, &summary);
                        bench.block(block, &mut summary)?;
                    }
                }
            }
            bench.compare_fdb(&mut summary);
            scope.spawn(|| drop(bench));
        }
        Ok(summary)
    })
}

/// One device under test.
pub struct Bench {
    seed: u64,
    device: &'static str,
    pub twins: Twins,
    counters: Counters,
    grammar: Grammar,
}

/// Growth while some frames went through.
struct Grown {
    outcomes: BTreeMap<&'static str, u64>,
    /// Without the marks of the twins.
    fast: u64,
}

impl Bench {
    pub fn new(seed: u64, name: &'static str, device: &Device) -> Result<Self> {
        let twins = Twins::new(device).with_context(|| format!("device {name}"))?;
        Ok(Self {
            seed,
            device: name,
            counters: Counters::open(twins.daemon.instance())?,
            grammar: Grammar::new(twins.world, seed, name),
            twins,
        })
    }

    /// Put cases in; the growth of the counters.
    fn exchange(&mut self, tap: Tap, cases: &[Case]) -> Result<Grown> {
        let before = self.counters.frames()?;
        let (seen, marks) = self.twins.put_in();
        self.twins.exchange(tap, cases).with_context(|| {
            let log = self.twins.daemon.log();
            let tail: Vec<&str> = log.lines().rev().take(20).collect();
            format!(
                "device {}, daemon's log backwards:\n{}",
                self.device,
                tail.join("\n")
            )
        })?;
        let (seen_now, marks_now) = self.twins.put_in();
        let mut outcomes = self.counters.frames()?;
        for (name, count) in &mut outcomes {
            *count -= before.get(name).copied().unwrap_or(0);
        }
        outcomes.retain(|_, count| *count > 0);
        let sum: u64 = outcomes.values().sum();
        // R42.
        ensure!(
            sum == seen_now - seen,
            "device {}: {} frames went in, {sum} outcomes were counted: {outcomes:?}",
            self.device,
            seen_now - seen
        );
        let fast: u64 = Outcome::ALL
            .iter()
            .filter(|outcome| outcome.is_fast())
            .filter_map(|outcome| outcomes.get(outcome.name()))
            .sum();
        Ok(Grown {
            outcomes,
            fast: fast - (marks_now - marks),
        })
    }

    /// One block of the corpus, see [`Grammar::block`].
    pub fn block(&mut self, block: u32, summary: &mut Summary) -> Result<()> {
        let (tap, is_plain) = Grammar::block(block);
        let first = block * BLOCK;
        let cases: Vec<Case> = (first..first + BLOCK)
            .map(|number| self.grammar.case(number))
            .collect();
        let grown = self.exchange(tap, &cases)?;
        let (mut unexpected, mut slow) = (false, false);
        summary.frames += cases.len() as u64;
        for (name, count) in &grown.outcomes {
            *summary.outcomes.entry(name).or_default() += count;
        }
        if is_plain {
            let meant = cases.iter().filter(|case| case.way == Way::Fast).count() as u64;
            summary.meant_fast += meant;
            summary.fast += grown.fast.min(meant);
            unexpected = grown.fast > meant;
            if grown.fast * 100 < meant * FAST_PERCENT {
                slow = true;
            }
        }
        if unexpected || !self.twins.differences().is_empty() {
            return self.trace(block, &cases, summary);
        }
        if let Err(error) = self.twins.flows(&cases, first as usize) {
            summary.difference(|| {
                format!("device {}, frames from {first} on: {error:#}", self.device)
            });
        }
        if slow {
            self.trace_slow(first, tap, &cases, summary)?;
        }
        Ok(())
    }

    fn trace_slow(
        &mut self,
        first: u32,
        tap: Tap,
        cases: &[Case],
        summary: &mut Summary,
    ) -> Result<()> {
        for (number, case) in (first..).zip(cases) {
            if summary.slow.len() == SLOW_DESCRIBED {
                break;
            }
            if case.way == Way::Fast {
                let grown = self.exchange(tap, std::slice::from_ref(case))?;
                if grown.fast == 0 {
                    summary.slow.push(self.describe(number, case, &grown));
                }
            }
        }
        Ok(())
    }

    /// Which frames of a block make a difference or take the fast path against
    /// expectation, one by one.
    fn trace(&mut self, block: u32, cases: &[Case], summary: &mut Summary) -> Result<()> {
        let together = self.twins.differences();
        if summary.descriptions.len() >= DESCRIBED {
            summary.differences += together.len() as u64;
            return Ok(());
        }
        let (tap, _) = Grammar::block(block);
        let mut traced = 0;
        for (number, case) in (block * BLOCK..).zip(cases) {
            let grown = self.exchange(tap, std::slice::from_ref(case))?;
            let unexpected = case.way == Way::Pass && grown.fast > 0;
            if unexpected || !self.twins.differences().is_empty() {
                traced += 1;
                summary.difference(|| self.describe(number, case, &grown));
            }
        }
        if traced == 0 {
            let lines: Vec<String> = together.iter().map(ToString::to_string).collect();
            let text = format!(
                "device {}, frames {} to {} from {tap:?}, none of them alone:\n  {}",
                self.device,
                block * BLOCK,
                (block + 1) * BLOCK - 1,
                lines.join("\n  ")
            );
            self.exchange(tap, cases)?;
            if self.twins.differences().is_empty() {
                summary.once += 1;
                if summary.descriptions.len() < DESCRIBED {
                    summary
                        .descriptions
                        .push(format!("once, not again: {text}"));
                }
            } else {
                summary.difference(|| text);
            }
        }
        Ok(())
    }

    /// One frame alone, as often as it takes to see that it is always the same.
    fn repeat(&mut self, number: u32, summary: &mut Summary) -> Result<()> {
        let case = self.grammar.case(number);
        let (tap, _) = Grammar::block(number / BLOCK);
        let grown = self.exchange(tap, std::slice::from_ref(&case))?;
        summary.frames += 1;
        summary.meant_fast += u64::from(case.way == Way::Fast);
        summary.fast += grown.fast;
        summary.outcomes = grown.outcomes.clone();
        let text = self.describe(number, &case, &grown);
        if self.twins.differences().is_empty() {
            summary.descriptions.push(text);
        } else {
            summary.difference(|| text);
        }
        Ok(())
    }

    /// Everything about the last exchange, which was of this frame alone.
    fn describe(&self, number: u32, case: &Case, grown: &Grown) -> String {
        let (tap, _) = Grammar::block(number / BLOCK);
        let mut text = format!(
            "device {}, frame {number} from {tap:?}, meant to be {:?}: {}\n  in: {}\n",
            self.device,
            case.way,
            case.what,
            hex(&case.frame)
        );
        for (host, tap, frame) in self.twins.emitted() {
            let _ = writeln!(text, "  {host} host, at {tap:?}: {}", hex(frame));
        }
        let _ = write!(
            text,
            "  outcomes (with those of the marks): {:?}\n  \
             again: cargo xtask test --oracle --seed {} --device {} --only {number}",
            grown.outcomes, self.seed, self.device
        );
        text
    }

    /// R7: at the end both kernels know the same.
    fn compare_fdb(&self, summary: &mut Summary) {
        if let Err(error) = self.twins.compare_fdb() {
            summary.difference(|| format!("device {}, kernel FDB: {error:#}", self.device));
        }
    }
}

/// Long runs of one byte in short: "a5*700".
fn hex(frame: &[u8]) -> String {
    let mut text = String::new();
    for run in frame.chunk_by(|a, b| a == b) {
        let byte = format!("{:02x}", run[0]);
        if run.len() < 16 {
            text.extend(std::iter::repeat_n(byte.as_str(), run.len()));
        } else {
            let _ = write!(text, " {byte}*{} ", run.len());
        }
    }
    text
}

/// The whole run as a test or program sees it: `Err` where it was not good.
pub fn check(plan: &Plan, progress: &mut dyn FnMut(&str, &Summary)) -> Result<String> {
    let start = Instant::now();
    let summary = run(plan, progress)?;
    let line = format!(
        "{summary} (seed {}, {:.0} s)",
        plan.seed,
        start.elapsed().as_secs_f32()
    );
    let good = summary.is_good();
    let mut texts = summary.descriptions;
    if !good {
        texts.extend(
            summary
                .slow
                .into_iter()
                .map(|text| format!("not fast: {text}")),
        );
    }
    let text = texts.join("\n\n");
    if good {
        return Ok(if text.is_empty() {
            line
        } else {
            format!("{text}\n\n{line}")
        });
    }
    bail!("{text}\n\n{line}")
}
