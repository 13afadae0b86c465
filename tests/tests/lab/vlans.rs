//! Two segments on three hosts in every layout that the kernel knows: a bridge for
//! each, VLANs of one bridge with a VXLAN device for each, VLANs of one bridge with
//! a single VXLAN device. The same suite for all; the third host has no daemon.

mod facts;
mod scene;

use std::time::Duration;

use anyhow::Context as _;
use serde_json::Value;
use vtep_common::MacAddr;
use vtep_tests::frames::{Socket, is_udp_to};
use vtep_tests::streams::Stream;
use vtep_tests::wait_until;

use scene::*;

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

/// Refreshed under the names that the layout gives them; idle ones age.
fn busy_entries_stay_and_idle_ones_age(layout: Layout) {
    if !layout.works("busy_entries_stay_and_idle_ones_age") {
        return;
    }
    let mut scene = Scene::new(layout);
    let [a, b, idle] = [0, 1, 2].map(|host| scene.add_vm(host, 1, host as u8 + 1));
    // Ten seconds, for the bridge in hundredths: a virtual machine may stand still for
    // some.
    let (bridge, vxlan) = (layout.bridge(1), layout.vxlan(1));
    let netns = &scene.lab.hosts[0].netns;
    netns
        .run_all(&format!(
            "ip link set {bridge} type bridge ageing_time 1000
             ip link set {vxlan} type vxlan ageing 10"
        ))
        .unwrap();
    scene.start();
    scene.ping(a, b, 3);
    scene.ping(a, idle, 3);
    scene.wait_fast(1, scene.vm(b).mac);
    let stream = Stream::start(scene.vm(a), scene.vm(b), 50).unwrap();
    let knows = |vm: usize| {
        let mac = scene.vm(vm).mac.to_string();
        let all = scene.kernel_fdb(0);
        let known = all.iter().filter(|entry| entry["mac"] == mac).count();
        (known, all)
    };
    let aged = || Ok(knows(idle).0 == 0);
    wait_until(Duration::from_secs(60), "the idle entry ages", aged).unwrap();
    // As long again, and nothing in it was flooded.
    let deadline = std::time::Instant::now() + Duration::from_secs(12);
    while std::time::Instant::now() < deadline {
        let (known, all) = knows(b);
        assert_eq!(known, 2, "{all:?}");
        std::thread::sleep(Duration::from_secs(1));
    }
    assert_eq!(knows(a).0, 1);
    assert_eq!(stream.finish().unwrap().lost_frames, 0);
}

fn ports_are_added_to_the_vlan_of_a_vni(layout: Layout) {
    if !layout.works("ports_are_added_to_the_vlan_of_a_vni") {
        return;
    }
    let mut scene = Scene::new(layout);
    let peer = scene.add_vm(1, 1, 2);
    let vm = scene.add_loose_vm(0, 1);
    scene.start();
    let (daemon, vni) = (&scene.daemons[0], VNIS[1].to_string());
    let host = &scene.lab.hosts[0].netns;
    let port = &scene.vm(vm).port;
    // Not of the bridge's default VLAN.
    daemon
        .cli(&["port", "add", port, "--vni", &vni, "--hook", "xdp"])
        .unwrap();
    let text = host
        .run(&format!("bridge -j vlan show dev {port}"))
        .unwrap();
    let rows: Vec<Value> = serde_json::from_str(&text).unwrap();
    let vlans = &rows[0]["vlans"];
    assert_eq!(vlans.as_array().unwrap().len(), 1, "{text}");
    assert_eq!(vlans[0]["vlan"], VLANS[1]);
    assert_eq!(
        vlans[0]["flags"],
        serde_json::json!(["PVID", "Egress Untagged"])
    );
    scene.ping(vm, peer, 3);
    scene.wait_fast(1, scene.vm(vm).mac);
    // What is in other VLANs stays there.
    let other = VNIS[0].to_string();
    let (code, line) = daemon
        .refusal(&["port", "add", port, "--vni", &other])
        .unwrap();
    assert_eq!(code, 1);
    assert!(line.contains("bridge vlan add"), "{line}");
    daemon.cli(&["port", "del", port]).unwrap();
    assert!(port_rows(daemon, port).is_empty());
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
    // The stack has taken the tag out of the frame when tcx sees it.
    scene.start_with(|index| if index == trunk { "tcx" } else { "xdp" });
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
    busy_entries_stay_and_idle_ones_age
    ports_are_added_to_the_vlan_of_a_vni
    a_port_whose_pvid_changes_is_of_the_other_segment_alone
    tagged_frames_of_a_port_go_through_the_kernel
    vlan_filtering_is_followed
);
suite!(Single as single_device:
    known_unicast_is_fast_in_every_segment
    r2_equal_addresses_in_two_segments_never_meet
    tables_are_followed_and_written_in_the_segments_words
    a_restart_adopts_the_segments
    busy_entries_stay_and_idle_ones_age
    ports_are_added_to_the_vlan_of_a_vni
    a_port_whose_pvid_changes_is_of_the_other_segment_alone
    tagged_frames_of_a_port_go_through_the_kernel
    vlan_filtering_is_followed
);
