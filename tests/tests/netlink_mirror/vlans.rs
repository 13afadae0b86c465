//! VNIs of single VXLAN devices. VLANs need another kernel: see the lab tests.

use vtep_user::kernel::{IfIndex, VniRange};

use crate::harness::*;

impl Mirror {
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
