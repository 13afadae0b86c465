//! Hands out indexes of `LOCATIONS` and slots of `REMOTES`, and knows what each
//! location says now. A program may still be reading what was just given up, so
//! freed numbers rest for a while before they mean something else.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::{Duration, Instant};

use vtep_common::layout::{FdbKey, Location, Place};

use super::remotes::RemoteKey;
use super::world::Domain;
use crate::kernel::IfIndex;
use crate::tables::TableUpdate;

/// Far longer than one run of a program, which is what has to end.
pub(super) const QUARANTINE: Duration = Duration::from_secs(1);

/// Numbers below `end`, each given out once until it is released.
#[derive(Debug)]
pub(super) struct Allocator {
    next: u32,
    end: u32,
    gaps: VecDeque<u32>,
    resting: VecDeque<(Instant, u32)>,
}

impl Allocator {
    pub fn new(first: u32, end: u32) -> Self {
        Self {
            next: first,
            end,
            gaps: VecDeque::new(),
            resting: VecDeque::new(),
        }
    }

    /// Take over a state in which `used` are given out.
    pub fn adopt(&mut self, used: &BTreeSet<u32>) {
        let first = self.next;
        self.next = used
            .last()
            .map_or(first, |last| last.saturating_add(1))
            .max(first);
        self.gaps = (first..self.next).filter(|n| !used.contains(n)).collect();
    }

    fn rested(&self, now: Instant) -> bool {
        let front = self.resting.front();
        front.is_some_and(|(since, _)| now.saturating_duration_since(*since) >= QUARANTINE)
    }

    pub fn has_free(&self, now: Instant) -> bool {
        !self.gaps.is_empty() || self.next < self.end || self.rested(now)
    }

    pub fn take(&mut self, now: Instant) -> Option<u32> {
        if self.rested(now) {
            return self.resting.pop_front().map(|(_, number)| number);
        }
        if let Some(number) = self.gaps.pop_front() {
            return Some(number);
        }
        (self.next < self.end).then(|| {
            self.next += 1;
            self.next - 1
        })
    }

    pub fn release(&mut self, number: u32, now: Instant) {
        self.resting.push_back((now, number));
    }

    /// When the next number comes free, if it has to be waited for.
    pub fn free_at(&self) -> Option<Instant> {
        let (since, _) = self.resting.front()?;
        since.checked_add(QUARANTINE)
    }
}

/// What a location stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Owner {
    /// A bridge port, as member of that bridge and VLAN: an entry that outlives the
    /// membership must not follow the port into another segment (R2).
    Port {
        domain: Domain,
        ifindex: IfIndex,
    },
    Remote(RemoteKey),
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    /// `None` while in use: taken over from an earlier run and not recognised.
    owner: Option<Owner>,
    in_use: bool,
    /// FDB entries that name this location.
    references: u32,
    /// As last stored.
    value: Location,
    /// A MAC behind this port, see `Port::first_key`.
    first: Option<FdbKey>,
}

const UNUSED: Entry = Entry {
    owner: None,
    in_use: false,
    references: 0,
    value: Location(0),
    first: None,
};

#[derive(Debug)]
pub(super) struct Locations {
    capacity: u32,
    entries: Vec<Entry>,
    by_owner: HashMap<Owner, u32>,
    allocator: Allocator,
    /// Given out since last asked.
    fresh: Vec<u32>,
    /// Lost their last reference since last asked; may have got a new one.
    idle: Vec<u32>,
}

impl Locations {
    pub fn new(capacity: u32) -> Self {
        Self {
            capacity,
            entries: vec![UNUSED],
            by_owner: HashMap::new(),
            allocator: Allocator::new(Location::NONE + 1, capacity),
            fresh: Vec::new(),
            idle: Vec::new(),
        }
    }

    fn entry(&self, index: u32) -> Entry {
        self.entries.get(index as usize).copied().unwrap_or(UNUSED)
    }

    /// Only for indexes below the capacity: those given out or adopted.
    fn entry_mut(&mut self, index: u32) -> &mut Entry {
        let index = index as usize;
        if index >= self.entries.len() {
            self.entries.resize(index + 1, UNUSED);
        }
        &mut self.entries[index]
    }

    pub fn value(&self, index: u32) -> Location {
        self.entry(index).value
    }

    pub fn owner(&self, index: u32) -> Option<Owner> {
        self.entry(index).owner
    }

    pub fn references(&self, index: u32) -> u32 {
        self.entry(index).references
    }

    pub fn find(&self, owner: &Owner) -> Option<u32> {
        self.by_owner.get(owner).copied()
    }

    /// Locations in use, with their owners.
    pub fn owned(&self) -> impl Iterator<Item = (u32, Owner)> + '_ {
        self.by_owner.iter().map(|(owner, index)| (*index, *owner))
    }

    pub fn has_free(&self, now: Instant) -> bool {
        self.allocator.has_free(now)
    }

    pub fn free_at(&self) -> Option<Instant> {
        self.allocator.free_at()
    }

    /// One more reference to the owner's location; `None` if there is no room.
    pub fn acquire(&mut self, owner: Owner, now: Instant) -> Option<u32> {
        let index = match self.find(&owner) {
            Some(index) => index,
            None => {
                let index = self.allocator.take(now)?;
                self.give(index, owner);
                self.fresh.push(index);
                index
            }
        };
        self.entry_mut(index).references += 1;
        Some(index)
    }

    fn give(&mut self, index: u32, owner: Owner) {
        self.by_owner.insert(owner, index);
        let entry = self.entry_mut(index);
        entry.owner = Some(owner);
        entry.in_use = true;
    }

    pub fn release(&mut self, index: u32) {
        if index == Location::NONE || index >= self.capacity {
            return;
        }
        let entry = self.entry_mut(index);
        entry.references = entry.references.saturating_sub(1);
        if entry.references == 0 {
            self.idle.push(index);
        }
    }

    pub fn first(&self, index: u32) -> Option<FdbKey> {
        self.entry(index).first
    }

    pub fn set_first(&mut self, index: u32, first: Option<FdbKey>) {
        self.entry_mut(index).first = first;
    }

    /// The store that makes a location say `place`; `None` if it does.
    pub fn store(&mut self, index: u32, place: Place) -> Option<TableUpdate> {
        let entry = self.entry_mut(index);
        if entry.value.place() == place {
            return None;
        }
        entry.value = Location::new(place, entry.value.generation().wrapping_add(1));
        Some(TableUpdate::Location {
            index,
            value: entry.value,
        })
    }

    pub fn take_fresh(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.fresh)
    }

    /// Remotes that nothing names any more.
    pub fn leaving(&self) -> impl Iterator<Item = (u32, RemoteKey)> + '_ {
        self.idle
            .iter()
            .filter_map(|&index| match self.entry(index) {
                Entry {
                    owner: Some(Owner::Remote(key)),
                    references: 0,
                    ..
                } => Some((index, key)),
                _ => None,
            })
    }

    /// Give back the locations that nothing names any more; what they said last.
    pub fn free_idle(&mut self, now: Instant) -> Vec<(u32, Option<Owner>)> {
        let mut freed = Vec::new();
        for index in std::mem::take(&mut self.idle) {
            let entry = self.entry_mut(index);
            if entry.references > 0 || !entry.in_use {
                continue;
            }
            let owner = entry.owner.take();
            entry.in_use = false;
            entry.first = None;
            if let Some(owner) = owner {
                self.by_owner.remove(&owner);
            }
            self.allocator.release(index, now);
            freed.push((index, owner));
        }
        freed
    }

    /// Take over what the maps hold: values, and how often each is named.
    pub fn adopt(
        &mut self,
        values: impl Iterator<Item = (u32, Location)>,
        named: impl Iterator<Item = u32>,
    ) {
        let mut used = BTreeSet::new();
        let valid = Location::NONE + 1..self.capacity;
        for (index, value) in values.filter(|(index, _)| valid.contains(index)) {
            self.entry_mut(index).value = value;
            if value.place() != Place::Kernel {
                used.insert(index);
            }
        }
        for index in named.filter(|index| valid.contains(index)) {
            self.entry_mut(index).references += 1;
            used.insert(index);
        }
        self.allocator.adopt(&used);
        for &index in &used {
            let entry = self.entry_mut(index);
            entry.in_use = true;
            if entry.references == 0 {
                self.idle.push(index);
            }
        }
    }

    /// Recognise the owner of a location that was taken over.
    pub fn claim(&mut self, index: u32, owner: Owner) {
        if self.entry(index).owner.is_none() && self.find(&owner).is_none() {
            self.give(index, owner);
        }
    }
}
