//! The FDB in batches: a run of updates becomes few system calls, and is still
//! refused element by element. Used by `dataplane` only.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use aya::maps::{HashMap as HashMapOf, Map, MapData};
use vtep_common::MacAddr;
use vtep_common::layout::{FdbKey, FdbValue};

use super::sys::{self, BatchError};
use super::{DataplaneError, clone_fd, errno, errno_refusal, map_error, typed};
use crate::tables::{Refused, TableUpdate};

/// Elements per system call.
const BATCH: usize = 8192;

/// The updates at the front that are all `Fdb` or all `FdbDel`, and the others.
pub fn split_run(updates: &[TableUpdate]) -> (&[TableUpdate], &[TableUpdate]) {
    let set = |update: &TableUpdate| matches!(update, TableUpdate::Fdb { .. });
    let del = |update: &TableUpdate| matches!(update, TableUpdate::FdbDel(_));
    let len = match updates.first() {
        Some(first) if set(first) => updates.iter().take_while(|u| set(u)).count(),
        Some(first) if del(first) => updates.iter().take_while(|u| del(u)).count(),
        _ => 0,
    };
    updates.split_at(len)
}

/// No values: a run of removals.
fn elements(run: &[TableUpdate]) -> (Vec<FdbKey>, Vec<FdbValue>) {
    let mut keys = Vec::with_capacity(run.len());
    let mut values = Vec::with_capacity(run.len());
    for update in run {
        match update {
            TableUpdate::Fdb { key, value } => {
                keys.push(*key);
                values.push(*value);
            }
            TableUpdate::FdbDel(key) => keys.push(*key),
            _ => {}
        }
    }
    (keys, values)
}

pub struct Fdb {
    map: HashMapOf<MapData, FdbKey, FdbValue>,
    fd: OwnedFd,
    capacity: u32,
}

impl Fdb {
    pub fn new(map: Map, capacity: u32) -> Result<Self, DataplaneError> {
        Ok(Self {
            fd: clone_fd(&map)?,
            map: typed(map)?,
            capacity,
        })
    }

    /// Write a run of [`split_run`].
    pub fn apply_run(&mut self, run: &[TableUpdate], refused: &mut Vec<Refused>) {
        for batch in run.chunks(BATCH) {
            let (keys, values) = elements(batch);
            let mut done = 0;
            while done < batch.len() {
                let map = self.fd.as_fd();
                let result = if values.is_empty() {
                    sys::delete_batch(map, &keys[done..])
                } else {
                    sys::update_batch(map, &keys[done..], &values[done..])
                };
                match result {
                    Ok(()) => break,
                    Err(BatchError::At(index, error)) => {
                        self.refuse(&batch[done + index], &error, refused);
                        done += index + 1;
                    }
                    Err(BatchError::Unsupported) => {
                        for update in &batch[done..] {
                            if let Err(error) = self.write_one(update) {
                                self.refuse(update, &error, refused);
                            }
                        }
                        break;
                    }
                }
            }
        }
    }

    fn refuse(&self, update: &TableUpdate, error: &io::Error, refused: &mut Vec<Refused>) {
        // Removed already: that is what was wanted.
        if matches!(update, TableUpdate::FdbDel(_)) && error.raw_os_error() == Some(libc::ENOENT) {
            return;
        }
        refused.push(Refused {
            update: update.clone(),
            reason: errno_refusal("FDB", self.capacity, error),
        });
    }

    fn write_one(&mut self, update: &TableUpdate) -> io::Result<()> {
        let result = match update {
            TableUpdate::Fdb { key, value } => self.map.insert(key, value, 0),
            TableUpdate::FdbDel(key) => self.map.remove(key),
            _ => Ok(()),
        };
        result.map_err(|e| {
            errno(&e).map_or_else(
                || io::Error::other(e.to_string()),
                io::Error::from_raw_os_error,
            )
        })
    }

    pub fn read(&self) -> Result<HashMap<FdbKey, FdbValue>, DataplaneError> {
        let zero = (FdbKey::new(0, MacAddr([0; 6])), FdbValue(0));
        let found = sys::read_hash(self.fd.as_fd(), zero)
            .map_err(|e| DataplaneError::kernel("read FDB", e))?;
        match found {
            Some(found) => Ok(found.into_iter().collect()),
            None => self
                .map
                .iter()
                .collect::<Result<_, _>>()
                .map_err(|e| map_error("read FDB", e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(i: u8) -> TableUpdate {
        let key = FdbKey::new(1, MacAddr([2, 0, 0, 0, 0, i]));
        TableUpdate::Fdb {
            key,
            value: FdbValue::new(key, 1, 0, 0),
        }
    }

    fn del(i: u8) -> TableUpdate {
        TableUpdate::FdbDel(FdbKey::new(1, MacAddr([2, 0, 0, 0, 0, i])))
    }

    #[test]
    fn runs_keep_the_order_of_sets_and_removals() {
        let updates = [set(1), set(2), del(1), TableUpdate::Detach(3), set(1)];
        let mut rest = &updates[..];
        let mut lens = Vec::new();
        while !rest.is_empty() {
            let (run, others) = split_run(rest);
            lens.push(run.len());
            rest = if run.is_empty() { &rest[1..] } else { others };
        }
        assert_eq!(lens, [2, 1, 0, 1]);
    }
}
