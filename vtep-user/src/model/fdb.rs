//! Where every MAC is: the kernel's two forwarding tables, turned into FDB
//! entries that name locations. An entry that moves is written once, from the
//! old to the new location, never deleted in between (R37).

use std::collections::HashSet;
use std::time::Instant;

use vtep_common::MacAddr;
use vtep_common::fdb::Value;
use vtep_common::layout::{FdbKey, Location, SegmentId};

use super::locations::Owner;
use super::remotes::RemoteKey;
use super::segments::Segment;
use super::world::{Touched, World};
use super::{Applied, Model};
use crate::tables::TableUpdate;

/// What the kernel's tables say about a MAC of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decision {
    /// Not in the map: the bridge floods it, or takes it for this host.
    Absent(&'static str),
    /// In the map, so that it is not flooded, but left to the kernel.
    Kernel(&'static str),
    At(Owner),
}

pub(super) const NOT_IN_BRIDGE: &str =
    "not in the bridge's table: the bridge floods it; add it with `master`";
pub(super) const THIS_HOST: &str = "an address of this host";

pub(super) fn decide(world: &World, segment: &Segment, mac: MacAddr) -> Decision {
    let Some(domain) = segment.domain() else {
        return Decision::Absent(NOT_IN_BRIDGE);
    };
    let Some(entry) = world.bridge_entry(domain, mac) else {
        return Decision::Absent(NOT_IN_BRIDGE);
    };
    if entry.is_local(domain) {
        return Decision::Absent(THIS_HOST);
    }
    if entry.port != segment.tunnel.vxlan {
        return Decision::At(Owner::Port {
            domain,
            ifindex: entry.port,
        });
    }
    let Some(entry) = world.vxlan_entry(segment.tunnel, mac) else {
        return Decision::Kernel("no entry of the VXLAN device: the default destination takes it");
    };
    if entry.several {
        return Decision::Kernel("has several destinations");
    }
    match RemoteKey::of(segment, &entry.to) {
        Ok(key) => Decision::At(Owner::Remote(key)),
        Err(reason) => Decision::Kernel(reason),
    }
}

/// FDB writes of one pass, in the order they are given out.
#[derive(Debug, Default)]
pub(super) struct FdbChanges {
    /// Of entries whose replacement the kernel refused: they make no room.
    pub withdrawals: Vec<TableUpdate>,
    pub writes: Vec<TableUpdate>,
    pub deletes: Vec<TableUpdate>,
}

impl Model {
    /// Epoch of an entry that has not carried traffic: one that does marks
    /// itself with its next frame.
    pub(super) fn idle_epoch(&self) -> u8 {
        self.epoch.wrapping_sub(2)
    }

    /// Stations whose entries have to be decided again.
    pub(super) fn touched_stations(&self) -> Vec<(&Segment, MacAddr)> {
        let mut stations = Vec::new();
        for domain in &self.dirty.domains {
            let Some(segment) = self.accelerated(domain) else {
                continue;
            };
            let now = self
                .world
                .bridges
                .get(domain)
                .into_iter()
                .flat_map(|t| t.keys());
            let id = segment.id.as_ref().unwrap_or(&0);
            let written = self.written.fdb.get(id).into_iter().flat_map(|t| t.keys());
            stations.extend(now.chain(written).map(|mac| (segment, *mac)));
        }
        for touched in &self.dirty.entries {
            let (segment, mac) = match touched {
                Touched::Bridge(domain, mac) => (self.accelerated(domain), mac),
                Touched::Vxlan(tunnel, mac) => (self.segments.get(tunnel), mac),
            };
            if let Some(segment) = segment.filter(|segment| segment.id.is_ok()) {
                stations.push((segment, *mac));
            }
        }
        // In a fixed order, each once: hash tables come in any.
        stations.sort_unstable_by_key(|(segment, mac)| (segment.tunnel, *mac));
        stations.dedup_by_key(|(segment, mac)| (segment.tunnel, *mac));
        stations
    }

    fn accelerated(&self, domain: &super::Domain) -> Option<&Segment> {
        self.segments.get(self.domains.get(domain)?)
    }

    pub(super) fn remote_of(&self, segment: &Segment, mac: MacAddr) -> Option<RemoteKey> {
        match decide(&self.world, segment, mac) {
            Decision::At(Owner::Remote(key)) => Some(key),
            _ => None,
        }
    }

    /// Decide about all that was touched, and about what waited.
    pub(super) fn decide_fdb(&mut self, now: Instant) -> FdbChanges {
        let mut changes = FdbChanges::default();
        let mut lost_first = HashSet::new();
        self.withdraw_refused(&mut lost_first, &mut changes);
        // Deleted entries make room only after this pass: writes come first.
        let capacity = self.settings.capacity.fdb;
        let mut room = capacity.saturating_sub(self.written.fdb_entries);
        for key in self.keys_to_decide(now, room) {
            let (id, mac) = (key.segment(), key.mac());
            let decision = self
                .segment_by_id(id)
                .map_or(Decision::Absent(NOT_IN_BRIDGE), |s| {
                    decide(&self.world, s, mac)
                });
            let waited = self.waiting.room.remove(&key);
            let old = self
                .written
                .fdb
                .get(&id)
                .and_then(|table| table.get(&mac))
                .copied();
            if let Decision::Absent(_) = decision {
                self.waiting.location.remove(&key);
                if let Some(old) = old {
                    self.locations.release(old.location);
                    self.leave(old.location, key, &mut lost_first);
                    self.forget_entry(key);
                    changes.deletes.push(TableUpdate::FdbDel(key));
                }
                continue;
            }
            if old.is_none() {
                if room == 0 || self.waiting.refused {
                    self.waiting.room.insert(key);
                    self.map_full += u64::from(!waited);
                    continue;
                }
                room -= 1;
            }
            self.write_entry(key, decision, old, now, &mut lost_first, &mut changes);
        }
        self.find_first_keys(&lost_first);
        self.dirty.domains.clear();
        self.dirty.entries.clear();
        changes
    }

    fn write_entry(
        &mut self,
        key: FdbKey,
        decision: Decision,
        old: Option<Applied>,
        now: Instant,
        lost_first: &mut HashSet<u32>,
        changes: &mut FdbChanges,
    ) {
        let flags = self.flags_of(key);
        let owner = match decision {
            Decision::At(owner) => Some(owner),
            Decision::Kernel(_) | Decision::Absent(_) => None,
        };
        if let Some(old) = old
            && old.flags == flags
            && self.locations.owner(old.location) == owner
            && (owner.is_some() || old.location == Location::NONE)
        {
            return;
        }
        let waited = self.waiting.location.remove(&key);
        let location = match owner {
            None => Location::NONE,
            Some(owner) => self.locations.acquire(owner, now).unwrap_or_else(|| {
                self.waiting.location.insert(key);
                self.map_full += u64::from(!waited);
                Location::NONE
            }),
        };
        if let Some(old) = old {
            self.locations.release(old.location);
            if old.location != location {
                self.leave(old.location, key, lost_first);
            } else if old.flags == flags {
                // Still without a location.
                return;
            }
        }
        if matches!(owner, Some(Owner::Port { .. }))
            && location != Location::NONE
            && self.locations.first(location).is_none()
        {
            self.locations.set_first(location, Some(key));
            self.dirty.values = true;
        }
        let new = Applied {
            location,
            generation: old.map_or(0, |old| old.generation).wrapping_add(1),
            flags,
        };
        let table = self.written.fdb.entry(key.segment()).or_default();
        if table.insert(key.mac(), new).is_none() {
            self.written.fdb_entries += 1;
        }
        changes.writes.push(TableUpdate::Fdb {
            key,
            value: Value::new(location, flags, self.idle_epoch()),
        });
    }

    fn flags_of(&self, key: FdbKey) -> u8 {
        let vni = self.segment_by_id(key.segment()).map(|segment| segment.vni);
        match vni {
            Some(vni) if self.api.contains(&(vni, key.mac())) => Value::OWNER_API,
            _ => 0,
        }
    }

    /// All keys to decide about, each once; `room`: new entries the map takes.
    fn keys_to_decide(&mut self, now: Instant, room: u32) -> Vec<FdbKey> {
        let stations = self.touched_stations();
        let mut keys: Vec<FdbKey> = stations
            .into_iter()
            .filter_map(|(segment, mac)| Some(FdbKey::new(*segment.id.as_ref().ok()?, mac)))
            .collect();
        for (id, table) in &self.written.fdb {
            if !self.by_id.contains_key(id) {
                keys.extend(table.keys().map(|mac| FdbKey::new(*id, *mac)));
            }
        }
        if !self.waiting.refused {
            keys.extend(self.waiting.room.iter().take(room as usize));
        }
        if self.locations.has_free(now) {
            keys.extend(&self.waiting.location);
        }
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    pub(super) fn segment_by_id(&self, id: SegmentId) -> Option<&Segment> {
        self.segments.get(self.by_id.get(&id)?)
    }

    /// Take an entry out of the books.
    pub(super) fn forget_entry(&mut self, key: FdbKey) {
        let Some(table) = self.written.fdb.get_mut(&key.segment()) else {
            return;
        };
        if table.remove(&key.mac()).is_some() {
            self.written.fdb_entries -= 1;
        }
        if table.is_empty() {
            self.written.fdb.remove(&key.segment());
        }
    }

    /// A MAC left a location; its port may need another first MAC.
    pub(super) fn leave(&mut self, location: u32, key: FdbKey, lost_first: &mut HashSet<u32>) {
        if location != Location::NONE && self.locations.first(location) == Some(key) {
            self.locations.set_first(location, None);
            lost_first.insert(location);
            self.dirty.values = true;
        }
    }

    /// Give ports that lost their first MAC another one: the smallest.
    pub(super) fn find_first_keys(&mut self, lost: &HashSet<u32>) {
        let wanting = |index: &u32| {
            self.locations.references(*index) > 0 && self.locations.first(*index).is_none()
        };
        let lost: HashSet<u32> = lost.iter().copied().filter(wanting).collect();
        if lost.is_empty() {
            return;
        }
        let mut found = std::collections::BTreeMap::new();
        for (id, table) in &self.written.fdb {
            for (mac, entry) in table {
                if lost.contains(&entry.location) {
                    let key = FdbKey::new(*id, *mac);
                    let first = found.entry(entry.location).or_insert(key);
                    *first = key.min(*first);
                }
            }
        }
        for (index, key) in found {
            self.locations.set_first(index, Some(key));
        }
    }
}
