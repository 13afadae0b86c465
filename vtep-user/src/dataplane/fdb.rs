//! The FDB as part of the data path: the forwarding table (`crate::fdb`) in the
//! memory of the BPF array, with a limit. Used by `dataplane` only.

use std::os::fd::BorrowedFd;

use vtep_common::fdb::{Bucket, Value, buckets};
use vtep_common::layout::FdbKey;

use super::DataplaneError;
use super::mmap::MmapArray;
use crate::fdb::{Table, bucket_count};

pub struct Fdb {
    // Before the memory it lies in.
    table: Table,
    _memory: MmapArray<Bucket>,
    capacity: u32,
}

impl Fdb {
    /// `map` holds `bucket_count(capacity)` buckets (checked when it was opened).
    pub fn new(map: BorrowedFd<'_>, capacity: u32) -> Result<Self, DataplaneError> {
        let count = bucket_count(capacity);
        let memory = MmapArray::new(map, count)
            .map_err(|e| DataplaneError::kernel("map FDB into memory", e))?;
        repair(&memory);
        // SAFETY: the mapping lives in the same struct, and an instance has one writer.
        let table = unsafe { Table::new(memory.base(), count) };
        Ok(Self {
            table,
            _memory: memory,
            capacity,
        })
    }

    /// Number of buckets minus one, which the programs need.
    pub fn mask(&self) -> u32 {
        self.table.mask()
    }

    pub fn set(&mut self, key: FdbKey, value: Value) -> Result<(), String> {
        let room = self.table.len() < self.capacity || self.table.get(key).is_some();
        if room && self.table.set(key, value).is_ok() {
            return Ok(());
        }
        Err(format!("FDB is full ({} entries)", self.capacity))
    }

    pub fn remove(&mut self, key: FdbKey) {
        self.table.remove(key);
    }

    pub fn iter(&self) -> impl Iterator<Item = (FdbKey, Value)> + '_ {
        self.table.iter()
    }
}

/// What a writer that was killed may have left (`crate::fdb`): a bucket whose
/// sequence stayed odd, which readers would never believe again, and an entry
/// that was being moved and stands in both its buckets. Readers look into the
/// first one first, so that one is kept.
fn repair(memory: &MmapArray<Bucket>) {
    let mask = memory.entries() - 1;
    for index in 0..=mask {
        let Some(mut bucket) = memory.load(index) else {
            continue;
        };
        let found = bucket;
        bucket.sequence = bucket.sequence.next_multiple_of(2);
        for word in bucket.keys.iter_mut().filter(|word| **word != 0) {
            let [first, second] = buckets(FdbKey::from_word(*word)).map(|b| b & mask);
            let twice = first != second
                && index == second
                && memory
                    .load(first)
                    .is_some_and(|first| first.keys.contains(word));
            if twice {
                *word = 0;
            }
        }
        if bucket != found {
            tracing::info!("FDB: bucket {index} repaired after an interrupted write");
            // In range: the index is below `entries`.
            let _ = memory.store(index, &bucket);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};

    use vtep_common::MacAddr;
    use vtep_common::fdb::{SLOTS, find};

    const CAPACITY: u32 = 100;

    fn memory() -> OwnedFd {
        // SAFETY: a C string; the descriptor returned is new.
        let fd =
            unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"fdb".as_ptr(), libc::MFD_CLOEXEC)) };
        let bytes = bucket_count(CAPACITY) as usize * size_of::<Bucket>();
        // SAFETY: plain system call.
        assert_eq!(unsafe { libc::ftruncate(fd.as_raw_fd(), bytes as i64) }, 0);
        fd
    }

    fn key(i: u8) -> FdbKey {
        FdbKey::new(1, MacAddr([2, 0, 0, 0, 0, i]))
    }

    /// As the programs read it.
    fn read(fdb: &Fdb, key: FdbKey) -> Option<Value> {
        buckets(key).into_iter().find_map(|index| {
            // SAFETY: masked, and mapped as long as `fdb` lives.
            unsafe {
                let bucket = fdb._memory.base().add((index & fdb.mask()) as usize);
                find(bucket.as_ptr(), key).map(|found| found.value)
            }
        })
    }

    #[test]
    fn r39_a_bucket_that_was_being_written_is_readable_again() {
        let fd = memory();
        let mut fdb = Fdb::new(fd.as_fd(), CAPACITY).unwrap();
        fdb.set(key(1), Value::new(7, 0, 0)).unwrap();
        for index in 0..=fdb.mask() {
            let mut bucket = fdb._memory.load(index).unwrap();
            bucket.sequence += 1;
            assert!(fdb._memory.store(index, &bucket));
        }
        assert_eq!(read(&fdb, key(1)), None);
        let mut fdb = Fdb::new(fd.as_fd(), CAPACITY).unwrap();
        assert_eq!(read(&fdb, key(1)), Some(Value::new(7, 0, 0)));
        fdb.set(key(2), Value::new(8, 0, 0)).unwrap();
        assert_eq!(read(&fdb, key(2)), Some(Value::new(8, 0, 0)));
    }

    #[test]
    fn r39_an_entry_that_was_being_moved_is_there_once() {
        let fd = memory();
        let mut fdb = Fdb::new(fd.as_fd(), CAPACITY).unwrap();
        for i in 1..=20 {
            fdb.set(key(i), Value::new(u32::from(i), 0, 0)).unwrap();
            let choices = buckets(key(i)).map(|b| b & fdb.mask());
            for index in choices {
                let mut bucket = fdb._memory.load(index).unwrap();
                let free = bucket.keys.iter().position(|word| *word == 0);
                if let Some(slot) = free
                    && !bucket.keys.contains(&key(i).word())
                    && slot < SLOTS
                {
                    bucket.keys[slot] = key(i).word();
                    bucket.values[slot] = Value::new(99, 0, 0).0;
                    assert!(fdb._memory.store(index, &bucket));
                }
            }
        }
        assert!(fdb.iter().count() > 20, "entries stand twice");
        let mut fdb = Fdb::new(fd.as_fd(), CAPACITY).unwrap();
        assert_eq!(fdb.iter().count(), 20);
        for i in 1..=20 {
            assert!(read(&fdb, key(i)).is_some());
            fdb.remove(key(i));
            assert_eq!(read(&fdb, key(i)), None, "nothing stale comes back");
        }
    }
}
