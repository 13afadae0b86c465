//! After a restart: take over what the maps hold, so that only differences are
//! written (R39). Numbers mean nothing by themselves; each location is
//! recognised by what it says, or by what all entries that name it want.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use vtep_common::fdb::Value;
use vtep_common::layout::{Config, FdbKey, Location, Place, PortKey, SegmentId};
use vtep_common::{MacAddr, Vni};

use super::fdb::{Decision, decide};
use super::locations::Owner;
use super::{Applied, Model, Written};
use crate::tables::Tables;

/// What the entries that name a location want it to be.
#[derive(Debug, Clone, Copy)]
enum Vote {
    All(Owner),
    Split,
}

impl Model {
    /// Take over what is in the maps. At most once, before the first snapshot;
    /// the first [`Model::updates`] after that writes the differences.
    pub fn adopt(&mut self, tables: Tables) {
        let config = tables.config.unwrap_or(Config::EMPTY);
        (self.epoch, self.fdb_mask) = (config.epoch, config.fdb_mask);
        for (key, segment) in &tables.segments {
            if segment.id != 0 && u32::from(segment.id) < self.settings.capacity.segments {
                self.ids.taken.insert(segment.id, *key);
            }
        }
        let named = tables.fdb.values().map(|value| value.location());
        self.locations
            .adopt(tables.locations.iter().map(|(i, v)| (*i, *v)), named);
        let slots = tables
            .locations
            .values()
            .filter_map(|value| match value.place() {
                Place::Remote(slot) if slot < self.settings.capacity.remotes => Some(slot),
                _ => None,
            });
        let slots: BTreeSet<u32> = slots.collect();
        let mut remotes = tables.remotes;
        remotes.retain(|slot, _| *slot < self.settings.capacity.remotes);
        self.slots.adopt(remotes, &slots);

        let vnis: HashMap<SegmentId, u32> = tables
            .segments
            .iter()
            .map(|(key, segment)| (segment.id, key.vni()))
            .collect();
        let mut fdb: BTreeMap<SegmentId, HashMap<MacAddr, Applied>> = BTreeMap::new();
        let fdb_entries = tables.fdb.len() as u32;
        for (key, value) in tables.fdb {
            if value.flags() & Value::OWNER_API != 0
                && let Some(vni) = vnis.get(&key.segment()).and_then(|vni| Vni::new(*vni))
            {
                self.api.insert((vni, key.mac()));
            }
            fdb.entry(key.segment()).or_default().insert(
                key.mac(),
                Applied {
                    location: value.location(),
                    generation: 1,
                    flags: value.flags(),
                },
            );
        }
        self.written = Written {
            config: tables.config,
            targets: tables.targets.into_iter().collect(),
            segments: tables.segments,
            ports: tables.ports,
            hooks: tables.hooks,
            peers: tables.peers,
            fdb,
            fdb_entries,
        };
        self.adopting = true;
        self.dirty.structure = true;
    }

    /// Find the owners of the locations taken over. A location that says what
    /// an owner wants is that owner's. One that says "kernel" or something old
    /// is taken only if all its entries want the same owner: the others would
    /// follow it to the wrong place before they are rewritten.
    pub(super) fn recognise(&mut self) {
        let mut votes: BTreeMap<u32, Vote> = BTreeMap::new();
        let mut said: BTreeMap<u32, Owner> = BTreeMap::new();
        for (id, table) in &self.written.fdb {
            let segment = self.segment_by_id(*id);
            for (mac, entry) in table {
                if entry.location == Location::NONE {
                    continue;
                }
                let vote = match segment.map(|segment| decide(&self.world, segment, *mac)) {
                    Some(Decision::At(owner)) => Vote::All(owner),
                    _ => Vote::Split,
                };
                if let Vote::All(owner) = vote
                    && !said.contains_key(&entry.location)
                    && self.says(entry.location, &owner)
                {
                    said.insert(entry.location, owner);
                }
                votes
                    .entry(entry.location)
                    .and_modify(|all| match (*all, vote) {
                        (Vote::All(a), Vote::All(b)) if a == b => {}
                        _ => *all = Vote::Split,
                    })
                    .or_insert(vote);
            }
        }
        for (index, owner) in &said {
            self.locations.claim(*index, *owner);
        }
        for (index, vote) in votes {
            if let Vote::All(owner) = vote {
                self.locations.claim(index, owner);
            }
        }
        self.recognise_first_keys();
    }

    fn says(&self, index: u32, owner: &Owner) -> bool {
        match (self.locations.value(index).place(), owner) {
            (Place::Port(port, _), Owner::Port { ifindex, .. }) => port == *ifindex,
            (Place::Remote(slot), Owner::Remote(key)) => self
                .slots
                .get(slot)
                .is_some_and(|value| key.is_described_by(value)),
            _ => false,
        }
    }

    fn recognise_first_keys(&mut self) {
        let owned: Vec<(u32, Owner)> = self.locations.owned().collect();
        let mut missing = HashSet::new();
        for (index, owner) in owned {
            let Owner::Port { ifindex, .. } = owner else {
                continue;
            };
            let word = self
                .written
                .ports
                .get(&PortKey::new(ifindex, 0))
                .map_or(0, |port| port.first_key);
            let key = FdbKey::from_word(word);
            let table = self.written.fdb.get(&key.segment());
            let entry = table.and_then(|table| table.get(&key.mac()));
            if entry.is_some_and(|entry| entry.location == index) {
                self.locations.set_first(index, Some(key));
            } else {
                missing.insert(index);
            }
        }
        self.find_first_keys(&missing);
        self.dirty.values = true;
    }
}
