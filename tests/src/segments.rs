//! Inner frames that are made with unfinished checksums and as superframes, and
//! the other end of it: every checksum of a frame from the wire, looked at.

use anyhow::{Context as _, Result, bail, ensure};
use vtep_common::{MacAddr, checksum};

use crate::vnet::{Checksum, Gso, Header, Transport};

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMP_V6: u8 = 58;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Addresses {
    V4([u8; 4], [u8; 4]),
    V6([u8; 16], [u8; 16]),
}

/// Frames of one flow, as a guest with offloads hands them over.
#[derive(Debug, Clone, Copy)]
pub struct Inner {
    /// From and to.
    pub macs: [MacAddr; 2],
    pub addresses: Addresses,
    pub ports: [u16; 2],
    /// Else UDP.
    pub tcp: bool,
}

impl Inner {
    /// A frame of any size with an unfinished transport checksum.
    pub fn partial(&self, payload: &[u8]) -> (Header, Vec<u8>) {
        let transport: &[u8] = if self.tcp { &[0; 20] } else { &[0; 8] };
        let mut transport = transport.to_vec();
        transport[..2].copy_from_slice(&self.ports[0].to_be_bytes());
        transport[2..4].copy_from_slice(&self.ports[1].to_be_bytes());
        let length = transport.len() + payload.len();
        let offset = if self.tcp {
            transport[4..8].copy_from_slice(&0xffff_ff00u32.to_be_bytes());
            // Five words, ACK and PSH, a window.
            transport[12..16].copy_from_slice(&[0x50, 0x18, 0x20, 0]);
            16
        } else {
            transport[4..6].copy_from_slice(&(length as u16).to_be_bytes());
            6
        };
        let protocol = if self.tcp { TCP } else { UDP };
        let pseudo = checksum::fold(self.addresses.pseudo(protocol, length));
        transport[offset..offset + 2].copy_from_slice(&pseudo.to_ne_bytes());
        let mut frame = [&self.macs[1].0[..], &self.macs[0].0].concat();
        match self.addresses {
            Addresses::V4(source, destination) => {
                let mut ip = vec![0x45, 0];
                ip.extend((20 + length as u16).to_be_bytes());
                ip.extend([0xff, 0xf8, 0x40, 0, 64, protocol, 0, 0]);
                ip.extend(source);
                ip.extend(destination);
                let sum = !checksum::bytes(&ip);
                ip[10..12].copy_from_slice(&sum.to_ne_bytes());
                frame.extend([8, 0]);
                frame.extend(ip);
            }
            Addresses::V6(source, destination) => {
                frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                frame.extend((length as u16).to_be_bytes());
                frame.extend([protocol, 64]);
                frame.extend(source);
                frame.extend(destination);
            }
        }
        let header = Header {
            checksum: Checksum::Partial {
                start: frame.len() as u16,
                offset: offset as u16,
            },
            gso: None,
        };
        frame.extend(transport);
        frame.extend(payload);
        (header, frame)
    }

    /// All of `payload` in one frame, to be cut into segments of `segment_bytes`.
    pub fn superframe(&self, payload: &[u8], segment_bytes: u16) -> (Header, Vec<u8>) {
        let (mut header, frame) = self.partial(payload);
        header.gso = Some(Gso {
            transport: match self.addresses {
                _ if !self.tcp => Transport::Udp,
                Addresses::V4(..) => Transport::TcpV4,
                Addresses::V6(..) => Transport::TcpV6,
            },
            ecn: false,
            header_bytes: (frame.len() - payload.len()) as u16,
            segment_bytes,
        });
        (header, frame)
    }
}

impl Addresses {
    /// Sum of the pseudo header (RFC 9293 section 3.1, RFC 8200 section 8.1).
    fn pseudo(&self, protocol: u8, length: usize) -> u64 {
        let sum = match self {
            Self::V4(a, b) => u64::from(checksum::bytes(a)) + u64::from(checksum::bytes(b)),
            Self::V6(a, b) => u64::from(checksum::bytes(a)) + u64::from(checksum::bytes(b)),
        };
        sum + u64::from(u16::from(protocol).to_be()) + u64::from((length as u16).to_be())
    }
}

/// What a frame was found to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Of IP; 0: no IP.
    pub protocol: u8,
    /// Offset of the transport header.
    pub transport: usize,
    /// Offset of what TCP or UDP carries.
    pub payload: usize,
}

/// Look at every checksum of a frame: IPv4 header, TCP, UDP, ICMP.
pub fn check(frame: &[u8]) -> Result<Seen> {
    let none = Seen {
        protocol: 0,
        transport: frame.len(),
        payload: frame.len(),
    };
    ensure!(frame.len() >= 14, "shorter than an Ethernet header");
    let (addresses, protocol, transport, end) = match frame[12..14] {
        [8, 0] => {
            let header = 14 + 4 * usize::from(frame.get(14).context("no IPv4 header")? & 15);
            let ip = frame.get(14..header).context("half an IPv4 header")?;
            ensure!(
                ip.len() >= 20 && checksum::bytes(ip) == 0xffff,
                "IPv4 header checksum"
            );
            let end = 14 + usize::from(u16::from_be_bytes([ip[2], ip[3]]));
            let addresses = Addresses::V4(array(&ip[12..16]), array(&ip[16..20]));
            (addresses, ip[9], header, end)
        }
        [0x86, 0xdd] => {
            let ip = frame.get(14..54).context("shorter than an IPv6 header")?;
            ensure!(ip[0] >> 4 == 6, "IP version");
            let end = 54 + usize::from(u16::from_be_bytes([ip[4], ip[5]]));
            let addresses = Addresses::V6(array(&ip[8..24]), array(&ip[24..40]));
            (addresses, ip[6], 54, end)
        }
        _ => return Ok(none),
    };
    let data = frame
        .get(transport..end)
        .with_context(|| format!("{} bytes of {end}", frame.len()))?;
    let pseudo = match protocol {
        ICMP => 0,
        _ => addresses.pseudo(protocol, data.len()),
    };
    let header = match protocol {
        TCP if data.len() >= 20 => usize::from(data[12] >> 4) * 4,
        UDP if data.len() >= 8 => 8,
        ICMP | ICMP_V6 if data.len() >= 4 => 4,
        TCP | UDP | ICMP | ICMP_V6 => bail!("{} bytes of protocol {protocol}", data.len()),
        _ => return Ok(none),
    };
    let summed = protocol != UDP || data[6..8] != [0, 0];
    let sum = checksum::fold(pseudo + u64::from(checksum::bytes(data)));
    ensure!(!summed || sum == 0xffff, "checksum of protocol {protocol}");
    Ok(Seen {
        protocol,
        transport,
        payload: transport + header,
    })
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(bytes);
    array
}

/// The inner frame of one from the wire, if it is VXLAN; outer headers, their
/// checksums and lengths must be right.
pub fn unwrap(frame: &[u8], udp_port: u16) -> Result<Option<&[u8]>> {
    let seen = check(frame).context("outer")?;
    if seen.protocol != UDP
        || frame[seen.transport + 2..seen.transport + 4] != udp_port.to_be_bytes()
    {
        return Ok(None);
    }
    let (header, inner) = frame[seen.payload..]
        .split_at_checked(8)
        .context("no VXLAN header")?;
    ensure!(header[0] == 8, "VXLAN flags {:#x}", header[0]);
    let length = u16::from_be_bytes([frame[seen.transport + 4], frame[seen.transport + 5]]);
    ensure!(
        usize::from(length) == frame.len() - seen.transport,
        "outer UDP length {length}"
    );
    Ok(Some(inner))
}
