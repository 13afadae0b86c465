//! The rules alone: what has to be in the maps, from the kernel's state and
//! without any history. Slow and plain, and no code of the model.

use vtep_common::layout::{PortKey, REMOTE_V6, VniKey};

use super::host::{Kernel, STRICT};
use super::*;

/// What an FDB entry means to the programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meaning {
    Kernel,
    Port(IfIndex),
    Remote {
        device: IfIndex,
        source: MacAddr,
        next_hop: MacAddr,
        ttl: u8,
        remote: IpAddr,
    },
}

impl Meaning {
    /// Whether both lead to the same station, by whatever way.
    pub fn is_same_place(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Remote { remote: a, .. }, Self::Remote { remote: b, .. }) => a == b,
            _ => self == other,
        }
    }
}

impl Kernel {
    pub fn segment_works(&self, n: usize) -> bool {
        let at = self.other_end(n);
        let up = self.links[&self.bridge(at)].up && self.links[&self.vxlan(n)].up;
        !self.filtered && up && self.is_mapped(n)
    }

    pub fn port_works(&self, ifindex: IfIndex, n: usize) -> bool {
        let link = &self.links[&ifindex];
        let at = self.other_end(n);
        let ethernet = matches!(link.kind, LinkKind::Tun(Tun { tap: true, .. }));
        let open = link.bridge_port.is_some_and(|port| !port.isolated);
        let member = link.master == Some(self.bridge(at)) && self.is_untagged(ifindex, at);
        self.segment_works(n) && link.up && ethernet && open && member
    }

    pub fn segment_of_port(&self, ifindex: IfIndex) -> Option<usize> {
        (0..2).find(|n| self.port_works(ifindex, *n))
    }

    /// (device, source MAC, next hop MAC, TTL, remote).
    fn way(&self, n: usize, remote: IpAddr) -> Option<Meaning> {
        // A segment has one family.
        let device = self.routes[&remote].filter(|_| remote.is_ipv6() == self.is_v6(n))?;
        let hop = *self.hops.get(&device)?;
        let link = &self.links[&device];
        let LinkKind::Vxlan(vxlan) = &self.links[&self.vxlan(n)].kind else {
            panic!()
        };
        let ttl = if vxlan.ttl == 0 { 64 } else { vxlan.ttl };
        link.up.then(|| Meaning::Remote {
            device,
            source: link.mac.unwrap(),
            next_hop: neighbour(device, self.gateway(n), hop).mac.unwrap(),
            ttl,
            remote,
        })
    }

    fn meaning(&self, n: usize, mac: MacAddr) -> Option<Meaning> {
        let entry = self.bridged.get(&(self.other_end(n), mac))?;
        if entry.state & bits::NUD_PERMANENT != 0 {
            return None;
        }
        let place = if entry.ifindex != self.vxlan(n) {
            self.port_works(entry.ifindex, n)
                .then_some(Meaning::Port(entry.ifindex))
        } else {
            match self.tunnelled.get(&(n, mac)).and_then(|tunnel| tunnel.dst) {
                Some(remote) => self.way(n, remote),
                _ => None,
            }
        };
        Some(place.unwrap_or(Meaning::Kernel))
    }

    pub fn fdb(&self) -> BTreeMap<(u32, MacAddr), Meaning> {
        let segments = (0..2).filter(|n| self.segment_works(*n));
        segments
            .flat_map(|n| (0..8).map(move |m| (n, mac(m))))
            .filter_map(|(n, mac)| Some(((100 + 100 * n as u32, mac), self.meaning(n, mac)?)))
            .collect()
    }

    /// Addresses that the strict segment takes frames from; `None`: it cannot be
    /// told, so it takes all.
    pub fn peers(&self) -> Option<BTreeSet<IpAddr>> {
        let entries = self.tunnelled.iter();
        let entries = entries.filter(|((n, _), _)| *n == STRICT);
        self.segment_works(STRICT)
            .then(|| entries.map(|(_, entry)| entry.dst).collect())?
    }

    pub fn uplinks(&self) -> BTreeSet<IfIndex> {
        if !(0..2).any(|n| self.segment_works(n)) {
            return BTreeSet::new();
        }
        let mut uplinks = BTreeSet::from([ETH0]);
        for n in (0..2).filter(|n| self.segment_works(*n)) {
            for ((at, _), entry) in &self.bridged {
                let here = *at == self.other_end(n) && entry.ifindex == self.vxlan(n);
                let tunnel = self.tunnelled.get(&(n, entry.mac));
                let fixed = entry.state & bits::NUD_PERMANENT != 0;
                if let (true, false, Some(tunnel)) = (here, fixed, tunnel)
                    && let Some(remote) = tunnel.dst
                    && remote.is_ipv6() == self.is_v6(n)
                {
                    uplinks.extend(self.routes[&remote]);
                }
            }
        }
        uplinks
    }
}

/// What the programs would read from the maps.
pub fn meanings(tables: &Tables) -> BTreeMap<FdbKey, Meaning> {
    let read = |index: u32| {
        let location = tables.locations.get(&index).copied().unwrap_or(Location(0));
        match location.place() {
            Place::Kernel => Meaning::Kernel,
            Place::Port(ifindex, _) => Meaning::Port(ifindex),
            Place::Remote(slot) => {
                let remote = &tables.remotes[&slot];
                let mac = |at: usize| MacAddr(remote.header[at..at + 6].try_into().unwrap());
                Meaning::Remote {
                    device: remote.ifindex,
                    source: mac(6),
                    next_hop: mac(0),
                    ttl: remote.header[if remote.flags & REMOTE_V6 == 0 {
                        22
                    } else {
                        21
                    }],
                    remote: destination(remote),
                }
            }
        }
    };
    let fdb = tables.fdb.iter();
    fdb.map(|(key, value)| (*key, read(value.location())))
        .collect()
}

/// The same by VNI.
pub fn meanings_by_vni(tables: &Tables) -> BTreeMap<(u32, MacAddr), Meaning> {
    let segments = tables.segments.iter();
    let vnis: HashMap<SegmentId, u32> = segments.map(|(k, s)| (s.id, k.vni())).collect();
    let meanings = meanings(tables).into_iter();
    meanings
        .map(|(key, meaning)| ((vnis[&key.segment()], key.mac()), meaning))
        .collect()
}

/// Where a frame starts its way: on a port, or on the wire in a VNI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Start {
    Port(PortKey),
    Wire(VniKey),
}

/// Where frames to every known address get from everywhere, and the segment's VNI.
pub fn reached(tables: &Tables) -> BTreeMap<(Start, MacAddr), (u32, Meaning)> {
    let meanings = meanings(tables);
    let ports = tables.ports.iter().map(|(key, port)| {
        let vni = u32::from_be(port.vni_word) >> 8;
        (Start::Port(*key), port.segment, vni)
    });
    let wire = tables.segments.iter();
    let wire = wire.map(|(key, segment)| (Start::Wire(*key), segment.id, key.vni()));
    let starts = ports.chain(wire);
    starts
        .flat_map(|(start, id, vni)| {
            let table = meanings.range(FdbKey::new(id, MacAddr::ZERO)..);
            let table = table.take_while(move |(key, _)| key.segment() == id);
            table.map(move |(key, meaning)| ((start, key.mac()), (vni, *meaning)))
        })
        .collect()
}
