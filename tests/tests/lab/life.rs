//! The data path outlives the controller, and entries change under load without
//! a moment in which they point nowhere.

use std::time::Duration;

use vtep_tests::daemon::Daemon;
use vtep_tests::lab::{Family, Lab, Options, VXLAN};
use vtep_tests::netns::Netns;
use vtep_tests::streams::Stream;
use vtep_tests::{on_both_underlays, wait_until};

on_both_underlays!(
    r39_kill_and_restart_under_100k_frames_lose_nothing,
    r39_restart_without_a_change_in_the_kernel_writes_nothing,
    unload_leaves_nothing_and_the_kernel_goes_on,
    r37_replace_under_load_loses_nothing,
);

/// Two hosts with a VM each, both accelerated, everything learned.
fn two_hosts(underlay: Family) -> (Lab, [Daemon; 2]) {
    let mut lab = Lab::on(underlay).unwrap();
    let (a, b) = (lab.add_vm(0).unwrap(), lab.add_vm(1).unwrap());
    let daemons = [0, 1].map(|i| Daemon::start(&lab.hosts[i], &[&lab.vms[i].port]).unwrap());
    lab.vms[a]
        .netns
        .run("ping -c 2 -i 0.2 -W 2 10.0.0.2")
        .unwrap();
    for daemon in &daemons {
        daemon.wait_accelerated(lab.vms[a].mac).unwrap();
        daemon.wait_accelerated(lab.vms[b].mac).unwrap();
    }
    (lab, daemons)
}

/// Id of the XDP program on a device, as the kernel reports it.
fn program_id(netns: &Netns, device: &str) -> Option<u64> {
    let text = netns
        .run(&format!("ip -j -d link show dev {device}"))
        .unwrap();
    let links: serde_json::Value = serde_json::from_str(&text).unwrap();
    links[0]["xdp"]["prog"]["id"].as_u64()
}

fn r39_kill_and_restart_under_100k_frames_lose_nothing(underlay: Family) {
    let (lab, mut daemons) = two_hosts(underlay);
    let port = lab.vms[0].port.clone();
    let before = program_id(&lab.hosts[0].netns, &port).expect("a program");
    let stream = Stream::start(&lab.vms[0], &lab.vms[1], 100_000).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    for _ in 0..3 {
        for daemon in &mut daemons {
            daemon.kill9().unwrap();
        }
        // Dead for a while: the maps forward on their own.
        std::thread::sleep(Duration::from_millis(300));
        assert!(program_id(&lab.hosts[0].netns, &port).is_some());
        for daemon in &mut daemons {
            daemon.spawn().unwrap();
            daemon.wait_ready().unwrap();
        }
    }
    let fast = daemons[0].frames("egress-remote").unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(
        daemons[0].frames("egress-remote").unwrap() > fast + 10_000,
        "still the fast path"
    );
    let report = stream.finish().unwrap();
    assert!(report.sent_frames > 50_000, "{report:?}");
    assert_eq!(
        (
            report.lost_frames,
            report.duplicated_frames,
            report.reordered_frames
        ),
        (0, 0, 0),
        "{report:?}"
    );
    let after = program_id(&lab.hosts[0].netns, &port).expect("a program");
    assert_ne!(
        before, after,
        "the restart loads its own programs into the links"
    );
}

fn r39_restart_without_a_change_in_the_kernel_writes_nothing(underlay: Family) {
    let (_lab, mut daemons) = two_hosts(underlay);
    for daemon in &mut daemons {
        // The kernel itself may learn something meanwhile; not every time.
        let mut updates = None;
        for _ in 0..5 {
            daemon.kill9().unwrap();
            daemon.spawn().unwrap();
            daemon.wait_ready().unwrap();
            updates = daemon.json(&["status"]).unwrap()["counters"]["updates"].as_u64();
            if updates == Some(0) {
                break;
            }
        }
        assert_eq!(updates, Some(0), "{}", daemon.log());
    }
}

fn unload_leaves_nothing_and_the_kernel_goes_on(underlay: Family) {
    let (lab, mut daemons) = two_hosts(underlay);
    let stream = Stream::start(&lab.vms[0], &lab.vms[1], 20_000).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    daemons[0].cli(&["unload"]).unwrap();
    daemons[1].kill9().unwrap();
    daemons[1].cli(&["unload"]).unwrap();
    for ((host, vm), daemon) in lab.hosts.iter().zip(&lab.vms).zip(&daemons) {
        assert_eq!(program_id(&host.netns, &vm.port), None);
        assert_eq!(program_id(&host.netns, "uplink0"), None);
        let pins = format!("/sys/fs/bpf/vtep/{}", daemon.instance());
        assert!(!std::path::Path::new(&pins).exists(), "{pins}");
    }
    let before = stream.received_frames();
    wait_until(Duration::from_secs(2), "frames go on", || {
        Ok(stream.received_frames() > before + 5_000)
    })
    .unwrap();
    stream.finish().unwrap();
}

/// R37 and F21: an entry that is moved to and fro always has a destination. Both
/// remotes carry the VM's frames to the same place: every frame must arrive.
fn r37_replace_under_load_loses_nothing(underlay: Family) {
    let mut lab = Lab::with(&Options {
        hosts: 3,
        underlay,
        ..Options::default()
    })
    .unwrap();
    let (a, b) = (lab.add_vm(0).unwrap(), lab.add_vm(1).unwrap());
    let daemon = Daemon::start(&lab.hosts[0], &[&lab.vms[a].port]).unwrap();
    // Host 3 hands what it gets for the VM's tunnel to host 2: the router sends both addresses there.
    lab.add_address(1, lab.hosts[2].address).unwrap();
    lab.vms[a]
        .netns
        .run("ping -c 2 -i 0.2 -W 2 10.0.0.2")
        .unwrap();
    lab.set_remote(0, lab.vms[b].mac, 1).unwrap();
    daemon.wait_accelerated(lab.vms[b].mac).unwrap();
    let stream = Stream::start(&lab.vms[a], &lab.vms[b], 100_000).unwrap();
    let mac = lab.vms[b].mac;
    for round in 0..300 {
        let remote = lab.hosts[1 + (round + 1) % 2].address;
        let line = format!("bridge fdb replace {mac} dev {VXLAN} self static dst {remote}");
        lab.hosts[0].netns.run(&line).unwrap();
    }
    let report = stream.finish().unwrap();
    let moves = daemon.fdb(mac).unwrap().unwrap()["generation"]
        .as_u64()
        .unwrap();
    // Two replacements within one batch of events are none.
    assert!(moves >= 100, "{moves} moves reached the maps");
    assert_eq!(
        (report.lost_frames, report.duplicated_frames),
        (0, 0),
        "{report:?}"
    );
    // None of the stream took the kernel's path meanwhile.
    for outcome in [
        "egress-pass-unknown-destination",
        "egress-pass-kernel-destination",
    ] {
        assert!(daemon.frames(outcome).unwrap() < 5, "{outcome}");
    }
}
