//! Ways to remotes: the header in the slot, next hops that come, change and go.

use vtep_common::checksum;
use vtep_common::layout::{REMOTE_NO_PORT_RANGE, REMOTE_UDP_CHECKSUM, Remote, vni_word};

use super::*;

pub fn slot(sim: &Sim, n: u8) -> Remote {
    match sim.place(100, mac(n)) {
        Some(Place::Remote(slot)) => sim.tables.remotes[&slot],
        other => panic!("{other:?}"),
    }
}

/// small_host with its VXLAN device changed and mac(1) behind REMOTE1.
pub fn host(change: impl Fn(&mut VxlanDevice)) -> Sim {
    let mut snapshot = small_host();
    for link in &mut snapshot.links {
        if let LinkKind::Vxlan(device) = &mut link.kind {
            change(device);
        }
    }
    let mut sim = Sim::started(snapshot);
    sim.apply(behind_remote(BR0, VX0, mac(1), REMOTE1));
    sim
}

#[test]
fn header_is_what_the_device_would_write() {
    let sim = host(|_| {});
    let remote = slot(&sim, 1);
    let mut header = vec![
        0x06, 0, 0, 0, 0, 1, 0x0a, 0, 0, 0, 0, 2, 0x08, 0x00, // Ethernet
        0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 192, 0, 2, 1, 198, 51, 100, 1, // IPv4
        0, 0, 0x12, 0xb5, 0, 0, 0, 0, // UDP
    ];
    let ip_sum = checksum::bytes(&header[14..34]);
    header.resize(112, 0);
    assert_eq!(
        remote,
        Remote {
            ifindex: ETH0,
            flags: REMOTE_NO_PORT_RANGE,
            ip_sum,
            vni_word: 0,
            port_min: 49152,
            port_count: 16384,
            header: header.try_into().unwrap(),
        }
    );
}

#[test]
fn r3_r4_r5_r28_r34_header_follows_the_device() {
    let remote = slot(
        &host(|device| {
            device.udp_port = 8472;
            device.source_ports = (5000, 5010);
            device.ttl = 9;
            device.tos = 0xb8;
            device.df = 1;
            device.udp_checksum = true;
        }),
        1,
    );
    // The upper bound is exclusive (udp_flow_src_port).
    assert_eq!((remote.port_min, remote.port_count), (5000, 10));
    assert_eq!(remote.flags, REMOTE_UDP_CHECKSUM);
    assert_eq!(remote.header[15], 0xb8);
    assert_eq!(remote.header[20..23], [0x40, 0, 9]);
    assert_eq!(remote.header[36..38], 8472u16.to_be_bytes());
    assert_eq!(remote.ip_sum, checksum::bytes(&remote.header[14..34]));
    for empty in [(7, 7), (9, 3)] {
        let remote = slot(&host(|device| device.source_ports = empty), 1);
        assert_eq!((remote.port_min, remote.port_count), (49152, 16384));
    }
}

#[test]
fn r14_entry_may_name_port_and_vni_of_the_remote() {
    let mut sim = host(|_| {});
    let own = FdbEntry {
        vni: Some(vni(7)),
        udp_port: Some(4790),
        ..tunnelled(VX0, mac(1), REMOTE1)
    };
    sim.apply([Event::Fdb(own)]);
    let remote = slot(&sim, 1);
    assert_eq!(remote.vni_word, vni_word(vni(7)));
    assert_eq!(remote.header[36..38], 4790u16.to_be_bytes());
    let row = &sim.model.remotes()[0];
    assert_eq!((row.vni, row.udp_port), (vni(7), 4790));
    // Named, but the segment's own: not an override.
    let same = FdbEntry {
        vni: Some(vni(100)),
        ..tunnelled(VX0, mac(1), REMOTE1)
    };
    sim.apply([Event::Fdb(same)]);
    assert_eq!(slot(&sim, 1).vni_word, 0);
}

#[test]
fn hop_limit_of_the_route_counts_where_the_device_has_none() {
    let route = Route {
        hop_limit: Some(33),
        ..via(ETH0, GATEWAY)
    };
    for (ttl, expected) in [(0, 33), (5, 5)] {
        let mut sim = host(|device| device.ttl = ttl);
        sim.routes.insert(REMOTE1, Some(route.clone()));
        sim.apply([Event::RoutesChanged]);
        assert_eq!(slot(&sim, 1).header[22], expected);
    }
}

#[test]
fn path_mtu_limits_what_the_tunnel_takes() {
    let mut sim = host(|_| {});
    assert_eq!(
        sim.tables.ports[&PortKey::new(TAP0, 0)].tunnel_max_bytes,
        1464
    );
    let route = Route {
        mtu: Some(1280),
        ..via(ETH0, GATEWAY)
    };
    sim.routes.insert(REMOTE1, Some(route));
    sim.apply([Event::RoutesChanged]);
    assert_eq!(
        sim.tables.ports[&PortKey::new(TAP0, 0)].tunnel_max_bytes,
        1280 - 50 + 14
    );
    sim.apply([Event::FdbGone(bridged(BR0, VX0, mac(1)))]);
    assert_eq!(
        sim.tables.ports[&PortKey::new(TAP0, 0)].tunnel_max_bytes,
        1464
    );
}

#[test]
fn f20_unresolved_next_hop_is_left_to_the_kernel() {
    let mut sim = host(|_| {});
    let hop = neighbour(ETH0, GATEWAY, 1);
    assert_eq!(sim.model.wanted_neighbours(), [(ETH0, GATEWAY)]);
    let states = [
        (bits::NUD_STALE, true),
        (bits::NUD_FAILED, false),
        (bits::NUD_DELAY, true),
        (bits::NUD_INCOMPLETE, false),
        (bits::NUD_PERMANENT, true),
    ];
    for (state, resolved) in states {
        let mac_of_hop = if resolved { hop.mac } else { None };
        sim.apply([Event::Neighbour(Neighbour {
            state,
            mac: mac_of_hop,
            ..hop.clone()
        })]);
        assert_eq!(sim.remote(100, mac(1)).is_some(), resolved, "{state:#x}");
    }
    sim.apply([Event::NeighbourGone(hop.clone())]);
    assert_eq!(sim.place(100, mac(1)), Some(Place::Kernel));
    assert_eq!(
        sim.reason(100, mac(1)),
        "next hop 192.0.2.254 on eth0 is not resolved"
    );
    assert_eq!(
        sim.model.wanted_neighbours().len(),
        1,
        "it has to be asked for"
    );
    // Somebody else's neighbour is nobody's business.
    assert_eq!(
        sim.apply([Event::Neighbour(neighbour(ETH0, REMOTE2, 3))]),
        []
    );
    let updates = sim.apply([Event::Neighbour(hop)]);
    assert!(matches!(
        updates[..],
        [TableUpdate::Remote { .. }, TableUpdate::Location { .. }]
    ));
    sim.apply([Event::FdbGone(bridged(BR0, VX0, mac(1)))]);
    assert_eq!(sim.model.wanted_neighbours(), []);
}

#[test]
fn live_slot_is_never_edited() {
    let mut sim = host(|_| {});
    let before = sim.place(100, mac(1));
    let updates = sim.apply([Event::Neighbour(neighbour(ETH0, GATEWAY, 2))]);
    assert!(matches!(
        updates[..],
        [TableUpdate::Remote { .. }, TableUpdate::Location { .. }]
    ));
    assert_ne!(sim.place(100, mac(1)), before);
    assert_eq!(slot(&sim, 1).header[..6], [0x06, 0, 0, 0, 0, 2]);
    // Confirmed, not changed.
    assert_eq!(
        sim.apply([Event::Neighbour(neighbour(ETH0, GATEWAY, 2))]),
        []
    );
    // The uplink's own address is part of the header too.
    let mut uplink = link(ETH0, "eth0", LinkKind::Plain);
    uplink.mac = Some(mac(77));
    sim.apply([Event::Link(uplink)]);
    assert_eq!(slot(&sim, 1).header[6..12], mac(77).0);
    assert_eq!(sim.tables.config.unwrap().uplink_macs[0], mac(77).to_bits());
}

#[test]
fn route_change_withdraws_nothing_until_the_answer_differs() {
    let mut sim = host(|_| {});
    sim.model.apply(Event::RoutesChanged);
    assert_eq!(sim.model.updates(sim.now), [], "asked, not answered");
    let open = sim.model.wanted_routes();
    assert_eq!(open.len(), 1);
    assert_eq!(open[0].source, Some(LOCAL.into()));
    assert_eq!(sim.model.wanted_routes(), [], "asked once");
    sim.model.route(&open[0], Some(via(ETH0, GATEWAY)));
    assert_eq!(sim.model.updates(sim.now), [], "the same answer");
    sim.routes.insert(REMOTE1, None);
    let updates = sim.apply([Event::RoutesChanged]);
    assert!(
        matches!(updates[..], [TableUpdate::Location { .. }]),
        "{updates:?}"
    );
    assert_eq!(sim.reason(100, mac(1)), "no route to it");
    sim.routes.insert(REMOTE1, Some(via(LO, GATEWAY)));
    sim.apply([Event::RoutesChanged]);
    assert_eq!(sim.reason(100, mac(1)), "it is an address of this host");
    let v6 = via(ETH0, GATEWAY_V6);
    sim.routes.insert(REMOTE1, Some(v6));
    sim.apply([Event::RoutesChanged]);
    let reason = "next hop fe80::fe on eth0 is not resolved";
    assert_eq!(sim.reason(100, mac(1)), reason);
    assert_eq!(sim.model.wanted_neighbours(), [(ETH0, GATEWAY_V6)]);
    sim.apply([Event::Neighbour(neighbour(ETH0, GATEWAY_V6, 6))]);
    let remote = slot(&sim, 1);
    assert_eq!(
        remote.header[..6],
        neighbour(ETH0, GATEWAY_V6, 6).mac.unwrap().0
    );
    assert_eq!(remote.destination_v4(), [198, 51, 100, 1]);
}

#[test]
fn uplink_that_goes_down_leaves_its_remotes_to_the_kernel() {
    let mut sim = host(|_| {});
    let up = link(ETH0, "eth0", LinkKind::Plain);
    let mut down = up.clone();
    down.up = false;
    sim.apply([Event::Link(down)]);
    assert_eq!(sim.reason(100, mac(1)), "uplink eth0 is down");
    sim.apply([Event::Link(up)]);
    assert_eq!(sim.remote(100, mac(1)), Some(REMOTE1));
}

#[test]
fn a_host_that_moves_is_one_store_for_all_segments() {
    let mut sim = Sim::started(two_segments());
    for n in 1..=50 {
        sim.apply(behind_remote(BR0, VX0, mac(n), REMOTE1));
        sim.apply(behind_remote(BR1, VX1, mac(n), REMOTE1));
    }
    let updates = sim.apply([Event::Neighbour(neighbour(ETH0, GATEWAY, 2))]);
    assert!(matches!(
        updates[..],
        [TableUpdate::Remote { .. }, TableUpdate::Location { .. }]
    ));
    let rows = sim.model.remotes();
    assert_eq!(
        rows.iter().map(|row| row.fdb_entries).collect::<Vec<_>>(),
        [50, 50]
    );
    assert_eq!(rows[0].dev.as_deref(), Some("eth0"));
    assert_eq!(rows[0].next_hop, Some(GATEWAY));
}

#[test]
fn uplinks_of_other_kinds_say_what_becomes_of_them() {
    let row = |change: &dyn Fn(&mut Snapshot)| {
        let mut host = small_host();
        change(&mut host);
        let rows = Sim::started(host).model.uplinks();
        rows.into_iter().find(|uplink| uplink.name == "eth0")
    };
    let kind = |kind: &str| {
        row(&|host: &mut Snapshot| {
            let eth0 = host.links.iter_mut().find(|l| l.ifindex == ETH0).unwrap();
            eth0.kind = LinkKind::Other(kind.to_owned());
        })
    };
    let in_a = |kind: &str| {
        let row = row(&|host: &mut Snapshot| {
            let eth0 = host.links.iter_mut().find(|l| l.ifindex == ETH0).unwrap();
            eth0.master = Some(99);
            let master = Link {
                ifindex: 99,
                name: "above".to_owned(),
                kind: LinkKind::Other(kind.to_owned()),
                master: None,
                ..eth0.clone()
            };
            host.links.push(master);
        });
        row.unwrap().reason.unwrap_or_default().to_string()
    };
    assert_eq!(kind("bond").unwrap().reason, None);
    let reason = kind("vlan").unwrap().reason.unwrap();
    assert!(reason.starts_with("VLAN devices have no XDP"), "{reason}");
    assert!(kind("dummy").is_none());
    assert!(kind("vrf").is_none());
    assert_eq!(in_a("vrf"), "it is in VRF above");
    assert_eq!(in_a("bond"), "it is a link of above: that is the uplink");
}
