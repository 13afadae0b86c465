//! Busy entries must not age out of the kernel, idle ones must.

use std::time::{Duration, Instant};

use vtep_user::kernel::{Event, FdbEntry, FdbTable, bits};
use vtep_user::netlink::FdbWrite;

use crate::harness::*;

const BUSY: &str = "02:00:00:00:00:01";
const IDLE: &str = "02:00:00:00:00:02";

fn in_table(mirror: &Mirror, table: FdbTable, address: &str) -> Option<FdbEntry> {
    mirror
        .entries(address)
        .into_iter()
        .find(|entry| entry.table == table)
        .cloned()
}

/// Refreshes `BUSY` four times a second, for three times the ageing time and on
/// until `IDLE` has aged out: `BUSY` has to be in the kernel all the time.
async fn busy_stays_and_idle_goes(mirror: &mut Mirror, table: FdbTable, ageing: Duration) {
    let busy = in_table(mirror, table, BUSY).expect("the busy entry");
    assert!(in_table(mirror, table, IDLE).is_some());
    let start = Instant::now();
    while in_table(mirror, table, IDLE).is_some() || start.elapsed() < 3 * ageing {
        assert!(
            start.elapsed() < 10 * ageing,
            "the idle entry does not age out"
        );
        let touched = mirror
            .netlink
            .fdb_refresh(std::slice::from_ref(&busy))
            .await
            .unwrap();
        assert_eq!(
            touched,
            1,
            "the busy entry aged out after {:?}",
            start.elapsed()
        );
        let tick = Instant::now() + Duration::from_millis(250);
        while let Ok(events) = tokio::time::timeout_at(tick.into(), mirror.events.next()).await {
            events
                .expect("events")
                .into_iter()
                .for_each(|event| mirror.apply(event));
        }
    }
    mirror.reload().await;
    let now = in_table(mirror, table, BUSY).expect("the busy entry is still there");
    assert_eq!(now, busy, "a refresh changes nothing but the age");
    assert!(in_table(mirror, table, IDLE).is_none());
    // And without refreshing it goes too: it was the refresh that kept it.
    mirror
        .until("the busy entry ages out at last", |m| {
            in_table(m, table, BUSY).is_none()
        })
        .await;
}

#[test]
fn a_refreshed_bridge_entry_outlives_the_ageing_time_and_an_idle_one_does_not() {
    in_namespace(|| async {
        segment();
        sh(&format!(
            "ip link set br0 type bridge ageing_time 150
             bridge fdb add {BUSY} dev va master dynamic
             bridge fdb add {IDLE} dev va master dynamic"
        ));
        let mut mirror = Mirror::start().await;
        busy_stays_and_idle_goes(&mut mirror, FdbTable::Bridge, Duration::from_millis(1500)).await;
    });
}

#[test]
fn a_refreshed_vxlan_entry_outlives_the_ageing_time_and_an_idle_one_does_not() {
    in_namespace(|| async {
        segment();
        sh(&format!(
            "ip link set vx type vxlan id 100 ageing 2
             bridge fdb add {BUSY} dev vx self dst 192.0.2.9 dynamic
             bridge fdb add {IDLE} dev vx self dst 192.0.2.9 dynamic"
        ));
        let mut mirror = Mirror::start().await;
        busy_stays_and_idle_goes(&mut mirror, FdbTable::Vxlan, Duration::from_secs(2)).await;
    });
}

#[test]
fn refreshing_does_not_bring_back_or_move_or_change_what_is_different_by_now() {
    in_namespace(|| async {
        segment();
        sh("bridge fdb add 02:00:00:00:00:01 dev va master dynamic
            bridge fdb add 02:00:00:00:00:02 dev va master dynamic
            bridge fdb add 02:00:00:00:00:03 dev va master dynamic
            bridge fdb add 02:00:00:00:00:04 dev va master dynamic
            bridge fdb add 02:00:00:00:00:11 dev vx self dst 192.0.2.9 dynamic
            bridge fdb add 02:00:00:00:00:12 dev vx self dst 192.0.2.9 dynamic
            bridge fdb add 02:00:00:00:00:13 dev vx self dst 192.0.2.9 dynamic
            bridge fdb add 02:00:00:00:00:14 dev vx self dst 192.0.2.9 dynamic");
        let mut mirror = Mirror::start().await;
        let known: Vec<FdbEntry> = mirror
            .fdb
            .iter()
            .filter(|e| e.mac.0[..5] == [2, 0, 0, 0, 0] && e.mac.0[5] < 0x20)
            .cloned()
            .collect();
        assert_eq!(known.len(), 8);
        // 1 vanishes, 2 moves, 3 becomes static, 4 stays; both tables.
        sh("bridge fdb del 02:00:00:00:00:01 dev va master
            bridge fdb replace 02:00:00:00:00:02 dev vx master dynamic
            bridge fdb replace 02:00:00:00:00:03 dev va master static
            bridge fdb del 02:00:00:00:00:11 dev vx self
            bridge fdb replace 02:00:00:00:00:12 dev vx self dst 192.0.2.8 dynamic
            bridge fdb replace 02:00:00:00:00:13 dev vx self dst 192.0.2.9 static");
        mirror.reload().await;
        let before: std::collections::HashSet<FdbEntry> = mirror.fdb.iter().cloned().collect();
        assert_eq!(mirror.netlink.fdb_refresh(&known).await.unwrap(), 2);
        mirror.reload().await;
        let after: std::collections::HashSet<FdbEntry> = mirror.fdb.iter().cloned().collect();
        assert_eq!(before, after);
        // Nothing to refresh, and a bridge that does not exist, are fine.
        assert_eq!(mirror.netlink.fdb_refresh(&[]).await.unwrap(), 0);
        let nowhere = FdbEntry {
            ifindex: 4242,
            bridge: Some(4242),
            ..known[0].clone()
        };
        assert_eq!(mirror.netlink.fdb_refresh(&[nowhere]).await.unwrap(), 0);
    });
}

#[test]
fn an_entry_learned_from_the_wire_is_refreshed() {
    in_namespace(|| async {
        let other = OtherNamespace::new();
        sh(&format!(
            "ip link add va type veth peer name vb
             ip link set vb netns {}
             ip addr add 192.0.2.1/24 dev va; ip link set va up
             ip link add vx type vxlan id 100 local 192.0.2.1 remote 192.0.2.2 dstport 4789 ageing 300
             ip addr add 10.0.0.1/24 dev vx; ip link set vx up",
            other.id()
        ));
        other.sh("ip addr add 192.0.2.2/24 dev vb; ip link set vb up
             ip link add vx type vxlan id 100 local 192.0.2.2 remote 192.0.2.1 dstport 4789
             ip link set vx address 02:00:00:00:00:42
             ip addr add 10.0.0.2/24 dev vx; ip link set vx up");
        let mut mirror = Mirror::start().await;
        sh("ping -c 1 -W 5 10.0.0.2 >/dev/null");
        let address = "02:00:00:00:00:42";
        mirror
            .until("learned", |m| !m.entries(address).is_empty())
            .await;
        let learned = mirror.entries(address)[0].clone();
        assert_eq!(learned.dst, Some("192.0.2.2".parse().unwrap()));
        assert_eq!(learned.table, FdbTable::Vxlan);
        for _ in 0..3 {
            let touched = mirror
                .netlink
                .fdb_refresh(std::slice::from_ref(&learned))
                .await;
            assert_eq!(touched.unwrap(), 1);
        }
        mirror.reload().await;
        assert_eq!(mirror.entries(address), [&learned]);
    });
}

#[test]
fn ten_thousand_entries_are_refreshed_fast() {
    in_namespace(|| async {
        segment();
        let mut lines = String::new();
        for n in 0..5000u32 {
            let [.., a, b] = n.to_be_bytes();
            lines.push_str(&format!(
                "fdb add 02:00:00:01:{a:02x}:{b:02x} dev va master dynamic\n"
            ));
            lines.push_str(&format!(
                "fdb add 02:00:00:02:{a:02x}:{b:02x} dev vx self dst 192.0.2.9 dynamic\n"
            ));
        }
        batch("bridge", &lines);
        let mut mirror = Mirror::start().await;
        let known: Vec<FdbEntry> = mirror
            .fdb
            .iter()
            .filter(|e| e.state & (bits::NUD_PERMANENT | bits::NUD_NOARP) == 0)
            .filter(|e| e.mac.0[..3] == [2, 0, 0])
            .cloned()
            .collect();
        assert_eq!(known.len(), 10_000);
        let start = Instant::now();
        assert_eq!(mirror.netlink.fdb_refresh(&known).await.unwrap(), 10_000);
        let took = start.elapsed();
        println!("refreshed 10,000 entries in {took:?}");
        assert!(took < Duration::from_secs(2), "{took:?}");
        // It tells nobody, so it does not make work for us: the next thing we hear
        // about is what was written after it.
        let marker = FdbEntry {
            mac: mac("02:00:00:03:00:00"),
            ..known[0].clone()
        };
        let write = mirror.netlink.fdb_write(&marker, FdbWrite::Replace);
        write.await.unwrap();
        let mut told = 0;
        while mirror.entries("02:00:00:03:00:00").is_empty() {
            for event in mirror.events.next().await.unwrap() {
                told += usize::from(matches!(&event, Event::Fdb(e) if known.contains(e)));
                mirror.apply(event);
            }
        }
        assert_eq!(told, 0);
    });
}
