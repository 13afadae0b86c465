//! Writer of the forwarding table (layout and reader: `vtep_common::fdb`).
//! Works on any memory that holds the buckets: the mapped BPF array in
//! `dataplane`, a vector in tests. One writer; readers need no lock.

use std::collections::VecDeque;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use vtep_common::fdb::{Bucket, SLOTS, Value, buckets};
use vtep_common::layout::FdbKey;

/// No room for a key: both buckets and everything that could be moved is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the forwarding table is full")]
pub struct Full;

/// Buckets looked at before a table counts as full.
const SEARCH_MAX: usize = 2000;

/// Number of buckets for `entries` entries, a power of two: at most four fifths
/// of the slots are used, which two choices and moving always reach.
pub fn bucket_count(entries: u32) -> u32 {
    entries
        .div_ceil(SLOTS as u32 - 1)
        .max(1)
        .next_power_of_two()
}

/// The table in somebody else's memory.
pub struct Table {
    memory: NonNull<Bucket>,
    mask: u32,
    entries: u32,
}

// SAFETY: the table is the only writer and all accesses are atomic.
unsafe impl Send for Table {}

/// A place in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    bucket: u32,
    slot: usize,
}

impl Table {
    /// Takes over a table as it is, counting its entries.
    ///
    /// # Safety
    /// `memory` points to `count` buckets (a power of two) that stay mapped and
    /// are written by nobody else while the table lives.
    pub unsafe fn new(memory: NonNull<Bucket>, count: u32) -> Self {
        let mut table = Self {
            memory,
            mask: count - 1,
            entries: 0,
        };
        table.entries = table.iter().count() as u32;
        table
    }

    pub fn len(&self) -> u32 {
        self.entries
    }

    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Number of buckets minus one.
    pub fn mask(&self) -> u32 {
        self.mask
    }

    fn key(&self, at: Place) -> &AtomicU64 {
        // SAFETY: `bucket` is masked, `slot` below SLOTS; aligned and mapped (`new`).
        unsafe {
            let keys = &raw mut (*self.memory.as_ptr().add(at.bucket as usize)).keys;
            AtomicU64::from_ptr(keys.cast::<u64>().add(at.slot))
        }
    }

    fn value(&self, at: Place) -> &AtomicU32 {
        // SAFETY: as in `key`.
        unsafe {
            let values = &raw mut (*self.memory.as_ptr().add(at.bucket as usize)).values;
            AtomicU32::from_ptr(values.cast::<u32>().add(at.slot))
        }
    }

    fn sequence(&self, bucket: u32) -> &AtomicU32 {
        // SAFETY: as in `key`.
        unsafe {
            AtomicU32::from_ptr(&raw mut (*self.memory.as_ptr().add(bucket as usize)).sequence)
        }
    }

    fn choices(&self, key: FdbKey) -> [u32; 2] {
        buckets(key).map(|b| b & self.mask)
    }

    fn slot_with(&self, bucket: u32, word: u64) -> Option<Place> {
        (0..SLOTS)
            .map(|slot| Place { bucket, slot })
            .find(|at| self.key(*at).load(Ordering::Relaxed) == word)
    }

    fn locate(&self, key: FdbKey) -> Option<Place> {
        let [first, second] = self.choices(key);
        self.slot_with(first, key.word())
            .or_else(|| self.slot_with(second, key.word()))
    }

    pub fn get(&self, key: FdbKey) -> Option<Value> {
        self.locate(key)
            .map(|at| Value(self.value(at).load(Ordering::Relaxed)))
    }

    /// Every entry, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (FdbKey, Value)> + '_ {
        (0..=self.mask).flat_map(move |bucket| {
            (0..SLOTS).filter_map(move |slot| {
                let at = Place { bucket, slot };
                let word = self.key(at).load(Ordering::Relaxed);
                let value = Value(self.value(at).load(Ordering::Relaxed));
                (word != 0).then_some((FdbKey::from_word(word), value))
            })
        })
    }

    /// Insert, or replace the value by one 4-byte store: readers see the old or
    /// the new one, never none (R37).
    pub fn set(&mut self, key: FdbKey, value: Value) -> Result<(), Full> {
        if let Some(at) = self.locate(key) {
            self.value(at).store(value.0, Ordering::Release);
            return Ok(());
        }
        let at = self.free_slot(key)?;
        self.fill(at, key.word(), value.0);
        self.entries += 1;
        Ok(())
    }

    /// False where there was no such key.
    pub fn remove(&mut self, key: FdbKey) -> bool {
        let Some(at) = self.locate(key) else {
            return false;
        };
        self.key(at).store(0, Ordering::Release);
        self.entries -= 1;
        true
    }

    /// Give a free slot a key. The sequence tells readers that hold the slot's
    /// former key not to believe the value.
    fn fill(&self, at: Place, word: u64, value: u32) {
        let sequence = self.sequence(at.bucket);
        let before = sequence.load(Ordering::Relaxed);
        sequence.store(before.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        self.value(at).store(value, Ordering::Relaxed);
        self.key(at).store(word, Ordering::Release);
        sequence.store(before.wrapping_add(2), Ordering::Release);
    }

    /// A free slot in one of the key's buckets, made by moving others if need
    /// be. A moved entry stands in both places for a moment, never in none.
    fn free_slot(&mut self, key: FdbKey) -> Result<Place, Full> {
        let [first, second] = self.choices(key);
        let free = |bucket| self.slot_with(bucket, 0);
        match (free(first), free(second)) {
            (Some(a), Some(b)) if self.load(b.bucket) < self.load(a.bucket) => return Ok(b),
            (Some(a), _) => return Ok(a),
            (None, Some(b)) => return Ok(b),
            (None, None) => {}
        }
        // Breadth first: the shortest chain of moves that ends in a free slot.
        struct Step {
            bucket: u32,
            /// Index of the step before, and the slot of it that moves here.
            from: Option<(usize, usize)>,
        }
        let mut steps = vec![
            Step {
                bucket: first,
                from: None,
            },
            Step {
                bucket: second,
                from: None,
            },
        ];
        let mut queue: VecDeque<usize> = VecDeque::from([0, 1]);
        while let Some(index) = queue.pop_front() {
            let bucket = steps[index].bucket;
            if let Some(mut hole) = self.slot_with(bucket, 0) {
                let mut step = index;
                while let Some((before, slot)) = steps[step].from {
                    let source = Place {
                        bucket: steps[before].bucket,
                        slot,
                    };
                    let word = self.key(source).load(Ordering::Relaxed);
                    self.fill(hole, word, self.value(source).load(Ordering::Relaxed));
                    self.key(source).store(0, Ordering::Release);
                    hole = source;
                    step = before;
                }
                return Ok(hole);
            }
            if steps.len() >= SEARCH_MAX {
                continue;
            }
            for slot in 0..SLOTS {
                let word = self.key(Place { bucket, slot }).load(Ordering::Relaxed);
                let [a, b] = self.choices(FdbKey::from_word(word));
                let other = if a == bucket { b } else { a };
                // A bucket twice in the search would move one entry twice.
                if steps.iter().all(|step| step.bucket != other) {
                    steps.push(Step {
                        bucket: other,
                        from: Some((index, slot)),
                    });
                    queue.push_back(steps.len() - 1);
                }
            }
        }
        Err(Full)
    }

    fn load(&self, bucket: u32) -> usize {
        (0..SLOTS)
            .filter(|slot| {
                self.key(Place {
                    bucket,
                    slot: *slot,
                })
                .load(Ordering::Relaxed)
                    != 0
            })
            .count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;
    use std::sync::atomic::AtomicBool;
    use vtep_common::MacAddr;
    use vtep_common::fdb::find;

    /// Buckets on the heap, with the alignment of a map.
    struct Memory(Vec<Bucket>);

    impl Memory {
        fn new(count: u32) -> Self {
            Self(vec![Bucket::EMPTY; count as usize])
        }

        fn table(&mut self) -> Table {
            let count = self.0.len() as u32;
            // SAFETY: the vector outlives the table in every test.
            unsafe { Table::new(NonNull::new(self.0.as_mut_ptr()).unwrap(), count) }
        }
    }

    fn key(n: u32) -> FdbKey {
        let [a, b, c, d] = n.to_be_bytes();
        FdbKey::new(1, MacAddr([2, 0, a, b, c, d]))
    }

    proptest! {
        #[test]
        fn table_equals_a_hash_map(
            steps in prop::collection::vec((any::<bool>(), 0u32..60, 0u32..1000), 0..400)
        ) {
            let mut memory = Memory::new(bucket_count(60));
            let mut table = memory.table();
            let mut model = HashMap::new();
            for (set, n, location) in steps {
                if set {
                    table.set(key(n), Value::new(location, 1, 2)).unwrap();
                    model.insert(n, location);
                } else {
                    prop_assert_eq!(table.remove(key(n)), model.remove(&n).is_some());
                }
                prop_assert_eq!(table.len() as usize, model.len());
            }
            for n in 0..60 {
                prop_assert_eq!(table.get(key(n)).map(Value::location), model.get(&n).copied());
            }
            prop_assert_eq!(table.iter().count(), model.len());
        }
    }

    #[test]
    fn takes_its_capacity_and_says_when_it_is_full() {
        for entries in [1u32, 100, 1 << 17] {
            let count = bucket_count(entries);
            let mut memory = Memory::new(count);
            let mut table = memory.table();
            for n in 0..entries {
                table
                    .set(key(n), Value::new(n, 0, 0))
                    .unwrap_or_else(|_| panic!("{n} of {entries}"));
            }
            assert!((0..entries).all(|n| table.get(key(n)) == Some(Value::new(n, 0, 0))));
            let slots = count * SLOTS as u32;
            assert_eq!(
                (entries..=slots).find_map(|n| table.set(key(n), Value(0)).err()),
                Some(Full)
            );
            assert!((0..entries).all(|n| table.get(key(n)) == Some(Value::new(n, 0, 0))));
            assert!(
                table.len() as f64 >= 0.9 * slots as f64 || slots < 100,
                "{} of {slots}",
                table.len()
            );
        }
    }

    #[test]
    fn takes_over_what_is_there() {
        let mut memory = Memory::new(64);
        let mut table = memory.table();
        for n in 0..100 {
            table.set(key(n), Value::new(n, 0, 0)).unwrap();
        }
        assert_eq!(memory.table().len(), 100);
    }

    /// R35: readers on all CPUs, a writer that inserts, moves, replaces and
    /// removes. A value a reader gets belongs to the key it asked for.
    #[test]
    fn readers_never_get_the_value_of_another_key() {
        const KEYS: u32 = 90;
        let mut memory = Memory::new(32);
        let mut table = memory.table();
        let base = table.memory.as_ptr() as usize;
        let stop = AtomicBool::new(false);
        // Low bits of the location: which key it belongs to.
        let value = |n: u32, round: u32| Value::new(n | (round & 0x1fff) << 7, 0, 0);
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..3)
                .map(|reader| {
                    let stop = &stop;
                    scope.spawn(move || {
                        let mut hits = 0u64;
                        let mut n = reader;
                        while !stop.load(Ordering::Relaxed) {
                            n = (n + 7) % KEYS;
                            for bucket in buckets(key(n)) {
                                let bucket =
                                    (base as *const Bucket).wrapping_add(bucket as usize & 31);
                                // SAFETY: inside the vector, which outlives the scope.
                                if let Some(found) = unsafe { find(bucket, key(n)) } {
                                    assert_eq!(found.value.location() & 0x7f, n);
                                    hits += 1;
                                }
                            }
                        }
                        hits
                    })
                })
                .collect();
            let mut random = 12345u32;
            for round in 0..400_000 {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let n = (random >> 16) % KEYS;
                if random & 3 == 0 {
                    table.remove(key(n));
                } else {
                    table.set(key(n), value(n, round)).unwrap();
                }
            }
            stop.store(true, Ordering::Relaxed);
            for reader in readers {
                assert!(
                    reader.join().unwrap() > 0,
                    "a reader saw nothing: the test proves nothing"
                );
            }
        });
    }
}
