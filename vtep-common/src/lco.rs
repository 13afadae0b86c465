//! Local checksum offload (Documentation/networking/checksum-offloads.rst): the
//! sum of an inner frame for the outer UDP checksum, without its payload. The
//! inner checksum makes the sum of what it covers known: the complement of its
//! pseudo header, whether it is there already or somebody below still puts it in.

use crate::checksum;
use crate::wire::{
    IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_TCP, IPPROTO_UDP, InnerIpv4, InnerIpv6, Tcp, Udp, Wire,
};

/// What has to be summed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transport {
    /// Nothing: this is the sum of the whole frame, folded.
    Known(u16),
    /// Everything from the transport header on; goes to [`verified`].
    Verify { before: u64, pseudo: u16 },
    /// The whole frame: it has no unfinished checksum.
    Whole,
    /// The bytes to sum are not final, or may not be: somebody below has a
    /// checksum to put in where it is not seen from here.
    Unknown,
}

/// `tcp`, `udp`: views behind the IP header. `frame_bytes`: length of the frame.
#[inline(always)]
pub fn ipv4(
    inner: &InnerIpv4,
    tcp: Option<&Tcp>,
    udp: Option<&Udp>,
    frame_bytes: u32,
) -> Transport {
    let ip = &inner.ip;
    if ip.is_fragment() {
        return Transport::Whole;
    }
    if ip.version_ihl != 0x45 {
        return Transport::Unknown;
    }
    if ip.protocol == IPPROTO_ICMP {
        return Transport::Whole;
    }
    let Some(bytes) = frame_bytes.checked_sub(InnerIpv4::LEN as u32) else {
        return Transport::Unknown;
    };
    // Padding is covered by the outer checksum only.
    if ip.total_length() as u32 + 14 != frame_bytes {
        return Transport::Unknown;
    }
    let addresses =
        u32::from_ne_bytes(ip.source) as u64 + u32::from_ne_bytes(ip.destination) as u64;
    let before = checksum::header(inner) as u64;
    transport(before, addresses, ip.protocol, bytes, tcp, udp)
}

#[inline(always)]
pub fn ipv6(
    inner: &InnerIpv6,
    tcp: Option<&Tcp>,
    udp: Option<&Udp>,
    frame_bytes: u32,
) -> Transport {
    let ip = &inner.ip;
    if ip.next_header == IPPROTO_ICMPV6 {
        return Transport::Whole;
    }
    let Some(bytes) = frame_bytes.checked_sub(InnerIpv6::LEN as u32) else {
        return Transport::Unknown;
    };
    if ip.payload_length() as u32 != bytes {
        return Transport::Unknown;
    }
    let addresses = checksum::addresses_v6(&ip.source, &ip.destination);
    let before = checksum::header(inner) as u64;
    transport(before, addresses, ip.next_header, bytes, tcp, udp)
}

#[inline(always)]
fn transport(
    before: u64,
    addresses: u64,
    protocol: u8,
    bytes: u32,
    tcp: Option<&Tcp>,
    udp: Option<&Udp>,
) -> Transport {
    let field = match (protocol, tcp, udp) {
        (IPPROTO_TCP, Some(tcp), _) => tcp.checksum,
        // None at all: the payload may be a tunnel with something unfinished in it.
        (IPPROTO_UDP, _, Some(udp)) if udp.checksum != [0, 0] => udp.checksum,
        _ => return Transport::Unknown,
    };
    let length = (bytes as u16).to_be() as u64;
    let pseudo = checksum::fold(addresses + (protocol as u16).to_be() as u64 + length);
    if u16::from_ne_bytes(field) == pseudo {
        // Unfinished: the field holds the pseudo header's sum. (Or it is finished, right, and
        // equal by chance; then the sum is the same.)
        Transport::Known(checksum::fold(before + !pseudo as u64))
    } else {
        Transport::Verify { before, pseudo }
    }
}

/// Sum of the whole frame, if the transport checksum is right: a wrong one may
/// also be one that is right when a checksum further inside has been put in.
/// `sum`: folded, from the transport header to the end.
#[inline(always)]
pub fn verified(before: u64, pseudo: u16, sum: u16) -> Option<u16> {
    if checksum::fold(pseudo as u64 + sum as u64) == 0xffff {
        Some(checksum::fold(before + sum as u64))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::view;

    /// A frame of one of both families with a TCP or UDP payload; the transport
    /// checksum is unfinished.
    fn frame(v6: bool, protocol: u8, addresses: [u8; 32], payload: &[u8]) -> (Vec<u8>, usize) {
        let header = if protocol == IPPROTO_TCP { 20 } else { 8 };
        let bytes = header + payload.len();
        let mut f = vec![2u8; 12];
        if v6 {
            f.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            f.extend((bytes as u16).to_be_bytes());
            f.extend([protocol, 64]);
            f.extend(addresses);
        } else {
            f.extend([8, 0, 0x45, 0]);
            f.extend((20 + bytes as u16).to_be_bytes());
            f.extend([0, 1, 0x40, 0, 64, protocol, 0x12, 0x34]);
            f.extend(&addresses[..8]);
        }
        let transport = f.len();
        f.resize(transport + header, 0x5a);
        f.extend(payload);
        let field = transport + if protocol == IPPROTO_TCP { 16 } else { 6 };
        let mut pseudo = if v6 {
            addresses.to_vec()
        } else {
            addresses[..8].to_vec()
        };
        pseudo.extend([0, protocol]);
        pseudo.extend((bytes as u16).to_be_bytes());
        let pseudo = checksum::bytes(&pseudo);
        f[field..field + 2].copy_from_slice(&pseudo.to_ne_bytes());
        (f, field)
    }

    fn ask(frame: &[u8], v6: bool) -> Transport {
        let bytes = frame.len() as u32;
        if v6 {
            ipv6(
                view(frame, 0).unwrap(),
                view(frame, 54),
                view(frame, 54),
                bytes,
            )
        } else {
            ipv4(
                view(frame, 0).unwrap(),
                view(frame, 34),
                view(frame, 34),
                bytes,
            )
        }
    }

    /// What the device makes of it.
    fn finish(frame: &mut [u8], v6: bool, field: usize) {
        let sum = !checksum::bytes(&frame[if v6 { 54 } else { 34 }..]);
        frame[field..field + 2].copy_from_slice(&sum.to_ne_bytes());
    }

    proptest::proptest! {
        #[test]
        fn f14_sum_is_that_of_the_finished_frame(
            v6: bool, tcp: bool, addresses: [u8; 32],
            payload in proptest::collection::vec(0u8.., 0..1400),
        ) {
            let protocol = if tcp { IPPROTO_TCP } else { IPPROTO_UDP };
            let (mut f, field) = frame(v6, protocol, addresses, &payload);
            let Transport::Known(unfinished) = ask(&f, v6) else {
                panic!("{:?}", ask(&f, v6));
            };
            finish(&mut f, v6, field);
            let whole = checksum::bytes(&f);
            proptest::prop_assert_eq!(unfinished % 0xffff, whole % 0xffff);
            let transport = if v6 { 54 } else { 34 };
            match ask(&f, v6) {
                Transport::Known(sum) => proptest::prop_assert_eq!(sum % 0xffff, whole % 0xffff),
                Transport::Verify { before, pseudo } => {
                    let sum = checksum::bytes(&f[transport..]);
                    let sum = verified(before, pseudo, sum).unwrap();
                    proptest::prop_assert_eq!(sum % 0xffff, whole % 0xffff);
                    let last = f.len() - 1;
                    f[last] ^= 1;
                    let sum = checksum::bytes(&f[transport..]);
                    proptest::prop_assert_eq!(verified(before, pseudo, sum), None);
                }
                // A finished UDP checksum of zero, which nobody sends.
                other => proptest::prop_assert!(f[field..field + 2] == [0, 0], "{:?}", other),
            }
        }
    }

    #[test]
    fn what_may_hide_an_unfinished_checksum_is_unknown() {
        let (plain, field) = frame(false, IPPROTO_UDP, [9; 32], &[0; 64]);
        let mut no_checksum = plain.clone();
        no_checksum[field..field + 2].fill(0);
        let mut gre = plain.clone();
        gre[23] = 47;
        let mut options = plain.clone();
        options[14] = 0x46;
        let mut padded = plain.clone();
        padded.push(0);
        for f in [no_checksum, gre, options, padded] {
            assert_eq!(ask(&f, false), Transport::Unknown);
        }
        let mut fragment = plain.clone();
        fragment[20] |= 0x20;
        assert_eq!(ask(&fragment, false), Transport::Whole);
        let mut icmp = plain;
        icmp[23] = IPPROTO_ICMP;
        assert_eq!(ask(&icmp, false), Transport::Whole);
    }
}
