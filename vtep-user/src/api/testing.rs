//! Fixed values and a command loop for tests of server, client and command
//! line: answers like a controller with one segment, two ports and two entries.

use std::collections::BTreeMap;
use std::net::IpAddr;

use tokio::sync::mpsc;
use vtep_common::{MacAddr, Outcome, Vni};

use super::command::{ApiError, Command};
use super::types::*;

pub fn vni() -> Vni {
    Vni::new(100).unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub fn status() -> Status {
    Status {
        ready: true,
        instance: "default".into(),
        netns: None,
        version: "0.1.0".into(),
        kernel: "6.18.5".into(),
        uplinks: vec![UplinkStatus {
            name: "eth1".into(),
            ifindex: 3,
            accelerated: true,
            hook: Some(Hook::Xdp),
            mode: Some(XdpMode::Native),
            reason: None,
        }],
        segments: vec![segment()],
        ports: vec![
            PortStatus {
                name: "tap0".into(),
                ifindex: 7,
                vni: vni(),
                vlan: None,
                hook: Some(Hook::Xdp),
                mode: Some(XdpMode::Native),
                ingress: Some(IngressWay::Xdp),
                accelerated: true,
                reason: None,
            },
            PortStatus {
                name: "veth1".into(),
                ifindex: 9,
                vni: vni(),
                vlan: None,
                hook: None,
                mode: None,
                ingress: None,
                accelerated: false,
                reason: Some("its owner uses offloads (tx-checksumming)".into()),
            },
        ],
        counters: Counters {
            overruns: 1,
            resyncs: 2,
            updates: 12,
            map_full: 0,
            fdb_entries: 2,
            fdb_capacity: 131_072,
        },
        warnings: vec!["eth1: the MTU leaves 1450 bytes: raise it by 50".into()],
    }
}

pub fn segment() -> SegmentStatus {
    SegmentStatus {
        vni: vni(),
        segment: Some(1),
        bridge: Some("br100".into()),
        vlan: None,
        vxlan: "vxlan100".into(),
        local: Some(ip("198.51.100.1")),
        udp_port: 4789,
        learning: true,
        strict: false,
        accelerated: true,
        reason: None,
    }
}

pub fn vni_row() -> VniRow {
    VniRow {
        segment: segment(),
        mtu: 1450,
        remotes: vec![ip("198.51.100.2"), ip("203.0.113.7")],
        ports: vec!["tap0".into(), "veth1".into()],
    }
}

pub fn fdb_rows() -> Vec<FdbRow> {
    vec![
        FdbRow {
            vni: vni(),
            vlan: None,
            mac: MacAddr([2, 0, 0, 0, 0, 1]),
            location: Location::Remote {
                remote: ip("198.51.100.2"),
            },
            endpoint: None,
            owner: Owner::Static,
            generation: 3,
            accelerated: true,
        },
        FdbRow {
            vni: vni(),
            vlan: None,
            mac: MacAddr([2, 0, 0, 0, 0, 2]),
            location: Location::Local {
                port: "tap0".into(),
            },
            endpoint: Some("vm1".into()),
            owner: Owner::Kernel,
            generation: 1,
            accelerated: false,
        },
    ]
}

pub fn remote_row() -> RemoteRow {
    RemoteRow {
        remote: ip("198.51.100.2"),
        vni: vni(),
        udp_port: 4789,
        local: Some(ip("198.51.100.1")),
        dev: Some("eth1".into()),
        next_hop: Some(ip("198.51.100.254")),
        mac: None,
        fdb_entries: 1,
        accelerated: false,
        reason: Some("next hop not resolved".into()),
    }
}

pub fn stats() -> Stats {
    let mut outcomes: BTreeMap<String, Count> = Outcome::ALL
        .iter()
        .map(|outcome| (outcome.name().to_owned(), Count::default()))
        .collect();
    let moved = Count {
        frames: 1000,
        bytes: 64_000,
    };
    outcomes.insert(Outcome::EgressRemote.name().into(), moved);
    Stats {
        outcomes,
        segments: vec![SegmentStats {
            vni: vni(),
            segment: 1,
            ingress: DirectionStats::default(),
            egress: DirectionStats {
                fast: moved,
                ..DirectionStats::default()
            },
            outcomes: BTreeMap::from([(Outcome::EgressRemote.name().into(), moved)]),
        }],
    }
}

pub fn resync() -> ResyncReport {
    ResyncReport {
        fdb_entries: 2,
        updates: 0,
        duration_ms: 4,
    }
}

/// Answers until all senders are gone or `Unload` came, and hands back what
/// was written, in words.
pub async fn controller(mut commands: mpsc::Receiver<Command>) -> Vec<String> {
    let mut log = Vec::new();
    while let Some(command) = commands.recv().await {
        match command {
            Command::Status(reply) => drop(reply.send(Ok(status()))),
            Command::VniShow(reply) => drop(reply.send(Ok(vec![vni_row()]))),
            Command::PortShow(reply) => drop(reply.send(Ok(status().ports))),
            Command::FdbShow(filter, reply) => {
                let mut rows = fdb_rows();
                rows.retain(|row| filter.vni.is_none_or(|vni| vni == row.vni));
                rows.retain(|row| filter.mac.is_none_or(|mac| mac == row.mac));
                drop(reply.send(Ok(rows)));
            }
            Command::RemoteShow(reply) => drop(reply.send(Ok(vec![remote_row()]))),
            Command::Stats(reply) => drop(reply.send(Ok(stats()))),
            Command::Resync(reply) => drop(reply.send(Ok(resync()))),
            Command::VniAdd(spec, reply) => {
                log.push(format!("add {spec:?}"));
                drop(reply.send(Ok(())));
            }
            Command::VniDel(vni, reply) => {
                let missing = ApiError::not_found(format!("no VNI {vni}: see `vtep vni show`"));
                drop(reply.send(Err(missing)));
            }
            Command::PortAdd(spec, reply) => {
                log.push(format!("add {spec:?}"));
                drop(reply.send(Ok(())));
            }
            Command::PortDel(name, reply) => {
                log.push(format!("delete port {name}"));
                drop(reply.send(Ok(())));
            }
            Command::FdbWrite(spec, WriteMode::Add, reply) => {
                let text = format!("{} exists: use `vtep fdb replace`", spec.mac);
                drop(reply.send(Err(ApiError::conflict(text))));
            }
            Command::FdbWrite(spec, WriteMode::Replace, reply) => {
                log.push(format!("replace {spec:?}"));
                drop(reply.send(Ok(())));
            }
            Command::FdbDel(vni, mac, reply) => {
                log.push(format!("delete {mac} in {vni}"));
                drop(reply.send(Ok(())));
            }
            Command::Unload(reply) => {
                log.push("unload".into());
                drop(reply.send(Ok(())));
                break;
            }
        }
    }
    log
}
