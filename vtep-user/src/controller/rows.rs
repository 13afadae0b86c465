//! What the model and the counters know, in the form of the control interface.

use std::collections::BTreeMap;

use vtep_common::layout::SegmentId;
use vtep_common::{Fate, MacAddr, Outcome, Vni};

use crate::api::ApiError;
use crate::api::types::{
    Count, Counters, DirectionStats, FdbFilter, FdbRow, Location, Owner, PortHook, PortStatus,
    RemoteRow, SegmentStats, SegmentStatus, Stats, Status, Target, UplinkStatus, VniRow, XdpMode,
};
use crate::host;
use crate::model::{self, HookChoice};
use crate::tables;

use super::Controller;

impl Controller {
    pub(super) fn status(&self) -> Status {
        let counters = self.model.counters();
        Status {
            ready: self.ready,
            instance: self.options.instance.name().to_owned(),
            netns: self.options.netns.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: host::kernel_release().unwrap_or_else(|error| error.to_string()),
            uplinks: self.model.uplinks().into_iter().map(uplink).collect(),
            segments: self.model.segments().into_iter().map(segment).collect(),
            ports: self.port_rows(),
            counters: Counters {
                overruns: self.counts.overruns,
                resyncs: self.counts.resyncs,
                updates: self.counts.updates,
                map_full: counters.map_full,
                fdb_entries: counters.fdb_entries,
                fdb_capacity: counters.fdb_capacity,
            },
            warnings: self.model.warnings(),
        }
    }

    pub(super) fn vni_rows(&self) -> Vec<VniRow> {
        let ports = self.model.ports();
        self.model
            .segments()
            .into_iter()
            .map(|row| VniRow {
                mtu: self.model.link(row.vxlan).map_or(0, |link| link.mtu),
                remotes: self.model.flood_list(row.vni),
                ports: ports
                    .iter()
                    .filter(|p| p.vni == row.vni)
                    .map(|p| p.name.clone())
                    .collect(),
                segment: segment(row),
            })
            .collect()
    }

    pub(super) fn port_rows(&self) -> Vec<PortStatus> {
        self.model.ports().into_iter().map(port).collect()
    }

    pub(super) fn fdb_rows(&self, filter: FdbFilter) -> Vec<FdbRow> {
        self.model
            .fdb_rows(filter.vni, filter.mac)
            .into_iter()
            .map(fdb)
            .collect()
    }

    pub(super) fn fdb_row(&self, vni: Vni, mac: MacAddr) -> Option<FdbRow> {
        self.model
            .fdb_rows(Some(vni), Some(mac))
            .into_iter()
            .next()
            .map(fdb)
    }

    pub(super) fn remote_rows(&self) -> Vec<RemoteRow> {
        self.model.remotes().into_iter().map(remote).collect()
    }

    pub(super) fn stats(&self) -> Result<Stats, ApiError> {
        let counters = self
            .dataplane
            .stats()
            .map_err(|error| ApiError::internal(format!("cannot read the counters: {error}")))?;
        let at = |segment: SegmentId, outcome: Outcome| {
            let counter = counters
                .get(segment as usize)
                .map(|row| row[outcome as usize]);
            counter.map_or(Count::default(), |c| Count {
                frames: c.frames,
                bytes: c.bytes,
            })
        };
        let segments = counters.len();
        let mut outcomes: BTreeMap<String, Count> = BTreeMap::new();
        for outcome in Outcome::ALL {
            let total = (0..segments as SegmentId)
                .map(|s| at(s, *outcome))
                .fold(Count::default(), add);
            outcomes.insert(outcome.name().to_owned(), total);
        }
        let segments = self
            .model
            .segments()
            .into_iter()
            .filter_map(|row| {
                let id = row.segment?;
                let direction = |ingress: bool| {
                    let count = |fate: Fate| {
                        Outcome::ALL
                            .iter()
                            .filter(|o| o.is_ingress() == ingress && o.fate() == fate)
                            .map(|o| at(id, *o))
                            .fold(Count::default(), add)
                    };
                    DirectionStats {
                        fast: count(Fate::Fast),
                        passed: count(Fate::Passed),
                        dropped: count(Fate::Dropped),
                    }
                };
                Some(SegmentStats {
                    vni: row.vni,
                    segment: id,
                    ingress: direction(true),
                    egress: direction(false),
                    outcomes: Outcome::ALL
                        .iter()
                        .map(|o| (o.name().to_owned(), at(id, *o)))
                        .filter(|(_, count)| count.frames > 0)
                        .collect(),
                })
            })
            .collect();
        Ok(Stats { outcomes, segments })
    }
}

fn add(a: Count, b: Count) -> Count {
    Count {
        frames: a.frames + b.frames,
        bytes: a.bytes + b.bytes,
    }
}

fn uplink(row: model::UplinkRow) -> UplinkStatus {
    UplinkStatus {
        name: row.name,
        ifindex: row.ifindex,
        accelerated: row.hook.is_some(),
        hook: row.hook.map(Into::into),
        mode: row.hook.and_then(mode),
        reason: row.reason,
    }
}

/// How XDP runs, where it is XDP.
fn mode(hook: tables::Hook) -> Option<XdpMode> {
    match hook {
        tables::Hook::Xdp(mode) => Some(mode.into()),
        tables::Hook::Tcx => None,
    }
}

fn segment(row: model::SegmentRow) -> SegmentStatus {
    SegmentStatus {
        vni: row.vni,
        segment: row.segment,
        bridge: row.bridge_name,
        vlan: row.vlan,
        vxlan: row.vxlan_name,
        local: row.local,
        udp_port: row.udp_port,
        learning: row.learning,
        strict: row.strict,
        accelerated: row.segment.is_some(),
        reason: row.reason,
    }
}

fn port(row: model::PortRow) -> PortStatus {
    PortStatus {
        name: row.name,
        ifindex: row.ifindex,
        vni: row.vni,
        vlan: row.vlan,
        hook: row.hook.map(Into::into),
        mode: row.hook.and_then(mode),
        ingress: row.via.map(Into::into),
        accelerated: row.hook.is_some(),
        reason: row.reason,
    }
}

fn fdb(row: model::FdbRow) -> FdbRow {
    FdbRow {
        vni: row.vni,
        vlan: row.vlan,
        mac: row.mac,
        location: match row.place {
            model::RowPlace::Port(port) => Location::Local { port },
            model::RowPlace::Remote(remote) => Location::Remote { remote },
        },
        endpoint: None,
        owner: match row.owner {
            model::RowOwner::Kernel => Owner::Kernel,
            model::RowOwner::Static => Owner::Static,
            model::RowOwner::Api => Owner::Api,
        },
        generation: row.generation,
        accelerated: row.accelerated,
    }
}

/// Whether an entry is where a request wanted it.
pub fn points_to(row: &FdbRow, target: &Target) -> bool {
    match (&row.location, target) {
        (Location::Remote { remote }, Target::Remote { remote: wanted }) => *remote == wanted.get(),
        (Location::Local { port }, Target::Local { port: wanted }) => port == wanted.as_str(),
        _ => false,
    }
}

fn remote(row: model::RemoteRow) -> RemoteRow {
    RemoteRow {
        remote: row.remote,
        vni: row.vni,
        udp_port: row.udp_port,
        local: row.local,
        dev: row.dev,
        next_hop: row.next_hop,
        mac: row.mac,
        fdb_entries: row.fdb_entries,
        accelerated: row.accelerated,
        reason: row.reason,
    }
}

pub fn hook_choice(hook: PortHook) -> HookChoice {
    match hook {
        PortHook::Auto => HookChoice::Auto,
        PortHook::Xdp => HookChoice::Xdp,
        PortHook::Tcx => HookChoice::Tcx,
        PortHook::Kernel => HookChoice::Kernel,
    }
}
