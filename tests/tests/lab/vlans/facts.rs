//! VLANs of bridge ports as netlink tells them, against `bridge vlan`.

use std::time::Duration;

use vtep_tests::netns::Netns;
use vtep_tests::{Device, has_devices};
use vtep_user::kernel::{Bridge, Event, LinkKind, VlanRange};
use vtep_user::netlink::{Events, Netlink};

const WAIT: Duration = Duration::from_secs(10);

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

fn untagged(vlan: u16) -> VlanRange {
    VlanRange {
        pvid: true,
        untagged: true,
        ..tagged(vlan, vlan, None)
    }
}

/// What events and dumps say of one namespace.
struct Watch<'a> {
    netns: &'a Netns,
    netlink: Netlink,
    events: Events,
}

impl Watch<'_> {
    /// Run commands until the port is told to have these VLANs; a dump says the same.
    async fn become_after(&mut self, script: &str, device: &str, expected: &[VlanRange]) {
        let ifindex = self.netns.ifindex(device).unwrap();
        self.netns.run_all(script).unwrap();
        let told = tokio::time::timeout(WAIT, async {
            loop {
                let events = self.events.next().await.unwrap();
                let mut here = events.into_iter().filter_map(|event| match event {
                    Event::Vlans(port, vlans) if port == ifindex => Some(vlans),
                    _ => None,
                });
                if here.next_back().as_deref() == Some(expected) {
                    break;
                }
            }
        });
        told.await
            .unwrap_or_else(|_| panic!("never told after `{script}`: {expected:?}"));
        let dump = self.netlink.snapshot().await.unwrap().vlans;
        let dump = dump.get(&ifindex).cloned().unwrap_or_default();
        assert_eq!(dump, expected, "{script}");
    }

    async fn bridge(&self, name: &str) -> Bridge {
        let link = self.netlink.link_by_name(name).await.unwrap().unwrap();
        match link.kind {
            LinkKind::Bridge(bridge) => bridge,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn vlans_of_ports_are_told_however_they_change() {
    let test = "vlans_of_ports_are_told_however_they_change";
    if !has_devices(test, &[Device::VlanAwareBridge]) {
        return;
    }
    let netns = Netns::new("vlans").unwrap();
    netns
        .run_all(
            "ip link add br0 type bridge vlan_filtering 1 vlan_default_pvid 1
             ip link add va type veth peer name vb
             ip link add vx type vxlan external vnifilter local 192.0.2.1 dstport 4789
             ip link set vx master br0
             bridge link set dev vx vlan_tunnel on",
        )
        .unwrap();
    let watch = || -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(follow(&netns));
        Ok(())
    };
    netns.enter(watch).unwrap();
}

async fn follow(netns: &Netns) {
    let events = Events::open().unwrap();
    let netlink = Netlink::open().unwrap();
    let mut watch = Watch {
        netns,
        netlink,
        events,
    };
    let pvid = untagged(1);
    let joined = "ip link set va master br0";
    watch.become_after(joined, "va", &[pvid]).await;
    let more = "bridge vlan add dev va vid 10\nbridge vlan add dev va vid 11-19";
    watch
        .become_after(more, "va", &[pvid, tagged(10, 19, None)])
        .await;
    let moved = "bridge vlan del dev va vid 10-19
        bridge vlan add dev va vid 20 pvid untagged";
    let old = VlanRange {
        pvid: false,
        ..pvid
    };
    watch.become_after(moved, "va", &[old, untagged(20)]).await;
    let left = "bridge vlan del dev va vid 1";
    watch.become_after(left, "va", &[untagged(20)]).await;
    let blocked = VlanRange {
        state: 4,
        ..untagged(20)
    };
    let block = "bridge vlan set dev va vid 20 state blocking";
    watch.become_after(block, "va", &[blocked]).await;

    let map = "bridge vlan add dev vx vid 10-12
        bridge vlan add dev vx vid 10-12 tunnel_info id 100-102";
    let mapped = [pvid, tagged(10, 12, Some(100))];
    watch.become_after(map, "vx", &mapped).await;
    let unmap = "bridge vlan del dev vx vid 11 tunnel_info id 101";
    let gap = [
        pvid,
        tagged(10, 10, Some(100)),
        tagged(11, 11, None),
        tagged(12, 12, Some(102)),
    ];
    watch.become_after(unmap, "vx", &gap).await;

    // Another bridge has another default; a port without a bridge has none.
    let other = "ip link add br1 type bridge vlan_filtering 1 vlan_default_pvid 7
        ip link set va master br1";
    watch.become_after(other, "va", &[untagged(7)]).await;
    let default = "ip link set br1 type bridge vlan_default_pvid 8";
    watch.become_after(default, "va", &[untagged(8)]).await;
    watch
        .become_after("ip link set va nomaster", "va", &[])
        .await;

    let bridge = watch.bridge("br0").await;
    assert!(bridge.vlan_filtering && !bridge.service_vlans && !bridge.mst);
    let service = "ip link set br0 type bridge vlan_protocol 802.1ad vlan_filtering 0";
    netns.run(service).unwrap();
    let bridge = watch.bridge("br0").await;
    assert!(!bridge.vlan_filtering && bridge.service_vlans);
}
