//! The data path module on the running kernel: adoption, death at any moment,
//! replacement in place, refusals, removal. Needs root and the eBPF object.

mod fixture;

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use fixture::*;
use vtep_common::layout::{Counter, Location, Place, PortKey, REMOTE_UDP_CHECKSUM, Via, VniKey};
use vtep_common::{Outcome, Vni};
use vtep_user::dataplane::{Dataplane, LogLevel};
use vtep_user::tables::{Capacity, Hook, Program, TableUpdate, Tables, XdpMode};

#[test]
fn starts_empty_and_reads_back_every_kind_of_update() {
    World::run("kinds", |world| {
        let (mut dataplane, tables) = world.open();
        assert_eq!(tables, Tables::default());
        let mut updates = world.updates();
        assert_eq!(dataplane.apply(&updates), []);
        assert_eq!(sorted(dataplane.read().unwrap()), expected(&updates));

        let vni = Vni::new(100).unwrap();
        let more = [
            TableUpdate::Location {
                index: 1,
                value: Location::new(Place::Port(world.ports[0], Via::Xdp), 5),
            },
            TableUpdate::TargetDel(world.ports[0]),
            TableUpdate::SegmentDel(VniKey::v4(vni, 4789)),
            TableUpdate::PortDel(PortKey::new(world.ports[1], 0)),
            TableUpdate::FdbDel(key(2)),
            TableUpdate::PeerDel(peer(2)),
            TableUpdate::Detach(world.ports[0]),
        ];
        // Removed twice: no error.
        for _ in 0..2 {
            assert_eq!(dataplane.apply(&more), []);
        }
        updates.extend(more);
        assert_eq!(sorted(dataplane.read().unwrap()), expected(&updates));
        assert_eq!(xdp("port0"), None);
        assert_eq!(xdp("port1").unwrap().1, "xdp");
    });
}

#[test]
fn r39_a_second_start_adopts_maps_and_links() {
    World::run("adopt", |world| {
        let (mut dataplane, _) = world.open();
        let updates = world.updates();
        dataplane.apply(&updates);
        let maps = pinned_map_ids(&world.maps());
        let before = xdp("port0").unwrap();
        let links: BTreeSet<u32> = dataplane.hooks().values().map(|h| h.link_id).collect();
        drop(dataplane);
        assert_eq!(
            xdp("port0"),
            Some(before.clone()),
            "dropped, still attached"
        );

        let (dataplane, tables) = world.open();
        assert_eq!(sorted(tables), expected(&updates));
        assert_eq!(pinned_map_ids(&world.maps()), maps);
        let after = xdp("port0").unwrap();
        assert_ne!(after.0, before.0, "the new program runs");
        assert_eq!(after.1, "xdp");
        assert_eq!(
            links,
            dataplane.hooks().values().map(|h| h.link_id).collect()
        );
        let programs = dataplane.programs().unwrap();
        assert_eq!(programs[0].id, after.0);
        assert_eq!(programs[1].id, xdp("port1").unwrap().0);
        wait_for("the old program is freed", || {
            !bpftool_has("prog", before.0)
        });
    });
}

#[test]
fn r39_programs_stay_when_the_process_is_killed() {
    World::run("kill", |world| {
        let mut child = Child::spawn(|| {
            let (mut dataplane, _) = world.open();
            assert_eq!(dataplane.apply(&world.updates()), []);
        });
        child.wait_until_done();
        let before = (xdp("port0").unwrap(), xdp("port1").unwrap());
        child.kill();
        assert_eq!((xdp("port0").unwrap(), xdp("port1").unwrap()), before);
        let (_, tables) = world.open();
        assert_eq!(sorted(tables), expected(&world.updates()));
    });
}

#[test]
fn r39_killed_at_any_moment_nothing_is_detached_and_the_next_start_goes_on() {
    World::run("moments", |world| {
        // The first starts are killed while the directory is being filled.
        for i in 0..12 {
            let child = Child::spawn(|| {
                let (mut dataplane, _) = world.open();
                dataplane.apply(&world.updates());
            });
            std::thread::sleep(Duration::from_millis(8 * i));
            child.kill();
        }
        let (mut dataplane, _) = world.open();
        assert_eq!(dataplane.apply(&world.updates()), []);
        drop(dataplane);
        for i in 0..12 {
            let child = Child::spawn(|| {
                loop {
                    let (mut dataplane, _) = world.open();
                    dataplane.apply(&[TableUpdate::Detach(world.ports[1])]);
                    dataplane.apply(&[world.attach(1, Program::Egress)]);
                }
            });
            std::thread::sleep(Duration::from_millis(90 + 5 * i));
            child.kill();
            assert_eq!(xdp("port0").expect("still attached").1, "xdp");
        }
        let (mut dataplane, tables) = world.open();
        let mut wanted = expected(&world.updates());
        let mut found = sorted(tables);
        assert!(found.hooks.contains_key(&world.ports[0]));
        // The last child may have died between detaching and attaching.
        wanted.hooks.clear();
        found.hooks.clear();
        assert_eq!(found, wanted);
        assert_eq!(dataplane.apply(&[world.attach(1, Program::Egress)]), []);
    });
}

#[test]
fn programs_are_replaced_without_an_uncounted_frame() {
    World::run("gap", |world| {
        let (mut dataplane, _) = world.open();
        assert_eq!(dataplane.apply(&world.updates()), []);
        let dropped = || {
            let links: serde_json::Value =
                serde_json::from_str(&ip("-j -s link show dev peer0")).unwrap();
            links[0]["stats64"]["tx"]["dropped"].as_u64().unwrap()
        };
        let stop = std::sync::atomic::AtomicBool::new(false);
        let sender = Sender::new("peer0");
        let sent = std::thread::scope(|scope| {
            let sending = scope.spawn(|| {
                let mut sent = 0u64;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    sent += u64::from(sender.send(&[0xff; 60]));
                    std::thread::sleep(Duration::from_micros(20));
                }
                sent
            });
            let mut ids = BTreeSet::new();
            for _ in 0..10 {
                drop(world.open());
                ids.insert(xdp("port0").unwrap().0);
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            assert_eq!(ids.len(), 10, "each start replaced the program");
            sending.join().unwrap()
        });
        let counted = || {
            let rows = dataplane.stats().unwrap();
            rows[0].iter().map(|counter| counter.frames).sum::<u64>()
        };
        wait_for("every frame is counted", || counted() + dropped() >= sent);
        assert_eq!(counted() + dropped(), sent);
        assert!(sent > 500, "{sent} frames");
    });
}

#[test]
fn counters_are_summed_and_survive_a_start() {
    World::run("stats", |world| {
        let (mut dataplane, _) = world.open();
        assert_eq!(dataplane.stats().unwrap().len(), 1);
        dataplane.apply(&world.updates());
        assert_eq!(dataplane.stats().unwrap().len(), 6);
        let sender = Sender::new("peer1");
        for _ in 0..5 {
            assert!(sender.send(&[0xff; 100]));
        }
        let multicast = Outcome::EgressPassMulticast as usize;
        let wanted = Counter {
            frames: 5,
            bytes: 500,
        };
        let read = |dataplane: &Dataplane| dataplane.stats().unwrap()[5][multicast];
        wait_for("five frames", || read(&dataplane) == wanted);
        dataplane.apply(&[TableUpdate::PortDel(PortKey::new(world.ports[1], 0))]);
        drop(dataplane);
        assert_eq!(read(&world.open().0), wanted);
    });
}

#[test]
fn a_half_filled_directory_is_completed() {
    World::run("half", |world| {
        let (mut dataplane, _) = world.open();
        dataplane.apply(&world.updates());
        drop(dataplane);
        for name in ["PORTS", "STATS"] {
            std::fs::remove_file(world.maps().join(name)).unwrap();
        }
        let (_, tables) = world.open();
        let mut wanted = expected(&world.updates());
        wanted.ports.clear();
        assert_eq!(sorted(tables), wanted);
        assert_eq!(pinned_map_ids(&world.maps()).len(), 9);
    });
}

#[test]
fn maps_of_another_shape_size_or_version_are_refused() {
    World::run("shape", |world| {
        drop(world.open());
        let error = world.open_error(Capacity {
            fdb: 2000,
            ..CAPACITY
        });
        assert!(
            error.contains(
                "maps/FDB: the pinned map has room for 1024 entries, 2048 are configured"
            ) && error.contains("vtep unload"),
            "{error}"
        );

        let config = world.maps().join("CONFIG");
        std::fs::remove_file(&config).unwrap();
        run(&format!(
            "bpftool map create {} type array key 4 value 16 entries 1 name CONFIG",
            config.display()
        ));
        let error = world.open_error(CAPACITY);
        assert!(
            error.contains("maps/CONFIG: the pinned object is not the map expected here")
                && error.contains("value 16 bytes")
                && error.contains("vtep unload"),
            "{error}"
        );
        Dataplane::unload(&world.pins).unwrap();

        std::fs::create_dir_all(world.pins.join("v0")).unwrap();
        let error = world.open_error(CAPACITY);
        assert!(error.contains("map layout v0, this one has v"), "{error}");
        let report = Dataplane::unload(&world.pins).unwrap();
        assert_eq!(report.layouts, [world.pins.join("v0")]);
        drop(world.open());
    });
}

#[test]
fn refuses_an_object_that_is_not_ours() {
    World::run("object", |world| {
        let open = |object: &[u8]| {
            Dataplane::open(object, &world.pins, CAPACITY, LogLevel::Off)
                .err()
                .expect("refused")
                .to_string()
        };
        let error = open(b"no object at all");
        assert!(error.starts_with("loading the eBPF object: "), "{error}");
        assert_eq!(error.lines().count(), 1);
    });
}

#[test]
fn full_tables_and_impossible_updates_are_refused_one_by_one() {
    World::run("full", |world| {
        let small = Capacity { fdb: 4, ..CAPACITY };
        let object = object();
        let (mut dataplane, _) =
            Dataplane::open(&object, &world.pins, small, LogLevel::Off).unwrap();
        let mut updates = entries(6, 1);
        // Room again after a removal; the entry in front of it stays refused.
        updates.push(TableUpdate::FdbDel(key(77)));
        updates.push(TableUpdate::FdbDel(key(0)));
        updates.extend(entries(6, 2).drain(4..5));
        let refused = dataplane.apply(&updates);
        let keys: Vec<_> = refused.iter().map(|r| r.update.clone()).collect();
        assert_eq!(keys, updates[4..6]);
        assert_eq!(refused[0].reason, "FDB is full (4 entries)");
        let fdb: HashMap<_, _> = dataplane.fdb().collect();
        let found: BTreeSet<_> = fdb.keys().copied().collect();
        assert_eq!(found, BTreeSet::from([key(1), key(2), key(3), key(4)]));
        assert_eq!(fdb[&key(4)].location(), 2);

        let mut remote = vtep_common::layout::Remote::EMPTY;
        remote.flags = REMOTE_UDP_CHECKSUM;
        let location = Location::new(Place::Kernel, 0);
        let mut port = world.updates()[7].clone();
        if let TableUpdate::Port { value, .. } = &mut port {
            value.segment = 6;
        }
        let cases = [
            (
                TableUpdate::Remote {
                    slot: 10,
                    value: remote,
                },
                "REMOTES has no usable element 10 (of 10)",
            ),
            (
                TableUpdate::Location {
                    index: 100,
                    value: location,
                },
                "LOCATIONS has no usable element 100 (of 100)",
            ),
            (
                TableUpdate::Location {
                    index: 0,
                    value: location,
                },
                "LOCATIONS has no usable element 0 (of 100)",
            ),
            (TableUpdate::TargetAdd(9999), "no such device"),
            (port, "segment number 6 is beyond the 5 configured segments"),
        ];
        for (update, reason) in cases {
            let refused = dataplane.apply(std::slice::from_ref(&update));
            assert_eq!(refused.len(), 1, "{update:?}");
            assert_eq!(refused[0].reason, reason);
            assert_eq!(refused[0].update, update);
        }
    });
}

/// The reason why the egress program cannot be attached to a device.
fn attach_refusal(dataplane: &mut Dataplane, ifindex: u32) -> String {
    let refused = dataplane.apply(&[TableUpdate::Attach {
        ifindex,
        program: Program::Egress,
        hook: Hook::Xdp(XdpMode::Native),
    }]);
    assert_eq!(refused.len(), 1, "attached to {ifindex}");
    assert!(!dataplane.hooks().contains_key(&ifindex));
    refused[0].reason.clone()
}

#[test]
fn devices_that_cannot_be_accelerated_are_refused_with_the_reason() {
    World::run("refused", |world| {
        let (mut dataplane, _) = world.open();
        assert_eq!(attach_refusal(&mut dataplane, 9999), "no such device");
        let reason = attach_refusal(&mut dataplane, 1);
        assert!(reason.contains("no native XDP"), "{reason}");

        let foreign = foreign_link(world.ports[0], XDP.0, XDP.1);
        let id = xdp("port0").unwrap().0;
        let reason = attach_refusal(&mut dataplane, world.ports[0]);
        assert_eq!(reason, format!("another XDP program is attached (id {id})"));
        assert_eq!(xdp("port0").unwrap().0, id, "it stays");
        drop(foreign);
        wait_for("the foreign program is gone", || xdp("port0").is_none());

        ip("link set peer1 mtu 9000");
        let reason = attach_refusal(&mut dataplane, world.ports[1]);
        assert!(reason.starts_with("the MTU is too large"), "{reason}");
        assert_eq!(world.links(), [""; 0]);
        assert_eq!(dataplane.apply(&[world.attach(0, Program::Egress)]), []);
    });
}

#[test]
fn r41_tc_programs_of_others_are_not_bypassed() {
    World::run("tc", |world| {
        let (mut dataplane, _) = world.open();
        let tcx = foreign_link(world.ports[0], TCX_INGRESS.0, TCX_INGRESS.1);
        let reason = attach_refusal(&mut dataplane, world.ports[0]);
        assert!(
            reason.starts_with("tc program of somebody else (tcx ingress, id "),
            "{reason}"
        );
        drop(tcx);
        wait_for("the foreign program is gone", || {
            dataplane.foreign_tc(world.ports[0]).unwrap().is_none()
        });

        run("tc qdisc add dev port0 clsact");
        assert_eq!(
            dataplane.apply(&[world.attach(0, Program::Egress)]),
            [],
            "a qdisc without filters is no filter"
        );
        dataplane.apply(&[TableUpdate::Detach(world.ports[0])]);
        for direction in ["ingress", "egress"] {
            run(&format!(
                "tc filter add dev port0 {direction} protocol all u32 match u32 0 0"
            ));
            assert_eq!(
                attach_refusal(&mut dataplane, world.ports[0]),
                format!("tc filter of somebody else (clsact {direction}, u32)")
            );
            run(&format!("tc filter del dev port0 {direction}"));
        }
    });
}

#[test]
fn program_and_mode_of_a_hook_can_change() {
    World::run("mode", |world| {
        let (mut dataplane, _) = world.open();
        let ifindex = world.ports[0];
        let attach = |program, mode: XdpMode| TableUpdate::Attach {
            ifindex,
            program,
            hook: Hook::Xdp(mode),
        };
        dataplane.apply(&[attach(Program::Ingress, XdpMode::Native)]);
        // An uplink has a second program, on tcx.
        let links = [format!("{ifindex}-native"), format!("{ifindex}-tcx")];
        assert_eq!(world.links(), links);
        dataplane.apply(&[attach(Program::Egress, XdpMode::Native)]);
        let hook = dataplane.hooks()[&ifindex];
        assert_eq!(hook.program, Program::Egress);
        assert_eq!(xdp("port0"), Some((hook.program_id, "xdp".to_owned())));
        assert_eq!(world.links(), links[..1]);

        assert_eq!(
            dataplane.apply(&[attach(Program::Egress, XdpMode::Generic)]),
            []
        );
        assert_eq!(xdp("port0").unwrap().1, "xdpgeneric");
        assert_eq!(world.links(), [format!("{ifindex}-generic")]);
        drop(dataplane);
        let (_, tables) = world.open();
        let hook = (Program::Egress, Hook::Xdp(XdpMode::Generic));
        assert_eq!(
            tables.hooks.into_iter().collect::<Vec<_>>(),
            [(ifindex, hook)]
        );
    });
}

#[test]
fn links_of_devices_that_are_gone_are_removed() {
    World::run("gone", |world| {
        let (mut dataplane, _) = world.open();
        dataplane.apply(&world.updates());
        ip("link del port1");
        assert_eq!(dataplane.hooks().len(), 1);
        assert_eq!(world.links().len(), 3);
        drop(dataplane);
        let (mut dataplane, tables) = world.open();
        assert_eq!(tables.hooks.len(), 1);
        assert_eq!(tables.targets, [world.ports[0]]);
        let ifindex = world.ports[0];
        let links = [format!("{ifindex}-native"), format!("{ifindex}-tcx")];
        assert_eq!(world.links(), links);

        // The same while running: the model detaches what is gone.
        ip("link del port0");
        assert_eq!(dataplane.apply(&[TableUpdate::Detach(world.ports[0])]), []);
        assert_eq!(world.links(), [""; 0]);
    });
}

#[test]
fn a_start_in_the_wrong_namespace_changes_nothing() {
    World::run("netns", |world| {
        let (mut dataplane, _) = world.open();
        dataplane.apply(&world.updates());
        let before = xdp("port0");
        let error = in_namespace(|| world.open_error(CAPACITY));
        assert!(
            error.contains("another network namespace") && error.contains("--netns"),
            "{error}"
        );
        assert_eq!(xdp("port0"), before);
        assert_eq!(world.links().len(), 3);
    });
}

#[test]
fn unload_leaves_nothing_and_says_what_others_hold() {
    World::run("unload", |world| {
        let (mut dataplane, _) = world.open();
        dataplane.apply(&world.updates());
        let maps = pinned_map_ids(&world.maps());
        let programs = [xdp("port0").unwrap().0, xdp("port1").unwrap().0];

        let report = Dataplane::unload(&world.pins).unwrap();
        assert_eq!(report.detached.len(), 2);
        assert_eq!(report.maps.len(), 9);
        assert!(report.remaining[0].contains("a vtep still running"));
        assert_eq!((xdp("port0"), xdp("port1")), (None, None));
        assert!(!world.pins.exists());
        drop(dataplane);
        wait_for("maps and programs are freed", || {
            !maps.iter().any(|id| bpftool_has("map", *id))
                && !programs.iter().any(|id| bpftool_has("prog", *id))
        });

        drop(world.open());
        let maps = pinned_map_ids(&world.maps());
        let report = Dataplane::unload(&world.pins).unwrap();
        assert_eq!(report.remaining, [""; 0]);
        assert!(!maps.iter().any(|id| bpftool_has("map", *id)));
        assert_eq!(Dataplane::unload(&world.pins).unwrap(), Default::default());
    });
}

#[test]
fn unload_works_from_another_namespace() {
    World::run("unloadns", |world| {
        let (mut dataplane, _) = world.open();
        dataplane.apply(&world.updates());
        drop(dataplane);
        let report = in_namespace(|| Dataplane::unload(&world.pins).unwrap());
        assert_eq!((report.detached.len(), report.remaining.len()), (2, 0));
        assert_eq!((xdp("port0"), xdp("port1")), (None, None));
    });
}

#[test]
fn hundred_thousand_entries_are_written_and_read_quickly() {
    World::run("bulk", |world| {
        let object = object();
        let (mut dataplane, _) =
            Dataplane::open(&object, &world.pins, Capacity::default(), LogLevel::Off).unwrap();
        let count = 100_000;
        let updates = entries(count, 3);
        let start = Instant::now();
        assert_eq!(dataplane.apply(&updates), []);
        let written = start.elapsed();
        let start = Instant::now();
        let fdb: HashMap<_, _> = dataplane.fdb().collect();
        let read = start.elapsed();
        assert_eq!(fdb.len(), count as usize);
        assert!(fdb.values().all(|value| value.location() == 3));
        let removals: Vec<_> = (0..count).map(|i| TableUpdate::FdbDel(key(i))).collect();
        let start = Instant::now();
        assert_eq!(dataplane.apply(&removals), []);
        let removed = start.elapsed();
        assert!(dataplane.fdb().next().is_none());
        eprintln!("100k entries: written {written:?}, read {read:?}, removed {removed:?}");
        assert!(written < Duration::from_secs(5), "{written:?}");
    });
}

#[test]
fn log_lines_are_forwarded_where_a_level_is_set() {
    World::run("log", |world| {
        let object = object();
        let open = |level| {
            Dataplane::open(&object, &world.pins, CAPACITY, level)
                .unwrap()
                .0
        };
        assert!(open(LogLevel::Off).take_log().is_none());
        let mut dataplane = open(LogLevel::Debug);
        let mut log = dataplane.take_log().expect("the object has log lines");
        assert!(dataplane.take_log().is_none());

        let mut updates = world.updates();
        if let TableUpdate::Config(config) = &mut updates[0] {
            config.udp_ports[0] = 4789u16.to_be_bytes();
        }
        assert_eq!(dataplane.apply(&updates), []);
        assert!(Sender::new("peer0").send(&frame_from_ourselves()));
        let readable = |log: &_| {
            let fd = std::os::fd::AsRawFd::as_raw_fd(log);
            let mut poll = libc::pollfd {
                fd,
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one structure, no waiting.
            unsafe { libc::poll(&mut poll, 1, 0) == 1 }
        };
        let own = Outcome::IngressDropOwnSource as usize;
        wait_for("the frame is dropped", || {
            dataplane.stats().unwrap()[5][own].frames == 1
        });
        wait_for("a line arrives", || readable(&log));
        log.flush();
        assert!(!readable(&log), "it was read");
    });
}
