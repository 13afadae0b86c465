//! VLAN-aware bridges: with a VXLAN device for each VNI, and with a single one.

use vtep_common::layout::{Place, PortKey};

use super::*;
use crate::model::{PortRow, RowPlace, SegmentRow};

/// br0 is VLAN-aware: VLAN 10 is VNI 100 (vxlan100), VLAN 20 is VNI 200 (vxlan200);
/// tap0 and tap1 are in VLAN 10, tap2 in VLAN 20.
pub fn vlans() -> Snapshot {
    let mut host = two_segments();
    host.links.iter_mut().for_each(make_vlan_aware);
    host.vlans = [
        (BR0, vec![pvid(1)]),
        (VX0, vec![pvid(10)]),
        (VX1, vec![pvid(20)]),
        (TAP0, vec![pvid(10)]),
        (TAP1, vec![pvid(10)]),
        (TAP2, vec![pvid(20)]),
    ]
    .into();
    host
}

/// The same with a single VXLAN device, which maps the VLANs in one range.
pub fn single() -> Snapshot {
    let mut host = vlans();
    host.links.retain(|link| link.ifindex != VX1);
    host.links
        .iter_mut()
        .filter(|link| link.ifindex == VX0)
        .for_each(make_single);
    host.vlans.remove(&VX1);
    host.vlans
        .insert(VX0, vec![pvid(1), mapped(10, 100), mapped(20, 200)]);
    host.vnis = [(VX0, vec![vnis(100, 200)])].into();
    host
}

pub fn mapped(vlan: u16, vni: u32) -> VlanRange {
    VlanRange {
        tunnel: Some(vni),
        ..tagged(vlan)
    }
}

pub fn vnis(first: u32, last: u32) -> VniRange {
    VniRange { first, last }
}

pub fn change(host: &mut Snapshot, ifindex: IfIndex, change: impl FnOnce(&mut Link)) {
    change(
        host.links
            .iter_mut()
            .find(|link| link.ifindex == ifindex)
            .unwrap(),
    );
}

pub fn change_bridge(host: &mut Snapshot, set: impl FnOnce(&mut Bridge)) {
    change(host, BR0, |link| match &mut link.kind {
        LinkKind::Bridge(bridge) => set(bridge),
        other => panic!("{other:?}"),
    });
}

fn vlan_filtering(host: &Snapshot, on: bool) -> Event {
    let mut host = host.clone();
    change_bridge(&mut host, |bridge| bridge.vlan_filtering = on);
    let bridge = host.links.into_iter().find(|link| link.ifindex == BR0);
    Event::Link(bridge.unwrap())
}

fn in_vlan(entry: FdbEntry, vlan: u16) -> FdbEntry {
    FdbEntry {
        vlan: Some(vlan),
        ..entry
    }
}

pub fn at_port(port: IfIndex, vlan: u16, n: u8) -> Event {
    Event::Fdb(in_vlan(bridged(BR0, port, mac(n)), vlan))
}

/// As `bridge fdb add .. src_vni` does.
fn from_vni(n: u32, entry: FdbEntry) -> FdbEntry {
    FdbEntry {
        source_vni: Some(vni(n)),
        ..entry
    }
}

/// A layout, and how it says that a MAC is behind a remote in VLAN 10 or 20.
struct Layout {
    host: Snapshot,
    behind: fn(u16, MacAddr, IpAddr) -> [Event; 2],
}

fn layouts() -> [Layout; 2] {
    [
        Layout {
            host: vlans(),
            behind: |vlan, mac, dst| {
                let vxlan = if vlan == 10 { VX0 } else { VX1 };
                [
                    Event::Fdb(tunnelled(vxlan, mac, dst)),
                    Event::Fdb(in_vlan(bridged(BR0, vxlan, mac), vlan)),
                ]
            },
        },
        Layout {
            host: single(),
            behind: |vlan, mac, dst| {
                let tunnel = from_vni(10 * u32::from(vlan), tunnelled(VX0, mac, dst));
                [
                    Event::Fdb(tunnel),
                    Event::Fdb(in_vlan(bridged(BR0, VX0, mac), vlan)),
                ]
            },
        },
    ]
}

const fn at(port: IfIndex) -> Option<Place> {
    Some(Place::Port(port, Via::Xdp))
}

pub fn segment(sim: &Sim, n: u32) -> SegmentRow {
    sim.model.segment(vni(n)).expect("a segment")
}

pub fn segment_of_port(sim: &Sim, port: IfIndex) -> Option<SegmentId> {
    let port = sim.tables.ports.get(&PortKey::new(port, 0));
    port.map(|port| port.segment)
}

#[test]
fn r2_vlans_of_one_bridge_are_segments_of_their_own() {
    for layout in layouts() {
        let mut sim = Sim::started(layout.host);
        assert_eq!(segment(&sim, 100).vlan, Some(10));
        assert_eq!(segment(&sim, 200).vlan, Some(20));
        assert_eq!(segment_of_port(&sim, TAP0), Some(sim.id(100)));
        assert_eq!(segment_of_port(&sim, TAP2), Some(sim.id(200)));
        // One MAC in both.
        sim.apply([at_port(TAP0, 10, 1), at_port(TAP2, 20, 1)]);
        assert_eq!(sim.place(100, mac(1)), at(TAP0));
        assert_eq!(sim.place(200, mac(1)), at(TAP2));
        sim.apply((layout.behind)(10, mac(1), REMOTE1));
        assert_eq!(sim.remote(100, mac(1)), Some(REMOTE1));
        assert_eq!(sim.place(200, mac(1)), at(TAP2));
        sim.apply((layout.behind)(20, mac(1), REMOTE2));
        assert_eq!(sim.remote(100, mac(1)), Some(REMOTE1));
        assert_eq!(sim.remote(200, mac(1)), Some(REMOTE2));
        let rows = sim.model.fdb_rows(None, None);
        let rows: Vec<_> = rows
            .iter()
            .map(|r| (r.vni.get(), r.vlan, &r.place))
            .collect();
        assert_eq!(
            rows,
            [
                (100, Some(10), &RowPlace::Remote(REMOTE1)),
                (200, Some(20), &RowPlace::Remote(REMOTE2))
            ]
        );
    }
}

#[test]
fn f22_odd_entries_of_vlans_are_mirrored_as_the_kernel_uses_them() {
    for layout in layouts() {
        let (host, single) = (layout.host, layout.behind);
        let zero_first = MacAddr([0, 0, 0, 0, 0, 1]);
        let mut sim = Sim::started(host);
        sim.apply(single(10, zero_first, REMOTE1));
        assert_eq!(sim.remote(100, zero_first), Some(REMOTE1));
        // Another VLAN, and VLAN 0, are other tables.
        sim.apply([
            at_port(TAP0, 1, 2),
            Event::Fdb(bridged(BR0, TAP0, mac(2))),
            at_port(TAP0, 20, 2),
        ]);
        assert_eq!(sim.place(100, mac(2)), None);
        assert_eq!(sim.place(200, mac(2)), Some(Place::Kernel));
        // Neither destination nor nexthop group.
        let [tunnel, bridge] = single(10, mac(3), REMOTE1);
        let Event::Fdb(tunnel) = tunnel else { panic!() };
        let bare = FdbEntry {
            dst: None,
            ..tunnel.clone()
        };
        sim.apply([Event::Fdb(bare.clone()), bridge.clone()]);
        assert_eq!(sim.place(100, mac(3)), Some(Place::Kernel));
        let group = FdbEntry {
            nexthop_id: Some(7),
            ..bare
        };
        sim.apply([Event::Fdb(group)]);
        assert_eq!(sim.place(100, mac(3)), Some(Place::Kernel));
        sim.apply([Event::Fdb(tunnel)]);
        assert_eq!(sim.remote(100, mac(3)), Some(REMOTE1));
    }
}

/// VLAN 1, which mirrors elsewhere take for "no VLAN".
#[test]
fn f22_vlan_1_is_a_vlan_like_the_others() {
    let mut host = vlans();
    host.vlans.insert(VX0, vec![pvid(1)]);
    host.vlans.insert(TAP0, vec![pvid(1)]);
    let mut sim = Sim::started(host);
    assert_eq!(segment(&sim, 100).vlan, Some(1));
    sim.apply([at_port(TAP0, 1, 1)]);
    assert_eq!(sim.place(100, mac(1)), at(TAP0));
    sim.apply([Event::Fdb(bridged(BR0, TAP1, mac(1)))]);
    assert_eq!(sim.place(100, mac(1)), at(TAP0));
}

#[test]
fn entries_of_another_vni_of_the_single_device_are_not_mixed_in() {
    let mut sim = Sim::started(single());
    sim.apply([
        Event::Fdb(from_vni(200, tunnelled(VX0, mac(1), REMOTE2))),
        Event::Fdb(tunnelled(VX0, mac(1), REMOTE3)),
        Event::Fdb(in_vlan(bridged(BR0, VX0, mac(1)), 10)),
    ]);
    assert_eq!(sim.place(100, mac(1)), Some(Place::Kernel));
    sim.apply([Event::Fdb(from_vni(100, tunnelled(VX0, mac(1), REMOTE1)))]);
    assert_eq!(sim.remote(100, mac(1)), Some(REMOTE1));
    // The VNI the remote expects is the segment's, also where the entry names it.
    let index = sim.tables.fdb[&FdbKey::new(sim.id(100), mac(1))].location();
    let Place::Remote(slot) = sim.tables.locations[&index].place() else {
        panic!()
    };
    assert_eq!(sim.tables.remotes[&slot].vni_word, 0);
    let told = FdbEntry {
        vni: Some(vni(100)),
        ..from_vni(100, tunnelled(VX0, mac(1), REMOTE1))
    };
    assert!(
        sim.apply([Event::Fdb(told)]).is_empty(),
        "the same place in other words"
    );
    // Flood lists are kept apart too.
    sim.apply([
        Event::Fdb(from_vni(100, tunnelled(VX0, MacAddr::ZERO, REMOTE1))),
        Event::Fdb(from_vni(200, tunnelled(VX0, MacAddr::ZERO, REMOTE2))),
    ]);
    assert_eq!(sim.model.flood_list(vni(100)), [REMOTE1]);
    assert_eq!(sim.model.flood_list(vni(200)), [REMOTE2]);
}

#[test]
fn a_port_of_several_vlans_is_fast_in_that_of_its_untagged_frames() {
    for layout in layouts() {
        let mut host = layout.host;
        host.vlans.insert(TAP0, vec![pvid(10), tagged(20)]);
        let mut sim = Sim::started(host);
        sim.apply([
            at_port(TAP0, 10, 1),
            at_port(TAP0, 20, 2),
            at_port(TAP2, 20, 3),
        ]);
        assert_eq!(sim.place(100, mac(1)), at(TAP0));
        // Known there, and left to the kernel, which adds the tag.
        assert_eq!(sim.place(200, mac(2)), Some(Place::Kernel));
        assert_eq!(sim.reason(200, mac(2)), "port: tagged in VLAN 20");
        assert_eq!(sim.place(200, mac(3)), at(TAP2));
        let rows = sim.model.port("tap0");
        let row = |row: &PortRow| (row.vni.get(), row.vlan, row.hook.is_some());
        assert_eq!(
            rows.iter().map(row).collect::<Vec<_>>(),
            [(100, Some(10), true), (200, Some(20), false)]
        );
        assert_eq!(rows[1].reason.as_deref(), Some("tagged in VLAN 20"));
        let of_tap0 = |key: &&PortKey| key.ifindex() == TAP0;
        assert_eq!(sim.tables.ports.keys().filter(of_tap0).count(), 1);
    }
}

#[test]
fn a_range_of_vlans_maps_to_a_range_of_vnis() {
    let mut host = single();
    let range = VlanRange {
        last: 309,
        ..mapped(10, 100)
    };
    host.vlans.insert(VX0, vec![range]);
    host.vlans.insert(
        TAP0,
        vec![
            VlanRange {
                first: 10,
                last: 19,
                ..tagged(10)
            },
            pvid(20),
        ],
    );
    host.vnis.insert(VX0, vec![vnis(100, 299), vnis(350, 5000)]);
    let settings = Settings {
        capacity: crate::tables::Capacity {
            segments: 512,
            ..Default::default()
        },
        ..Settings::default()
    };
    let mut sim = Sim::new(settings);
    sim.model.replace(host);
    sim.run();
    assert_eq!(sim.tables.segments.len(), 250);
    assert_eq!(segment(&sim, 100).vlan, Some(10));
    assert_eq!(segment(&sim, 399).vlan, Some(309));
    let reason = segment(&sim, 300).reason.unwrap();
    assert!(reason.starts_with("not in the filter"), "{reason}");
    assert_eq!(segment_of_port(&sim, TAP0), Some(sim.id(110)));
    assert_eq!(sim.model.port("tap0").len(), 11);
    assert_eq!(sim.run(), []);
}

#[test]
fn vlan_filtering_is_followed_when_it_is_switched() {
    // One device, so that the bridge makes sense both ways.
    let mut host = vlans();
    host.links.retain(|link| link.ifindex != VX1);
    let mut sim = Sim::started(host.clone());
    sim.apply([at_port(TAP0, 10, 1), at_port(TAP2, 20, 3)]);
    assert_eq!(sim.place(100, mac(1)), at(TAP0));
    assert_eq!(sim.place(100, mac(3)), None);
    sim.apply([vlan_filtering(&host, false)]);
    // The tables of the VLANs are not looked into any more.
    assert_eq!(sim.place(100, mac(1)), None);
    assert_eq!(segment(&sim, 100).vlan, None);
    // All ports are one segment now.
    assert_eq!(segment_of_port(&sim, TAP2), Some(sim.id(100)));
    sim.apply([Event::Fdb(bridged(BR0, TAP2, mac(3)))]);
    assert_eq!(sim.place(100, mac(3)), at(TAP2));
    sim.apply([vlan_filtering(&host, true)]);
    assert_eq!(sim.place(100, mac(3)), None);
    assert_eq!(sim.place(100, mac(1)), at(TAP0));
    assert_eq!(segment_of_port(&sim, TAP2), None);
    assert!(!sim.tables.hooks.contains_key(&TAP2));
}

#[test]
fn r2_a_port_that_changes_its_pvid_takes_no_entry_along() {
    for layout in layouts() {
        let mut sim = Sim::started(layout.host);
        sim.apply([at_port(TAP0, 10, 1), at_port(TAP1, 10, 2)]);
        // Told before the bridge has flushed what was behind the port.
        let updates = sim.apply([Event::Vlans(TAP0, vec![pvid(20)])]);
        assert_eq!(sim.place(100, mac(1)), Some(Place::Kernel));
        assert_eq!(
            sim.reason(100, mac(1)),
            "its port is not a member of the VLAN"
        );
        assert_eq!(segment_of_port(&sim, TAP0), Some(sim.id(200)));
        // Out of the old segment, its entries to the kernel, into the new one.
        let position = |what: &dyn Fn(&TableUpdate) -> bool| updates.iter().position(what);
        let key = PortKey::new(TAP0, 0);
        let out = position(&|u| *u == TableUpdate::PortDel(key));
        let stop = position(&|u| matches!(u, TableUpdate::Location { .. }));
        let come = position(&|u| matches!(u, TableUpdate::Port { key: k, .. } if *k == key));
        assert!(out < stop && stop < come && out.is_some(), "{updates:?}");
        // The program stays.
        let hooked =
            |u: &TableUpdate| matches!(u, TableUpdate::Detach(_) | TableUpdate::Attach { .. });
        assert!(!updates.iter().any(hooked), "{updates:?}");
        sim.apply([
            Event::FdbGone(in_vlan(bridged(BR0, TAP0, mac(1)), 10)),
            at_port(TAP0, 20, 1),
        ]);
        assert_eq!(sim.place(100, mac(1)), None);
        assert_eq!(sim.place(200, mac(1)), at(TAP0));
        assert_eq!(sim.place(100, mac(2)), at(TAP1));
    }
}

#[test]
fn a_mapping_that_changes_is_followed() {
    let mut sim = Sim::started(single());
    sim.apply([at_port(TAP0, 10, 1), at_port(TAP2, 20, 2)]);
    sim.apply([
        Event::Fdb(from_vni(300, tunnelled(VX0, mac(3), REMOTE1))),
        Event::Fdb(in_vlan(bridged(BR0, VX0, mac(3)), 10)),
    ]);
    // VLAN 10 goes to another VNI, which comes into the filter later.
    sim.apply([Event::Vlans(VX0, vec![mapped(10, 300), mapped(20, 200)])]);
    assert!(sim.model.segment(vni(100)).is_none());
    assert!(segment(&sim, 300).reason.is_some());
    assert_eq!(segment_of_port(&sim, TAP0), None);
    sim.apply([Event::Vnis(VX0, vec![vnis(200, 200), vnis(300, 300)])]);
    assert_eq!(segment_of_port(&sim, TAP0), Some(sim.id(300)));
    assert_eq!(sim.place(300, mac(1)), at(TAP0));
    assert_eq!(sim.remote(300, mac(3)), Some(REMOTE1));
    assert_eq!(sim.place(200, mac(2)), at(TAP2));
}

#[test]
fn a_port_that_changes_its_bridge_has_no_vlans_until_they_are_told() {
    let mut host = vlans();
    let mut other = bridge(BR1, "br1");
    make_vlan_aware(&mut other);
    change(&mut host, BR1, |link| *link = other);
    change(&mut host, VX1, |link| link.master = Some(BR1));
    let mut sim = Sim::started(host);
    sim.apply([Event::Link(tap(TAP0, "tap0", BR1))]);
    assert_eq!(segment_of_port(&sim, TAP0), None);
    sim.apply([Event::Vlans(TAP0, vec![pvid(20)])]);
    assert_eq!(segment_of_port(&sim, TAP0), Some(sim.id(200)));
}

#[test]
fn busy_entries_of_vlans_and_vnis_are_refreshed_under_their_names() {
    let mut host = single();
    change(&mut host, VX0, |link| match &mut link.kind {
        LinkKind::Vxlan(device) => device.learning = true,
        other => panic!("{other:?}"),
    });
    let mut sim = Sim::started(host);
    sim.apply([
        at_port(TAP0, 10, 1),
        Event::Fdb(from_vni(100, tunnelled(VX0, mac(2), REMOTE1))),
        Event::Fdb(in_vlan(bridged(BR0, VX0, mac(2)), 10)),
    ]);
    let key = FdbKey::new(sim.id(100), mac(2));
    let value = sim.tables.fdb[&key];
    let epoch = sim.tables.config.unwrap().epoch;
    let busy = vtep_common::fdb::Value::new(value.location(), 0, epoch);
    let entries = sim.model.busy([(key, busy)], &BTreeMap::new());
    let names: Vec<_> = entries
        .iter()
        .map(|e| (e.table, e.ifindex, e.vlan, e.source_vni))
        .collect();
    assert_eq!(
        names,
        [
            (FdbTable::Bridge, VX0, Some(10), None),
            (FdbTable::Vxlan, VX0, None, Some(vni(100)))
        ]
    );
}
