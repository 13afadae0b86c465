//! Keeps alive in the kernel what the fast path keeps busy, and nothing else:
//! entries marked with the current or the previous epoch are refreshed, idle
//! ones age as configured. The controller reads the marks once an interval.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use vtep_common::fdb::Value;
use vtep_common::layout::{FdbKey, Port, PortKey};

use super::Model;
use super::segments::Segment;
use super::world::{BridgeEntry, Domain, VxlanEntry};
use crate::kernel::{FdbEntry, FdbTable};

/// Lower bound of [`Model::refresh_interval`], whatever the lifetimes say.
pub const SHORTEST_INTERVAL: Duration = Duration::from_millis(100);

impl Model {
    /// Begin another epoch; the next updates tell the programs.
    pub fn next_epoch(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
    }

    fn is_recent(&self, epoch: u8) -> bool {
        epoch == self.epoch || epoch == self.epoch.wrapping_sub(1)
    }

    /// The kernel's entries to refresh, given the content of `FDB` and `PORTS`:
    /// dynamic ones that carried traffic in this epoch or the one before.
    pub fn busy(
        &self,
        fdb: impl IntoIterator<Item = (FdbKey, Value)>,
        ports: &BTreeMap<PortKey, Port>,
    ) -> Vec<FdbEntry> {
        let entries = fdb
            .into_iter()
            .filter(|(_, value)| self.is_recent(value.epoch()));
        let ports = ports.values();
        let ports = ports.filter(|port| port.first_key != 0 && self.is_recent(port.epoch));
        let first = ports.map(|port| FdbKey::from_word(port.first_key));
        let keys: BTreeSet<FdbKey> = entries.map(|(key, _)| key).chain(first).collect();
        keys.into_iter()
            .flat_map(|key| self.kernel_entries(key))
            .collect()
    }

    /// The entries behind one key that can age: in the bridge's table, and in
    /// the VXLAN device's for a remote.
    fn kernel_entries(&self, key: FdbKey) -> impl Iterator<Item = FdbEntry> {
        let found = self.segment_by_id(key.segment()).and_then(|segment| {
            let domain = segment.domain()?;
            let entry = self.world.bridge_entry(domain, key.mac())?;
            let remote = (entry.port == segment.tunnel.vxlan)
                .then(|| self.world.vxlan_entry(segment.tunnel, key.mac()))
                .flatten();
            Some((segment, domain, *entry, remote.copied()))
        });
        found
            .into_iter()
            .flat_map(move |(segment, domain, entry, remote)| {
                let bridge = (entry.ages() && !entry.is_local(domain))
                    .then(|| bridge_entry(key, domain, entry));
                let vxlan = remote
                    .filter(|remote| remote.ages())
                    .map(|remote| vxlan_entry(key, segment, remote));
                bridge.into_iter().chain(vxlan)
            })
    }

    /// How often to look for busy entries; `None` while nothing ages. A third
    /// of the shortest lifetime: an entry survives two lost looks.
    pub fn refresh_interval(&self) -> Option<Duration> {
        let accelerated = self.segments.values().filter(|segment| segment.id.is_ok());
        let lifetimes = accelerated.flat_map(|segment| {
            let bridge = segment
                .bridge
                .and_then(|bridge| self.world.bridge_ageing(bridge));
            let vxlan = self
                .world
                .vxlan(segment.tunnel.vxlan)
                .filter(|(_, device)| device.learning);
            let vxlan = vxlan.map(|(_, device)| Duration::from_secs(device.ageing_s.into()));
            bridge.into_iter().chain(vxlan)
        });
        // Zero: entries live for ever (vxlan) or are not learned at all (bridge).
        let shortest = lifetimes.filter(|lifetime| !lifetime.is_zero()).min()?;
        Some((shortest / 3).max(SHORTEST_INTERVAL))
    }
}

fn bridge_entry(key: FdbKey, domain: Domain, entry: BridgeEntry) -> FdbEntry {
    FdbEntry {
        table: FdbTable::Bridge,
        ifindex: entry.port,
        bridge: Some(domain.bridge),
        mac: key.mac(),
        vlan: (domain.vlan != 0).then_some(domain.vlan),
        dst: None,
        udp_port: None,
        vni: None,
        source_vni: None,
        via: None,
        nexthop_id: None,
        state: entry.state,
        flags: entry.flags,
    }
}

fn vxlan_entry(key: FdbKey, segment: &Segment, entry: VxlanEntry) -> FdbEntry {
    FdbEntry {
        table: FdbTable::Vxlan,
        ifindex: segment.tunnel.vxlan,
        bridge: None,
        mac: key.mac(),
        vlan: None,
        dst: entry.to.dst,
        udp_port: entry.to.udp_port,
        vni: entry.to.vni,
        source_vni: segment.tunnel.source_vni,
        via: entry.to.via,
        nexthop_id: entry.to.nexthop_id,
        state: entry.state,
        flags: entry.flags,
    }
}
