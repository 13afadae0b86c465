//! What the kernel refuses, and devices that go away: what depends on them is
//! left to the kernel until they work again.

use super::devices::with_link;
use super::*;

#[test]
fn refused_program_is_tried_again_only_after_a_change_or_on_request() {
    let mut sim = Sim::new(Settings::default());
    sim.refusing = [TAP0, ETH0].into();
    sim.model.replace(small_host());
    sim.run();
    sim.apply([Event::Fdb(bridged(BR0, TAP0, mac(1)))]);
    sim.apply(behind_remote(BR0, VX0, mac(2), REMOTE1));
    assert_eq!(sim.place(100, mac(1)), Some(Place::Kernel));
    assert_eq!(sim.place(100, mac(2)), Some(Place::Kernel));
    assert!(
        sim.reason(100, mac(1))
            .contains("the program cannot be attached: Operation not supported")
    );
    assert!(
        sim.reason(100, mac(2))
            .starts_with("uplink eth0: the program cannot be attached")
    );
    assert_eq!(sim.tables.targets, [TAP1]);
    assert!(sim.model.has_refused());
    assert_eq!(sim.run(), []);

    sim.refusing.clear();
    assert_eq!(sim.run(), [], "nothing has changed");
    sim.apply([Event::Link(
        with_link(TAP0, |l| l.mtu = 1400).links[4].clone(),
    )]);
    assert_eq!(sim.place(100, mac(1)), Some(Place::Port(TAP0, Via::Xdp)));
    assert!(sim.model.retry());
    sim.run();
    assert_eq!(sim.remote(100, mac(2)), Some(REMOTE1));
    assert!(!sim.model.has_refused() && !sim.model.retry());
}

#[test]
fn refused_map_entries_take_what_depends_on_them_along() {
    let host = || {
        let mut sim = Sim::started(small_host());
        sim.apply([Event::Fdb(bridged(BR0, TAP0, mac(1)))]);
        sim
    };
    let refuse = |sim: &mut Sim, update: TableUpdate| {
        let reason = "No space left on device (os error 28)".to_owned();
        sim.model.refused(vec![Refused { update, reason }]);
        sim.run();
    };
    let mut sim = host();
    let (&key, &value) = sim.tables.segments.iter().next().unwrap();
    refuse(&mut sim, TableUpdate::Segment { key, value });
    assert!(sim.tables.segments.is_empty() && sim.tables.fdb.is_empty());
    assert!(
        sim.model
            .segment(vni(100))
            .unwrap()
            .reason
            .unwrap()
            .contains("No space left")
    );

    let mut sim = host();
    let value = sim.tables.ports[&PortKey::new(TAP0, 0)];
    refuse(
        &mut sim,
        TableUpdate::Port {
            key: PortKey::new(TAP0, 0),
            value,
        },
    );
    assert!(
        !sim.tables.ports.contains_key(&PortKey::new(TAP0, 0))
            && !sim.tables.hooks.contains_key(&TAP0)
    );
    assert_eq!(sim.place(100, mac(1)), Some(Place::Kernel));

    let mut sim = host();
    let (&index, &value) = sim.tables.locations.iter().next().unwrap();
    refuse(&mut sim, TableUpdate::Location { index, value });
    assert_eq!(sim.place(100, mac(1)), Some(Place::Kernel));
    assert!(sim.model.retry());
    sim.run();
    assert_eq!(sim.place(100, mac(1)), Some(Place::Port(TAP0, Via::Xdp)));

    let mut sim = host();
    let config = sim.tables.config.unwrap();
    refuse(&mut sim, TableUpdate::Config(config));
    assert!(sim.model.warnings()[0].contains("No space left"));
    assert!(sim.model.retry());
    assert_eq!(sim.run(), [TableUpdate::Config(config)]);
}

#[test]
fn port_that_went_away_is_detached_and_one_under_its_number_is_new() {
    let mut sim = Sim::started(small_host());
    sim.apply([Event::Fdb(bridged(BR0, TAP0, mac(1)))]);
    let updates = sim.apply([Event::LinkGone(TAP0)]);
    assert_eq!(updates[0], TableUpdate::Detach(TAP0));
    assert_eq!(sim.place(100, mac(1)), None);
    assert!(
        !sim.tables.targets.contains(&TAP0)
            && !sim.tables.ports.contains_key(&PortKey::new(TAP0, 0))
    );
    sim.apply([
        Event::Link(tap(TAP0, "tap0", BR0)),
        Event::Fdb(bridged(BR0, TAP0, mac(1))),
    ]);
    // Both in one batch: the kernel has taken target and program along.
    let updates = sim.apply([Event::LinkGone(TAP0), Event::Link(tap(TAP0, "other", BR0))]);
    assert_eq!(updates[0], TableUpdate::Detach(TAP0));
    assert!(updates.contains(&TableUpdate::TargetAdd(TAP0)));
    assert!(
        updates
            .iter()
            .any(|u| matches!(u, TableUpdate::Attach { ifindex: TAP0, .. }))
    );
}
