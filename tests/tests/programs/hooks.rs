//! What the tcx programs, the way through the stack, marks and an IPv6 underlay
//! add to the plain XDP programs of an IPv4 one.

use vtep_common::layout::{
    Mark, Place, REMOTE_DF_INHERIT, REMOTE_NO_PORT_RANGE, REMOTE_TOS_INHERIT, REMOTE_TTL_INHERIT,
    REMOTE_UDP_CHECKSUM, SEGMENT_LEARNING, SEGMENT_STRICT, SEGMENT_ZERO_CHECKSUM, Via, address_v4,
};
use vtep_common::{Outcome, checksum, ecn};

use crate::assert_passes;
use crate::fixture::*;
use crate::frames::*;

/// With a checksum that is right, or left to do.
fn with_udp_checksum(frame: &[u8], finished: bool) -> Vec<u8> {
    let mut frame = frame.to_vec();
    let v6 = frame[12..14] == [0x86, 0xdd];
    let (addresses, transport) = if v6 { (22..54, 54) } else { (26..34, 34) };
    let length = (frame.len() - transport) as u16;
    let mut pseudo = frame[addresses].to_vec();
    pseudo.extend([0, 17]);
    pseudo.extend(length.to_be_bytes());
    let pseudo = checksum::bytes(&pseudo);
    let field = transport + 6;
    frame[field..field + 2].copy_from_slice(&pseudo.to_ne_bytes());
    if finished {
        let sum = !checksum::bytes(&frame[transport..]);
        frame[field..field + 2].copy_from_slice(&sum.to_ne_bytes());
    }
    frame
}

#[test]
fn tcx_encapsulates_with_a_right_outer_checksum_whoever_finishes_the_inner_one() {
    World::run(|w| {
        for len in [60, 61, 100, 590, 1464] {
            for inner in [udp(VM0, FAR, len), udp6(VM0, FAR, len.max(80), 0)] {
                let finished = with_udp_checksum(&inner, true);
                for sent in [with_udp_checksum(&inner, false), finished.clone()] {
                    let run = w.tcx_egress(0, &sent, 0);
                    assert_eq!(
                        (run.outcome, run.action),
                        (Outcome::EgressRemote, TC_REDIRECT)
                    );
                    assert_eq!((run.segment, run.bytes), (SEGMENT, sent.len() as u64));
                    // As a device below would do it.
                    let mut frame = run.frame;
                    assert_eq!(frame[50..], sent);
                    frame[50..].copy_from_slice(&finished);
                    let outer = Outer::parse(&frame);
                    assert!(outer.ip_checksum_ok);
                    assert_eq!(outer.udp_checksum_ok, Some(true), "{len} bytes");
                    assert_eq!(
                        (outer.eth_destination, outer.destination, outer.vni),
                        (ROUTER_MAC, REMOTE, VNI)
                    );
                }
            }
        }
    });
}

#[test]
fn tcx_leaves_to_the_kernel_what_it_cannot_sum_and_superframes_with_checksums() {
    World::run(|w| {
        let good = with_udp_checksum(&udp(VM0, FAR, 200), true);
        let mut wrong = good.clone();
        wrong[100] ^= 1;
        let none = udp(VM0, FAR, 200);
        for (frame, gso_size, outcome, what) in [
            (&wrong, 0, Outcome::EgressPassChecksum, "wrong inner"),
            (&none, 0, Outcome::EgressPassChecksum, "no inner"),
            (&good, 100, Outcome::EgressPassGso, "superframe"),
        ] {
            let run = w.tcx_egress(0, frame, gso_size);
            assert_eq!((run.outcome, run.action), (outcome, TC_NEXT), "{what}");
            assert_eq!(&run.frame, frame, "{what}");
        }
        // Segments that do not fit, of a frame that says otherwise.
        let run = w.tcx_egress(0, &with_udp_checksum(&udp(VM0, FAR2, 1464), true), 1430);
        assert_eq!(run.outcome, Outcome::EgressPassTooLong);
        // Without an outer checksum nothing of that matters.
        let mut wrong2 = with_udp_checksum(&udp(VM0, FAR2, 200), true);
        wrong2[100] ^= 1;
        let run = w.tcx_egress(0, &wrong2, 0);
        assert_eq!(run.outcome, Outcome::EgressRemote);
        assert_eq!(run.frame[50..], wrong2);
    });
}

#[test]
fn tcx_passes_what_xdp_passes_and_forwards_between_ports() {
    World::run(|w| {
        for (frame, outcome) in [
            (udp(VM0, BROADCAST, 100), Outcome::EgressPassMulticast),
            (udp(NOWHERE, FAR, 100), Outcome::EgressPassUnknownSource),
            (arp(VM0, FAR), Outcome::EgressPassInnerType),
            (udp(VM0, KERNEL, 100), Outcome::EgressPassKernelDestination),
            (udp(VM0, VM0B, 100), Outcome::EgressPassSamePort),
        ] {
            let run = w.tcx_egress(0, &frame, 0);
            assert_eq!((run.outcome, run.action), (outcome, TC_NEXT));
            assert_eq!(run.frame, frame);
        }
        for via in [Via::Xdp, Via::Gro, Via::Stack] {
            w.set_location(11, Place::Port(w.ports[1], via));
            let frame = udp(VM0, VM1, 100);
            let run = w.tcx_egress(0, &frame, 0);
            assert_eq!(
                (run.outcome, run.action),
                (Outcome::EgressLocal, TC_REDIRECT)
            );
            assert_eq!(run.frame, frame);
        }
        w.set_location(11, Place::Port(w.ports[1], Via::Kernel));
        let run = w.tcx_egress(0, &udp(VM0, VM1, 100), 0);
        assert_eq!(run.outcome, Outcome::EgressPassKernelDestination);
    });
}

#[test]
fn r4_tcx_source_port_is_in_the_kernels_range_where_the_device_names_none() {
    World::run(|w| {
        let mut config = w.config();
        (config.kernel_port_min, config.kernel_port_count) = (40_000, 10);
        w.set_config(config);
        let frame = udp(VM0, FAR2, 100);
        let port = |w: &mut World, flags| {
            w.set_remote(4, remote(w.uplink, OTHER_REMOTE, flags));
            Outer::parse(&w.tcx_egress(0, &frame, 0).frame).udp_source
        };
        let kernel = port(w, REMOTE_NO_PORT_RANGE);
        assert!((40_000..40_010).contains(&kernel), "{kernel}");
        assert_eq!(port(w, REMOTE_NO_PORT_RANGE), kernel, "stable");
        assert!(port(w, 0) >= 49152);
    });
}

#[test]
fn tcp_for_a_port_with_offloads_is_stripped_marked_and_passed_and_nothing_else() {
    World::run(|w| {
        let mut config = w.config();
        config.cookie = 0x1234_5678;
        w.set_config(config);
        let mark = Mark {
            cookie: config.cookie,
            ifindex: w.ports[0],
        };
        let mut tcp = udp(FAR, VM0, 100);
        tcp[23] = 6;
        let datagram = udp(FAR, VM0, 100);
        let mut fragment = tcp.clone();
        fragment[21] = 8;
        for (via, inner, stack) in [
            (Via::Gro, &tcp, true),
            (Via::Gro, &datagram, false),
            (Via::Gro, &fragment, false),
            (Via::Stack, &tcp, true),
            (Via::Stack, &datagram, true),
            (Via::Xdp, &tcp, false),
        ] {
            w.set_location(10, Place::Port(w.ports[0], via));
            let run = w.ingress(&outer(inner).bytes());
            let expected = if stack {
                (Outcome::IngressLocalStack, XDP_PASS)
            } else {
                (Outcome::IngressLocal, XDP_REDIRECT)
            };
            assert_eq!((run.outcome, run.action), expected, "{via:?}");
            assert_eq!((&run.frame, run.bytes), (inner, 100));
            assert_eq!(run.mark, stack.then_some(mark), "{via:?}");
        }
        w.set_location(10, Place::Port(w.ports[0], Via::Kernel));
        let frame = outer(&tcp).bytes();
        let run = w.ingress(&frame);
        assert_passes(&run, &frame, Outcome::IngressPassKernelDestination, "jumbo");
    });
}

#[test]
fn r29_r30_ipv6_underlay_in_both_directions() {
    World::run(|w| {
        for flags in [REMOTE_UDP_CHECKSUM, 0] {
            w.set_remote(3, remote_v6(w.uplink, REMOTE_V6_ADDRESS, flags));
            for inner in [udp(VM0, FAR, 100), udp6(VM0, FAR, 1464, 0xb9)] {
                let inner = with_udp_checksum(&inner, true);
                for run in [w.egress(0, &inner), w.tcx_egress(0, &inner, 0)] {
                    assert_eq!(run.outcome, Outcome::EgressRemote);
                    let outer = OuterV6::parse(&run.frame);
                    assert_eq!(outer.inner, inner);
                    assert_eq!(outer.destination, REMOTE_V6_ADDRESS.octets());
                    let tos = if inner.len() == 100 { 0 } else { 1 };
                    assert_eq!((outer.class, outer.vni), (tos, VNI));
                    let checksum = (flags != 0).then_some(true);
                    assert_eq!(outer.checksum_ok, checksum);
                }
            }
        }
        let inner = udp(FAR, VM0, 100);
        let with = outer_v6(&inner, true);
        let without = outer_v6(&inner, false);
        let run = w.ingress(&with);
        assert_eq!((run.outcome, &run.frame), (Outcome::IngressLocal, &inner));
        let run = w.ingress(&without);
        assert_passes(&run, &without, Outcome::IngressPassChecksum, "R30");
        let mut wrong = with.clone();
        wrong[120] ^= 1;
        let run = w.ingress(&wrong);
        assert_passes(&run, &wrong, Outcome::IngressPassChecksum, "wrong");
        w.set_segment(SEGMENT_LEARNING | SEGMENT_ZERO_CHECKSUM);
        assert_eq!(w.ingress(&without).outcome, Outcome::IngressLocal);

        // Another remote, our own address, another host's, a prefix of it, a fragment header.
        for (at, value, outcome) in [
            (37, 9, Outcome::IngressPassLearn),
            (53, 9, Outcome::IngressPassOtherAddress),
            (20, 44, Outcome::IngressPassNotVxlan),
            (22, 0xff, Outcome::IngressPassMalformed),
            (19, 1, Outcome::IngressPassMalformed),
        ] {
            let mut frame = without.clone();
            frame[at] = value;
            let run = w.ingress(&frame);
            assert_passes(&run, &frame, outcome, &format!("byte {at}"));
        }
        let mut own = without.clone();
        own.copy_within(38..54, 22);
        assert_eq!(w.ingress(&own).action, XDP_DROP);
        for len in 14..with.len() {
            let run = w.ingress(&with[..len]);
            assert_eq!((run.action, &run.frame[..]), (XDP_PASS, &with[..len]));
        }
    });
}

#[test]
fn r28_r34_dscp_ttl_and_df_are_taken_from_the_inner_header_where_the_device_says_so() {
    World::run(|w| {
        let all = REMOTE_TOS_INHERIT | REMOTE_TTL_INHERIT | REMOTE_DF_INHERIT;
        let mut v4 = with_tos(&udp(VM0, FAR2, 100), 0xbb);
        v4[22] = 9;
        let v6 = udp6(VM0, FAR2, 100, 0x2e << 2);
        let mut ethernet = udp(VM0, FAR2, 100);
        ethernet[12..14].copy_from_slice(&[0x88, 0xb5]);
        // TOS, TTL, DF; the template says 0, 64, no.
        for (flags, inner, expected) in [
            (0, &v4, (2, 64, false)),
            (all, &v4, (0xba, 9, true)),
            (REMOTE_TTL_INHERIT, &v4, (2, 9, false)),
            (REMOTE_DF_INHERIT, &v4, (2, 64, true)),
            (all, &v6, (0xb8, 64, true)),
            (all, &ethernet, (0, 64, false)),
        ] {
            w.set_remote(4, remote(w.uplink, OTHER_REMOTE, flags));
            let run = w.egress(0, inner);
            let outer = Outer::parse(&run.frame);
            assert!(outer.ip_checksum_ok, "{flags}");
            let found = (run.frame[15], run.frame[22], run.frame[20] & 0x40 != 0);
            assert_eq!(found, expected, "flags {flags}");
        }
    });
}

#[test]
fn r10_strict_segments_drop_and_count_strangers() {
    World::run(|w| {
        w.set_segment(SEGMENT_LEARNING | SEGMENT_STRICT);
        let frame = outer(&udp(FAR, VM0, 100)).bytes();
        let run = w.ingress(&frame);
        assert_eq!(
            (run.outcome, run.action),
            (Outcome::IngressDropUnknownPeer, XDP_DROP)
        );
        w.add_peer(address_v4(REMOTE.octets()));
        assert_eq!(w.ingress(&frame).outcome, Outcome::IngressLocal);
    });
}

#[test]
fn r27_every_ecn_cell_is_merged_or_left_to_the_kernel() {
    World::run(|w| {
        for outer_tos in 0..4u8 {
            for inner_tos in 0..4u8 {
                let inner = with_tos(&udp(FAR, VM0, 100), inner_tos);
                let frame = Outer {
                    tos: outer_tos,
                    ..outer(&inner)
                }
                .bytes();
                let run = w.ingress(&frame);
                let expected = match ecn::decap(outer_tos, inner_tos) {
                    ecn::Decap::Keep => inner,
                    ecn::Decap::Set(mark) => with_tos(&inner, mark),
                    ecn::Decap::Refuse => {
                        assert_passes(&run, &frame, Outcome::IngressPassEcn, "ECN");
                        continue;
                    }
                };
                assert_eq!((run.outcome, run.frame), (Outcome::IngressLocal, expected));
            }
        }
    });
}
