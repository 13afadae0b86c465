//! Frames of the program tests, and a reader for what comes out.

use std::net::Ipv4Addr;

use vtep_common::{MacAddr, checksum};

use crate::fixture::{LOCAL, LOCAL_V6, REMOTE, REMOTE_V6_ADDRESS, ROUTER_MAC, UPLINK_MAC, VNI};

fn ethernet(source: MacAddr, destination: MacAddr, ethertype: u16) -> Vec<u8> {
    let mut frame = destination.0.to_vec();
    frame.extend(source.0);
    frame.extend(ethertype.to_be_bytes());
    frame
}

/// IPv4 UDP frame of `len` bytes with a payload that counts up.
pub fn udp(source: MacAddr, destination: MacAddr, len: usize) -> Vec<u8> {
    let mut frame = ethernet(source, destination, 0x0800);
    let total = (len - 14) as u16;
    frame.extend([0x45, 0]);
    frame.extend(total.to_be_bytes());
    frame.extend([0, 1, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    let sum = !checksum::bytes(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_ne_bytes());
    frame.extend(4000u16.to_be_bytes());
    frame.extend(5000u16.to_be_bytes());
    frame.extend((total - 20).to_be_bytes());
    frame.extend([0, 0]);
    frame.extend((0..len - 42).map(|i| (i * 7) as u8));
    frame
}

/// IPv6 UDP frame of `len` bytes.
pub fn udp6(source: MacAddr, destination: MacAddr, len: usize, class: u8) -> Vec<u8> {
    let mut frame = ethernet(source, destination, 0x86dd);
    frame.extend([0x60 | (class >> 4), class << 4, 0, 0]);
    frame.extend(((len - 54) as u16).to_be_bytes());
    frame.extend([17, 64]);
    frame.extend([0xfd; 32]);
    frame.extend((0..len - 54).map(|i| (i * 5) as u8));
    frame
}

/// ICMPv6 frame of a type.
pub fn nd(source: MacAddr, destination: MacAddr, icmp_type: u8) -> Vec<u8> {
    let mut frame = udp6(source, destination, 86, 0);
    frame[20] = 58;
    frame[54] = icmp_type;
    frame
}

pub fn arp(source: MacAddr, destination: MacAddr) -> Vec<u8> {
    let mut frame = ethernet(source, destination, 0x0806);
    frame.extend([0, 1, 8, 0, 6, 4, 0, 2]);
    frame.resize(60, 0);
    frame
}

pub fn rarp(source: MacAddr, destination: MacAddr) -> Vec<u8> {
    let mut frame = ethernet(source, destination, 0x8035);
    frame.extend([0, 1, 8, 0, 6, 4, 0, 3]);
    frame.resize(60, 0);
    frame
}

pub fn vlan(frame: &[u8], tpid: u16) -> Vec<u8> {
    let mut tagged = frame[..12].to_vec();
    tagged.extend(tpid.to_be_bytes());
    tagged.extend([0, 5]);
    tagged.extend(&frame[12..]);
    tagged
}

pub fn with_tos(frame: &[u8], tos: u8) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[15] = tos;
    frame[24..26].fill(0);
    let sum = !checksum::bytes(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_ne_bytes());
    frame
}

/// A VXLAN frame, to be built or as read from bytes.
#[derive(Clone, Debug)]
pub struct Outer {
    pub eth_destination: MacAddr,
    pub eth_source: MacAddr,
    pub tos: u8,
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
    pub udp_source: u16,
    pub udp_destination: u16,
    pub vni: u32,
    pub inner: Vec<u8>,
    /// Build with a UDP checksum.
    pub udp_checksum: bool,
    pub ip_checksum_ok: bool,
    /// `None`: the frame carries none.
    pub udp_checksum_ok: Option<bool>,
}

/// A good frame from the remote to this VTEP.
pub fn outer(inner: &[u8]) -> Outer {
    Outer {
        eth_destination: UPLINK_MAC,
        eth_source: ROUTER_MAC,
        tos: 0,
        source: REMOTE,
        destination: LOCAL,
        udp_source: 50_000,
        udp_destination: 4789,
        vni: VNI,
        inner: inner.to_vec(),
        udp_checksum: false,
        ip_checksum_ok: true,
        udp_checksum_ok: None,
    }
}

impl Outer {
    fn udp_sum(&self, datagram: &[u8]) -> u16 {
        let pseudo = checksum::udp_pseudo_v4(
            self.source.octets(),
            self.destination.octets(),
            datagram.len() as u16,
        );
        checksum::fold(pseudo + checksum::bytes(datagram) as u64)
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut udp = Vec::new();
        udp.extend(self.udp_source.to_be_bytes());
        udp.extend(self.udp_destination.to_be_bytes());
        udp.extend((self.inner.len() as u16 + 16).to_be_bytes());
        udp.extend([0, 0, 8, 0, 0, 0]);
        udp.extend((self.vni << 8).to_be_bytes());
        udp.extend(&self.inner);
        if self.udp_checksum {
            let sum = !self.udp_sum(&udp);
            udp[6..8].copy_from_slice(&sum.to_ne_bytes());
        }
        let mut frame = ethernet(self.eth_source, self.eth_destination, 0x0800);
        frame.extend([0x45, self.tos]);
        frame.extend((udp.len() as u16 + 20).to_be_bytes());
        frame.extend([0, 9, 0, 0, 63, 17, 0, 0]);
        frame.extend(self.source.octets());
        frame.extend(self.destination.octets());
        let sum = !checksum::bytes(&frame[14..34]);
        frame[24..26].copy_from_slice(&sum.to_ne_bytes());
        frame.extend(udp);
        frame
    }

    /// Panics on anything that is not a plain VXLAN frame with right lengths.
    pub fn parse(frame: &[u8]) -> Self {
        let word = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
        let address =
            |at: usize| Ipv4Addr::new(frame[at], frame[at + 1], frame[at + 2], frame[at + 3]);
        assert_eq!((word(12), frame[14], frame[23]), (0x0800, 0x45, 17));
        assert_eq!(word(16) as usize, frame.len() - 14, "total length");
        assert_eq!(word(38) as usize, frame.len() - 34, "UDP length");
        assert_eq!(frame[42..46], [8, 0, 0, 0], "R1: I flag alone");
        assert_eq!(frame[49], 0, "R1: reserved byte");
        let mut outer = Self {
            eth_destination: MacAddr(frame[..6].try_into().unwrap()),
            eth_source: MacAddr(frame[6..12].try_into().unwrap()),
            tos: frame[15],
            source: address(26),
            destination: address(30),
            udp_source: word(34),
            udp_destination: word(36),
            vni: u32::from_be_bytes(frame[46..50].try_into().unwrap()) >> 8,
            inner: frame[50..].to_vec(),
            udp_checksum: frame[40..42] != [0, 0],
            ip_checksum_ok: checksum::bytes(&frame[14..34]) == 0xffff,
            udp_checksum_ok: None,
        };
        if outer.udp_checksum {
            outer.udp_checksum_ok = Some(outer.udp_sum(&frame[34..]) == 0xffff);
        }
        outer
    }
}

/// A VXLAN frame on an IPv6 underlay, as read.
pub struct OuterV6 {
    pub class: u8,
    pub destination: [u8; 16],
    pub vni: u32,
    pub inner: Vec<u8>,
    /// `None`: the frame carries none.
    pub checksum_ok: Option<bool>,
}

fn udp_sum_v6(frame: &[u8]) -> u16 {
    let mut pseudo = frame[22..54].to_vec();
    pseudo.extend(((frame.len() - 54) as u32).to_be_bytes());
    pseudo.extend([0, 0, 0, 17]);
    checksum::fold(checksum::bytes(&pseudo) as u64 + checksum::bytes(&frame[54..]) as u64)
}

impl OuterV6 {
    /// Panics on anything that is not a plain VXLAN frame with right lengths.
    pub fn parse(frame: &[u8]) -> Self {
        let word = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
        assert_eq!((word(12), frame[14] >> 4, frame[20]), (0x86dd, 6, 17));
        assert_eq!(word(18) as usize, frame.len() - 54, "payload length");
        assert_eq!(word(58) as usize, frame.len() - 54, "UDP length");
        assert_eq!((word(56), &frame[62..66]), (4789, &[8, 0, 0, 0][..]));
        Self {
            class: frame[14] << 4 | frame[15] >> 4,
            destination: frame[38..54].try_into().unwrap(),
            vni: u32::from_be_bytes(frame[66..70].try_into().unwrap()) >> 8,
            inner: frame[70..].to_vec(),
            checksum_ok: (frame[60..62] != [0, 0]).then(|| udp_sum_v6(frame) == 0xffff),
        }
    }
}

/// A good frame from the remote to this VTEP on an IPv6 underlay.
pub fn outer_v6(inner: &[u8], with_checksum: bool) -> Vec<u8> {
    let mut frame = ethernet(ROUTER_MAC, UPLINK_MAC, 0x86dd);
    let length = (inner.len() as u16 + 16).to_be_bytes();
    frame.extend([0x60, 0, 0, 0, length[0], length[1], 17, 63]);
    frame.extend(REMOTE_V6_ADDRESS.octets());
    frame.extend(LOCAL_V6.octets());
    frame.extend(50_000u16.to_be_bytes());
    frame.extend(4789u16.to_be_bytes());
    frame.extend([length[0], length[1], 0, 0, 8, 0, 0, 0]);
    frame.extend((VNI << 8).to_be_bytes());
    frame.extend(inner);
    if with_checksum {
        let sum = !udp_sum_v6(&frame);
        frame[60..62].copy_from_slice(&sum.to_ne_bytes());
    }
    frame
}
