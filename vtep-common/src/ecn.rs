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
