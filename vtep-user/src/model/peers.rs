//! Strict mode (R10): which addresses a segment takes frames from, counted over
//! all entries of its VXLAN device, so that one more or less is O(1).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use vtep_common::Vni;
use vtep_common::layout::{PeerKey, SegmentId};

use super::segments::Segment;
use super::world::{Destination, Tunnel};
use super::{Model, Reason, header};
use crate::kernel::IfIndex;
use crate::tables::TableUpdate;

/// Which segments are strict.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Strict {
    pub all: bool,
    /// Exceptions.
    pub vnis: BTreeMap<Vni, bool>,
}

impl Strict {
    pub fn of(&self, vni: Vni) -> bool {
        self.vnis.get(&vni).copied().unwrap_or(self.all)
    }
}

/// Entries of one tunnel by the address they lead to; `None`: to nexthop
/// objects, whose addresses are not known here.
type Counts = BTreeMap<Option<IpAddr>, u32>;

#[derive(Debug, Default)]
pub(super) struct Peers {
    counts: HashMap<Tunnel, Counts>,
    /// An address came or went since last asked.
    pub changed: bool,
}

impl Peers {
    pub fn add(&mut self, tunnel: Tunnel, to: &Destination) {
        let counts = self.counts.entry(tunnel).or_default();
        let count = counts.entry(of(to)).or_default();
        *count += 1;
        self.changed |= *count == 1;
    }

    pub fn remove(&mut self, tunnel: Tunnel, to: &Destination) {
        let Some(counts) = self.counts.get_mut(&tunnel) else {
            return;
        };
        if let Some(count) = counts.get_mut(&of(to)) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&of(to));
                self.changed = true;
            }
        }
        if counts.is_empty() {
            self.counts.remove(&tunnel);
        }
    }

    pub fn remove_device(&mut self, vxlan: IfIndex) {
        let before = self.counts.len();
        self.counts.retain(|tunnel, _| tunnel.vxlan != vxlan);
        self.changed |= self.counts.len() != before;
    }

    /// Whether the addresses of all remotes are known.
    fn all_known(&self, tunnel: Tunnel) -> bool {
        let counts = self.counts.get(&tunnel);
        !counts.is_some_and(|counts| counts.contains_key(&None))
    }

    fn addresses(&self, tunnel: Tunnel) -> impl Iterator<Item = IpAddr> + '_ {
        let counts = self.counts.get(&tunnel).into_iter().flatten();
        counts
            .filter_map(|(address, _)| *address)
            .filter(|address| header::is_host(*address))
    }
}

fn of(to: &Destination) -> Option<IpAddr> {
    // An entry without either goes to the default destination, which is counted
    // by its own entry.
    match to.nexthop_id {
        Some(_) => None,
        None => Some(
            to.dst
                .unwrap_or(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED)),
        ),
    }
}

impl Model {
    /// Whether frames from strangers are dropped; `Err`: they should be, but
    /// cannot be told.
    pub(super) fn is_strict(&self, segment: &Segment) -> Result<bool, Reason> {
        if !segment.strict {
            return Ok(false);
        }
        if let Some(reason) = &self.refusals.peers {
            return Err(format!("the table of peers takes no more: {reason}").into());
        }
        if !self.world.peers.all_known(segment.tunnel) {
            return Err("entries lead to nexthop groups, whose addresses are not known".into());
        }
        Ok(true)
    }

    /// Peers that are new, and those that are not any more.
    pub(super) fn peer_changes(&mut self) -> (Vec<TableUpdate>, Vec<TableUpdate>) {
        let mut wanted = BTreeSet::new();
        for segment in self.segments.values() {
            if let (Ok(id), Ok(true)) = (&segment.id, self.is_strict(segment)) {
                let addresses = self.world.peers.addresses(segment.tunnel);
                wanted.extend(addresses.map(|address| peer(*id, address)));
            }
        }
        let written = &self.written.peers;
        let new = wanted.difference(written).copied();
        let gone = written.difference(&wanted).copied();
        let changes = (
            new.map(TableUpdate::Peer).collect(),
            gone.map(TableUpdate::PeerDel).collect(),
        );
        self.written.peers = wanted;
        changes
    }
}

fn peer(segment: SegmentId, address: IpAddr) -> PeerKey {
    PeerKey {
        address: header::address_bytes(address),
        segment,
        pad: [0; 2],
    }
}
