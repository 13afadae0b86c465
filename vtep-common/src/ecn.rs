//! Explicit congestion notification through a tunnel (RFC 6040), as the
//! kernel does it (include/net/inet_ecn.h).

/// The two ECN bits of a TOS or traffic class.
pub const MASK: u8 = 3;
pub const NOT_ECT: u8 = 0;
pub const ECT_1: u8 = 1;
pub const ECT_0: u8 = 2;
pub const CE: u8 = 3;

/// What decapsulation makes of an inner mark (RFC 6040 figure 4).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decap {
    Keep,
    /// The inner mark becomes this one.
    Set(u8),
    /// The kernel drops or logs the frame: it has to see it.
    Refuse,
}

/// Merge the outer mark into the inner one, as `INET_ECN_decapsulate` does.
#[inline(always)]
pub const fn decap(outer_tos: u8, inner_tos: u8) -> Decap {
    let (outer, inner) = (outer_tos & MASK, inner_tos & MASK);
    match (outer, inner) {
        (NOT_ECT, _) => Decap::Keep,
        (_, NOT_ECT) => Decap::Refuse,
        (CE, ECT_0 | ECT_1) => Decap::Set(CE),
        (ECT_1, ECT_0) => Decap::Set(ECT_1),
        _ => Decap::Keep,
    }
}

/// Give an inner IPv4 header a mark. The checksum is updated as the kernel does
/// it (`csum16_add`): where both 0 and 0xffff are right, both paths must choose
/// the same.
#[inline(always)]
pub fn set_v4(ip: &mut crate::wire::Ipv4, mark: u8) {
    let old = (ip.tos & MASK) as u16;
    let new = (mark & MASK) as u16;
    // The header's sum grows by the difference, its complement shrinks.
    let add = if new > old { !(new - old) } else { old - new };
    let (sum, carry) = u16::from_be_bytes(ip.checksum).overflowing_add(add);
    ip.checksum = (sum + carry as u16).to_be_bytes();
    ip.tos = (ip.tos & !MASK) | (mark & MASK);
}

/// Give an inner IPv6 header a mark.
#[inline(always)]
pub fn set_v6(ip: &mut crate::wire::Ipv6, mark: u8) {
    let byte = &mut ip.version_class_label[1];
    *byte = (*byte & !(MASK << 4)) | ((mark & MASK) << 4);
}

/// ECN bits of the outer header for an inner TOS: the inner bits, and ECT(0)
/// for CE. That is what the kernel does (`INET_ECN_encapsulate`, the "full
/// functionality" of RFC 3168); RFC 6040 would copy CE as well. Both paths of a
/// flow must agree, so the kernel wins.
#[inline(always)]
pub const fn encap(inner_tos: u8) -> u8 {
    match inner_tos & MASK {
        CE => ECT_0,
        ecn => ecn,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 6040 figure 4, rows inner, columns outer: the inner mark after
    /// decapsulation, or `None` where the frame is dropped or logged.
    const FIGURE_4: [[Option<u8>; 4]; 4] = [
        // outer Not-ECT, ECT(1), ECT(0), CE
        [Some(NOT_ECT), None, None, None], // inner Not-ECT
        [Some(ECT_1), Some(ECT_1), Some(ECT_1), Some(CE)], // inner ECT(1)
        [Some(ECT_0), Some(ECT_1), Some(ECT_0), Some(CE)], // inner ECT(0)
        [Some(CE), Some(CE), Some(CE), Some(CE)], // inner CE
    ];

    #[test]
    fn r27_ecn_decap_table() {
        for inner in 0..4u8 {
            for outer in 0..4u8 {
                // Figure 4 lists its columns as Not-ECT, ECT(1), ECT(0), CE: the numbers' order.
                let expected = match FIGURE_4[inner as usize][outer as usize] {
                    None => Decap::Refuse,
                    Some(mark) if mark == inner => Decap::Keep,
                    Some(mark) => Decap::Set(mark),
                };
                // The upper six bits must not matter.
                for dscp in [0, 0xb8, 0xfc] {
                    let found = decap(outer | dscp, inner | !dscp & 0xfc);
                    assert_eq!(found, expected, "outer {outer} inner {inner}");
                }
            }
        }
    }

    #[test]
    fn r27_inner_checksum_stays_right_and_the_rest_stays() {
        for seed in 0..=u16::MAX {
            for (old, new) in [(ECT_0, CE), (ECT_1, CE), (ECT_0, ECT_1)] {
                let mut b = [0u8; 20];
                b[0] = 0x45;
                b[1] = 0xb8 | old;
                b[4..6].copy_from_slice(&seed.to_be_bytes());
                b[8] = 64;
                let sum = !u16::from_be(crate::checksum::bytes(&b));
                b[10..12].copy_from_slice(&sum.to_be_bytes());
                let mut ip = *crate::wire::view::<crate::wire::Ipv4>(&b, 0).unwrap();
                set_v4(&mut ip, new);
                assert_eq!(crate::checksum::ipv4_header(&ip), 0xffff, "{seed}");
                assert_eq!((ip.tos, ip.ttl), (0xb8 | new, 64));
            }
        }
        let mut b = [0xffu8; 40];
        b[1] = 0xaf;
        let mut ip = *crate::wire::view::<crate::wire::Ipv6>(&b, 0).unwrap();
        set_v6(&mut ip, CE);
        assert_eq!(
            (ip.version_class_label, ip.traffic_class()),
            ([0xff, 0xbf, 0xff, 0xff], 0xfb)
        );
    }
}
