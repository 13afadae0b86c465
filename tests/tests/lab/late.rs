//! Changes that mirrors get wrong elsewhere: late deletes, entries in unusual
//! forms, devices that come again, ports that leave, entries that age (F1, F22).

use std::time::Duration;

use serde_json::Value;
use vtep_common::MacAddr;
use vtep_tests::daemon::Daemon;
use vtep_tests::lab::{Family, Lab, Options};
use vtep_tests::maps::{Maps, Way};
use vtep_tests::streams::Session;
use vtep_tests::{on_both_underlays, wait_until};

on_both_underlays!(
    entries_in_every_form_are_followed,
    devices_that_come_again_are_accelerated_again,
    a_port_takes_its_program_nowhere_and_its_name_along,
    busy_entries_stay_and_idle_ones_age,
);

const SEGMENT: u16 = 1;
const SOON: Duration = Duration::from_secs(1);

/// Two hosts, a VM on each, daemons with both ports of a host on XDP.
fn scene(underlay: Family) -> (Lab, Vec<Daemon>, Maps) {
    let mut lab = Lab::on(underlay).unwrap();
    for host in [0, 1, 0] {
        lab.add_vm(host).unwrap();
    }
    let daemons =
        (0..2).map(|i| Daemon::start(&lab.hosts[i], &["port1", "port2", "port3"]).unwrap());
    let daemons: Vec<Daemon> = daemons.collect();
    let maps = Maps::open(daemons[0].instance()).unwrap();
    lab.vms[0]
        .netns
        .run("ping -c 2 -i 0.2 -W 2 10.0.0.2")
        .unwrap();
    for daemon in &daemons {
        daemon.wait_accelerated(lab.vms[0].mac).unwrap();
        daemon.wait_accelerated(lab.vms[1].mac).unwrap();
    }
    (lab, daemons, maps)
}

#[track_caller]
fn soon(what: &str, done: impl Fn() -> bool) {
    wait_until(SOON, what, || Ok(done())).unwrap();
}

/// The first VM reaches the second, and its frames take the fast path.
#[track_caller]
fn fast(lab: &Lab, daemon: &Daemon) {
    let sent = || daemon.frames("egress-remote").unwrap();
    let before = sent();
    let result = wait_until(Duration::from_secs(5), "pings take the fast path", || {
        let ping = lab.vms[0].netns.run("ping -c 5 -i 0.01 -W 1 10.0.0.2");
        Ok(ping.is_ok() && sent() >= before + 5)
    });
    if let Err(error) = result {
        let show = |words: &[&str]| daemon.cli(words).unwrap();
        let fdb = lab.hosts[0].netns.run("bridge fdb show").unwrap();
        panic!(
            "{error:#}\n{}\n{}\n{fdb}",
            show(&["status"]),
            show(&["fdb", "show"])
        );
    }
}

fn entries_in_every_form_are_followed(underlay: Family) {
    let (lab, daemons, maps) = scene(underlay);
    let (daemon, netns) = (&daemons[0], &lab.hosts[0].netns);
    let second = lab.hosts[1].address;
    let there = Way::Remote(second);
    // Behind the same router, nobody's.
    let third = lab.underlay.address(1, 3);
    let port = Way::Port(netns.ifindex("port1").unwrap());
    // First byte zero, which others take for "no address".
    let zero: MacAddr = "00:00:00:00:00:09".parse().unwrap();
    netns
        .run_all(&format!(
            "bridge fdb add {zero} dev vxlan100 self static dst {second}
             bridge fdb add {zero} dev vxlan100 master static"
        ))
        .unwrap();
    soon("it is in the map", || {
        maps.get(SEGMENT, zero) == Some(there)
    });

    // Only in one of the tables: the kernel floods it, or has no remote.
    let half: MacAddr = "02:00:00:00:09:01".parse().unwrap();
    netns
        .run(&format!(
            "bridge fdb add {half} dev vxlan100 self static dst {second}"
        ))
        .unwrap();
    soon("it is shown", || {
        daemon
            .fdb(half)
            .unwrap()
            .is_some_and(|row| row["accelerated"] == false)
    });
    assert_eq!(maps.get(SEGMENT, half), None);
    netns
        .run(&format!("bridge fdb add {half} dev vxlan100 master static"))
        .unwrap();
    soon("it is complete", || maps.get(SEGMENT, half) == Some(there));
    netns
        .run(&format!("bridge fdb del {half} dev vxlan100 self"))
        .unwrap();
    soon("its remote is gone", || {
        maps.get(SEGMENT, half) == Some(Way::Kernel)
    });

    // An entry with a nexthop group has no dst at all.
    let nexthop: MacAddr = "02:00:00:00:09:02".parse().unwrap();
    netns
        .run_all(&format!(
            "ip nexthop add id 11 via {second} fdb
             ip nexthop add id 12 group 11 fdb
             bridge fdb add {nexthop} dev vxlan100 self static nhid 12
             bridge fdb add {nexthop} dev vxlan100 master static"
        ))
        .unwrap();
    soon("it is left to the kernel", || {
        maps.get(SEGMENT, nexthop) == Some(Way::Kernel)
    });
    assert_eq!(daemon.fdb(nexthop).unwrap().unwrap()["accelerated"], false);
    daemon
        .cli(&[
            "fdb",
            "replace",
            "02:00:00:00:09:02",
            "--vni",
            "100",
            "--dst",
            &second.to_string(),
        ])
        .unwrap();
    assert_eq!(maps.get(SEGMENT, nexthop), Some(there));

    // Another VNI and UDP port than the device's, for this remote only.
    netns
        .run(&format!(
            "bridge fdb replace {half} dev vxlan100 self static dst {second} port 4790 vni 300"
        ))
        .unwrap();
    soon("it has a remote again", || {
        maps.get(SEGMENT, half) == Some(there)
    });
    let rows = daemon.json(&["remote", "show"]).unwrap();
    let rows = rows.as_array().unwrap();
    assert!(
        rows.iter()
            .any(|r| r["vni"] == 300 && r["udp_port"] == 4790),
        "{rows:?}"
    );

    // A late delete of what was there before takes nothing away (F1).
    let x: MacAddr = "02:00:00:00:09:03".parse().unwrap();
    netns
        .run_all(&format!(
            "bridge fdb add {x} dev vxlan100 self static dst {third}
             bridge fdb add {x} dev vxlan100 master static
             bridge fdb replace {x} dev vxlan100 self static dst {second}"
        ))
        .unwrap();
    soon("it moved", || maps.get(SEGMENT, x) == Some(there));
    netns
        .run(&format!("bridge fdb del {x} dev vxlan100 self dst {third}"))
        .unwrap();
    daemon.cli(&["status"]).unwrap();
    assert_eq!(maps.get(SEGMENT, x), Some(there));
    netns
        .run(&format!("bridge fdb replace {x} dev port1 master static"))
        .unwrap();
    soon("it is local", || maps.get(SEGMENT, x) == Some(port));
    // What a routing daemon's late withdraw does: both are still asked for.
    netns
        .run(&format!("bridge fdb del {x} dev vxlan100 self"))
        .unwrap();
    netns
        .run(&format!("bridge fdb del {x} dev vxlan100 master"))
        .unwrap_err();
    daemon.cli(&["resync"]).unwrap();
    assert_eq!(maps.get(SEGMENT, x), Some(port));

    // Flush of a port: learned entries go, what was said stays.
    let learned = lab.vms[0].mac;
    assert_eq!(maps.get(SEGMENT, learned), Some(port));
    netns
        .run("ip link set port1 type bridge_slave fdb_flush")
        .unwrap();
    soon("the learned entry is gone", || {
        maps.get(SEGMENT, learned).is_none()
    });
    assert_eq!(maps.get(SEGMENT, x), Some(port));
    fast(&lab, daemon);
}

fn devices_that_come_again_are_accelerated_again(underlay: Family) {
    let (lab, daemons, maps) = scene(underlay);
    let (daemon, netns) = (&daemons[0], &lab.hosts[0].netns);
    let (first, second) = (lab.hosts[0].address, lab.hosts[1].address);
    // The VXLAN device, first under a new number, then under its old one.
    for index in ["", "index 77", "index 77"] {
        netns
            .run_all(&format!(
                "ip link del vxlan100
                 ip link add vxlan100 {index} type vxlan id 100 local {first} dstport 4789
                 ip link set vxlan100 mtu 1450 master br100
                 ip link set vxlan100 up
                 bridge fdb append 00:00:00:00:00:00 dev vxlan100 dst {second}"
            ))
            .unwrap();
        fast(&lab, daemon);
    }
    // Too fast to be seen gone, with another VNI meanwhile.
    netns
        .run_all(&format!(
            "ip link del vxlan100
             ip link add vxlan100 index 77 type vxlan id 101 local {first} dstport 4789
             ip link del vxlan100
             ip link add vxlan100 index 77 type vxlan id 100 local {first} dstport 4789
             ip link set vxlan100 mtu 1450 master br100
             ip link set vxlan100 up
             bridge fdb append 00:00:00:00:00:00 dev vxlan100 dst {second}",
        ))
        .unwrap();
    fast(&lab, daemon);
    // The bridge.
    netns
        .run_all(
            "ip link del br100
             ip link add br100 type bridge
             ip link set br100 up
             ip link set vxlan100 master br100
             ip link set port1 master br100
             ip link set port3 master br100",
        )
        .unwrap();
    fast(&lab, daemon);
    // A VM's card, under the same name and number.
    let (mac, number) = (lab.vms[0].mac, netns.ifindex("port1").unwrap());
    let vm = &lab.vms[0].netns;
    netns
        .run_all(&format!(
            "ip link del port1
             ip link add port1 index {number} type veth peer name eth0 address {mac} netns {}
             ethtool -K port1 gro on",
            vm.name()
        ))
        .unwrap();
    vm.run_all(
        "ethtool -K eth0 tso off gso off tx off gro on
         ip link set eth0 mtu 1450
         ip addr add 10.0.0.1/24 dev eth0
         ip link set eth0 up",
    )
    .unwrap();
    netns
        .run_all(
            "ip link set port1 master br100
             ip link set port1 up",
        )
        .unwrap();
    fast(&lab, daemon);
    assert_eq!(maps.get(SEGMENT, mac), Some(Way::Port(number)));
    assert_eq!(daemon.json(&["resync"]).unwrap()["updates"], 0);
    let warnings = daemon.json(&["status"]).unwrap()["warnings"].clone();
    assert_eq!(warnings, Value::Array(vec![]), "{warnings}");
}

fn a_port_takes_its_program_nowhere_and_its_name_along(underlay: Family) {
    let (lab, daemons, maps) = scene(underlay);
    let netns = &lab.hosts[0].netns;
    // Renamed: the choice of hook was for the old name.
    netns
        .run_all(
            "ip link set port1 down
             ip link set port1 name tap-x
             ip link set tap-x up",
        )
        .unwrap();
    let row = |name: &str| daemons[0].status_row("ports", "name", name).unwrap();
    soon("the new name is shown", || {
        row("tap-x").is_some_and(|row| row["hook"] == "tcx")
    });
    assert!(row("port1").is_none());
    daemons[0]
        .cli(&["port", "add", "tap-x", "--vni", "100", "--hook", "xdp"])
        .unwrap();
    assert_eq!(row("tap-x").unwrap()["hook"], "xdp");
    fast(&lab, &daemons[0]);
    netns
        .run_all(
            "ip link set tap-x down
             ip link set tap-x name port1
             ip link set port1 up",
        )
        .unwrap();
    soon("the old name is back", || {
        row("port1").is_some_and(|row| row["accelerated"] == true)
    });
    fast(&lab, &daemons[0]);

    // Moved away: the program stays behind, and the other daemon takes it over.
    let vm = &lab.vms[0];
    lab.move_vm(0, 0, 1).unwrap();
    soon("the port is gone", || row("port1").is_none());
    let device = || lab.hosts[1].netns.run("ip -d link show port1").unwrap();
    let other = || daemons[1].status_row("ports", "name", "port1").unwrap();
    soon("it is the other host's", || {
        other().is_some_and(|row| row["accelerated"] == true)
    });
    assert_eq!(device().matches("prog/xdp").count(), 1, "{}", device());
    vm.netns.run("ping -c 5 -i 0.01 -W 2 10.0.0.2").unwrap();
    soon("switched locally by the other host", || {
        daemons[1].frames("egress-local").unwrap() >= 4
    });
    // And away from both.
    lab.hosts[1]
        .netns
        .run(&format!("ip link set port1 netns {}", lab.router.name()))
        .unwrap();
    soon("no program is left on it", || {
        !lab.router
            .run("ip -d link show port1")
            .unwrap()
            .contains("prog/xdp")
    });
    for daemon in &daemons {
        let warnings = daemon.json(&["status"]).unwrap()["warnings"].clone();
        assert_eq!(warnings, Value::Array(vec![]), "{warnings}");
    }
    drop(maps);
}

/// The kernel sees no frame of the busy pair, so only our refresh keeps their
/// entries; nothing keeps the idle one.
fn busy_entries_stay_and_idle_ones_age(underlay: Family) {
    const LIFETIME: Duration = Duration::from_secs(3);
    let mut lab = Lab::with(&Options {
        vxlan: "ageing 3".to_owned(),
        underlay,
        ..Options::default()
    })
    .unwrap();
    for host in [0, 1, 0, 1] {
        lab.add_vm(host).unwrap();
    }
    for host in &lab.hosts {
        // Hundredths of a second.
        host.netns
            .run("ip link set br100 type bridge ageing_time 300")
            .unwrap();
    }
    let daemons = (0..2)
        .map(|i| Daemon::start(&lab.hosts[i], &["port1", "port2", "port3", "port4"]).unwrap());
    let daemons: Vec<Daemon> = daemons.collect();
    // ARP would go through the bridge.
    for (vm, other) in [(0, 1), (1, 0), (2, 3), (3, 2)] {
        let (vm, other) = (&lab.vms[vm], &lab.vms[other]);
        vm.netns
            .run(&format!(
                "ip neigh replace {} lladdr {} dev eth0 nud permanent",
                other.address, other.mac
            ))
            .unwrap();
    }
    lab.vms[2].netns.run("ping -c 1 -W 2 10.0.0.4").unwrap();
    let session = Session::start(&lab.vms[0], &lab.vms[1]).unwrap();
    for daemon in &daemons {
        daemon.wait_accelerated(lab.vms[0].mac).unwrap();
        daemon.wait_accelerated(lab.vms[1].mac).unwrap();
    }
    std::thread::sleep(Duration::from_millis(200));
    let passed = || -> u64 {
        let stats = daemons[0].json(&["stats"]).unwrap();
        let outcomes = stats["outcomes"].as_object().unwrap();
        let to_kernel = outcomes.iter().filter(|(name, _)| {
            name.contains("pass-unknown")
                || name.contains("pass-moved")
                || name.contains("pass-kernel")
        });
        to_kernel
            .map(|(_, count)| count["frames"].as_u64().unwrap())
            .sum()
    };
    let before = passed();
    let tables = |host: usize| lab.hosts[host].netns.run("bridge fdb show").unwrap();
    let start = std::time::Instant::now();
    let mut idle_gone = None;
    while start.elapsed() < LIFETIME * 5 {
        for host in 0..2 {
            let text = tables(host);
            let (here, there) = (
                lab.vms[host].mac.to_string(),
                lab.vms[1 - host].mac.to_string(),
            );
            let has = |mac: &str, device: &str, table: &str| {
                text.lines()
                    .any(|l| l.starts_with(mac) && l.contains(device) && l.contains(table))
            };
            let all = has(&here, "dev port", "master")
                && has(&there, "dev vxlan100", "master")
                && has(&there, "dev vxlan100", "self");
            assert!(all, "host {host} after {:?}:\n{text}", start.elapsed());
        }
        let idle = lab.vms[3].mac.to_string();
        if idle_gone.is_none() && !tables(0).contains(&idle) {
            idle_gone = Some(start.elapsed());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    let report = session.finish().unwrap();
    println!(
        "idle entry gone after {idle_gone:?}; {report:?}; {} frames to the kernel",
        passed() - before
    );
    // A VXLAN device looks every 10 s (vxlan_core.c, FDB_AGE_INTERVAL).
    assert!(idle_gone.is_some(), "the idle entry is still there");
    assert_eq!(
        passed(),
        before,
        "frames refreshed the entries in the kernel's way"
    );
    assert!(daemons[0].fdb(lab.vms[3].mac).unwrap().is_none());
}
