//! A VM's network card moves between accelerated hosts in different subnets.

use std::time::Duration;

use vtep_tests::daemon::Daemon;
use vtep_tests::frames::{Socket, rarp};
use vtep_tests::lab::{Family, Lab, Options};
use vtep_tests::streams::Session;
use vtep_tests::{on_both_underlays, wait_until};

/// Redirected by XDP, or through the stack until the host has seen that the
/// card takes what XDP redirects.
fn fast_frames(daemon: &Daemon) -> u64 {
    let frames = |outcome| daemon.frames(outcome).unwrap();
    frames("ingress-local") + frames("ingress-local-stack")
}

on_both_underlays!(tcp_session_survives_moves_to_and_fro);

fn tcp_session_survives_moves_to_and_fro(underlay: Family) {
    let mut lab = Lab::with(&Options {
        hosts: 3,
        underlay,
        ..Options::default()
    })
    .unwrap();
    let (client, vm) = (lab.add_vm(2).unwrap(), lab.add_vm(0).unwrap());
    let (port, mac) = (lab.vms[vm].port.clone(), lab.vms[vm].mac);
    let client_port = lab.vms[client].port.clone();
    let daemons: Vec<Daemon> = [&port, &port, &client_port]
        .iter()
        .zip(&lab.hosts)
        .map(|(port, host)| Daemon::start(host, &[port.as_str()]).unwrap())
        .collect();
    lab.vms[client]
        .netns
        .run("ping -c 2 -i 0.2 -W 2 10.0.0.2")
        .unwrap();
    daemons[2].wait_accelerated(mac).unwrap();
    let session = Session::start(&lab.vms[client], &lab.vms[vm]).unwrap();
    let announce = lab.vms[vm].netns.enter(|| Socket::open("eth0")).unwrap();
    for (from, to) in [(0, 1), (1, 0), (0, 1)] {
        lab.move_vm(vm, from, to).unwrap();
        let remote = lab.hosts[to].address.to_string();
        wait_until(
            Duration::from_secs(5),
            "the client's host sends to the new host",
            || {
                announce.send(&rarp(mac))?;
                let row = daemons[2].fdb(mac)?;
                Ok(row.is_some_and(|row| row["location"]["remote"] == remote.as_str()))
            },
        )
        .unwrap();
        // The old host knows it behind the new one, and has taken its program off the card.
        wait_until(
            Duration::from_secs(5),
            "the old host sends to the new host",
            || {
                let row = daemons[from].fdb(mac)?;
                Ok(row.is_some_and(|row| row["location"]["remote"] == remote.as_str()))
            },
        )
        .unwrap();
        daemons[to].wait_accelerated(mac).unwrap();
        let (before, fast) = (session.round_trips(), fast_frames(&daemons[to]));
        wait_until(Duration::from_secs(10), "the session goes on", || {
            Ok(session.round_trips() > before + 50)
        })
        .unwrap();
        let now = fast_frames(&daemons[to]);
        assert!(
            now > fast + 40,
            "the new host's fast path carries it: {fast} -> {now}"
        );
    }
    session.finish().unwrap();
}
