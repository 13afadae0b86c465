//! The only unsafe packet access: a frame as linear memory between two
//! pointers, whatever the hook. Reads borrow the packet and writes borrow it
//! mutably, so that the compiler refuses any pointer kept across a resize.

use core::arch::asm;

use aya_ebpf::helpers::bpf_csum_diff;
use vtep_common::checksum;
use vtep_common::wire::Wire;

/// A frame as a program sees it. `data` and `data_end` must come fresh from the
/// context at each call: the verifier ties them to the last resize.
pub trait Packet: Sized {
    /// Address of the first byte.
    fn data(&self) -> usize;
    /// Address behind the last byte that can be read directly.
    fn data_end(&self) -> usize;
    /// Length of the frame, Ethernet header included, bytes.
    fn len(&self) -> u32;
    /// Device the frame came from.
    fn ingress_ifindex(&self) -> u32;

    /// Header at a constant offset; `None` where the frame ends before.
    #[inline(always)]
    fn get<T: Wire>(&self, offset: usize) -> Option<&T> {
        let start = self.data() + offset;
        if start + T::LEN > self.data_end() {
            return None;
        }
        // SAFETY: inside the frame (checked, the verifier proves it); Wire types accept any bytes
        // at any alignment.
        Some(unsafe { &*(start as *const T) })
    }

    /// Same, to be written.
    #[inline(always)]
    fn get_mut<T: Wire>(&mut self, offset: usize) -> Option<&mut T> {
        let start = self.data() + offset;
        if start + T::LEN > self.data_end() {
            return None;
        }
        // SAFETY: as in `get`, and `&mut self` makes the borrow unique.
        Some(unsafe { &mut *(start as *mut T) })
    }

    /// Folded ones-complement sum of everything from `offset` to the end of the
    /// linear part. `None` from 8 KiB on, and for anything the helper refuses.
    ///
    /// The one place with variable packet offsets. `bpf_csum_diff` takes
    /// constant lengths only (at most 512 bytes before Linux 6.13), so the data
    /// is summed in blocks of falling powers of two. Each block's offset is made
    /// from the length alone: states of the verifier that differ only in which
    /// blocks were there become one again, instead of doubling at every block.
    #[inline(always)]
    fn sum_from(&self, offset: usize) -> Option<u16> {
        let start = self.data() + offset;
        let end = self.data_end();
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
        sum = sum_bit::<Self, 256>(self, start, len, sum)?;
        sum = sum_bit::<Self, 128>(self, start, len, sum)?;
        // Below this, loads are cheaper than the call.
        let mut rest = sum as u64;
        rest += load_bit::<Self, 64>(self, start, len)?;
        rest += load_bit::<Self, 32>(self, start, len)?;
        rest += load_bit::<Self, 16>(self, start, len)?;
        rest += load_bit::<Self, 8>(self, start, len)?;
        if len & 4 != 0 {
            rest += read::<Self, u32>(self, start + (len & 0x1ff8))? as u64;
        }
        if len & 2 != 0 {
            rest += read::<Self, u16>(self, start + (len & 0x1ffc))? as u64;
        }
        if len & 1 != 0 {
            rest += read::<Self, u8>(self, start + (len & 0x1ffe))? as u64;
        }
        Some(checksum::fold(rest))
    }
}

/// The block of `N` bytes that a length with bit `N` set has behind its
/// larger blocks.
#[inline(always)]
fn sum_bit<P: Packet, const N: usize>(
    packet: &P,
    start: usize,
    len: usize,
    seed: u32,
) -> Option<u32> {
    if len & N == 0 {
        return Some(seed);
    }
    let at = start + (len & (0x2000 - 2 * N));
    if at + N > packet.data_end() {
        return None;
    }
    sum_block::<N>(at, seed)
}

/// Same in 4-byte loads.
#[inline(always)]
fn load_bit<P: Packet, const N: usize>(packet: &P, start: usize, len: usize) -> Option<u64> {
    if len & N == 0 {
        return Some(0);
    }
    let at = start + (len & (0x2000 - 2 * N));
    if at + N > packet.data_end() {
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
fn read<P: Packet, T: Copy>(packet: &P, at: usize) -> Option<T> {
    let mut after = at;
    // LLVM would turn `at + 1 > end` into `at >= end`, from which the verifier learns nothing.
    // SAFETY: one addition.
    unsafe {
        asm!("{0} += {1}", inout(reg) after, const size_of::<T>(), options(pure, nomem, nostack));
    }
    if after > packet.data_end() {
        return None;
    }
    // SAFETY: inside the frame, checked above.
    Some(unsafe { (at as *const T).read_unaligned() })
}

/// Add `N` bytes at `at`, which the caller has compared with the end.
#[inline(always)]
fn sum_block<const N: usize>(at: usize, seed: u32) -> Option<u32> {
    // SAFETY: the verifier checks that `at .. at + N` lies in the frame.
    let sum = unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, at as *mut u32, N as u32, seed) };
    // Negative: refused. Otherwise a 32-bit sum, or (from Linux 6.13) a folded one.
    u32::try_from(sum).ok()
}
