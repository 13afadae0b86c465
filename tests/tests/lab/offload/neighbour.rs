//! F20: the next hop is not resolved. The kernel's path carries the first
//! frames while it asks; none is lost.

use std::net::UdpSocket;
use std::time::Duration;

use vtep_tests::lab::{BRIDGE, UPLINK};

use super::{Case, World, for_all_ports};

for_all_ports! {
    f20_the_first_frames_to_an_unresolved_next_hop_arrive: cold;
}

const ROUNDS: u32 = 20;
/// In a burst.
const FRAMES: u32 = 20;

fn cold(case: &Case) {
    let mut world = World::without_daemons(case);
    // Everything is known but the way: nothing else is asked before the first frame.
    for (here, there) in [(0, 1), (1, 0)] {
        let (vm, peer) = (&world.lab.vms[here], &world.lab.vms[there]);
        vm.netns
            .run(&format!(
                "ip neigh replace {} lladdr {} dev eth0 nud permanent",
                peer.address, peer.mac
            ))
            .unwrap();
        world.lab.hosts[here]
            .netns
            .run(&format!(
                "bridge fdb replace {} dev {} master static",
                vm.mac, vm.port
            ))
            .unwrap();
        world.lab.set_remote(here, peer.mac, there).unwrap();
    }
    let socket = |vm: usize| {
        let vm = &world.lab.vms[vm];
        let socket = vm.netns.enter(|| Ok(UdpSocket::bind((vm.address, 4000))?));
        let socket = socket.unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        socket
    };
    let sockets = [socket(0), socket(1)];
    let [a, b] = [0, 1].map(|vm: usize| world.lab.vms[vm].address);
    sockets[0].connect((b, 4000)).unwrap();
    sockets[1].connect((a, 4000)).unwrap();
    burst(&world, &sockets, "the kernel alone");
    forget(&world);
    world.start_cold();
    burst(&world, &sockets, "the daemon has just started");
    for round in 0..ROUNDS {
        forget(&world);
        burst(&world, &sockets, &format!("round {round}"));
    }
    world.meet();
    world.look();
    burst(&world, &sockets, "resolved");
    world.assert_fast(u64::from(FRAMES));
}

fn forget(world: &World) {
    for host in &world.lab.hosts {
        host.netns
            .run(&format!("ip neigh flush dev {UPLINK}"))
            .unwrap();
    }
    for device in ["to1", "to2"] {
        world
            .lab
            .router
            .run(&format!("ip neigh flush dev {device}"))
            .unwrap();
    }
}

/// All arrive, once, in both directions.
fn burst(world: &World, sockets: &[UdpSocket; 2], what: &str) {
    let [a, b] = sockets;
    for (from, to) in [(a, b), (b, a)] {
        for number in 0..FRAMES {
            from.send(&number.to_be_bytes()).unwrap();
        }
        let mut got = vec![0; FRAMES as usize];
        for _ in 0..FRAMES {
            let mut bytes = [0; 4];
            to.recv(&mut bytes).unwrap_or_else(|error| {
                let show = |line: &str| world.lab.hosts[0].netns.run(line).unwrap();
                panic!(
                    "{what}: {error}, {got:?} of each arrived\n{}\n{}",
                    show(&format!("ip neigh show dev {UPLINK}")),
                    show(&format!("bridge fdb show br {BRIDGE}"))
                )
            });
            got[u32::from_be_bytes(bytes) as usize] += 1;
        }
        assert!(got.iter().all(|times| *times == 1), "{what}: {got:?}");
    }
}
