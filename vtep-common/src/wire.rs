//! Headers as they lie on the wire: byte arrays in network order, alignment 1,
//! so a reference into a packet is always valid. Getters return host order.

use crate::MacAddr;

pub const ETH_P_IP: u16 = 0x0800;
pub const ETH_P_ARP: u16 = 0x0806;
pub const ETH_P_RARP: u16 = 0x8035;
pub const ETH_P_8021Q: u16 = 0x8100;
pub const ETH_P_IPV6: u16 = 0x86dd;
pub const ETH_P_PPP_SES: u16 = 0x8864;
pub const ETH_P_8021AD: u16 = 0x88a8;
pub const IPPROTO_ICMP: u8 = 1;
pub const IPPROTO_TCP: u8 = 6;
pub const IPPROTO_UDP: u8 = 17;
pub const IPPROTO_ICMPV6: u8 = 58;
pub const IPPROTO_SCTP: u8 = 132;

/// # Safety
/// Implementors are `repr(C)`, made of bytes only: any bit pattern is valid and
/// the alignment is 1.
pub unsafe trait Wire: Sized {
    const LEN: usize = size_of::<Self>();
}

macro_rules! wire {
    ($($t:ty),*) => { $(
        // SAFETY: repr(C) over byte arrays, checked for alignment 1 below.
        unsafe impl Wire for $t {}
        const _: () = assert!(align_of::<$t>() == 1);
    )* };
}

/// Ethernet II header.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Ethernet {
    pub destination: [u8; 6],
    pub source: [u8; 6],
    pub ethertype: [u8; 2],
}

impl Ethernet {
    #[inline(always)]
    pub fn ethertype(&self) -> u16 {
        u16::from_be_bytes(self.ethertype)
    }
}

/// IPv4 header without options (RFC 791).
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Ipv4 {
    pub version_ihl: u8,
    pub tos: u8,
    pub total_length: [u8; 2],
    pub identification: [u8; 2],
    pub fragment: [u8; 2],
    pub ttl: u8,
    pub protocol: u8,
    pub checksum: [u8; 2],
    pub source: [u8; 4],
    pub destination: [u8; 4],
}

impl Ipv4 {
    #[inline(always)]
    pub fn total_length(&self) -> u16 {
        u16::from_be_bytes(self.total_length)
    }

    /// More fragments, or not the first one.
    #[inline(always)]
    pub fn is_fragment(&self) -> bool {
        u16::from_be_bytes(self.fragment) & 0x3fff != 0
    }
}

/// IPv6 fixed header (RFC 8200).
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Ipv6 {
    /// Version, traffic class, flow label.
    pub version_class_label: [u8; 4],
    pub payload_length: [u8; 2],
    pub next_header: u8,
    pub hop_limit: u8,
    pub source: [u8; 16],
    pub destination: [u8; 16],
}

impl Ipv6 {
    #[inline(always)]
    pub fn traffic_class(&self) -> u8 {
        (self.version_class_label[0] << 4) | (self.version_class_label[1] >> 4)
    }

    #[inline(always)]
    pub fn payload_length(&self) -> u16 {
        u16::from_be_bytes(self.payload_length)
    }
}

/// UDP header (RFC 768).
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Udp {
    pub source: [u8; 2],
    pub destination: [u8; 2],
    pub length: [u8; 2],
    pub checksum: [u8; 2],
}

/// VXLAN header (RFC 7348 section 5).
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Vxlan {
    /// Flags octet and 24 reserved bits.
    pub flags: [u8; 4],
    /// VNI and 8 reserved bits.
    pub vni: [u8; 4],
}

/// The flags word of a plain frame: the I flag alone.
pub const VXLAN_FLAGS_I: [u8; 4] = [0x08, 0, 0, 0];

/// All that is put in front of an inner frame on an IPv4 underlay.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct OuterV4 {
    pub eth: Ethernet,
    pub ip: Ipv4,
    pub udp: Udp,
    pub vxlan: Vxlan,
}

/// Same on an IPv6 underlay.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct OuterV6 {
    pub eth: Ethernet,
    pub ip: Ipv6,
    pub udp: Udp,
    pub vxlan: Vxlan,
}

/// The two addresses and the type of an inner frame plus the first two bytes
/// of its payload, where IPv4 and IPv6 keep version and traffic class.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct InnerHead {
    pub eth: Ethernet,
    pub first: [u8; 2],
}

/// An inner IPv4 frame up to the end of its fixed header.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct InnerIpv4 {
    pub eth: Ethernet,
    pub ip: Ipv4,
}

/// Same, IPv6.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct InnerIpv6 {
    pub eth: Ethernet,
    pub ip: Ipv6,
}

/// TCP header without options (RFC 9293).
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Tcp {
    pub source: [u8; 2],
    pub destination: [u8; 2],
    pub sequence: [u8; 4],
    pub acknowledgment: [u8; 4],
    /// Data offset in 4-byte words, in the upper half.
    pub offset: u8,
    pub flags: u8,
    pub window: [u8; 2],
    pub checksum: [u8; 2],
    pub urgent: [u8; 2],
}

impl Tcp {
    /// Length of the header with options, bytes.
    #[inline(always)]
    pub fn header_bytes(&self) -> u32 {
        (self.offset >> 4) as u32 * 4
    }
}

/// IPv4 header and the first four bytes of what follows: TCP, UDP, SCTP ports.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Ipv4Flow {
    pub ip: Ipv4,
    pub ports: [u8; 4],
}

/// IPv6 fixed header and the first four bytes of what follows.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Ipv6Flow {
    pub ip: Ipv6,
    pub ports: [u8; 4],
}

wire!(
    Ethernet, Ipv4, Ipv6, Udp, Tcp, Vxlan, OuterV4, OuterV6, InnerHead, InnerIpv4, InnerIpv6,
    Ipv4Flow, Ipv6Flow
);
const _: () = assert!(OuterV4::LEN == 50 && OuterV6::LEN == 70 && InnerHead::LEN == 16);
const _: () = assert!(Ipv4Flow::LEN == 24 && Ipv6Flow::LEN == 44);

impl InnerHead {
    /// Destination MAC as the low 48 bits of an integer (see [`MacAddr::to_bits`]).
    #[inline(always)]
    pub fn destination_bits(&self) -> u64 {
        MacAddr(self.eth.destination).to_bits()
    }

    /// Source MAC, same form.
    #[inline(always)]
    pub fn source_bits(&self) -> u64 {
        MacAddr(self.eth.source).to_bits()
    }

    /// IPv4 TOS or IPv6 traffic class; `None` for other payloads.
    #[inline(always)]
    pub fn traffic_class(&self) -> Option<u8> {
        match self.eth.ethertype() {
            ETH_P_IP => Some(self.first[1]),
            ETH_P_IPV6 => Some((self.first[0] << 4) | (self.first[1] >> 4)),
            _ => None,
        }
    }
}

/// A view of bytes in user space: the test and hold-path counterpart of the
/// packet type of the eBPF programs.
pub fn view<T: Wire>(bytes: &[u8], offset: usize) -> Option<&T> {
    let part = bytes.get(offset..offset.checked_add(T::LEN)?)?;
    // SAFETY: `part` is T::LEN bytes long; Wire types accept any bytes at any alignment.
    Some(unsafe { &*part.as_ptr().cast::<T>() })
}
