//! A look at every tunnelled frame that comes by on a device: outer and inner
//! checksums, lengths, sizes. And the counters in which a receiving kernel says
//! that it found a wrong checksum.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::frames::Socket;
use crate::netns::Netns;
use crate::segments;

/// Silence after which everything that was sent has come by.
const SILENCE: Duration = Duration::from_millis(100);

/// What came by. All but `frames` are of the inner frames.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    pub frames: u64,
    pub bytes: u64,
    pub tcp_frames: u64,
    pub udp_frames: u64,
    pub largest: usize,
    /// Outer UDP headers with a checksum.
    pub outer_checksums: u64,
    /// What was wrong, a few of them.
    pub wrong: Vec<String>,
    pub wrong_frames: u64,
    /// Not looked at, because they came too fast.
    pub missed: u64,
}

pub struct Wiretap {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Seen>>,
}

impl Wiretap {
    /// Frames that arrive at `device`.
    pub fn start(netns: &Netns, device: &str, udp_port: u16) -> Result<Self> {
        let socket = netns.enter(|| Socket::open(device))?;
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let stop = stop.clone();
            std::thread::spawn(move || look(&socket, udp_port, &stop))
        };
        Ok(Self { stop, thread })
    }

    pub fn finish(self) -> Result<Seen> {
        self.stop.store(true, Ordering::Release);
        match self.thread.join() {
            Ok(seen) => seen,
            Err(_) => bail!("the wiretap panicked"),
        }
    }
}

fn look(socket: &Socket, udp_port: u16, stop: &AtomicBool) -> Result<Seen> {
    let mut seen = Seen::default();
    loop {
        // Asked before the look: what came earlier is still looked at.
        let stopped = stop.load(Ordering::Acquire);
        let Some(frame) = socket.receive(SILENCE)? else {
            if stopped {
                break;
            }
            continue;
        };
        if let Err(error) = seen.add(&frame, udp_port) {
            seen.wrong_frames += 1;
            if seen.wrong.len() < 5 {
                let head: String = frame.iter().take(160).map(|b| format!("{b:02x}")).collect();
                seen.wrong
                    .push(format!("{error:#}: {} bytes {head}", frame.len()));
            }
        }
    }
    seen.missed = socket.missed()?.into();
    Ok(seen)
}

impl Seen {
    fn add(&mut self, frame: &[u8], udp_port: u16) -> Result<()> {
        let Some(inner) = segments::unwrap(frame, udp_port)? else {
            return Ok(());
        };
        self.frames += 1;
        self.bytes += inner.len() as u64;
        self.largest = self.largest.max(inner.len());
        let checksum = frame.len() - inner.len() - 10;
        self.outer_checksums += u64::from(frame[checksum..checksum + 2] != [0, 0]);
        match segments::check(inner).context("inner")?.protocol {
            6 => self.tcp_frames += 1,
            17 => self.udp_frames += 1,
            _ => {}
        }
        Ok(())
    }
}

/// A counter of a namespace's IPv4 stack, as in /proc/net/snmp.
pub fn counter(netns: &Netns, protocol: &str, name: &str) -> Result<u64> {
    // Not /proc/net: that is the namespace of the process.
    let text = netns.enter(|| Ok(std::fs::read_to_string("/proc/thread-self/net/snmp")?))?;
    let mut lines = text
        .lines()
        .filter_map(|line| line.strip_prefix(protocol)?.strip_prefix(": "));
    let (names, values) = (lines.next(), lines.next());
    let mut pairs = names
        .into_iter()
        .flat_map(str::split_whitespace)
        .zip(values.into_iter().flat_map(str::split_whitespace));
    let (_, value) = pairs
        .find(|(key, _)| *key == name)
        .with_context(|| format!("no counter {protocol} {name}"))?;
    Ok(value.parse()?)
}
