//! Outer headers as a VXLAN device writes them: its options and two addresses
//! become the template that the programs copy. Pure values; which device, next
//! hop and hop limit is in `remotes`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use vtep_common::checksum;
use vtep_common::layout::{
    HEADER_V4_LEN, HEADER_V6_LEN, REMOTE_DF_INHERIT, REMOTE_NO_PORT_RANGE, REMOTE_TOS_INHERIT,
    REMOTE_TTL_INHERIT, REMOTE_UDP_CHECKSUM, REMOTE_V6, Remote, address_v4,
};
use vtep_common::wire::{ETH_P_IP, ETH_P_IPV6, Ethernet, IPPROTO_UDP, Ipv4, Ipv6, Wire};

use crate::kernel::{IfIndex, VxlanDevice};

/// Source ports where the device names no range. RFC 7348 section 5 recommends
/// this one; the kernel would take net.ipv4.ip_local_port_range (udp_flow_src_port
/// in include/net/udp.h), which other sockets of the host share.
const DEFAULT_PORTS: (u16, u16) = (49152, 16384);

/// Don't fragment, in the IPv4 fragment word (RFC 791).
const DF: u16 = 0x4000;
/// `tos inherit`: any other value is written as it is, without its ECN bits
/// (vxlan_core.c, vxlan_xmit_one).
const TOS_INHERIT: u8 = 1;
/// VXLAN_DF_SET and VXLAN_DF_INHERIT (include/uapi/linux/if_link.h).
const DF_SET: u8 = 1;
const DF_INHERIT: u8 = 2;

/// What a VXLAN device puts into every outer header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Policy {
    pub local: IpAddr,
    /// Device that the route has to lead through: that of the entry (`via`), else
    /// the VRF of the underlay device (vxlan_core.c, vxlan_xmit_one).
    pub link: Option<IfIndex>,
    pub udp_port: u16,
    pub port_min: u16,
    pub port_count: u16,
    /// `REMOTE_*` bits.
    pub flags: u16,
    /// 0: the route's hop limit.
    pub ttl: u8,
    /// DSCP bits only.
    pub tos: u8,
    /// IPv4 only.
    pub df: bool,
    /// IPv6 only.
    pub flow_label: u32,
}

impl Policy {
    pub fn of(device: &VxlanDevice, local: IpAddr, vrf: Option<IfIndex>) -> Self {
        let v6 = local.is_ipv6();
        let udp_checksum = if v6 {
            !device.udp6_zero_checksum_tx
        } else {
            device.udp_checksum
        };
        // The upper bound is exclusive, and an empty range means the default
        // (udp_flow_src_port).
        let range = match device.source_ports {
            (min, max) if min < max => Some((min, max - min)),
            _ => None,
        };
        let (port_min, port_count) = range.unwrap_or(DEFAULT_PORTS);
        let tos_inherit = device.tos == TOS_INHERIT;
        let flags = [
            (v6, REMOTE_V6),
            (udp_checksum, REMOTE_UDP_CHECKSUM),
            (range.is_none(), REMOTE_NO_PORT_RANGE),
            (tos_inherit, REMOTE_TOS_INHERIT),
            (device.ttl_inherit, REMOTE_TTL_INHERIT),
            (!v6 && device.df == DF_INHERIT, REMOTE_DF_INHERIT),
        ];
        Self {
            local,
            link: vrf,
            udp_port: device.udp_port,
            port_min,
            port_count,
            flags: flags.iter().filter(|(on, _)| *on).map(|(_, bit)| bit).sum(),
            ttl: if device.ttl_inherit { 0 } else { device.ttl },
            tos: if tos_inherit { 0 } else { device.tos & !3 },
            df: !v6 && device.df == DF_SET,
            flow_label: if v6 { device.flow_label } else { 0 },
        }
    }

    /// A slot without what the way adds: device, Ethernet addresses and VNI.
    pub fn header(&self, remote: IpAddr, hop_limit: u8) -> Remote {
        let mut value = Remote {
            flags: self.flags,
            port_min: self.port_min,
            port_count: self.port_count,
            ..Remote::EMPTY
        };
        let hop_limit = if self.ttl == 0 { hop_limit } else { self.ttl };
        let (eth, rest) = value.header.split_at_mut(Ethernet::LEN);
        let udp = match (self.local, remote) {
            (IpAddr::V4(local), IpAddr::V4(remote)) => {
                eth[12..].copy_from_slice(&ETH_P_IP.to_be_bytes());
                let (ip, udp) = rest.split_at_mut(Ipv4::LEN);
                self.ipv4(ip, local, remote, hop_limit);
                value.ip_sum = checksum::bytes(ip);
                udp
            }
            (IpAddr::V6(local), IpAddr::V6(remote)) => {
                eth[12..].copy_from_slice(&ETH_P_IPV6.to_be_bytes());
                let (ip, udp) = rest.split_at_mut(Ipv6::LEN);
                self.ipv6(ip, local, remote, hop_limit);
                let addresses = u64::from(checksum::bytes(&ip[8..]));
                let protocol = u64::from(u16::from(IPPROTO_UDP).to_be());
                value.ip_sum = checksum::fold(addresses + protocol);
                udp
            }
            // Not reached: `RemoteKey::of` compares the families.
            _ => return Remote::EMPTY,
        };
        udp[2..4].copy_from_slice(&self.udp_port.to_be_bytes());
        value
    }

    fn ipv4(&self, ip: &mut [u8], local: Ipv4Addr, remote: Ipv4Addr, hop_limit: u8) {
        ip[0] = 0x45;
        ip[1] = self.tos;
        ip[6..8].copy_from_slice(&if self.df { DF } else { 0 }.to_be_bytes());
        ip[8] = hop_limit;
        ip[9] = IPPROTO_UDP;
        ip[12..16].copy_from_slice(&local.octets());
        ip[16..20].copy_from_slice(&remote.octets());
    }

    fn ipv6(&self, ip: &mut [u8], local: Ipv6Addr, remote: Ipv6Addr, hop_limit: u8) {
        let first = 6 << 28 | u32::from(self.tos) << 20 | self.flow_label;
        ip[..4].copy_from_slice(&first.to_be_bytes());
        ip[6] = IPPROTO_UDP;
        ip[7] = hop_limit;
        ip[8..24].copy_from_slice(&local.octets());
        ip[24..40].copy_from_slice(&remote.octets());
    }
}

const _: () = assert!(HEADER_V4_LEN == Ethernet::LEN + Ipv4::LEN + 8);
const _: () = assert!(HEADER_V6_LEN == Ethernet::LEN + Ipv6::LEN + 8);

/// Where the TTL or hop limit stands in a template.
pub(super) const fn hop_limit_at(remote: IpAddr) -> usize {
    match remote {
        IpAddr::V4(_) => Ethernet::LEN + 8,
        IpAddr::V6(_) => Ethernet::LEN + 7,
    }
}

/// As the maps keep addresses of either family.
pub(super) const fn address_bytes(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => address_v4(ip.octets()),
        IpAddr::V6(ip) => ip.octets(),
    }
}

/// Whether an address can be that of one host. IPv6 addresses that mean an IPv4
/// address are none: no network routes them, and the maps would mix them up.
pub(super) fn is_host(ip: IpAddr) -> bool {
    let host = !ip.is_unspecified() && !ip.is_loopback() && !ip.is_multicast();
    match ip {
        IpAddr::V4(_) => host,
        IpAddr::V6(ip) => host && ip.to_ipv4().is_none(),
    }
}
