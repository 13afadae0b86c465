//! Random histories against an oracle that knows no history: whatever happened,
//! in whatever batches, the maps say what a fresh look at the kernel says.

use proptest::prelude::*;
use vtep_common::layout::{SEGMENT_LEARNING, SEGMENT_STRICT};

use super::host::{Kernel, Layout, Op, PORTS, STRICT, VNIS};
use super::oracle::{Meaning, meanings_by_vni};
use super::*;
use crate::model::Strict;
use crate::tables::{Capacity, Program};

fn op() -> impl Strategy<Value = Op> {
    let (two, three, macs) = (0usize..2, 0usize..3, 1u8..6);
    prop_oneof![
        6 => (two.clone(), 0usize..4, macs.clone(), prop::bool::weighted(0.1))
            .prop_map(|(bridge, port, mac, local)| Op::Bridged { bridge, port, mac, local }),
        3 => (two.clone(), 0usize..4, macs.clone())
            .prop_map(|(bridge, port, mac)| Op::BridgedGone { bridge, port, mac }),
        6 => (two.clone(), macs.clone(), 0usize..5)
            .prop_map(|(vxlan, mac, remote)| Op::Tunnelled { vxlan, mac, remote }),
        2 => (two.clone(), macs, 0usize..5)
            .prop_map(|(vxlan, mac, remote)| Op::TunnelledGone { vxlan, mac, remote }),
        2 => (0usize..9, prop::bool::weighted(0.7)).prop_map(|(device, up)| Op::Up { device, up }),
        1 => (three.clone(), prop::option::weighted(0.8, two.clone()))
            .prop_map(|(port, bridge)| Op::Master { port, bridge }),
        1 => (three.clone(), any::<bool>()).prop_map(|(port, on)| Op::Isolated { port, on }),
        1 => (three.clone(), any::<bool>()).prop_map(|(port, on)| Op::Offloads { port, on }),
        1 => (two.clone(), any::<bool>()).prop_map(|(vxlan, on)| Op::Learning { vxlan, on }),
        1 => (two.clone(), 0u8..3).prop_map(|(vxlan, ttl)| Op::Ttl { vxlan, ttl }),
        1 => three.clone().prop_map(|port| Op::Reborn { port }),
        2 => (two.clone(), prop::option::weighted(0.8, 1u8..4))
            .prop_map(|(eth, n)| Op::Hop { eth, n }),
        2 => (two.clone(), three, prop::option::weighted(0.8, two))
            .prop_map(|(family, remote, eth)| Op::Route { family, remote, eth }),
        1 => prop::bool::weighted(0.2).prop_map(|on| Op::Filter { on }),
        1 => (0usize..3, 0usize..2, any::<bool>())
            .prop_map(|(port, vlan, on)| Op::Tagged { port, vlan, on }),
        1 => prop::bool::weighted(0.7).prop_map(|on| Op::VlanFiltering { on }),
        1 => Just(Op::Swap),
        1 => (0usize..2, prop::bool::weighted(0.3))
            .prop_map(|(vlan, on)| Op::Blocked { vlan, on }),
        1 => (0usize..2, prop::bool::weighted(0.7)).prop_map(|(n, on)| Op::VniFilter { n, on }),
        1 => Just(Op::Resync),
    ]
}

/// What ends a batch.
#[derive(Debug, Clone, Copy)]
enum End {
    Run,
    Wait,
    /// The controller starts over, on the state it knows.
    Restart,
    /// The batch happens while no controller runs.
    Away,
}

fn history() -> impl Strategy<Value = Vec<(Vec<Op>, End)>> {
    let end = prop_oneof![6 => Just(End::Run), 2 => Just(End::Wait), 1 => Just(End::Restart), 1 => Just(End::Away)];
    prop::collection::vec((prop::collection::vec(op(), 1..6), end), 1..25)
}

fn compare(kernel: &Kernel, sim: &Sim) {
    let tables = &sim.tables;
    assert_eq!(meanings_by_vni(tables), kernel.fdb());
    let ports = PORTS
        .iter()
        .filter_map(|p| Some((*p, kernel.segment_of_port(*p)?)));
    let ports: BTreeMap<IfIndex, usize> = ports.collect();
    assert!(
        tables
            .ports
            .keys()
            .map(|key| key.ifindex())
            .eq(ports.keys().copied()),
        "{:?}",
        tables.ports
    );
    for (ifindex, n) in &ports {
        let vni = 100 + 100 * *n as u32;
        let port = &tables.ports[&PortKey::new(*ifindex, 0)];
        assert_eq!(port.segment, sim.id(vni));
        let behind = |word: u64| {
            let key = FdbKey::from_word(word);
            key.segment() == port.segment
                && sim.place(vni, key.mac()) == Some(Place::Port(*ifindex, Via::Xdp))
        };
        let any = (0..8).any(|m| sim.place(vni, mac(m)) == Some(Place::Port(*ifindex, Via::Xdp)));
        assert!(
            if any {
                behind(port.first_key)
            } else {
                port.first_key == 0
            },
            "{port:?}"
        );
    }
    let uplinks = kernel.uplinks();
    let ports = ports.keys().map(|ifindex| (*ifindex, Program::Egress));
    let expected = ports.chain(uplinks.iter().map(|ifindex| (*ifindex, Program::Ingress)));
    let expected: BTreeMap<_, _> = expected.collect();
    let hooks: BTreeMap<_, _> = tables.hooks.iter().map(|(i, (p, _))| (*i, *p)).collect();
    assert_eq!(hooks, expected);
    assert!(
        tables
            .targets
            .iter()
            .collect::<BTreeSet<_>>()
            .into_iter()
            .eq(expected.keys())
    );
    let macs = uplinks
        .iter()
        .map(|ifindex| kernel.links[ifindex].mac.unwrap().to_bits());
    let macs: BTreeSet<u64> = macs.collect();
    let written = tables.config.unwrap().uplink_macs;
    let written: BTreeSet<u64> = written.into_iter().filter(|m| *m != u64::MAX).collect();
    assert_eq!(written, macs);
    for (key, segment) in &tables.segments {
        let n = (key.vni() / 100 - 1) as usize;
        assert!(kernel.segment_works(n));
        let LinkKind::Vxlan(device) = &kernel.links[&kernel.vxlan(n)].kind else {
            panic!()
        };
        assert_eq!(segment.flags & SEGMENT_LEARNING != 0, device.learning);
        let strict = n == STRICT && kernel.peers().is_some();
        assert_eq!(segment.flags & SEGMENT_STRICT != 0, strict);
        assert_eq!(key.is_v6(), kernel.is_v6(n));
    }
    let peers = tables.peers.iter();
    let peers: BTreeSet<IpAddr> = peers
        .inspect(|key| assert_eq!(key.segment, sim.id(200)))
        .map(|key| match key.address {
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, v4 @ ..] => v4.into(),
            v6 => v6.into(),
        })
        .collect();
    assert_eq!(peers, kernel.peers().unwrap_or_default());
}

fn play(
    settings: Settings,
    layout: Layout,
    history: Vec<(Vec<Op>, End)>,
    check: impl Fn(&Kernel, &Sim),
) {
    let mut kernel = Kernel::new(layout);
    let mut sim = Sim::with(settings.clone(), kernel.snapshot());
    for (ops, end) in history {
        for op in &ops {
            for event in kernel.run(op, &mut sim) {
                sim.model.apply(event);
            }
        }
        match end {
            End::Run => _ = sim.run(),
            End::Wait => _ = sim.wait(QUARANTINE),
            End::Restart => {
                sim.run();
                sim.restart(settings.clone(), kernel.snapshot());
                assert_eq!(sim.run(), [], "a restart writes nothing");
            }
            // What the model has heard dies with it.
            End::Away => {
                sim.restart(settings.clone(), kernel.snapshot());
                sim.run();
            }
        }
        check(&kernel, &sim);
        assert_eq!(sim.run(), [], "nothing is left to do");
        sim.model.replace(kernel.snapshot());
        assert_eq!(sim.run(), [], "a resync finds nothing");
    }
}

fn strict() -> Settings {
    let strict = Strict {
        vnis: [(vni(VNIS[STRICT]), true)].into(),
        ..Strict::default()
    };
    Settings {
        strict,
        ..Settings::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn maps_say_what_the_kernel_says(history in history()) {
        play(strict(), Layout::Bridges, history, compare);
    }

    #[test]
    fn maps_say_what_a_vlan_aware_bridge_says(history in history()) {
        play(strict(), Layout::Vlans, history, compare);
    }

    #[test]
    fn maps_say_what_a_single_vxlan_device_says(history in history()) {
        play(strict(), Layout::Single, history, compare);
    }

    /// With maps that are too small, less is fast, and nothing is wrong.
    #[test]
    fn small_maps_say_nothing_wrong(history in history(), size in 1u32..6) {
        let settings = Settings {
            capacity: Capacity {
                fdb: size,
                locations: size + 1,
                remotes: size.div_ceil(2),
                segments: 2 + size % 2,
                peers: size,
                ports: 16 + size,
            },
            ..Settings::default()
        };
        play_small(settings, history);
    }
}

fn play_small(settings: Settings, history: Vec<(Vec<Op>, End)>) {
    let capacity = settings.capacity;
    let mut kernel = Kernel::new(Layout::Bridges);
    let mut sim = Sim::with(settings, kernel.snapshot());
    for (ops, end) in history {
        for op in &ops {
            for event in kernel.run(op, &mut sim) {
                sim.model.apply(event);
            }
        }
        sim.run();
        if matches!(end, End::Wait) {
            sim.wait(QUARANTINE);
        }
        let tables = &sim.tables;
        assert!(tables.fdb.len() <= capacity.fdb as usize);
        assert!(
            tables
                .locations
                .keys()
                .all(|index| *index < capacity.locations)
        );
        assert!(tables.remotes.keys().all(|slot| *slot < capacity.remotes));
        let (wanted, got) = (kernel.fdb(), meanings_by_vni(tables));
        for (key, meaning) in &got {
            assert!(
                *meaning == Meaning::Kernel || wanted[key] == *meaning,
                "{key:?} {meaning:?}"
            );
        }
        // What is missing is missing for a reason.
        let accelerated: BTreeSet<u32> = tables.segments.keys().map(|key| key.vni()).collect();
        let missing = wanted.keys().filter(|key| accelerated.contains(&key.0));
        let missing = missing.filter(|key| !got.contains_key(*key)).count();
        assert!(missing as u64 <= sim.model.counters().waiting);
        assert!(
            missing == 0 || got.len() == capacity.fdb as usize,
            "{missing} wait in vain"
        );
    }
}
