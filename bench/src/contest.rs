//! The contestants of one scenario, each in a thread with a network namespace
//! of its own, run in turns.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use vtep_tests::generator::{Generator, Measured, Plan};
use vtep_tests::streams::pin_to_cpu;

use crate::{frames, host};

/// Inner frame without check sequence: 64 bytes on a wire.
const FRAME_BYTES: usize = 60;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Egress,
    Ingress,
}

impl Direction {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Egress => "egress",
            Self::Ingress => "ingress",
        }
    }
}

/// How frames come to the port of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// Plain frames, handed over by the device: the XDP hook.
    Plain,
    /// A port with offloads, so the tcx hook; handed over by the device.
    Offloads,
    /// The same, sent by a socket of the guest.
    OffloadsSocket,
}

impl Port {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Offloads => "offloads",
            Self::OffloadsSocket => "offloads, sent by a socket",
        }
    }

    const fn contestants(self) -> &'static [Contestant] {
        match self {
            Self::Plain => &[
                Contestant::Drop,
                Contestant::Redirect,
                Contestant::Vtep,
                Contestant::Kernel,
            ],
            Self::Offloads => &[Contestant::Drop, Contestant::Vtep, Contestant::Kernel],
            Self::OffloadsSocket => &[Contestant::Vtep, Contestant::Kernel],
        }
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scenario {
    pub direction: Direction,
    pub port: Port,
    /// Number of flows; each has its own pair of MACs and its own ports.
    pub flows: u16,
}

impl Scenario {
    pub fn name(self) -> String {
        let port = match self.port {
            Port::Plain => String::new(),
            port => format!(", port with {}", port.name()),
        };
        format!(
            "{}, {} flow{}{port}",
            self.direction.name(),
            self.flows,
            if self.flows == 1 { "" } else { "s" }
        )
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contestant {
    /// The sink directly at the generator's peer: what the generator costs.
    Drop,
    /// XDP redirect between the same devices, no work: the ceiling.
    Redirect,
    Vtep,
    /// The kernel's bridge and vxlan, br_netfilter off.
    Kernel,
}

impl Contestant {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Drop => "xdp-drop",
            Self::Redirect => "xdp-redirect",
            Self::Vtep => "vtep",
            Self::Kernel => "kernel",
        }
    }
}

pub struct Setup {
    pub vtep: PathBuf,
    pub lab: PathBuf,
    /// Length of one run.
    pub time: Duration,
    pub rounds: u32,
}

/// Frames/s of every run, by contestant.
pub struct Results {
    pub scenario: Scenario,
    pub rates: Vec<(Contestant, Vec<f64>)>,
}

/// A contestant, ready, waiting for its turn.
struct Lane {
    contestant: Contestant,
    go: Sender<()>,
    done: Receiver<Result<Measured>>,
    thread: JoinHandle<()>,
}

impl Lane {
    fn start(setup: &Setup, contestant: Contestant, scenario: Scenario) -> Result<Self> {
        let (go, wait_go) = channel();
        let (report, done) = channel();
        let (vtep, lab, time) = (setup.vtep.clone(), setup.lab.clone(), setup.time);
        let thread = std::thread::spawn(move || {
            let built = Host::build(contestant, scenario, &vtep, &lab);
            let mut host = match built {
                Ok(host) => host,
                Err(error) => {
                    // The receiver is only gone when the run was given up.
                    let _ = report.send(Err(error));
                    return;
                }
            };
            let check = host.check();
            let _ = report.send(check);
            while wait_go.recv().is_ok() {
                let _ = report.send(host.measure(time));
            }
        });
        let lane = Self {
            contestant,
            go,
            done,
            thread,
        };
        lane.done
            .recv()
            .context("contestant thread died")?
            .with_context(|| format!("{}: {}", contestant.name(), scenario.name()))?;
        Ok(lane)
    }

    fn turn(&self) -> Result<Measured> {
        self.go.send(())?;
        self.done.recv()?
    }

    fn finish(self) -> Result<()> {
        drop(self.go);
        if self.thread.join().is_err() {
            bail!("{}: thread panicked", self.contestant.name());
        }
        Ok(())
    }
}

/// Run one scenario.
pub fn run(setup: &Setup, scenario: Scenario, progress: bool) -> Result<Results> {
    let contestants = scenario.port.contestants();
    let lanes = contestants
        .iter()
        .map(|contestant| Lane::start(setup, *contestant, scenario))
        .collect::<Result<Vec<_>>>()?;
    let mut rates: Vec<(Contestant, Vec<f64>)> =
        contestants.iter().map(|c| (*c, Vec::new())).collect();
    let forward: Vec<usize> = (0..lanes.len()).collect();
    let backward: Vec<usize> = forward.iter().rev().copied().collect();
    for round in 0..setup.rounds {
        for order in [&forward, &backward] {
            for &i in order {
                let measured = lanes[i].turn()?;
                rates[i].1.push(measured.rate());
            }
        }
        if progress {
            eprintln!(
                "{}: round {} of {}",
                scenario.name(),
                round + 1,
                setup.rounds
            );
        }
    }
    lanes.into_iter().try_for_each(Lane::finish)?;
    Ok(Results { scenario, rates })
}

struct Host {
    contestant: Contestant,
    port: Port,
    generator: Generator,
    /// Sends in the generator's place.
    socket: Option<host::Sender>,
    frame: Vec<u8>,
    daemon: Option<Daemon>,
}

impl Host {
    fn build(contestant: Contestant, scenario: Scenario, vtep: &Path, lab: &Path) -> Result<Self> {
        pin_to_cpu(0);
        host::enter_new_namespace()?;
        let Scenario {
            direction,
            port,
            flows,
        } = scenario;
        host::make_wires(port)?;
        let (inject, near, far) = match direction {
            Direction::Egress => (host::VM, host::PORT, host::WIRE),
            Direction::Ingress => (host::WIRE, host::UPLINK, host::VM),
        };
        let ends = match direction {
            Direction::Egress => [host::LOCAL_MAC, host::REMOTE_MAC],
            Direction::Ingress => [host::REMOTE_MAC, host::LOCAL_MAC],
        };
        // As guests send them; the outer one depends on it where both are to be right.
        let inner_checksum = port != Port::Plain && flows == 1;
        let inner = frames::plain(ends[0], ends[1], FRAME_BYTES, inner_checksum);
        let (frame, inner_at) = match direction {
            Direction::Egress => (inner, 0),
            Direction::Ingress => (
                frames::encapsulated(&inner, flows == 1),
                frames::OUTER_BYTES,
            ),
        };
        // Last two bytes of both MACs, and the inner UDP source port.
        let plan = Plan {
            flows: flows.into(),
            ifindex: host::ifindex(inject)?,
            first_mac_at: inner_at + 4,
            second_mac_at: inner_at + 10,
            port_at: inner_at + 34,
            pad: 0,
        };
        let sink = if contestant == Contestant::Drop {
            near
        } else {
            far
        };
        let mut generator = Generator::load(lab)?;
        generator.set_plan(plan)?;
        // A program on a veth makes the kernel copy what is no XDP frame: it would be a cost of
        // the sink that hides the way.
        if port == Port::Plain || contestant == Contestant::Drop {
            generator.attach_sink(sink)?;
        }
        let mut daemon = None;
        match contestant {
            Contestant::Drop => {}
            Contestant::Redirect => {
                let to = match direction {
                    Direction::Egress => host::UPLINK,
                    Direction::Ingress => host::PORT,
                };
                generator.redirect(near, host::ifindex(to)?)?;
            }
            Contestant::Kernel => host::make_segment(flows)?,
            Contestant::Vtep => {
                host::make_segment(flows)?;
                daemon = Some(Daemon::start(vtep, scenario)?);
            }
        }
        let socket = match port {
            Port::OffloadsSocket => Some(host::Sender::open(FRAME_BYTES)?),
            _ => None,
        };
        Ok(Self {
            contestant,
            port,
            generator,
            socket,
            frame,
            daemon,
        })
    }

    /// One run. What did not arrive would make the rate a lie.
    fn measure(&mut self, time: Duration) -> Result<Measured> {
        let before = self.received()?;
        let measured = match &mut self.socket {
            None => self.generator.run(&self.frame, time)?,
            Some(socket) => {
                let (sent_frames, elapsed) = socket.run(time)?;
                Measured {
                    sent_frames,
                    received_frames: 0,
                    elapsed,
                }
            }
        };
        let measured = Measured {
            received_frames: self.received()? - before,
            ..measured
        };
        let Measured {
            sent_frames,
            received_frames,
            ..
        } = measured;
        ensure!(
            received_frames * 1000 >= sent_frames * 999,
            "{}: {received_frames} of {sent_frames} frames arrived",
            self.contestant.name()
        );
        Ok(measured)
    }

    /// Before anything is timed: every frame of a small burst must arrive, and
    /// the accelerated contestant must have carried it itself.
    fn check(&mut self) -> Result<Measured> {
        let start = Instant::now();
        let before = self.received()?;
        match &mut self.socket {
            None => self.generator.burst(&self.frame, 64)?,
            Some(socket) => socket.burst()?,
        }
        while self.received()? < before + 64 {
            ensure!(
                start.elapsed() < Duration::from_secs(2),
                "{} of 64 frames arrived",
                self.received()? - before
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        if let Some(daemon) = &self.daemon {
            let fast = daemon.fast_frames()?;
            ensure!(
                fast >= 64,
                "only {fast} of 64 frames took the fast path: {}",
                daemon.query("stats")?["segments"]
            );
        }
        Ok(Measured {
            sent_frames: 64,
            received_frames: self.received()? - before,
            elapsed: start.elapsed(),
        })
    }

    /// Frames that arrived so far.
    fn received(&self) -> Result<u64> {
        if self.port == Port::Plain || self.contestant == Contestant::Drop {
            return Ok(self.generator.counters()?[1]);
        }
        host::received(host::WIRE)
    }
}

/// The real daemon on this namespace.
struct Daemon {
    vtep: PathBuf,
    instance: String,
    child: Child,
    _config: tempfile::NamedTempFile,
}

impl Daemon {
    fn start(vtep: &Path, scenario: Scenario) -> Result<Self> {
        let config = tempfile::NamedTempFile::new()?;
        let hook = match scenario.port {
            Port::Plain => "xdp",
            Port::Offloads | Port::OffloadsSocket => "auto",
        };
        std::fs::write(
            config.path(),
            format!("[ports.{}]\nhook = \"{hook}\"\n", host::PORT),
        )?;
        let instance = format!(
            "bench-{}-{}-{}-{}",
            std::process::id(),
            scenario.direction.name(),
            scenario.flows,
            scenario.port as u8
        );
        let child = Command::new(vtep)
            .args(["--instance", &instance, "--netns"])
            .arg(host::namespace_path())
            .args(["run", "--config"])
            .arg(config.path())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| vtep.display().to_string())?;
        let daemon = Self {
            vtep: vtep.to_owned(),
            instance,
            child,
            _config: config,
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match daemon.query("status") {
                Ok(status) if ready(&status, 2 * u64::from(scenario.flows)) => return Ok(daemon),
                last if Instant::now() > deadline => {
                    bail!("vtep did not become ready: {last:?}")
                }
                _ => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    fn query(&self, what: &str) -> Result<Value> {
        let output = Command::new(&self.vtep)
            .args(["--json", "--instance", &self.instance, what])
            .output()?;
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    fn fast_frames(&self) -> Result<u64> {
        let stats = self.query("stats")?;
        Ok(["ingress-local", "egress-remote"]
            .iter()
            .filter_map(|name| stats["outcomes"][name]["frames"].as_u64())
            .sum())
    }

    /// Whatever it got to: nothing is left behind.
    fn stop(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        let output = Command::new(&self.vtep)
            .args(["--instance", &self.instance, "unload"])
            .output()?;
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("{}: {error:#}", self.instance);
        }
    }
}

/// Ready, with uplink and port on the fast path and all entries in the maps.
fn ready(status: &Value, entries: u64) -> bool {
    let all = |list: &Value| {
        list.as_array().is_some_and(|rows| {
            !rows.is_empty()
                && rows
                    .iter()
                    .all(|row| row["accelerated"] == Value::Bool(true))
        })
    };
    let held = status["counters"]["fdb_entries"]
        .as_u64()
        .is_some_and(|held| held >= entries);
    held && status["ready"] == Value::Bool(true) && all(&status["uplinks"]) && all(&status["ports"])
}
