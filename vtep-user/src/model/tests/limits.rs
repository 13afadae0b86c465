//! Maps that are too small (R40): what has no room is left to the kernel,
//! counted, shown, and written as soon as there is room.

use super::*;
use crate::tables::Capacity;

fn settings(change: impl Fn(&mut Capacity)) -> Settings {
    let mut settings = Settings::default();
    change(&mut settings.capacity);
    settings
}

#[test]
fn entries_beyond_the_capacity_wait_and_get_room() {
    let mut sim = Sim::with(settings(|c| c.fdb = 3), small_host());
    sim.apply((1..=5).map(|n| Event::Fdb(bridged(BR0, TAP0, mac(n)))));
    assert_eq!(sim.tables.fdb.len(), 3);
    let counters = sim.model.counters();
    assert_eq!(
        (counters.fdb_entries, counters.waiting, counters.map_full),
        (3, 2, 2)
    );
    assert_eq!((counters.fdb_capacity, counters.kernel_fdb_entries), (3, 5));
    assert_eq!(sim.reason(100, mac(5)), "the FDB map is full");
    // A move needs no room.
    sim.apply([Event::Fdb(bridged(BR0, TAP1, mac(1)))]);
    assert_eq!(sim.place(100, mac(1)), Some(Place::Port(TAP1, Via::Xdp)));
    sim.apply(
        [1, 2].map(|n| Event::FdbGone(bridged(BR0, if n == 1 { TAP1 } else { TAP0 }, mac(n)))),
    );
    assert!((3..=5).all(|n| sim.place(100, mac(n)).is_some()));
    assert_eq!(sim.model.counters().waiting, 0);
    // One that waits and vanishes is forgotten.
    sim.apply((6..=7).map(|n| Event::Fdb(bridged(BR0, TAP0, mac(n)))));
    sim.apply((6..=7).map(|n| Event::FdbGone(bridged(BR0, TAP0, mac(n)))));
    assert_eq!(sim.model.counters().waiting, 0);
}

#[test]
fn refused_entries_wait_until_something_is_deleted() {
    let mut sim = Sim::started(small_host());
    sim.apply([1, 2].map(|n| Event::Fdb(bridged(BR0, TAP0, mac(n)))));
    let refuse = |sim: &mut Sim, n: u8| {
        let key = FdbKey::new(sim.id(100), mac(n));
        let update = TableUpdate::Fdb {
            key,
            value: sim.tables.fdb[&key],
        };
        let reason = "the forwarding table is full".to_owned();
        sim.model.refused(vec![Refused { update, reason }]);
        key
    };
    // A new one: it never came into the map.
    let key = refuse(&mut sim, 2);
    sim.tables.fdb.remove(&key);
    assert_eq!(sim.run(), []);
    assert_eq!(
        sim.model.warnings(),
        ["the kernel takes no more FDB entries"]
    );
    sim.apply([Event::Fdb(bridged(BR0, TAP0, mac(3)))]);
    assert_eq!(sim.place(100, mac(3)), None);
    assert_eq!(sim.model.counters().waiting, 2);
    sim.apply([Event::FdbGone(bridged(BR0, TAP0, mac(1)))]);
    assert!([2, 3].iter().all(|n| sim.place(100, mac(*n)).is_some()));
    // One that replaced an older one: the older one must go.
    sim.apply([Event::Fdb(bridged(BR0, TAP1, mac(2)))]);
    let key = refuse(&mut sim, 2);
    assert!(sim.run().contains(&TableUpdate::FdbDel(key)));
    assert!(sim.model.retry());
    sim.run();
    assert_eq!(sim.place(100, mac(2)), Some(Place::Port(TAP1, Via::Xdp)));
}

#[test]
fn without_a_location_an_entry_says_kernel_until_one_has_rested() {
    // Index 0 is not handed out: two are left.
    let mut sim = Sim::with(settings(|c| c.locations = 3), small_host());
    sim.apply([Event::Fdb(bridged(BR0, TAP0, mac(1)))]);
    sim.apply([Event::Fdb(bridged(BR0, TAP1, mac(2)))]);
    sim.apply(behind_remote(BR0, VX0, mac(3), REMOTE1));
    assert_eq!(sim.place(100, mac(3)), Some(Place::Kernel));
    assert_eq!(sim.reason(100, mac(3)), "the map of locations is full");
    assert_eq!(
        sim.model.wake_at(),
        None,
        "nothing will come free by itself"
    );
    sim.apply([Event::FdbGone(bridged(BR0, TAP0, mac(1)))]);
    assert_eq!(sim.place(100, mac(3)), Some(Place::Kernel));
    assert_eq!(sim.model.wake_at(), Some(sim.now + QUARANTINE));
    sim.wait(QUARANTINE);
    assert_eq!(sim.remote(100, mac(3)), Some(REMOTE1));
    assert_eq!(sim.model.wake_at(), None);
}

#[test]
fn without_a_slot_a_remote_is_left_to_the_kernel_until_one_has_rested() {
    let mut sim = Sim::with(settings(|c| c.remotes = 1), small_host());
    sim.apply(behind_remote(BR0, VX0, mac(1), REMOTE1));
    assert_eq!(sim.remote(100, mac(1)), Some(REMOTE1));
    // A changed header needs a second slot.
    sim.apply([Event::Neighbour(neighbour(ETH0, GATEWAY, 2))]);
    assert_eq!(sim.place(100, mac(1)), Some(Place::Kernel));
    assert_eq!(sim.reason(100, mac(1)), "table of remotes full");
    assert_eq!(sim.model.wake_at(), Some(sim.now + QUARANTINE));
    sim.wait(QUARANTINE);
    assert_eq!(sim.remote(100, mac(1)), Some(REMOTE1));
    assert_eq!(sim.model.wake_at(), None);
}

#[test]
fn segments_beyond_the_capacity_wait() {
    // Number 0 is not handed out.
    let mut sim = Sim::with(settings(|c| c.segments = 2), two_segments());
    let reason = |sim: &Sim, n| sim.model.segment(vni(n)).unwrap().reason;
    assert_eq!(reason(&sim, 100), None);
    assert_eq!(
        reason(&sim, 200).as_deref(),
        Some("segment table full (1 segments)")
    );
    sim.apply([
        Event::Fdb(bridged(BR0, TAP0, mac(1))),
        Event::Fdb(bridged(BR1, TAP2, mac(1))),
    ]);
    // The number changes hands only after the last entry under it is gone.
    sim.apply([Event::LinkGone(VX0)]);
    assert_eq!(reason(&sim, 200), None);
    assert_eq!(
        (sim.id(200), sim.place(200, mac(1))),
        (1, Some(Place::Port(TAP2, Via::Xdp)))
    );
}

#[test]
fn ports_beyond_the_capacity_wait() {
    let reserved = 2 * vtep_common::layout::UPLINKS_MAX as u32;
    let mut sim = Sim::with(settings(|c| c.ports = reserved + 1), small_host());
    assert!(sim.tables.ports.keys().eq([&PortKey::new(TAP0, 0)]));
    let reason = sim.model.port("tap1").remove(0).reason;
    assert_eq!(reason.as_deref(), Some("port table full (1 ports)"));
    sim.apply([Event::LinkGone(TAP0)]);
    assert!(sim.tables.ports.keys().eq([&PortKey::new(TAP1, 0)]));
}

#[test]
fn more_udp_ports_than_the_programs_compare_are_left_to_the_kernel() {
    let mut host = small_host();
    for n in 0..6 {
        let mut device = vxlan_device(1000 + n);
        device.udp_port = 5000 + n as u16;
        let bridge_index = 100 + n;
        host.links
            .push(bridge(bridge_index, &format!("br{bridge_index}")));
        host.links
            .push(vxlan(200 + n, &format!("vx{n}"), device, bridge_index));
    }
    let sim = Sim::started(host);
    assert_eq!(sim.tables.segments.len(), 4);
    let left = sim
        .model
        .segments()
        .into_iter()
        .filter_map(|row| row.reason);
    assert_eq!(
        left.collect::<Vec<_>>(),
        ["more than 4 different UDP ports"; 3]
    );
}

#[test]
fn ten_thousand_entries_are_written_once_and_move_one_by_one() {
    let wide = |n: u32| {
        MacAddr([
            2,
            0,
            (n >> 24) as u8,
            (n >> 16) as u8,
            (n >> 8) as u8,
            n as u8,
        ])
    };
    let mut host = small_host();
    for n in 0..10_000 {
        host.fdb.push(bridged(BR0, VX0, wide(n)));
        host.fdb.push(tunnelled(
            VX0,
            wide(n),
            [REMOTE1, REMOTE2, REMOTE3][n as usize % 3],
        ));
    }
    let mut model = Model::new(Settings::default());
    let start = Instant::now();
    model.replace(host.clone());
    for query in model.wanted_routes() {
        model.route(&query, Some(via(ETH0, GATEWAY)));
    }
    let updates = model.updates(start);
    let first = start.elapsed();
    assert!(updates.len() > 10_000);
    let start = Instant::now();
    model.replace(host);
    assert_eq!(model.updates(start), []);
    println!("first dump {first:?}, again {:?}", start.elapsed());
    let start = Instant::now();
    for n in 0..1000u32 {
        model.apply(Event::Fdb(tunnelled(
            VX0,
            wide(n),
            [REMOTE2, REMOTE3, REMOTE1][n as usize % 3],
        )));
        assert_eq!(model.updates(start).len(), 1);
    }
    println!("a move {:?}", start.elapsed() / 1000);
}
