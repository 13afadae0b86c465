//! Frames in tcx: socket buffers whose checksums may be left to do and which
//! may be superframes (GSO), cut into frames by whoever sends them.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    __sk_buff, BPF_ADJ_ROOM_ENCAP_L2_SHIFT, BPF_F_ADJ_ROOM_ENCAP_L2_ETH,
    BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6, BPF_F_ADJ_ROOM_ENCAP_L4_UDP,
    BPF_F_ADJ_ROOM_FIXED_GSO, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
};
use aya_ebpf::helpers::{bpf_set_hash, bpf_skb_adjust_room, bpf_skb_pull_data};
use aya_ebpf::programs::TcContext;
use vtep_common::Outcome::{self, *};
use vtep_common::encap::{self, Frame};
use vtep_common::flow;
use vtep_common::layout::{Config, Mark, REMOTE_NO_PORT_RANGE, Remote};
use vtep_common::lco::{self, Transport};
use vtep_common::wire::{
    ETH_P_IP, ETH_P_IPV6, Ethernet, IPPROTO_TCP, InnerHead, InnerIpv4, InnerIpv6, Ipv4, Ipv6,
    OuterV4, OuterV6, Tcp, Udp, Wire,
};

use crate::egress::FromPort;
use crate::packet::Packet;

/// Everything that is ever read of an inner frame: up to a TCP header over IPv6.
const HEADERS: u32 = (Ethernet::LEN + Ipv6::LEN + Tcp::LEN) as u32;

/// The outer headers, and the inner Ethernet header again: the kernel makes
/// room behind the latter.
#[repr(C)]
struct Grown<O> {
    outer: O,
    inner: Ethernet,
}

// SAFETY: made of two wire types, which leave no gap between them.
unsafe impl<O: Wire> Wire for Grown<O> {}

impl<O: Wire> Grown<O> {
    /// Copy the first 14 bytes to where they belong, in words.
    #[inline(always)]
    fn move_inner(&mut self) {
        let from = core::ptr::from_ref(&self.outer).cast::<u8>();
        let to = core::ptr::from_mut(&mut self.inner).cast::<u8>();
        // SAFETY: 14 bytes on both sides, which do not overlap.
        unsafe {
            to.cast::<u64>()
                .write_unaligned(from.cast::<u64>().read_unaligned());
            to.add(8)
                .cast::<u32>()
                .write_unaligned(from.add(8).cast::<u32>().read_unaligned());
            to.add(12)
                .cast::<u16>()
                .write_unaligned(from.add(12).cast::<u16>().read_unaligned());
        }
    }
}

pub struct SkbPacket<'c> {
    ctx: &'c TcContext,
}

impl Packet for SkbPacket<'_> {
    #[inline(always)]
    fn data(&self) -> usize {
        self.ctx.data()
    }

    #[inline(always)]
    fn data_end(&self) -> usize {
        self.ctx.data_end()
    }

    #[inline(always)]
    fn len(&self) -> u32 {
        self.ctx.len()
    }

    #[inline(always)]
    fn ingress_ifindex(&self) -> u32 {
        // SAFETY: the context is the one the kernel gave to this program.
        unsafe { (*self.skb()).ingress_ifindex }
    }
}

impl<'c> SkbPacket<'c> {
    pub fn new(ctx: &'c TcContext) -> Self {
        Self { ctx }
    }

    #[inline(always)]
    fn skb(&self) -> *mut __sk_buff {
        self.ctx.as_ptr().cast()
    }

    /// Bring the headers into the linear part, where they can be read.
    #[inline(always)]
    pub fn pull_headers(&mut self) {
        let linear = (self.data_end() - self.data()) as u32;
        let wanted = if self.len() < HEADERS {
            self.len()
        } else {
            HEADERS
        };
        if linear < wanted {
            // SAFETY: as above. If it fails, the frame reads as truncated, and passes.
            unsafe { bpf_skb_pull_data(self.skb(), wanted) };
        }
    }

    /// What XDP noted about a frame that came through the stack.
    #[inline(always)]
    pub fn mark(&self) -> Option<Mark> {
        // SAFETY: as above.
        let start = unsafe { (*self.skb()).data_meta } as usize;
        if start + size_of::<Mark>() > self.data() {
            return None;
        }
        // SAFETY: between the metadata pointer and the data, four-byte aligned.
        Some(unsafe { (start as *const Mark).read() })
    }

    #[inline(always)]
    fn gso_size(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.skb()).gso_size }
    }

    /// Make room for `bytes` of outer headers.
    #[inline(always)]
    #[must_use]
    fn grow(&mut self, bytes: usize, layer3: u64) -> bool {
        let flags = BPF_F_ADJ_ROOM_FIXED_GSO as u64
            | layer3
            | BPF_F_ADJ_ROOM_ENCAP_L4_UDP as u64
            | BPF_F_ADJ_ROOM_ENCAP_L2_ETH as u64
            | ((Ethernet::LEN as u64) << BPF_ADJ_ROOM_ENCAP_L2_SHIFT);
        // SAFETY: as above; refused before anything is changed.
        unsafe { bpf_skb_adjust_room(self.skb(), bytes as i32, BPF_ADJ_ROOM_MAC, flags) == 0 }
    }

    /// Sum from the transport header to the end, if all of it can be read.
    #[inline(always)]
    fn linear_sum(&self, offset: usize) -> Option<u16> {
        if self.data() + self.len() as usize != self.data_end() {
            return None;
        }
        self.sum_from(offset)
    }
}

impl FromPort for SkbPacket<'_> {
    #[inline(always)]
    fn has_tag(&self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.skb()).vlan_present != 0 }
    }

    /// Of a superframe, its largest segment.
    #[inline(always)]
    fn longest_bytes(&self, head: &InnerHead) -> Option<u32> {
        let gso_size = self.gso_size();
        if gso_size == 0 {
            return Some(self.len());
        }
        let (protocol, transport) = match head.eth.ethertype() {
            ETH_P_IP => {
                let ip = &self.get::<InnerIpv4>(0)?.ip;
                if ip.version_ihl != 0x45 {
                    return None;
                }
                (ip.protocol, Ethernet::LEN + Ipv4::LEN)
            }
            ETH_P_IPV6 => (
                self.get::<InnerIpv6>(0)?.ip.next_header,
                Ethernet::LEN + Ipv6::LEN,
            ),
            _ => return None,
        };
        let header = if protocol == IPPROTO_TCP {
            if transport == Ethernet::LEN + Ipv4::LEN {
                self.get::<Tcp>(Ethernet::LEN + Ipv4::LEN)?.header_bytes()
            } else {
                self.get::<Tcp>(Ethernet::LEN + Ipv6::LEN)?.header_bytes()
            }
        } else {
            Udp::LEN as u32
        };
        Some(transport as u32 + header + gso_size)
    }

    #[inline(always)]
    fn can_encapsulate(&self, head: &InnerHead, remote: &Remote) -> Result<(), Outcome> {
        match head.eth.ethertype() {
            ETH_P_IP | ETH_P_IPV6 => {}
            // The kernel makes room in front of IP only (bpf_skb_net_grow in net/core/filter.c).
            _ => return Err(EgressPassInnerType),
        }
        // It cannot ask for checksums of the tunnel either (SKB_GSO_UDP_TUNNEL_CSUM).
        if self.gso_size() != 0 && remote.wants_udp_checksum() {
            return Err(EgressPassGso);
        }
        Ok(())
    }

    /// The kernel makes the port of the buffer's hash. (The other way round, its
    /// own hash costs more than all our look-ups.)
    #[inline(always)]
    fn hand_over(&self, hash: u32) {
        // SAFETY: as above; cannot fail.
        unsafe { bpf_set_hash(self.skb(), hash) };
    }

    /// As udp_flow_src_port (include/net/udp.h).
    #[inline(always)]
    fn source_port(&self, hash: u32, remote: &Remote, config: &Config) -> u16 {
        let hash = hash ^ (hash << 16);
        if remote.flags & REMOTE_NO_PORT_RANGE != 0 {
            flow::source_port(hash, config.kernel_port_min, config.kernel_port_count)
        } else {
            flow::source_port(hash, remote.port_min, remote.port_count)
        }
    }

    #[inline(always)]
    fn inner_sum(&self, head: &InnerHead) -> Result<u16, Outcome> {
        let (transport, offset) = match head.eth.ethertype() {
            ETH_P_IP => {
                let inner = self.get::<InnerIpv4>(0).ok_or(EgressPassMalformed)?;
                const OFFSET: usize = InnerIpv4::LEN;
                let transport = lco::ipv4(inner, self.get(OFFSET), self.get(OFFSET), self.len());
                (transport, OFFSET)
            }
            _ => {
                let inner = self.get::<InnerIpv6>(0).ok_or(EgressPassMalformed)?;
                const OFFSET: usize = InnerIpv6::LEN;
                let transport = lco::ipv6(inner, self.get(OFFSET), self.get(OFFSET), self.len());
                (transport, OFFSET)
            }
        };
        let sum = match transport {
            Transport::Known(sum) => Some(sum),
            Transport::Verify { before, pseudo } => {
                let sum = if offset == InnerIpv4::LEN {
                    self.linear_sum(InnerIpv4::LEN)
                } else {
                    self.linear_sum(InnerIpv6::LEN)
                };
                sum.and_then(|sum| lco::verified(before, pseudo, sum))
            }
            Transport::Whole => self.linear_sum(0),
            Transport::Unknown => None,
        };
        sum.ok_or(EgressPassChecksum)
    }

    /// The device is looked up when the program has ended.
    #[inline(always)]
    fn choose(&self, _: u32) -> bool {
        true
    }

    #[inline(always)]
    fn encapsulate(&mut self, remote: &Remote, frame: &Frame) -> Outcome {
        let grown = if remote.is_v6() {
            self.grow(OuterV6::LEN, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 as u64)
        } else {
            self.grow(OuterV4::LEN, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 as u64)
        };
        if !grown {
            return EgressPassNoHeadroom;
        }
        let written = if remote.is_v6() {
            self.get_mut::<Grown<OuterV6>>(0).map(|grown| {
                grown.move_inner();
                encap::write_v6(&mut grown.outer, remote, frame);
            })
        } else {
            self.get_mut::<Grown<OuterV4>>(0).map(|grown| {
                grown.move_inner();
                encap::write_v4(&mut grown.outer, remote, frame);
            })
        };
        match written {
            Some(()) => EgressRemote,
            None => EgressDropNoMemory,
        }
    }
}
