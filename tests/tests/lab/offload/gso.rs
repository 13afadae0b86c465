//! F15: superframes into the tunnel, merged frames out of it, with payloads
//! around whole numbers of segments.

use std::time::{Duration, Instant};

use vtep_tests::frames::Socket;
use vtep_tests::lab::Vm;
use vtep_tests::segments::{self, Addresses, Inner, check};
use vtep_tests::streams::{connect, transfer};
use vtep_tests::vnet::{HEADER_BYTES, Header};

use super::{Case, World, for_all_ports};

for_all_ports! {
    f15_writes_around_whole_segments_arrive: writes;
    f15_superframes_are_cut_as_the_device_would_and_arrive_whole: superframes;
    r4_superframes_and_single_frames_of_a_flow_leave_from_one_port: one_port;
    r31_r32_superframes_whose_segments_do_not_fit_fare_as_with_the_kernel: too_long;
}

/// Around one and two segments, and around the largest superframe.
fn around(segment: usize) -> impl Iterator<Item = usize> {
    let most = (65535 - 60) / segment;
    let whole = [1, 2, 3, 17, most].map(|count| count * segment);
    whole
        .into_iter()
        .flat_map(|size| [size - 1, size, size + 1])
        .filter(move |size| *size <= most * segment)
}

fn writes(case: &Case) {
    let mut world = World::new(case);
    let [a, b] = world.vms();
    let (near, far) = connect(&a.netns, &b.netns, b.address.into()).unwrap();
    // Headers of 20 bytes each and a timestamp option of 12 (RFC 7323).
    let segment = world.lab.vm_mtu as usize - 52;
    for size in around(segment) {
        for (from, to) in [(&near, &far), (&far, &near)] {
            transfer(from, to, size).unwrap_or_else(|error| panic!("{size} bytes: {error:#}"));
        }
    }
    // Superframes that need an outer checksum are the kernel's.
    world.assert_fast(10);
}

/// Of neither VM, so that no stack answers.
const V4: Addresses = Addresses::V4([10, 0, 1, 1], [10, 0, 1, 2]);
const V6: Addresses = Addresses::V6([0xfd; 16], [0xfe; 16]);

fn superframes(case: &Case) {
    let mut world = World::new(case);
    let wire = world.lab.router.enter(|| Socket::open("to1")).unwrap();
    let [a, b] = world.vms();
    let open = |vm: &Vm| vm.netns.enter(|| Socket::with_headers("eth0")).unwrap();
    let (from, to) = (open(a), open(b));
    let mut port = 1000;
    let mut merged = 0;
    for (tcp, segment) in [(true, 1398), (true, 536), (false, 1400)] {
        for addresses in [V4, V6] {
            let segment = match addresses {
                V4 => segment,
                _ => segment - 20,
            };
            for size in around(segment) {
                // A flow of its own, so that nothing is taken for a repetition.
                port += 1;
                let inner = Inner {
                    macs: [a.mac, b.mac],
                    addresses,
                    ports: [port, 2000],
                    tcp,
                };
                let data: Vec<u8> = (0..size).map(|i| (i * 7 + i / 251) as u8).collect();
                let (header, frame) = match size > segment {
                    true => inner.superframe(&data, segment as u16),
                    false => inner.partial(&data),
                };
                let what = format!("{addresses:?} tcp {tcp} {size} of {segment}");
                from.send(&[&header.encode()[..], &frame].concat())
                    .unwrap_or_else(|error| panic!("{what}: {error:#}"));
                on_the_wire(&wire, &header.segments(&frame), port, &what);
                merged += at_the_guest(&to, &data, port, &what);
            }
        }
    }
    assert!(merged > 10, "{merged} of the frames had been merged");
    world.assert_fast(0);
}

/// Superframes may be the kernel's, single frames are fast.
fn one_port(case: &Case) {
    let mut world = World::new(case);
    let wire = world.lab.router.enter(|| Socket::open("to1")).unwrap();
    let [a, b] = world.vms();
    let from = a.netns.enter(|| Socket::with_headers("eth0")).unwrap();
    for (n, (addresses, tcp)) in [(V4, true), (V6, true), (V4, false), (V6, false)]
        .into_iter()
        .enumerate()
    {
        let inner = Inner {
            macs: [a.mac, b.mac],
            addresses,
            ports: [2000 + n as u16, 2000],
            tcp,
        };
        let port = inner.ports[0];
        for (header, frame) in [
            inner.partial(&[1; 100]),
            inner.superframe(&[2; 4000], 1000),
            inner.partial(&[3; 100]),
        ] {
            from.send(&[&header.encode()[..], &frame].concat()).unwrap();
        }
        let ours = |frame: &[u8]| {
            let inner = segments::unwrap(frame, 4789).unwrap();
            inner.is_some_and(|frame| is_from(frame, port))
        };
        let frames = wire.capture(6, Duration::from_secs(2), ours).unwrap();
        let ports: std::collections::BTreeSet<[u8; 2]> = frames
            .iter()
            .map(|frame| {
                let at = check(frame).unwrap().transport;
                [frame[at], frame[at + 1]]
            })
            .collect();
        assert_eq!(
            (frames.len(), ports.len()),
            (6, 1),
            "{addresses:?} tcp {tcp}"
        );
    }
    world.assert_fast(0);
}

fn is_from(frame: &[u8], port: u16) -> bool {
    check(frame).is_ok_and(|seen| {
        seen.protocol != 0 && frame[seen.transport..seen.transport + 2] == port.to_be_bytes()
    })
}

/// The very bytes that a NIC would have made of it.
fn on_the_wire(wire: &Socket, expected: &[Vec<u8>], port: u16, what: &str) {
    let ours = |frame: &[u8]| {
        let inner = segments::unwrap(frame, 4789).unwrap();
        inner.is_some_and(|inner| is_from(inner, port))
    };
    let frames = wire
        .capture(expected.len(), Duration::from_secs(2), ours)
        .unwrap();
    let inner: Vec<&[u8]> = frames
        .iter()
        .filter_map(|frame| segments::unwrap(frame, 4789).unwrap())
        .collect();
    assert_eq!(inner.len(), expected.len(), "{what}");
    for (number, (got, expected)) in inner.iter().zip(expected).enumerate() {
        assert!(
            got == expected,
            "{what}, segment {number}:\n{got:02x?} instead of\n{expected:02x?}"
        );
    }
}

/// All of the payload, in order; whether some of it came merged.
fn at_the_guest(to: &Socket, data: &[u8], port: u16, what: &str) -> usize {
    let deadline = Instant::now() + Duration::from_secs(2);
    let (mut got, mut merged): (Vec<u8>, usize) = (Vec::new(), 0);
    while got.len() < data.len() {
        let left = deadline.saturating_duration_since(Instant::now());
        let bytes = to.receive(left).unwrap();
        let bytes = bytes.unwrap_or_else(|| panic!("{what}: {} bytes arrived", got.len()));
        let (header, frame) = bytes.split_first_chunk::<HEADER_BYTES>().unwrap();
        let header = Header::decode(header).unwrap();
        let segments = header.segments(frame);
        if !is_from(&segments[0], port) {
            continue;
        }
        merged += usize::from(header.gso.is_some());
        for segment in segments {
            let seen = check(&segment).unwrap_or_else(|error| panic!("{what}: {error:#}"));
            got.extend(&segment[seen.payload..]);
        }
    }
    assert!(got == data, "{what}: other bytes");
    merged
}

/// What became of a superframe: bytes at the receiver, an error at the sender.
#[derive(Debug, PartialEq, Eq)]
struct Fate {
    bytes: usize,
    error: bool,
}

fn too_long(case: &Case) {
    let mut world = World::without_daemons(case);
    world.meet();
    let kernel = fates(&world, 3000);
    // Neither everything nor nothing fits.
    assert!(kernel.iter().any(|fate| fate.bytes > 0), "{kernel:?}");
    assert!(kernel.iter().any(|fate| fate.error), "{kernel:?}");
    world.start();
    assert_eq!(fates(&world, 4000), kernel);
}

/// Segments around what the tunnel takes, in flows from `port` on.
fn fates(world: &World, port: u16) -> Vec<Fate> {
    let [a, b] = world.vms();
    let open = |vm: &Vm| vm.netns.enter(|| Socket::with_headers("eth0")).unwrap();
    let (from, to) = (open(a), open(b));
    let mut fates = Vec::new();
    for (addresses, tcp) in [(V4, true), (V6, true), (V4, false), (V6, false)] {
        let ip = if addresses == V4 { 20 } else { 40 };
        let headers = ip + if tcp { 20 } else { 8 };
        let most = world.lab.vm_mtu as usize - headers;
        for segment in [most - 1, most, most + 1, most + 40] {
            let inner = Inner {
                macs: [a.mac, b.mac],
                addresses,
                ports: [port + fates.len() as u16, 2000],
                tcp,
            };
            let (header, frame) = inner.superframe(&vec![0x5a; segment * 4], segment as u16);
            from.send(&[&header.encode()[..], &frame].concat()).unwrap();
            fates.push(fate(&from, &to, inner.ports[0], segment * 4));
        }
    }
    fates
}

fn fate(from: &Socket, to: &Socket, port: u16, bytes: usize) -> Fate {
    let mut fate = Fate {
        bytes: 0,
        error: false,
    };
    let deadline = Instant::now() + Duration::from_millis(500);
    while fate.bytes < bytes && !fate.error && Instant::now() < deadline {
        while let Some(bytes) = to.receive(Duration::from_millis(10)).unwrap() {
            let (header, frame) = bytes.split_first_chunk::<HEADER_BYTES>().unwrap();
            for segment in Header::decode(header).unwrap().segments(frame) {
                if is_from(&segment, port) {
                    fate.bytes += segment.len() - check(&segment).unwrap().payload;
                }
            }
        }
        while let Some(bytes) = from.receive(Duration::ZERO).unwrap() {
            fate.error |= is_error(&bytes[HEADER_BYTES..], port);
        }
    }
    fate
}

/// "Fragmentation needed" (RFC 1191), "packet too big" (RFC 4443).
fn is_error(frame: &[u8], port: u16) -> bool {
    let seen = check(frame).unwrap();
    let message = &frame[seen.transport..];
    let ports = match (seen.protocol, message.get(..2)) {
        (1, Some([3, 4])) => 8 + 20,
        (58, Some([2, 0])) => 8 + 40,
        _ => return false,
    };
    message.get(ports..ports + 2) == Some(&port.to_be_bytes()[..])
}
