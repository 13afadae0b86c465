//! Links, their kinds and their bridge-port flags.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use vtep_common::Vni;
use vtep_user::kernel::{Bridge, LinkKind};

use crate::harness::*;

fn port(link: &vtep_user::kernel::Link) -> vtep_user::kernel::BridgePort {
    link.bridge_port.expect("a bridge port")
}

#[test]
fn every_port_flag_is_current_however_it_is_set() {
    in_namespace(|| async {
        segment();
        sh("ip link add vc type veth peer name vd; ip link set vc master br0; ip link set vc up");
        let mut mirror = Mirror::start().await;
        let backup = mirror.index("vc");
        // `bridge link` is told in AF_BRIDGE messages alone, `ip link` in both.
        for set in ["bridge link set dev va", "ip link set va type bridge_slave"] {
            mirror
                .change(&format!("{set} isolated on"), "va", |l| port(l).isolated)
                .await;
            mirror
                .change(&format!("{set} isolated off"), "va", |l| !port(l).isolated)
                .await;
            mirror
                .change(&format!("{set} learning off"), "va", |l| !port(l).learning)
                .await;
            mirror
                .change(&format!("{set} learning on"), "va", |l| port(l).learning)
                .await;
            mirror
                .change(&format!("{set} neigh_suppress on"), "va", |l| {
                    port(l).neigh_suppress
                })
                .await;
            mirror
                .change(&format!("{set} neigh_suppress off"), "va", |l| {
                    !port(l).neigh_suppress
                })
                .await;
            mirror
                .change(&format!("{set} hairpin on"), "va", |l| port(l).hairpin)
                .await;
            mirror
                .change(&format!("{set} hairpin off"), "va", |l| !port(l).hairpin)
                .await;
            mirror
                .change(&format!("{set} flood off"), "va", |l| {
                    !port(l).unicast_flood
                })
                .await;
            mirror
                .change(&format!("{set} flood on"), "va", |l| port(l).unicast_flood)
                .await;
            mirror
                .change(&format!("{set} locked on"), "va", |l| port(l).locked)
                .await;
            mirror
                .change(&format!("{set} locked off"), "va", |l| !port(l).locked)
                .await;
            mirror
                .change(&format!("{set} vlan_tunnel on"), "va", |l| {
                    port(l).vlan_tunnel
                })
                .await;
            mirror
                .change(&format!("{set} vlan_tunnel off"), "va", |l| {
                    !port(l).vlan_tunnel
                })
                .await;
            mirror
                .change(&format!("{set} backup_port vc"), "va", |l| {
                    port(l).backup_port == Some(backup)
                })
                .await;
            mirror
                .change(&format!("{set} nobackup_port"), "va", |l| {
                    port(l).backup_port.is_none()
                })
                .await;
            mirror
                .change(&format!("{set} state 1"), "va", |l| port(l).state == 1)
                .await;
            mirror
                .change(&format!("{set} state 3"), "va", |l| port(l).state == 3)
                .await;
        }
        mirror
            .change("ip link set va type bridge_slave proxy_arp on", "va", |l| {
                port(l).proxy_arp
            })
            .await;
        mirror
            .change(
                "ip link set va type bridge_slave proxy_arp off",
                "va",
                |l| !port(l).proxy_arp,
            )
            .await;
        mirror
            .change(
                "ip link set va type bridge_slave proxy_arp_wifi on",
                "va",
                |l| port(l).proxy_arp,
            )
            .await;
        assert_eq!(mirror.overruns, 0);
    });
}

#[test]
fn a_partial_port_message_leaves_the_rest_of_the_link_alone() {
    in_namespace(|| async {
        segment();
        let mut mirror = Mirror::start().await;
        let before = mirror.link("vx").expect("vx").clone();
        mirror
            .change("bridge link set dev vx neigh_suppress on", "vx", |l| {
                port(l).neigh_suppress
            })
            .await;
        let after = mirror.link("vx").expect("vx");
        assert_eq!(after.kind, before.kind);
        assert_eq!(
            (after.mac, after.mtu, after.master),
            (before.mac, before.mtu, before.master)
        );
    });
}

#[test]
fn entering_and_leaving_a_bridge_is_followed_and_the_device_stays() {
    in_namespace(|| async {
        segment();
        let mut mirror = Mirror::start().await;
        let bridge = mirror.index("br0");
        mirror
            .change("ip link set va nomaster", "va", |l| {
                l.master.is_none() && l.bridge_port.is_none()
            })
            .await;
        mirror
            .change("ip link set va master br0", "va", |l| {
                l.master == Some(bridge) && l.bridge_port.is_some_and(|p| p.state == 3)
            })
            .await;
        // With STP the port walks through its states by itself.
        mirror
            .change(
                "ip link set br0 type bridge stp_state 1 forward_delay 200",
                "br0",
                |_| true,
            )
            .await;
        mirror
            .change(
                "ip link set va nomaster; ip link set va master br0",
                "va",
                |l| l.bridge_port.is_some_and(|p| p.state == 1),
            )
            .await;
        mirror
            .until("the port forwards", |m| {
                port(m.link("va").unwrap()).state == 3
            })
            .await;
        // Not compared as a whole: a topology change shortens the ageing time for a
        // while, and the kernel says so to nobody.
        sh("ip link set br0 type bridge stp_state 0");
        // Through its bridge.
        sh("ip link del br0");
        mirror
            .until("the bridge is gone", |m| m.link("br0").is_none())
            .await;
        mirror.links_match("ip link del br0").await;
        assert_eq!(mirror.link("va").unwrap().master, None);
    });
}

#[test]
fn device_attributes_are_followed() {
    in_namespace(|| async {
        segment();
        let mut mirror = Mirror::start().await;
        assert!(mirror.link("lo").unwrap().loopback);
        assert_eq!(
            mirror.link("lo").unwrap().mac,
            None,
            "loopback has no Ethernet address"
        );
        assert_eq!(mirror.link("va").unwrap().kind, LinkKind::Veth);
        mirror
            .change("ip link set va mtu 1400", "va", |l| l.mtu == 1400)
            .await;
        mirror.change("ip link set va down", "va", |l| !l.up).await;
        mirror
            .change("ip link set va up", "va", |l| l.up && port(l).state == 3)
            .await;
        mirror
            .change("ip link set va address 02:00:00:00:00:77", "va", |l| {
                l.mac == Some(mac("02:00:00:00:00:77"))
            })
            .await;
        mirror
            .change(
                "ip link set va down; ip link set va name tap7",
                "tap7",
                |l| !l.up,
            )
            .await;
        assert!(mirror.link("va").is_none());
        mirror
            .change("ip link add mv0 link vb type macvlan", "mv0", |l| {
                l.kind == LinkKind::Other("macvlan".into())
            })
            .await;
        sh("ip link del tap7");
        mirror
            .until("both ends are gone", |m| {
                m.link("tap7").is_none() && m.link("vb").is_none() && m.link("mv0").is_none()
            })
            .await;
        mirror.links_match("ip link del tap7").await;
    });
}

#[test]
fn a_device_that_moves_to_another_namespace_is_gone_and_can_come_back() {
    in_namespace(|| async {
        segment();
        let other = OtherNamespace::new();
        let mut mirror = Mirror::start().await;
        sh(&format!("ip link set va netns {}", other.id()));
        mirror.until("va left", |m| m.link("va").is_none()).await;
        mirror.links_match("leaving").await;
        other.sh(&format!("ip link set va netns {}", thread_id()));
        mirror.until("va is back", |m| m.link("va").is_some()).await;
        mirror.links_match("coming back").await;
    });
}

#[test]
fn bridge_options_are_followed_in_milliseconds() {
    in_namespace(|| async {
        // A device that is down announces changed options only once it goes up.
        sh("ip link add br0 type bridge; ip link set br0 up");
        let mut mirror = Mirror::start().await;
        let bridge = |l: &vtep_user::kernel::Link| match l.kind {
            LinkKind::Bridge(bridge) => bridge,
            _ => panic!("{l:?}"),
        };
        let first = bridge(mirror.link("br0").unwrap());
        // The default of 300 s, as `ip -d link` prints it: in centiseconds.
        let text = output_of("ip -d link show br0");
        assert!(text.contains("ageing_time 30000 "), "{text}");
        let default = Bridge {
            vlan_filtering: false,
            service_vlans: false,
            mst: false,
            default_pvid: first.default_pvid,
            ageing_ms: 300_000,
            nf_call: false,
        };
        assert_eq!(first, default);
        mirror
            .change("ip link set br0 type bridge ageing_time 150", "br0", |l| {
                bridge(l).ageing_ms == 1500
            })
            .await;
        for tables in ["iptables", "ip6tables", "arptables"] {
            mirror
                .change(
                    &format!("ip link set br0 type bridge nf_call_{tables} 1"),
                    "br0",
                    |l| bridge(l).nf_call,
                )
                .await;
            mirror
                .change(
                    &format!("ip link set br0 type bridge nf_call_{tables} 0"),
                    "br0",
                    |l| !bridge(l).nf_call,
                )
                .await;
        }
    });
}

#[test]
fn vxlan_options_come_through_in_the_right_byte_order() {
    in_namespace(|| async {
        segment();
        let mut mirror = Mirror::start().await;
        let plain = vxlan(mirror.link("vx").unwrap()).clone();
        assert_eq!(plain.vni, Vni::new(100).unwrap());
        assert_eq!(plain.local, Some("192.0.2.1".parse().unwrap()));
        assert_eq!((plain.group, plain.link), (None, None));
        assert_eq!((plain.udp_port, plain.source_ports), (4789, (0, 0)));
        assert!(plain.learning && plain.udp_checksum);
        assert_eq!(
            (plain.ageing_s, plain.ttl, plain.tos, plain.df),
            (300, 0, 0, 0)
        );
        assert!(!plain.collect_metadata && !plain.vnifilter && !plain.ttl_inherit);
        assert!(
            plain.foreign_options.is_empty(),
            "{:?}",
            plain.foreign_options
        );

        let underlay = mirror.index("vb");
        mirror
            .change(
                "ip link add v4 type vxlan id 16777215 remote 192.0.2.9 dev vb dstport 8472 \
                 srcport 49152 65535 ttl 17 tos 0x1c df set noudpcsum nolearning ageing 77",
                "v4",
                |_| true,
            )
            .await;
        let v4 = vxlan(mirror.link("v4").unwrap());
        assert_eq!(v4.vni.get(), 0xff_ffff);
        assert_eq!(v4.group, Some("192.0.2.9".parse().unwrap()));
        assert_eq!((v4.link, v4.udp_port), (Some(underlay), 8472));
        assert_eq!(v4.source_ports, (49152, 65535));
        assert_eq!((v4.ttl, v4.tos, v4.df, v4.ageing_s), (17, 0x1c, 1, 77));
        assert!(!v4.udp_checksum && !v4.learning);

        mirror
            .change(
                "ip link add v6 type vxlan id 6 local 2001:db8::1 dstport 4790 ttl inherit \
                 tos inherit df inherit udp6zerocsumtx udp6zerocsumrx flowlabel 0xabcde",
                "v6",
                |_| true,
            )
            .await;
        let v6 = vxlan(mirror.link("v6").unwrap());
        assert_eq!(v6.local, Some("2001:db8::1".parse().unwrap()));
        assert!(v6.ttl_inherit && v6.udp6_zero_checksum_tx && v6.udp6_zero_checksum_rx);
        assert_eq!((v6.tos, v6.df, v6.flow_label), (1, 2, 0xabcde));
        assert!(v6.foreign_options.is_empty(), "{:?}", v6.foreign_options);

        mirror
            .change(
                "ip link add single type vxlan external vnifilter dstport 4791",
                "single",
                |_| true,
            )
            .await;
        let single = vxlan(mirror.link("single").unwrap());
        assert!(single.collect_metadata && single.vnifilter);

        for (option, port) in [
            ("gbp", 5001),
            ("gpe external", 5002),
            ("remcsumtx", 5003),
            ("remcsumrx", 5004),
            ("proxy", 5005),
            ("rsc", 5006),
            ("l2miss", 5007),
            ("l3miss", 5008),
        ] {
            let name = option.split(' ').next().unwrap();
            let id = if option.contains("external") {
                String::new()
            } else {
                format!("id {port}")
            };
            let make = format!("ip link add f{name} type vxlan {id} dstport {port} {option}");
            mirror.change(&make, &format!("f{name}"), |_| true).await;
            let made = vxlan(mirror.link(&format!("f{name}")).unwrap());
            assert!(
                made.foreign_options.contains(&name),
                "{name}: {:?}",
                made.foreign_options
            );
        }
    });
}

#[test]
fn changed_vxlan_options_are_followed() {
    in_namespace(|| async {
        segment();
        let mut mirror = Mirror::start().await;
        let set = "ip link set vx type vxlan id 100";
        mirror
            .change(&format!("{set} ageing 12"), "vx", |l| {
                vxlan(l).ageing_s == 12
            })
            .await;
        mirror
            .change(&format!("{set} nolearning"), "vx", |l| !vxlan(l).learning)
            .await;
        mirror
            .change(&format!("{set} ttl 9"), "vx", |l| vxlan(l).ttl == 9)
            .await;
        mirror
            .change(&format!("{set} tos 4"), "vx", |l| vxlan(l).tos == 4)
            .await;
        mirror
            .change(&format!("{set} df set"), "vx", |l| vxlan(l).df == 1)
            .await;
        mirror
            .change(&format!("{set} remote 192.0.2.8"), "vx", |l| {
                vxlan(l).group == Some("192.0.2.8".parse().unwrap())
            })
            .await;
        mirror
            .change(&format!("{set} local 192.0.2.7"), "vx", |l| {
                vxlan(l).local == Some("192.0.2.7".parse().unwrap())
            })
            .await;
    });
}

#[test]
fn a_tap_tells_its_kind_and_whether_its_owner_wants_offloads() {
    in_namespace(|| async {
        let mut mirror = Mirror::start().await;
        let tun = |l: &vtep_user::kernel::Link| match l.kind {
            LinkKind::Tun(tun) => tun,
            _ => panic!("{l:?}"),
        };
        mirror
            .change("ip tuntap add tun0 mode tun", "tun0", |l| !tun(l).tap)
            .await;
        mirror
            .change("ip tuntap add tap0 mode tap", "tap0", |l| {
                tun(l).tap && !tun(l).vnet_hdr
            })
            .await;
        mirror.change("ip link set tap0 up", "tap0", |l| l.up).await;
        mirror
            .change("ip tuntap add tap1 mode tap vnet_hdr", "tap1", |l| {
                tun(l).vnet_hdr
            })
            .await;
        // What QEMU does with a persistent tap: the owner decides.
        let tap = File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .expect("tun");
        let mut request = [0u8; 40];
        request[..4].copy_from_slice(b"tap0");
        let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as u16;
        request[16..18].copy_from_slice(&flags.to_ne_bytes());
        // SAFETY: `request` is a struct ifreq of 40 bytes that outlives the call.
        let set = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
        mirror
            .until("vnet_hdr shows", |m| tun(m.link("tap0").unwrap()).vnet_hdr)
            .await;
        mirror.links_match("TUNSETIFF").await;
    });
}

fn bpf(command: libc::c_int, attributes: &mut [u8; 128]) -> OwnedFd {
    // SAFETY: `attributes` is a zero-extended union bpf_attr that outlives the
    // call, and the pointers in it are to live buffers of the caller.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), 128) };
    assert!(
        fd >= 0,
        "bpf({command}): {}",
        std::io::Error::last_os_error()
    );
    // SAFETY: a new descriptor that nobody else owns.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

/// `return XDP_PASS`.
fn xdp_program() -> OwnedFd {
    const BPF_PROG_LOAD: libc::c_int = 5;
    const BPF_PROG_TYPE_XDP: u32 = 6;
    let code: [u64; 2] = [0x0000_0002_0000_00b7, 0x95];
    let licence = c"GPL";
    let mut attributes = [0; 128];
    attributes[..4].copy_from_slice(&BPF_PROG_TYPE_XDP.to_ne_bytes());
    attributes[4..8].copy_from_slice(&2u32.to_ne_bytes());
    attributes[8..16].copy_from_slice(&(code.as_ptr() as u64).to_ne_bytes());
    attributes[16..24].copy_from_slice(&(licence.as_ptr() as u64).to_ne_bytes());
    bpf(BPF_PROG_LOAD, &mut attributes)
}

fn program_id(program: &OwnedFd) -> u32 {
    let path = format!("/proc/self/fdinfo/{}", program.as_raw_fd());
    let text = std::fs::read_to_string(path).expect("fdinfo");
    let line = text
        .lines()
        .find(|line| line.starts_with("prog_id:"))
        .expect("prog_id");
    line["prog_id:".len()..].trim().parse().expect("number")
}

#[test]
fn an_xdp_program_shows_when_it_comes_and_goes() {
    in_namespace(|| async {
        segment();
        let mut mirror = Mirror::start().await;
        assert_eq!(mirror.link("vb").unwrap().xdp, None);
        let program = xdp_program();
        let id = program_id(&program);
        let attached = |mode| {
            move |l: &vtep_user::kernel::Link| {
                l.xdp
                    .is_some_and(|xdp| (xdp.mode, xdp.program_id) == (mode, id))
            }
        };
        mirror
            .change(
                &format!("bpftool net attach xdpdrv id {id} dev vb"),
                "vb",
                attached(1),
            )
            .await;
        mirror
            .change("bpftool net detach xdpdrv dev vb", "vb", |l| {
                l.xdp.is_none()
            })
            .await;
        mirror
            .change(
                &format!("bpftool net attach xdpgeneric id {id} dev vb"),
                "vb",
                attached(2),
            )
            .await;
        mirror
            .change("bpftool net detach xdpgeneric dev vb", "vb", |l| {
                l.xdp.is_none()
            })
            .await;

        const BPF_LINK_CREATE: libc::c_int = 28;
        const BPF_XDP: u32 = 37;
        const XDP_FLAGS_DRV_MODE: u32 = 4;
        let mut attributes = [0; 128];
        attributes[..4].copy_from_slice(&(program.as_raw_fd() as u32).to_ne_bytes());
        attributes[4..8].copy_from_slice(&mirror.index("vb").to_ne_bytes());
        attributes[8..12].copy_from_slice(&BPF_XDP.to_ne_bytes());
        attributes[12..16].copy_from_slice(&XDP_FLAGS_DRV_MODE.to_ne_bytes());
        let link = bpf(BPF_LINK_CREATE, &mut attributes);
        // A bpf link comes and goes without a notification (as of Linux 6.18): the
        // next message about the device, or the next dump, has it.
        mirror
            .change("ip link set vb mtu 1450", "vb", |l| l.mtu == 1450)
            .await;
        assert!(
            attached(1)(mirror.link("vb").unwrap()),
            "{:?}",
            mirror.link("vb")
        );
        drop(link);
        let read = || async { mirror.netlink.link_by_name("vb").await.unwrap().unwrap() };
        let end = std::time::Instant::now() + DEADLINE;
        while read().await.xdp.is_some() {
            assert!(
                std::time::Instant::now() < end,
                "in vain: the bpf link is gone"
            );
            tokio::task::yield_now().await;
        }
    });
}
