//! Segments, ports and uplinks: what is accelerated, and the reason why not.

use std::collections::BTreeSet;

use vtep_common::layout::{Config, SEGMENT_LEARNING, VniKey, address_v4, vni_word};

use super::*;
use crate::kernel::Filters;
use crate::model::HookChoice;
use crate::tables::{Hook, Program, XdpMode};

/// The reason of the segment of VNI 100; empty: accelerated.
fn segment_reason(host: Snapshot) -> String {
    let sim = Sim::started(host);
    let row = sim.model.segment(vni(100)).unwrap();
    assert_eq!(row.segment.is_some(), row.reason.is_none());
    let accelerated = sim.tables.segments.keys().any(|key| key.vni() == 100);
    assert_eq!(accelerated, row.reason.is_none());
    if !accelerated {
        assert!(
            sim.model
                .ports()
                .iter()
                .all(|port| port.vni != vni(100) || port.hook.is_none())
        );
    }
    row.reason.unwrap_or_default()
}

/// small_host with its VXLAN device changed.
fn with_device(change: impl Fn(&mut VxlanDevice)) -> Snapshot {
    with_link(VX0, |link| match &mut link.kind {
        LinkKind::Vxlan(device) => change(device),
        other => panic!("{other:?}"),
    })
}

pub fn with_link(ifindex: IfIndex, change: impl Fn(&mut Link)) -> Snapshot {
    let mut host = small_host();
    host.links
        .iter_mut()
        .filter(|link| link.ifindex == ifindex)
        .for_each(change);
    host
}

fn with_port(ifindex: IfIndex, change: impl Fn(&mut BridgePort)) -> Snapshot {
    with_link(ifindex, |link| change(link.bridge_port.as_mut().unwrap()))
}

fn with_bridge(change: impl Fn(&mut Bridge)) -> Snapshot {
    with_link(BR0, |link| match &mut link.kind {
        LinkKind::Bridge(bridge) => change(bridge),
        other => panic!("{other:?}"),
    })
}

fn with_filters(filters: Filters) -> Snapshot {
    Snapshot {
        filters,
        ..small_host()
    }
}

#[test]
fn r41_what_is_not_mirrored_exactly_is_left_to_the_kernel_with_a_reason() {
    let compatible: IpAddr = "::192.0.2.1".parse().unwrap();
    let chains = |names: &[&str]| {
        names
            .iter()
            .map(|name| name.to_string())
            .collect::<Vec<_>>()
    };
    let mut twins = two_segments();
    for link in &mut twins.links {
        if link.ifindex == VX1 {
            *link = vxlan(VX1, "vxlan200", vxlan_device(200), BR0);
        }
    }
    let mut same_vni = two_segments();
    for link in &mut same_vni.links {
        if link.ifindex == VX1 {
            *link = vxlan(VX1, "vxlan200", vxlan_device(100), BR1);
        }
    }
    let cases = [
        ("", small_host()),
        ("not in a bridge", with_link(VX0, |l| l.master = None)),
        (
            "tap0 is not a bridge",
            with_link(VX0, |l| l.master = Some(TAP0)),
        ),
        (
            "its bridge is gone",
            with_link(VX0, |l| l.master = Some(77)),
        ),
        ("the VXLAN device is down", with_link(VX0, |l| l.up = false)),
        ("bridge br0 is down", with_link(BR0, |l| l.up = false)),
        (
            "a member of no VLAN",
            with_bridge(|b| b.vlan_filtering = true),
        ),
        ("multiple spanning trees", with_bridge(|b| b.mst = true)),
        (
            "single VXLAN device",
            with_device(|d| d.collect_metadata = true),
        ),
        ("no local address: set", with_device(|d| d.local = None)),
        (
            "its local address ::c000:201 cannot be used",
            with_device(|d| d.local = Some(compatible)),
        ),
        (
            "option gbp, l2miss",
            with_device(|d| d.foreign_options = vec!["gbp", "l2miss"]),
        ),
        ("its bridge has a second VXLAN device, vxlan200", twins),
        ("vxlan200 has the same VNI and UDP port", same_vni),
        (
            "bridge port: its state is not known",
            with_link(VX0, |l| l.bridge_port = None),
        ),
        (
            "bridge port: not forwarding",
            with_port(VX0, |p| p.state = 4),
        ),
        (
            "bridge port: isolated",
            with_port(VX0, |p| p.isolated = true),
        ),
        ("bridge port: locked", with_port(VX0, |p| p.locked = true)),
        ("bridge port: MAC auth", with_port(VX0, |p| p.mab = true)),
        (
            "bridge port: vlan_tunnel",
            with_port(VX0, |p| p.vlan_tunnel = true),
        ),
        (
            "bridge port: proxy ARP",
            with_port(VX0, |p| p.proxy_arp = true),
        ),
        (
            "bridge port: has a backup",
            with_port(VX0, |p| p.backup_port = Some(TAP0)),
        ),
        (
            "chain filter/forward filters",
            with_filters(Filters {
                bridge_chains: chains(&["filter/forward"]),
                ..Filters::default()
            }),
        ),
        (
            "bridge-nf-call is on: chain ip/x",
            with_filters(Filters {
                bridge_nf_call: true,
                ip_chains: chains(&["ip/x"]),
                ..Filters::default()
            }),
        ),
        (
            "",
            with_filters(Filters {
                ip_chains: chains(&["ip/x"]),
                ..Filters::default()
            }),
        ),
        (
            "",
            with_filters(Filters {
                bridge_nf_call: true,
                ..Filters::default()
            }),
        ),
        // What passes to the kernel anyway, or changes no frame.
        ("", with_port(VX0, |p| p.neigh_suppress = true)),
        ("", with_port(VX0, |p| p.unicast_flood = false)),
        ("", with_device(|d| d.group = Some(REMOTE1))),
        ("", with_device(|d| d.udp_checksum = true)),
        // What the programs do themselves.
        ("", with_device(|d| d.local = Some(LOCAL_V6.into()))),
        ("", with_device(|d| d.ttl_inherit = true)),
        ("", with_device(|d| d.tos = 1)),
        ("", with_device(|d| d.df = 2)),
    ];
    for (expected, host) in cases {
        let reason = segment_reason(host);
        assert_eq!(
            reason.is_empty(),
            expected.is_empty(),
            "{reason} instead of {expected}"
        );
        assert!(
            reason.starts_with(expected),
            "{reason} instead of {expected}"
        );
    }
}

#[test]
fn filters_of_one_bridge_count_without_the_sysctl() {
    let mut host = with_bridge(|bridge| bridge.nf_call = true);
    host.filters.ip_chains = vec!["ip/x".to_owned()];
    assert!(segment_reason(host).starts_with("bridge-nf-call"));
    // And they are followed as they change.
    let mut sim = Sim::started(small_host());
    sim.apply([Event::Fdb(bridged(BR0, TAP0, mac(1)))]);
    sim.model.set_filters(Filters {
        bridge_chains: vec!["filter/forward".to_owned()],
        ..Filters::default()
    });
    sim.run();
    assert!(sim.tables.segments.is_empty() && sim.tables.fdb.is_empty());
    assert!(sim.tables.hooks.is_empty(), "{:?}", sim.tables.hooks);
    sim.model.set_filters(Filters::default());
    sim.run();
    assert!(sim.place(100, mac(1)).is_some());
}

#[test]
fn only_named_devices_are_accelerated() {
    let settings = Settings {
        vxlan: Some(["vxlan200".to_owned()].into()),
        ..Settings::default()
    };
    let sim = Sim::with(settings, two_segments());
    let reason = sim.model.segment(vni(100)).unwrap().reason;
    assert_eq!(reason.as_deref(), Some("not named in the configuration"));
    assert!(sim.model.segment(vni(200)).unwrap().segment.is_some());
}

#[test]
fn local_address_is_derived_where_the_link_has_one() {
    let mut host = with_device(|device| {
        device.local = None;
        device.link = Some(ETH0);
    });
    let sim = Sim::started(host.clone());
    assert_eq!(
        sim.tables.segments[&VniKey::v4(vni(100), 4789)].local,
        address_v4(LOCAL.octets())
    );
    host.addresses.push(Address {
        ifindex: ETH0,
        address: "192.0.2.9".parse().unwrap(),
    });
    assert!(segment_reason(host.clone()).contains("eth0 has several"));
    host.addresses.clear();
    assert!(segment_reason(host).contains("eth0 has no IPv4 address"));
}

#[test]
fn segment_values_follow_device_and_ports() {
    let key = VniKey::v4(vni(100), 4789);
    let sim = Sim::started(small_host());
    let segment = sim.tables.segments[&key];
    assert_eq!(
        (segment.local, segment.flags),
        (address_v4(LOCAL.octets()), 0)
    );
    assert_eq!(segment.local_max_bytes, 1514);
    for host in [
        with_device(|d| d.learning = true),
        with_port(VX0, |p| p.learning = true),
    ] {
        assert_eq!(
            Sim::started(host).tables.segments[&key].flags,
            SEGMENT_LEARNING
        );
    }
    let sim = Sim::started(with_link(TAP1, |link| link.mtu = 1400));
    assert_eq!(sim.tables.segments[&key].local_max_bytes, 1414);
    let port = sim.tables.ports[&PortKey::new(TAP0, 0)];
    assert_eq!((port.local_max_bytes, port.tunnel_max_bytes), (1414, 1464));
    assert_eq!((port.vni_word, port.segment), (vni_word(vni(100)), 1));
    let sim = Sim::started(with_link(ETH0, |link| link.mtu = 1400));
    assert_eq!(
        sim.tables.ports[&PortKey::new(TAP0, 0)].tunnel_max_bytes,
        1364
    );
    let sim = Sim::started(with_link(ETH0, |link| link.mtu = 9000));
    assert_eq!(
        sim.tables.ports[&PortKey::new(TAP0, 0)].tunnel_max_bytes,
        1464
    );
}

#[test]
fn hook_of_a_port_follows_from_its_offloads_and_the_users_choice() {
    let tun = |tap, vnet_hdr| LinkKind::Tun(Tun { tap, vnet_hdr });
    let xdp = Ok(Hook::Xdp(XdpMode::Native));
    let cases = [
        (HookChoice::Auto, tun(true, false), xdp),
        (HookChoice::Auto, tun(true, true), Ok(Hook::Tcx)),
        (HookChoice::Auto, LinkKind::Veth, Ok(Hook::Tcx)),
        (HookChoice::Auto, LinkKind::Plain, Ok(Hook::Tcx)),
        (
            HookChoice::Auto,
            LinkKind::Other("vlan".into()),
            Ok(Hook::Tcx),
        ),
        (HookChoice::Xdp, LinkKind::Veth, xdp),
        (HookChoice::Xdp, tun(true, true), xdp),
        (HookChoice::Tcx, tun(true, false), Ok(Hook::Tcx)),
        (HookChoice::Auto, tun(false, false), Err("tun device")),
        (
            HookChoice::Kernel,
            tun(true, false),
            Err("left to the kernel by configuration"),
        ),
    ];
    for (choice, kind, expected) in cases {
        let settings = Settings {
            hooks: [("tap0".to_owned(), choice)].into(),
            ..Settings::default()
        };
        let mut host = with_link(TAP0, |link| link.kind = kind.clone());
        host.redirect_targets = Some([ETH0, TAP0, TAP1].into());
        let sim = Sim::with(settings, host);
        let row = sim.model.port("tap0").remove(0);
        let hook = sim.tables.hooks.get(&TAP0);
        let wanted = expected.ok().map(|hook| (Program::Egress, hook));
        assert_eq!(hook.copied(), wanted, "{choice:?} {kind:?}");
        let (hooked, expected) = (expected.is_ok(), expected.err());
        assert_eq!(row.hook.is_some(), hooked);
        assert!(
            row.reason
                .unwrap_or_default()
                .starts_with(expected.unwrap_or(""))
        );
        assert_eq!(
            sim.tables.ports.contains_key(&PortKey::new(TAP0, 0)),
            hooked
        );
        assert_eq!(sim.tables.targets.contains(&TAP0), hooked);
    }
    for change in [
        |port: &mut BridgePort| port.state = 0,
        |port: &mut BridgePort| port.isolated = true,
        |port: &mut BridgePort| port.locked = true,
    ] {
        let sim = Sim::started(with_port(TAP0, change));
        assert!(sim.model.port("tap0").remove(0).reason.is_some());
        assert!(sim.model.port("tap1").remove(0).reason.is_none());
    }
    let sim = Sim::started(with_link(TAP0, |link| link.up = false));
    assert_eq!(
        sim.model.port("tap0").remove(0).reason.as_deref(),
        Some("the device is down")
    );
}

#[test]
fn devices_that_lose_redirected_frames_are_served_through_the_stack() {
    let mut host = small_host();
    host.links
        .push(member(link(40, "veth0", LinkKind::Veth), BR0));
    let settings = Settings {
        hooks: [("veth0".to_owned(), HookChoice::Xdp)].into(),
        ..Settings::default()
    };
    let mut sim = Sim::with(settings, host);
    sim.apply([Event::Fdb(bridged(BR0, 40, mac(1)))]);
    sim.apply(behind_remote(BR0, VX0, mac(2), REMOTE1));
    assert_eq!(sim.place(100, mac(1)), Some(Place::Port(40, Via::Stack)));
    sim.losing = [ETH0, 40].into();
    sim.model.set_redirect_targets(Some([TAP0, TAP1].into()));
    sim.run();
    assert_eq!(sim.place(100, mac(1)), Some(Place::Port(40, Via::Stack)));
    // Of use to tcx ports; XDP finds no target.
    assert_eq!(sim.remote(100, mac(2)), Some(REMOTE1));
    assert_eq!(sim.tables.targets, [TAP0, TAP1]);
    sim.model.set_redirect_targets(Some([ETH0, 40].into()));
    sim.run();
    assert_eq!(sim.place(100, mac(1)), Some(Place::Port(40, Via::Xdp)));
    assert_eq!(sim.remote(100, mac(2)), Some(REMOTE1));
}

#[test]
fn without_tcx_ports_with_offloads_are_left_to_the_kernel() {
    let mut host = small_host();
    host.links
        .push(member(link(40, "veth0", LinkKind::Veth), BR0));
    let settings = Settings {
        tcx: false,
        ..Settings::default()
    };
    let mut sim = Sim::with(settings, host);
    sim.apply([Event::Fdb(bridged(BR0, 40, mac(1)))]);
    assert_eq!(sim.place(100, mac(1)), Some(Place::Kernel));
    assert!(sim.reason(100, mac(1)).contains("the kernel has no tcx"));
    sim.model.set_hook("veth0", HookChoice::Xdp);
    sim.model.set_redirect_targets(Some([ETH0].into()));
    sim.run();
    assert!(sim.reason(100, mac(1)).contains("the veth does not poll"));
}

#[test]
fn f18_jumbo_ports_take_frames_from_the_wire_by_the_kernel() {
    let place = |uplink_mtu, port_mtu| {
        let mut host = with_link(ETH0, |link| link.mtu = uplink_mtu);
        let tap = host.links.iter_mut().find(|link| link.ifindex == TAP0);
        tap.unwrap().mtu = port_mtu;
        let mut sim = Sim::started(host);
        sim.apply([Event::Fdb(bridged(BR0, TAP0, mac(1)))]);
        sim.apply(behind_remote(BR0, VX0, mac(2), REMOTE1));
        let local_max = sim.tables.segments[&VniKey::v4(vni(100), 4789)].local_max_bytes;
        (sim.place(100, mac(1)), local_max)
    };
    let at = |via| Some(Place::Port(TAP0, via));
    assert_eq!(place(9000, 1450), (at(Via::Xdp), 1464));
    // Never that long on this wire.
    assert_eq!(place(1500, 8950), (at(Via::Xdp), 1514));
    assert_eq!(place(9000, 8950), (at(Via::Kernel), 1514));
}

#[test]
fn uplinks_are_those_that_remotes_are_reached_by() {
    let mut host = small_host();
    host.links.push(link(ETH1, "eth1", LinkKind::Plain));
    host.neighbours.push(neighbour(ETH1, REMOTE2, 9));
    let mut sim = Sim::started(host.clone());
    let ingress = |sim: &Sim| {
        let hooks = sim
            .tables
            .hooks
            .iter()
            .filter(|(_, hook)| hook.0 == Program::Ingress);
        hooks.map(|(ifindex, _)| *ifindex).collect::<Vec<_>>()
    };
    // The device that owns the local address.
    assert_eq!(ingress(&sim), [ETH0]);
    let macs = |sim: &Sim| {
        let macs = sim.tables.config.unwrap().uplink_macs;
        macs.into_iter().filter(|mac| *mac != u64::MAX).count()
    };
    assert_eq!(
        (macs(&sim), sim.tables.config.unwrap().udp_ports[0]),
        (1, [0x12, 0xb5])
    );
    let direct = Route {
        gateway: None,
        ..via(ETH1, GATEWAY)
    };
    sim.routes.insert(REMOTE2, Some(direct));
    sim.apply(behind_remote(BR0, VX0, mac(1), REMOTE2));
    assert_eq!((ingress(&sim), macs(&sim)), (vec![ETH0, ETH1], 2));
    assert_eq!(sim.remote(100, mac(1)), Some(REMOTE2));
    // And no longer.
    sim.apply([Event::FdbGone(bridged(BR0, VX0, mac(1)))]);
    assert_eq!((ingress(&sim), macs(&sim)), (vec![ETH0], 1));

    let settings = Settings {
        uplinks: Some(BTreeSet::from(["eth0".to_owned()])),
        ..Settings::default()
    };
    let routes = sim.routes.clone();
    let mut sim = Sim::with(settings, host);
    sim.routes = routes;
    sim.apply(behind_remote(BR0, VX0, mac(1), REMOTE2));
    assert_eq!(ingress(&sim), [ETH0]);
    assert_eq!(sim.place(100, mac(1)), Some(Place::Kernel));
    assert_eq!(sim.reason(100, mac(1)), "eth1 is not one of the uplinks");
}

#[test]
fn a_device_of_this_host_is_no_uplink() {
    let reason = |host: Snapshot, name: &str| {
        let sim = Sim::started(host);
        assert_eq!(
            sim.tables.config.unwrap().uplink_macs,
            Config::EMPTY.uplink_macs
        );
        let uplinks = sim.model.uplinks();
        uplinks
            .into_iter()
            .find(|uplink| uplink.name == name)
            .unwrap()
            .reason
            .unwrap()
    };
    assert_eq!(
        reason(with_link(ETH0, |l| *l = member(l.clone(), BR0)), "eth0"),
        "it is a port of bridge br0"
    );
    assert_eq!(
        reason(with_link(ETH0, |l| l.mac = None), "eth0"),
        "it has no Ethernet address"
    );
    let mut host = small_host();
    host.addresses[0].ifindex = BR0;
    assert!(reason(host, "br0").starts_with("a virtual device"));
}
