//! The laboratory alone, without our program: what the kernel does is what the
//! other tests compare with.

use std::time::Duration;

use vtep_tests::frames::{Socket, ethernet, ipv4_udp, is_udp_to, rarp};
use vtep_tests::generator::{Generator, Plan, object};
use vtep_tests::lab::{Family, Lab, UPLINK};
use vtep_tests::streams::{Session, Stream};
use vtep_tests::{is_root, on_both_underlays, wait_until};

on_both_underlays!(
    kernel_path_carries_ping_tcp_and_100k_frames,
    kernel_learning_follows_a_moved_vm,
);

fn kernel_path_carries_ping_tcp_and_100k_frames(underlay: Family) {
    let mut lab = Lab::on(underlay).unwrap();
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

/// Regression: a port whose GRO was on before it came up never told its peer that
/// it takes redirected frames, and nothing of the generator's arrived.
#[test]
fn generated_frames_enter_a_port_and_leave_encapsulated() {
    if !is_root("generated_frames_enter_a_port_and_leave_encapsulated") {
        return;
    }
    const FRAMES: u32 = 10_000;
    let mut lab = Lab::new().unwrap();
    let (a, b) = (lab.add_vm(0).unwrap(), lab.add_vm(1).unwrap());
    lab.warm_up().unwrap();
    // After a move it has to hold as well.
    lab.move_vm(a, 0, 1).unwrap();
    lab.move_vm(a, 1, 0).unwrap();
    let (from, to) = (&lab.vms[a], &lab.vms[b]);
    from.netns.run("ping -c 1 -W 2 10.0.0.2").unwrap();
    let addresses = [from.address.octets(), to.address.octets()];
    let packet = ipv4_udp(addresses[0], addresses[1], [1000, 2000], &[0; 18]);
    let frame = ethernet(from.mac, to.mac, 0x0800, &packet);
    let ifindex = from.netns.ifindex("eth0").unwrap();
    let mut generator = Generator::load(&object()).unwrap();
    from.netns
        .enter(|| {
            generator.set_plan(Plan {
                ifindex,
                ..Plan::default()
            })
        })
        .unwrap();
    lab.router.enter(|| generator.attach_sink("to1")).unwrap();
    generator.burst(&frame, FRAMES).unwrap();
    wait_until(Duration::from_secs(2), "all frames are on the wire", || {
        Ok(generator.counters()?[1] >= u64::from(FRAMES))
    })
    .unwrap();
}

fn kernel_learning_follows_a_moved_vm(underlay: Family) {
    let mut lab = Lab::on(underlay).unwrap();
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
