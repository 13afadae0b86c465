//! The commands that write: segments, ports and entries on hosts that have
//! nothing, what they leave behind, and what they refuse.

use std::time::Instant;

use serde_json::{Value, json};
use vtep_common::MacAddr;
use vtep_tests::daemon::Daemon;
use vtep_tests::is_root;
use vtep_tests::lab::{Lab, Options};

/// Hosts without segment, a daemon on each.
pub fn bare(hosts: usize) -> (Lab, Vec<Daemon>) {
    let lab = Lab::with(&Options {
        hosts,
        segment: false,
        ..Options::default()
    })
    .unwrap();
    let daemons = lab.hosts.iter();
    let daemons = daemons.map(|host| Daemon::with_config(host, "").unwrap());
    let daemons = daemons.collect();
    (lab, daemons)
}

/// The words of a command line.
pub fn words(line: &str) -> Vec<&str> {
    line.split(' ').collect()
}

fn run(daemon: &Daemon, line: &str) -> String {
    daemon.cli(&words(line)).unwrap()
}

/// Exit status 1 and one line that has all of `parts`.
#[track_caller]
fn refuse(daemon: &Daemon, line: &str, parts: &[&str]) {
    refuse_with(daemon, line, 1, parts);
}

#[track_caller]
fn refuse_with(daemon: &Daemon, line: &str, status: i32, parts: &[&str]) {
    let (code, text) = daemon.refusal(&words(line)).unwrap();
    assert_eq!(code, status, "{line}: {text}");
    for part in parts {
        assert!(text.contains(part), "{line}: `{part}` is not in: {text}");
    }
    assert!(!text.contains("os error"), "{line}: {text}");
}

/// Two hosts with VNI 100, a VM on each, ports and remotes set.
pub fn two_hosts() -> (Lab, Vec<Daemon>) {
    let (mut lab, daemons) = bare(2);
    for (host, daemon) in daemons.iter().enumerate() {
        let vm = lab.add_vm(host).unwrap();
        let (here, there) = (lab.hosts[host].address, lab.hosts[1 - host].address);
        run(
            daemon,
            &format!("vni add 100 --local {here} --remote {there}"),
        );
        let port = &lab.vms[vm].port;
        run(daemon, &format!("port add {port} --vni 100 --hook xdp"));
    }
    (lab, daemons)
}

/// Names and bridges of a host's devices, without what changes by itself.
fn links(lab: &Lab, host: usize) -> String {
    let text = lab.hosts[host].netns.run("ip -o link").unwrap();
    text.lines()
        .map(|line| {
            let master = line.split(" master ").nth(1);
            let master = master.and_then(|m| m.split(' ').next());
            let name = line.split(' ').nth(1).unwrap();
            format!("{name} {}\n", master.unwrap_or("-"))
        })
        .collect()
}

#[test]
fn entries_are_in_the_maps_when_the_command_returns() {
    if !is_root("entries_are_in_the_maps_when_the_command_returns") {
        return;
    }
    let (mut lab, daemons) = two_hosts();
    lab.add_vm(0).unwrap();
    let daemon = &daemons[0];
    run(daemon, "port add port3 --vni 100 --hook xdp");
    let there = lab.hosts[1].address;
    let show = |mac: MacAddr| daemon.fdb(mac).unwrap();
    let remote = |ip: &str| json!({"kind": "remote", "remote": ip});
    let local = |port: &str| json!({"kind": "local", "port": port});
    let is = |mac: MacAddr, location: &Value, accelerated: bool| {
        let row = show(mac).unwrap();
        assert_eq!(row["location"], *location, "{row}");
        assert_eq!(row["owner"], "api", "{row}");
        assert_eq!(row["accelerated"], accelerated, "{row}");
        assert!(row["generation"].as_u64().unwrap() > 0, "{row}");
    };
    let x = MacAddr([2, 0, 0, 0, 9, 1]);

    // The first remote: its next hop has to be resolved before.
    run(daemon, &format!("fdb add {x} --vni 100 --dst {there}"));
    is(x, &remote("198.51.100.2"), true);
    refuse(
        daemon,
        &format!("fdb add {x} --vni 100 --dst {there}"),
        &["02:00:00:00:09:01", "exists", "`vtep fdb replace`"],
    );
    refuse(
        daemon,
        &format!("fdb add {x} --vni 100 --port port1"),
        &["exists"],
    );
    is(x, &remote("198.51.100.2"), true);
    // Remote to remote; nobody answers there yet, so the kernel carries it.
    run(
        daemon,
        &format!("fdb replace {x} --vni 100 --dst 192.0.2.77"),
    );
    is(x, &remote("192.0.2.77"), false);
    run(daemon, &format!("fdb replace {x} --vni 100 --dst {there}"));
    is(x, &remote("198.51.100.2"), true);
    // Remote to local to another port to remote.
    run(daemon, &format!("fdb replace {x} --vni 100 --port port1"));
    is(x, &local("port1"), true);
    let kernel = lab.hosts[0].netns.run("bridge fdb show").unwrap();
    // The kernel may add one for the port's default VLAN.
    let entries = kernel.lines().filter(|line| !line.contains(" vlan "));
    let mine = entries.filter(|line| line.contains("02:00:00:00:09:01"));
    assert_eq!(mine.count(), 1, "{kernel}");
    run(daemon, &format!("fdb replace {x} --vni 100 --port port3"));
    is(x, &local("port3"), true);
    run(daemon, &format!("fdb replace {x} --vni 100 --dst {there}"));
    is(x, &remote("198.51.100.2"), true);
    // The same again changes nothing.
    let before = show(x);
    run(daemon, &format!("fdb replace {x} --vni 100 --dst {there}"));
    assert_eq!(show(x), before);
    // Replace also adds, and add takes over what was only learned.
    let y = MacAddr([0, 0, 0, 0, 9, 2]);
    run(daemon, &format!("fdb replace {y} --vni 100 --port port1"));
    is(y, &local("port1"), true);
    let learned = lab.vms[0].mac;
    lab.vms[0].netns.run("ping -c 1 -W 2 10.0.0.2").unwrap();
    assert_eq!(show(learned).unwrap()["owner"], "kernel");
    run(daemon, &format!("fdb add {learned} --vni 100 --port port1"));
    is(learned, &local("port1"), true);
    // But never an address of the host itself.
    let own = lab.hosts[0].netns.run("ip -br link show port1").unwrap();
    let own = own.split_whitespace().nth(2).unwrap();
    refuse(
        daemon,
        &format!("fdb replace {own} --vni 100 --dst {there}"),
        &[own, "this host"],
    );

    run(daemon, &format!("fdb del {x} --vni 100"));
    assert_eq!(show(x), None);
    let kernel = lab.hosts[0].netns.run("bridge fdb show").unwrap();
    assert!(!kernel.contains("02:00:00:00:09:01"), "{kernel}");
    refuse(
        daemon,
        &format!("fdb del {x} --vni 100"),
        &["no 02:00:00:00:09:01 in VNI 100"],
    );
    run(daemon, &format!("fdb add {x} --vni 100 --port port3"));
    is(x, &local("port3"), true);
}

#[test]
fn reads_show_the_same_as_text_and_as_json() {
    if !is_root("reads_show_the_same_as_text_and_as_json") {
        return;
    }
    let (lab, daemons) = two_hosts();
    let daemon = &daemons[0];
    run(
        daemon,
        "fdb add 02:00:00:00:00:02 --vni 100 --dst 198.51.100.2",
    );
    lab.vms[0]
        .netns
        .run("ping -c 3 -i 0.2 -W 2 10.0.0.2")
        .unwrap();
    for (line, text, key) in [
        ("status", "uplink0  xdp   native  yes", "uplinks"),
        ("vni show", "198.51.100.2  port1  yes", "remotes"),
        (
            "port show",
            "port1  100  xdp   native  xdp      yes",
            "hook",
        ),
        ("fdb show", "dst 198.51.100.2  api", "location"),
        (
            "fdb show --vni 100 02:00:00:00:00:02",
            "dst 198.51.100.2  api",
            "location",
        ),
        ("remote show", "192.0.2.2  uplink0  192.0.2.1", "next_hop"),
        ("stats", "egress-remote", "outcomes"),
        ("resync", "updates were needed", "duration_ms"),
    ] {
        let output = run(daemon, line);
        assert!(output.contains(text), "{line}: {output}");
        let value = daemon.json(&words(line)).unwrap();
        let object = value.get(0).unwrap_or(&value);
        assert!(object.get(key).is_some(), "{line}: {value}");
    }
    assert_eq!(daemon.json(&["resync"]).unwrap()["updates"], 0);
    assert_eq!(run(daemon, "fdb show --vni 100 02:00:00:00:00:99"), "");
    let stats = daemon.json(&["stats"]).unwrap();
    assert_eq!(stats["segments"][0]["vni"], 100);
    let egress = &stats["segments"][0]["egress"];
    let frames = |fate: &str| egress[fate]["frames"].as_u64().unwrap();
    assert!(frames("fast") + frames("passed") >= 3, "{egress}");
}

#[test]
fn segments_and_ports_leave_nothing_half_done() {
    if !is_root("segments_and_ports_leave_nothing_half_done") {
        return;
    }
    let (mut lab, daemons) = bare(2);
    let daemon = &daemons[0];
    for _ in 0..2 {
        lab.add_vm(0).unwrap();
    }
    let netns = &lab.hosts[0].netns;
    netns
        .run("ip link add taken type veth peer name taken2")
        .unwrap();
    let before = links(&lab, 0);
    for (line, parts) in [
        (
            "vni add 100 --dev nodev9",
            &["no device nodev9", "ip link"][..],
        ),
        (
            "vni add 100 --bridge taken",
            &["device taken exists", "--bridge"],
        ),
        (
            "vni add 100 --vxlan taken",
            &["device taken exists", "--vxlan"],
        ),
        (
            "vni add 100 --local 192.0.2.2 --mtu 65535",
            &["MTU 65535", "65485"],
        ),
        (
            "vni add 100 --dev uplink0 --mtu 1451",
            &["MTU 1451", "1450"],
        ),
        (
            "vni add 100 --remote 2001:db8::1",
            &["no route to remote 2001:db8::1", "--local"],
        ),
        (
            "vni add 100 --dev uplink0 --remote 2001:db8::1",
            &["2001:db8::1", "vxlan100"],
        ),
        (
            "vni add 100 --local 192.0.2.2 --mtu 69 --remote 198.51.100.2 --bridge lo",
            &["device lo exists"],
        ),
        (
            "port add port1 --vni 100",
            &["no VNI 100", "vtep vni add 100"],
        ),
        ("port del port1", &["port1 is no port", "port show"]),
        (
            "fdb add 02:00:00:00:00:05 --vni 100 --dst 192.0.2.9",
            &["no VNI 100", "vtep vni add 100"],
        ),
        ("fdb del 02:00:00:00:00:05 --vni 100", &["no VNI 100"]),
        ("vni del 100", &["no VNI 100"]),
    ] {
        refuse(daemon, line, parts);
        assert_eq!(links(&lab, 0), before, "{line}");
    }
    // A second VXLAN device of this VNI and port, which the kernel refuses.
    netns
        .run("ip link add other type vxlan id 100 dstport 4789 local 192.0.2.2")
        .unwrap();
    refuse(
        daemon,
        "vni add 100",
        &["VNI 100 exists already on device other"],
    );
    // Not ours, so not removed.
    refuse(
        daemon,
        "vni del 100",
        &["other was not made by `vtep vni add`", "ip link del other"],
    );
    refuse(
        daemon,
        "port add port1 --vni 100",
        &["other is in no bridge", "ip link set other master"],
    );
    netns.run("ip link del other").unwrap();
    netns.run("ip link add br7 type bridge").unwrap();
    netns.run("ip link set port2 master br7").unwrap();

    let start = Instant::now();
    run(
        daemon,
        "vni add 100 --local 192.0.2.2 --remote 198.51.100.2",
    );
    println!("vni add: {:?}", start.elapsed());
    refuse(
        daemon,
        "vni add 100",
        &["VNI 100 exists already", "vtep vni del 100"],
    );
    refuse(daemon, "port add nodev9 --vni 100", &["no device nodev9"]);
    refuse(
        daemon,
        "port add port2 --vni 100",
        &["port2 belongs to br7", "ip link set port2 nomaster"],
    );
    refuse(
        daemon,
        "port add uplink0 --vni 100",
        &["uplink0 is an uplink"],
    );
    refuse(daemon, "port add br7 --vni 100", &["br7 cannot be a port"]);
    refuse(daemon, "port add lo --vni 100", &["lo cannot be a port"]);
    netns.run("ip addr add 10.9.9.9/24 dev taken").unwrap();
    refuse(
        daemon,
        "port add taken --vni 100",
        &["taken has the address 10.9.9.9"],
    );
    refuse(
        daemon,
        "fdb add 02:00:00:00:00:05 --vni 100 --port port2",
        &["port2 is no port of VNI 100"],
    );
    refuse(
        daemon,
        "fdb add 02:00:00:00:00:05 --vni 100 --dst 2001:db8::1",
        &["2001:db8::1", "another IP family"],
    );
    refuse(
        daemon,
        "fdb add 02:00:00:00:00:05 --vni 101 --dst 192.0.2.9",
        &["no VNI 101"],
    );
    assert_eq!(run(daemon, "port show"), "");

    // A port keeps what was chosen for it, and loses it with its segment.
    run(daemon, "port add port1 --vni 100 --hook xdp");
    let row = daemon
        .status_row("ports", "name", "port1")
        .unwrap()
        .unwrap();
    assert_eq!(
        (&row["accelerated"], &row["hook"]),
        (&json!(true), &json!("xdp")),
        "{row}"
    );
    run(daemon, "port add port1 --vni 100 --hook kernel");
    let row = daemon
        .status_row("ports", "name", "port1")
        .unwrap()
        .unwrap();
    assert_eq!(row["accelerated"], false, "{row}");
    run(daemon, "port add port1 --vni 100 --hook xdp");
    run(daemon, "port del port1");
    assert_eq!(run(daemon, "port show"), "");
    let port = netns.run("ip -d link show port1").unwrap();
    assert!(!port.contains("master") && !port.contains("xdp"), "{port}");
    run(daemon, "port add port1 --vni 100");
    let row = daemon
        .status_row("ports", "name", "port1")
        .unwrap()
        .unwrap();
    assert_eq!((&row["hook"], &row["mode"]), (&"tcx".into(), &Value::Null));

    run(daemon, "vni del 100");
    let after = links(&lab, 0);
    assert!(
        !after.contains("vxlan100") && !after.contains("br100"),
        "{after}"
    );
    assert!(after.contains("port1") && after.contains("br7"), "{after}");
    let status = daemon.json(&["status"]).unwrap();
    assert_eq!(status["segments"], json!([]), "{status}");
    assert_eq!(status["counters"]["fdb_entries"], 0, "{status}");

    // Names, port and learning as they are said.
    run(
        daemon,
        "vni add 16777215 --local 192.0.2.2 --dev uplink0 --udp-port 8472 --learning off --mtu 1400 --bridge brx --vxlan vxx",
    );
    let device = netns.run("ip -d link show vxx").unwrap();
    for part in [
        "id 16777215",
        "dstport 8472",
        "nolearning",
        "mtu 1400",
        "dev uplink0",
        "master brx",
    ] {
        assert!(device.contains(part), "{part}: {device}");
    }
    run(daemon, "vni del 16777215");
}

#[test]
fn wrong_usage_is_one_line_and_exit_2() {
    if !is_root("wrong_usage_is_one_line_and_exit_2") {
        return;
    }
    let (lab, daemons) = bare(1);
    let daemon = &daemons[0];
    let before = links(&lab, 0);
    for (line, parts) in [
        ("vni add 16777216", &["16777216", "VNI"][..]),
        ("vni add -1", &["-1"]),
        ("vni add 100 --mtu 20", &["20", "68"]),
        (
            "vni add 100 --local 192.0.2.2 --remote 2001:db8::1",
            &["different IP families"],
        ),
        ("vni add 100 --remote 224.0.0.1", &["224.0.0.1"]),
        (
            "vni add 100 --bridge sixteen-bytes-xx",
            &["sixteen-bytes-xx", "device name"],
        ),
        (
            "fdb add 01:00:5e:00:00:01 --vni 100 --dst 192.0.2.9",
            &["multicast"],
        ),
        (
            "fdb add ff:ff:ff:ff:ff:ff --vni 100 --dst 192.0.2.9",
            &["multicast"],
        ),
        (
            "fdb add 00:00:00:00:00:00 --vni 100 --dst 192.0.2.9",
            &["all-zero"],
        ),
        ("fdb add 02:00:00:00:00:05 --vni 100", &["--dst"]),
        (
            "fdb add 02:00:00:00:00:05 --vni 100 --dst 192.0.2.9 --port port1",
            &["--port"],
        ),
        ("frobnicate", &["frobnicate"]),
        ("vni frobnicate", &["frobnicate"]),
    ] {
        refuse_with(daemon, line, 2, parts);
    }
    assert_eq!(links(&lab, 0), before);
}
