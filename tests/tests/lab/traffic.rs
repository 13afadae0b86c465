//! Known unicast takes the fast path, in both directions, and everything else
//! still works.

use std::time::Duration;

use vtep_tests::daemon::Daemon;
use vtep_tests::lab::{Family, Lab};
use vtep_tests::streams::{Session, Stream};
use vtep_tests::{is_root, on_both_underlays, wait_until};

on_both_underlays!(
    ping_tcp_and_udp_take_the_fast_path_on_both_hosts,
    local_ports_of_one_segment_are_switched,
);

fn ping_tcp_and_udp_take_the_fast_path_on_both_hosts(underlay: Family) {
    let mut lab = Lab::on(underlay).unwrap();
    let (a, b) = (lab.add_vm(0).unwrap(), lab.add_vm(1).unwrap());
    let daemons: Vec<Daemon> = (0..2)
        .map(|i| Daemon::start(&lab.hosts[i], &[&lab.vms[i].port]).unwrap())
        .collect();
    lab.vms[a]
        .netns
        .run("ping -c 2 -i 0.2 -W 2 10.0.0.2")
        .unwrap();
    for daemon in &daemons {
        daemon.wait_accelerated(lab.vms[a].mac).unwrap();
        daemon.wait_accelerated(lab.vms[b].mac).unwrap();
    }
    lab.vms[a]
        .netns
        .run("ping -c 10 -i 0.01 -W 2 10.0.0.2")
        .unwrap();
    let session = Session::start(&lab.vms[a], &lab.vms[b]).unwrap();
    let stream = Stream::start(&lab.vms[a], &lab.vms[b], 100_000).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let report = stream.finish().unwrap();
    let session = session.finish().unwrap();
    assert!(session.round_trips > 50, "{session:?}");
    assert_eq!(
        (
            report.lost_frames,
            report.duplicated_frames,
            report.reordered_frames
        ),
        (0, 0, 0),
        "{report:?}"
    );
    // Host 1 encapsulated what was sent, host 2 stripped it: nothing of it went through the kernel.
    let sent = report.sent_frames;
    assert!(daemons[0].frames("egress-remote").unwrap() >= sent);
    assert!(daemons[1].frames("ingress-local").unwrap() >= sent);
    // And the session's answers came the other way.
    assert!(daemons[1].frames("egress-remote").unwrap() >= session.round_trips);
    assert!(daemons[0].frames("ingress-local").unwrap() >= session.round_trips);
}

fn local_ports_of_one_segment_are_switched(underlay: Family) {
    let mut lab = Lab::on(underlay).unwrap();
    let (a, b) = (lab.add_vm(0).unwrap(), lab.add_vm(0).unwrap());
    let daemon = Daemon::start(&lab.hosts[0], &[&lab.vms[a].port, &lab.vms[b].port]).unwrap();
    lab.vms[a]
        .netns
        .run("ping -c 2 -i 0.2 -W 2 10.0.0.2")
        .unwrap();
    daemon.wait_accelerated(lab.vms[a].mac).unwrap();
    daemon.wait_accelerated(lab.vms[b].mac).unwrap();
    lab.vms[a]
        .netns
        .run("ping -c 20 -i 0.01 -W 2 10.0.0.2")
        .unwrap();
    assert!(daemon.frames("egress-local").unwrap() >= 40);
}

/// A veth hands redirected frames on only where its other end polls; it loses
/// them in silence otherwise (the trap of STYLE and of every XDP newcomer).
#[test]
fn port_that_would_lose_redirected_frames_is_served_through_the_stack() {
    if !is_root("port_that_would_lose_redirected_frames_is_served_through_the_stack") {
        return;
    }
    let mut lab = Lab::new().unwrap();
    let (a, b) = (lab.add_vm(0).unwrap(), lab.add_vm(1).unwrap());
    lab.vms[a].netns.run("ethtool -K eth0 gro off").unwrap();
    let daemon = Daemon::start(&lab.hosts[0], &[&lab.vms[a].port]).unwrap();
    let port = || daemon.json(&["status"]).unwrap()["ports"][0].clone();
    assert_eq!(port()["ingress"], "stack");
    let stream = Stream::start(&lab.vms[b], &lab.vms[a], 10_000).unwrap();
    // Switched on and off while frames come.
    for (state, way) in [("on", "xdp"), ("off", "stack"), ("on", "xdp")] {
        std::thread::sleep(Duration::from_millis(200));
        lab.vms[a]
            .netns
            .run(&format!("ethtool -K eth0 gro {state}"))
            .unwrap();
        wait_until(
            Duration::from_secs(2),
            &format!("GRO {state} is noticed"),
            || Ok(port()["ingress"] == way),
        )
        .unwrap();
    }
    std::thread::sleep(Duration::from_millis(200));
    let report = stream.finish().unwrap();
    // What is on its way at the moment of "off" is lost; nothing after it is.
    assert!(report.lost_frames < 200, "{report:?}");
    assert!(
        report.longest_gap < Duration::from_millis(100),
        "{report:?}"
    );
}
