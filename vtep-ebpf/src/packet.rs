//! The only unsafe packet access. Reads borrow the packet and writes borrow it
//! mutably, so that the compiler refuses any pointer kept across a resize.

use core::arch::asm;
use core::marker::PhantomData;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::{bpf_csum_diff, bpf_xdp_adjust_head};
use aya_ebpf::programs::XdpContext;
use vtep_common::checksum;
use vtep_common::wire::Wire;

/// A frame in an XDP program: linear memory between two pointers.
pub struct Packet<'c> {
    ctx: &'c XdpContext,
    // Reads borrow self, so the data pointers are as good as a borrow of it.
    _memory: PhantomData<&'c mut [u8]>,
}

impl<'c> Packet<'c> {
    pub fn new(ctx: &'c XdpContext) -> Self {
        Self {
            ctx,
            _memory: PhantomData,
        }
    }

    /// Length of the frame, Ethernet header included, bytes.
    #[inline(always)]
    pub fn len(&self) -> u32 {
        (self.ctx.data_end() - self.ctx.data()) as u32
    }

    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        self.ctx.ingress_ifindex() as u32
    }

    /// Header at a constant offset; `None` where the frame ends before.
    #[inline(always)]
    pub fn get<T: Wire>(&self, offset: usize) -> Option<&T> {
        let start = self.ctx.data() + offset;
        if start + T::LEN > self.ctx.data_end() {
            return None;
        }
        // SAFETY: inside the frame (checked, the verifier proves it); Wire types accept any bytes
        // at any alignment.
        Some(unsafe { &*(start as *const T) })
    }

    /// Same, to be written.
    #[inline(always)]
    pub fn get_mut<T: Wire>(&mut self, offset: usize) -> Option<&mut T> {
        let start = self.ctx.data() + offset;
        if start + T::LEN > self.ctx.data_end() {
            return None;
        }
        // SAFETY: as in `get`, and `&mut self` makes the borrow unique.
        Some(unsafe { &mut *(start as *mut T) })
    }

    /// Move the start of the frame: negative adds room in front, positive
    /// strips. False where the driver refuses; the frame is then as before.
    #[inline(always)]
    #[must_use]
    pub fn adjust_head(&mut self, bytes: i32) -> bool {
        // SAFETY: the context is the one the kernel gave to this program.
        unsafe { bpf_xdp_adjust_head(self.ctx.as_ptr().cast(), bytes) == 0 }
    }

    /// Folded ones-complement sum of everything from `offset` to the end.
    /// `None` from 8 KiB on, and for anything the helper refuses.
    ///
    /// The one place with variable packet offsets. `bpf_csum_diff` takes
    /// constant lengths only (at most 512 bytes before Linux 6.13), so the data
    /// is summed in blocks of falling powers of two. Each block's offset is made
    /// from the length alone: states of the verifier that differ only in which
    /// blocks were there become one again, instead of doubling at every block.
    #[inline(always)]
    pub fn sum_from(&self, offset: usize) -> Option<u16> {
        let start = self.ctx.data() + offset;
        let end = self.ctx.data_end();
        let len = end - start;
        if len >= 0x2000 {
            return None;
        }
        let mut sum = 0u32;
        for block in 0..15 {
            let at = start + block * 512;
            if at + 512 > end {
                break;
            }
            sum = sum_block::<512>(at, sum)?;
        }
        sum = self.sum_bit::<256>(start, len, sum)?;
        sum = self.sum_bit::<128>(start, len, sum)?;
        // Below this, loads are cheaper than the call.
        let mut rest = sum as u64;
        rest += self.load_bit::<64>(start, len)?;
        rest += self.load_bit::<32>(start, len)?;
        rest += self.load_bit::<16>(start, len)?;
        rest += self.load_bit::<8>(start, len)?;
        if len & 4 != 0 {
            rest += self.read::<u32>(start + (len & 0x1ff8))? as u64;
        }
        if len & 2 != 0 {
            rest += self.read::<u16>(start + (len & 0x1ffc))? as u64;
        }
        if len & 1 != 0 {
            rest += self.read::<u8>(start + (len & 0x1ffe))? as u64;
        }
        Some(checksum::fold(rest))
    }

    /// The block of `N` bytes that a length with bit `N` set has behind its
    /// larger blocks.
    #[inline(always)]
    fn sum_bit<const N: usize>(&self, start: usize, len: usize, seed: u32) -> Option<u32> {
        if len & N == 0 {
            return Some(seed);
        }
        let at = start + (len & (0x2000 - 2 * N));
        if at + N > self.ctx.data_end() {
            return None;
        }
        sum_block::<N>(at, seed)
    }

    /// Same in 4-byte loads.
    #[inline(always)]
    fn load_bit<const N: usize>(&self, start: usize, len: usize) -> Option<u64> {
        if len & N == 0 {
            return Some(0);
        }
        let at = start + (len & (0x2000 - 2 * N));
        if at + N > self.ctx.data_end() {
            return None;
        }
        let mut sum = 0;
        for i in 0..N / 4 {
            // SAFETY: inside the frame, checked above.
            sum += unsafe { (at as *const u32).add(i).read_unaligned() } as u64;
        }
        Some(sum)
    }

    /// One load.
    #[inline(always)]
    fn read<T: Copy>(&self, at: usize) -> Option<T> {
        let mut after = at;
        // LLVM would turn `at + 1 > end` into `at >= end`, from which the verifier learns nothing.
        // SAFETY: one addition.
        unsafe {
            asm!("{0} += {1}", inout(reg) after, const size_of::<T>(), options(pure, nomem, nostack));
        }
        if after > self.ctx.data_end() {
            return None;
        }
        // SAFETY: inside the frame, checked above.
        Some(unsafe { (at as *const T).read_unaligned() })
    }
}

/// Add `N` bytes at `at`, which the caller has compared with the end.
#[inline(always)]
fn sum_block<const N: usize>(at: usize, seed: u32) -> Option<u32> {
    // SAFETY: the verifier checks that `at .. at + N` lies in the frame.
    let sum = unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, at as *mut u32, N as u32, seed) };
    // Negative: refused. Otherwise a 32-bit sum, or (from Linux 6.13) a folded one.
    u32::try_from(sum).ok()
}
