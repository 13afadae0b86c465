//! What `vtep stats` says, against what both ends counted: the devices of the
//! VMs, the sockets in them, and the wire between the hosts.

use std::net::UdpSocket;
use std::time::Duration;

use serde_json::Value;
use vtep_tests::daemon::Daemon;
use vtep_tests::lab::Vm;
use vtep_tests::streams::{connect, transfer};
use vtep_tests::wait_until;
use vtep_tests::wiretap::{Seen, Wiretap};

use super::{Case, World, for_all_ports};

for_all_ports! {
    statistics_agree_with_the_frames_counted_at_both_ends: agree;
}

const DATAGRAMS: u64 = 2000;
const BYTES: usize = 1 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Count {
    frames: u64,
    bytes: u64,
}

impl std::ops::Sub for Count {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            frames: self.frames - other.frames,
            bytes: self.bytes - other.bytes,
        }
    }
}

impl std::ops::Add for Count {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            frames: self.frames + other.frames,
            bytes: self.bytes + other.bytes,
        }
    }
}

/// One direction of the segment: fast, passed, dropped.
type Direction = [Count; 3];

fn direction(daemon: &Daemon, name: &str) -> Direction {
    let stats = daemon.json(&["stats"]).unwrap();
    let row = &stats["segments"][0][name];
    ["fast", "passed", "dropped"].map(|fate| Count {
        frames: row[fate]["frames"].as_u64().unwrap(),
        bytes: row[fate]["bytes"].as_u64().unwrap(),
    })
}

fn since(now: Direction, before: Direction) -> Direction {
    [0, 1, 2].map(|i| now[i] - before[i])
}

/// What a VM's device sent.
fn sent(vm: &Vm) -> Count {
    let text = vm.netns.run("ip -j -s link show dev eth0").unwrap();
    let links: Value = serde_json::from_str(&text).unwrap();
    let sent = &links[0]["stats64"]["tx"];
    Count {
        frames: sent["packets"].as_u64().unwrap(),
        bytes: sent["bytes"].as_u64().unwrap(),
    }
}

fn on_the_wire(seen: &Seen) -> Count {
    assert_eq!((seen.wrong_frames, seen.missed), (0, 0), "{seen:?}");
    Count {
        frames: seen.frames,
        bytes: seen.bytes,
    }
}

fn agree(case: &Case) {
    let mut world = World::new(case);
    // Nothing but what is sent here.
    for (vm, peer) in [(0, 1), (1, 0)].map(|(a, b)| (&world.lab.vms[a], &world.lab.vms[b])) {
        let (ip, mac) = (peer.address, peer.mac);
        vm.netns
            .run(&format!(
                "ip neigh replace {ip} lladdr {mac} dev eth0 nud permanent"
            ))
            .unwrap();
        vm.netns
            .enter(|| {
                let path = "/proc/sys/net/ipv6/conf/eth0/disable_ipv6";
                Ok(std::fs::write(path, "1")?)
            })
            .unwrap();
    }
    let taps =
        ["to1", "to2"].map(|device| Wiretap::start(&world.lab.router, device, 4789).unwrap());
    let before = Before::look(&world);
    let [a, b] = world.vms();
    let (near, far) = connect(&a.netns, &b.netns, b.address.into()).unwrap();
    transfer(&near, &far, BYTES).unwrap();
    transfer(&far, &near, BYTES).unwrap();
    drop((near, far));
    let received = datagrams(a, b);
    assert_eq!(received, DATAGRAMS, "datagrams at the receiver");
    let seen = taps.map(|tap| on_the_wire(&tap.finish().unwrap()));
    let now = Before::look(&world);
    for host in 0..2 {
        let sent = now.sent[host] - before.sent[host];
        let egress = since(now.egress[host], before.egress[host]);
        let ingress = since(now.ingress[host], before.ingress[host]);
        let what = format!(
            "host {}: sent {sent:?}, egress {egress:?}, ingress {ingress:?}, wire {seen:?}",
            host + 1
        );
        let [carried, passed, dropped] = egress;
        let egress = carried + passed + dropped;
        assert_eq!(egress.frames, sent.frames, "{what}");
        // A veth whose other end polls counts no Ethernet headers.
        let headers = egress.frames * 14;
        assert!(
            [0, headers].contains(&(egress.bytes - sent.bytes)),
            "{what}"
        );
        let [carried, passed, dropped] = ingress;
        assert_eq!(dropped, Count::default(), "{what}");
        let mut from_wire = carried + passed;
        // These came with all that was in front of them.
        let outer_bytes = u64::from(case.underlay.overhead());
        from_wire.bytes -= passed.frames * outer_bytes;
        assert_eq!(from_wire, seen[1 - host], "{what}");
        assert!(carried.frames >= from_wire.frames - 5, "{what}");
        said_in_words(&world.daemons[host]);
    }
    let [carried, ..] = since(now.egress[0], before.egress[0]);
    assert!(carried.frames >= DATAGRAMS, "{carried:?}");
    world.assert_fast(20);
}

struct Before {
    sent: [Count; 2],
    egress: [Direction; 2],
    ingress: [Direction; 2],
}

impl Before {
    fn look(world: &World) -> Self {
        Self {
            sent: world.vms().map(sent),
            egress: [0, 1].map(|host| direction(&world.daemons[host], "egress")),
            ingress: [0, 1].map(|host| direction(&world.daemons[host], "ingress")),
        }
    }
}

/// The text has the figures of the JSON.
fn said_in_words(daemon: &Daemon) {
    wait_until(Duration::from_secs(2), "text and JSON agree", || {
        let [ingress, egress] = ["ingress", "egress"].map(|name| {
            let [fast, passed, dropped] = direction(daemon, name);
            let figures = [fast.frames, fast.bytes, passed.frames, dropped.frames];
            format!(
                "100 {name} {}",
                figures.map(|figure| figure.to_string()).join(" ")
            )
        });
        let text = daemon.cli(&["stats"])?;
        let rows: Vec<String> = text
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        Ok(rows.contains(&ingress) && rows.contains(&egress))
    })
    .unwrap();
}

/// How many of them arrived.
fn datagrams(from: &Vm, to: &Vm) -> u64 {
    let open = |vm: &Vm| {
        let socket = vm.netns.enter(|| Ok(UdpSocket::bind((vm.address, 4000))?));
        socket.unwrap()
    };
    let (near, far) = (open(from), open(to));
    near.connect((to.address, 4000)).unwrap();
    far.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut buffer = [0; 2048];
    let mut received = 0;
    for number in 0..DATAGRAMS {
        near.send(&vec![0x5a; 18 + number as usize % 1300]).unwrap();
        // Never more under way than the queues of virtual devices hold.
        if number % 32 == 31 {
            while received < number + 1 && far.recv(&mut buffer).is_ok() {
                received += 1;
            }
        }
    }
    while received < DATAGRAMS && far.recv(&mut buffer).is_ok() {
        received += 1;
    }
    received
}
