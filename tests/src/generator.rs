//! Generator and sink: the kernel's own XDP machinery in "live frames" mode
//! (BPF_F_TEST_XDP_LIVE_FRAMES, Linux 5.18) redirects frames into one end of a
//! veth; an XDP program at the far end of the way counts and drops them.
//! Both are counted, so that what was offered and what arrived are both known.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use aya::maps::{Array, DevMapHash, MapData, PerCpuArray};
use aya::programs::{TestRun as _, TestRunAttrs, TestRunOptions, Xdp, XdpMode};
use aya::{Ebpf, Pod};
use vtep_common::layout::Counter;

/// Frames per syscall: long enough to hide the syscall, short enough to stop.
const BURST_FRAMES: u32 = 1 << 18;
/// Frames the kernel hands over at a time, as a NIC driver would.
const BATCH_FRAMES: u32 = 64;

/// What varies from frame to frame: layout of `Plan` in `vtep-ebpf/src/lab.rs`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Plan {
    /// Frames alternate over this many flows; 0 and 1: all alike.
    pub flows: u32,
    /// Device the frames are sent to.
    pub ifindex: u32,
    /// Offsets (bytes) of 16-bit fields that count up with the flow; 0: none.
    pub first_mac_at: u32,
    pub second_mac_at: u32,
    pub port_at: u32,
    pub pad: u32,
}

// SAFETY: plain integers without padding.
unsafe impl Pod for Plan {}

/// Frames seen at both ends in a time.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    pub sent_frames: u64,
    pub received_frames: u64,
    pub elapsed: Duration,
}

/// The laboratory's eBPF object: in VTEP_EBPF_DIR, or where `cargo xtask build`
/// leaves it.
pub fn object() -> PathBuf {
    let default =
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/ebpf/bpfel-unknown-none/release");
    std::env::var_os("VTEP_EBPF_DIR")
        .map_or_else(default, PathBuf::from)
        .join("lab")
}

impl Measured {
    /// Frames per second that arrived.
    pub fn rate(&self) -> f64 {
        self.received_frames as f64 / self.elapsed.as_secs_f64()
    }
}

/// The laboratory object with its programs attached.
pub struct Generator {
    ebpf: Ebpf,
}

impl Generator {
    /// Loads the object; nothing is attached yet.
    pub fn load(object: &Path) -> Result<Self> {
        let mut ebpf = Ebpf::load_file(object)
            .with_context(|| format!("{}: run `cargo xtask build`", object.display()))?;
        for name in ["lab_generate", "lab_sink", "lab_redirect", "lab_pass"] {
            program(&mut ebpf, name)?.load()?;
        }
        Ok(Self { ebpf })
    }

    /// What is sent, and where to; `plan.ifindex` is a device of the caller's
    /// network namespace, and frames go into it as if they came to its peer.
    pub fn set_plan(&mut self, plan: Plan) -> Result<()> {
        let mut plans: Array<&mut MapData, Plan> = self.map("LAB_PLAN")?;
        plans.set(0, plan, 0)?;
        let mut ports: DevMapHash<&mut MapData> = self.map("LAB_PORTS")?;
        ports.insert(plan.ifindex, plan.ifindex, None, 0)?;
        Ok(())
    }

    /// Count and drop what arrives at a device of the caller's network namespace,
    /// until the generator is dropped.
    pub fn attach_sink(&mut self, device: &str) -> Result<()> {
        self.attach("lab_sink", device)
    }

    /// Plain redirect of everything that arrives at `device`.
    pub fn redirect(&mut self, device: &str, to: u32) -> Result<()> {
        let mut ports: DevMapHash<&mut MapData> = self.map("LAB_PORTS")?;
        // The key beside the generator's: lab_redirect looks its target up under 0.
        ports.insert(0, to, None, 0)?;
        self.attach("lab_redirect", device)
    }

    fn map<'a, T>(&'a mut self, name: &str) -> Result<T>
    where
        T: TryFrom<&'a mut aya::maps::Map, Error = aya::maps::MapError>,
    {
        Ok(T::try_from(
            self.ebpf
                .map_mut(name)
                .with_context(|| format!("map {name}"))?,
        )?)
    }

    /// Attach one of the object's programs in the driver.
    pub fn attach(&mut self, name: &str, device: &str) -> Result<()> {
        program(&mut self.ebpf, name)?
            .attach(device, XdpMode::Driver)
            .with_context(|| format!("attach {name} to {device}"))?;
        Ok(())
    }

    /// Send `frame` for at least `time`, on the CPU the caller is pinned to.
    pub fn run(&mut self, frame: &[u8], time: Duration) -> Result<Measured> {
        let before = self.counters()?;
        let start = Instant::now();
        while start.elapsed() < time {
            self.burst(frame, BURST_FRAMES)?;
        }
        let elapsed = start.elapsed();
        let after = self.counters()?;
        Ok(Measured {
            sent_frames: after[0] - before[0],
            received_frames: after[1] - before[1],
            elapsed,
        })
    }

    /// Send exactly `frames` frames.
    pub fn burst(&mut self, frame: &[u8], frames: u32) -> Result<()> {
        let program: &Xdp = self
            .ebpf
            .program("lab_generate")
            .context("lab_generate")?
            .try_into()?;
        program
            .test_run(TestRunOptions {
                data_in: Some(frame),
                repeat: frames,
                attrs: TestRunAttrs::new().xdp_live_frames(BATCH_FRAMES),
                ..TestRunOptions::new()
            })
            .context("live frames need Linux 5.18 or newer")?;
        Ok(())
    }

    /// Frames generated and frames received so far.
    pub fn counters(&self) -> Result<[u64; 2]> {
        let counters: PerCpuArray<_, Counter> = self
            .ebpf
            .map("LAB_COUNT")
            .context("LAB_COUNT")?
            .try_into()?;
        let mut sums = [0; 2];
        for (index, sum) in sums.iter_mut().enumerate() {
            *sum = counters
                .get(&(index as u32), 0)?
                .iter()
                .map(|c| c.frames)
                .sum();
        }
        Ok(sums)
    }
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp> {
    Ok(ebpf
        .program_mut(name)
        .with_context(|| format!("program {name}"))?
        .try_into()?)
}
