//! The forwarding table: buckets of one cache line, two possible buckets per
//! key. This file has the layout, the hash and the reader, which runs in the
//! eBPF programs and beside the writer in tests; the writer is user space's
//! (`vtep-user/src/dataplane/fdb.rs`), alone, in the mapped memory.

use crate::layout::FdbKey;

/// Keys of a bucket.
pub const SLOTS: usize = 5;

/// One cache line of the table. Written by one writer, read by any CPU at any
/// time; see [`find`] for what the reader relies on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C, align(64))]
pub struct Bucket {
    /// [`FdbKey::word`]; 0: free. No key is 0, segments count from 1.
    pub keys: [u64; SLOTS],
    /// [`Value`] of each key.
    pub values: [u32; SLOTS],
    /// Raised before and after a slot gets another key: odd while one is written.
    pub sequence: u32,
}

const _: () = assert!(size_of::<Bucket>() == 64);

impl Bucket {
    pub const EMPTY: Self = Self {
        keys: [0; SLOTS],
        values: [0; SLOTS],
        sequence: 0,
    };
}

/// What is stored with a key: bits 0-19 location index, 20-23 flags, 24-31
/// epoch of last use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct Value(pub u32);

impl Value {
    /// Flag: the entry was made through the API; kept so that a restart knows.
    pub const OWNER_API: u8 = 1;
    pub const LOCATION_MAX: u32 = 0xf_ffff;
    pub const FLAGS_MAX: u8 = 0xf;
    /// Byte of the value that holds the epoch (little endian).
    pub const EPOCH_BYTE: usize = 3;

    pub const fn new(location: u32, flags: u8, epoch: u8) -> Self {
        Self(
            (location & Self::LOCATION_MAX)
                | (((flags & Self::FLAGS_MAX) as u32) << 20)
                | ((epoch as u32) << 24),
        )
    }

    #[inline(always)]
    pub const fn location(self) -> u32 {
        self.0 & Self::LOCATION_MAX
    }

    pub const fn flags(self) -> u8 {
        (self.0 >> 20) as u8 & Self::FLAGS_MAX
    }

    #[inline(always)]
    pub const fn epoch(self) -> u8 {
        (self.0 >> 24) as u8
    }
}

/// The two buckets of a key, before masking. One multiplication spreads MACs
/// that differ in any bytes over both words.
#[inline(always)]
pub const fn buckets(key: FdbKey) -> [u32; 2] {
    let h = key.word();
    let h = (h ^ (h >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let h = (h ^ (h >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    [(h >> 32) as u32, h as u32 ^ (h >> 47) as u32]
}

/// Where a key stands in a bucket, and its value at one moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found {
    pub slot: usize,
    pub value: Value,
}

/// Look for `key` in a bucket that a writer may be changing.
///
/// The value belongs to the key: the sequence is read before the key and after
/// the value, and a slot gets another key only between two changes of it. Loads
/// are volatile and the machine keeps their order (x86 and arm64 kernels map
/// volatile loads of BPF to plain loads; on arm64 a stale value is possible for
/// the time of a store buffer, a foreign one is not, because the sequence is
/// compared last).
///
/// # Safety
/// `bucket` points to a bucket that stays mapped during the call.
#[inline(always)]
pub unsafe fn find(bucket: *const Bucket, key: FdbKey) -> Option<Found> {
    let key = key.word();
    // SAFETY: the fields of a mapped bucket, aligned; the caller vouches for it.
    unsafe {
        let sequence = (&raw const (*bucket).sequence).read_volatile();
        let slot = if (&raw const (*bucket).keys[0]).read_volatile() == key {
            0
        } else if (&raw const (*bucket).keys[1]).read_volatile() == key {
            1
        } else if (&raw const (*bucket).keys[2]).read_volatile() == key {
            2
        } else if (&raw const (*bucket).keys[3]).read_volatile() == key {
            3
        } else if (&raw const (*bucket).keys[4]).read_volatile() == key {
            4
        } else {
            return None;
        };
        let value = (&raw const (*bucket).values)
            .cast::<u32>()
            .add(slot)
            .read_volatile();
        if (&raw const (*bucket).sequence).read_volatile() != sequence || sequence & 1 != 0 {
            return None;
        }
        Some(Found {
            slot,
            value: Value(value),
        })
    }
}
