//! What the kernel refused to take, and how long that is remembered: until the
//! device changes or the controller says "retry", so that nothing is tried in a
//! loop. Whatever hangs on a refused thing is left to the kernel.

use std::collections::{BTreeMap, HashSet};

use vtep_common::layout::{FdbKey, Place, VniKey};

use super::fdb::FdbChanges;
use super::{Domain, Model, Reason};
use crate::kernel::{IfIndex, Link, LinkKind};
use crate::tables::{Refused, TableUpdate};

#[derive(Debug, Default)]
pub(super) struct Refusals {
    /// No program, no target or no port entry.
    pub devices: BTreeMap<IfIndex, Reason>,
    pub segments: BTreeMap<VniKey, Reason>,
    /// Locations that must say "kernel".
    pub places: BTreeMap<u32, Reason>,
    pub config: Option<Reason>,
    /// No room for a peer: no segment is strict.
    pub peers: Option<Reason>,
    /// Entries to take out of the map again, if they are in it.
    fdb: Vec<FdbKey>,
    /// Removals to repeat.
    pub removals: Vec<(TableUpdate, Reason)>,
}

impl Refusals {
    /// The device is not what it was: what it was refused may work now.
    pub fn forget(&mut self, link: &Link) {
        self.devices.remove(&link.ifindex);
        if let LinkKind::Vxlan(device) = &link.kind {
            let mine = |key: &VniKey| {
                let vni = device.vni.get();
                key.udp_port() == device.udp_port && (device.collect_metadata || key.vni() == vni)
            };
            self.segments.retain(|key, _| !mine(key));
        }
    }

    fn is_empty(&self) -> bool {
        self.devices.is_empty()
            && self.segments.is_empty()
            && self.places.is_empty()
            && self.config.is_none()
            && self.peers.is_none()
            && self.removals.is_empty()
    }
}

impl Model {
    /// Take in what the kernel refused of the last updates. The next
    /// [`Model::updates`] corrects what depended on it.
    ///
    /// Removing what is not there is not a refusal: the caller leaves out
    /// ENOENT and ENODEV of removals.
    pub fn refused(&mut self, refused: Vec<Refused>) {
        for Refused { update, reason } in refused {
            self.dirty.structure = true;
            match update {
                TableUpdate::Attach { ifindex, .. } => {
                    self.written.hooks.remove(&ifindex);
                    let reason = format!("the program cannot be attached: {reason}");
                    self.refusals.devices.insert(ifindex, reason.into());
                }
                // An older value may still be in the map: it counts as written,
                // and is removed because the device is not accelerated.
                TableUpdate::TargetAdd(ifindex) => {
                    let reason = format!("cannot be a redirect target: {reason}");
                    self.refusals.devices.insert(ifindex, reason.into());
                }
                TableUpdate::Port { key, .. } => {
                    let ifindex = key.ifindex();
                    let reason = format!("no entry in the port table: {reason}");
                    self.refusals.devices.insert(ifindex, reason.into());
                }
                TableUpdate::Segment { key, .. } => {
                    let reason = format!("no entry in the segment table: {reason}");
                    self.refusals.segments.insert(key, reason.into());
                }
                TableUpdate::Fdb { key, .. } => self.refusals.fdb.push(key),
                TableUpdate::Location { index, .. } => {
                    self.refusals.places.insert(index, reason.into());
                }
                TableUpdate::Remote { slot, .. } => {
                    let named = self.locations.owned().map(|(index, _)| index);
                    let named: Vec<u32> = named
                        .filter(|i| self.locations.value(*i).place() == Place::Remote(slot))
                        .collect();
                    for index in named {
                        self.refusals.places.insert(index, reason.clone().into());
                    }
                }
                TableUpdate::Peer(key) => {
                    self.written.peers.remove(&key);
                    self.refusals.peers = Some(reason.into());
                }
                TableUpdate::Config(_) => self.refusals.config = Some(reason.into()),
                removal @ (TableUpdate::TargetDel(_)
                | TableUpdate::SegmentDel(_)
                | TableUpdate::PeerDel(_)
                | TableUpdate::PortDel(_)
                | TableUpdate::FdbDel(_)
                | TableUpdate::Detach(_)) => {
                    self.refusals
                        .removals
                        .retain(|(known, _)| *known != removal);
                    self.refusals.removals.push((removal, reason.into()));
                }
            }
        }
    }

    /// Whether [`Model::retry`] would do anything.
    pub fn has_refused(&self) -> bool {
        !self.refusals.is_empty() || self.waiting.refused
    }

    /// Try again what was refused; false if there is nothing. The controller
    /// calls it with growing intervals, and [`Model::updates`] after it.
    pub fn retry(&mut self) -> bool {
        if !self.has_refused() {
            return false;
        }
        if self.refusals.config.is_some() {
            self.written.config = None;
        }
        let fdb = std::mem::take(&mut self.refusals.fdb);
        self.repeat = std::mem::take(&mut self.refusals).removals;
        self.refusals.fdb = fdb;
        self.waiting.refused = false;
        self.dirty.structure = true;
        self.dirty
            .domains
            .extend(self.domains.keys().copied().collect::<Vec<Domain>>());
        true
    }

    /// Take refused FDB entries out of the books. One that replaced an older
    /// entry is removed from the map: the older one must not stay.
    pub(super) fn withdraw_refused(
        &mut self,
        lost_first: &mut HashSet<u32>,
        changes: &mut FdbChanges,
    ) {
        for key in std::mem::take(&mut self.refusals.fdb) {
            let table = self.written.fdb.get(&key.segment());
            let Some(entry) = table.and_then(|t| t.get(&key.mac())).copied() else {
                continue;
            };
            self.locations.release(entry.location);
            self.leave(entry.location, key, lost_first);
            self.forget_entry(key);
            if entry.generation > 1 {
                changes.withdrawals.push(TableUpdate::FdbDel(key));
            }
            self.waiting.location.remove(&key);
            self.waiting.room.insert(key);
            self.waiting.refused = true;
            self.map_full += 1;
        }
    }

    /// Removals to repeat that are still right.
    pub(super) fn repeated_removals(&mut self) -> Vec<TableUpdate> {
        let repeat = std::mem::take(&mut self.repeat).into_iter();
        let written = &self.written;
        let still = |update: &TableUpdate| match update {
            TableUpdate::TargetDel(ifindex) => !written.targets.contains(ifindex),
            TableUpdate::SegmentDel(key) => !written.segments.contains_key(key),
            TableUpdate::PeerDel(key) => !written.peers.contains(key),
            TableUpdate::PortDel(key) => !written.ports.contains_key(key),
            TableUpdate::Detach(ifindex) => !written.hooks.contains_key(ifindex),
            TableUpdate::FdbDel(key) => {
                let table = written.fdb.get(&key.segment());
                !table.is_some_and(|table| table.contains_key(&key.mac()))
            }
            _ => false,
        };
        repeat.map(|(update, _)| update).filter(still).collect()
    }
}
