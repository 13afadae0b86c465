//! Devices made and changed by us.

use vtep_common::Vni;
use vtep_user::kernel::LinkKind;
use vtep_user::netlink::VxlanSpec;

use crate::harness::*;

#[test]
fn a_segment_is_made_changed_and_removed() {
    in_namespace(|| async {
        sh(
            "ip link add va type veth peer name vb; ip link set vb mtu 9000; ip link set va mtu 9000",
        );
        let mut mirror = Mirror::start().await;
        let netlink = mirror.netlink.clone();
        let br100 = netlink.create_bridge("br100", Some(1450)).await.unwrap();
        let spec = VxlanSpec {
            name: "vx100".into(),
            vni: Vni::new(100).unwrap(),
            local: Some("192.0.2.1".parse().unwrap()),
            udp_port: 4789,
            learning: false,
            link: Some(mirror.index("vb")),
            mtu: Some(1450),
            ageing_s: Some(60),
        };
        let vx100 = netlink.create_vxlan(&spec).await.unwrap();
        netlink.set_master(vx100, Some(br100)).await.unwrap();
        for link in [br100, vx100] {
            netlink.set_up(link, true).await.unwrap();
        }
        netlink.set_alias(vx100, "made by vtep").await.unwrap();
        mirror
            .until("the segment is up", |m| {
                m.link("vx100")
                    .is_some_and(|l| l.up && l.master == Some(br100))
                    && m.link("br100").is_some_and(|l| l.up)
            })
            .await;
        mirror.links_match("creation").await;
        let made = mirror.link("vx100").unwrap();
        assert_eq!((made.ifindex, made.mtu), (vx100, 1450));
        let device = vxlan(made);
        assert_eq!(
            (device.vni, device.local, device.udp_port),
            (spec.vni, spec.local, 4789)
        );
        assert_eq!(
            (device.learning, device.link, device.ageing_s),
            (false, spec.link, 60)
        );
        assert!(matches!(
            mirror.link("br100").unwrap().kind,
            LinkKind::Bridge(_)
        ));
        assert_eq!(
            netlink.alias(vx100).await.unwrap().as_deref(),
            Some("made by vtep")
        );
        assert_eq!(netlink.alias(br100).await.unwrap(), None);
        let text = output_of("ip -d link show vx100");
        assert!(
            text.contains("vxlan id 100 local 192.0.2.1 dev vb srcport 0 0 dstport 4789"),
            "{text}"
        );
        assert!(
            text.contains("nolearning") && text.contains("alias made by vtep"),
            "{text}"
        );

        netlink.set_mtu(vx100, 1400).await.unwrap();
        netlink.set_master(vx100, None).await.unwrap();
        netlink.set_up(vx100, false).await.unwrap();
        mirror
            .until("changed", |m| {
                m.link("vx100")
                    .is_some_and(|l| (l.mtu, l.up, l.master) == (1400, false, None))
            })
            .await;
        netlink.delete_link(vx100).await.unwrap();
        netlink.delete_link(br100).await.unwrap();
        assert_eq!(netlink.link_by_name("vx100").await.unwrap(), None);
        mirror
            .until("gone", |m| {
                m.link("vx100").is_none() && m.link("br100").is_none()
            })
            .await;
        mirror.links_match("removal").await;
    });
}

#[test]
fn an_ipv6_device_is_made() {
    in_namespace(|| async {
        let mut mirror = Mirror::start().await;
        let spec = VxlanSpec {
            name: "vx6".into(),
            vni: Vni::new(0xff_ffff).unwrap(),
            local: Some("2001:db8::1".parse().unwrap()),
            udp_port: 8472,
            learning: true,
            link: None,
            mtu: None,
            ageing_s: None,
        };
        mirror.netlink.create_vxlan(&spec).await.unwrap();
        mirror
            .until("vx6 is there", |m| m.link("vx6").is_some())
            .await;
        let device = vxlan(mirror.link("vx6").unwrap());
        assert_eq!(
            (device.vni, device.local, device.udp_port),
            (spec.vni, spec.local, 8472)
        );
        assert!(device.learning);
    });
}

#[test]
fn a_refusal_names_the_object_and_the_reason() {
    in_namespace(|| async {
        sh("ip link add va type veth peer name vb");
        let mirror = Mirror::start().await;
        let netlink = &mirror.netlink;
        let mut spec = VxlanSpec {
            name: "vx1".into(),
            vni: Vni::new(1).unwrap(),
            local: None,
            udp_port: 4789,
            learning: true,
            link: None,
            mtu: None,
            ageing_s: None,
        };
        netlink.create_vxlan(&spec).await.unwrap();
        let again = netlink.create_vxlan(&spec).await.unwrap_err();
        let text = again.to_string();
        assert!(
            text.starts_with("cannot create vxlan device vx1: File exists"),
            "{text}"
        );
        assert_eq!(again.errno(), Some(libc::EEXIST));

        // The kernel's own words (extended acknowledgement).
        spec.name = "vx2".into();
        let same_vni = netlink.create_vxlan(&spec).await.unwrap_err().to_string();
        assert!(
            same_vni.contains("A VXLAN device with the specified VNI already exists"),
            "{same_vni}"
        );

        let bridge = netlink
            .create_bridge("a-name-that-is-too-long", None)
            .await
            .unwrap_err();
        assert!(
            bridge
                .to_string()
                .starts_with("cannot create bridge a-name-that-is-too-long: "),
            "{bridge}"
        );
        let no_bridge = netlink
            .set_master(mirror.index("va"), Some(mirror.index("vb")))
            .await;
        assert!(no_bridge.is_err());
        let gone = netlink.delete_link(4242).await.unwrap_err();
        assert_eq!(gone.errno(), Some(libc::ENODEV), "{gone}");
        assert_eq!(netlink.link_by_name("nothing").await.unwrap(), None);
        assert_eq!(netlink.alias(4242).await.unwrap(), None);
    });
}

#[test]
fn a_cancelled_request_does_not_disturb_the_next_one() {
    in_namespace(|| async {
        segment();
        let mut lines = String::new();
        for n in 0..4000u32 {
            let [.., a, b] = n.to_be_bytes();
            lines.push_str(&format!(
                "fdb add 02:00:00:01:{a:02x}:{b:02x} dev va master static\n"
            ));
        }
        batch("bridge", &lines);
        let mirror = Mirror::start().await;
        let whole = mirror.fdb.len();
        // A timeout of nothing polls once: the dump has begun, the rest is left.
        for _ in 0..5 {
            let cut = tokio::time::timeout(std::time::Duration::ZERO, mirror.netlink.snapshot());
            assert!(
                cut.await.is_err(),
                "the snapshot must not fit into one poll"
            );
            let again = mirror.netlink.snapshot().await.unwrap();
            assert_eq!(again.fdb.len(), whole);
            assert_eq!(again.links.len(), mirror.links.len());
        }
    });
}

#[test]
fn several_tasks_can_ask_at_once() {
    in_namespace(|| async {
        segment();
        let mirror = Mirror::start().await;
        let expected = mirror.links.len();
        let tasks: Vec<_> = (0..20)
            .map(|_| {
                let netlink = mirror.netlink.clone();
                tokio::spawn(async move {
                    let links = netlink.links().await.unwrap().len();
                    let route = netlink
                        .route("192.0.2.7".parse().unwrap(), None, None)
                        .await;
                    (links, route.unwrap().is_some())
                })
            })
            .collect();
        for task in tasks {
            assert_eq!(task.await.unwrap(), (expected, true));
        }
    });
}
