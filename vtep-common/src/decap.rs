//! Decides whether a frame from the wire is a plain VXLAN frame, and whether
//! an inner frame may take the fast path at all. Everything that needs no
//! lookup is here; what is not certain passes to the kernel.

use crate::checksum;
use crate::layout::{Config, Segment};
use crate::outcome::Outcome;
use crate::wire::{
    ETH_P_8021AD, ETH_P_8021Q, ETH_P_ARP, ETH_P_IP, ETH_P_IPV6, ETH_P_RARP, Ethernet,
    IPPROTO_ICMPV6, IPPROTO_UDP, InnerHead, Ipv4, Ipv6Flow, OuterV4, Udp, VXLAN_FLAGS_I, Wire,
};
use crate::{MacAddr, ecn};

/// ICMPv6 types 133 to 137 are neighbour discovery (RFC 4861).
const ND: core::ops::RangeInclusive<u8> = 133..=137;

/// First look at a frame on an uplink: IPv4, UDP, a mirrored port, for us.
/// Traffic that is not VXLAN leaves in the first comparisons.
#[inline(always)]
pub fn addressed_to_vtep(outer: &OuterV4, config: &Config) -> Result<(), Outcome> {
    if outer.eth.ethertype() != ETH_P_IP
        || outer.ip.version_ihl >> 4 != 4
        || outer.ip.protocol != IPPROTO_UDP
    {
        return Err(Outcome::IngressPassNotVxlan);
    }
    if outer.ip.version_ihl != 0x45 {
        return Err(Outcome::IngressPassIpOptions);
    }
    if outer.ip.is_fragment() {
        return Err(Outcome::IngressPassFragment);
    }
    let [a, b, c, d] = config.udp_ports;
    let port = outer.udp.destination;
    if port == [0, 0] || (port != a && port != b && port != c && port != d) {
        return Err(Outcome::IngressPassNotVxlan);
    }
    let mac = MacAddr(outer.eth.destination).to_bits();
    let [m0, m1, m2, m3, m4, m5, m6, m7] = config.uplink_macs;
    if mac != m0
        && mac != m1
        && mac != m2
        && mac != m3
        && mac != m4
        && mac != m5
        && mac != m6
        && mac != m7
    {
        return Err(Outcome::IngressPassOtherMac);
    }
    Ok(())
}

/// The outer headers of a frame for `segment` are complete and right.
/// `frame_bytes`: length of the whole frame. The UDP checksum is not looked at.
#[inline(always)]
pub fn well_formed(outer: &OuterV4, segment: &Segment, frame_bytes: u32) -> Result<(), Outcome> {
    if outer.ip.destination != segment.local_v4() {
        return Err(Outcome::IngressPassOtherAddress);
    }
    let total = outer.ip.total_length() as u32;
    let first = outer.ip.source[0];
    if total + Ethernet::LEN as u32 != frame_bytes
        || u16::from_be_bytes(outer.udp.length) as u32 + Ipv4::LEN as u32 != total
        || checksum::ipv4_header(&outer.ip) != 0xffff
        // Sources the kernel's routing refuses: "this network", loopback,
        // multicast and above (net/ipv4/route.c, ip_route_input_slow).
        || first == 0
        || first == 127
        || first >= 224
    {
        return Err(Outcome::IngressPassMalformed);
    }
    if outer.ip.source == segment.local_v4() {
        return Err(Outcome::IngressDropOwnSource);
    }
    if outer.vxlan.flags != VXLAN_FLAGS_I || outer.vxlan.vni[3] != 0 {
        return Err(Outcome::IngressPassFlags);
    }
    Ok(())
}

/// Whether a UDP checksum is right. `sum`: folded sum over the UDP header and
/// everything behind it.
#[inline(always)]
pub fn udp_checksum_is_right(ip: &Ipv4, udp: &Udp, sum: u16) -> bool {
    let length = u16::from_be_bytes(udp.length);
    let pseudo = checksum::udp_pseudo_v4(ip.source, ip.destination, length);
    checksum::fold(pseudo + sum as u64) == 0xffff
}

/// What an inner frame asks of the bridge.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Inner {
    /// Known unicast is all there is to it.
    Plain,
    /// Broadcast or multicast.
    Multicast,
    /// The kernel must see it: VLAN tags, ARP and RARP, neighbour discovery,
    /// sources no station can have.
    Control,
    /// Too short for what its type says.
    Truncated,
}

/// Sort an inner frame. `ipv4`, `ipv6`: views behind the Ethernet header, if
/// they fit. The VXLAN device drops IP packets without a complete header, in
/// both directions (pskb_inet_may_pull, skb_vlan_inet_prepare in
/// include/net/ip_tunnels.h).
#[inline(always)]
pub fn classify(head: &InnerHead, ipv4: Option<&Ipv4>, ipv6: Option<&Ipv6Flow>) -> Inner {
    if MacAddr(head.eth.destination).is_multicast() {
        return Inner::Multicast;
    }
    let source = head.source_bits();
    if source & 1 != 0 || source == 0 {
        return Inner::Control;
    }
    match head.eth.ethertype() {
        ETH_P_8021Q | ETH_P_8021AD | ETH_P_ARP | ETH_P_RARP => Inner::Control,
        ETH_P_IP if ipv4.is_none() => Inner::Truncated,
        ETH_P_IPV6 => match ipv6 {
            None => Inner::Truncated,
            Some(flow) if flow.ip.next_header == IPPROTO_ICMPV6 && ND.contains(&flow.ports[0]) => {
                Inner::Control
            }
            Some(_) => Inner::Plain,
        },
        _ => Inner::Plain,
    }
}

/// Whether the inner header stays as it is when the outer one is removed.
#[inline(always)]
pub fn ecn_unchanged(outer: &OuterV4, head: &InnerHead) -> bool {
    match head.traffic_class() {
        Some(inner) => ecn::decap_is_identity(outer.ip.tos, inner),
        None => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::view;

    /// The kernel's device drops them; found by comparing with it.
    #[test]
    fn ip_packets_without_a_complete_header_are_left_to_the_kernel() {
        for (ethertype, complete_bytes) in [(ETH_P_IP, 20), (ETH_P_IPV6, 44), (0x88b5, 2)] {
            for length in 2..60 {
                let mut frame = vec![0x02; 14 + length];
                frame[12..14].copy_from_slice(&ethertype.to_be_bytes());
                let head: &InnerHead = view(&frame, 0).unwrap();
                let expected = if length < complete_bytes {
                    Inner::Truncated
                } else {
                    Inner::Plain
                };
                let found = classify(head, view(&frame, 14), view(&frame, 14));
                assert_eq!(found, expected, "{ethertype:#06x}, {length} bytes");
            }
        }
    }
}
