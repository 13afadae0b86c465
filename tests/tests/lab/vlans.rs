//! Two segments on three hosts in every layout that the kernel knows: a bridge for
//! each, VLANs of one bridge with a VXLAN device for each, VLANs of one bridge with
//! a single VXLAN device. The same suite for all; the third host has no daemon.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;
use vtep_common::MacAddr;
use vtep_tests::daemon::Daemon;
use vtep_tests::frames::{Socket, ethernet, ipv4_udp, is_udp_to};
use vtep_tests::lab::{Lab, Options, VM_MTU, Vm};
use vtep_tests::{Device, has_devices, is_root, wait_until};

const VLANS: [u16; 2] = [10, 20];
const VNIS: [u32; 2] = [100, 200];
const WAIT: Duration = Duration::from_secs(10);
/// Long enough for a frame that should not come, were it on its way.
const SILENCE: Duration = Duration::from_millis(300);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    Bridges,
    Vlans,
    Single,
}

impl Layout {
    #[must_use]
    fn works(self, test: &str) -> bool {
        let test = format!("{test} ({self:?})");
        match self {
            Self::Bridges => is_root(&test),
            Self::Vlans | Self::Single => has_devices(&test, &[Device::VlanAwareBridge]),
        }
    }

    fn bridge(self, n: usize) -> String {
        match self {
            Self::Bridges => format!("br{}", VNIS[n]),
            Self::Vlans | Self::Single => "br0".to_owned(),
        }
    }

    fn vxlan(self, n: usize) -> String {
        match self {
            Self::Single => "vxlan0".to_owned(),
            Self::Bridges | Self::Vlans => format!("vxlan{}", VNIS[n]),
        }
    }

    /// Words of `bridge fdb` that name the segment in the bridge's table.
    fn in_bridge(self, n: usize) -> String {
        match self {
            Self::Bridges => "master".to_owned(),
            Self::Vlans | Self::Single => format!("master vlan {}", VLANS[n]),
        }
    }

    /// The same in the VXLAN device's.
    fn in_tunnel(self, n: usize) -> String {
        match self {
            Self::Single => format!("self src_vni {}", VNIS[n]),
            Self::Bridges | Self::Vlans => "self".to_owned(),
        }
    }

    /// Commands that make the segments of one host.
    fn commands(self, local: IpAddr) -> String {
        let mut lines = String::new();
        let mut add = |line: String| lines += &(line + "\n");
        if self != Self::Bridges {
            add("ip link add br0 type bridge vlan_filtering 1 vlan_default_pvid 0".to_owned());
        }
        if self == Self::Single {
            add(format!(
                "ip link add vxlan0 type vxlan external vnifilter learning local {local} dstport 4789"
            ));
            add(format!("ip link set vxlan0 mtu {VM_MTU} master br0"));
            add("bridge link set dev vxlan0 vlan_tunnel on".to_owned());
        }
        for (n, (vlan, vni)) in VLANS.iter().zip(VNIS).enumerate() {
            let (bridge, vxlan) = (self.bridge(n), self.vxlan(n));
            match self {
                Self::Bridges => add(format!("ip link add {bridge} type bridge")),
                Self::Vlans => {}
                Self::Single => {
                    add(format!("bridge vlan add dev vxlan0 vid {vlan}"));
                    add(format!(
                        "bridge vlan add dev vxlan0 vid {vlan} tunnel_info id {vni}"
                    ));
                    add(format!("bridge vni add dev vxlan0 vni {vni}"));
                    continue;
                }
            }
            add(format!(
                "ip link add {vxlan} type vxlan id {vni} local {local} dstport 4789"
            ));
            add(format!("ip link set {vxlan} mtu {VM_MTU} master {bridge}"));
            if self == Self::Vlans {
                add(format!(
                    "bridge vlan add dev {vxlan} vid {vlan} pvid untagged"
                ));
            }
        }
        for n in 0..2 {
            add(format!("ip link set {} up", self.vxlan(n)));
            add(format!("ip link set {} up", self.bridge(n)));
        }
        lines
    }
}

struct Scene {
    layout: Layout,
    lab: Lab,
    daemons: Vec<Daemon>,
}

impl Scene {
    fn new(layout: Layout) -> Self {
        let lab = Lab::with(&Options {
            hosts: 3,
            segment: false,
            ..Options::default()
        })
        .unwrap();
        for host in &lab.hosts {
            host.netns.run_all(&layout.commands(host.address)).unwrap();
            let others = lab
                .hosts
                .iter()
                .filter(|other| other.address != host.address);
            for (n, other) in (0..2).flat_map(|n| others.clone().map(move |other| (n, other))) {
                let (vxlan, tunnel) = (layout.vxlan(n), layout.in_tunnel(n));
                let to = other.address;
                let line =
                    format!("bridge fdb append 00:00:00:00:00:00 dev {vxlan} {tunnel} dst {to}");
                host.netns.run(&line).unwrap();
            }
        }
        lab.warm_up().unwrap();
        Self {
            layout,
            lab,
            daemons: Vec::new(),
        }
    }

    /// A VM in a segment; `number` makes its MAC and address.
    fn add_vm(&mut self, host: usize, n: usize, number: u8) -> usize {
        let index = self.lab.add_vm(host).unwrap();
        let vm = &mut self.lab.vms[index];
        vm.mac = MacAddr([2, 0, 0, 0, 0, number]);
        vm.address = Ipv4Addr::new(10, 0, 0, number);
        vm.netns
            .run_all(&format!(
                "ip addr flush dev eth0
                 ip link set eth0 address {}
                 ip addr add {}/24 dev eth0",
                vm.mac, vm.address
            ))
            .unwrap();
        let (port, bridge) = (&vm.port, self.layout.bridge(n));
        let netns = &self.lab.hosts[host].netns;
        netns
            .run(&format!("ip link set {port} master {bridge}"))
            .unwrap();
        if self.layout != Layout::Bridges {
            let vlan = VLANS[n];
            netns
                .run(&format!(
                    "bridge vlan add dev {port} vid {vlan} pvid untagged"
                ))
                .unwrap();
        }
        // See `lab::plug` for GRO.
        netns
            .run_all(&format!(
                "ip link set {port} up
                 ethtool -K {port} gro off
                 ethtool -K {port} gro on"
            ))
            .unwrap();
        index
    }

    /// Daemons on the first two hosts, all ports on the XDP hook.
    fn start(&mut self) {
        let ports: Vec<&str> = self.lab.vms.iter().map(|vm| vm.port.as_str()).collect();
        let daemons = (0..2).map(|i| Daemon::start(&self.lab.hosts[i], &ports).unwrap());
        self.daemons = daemons.collect();
    }

    fn vm(&self, index: usize) -> &Vm {
        &self.lab.vms[index]
    }

    #[track_caller]
    fn ping(&self, from: usize, to: usize, count: u32) {
        let to = self.vm(to).address;
        self.vm(from)
            .netns
            .run(&format!("ping -c {count} -i 0.02 -W 2 {to}"))
            .unwrap();
    }

    /// Both hosts with daemons forward to a MAC of a segment.
    #[track_caller]
    fn wait_fast(&self, n: usize, mac: MacAddr) {
        for daemon in &self.daemons {
            wait_row(daemon, n, mac, |row| row["accelerated"] == true).unwrap();
        }
    }

    fn kernel_fdb(&self, host: usize) -> Vec<Value> {
        let text = self.lab.hosts[host]
            .netns
            .run("bridge -j fdb show")
            .unwrap();
        serde_json::from_str(&text).unwrap()
    }
}

fn row(daemon: &Daemon, n: usize, mac: MacAddr) -> Result<Option<Value>> {
    let rows = daemon.json(&[
        "fdb",
        "show",
        "--vni",
        &VNIS[n].to_string(),
        &mac.to_string(),
    ])?;
    Ok(rows.as_array().and_then(|rows| rows.first()).cloned())
}

fn wait_row(
    daemon: &Daemon,
    n: usize,
    mac: MacAddr,
    wanted: impl Fn(&Value) -> bool,
) -> Result<()> {
    wait_until(WAIT, &format!("{mac} in VNI {}", VNIS[n]), || {
        Ok(row(daemon, n, mac)?.is_some_and(|row| wanted(&row)))
    })
    .with_context(|| {
        let show = |words: &[&str]| daemon.cli(words).unwrap_or_else(|e| format!("{e:#}"));
        format!("{}\n{}", show(&["status"]), show(&["fdb", "show"]))
    })
    .map(drop)
}

/// Frames of a segment that ended in an outcome.
fn frames(daemon: &Daemon, n: usize, outcome: &str) -> u64 {
    let stats = daemon.json(&["stats"]).unwrap();
    let segments = stats["segments"].as_array().unwrap();
    let segment = segments
        .iter()
        .find(|s| s["vni"] == VNIS[n])
        .expect("a segment");
    segment["outcomes"][outcome]["frames"].as_u64().unwrap_or(0)
}

fn port_rows(daemon: &Daemon, port: &str) -> BTreeMap<u64, Value> {
    let rows = daemon.json(&["port", "show"]).unwrap();
    let rows = rows
        .as_array()
        .unwrap()
        .iter()
        .filter(|row| row["name"] == port);
    rows.map(|row| (row["vni"].as_u64().unwrap(), row.clone()))
        .collect()
}

/// One VM's end of its veth.
fn socket(vm: &Vm) -> Socket {
    vm.netns.enter(|| Socket::open("eth0")).unwrap()
}

/// A frame to `to`, known by its UDP port.
fn marked(from: &Vm, to: &Vm, mark: u16) -> Vec<u8> {
    let (source, destination) = (from.address.octets(), to.address.octets());
    let packet = ipv4_udp(source, destination, [mark, mark], &[0; 64]);
    ethernet(from.mac, to.mac, 0x0800, &packet)
}

/// Send marked frames; how many of them each of `ends` got.
fn deliver(from: &Vm, to: &Vm, mark: u16, count: usize, ends: &[&Vm]) -> Vec<usize> {
    let sender = socket(from);
    let listeners: Vec<Socket> = ends.iter().map(|vm| socket(vm)).collect();
    for _ in 0..count {
        sender.send(&marked(from, to, mark)).unwrap();
    }
    let heard = |socket: &Socket| {
        let first = socket.capture(count, WAIT.min(SILENCE * 3), |frame| is_udp_to(frame, mark));
        let more = socket.capture(1, SILENCE, |frame| is_udp_to(frame, mark));
        first.unwrap().len() + more.unwrap().len()
    };
    listeners.iter().map(heard).collect()
}

fn known_unicast_is_fast_in_every_segment(layout: Layout) {
    if !layout.works("known_unicast_is_fast_in_every_segment") {
        return;
    }
    let mut scene = Scene::new(layout);
    let vms: Vec<[usize; 3]> = (0..2u8)
        .map(|n| [0, 1, 2].map(|host| scene.add_vm(host, n.into(), 10 * n + host as u8 + 1)))
        .collect();
    scene.start();
    for (n, [a, b, c]) in vms.into_iter().enumerate() {
        // To the other daemon, and to the host that has the kernel alone.
        for (from, to) in [(a, b), (a, c), (b, c)] {
            scene.ping(from, to, 3);
        }
        for vm in [a, b, c] {
            scene.wait_fast(n, scene.vm(vm).mac);
        }
        let outcomes = ["egress-remote", "ingress-local"];
        let count = |outcome| frames(&scene.daemons[0], n, outcome);
        let before = outcomes.map(count);
        scene.ping(a, b, 20);
        scene.ping(c, a, 20);
        for (outcome, before) in outcomes.iter().zip(before) {
            let fast = count(outcome) - before;
            assert!(fast >= 40, "{outcome} in VNI {}: {fast}", VNIS[n]);
        }
    }
    let vnis = scene.daemons[0].json(&["vni", "show"]).unwrap();
    for (n, row) in vnis.as_array().unwrap().iter().enumerate() {
        assert_eq!(row["vni"], VNIS[n]);
        assert_eq!(row["vxlan"], layout.vxlan(n));
        let vlan = (layout != Layout::Bridges).then_some(VLANS[n]);
        assert_eq!(row["vlan"], serde_json::json!(vlan));
        assert_eq!(row["remotes"].as_array().unwrap().len(), 2, "{row}");
        assert_eq!(row["ports"].as_array().unwrap().len(), 1, "{row}");
    }
}

fn r2_equal_addresses_in_two_segments_never_meet(layout: Layout) {
    if !layout.works("r2_equal_addresses_in_two_segments_never_meet") {
        return;
    }
    let mut scene = Scene::new(layout);
    let [a, b] = [0, 1].map(|host| scene.add_vm(host, 0, host as u8 + 1));
    let [a2, b2] = [0, 1].map(|host| scene.add_vm(host, 1, host as u8 + 1));
    // Of the second segment alone, where the others have nobody.
    let alone = scene.add_vm(1, 1, 9);
    scene.start();
    scene.ping(a, b, 3);
    scene.ping(a2, b2, 3);
    scene.ping(a2, alone, 3);
    for n in 0..2 {
        scene.wait_fast(n, scene.vm(a).mac);
        scene.wait_fast(n, scene.vm(b).mac);
    }
    let before = [0, 1].map(|n| frames(&scene.daemons[0], n, "egress-remote"));
    let [vm_a, vm_b, vm_a2, vm_b2, vm_alone] = [a, b, a2, b2, alone].map(|i| scene.vm(i));
    const COUNT: usize = 50;
    assert_eq!(deliver(vm_a, vm_b, 4001, COUNT, &[vm_b, vm_b2]), [COUNT, 0]);
    assert_eq!(
        deliver(vm_a2, vm_b2, 4002, COUNT, &[vm_b, vm_b2]),
        [0, COUNT]
    );
    assert_eq!(deliver(vm_b, vm_a, 4003, COUNT, &[vm_a, vm_a2]), [COUNT, 0]);
    let after = [0, 1].map(|n| frames(&scene.daemons[0], n, "egress-remote"));
    assert!(after[0] - before[0] >= COUNT as u64, "{before:?} {after:?}");
    assert!(after[1] - before[1] >= COUNT as u64, "{before:?} {after:?}");
    // An address that only the other segment knows is flooded, within the segment.
    let heard = deliver(vm_a, vm_alone, 4004, COUNT, &[vm_b, vm_alone, vm_a2]);
    assert_eq!(heard, [COUNT, 0, 0]);
}

fn tables_are_followed_and_written_in_the_segments_words(layout: Layout) {
    if !layout.works("tables_are_followed_and_written_in_the_segments_words") {
        return;
    }
    let mut scene = Scene::new(layout);
    let port = scene.add_vm(0, 1, 1);
    scene.start();
    let (daemon, host) = (&scene.daemons[0], &scene.lab.hosts[0].netns);
    let there = [1, 2].map(|host| scene.lab.hosts[host].address.to_string());
    let mac = MacAddr([0, 1, 2, 3, 4, 5]);
    let (vxlan, bridge, tunnel) = (layout.vxlan(1), layout.in_bridge(1), layout.in_tunnel(1));
    // By the kernel's tools.
    host.run_all(&format!(
        "bridge fdb replace {mac} dev {vxlan} {tunnel} static dst {}
         bridge fdb replace {mac} dev {vxlan} {bridge} static",
        there[0]
    ))
    .unwrap();
    let at = |to: &str| {
        let to = to.to_owned();
        move |row: &Value| row["location"]["remote"] == to && row["accelerated"] == true
    };
    wait_row(daemon, 1, mac, at(&there[0])).unwrap();
    assert_eq!(row(daemon, 0, mac).unwrap(), None, "in the other segment");
    let line = format!(
        "bridge fdb replace {mac} dev {vxlan} {tunnel} static dst {}",
        there[1]
    );
    host.run(&line).unwrap();
    wait_row(daemon, 1, mac, at(&there[1])).unwrap();
    let name = &scene.vm(port).port;
    host.run(&format!(
        "bridge fdb replace {mac} dev {name} {bridge} static"
    ))
    .unwrap();
    wait_row(daemon, 1, mac, |row| row["location"]["port"] == *name).unwrap();
    // By ours: what the kernel has then is of this segment alone.
    let (vni, text) = (VNIS[1].to_string(), mac.to_string());
    let replace = ["fdb", "replace", &text, "--vni", &vni, "--dst", &there[0]];
    daemon.cli(&replace).unwrap();
    let entries = || {
        let all = scene.kernel_fdb(0).into_iter();
        // Told no VLAN, the kernel takes all that the port is in, asleep or not.
        let asleep = |entry: &Value| layout == Layout::Bridges && entry["vlan"] == 1;
        all.filter(|entry| entry["mac"] == text && !asleep(entry))
            .collect::<Vec<_>>()
    };
    let known = entries();
    assert_eq!(known.len(), 2, "{known:?}");
    for entry in &known {
        assert_eq!(entry["ifname"], vxlan, "{entry}");
        let in_bridge = entry["dst"].is_null();
        let vlan = (layout != Layout::Bridges && in_bridge).then_some(VLANS[1]);
        assert_eq!(entry["vlan"], serde_json::json!(vlan), "{entry}");
        let source = (layout == Layout::Single && !in_bridge).then_some(VNIS[1]);
        assert_eq!(entry["src_vni"], serde_json::json!(source), "{entry}");
    }
    daemon.cli(&["fdb", "del", &text, "--vni", &vni]).unwrap();
    assert_eq!(entries(), [] as [Value; 0]);
    assert_eq!(row(daemon, 1, mac).unwrap(), None);
}

fn a_restart_adopts_the_segments(layout: Layout) {
    if !layout.works("a_restart_adopts_the_segments") {
        return;
    }
    let mut scene = Scene::new(layout);
    let [a, b] = [0, 1].map(|host| scene.add_vm(host, 1, host as u8 + 1));
    scene.start();
    scene.ping(a, b, 3);
    scene.wait_fast(1, scene.vm(b).mac);
    let daemon = &mut scene.daemons[0];
    daemon.kill9().unwrap();
    daemon.spawn().unwrap();
    daemon.wait_ready().unwrap();
    scene.wait_fast(1, scene.vm(b).mac);
    let resync = scene.daemons[0].json(&["resync"]).unwrap();
    assert_eq!(resync["updates"], 0, "{resync}");
    scene.ping(a, b, 3);
}

fn a_port_whose_pvid_changes_is_of_the_other_segment_alone(layout: Layout) {
    if !layout.works("a_port_whose_pvid_changes_is_of_the_other_segment_alone") {
        return;
    }
    let mut scene = Scene::new(layout);
    let a = scene.add_vm(0, 0, 1);
    let b = scene.add_vm(1, 0, 2);
    let b2 = scene.add_vm(1, 1, 2);
    scene.start();
    scene.ping(a, b, 3);
    scene.wait_fast(0, scene.vm(a).mac);
    scene.wait_fast(0, scene.vm(b).mac);
    let [vm_a, vm_b, vm_b2] = [a, b, b2].map(|i| scene.vm(i));
    const COUNT: usize = 20;
    assert_eq!(deliver(vm_a, vm_b, 4001, COUNT, &[vm_b, vm_b2]), [COUNT, 0]);
    let host = &scene.lab.hosts[0].netns;
    let port = &vm_a.port;
    host.run_all(&format!(
        "bridge vlan del dev {port} vid {}
         bridge vlan add dev {port} vid {} pvid untagged",
        VLANS[0], VLANS[1]
    ))
    .unwrap();
    let daemon = &scene.daemons[0];
    wait_until(WAIT, "the port is in the other VLAN", || {
        let rows = port_rows(daemon, port);
        Ok(rows.len() == 1
            && rows
                .get(&u64::from(VNIS[1]))
                .is_some_and(|r| r["accelerated"] == true))
    })
    .unwrap();
    // Nobody is left behind in the old one.
    assert_eq!(deliver(vm_a, vm_b, 4002, COUNT, &[vm_b, vm_b2]), [0, COUNT]);
    assert_eq!(deliver(vm_b, vm_a, 4003, COUNT, &[vm_a]), [0]);
    scene.ping(a, b2, 3);
    scene.wait_fast(1, vm_a.mac);
    scene.wait_fast(1, vm_b2.mac);
    let before = frames(daemon, 1, "egress-remote");
    assert_eq!(
        deliver(vm_a, vm_b2, 4004, COUNT, &[vm_b, vm_b2]),
        [0, COUNT]
    );
    assert!(frames(daemon, 1, "egress-remote") - before >= COUNT as u64);
}

fn tagged_frames_of_a_port_go_through_the_kernel(layout: Layout) {
    if !layout.works("tagged_frames_of_a_port_go_through_the_kernel") {
        return;
    }
    let mut scene = Scene::new(layout);
    // Untagged in the second VLAN, tagged in the first.
    let trunk = scene.add_vm(0, 1, 1);
    let b = scene.add_vm(1, 0, 2);
    let b2 = scene.add_vm(1, 1, 2);
    let port = scene.vm(trunk).port.clone();
    scene.lab.hosts[0]
        .netns
        .run(&format!("bridge vlan add dev {port} vid {}", VLANS[0]))
        .unwrap();
    scene.start();
    let rows = port_rows(&scene.daemons[0], &port);
    let row = |n: usize| &rows[&u64::from(VNIS[n])];
    assert_eq!(row(1)["accelerated"], true, "{rows:?}");
    assert_eq!(row(0)["reason"], format!("tagged in VLAN {}", VLANS[0]));
    scene.ping(trunk, b2, 3);
    scene.wait_fast(1, scene.vm(trunk).mac);
    let [vm, vm_b, vm_b2] = [trunk, b, b2].map(|i| scene.vm(i));
    let [_, tag] = VLANS[0].to_be_bytes();
    let tagged = |mark| {
        let mut frame = marked(vm, vm_b, mark);
        frame.splice(12..12, [0x81, 0, 0, tag]);
        frame
    };
    // The tag goes, in the VLAN's VNI.
    let (out, ends) = (socket(vm), [socket(vm_b), socket(vm_b2)]);
    out.send(&tagged(4001)).unwrap();
    let heard = |socket: &Socket, mark: u16| {
        let frames = socket.capture(1, SILENCE * 3, |frame| is_udp_to(frame, mark));
        frames.unwrap().len()
    };
    assert_eq!([heard(&ends[0], 4001), heard(&ends[1], 4001)], [1, 0]);
    // The MAC is known behind the port in both VLANs; the answer gets the tag.
    wait_row(&scene.daemons[0], 0, vm.mac, |row| {
        row["location"]["port"] == port && row["accelerated"] == false
    })
    .unwrap();
    socket(vm_b).send(&marked(vm_b, vm, 4002)).unwrap();
    let is_tagged = |frame: &[u8]| frame.len() > 46 && frame[12..16] == [0x81, 0, 0, tag];
    let back = out.capture(1, WAIT, |frame| is_tagged(frame)).unwrap();
    assert_eq!(back.len(), 1, "the answer comes back with its tag");
    let mut plain = back[0].clone();
    plain.drain(12..16);
    assert!(is_udp_to(&plain, 4002));
    assert_eq!(deliver(vm_b2, vm, 4003, 10, &[vm]), [10]);
}

fn vlan_filtering_is_followed(layout: Layout) {
    if !layout.works("vlan_filtering_is_followed") {
        return;
    }
    let mut scene = Scene::new(layout);
    let [a, b] = [0, 1].map(|host| scene.add_vm(host, 0, host as u8 + 1));
    scene.start();
    scene.ping(a, b, 3);
    scene.wait_fast(0, scene.vm(b).mac);
    let daemon = &scene.daemons[0];
    for (on, accelerated) in [(0, false), (1, true), (0, false), (1, true)] {
        let line = format!("ip link set br0 type bridge vlan_filtering {on}");
        scene.lab.hosts[0].netns.run(&line).unwrap();
        wait_until(WAIT, &format!("filtering {on}"), || {
            let status = daemon.json(&["status"])?;
            let segments = status["segments"].as_array().context("segments")?;
            Ok(segments.iter().all(|row| row["accelerated"] == accelerated))
        })
        .unwrap();
    }
    scene.ping(a, b, 3);
    scene.wait_fast(0, scene.vm(a).mac);
    scene.wait_fast(0, scene.vm(b).mac);
    let before = frames(daemon, 0, "egress-remote");
    scene.ping(a, b, 10);
    assert!(frames(daemon, 0, "egress-remote") - before >= 10);
}

macro_rules! suite {
    ($layout:ident as $module:ident: $($test:ident)*) => {
        mod $module {
            $(
                #[test]
                fn $test() {
                    super::$test(super::Layout::$layout);
                }
            )*
        }
    };
}

suite!(Bridges as bridges:
    known_unicast_is_fast_in_every_segment
    r2_equal_addresses_in_two_segments_never_meet
    tables_are_followed_and_written_in_the_segments_words
    a_restart_adopts_the_segments
);
suite!(Vlans as per_vni:
    known_unicast_is_fast_in_every_segment
    r2_equal_addresses_in_two_segments_never_meet
    tables_are_followed_and_written_in_the_segments_words
    a_restart_adopts_the_segments
    a_port_whose_pvid_changes_is_of_the_other_segment_alone
    tagged_frames_of_a_port_go_through_the_kernel
    vlan_filtering_is_followed
);
suite!(Single as single_device:
    known_unicast_is_fast_in_every_segment
    r2_equal_addresses_in_two_segments_never_meet
    tables_are_followed_and_written_in_the_segments_words
    a_restart_adopts_the_segments
    a_port_whose_pvid_changes_is_of_the_other_segment_alone
    tagged_frames_of_a_port_go_through_the_kernel
    vlan_filtering_is_followed
);
