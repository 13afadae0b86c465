//! Strict mode (R10): who may send to a segment.

use vtep_common::layout::{PeerKey, SEGMENT_STRICT, VniKey};

use super::*;
use crate::model::Strict;

fn strict(vnis: &[(u32, bool)], all: bool) -> Settings {
    let vnis = vnis.iter().map(|(n, on)| (vni(*n), *on)).collect();
    Settings {
        strict: Strict { all, vnis },
        ..Settings::default()
    }
}

fn peers(sim: &Sim) -> Vec<(SegmentId, IpAddr)> {
    let address = |key: &PeerKey| match key.address {
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, v4 @ ..] => v4.into(),
        v6 => v6.into(),
    };
    let peers = sim.tables.peers.iter();
    let mut peers: Vec<_> = peers.map(|key| (key.segment, address(key))).collect();
    peers.sort();
    peers
}

fn is_strict(sim: &Sim, n: u32) -> bool {
    let segment = sim.tables.segments[&VniKey::v4(vni(n), 4789)];
    segment.flags & SEGMENT_STRICT != 0
}

#[test]
fn r10_every_address_in_the_table_is_a_peer_of_a_strict_segment() {
    let settings = strict(&[(200, false)], true);
    let mut sim = Sim::with(settings.clone(), two_segments());
    let (id, flood) = (sim.id(100), tunnelled(VX0, MacAddr::ZERO, REMOTE3));
    let group = tunnelled(VX0, MacAddr([1, 0, 0x5e, 0, 0, 1]), REMOTE2);
    assert!(is_strict(&sim, 100) && !is_strict(&sim, 200));
    assert_eq!(peers(&sim), []);
    sim.apply([flood.clone(), group.clone()].map(Event::Fdb));
    // In the VXLAN device's table alone, and in that of a segment that is not strict.
    sim.apply([1, 2].map(|n| Event::Fdb(tunnelled(VX0, mac(n), REMOTE1))));
    sim.apply(behind_remote(BR1, VX1, mac(3), REMOTE1));
    let all = [REMOTE1, REMOTE2, REMOTE3].map(|ip| (id, ip));
    assert_eq!(peers(&sim), all);
    let mut host = two_segments();
    host.fdb = vec![flood.clone(), group.clone()];
    host.fdb
        .extend([1, 2].map(|n| tunnelled(VX0, mac(n), REMOTE1)));
    host.fdb.push(tunnelled(VX1, mac(3), REMOTE1));
    host.fdb.push(bridged(BR1, VX1, mac(3)));
    sim.restart(settings, host);
    assert_eq!(sim.run(), [], "a restart writes nothing");
    // An address stays until its last entry goes, or moves.
    sim.apply([Event::FdbGone(tunnelled(VX0, mac(1), REMOTE1))]);
    assert_eq!(peers(&sim), all);
    sim.apply([Event::Fdb(tunnelled(VX0, mac(2), REMOTE3))]);
    assert_eq!(peers(&sim), all[1..]);
    sim.apply([Event::FdbGone(group)]);
    assert_eq!(peers(&sim), all[2..]);
    sim.apply([Event::FdbGone(flood), Event::LinkGone(VX0)]);
    assert_eq!(peers(&sim), []);
}

#[test]
fn r10_nothing_is_strict_unless_asked_for() {
    let mut sim = Sim::started(small_host());
    sim.apply(behind_remote(BR0, VX0, mac(1), REMOTE1));
    assert!(!is_strict(&sim, 100) && !sim.model.segment(vni(100)).unwrap().strict);
    assert_eq!((peers(&sim), sim.model.warnings()), (vec![], vec![]));
}

/// A peer comes before the segment asks for peers, and leaves after it.
#[test]
fn r10_a_known_peer_is_never_a_stranger() {
    let mut host = small_host();
    host.fdb = vec![tunnelled(VX0, mac(1), REMOTE1)];
    let mut sim = Sim::new(strict(&[(100, true)], false));
    sim.model.replace(host);
    let updates = sim.run();
    let at = |wanted: fn(&TableUpdate) -> bool| updates.iter().position(wanted);
    let peer = at(|update| matches!(update, TableUpdate::Peer(_)));
    let segment = at(|update| matches!(update, TableUpdate::Segment { .. }));
    assert!(peer.is_some() && peer < segment, "{updates:?}");
    let updates = sim.apply([Event::LinkGone(VX0)]);
    let at = |wanted: fn(&TableUpdate) -> bool| updates.iter().position(wanted);
    let peer = at(|update| matches!(update, TableUpdate::PeerDel(_)));
    let segment = at(|update| matches!(update, TableUpdate::SegmentDel(_)));
    assert!(segment.is_some() && segment < peer, "{updates:?}");
}

#[test]
fn r10_a_segment_whose_peers_cannot_be_told_is_not_strict_and_says_so() {
    let mut sim = Sim::with(strict(&[], true), small_host());
    sim.apply(behind_remote(BR0, VX0, mac(1), REMOTE1));
    let group = FdbEntry {
        dst: None,
        nexthop_id: Some(7),
        ..tunnelled(VX0, mac(2), REMOTE1)
    };
    sim.apply([Event::Fdb(group.clone())]);
    assert!(!is_strict(&sim, 100));
    assert_eq!(peers(&sim), []);
    let warnings = sim.model.warnings();
    assert!(warnings[0].starts_with("VNI 100 is not strict: entries lead to nexthop groups"));
    sim.apply([Event::FdbGone(group)]);
    assert!(is_strict(&sim, 100) && sim.model.warnings().is_empty());
    assert_eq!(peers(&sim).len(), 1);
}

#[test]
fn r10_r40_no_segment_is_strict_while_a_peer_finds_no_room() {
    let mut sim = Sim::with(strict(&[], true), small_host());
    sim.model.apply(Event::Fdb(tunnelled(VX0, mac(1), REMOTE1)));
    let updates = sim.model.updates(sim.now);
    let refused = updates.iter().filter(|u| matches!(u, TableUpdate::Peer(_)));
    let refused: Vec<Refused> = refused
        .map(|update| Refused {
            update: update.clone(),
            reason: "PEERS is full".to_owned(),
        })
        .collect();
    assert_eq!(refused.len(), 1);
    sim.model.refused(refused);
    sim.run();
    assert!(!is_strict(&sim, 100) && sim.model.has_refused());
    let warnings = sim.model.warnings();
    assert_eq!(
        warnings,
        ["VNI 100 is not strict: the table of peers takes no more: PEERS is full"]
    );
    assert!(sim.model.retry());
    sim.run();
    assert!(is_strict(&sim, 100) && peers(&sim).len() == 1);
}
