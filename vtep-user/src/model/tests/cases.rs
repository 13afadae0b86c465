//! Forwarding entries: what goes into the map, what it says, and how it moves.

use vtep_common::layout::{Location, Place};
use vtep_common::{MacAddr, Vni};

use super::*;
use crate::model::HookChoice;
use crate::model::RowPlace;

#[test]
fn first_dump_is_written_in_a_safe_order() {
    let mut sim = Sim::new(Settings::default());
    let mut host = small_host();
    host.fdb = vec![
        bridged(BR0, TAP0, mac(1)),
        bridged(BR0, VX0, mac(2)),
        tunnelled(VX0, mac(2), REMOTE1),
    ];
    sim.model.replace(host);
    let kinds: Vec<&str> = sim
        .run()
        .iter()
        .map(|update| match update {
            TableUpdate::Config(_) => "config",
            TableUpdate::Remote { .. } => "remote",
            TableUpdate::TargetAdd(_) => "target",
            TableUpdate::Location { .. } => "location",
            TableUpdate::Segment { .. } => "segment",
            TableUpdate::Port { .. } => "port",
            TableUpdate::Fdb { .. } => "fdb",
            TableUpdate::Attach { .. } => "attach",
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(
        kinds,
        [
            "config", "remote", "target", "target", "target", "location", "location", "segment",
            "fdb", "fdb", "port", "port", "attach", "attach", "attach"
        ]
    );
    assert_eq!(sim.place(100, mac(1)), Some(Place::Port(TAP0, Via::Xdp)));
    assert_eq!(sim.remote(100, mac(2)), Some(REMOTE1));
    assert_eq!(sim.run(), []);
}

#[test]
fn f22_odd_entries_are_mirrored_as_the_kernel_uses_them() {
    let zero_first = MacAddr([0, 0, 0, 0, 0, 1]);
    let vlan = |entry: FdbEntry, vlan| FdbEntry {
        vlan: Some(vlan),
        ..entry
    };
    let local = |entry: FdbEntry| FdbEntry {
        state: bits::NUD_PERMANENT,
        ..entry
    };
    let fixed = |entry: FdbEntry| FdbEntry {
        state: bits::NUD_NOARP,
        ..entry
    };
    let group = |entry: FdbEntry| FdbEntry {
        dst: None,
        nexthop_id: Some(7),
        ..entry
    };
    let tunnel = |n| tunnelled(VX0, mac(n), REMOTE1);
    let at_vxlan = bridged(BR0, VX0, mac(1));
    let at_tap = bridged(BR0, TAP0, mac(1));
    let at = Some(Place::Port(TAP0, Via::Xdp));
    let kernel = Some(Place::Kernel);
    // Entries in, place of mac(1) out; a case with other MACs says so.
    let cases: Vec<(&str, Vec<FdbEntry>, MacAddr, Option<Place>)> = vec![
        ("learned at a port", vec![at_tap.clone()], mac(1), at),
        ("static at a port", vec![fixed(at_tap.clone())], mac(1), at),
        (
            "first byte 00",
            vec![bridged(BR0, TAP0, zero_first)],
            zero_first,
            at,
        ),
        (
            "all zero",
            vec![bridged(BR0, TAP0, MacAddr::ZERO)],
            MacAddr::ZERO,
            None,
        ),
        (
            "multicast",
            vec![bridged(BR0, TAP0, MacAddr([1, 0, 0x5e, 0, 0, 1]))],
            MacAddr([1, 0, 0x5e, 0, 0, 1]),
            None,
        ),
        ("the port's own", vec![local(at_tap.clone())], mac(1), None),
        (
            "the bridge's own",
            vec![bridged(BR0, BR0, mac(1))],
            mac(1),
            None,
        ),
        // The kernel looks up VLAN 0 on a bridge that is not VLAN-aware.
        ("VLAN 1 alone", vec![vlan(at_tap.clone(), 1)], mac(1), None),
        (
            "VLAN 1 beside 0",
            vec![vlan(bridged(BR0, TAP1, mac(1)), 1), at_tap],
            mac(1),
            at,
        ),
        ("no remote known", vec![at_vxlan.clone()], mac(1), kernel),
        (
            "nexthop group",
            vec![at_vxlan.clone(), group(tunnel(1))],
            mac(1),
            kernel,
        ),
        (
            "remote of the other family",
            vec![
                at_vxlan.clone(),
                FdbEntry {
                    dst: Some("2001:db8::1".parse().unwrap()),
                    ..tunnel(1)
                },
            ],
            mac(1),
            kernel,
        ),
        (
            "fixed device",
            vec![
                at_vxlan.clone(),
                FdbEntry {
                    via: Some(ETH0),
                    ..tunnel(1)
                },
            ],
            mac(1),
            Some(Place::Remote(0)),
        ),
        (
            "two remotes in a dump",
            vec![at_vxlan.clone(), tunnel(1), tunnelled(VX0, mac(1), REMOTE2)],
            mac(1),
            kernel,
        ),
        (
            "to this host",
            vec![at_vxlan, tunnelled(VX0, mac(1), LOCAL.into())],
            mac(1),
            kernel,
        ),
        ("VXLAN device only", vec![tunnel(1)], mac(1), None),
    ];
    for (name, fdb, mac, place) in cases {
        let host = Snapshot {
            fdb,
            ..small_host()
        };
        let sim = Sim::started(host);
        assert_eq!(sim.place(100, mac), place, "{name}");
        if place == kernel {
            assert_eq!(
                sim.tables
                    .fdb
                    .values()
                    .map(|v| v.location())
                    .collect::<Vec<_>>(),
                [Location::NONE],
                "{name}"
            );
            assert!(!sim.reason(100, mac).is_empty());
        }
    }
}

#[test]
fn r37_every_move_is_one_write() {
    let mut sim = Sim::started(small_host());
    let place = |sim: &Sim| (sim.place(100, mac(1)), sim.remote(100, mac(1)));
    sim.apply([Event::Fdb(bridged(BR0, TAP0, mac(1)))]);
    // To a remote: the tunnel entry comes first, and changes nothing yet.
    sim.apply([Event::Fdb(tunnelled(VX0, mac(1), REMOTE1))]);
    assert_eq!(place(&sim).0, Some(Place::Port(TAP0, Via::Xdp)));
    let updates = sim.apply([Event::Fdb(bridged(BR0, VX0, mac(1)))]);
    assert_eq!(place(&sim).1, Some(REMOTE1));
    assert!(!updates.iter().any(|u| matches!(u, TableUpdate::FdbDel(_))));
    // From remote to remote: `bridge fdb replace`.
    let updates = sim.apply([Event::Fdb(tunnelled(VX0, mac(1), REMOTE2))]);
    assert_eq!(place(&sim).1, Some(REMOTE2));
    assert_eq!(
        updates
            .iter()
            .filter(|u| matches!(u, TableUpdate::Fdb { .. }))
            .count(),
        1
    );
    // Back home; the tunnel entry lingers.
    let updates = sim.apply([Event::Fdb(bridged(BR0, TAP1, mac(1)))]);
    assert_eq!(place(&sim).0, Some(Place::Port(TAP1, Via::Xdp)));
    assert!(!updates.iter().any(|u| matches!(u, TableUpdate::FdbDel(_))));
    assert_eq!(sim.model.fdb_rows(None, None)[0].generation, 4);
}

#[test]
fn states_inside_a_batch_are_never_written() {
    let mut sim = Sim::started(small_host());
    sim.apply([Event::Fdb(bridged(BR0, TAP0, mac(1)))]);
    let updates = sim.apply([
        Event::FdbGone(bridged(BR0, TAP0, mac(1))),
        Event::Fdb(bridged(BR0, TAP1, mac(1))),
        Event::FdbGone(bridged(BR0, TAP1, mac(1))),
        Event::Fdb(bridged(BR0, TAP0, mac(1))),
    ]);
    assert_eq!(updates, []);
}

#[test]
fn f1_late_withdraw_of_an_older_place_removes_nothing() {
    let mut sim = Sim::started(small_host());
    sim.apply(behind_remote(BR0, VX0, mac(1), REMOTE1));
    sim.apply([Event::Fdb(tunnelled(VX0, mac(1), REMOTE2))]);
    assert_eq!(
        sim.apply([Event::FdbGone(tunnelled(VX0, mac(1), REMOTE1))]),
        []
    );
    assert_eq!(sim.remote(100, mac(1)), Some(REMOTE2));
    sim.apply([Event::Fdb(bridged(BR0, TAP0, mac(1)))]);
    assert_eq!(sim.apply([Event::FdbGone(bridged(BR0, VX0, mac(1)))]), []);
    assert_eq!(sim.place(100, mac(1)), Some(Place::Port(TAP0, Via::Xdp)));
    // The right one does.
    sim.apply([Event::FdbGone(bridged(BR0, TAP0, mac(1)))]);
    assert_eq!(sim.place(100, mac(1)), None);
}

#[test]
fn local_entry_that_the_bridge_took_over_goes_under_its_new_name() {
    let local = |entry: FdbEntry| FdbEntry {
        state: bits::NUD_PERMANENT,
        ..entry
    };
    let mut sim = Sim::started(small_host());
    sim.apply([Event::Fdb(local(bridged(BR0, TAP0, mac(1))))]);
    sim.apply([Event::FdbGone(local(bridged(BR0, BR0, mac(1))))]);
    assert_eq!(sim.model.bridge_port_of(vni(100), mac(1)), None);
}

#[test]
fn f2_a_thousand_moves_leak_nothing() {
    let mut sim = Sim::started(small_host());
    for round in 0..1000 {
        let remote = if round % 2 == 0 { REMOTE1 } else { REMOTE2 };
        sim.apply(behind_remote(BR0, VX0, mac(1), remote));
        assert_eq!(sim.remote(100, mac(1)), Some(remote));
        sim.apply([Event::Fdb(bridged(BR0, TAP0, mac(1)))]);
        assert_eq!(sim.place(100, mac(1)), Some(Place::Port(TAP0, Via::Xdp)));
        sim.wait(Duration::from_millis(400));
    }
    let indexes = sim.tables.locations.keys().max().unwrap();
    assert!(*indexes <= 10, "{indexes} locations");
    let slots = sim.tables.remotes.keys().max().unwrap();
    assert!(*slots <= 10, "{slots} slots");
    let live = sim
        .tables
        .locations
        .values()
        .filter(|l| l.place() != Place::Kernel);
    assert_eq!(live.count(), 1);
}

#[test]
fn r2_equal_macs_in_two_segments_are_two_entries() {
    let mut sim = Sim::started(two_segments());
    sim.apply([
        Event::Fdb(bridged(BR0, TAP0, mac(1))),
        Event::Fdb(bridged(BR1, TAP2, mac(1))),
    ]);
    assert_eq!(sim.place(100, mac(1)), Some(Place::Port(TAP0, Via::Xdp)));
    assert_eq!(sim.place(200, mac(1)), Some(Place::Port(TAP2, Via::Xdp)));
    // A port that changes the bridge before its old entries are flushed.
    sim.apply([Event::Link(tap(TAP0, "tap0", BR1))]);
    assert_eq!(sim.place(100, mac(1)), Some(Place::Kernel));
    assert_eq!(
        sim.tables.ports[&PortKey::new(TAP0, 0)].segment,
        sim.id(200)
    );
}

#[test]
fn first_key_follows_the_macs_behind_a_port() {
    let mut sim = Sim::started(small_host());
    let first = |sim: &Sim| FdbKey::from_word(sim.tables.ports[&PortKey::new(TAP0, 0)].first_key);
    assert_eq!(first(&sim).word(), 0);
    sim.apply([Event::Fdb(bridged(BR0, TAP0, mac(2)))]);
    assert_eq!(first(&sim), FdbKey::new(sim.id(100), mac(2)));
    sim.apply([1, 3].map(|n| Event::Fdb(bridged(BR0, TAP0, mac(n)))));
    assert_eq!(first(&sim).mac(), mac(2), "the first one stays");
    sim.apply([Event::Fdb(bridged(BR0, TAP1, mac(2)))]);
    assert_eq!(first(&sim).mac(), mac(1));
    sim.apply([1, 3].map(|n| Event::FdbGone(bridged(BR0, TAP0, mac(n)))));
    assert_eq!(first(&sim).word(), 0);
}

#[test]
fn entries_of_an_unaccelerated_port_are_left_to_the_kernel() {
    let mut host = small_host();
    host.links
        .push(member(link(40, "veth0", LinkKind::Veth), BR0));
    let settings = Settings {
        hooks: [("veth0".to_owned(), HookChoice::Kernel)].into(),
        ..Settings::default()
    };
    let mut sim = Sim::with(settings, host);
    sim.apply([Event::Fdb(bridged(BR0, 40, mac(1)))]);
    assert_eq!(sim.place(100, mac(1)), Some(Place::Kernel));
    assert!(
        sim.reason(100, mac(1))
            .starts_with("port: left to the kernel")
    );
    // One store is enough when it becomes one.
    sim.model.set_hook("veth0", HookChoice::Auto);
    let updates = sim.run();
    assert!(!updates.iter().any(|u| matches!(u, TableUpdate::Fdb { .. })));
    assert_eq!(sim.place(100, mac(1)), Some(Place::Port(40, Via::Stack)));
}

/// The bridge has sent to the new port already: not back to the old one.
#[test]
fn entry_that_leaves_a_port_as_it_is_accelerated_never_speeds_to_it() {
    let carries_ethernet = |on| {
        let mut link = tap(TAP0, "tap0", BR0);
        link.kind = LinkKind::Tun(Tun {
            tap: on,
            vnet_hdr: false,
        });
        Event::Link(link)
    };
    let mut sim = Sim::started(small_host());
    sim.apply([1, 2].map(|n| Event::Fdb(bridged(BR0, TAP0, mac(n)))));
    sim.apply([carries_ethernet(false)]);
    let updates = sim.apply([
        carries_ethernet(true),
        Event::Fdb(bridged(BR0, TAP1, mac(1))),
    ]);
    let at = |wanted: fn(&TableUpdate) -> bool| updates.iter().position(wanted).unwrap();
    let speaks = at(
        |u| matches!(u, TableUpdate::Location { value, .. } if value.kind() == Location::KIND_PORT && value.index() == TAP0),
    );
    assert!(at(|u| matches!(u, TableUpdate::Fdb { .. })) < speaks);
    assert_eq!(sim.place(100, mac(2)), Some(Place::Port(TAP0, Via::Xdp)));
}

#[test]
fn rows_tell_owner_place_and_reason() {
    let mut sim = Sim::started(small_host());
    let fixed = FdbEntry {
        state: bits::NUD_NOARP,
        ..bridged(BR0, TAP0, mac(1))
    };
    sim.apply([
        Event::Fdb(fixed),
        Event::Fdb(bridged(BR0, TAP1, mac(2))),
        Event::Fdb(tunnelled(VX0, mac(3), REMOTE1)),
    ]);
    sim.apply(behind_remote(BR0, VX0, mac(4), REMOTE2));
    sim.model.mark_api(vni(100), mac(4), true);
    sim.run();
    let rows = sim.model.fdb_rows(None, None);
    let seen: Vec<_> = rows
        .iter()
        .map(|r| (r.mac, &r.place, r.owner, r.accelerated))
        .collect();
    use crate::model::RowOwner::{Api, Kernel, Static};
    assert_eq!(
        seen,
        [
            (mac(1), &RowPlace::Port("tap0".into()), Static, true),
            (mac(2), &RowPlace::Port("tap1".into()), Kernel, true),
            (mac(3), &RowPlace::Remote(REMOTE1), Kernel, false),
            (mac(4), &RowPlace::Remote(REMOTE2), Api, true),
        ]
    );
    assert!(
        rows[2]
            .reason
            .as_ref()
            .unwrap()
            .contains("add it with `master`")
    );
    let key = FdbKey::new(sim.id(100), mac(4));
    assert_eq!(
        sim.tables.fdb[&key].flags(),
        vtep_common::fdb::Value::OWNER_API
    );
    assert_eq!(sim.model.remotes().len(), 1);
    assert_eq!(sim.model.bridge_port_of(vni(100), mac(4)), Some(VX0));
    assert_eq!(sim.model.bridge_port_of(Vni::new(5).unwrap(), mac(4)), None);
    // The mark goes with the kernel's entry.
    sim.apply([
        Event::FdbGone(bridged(BR0, VX0, mac(4))),
        Event::FdbGone(tunnelled(VX0, mac(4), REMOTE2)),
    ]);
    sim.apply([Event::Fdb(bridged(BR0, TAP0, mac(4)))]);
    assert_eq!(sim.model.fdb_rows(None, Some(mac(4)))[0].owner, Kernel);
}

#[test]
fn busy_entries_are_refreshed_and_idle_ones_are_not() {
    let mut sim = Sim::started(small_host());
    sim.apply([1, 2].map(|n| Event::Fdb(bridged(BR0, TAP0, mac(n)))));
    sim.apply(behind_remote(BR0, VX0, mac(3), REMOTE1));
    let fixed = FdbEntry {
        state: bits::NUD_NOARP,
        ..bridged(BR0, TAP1, mac(4))
    };
    let routed = FdbEntry {
        flags: bits::NTF_MASTER | bits::NTF_EXT_LEARNED,
        ..bridged(BR0, TAP1, mac(5))
    };
    sim.apply([fixed, routed].map(Event::Fdb));
    let busy = |sim: &Sim| {
        let fdb = sim.tables.fdb.iter().map(|(key, value)| (*key, *value));
        sim.model.busy(fdb, &sim.tables.ports)
    };
    // What is written counts as idle, in whatever epoch.
    for _ in 0..3 {
        assert_eq!(busy(&sim), []);
        sim.model.next_epoch();
        let updates = sim.run();
        assert!(
            matches!(updates[..], [TableUpdate::Config(_)]),
            "{updates:?}"
        );
    }
    let epoch = sim.tables.config.unwrap().epoch;
    assert_eq!(epoch, 3);
    // As the programs mark: mac(1) is the port's first, the others their own.
    sim.tables
        .ports
        .get_mut(&PortKey::new(TAP0, 0))
        .unwrap()
        .epoch = epoch;
    for n in [3, 4, 5] {
        let value = sim.tables.fdb.get_mut(&FdbKey::new(sim.id(100), mac(n)));
        *value.unwrap() = vtep_common::fdb::Value::new(1, 0, epoch - 1);
    }
    let expected = [
        bridged(BR0, TAP0, mac(1)),
        bridged(BR0, VX0, mac(3)),
        tunnelled(VX0, mac(3), REMOTE1),
    ];
    let expected = expected.map(|entry| FdbEntry {
        bridge: (entry.table == FdbTable::Bridge).then_some(BR0),
        ..entry
    });
    assert_eq!(busy(&sim), expected);
    // Bridge 300 s; the VXLAN device does not learn.
    assert_eq!(sim.model.refresh_interval(), Some(Duration::from_secs(100)));
}
