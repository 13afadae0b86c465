//! IPv4 and IPv6 underlays on the same hosts, and what the commands make of
//! addresses of either family.

use std::time::Duration;

use serde_json::{Value, json};
use vtep_common::MacAddr;
use vtep_tests::daemon::Daemon;
use vtep_tests::lab::{Family, Lab, Options, Vm};
use vtep_tests::{is_root, on_both_underlays, wait_until};

on_both_underlays!(r31_a_narrower_path_is_found_out_and_told_to_the_vm);

const MACS: [MacAddr; 2] = [MacAddr([2, 0, 0, 0, 7, 1]), MacAddr([2, 0, 0, 0, 7, 2])];

/// On every host a bridge and VXLAN device for each family, VNI and UDP port the
/// same. VMs 0 and 1 are on the first host, 2 and 3 on the second, odd ones on
/// IPv6; those of a host have the same MAC address.
fn both_families() -> Lab {
    let mut lab = Lab::new().unwrap();
    let v6 = lab.add_family(Family::V6).unwrap();
    for (host, mac) in MACS.iter().enumerate() {
        let (local, remote) = (v6[host], v6[1 - host]);
        let netns = &lab.hosts[host].netns;
        netns
            .run_all(&format!(
                "ip link add br6 type bridge
                 ip link add vxlan6 type vxlan id 100 local {local} dstport 4789
                 ip link set vxlan6 mtu 1430 master br6
                 ip link set vxlan6 up
                 ip link set br6 up
                 bridge fdb append 00:00:00:00:00:00 dev vxlan6 dst {remote}"
            ))
            .unwrap();
        for bridge in ["br100", "br6"] {
            let vm = lab.add_vm(host).unwrap();
            let Vm { netns, port, .. } = &lab.vms[vm];
            let set = format!("ip link set eth0 address {mac}");
            netns.run(&set).unwrap();
            let set = format!("ip link set {port} master {bridge}");
            lab.hosts[host].netns.run(&set).unwrap();
        }
    }
    lab
}

fn ping(lab: &Lab, vm: usize, to: usize) -> bool {
    let line = format!("ping -c 10 -i 0.01 -W 1 {}", lab.vms[to].address);
    lab.vms[vm].netns.run(&line).is_ok()
}

#[test]
fn r2_both_families_carry_equal_vnis_ports_and_macs_side_by_side() {
    if !is_root("r2_both_families_carry_equal_vnis_ports_and_macs_side_by_side") {
        return;
    }
    let lab = both_families();
    let daemons = [0, 1].map(|host: usize| {
        let ports = [&lab.vms[2 * host].port, &lab.vms[2 * host + 1].port];
        Daemon::start(&lab.hosts[host], &ports.map(String::as_str)).unwrap()
    });
    assert!(ping(&lab, 0, 2) && ping(&lab, 1, 3));
    for daemon in &daemons {
        wait_until(Duration::from_secs(5), "four fast stations", || {
            let rows = daemon.json(&["fdb", "show"])?;
            let rows = rows.as_array().into_iter().flatten();
            let ours = rows.filter(|row| MACS.iter().any(|mac| row["mac"] == mac.to_string()));
            Ok(ours.filter(|row| row["accelerated"] == true).count() == 4)
        })
        .unwrap();
    }
    let egress = |daemon: &Daemon| -> Vec<u64> {
        let stats = daemon.json(&["stats"]).unwrap();
        let segments = stats["segments"].as_array().unwrap();
        let fast = |row: &Value| row["outcomes"]["egress-remote"]["frames"].as_u64();
        segments.iter().map(|row| fast(row).unwrap_or(0)).collect()
    };
    let before = egress(&daemons[0]);
    assert!(ping(&lab, 0, 2) && ping(&lab, 1, 3));
    let after = egress(&daemons[0]);
    assert_eq!(before.len(), 2);
    assert!(after.iter().zip(&before).all(|(a, b)| *a >= b + 10));
    // The one family's VMs do not reach the other's.
    assert!(!ping(&lab, 0, 3) && !ping(&lab, 1, 2));
    let rows = daemons[0].json(&["remote", "show"]).unwrap();
    let remotes = rows.as_array().unwrap().iter().map(|row| &row["remote"]);
    let remotes: Vec<&Value> = remotes.collect();
    assert_eq!(remotes, [&json!("198.51.100.2"), &json!("2001:db8:2::2")]);
}

#[test]
fn segments_on_ipv6_are_made_and_filled_by_commands() {
    if !is_root("segments_on_ipv6_are_made_and_filled_by_commands") {
        return;
    }
    let mut lab = Lab::with(&Options {
        underlay: Family::V6,
        segment: false,
        ..Options::default()
    })
    .unwrap();
    let mut daemons = Vec::new();
    for host in 0..2 {
        let vm = lab.add_vm(host).unwrap();
        let daemon = Daemon::with_config(&lab.hosts[host], "").unwrap();
        let (here, there) = (lab.hosts[host].address, lab.hosts[1 - host].address);
        let port = &lab.vms[vm].port;
        for line in [
            format!("vni add 100 --local {here} --remote {there}"),
            format!("port add {port} --vni 100 --hook xdp"),
        ] {
            let words: Vec<&str> = line.split(' ').collect();
            daemon.cli(&words).unwrap();
        }
        daemons.push(daemon);
    }
    let daemon = &daemons[0];
    // 70 bytes less than the underlay, which has 1520.
    let device = lab.hosts[0].netns.run("ip -d link show vxlan100").unwrap();
    assert!(device.contains("mtu 1450"), "{device}");
    let x = MacAddr([2, 0, 0, 0, 9, 1]).to_string();
    let add = ["fdb", "add", &x, "--vni", "100", "--dst"];
    let (_, line) = daemon
        .refusal(&[&add[..], &["198.51.100.2"]].concat())
        .unwrap();
    assert!(line.contains("another IP family"), "{line}");
    daemon
        .cli(&[&add[..], &["2001:db8:2::2"]].concat())
        .unwrap();
    let rows = daemon.json(&["fdb", "show", "--vni", "100", &x]).unwrap();
    let remote = json!({"kind": "remote", "remote": "2001:db8:2::2"});
    let row = &rows[0];
    assert_eq!(
        (&row["location"], &row["accelerated"]),
        (&remote, &json!(true))
    );
    let text = daemon.cli(&["remote", "show"]).unwrap();
    assert!(
        text.contains("2001:db8:1::2  uplink0  2001:db8:1::1"),
        "{text}"
    );
    let vni = daemon.json(&["vni", "show"]).unwrap();
    assert_eq!(vni[0]["remotes"], json!(["2001:db8:2::2"]));
    assert!(ping(&lab, 0, 1));
    for daemon in &daemons {
        daemon.wait_accelerated(lab.vms[0].mac).unwrap();
        daemon.wait_accelerated(lab.vms[1].mac).unwrap();
    }
    let before = daemon.frames("egress-remote").unwrap();
    assert!(ping(&lab, 0, 1));
    assert!(daemon.frames("egress-remote").unwrap() >= before + 10);
}

/// The kernel learns the MTU of a path from what a router says about a frame
/// that XDP sent; from then on larger ones are its own.
fn r31_a_narrower_path_is_found_out_and_told_to_the_vm(underlay: Family) {
    let mut lab = Lab::with(&Options {
        underlay,
        // Routers cut other IPv4 packets.
        vxlan: if underlay == Family::V4 { "df set" } else { "" }.to_owned(),
        ..Options::default()
    })
    .unwrap();
    let (a, b) = (lab.add_vm(0).unwrap(), lab.add_vm(1).unwrap());
    let daemon = Daemon::start(&lab.hosts[0], &[&lab.vms[a].port]).unwrap();
    assert!(ping(&lab, a, b));
    daemon.wait_accelerated(lab.vms[b].mac).unwrap();
    lab.router.run("ip link set to2 mtu 1400").unwrap();
    let mtu = 1400 - underlay.overhead();
    let size = lab.vm_mtu - 28;
    let ping = format!("ping -M do -s {size} -c 1 -W 1 {}", lab.vms[b].address);
    let before = daemon.frames("egress-remote").unwrap();
    wait_until(Duration::from_secs(15), "the VM is told", || {
        let said = lab.vms[a]
            .netns
            .run(&ping)
            .map_err(|error| format!("{error:#}"));
        Ok(said.is_err_and(|error| {
            error.contains(&format!("mtu = {mtu}")) || error.contains(&format!("mtu={mtu}"))
        }))
    })
    .unwrap();
    assert!(
        daemon.frames("egress-remote").unwrap() > before,
        "the first was ours"
    );
    let fit = format!(
        "ping -M do -s {} -c 1 -W 1 {}",
        mtu - 28,
        lab.vms[b].address
    );
    lab.vms[a].netns.run(&fit).unwrap();
}
