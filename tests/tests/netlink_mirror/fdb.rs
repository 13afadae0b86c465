//! Forwarding entries of bridges and VXLAN devices, read and written.

use std::collections::BTreeSet;

use serde_json::Value;
use vtep_common::Vni;
use vtep_user::kernel::{FdbEntry, FdbTable, LinkKind, bits};
use vtep_user::netlink::FdbWrite;

use crate::harness::*;

/// Every kind of entry that mirrors elsewhere lose (F22).
const ENTRIES: &str = "
    bridge fdb add 00:00:00:00:00:07 dev va master static
    bridge fdb add 00:1b:21:00:00:01 dev vx master static
    bridge fdb add 02:00:00:00:00:02 dev va master dynamic
    bridge fdb add 02:00:00:00:00:03 dev va master permanent
    bridge fdb add 02:00:00:00:00:04 dev vx master dynamic extern_learn
    bridge fdb add 02:00:00:00:00:05 dev va master static sticky
    bridge fdb add 02:00:00:00:00:06 dev br0 self
    bridge fdb add 00:1b:21:00:00:01 dev vx self dst 198.51.100.1
    bridge fdb add 02:00:00:00:00:08 dev vx self dst 198.51.100.2 dynamic
    bridge fdb add 02:00:00:00:00:04 dev vx self dst 198.51.100.3 extern_learn
    bridge fdb add 02:00:00:00:00:09 dev vx self dst 198.51.100.4 port 8472 vni 300
    bridge fdb add 02:00:00:00:00:0a dev vx self dst 198.51.100.5 via vb
    bridge fdb append 00:00:00:00:00:00 dev vx self dst 198.51.100.6
    bridge fdb append 00:00:00:00:00:00 dev vx self dst 198.51.100.7
    bridge fdb append 00:00:00:00:00:00 dev vx self dst 198.51.100.7 port 4790 vni 7
    bridge fdb append 01:00:5e:00:00:fb dev vx self dst 198.51.100.6
    bridge fdb append 01:00:5e:00:00:fb dev vx self dst 198.51.100.7
    ip nexthop add id 10 via 198.51.100.9 fdb
    ip nexthop add id 11 group 10 fdb
    bridge fdb add 02:00:00:00:00:0b dev vx self nhid 11
    bridge fdb add 02:00:00:00:00:0c dev vb self";

/// An entry as `bridge -j fdb show` tells it.
type Told = (
    String,
    String,
    Option<String>,
    Option<String>,
    u64,
    u64,
    u64,
    String,
    bool,
    bool,
);

fn told_by_bridge() -> BTreeSet<Told> {
    let list: Value = serde_json::from_str(&output_of("bridge -j fdb show")).expect("JSON");
    let list = list.as_array().expect("list");
    list.iter()
        .filter(|entry| {
            let vxlan = ["vx", "single", "v6"]
                .iter()
                .any(|name| entry["ifname"] == *name);
            // The receive filters of all other devices.
            entry["master"].is_string() || vxlan
        })
        .map(|entry| {
            let text = |key: &str| entry[key].as_str().map(str::to_owned);
            let number = |key: &str| entry[key].as_u64().unwrap_or(0);
            let flag = |flag: &str| {
                entry["flags"]
                    .as_array()
                    .is_some_and(|flags| flags.iter().any(|f| f == flag))
            };
            (
                text("ifname").unwrap(),
                text("mac").unwrap(),
                text("master"),
                text("dst"),
                number("port"),
                number("vni") + (number("src_vni") << 32),
                number("nhid"),
                text("state").unwrap_or_default(),
                flag("extern_learn"),
                flag("sticky"),
            )
        })
        .collect()
}

fn told_by(mirror: &Mirror, fdb: &[FdbEntry]) -> BTreeSet<Told> {
    let name = |ifindex| mirror.links[&ifindex].name.clone();
    fdb.iter()
        .map(|entry| {
            let vni = |vni: Option<Vni>| vni.map_or(0, |vni| u64::from(vni.get()));
            let state = match entry.state {
                state if state & bits::NUD_PERMANENT != 0 => "permanent",
                state if state & bits::NUD_NOARP != 0 => "static",
                bits::NUD_STALE => "stale",
                _ => "",
            };
            (
                name(entry.ifindex),
                entry.mac.to_string(),
                entry.bridge.map(name),
                entry.dst.map(|dst| dst.to_string()),
                entry.udp_port.unwrap_or(0).into(),
                vni(entry.vni) + (vni(entry.source_vni) << 32),
                entry.nexthop_id.unwrap_or(0).into(),
                state.to_owned(),
                entry.flags & bits::NTF_EXT_LEARNED != 0,
                entry.flags & bits::NTF_STICKY != 0,
            )
        })
        .collect()
}

/// Polled, since the namespace's own traffic is being learned meanwhile.
async fn mirror_agrees(mirror: &mut Mirror) {
    let end = std::time::Instant::now() + DEADLINE;
    loop {
        let kernel = told_by_bridge();
        let wait = std::time::Duration::from_millis(20);
        while let Ok(events) = tokio::time::timeout(wait, mirror.events.next()).await {
            events
                .expect("events")
                .into_iter()
                .for_each(|event| mirror.apply(event));
        }
        let mirrored = told_by(mirror, &mirror.fdb);
        if mirrored == kernel {
            return;
        }
        assert!(
            std::time::Instant::now() < end,
            "only mirrored: {:?}\nonly in the kernel: {:?}",
            mirrored.difference(&kernel).collect::<Vec<_>>(),
            kernel.difference(&mirrored).collect::<Vec<_>>()
        );
    }
}

#[test]
fn every_kind_of_entry_arrives_as_an_event_and_goes_as_one() {
    in_namespace(|| async {
        segment();
        let mut mirror = Mirror::start().await;
        sh(ENTRIES);
        mirror_agrees(&mut mirror).await;
        let (vx, va, br0, vb) = (
            mirror.index("vx"),
            mirror.index("va"),
            mirror.index("br0"),
            mirror.index("vb"),
        );

        let both = mirror.entries("00:1b:21:00:00:01");
        assert_eq!(both.len(), 2, "one entry in each table: {both:?}");
        let bridge = both.iter().find(|e| e.table == FdbTable::Bridge).unwrap();
        assert_eq!(
            (bridge.ifindex, bridge.bridge, bridge.dst),
            (vx, Some(br0), None)
        );
        let vxlan = both.iter().find(|e| e.table == FdbTable::Vxlan).unwrap();
        assert_eq!((vxlan.ifindex, vxlan.bridge), (vx, None));
        assert_eq!(vxlan.dst, Some("198.51.100.1".parse().unwrap()));
        assert_eq!((vxlan.udp_port, vxlan.vni, vxlan.via), (None, None, None));

        let far = mirror.entries("02:00:00:00:00:09")[0];
        assert_eq!((far.udp_port, far.vni), (Some(8472), Vni::new(300)));
        assert_eq!(mirror.entries("02:00:00:00:00:0a")[0].via, Some(vb));
        assert_eq!(mirror.entries("02:00:00:00:00:0b")[0].nexthop_id, Some(11));
        assert_eq!(mirror.entries("02:00:00:00:00:0b")[0].dst, None);
        assert_eq!(mirror.entries("00:00:00:00:00:00").len(), 3);
        assert_eq!(mirror.entries("01:00:5e:00:00:fb").len(), 2);
        let own = mirror.entries("02:00:00:00:00:06")[0];
        assert_eq!(
            (own.ifindex, own.bridge, own.table),
            (br0, Some(br0), FdbTable::Bridge)
        );
        let dynamic = mirror.entries("02:00:00:00:00:02")[0];
        assert_eq!(dynamic.state & (bits::NUD_PERMANENT | bits::NUD_NOARP), 0);
        assert_eq!(dynamic.ifindex, va);
        assert!(
            mirror.entries("02:00:00:00:00:0c").is_empty(),
            "a receive filter of veth"
        );

        // A fresh dump says the same.
        let snapshot = mirror.netlink.snapshot().await.unwrap();
        assert_eq!(told_by(&mirror, &snapshot.fdb), told_by_bridge());

        // One destination of several, a replaced one, and whole entries.
        sh(
            "bridge fdb del 00:00:00:00:00:00 dev vx self dst 198.51.100.6
            bridge fdb replace 02:00:00:00:00:08 dev vx self dst 198.51.100.77
            bridge fdb replace 02:00:00:00:00:02 dev vx master dynamic
            bridge fdb del 02:00:00:00:00:09 dev vx self
            bridge fdb del 01:00:5e:00:00:fb dev vx self
            bridge fdb del 02:00:00:00:00:05 dev va master",
        );
        mirror_agrees(&mut mirror).await;
        let moved = mirror.entries("02:00:00:00:00:08");
        assert_eq!(
            (moved.len(), moved[0].dst),
            (1, Some("198.51.100.77".parse().unwrap()))
        );
        assert_eq!(mirror.entries("02:00:00:00:00:02")[0].ifindex, vx);

        sh("ip link set va nomaster");
        mirror_agrees(&mut mirror).await;
        sh("ip link del vx");
        mirror.until("vx is gone", |m| m.link("vx").is_none()).await;
        mirror_agrees(&mut mirror).await;
        sh("ip link del br0");
        mirror
            .until("br0 is gone", |m| m.link("br0").is_none())
            .await;
        assert!(mirror.fdb.is_empty(), "{:?}", mirror.fdb);
    });
}

#[test]
fn the_single_vxlan_device_tells_the_segment_of_each_entry() {
    in_namespace(|| async {
        sh(
            "ip link add single type vxlan external vnifilter local 192.0.2.1 dstport 4789
            ip link set single up
            bridge vni add vni 100 dev single
            bridge fdb add 02:00:00:00:00:01 dev single self dst 198.51.100.1 src_vni 100
            bridge fdb append 00:00:00:00:00:00 dev single self dst 198.51.100.1 src_vni 100",
        );
        let mut mirror = Mirror::start().await;
        assert_eq!(
            mirror.entries("02:00:00:00:00:01")[0].source_vni,
            Vni::new(100)
        );
        sh("bridge fdb add 02:00:00:00:00:01 dev single self dst 198.51.100.2 src_vni 200 vni 201");
        mirror_agrees(&mut mirror).await;
        let second = &mirror.entries("02:00:00:00:00:01")[1];
        assert_eq!(
            (second.source_vni, second.vni),
            (Vni::new(200), Vni::new(201))
        );
    });
}

#[test]
fn ipv6_destinations_come_through() {
    in_namespace(|| async {
        sh("ip link add v6 type vxlan id 6 local 2001:db8::1 dstport 4789; ip link set v6 up");
        let mut mirror = Mirror::start().await;
        sh("bridge fdb add 00:00:00:00:00:01 dev v6 self dst 2001:db8::9");
        mirror_agrees(&mut mirror).await;
        let entry = mirror.entries("00:00:00:00:00:01")[0];
        assert_eq!(entry.dst, Some("2001:db8::9".parse().unwrap()));
    });
}

#[test]
fn what_traffic_teaches_the_bridge_arrives_as_an_event() {
    in_namespace(|| async {
        segment();
        let mut mirror = Mirror::start().await;
        sh("ip link set vb address 02:00:00:00:00:42; ip neigh add 192.0.2.9 lladdr 02:00:00:00:00:99 dev vb
            ping -c 1 -W 1 192.0.2.9 >/dev/null || true");
        let va = mirror.index("va");
        mirror
            .until("the source address is learned", |m| {
                m.entries("02:00:00:00:00:42")
                    .iter()
                    .any(|e| e.ifindex == va)
            })
            .await;
        mirror_agrees(&mut mirror).await;
    });
}

fn bridge_entry(mirror: &Mirror, port: &str, address: &str, state: u16) -> FdbEntry {
    FdbEntry {
        table: FdbTable::Bridge,
        ifindex: mirror.index(port),
        bridge: Some(mirror.index("br0")),
        mac: mac(address),
        vlan: None,
        dst: None,
        udp_port: None,
        vni: None,
        source_vni: None,
        via: None,
        nexthop_id: None,
        state,
        flags: 0,
    }
}

fn vxlan_entry(mirror: &Mirror, address: &str, dst: &str) -> FdbEntry {
    FdbEntry {
        table: FdbTable::Vxlan,
        bridge: None,
        dst: Some(dst.parse().unwrap()),
        flags: bits::NTF_SELF,
        ..bridge_entry(mirror, "vx", address, bits::NUD_NOARP | bits::NUD_PERMANENT)
    }
}

#[test]
fn written_entries_are_in_the_kernel_and_deleted_ones_are_not() {
    in_namespace(|| async {
        segment();
        sh("ip nexthop add id 10 via 198.51.100.9 fdb; ip nexthop add id 11 group 10 fdb");
        let mut mirror = Mirror::start().await;
        let netlink = mirror.netlink.clone();
        let (vb, br0) = (mirror.index("vb"), mirror.index("br0"));
        let zero = "00:00:00:00:00:00";
        let written = [
            bridge_entry(&mirror, "va", "00:00:00:00:00:07", bits::NUD_NOARP),
            bridge_entry(&mirror, "vx", "02:00:00:00:00:01", bits::NUD_REACHABLE),
            bridge_entry(&mirror, "va", "02:00:00:00:00:02", bits::NUD_PERMANENT),
            FdbEntry {
                flags: bits::NTF_EXT_LEARNED,
                ..bridge_entry(&mirror, "vx", "02:00:00:00:00:03", bits::NUD_REACHABLE)
            },
            FdbEntry {
                ifindex: br0,
                ..bridge_entry(&mirror, "va", "02:00:00:00:00:04", bits::NUD_PERMANENT)
            },
            vxlan_entry(&mirror, "02:00:00:00:00:01", "198.51.100.1"),
            FdbEntry {
                udp_port: Some(8472),
                vni: Vni::new(300),
                via: Some(vb),
                flags: bits::NTF_SELF | bits::NTF_EXT_LEARNED,
                ..vxlan_entry(&mirror, "02:00:00:00:00:03", "198.51.100.2")
            },
            FdbEntry {
                dst: None,
                nexthop_id: Some(11),
                ..vxlan_entry(&mirror, "02:00:00:00:00:05", "198.51.100.1")
            },
        ];
        for entry in &written {
            netlink.fdb_write(entry, FdbWrite::Add).await.unwrap();
            if entry.table == FdbTable::Bridge && entry.flags & bits::NTF_EXT_LEARNED != 0 {
                continue;
            }
            let again = netlink.fdb_write(entry, FdbWrite::Add).await;
            let again = again.expect_err(&format!("twice: {entry:?}"));
            assert_eq!(again.errno(), Some(libc::EEXIST), "{again}");
        }
        for dst in ["198.51.100.6", "198.51.100.7"] {
            let entry = vxlan_entry(&mirror, zero, dst);
            netlink.fdb_write(&entry, FdbWrite::Append).await.unwrap();
        }
        mirror_agrees(&mut mirror).await;
        for entry in &written {
            assert!(
                mirror.fdb.contains(entry),
                "{entry:?} not in {:#?}",
                mirror.fdb
            );
        }
        assert_eq!(mirror.entries(zero).len(), 2);

        // To another remote, and to another port: one replaced entry, no second one.
        let moved = vxlan_entry(&mirror, "02:00:00:00:00:01", "198.51.100.9");
        netlink.fdb_write(&moved, FdbWrite::Replace).await.unwrap();
        let port = bridge_entry(&mirror, "va", "02:00:00:00:00:01", bits::NUD_REACHABLE);
        netlink.fdb_write(&port, FdbWrite::Replace).await.unwrap();
        mirror_agrees(&mut mirror).await;
        assert_eq!(mirror.entries("02:00:00:00:00:01"), [&moved, &port]);

        let refused = netlink
            .fdb_write(
                &vxlan_entry(&mirror, zero, "198.51.100.8"),
                FdbWrite::Replace,
            )
            .await;
        let refused = refused.unwrap_err();
        let text = refused.to_string();
        assert!(
            text.starts_with(&format!(
                "cannot replace vxlan entry {zero} on vx dst 198.51.100.8: "
            )),
            "{text}"
        );
        assert_eq!(refused.errno(), Some(libc::EOPNOTSUPP), "{text}");

        for entry in mirror.fdb.clone() {
            let device = &mirror.links[&entry.ifindex];
            let own = device.mac == Some(entry.mac);
            // The bridge's own address sits with its ports, and is not ours to take.
            if !own && !matches!((&device.kind, entry.dst), (LinkKind::Veth, Some(_))) {
                netlink.fdb_delete(&entry).await.unwrap();
            }
        }
        mirror_agrees(&mut mirror).await;
        assert!(mirror.entries(zero).is_empty());
        let gone = netlink.fdb_delete(&written[0]).await.unwrap_err();
        assert_eq!(gone.errno(), Some(libc::ENOENT), "{gone}");
    });
}
