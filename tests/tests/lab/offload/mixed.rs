//! F17 between ports of different kinds: over the tunnel, and within one host,
//! where nothing ever finishes a checksum or cuts a superframe.

use std::net::IpAddr;
use std::time::Duration;

use vtep_tests::daemon::Daemon;
use vtep_tests::lab::{Guest, Lab, Options, Vm};
use vtep_tests::streams::{connect, transfer};
use vtep_tests::wiretap::counter;
use vtep_tests::{is_root, wait_until};

const KINDS: [Guest; 4] = [Guest::Plain, Guest::Veth, Guest::PollingVeth, Guest::Tap];
const BYTES: usize = 400_000;

#[test]
fn f17_tcp_runs_between_all_kinds_of_ports() {
    if !is_root("f17_tcp_runs_between_all_kinds_of_ports") {
        return;
    }
    for vxlan in ["udpcsum", "noudpcsum"] {
        all_pairs(vxlan);
    }
}

fn all_pairs(vxlan: &str) {
    let mut lab = Lab::with(&Options {
        vxlan: vxlan.into(),
        ..Options::default()
    })
    .unwrap();
    for host in 0..2 {
        for guest in KINDS {
            lab.add_guest(host, guest).unwrap();
        }
    }
    lab.warm_up().unwrap();
    let (here, there) = lab.vms.split_at(KINDS.len());
    let daemons: Vec<Daemon> = [here, there]
        .iter()
        .zip(&lab.hosts)
        .map(|(vms, host)| Daemon::start(host, &[&vms[0].port]).unwrap())
        .collect();
    // All are known everywhere.
    for vm in there {
        ping(&here[0], vm);
    }
    for vm in here {
        ping(vm, &there[0]);
    }
    for daemon in &daemons {
        for vm in &lab.vms {
            wait_until(
                Duration::from_secs(5),
                &format!("{} is known", vm.mac),
                || Ok(daemon.fdb(vm.mac)?.is_some()),
            )
            .unwrap();
        }
    }
    for (number, from) in here.iter().enumerate() {
        for (other, to) in there.iter().enumerate() {
            run(
                from,
                to,
                &format!("{vxlan}: {number} to {other} over the tunnel"),
            );
        }
        for (other, to) in here
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != number)
        {
            run(
                from,
                to,
                &format!("{vxlan}: {number} to {other} on one host"),
            );
        }
    }
    for daemon in &daemons {
        let frames = |outcome| daemon.frames(outcome).unwrap();
        assert!(
            frames("egress-remote") > 100,
            "{}",
            daemon.cli(&["stats"]).unwrap()
        );
    }
    assert!(daemons[0].frames("egress-local").unwrap() > 100);
}

fn ping(from: &Vm, to: &Vm) {
    let line = format!("ping -c 1 -W 2 {}", to.address);
    from.netns.run(&line).unwrap();
}

fn run(from: &Vm, to: &Vm, what: &str) {
    let failed = |error: anyhow::Error| -> () { panic!("{what}: {error:#}") };
    let (near, far) = connect(&from.netns, &to.netns, IpAddr::from(to.address))
        .unwrap_or_else(|error| panic!("{what}: {error:#}"));
    transfer(&near, &far, BYTES).unwrap_or_else(failed);
    transfer(&far, &near, BYTES).unwrap_or_else(failed);
    for vm in [from, to] {
        let wrong = counter(&vm.netns, "Tcp", "InCsumErrors").unwrap();
        assert_eq!(wrong, 0, "{what}: wrong checksums at {}", vm.address);
    }
}
