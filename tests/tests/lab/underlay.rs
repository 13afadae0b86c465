//! Underlays that are more than one plain NIC: what works on them is fast, what
//! does not is left to the kernel with a reason. Most kernels of machines that
//! build have none of these devices: `cargo xtask vm` boots one that has.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use serde_json::Value;
use vtep_tests::daemon::Daemon;
use vtep_tests::frames::{Socket, is_udp_to};
use vtep_tests::lab::{BRIDGE, Lab, Options, UPLINK, VNI, VXLAN};
use vtep_tests::streams::Session;
use vtep_tests::{Device, has_devices, wait_until};

/// Two hosts without segment, whose underlay the test changes before
/// [`Scene::new`].
fn bare() -> Lab {
    Lab::with(&Options {
        segment: false,
        ..Options::default()
    })
    .unwrap()
}

/// On both hosts a segment between their addresses and a VM, on the first a
/// daemon; a TCP session between the VMs.
struct Scene {
    lab: Lab,
    daemon: Daemon,
    session: Session,
}

impl Scene {
    /// `options`: of the VXLAN devices.
    fn new(mut lab: Lab, options: &str) -> Self {
        for (i, other) in [(0, 1), (1, 0)] {
            let vm = lab.add_vm(i).unwrap();
            let port = lab.vms[vm].port.clone();
            let (host, remote) = (&lab.hosts[i], lab.hosts[other].address);
            let local = host.address;
            // GRO is turned on while the port is up: only that tells the VM's end.
            let lines = format!(
                "ip link add {BRIDGE} type bridge
                 ip link add {VXLAN} type vxlan id {VNI} local {local} dstport 4789 {options}
                 ip link set {VXLAN} mtu 1400 master {BRIDGE}
                 ip link set {VXLAN} up
                 ip link set {BRIDGE} up
                 bridge fdb append 00:00:00:00:00:00 dev {VXLAN} dst {remote}
                 ip link set {port} master {BRIDGE}
                 ip link set {port} up
                 ethtool -K {port} gro off
                 ethtool -K {port} gro on"
            );
            host.netns.run_all(&lines).unwrap();
        }
        for vm in &lab.vms {
            vm.netns.run("ip link set eth0 mtu 1400").unwrap();
        }
        let daemon = Daemon::start(&lab.hosts[0], &[&lab.vms[0].port]).unwrap();
        let session = Session::start(&lab.vms[0], &lab.vms[1]).unwrap();
        let scene = Self {
            lab,
            daemon,
            session,
        };
        scene.flows();
        scene
    }

    /// The session makes progress.
    #[track_caller]
    fn flows(&self) {
        let before = self.session.round_trips();
        wait_until(Duration::from_secs(5), "the session goes on", || {
            Ok(self.session.round_trips() > before + 20)
        })
        .unwrap_or_else(|error| panic!("{error}:\n{}", self.status()));
    }

    /// Frames of host 1 that took the fast path, in both directions.
    fn fast(&self) -> [u64; 2] {
        ["egress-remote", "ingress-local"].map(|outcome| self.daemon.frames(outcome).unwrap())
    }

    fn status(&self) -> String {
        self.daemon.cli(&["status"]).unwrap()
    }

    fn uplink(&self, name: &str) -> Option<Value> {
        self.daemon.status_row("uplinks", "name", name).unwrap()
    }

    /// The session is on the fast path, in both directions.
    #[track_caller]
    fn is_fast(&self) {
        for vm in &self.lab.vms {
            self.daemon.wait_accelerated(vm.mac).unwrap();
        }
        let before = self.fast();
        wait_until(Duration::from_secs(5), "frames take the fast path", || {
            let now = self.fast();
            Ok(now[0] > before[0] + 20 && now[1] > before[1] + 20)
        })
        .unwrap_or_else(|error| panic!("{error}:\n{}", self.status()));
    }

    /// `status` gives a reason for an uplink that is left to the kernel, and
    /// the session goes on there.
    #[track_caller]
    fn is_left(&self, uplink: &str, reason: &str) {
        let says = |row: &Value| {
            row["accelerated"] == false
                && row["reason"].as_str().is_some_and(|r| r.contains(reason))
        };
        wait_until(Duration::from_secs(2), "the reason is said", || {
            Ok(self.uplink(uplink).is_some_and(|row| says(&row)))
        })
        .unwrap_or_else(|error| panic!("{uplink}: {reason}: {error}:\n{}", self.status()));
        self.flows();
        assert_eq!(self.fast(), [0, 0], "{}", self.status());
    }
}

#[test]
fn local_address_on_a_dummy_is_fast_through_the_nic() {
    let test = "local_address_on_a_dummy_is_fast_through_the_nic";
    if !has_devices(test, &[Device::Dummy]) {
        return;
    }
    let mut lab = bare();
    for (i, host) in lab.hosts.iter_mut().enumerate() {
        let local = Ipv4Addr::new(10, 255, 0, i as u8 + 1);
        host.netns
            .run_all(&format!(
                "ip link add dummy0 type dummy
                 ip addr add {local}/32 dev dummy0
                 ip link set dummy0 up"
            ))
            .unwrap();
        let route = format!("ip route add {local}/32 via {}", host.address);
        lab.router.run(&route).unwrap();
        host.address = local.into();
    }
    let scene = Scene::new(lab, "");
    scene.is_fast();
    assert_eq!(scene.uplink(UPLINK).unwrap()["accelerated"], true);
    assert_eq!(scene.uplink("dummy0"), None, "{}", scene.status());
    let wire = scene.lab.router.enter(|| Socket::open("to1")).unwrap();
    let frames = wire.capture(4, Duration::from_secs(20), |f| is_udp_to(f, 4789));
    for frame in frames.unwrap() {
        let source = <[u8; 4]>::try_from(&frame[26..30]).unwrap();
        assert!(matches!(source, [10, 255, 0, 1 | 2]), "{source:?}");
    }
    scene.session.finish().unwrap();
}

#[test]
fn uplink_that_is_a_vlan_device_is_left_to_the_kernel_with_a_reason() {
    let test = "uplink_that_is_a_vlan_device_is_left_to_the_kernel_with_a_reason";
    if !has_devices(test, &[Device::Vlan]) {
        return;
    }
    let lab = bare();
    for (i, host) in lab.hosts.iter().enumerate() {
        let (address, gateway) = (host.address, host.gateway);
        let move_address = |device: &str, address: IpAddr| {
            format!(
                "ip addr flush dev {device}
                 ip link add link {device} name {device}.5 type vlan id 5
                 ip addr add {address}/24 dev {device}.5
                 ip link set {device}.5 up"
            )
        };
        let far = format!("to{}", i + 1);
        lab.router.run_all(&move_address(&far, gateway)).unwrap();
        host.netns.run_all(&move_address(UPLINK, address)).unwrap();
        let route = format!("ip route add default via {gateway}");
        host.netns.run(&route).unwrap();
    }
    let scene = Scene::new(lab, "");
    scene.is_left("uplink0.5", "VLAN");
    scene.session.finish().unwrap();
}

#[test]
fn underlay_in_a_vrf_is_left_to_the_kernel_with_a_reason() {
    let test = "underlay_in_a_vrf_is_left_to_the_kernel_with_a_reason";
    if !has_devices(test, &[Device::Vrf]) {
        return;
    }
    let lab = bare();
    for host in &lab.hosts {
        host.netns
            .run_all(&format!(
                "ip link add fabric type vrf table 10
                 ip link set fabric up
                 ip link set {UPLINK} master fabric
                 ip route add default via {} vrf fabric",
                host.gateway
            ))
            .unwrap();
    }
    let scene = Scene::new(lab, "dev fabric");
    scene.is_left(UPLINK, "VRF fabric");
    scene.session.finish().unwrap();
}

#[test]
fn uplink_that_is_a_bond_is_fast_on_whichever_link_is_up() {
    let test = "uplink_that_is_a_bond_is_fast_on_whichever_link_is_up";
    if !has_devices(test, &[Device::Bond]) {
        return;
    }
    let lab = bare();
    for (i, host) in lab.hosts.iter().enumerate() {
        let (far, number) = (format!("to{}", i + 1), i + 1);
        let (address, gateway) = (host.address, host.gateway);
        let (mac, gateway_mac) = (host.uplink_mac, host.gateway_mac);
        // A switch with two links to the host.
        lab.router
            .run_all(&format!(
                "ip link add {far}b type veth peer name uplink1 netns {}
                 ip addr flush dev {far}
                 ip link add switch{number} address {gateway_mac} type bridge
                 ip link set {far} master switch{number}
                 ip link set {far}b master switch{number}
                 ethtool -K {far}b tso off gso off tx off txvlan off gro on
                 ip addr add {gateway}/24 dev switch{number}
                 ip link set switch{number} up",
                host.netns.name()
            ))
            .unwrap();
        host.netns
            .run_all(&format!(
                "ip addr flush dev {UPLINK}
                 ip link add bond0 address {mac} type bond mode active-backup miimon 50
                 ethtool -K uplink1 tso off gso off tx off txvlan off gro on
                 ip link set {UPLINK} down
                 ip link set {UPLINK} master bond0
                 ip link set uplink1 master bond0
                 ip link set bond0 up
                 ip addr add {address}/24 dev bond0
                 ip route add default via {gateway}"
            ))
            .unwrap();
        // Up at last, and told that the far ends poll.
        lab.router
            .run_all(&format!(
                "ip link set {far}b up
                 ethtool -K {far} gro off
                 ethtool -K {far} gro on
                 ethtool -K {far}b gro off
                 ethtool -K {far}b gro on"
            ))
            .unwrap();
    }
    let scene = Scene::new(lab, "");
    println!("{}", scene.status());
    assert_eq!(scene.uplink("bond0").unwrap()["accelerated"], true);
    scene.is_fast();
    let bond = &scene.lab.hosts[0].netns;
    for link in [UPLINK, "uplink1"] {
        bond.run(&format!("ip link set {link} down")).unwrap();
        scene.flows();
        scene.is_fast();
        bond.run(&format!("ip link set {link} up")).unwrap();
        scene.flows();
    }
    scene.session.finish().unwrap();
}
