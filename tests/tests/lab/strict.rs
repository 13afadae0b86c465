//! Strict mode: frames from hosts that no entry of the segment names are dropped
//! and counted, whatever is in them.

use vtep_common::MacAddr;
use vtep_tests::daemon::Daemon;
use vtep_tests::frames::{Socket, ethernet, vxlan};
use vtep_tests::lab::{Family, Lab, Options, VNI, VXLAN, Vm};
use vtep_tests::{is_root, on_both_underlays, wait_until};

use std::time::Duration;

on_both_underlays!(r10_strangers_are_dropped_and_counted_until_an_entry_names_them);

const SOON: Duration = Duration::from_secs(2);
const ALL: MacAddr = MacAddr::ZERO;

/// The first host is strict and knows the second; the third floods to it unasked.
/// VMs 0 and 2 do not have to ask for each other. Nothing is learned from the
/// wire: the bridge of the third host says something itself at times.
fn scene(underlay: Family) -> (Lab, Daemon) {
    let mut lab = Lab::with(&Options {
        hosts: 3,
        vxlan: "nolearning".to_owned(),
        underlay,
        ..Options::default()
    })
    .unwrap();
    for host in 0..3 {
        lab.add_vm(host).unwrap();
    }
    let (stranger, first) = (lab.hosts[2].address, &lab.hosts[0].netns);
    first
        .run(&format!("bridge fdb del {ALL} dev {VXLAN} dst {stranger}"))
        .unwrap();
    for (vm, other) in [(0, 2), (2, 0)] {
        let Vm { address, mac, .. } = &lab.vms[other];
        let line = format!("ip neigh replace {address} lladdr {mac} dev eth0 nud permanent");
        lab.vms[vm].netns.run(&line).unwrap();
    }
    lab.set_remote(2, lab.vms[0].mac, 0).unwrap();
    let config = "strict = true\n[ports.port1]\nhook = \"xdp\"\n";
    let daemon = Daemon::with_config(&lab.hosts[0], config).unwrap();
    let row = daemon.status_row("segments", "vxlan", VXLAN).unwrap();
    assert_eq!(row.unwrap()["strict"], true);
    (lab, daemon)
}

fn r10_strangers_are_dropped_and_counted_until_an_entry_names_them(underlay: Family) {
    let (lab, daemon) = scene(underlay);
    let dropped = || daemon.frames("ingress-drop-unknown-peer").unwrap();
    // The second host is known by the flood list, then by a station's entry.
    let ping = "ping -c 3 -i 0.1 -W 2 10.0.0.2";
    lab.vms[0].netns.run(ping).unwrap();
    lab.set_remote(0, lab.vms[1].mac, 1).unwrap();
    daemon.wait_accelerated(lab.vms[1].mac).unwrap();
    let fast = daemon.frames("ingress-local").unwrap();
    lab.vms[0].netns.run(ping).unwrap();
    assert!(daemon.frames("ingress-local").unwrap() >= fast + 3);
    let before = dropped();
    let stranger = &lab.vms[2];
    let ping = "ping -c 10 -i 0.01 -W 1 10.0.0.1";
    stranger.netns.run(ping).unwrap_err();
    wait_until(SOON, "ten frames are counted", || {
        Ok(dropped() >= before + 10)
    })
    .unwrap();
    // Broadcasts as well: nobody has this address, so it is asked for.
    let before = dropped();
    stranger.netns.run("ping -c 1 -W 1 10.0.0.99").unwrap_err();
    wait_until(SOON, "the broadcast is counted", || Ok(dropped() > before)).unwrap();
    // The kernel has seen nothing of it.
    let fdb = lab.hosts[0].netns.run("bridge fdb show").unwrap();
    assert!(!fdb.contains(&stranger.mac.to_string()), "{fdb}");

    let address = lab.hosts[2].address;
    let entry = format!("{ALL} dev {VXLAN} dst {address}");
    let host = &lab.hosts[0].netns;
    host.run(&format!("bridge fdb append {entry}")).unwrap();
    wait_until(SOON, "no stranger any more", || {
        Ok(stranger.netns.run("ping -c 1 -W 1 10.0.0.1").is_ok())
    })
    .unwrap();
    let before = dropped();
    stranger.netns.run(ping).unwrap();
    assert_eq!(dropped(), before);
}

/// Frames that would pass to the kernel for what is in them are no way in.
#[test]
fn r10_odd_frames_of_strangers_are_dropped_too() {
    if !is_root("r10_odd_frames_of_strangers_are_dropped_too") {
        return;
    }
    let (lab, daemon) = scene(Family::V4);
    let wire = lab.router.enter(|| Socket::open("to1")).unwrap();
    let host = &lab.hosts[0];
    let macs = [host.gateway_mac, host.uplink_mac];
    let addresses = [lab.hosts[2].ipv4().unwrap(), host.ipv4().unwrap()];
    let inner = ethernet(lab.vms[2].mac, lab.vms[0].mac, 0x88b5, &[7; 46]);
    let plain = vxlan(macs, addresses, 4789, VNI, &inner);
    // A reserved flag, and a length that hides bytes: the kernel would decide.
    let mut flag = plain.clone();
    flag[43] = 1;
    let mut trailing = plain.clone();
    trailing.extend([0; 8]);
    for frame in [plain, flag, trailing] {
        let before = daemon.frames("ingress-drop-unknown-peer").unwrap();
        wire.send(&frame).unwrap();
        wait_until(SOON, "it is counted", || {
            Ok(daemon.frames("ingress-drop-unknown-peer")? == before + 1)
        })
        .unwrap();
    }
}
