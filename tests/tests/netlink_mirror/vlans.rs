//! VLANs of bridge ports and VNIs of single VXLAN devices.

use std::process::Command;

use vtep_user::kernel::{IfIndex, LinkKind, VlanRange, VniRange};

use crate::harness::*;

/// As `bridge vlan` and `bridge vni` do, whatever they print.
const SINGLE: &str = "ip link add br0 type bridge vlan_filtering 1 vlan_default_pvid 1
    ip link add va type veth peer name vb
    ip link add vx type vxlan external vnifilter local 192.0.2.1 dstport 4789
    ip link set va master br0
    ip link set vx master br0
    bridge link set dev vx vlan_tunnel on";

/// Whether the kernel can do it (CONFIG_BRIDGE_VLAN_FILTERING); a failure where
/// VTEP_TESTS_REQUIRE asks for it.
fn kernel_filters_vlans() -> bool {
    let script = "ip link add probe type bridge vlan_filtering 1 && ip link del probe";
    let probe = Command::new("sh").args(["-c", script]).output();
    if probe.expect("sh runs").status.success() {
        return true;
    }
    let required = std::env::var("VTEP_TESTS_REQUIRE").is_ok_and(|need| need.contains("vlan"));
    assert!(!required, "VTEP_TESTS_REQUIRE asks for VLAN filtering");
    eprintln!("SKIPPED: the kernel has no VLAN filtering (CONFIG_BRIDGE_VLAN_FILTERING)");
    false
}

fn untagged(vlan: u16) -> VlanRange {
    VlanRange {
        first: vlan,
        last: vlan,
        pvid: true,
        untagged: true,
        state: 3,
        tunnel: None,
    }
}

fn tagged(first: u16, last: u16, tunnel: Option<u32>) -> VlanRange {
    VlanRange {
        first,
        last,
        pvid: false,
        untagged: false,
        state: 3,
        tunnel,
    }
}

impl Mirror {
    /// Runs a command until the mirror has these VLANs, as a fresh dump has.
    async fn vlans_become(&mut self, script: &str, name: &str, expected: &[VlanRange]) {
        sh(script);
        let ifindex = self.index(name);
        let of = |all: Option<&Vec<VlanRange>>| all.cloned().unwrap_or_default();
        self.until(script, |mirror| of(mirror.vlans.get(&ifindex)) == expected)
            .await;
        let dump = self.netlink.snapshot().await.expect("snapshot").vlans;
        assert_eq!(of(dump.get(&ifindex)), expected, "{script}");
    }

    async fn vnis_become(&mut self, script: &str, ifindex: IfIndex, expected: &[(u32, u32)]) {
        let range = |&(first, last)| VniRange { first, last };
        let expected: Vec<VniRange> = expected.iter().map(range).collect();
        let of = |all: Option<&Vec<VniRange>>| all.cloned().unwrap_or_default();
        sh(script);
        self.until(script, |mirror| of(mirror.vnis.get(&ifindex)) == expected)
            .await;
        let dump = self.netlink.snapshot().await.expect("snapshot").vnis;
        assert_eq!(of(dump.get(&ifindex)), expected, "{script}");
    }
}

#[test]
fn vnis_of_a_single_device_are_current() {
    in_namespace(|| async {
        sh(
            "ip link add vx type vxlan external vnifilter local 192.0.2.1 dstport 4789
            ip link add plain type vxlan id 7 local 192.0.2.1 dstport 4790
            bridge vni add dev vx vni 100",
        );
        let mut mirror = Mirror::start().await;
        let vx = mirror.index("vx");
        assert_eq!(mirror.vnis.keys().collect::<Vec<_>>(), [&vx]);
        let all: &[(&str, &[(u32, u32)])] = &[
            ("bridge vni add dev vx vni 101", &[(100, 101)]),
            (
                "bridge vni add dev vx vni 200-209",
                &[(100, 101), (200, 209)],
            ),
            (
                "bridge vni delete dev vx vni 204",
                &[(100, 101), (200, 203), (205, 209)],
            ),
            (
                "bridge vni delete dev vx vni 205-209",
                &[(100, 101), (200, 203)],
            ),
            ("bridge vni delete dev vx vni 100-101", &[(200, 203)]),
        ];
        for (script, expected) in all {
            mirror.vnis_become(script, vx, expected).await;
        }
    });
}

#[test]
fn thousands_of_vnis_are_read_whole() {
    in_namespace(|| async {
        sh("ip link add vx type vxlan external vnifilter local 192.0.2.1 dstport 4789");
        // No two in a row: nothing can be shortened.
        let lines: Vec<String> = (1..=4000)
            .map(|n| format!("vni add dev vx vni {}", 2 * n))
            .collect();
        batch("bridge", &lines.join("\n"));
        let mirror = Mirror::start().await;
        let vnis = &mirror.vnis[&mirror.index("vx")];
        assert!(
            vnis.iter()
                .map(|range| range.first)
                .eq((1..=4000).map(|n| 2 * n))
        );
    });
}

#[test]
fn vlans_of_ports_are_current_however_they_change() {
    in_namespace(|| async {
        if !kernel_filters_vlans() {
            return;
        }
        sh(SINGLE);
        let mut mirror = Mirror::start().await;
        let LinkKind::Bridge(bridge) = mirror.link("br0").unwrap().kind else {
            panic!()
        };
        assert!(bridge.vlan_filtering && !bridge.mst && !bridge.service_vlans);
        let pvid = untagged(1);
        let (va, vx) = ("va", "vx");
        mirror.vlans_become("true", va, &[pvid]).await;
        mirror
            .vlans_become(
                "bridge vlan add dev va vid 10",
                va,
                &[pvid, tagged(10, 10, None)],
            )
            .await;
        mirror
            .vlans_become(
                "bridge vlan add dev va vid 11-19",
                va,
                &[pvid, tagged(10, 19, None)],
            )
            .await;
        let old = VlanRange {
            pvid: false,
            ..pvid
        };
        mirror
            .vlans_become(
                "bridge vlan del dev va vid 10-19; bridge vlan add dev va vid 20 pvid untagged",
                va,
                &[old, untagged(20)],
            )
            .await;
        mirror
            .vlans_become("bridge vlan del dev va vid 1", va, &[untagged(20)])
            .await;
        let blocked = VlanRange {
            state: 4,
            ..untagged(20)
        };
        mirror
            .vlans_become(
                "bridge vlan set dev va vid 20 state blocking",
                va,
                &[blocked],
            )
            .await;
        let map = "bridge vlan add dev vx vid 10-12
            bridge vlan add dev vx vid 10-12 tunnel_info id 100-102";
        mirror
            .vlans_become(map, vx, &[pvid, tagged(10, 12, Some(100))])
            .await;
        mirror
            .vlans_become(
                "bridge vlan del dev vx vid 11 tunnel_info id 101",
                vx,
                &[
                    pvid,
                    tagged(10, 10, Some(100)),
                    tagged(11, 11, None),
                    tagged(12, 12, Some(102)),
                ],
            )
            .await;
        // Another bridge has another default; a port without a bridge has none.
        let other = "ip link add br1 type bridge vlan_filtering 1 vlan_default_pvid 7
            ip link set va master br1";
        mirror.vlans_become(other, va, &[untagged(7)]).await;
        mirror
            .vlans_become("ip link set va nomaster", va, &[])
            .await;
        mirror
            .change(
                "ip link set br1 type bridge vlan_filtering 0",
                "br1",
                |link| matches!(link.kind, LinkKind::Bridge(bridge) if !bridge.vlan_filtering),
            )
            .await;
    });
}
