//! The only unsafe packet access. Reads borrow the packet and writes borrow it
//! mutably, so that the compiler refuses any pointer kept across a resize.

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
    /// `None` above 9 KiB, and for anything the helper refuses.
    ///
    /// The one place with a variable packet offset: `bpf_csum_diff` takes
    /// constant lengths only (up to 512 bytes before Linux 6.13), so the data
    /// is summed in blocks of falling powers of two.
    #[inline(always)]
    pub fn sum_from(&self, offset: usize) -> Option<u16> {
        let end = self.ctx.data_end();
        let mut at = self.ctx.data() + offset;
        let mut sum = 0u32;
        for _ in 0..18 {
            if at + 512 > end {
                break;
            }
            sum = sum_block::<512>(at, sum)?;
            at += 512;
        }
        if at + 512 <= end {
            return None;
        }
        if at + 256 <= end {
            sum = sum_block::<256>(at, sum)?;
            at += 256;
        }
        if at + 128 <= end {
            sum = sum_block::<128>(at, sum)?;
            at += 128;
        }
        if at + 64 <= end {
            sum = sum_block::<64>(at, sum)?;
            at += 64;
        }
        if at + 32 <= end {
            sum = sum_block::<32>(at, sum)?;
            at += 32;
        }
        let mut rest = sum as u64;
        if at + 16 <= end {
            rest += read::<u32>(at) as u64
                + read::<u32>(at + 4) as u64
                + read::<u32>(at + 8) as u64
                + read::<u32>(at + 12) as u64;
            at += 16;
        }
        if at + 8 <= end {
            rest += read::<u32>(at) as u64 + read::<u32>(at + 4) as u64;
            at += 8;
        }
        if at + 4 <= end {
            rest += read::<u32>(at) as u64;
            at += 4;
        }
        if at + 2 <= end {
            rest += read::<u16>(at) as u64;
            at += 2;
        }
        if at + 1 <= end {
            rest += read::<u8>(at) as u64;
        }
        Some(checksum::fold(rest))
    }
}

/// Add `N` bytes at `at`, which the caller has compared with the end.
#[inline(always)]
fn sum_block<const N: u32>(at: usize, seed: u32) -> Option<u32> {
    // SAFETY: the verifier checks that `at .. at + N` lies in the frame.
    let sum = unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, at as *mut u32, N, seed) };
    // Negative: refused. Otherwise a 32-bit sum, or (from Linux 6.13) a folded one.
    u32::try_from(sum).ok()
}

/// One load at `at`, which the caller has compared with the end.
#[inline(always)]
fn read<T: Copy>(at: usize) -> T {
    // SAFETY: the verifier checks that `at` lies in the frame.
    unsafe { (at as *const T).read_unaligned() }
}
