//! One host under test in an anonymous network namespace: an uplink, a bridge
//! with a VXLAN device, a VM's port. The far ends of both veths are in the same
//! namespace and carry the generator on one side and the sink on the other.

use std::ffi::CString;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use vtep_common::MacAddr;

use crate::contest::Port;

pub const VNI: u32 = 100;
pub const UPLINK_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0xff, 1]);
pub const ROUTER_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0xff, 2]);
/// First MAC of the VMs at the port and of the VMs behind the remote; the last
/// two bytes count up.
pub const LOCAL_MAC: MacAddr = MacAddr([2, 0, 0, 1, 0, 0]);
pub const REMOTE_MAC: MacAddr = MacAddr([2, 0, 0, 2, 0, 0]);
pub const LOCAL_IP: [u8; 4] = [192, 0, 2, 2];
pub const REMOTE_IP: [u8; 4] = [198, 51, 100, 2];

/// Devices: the host's ends, and the far ends.
pub const UPLINK: &str = "uplink0";
pub const WIRE: &str = "wire0";
pub const PORT: &str = "port0";
pub const VM: &str = "vm0";

/// Move this thread into a new network namespace, in which nothing but the
/// benchmark's frames moves.
pub fn enter_new_namespace() -> Result<()> {
    // SAFETY: affects the calling thread only.
    let status = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    ensure!(
        status == 0,
        "a new network namespace needs root: {}",
        std::io::Error::last_os_error()
    );
    set("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1")?;
    for filter in ["iptables", "ip6tables", "arptables"] {
        let path = format!("/proc/sys/net/bridge/bridge-nf-call-{filter}");
        if std::path::Path::new(&path).exists() {
            set(&path, "0")?;
        }
    }
    Ok(())
}

/// This thread's namespace, as other processes can open it.
pub fn namespace_path() -> PathBuf {
    // SAFETY: no arguments, no memory.
    let thread = unsafe { libc::gettid() };
    PathBuf::from(format!("/proc/{}/task/{thread}/ns/net", std::process::id()))
}

fn set(path: &str, value: &str) -> Result<()> {
    std::fs::write(path, value).with_context(|| format!("write {value} to {path}"))
}

pub fn run(line: &str) -> Result<()> {
    let mut words = line.split_whitespace();
    let program = words.next().context("empty command")?;
    let output = Command::new(program)
        .args(words)
        .output()
        .with_context(|| line.to_owned())?;
    ensure!(
        output.status.success(),
        "`{line}`: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

pub fn ifindex(name: &str) -> Result<u32> {
    let c_name = CString::new(name)?;
    // SAFETY: a valid C string.
    let index = unsafe { libc::if_nametoindex(c_name.as_ptr()) };
    ensure!(index != 0, "no device {name}");
    Ok(index)
}

/// The veths alone: what every contestant has in common. Uplinks carry
/// wire-sized frames, and GRO is on so that redirected frames are received.
pub fn make_wires(port: Port) -> Result<()> {
    let veths = [(UPLINK, WIRE, true), (PORT, VM, port == Port::Plain)];
    for (host, far, plain) in veths {
        run(&format!("ip link add {host} type veth peer name {far}"))?;
        for end in [host, far] {
            if plain {
                run(&format!(
                    "ethtool -K {end} tso off gso off tx off txvlan off"
                ))?;
            }
            run(&format!("ip link set {end} up"))?;
        }
        // Only now: an end that is down does not tell the other that it polls.
        for end in [host, far] {
            run(&format!("ethtool -K {end} gro on"))?;
        }
    }
    Ok(())
}

/// Frames that a device has received.
pub fn received(device: &str) -> Result<u64> {
    let output = Command::new("ip")
        .args(["-json", "-statistics", "link", "show", "dev", device])
        .output()?;
    let links: Value = serde_json::from_slice(&output.stdout)?;
    let frames = links[0]["stats64"]["rx"]["packets"].as_u64();
    frames.with_context(|| format!("no counters of {device}"))
}

/// A socket of the guest that sends as fast as it can.
pub struct Sender {
    socket: UdpSocket,
    payload: Vec<u8>,
}

/// Frames per system call.
const BATCH: usize = 64;

impl Sender {
    /// Of frames of `frame_bytes`, from the first local to the first remote VM.
    pub fn open(frame_bytes: usize) -> Result<Self> {
        let (from, to) = ([10, 0, 0, 1], [10, 0, 0, 2]);
        run(&format!("ip link set {VM} address {LOCAL_MAC}"))?;
        run(&format!("ip addr add {}/24 dev {VM}", Ipv4Addr::from(from)))?;
        run(&format!(
            "ip neigh replace {} lladdr {REMOTE_MAC} dev {VM} nud permanent",
            Ipv4Addr::from(to)
        ))?;
        let socket = UdpSocket::bind((Ipv4Addr::from(from), 1000))?;
        socket.connect((Ipv4Addr::from(to), 2000))?;
        Ok(Self {
            socket,
            payload: vec![0x5a; frame_bytes - 42],
        })
    }

    /// Send `BATCH` frames.
    pub fn burst(&mut self) -> Result<()> {
        let mut vector = libc::iovec {
            iov_base: self.payload.as_mut_ptr().cast(),
            iov_len: self.payload.len(),
        };
        // SAFETY: all zero is a valid header.
        let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
        message.msg_hdr.msg_iov = &mut vector;
        message.msg_hdr.msg_iovlen = 1;
        let mut messages = [message; BATCH];
        let fd = self.socket.as_raw_fd();
        // SAFETY: every header points to the vector, which outlives the call.
        let sent = unsafe { libc::sendmmsg(fd, messages.as_mut_ptr(), BATCH as u32, 0) };
        ensure!(
            sent == BATCH as i32,
            "{sent} of {BATCH} datagrams: {}",
            std::io::Error::last_os_error()
        );
        Ok(())
    }

    /// Frames sent, in at least `time`.
    pub fn run(&mut self, time: Duration) -> Result<(u64, Duration)> {
        let (start, mut frames) = (Instant::now(), 0);
        while start.elapsed() < time {
            self.burst()?;
            frames += BATCH as u64;
        }
        Ok((frames, start.elapsed()))
    }
}

/// Bridge, VXLAN device with its default options, one remote, one entry for
/// each of `macs` MACs on both sides.
pub fn make_segment(macs: u16) -> Result<()> {
    run(&format!("ip link set {UPLINK} address {UPLINK_MAC}"))?;
    run(&format!("ip addr add 192.0.2.2/24 dev {UPLINK}"))?;
    run("ip route add default via 192.0.2.1")?;
    run(&format!(
        "ip neigh add 192.0.2.1 lladdr {ROUTER_MAC} dev {UPLINK} nud permanent"
    ))?;
    run("ip link add br0 type bridge")?;
    run(&format!(
        "ip link add vxlan0 type vxlan id {VNI} local 192.0.2.2 dstport 4789"
    ))?;
    for device in ["vxlan0", PORT] {
        run(&format!("ip link set {device} master br0"))?;
        run(&format!("ip link set {device} up"))?;
    }
    run("ip link set br0 up")?;
    let mut batch = String::new();
    for i in 0..macs {
        let (local, remote) = (numbered(LOCAL_MAC, i), numbered(REMOTE_MAC, i));
        batch += &format!("fdb replace {local} dev {PORT} master static\n");
        batch += &format!("fdb replace {remote} dev vxlan0 master static\n");
        batch += &format!("fdb replace {remote} dev vxlan0 self static dst 198.51.100.2\n");
    }
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), batch)?;
    run(&format!("bridge -batch {}", file.path().display()))
}

pub fn numbered(mac: MacAddr, i: u16) -> MacAddr {
    let [a, b, c, d, ..] = mac.0;
    let [high, low] = i.to_be_bytes();
    MacAddr([a, b, c, d, high, low])
}
