//! Writes the outer headers: the template of the remote, then the fields that
//! differ from frame to frame. The room has been made by the caller; nothing
//! here can fail.

use crate::checksum;
use crate::ecn;
use crate::layout::{
    HEADER_V4_LEN, HEADER_V6_LEN, REMOTE_DF_INHERIT, REMOTE_INHERIT, REMOTE_TOS_INHERIT,
    REMOTE_TTL_INHERIT, REMOTE_UDP_CHECKSUM, REMOTE_V6, Remote,
};
use crate::wire::{
    ETH_P_IP, ETH_P_IPV6, InnerHead, Ipv4, Ipv6Flow, OuterV4, OuterV6, Udp, VXLAN_FLAGS_I, Vxlan,
    Wire,
};

/// What differs from frame to frame.
pub struct Frame {
    /// Inner frame, bytes. At most 65535 - 36.
    pub inner_bytes: u16,
    /// See [`crate::layout::vni_word`].
    pub vni_word: u32,
    pub marks: Marks,
    /// UDP source port, host order.
    pub source_port: u16,
    /// IPv4 identification, any value that differs between frames in flight.
    pub identification: u16,
    /// Folded sum of the inner frame; read only where the remote wants a UDP
    /// checksum.
    pub inner_sum: u16,
}

/// What the outer IP header takes from the inner one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Marks {
    /// Bits to add to the template's TOS or traffic class: ECN, and DSCP where
    /// it is inherited.
    pub tos: u8,
    /// TTL or hop limit; 0: the template's.
    pub ttl: u8,
    /// Set DF although the template does not.
    pub df: bool,
}

impl Marks {
    /// As the kernel's driver does it (vxlan_xmit_one in
    /// drivers/net/vxlan/vxlan_core.c).
    #[inline(always)]
    pub fn of(
        remote: &Remote,
        head: &InnerHead,
        ipv4: Option<&Ipv4>,
        ipv6: Option<&Ipv6Flow>,
    ) -> Self {
        let inner_tos = head.traffic_class().unwrap_or(0);
        let mut marks = Self {
            tos: ecn::encap(inner_tos),
            ttl: 0,
            df: false,
        };
        if remote.flags & REMOTE_INHERIT == 0 {
            return marks;
        }
        if remote.flags & REMOTE_TOS_INHERIT != 0 {
            marks.tos |= inner_tos & !ecn::MASK;
        }
        let (ttl, df) = match (head.eth.ethertype(), ipv4, ipv6) {
            (ETH_P_IP, Some(ip), _) => (ip.ttl, ip.fragment[0] & 0x40 != 0),
            (ETH_P_IPV6, _, Some(flow)) => (flow.ip.hop_limit, true),
            _ => (0, false),
        };
        if remote.flags & REMOTE_TTL_INHERIT != 0 {
            marks.ttl = ttl;
        }
        marks.df = df && remote.flags & REMOTE_DF_INHERIT != 0;
        marks
    }
}

impl Remote {
    /// Frames to this remote carry a UDP checksum.
    #[inline(always)]
    pub const fn wants_udp_checksum(&self) -> bool {
        self.flags & REMOTE_UDP_CHECKSUM != 0
    }

    #[inline(always)]
    pub const fn is_v6(&self) -> bool {
        self.flags & REMOTE_V6 != 0
    }

    #[inline(always)]
    fn vni_word(&self, frame: &Frame) -> u32 {
        if self.vni_word != 0 {
            self.vni_word
        } else {
            frame.vni_word
        }
    }
}

/// Write the 50 outer bytes of an IPv4 underlay.
#[inline(always)]
pub fn write_v4(out: &mut OuterV4, remote: &Remote, frame: &Frame) {
    copy_template::<HEADER_V4_LEN>(core::ptr::from_mut(out).cast(), remote);
    let udp_bytes = frame
        .inner_bytes
        .wrapping_add((Udp::LEN + Vxlan::LEN) as u16);
    let total_bytes = udp_bytes.wrapping_add(Ipv4::LEN as u16);

    let ip = &mut out.ip;
    let marks = &frame.marks;
    ip.tos |= marks.tos;
    ip.total_length = total_bytes.to_be_bytes();
    ip.identification = frame.identification.to_be_bytes();
    let mut sum = remote.ip_sum as u64
        + total_bytes.to_be() as u64
        + frame.identification.to_be() as u64
        + (marks.tos as u16).to_be() as u64;
    if marks.ttl != 0 {
        // Ones-complement: out with the old word, in with the new one.
        sum += !u16::from_ne_bytes([ip.ttl, ip.protocol]) as u64;
        ip.ttl = marks.ttl;
        sum += u16::from_ne_bytes([ip.ttl, ip.protocol]) as u64;
    }
    if marks.df {
        ip.fragment[0] |= 0x40;
        sum += u16::from_ne_bytes([0x40, 0]) as u64;
    }
    ip.checksum = (!checksum::fold(sum)).to_ne_bytes();

    let pseudo = if remote.wants_udp_checksum() {
        checksum::udp_pseudo_v4(ip.source, ip.destination, udp_bytes)
    } else {
        0
    };
    write_vxlan(
        &mut out.udp,
        &mut out.vxlan,
        remote,
        frame,
        udp_bytes,
        pseudo,
    );
}

/// Write the 70 outer bytes of an IPv6 underlay.
#[inline(always)]
pub fn write_v6(out: &mut OuterV6, remote: &Remote, frame: &Frame) {
    copy_template::<HEADER_V6_LEN>(core::ptr::from_mut(out).cast(), remote);
    let udp_bytes = frame
        .inner_bytes
        .wrapping_add((Udp::LEN + Vxlan::LEN) as u16);
    let ip = &mut out.ip;
    let marks = &frame.marks;
    ip.version_class_label[0] |= marks.tos >> 4;
    ip.version_class_label[1] |= marks.tos << 4;
    ip.payload_length = udp_bytes.to_be_bytes();
    if marks.ttl != 0 {
        ip.hop_limit = marks.ttl;
    }
    let pseudo = remote.ip_sum as u64 + udp_bytes.to_be() as u64;
    write_vxlan(
        &mut out.udp,
        &mut out.vxlan,
        remote,
        frame,
        udp_bytes,
        pseudo,
    );
}

/// UDP and VXLAN header. `pseudo`: sum of the pseudo header.
#[inline(always)]
fn write_vxlan(
    udp: &mut Udp,
    vxlan: &mut Vxlan,
    remote: &Remote,
    frame: &Frame,
    udp_bytes: u16,
    pseudo: u64,
) {
    let vni_word = remote.vni_word(frame);
    vxlan.flags = VXLAN_FLAGS_I;
    vxlan.vni = vni_word.to_ne_bytes();
    udp.source = frame.source_port.to_be_bytes();
    udp.length = udp_bytes.to_be_bytes();
    if remote.wants_udp_checksum() {
        let sum = pseudo
            + frame.source_port.to_be() as u64
            + u16::from_ne_bytes(udp.destination) as u64
            + udp_bytes.to_be() as u64
            + u32::from_ne_bytes(VXLAN_FLAGS_I) as u64
            + vni_word as u64
            + frame.inner_sum as u64;
        udp.checksum = match !checksum::fold(sum) {
            0 => [0xff; 2], // zero would mean "none" (RFC 768)
            checksum => checksum.to_ne_bytes(),
        };
    }
}

/// Copy the header in 8-byte words: a byte-wise memcpy is what the BPF back
/// end makes of anything it cannot prove aligned.
#[inline(always)]
fn copy_template<const LEN: usize>(to: *mut u8, remote: &Remote) {
    let from = remote.header.as_ptr();
    let mut at = 0;
    while at + 8 <= LEN {
        // SAFETY: both sides are at least LEN bytes long.
        unsafe {
            to.add(at)
                .cast::<u64>()
                .write_unaligned(from.add(at).cast::<u64>().read())
        };
        at += 8;
    }
    while at < LEN {
        // SAFETY: as above.
        unsafe { *to.add(at) = *from.add(at) };
        at += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::vni_word;
    use crate::wire::{Ethernet, view};
    use crate::{Vni, decap};

    fn remote(flags: u16) -> Remote {
        let mut r = Remote {
            flags,
            port_min: 49152,
            port_count: 16384,
            ifindex: 3,
            ..Remote::EMPTY
        };
        r.header[..14].copy_from_slice(&[2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8, 8, 0]);
        r.header[14..34].copy_from_slice(&[
            0x45, 0xb8, 0, 0, 0, 0, 0x40, 0, 64, 17, 0, 0, 192, 0, 2, 2, 198, 51, 100, 2,
        ]);
        r.header[36..38].copy_from_slice(&4789u16.to_be_bytes());
        r.ip_sum = checksum::bytes(&r.header[14..34]);
        r
    }

    fn encapsulate(remote: &Remote, inner: &[u8], identification: u16, ecn: u8) -> Vec<u8> {
        let mut frame = vec![0u8; OuterV4::LEN + inner.len()];
        frame[OuterV4::LEN..].copy_from_slice(inner);
        // SAFETY: OuterV4 is plain bytes and the vector is longer.
        let out = unsafe { &mut *frame.as_mut_ptr().cast::<OuterV4>() };
        write_v4(
            out,
            remote,
            &Frame {
                inner_bytes: inner.len() as u16,
                vni_word: vni_word(Vni::new(0x01_0203).unwrap()),
                marks: Marks {
                    tos: ecn,
                    ttl: 0,
                    df: false,
                },
                source_port: 50_000,
                identification,
                inner_sum: checksum::bytes(inner),
            },
        );
        frame
    }

    proptest::proptest! {
        #[test]
        fn r5_written_checksums_are_right(
            inner in proptest::collection::vec(0u8.., 14..1500), id: u16, ecn in 0u8..4,
        ) {
            for flags in [0, REMOTE_UDP_CHECKSUM] {
                let frame = encapsulate(&remote(flags), &inner, id, ecn);
                let outer: &OuterV4 = view(&frame, 0).unwrap();
                proptest::prop_assert_eq!(checksum::ipv4_header(&outer.ip), 0xffff);
                let sum = checksum::bytes(&frame[34..]);
                if flags == 0 {
                    proptest::prop_assert_eq!(outer.udp.checksum, [0, 0]);
                } else {
                    proptest::prop_assert_ne!(outer.udp.checksum, [0, 0]);
                    proptest::prop_assert!(decap::udp_checksum_is_right(outer, sum));
                }
                proptest::prop_assert_eq!(&frame[OuterV4::LEN..], &inner[..]);
            }
        }
    }

    #[test]
    fn r1_r3_header_fields_are_those_of_the_template() {
        let frame = encapsulate(&remote(0), &[0xaa; 60], 7, 1);
        let outer: &OuterV4 = view(&frame, 0).unwrap();
        assert_eq!(frame[..Ethernet::LEN], remote(0).header[..Ethernet::LEN]);
        assert_eq!(
            (outer.ip.tos, outer.ip.ttl, outer.ip.fragment),
            (0xb9, 64, [0x40, 0])
        );
        assert_eq!(
            outer.ip.total_length() as usize,
            frame.len() - Ethernet::LEN
        );
        assert_eq!(outer.udp.destination, 4789u16.to_be_bytes());
        assert_eq!(outer.vxlan.flags, VXLAN_FLAGS_I);
        assert_eq!(outer.vxlan.vni, [1, 2, 3, 0]);
    }

    #[test]
    fn r14_downstream_vni_of_the_remote_wins() {
        let mut r = remote(0);
        r.vni_word = vni_word(Vni::new(9).unwrap());
        let frame = encapsulate(&r, &[0; 60], 0, 0);
        assert_eq!(frame[46..50], [0, 0, 9, 0]);
    }
}
