//! What of VLAN-aware bridges and single VXLAN devices is left to the kernel.

use super::vlans::*;
use super::*;
use crate::tables::Program;

#[test]
fn odd_memberships_of_ports_are_left_to_the_kernel_with_a_reason() {
    let only = |range: VlanRange| vec![range];
    let cases = [
        (only(tagged(10)), "tagged in VLAN 10"),
        (
            only(VlanRange {
                untagged: false,
                ..pvid(10)
            }),
            "frames to it are tagged with VLAN 10, its PVID",
        ),
        (
            vec![
                pvid(1),
                VlanRange {
                    pvid: false,
                    ..pvid(10)
                },
            ],
            "untagged in VLAN 10, which is not its PVID",
        ),
        (
            only(VlanRange {
                state: 1,
                ..pvid(10)
            }),
            "not forwarding in VLAN 10",
        ),
    ];
    for (ranges, expected) in cases {
        let mut host = vlans();
        host.vlans.insert(TAP0, ranges);
        let mut sim = Sim::started(host);
        sim.apply([at_port(TAP0, 10, 1)]);
        assert_eq!(sim.place(100, mac(1)), Some(Place::Kernel));
        let rows = sim.model.port("tap0");
        assert_eq!(rows.len(), 1, "{expected}");
        assert_eq!(rows[0].reason.as_deref(), Some(expected));
        assert!(segment_of_port(&sim, TAP0).is_none());
        assert!(!sim.tables.hooks.contains_key(&TAP0));
    }
    // A VLAN without a segment, and no VLAN at all.
    for ranges in [vec![pvid(30)], vec![]] {
        let mut host = vlans();
        host.vlans.insert(TAP0, ranges);
        let sim = Sim::started(host);
        assert_eq!(sim.model.port("tap0"), []);
        assert!(!sim.tables.hooks.contains_key(&TAP0));
        assert_eq!(sim.tables.hooks[&TAP1].0, Program::Egress);
    }
}

type Change = Box<dyn Fn(&mut Snapshot)>;

fn is_left(mut host: Snapshot, set: &Change, expected: &str) {
    set(&mut host);
    let sim = Sim::started(host);
    let reason = segment(&sim, 100).reason.unwrap_or_default();
    assert!(
        reason.starts_with(expected),
        "{reason} instead of {expected}"
    );
    assert_eq!(reason.is_empty(), expected.is_empty(), "{reason}");
    let fast = sim.tables.segments.keys().any(|key| key.vni() == 100);
    assert_eq!(fast, expected.is_empty());
}

fn set_vlans(ifindex: IfIndex, ranges: Vec<VlanRange>) -> Change {
    Box::new(move |host| drop(host.vlans.insert(ifindex, ranges.clone())))
}

#[test]
fn r41_devices_of_one_vni_are_left_to_the_kernel_with_a_reason() {
    let not = |what: fn(&mut VlanRange)| {
        let mut range = pvid(10);
        what(&mut range);
        set_vlans(VX0, vec![range])
    };
    let cases: Vec<(&str, Change)> = vec![
        ("", Box::new(|_| {})),
        ("a member of no VLAN", set_vlans(VX0, vec![])),
        (
            "a member of several VLANs",
            set_vlans(VX0, vec![pvid(10), tagged(20)]),
        ),
        ("a member of several VLANs", not(|range| range.last = 11)),
        ("tagged in VLAN 10", not(|range| range.untagged = false)),
        ("VLAN 10 is not its PVID", not(|range| range.pvid = false)),
        ("not forwarding in VLAN 10", not(|range| range.state = 4)),
        (
            "VLAN 10 of its bridge has a second VXLAN device, vxlan200",
            set_vlans(VX1, vec![pvid(10)]),
        ),
        // Wherever the bridge floods to counts, whatever the other one is good for.
        (
            "VLAN 10 of its bridge has a second VXLAN device, vxlan200",
            set_vlans(VX1, vec![pvid(20), tagged(10)]),
        ),
        (
            "its bridge filters service VLANs (802.1ad)",
            Box::new(|host| change_bridge(host, |bridge| bridge.service_vlans = true)),
        ),
        (
            "multiple spanning trees",
            Box::new(|host| change_bridge(host, |bridge| bridge.mst = true)),
        ),
        (
            "bridge port: vlan_tunnel",
            Box::new(|host| {
                change(host, VX0, |link| {
                    link.bridge_port.as_mut().unwrap().vlan_tunnel = true;
                });
            }),
        ),
    ];
    for (expected, set) in cases {
        is_left(vlans(), &set, expected);
    }
}

#[test]
fn r41_vnis_of_a_single_device_are_left_to_the_kernel_with_a_reason() {
    let port = |set: fn(&mut BridgePort)| -> Change {
        Box::new(move |host| {
            change(host, VX0, |link| set(link.bridge_port.as_mut().unwrap()));
        })
    };
    let map = |set: fn(&mut VlanRange)| {
        let mut range = mapped(10, 100);
        set(&mut range);
        set_vlans(VX0, vec![pvid(1), range])
    };
    let cases: Vec<(&str, Change)> = vec![
        ("", Box::new(|_| {})),
        (
            "single VXLAN device (external) without vlan_tunnel",
            port(|port| port.vlan_tunnel = false),
        ),
        ("bridge port: isolated", port(|port| port.isolated = true)),
        (
            "untagged in VLAN 10: the mapping is not used",
            map(|range| range.untagged = true),
        ),
        ("not forwarding in VLAN 10", map(|range| range.state = 0)),
        (
            "not in the filter: `bridge vni add dev vxlan100 vni 100`",
            Box::new(|host| drop(host.vnis.remove(&VX0))),
        ),
        // Without vnifilter the device takes every VNI.
        (
            "",
            Box::new(|host| {
                host.vnis.clear();
                change(host, VX0, |link| match &mut link.kind {
                    LinkKind::Vxlan(device) => device.vnifilter = false,
                    other => panic!("{other:?}"),
                });
            }),
        ),
        (
            "multiple spanning trees",
            Box::new(|host| change_bridge(host, |bridge| bridge.mst = true)),
        ),
    ];
    for (expected, set) in cases {
        is_left(single(), &set, expected);
    }
}

#[test]
fn a_single_device_without_mapping_says_so() {
    for set in [
        set_vlans(VX0, vec![]),
        set_vlans(VX0, vec![pvid(1), tagged(10)]),
        // Zero is no VNI there.
        set_vlans(VX0, vec![mapped(10, 0)]),
    ] {
        let mut host = single();
        set(&mut host);
        let sim = Sim::started(host);
        let rows = sim.model.segments();
        assert_eq!(rows.len(), 1);
        let reason = rows[0].reason.as_deref();
        let expected = "single VXLAN device (external): no VLAN is mapped to a VNI";
        assert_eq!(reason, Some(expected));
    }
    let mut host = single();
    change_bridge(&mut host, |bridge| bridge.vlan_filtering = false);
    let sim = Sim::started(host);
    let reason = sim.model.segments().remove(0).reason.unwrap();
    assert!(reason.contains("not VLAN-aware"), "{reason}");
}
