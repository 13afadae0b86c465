//! The mirror under load: many entries, fast changes, many moves, lost
//! notifications. What the maps hold is read from the maps.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use serde_json::Value;
use vtep_common::MacAddr;
use vtep_tests::daemon::Daemon;
use vtep_tests::lab::{Family, Lab};
use vtep_tests::maps::{Maps, Way};
use vtep_tests::{on_both_underlays, wait_until};
use vtep_user::kernel::{FdbEntry, FdbTable, bits};
use vtep_user::netlink::{FdbWrite, Netlink};

on_both_underlays!(
    ten_thousand_entries_in_a_second_and_in_little_memory,
    a_replaced_entry_is_in_the_maps_within_5_ms,
    a_thousand_moves_leave_what_the_last_one_says,
    lost_notifications_are_counted_and_repaired,
);

const SEGMENT: u16 = 1;

/// The other host, and a second address behind the same router, so that it is
/// resolved at once.
fn remotes(underlay: Family) -> [IpAddr; 2] {
    [2, 3].map(|host| underlay.address(1, host))
}

fn mac(number: u32) -> MacAddr {
    let [a, b, c, d] = number.to_be_bytes();
    MacAddr([2, 1, a, b, c, d])
}

/// One host of interest, with a VM, its daemon and its maps.
fn host(underlay: Family) -> (Lab, Daemon, Maps) {
    let mut lab = Lab::on(underlay).unwrap();
    lab.add_vm(0).unwrap();
    let daemon = Daemon::start(&lab.hosts[0], &[&lab.vms[0].port]).unwrap();
    let maps = Maps::open(daemon.instance()).unwrap();
    lab.set_remote(0, mac(0), 1).unwrap();
    daemon.wait_accelerated(mac(0)).unwrap();
    (lab, daemon, maps)
}

/// Feed `bridge -batch`; how long it took.
fn batch(lab: &Lab, lines: &str) -> Duration {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), lines).unwrap();
    let start = Instant::now();
    lab.hosts[0]
        .netns
        .run(&format!("bridge -batch {}", file.path().display()))
        .unwrap();
    start.elapsed()
}

/// Both tables, as an operator would write them.
fn remote(lines: &mut String, mac: MacAddr, dst: IpAddr) {
    writeln!(
        lines,
        "fdb replace {mac} dev vxlan100 self static dst {dst}"
    )
    .unwrap();
    writeln!(lines, "fdb replace {mac} dev vxlan100 master static").unwrap();
}

/// A field of /proc/PID/status in KiB.
fn memory_kib(daemon: &Daemon, field: &str) -> u64 {
    let path = format!("/proc/{}/status", daemon.pid().unwrap());
    let text = std::fs::read_to_string(path).unwrap();
    let line = text.lines().find(|l| l.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// User and system time in clock ticks (1/100 s), all threads.
fn cpu_ticks(daemon: &Daemon) -> u64 {
    let path = format!("/proc/{}/stat", daemon.pid().unwrap());
    let text = std::fs::read_to_string(path).unwrap();
    let fields: Vec<&str> = text
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

/// What the kernel's two tables say, in the words of the maps.
fn kernel(lab: &Lab) -> BTreeMap<MacAddr, Way> {
    let netns = &lab.hosts[0].netns;
    let text = netns.run("bridge -j fdb show").unwrap();
    let rows: Vec<Value> = serde_json::from_str(&text).unwrap();
    let of = |row: &Value| row["mac"].as_str().unwrap().parse::<MacAddr>().unwrap();
    let tunnel: BTreeMap<MacAddr, IpAddr> = rows
        .iter()
        .filter(|row| row["ifname"] == "vxlan100" && row["dst"].is_string())
        .map(|row| (of(row), row["dst"].as_str().unwrap().parse().unwrap()))
        .collect();
    let port = netns.ifindex("port1").unwrap();
    rows.iter()
        .filter(|row| row["master"] == "br100" && row["state"] != "permanent")
        .map(|row| {
            let way = match row["ifname"].as_str().unwrap() {
                "port1" => Way::Port(port),
                _ => tunnel
                    .get(&of(row))
                    .map_or(Way::Kernel, |ip| Way::Remote(*ip)),
            };
            (of(row), way)
        })
        .collect()
}

#[track_caller]
fn equal(lab: &Lab, maps: &Maps) {
    let (kernel, maps) = (kernel(lab), maps.all(SEGMENT));
    let differing = kernel.iter().find(|(mac, way)| maps.get(mac) != Some(way));
    assert_eq!(differing, None);
    let differing = maps.iter().find(|(mac, _)| !kernel.contains_key(mac));
    assert_eq!(differing, None);
}

fn ten_thousand_entries_in_a_second_and_in_little_memory(underlay: Family) {
    let [there, _] = remotes(underlay);
    const COUNT: u32 = 10_000;
    let (lab, daemon, maps) = host(underlay);
    println!("memory before: {} KiB", memory_kib(&daemon, "VmRSS"));
    let mut lines = String::new();
    (0..COUNT).for_each(|n| remote(&mut lines, mac(n), there));
    let written = batch(&lab, &lines);
    let all = |maps: &Maps| {
        let ways = maps.all(SEGMENT);
        (0..COUNT).all(|n| ways.get(&mac(n)) == Some(&Way::Remote(there)))
    };
    let after = wait_until(Duration::from_secs(1), "all are in the maps", || {
        Ok(all(&maps))
    })
    .unwrap();
    println!("{COUNT} entries: bridge -batch took {written:?}, in the maps {after:?} later");
    let start = Instant::now();
    let rows = daemon.json(&["fdb", "show", "--vni", "100"]).unwrap();
    println!("fdb show: {:?}", start.elapsed());
    let rows = rows.as_array().unwrap();
    let good = rows
        .iter()
        .filter(|row| row["accelerated"] == true && row["location"]["remote"] == there.to_string());
    assert!(good.count() >= COUNT as usize);

    let (rss, anonymous) = (memory_kib(&daemon, "VmRSS"), memory_kib(&daemon, "RssAnon"));
    println!("memory with {COUNT} entries: {rss} KiB, of which {anonymous} KiB anonymous");
    // Somebody else's burst may fall into one of the windows.
    let idle = (0..3).any(|_| {
        let before = cpu_ticks(&daemon);
        std::thread::sleep(Duration::from_secs(5));
        let ticks = cpu_ticks(&daemon) - before;
        println!("idle for 5 s: {ticks} clock ticks");
        ticks <= 1
    });
    assert!(rss < 30 * 1024, "{rss} KiB");
    assert!(idle);
    equal(&lab, &maps);
    assert_eq!(daemon.json(&["resync"]).unwrap()["updates"], 0);
}

fn a_replaced_entry_is_in_the_maps_within_5_ms(underlay: Family) {
    let [there, elsewhere] = remotes(underlay);
    const ROUNDS: usize = 300;
    let (lab, daemon, maps) = host(underlay);
    let entry = |dst: IpAddr, ifindex| FdbEntry {
        table: FdbTable::Vxlan,
        ifindex,
        bridge: None,
        mac: mac(0),
        vlan: None,
        dst: Some(dst),
        udp_port: None,
        vni: None,
        source_vni: None,
        via: None,
        nexthop_id: None,
        state: bits::NUD_NOARP | bits::NUD_REACHABLE,
        flags: 0,
    };
    let netns = &lab.hosts[0].netns;
    let vxlan = netns.ifindex("vxlan100").unwrap();
    // Both remotes are in use, so that none of them is new.
    lab.set_remote(0, mac(1), 1).unwrap();
    let mut lines = String::new();
    remote(&mut lines, mac(2), elsewhere);
    batch(&lab, &lines);
    daemon.wait_accelerated(mac(1)).unwrap();
    daemon.wait_accelerated(mac(2)).unwrap();
    let measure = || -> anyhow::Result<Vec<Duration>> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            let netlink = Netlink::open()?;
            let mut times = Vec::new();
            for round in 0..ROUNDS {
                let dst = [elsewhere, there][round % 2];
                let start = Instant::now();
                netlink
                    .fdb_write(&entry(dst, vxlan), FdbWrite::Replace)
                    .await?;
                while maps.get(SEGMENT, mac(0)) != Some(Way::Remote(dst)) {
                    anyhow::ensure!(start.elapsed() < Duration::from_secs(1), "round {round}");
                    std::thread::yield_now();
                }
                times.push(start.elapsed());
                // As an operator would, not in a burst.
                std::thread::sleep(Duration::from_millis(2));
            }
            times.sort();
            Ok(times)
        })
    };
    // On a machine whose CPUs are taken by others, the third try counts.
    let fast = (0..3).any(|_| {
        let times = netns.enter(measure).unwrap();
        let (median, p99) = (times[ROUNDS / 2], times[ROUNDS * 99 / 100]);
        println!(
            "replace to maps: median {median:?}, p99 {p99:?}, worst {:?}",
            times[ROUNDS - 1]
        );
        p99 < Duration::from_millis(5)
    });
    assert!(fast);
    drop(daemon);
}

/// F2: elsewhere an entry is stuck after some twenty moves.
fn a_thousand_moves_leave_what_the_last_one_says(underlay: Family) {
    let [there, _] = remotes(underlay);
    let (lab, daemon, maps) = host(underlay);
    let vm = lab.vms[0].mac;
    let port = Way::Port(lab.hosts[0].netns.ifindex("port1").unwrap());
    let move_to = |lines: &mut String, away: bool| {
        if away {
            remote(lines, vm, there);
        } else {
            writeln!(lines, "fdb replace {vm} dev port1 master static").unwrap();
            writeln!(lines, "fdb del {vm} dev vxlan100 self").unwrap();
        }
    };
    let mut lines = String::new();
    move_to(&mut lines, true);
    move_to(&mut lines, false);
    batch(&lab, &lines);
    let is = |way: Way| {
        wait_until(Duration::from_secs(2), "the last move counts", || {
            Ok(maps.get(SEGMENT, vm) == Some(way))
        })
        .unwrap_or_else(|e| panic!("{e}: {:?} instead of {way:?}", maps.get(SEGMENT, vm)))
    };
    is(port);
    std::thread::sleep(Duration::from_millis(1100));
    let (entries, locations, memory) = (
        maps.all(SEGMENT).len(),
        maps.locations_in_use(),
        memory_kib(&daemon, "RssAnon"),
    );
    for (moves, last) in [(501, true), (500, false)] {
        lines.clear();
        (1..=moves).for_each(|n| move_to(&mut lines, (n % 2 == moves % 2) == last));
        batch(&lab, &lines);
        is(if last { Way::Remote(there) } else { port });
        equal(&lab, &maps);
    }
    // The same by our own command, which returns only when it is done.
    for round in 0..50 {
        let away = round % 2 == 0;
        let to = if away {
            ["--dst", &there.to_string()]
        } else {
            ["--port", "port1"]
        };
        let address = vm.to_string();
        daemon
            .cli(&["fdb", "replace", &address, "--vni", "100", to[0], to[1]])
            .unwrap();
        let way = if away { Way::Remote(there) } else { port };
        assert_eq!(maps.get(SEGMENT, vm), Some(way), "round {round}");
    }
    equal(&lab, &maps);
    assert_eq!(maps.all(SEGMENT).len(), entries);
    wait_until(
        Duration::from_secs(3),
        "given up locations are given back",
        || Ok(maps.locations_in_use() <= locations),
    )
    .unwrap();
    let grown = memory_kib(&daemon, "RssAnon").saturating_sub(memory);
    println!("1051 moves: memory grew by {grown} KiB");
    assert!(grown < 1024, "{grown} KiB");
    assert_eq!(daemon.json(&["resync"]).unwrap()["updates"], 0);
}

/// R40: more changes than fit into the socket while the daemon stands still.
fn lost_notifications_are_counted_and_repaired(underlay: Family) {
    let [there, elsewhere] = remotes(underlay);
    const COUNT: u32 = 40_000;
    let (lab, daemon, maps) = host(underlay);
    let signal = |number| {
        let pid = daemon.pid().unwrap() as i32;
        // SAFETY: a signal to a child of ours.
        let status = unsafe { libc::kill(pid, number) };
        assert_eq!(status, 0);
    };
    // What is only in the maps must go, what is there may change.
    let mut lines = String::new();
    (0..1000).for_each(|n| remote(&mut lines, mac(n), there));
    batch(&lab, &lines);
    wait_until(Duration::from_secs(2), "the first thousand", || {
        Ok(maps.get(SEGMENT, mac(999)) == Some(Way::Remote(there)))
    })
    .unwrap();
    signal(libc::SIGSTOP);
    lines.clear();
    (1..COUNT).for_each(|n| remote(&mut lines, mac(n), there));
    (1..COUNT).for_each(|n| remote(&mut lines, mac(n), elsewhere));
    (100..200).for_each(|n| {
        writeln!(lines, "fdb del {} dev vxlan100 self", mac(n)).unwrap();
        writeln!(lines, "fdb del {} dev vxlan100 master", mac(n)).unwrap();
    });
    let written = batch(&lab, &lines);
    signal(libc::SIGCONT);
    let start = Instant::now();
    // Answered when everything before it is done.
    let overruns = || {
        daemon.json(&["status"]).unwrap()["counters"]["overruns"]
            .as_u64()
            .unwrap()
    };
    wait_until(Duration::from_secs(10), "the loss is counted", || {
        Ok(overruns() > 0)
    })
    .unwrap();
    println!(
        "{} changes in {written:?}; noticed and repaired after {:?}",
        lines.lines().count(),
        start.elapsed()
    );
    equal(&lab, &maps);
    assert_eq!(maps.get(SEGMENT, mac(150)), None);
    assert_eq!(
        maps.get(SEGMENT, mac(COUNT - 1)),
        Some(Way::Remote(elsewhere))
    );
    let text = daemon.cli(&["status"]).unwrap();
    assert!(!text.contains(" 0 overruns"), "{text}");
    // And it goes on.
    lines.clear();
    remote(&mut lines, mac(150), there);
    batch(&lab, &lines);
    wait_until(Duration::from_secs(1), "new entries", || {
        Ok(maps.get(SEGMENT, mac(150)) == Some(Way::Remote(there)))
    })
    .unwrap();
}
