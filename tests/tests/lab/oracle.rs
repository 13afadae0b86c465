//! The kernel's driver as oracle: two hosts that are alike, one accelerated. The
//! same frames go into both, in both directions, and what comes out on the wire
//! and at the VMs must be equal.

use std::time::Duration;

use vtep_common::MacAddr;
use vtep_tests::corpus::{self, A, A2, C, Case, FAR, FAR_IP, NEAR, NEAR_IP};
use vtep_tests::daemon::Daemon;
use vtep_tests::frames::{Socket, ethernet};
use vtep_tests::lab::{Family, Lab, VM_MTU, Vm};
use vtep_tests::twins::{Device, Report, Tap, Twins, encapsulated};
use vtep_tests::vnet::Header;
use vtep_tests::{is_root, wait_until};

/// Frames beside those of the tables, per direction.
const GENERATED: usize = 2000;
/// Frames of every kind in the tests of one requirement.
const EACH: usize = 20;

const NOBODY: MacAddr = MacAddr([2, 0, 0, 0, 0xee, 1]);
const EVERYBODY: MacAddr = MacAddr([0xff; 6]);
const SOME: MacAddr = MacAddr([1, 0, 0x5e, 1, 2, 3]);

/// The whole corpus through a device, in both directions.
fn compare(test: &str, device: &Device, seed: u64) {
    if !is_root(test) {
        return;
    }
    let mut twins = Twins::new(device).unwrap();
    let egress = corpus::egress(&twins.world, seed, GENERATED);
    let ingress = corpus::ingress(&twins.world, seed + 1, GENERATED);
    for (tap, cases) in [(Tap::A, egress), (Tap::Wire, ingress)] {
        let report = run(&mut twins, tap, &cases);
        assert!(report.frames > GENERATED);
        println!(
            "{test}, from {tap:?}: {} frames, {} fast of {} known unicast",
            report.frames, report.fast, report.expected_fast,
        );
    }
    twins.compare_fdb().unwrap();
}

fn run(twins: &mut Twins, tap: Tap, cases: &[Case]) -> Report {
    twins.run(tap, cases).unwrap_or_else(|e| panic!("{e:#}"))
}

/// Frames that came out at the wire, the first and the second VM.
fn out(report: &Report) -> [usize; 3] {
    [Tap::Wire, Tap::A, Tap::C].map(|tap| report.out.get(&tap).copied().unwrap_or(0))
}

#[test]
fn r42_default_device_equals_the_kernel_and_every_frame_is_counted() {
    compare("default device", &Device::default(), 0x1001);
}

#[test]
fn r5_device_without_udp_checksums_equals_the_kernel() {
    let device = Device {
        vxlan: "noudpcsum",
        ..Device::default()
    };
    compare("noudpcsum", &device, 0x2001);
}

#[test]
fn r7_device_that_does_not_learn_equals_the_kernel() {
    let device = Device {
        vxlan: "nolearning",
        ..Device::default()
    };
    compare("nolearning", &device, 0x3001);
}

/// As routing daemons set it up: nothing is learned from the wire.
#[test]
fn r7_device_and_bridge_port_that_do_not_learn_equal_the_kernel() {
    let device = Device {
        vxlan: "nolearning",
        bridge_learning: false,
        ..Device::default()
    };
    compare("nolearning, learning off", &device, 0x4001);
}

#[test]
fn r3_r4_device_with_other_ports_equals_the_kernel() {
    let device = Device {
        vxlan: "srcport 50000 50100",
        udp_port: 8472,
        ..Device::default()
    };
    compare("port 8472, srcport", &device, 0x5001);
}

#[test]
fn r28_device_with_tos_and_ttl_equals_the_kernel() {
    let device = Device {
        vxlan: "tos 0x10 ttl 5",
        ..Device::default()
    };
    compare("tos 0x10 ttl 5", &device, 0x6001);
}

#[test]
fn r28_r34_devices_that_inherit_equal_the_kernel() {
    for (underlay, vxlan) in [
        (Family::V4, "tos inherit ttl inherit df inherit"),
        (Family::V6, "tos inherit ttl inherit flowlabel 0x12345"),
    ] {
        let device = Device {
            underlay,
            vxlan,
            ..Device::default()
        };
        compare(&format!("{underlay:?} {vxlan}"), &device, 0x9001);
    }
}

#[test]
fn r34_device_that_sets_df_equals_the_kernel() {
    let device = Device {
        vxlan: "df set",
        ..Device::default()
    };
    compare("df set", &device, 0x7001);
}

#[test]
fn r31_ports_of_different_mtu_equal_the_kernel() {
    let device = Device {
        small_mtu: 1400,
        ..Device::default()
    };
    compare("MTU 1400", &device, 0x8001);
}

/// Twins with the default device for the tests of one requirement.
fn twins(test: &str) -> Option<Twins> {
    is_root(test).then(|| Twins::new(&Device::default()).unwrap())
}

#[test]
fn r1_flags_and_reserved_bits_are_left_to_the_kernel() {
    let Some(mut twins) = twins("r1") else { return };
    let changes = [
        "no I flag",
        "group policy flag",
        "group policy identifier",
        "one flag or reserved bit",
        "all flags",
        "reserved byte",
    ];
    let cases = corpus::ingress_changed(&twins.world, &changes, EACH);
    let report = run(&mut twins, Tap::Wire, &cases);
    assert_eq!(report.fast, 0);
    // The reserved byte is part of the key of the segment.
    let count = |name| report.outcomes.get(name).copied().unwrap_or(0) as usize;
    let passed = count("ingress-pass-flags") + count("ingress-pass-unknown-vni");
    assert_eq!(passed, cases.len());
}

#[test]
fn r2_r3_other_vnis_and_ports_are_never_delivered() {
    let Some(mut twins) = twins("r2_r3") else {
        return;
    };
    let cases = corpus::ingress_changed(&twins.world, &["other VNI", "other UDP port"], EACH);
    let report = run(&mut twins, Tap::Wire, &cases);
    let [_, a, c] = out(&report);
    assert_eq!((report.fast, a, c), (0, 0, 0));
}

#[test]
fn r5_udp_checksums_are_accepted_and_sent_as_the_kernel_does() {
    if !is_root("r5") {
        return;
    }
    for vxlan in ["udpcsum", "noudpcsum"] {
        let device = Device {
            vxlan,
            ..Device::default()
        };
        let mut twins = Twins::new(&device).unwrap();
        let accepted = corpus::ingress_changed(&twins.world, &["as it is", "UDP checksum"], EACH);
        let report = run(&mut twins, Tap::Wire, &accepted);
        assert_eq!(report.fast as usize, accepted.len());
        assert_eq!(out(&report), [0, accepted.len(), 0]);

        let wrong = corpus::ingress_changed(&twins.world, &["wrong UDP checksum"], EACH);
        let report = run(&mut twins, Tap::Wire, &wrong);
        assert_eq!(report.outcomes["ingress-pass-checksum"], EACH as u64);
        assert_eq!(out(&report), [0, 0, 0]);

        let sent = corpus::egress_to(&twins.world, &[NEAR[0]], &["udp4", "tcp6"], EACH);
        let report = run(&mut twins, Tap::A, &sent);
        assert_eq!(report.fast as usize, sent.len());
        // That they are right, the comparison has looked at.
        let mut checksums = twins.out(Tap::Wire).iter().map(|frame| &frame[40..42]);
        assert!(checksums.all(|sum| (sum == [0, 0]) == (vxlan == "noudpcsum")));
    }
}

#[test]
fn r6_outer_fragments_are_put_together_by_the_kernel() {
    let Some(mut twins) = twins("r6") else { return };
    let pairs = corpus::ingress_in_two_fragments(&twins.world);
    let report = run(&mut twins, Tap::Wire, &pairs);
    assert_eq!(report.fast, 0);
    assert_eq!(out(&report), [0, pairs.len() / 2, 0]);
    let halves = corpus::ingress_changed(&twins.world, &["first fragment", "last fragment"], EACH);
    let report = run(&mut twins, Tap::Wire, &halves);
    assert_eq!(out(&report), [0, 0, 0]);
}

#[test]
fn r8_frames_for_many_or_nobody_known_are_flooded_by_the_kernel() {
    let Some(mut twins) = twins("r8") else { return };
    let to = [NOBODY, EVERYBODY, SOME];
    let kinds = ["udp4", "tcp6", "arp request", "odd type"];
    let cases = corpus::egress_to(&twins.world, &to, &kinds, EACH);
    let n = cases.len();
    let report = run(&mut twins, Tap::A, &cases);
    assert_eq!(report.fast, 0);
    // To both remotes, and to the other VM.
    assert_eq!(out(&report), [2 * n, 0, n]);
    let cases = corpus::ingress_to(&twins.world, &to, &kinds, EACH);
    let report = run(&mut twins, Tap::Wire, &cases);
    assert_eq!(report.fast, 0);
    assert_eq!(out(&report), [0, n, n]);
}

#[test]
fn r9_tagged_frames_go_the_way_of_the_bridge() {
    let Some(mut twins) = twins("r9") else { return };
    let kinds = ["vlan", "priority tag", "qinq"];
    let cases = corpus::egress_to(&twins.world, &[NEAR[0]], &kinds, EACH);
    let n = cases.len();
    let report = run(&mut twins, Tap::A, &cases);
    assert_eq!((report.fast, out(&report)), (0, [n, 0, 0]));
    let cases = corpus::ingress_to(&twins.world, &[A], &kinds, EACH);
    let report = run(&mut twins, Tap::Wire, &cases);
    assert_eq!((report.fast, out(&report)), (0, [0, n, 0]));
}

#[test]
fn r11_nothing_from_the_wire_goes_to_another_remote() {
    let Some(mut twins) = twins("r11") else {
        return;
    };
    let kinds = ["udp4", "tcp6", "arp reply", "odd type"];
    let cases = corpus::ingress_to(&twins.world, &[NEAR[0], NEAR[1], FAR], &kinds, EACH);
    let report = run(&mut twins, Tap::Wire, &cases);
    assert_eq!((report.fast, out(&report)), (0, [0, 0, 0]));
    let flooded = corpus::ingress_to(&twins.world, &[NOBODY, EVERYBODY], &kinds, EACH);
    let report = run(&mut twins, Tap::Wire, &flooded);
    let n = flooded.len();
    assert_eq!((report.fast, out(&report)), (0, [0, n, n]));
}

#[test]
fn r12_frames_with_our_own_source_are_dropped_and_counted() {
    let Some(mut twins) = twins("r12") else {
        return;
    };
    let cases = corpus::ingress_changed(&twins.world, &["own source"], EACH);
    let report = run(&mut twins, Tap::Wire, &cases);
    assert_eq!(report.outcomes["ingress-drop-own-source"], EACH as u64);
    assert_eq!(out(&report), [0, 0, 0]);
    // The first remote knows the station: it does not get its frame back.
    let back = corpus::ingress_to(&twins.world, &[NEAR[1]], &["udp4"], EACH);
    assert_eq!(out(&run(&mut twins, Tap::Wire, &back)), [0, 0, 0]);
}

/// One frame of an unknown or moved station.
fn hello(twins: &Twins, from: Tap, outer: [u8; 4], ends: [MacAddr; 2]) -> Case {
    let inner = ethernet(ends[0], ends[1], 0x88b5, &[7; 46]);
    let frame = match from {
        Tap::Wire => encapsulated(&twins.world, outer, &inner),
        _ => inner,
    };
    Case {
        vnet: Header::default(),
        what: format!("{} > {} from {from:?}", ends[0], ends[1]),
        frame,
        way: corpus::Way::Either,
        flow: 0,
    }
}

/// A station that nobody has declared turns up at every place in turn.
#[test]
fn r7_stations_are_learned_and_move_as_in_the_kernel() {
    let station = MacAddr([2, 0, 0, 0, 0x77, 1]);
    let Some(mut twins) = twins("r7") else { return };
    let near = "198.51.100.2";
    let places = [
        (Tap::A, NEAR_IP, "port1"),
        (Tap::Wire, NEAR_IP, near),
        (Tap::Wire, FAR_IP, "203.0.113.2"),
        (Tap::C, NEAR_IP, "port2"),
        (Tap::A, NEAR_IP, "port1"),
        (Tap::Wire, FAR_IP, "203.0.113.2"),
        (Tap::Wire, NEAR_IP, near),
    ];
    for (tap, outer, place) in places {
        let to = if tap == Tap::Wire { A2 } else { NEAR[1] };
        let first = hello(&twins, tap, outer, [station, to]);
        assert_eq!(run(&mut twins, tap, &[first]).fast, 0, "{place}");
        twins.wait_place(station, place).unwrap();
        let fdb = twins.compare_fdb().unwrap();
        assert!(fdb.iter().any(|line| line.starts_with("02:00:00:00:77:01")));
        // Known now: fast in both directions, from and to it.
        let second = hello(&twins, tap, outer, [station, to]);
        assert_eq!(run(&mut twins, tap, &[second]).fast, 1, "{place}");
        let (tap, from) = match tap {
            Tap::A => (Tap::C, C),
            _ => (Tap::A, A),
        };
        let answer = hello(&twins, tap, NEAR_IP, [from, station]);
        assert_eq!(run(&mut twins, tap, &[answer]).fast, 1, "{place}");
    }
}

#[test]
fn r7_nothing_is_learned_where_learning_is_off() {
    if !is_root("r7_nothing") {
        return;
    }
    let device = Device {
        vxlan: "nolearning",
        bridge_learning: false,
        ..Device::default()
    };
    let mut twins = Twins::new(&device).unwrap();
    let before = twins.compare_fdb().unwrap();
    let station = MacAddr([2, 0, 0, 0, 0x77, 1]);
    for outer in [NEAR_IP, FAR_IP] {
        for source in [station, NEAR[0], FAR] {
            let case = hello(&twins, Tap::Wire, outer, [source, A]);
            assert_eq!(out(&run(&mut twins, Tap::Wire, &[case])), [0, 1, 0]);
        }
    }
    assert_eq!(twins.compare_fdb().unwrap(), before);
}

/// A host of the test of two segments: what the laboratory does not make.
fn add_segment_200(lab: &Lab, host: usize) {
    let address = lab.hosts[host].address;
    let other = lab.hosts[1 - host].address;
    lab.hosts[host]
        .netns
        .run_all(&format!(
            "ip link add br200 type bridge
             ip link add vxlan200 type vxlan id 200 local {address} dstport 4789
             ip link set vxlan200 mtu {VM_MTU} master br200
             ip link set vxlan200 up
             ip link set br200 up
             bridge fdb append 00:00:00:00:00:00 dev vxlan200 dst {other}"
        ))
        .unwrap();
}

/// Both stations exist in both segments, on the same hosts: four VMs with two
/// addresses between them.
#[test]
fn r2_equal_macs_in_two_segments_never_mix() {
    const FRAMES: u32 = 200;
    if !is_root("r2_equal_macs_in_two_segments_never_mix") {
        return;
    }
    let macs = [MacAddr([2, 0, 0, 0, 7, 1]), MacAddr([2, 0, 0, 0, 7, 2])];
    let mut lab = Lab::new().unwrap();
    for host in 0..2 {
        add_segment_200(&lab, host);
        for vni in [100, 200] {
            let vm = lab.add_vm(host).unwrap();
            let Vm { netns, port, .. } = &lab.vms[vm];
            netns
                .run_all(&format!(
                    "ip addr flush dev eth0
                     ip link set eth0 down
                     ip link set eth0 address {} up",
                    macs[host]
                ))
                .unwrap();
            let other = lab.hosts[1 - host].address;
            lab.hosts[host]
                .netns
                .run_all(&format!(
                    "ip link set {port} master br{vni}
                     bridge fdb replace {} dev {port} master static
                     bridge fdb replace {} dev vxlan{vni} self static dst {other}
                     bridge fdb replace {} dev vxlan{vni} master static",
                    macs[host],
                    macs[1 - host],
                    macs[1 - host]
                ))
                .unwrap();
        }
    }
    lab.warm_up().unwrap();
    let daemons = [0, 1].map(|host: usize| {
        let ports = [&lab.vms[2 * host].port, &lab.vms[2 * host + 1].port];
        Daemon::start(&lab.hosts[host], &ports.map(String::as_str)).unwrap()
    });
    for daemon in &daemons {
        wait_until(Duration::from_secs(5), "four fast stations", || {
            let rows = daemon.json(&["fdb", "show"])?;
            let of = |vni| {
                let rows = rows.as_array().into_iter().flatten();
                let fast = rows.filter(|row| row["vni"] == vni && row["accelerated"] == true);
                fast.filter(|row| macs.iter().any(|mac| row["mac"] == mac.to_string()))
                    .count()
            };
            Ok((of(100), of(200)) == (2, 2))
        })
        .unwrap();
    }
    let sockets: Vec<Socket> = lab
        .vms
        .iter()
        .map(|vm| vm.netns.enter(|| Socket::open("eth0")).unwrap())
        .collect();
    // VMs 0 and 1 are on the first host, 2 and 3 on the second; even ones in VNI 100.
    let send = |vm: usize, number: u32| {
        let host = vm / 2;
        let mut payload = vec![0xd2, vm as u8];
        payload.extend(number.to_be_bytes());
        payload.resize(46, 0);
        let frame = ethernet(macs[host], macs[1 - host], 0x88b5, &payload);
        sockets[vm].send(&frame).unwrap();
    };
    let receive = |vm: usize| {
        let frames = sockets[vm]
            .capture(1, Duration::from_secs(5), |frame| {
                frame.get(12..15) == Some(&[0x88, 0xb5, 0xd2])
            })
            .unwrap();
        let frame = frames.first().expect("a frame is missing");
        let number = u32::from_be_bytes([frame[16], frame[17], frame[18], frame[19]]);
        (usize::from(frame[15]), number)
    };
    for number in 0..FRAMES {
        (0..4).for_each(|vm| send(vm, number));
    }
    for vm in 0..4 {
        // Exactly those of the peer, in order; the next frame after them is its last.
        for number in 0..FRAMES {
            assert_eq!(receive(vm), (vm ^ 2, number), "at VM {vm}");
        }
    }
    (0..4).for_each(|vm| send(vm, FRAMES));
    (0..4).for_each(|vm| assert_eq!(receive(vm), (vm ^ 2, FRAMES), "at VM {vm}"));
    for daemon in &daemons {
        let sent = u64::from(2 * (FRAMES + 1));
        assert_eq!(daemon.frames("egress-remote").unwrap(), sent);
        assert_eq!(daemon.frames("ingress-local").unwrap(), sent);
    }
}
