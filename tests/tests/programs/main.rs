//! Program tests: frame in, verdict, frame out, counter. The loaded object is
//! the real one; only the wire is missing.

mod fixture;
mod frames;
mod hooks;

use fixture::*;
use frames::*;
use vtep_common::layout::{Config, Place, SEGMENT_LEARNING};
use vtep_common::{MacAddr, Outcome, checksum};

/// A frame that must pass: same bytes, the kernel's action, this outcome.
fn assert_passes(run: &Run, frame: &[u8], outcome: Outcome, what: &str) {
    assert_eq!(run.outcome, outcome, "{what}");
    assert_eq!(run.action, XDP_PASS, "{what}");
    assert_eq!(
        run.frame, frame,
        "{what}: passed before a byte is changed (R38)"
    );
}

#[test]
fn egress_encapsulates_known_unicast() {
    World::run(|w| {
        for len in [60, 61, 62, 63, 64, 65, 98, 590, 1000, 1463, 1464] {
            for source in [VM0, VM0B] {
                let inner = udp(source, FAR, len);
                let run = w.egress(0, &inner);
                assert_eq!(
                    (run.outcome, run.action),
                    (Outcome::EgressRemote, XDP_REDIRECT)
                );
                assert_eq!((run.segment, run.bytes), (SEGMENT, len as u64));
                let outer = Outer::parse(&run.frame);
                assert_eq!(outer.inner, inner);
                assert_eq!(
                    (outer.eth_destination, outer.eth_source),
                    (ROUTER_MAC, UPLINK_MAC)
                );
                assert_eq!((outer.source, outer.destination), (LOCAL, REMOTE));
                assert_eq!((outer.udp_destination, outer.vni), (4789, VNI));
                assert!(outer.udp_source >= 49152);
                assert!(outer.ip_checksum_ok);
                assert_eq!(outer.udp_checksum_ok, Some(true), "R5 at {len} bytes");
            }
        }
        let run = w.egress(0, &udp(VM0, FAR2, 100));
        assert_eq!(Outer::parse(&run.frame).udp_checksum_ok, None, "noudpcsum");
    });
}

#[test]
fn r26_outer_ecn_is_what_the_kernel_would_write() {
    World::run(|w| {
        for (tos, outer) in [(0u8, 0), (1, 1), (2, 2), (3, 2), (0xb8 | 2, 2), (0xbb, 2)] {
            let run = w.egress(0, &with_tos(&udp(VM0, FAR, 100), tos));
            assert_eq!(Outer::parse(&run.frame).tos, outer, "tos {tos}");
            let run = w.egress(0, &udp6(VM0, FAR, 100, tos));
            assert_eq!(Outer::parse(&run.frame).tos, outer, "class {tos}");
        }
    });
}

#[test]
fn r6_outer_identifications_of_a_flow_differ() {
    World::run(|w| {
        // The counter is per CPU.
        vtep_tests::streams::pin_to_cpu(0);
        let frame = udp(VM0, FAR, 100);
        let ids: std::collections::HashSet<[u8; 2]> = (0..300)
            .map(|_| w.egress(0, &frame).frame[18..20].try_into().unwrap())
            .collect();
        assert_eq!(ids.len(), 300);
    });
}

#[test]
fn egress_forwards_between_local_ports_unchanged() {
    World::run(|w| {
        let inner = udp(VM0, VM1, 200);
        let run = w.egress(0, &inner);
        assert_eq!(
            (run.outcome, run.action),
            (Outcome::EgressLocal, XDP_REDIRECT)
        );
        assert_eq!(run.frame, inner);
    });
}

#[test]
fn egress_passes_what_it_does_not_know_completely() {
    World::run(|w| {
        let broadcast = MacAddr([0xff; 6]);
        let multicast = MacAddr([1, 0, 0x5e, 0, 0, 5]);
        let cases: Vec<(&str, Vec<u8>, Outcome)> = vec![
            (
                "broadcast",
                udp(VM0, broadcast, 100),
                Outcome::EgressPassMulticast,
            ),
            (
                "multicast",
                udp(VM0, multicast, 100),
                Outcome::EgressPassMulticast,
            ),
            (
                "new source",
                udp(NOWHERE, FAR, 100),
                Outcome::EgressPassUnknownSource,
            ),
            (
                "source of port 1",
                udp(VM1, FAR, 100),
                Outcome::EgressPassUnknownSource,
            ),
            (
                "source behind a remote",
                udp(FAR, FAR2, 100),
                Outcome::EgressPassUnknownSource,
            ),
            (
                "group source",
                udp(multicast, FAR, 100),
                Outcome::EgressPassInnerType,
            ),
            (
                "zero source",
                udp(MacAddr::ZERO, FAR, 100),
                Outcome::EgressPassInnerType,
            ),
            (
                "new destination",
                udp(VM0, NOWHERE, 100),
                Outcome::EgressPassUnknownDestination,
            ),
            (
                "zero destination",
                udp(VM0, MacAddr::ZERO, 100),
                Outcome::EgressPassUnknownDestination,
            ),
            ("own port", udp(VM0, VM0B, 100), Outcome::EgressPassSamePort),
            (
                "kernel's",
                udp(VM0, KERNEL, 100),
                Outcome::EgressPassKernelDestination,
            ),
            ("ARP", arp(VM0, FAR), Outcome::EgressPassInnerType),
            ("RARP", rarp(VM0, FAR), Outcome::EgressPassInnerType),
            (
                "VLAN",
                vlan(&udp(VM0, FAR, 100), 0x8100),
                Outcome::EgressPassInnerType,
            ),
            (
                "QinQ",
                vlan(&udp(VM0, FAR, 100), 0x88a8),
                Outcome::EgressPassInnerType,
            ),
            ("NS", nd(VM0, FAR, 135), Outcome::EgressPassInnerType),
            ("NA", nd(VM0, FAR, 136), Outcome::EgressPassInnerType),
            (
                "too long for the tunnel",
                udp(VM0, FAR, 1465),
                Outcome::EgressPassTooLong,
            ),
            (
                "too long for the port",
                udp(VM0, VM1, 1465),
                Outcome::EgressPassTooLong,
            ),
            (
                "runt",
                udp(VM0, FAR, 100)[..15].to_vec(),
                Outcome::EgressPassMalformed,
            ),
        ];
        for (what, frame, outcome) in cases {
            let run = w.egress(0, &frame);
            assert_passes(&run, &frame, outcome, what);
        }
        // ICMPv6 other than neighbour discovery is ordinary traffic.
        assert_eq!(
            w.egress(0, &nd(VM0, FAR, 128)).outcome,
            Outcome::EgressRemote
        );
    });
}

#[test]
fn egress_passes_when_the_target_or_the_port_is_gone() {
    World::run(|w| {
        let frame = udp(VM0, FAR, 100);
        w.set_location(20, Place::Kernel);
        assert_passes(
            &w.egress(0, &frame),
            &frame,
            Outcome::EgressPassKernelDestination,
            "unresolved",
        );
        w.set_location(20, Place::Remote(3));
        w.set_location(10, Place::Kernel);
        let other = udp(VM0B, FAR, 100);
        assert_passes(
            &w.egress(0, &other),
            &other,
            Outcome::EgressPassUnknownSource,
            "moved source",
        );
        w.remove_target(w.uplink);
        assert_passes(
            &w.egress(0, &frame),
            &frame,
            Outcome::EgressPassNoTarget,
            "no target",
        );
    });
}

#[test]
fn ingress_strips_and_redirects_known_unicast() {
    World::run(|w| {
        for len in [60, 61, 100, 590, 1463, 1464] {
            for checksum in [false, true] {
                let inner = udp(FAR, VM0, len);
                let run = w.ingress(
                    &Outer {
                        udp_checksum: checksum,
                        ..outer(&inner)
                    }
                    .bytes(),
                );
                assert_eq!(
                    (run.outcome, run.action),
                    (Outcome::IngressLocal, XDP_REDIRECT),
                    "{len}"
                );
                assert_eq!(run.frame, inner);
                assert_eq!((run.segment, run.bytes), (SEGMENT, len as u64));
            }
        }
    });
}

#[test]
fn ingress_passes_what_it_does_not_know_completely() {
    World::run(|w| {
        let inner = udp(FAR, VM0, 100);
        let good = outer(&inner).bytes();
        // (what, offset, value): one byte of a good frame changed, IPv4 checksum made right.
        let patched = |at: usize, value: u8| {
            let mut frame = good.clone();
            frame[at] = value;
            fix_ip_checksum(&mut frame);
            frame
        };
        let mut bad_ip_sum = good.clone();
        bad_ip_sum[24] ^= 1;
        let mut trailer = good.clone();
        trailer.push(0);
        let mut bad_udp_sum = Outer {
            udp_checksum: true,
            ..outer(&inner)
        }
        .bytes();
        bad_udp_sum[140] ^= 1;
        let case = |inner: Vec<u8>| outer(&inner).bytes();
        let cases: Vec<(&str, Vec<u8>, Outcome)> = vec![
            (
                "ARP",
                arp(FAR, VM0).into_iter().chain([0; 40]).collect(),
                Outcome::IngressPassNotVxlan,
            ),
            ("TCP", patched(23, 6), Outcome::IngressPassNotVxlan),
            (
                "other UDP port",
                patched(37, 53),
                Outcome::IngressPassNotVxlan,
            ),
            (
                "UDP port 0",
                {
                    let mut f = good.clone();
                    f[36] = 0;
                    f[37] = 0;
                    f
                },
                Outcome::IngressPassNotVxlan,
            ),
            ("other MAC", patched(5, 0x11), Outcome::IngressPassOtherMac),
            (
                "IP options",
                patched(14, 0x46),
                Outcome::IngressPassIpOptions,
            ),
            (
                "first fragment",
                patched(20, 0x20),
                Outcome::IngressPassFragment,
            ),
            (
                "later fragment",
                patched(21, 0x01),
                Outcome::IngressPassFragment,
            ),
            (
                "wrong IP checksum",
                bad_ip_sum,
                Outcome::IngressPassMalformed,
            ),
            ("trailing byte", trailer, Outcome::IngressPassMalformed),
            (
                "UDP length",
                patched(39, good[39] - 1),
                Outcome::IngressPassMalformed,
            ),
            (
                "loopback source",
                patched(26, 127),
                Outcome::IngressPassMalformed,
            ),
            (
                "multicast source",
                patched(26, 224),
                Outcome::IngressPassMalformed,
            ),
            (
                "wrong UDP checksum",
                bad_udp_sum,
                Outcome::IngressPassChecksum,
            ),
            (
                "other address",
                patched(33, 9),
                Outcome::IngressPassOtherAddress,
            ),
            ("no I flag", patched(42, 0), Outcome::IngressPassFlags),
            ("GBP flag", patched(42, 0x88), Outcome::IngressPassFlags),
            ("reserved bits", patched(45, 1), Outcome::IngressPassFlags),
            (
                "reserved byte",
                patched(49, 1),
                Outcome::IngressPassUnknownVni,
            ),
            (
                "unknown VNI",
                patched(48, 101),
                Outcome::IngressPassUnknownVni,
            ),
            ("CE over Not-ECT", patched(15, 3), Outcome::IngressPassEcn),
            (
                "broadcast",
                case(udp(FAR, MacAddr([0xff; 6]), 100)),
                Outcome::IngressPassMulticast,
            ),
            (
                "inner ARP",
                case(arp(FAR, VM0)),
                Outcome::IngressPassInnerType,
            ),
            (
                "inner RARP",
                case(rarp(FAR, VM0)),
                Outcome::IngressPassInnerType,
            ),
            (
                "inner VLAN",
                case(vlan(&inner, 0x8100)),
                Outcome::IngressPassInnerType,
            ),
            (
                "inner NA",
                case(nd(FAR, VM0, 136)),
                Outcome::IngressPassInnerType,
            ),
            (
                "group source",
                case(udp(MacAddr([3, 0, 0, 0, 0, 1]), VM0, 100)),
                Outcome::IngressPassInnerType,
            ),
            (
                "new source",
                case(udp(NOWHERE, VM0, 100)),
                Outcome::IngressPassLearn,
            ),
            (
                "moved source",
                case(udp(FAR2, VM0, 100)),
                Outcome::IngressPassLearn,
            ),
            (
                "local source",
                case(udp(VM1, VM0, 100)),
                Outcome::IngressPassLearn,
            ),
            (
                "new destination",
                case(udp(FAR, NOWHERE, 100)),
                Outcome::IngressPassUnknownDestination,
            ),
            (
                "split horizon (R11)",
                case(udp(FAR, FAR2, 100)),
                Outcome::IngressPassRemoteDestination,
            ),
            (
                "kernel's",
                case(udp(FAR, KERNEL, 100)),
                Outcome::IngressPassKernelDestination,
            ),
            (
                "too long",
                case(udp(FAR, VM0, 1465)),
                Outcome::IngressPassTooLong,
            ),
        ];
        for (what, frame, outcome) in cases {
            let run = w.ingress(&frame);
            assert_passes(&run, &frame, outcome, what);
        }
        w.remove_target(w.ports[0]);
        assert_passes(
            &w.ingress(&good),
            &good,
            Outcome::IngressPassNoTarget,
            "no target",
        );
    });
}

#[test]
fn r7_learning_off_asks_nothing_of_the_source() {
    World::run(|w| {
        let frame = outer(&udp(NOWHERE, VM0, 100)).bytes();
        assert_eq!(w.ingress(&frame).outcome, Outcome::IngressPassLearn);
        w.set_segment(0);
        assert_eq!(w.ingress(&frame).outcome, Outcome::IngressLocal);
        w.set_segment(SEGMENT_LEARNING);
        assert_eq!(w.ingress(&frame).outcome, Outcome::IngressPassLearn);
    });
}

#[test]
fn r12_own_address_as_outer_source_is_dropped_and_counted() {
    World::run(|w| {
        let frame = Outer {
            source: LOCAL,
            ..outer(&udp(FAR, VM0, 100))
        }
        .bytes();
        let run = w.ingress(&frame);
        assert_eq!(
            (run.outcome, run.action),
            (Outcome::IngressDropOwnSource, XDP_DROP)
        );
    });
}

#[test]
fn r38_every_truncation_is_never_forwarded() {
    World::run(|w| {
        let inner = udp(FAR, VM0, 100);
        for checksum in [false, true] {
            let frame = Outer {
                udp_checksum: checksum,
                ..outer(&inner)
            }
            .bytes();
            for len in 14..frame.len() {
                let run = w.ingress(&frame[..len]);
                assert_eq!(
                    (run.action, &run.frame[..]),
                    (XDP_PASS, &frame[..len]),
                    "{len} bytes"
                );
            }
        }
        // An inner frame has no length of its own that the bridge would check: cut short it is
        // still a frame, as long as the addresses are there. It must come out as it went in.
        for inner in [udp(VM0, FAR, 100), udp6(VM0, FAR, 100, 0)] {
            for len in 14..inner.len() {
                let run = w.egress(0, &inner[..len]);
                match run.outcome {
                    Outcome::EgressRemote => {
                        let outer = Outer::parse(&run.frame);
                        assert_eq!(outer.inner, &inner[..len]);
                        assert_eq!(outer.udp_checksum_ok, Some(true), "{len} bytes");
                    }
                    outcome => assert_passes(&run, &inner[..len], outcome, "short frame"),
                }
            }
        }
    });
}

#[test]
fn unconfigured_programs_pass_everything() {
    World::run(|w| {
        w.set_config(Config::EMPTY);
        let frame = outer(&udp(FAR, VM0, 100)).bytes();
        assert_passes(
            &w.ingress(&frame),
            &frame,
            Outcome::IngressPassNotVxlan,
            "no VXLAN port",
        );
        // Port 0 and the all-ones MAC mark free places in the configuration.
        let mut config = w.config();
        config.uplink_macs = Config::EMPTY.uplink_macs;
        w.set_config(config);
        let mut broadcast = frame.clone();
        broadcast[..6].fill(0xff);
        assert_passes(
            &w.ingress(&broadcast),
            &broadcast,
            Outcome::IngressPassOtherMac,
            "broadcast",
        );
    });
}

#[test]
fn traffic_marks_the_source_with_the_epoch() {
    World::run(|w| {
        w.ingress(&outer(&udp(FAR, VM0, 100)).bytes());
        assert_eq!((w.fdb(FAR).epoch(), w.fdb(VM0).epoch()), (EPOCH, EPOCH - 1));
        w.egress(0, &udp(VM0, FAR, 100));
        let port = w.ports[0];
        assert_eq!((w.port(port).epoch, w.fdb(VM0).epoch()), (EPOCH, EPOCH - 1));
        w.egress(0, &udp(VM0B, FAR, 100));
        assert_eq!(w.fdb(VM0B).epoch(), EPOCH);
        assert_eq!(
            (w.fdb(VM0B).location(), w.fdb(FAR).location()),
            (10, 20),
            "nothing else changes"
        );
    });
}

#[test]
fn fdb_entry_that_is_being_written_is_not_believed() {
    World::run(|w| {
        let frame = udp(VM0, FAR, 100);
        w.set_fdb_sequence(FAR, 7);
        let run = w.egress(0, &frame);
        assert_passes(
            &run,
            &frame,
            Outcome::EgressPassUnknownDestination,
            "odd sequence",
        );
        w.set_fdb_sequence(FAR, 8);
        assert_eq!(w.egress(0, &frame).outcome, Outcome::EgressRemote);
    });
}

#[test]
fn r4_flows_keep_their_port_and_spread() {
    World::run(|w| {
        let port_of = |w: &mut World, source_port: u16| {
            let mut frame = udp(VM0, FAR, 100);
            frame[34..36].copy_from_slice(&source_port.to_be_bytes());
            Outer::parse(&w.egress(0, &frame).frame).udp_source
        };
        let ports: std::collections::HashSet<u16> =
            (0..200).map(|i| port_of(w, 1000 + i)).collect();
        assert!(ports.len() > 190, "{} ports for 200 flows", ports.len());
        assert_eq!(port_of(w, 1000), port_of(w, 1000));
    });
}

fn fix_ip_checksum(frame: &mut [u8]) {
    frame[24..26].fill(0);
    let header = 4 * (frame[14] & 15) as usize;
    let sum = !checksum::bytes(&frame[14..14 + header]);
    frame[24..26].copy_from_slice(&sum.to_ne_bytes());
}
