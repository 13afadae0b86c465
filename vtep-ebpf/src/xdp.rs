//! Frames in XDP: before the kernel has made anything of them. Their owners
//! send plain frames, with finished checksums and no segmentation left to do.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::{bpf_xdp_adjust_head, bpf_xdp_adjust_meta, bpf_xdp_get_buff_len};
use aya_ebpf::programs::XdpContext;
use vtep_common::Outcome::{self, EgressPassTooLong};
use vtep_common::encap::{self, Frame};
use vtep_common::flow;
use vtep_common::layout::{Config, Mark, Remote};
use vtep_common::wire::{InnerHead, OuterV4, OuterV6, Wire};

use crate::egress::FromPort;
use crate::maps;
use crate::packet::Packet;

pub struct XdpPacket<'c> {
    ctx: &'c XdpContext,
}

impl Packet for XdpPacket<'_> {
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
        (self.ctx.data_end() - self.ctx.data()) as u32
    }

    #[inline(always)]
    fn ingress_ifindex(&self) -> u32 {
        self.ctx.ingress_ifindex() as u32
    }
}

impl<'c> XdpPacket<'c> {
    pub fn new(ctx: &'c XdpContext) -> Self {
        Self { ctx }
    }

    /// Whether the frame goes on in further buffers, which cannot be read here
    /// and which not every driver can send.
    #[inline(always)]
    pub fn has_frags(&self) -> bool {
        // SAFETY: the context is the one the kernel gave to this program.
        let bytes = unsafe { bpf_xdp_get_buff_len(self.ctx.as_ptr().cast()) };
        bytes != self.len() as u64
    }

    /// Move the start of the frame: negative adds room in front, positive
    /// strips. False where the driver refuses; the frame is then as before.
    #[inline(always)]
    #[must_use]
    pub fn adjust_head(&mut self, bytes: i32) -> bool {
        // SAFETY: as above.
        unsafe { bpf_xdp_adjust_head(self.ctx.as_ptr().cast(), bytes) == 0 }
    }

    /// Make room for a [`Mark`]. False where the driver has no metadata.
    #[inline(always)]
    #[must_use]
    pub fn make_room_for_mark(&mut self) -> bool {
        let bytes = -(size_of::<Mark>() as i32);
        // SAFETY: as above.
        unsafe { bpf_xdp_adjust_meta(self.ctx.as_ptr().cast(), bytes) == 0 }
    }

    /// Fill the room.
    #[inline(always)]
    #[must_use]
    pub fn mark(&mut self, mark: Mark) -> bool {
        let start = self.ctx.metadata();
        if start + size_of::<Mark>() > self.ctx.data() {
            return false;
        }
        // SAFETY: between the metadata pointer and the data (checked, the verifier proves it),
        // which drivers align to four bytes.
        unsafe { (start as *mut Mark).write(mark) };
        true
    }
}

impl FromPort for XdpPacket<'_> {
    /// Where a tag would be is looked at with the rest of the frame.
    #[inline(always)]
    fn has_tag(&self) -> bool {
        false
    }

    #[inline(always)]
    fn longest_bytes(&self, _: &InnerHead) -> Option<u32> {
        Some(self.len())
    }

    #[inline(always)]
    fn can_encapsulate(&self, _: &InnerHead, _: &Remote) -> Result<(), Outcome> {
        Ok(())
    }

    /// The kernel looks at the frame anew.
    #[inline(always)]
    fn hand_over(&self, _: u32) {}

    #[inline(always)]
    fn source_port(&self, hash: u32, remote: &Remote, _: &Config) -> u16 {
        flow::source_port(hash, remote.port_min, remote.port_count)
    }

    #[inline(always)]
    fn inner_sum(&self, _: &InnerHead) -> Result<u16, Outcome> {
        self.sum_from(0).ok_or(EgressPassTooLong)
    }

    /// Nothing happens to the frame until the program returns "redirect".
    #[inline(always)]
    fn choose(&self, ifindex: u32) -> bool {
        maps::redirect(ifindex)
    }

    #[inline(always)]
    fn encapsulate(&mut self, remote: &Remote, frame: &Frame) -> Outcome {
        let written = if remote.is_v6() {
            self.adjust_head(-(OuterV6::LEN as i32))
                && self
                    .get_mut::<OuterV6>(0)
                    .map(|outer| encap::write_v6(outer, remote, frame))
                    .is_some()
        } else {
            self.adjust_head(-(OuterV4::LEN as i32))
                && self
                    .get_mut::<OuterV4>(0)
                    .map(|outer| encap::write_v4(outer, remote, frame))
                    .is_some()
        };
        // Only the driver can refuse: the room is there once it has been made.
        if written {
            Outcome::EgressRemote
        } else {
            Outcome::EgressPassNoHeadroom
        }
    }
}
