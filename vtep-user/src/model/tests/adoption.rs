//! A controller that starts over on maps that are in use (R39): it recognises
//! them, and writes only what changed while nobody looked.

use super::*;
use crate::model::RowOwner;

/// Another controller on the same maps and the same kernel.
fn restart(sim: &mut Sim, host: Snapshot) -> Vec<TableUpdate> {
    sim.model = Model::new(Settings::default());
    sim.model.adopt(sim.tables.clone());
    sim.model.replace(host);
    // As long as a restart takes.
    sim.now += QUARANTINE;
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
    assert_eq!(sim.place(100, mac(1)), Some(Place::Port(TAP1)));
    assert_eq!(sim.remote(100, mac(4)), Some(REMOTE1));
    // Two remotes, a new slot each; nothing is attached or detached.
    let remotes = updates
        .iter()
        .filter(|u| matches!(u, TableUpdate::Remote { .. }));
    assert_eq!(remotes.count(), 2);
    let hooks = |u: &&TableUpdate| matches!(u, TableUpdate::Attach { .. } | TableUpdate::Detach(_));
    assert_eq!(updates.iter().filter(hooks).count(), 0);
}

#[test]
fn location_whose_entries_parted_is_not_moved_under_them() {
    let mut sim = Sim::started(small_host());
    sim.routes.insert(REMOTE1, None);
    for n in 1..=3 {
        sim.apply(behind_remote(BR0, VX0, mac(n), REMOTE1));
    }
    // All at one unresolved remote; while nobody looks, one goes elsewhere.
    let mut host = small_host();
    for (n, remote) in [(1, REMOTE2), (2, REMOTE1), (3, REMOTE1)] {
        host.fdb
            .extend([bridged(BR0, VX0, mac(n)), tunnelled(VX0, mac(n), remote)]);
    }
    let updates = restart(&mut sim, host);
    assert_eq!(sim.remote(100, mac(1)), Some(REMOTE2));
    assert_eq!(sim.place(100, mac(2)), Some(Place::Kernel));
    // At no step was the location they shared made to say REMOTE2.
    let shared: BTreeSet<u32> = updates
        .iter()
        .filter_map(|update| match update {
            TableUpdate::Location { index, .. } => Some(*index),
            _ => None,
        })
        .collect();
    let id = sim.id(100);
    assert!(shared.contains(&sim.tables.fdb[&FdbKey::new(id, mac(1))].location()));
    assert_eq!(shared.len(), 1);
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
    assert_eq!(sim.place(100, mac(1)), Some(Place::Port(TAP0)));
    assert_eq!(sim.remote(100, mac(4)), Some(REMOTE1));
}
