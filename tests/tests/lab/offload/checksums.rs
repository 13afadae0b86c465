//! F14: frames whose checksums the guest left to the device. Every checksum is
//! looked at on the wire and by the receiver.

use std::net::{IpAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use vtep_tests::lab::Vm;
use vtep_tests::streams::{connect, transfer};
use vtep_tests::wiretap::{Wiretap, counter};

use super::{Case, World, for_all_ports, v6};

for_all_ports! {
    f14_every_checksum_is_right_on_the_wire_and_at_the_receiver: every_checksum;
}

const BYTES: usize = 2 << 20;
/// Payloads of datagrams; the largest that fits is the last.
const DATAGRAMS: [usize; 7] = [0, 1, 18, 19, 511, 1000, 1402];

fn every_checksum(case: &Case) {
    let mut world = World::new(case);
    let taps = ["to1", "to2"].map(|device| {
        let udp_port = 4789;
        Wiretap::start(&world.lab.router, device, udp_port).unwrap()
    });
    let [a, b] = world.vms();
    for (from, to) in [(a, b), (b, a)] {
        for address in [IpAddr::from(to.address), v6(to)] {
            let (near, far) = connect(&from.netns, &to.netns, address).unwrap();
            transfer(&near, &far, BYTES).unwrap();
            datagrams(from, to, address);
        }
    }
    let seen = taps.map(|tap| tap.finish().unwrap());
    for seen in &seen {
        assert_eq!((seen.wrong_frames, seen.missed), (0, 0), "{seen:?}");
        let full = u64::from(world.lab.vm_mtu);
        assert!(seen.tcp_frames >= 2 * BYTES as u64 / full, "{seen:?}");
        // As many again were cut from one.
        assert!(seen.udp_frames >= 4 * DATAGRAMS.len() as u64, "{seen:?}");
        assert!(seen.largest <= world.lab.vm_mtu as usize + 14, "{seen:?}");
        let summed = if case.udpcsum { seen.frames } else { 0 };
        assert_eq!(seen.outer_checksums, summed, "{seen:?}");
    }
    for vm in [a, b] {
        for protocol in ["Tcp", "Udp"] {
            let name = if protocol == "Tcp" {
                "InErrs"
            } else {
                "InErrors"
            };
            assert_eq!(counter(&vm.netns, protocol, name).unwrap(), 0);
            assert_eq!(counter(&vm.netns, protocol, "InCsumErrors").unwrap(), 0);
        }
    }
    for vm in &world.lab.vms {
        if let Some(machine) = &vm.machine {
            // The guest does use what this is about.
            let sent = machine.from_guest();
            assert!(sent.partial > 100 && sent.superframes > 20, "{sent:?}");
            assert_eq!(sent.refused + machine.to_guest().refused, 0, "{sent:?}");
        }
    }
    world.assert_fast_tcp(case, 2 * BYTES);
}

/// One by one, and several of a size in one call, which the kernel (or the host
/// behind the guest) cuts.
fn datagrams(from: &Vm, to: &Vm, address: IpAddr) {
    let any = |vm: &Vm| {
        let any: IpAddr = match address {
            IpAddr::V4(_) => [0; 4].into(),
            IpAddr::V6(_) => [0; 16].into(),
        };
        vm.netns.enter(|| Ok(UdpSocket::bind((any, 0))?)).unwrap()
    };
    let (near, far) = (any(from), any(to));
    near.connect((address, far.local_addr().unwrap().port()))
        .unwrap();
    far.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut buffer = [0; 2048];
    let mut receive = |want: &[u8]| {
        let n = far.recv(&mut buffer).expect("a datagram");
        assert!(buffer[..n] == *want, "{n} bytes instead of {}", want.len());
    };
    // Headers of IPv6 are longer.
    let less = if address.is_ipv6() { 20 } else { 0 };
    for size in DATAGRAMS.map(|size| size.saturating_sub(less)) {
        let data: Vec<u8> = (0..size).map(|i| (i * 31) as u8).collect();
        near.send(&data).unwrap();
        receive(&data);
        if size > 18 {
            let whole: Vec<u8> = (0..size * 7 - 5)
                .map(|i| (i * 13 + i / 256) as u8)
                .collect();
            cut_into(&near, size);
            near.send(&whole).unwrap();
            whole.chunks(size).for_each(&mut receive);
            cut_into(&near, 0);
        }
    }
}

fn cut_into(socket: &UdpSocket, bytes: usize) {
    let bytes = bytes as libc::c_int;
    // SAFETY: an int option with an int value.
    let status = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            (&raw const bytes).cast(),
            size_of_val(&bytes) as u32,
        )
    };
    assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
}
