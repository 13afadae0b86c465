//! IPv6 underlays, beside IPv4 ones and alone.

use vtep_common::checksum;
use vtep_common::layout::{
    PortKey, REMOTE_DF_INHERIT, REMOTE_NO_PORT_RANGE, REMOTE_TOS_INHERIT, REMOTE_TTL_INHERIT,
    REMOTE_UDP_CHECKSUM, REMOTE_V6, Remote, SEGMENT_ZERO_CHECKSUM, VniKey,
};

use super::*;

const V6: IpAddr = IpAddr::V6(LOCAL_V6);

/// A host with one segment on an IPv6 underlay, its gateway resolved.
fn snapshot(change: impl Fn(&mut VxlanDevice)) -> Snapshot {
    let mut host = small_host();
    for link in &mut host.links {
        if let LinkKind::Vxlan(device) = &mut link.kind {
            device.local = Some(V6);
            change(device);
        }
    }
    host.addresses.push(Address {
        ifindex: ETH0,
        address: V6,
    });
    host.neighbours.push(neighbour(ETH0, GATEWAY_V6, 6));
    host
}

/// The same with mac(1) behind REMOTE1_V6.
fn host(change: impl Fn(&mut VxlanDevice)) -> Sim {
    let mut sim = Sim::started(snapshot(change));
    sim.apply(behind_remote(BR0, VX0, mac(1), REMOTE1_V6));
    sim
}

fn slot(sim: &Sim) -> Remote {
    match sim.place(100, mac(1)) {
        Some(Place::Remote(slot)) => sim.tables.remotes[&slot],
        other => panic!("{other:?}: {}", sim.reason(100, mac(1))),
    }
}

#[test]
fn ipv6_header_is_what_the_device_would_write() {
    let remote = slot(&host(|_| {}));
    let mut header = vec![
        0x06, 0, 0, 0, 0, 6, 0x0a, 0, 0, 0, 0, 2, 0x86, 0xdd, // Ethernet
        0x60, 0, 0, 0, 0, 0, 17, 64, // IPv6
        0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, // source
        0x20, 0x01, 0x0d, 0xb8, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, // destination
        0, 0, 0x12, 0xb5, 0, 0, 0, 0, // UDP
    ];
    // Addresses and protocol as the pseudo header of RFC 8200 section 8.1 has them.
    let mut pseudo = header[22..54].to_vec();
    pseudo.extend([0, 17]);
    header.resize(112, 0);
    assert_eq!(
        remote,
        Remote {
            ifindex: ETH0,
            flags: REMOTE_V6 | REMOTE_UDP_CHECKSUM | REMOTE_NO_PORT_RANGE,
            ip_sum: checksum::bytes(&pseudo),
            vni_word: 0,
            port_min: 49152,
            port_count: 16384,
            header: header.try_into().unwrap(),
        }
    );
}

#[test]
fn r28_r29_ipv6_header_follows_the_device() {
    let remote = slot(&host(|device| {
        device.udp_port = 8472;
        device.ttl = 9;
        device.tos = 0xb8;
        // Of IPv4 alone.
        device.df = 1;
        device.flow_label = 0xabcde;
        device.udp6_zero_checksum_tx = true;
        device.udp_checksum = true;
    }));
    assert_eq!(remote.flags, REMOTE_V6 | REMOTE_NO_PORT_RANGE);
    assert_eq!(remote.header[14..22], [0x6b, 0x8a, 0xbc, 0xde, 0, 0, 17, 9]);
    assert_eq!(remote.header[56..58], 8472u16.to_be_bytes());
    // The label belongs to no IPv4 header.
    let v4 = super::remotes::host(|device| device.flow_label = 0xabcde);
    assert_eq!(super::remotes::slot(&v4, 1).header[14..18], [0x45, 0, 0, 0]);
}

#[test]
fn r28_r34_inherited_fields_are_left_to_the_programs() {
    let inherit = |device: &mut VxlanDevice| {
        device.ttl_inherit = true;
        // What the device had before `ttl inherit` counts no longer.
        device.ttl = 9;
        device.tos = 1;
        device.df = 2;
    };
    let flags = REMOTE_TOS_INHERIT | REMOTE_TTL_INHERIT | REMOTE_NO_PORT_RANGE;
    let v4 = super::remotes::slot(&super::remotes::host(inherit), 1);
    assert_eq!(v4.flags, flags | REMOTE_DF_INHERIT);
    assert_eq!((v4.header[15], v4.header[20], v4.header[22]), (0, 0, 64));
    let v6 = slot(&host(inherit));
    assert_eq!(v6.flags, flags | REMOTE_V6 | REMOTE_UDP_CHECKSUM);
    assert_eq!(v6.header[14..22], [0x60, 0, 0, 0, 0, 0, 17, 64]);
    // Only 1 means "inherit"; the ECN bits are never the device's.
    let odd = slot(&host(|device| device.tos = 3));
    assert_eq!((odd.flags & REMOTE_TOS_INHERIT, odd.header[15]), (0, 0));
}

#[test]
fn hop_limit_is_the_devices_or_the_routes_or_the_underlays() {
    let cases = [
        (0, None, None, 64),
        (0, None, Some(33), 33),
        (0, Some(7), Some(33), 7),
    ];
    for (ttl, of_route, of_underlay, expected) in
        cases.into_iter().chain([(5, Some(7), Some(33), 5)])
    {
        let mut host = snapshot(|device| device.ttl = ttl);
        for link in host.links.iter_mut().filter(|link| link.ifindex == ETH0) {
            link.hop_limit_v6 = of_underlay;
        }
        let mut sim = Sim::started(host);
        let route = Route {
            hop_limit: of_route,
            ..via(ETH0, GATEWAY_V6)
        };
        sim.routes.insert(REMOTE1_V6, Some(route));
        sim.apply(behind_remote(BR0, VX0, mac(1), REMOTE1_V6));
        assert_eq!(slot(&sim).header[21], expected);
    }
}

#[test]
fn ipv6_headers_take_70_bytes_of_the_underlay() {
    let mut large = snapshot(|_| {});
    large.links.iter_mut().for_each(|link| link.mtu = 1500);
    let tunnel = |sim: &Sim| sim.tables.ports[&PortKey::new(TAP0, 0)].tunnel_max_bytes;
    assert_eq!(tunnel(&Sim::started(large)), 1430 + 14);
    let mut v4 = small_host();
    v4.links.iter_mut().for_each(|link| link.mtu = 1500);
    assert_eq!(tunnel(&Sim::started(v4)), 1450 + 14);
}

#[test]
fn r29_r30_zero_checksums_are_taken_where_the_device_says_so() {
    let key = VniKey::v6(vni(100), 4789);
    let flags = |sim: &Sim| sim.tables.segments[&key].flags;
    assert_eq!(flags(&host(|_| {})), 0);
    let sim = host(|device| device.udp6_zero_checksum_rx = true);
    assert_eq!(flags(&sim), SEGMENT_ZERO_CHECKSUM);
    assert_eq!(sim.tables.segments[&key].local, LOCAL_V6.octets());
    // IPv4 takes them always.
    let v4 = super::remotes::host(|device| device.udp6_zero_checksum_rx = true);
    assert_eq!(v4.tables.segments[&VniKey::v4(vni(100), 4789)].flags, 0);
}

#[test]
fn both_families_work_side_by_side_with_equal_vni_and_port() {
    let mut host = snapshot(|_| {});
    host.links.extend([
        bridge(BR1, "br1"),
        vxlan(VX1, "vxlan100v4", vxlan_device(100), BR1),
        tap(TAP2, "tap2", BR1),
    ]);
    let mut sim = Sim::started(host);
    sim.apply(behind_remote(BR0, VX0, mac(1), REMOTE1_V6));
    sim.apply(behind_remote(BR1, VX1, mac(1), REMOTE1));
    let segments = &sim.tables.segments;
    let ids = [VniKey::v6, VniKey::v4].map(|key| segments[&key(vni(100), 4789)].id);
    assert_ne!(ids[0], ids[1]);
    let rows = sim.model.fdb_rows(Some(vni(100)), None);
    let accelerated = rows.iter().filter(|row| row.accelerated).count();
    assert_eq!((rows.len(), accelerated), (2, 2), "{rows:?}");
    let remotes: Vec<IpAddr> = sim.model.remotes().iter().map(|row| row.remote).collect();
    assert_eq!(remotes, [REMOTE1, REMOTE1_V6]);
    let locals: Vec<_> = sim.model.remotes().iter().map(|row| row.local).collect();
    assert_eq!(locals, [Some(LOCAL.into()), Some(V6)]);
}

#[test]
fn a_device_without_addresses_is_of_the_family_of_its_entries() {
    let mut host = snapshot(|device| {
        device.local = None;
        device.link = Some(ETH0);
    });
    host.addresses.push(Address {
        ifindex: ETH0,
        address: "fe80::1".parse().unwrap(),
    });
    let mut sim = Sim::started(host.clone());
    assert!(
        sim.tables
            .segments
            .contains_key(&VniKey::v4(vni(100), 4789))
    );
    sim.apply(behind_remote(BR0, VX0, mac(1), REMOTE1_V6));
    let keys: Vec<VniKey> = sim.tables.segments.keys().copied().collect();
    assert_eq!(keys, [VniKey::v6(vni(100), 4789)]);
    // Of its two addresses on the link the one that is not link-local.
    assert_eq!(slot(&sim).header[22..38], LOCAL_V6.octets());
    host.fdb = vec![tunnelled(VX0, mac(1), REMOTE1_V6)];
    let sim = Sim::started(host.clone());
    assert!(
        sim.tables
            .segments
            .contains_key(&VniKey::v6(vni(100), 4789))
    );
    host.addresses.retain(|address| address.address != V6);
    let sim = Sim::started(host);
    let reason = sim.model.segment(vni(100)).unwrap().reason;
    assert_eq!(
        reason.unwrap(),
        "no local address: eth0 has no IPv6 address"
    );
}

#[test]
fn link_local_addresses_work_where_entry_and_device_name_them() {
    let (here, there) = ["fe80::1", "fe80::2"]
        .map(|ip| ip.parse::<IpAddr>().unwrap())
        .into();
    let mut host = snapshot(|device| {
        device.local = Some(here);
        device.link = Some(ETH0);
    });
    host.neighbours.push(neighbour(ETH0, there, 2));
    let mut sim = Sim::started(host);
    let entry = FdbEntry {
        via: Some(ETH0),
        ..tunnelled(VX0, mac(1), there)
    };
    for event in [Event::Fdb(entry), Event::Fdb(bridged(BR0, VX0, mac(1)))] {
        sim.model.apply(event);
    }
    let queries = sim.model.wanted_routes();
    assert_eq!((queries.len(), queries[0].link), (1, Some(ETH0)));
    assert_eq!(queries[0].source, Some(here));
    let on_link = Route {
        gateway: None,
        ..via(ETH0, GATEWAY_V6)
    };
    sim.model.route(&queries[0], Some(on_link));
    sim.run();
    assert_eq!(
        slot(&sim).header[..6],
        neighbour(ETH0, there, 2).mac.unwrap().0
    );
}

/// vxlan_xmit_one asks with the entry's own device; that of the VXLAN device
/// only chooses the VRF.
#[test]
fn routes_lead_through_the_device_of_the_entry_or_the_vrf() {
    const VRF: IfIndex = 50;
    let mut host = snapshot(|device| device.link = Some(ETH0));
    let ask = |host: &Snapshot, entry: FdbEntry| {
        let mut model = Model::new(Settings::default());
        model.replace(host.clone());
        model.apply(Event::Fdb(entry));
        model.apply(Event::Fdb(bridged(BR0, VX0, mac(1))));
        model.wanted_routes()[0].link
    };
    let plain = tunnelled(VX0, mac(1), REMOTE1_V6);
    let fixed = FdbEntry {
        via: Some(ETH1),
        ..plain.clone()
    };
    assert_eq!(ask(&host, plain.clone()), None);
    assert_eq!(ask(&host, fixed.clone()), Some(ETH1));
    for link in host.links.iter_mut().filter(|link| link.ifindex == ETH0) {
        link.master = Some(VRF);
    }
    host.links
        .push(link(VRF, "red", LinkKind::Other("vrf".to_owned())));
    assert_eq!(ask(&host, plain), Some(VRF));
    assert_eq!(ask(&host, fixed), Some(ETH1));
}

#[test]
fn addresses_that_mean_ipv4_are_no_remotes() {
    let mut sim = host(|_| {});
    for address in ["::ffff:198.51.100.1", "::198.51.100.1", "::1", "ff02::1"] {
        sim.apply(behind_remote(BR0, VX0, mac(2), address.parse().unwrap()));
        assert_eq!(sim.place(100, mac(2)), Some(Place::Kernel), "{address}");
    }
}
