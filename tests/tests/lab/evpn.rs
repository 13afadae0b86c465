//! What a routing daemon does to the kernel's tables (EVPN, RFC 7432 and its
//! companions), written as FRR's zebra writes it, is followed; what the bridge
//! or the host's IP stack has to see, they see.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vtep_common::MacAddr;
use vtep_tests::daemon::Daemon;
use vtep_tests::frames::{Socket, ethernet, ipv4_udp, rarp};
use vtep_tests::lab::{BRIDGE, Lab, Options, VXLAN, Vm};
use vtep_tests::maps::{Maps, Way};
use vtep_tests::{is_root, wait_until};

const SOON: Duration = Duration::from_secs(5);
/// The only segment of a host.
const SEGMENT: u16 = 1;

/// Two hosts that learn nothing from the wire, as with EVPN; a daemon on the first.
struct Scene {
    lab: Lab,
    daemon: Daemon,
    maps: Maps,
}

impl Scene {
    fn new() -> Self {
        let mut lab = Lab::with(&Options {
            vxlan: "nolearning".to_owned(),
            ..Options::default()
        })
        .unwrap();
        for host in 0..2 {
            lab.add_vm(host).unwrap();
            let netns = &lab.hosts[host].netns;
            netns
                .run(&format!("bridge link set dev {VXLAN} learning off"))
                .unwrap();
        }
        let daemon = Daemon::start(&lab.hosts[0], &["port1"]).unwrap();
        let maps = Maps::open(daemon.instance()).unwrap();
        Self { lab, daemon, maps }
    }

    fn run(&self, lines: &str) {
        self.lab.hosts[0].netns.run_all(lines).unwrap();
    }

    fn vm(&self, number: usize) -> &Vm {
        &self.lab.vms[number]
    }

    /// A type-2 route of another host, as zebra installs it: one message for the
    /// tables of bridge and device, which the kernel writes one after the other.
    fn install(&self, mac: MacAddr, remote: IpAddr) {
        self.run(&format!(
            "bridge fdb replace {mac} dev {VXLAN} master self dynamic extern_learn dst {remote}"
        ));
    }

    fn withdraw(&self, mac: MacAddr, remote: IpAddr) {
        self.run(&format!(
            "bridge fdb del {mac} dev {VXLAN} self dst {remote}"
        ));
    }

    #[track_caller]
    fn is_at(&self, mac: MacAddr, way: Way) {
        wait_until(SOON, &format!("{mac} is at {way:?}"), || {
            Ok(self.maps.get(SEGMENT, mac) == Some(way))
        })
        .unwrap_or_else(|e| panic!("{e}: {:?}", self.maps.get(SEGMENT, mac)));
    }

    fn port(&self) -> Way {
        Way::Port(self.lab.hosts[0].netns.ifindex("port1").unwrap())
    }
}

/// A MAC comes, goes to another host with a higher sequence, and comes back by
/// its own announcement; late withdraws of places it has left change nothing.
/// Meanwhile the entry is always there: it says a place, or (between the kernel's
/// two writes) that the kernel decides.
#[test]
fn r16_r17_r18_what_the_routing_daemon_installs_is_followed_without_a_gap() {
    if !is_root("r16_r17_r18_what_the_routing_daemon_installs_is_followed_without_a_gap") {
        return;
    }
    let scene = Scene::new();
    let (vm, far) = (scene.vm(0), scene.lab.hosts[1].address);
    let elsewhere: IpAddr = "203.0.113.2".parse().unwrap();
    scene
        .lab
        .router
        .run("ip route add 203.0.113.0/24 via 198.51.100.2")
        .unwrap();
    let announce = vm.netns.enter(|| Socket::open("eth0")).unwrap();
    announce.send(&rarp(vm.mac)).unwrap();
    scene.is_at(vm.mac, scene.port());
    let done = AtomicBool::new(false);
    let gaps = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut gaps = 0;
            while !done.load(Ordering::Relaxed) {
                gaps += u32::from(scene.maps.get(SEGMENT, vm.mac).is_none());
            }
            gaps
        });
        for _ in 0..20 {
            // Away, further, and home again.
            scene.install(vm.mac, far);
            scene.is_at(vm.mac, Way::Remote(far));
            scene.install(vm.mac, elsewhere);
            scene.is_at(vm.mac, Way::Remote(elsewhere));
            announce.send(&rarp(vm.mac)).unwrap();
            scene.is_at(vm.mac, scene.port());
            scene.withdraw(vm.mac, elsewhere);
            scene.is_at(vm.mac, scene.port());
        }
        done.store(true, Ordering::Relaxed);
        reader.join().unwrap()
    });
    assert_eq!(gaps, 0, "moments without a destination");
}

/// A sticky MAC, or one that the daemon has frozen, stays where it is said to
/// be, whatever a VM claims.
#[test]
fn r19_r20_sticky_entries_are_not_moved_by_frames() {
    if !is_root("r19_r20_sticky_entries_are_not_moved_by_frames") {
        return;
    }
    let scene = Scene::new();
    let (vm, far) = (scene.vm(0), scene.lab.hosts[1].address);
    let claimed = MacAddr([2, 0, 0, 0, 9, 9]);
    for flags in ["static sticky", "static"] {
        scene.run(&format!(
            "bridge fdb replace {claimed} dev {VXLAN} master {flags}
             bridge fdb replace {claimed} dev {VXLAN} self static dst {far}"
        ));
        scene.is_at(claimed, Way::Remote(far));
        let socket = vm.netns.enter(|| Socket::open("eth0")).unwrap();
        let passed = || scene.daemon.frames("egress-pass-unknown-source").unwrap();
        let before = passed();
        let packet = ipv4_udp([10, 0, 0, 1], [10, 0, 0, 2], [1, 2], &[0; 60]);
        let frame = ethernet(claimed, scene.vm(1).mac, 0x0800, &packet);
        for _ in 0..50 {
            socket.send(&frame).unwrap();
        }
        wait_until(SOON, "the kernel decides about them", || {
            Ok(passed() >= before + 50)
        })
        .unwrap();
        // Sticky: stays. Static without it: the bridge moves it, and so do we.
        if flags.contains("sticky") {
            scene.is_at(claimed, Way::Remote(far));
        } else {
            scene.is_at(claimed, scene.port());
        }
    }
}

/// The bridge answers ARP for the remote station itself, and announcements
/// reach the other host in spite of it.
#[test]
fn r21_suppression_answers_and_announcements_are_not_swallowed() {
    if !is_root("r21_suppression_answers_and_announcements_are_not_swallowed") {
        return;
    }
    let scene = Scene::new();
    let (a, b) = (scene.vm(0), scene.vm(1));
    scene.install(b.mac, scene.lab.hosts[1].address);
    scene.run(&format!(
        "bridge link set dev {VXLAN} neigh_suppress on
         ip addr add 10.0.0.254/24 dev {BRIDGE}
         ip neigh replace {} lladdr {} dev {BRIDGE} nud permanent",
        b.address, b.mac
    ));
    scene.is_at(b.mac, Way::Remote(scene.lab.hosts[1].address));
    let wire = scene.lab.router.enter(|| Socket::open("to1")).unwrap();
    let send = a.netns.enter(|| Socket::open("eth0")).unwrap();
    // The station itself cannot answer, so the ping fails; the bridge has to.
    b.netns.run("ip link set eth0 down").unwrap();
    let ping = format!("ping -c 1 -W 1 {}", b.address);
    assert!(a.netns.run(&ping).is_err());
    let known = a.netns.run("ip neigh show dev eth0").unwrap();
    assert!(known.contains(&b.mac.to_string()), "{known}");
    send.send(&rarp(a.mac)).unwrap();
    let ethertype = |frame: &[u8]| frame.get(62..64).map(|b| [b[0], b[1]]);
    let seen = wire
        .capture(1, SOON, |frame| ethertype(frame) == Some([0x80, 0x35]))
        .unwrap();
    assert_eq!(seen.len(), 1, "the RARP is on the wire");
}

/// Frames for the host's own MAC in the bridge (router MAC of an anycast
/// gateway or an L3VNI) go to its IP stack.
#[test]
fn r25_frames_for_the_hosts_router_mac_reach_its_ip_stack() {
    if !is_root("r25_frames_for_the_hosts_router_mac_reach_its_ip_stack") {
        return;
    }
    let scene = Scene::new();
    scene.run(&format!(
        "ip link set {BRIDGE} address 02:00:00:00:fe:01
         ip addr add 10.0.0.254/24 dev {BRIDGE}"
    ));
    let router_mac = "02:00:00:00:fe:01".parse().unwrap();
    // The other host knows it as EVPN would tell it.
    scene.lab.set_remote(1, router_mac, 0).unwrap();
    let (near, far) = (scene.vm(0), scene.vm(1));
    scene.install(far.mac, scene.lab.hosts[1].address);
    let passed = || {
        let frames = |outcome| scene.daemon.frames(outcome).unwrap();
        frames("ingress-pass-kernel-destination") + frames("ingress-pass-unknown-destination")
    };
    let before = passed();
    for vm in [near, far] {
        let line = "ip neigh replace 10.0.0.254 lladdr 02:00:00:00:fe:01 dev eth0 nud permanent";
        vm.netns.run(line).unwrap();
        vm.netns.run("ping -c 5 -i 0.1 -W 2 10.0.0.254").unwrap();
    }
    assert!(passed() >= before + 5, "the IP stack answered them");
}
