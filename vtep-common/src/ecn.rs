//! Explicit congestion notification through a tunnel (RFC 6040), as the
//! kernel does it (include/net/inet_ecn.h).

/// The two ECN bits of a TOS or traffic class.
pub const MASK: u8 = 3;
pub const NOT_ECT: u8 = 0;
pub const ECT_1: u8 = 1;
pub const ECT_0: u8 = 2;
pub const CE: u8 = 3;

/// Whether a frame with these marks leaves the tunnel as it is: the cells of
/// the RFC 6040 table in which neither the inner header changes, nor the frame
/// is dropped, nor the kernel logs.
#[inline(always)]
pub const fn decap_is_identity(outer_tos: u8, inner_tos: u8) -> bool {
    let (outer, inner) = (outer_tos & MASK, inner_tos & MASK);
    match outer {
        NOT_ECT => true,
        ECT_0 => inner != NOT_ECT,
        ECT_1 => inner == ECT_1 || inner == CE,
        _ => inner == CE,
    }
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
    fn r27_identity_cells_of_the_decap_table() {
        for inner in 0..4u8 {
            for outer in 0..4u8 {
                let expected = FIGURE_4[inner as usize][outer as usize] == Some(inner);
                // The upper six bits must not matter.
                for dscp in [0, 0xb8, 0xfc] {
                    assert_eq!(
                        decap_is_identity(outer | dscp, inner | !dscp & 0xfc),
                        expected,
                        "outer {outer} inner {inner}"
                    );
                }
            }
        }
    }
}
