//! Hash of the inner flow, from which the UDP source port is made (R4,
//! RFC 7348 section 5): stable per flow, well spread, the same code in every
//! path a frame can take. Not keyed: it spreads load, it protects nothing.

use crate::wire::{
    ETH_P_IP, ETH_P_IPV6, IPPROTO_SCTP, IPPROTO_TCP, IPPROTO_UDP, InnerHead, Ipv4Flow, Ipv6Flow,
};

/// 64-bit mixing of two words: multiply and fold, constants of splitmix64.
#[inline(always)]
const fn mix(a: u64, b: u64) -> u64 {
    let h = (a ^ (a >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ b;
    let h = (h ^ (h >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (h ^ (h >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb)
}

#[inline(always)]
const fn has_ports(protocol: u8) -> bool {
    matches!(protocol, IPPROTO_TCP | IPPROTO_UDP | IPPROTO_SCTP)
}

/// Frames without an IP header: addresses and type.
#[inline(always)]
pub fn hash_ethernet(head: &InnerHead) -> u32 {
    let ethertype = head.eth.ethertype() as u64;
    (mix(
        head.source_bits() | (ethertype << 48),
        head.destination_bits(),
    ) >> 32) as u32
}

/// Addresses, protocol and ports; fragments and headers with options count
/// without ports, so that all parts of a datagram hash alike.
#[inline(always)]
pub fn hash_ipv4(flow: &Ipv4Flow) -> u32 {
    let ip = &flow.ip;
    let addresses =
        u32::from_ne_bytes(ip.source) as u64 | ((u32::from_ne_bytes(ip.destination) as u64) << 32);
    let plain = ip.version_ihl == 0x45 && !ip.is_fragment() && has_ports(ip.protocol);
    let ports = if plain {
        u32::from_ne_bytes(flow.ports)
    } else {
        0
    };
    (mix(addresses, ports as u64 | ((ip.protocol as u64) << 32)) >> 32) as u32
}

/// Addresses, next header and ports; extension headers count without ports.
#[inline(always)]
pub fn hash_ipv6(flow: &Ipv6Flow) -> u32 {
    let ip = &flow.ip;
    let half = |a: &[u8; 16], i: usize| {
        u64::from_ne_bytes([
            a[i],
            a[i + 1],
            a[i + 2],
            a[i + 3],
            a[i + 4],
            a[i + 5],
            a[i + 6],
            a[i + 7],
        ])
    };
    let ports = if has_ports(ip.next_header) {
        u32::from_ne_bytes(flow.ports)
    } else {
        0
    };
    let source = mix(half(&ip.source, 0), half(&ip.source, 8));
    let destination = mix(source, half(&ip.destination, 0));
    let h = mix(
        destination ^ half(&ip.destination, 8),
        ports as u64 | ((ip.next_header as u64) << 32),
    );
    (h >> 32) as u32
}

/// Hash of an inner frame. `ipv4` and `ipv6` are views behind the Ethernet
/// header, `None` where the frame is too short for them.
#[inline(always)]
pub fn hash(head: &InnerHead, ipv4: Option<&Ipv4Flow>, ipv6: Option<&Ipv6Flow>) -> u32 {
    match (head.eth.ethertype(), ipv4, ipv6) {
        (ETH_P_IP, Some(flow), _) => hash_ipv4(flow),
        (ETH_P_IPV6, _, Some(flow)) => hash_ipv6(flow),
        _ => hash_ethernet(head),
    }
}

/// UDP source port, host order, in `min .. min + count`.
#[inline(always)]
pub const fn source_port(hash: u32, min: u16, count: u16) -> u16 {
    min.wrapping_add(((hash as u64 * count as u64) >> 32) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::view;
    use std::collections::HashSet;

    fn ipv4(source: u32, ports: [u16; 2], protocol: u8, fragment: u16) -> u32 {
        let mut b = [0u8; 24];
        b[0] = 0x45;
        b[6..8].copy_from_slice(&fragment.to_be_bytes());
        b[9] = protocol;
        b[12..16].copy_from_slice(&source.to_be_bytes());
        b[16..20].copy_from_slice(&[10, 0, 0, 2]);
        b[20..22].copy_from_slice(&ports[0].to_be_bytes());
        b[22..24].copy_from_slice(&ports[1].to_be_bytes());
        hash_ipv4(view(&b, 0).unwrap())
    }

    #[test]
    fn r4_16k_flows_give_10k_ports_inside_the_range() {
        // Worst realistic cases: only one field counts up.
        let by_port = (0..16384u16).map(|i| ipv4(0x0a00_0001, [1024 + i, 80], 6, 0));
        let by_address = (0..16384u32).map(|i| ipv4(0x0a00_0000 + i, [40000, 80], 17, 0));
        for hashes in [by_port.collect::<Vec<_>>(), by_address.collect()] {
            let ports: HashSet<u16> = hashes
                .iter()
                .map(|h| source_port(*h, 49152, 16384))
                .collect();
            assert!(ports.len() >= 10_000, "{} ports", ports.len());
            assert!(ports.iter().all(|p| *p >= 49152));
        }
    }

    #[test]
    fn r4_small_and_odd_ranges_are_kept() {
        for hash in [0, 1, u32::MAX / 2, u32::MAX] {
            assert_eq!(source_port(hash, 7, 1), 7);
            assert!((5000..5003).contains(&source_port(hash, 5000, 3)));
        }
    }

    #[test]
    fn all_fragments_of_a_datagram_hash_alike() {
        let first = ipv4(1, [1000, 2000], 17, 0x2000);
        let second = ipv4(1, [0xdead, 0xbeef], 17, 0x00b9);
        assert_eq!(first, second);
        assert_ne!(ipv4(1, [1000, 2000], 17, 0), ipv4(1, [1000, 2001], 17, 0));
    }
}
