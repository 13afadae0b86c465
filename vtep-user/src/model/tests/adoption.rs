//! A controller that starts over on maps that are in use (R39): it recognises
//! them, and writes only what changed while nobody looked.

use super::*;
use crate::model::RowOwner;

/// Another controller on the same maps and the same kernel; what it writes.
fn restart(sim: &mut Sim, host: Snapshot) -> Vec<TableUpdate> {
    sim.restart(Settings::default(), host);
    sim.run()
}

fn busy_host() -> Snapshot {
    let mut host = two_segments();
    host.links
        .push(member(link(40, "veth0", LinkKind::Veth), BR0));
    host.fdb = vec![
        bridged(BR0, TAP0, mac(1)),
        bridged(BR0, TAP0, mac(2)),
        bridged(BR1, TAP2, mac(1)),
        bridged(BR0, 40, mac(3)),
        bridged(BR0, VX0, mac(4)),
        tunnelled(VX0, mac(4), REMOTE1),
        bridged(BR0, VX0, mac(5)),
        tunnelled(VX0, mac(5), REMOTE2),
        bridged(BR0, VX0, mac(6)),
    ];
    host
}

#[test]
fn r39_restart_writes_nothing_where_nothing_changed() {
    let mut sim = Sim::new(Settings::default());
    // One remote is unresolved, so that its location says "kernel".
    sim.routes.insert(REMOTE2, None);
    sim.model.replace(busy_host());
    sim.run();
    sim.model.mark_api(vni(100), mac(4), true);
    sim.run();
    sim.model.next_epoch();
    sim.run();
    assert_eq!(restart(&mut sim, busy_host()), []);
    let row = &sim.model.fdb_rows(Some(vni(100)), Some(mac(4)))[0];
    assert_eq!((row.owner, row.accelerated), (RowOwner::Api, true));
}

#[test]
fn restart_without_answers_from_routing_keeps_the_ways() {
    let mut sim = Sim::started(busy_host());
    sim.model = Model::new(Settings::default());
    sim.model.adopt(sim.tables.clone());
    sim.model.replace(busy_host());
    assert_eq!(sim.model.updates(sim.now), []);
    assert_eq!(sim.run(), []);
}

#[test]
fn f3_moves_after_a_restart_are_followed() {
    let mut sim = Sim::started(busy_host());
    restart(&mut sim, busy_host());
    sim.apply([Event::Fdb(tunnelled(VX0, mac(4), REMOTE2))]);
    assert_eq!(sim.remote(100, mac(4)), Some(REMOTE2));
    sim.apply([Event::FdbGone(bridged(BR0, TAP0, mac(1)))]);
    assert_eq!(sim.place(100, mac(1)), None);
}

#[test]
fn restart_writes_what_changed_while_nobody_looked() {
    let mut sim = Sim::started(busy_host());
    let mut host = busy_host();
    host.fdb.retain(|entry| entry.mac != mac(2));
    host.fdb[0] = bridged(BR0, TAP1, mac(1));
    host.neighbours = vec![neighbour(ETH0, GATEWAY, 9)];
    let updates = restart(&mut sim, host);
    let id = sim.id(100);
    let fdb: Vec<FdbKey> = updates
        .iter()
        .filter_map(|update| match update {
            TableUpdate::Fdb { key, .. } | TableUpdate::FdbDel(key) => Some(*key),
            _ => None,
        })
        .collect();
    assert_eq!(fdb, [FdbKey::new(id, mac(1)), FdbKey::new(id, mac(2))]);
    assert_eq!(sim.place(100, mac(1)), Some(Place::Port(TAP1, Via::Xdp)));
    assert_eq!(sim.remote(100, mac(4)), Some(REMOTE1));
    // Two remotes, a new slot each; nothing is attached or detached.
    let remotes = updates
        .iter()
        .filter(|u| matches!(u, TableUpdate::Remote { .. }));
    assert_eq!(remotes.count(), 2);
    let hooks = |u: &&TableUpdate| matches!(u, TableUpdate::Attach { .. } | TableUpdate::Detach(_));
    assert_eq!(updates.iter().filter(hooks).count(), 0);
}

/// Nine MACs at one location; while nobody looks, all but the last go to
/// another remote. Returns that location before, and what the restart wrote.
fn parted(sim: &mut Sim) -> (u32, Vec<TableUpdate>) {
    let macs: Vec<MacAddr> = (1..=9).map(mac).collect();
    for mac in &macs {
        sim.apply(behind_remote(BR0, VX0, *mac, REMOTE1));
    }
    let shared = sim.tables.fdb[&FdbKey::new(sim.id(100), mac(9))].location();
    let mut host = small_host();
    for mac in macs {
        let remote = if mac == self::mac(9) {
            REMOTE1
        } else {
            REMOTE2
        };
        host.fdb
            .extend([bridged(BR0, VX0, mac), tunnelled(VX0, mac, remote)]);
    }
    let updates = restart(sim, host);
    assert!((1..9).all(|n| sim.remote(100, mac(n)) == Some(REMOTE2)));
    (shared, updates)
}

fn stores_to(updates: &[TableUpdate], location: u32) -> usize {
    let store =
        |u: &&TableUpdate| matches!(u, TableUpdate::Location { index, .. } if *index == location);
    updates.iter().filter(store).count()
}

#[test]
fn location_is_recognised_by_the_remote_it_leads_to() {
    let mut sim = Sim::started(small_host());
    let (shared, updates) = parted(&mut sim);
    assert_eq!(sim.remote(100, mac(9)), Some(REMOTE1));
    // The one that stayed is not touched, although the others are more.
    assert_eq!(stores_to(&updates, shared), 0, "{updates:?}");
}

#[test]
fn location_that_says_kernel_goes_to_nobody_when_its_entries_part() {
    let mut sim = Sim::started(small_host());
    sim.routes.insert(REMOTE1, None);
    let (shared, updates) = parted(&mut sim);
    assert_eq!(sim.place(100, mac(9)), Some(Place::Kernel));
    // At no step did it say REMOTE2, under the one that stayed.
    assert_eq!(stores_to(&updates, shared), 0, "{updates:?}");
}

#[test]
fn maps_full_of_what_is_gone_are_emptied() {
    let mut sim = Sim::started(busy_host());
    restart(&mut sim, Snapshot::default());
    assert!(sim.tables.fdb.is_empty() && sim.tables.segments.is_empty());
    assert!(sim.tables.ports.is_empty() && sim.tables.hooks.is_empty());
    assert!(sim.tables.targets.is_empty());
    assert!(
        sim.tables
            .locations
            .values()
            .all(|l| l.place() == Place::Kernel)
    );
}

#[test]
fn nonsense_in_the_maps_is_replaced() {
    use vtep_common::fdb::Value;
    let mut sim = Sim::started(busy_host());
    let id = sim.id(100);
    let wild = [Value::LOCATION_MAX, 9999, 500];
    for (n, index) in [1, 4, 5].into_iter().zip(wild) {
        sim.tables
            .fdb
            .insert(FdbKey::new(id, mac(n)), Value::new(index, 0, 0));
    }
    sim.tables
        .fdb
        .insert(FdbKey::new(999, mac(1)), Value::new(1, 0, 0));
    let (tables, host) = (sim.tables.clone(), busy_host());
    sim.model = Model::new(Settings::default());
    sim.model.adopt(tables);
    sim.model.replace(host);
    for query in sim.model.wanted_routes() {
        sim.model.route(&query, Some(via(ETH0, GATEWAY)));
    }
    let updates = sim.model.updates(sim.now);
    assert!(updates.contains(&TableUpdate::FdbDel(FdbKey::new(999, mac(1)))));
    for update in &updates {
        sim.write_one(update);
    }
    assert_eq!(sim.place(100, mac(1)), Some(Place::Port(TAP0, Via::Xdp)));
    assert_eq!(sim.remote(100, mac(4)), Some(REMOTE1));
}
