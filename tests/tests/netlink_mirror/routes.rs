//! Route lookups, neighbours and addresses.

use std::net::IpAddr;

use vtep_user::kernel::{Route, bits};

use crate::harness::*;

fn ip(text: &str) -> IpAddr {
    text.parse().expect("address")
}

/// `va` (192.0.2.1, 2001:db8::1) and `vb` (198.51.100.1) with routes of all types.
fn topology() {
    sh("ip link add va type veth peer name va-peer
        ip link add vb type veth peer name vb-peer
        for dev in va va-peer vb vb-peer; do ip link set $dev up; done
        ip addr add 192.0.2.1/24 dev va
        ip addr add 198.51.100.1/24 dev vb
        ip addr add 2001:db8::1/64 dev va nodad
        ip route add 203.0.113.0/24 via 192.0.2.254
        ip route add 203.0.113.64/26 via 192.0.2.253 src 198.51.100.1 mtu 1400 hoplimit 9
        ip route add 10.1.0.0/16 nexthop via 192.0.2.251 nexthop via 198.51.100.251
        ip route add 10.2.0.0/16 via inet6 fe80::9 dev va
        ip route add blackhole 10.3.0.0/16
        ip route add unreachable 10.4.0.0/16
        ip route add prohibit 10.5.0.0/16
        ip route add 2001:db8:1::/48 via 2001:db8::fe mtu 1380
        ip route add blackhole 2001:db8:3::/48
        ip route add unreachable 2001:db8:4::/48
        ip route add prohibit 2001:db8:5::/48
        ip -6 route add 2001:db8:6::/48 nexthop via 2001:db8::a nexthop via 2001:db8::b");
}

#[test]
fn routes_are_what_ip_route_get_says() {
    in_namespace(|| async {
        topology();
        let mirror = Mirror::start().await;
        let netlink = &mirror.netlink;
        let (va, vb) = (mirror.index("va"), mirror.index("vb"));
        let get = async |remote: &str| netlink.route(ip(remote), None, None).await.unwrap();
        let plain = Route {
            ifindex: va,
            gateway: None,
            source: Some(ip("192.0.2.1")),
            mtu: None,
            hop_limit: None,
        };
        assert_eq!(get("192.0.2.7").await, Some(plain.clone()));
        let gateway = Route {
            gateway: Some(ip("192.0.2.254")),
            ..plain.clone()
        };
        assert_eq!(get("203.0.113.1").await, Some(gateway));
        let metrics = Route {
            gateway: Some(ip("192.0.2.253")),
            source: Some(ip("198.51.100.1")),
            mtu: Some(1400),
            hop_limit: Some(9),
            ..plain.clone()
        };
        assert_eq!(get("203.0.113.65").await, Some(metrics));
        let through_v6 = Route {
            gateway: Some(ip("fe80::9")),
            ..plain.clone()
        };
        assert_eq!(get("10.2.0.1").await, Some(through_v6));
        for remote in ["10.1.0.1", "2001:db8:6::1"] {
            let path = get(remote).await.expect("one path of two");
            assert!(path.gateway.is_some(), "{path:?}");
            assert!([va, vb].contains(&path.ifindex));
        }
        let v6 = get("2001:db8:1::5").await.expect("IPv6 route");
        assert_eq!(
            (v6.ifindex, v6.gateway, v6.mtu),
            (va, Some(ip("2001:db8::fe")), Some(1380))
        );
        assert_eq!(v6.source, Some(ip("2001:db8::1")));
        assert_eq!(get("2001:db8::77").await.expect("on link").gateway, None);
    });
}

#[test]
fn what_cannot_be_reached_through_a_device_has_no_route() {
    in_namespace(|| async {
        topology();
        let mirror = Mirror::start().await;
        let cases = [
            "10.3.0.1",
            "10.4.0.1",
            "10.5.0.1",
            "172.16.0.1",
            "192.0.2.1",
            "127.0.0.1",
            "192.0.2.255",
            "224.0.0.5",
            "255.255.255.255",
            "2001:db8:3::1",
            "2001:db8:4::1",
            "2001:db8:5::1",
            "2001:db9::1",
            "2001:db8::1",
            "::1",
            "ff02::1",
        ];
        for remote in cases {
            let route = mirror.netlink.route(ip(remote), None, None).await.unwrap();
            assert_eq!(route, None, "{remote}");
        }
        // A device that is not there, and a source that is not ours.
        assert_eq!(
            mirror
                .netlink
                .route(ip("192.0.2.7"), Some(4242), None)
                .await
                .unwrap(),
            None
        );
        let foreign = mirror
            .netlink
            .route(ip("192.0.2.7"), None, Some(ip("8.8.8.8")))
            .await;
        assert_eq!(foreign.unwrap(), None);
    });
}

#[test]
fn link_source_and_rules_are_respected() {
    in_namespace(|| async {
        topology();
        sh("ip route add 10.9.0.0/16 via 192.0.2.254
            ip route add 10.9.0.0/16 via 198.51.100.254 metric 10 dev vb
            ip rule add from 198.51.100.1 lookup 77
            ip route add 10.9.0.0/16 via 198.51.100.250 table 77
            ip rule add ipproto udp to 10.8.0.0/16 lookup 78
            ip route add 10.8.0.0/16 via 198.51.100.249 table 78");
        let mirror = Mirror::start().await;
        let vb = mirror.index("vb");
        let gateway = async |remote: &str, link, source: Option<&str>| {
            let route = mirror
                .netlink
                .route(ip(remote), link, source.map(ip))
                .await
                .unwrap();
            route.and_then(|route| route.gateway)
        };
        assert_eq!(
            gateway("10.9.0.1", None, None).await,
            Some(ip("192.0.2.254"))
        );
        assert_eq!(
            gateway("10.9.0.1", Some(vb), None).await,
            Some(ip("198.51.100.254"))
        );
        let source = Some("198.51.100.1");
        assert_eq!(
            gateway("10.9.0.1", None, source).await,
            Some(ip("198.51.100.250"))
        );
        assert_eq!(
            gateway("10.8.0.1", None, None).await,
            Some(ip("198.51.100.249"))
        );
    });
}

#[test]
fn link_local_addresses_are_reached_through_the_named_link_only() {
    in_namespace(|| async {
        topology();
        sh("ip addr add fe80::1/64 dev va nodad
            ip addr add fe80::1/64 dev vb nodad
            ip route add 2001:db8:7::/48 via fe80::9 dev vb src 2001:db8::1
            ip route add 2001:db8:8::/48 via fe80::9 dev vb hoplimit 7");
        let mirror = Mirror::start().await;
        let (va, vb) = (mirror.index("va"), mirror.index("vb"));
        for (link, source) in [(va, Some("fe80::1")), (vb, Some("fe80::1")), (vb, None)] {
            let route = mirror
                .netlink
                .route(ip("fe80::9"), Some(link), source.map(ip));
            let route = route.await.unwrap().expect("on link");
            assert_eq!((route.ifindex, route.gateway), (link, None));
        }
        let source = Some(ip("2001:db8::1"));
        let route = mirror.netlink.route(ip("2001:db8:7::1"), None, source);
        let route = route
            .await
            .unwrap()
            .expect("next hop without a global address");
        assert_eq!((route.ifindex, route.gateway), (vb, Some(ip("fe80::9"))));
        let route = mirror.netlink.route(ip("2001:db8:8::1"), None, None);
        assert_eq!(route.await.unwrap().expect("metric").hop_limit, Some(7));
    });
}

#[test]
fn the_hop_limit_of_a_device_is_the_one_its_routes_use() {
    in_namespace(|| async {
        topology();
        sh("echo 33 > /proc/sys/net/ipv6/conf/va/hop_limit");
        let mirror = Mirror::start().await;
        let limit = |name| mirror.link(name).and_then(|link| link.hop_limit_v6);
        assert_eq!((limit("va"), limit("vb")), (Some(33), Some(64)));
    });
}

#[test]
fn every_change_of_routing_is_announced() {
    in_namespace(|| async {
        topology();
        let mut mirror = Mirror::start().await;
        for script in [
            "ip route add 10.20.0.0/16 via 192.0.2.254",
            "ip route change 10.20.0.0/16 via 192.0.2.253",
            "ip route del 10.20.0.0/16",
            "ip route add 2001:db8:20::/48 via 2001:db8::fe",
            "ip route del 2001:db8:20::/48",
            "ip rule add from 192.0.2.1 lookup 50",
            "ip rule del from 192.0.2.1 lookup 50",
            "ip -6 rule add from 2001:db8::1 lookup 50",
            "ip -6 rule del from 2001:db8::1 lookup 50",
            "ip nexthop add id 5 via 192.0.2.254 dev va",
            "ip nexthop replace id 5 via 192.0.2.253 dev va",
            "ip nexthop del id 5",
        ] {
            let before = mirror.routes_changed;
            sh(script);
            mirror.until(script, |m| m.routes_changed > before).await;
            // What trails behind must not be taken for the next one's.
            let wait = std::time::Duration::from_millis(20);
            while let Ok(events) = tokio::time::timeout(wait, mirror.events.next()).await {
                events
                    .unwrap()
                    .into_iter()
                    .for_each(|event| mirror.apply(event));
            }
        }
    });
}

#[test]
fn addresses_come_and_go() {
    in_namespace(|| async {
        topology();
        let mut mirror = Mirror::start().await;
        let va = mirror.index("va");
        let has = move |m: &Mirror, address: &str| {
            m.addresses
                .iter()
                .any(|a| (a.ifindex, a.address) == (va, ip(address)))
        };
        assert!(has(&mirror, "192.0.2.1") && has(&mirror, "2001:db8::1"));
        // Our end of a point-to-point address, not the peer's.
        sh("ip addr add 10.7.0.1 peer 10.7.0.2 dev va; ip addr add 2001:db8::2/64 dev va nodad");
        mirror
            .until("new addresses", |m| {
                has(m, "10.7.0.1") && has(m, "2001:db8::2")
            })
            .await;
        assert!(!has(&mirror, "10.7.0.2"));
        sh("ip addr del 10.7.0.1 peer 10.7.0.2 dev va; ip addr del 2001:db8::2/64 dev va");
        mirror
            .until("gone", |m| !has(m, "10.7.0.1") && !has(m, "2001:db8::2"))
            .await;
    });
}

#[test]
fn neighbours_come_change_and_go_in_both_families() {
    in_namespace(|| async {
        topology();
        let mut mirror = Mirror::start().await;
        let va = mirror.index("va");
        for (command, address) in [("ip neigh", "192.0.2.9"), ("ip -6 neigh", "2001:db8::9")] {
            let find = move |m: &Mirror| {
                m.neighbours
                    .iter()
                    .find(|n| (n.ifindex, n.address) == (va, ip(address)))
                    .cloned()
            };
            sh(&format!(
                "{command} add {address} lladdr 00:00:00:00:00:09 dev va"
            ));
            mirror.until("neighbour", |m| find(m).is_some()).await;
            let entry = find(&mirror).unwrap();
            assert_eq!(entry.mac, Some(mac("00:00:00:00:00:09")));
            assert_eq!(entry.state, bits::NUD_PERMANENT);
            let dumped = mirror.netlink.snapshot().await.unwrap().neighbours;
            assert!(dumped.contains(&entry), "{dumped:?}");
            sh(&format!(
                "{command} replace {address} lladdr 02:00:00:00:00:0a nud stale dev va"
            ));
            mirror
                .until("another address", |m| {
                    find(m).is_some_and(|n| {
                        n.mac == Some(mac("02:00:00:00:00:0a")) && n.state == bits::NUD_STALE
                    })
                })
                .await;
            sh(&format!("{command} del {address} dev va"));
            // Deleting announces a failed entry first, or the removal alone.
            mirror
                .until("no usable neighbour", |m| {
                    find(m).is_none_or(|n| n.state & bits::NUD_VALID == 0)
                })
                .await;
            sh(&format!("{command} add proxy {address} dev va"));
        }
        let proxied = |n: &vtep_user::kernel::Neighbour| {
            n.state & bits::NUD_VALID != 0
                && [ip("192.0.2.9"), ip("2001:db8::9")].contains(&n.address)
        };
        let dumped = mirror.netlink.snapshot().await.unwrap().neighbours;
        assert!(!dumped.iter().any(proxied), "{dumped:?}");
    });
}

#[test]
fn a_neighbour_in_use_is_resolved_like_traffic_would() {
    in_namespace(|| async {
        topology();
        let other = OtherNamespace::new();
        sh(&format!("ip link set va-peer netns {}", other.id()));
        other.sh("ip link set va-peer address 02:00:00:00:00:02 up
             ip addr add 192.0.2.2/24 dev va-peer
             ip addr add 2001:db8::2/64 dev va-peer nodad");
        let mut mirror = Mirror::start().await;
        let va = mirror.index("va");
        let state = move |m: &Mirror, address: &str| {
            let found = m
                .neighbours
                .iter()
                .find(|n| (n.ifindex, n.address) == (va, ip(address)));
            found.map_or(0, |n| n.state)
        };
        for address in ["192.0.2.2", "2001:db8::2"] {
            mirror.netlink.neighbour_use(va, ip(address)).await.unwrap();
            mirror
                .until("resolved", |m| state(m, address) & bits::NUD_REACHABLE != 0)
                .await;
            let found = mirror
                .neighbours
                .iter()
                .find(|n| n.address == ip(address))
                .unwrap();
            assert_eq!(found.mac, Some(mac("02:00:00:00:00:02")));
        }
        // Nobody has these: asked for, and found missing.
        for address in ["192.0.2.99", "2001:db8::99"] {
            mirror.netlink.neighbour_use(va, ip(address)).await.unwrap();
            mirror
                .until("missing", |m| state(m, address) & bits::NUD_FAILED != 0)
                .await;
        }
        // A stale one is confirmed or at least probed.
        sh("ip neigh replace 192.0.2.50 lladdr 02:00:00:00:00:50 nud stale dev va");
        mirror
            .netlink
            .neighbour_use(va, ip("192.0.2.50"))
            .await
            .unwrap();
        mirror
            .until("probing", |m| {
                state(m, "192.0.2.50") & (bits::NUD_DELAY | bits::NUD_PROBE) != 0
            })
            .await;
        // Permanent ones stay as they are.
        for (address, nud, kept) in [
            ("192.0.2.60", "permanent", bits::NUD_PERMANENT),
            ("192.0.2.61", "noarp", bits::NUD_NOARP),
            ("2001:db8::60", "permanent", bits::NUD_PERMANENT),
        ] {
            sh(&format!(
                "ip neigh replace {address} lladdr 02:00:00:00:00:60 nud {nud} dev va"
            ));
            mirror.netlink.neighbour_use(va, ip(address)).await.unwrap();
            mirror.reload().await;
            assert_eq!(state(&mirror, address), kept, "{address}");
        }
        let none = mirror
            .netlink
            .neighbour_use(4242, ip("192.0.2.60"))
            .await
            .unwrap_err();
        assert_eq!(none.errno(), Some(libc::ENODEV), "{none}");
    });
}
