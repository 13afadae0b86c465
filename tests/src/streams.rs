//! Traffic that notices what is lost: a sequence-numbered frame stream between
//! two devices, and a TCP session that must live on.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::frames::{Socket, ethernet, ipv4_udp};
use crate::lab::Vm;
use crate::netns::Netns;

/// UDP port of the stream.
const PORT: u16 = 4000;
/// Frames per system call.
const BATCH: usize = 32;

/// What became of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StreamReport {
    pub sent_frames: u64,
    pub received_frames: u64,
    pub lost_frames: u64,
    pub duplicated_frames: u64,
    pub reordered_frames: u64,
    pub longest_gap: Duration,
}

/// Pin the calling thread.
pub fn pin_to_cpu(cpu: usize) {
    // SAFETY: cpu_set_t is a plain bit set; all zero is the empty one.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: `cpu` is below CPU_SETSIZE for any machine this runs on.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: `set` lives for the call. Failing (no such CPU) leaves the thread unpinned.
    unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) };
}

/// Numbered UDP frames from one VM's device to another's, at a steady rate. One
/// thread sends, on one CPU, so that the sender itself never reorders.
pub struct Stream {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    received: Arc<AtomicU64>,
    sender: JoinHandle<Result<()>>,
    receiver: JoinHandle<Result<StreamReport>>,
}

impl Stream {
    /// Starts sending at `rate` frames/s.
    pub fn start(from: &Vm, to: &Vm, rate: u32) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(AtomicBool::new(false));
        let sent = Arc::new(AtomicU64::new(0));
        let received = Arc::new(AtomicU64::new(0));
        let receive_socket = to.netns.enter(|| Socket::open("eth0"))?;
        let send_socket = from.netns.enter(|| Socket::open("eth0"))?;
        let receiver = {
            let (done, received) = (done.clone(), received.clone());
            std::thread::spawn(move || receive(&receive_socket, &done, &received))
        };
        let (source, destination) = (from.address.octets(), to.address.octets());
        let frame = |number: u64| {
            let packet = ipv4_udp(source, destination, [PORT, PORT], &number.to_be_bytes());
            let mut frame = ethernet(from.mac, to.mac, 0x0800, &packet);
            // The number changes under a checksum that is not kept: none.
            frame[40..42].fill(0);
            frame.resize(60, 0);
            frame
        };
        let frames: Vec<Vec<u8>> = (0..BATCH as u64).map(frame).collect();
        let sender = {
            let (stop, sent) = (stop.clone(), sent.clone());
            std::thread::spawn(move || {
                pin_to_cpu(0);
                let result = send(&send_socket, frames, rate, &stop, &sent);
                // Let the last frames arrive before the receiver ends.
                std::thread::sleep(Duration::from_millis(300));
                done.store(true, Ordering::Release);
                result
            })
        };
        Ok(Self {
            stop,
            sent,
            received,
            sender,
            receiver,
        })
    }

    pub fn sent_frames(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    pub fn received_frames(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Stop sending, wait for the last frames, count.
    pub fn finish(self) -> Result<StreamReport> {
        self.stop.store(true, Ordering::Release);
        let sender = self.sender.join();
        let receiver = self.receiver.join();
        match (sender, receiver) {
            (Ok(Ok(())), Ok(Ok(report))) => {
                let sent_frames = self.sent.load(Ordering::Relaxed);
                let arrived = report.received_frames - report.duplicated_frames;
                Ok(StreamReport {
                    sent_frames,
                    lost_frames: sent_frames - arrived,
                    ..report
                })
            }
            (Ok(Err(error)), _) | (_, Ok(Err(error))) => Err(error),
            _ => bail!("a stream thread panicked"),
        }
    }
}

fn send(
    socket: &Socket,
    mut frames: Vec<Vec<u8>>,
    rate: u32,
    stop: &AtomicBool,
    sent: &AtomicU64,
) -> Result<()> {
    let interval = Duration::from_secs_f64(BATCH as f64 / f64::from(rate));
    let mut due = Instant::now();
    let mut next = 0u64;
    while !stop.load(Ordering::Acquire) {
        let now = Instant::now();
        if now < due {
            std::thread::sleep(due - now);
            continue;
        }
        // A sender that was held up does not catch up in one burst: the rings of
        // virtual devices hold 256 frames, and what overflows there would be its fault.
        due = if now - due > 2 * interval {
            now + interval
        } else {
            due + interval
        };
        for (i, frame) in frames.iter_mut().enumerate() {
            frame[42..50].copy_from_slice(&(next + i as u64).to_be_bytes());
        }
        next += socket.send_batch(&frames)? as u64;
        sent.store(next, Ordering::Relaxed);
    }
    Ok(())
}

fn receive(socket: &Socket, done: &AtomicBool, received: &AtomicU64) -> Result<StreamReport> {
    let mut report = StreamReport::default();
    let mut seen: Vec<u64> = Vec::new();
    let mut highest: Option<u64> = None;
    let mut last = Instant::now();
    loop {
        let finished = done.load(Ordering::Acquire);
        let batch = socket.receive_batch(Duration::from_millis(20))?;
        // Other traffic may go on; the stream is over when none of it came for a while.
        if finished && last.elapsed() > Duration::from_millis(100) {
            return Ok(report);
        }
        for frame in batch {
            if frame.len() < 50 || frame[36..38] != PORT.to_be_bytes() || frame[12..14] != [8, 0] {
                continue;
            }
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&frame[42..50]);
            let number = u64::from_be_bytes(bytes);
            let now = Instant::now();
            if report.received_frames > 0 {
                report.longest_gap = report.longest_gap.max(now - last);
            }
            last = now;
            report.received_frames += 1;
            received.store(report.received_frames, Ordering::Relaxed);
            let (word, bit) = ((number / 64) as usize, 1u64 << (number % 64));
            if seen.len() <= word {
                seen.resize(word + 1024, 0);
            }
            if seen[word] & bit != 0 {
                report.duplicated_frames += 1;
                continue;
            }
            seen[word] |= bit;
            if highest.is_some_and(|h| number < h) {
                report.reordered_frames += 1;
            }
            highest = Some(highest.map_or(number, |h| h.max(number)));
        }
    }
}

/// What became of a TCP session.
#[derive(Debug, Clone, Copy)]
pub struct SessionReport {
    pub round_trips: u64,
    pub longest_gap: Duration,
}

/// One TCP connection on which a small request is echoed every few
/// milliseconds; an error or a wrong byte ends it.
pub struct Session {
    stop: Arc<AtomicBool>,
    round_trips: Arc<AtomicU64>,
    client: JoinHandle<Result<SessionReport>>,
}

impl Session {
    /// Client in `from`, server in `to`.
    pub fn start(from: &Vm, to: &Vm) -> Result<Self> {
        let address = SocketAddr::from((to.address, 7));
        let listener = to.netns.enter(|| {
            TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 7))).context("listen")
        })?;
        std::thread::spawn(move || -> Result<()> {
            let (mut stream, _) = listener.accept()?;
            stream.set_nodelay(true)?;
            let mut buffer = [0; 4096];
            loop {
                let n = stream.read(&mut buffer)?;
                if n == 0 {
                    return Ok(());
                }
                stream.write_all(&buffer[..n])?;
            }
        });
        let stream = from.netns.enter(|| {
            TcpStream::connect_timeout(&address, Duration::from_secs(5)).context("connect")
        })?;
        let stop = Arc::new(AtomicBool::new(false));
        let round_trips = Arc::new(AtomicU64::new(0));
        let client = {
            let (stop, round_trips) = (stop.clone(), round_trips.clone());
            std::thread::spawn(move || talk(stream, &stop, &round_trips))
        };
        Ok(Self {
            stop,
            round_trips,
            client,
        })
    }

    pub fn round_trips(&self) -> u64 {
        self.round_trips.load(Ordering::Relaxed)
    }

    /// End it properly; an error where it had died.
    pub fn finish(self) -> Result<SessionReport> {
        self.stop.store(true, Ordering::Release);
        match self.client.join() {
            Ok(result) => result.context("TCP session"),
            Err(_) => bail!("the session's thread panicked"),
        }
    }
}

fn talk(
    mut stream: TcpStream,
    stop: &AtomicBool,
    round_trips: &AtomicU64,
) -> Result<SessionReport> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut report = SessionReport {
        round_trips: 0,
        longest_gap: Duration::ZERO,
    };
    while !stop.load(Ordering::Acquire) {
        let request = report.round_trips.to_be_bytes();
        let start = Instant::now();
        stream.write_all(&request)?;
        let mut answer = [0; 8];
        stream.read_exact(&mut answer)?;
        if answer != request {
            bail!("request {} came back as {answer:?}", report.round_trips);
        }
        report.longest_gap = report.longest_gap.max(start.elapsed());
        report.round_trips += 1;
        round_trips.store(report.round_trips, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(report)
}

/// What a sender writes at an offset, so that nothing lost, doubled or swapped
/// goes unnoticed.
fn pattern(at: usize) -> u8 {
    (at ^ (at >> 8) ^ (at >> 16)) as u8
}

/// A TCP connection from one namespace to another, without delay and with a
/// limit to all waiting.
pub fn connect(from: &Netns, to: &Netns, address: IpAddr) -> Result<(TcpStream, TcpStream)> {
    let limit = Duration::from_secs(10);
    let listener = to.enter(|| {
        let any: IpAddr = match address {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        TcpListener::bind((any, 0)).context("listen")
    })?;
    let to = SocketAddr::from((address, listener.local_addr()?.port()));
    let near = from.enter(|| TcpStream::connect_timeout(&to, limit).context("connect"))?;
    let (far, _) = listener.accept()?;
    for stream in [&near, &far] {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
    }
    Ok((near, far))
}

/// Move `bytes` over a connection and look at every one of them.
pub fn transfer(mut from: &TcpStream, mut to: &TcpStream, bytes: usize) -> Result<()> {
    const CHUNK: usize = 256 << 10;
    let data: Vec<u8> = (0..bytes).map(pattern).collect();
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| -> Result<()> {
            for chunk in data.chunks(CHUNK) {
                from.write_all(chunk).context("send")?;
            }
            Ok(())
        });
        let mut received = vec![0; bytes];
        let result = to.read_exact(&mut received).context("receive");
        let sent = sender
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        result.and(sent)?;
        match received
            .iter()
            .zip(&data)
            .position(|(got, sent)| got != sent)
        {
            Some(at) => bail!("byte {at} of {bytes} is another one"),
            None => Ok(()),
        }
    })
}
