//! Outer headers of both families, right or wrong in every field.

use vtep_common::{MacAddr, checksum};

use super::{HOST_IP, NEAR_IP, World};
use crate::frames::ethernet;
use crate::lab::{Family, VNI};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum UdpChecksum {
    None,
    Right,
    Wrong,
}

/// Fields that a family does not have are left out; what stands for IPv4 options
/// are extension headers, and addresses are those of [`v6`].
#[derive(Debug, Clone)]
pub(super) struct Outer {
    pub family: Family,
    pub macs: [MacAddr; 2],
    pub tos: u8,
    pub identification: u16,
    pub fragment: u16,
    pub ttl: u8,
    pub protocol: u8,
    pub addresses: [[u8; 4]; 2],
    pub options: &'static [u8],
    pub udp_ports: [u16; 2],
    pub udp_checksum: UdpChecksum,
    pub ip_checksum_off: u8,
    pub vxlan: [u8; 8],
    /// Added to the lengths in the headers.
    pub total_off: i16,
    pub udp_off: i16,
    /// Bytes behind the packet.
    pub trailing: usize,
    /// Keep only so many bytes behind the UDP header.
    pub cut: Option<usize>,
    /// Instead of version 4 and the length of the header.
    pub first: Option<u8>,
    /// VLAN tag of the underlay.
    pub tag: Option<u16>,
}

impl Outer {
    pub fn new(world: &World, number: usize) -> Self {
        let mut vxlan = [8, 0, 0, 0, 0, 0, 0, 0];
        vxlan[4..].copy_from_slice(&(VNI << 8).to_be_bytes());
        Self {
            family: world.underlay,
            macs: [world.gateway_mac, world.uplink_mac],
            tos: 0,
            identification: number as u16,
            fragment: 0,
            ttl: 64,
            protocol: 17,
            addresses: [NEAR_IP, HOST_IP],
            options: &[],
            udp_ports: [50_000 + (number % 100) as u16, world.udp_port],
            udp_checksum: match world.underlay {
                Family::V4 => UdpChecksum::None,
                Family::V6 => UdpChecksum::Right,
            },
            ip_checksum_off: 0,
            vxlan,
            total_off: 0,
            udp_off: 0,
            trailing: 0,
            cut: None,
            first: None,
            tag: None,
        }
    }

    pub fn build(&self, inner: &[u8]) -> Vec<u8> {
        let mut data = [&self.vxlan[..], inner].concat();
        data.truncate(self.cut.unwrap_or(data.len()));
        let udp_bytes = (8 + data.len() as u16).wrapping_add_signed(self.udp_off);
        let mut udp = Vec::new();
        for field in [self.udp_ports[0], self.udp_ports[1], udp_bytes, 0] {
            udp.extend(field.to_be_bytes());
        }
        udp.extend(data);
        if self.udp_checksum != UdpChecksum::None {
            let covered = udp.len().min(usize::from(udp_bytes));
            let addresses: u64 = match self.family {
                Family::V4 => self.addresses.map(|a| sum(&a)).iter().sum(),
                Family::V6 => self.addresses.map(|a| sum(&v6(a))).iter().sum(),
            };
            let wrong = u16::from(self.udp_checksum == UdpChecksum::Wrong);
            let sum = udp_checksum(addresses, udp_bytes, &udp[..covered]).wrapping_add(wrong);
            udp[6..8].copy_from_slice(&if sum == 0 { 0xffff } else { sum }.to_ne_bytes());
        }
        let (ethertype, mut packet) = match self.family {
            Family::V4 => (0x0800, self.v4_header(udp.len())),
            Family::V6 => (0x86dd, self.v6_header(udp.len())),
        };
        packet.extend(udp);
        packet.resize(packet.len() + self.trailing, 0xee);
        let [source, destination] = self.macs;
        let mut frame = ethernet(source, destination, ethertype, &packet);
        if let Some(id) = self.tag {
            frame.splice(12..12, [0x8100, id].map(u16::to_be_bytes).concat());
        }
        frame
    }

    fn v4_header(&self, udp_bytes: usize) -> Vec<u8> {
        let header = 20 + self.options.len();
        let total = ((header + udp_bytes) as u16).wrapping_add_signed(self.total_off);
        let first = self.first.unwrap_or(0x40 | (header / 4) as u8);
        let mut ip = vec![first, self.tos];
        for field in [total, self.identification, self.fragment] {
            ip.extend(field.to_be_bytes());
        }
        ip.extend([self.ttl, self.protocol, 0, 0]);
        ip.extend(self.addresses.concat());
        ip.extend(self.options);
        let sum = !checksum::bytes(&ip);
        ip[10..12].copy_from_slice(&sum.to_ne_bytes());
        ip[11] ^= self.ip_checksum_off;
        ip
    }

    fn v6_header(&self, udp_bytes: usize) -> Vec<u8> {
        let mut next = self.protocol;
        let mut extensions = Vec::new();
        if self.fragment & 0x3fff != 0 {
            extensions = fragment_header(next, self.fragment, self.identification).to_vec();
            next = 44;
        }
        if let Some(option) = self.options.first() {
            // Hop-by-hop: padding, router alert; a routing header; an unknown option.
            let (header, bytes) = match option {
                1 => (0, [next, 0, 1, 4, 0, 0, 0, 0]),
                0x94 => (0, [next, 0, 5, 2, 0, 0, 1, 0]),
                0x83 => (43, [next, 0, 0, 1, 0, 0, 0, 0]),
                _ => (60, [next, 0, 0xc7, 4, 0, 0, 0, 0]),
            };
            extensions = [&bytes[..], &extensions].concat();
            next = header;
        }
        let total = (extensions.len() + udp_bytes) as u16;
        let version = match self.first {
            _ if self.ip_checksum_off != 0 => 5,
            Some(first) if first >> 4 != 6 => first >> 4,
            Some(_) => 4,
            None => 6,
        };
        let mut ip = vec![version << 4 | self.tos >> 4, self.tos << 4, 0, 0];
        ip.extend(total.wrapping_add_signed(self.total_off).to_be_bytes());
        ip.extend([next, self.ttl]);
        ip.extend(self.addresses.map(v6).concat());
        ip.extend(extensions);
        ip
    }
}

fn fragment_header(next: u8, fragment: u16, identification: u16) -> [u8; 8] {
    let [a, b] = (fragment << 3 | fragment >> 13 & 1).to_be_bytes();
    let [c, d] = identification.to_be_bytes();
    [next, 0, a, b, 0, 0, c, d]
}

fn sum(bytes: &[u8]) -> u64 {
    u64::from(checksum::bytes(bytes))
}

/// Native byte order; `addresses`: their sum, which is all that is of the family.
pub(super) fn udp_checksum(addresses: u64, udp_bytes: u16, covered: &[u8]) -> u16 {
    let rest = u64::from(17u16.to_be()) + u64::from(udp_bytes.to_be());
    !checksum::fold(addresses + rest + sum(covered))
}

/// The IPv6 address that an address of the corpus stands for.
pub fn v6(address: [u8; 4]) -> [u8; 16] {
    let [a, b, c, d] = address;
    let mut v6 = [0; 16];
    match address {
        [192, 0, 2, _] | [198, 51, 100, _] | [203, 0, 113, _] => {
            v6[..4].copy_from_slice(&[0x20, 1, 0x0d, 0xb8]);
            v6[5] = match a {
                192 => 1,
                198 => 2,
                _ => 3,
            };
        }
        [0, 0, 0, 0] => {}
        [127, ..] => v6[15] = 1,
        [224..=239, ..] => v6[..2].copy_from_slice(&[0xff, if a == 224 { 2 } else { 0x0e }]),
        // IPv4 in IPv6, which no sender on a wire may have.
        [0 | 240.., ..] => v6[10..15].copy_from_slice(&[0xff, 0xff, a, b, c]),
        _ => {
            v6[..4].copy_from_slice(&[0x20, 1, 0x0d, 0xb8]);
            v6[12..15].copy_from_slice(&[a, b, c]);
        }
    }
    v6[15] |= d;
    v6
}

/// The other way round; four bytes that are as good as the address, for those
/// that are not of the corpus.
pub(super) fn name_of(address: &[u8]) -> [u8; 4] {
    let subnets = [[192, 0, 2], [198, 51, 100], [203, 0, 113]];
    let known = subnets.map(|[a, b, c]| [a, b, c, address[15]]);
    if let Some(name) = known.into_iter().find(|name| v6(*name) == *address) {
        return name;
    }
    // FNV-1a.
    let hash = address.iter().fold(0x811c_9dc5u32, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    });
    hash.to_be_bytes()
}

/// A packet without options in two fragments, the first of so many units of 8
/// bytes.
pub(super) fn in_two(whole: &[u8], units: usize) -> [Vec<u8>; 2] {
    let is_v6 = whole[12..14] == [0x86, 0xdd];
    let start = if is_v6 { 54 } else { 34 };
    let at = start + 8 * units;
    let parts = [(0x2000, &whole[start..at]), (units as u16, &whole[at..])];
    parts.map(|(fragment, data)| {
        let mut ip = whole[14..start].to_vec();
        if is_v6 {
            ip[4..6].copy_from_slice(&(8 + data.len() as u16).to_be_bytes());
            // The source port tells packets apart.
            let identification = u16::from_be_bytes([whole[54], whole[55]]);
            ip.extend(fragment_header(ip[6], fragment, identification));
            ip[6] = 44;
        } else {
            ip[2..4].copy_from_slice(&(20 + data.len() as u16).to_be_bytes());
            ip[6..8].copy_from_slice(&fragment.to_be_bytes());
            ip[10..12].fill(0);
            let sum = !checksum::bytes(&ip);
            ip[10..12].copy_from_slice(&sum.to_ne_bytes());
        }
        [&whole[..14], &ip, data].concat()
    })
}

/// An inner frame as a remote sends it.
pub fn encapsulated(world: &World, from: [u8; 4], inner: &[u8]) -> Vec<u8> {
    let mut outer = Outer::new(world, 0);
    outer.addresses[0] = from;
    outer.build(inner)
}
