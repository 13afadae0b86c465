//! Decides whether a frame from the wire is a plain VXLAN frame, and whether
//! an inner frame may take the fast path at all. Everything that needs no
//! lookup is here; what is not certain passes to the kernel.

use crate::checksum;
use crate::layout::{
    Config, REMOTE_V6, Remote, SEGMENT_ZERO_CHECKSUM, Segment, VniKey, address_v4,
};
use crate::outcome::Outcome;
use crate::wire::{
    ETH_P_8021AD, ETH_P_8021Q, ETH_P_ARP, ETH_P_IP, ETH_P_IPV6, ETH_P_PPP_SES, ETH_P_RARP,
    Ethernet, IPPROTO_ICMPV6, IPPROTO_TCP, IPPROTO_UDP, InnerHead, Ipv4, Ipv6, Ipv6Flow, OuterV4,
    OuterV6, Udp, VXLAN_FLAGS_I, Vxlan, Wire,
};
use crate::{MacAddr, ecn};

/// ICMPv6 types 133 to 137 are neighbour discovery (RFC 4861).
const ND: core::ops::RangeInclusive<u8> = 133..=137;

/// The outer headers of one underlay family: what ingress asks of them.
pub trait Outer: Wire {
    /// Offset of the UDP header.
    const UDP: usize;

    fn eth(&self) -> &Ethernet;
    fn udp(&self) -> &Udp;
    fn vxlan(&self) -> &Vxlan;
    /// TOS or traffic class.
    fn tos(&self) -> u8;
    /// An IP header that UDP follows at once: no options, no fragment.
    fn is_plain_udp(&self) -> Result<(), Outcome>;
    /// Whether it is addressed to the segment's local address.
    fn is_to(&self, segment: &Segment) -> bool;
    /// Lengths, header checksum and addresses are right. `frame_bytes`: length
    /// of the whole frame.
    fn is_well_formed(&self, segment: &Segment, frame_bytes: u32) -> Result<(), Outcome>;
    /// Which VXLAN device the frame is for.
    fn key(&self) -> VniKey;
    /// As in [`crate::layout::PeerKey`].
    fn source(&self) -> [u8; 16];
    /// Whether the frame came from this remote.
    fn is_from(&self, remote: &Remote) -> bool;
    /// Pseudo header of the UDP checksum.
    fn pseudo_sum(&self) -> u64;
    /// Whether a frame without a UDP checksum is accepted.
    fn takes_zero_checksum(segment: &Segment) -> bool;
}

impl Outer for OuterV4 {
    const UDP: usize = Ethernet::LEN + Ipv4::LEN;

    #[inline(always)]
    fn eth(&self) -> &Ethernet {
        &self.eth
    }

    #[inline(always)]
    fn udp(&self) -> &Udp {
        &self.udp
    }

    #[inline(always)]
    fn vxlan(&self) -> &Vxlan {
        &self.vxlan
    }

    #[inline(always)]
    fn tos(&self) -> u8 {
        self.ip.tos
    }

    #[inline(always)]
    fn is_plain_udp(&self) -> Result<(), Outcome> {
        if self.ip.version_ihl >> 4 != 4 || self.ip.protocol != IPPROTO_UDP {
            return Err(Outcome::IngressPassNotVxlan);
        }
        if self.ip.version_ihl != 0x45 {
            return Err(Outcome::IngressPassIpOptions);
        }
        if self.ip.is_fragment() {
            return Err(Outcome::IngressPassFragment);
        }
        Ok(())
    }

    #[inline(always)]
    fn is_to(&self, segment: &Segment) -> bool {
        self.ip.destination == segment.local_v4()
    }

    #[inline(always)]
    fn is_well_formed(&self, segment: &Segment, frame_bytes: u32) -> Result<(), Outcome> {
        if !self.is_to(segment) {
            return Err(Outcome::IngressPassOtherAddress);
        }
        let total = self.ip.total_length() as u32;
        let first = self.ip.source[0];
        if total + Ethernet::LEN as u32 != frame_bytes
            || u16::from_be_bytes(self.udp.length) as u32 + Ipv4::LEN as u32 != total
            || checksum::ipv4_header(&self.ip) != 0xffff
            // Sources the kernel's routing refuses: "this network", loopback,
            // multicast and above (net/ipv4/route.c, ip_route_input_slow).
            || first == 0
            || first == 127
            || first >= 224
        {
            return Err(Outcome::IngressPassMalformed);
        }
        if self.ip.source == segment.local_v4() {
            return Err(Outcome::IngressDropOwnSource);
        }
        Ok(())
    }

    #[inline(always)]
    fn key(&self) -> VniKey {
        VniKey::from_words(
            u32::from_ne_bytes(self.vxlan.vni),
            u16::from_ne_bytes(self.udp.destination),
        )
    }

    #[inline(always)]
    fn source(&self) -> [u8; 16] {
        address_v4(self.ip.source)
    }

    #[inline(always)]
    fn is_from(&self, remote: &Remote) -> bool {
        remote.flags & REMOTE_V6 == 0 && remote.destination_v4() == self.ip.source
    }

    #[inline(always)]
    fn pseudo_sum(&self) -> u64 {
        let length = u16::from_be_bytes(self.udp.length);
        checksum::udp_pseudo_v4(self.ip.source, self.ip.destination, length)
    }

    /// Always (RFC 7348 section 5).
    #[inline(always)]
    fn takes_zero_checksum(_: &Segment) -> bool {
        true
    }
}

impl Outer for OuterV6 {
    const UDP: usize = Ethernet::LEN + Ipv6::LEN;

    #[inline(always)]
    fn eth(&self) -> &Ethernet {
        &self.eth
    }

    #[inline(always)]
    fn udp(&self) -> &Udp {
        &self.udp
    }

    #[inline(always)]
    fn vxlan(&self) -> &Vxlan {
        &self.vxlan
    }

    #[inline(always)]
    fn tos(&self) -> u8 {
        self.ip.traffic_class()
    }

    /// Extension headers and fragments have another next header.
    #[inline(always)]
    fn is_plain_udp(&self) -> Result<(), Outcome> {
        if self.ip.version_class_label[0] >> 4 != 6 || self.ip.next_header != IPPROTO_UDP {
            return Err(Outcome::IngressPassNotVxlan);
        }
        Ok(())
    }

    #[inline(always)]
    fn is_to(&self, segment: &Segment) -> bool {
        self.ip.destination == segment.local
    }

    #[inline(always)]
    fn is_well_formed(&self, segment: &Segment, frame_bytes: u32) -> Result<(), Outcome> {
        if !self.is_to(segment) {
            return Err(Outcome::IngressPassOtherAddress);
        }
        let payload = self.ip.payload_length() as u32;
        let source = &self.ip.source;
        if payload + (Ethernet::LEN + Ipv6::LEN) as u32 != frame_bytes
            || u16::from_be_bytes(self.udp.length) as u32 != payload
            // Sources the kernel looks at more closely: multicast, and those
            // that begin with zeros: none, loopback, mapped IPv4 (net/ipv6/ip6_input.c).
            || source[0] == 0xff
            || u64::from_ne_bytes([
                source[0], source[1], source[2], source[3], source[4], source[5], source[6],
                source[7],
            ]) == 0
        {
            return Err(Outcome::IngressPassMalformed);
        }
        if self.ip.source == segment.local {
            return Err(Outcome::IngressDropOwnSource);
        }
        Ok(())
    }

    #[inline(always)]
    fn key(&self) -> VniKey {
        VniKey::from_words_v6(
            u32::from_ne_bytes(self.vxlan.vni),
            u16::from_ne_bytes(self.udp.destination),
        )
    }

    #[inline(always)]
    fn source(&self) -> [u8; 16] {
        self.ip.source
    }

    #[inline(always)]
    fn is_from(&self, remote: &Remote) -> bool {
        remote.is_destination_v6(&self.ip.source)
    }

    #[inline(always)]
    fn pseudo_sum(&self) -> u64 {
        let length = u16::from_be_bytes(self.udp.length);
        checksum::udp_pseudo_v6(&self.ip.source, &self.ip.destination, length)
    }

    /// R30: unless the device says so (`udp6zerocsumrx`), the kernel drops it.
    #[inline(always)]
    fn takes_zero_checksum(segment: &Segment) -> bool {
        segment.flags & SEGMENT_ZERO_CHECKSUM != 0
    }
}

/// First look at a frame on an uplink: UDP, a mirrored port, for us. Traffic
/// that is not VXLAN leaves in the first comparisons.
#[inline(always)]
pub fn addressed_to_vtep<O: Outer>(outer: &O, config: &Config) -> Result<(), Outcome> {
    outer.is_plain_udp()?;
    let [a, b, c, d] = config.udp_ports;
    let port = outer.udp().destination;
    if port == [0, 0] || (port != a && port != b && port != c && port != d) {
        return Err(Outcome::IngressPassNotVxlan);
    }
    let mac = MacAddr(outer.eth().destination).to_bits();
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

/// The outer headers of a frame for `segment` are complete and right. The UDP
/// checksum is not looked at, only whether there has to be one.
#[inline(always)]
pub fn well_formed<O: Outer>(
    outer: &O,
    segment: &Segment,
    frame_bytes: u32,
) -> Result<(), Outcome> {
    outer.is_well_formed(segment, frame_bytes)?;
    let vxlan = outer.vxlan();
    if vxlan.flags != VXLAN_FLAGS_I || vxlan.vni[3] != 0 {
        return Err(Outcome::IngressPassFlags);
    }
    if outer.udp().checksum == [0, 0] && !O::takes_zero_checksum(segment) {
        return Err(Outcome::IngressPassChecksum);
    }
    Ok(())
}

/// Whether a UDP checksum is right. `sum`: folded sum over the UDP header and
/// everything behind it.
#[inline(always)]
pub fn udp_checksum_is_right<O: Outer>(outer: &O, sum: u16) -> bool {
    checksum::fold(outer.pseudo_sum() + sum as u64) == 0xffff
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
/// include/net/ip_tunnels.h); a bridge with br_netfilter PPPoE sessions without
/// a header (br_nf_pre_routing), which are left to it together with a few more.
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
        ETH_P_IP | ETH_P_PPP_SES if ipv4.is_none() => Inner::Truncated,
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

/// What the outer mark does to the inner header (R27).
#[inline(always)]
pub fn ecn(outer_tos: u8, head: &InnerHead) -> ecn::Decap {
    match head.traffic_class() {
        Some(inner) => ecn::decap(outer_tos, inner),
        None => ecn::Decap::Keep,
    }
}

/// Whether GRO may merge an inner frame: TCP, and not a fragment. All frames of
/// a connection get the same answer.
#[inline(always)]
pub fn is_tcp(head: &InnerHead, ipv4: Option<&Ipv4>, ipv6: Option<&Ipv6Flow>) -> bool {
    match (head.eth.ethertype(), ipv4, ipv6) {
        (ETH_P_IP, Some(ip), _) => ip.protocol == IPPROTO_TCP && !ip.is_fragment(),
        (ETH_P_IPV6, _, Some(flow)) => flow.ip.next_header == IPPROTO_TCP,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::view;

    /// The kernel drops them; found by comparing with it.
    #[test]
    fn packets_without_a_complete_header_are_left_to_the_kernel() {
        let complete = [
            (ETH_P_IP, 20),
            (ETH_P_IPV6, 44),
            (ETH_P_PPP_SES, 20),
            (0x88b5, 2),
        ];
        for (ethertype, complete_bytes) in complete {
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
