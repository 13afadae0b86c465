//! The laboratory alone, without our program: what the kernel does is what the
//! other tests compare with.

use std::time::Duration;

use vtep_tests::frames::{Socket, is_udp_to, rarp};
use vtep_tests::lab::{Lab, UPLINK};
use vtep_tests::streams::{Session, Stream};
use vtep_tests::{is_root, wait_until};

#[test]
fn kernel_path_carries_ping_tcp_and_100k_frames() {
    if !is_root("kernel_path_carries_ping_tcp_and_100k_frames") {
        return;
    }
    let mut lab = Lab::new().unwrap();
    let (a, b) = (lab.add_vm(0).unwrap(), lab.add_vm(1).unwrap());
    lab.warm_up().unwrap();
    lab.vms[a]
        .netns
        .run("ping -c 2 -i 0.2 -W 2 10.0.0.2")
        .unwrap();
    let session = Session::start(&lab.vms[a], &lab.vms[b]).unwrap();
    let stream = Stream::start(&lab.vms[a], &lab.vms[b], 100_000).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let report = stream.finish().unwrap();
    assert!(session.finish().unwrap().round_trips > 50);
    assert!(report.sent_frames > 30_000, "{report:?}");
    assert_eq!(
        (report.lost_frames, report.duplicated_frames),
        (0, 0),
        "{report:?}"
    );
}

#[test]
fn kernel_learning_follows_a_moved_vm() {
    if !is_root("kernel_learning_follows_a_moved_vm") {
        return;
    }
    let mut lab = Lab::new().unwrap();
    let (a, b) = (lab.add_vm(0).unwrap(), lab.add_vm(1).unwrap());
    lab.warm_up().unwrap();
    lab.vms[a].netns.run("ping -c 1 -W 2 10.0.0.2").unwrap();
    let session = Session::start(&lab.vms[a], &lab.vms[b]).unwrap();
    lab.move_vm(b, 1, 0).unwrap();
    lab.vms[b]
        .netns
        .enter(|| Socket::open("eth0")?.send(&rarp(lab.vms[b].mac)))
        .unwrap();
    let before = session.round_trips();
    wait_until(Duration::from_secs(10), "the session goes on", || {
        Ok(session.round_trips() > before + 20)
    })
    .unwrap();
    session.finish().unwrap();
}

#[test]
fn frames_of_the_kernel_can_be_captured_on_the_wire() {
    if !is_root("frames_of_the_kernel_can_be_captured_on_the_wire") {
        return;
    }
    let mut lab = Lab::new().unwrap();
    let a = lab.add_vm(0).unwrap();
    lab.add_vm(1).unwrap();
    lab.warm_up().unwrap();
    let wire = lab.router.enter(|| Socket::open("to1")).unwrap();
    lab.vms[a].netns.run("ping -c 1 -W 2 10.0.0.2").unwrap();
    let frames = wire
        .capture(1, Duration::from_secs(2), |f| is_udp_to(f, 4789))
        .unwrap();
    assert_eq!(frames.len(), 1, "{UPLINK} sent nothing");
}
