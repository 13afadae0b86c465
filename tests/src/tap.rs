//! An owner of a tap, as a hypervisor is one. Its guest is a namespace whose
//! `eth0` is a second tap, so that a real TCP stack exchanges unfinished
//! checksums and superframes with the host.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::netns::Netns;
use crate::vnet::{Checksum, HEADER_BYTES, Header};

/// What owners of today's machines take (QEMU with `csum`, `guest_tso4`, ..).
const OFFLOADS: u32 = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
/// Linux 6.2 and later.
const USO: u32 = libc::TUN_F_USO4 | libc::TUN_F_USO6;
/// Largest frame with its header.
const BUFFER_BYTES: usize = HEADER_BYTES + 14 + 65536;

/// A tap whose frames carry virtio-net headers; it is gone when dropped.
#[derive(Debug)]
struct Tap {
    file: File,
}

impl Tap {
    /// Make the device in the caller's namespace. The owner takes frames with
    /// unfinished checksums and superframes.
    fn open(name: &str) -> Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .context("/dev/net/tun")?;
        // SAFETY: all zero is a valid request.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        ensure!(
            name.len() < libc::IFNAMSIZ,
            "{name} is too long for a device"
        );
        for (to, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = byte as libc::c_char;
        }
        request.ifr_ifru.ifru_flags =
            (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one ifreq.
        let status = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        ensure!(status == 0, "tap {name}: {}", io::Error::last_os_error());
        let this = Self { file };
        if this.take(OFFLOADS | USO).is_err() {
            this.take(OFFLOADS)
                .with_context(|| format!("offloads of tap {name}"))?;
        }
        // SAFETY: changes the flags of an open descriptor.
        let status = unsafe { libc::fcntl(this.file.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
        ensure!(status == 0, "tap {name}: {}", io::Error::last_os_error());
        Ok(this)
    }

    fn take(&self, offloads: u32) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes a number.
        match unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(offloads),
            )
        } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn decode(bytes: &[u8]) -> Result<Header> {
    let header = bytes.first_chunk().context("no virtio-net header")?;
    Ok(Header::decode(header)?)
}

fn readable(file: &File) -> libc::pollfd {
    libc::pollfd {
        fd: file.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    }
}

fn poll(files: &mut [libc::pollfd], time: Duration) -> Result<i32> {
    let count = files.len() as libc::nfds_t;
    // SAFETY: `files` is of that length.
    let ready = unsafe { libc::poll(files.as_mut_ptr(), count, time.as_millis() as i32) };
    ensure!(ready >= 0, "poll: {}", io::Error::last_os_error());
    Ok(ready)
}

/// Frames in one direction, as they crossed the tap.
#[derive(Debug, Default)]
pub struct Counts {
    frames: AtomicU64,
    bytes: AtomicU64,
    /// With an unfinished checksum.
    partial: AtomicU64,
    superframes: AtomicU64,
    /// The receiving device did not take them.
    refused: AtomicU64,
}

/// Values of [`Counts`] at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counted {
    pub frames: u64,
    pub bytes: u64,
    pub partial: u64,
    pub superframes: u64,
    pub refused: u64,
}

impl Counts {
    fn get(&self) -> Counted {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counted {
            frames: value(&self.frames),
            bytes: value(&self.bytes),
            partial: value(&self.partial),
            superframes: value(&self.superframes),
            refused: value(&self.refused),
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    from_guest: Counts,
    to_guest: Counts,
}

/// The hypervisor of one guest; both taps are gone when it is dropped.
#[derive(Debug)]
pub struct Machine {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Machine {
    /// Make `eth0` in the guest's and `port` in the host's namespace, and hand
    /// frames to and fro.
    pub fn start(guest: &Netns, host: &Netns, port: &str) -> Result<Self> {
        let taps = [
            guest.enter(|| Tap::open("eth0"))?,
            host.enter(|| Tap::open(port))?,
        ];
        let shared = Arc::new(Shared::default());
        let thread = {
            let shared = shared.clone();
            std::thread::spawn(move || relay(&taps, &shared))
        };
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    pub fn from_guest(&self) -> Counted {
        self.shared.from_guest.get()
    }

    pub fn to_guest(&self) -> Counted {
        self.shared.to_guest.get()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        if let Some(Ok(Err(error))) = ended {
            crate::complain(&format!("the owner of a tap ended: {error:#}"));
        }
    }
}

/// Frames per look at the other side.
const BUDGET: usize = 64;

fn relay(taps: &[Tap; 2], shared: &Shared) -> Result<()> {
    let [guest, host] = taps;
    let mut buffer = vec![0; BUFFER_BYTES];
    while !shared.stop.load(Ordering::Relaxed) {
        poll(
            &mut [readable(&guest.file), readable(&host.file)],
            Duration::from_millis(20),
        )?;
        for (from, to, counts) in [
            (guest, host, &shared.from_guest),
            (host, guest, &shared.to_guest),
        ] {
            for _ in 0..BUDGET {
                let n = match (&from.file).read(&mut buffer) {
                    Ok(n) => n,
                    Err(error) if is_down(&error) => break,
                    Err(error) => return Err(error).context("read from a tap"),
                };
                let header = decode(&buffer[..n])?;
                let add = |counter: &AtomicU64, n: usize| {
                    counter.fetch_add(n as u64, Ordering::Relaxed);
                };
                add(&counts.frames, 1);
                add(&counts.bytes, n - HEADER_BYTES);
                let partial = matches!(header.checksum, Checksum::Partial { .. });
                add(&counts.partial, usize::from(partial));
                add(&counts.superframes, usize::from(header.gso.is_some()));
                match (&to.file).write(&buffer[..n]) {
                    Ok(written) if written == n => {}
                    Ok(written) => bail!("a tap took {written} of {n} bytes"),
                    Err(error) if is_down(&error) => add(&counts.refused, 1),
                    Err(error) => return Err(error).context("write to a tap"),
                }
            }
        }
    }
    Ok(())
}

/// Nothing there, or the device is down or gone.
fn is_down(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAGAIN | libc::EIO | libc::EBADFD | libc::ENODEV)
    )
}
