//! F18: large MTUs. What is not accelerated says why; nothing is lost that the
//! kernel alone carries.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use serde_json::Value;
use vtep_tests::lab::{Lab, Vm};
use vtep_tests::streams::{connect, transfer};

use super::{Case, World, for_all_ports};

for_all_ports! {
    f18_every_size_that_fits_arrives_at_every_mtu: every_mtu;
}

const BYTES: usize = 2 << 20;
/// Headers in front of a datagram.
const HEADERS: u32 = 28;

fn every_mtu(case: &Case) {
    for underlay_mtu in [1500, 3498, 9000] {
        let case = Case {
            underlay_mtu,
            ..*case
        };
        let mut world = World::without_daemons(&case);
        let fit = world.lab.vm_mtu - HEADERS;
        // The VMs believe in more than the tunnel takes.
        for (vm, host) in world.lab.vms.iter().zip(&world.lab.hosts) {
            let set = |device: &str| format!("ip link set {device} mtu {underlay_mtu}");
            host.netns.run(&set(&vm.port)).unwrap();
            vm.netns.run(&set("eth0")).unwrap();
        }
        let sizes: Vec<u32> = [0, 1422, 1472, 3420, fit]
            .into_iter()
            .flat_map(|size: u32| size.saturating_sub(6)..size + 6)
            .chain((100..fit).step_by(353))
            .filter(|size| *size <= underlay_mtu - HEADERS)
            .collect();
        let kernel = arrived(&world.lab, &sizes);
        let expected: BTreeSet<u32> = sizes.iter().copied().filter(|size| *size <= fit).collect();
        assert_eq!(kernel, expected, "MTU {underlay_mtu}, the kernel alone");
        world.start();
        say_why_not(&world);
        assert_eq!(arrived(&world.lab, &sizes), kernel, "MTU {underlay_mtu}");

        // TCP trusts the MTU of its device.
        for vm in &world.lab.vms {
            vm.netns
                .run(&format!("ip link set eth0 mtu {}", world.lab.vm_mtu))
                .unwrap();
        }
        let [a, b] = world.vms();
        let (near, far) = connect(&a.netns, &b.netns, b.address.into()).unwrap();
        transfer(&near, &far, BYTES).unwrap();
        transfer(&far, &near, BYTES).unwrap();
        world.assert_fast(10);
    }
}

fn say_why_not(world: &World) {
    for daemon in &world.daemons {
        let status = daemon.json(&["status"]).unwrap();
        for list in ["uplinks", "ports"] {
            for row in status[list].as_array().unwrap() {
                let accelerated = row["accelerated"] == Value::Bool(true);
                assert_ne!(accelerated, row["reason"].is_string(), "{row}");
            }
        }
    }
}

/// Sizes of datagrams that were echoed, none of them in fragments.
fn arrived(lab: &Lab, sizes: &[u32]) -> BTreeSet<u32> {
    let [a, b] = [&lab.vms[0], &lab.vms[1]];
    let (near, far) = (socket(a), socket(b));
    let port = |socket: &UdpSocket| socket.local_addr().unwrap().port();
    near.connect((b.address, port(&far))).unwrap();
    far.connect((a.address, port(&near))).unwrap();
    let mut arrived = BTreeSet::new();
    let mut buffer = vec![0; 65536];
    // What does not fit is not waited for: all are sent, then all are received.
    for (from, to) in [(&near, &far), (&far, &near)] {
        let mut came = BTreeSet::new();
        for sizes in sizes.chunks(8) {
            for size in sizes {
                send(from, &vec![0x5a; *size as usize]);
            }
            // A mark behind them.
            send(from, &[0xff; 50]);
            loop {
                match to.recv(&mut buffer) {
                    Ok(50) if buffer[0] == 0xff => break,
                    Ok(n) => drop(came.insert(n as u32)),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        panic!("the mark behind {sizes:?} did not arrive")
                    }
                    Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        }
        arrived = match arrived.is_empty() {
            true => came,
            false => arrived.intersection(&came).copied().collect(),
        };
    }
    arrived
}

/// The host may have said about an earlier one that it did not fit (R31).
fn send(socket: &UdpSocket, data: &[u8]) {
    let too_long = |result: &Result<usize, std::io::Error>| {
        let error = result.as_ref().err().and_then(std::io::Error::raw_os_error);
        error == Some(libc::EMSGSIZE)
    };
    let mut tries = (0..20).map(|_| socket.send(data));
    tries.find(|result| !too_long(result)).unwrap().unwrap();
}

fn socket(vm: &Vm) -> UdpSocket {
    let socket = vm
        .netns
        .enter(|| Ok(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?))
        .unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    let probe: libc::c_int = libc::IP_PMTUDISC_PROBE;
    // SAFETY: an int option with an int value.
    let status = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_IP,
            libc::IP_MTU_DISCOVER,
            (&raw const probe).cast(),
            size_of_val(&probe) as u32,
        )
    };
    assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
    socket
}
