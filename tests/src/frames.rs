//! Raw frames on a device: sending in batches, capturing with a filter.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use vtep_common::{MacAddr, checksum};

use crate::vnet::Header;

/// linux/if_packet.h
const PACKET_VNET_HDR: i32 = 15;

/// An AF_PACKET socket bound to one device. Sends and sees whole frames.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    /// Frames have virtio-net headers.
    headers: bool,
}

impl Socket {
    /// In the caller's namespace. Own frames are not seen.
    pub fn open(device: &str) -> Result<Self> {
        let protocol = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: plain system call.
        let fd = unsafe {
            libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                i32::from(protocol),
            )
        };
        ensure!(fd >= 0, "packet socket: {}", io::Error::last_os_error());
        // SAFETY: just opened, owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let this = Self { fd, headers: false };
        let name = std::ffi::CString::new(device)?;
        // SAFETY: a valid C string.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        ensure!(index != 0, "no device {device}");
        // SAFETY: all zero is a valid address.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = index as i32;
        // SAFETY: `address` is of the given length.
        let status = unsafe {
            libc::bind(
                this.fd.as_raw_fd(),
                (&raw const address).cast(),
                size_of_val(&address) as u32,
            )
        };
        ensure!(
            status == 0,
            "bind to {device}: {}",
            io::Error::last_os_error()
        );
        this.option(libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, 1)?;
        this.option(libc::SOL_PACKET, libc::PACKET_AUXDATA, 1)?;
        this.option(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 64 << 20)?;
        this.option(libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, 8 << 20)?;
        Ok(this)
    }

    /// The same, with a virtio-net header in front of every frame: unfinished
    /// checksums and superframes, as a guest's stack and its device exchange them.
    pub fn with_headers(device: &str) -> Result<Self> {
        let mut this = Self::open(device)?;
        this.option(libc::SOL_PACKET, PACKET_VNET_HDR, 1)?;
        this.headers = true;
        Ok(this)
    }

    /// What is sent for a frame, of which something may be left to do.
    pub fn bytes(&self, header: Header, frame: &[u8]) -> Vec<u8> {
        if self.headers {
            [&header.encode()[..], frame].concat()
        } else {
            frame.to_vec()
        }
    }

    fn option(&self, level: i32, name: i32, value: i32) -> Result<()> {
        // SAFETY: an int option with an int value.
        let status = unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                level,
                name,
                (&raw const value).cast(),
                size_of_val(&value) as u32,
            )
        };
        ensure!(
            status == 0,
            "socket option {name}: {}",
            io::Error::last_os_error()
        );
        Ok(())
    }

    pub fn send(&self, frame: &[u8]) -> Result<()> {
        // SAFETY: `frame` is readable for its length.
        let sent =
            unsafe { libc::send(self.fd.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        ensure!(
            sent == frame.len() as isize,
            "send: {}",
            io::Error::last_os_error()
        );
        Ok(())
    }

    /// Send all of them with few system calls; returns how many the device took.
    pub fn send_batch(&self, frames: &[impl AsRef<[u8]>]) -> Result<usize> {
        let mut vectors: Vec<libc::iovec> = frames
            .iter()
            .map(|frame| libc::iovec {
                // Only read from.
                iov_base: frame.as_ref().as_ptr().cast_mut().cast(),
                iov_len: frame.as_ref().len(),
            })
            .collect();
        let mut messages: Vec<libc::mmsghdr> = vectors.iter_mut().map(message).collect();
        let mut sent = 0;
        while sent < messages.len() {
            // SAFETY: the headers point to vectors and frames that live on.
            let n = unsafe {
                libc::sendmmsg(
                    self.fd.as_raw_fd(),
                    messages[sent..].as_mut_ptr(),
                    (messages.len() - sent) as u32,
                    0,
                )
            };
            if n < 0 {
                let error = io::Error::last_os_error();
                if error.raw_os_error() == Some(libc::ENOBUFS) {
                    std::thread::yield_now();
                    continue;
                }
                return Err(error).context("sendmmsg");
            }
            sent += n as usize;
        }
        Ok(sent)
    }

    /// The next frame, or `None` after `time`. A VLAN tag, which the kernel takes
    /// out of received frames, is put back.
    pub fn receive(&self, time: Duration) -> Result<Option<Vec<u8>>> {
        if !self.wait(time)? {
            return Ok(None);
        }
        // The largest superframe, and what may stand in front of it.
        let mut buffer = vec![0u8; 65536 + 64];
        let mut vector = libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        let mut header = message(&mut vector).msg_hdr;
        let mut control = [0u64; 16];
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = size_of_val(&control);
        // SAFETY: the header points to one buffer and one control area, both writable.
        let n = unsafe { libc::recvmsg(self.fd.as_raw_fd(), &mut header, 0) };
        ensure!(n >= 0, "recvmsg: {}", io::Error::last_os_error());
        buffer.truncate(n as usize);
        if let Some(tag) = vlan_tag(&header) {
            buffer.splice(12..12, tag);
        }
        Ok(Some(buffer))
    }

    /// What is there, up to 64 frames of which the first 128 bytes are kept; empty
    /// after `time`.
    pub fn receive_batch(&self, time: Duration) -> Result<Vec<Vec<u8>>> {
        if !self.wait(time)? {
            return Ok(Vec::new());
        }
        let mut buffers = vec![vec![0u8; 128]; 64];
        let mut vectors: Vec<libc::iovec> = buffers
            .iter_mut()
            .map(|b| libc::iovec {
                iov_base: b.as_mut_ptr().cast(),
                iov_len: b.len(),
            })
            .collect();
        let mut messages: Vec<libc::mmsghdr> = vectors.iter_mut().map(message).collect();
        // SAFETY: the headers point to vectors and buffers that live on.
        let n = unsafe {
            libc::recvmmsg(
                self.fd.as_raw_fd(),
                messages.as_mut_ptr(),
                messages.len() as u32,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        ensure!(n >= 0, "recvmmsg: {}", io::Error::last_os_error());
        buffers.truncate(n as usize);
        for (buffer, message) in buffers.iter_mut().zip(&messages) {
            buffer.truncate(message.msg_len as usize);
        }
        Ok(buffers)
    }

    /// Whether something can be received within `time`.
    fn wait(&self, time: Duration) -> Result<bool> {
        let mut poll = libc::pollfd {
            fd: self.fd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd.
        let ready = unsafe { libc::poll(&mut poll, 1, time.as_millis() as i32) };
        ensure!(ready >= 0, "poll: {}", io::Error::last_os_error());
        Ok(ready > 0)
    }

    /// Frames since the last look that came and did not fit the buffer.
    pub fn missed(&self) -> Result<u32> {
        // SAFETY: all zero is a valid value.
        let mut statistics: libc::tpacket_stats = unsafe { std::mem::zeroed() };
        let mut length = size_of_val(&statistics) as libc::socklen_t;
        // SAFETY: the option writes at most `length` bytes of `statistics`.
        let status = unsafe {
            libc::getsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut statistics).cast(),
                &mut length,
            )
        };
        ensure!(status == 0, "statistics: {}", io::Error::last_os_error());
        Ok(statistics.tp_drops)
    }

    /// Frames that `keep` wants, until `count` of them came or `time` is over.
    pub fn capture(
        &self,
        count: usize,
        time: Duration,
        keep: impl Fn(&[u8]) -> bool,
    ) -> Result<Vec<Vec<u8>>> {
        let deadline = Instant::now() + time;
        let mut frames = Vec::new();
        while frames.len() < count {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.receive(left)? {
                Some(frame) if keep(&frame) => frames.push(frame),
                Some(_) => {}
                None => break,
            }
        }
        Ok(frames)
    }
}

/// Frames taken at once.
const INBOX_FRAMES: usize = 64;
/// The longest frame there is: a superframe.
const INBOX_BYTES: usize = (1 << 16) + 64;

/// Room for many whole frames, used again and again.
#[derive(Debug)]
pub struct Inbox {
    bytes: Vec<u8>,
    controls: Vec<[u64; 16]>,
}

impl Default for Inbox {
    fn default() -> Self {
        Self {
            bytes: vec![0; INBOX_FRAMES * INBOX_BYTES],
            controls: vec![[0; 16]; INBOX_FRAMES],
        }
    }
}

impl Inbox {
    /// Give everything that `socket` has, up to [`INBOX_FRAMES`], to `take`: as on
    /// a wire, so cut and summed where it has headers, and with VLAN tags put back.
    /// False where nothing came within `time`.
    pub fn receive(
        &mut self,
        socket: &Socket,
        time: Duration,
        mut take: impl FnMut(Vec<u8>) -> Result<()>,
    ) -> Result<bool> {
        if !socket.wait(time)? {
            return Ok(false);
        }
        let slots = self.bytes.chunks_exact_mut(INBOX_BYTES);
        let mut vectors: Vec<libc::iovec> = slots
            .map(|slot| libc::iovec {
                iov_base: slot.as_mut_ptr().cast(),
                iov_len: slot.len(),
            })
            .collect();
        let mut messages: Vec<libc::mmsghdr> = vectors.iter_mut().map(message).collect();
        for (message, control) in messages.iter_mut().zip(&mut self.controls) {
            message.msg_hdr.msg_control = control.as_mut_ptr().cast();
            message.msg_hdr.msg_controllen = size_of_val(control);
        }
        // SAFETY: the headers point to vectors, buffers and control areas that live on.
        let n = unsafe {
            libc::recvmmsg(
                socket.fd.as_raw_fd(),
                messages.as_mut_ptr(),
                messages.len() as u32,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        ensure!(n >= 0, "recvmmsg: {}", io::Error::last_os_error());
        let slots = self.bytes.chunks_exact(INBOX_BYTES);
        for (slot, message) in slots.zip(&messages).take(n as usize) {
            let bytes = &slot[..message.msg_len as usize];
            let frames = match bytes.split_first_chunk() {
                Some((header, frame)) if socket.headers => Header::decode(header)?.segments(frame),
                _ => vec![bytes.to_vec()],
            };
            for mut frame in frames {
                if let Some(tag) = vlan_tag(&message.msg_hdr) {
                    frame.splice(12..12, tag);
                }
                take(frame)?;
            }
        }
        Ok(true)
    }
}

/// A message of one buffer.
fn message(vector: &mut libc::iovec) -> libc::mmsghdr {
    // SAFETY: all zero is a valid header.
    let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
    message.msg_hdr.msg_iov = vector;
    message.msg_hdr.msg_iovlen = 1;
    message
}

/// The VLAN tag of a received frame, as it was on the wire.
fn vlan_tag(header: &libc::msghdr) -> Option<[u8; 4]> {
    // SAFETY: `header` has come back from recvmsg.
    let control = unsafe { libc::CMSG_FIRSTHDR(header).as_ref()? };
    if (control.cmsg_level, control.cmsg_type) != (libc::SOL_PACKET, libc::PACKET_AUXDATA) {
        return None;
    }
    // SAFETY: data of this type is a tpacket_auxdata (linux/if_packet.h).
    let data = unsafe {
        libc::CMSG_DATA(control)
            .cast::<libc::tpacket_auxdata>()
            .read_unaligned()
    };
    (data.tp_status & libc::TP_STATUS_VLAN_VALID != 0).then(|| {
        let [a, b] = data.tp_vlan_tpid.to_be_bytes();
        let [c, d] = data.tp_vlan_tci.to_be_bytes();
        [a, b, c, d]
    })
}

/// Ethernet header and payload.
pub fn ethernet(source: MacAddr, destination: MacAddr, ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = destination.0.to_vec();
    frame.extend(source.0);
    frame.extend(ethertype.to_be_bytes());
    frame.extend(payload);
    frame
}

/// IPv4 UDP packet with right checksums.
pub fn ipv4_udp(source: [u8; 4], destination: [u8; 4], ports: [u16; 2], payload: &[u8]) -> Vec<u8> {
    let length = 8 + payload.len() as u16;
    let mut ip = vec![0x45, 0];
    ip.extend((20 + length).to_be_bytes());
    ip.extend([0, 1, 0x40, 0, 64, 17, 0, 0]);
    ip.extend(source);
    ip.extend(destination);
    let sum = !checksum::bytes(&ip);
    ip[10..12].copy_from_slice(&sum.to_ne_bytes());
    let mut udp = Vec::new();
    udp.extend(ports[0].to_be_bytes());
    udp.extend(ports[1].to_be_bytes());
    udp.extend(length.to_be_bytes());
    udp.extend([0, 0]);
    udp.extend(payload);
    let sum =
        checksum::udp_pseudo_v4(source, destination, length) + u64::from(checksum::bytes(&udp));
    udp[6..8].copy_from_slice(&(!checksum::fold(sum)).to_ne_bytes());
    ip.extend(udp);
    ip
}

/// What a hypervisor sends for a VM that has arrived: a broadcast reverse ARP.
pub fn rarp(mac: MacAddr) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, 3];
    packet.extend(mac.0);
    packet.extend([0; 4]);
    packet.extend(mac.0);
    packet.extend([0; 4]);
    packet.resize(46, 0);
    ethernet(mac, MacAddr([0xff; 6]), 0x8035, &packet)
}

/// `inner` behind the headers of an IPv4 VTEP; no UDP checksum.
pub fn vxlan(
    macs: [MacAddr; 2],
    addresses: [[u8; 4]; 2],
    udp_port: u16,
    vni: u32,
    inner: &[u8],
) -> Vec<u8> {
    let mut payload = vec![8, 0, 0, 0];
    payload.extend((vni << 8).to_be_bytes());
    payload.extend(inner);
    let mut packet = ipv4_udp(addresses[0], addresses[1], [50_000, udp_port], &payload);
    packet[26..28].fill(0);
    ethernet(macs[0], macs[1], 0x0800, &packet)
}

/// Same with a UDP checksum, as Linux peers send it by default.
pub fn vxlan_with_checksum(
    macs: [MacAddr; 2],
    addresses: [[u8; 4]; 2],
    udp_port: u16,
    vni: u32,
    inner: &[u8],
) -> Vec<u8> {
    let mut frame = vxlan(macs, addresses, udp_port, vni, inner);
    let length = (frame.len() - 34) as u16;
    let sum = checksum::udp_pseudo_v4(addresses[0], addresses[1], length)
        + u64::from(checksum::bytes(&frame[34..]));
    frame[40..42].copy_from_slice(&(!checksum::fold(sum)).to_ne_bytes());
    frame
}

/// Whether a frame is UDP to this port, over an IP header without options.
pub fn is_udp_to(frame: &[u8], port: u16) -> bool {
    let (protocol, udp) = match frame.get(12..14) {
        Some([0x08, 0x00]) => (23, 34),
        Some([0x86, 0xdd]) => (20, 54),
        _ => return false,
    };
    frame.get(protocol) == Some(&17) && frame.get(udp + 2..udp + 4) == Some(&port.to_be_bytes())
}
