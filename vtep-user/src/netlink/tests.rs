//! Recorded kernel messages (captured.txt), the same ones damaged, and any bytes
//! at all, through the decoders.

use proptest::prelude::*;
use vtep_common::{MacAddr, Vni};

use super::codec::{messages, *};
use super::decode::{Notice, Part, address, fdb_entry, neighbour, notice, route};
use super::link::link;
use super::vlan::{vlans, vnis};
use crate::kernel::{
    Address, Bridge, BridgePort, Event, FdbEntry, FdbTable, Link, LinkKind, Neighbour, Route, Tun,
    VlanRange, VniRange, VxlanDevice, bits,
};

/// The recorded message of that name, with its header.
pub(super) fn captured(name: &str) -> Vec<u8> {
    let text = include_str!("captured.txt");
    let mut lines = text.lines().skip_while(|line| *line != name);
    assert!(lines.next().is_some(), "no capture named {name}");
    let hex: String = lines
        .take_while(|line| !line.is_empty())
        .filter(|line| !line.starts_with('#'))
        .collect();
    (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hex"))
        .collect()
}

/// Type and body of a recorded message.
fn parts(bytes: &[u8]) -> (u16, &[u8]) {
    let all: Vec<_> = messages(bytes).collect();
    assert_eq!(all.len(), 1);
    (all[0].kind, all[0].body)
}

fn captured_link(name: &str) -> Link {
    let bytes = captured(name);
    let (kind, body) = parts(&bytes);
    let link = link(body).expect("a complete link");
    assert_eq!(
        notice(kind, body),
        Some(Notice::Fact(Event::Link(link.clone())))
    );
    link
}

fn captured_event(name: &str) -> Option<Event> {
    let bytes = captured(name);
    let (kind, body) = parts(&bytes);
    match notice(kind, body) {
        Some(Notice::Fact(event)) => Some(event),
        Some(Notice::Partial(part)) => panic!("{name}: {part:?} only"),
        None => None,
    }
}

fn captured_entry(name: &str) -> FdbEntry {
    match captured_event(name) {
        Some(Event::Fdb(entry) | Event::FdbGone(entry)) => entry,
        other => panic!("{name}: {other:?}"),
    }
}

const PLAIN_PORT: BridgePort = BridgePort {
    state: 3,
    learning: true,
    unicast_flood: true,
    hairpin: false,
    isolated: false,
    locked: false,
    mab: false,
    neigh_suppress: false,
    neigh_vlan_suppress: false,
    vlan_tunnel: false,
    proxy_arp: false,
    backup_port: None,
};

#[test]
fn a_vxlan_device_in_a_bridge_is_read_whole() {
    assert_eq!(
        captured_link("link-vxlan-port"),
        Link {
            ifindex: 5,
            name: "vx".into(),
            mac: Some(MacAddr([2, 0, 0, 0, 0, 5])),
            mtu: 1450,
            up: true,
            loopback: false,
            master: Some(2),
            kind: LinkKind::Vxlan(Box::new(VxlanDevice {
                vni: Vni::new(100).unwrap(),
                local: Some([192, 0, 2, 1].into()),
                group: Some([192, 0, 2, 9].into()),
                link: Some(3),
                udp_port: 4789,
                source_ports: (50000, 60000),
                learning: true,
                ageing_s: 77,
                ttl: 17,
                ttl_inherit: false,
                tos: 4,
                df: 1,
                udp_checksum: false,
                udp6_zero_checksum_tx: false,
                udp6_zero_checksum_rx: false,
                flow_label: 0,
                collect_metadata: false,
                vnifilter: false,
                foreign_options: vec![],
            })),
            bridge_port: Some(BridgePort {
                learning: false,
                isolated: true,
                locked: true,
                neigh_suppress: true,
                ..PLAIN_PORT
            }),
            xdp: None,
            hop_limit_v6: Some(64),
        }
    );
}

#[test]
fn options_that_are_not_mirrored_are_named() {
    let LinkKind::Vxlan(device) = captured_link("link-vxlan-v6").kind else {
        panic!()
    };
    let mut foreign = device.foreign_options.clone();
    foreign.sort_unstable();
    // GBP takes bits that an ordinary device has in its mask of ignored ones.
    assert_eq!(
        foreign,
        ["gbp", "l2miss", "l3miss", "proxy", "reserved_bits", "rsc"]
    );
    assert_eq!(device.local, Some("2001:db8::1".parse().unwrap()));
    assert!(device.ttl_inherit && device.tos & 1 == 1 && device.udp6_zero_checksum_tx);
}

#[test]
fn bridge_times_are_hundredths_of_a_second() {
    let LinkKind::Bridge(bridge) = captured_link("link-bridge").kind else {
        panic!()
    };
    let expected = Bridge {
        vlan_filtering: false,
        default_pvid: bridge.default_pvid,
        service_vlans: false,
        mst: false,
        ageing_ms: 15_000,
        nf_call: false,
    };
    assert_eq!(bridge, expected);
}

#[test]
fn loopback_and_tap_are_what_they_are() {
    let lo = captured_link("link-loopback");
    assert!(lo.loopback && lo.up && lo.mac.is_none() && lo.kind == LinkKind::Plain);
    let tap = captured_link("link-tap");
    assert_eq!(
        tap.kind,
        LinkKind::Tun(Tun {
            tap: true,
            vnet_hdr: true
        })
    );
    assert!(!tap.up);
}

#[test]
fn messages_about_a_port_never_pass_for_a_link_nor_for_its_end() {
    for name in ["port-flag", "port-left"] {
        let bytes = captured(name);
        let (kind, body) = parts(&bytes);
        assert_eq!(
            notice(kind, body),
            Some(Notice::Partial(Part::Link(4))),
            "{name}"
        );
    }
    assert!(matches!(
        captured_event("link-gone"),
        Some(Event::LinkGone(_))
    ));
}

#[test]
fn a_link_message_without_its_name_or_mtu_is_only_a_part() {
    // As wireless extensions send it: header and IFLA_WIRELESS.
    let bytes = captured("link-tap");
    let (kind, body) = parts(&bytes);
    let ifindex = u32::from_ne_bytes(body[4..8].try_into().unwrap());
    let mut partial = body[..16].to_vec();
    partial.extend_from_slice(&[8, 0, 11, 0, 1, 2, 3, 4]);
    assert_eq!(
        notice(kind, &partial),
        Some(Notice::Partial(Part::Link(ifindex)))
    );
}

#[test]
fn bridge_entries_are_read_in_all_their_forms() {
    let entry = FdbEntry {
        table: FdbTable::Bridge,
        ifindex: 4,
        bridge: Some(2),
        mac: MacAddr([0, 0, 0, 0, 0, 7]),
        vlan: None,
        dst: None,
        udp_port: None,
        vni: None,
        source_vni: None,
        via: None,
        nexthop_id: None,
        state: bits::NUD_NOARP,
        flags: 0,
    };
    assert_eq!(captured_entry("fdb-bridge-static"), entry);
    let on_vxlan = captured_entry("fdb-bridge-on-vxlan-port");
    assert_eq!(on_vxlan.mac, MacAddr([0, 0x1b, 0x21, 0, 0, 1]));
    assert_eq!(
        (on_vxlan.table, on_vxlan.ifindex, on_vxlan.dst),
        (FdbTable::Bridge, 5, None)
    );
    assert_eq!(on_vxlan.flags, bits::NTF_EXT_LEARNED);
    let own = captured_entry("fdb-bridge-own");
    assert_eq!(
        (own.ifindex, own.bridge, own.state),
        (2, Some(2), bits::NUD_PERMANENT)
    );

    // VLAN 1, which a VLAN-aware bridge adds as NDA_VLAN.
    let mut tagged = captured("fdb-bridge-static");
    tagged.extend_from_slice(&[6, 0, libc::NDA_VLAN as u8, 0, 1, 0, 0, 0]);
    let length = tagged.len() as u32;
    tagged[..4].copy_from_slice(&length.to_ne_bytes());
    let (_, body) = parts(&tagged);
    assert_eq!(
        fdb_entry(body),
        Some(FdbEntry {
            vlan: Some(1),
            ..entry
        })
    );
}

#[test]
fn vxlan_entries_are_read_in_all_their_forms() {
    let entry = FdbEntry {
        table: FdbTable::Vxlan,
        ifindex: 5,
        bridge: None,
        mac: MacAddr([2, 0, 0, 0, 0, 9]),
        vlan: None,
        dst: Some([198, 51, 100, 4].into()),
        udp_port: Some(8472),
        vni: Vni::new(300),
        source_vni: None,
        via: Some(3),
        nexthop_id: None,
        state: bits::NUD_NOARP | bits::NUD_PERMANENT,
        flags: bits::NTF_SELF,
    };
    assert_eq!(captured_event("fdb-vxlan"), Some(Event::Fdb(entry.clone())));
    assert_eq!(
        captured_event("fdb-vxlan-gone"),
        Some(Event::FdbGone(entry))
    );
    let zero = captured_entry("fdb-vxlan-zero");
    assert_eq!(
        (zero.mac, zero.dst),
        (MacAddr::ZERO, Some([198, 51, 100, 6].into()))
    );
    assert_eq!(
        captured_entry("fdb-vxlan-v6").dst,
        Some("2001:db8::9".parse().unwrap())
    );
    let nexthop = captured_entry("fdb-vxlan-nexthop");
    assert_eq!((nexthop.nexthop_id, nexthop.dst), (Some(11), None));
    assert_eq!(captured_entry("fdb-vxlan-single").source_vni, Vni::new(100));
    // A veth's receive filter looks much the same.
    assert_eq!(captured_event("fdb-receive-filter"), None);
}

#[test]
fn neighbours_and_addresses_are_read() {
    let resolved = Neighbour {
        ifindex: 3,
        address: [192, 0, 2, 77].into(),
        mac: Some(MacAddr([0, 0, 0, 0, 0, 0x77])),
        state: bits::NUD_PERMANENT,
    };
    assert_eq!(
        captured_event("neighbour"),
        Some(Event::Neighbour(resolved))
    );
    let gone = captured_event("neighbour-v6-gone");
    let (Some(Event::Neighbour(n)) | Some(Event::NeighbourGone(n))) = gone else {
        panic!()
    };
    assert_eq!(
        n.address,
        "2001:db8::77".parse::<std::net::IpAddr>().unwrap()
    );
    let own = Address {
        ifindex: 3,
        address: [10, 7, 0, 1].into(),
    };
    assert_eq!(captured_event("address"), Some(Event::Address(own)));
}

#[test]
fn routes_are_read() {
    assert_eq!(captured_event("route"), Some(Event::RoutesChanged));
    let read = |name: &str| {
        let bytes = captured(name);
        route(parts(&bytes).1)
    };
    let gateway = Route {
        ifindex: 3,
        gateway: Some([192, 0, 2, 254].into()),
        source: Some([192, 0, 2, 1].into()),
        mtu: Some(1400),
        hop_limit: Some(9),
    };
    assert_eq!(read("route-gateway"), Some(gateway));
    let gateway = read("route-via-v6").unwrap().gateway;
    assert_eq!(gateway, Some("fe80::9".parse().unwrap()));
    assert_eq!(read("route-local"), None);
}

#[test]
fn vnis_of_a_single_device_are_read_and_changes_ask_for_them() {
    let dump = captured("vni-dump");
    let range = |first, last| VniRange { first, last };
    let expected = vec![range(100, 101), range(200, 201)];
    assert_eq!(vnis(parts(&dump).1), Some((6, expected)));
    let added = captured("vni-added");
    assert_eq!(vnis(parts(&added).1), Some((6, vec![range(201, 201)])));
    for name in ["vni-added", "vni-gone"] {
        let bytes = captured(name);
        let (kind, body) = parts(&bytes);
        let asked = Some(Notice::Partial(Part::Vnis(6)));
        assert_eq!(notice(kind, body), asked, "{name}");
    }
}

#[test]
fn vlans_of_a_port_are_read_and_changes_ask_for_them() {
    let range = |first, last, tunnel| VlanRange {
        first,
        last,
        pvid: false,
        untagged: false,
        state: 3,
        tunnel,
    };
    let pvid = VlanRange {
        pvid: true,
        untagged: true,
        ..range(1, 1, None)
    };
    let dump = captured("vlan-dump");
    let expected = vec![
        pvid,
        range(10, 10, Some(100)),
        range(11, 11, None),
        range(12, 12, Some(102)),
    ];
    assert_eq!(vlans(parts(&dump).1), Some((5, expected)));
    let mapped = captured("vlan-mapped");
    let expected = vec![range(10, 12, Some(100))];
    assert_eq!(vlans(parts(&mapped).1), Some((5, expected)));
    for (name, port) in [("vlan-mapped", 5), ("vlan-gone", 4)] {
        let bytes = captured(name);
        let (kind, body) = parts(&bytes);
        let asked = Some(Notice::Partial(Part::Vlans(port)));
        assert_eq!(notice(kind, body), asked, "{name}");
    }
}

fn every_decoder(kind: u16, body: &[u8]) {
    notice(kind, body);
    link(body);
    fdb_entry(body);
    neighbour(body);
    address(body);
    route(body);
    vlans(body);
    vnis(body);
    ip_of(body);
    text_of(body);
}

const NAMES: [&str; 14] = [
    "link-vxlan-port",
    "link-vxlan-v6",
    "link-bridge",
    "link-tap",
    "port-flag",
    "fdb-bridge-static",
    "fdb-vxlan",
    "fdb-vxlan-nexthop",
    "neighbour",
    "address",
    "route-gateway",
    "route-via-v6",
    "vlan-dump",
    "vni-dump",
];

#[test]
fn every_message_cut_at_every_length_is_taken() {
    for name in NAMES {
        let bytes = captured(name);
        let (kind, body) = parts(&bytes);
        for length in 0..body.len() {
            every_decoder(kind, &body[..length]);
        }
    }
}

proptest! {
    #[test]
    fn any_bytes_are_taken(kind: u16, bytes: Vec<u8>) {
        every_decoder(kind, &bytes);
        messages(&bytes).for_each(|message| every_decoder(message.kind, message.body));
    }

    #[test]
    fn damaged_messages_are_taken(
        which in 0..NAMES.len(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut bytes = captured(NAMES[which]);
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        messages(&bytes).for_each(|message| every_decoder(message.kind, message.body));
        every_decoder(libc::RTM_NEWLINK, &bytes[16..]);
        every_decoder(libc::RTM_NEWNEIGH, &bytes[16..]);
    }
}
