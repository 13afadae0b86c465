//! Many entries, bursts, losses, and tables that change while they are read.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vtep_user::kernel::{Event, FdbEntry, FdbTable};
use vtep_user::netlink::Events;

use crate::harness::*;

/// `count` static entries in each table.
fn many(count: u32, verb: &str) -> String {
    let mut lines = String::new();
    for n in 0..count {
        let [.., a, b] = n.to_be_bytes();
        let bridge = format!("fdb {verb} 02:00:00:01:{a:02x}:{b:02x} dev va master");
        let vxlan = format!("fdb {verb} 02:00:00:02:{a:02x}:{b:02x} dev vx self dst 192.0.2.9");
        let state = if verb == "add" { " static" } else { "" };
        lines.push_str(&format!("{bridge}{state}\n{vxlan}\n"));
    }
    lines
}

fn ours(fdb: &[FdbEntry], table: FdbTable) -> usize {
    fdb.iter()
        .filter(|e| e.table == table && e.mac.0[..3] == [2, 0, 0])
        .count()
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .expect("VmRSS");
    line["VmRSS:".len()..]
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .expect("number")
}

#[test]
fn a_burst_of_twenty_thousand_arrives_whole_and_the_dump_is_fast() {
    in_namespace(|| async {
        segment();
        let mut mirror = Mirror::start().await;
        mirror.fdb.clear();
        // Written by another process while nobody reads.
        batch("bridge", &many(10_000, "add"));
        let start = Instant::now();
        let mut arrived = 0;
        while arrived < 20_000 {
            let events = tokio::time::timeout(DEADLINE, mirror.events.next());
            for event in events.await.expect("in time").expect("events") {
                match event {
                    Event::Fdb(entry) if entry.mac.0[..3] == [2, 0, 0] => arrived += 1,
                    Event::Overrun => panic!("lost after {arrived}"),
                    _ => {}
                }
            }
        }
        println!("20,000 notifications read in {:?}", start.elapsed());

        let before = resident_kib();
        let start = Instant::now();
        let snapshot = mirror.netlink.snapshot().await.unwrap();
        let took = start.elapsed();
        println!(
            "snapshot in {took:?}, {} KiB more resident",
            resident_kib().saturating_sub(before)
        );
        assert_eq!(ours(&snapshot.fdb, FdbTable::Bridge), 10_000);
        assert_eq!(ours(&snapshot.fdb, FdbTable::Vxlan), 10_000);
        assert!(took < Duration::from_millis(1500), "{took:?}");

        // And away again.
        batch("bridge", &many(10_000, "del"));
        let mut gone = 0;
        while gone < 20_000 {
            let events = tokio::time::timeout(DEADLINE, mirror.events.next());
            for event in events.await.expect("in time").expect("events") {
                gone +=
                    usize::from(matches!(event, Event::FdbGone(e) if e.mac.0[..3] == [2, 0, 0]));
            }
        }
    });
}

#[test]
fn a_batch_is_bounded_and_keeps_the_order() {
    in_namespace(|| async {
        segment();
        let mut mirror = Mirror::start().await;
        batch("bridge", &many(5_000, "add"));
        let mut bridge = Vec::new();
        while bridge.len() < 5_000 {
            let events = tokio::time::timeout(DEADLINE, mirror.events.next()).await;
            let events = events.expect("in time").expect("events");
            assert!(events.len() <= 4200, "{}", events.len());
            bridge.extend(events.into_iter().filter_map(|event| match event {
                Event::Fdb(e) if e.mac.0[..4] == [2, 0, 0, 1] => Some(e.mac),
                _ => None,
            }));
        }
        assert!(bridge.is_sorted(), "out of order");
    });
}

#[test]
fn a_loss_is_told_once_and_a_snapshot_after_it_is_complete() {
    in_namespace(|| async {
        segment();
        let mut mirror = Mirror::start().await;
        // More than 32 MiB of unread notifications: static entries written over and
        // over, each change told.
        let mut lines = String::new();
        for round in 0..20 {
            for n in 0..5_000u32 {
                let [.., a, b] = n.to_be_bytes();
                let dst = 1 + round % 2;
                lines.push_str(&format!(
                    "fdb replace 02:00:00:02:{a:02x}:{b:02x} dev vx self dst 192.0.2.{dst}\n"
                ));
            }
        }
        batch("bridge", &lines);
        let events = mirror.events.next().await.unwrap();
        assert_eq!(events, [Event::Overrun]);
        // The queue is empty now: what happens from here on is told.
        mirror.reload().await;
        assert_eq!(ours(&mirror.fdb, FdbTable::Vxlan), 5_000);
        sh("bridge fdb add 02:00:00:03:00:01 dev vx self dst 192.0.2.9");
        mirror
            .until("told again", |m| !m.entries("02:00:00:03:00:01").is_empty())
            .await;
        assert_eq!(mirror.overruns, 0, "one loss, told once");
    });
}

#[test]
fn entries_that_stay_are_in_every_snapshot_while_others_come_and_go() {
    in_namespace(|| async {
        segment();
        batch("bridge", &many(4_000, "add"));
        let mirror = Mirror::start().await;
        assert_eq!(ours(&mirror.fdb, FdbTable::Bridge), 4_000);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        // A thread of this namespace that adds and removes entries in bulk.
        let churn = std::thread::spawn(move || {
            let mut lines = String::new();
            for n in 0..3_000u32 {
                let [.., a, b] = n.to_be_bytes();
                for verb in ["add", "del"] {
                    lines.push_str(&format!(
                        "fdb {verb} 06:00:00:01:{a:02x}:{b:02x} dev va master\n\
                         fdb {verb} 06:00:00:02:{a:02x}:{b:02x} dev vx self dst 192.0.2.8\n"
                    ));
                }
            }
            while !stopped.load(Ordering::Relaxed) {
                batch("bridge", &lines);
            }
        });
        for round in 0..15 {
            let snapshot = mirror.netlink.snapshot().await.unwrap();
            assert_eq!(
                ours(&snapshot.fdb, FdbTable::Bridge),
                4_000,
                "round {round}"
            );
            assert_eq!(ours(&snapshot.fdb, FdbTable::Vxlan), 4_000, "round {round}");
        }
        stop.store(true, Ordering::Relaxed);
        churn.join().unwrap();
    });
}

#[test]
fn events_that_were_read_survive_a_cancelled_wait() {
    in_namespace(|| async {
        segment();
        let mut mirror = Mirror::start().await;
        // A partial link message makes `next` ask the kernel, which yields: the
        // moment at which a select loop may drop it.
        sh("bridge fdb add 02:00:00:00:00:01 dev va master static
            bridge link set dev va isolated on");
        let mut cut = 0;
        let end = Instant::now() + DEADLINE;
        while mirror.entries("02:00:00:00:00:01").is_empty()
            || !mirror.link("va").unwrap().bridge_port.unwrap().isolated
        {
            assert!(Instant::now() < end, "lost in one of {cut} cancelled waits");
            match tokio::time::timeout(Duration::ZERO, mirror.events.next()).await {
                Ok(events) => events.unwrap().into_iter().for_each(|e| mirror.apply(e)),
                Err(_) => cut += 1,
            }
            tokio::task::yield_now().await;
        }
    });
}

#[test]
fn waiting_costs_nothing() {
    in_namespace(|| async {
        segment();
        // Until the namespace has settled (IPv6 start-up).
        let mut events = Events::open().unwrap();
        let quiet = Duration::from_millis(1500);
        while tokio::time::timeout(quiet, events.next()).await.is_ok() {}
        let cpu = || {
            let mut time = libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            // SAFETY: `time` is a valid timespec for the kernel to write.
            let read = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
            assert_eq!(read, 0);
            Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
        };
        let before = cpu();
        let nothing = tokio::time::timeout(Duration::from_secs(1), events.next()).await;
        assert!(nothing.is_err(), "{nothing:?}");
        let used = cpu() - before;
        println!("one second of waiting: {used:?} of CPU");
        // Half a percent: even one look every millisecond would take more.
        assert!(used < Duration::from_millis(5), "{used:?}");
    });
}
