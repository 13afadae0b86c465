//! Internet checksum arithmetic (RFC 1071) on folded 16-bit sums in *native*
//! byte order: a ones-complement sum does not care, as long as words are read
//! and written the same way.

/// Fold a sum of 16-bit words to 16 bits. Exact for sums below 2^48.
#[inline(always)]
pub const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + ((sum >> 16) & 0xffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// Sum of the 20 bytes of an IPv4 header, folded; 0xffff when its checksum is
/// right (RFC 791).
#[inline(always)]
pub fn ipv4_header(ip: &crate::wire::Ipv4) -> u16 {
    // SAFETY: Wire types are plain bytes; 20 of them.
    let b = unsafe { &*core::ptr::from_ref(ip).cast::<[u8; 20]>() };
    let word = |i: usize| u32::from_ne_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]) as u64;
    fold(word(0) + word(4) + word(8) + word(12) + word(16))
}

/// Pseudo header of UDP over IPv4 (RFC 768): addresses, protocol, length.
/// `udp_length` in host order.
#[inline(always)]
pub fn udp_pseudo_v4(source: [u8; 4], destination: [u8; 4], udp_length: u16) -> u64 {
    u32::from_ne_bytes(source) as u64
        + u32::from_ne_bytes(destination) as u64
        + (crate::wire::IPPROTO_UDP as u16).to_be() as u64
        + udp_length.to_be() as u64
}

/// Same over IPv6 (RFC 8200 section 8.1).
#[inline(always)]
pub fn udp_pseudo_v6(source: &[u8; 16], destination: &[u8; 16], udp_length: u16) -> u64 {
    addresses_v6(source, destination)
        + (crate::wire::IPPROTO_UDP as u16).to_be() as u64
        + udp_length.to_be() as u64
}

/// Sum of two IPv6 addresses.
#[inline(always)]
pub fn addresses_v6(source: &[u8; 16], destination: &[u8; 16]) -> u64 {
    let half = |a: &[u8; 16], i: usize| {
        u32::from_ne_bytes([a[i], a[i + 1], a[i + 2], a[i + 3]]) as u64
            + u32::from_ne_bytes([a[i + 4], a[i + 5], a[i + 6], a[i + 7]]) as u64
    };
    half(source, 0) + half(source, 8) + half(destination, 0) + half(destination, 8)
}

/// Folded sum of a header.
#[inline(always)]
pub fn header<T: crate::wire::Wire>(header: &T) -> u16 {
    let start = core::ptr::from_ref(header).cast::<u8>();
    let mut sum = 0u64;
    let mut at = 0;
    while at + 2 <= T::LEN {
        // SAFETY: inside the header.
        sum += unsafe { start.add(at).cast::<u16>().read_unaligned() } as u64;
        at += 2;
    }
    fold(sum)
}

/// Sum of any bytes, folded: the user-space counterpart of `bpf_csum_diff`.
pub fn bytes(data: &[u8]) -> u16 {
    let mut sum = 0u64;
    let mut words = data.chunks_exact(2);
    for word in &mut words {
        sum += u16::from_ne_bytes([word[0], word[1]]) as u64;
    }
    if let [last] = words.remainder() {
        sum += u16::from_ne_bytes([*last, 0]) as u64;
    }
    fold(sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::view;

    /// RFC 1071 as written: big-endian words, carry added back at once.
    fn reference(data: &[u8]) -> u16 {
        let mut sum: u16 = 0;
        for chunk in data.chunks(2) {
            let word = u16::from_be_bytes([chunk[0], *chunk.get(1).unwrap_or(&0)]);
            let (s, carry) = sum.overflowing_add(word);
            sum = s + u16::from(carry);
        }
        sum
    }

    proptest::proptest! {
        #[test]
        fn sum_equals_the_textbook(data in proptest::collection::vec(0u8.., 0..2000)) {
            proptest::prop_assert_eq!(u16::from_be(bytes(&data)), reference(&data));
        }

        #[test]
        fn header_sum_equals_the_textbook(data: [u8; 20]) {
            proptest::prop_assert_eq!(u16::from_be(ipv4_header(view(&data, 0).unwrap())), reference(&data));
        }

        #[test]
        fn fold_keeps_the_value_modulo_ffff(sum in 0u64..1 << 48) {
            proptest::prop_assert_eq!(fold(sum) as u64 % 0xffff, sum % 0xffff);
            proptest::prop_assert_eq!(fold(sum) == 0, sum == 0);
        }
    }
}
