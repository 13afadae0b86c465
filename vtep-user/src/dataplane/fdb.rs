//! The FDB as part of the data path: the forwarding table (`crate::fdb`) in the
//! memory of the BPF array, with a limit. Used by `dataplane` only.

use std::os::fd::BorrowedFd;

use vtep_common::fdb::{Bucket, Value};
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
