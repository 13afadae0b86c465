//! Generator and sink: the kernel's own XDP machinery in "live frames" mode
//! (BPF_F_TEST_XDP_LIVE_FRAMES, Linux 5.18) redirects frames into one end of a
//! veth; an XDP program at the far end of the way counts and drops them.
//! Both are counted, so that what was offered and what arrived are both known.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
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
    /// Loads the object and attaches the sink to `sink` and, where the ceiling
    /// is measured, plain redirects. Runs in the caller's network namespace.
    pub fn new(object: &Path, sink: &str, plan: Plan) -> Result<Self> {
        let mut ebpf = Ebpf::load_file(object)
            .with_context(|| format!("{}: run `cargo xtask build`", object.display()))?;
        for name in ["lab_generate", "lab_sink", "lab_redirect", "lab_pass"] {
            program(&mut ebpf, name)?.load()?;
        }
        let mut generator = Self { ebpf };
        generator.attach("lab_sink", sink)?;
        let mut plans: Array<&mut MapData, Plan> = generator.map("LAB_PLAN")?;
        plans.set(0, plan, 0)?;
        let mut ports: DevMapHash<&mut MapData> = generator.map("LAB_PORTS")?;
        ports.insert(plan.ifindex, plan.ifindex, None, 0)?;
        Ok(generator)
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

/// Run the calling thread, and with it the whole way of the frames, on one CPU.
pub fn pin_to_cpu(cpu: usize) -> Result<()> {
    // SAFETY: cpu_set_t is a plain bit set; all zero is the empty one.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: `cpu` is below CPU_SETSIZE for any machine this runs on.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: `set` lives for the call.
    let status = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) };
    ensure!(
        status == 0,
        "cannot pin to CPU {cpu}: {}",
        std::io::Error::last_os_error()
    );
    Ok(())
}
