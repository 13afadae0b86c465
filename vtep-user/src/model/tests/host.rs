//! A kernel in values, as plainly as can be, in every layout of two segments: what
//! operations do to it, and what it would notify.

use super::*;
use crate::kernel::Filters;

pub const PORTS: [IfIndex; 3] = [TAP0, TAP1, TAP2];
/// The first segment's underlay is IPv4, the second's IPv6, unless both have one
/// VXLAN device.
const V6: usize = 1;
pub const STRICT: usize = 1;
const GATEWAYS: [IpAddr; 2] = [GATEWAY, GATEWAY_V6];
const REMOTES: [[IpAddr; 3]; 2] = [
    [REMOTE1, REMOTE2, REMOTE3],
    [REMOTE1_V6, REMOTE2_V6, REMOTE3_V6],
];
pub const VNIS: [u32; 2] = [100, 200];
const VLANS: [u16; 2] = [10, 20];

/// How two segments are made. A bridge in the operations is a VLAN where there is
/// one bridge only, and belonging to it is a port's PVID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// A bridge and a VXLAN device each.
    Bridges,
    /// VLANs of one bridge, with a VXLAN device each.
    Vlans,
    /// VLANs of one bridge, mapped to VNIs of one VXLAN device.
    Single,
}

#[derive(Debug, Clone)]
pub enum Op {
    /// A MAC appears at a port (or the VXLAN device, 3) of a bridge.
    Bridged {
        bridge: usize,
        port: usize,
        mac: u8,
        local: bool,
    },
    BridgedGone {
        bridge: usize,
        port: usize,
        mac: u8,
    },
    Tunnelled {
        vxlan: usize,
        mac: u8,
        remote: usize,
    },
    TunnelledGone {
        vxlan: usize,
        mac: u8,
        remote: usize,
    },
    Up {
        device: usize,
        up: bool,
    },
    Master {
        port: usize,
        bridge: Option<usize>,
    },
    Isolated {
        port: usize,
        on: bool,
    },
    Offloads {
        port: usize,
        on: bool,
    },
    Learning {
        vxlan: usize,
        on: bool,
    },
    Ttl {
        vxlan: usize,
        ttl: u8,
    },
    Reborn {
        port: usize,
    },
    Hop {
        eth: usize,
        n: Option<u8>,
    },
    Route {
        family: usize,
        remote: usize,
        eth: Option<usize>,
    },
    Filter {
        on: bool,
    },
    /// Of a VLAN-aware bridge only, as all below.
    Tagged {
        port: usize,
        vlan: usize,
        on: bool,
    },
    VlanFiltering {
        on: bool,
    },
    /// The two VNIs change their VLANs.
    Swap,
    /// The spanning tree blocks a VLAN of the VXLAN device.
    Blocked {
        vlan: usize,
        on: bool,
    },
    /// Of a single VXLAN device only: `vnifilter`.
    VniFilter {
        n: usize,
        on: bool,
    },
    Resync,
}

/// The kernel, as plainly as can be.
#[derive(Debug, Clone)]
pub struct Kernel {
    layout: Layout,
    pub links: BTreeMap<IfIndex, Link>,
    /// By bridge or VLAN.
    pub bridged: BTreeMap<(usize, MacAddr), FdbEntry>,
    /// By VNI.
    pub tunnelled: BTreeMap<(usize, MacAddr), FdbEntry>,
    /// PVIDs of ports on the VLAN-aware bridge, and VLANs they are tagged in.
    pvids: BTreeMap<IfIndex, usize>,
    tagged: BTreeSet<(IfIndex, usize)>,
    swapped: bool,
    blocked: BTreeSet<usize>,
    unfiltered_vnis: BTreeSet<usize>,
    pub hops: BTreeMap<IfIndex, u8>,
    pub routes: BTreeMap<IpAddr, Option<IfIndex>>,
    pub filtered: bool,
}

fn eth(n: usize) -> IfIndex {
    [ETH0, ETH1][n]
}

impl Kernel {
    pub fn new(layout: Layout) -> Self {
        let mut host = two_segments();
        for link in host.links.iter_mut().filter(|link| link.ifindex == VX1) {
            if let LinkKind::Vxlan(device) = &mut link.kind {
                device.local = Some(LOCAL_V6.into());
            }
        }
        host.links.push(link(ETH1, "eth1", LinkKind::Plain));
        let links = host.links.into_iter();
        let mut links: BTreeMap<_, _> = links.map(|link| (link.ifindex, link)).collect();
        if layout != Layout::Bridges {
            links.values_mut().for_each(make_vlan_aware);
        }
        if layout == Layout::Single {
            links.remove(&VX1);
            make_single(links.get_mut(&VX0).unwrap());
        }
        Self {
            layout,
            links,
            pvids: [(TAP0, 0), (TAP1, 0), (TAP2, 1)].into(),
            tagged: BTreeSet::new(),
            swapped: false,
            blocked: BTreeSet::new(),
            unfiltered_vnis: [0, 1].into(),
            bridged: BTreeMap::new(),
            tunnelled: BTreeMap::new(),
            hops: [(ETH0, 1), (ETH1, 2)].into(),
            routes: REMOTES
                .concat()
                .iter()
                .map(|to| (*to, Some(ETH0)))
                .collect(),
            filtered: false,
        }
    }

    pub fn snapshot(&self) -> Snapshot {
        let hops = self
            .hops
            .iter()
            .flat_map(|(eth, n)| GATEWAYS.map(|hop| neighbour(*eth, hop, *n)));
        let mut addresses = two_segments().addresses;
        addresses.push(Address {
            ifindex: ETH0,
            address: LOCAL_V6.into(),
        });
        Snapshot {
            links: self.links.values().cloned().collect(),
            vlans: self
                .links
                .keys()
                .map(|ifindex| (*ifindex, self.vlans_of(*ifindex)))
                .collect(),
            vnis: [(VX0, self.vnis())].into(),
            addresses,
            fdb: self
                .bridged
                .values()
                .chain(self.tunnelled.values())
                .cloned()
                .collect(),
            neighbours: hops.collect(),
            filters: self.filters(),
            redirect_targets: None,
        }
    }

    fn filters(&self) -> Filters {
        let chains = self.filtered.then(|| "filter/forward".to_owned());
        Filters {
            bridge_chains: chains.into_iter().collect(),
            ..Filters::default()
        }
    }

    fn change(&mut self, ifindex: IfIndex, change: impl FnOnce(&mut Link)) -> Vec<Event> {
        let link = self.links.get_mut(&ifindex).unwrap();
        change(link);
        vec![Event::Link(link.clone())]
    }

    pub fn bridge(&self, at: usize) -> IfIndex {
        match self.layout {
            Layout::Bridges => [BR0, BR1][at],
            Layout::Vlans | Layout::Single => BR0,
        }
    }

    pub fn vxlan(&self, n: usize) -> IfIndex {
        match self.layout {
            Layout::Single => VX0,
            Layout::Bridges | Layout::Vlans => [VX0, VX1][n],
        }
    }

    /// Bridge or VLAN of a VNI, and the VNI of a bridge or VLAN.
    pub fn other_end(&self, n: usize) -> usize {
        n ^ usize::from(self.swapped)
    }

    fn vlan(&self, at: usize) -> Option<u16> {
        (self.layout != Layout::Bridges).then_some(VLANS[at])
    }

    /// Whether a VLAN and a VNI are one in both directions.
    pub fn is_mapped(&self, n: usize) -> bool {
        let LinkKind::Bridge(bridge) = &self.links[&BR0].kind else {
            panic!()
        };
        self.layout == Layout::Bridges
            || bridge.vlan_filtering
                && !self.blocked.contains(&self.other_end(n))
                && (self.layout == Layout::Vlans || self.unfiltered_vnis.contains(&n))
    }

    /// Whether a port's untagged frames, and all its frames there, are of this place.
    pub fn is_untagged(&self, port: IfIndex, at: usize) -> bool {
        self.layout == Layout::Bridges || self.pvids.get(&port) == Some(&at)
    }

    fn vlans_of(&self, ifindex: IfIndex) -> Vec<VlanRange> {
        if self.layout == Layout::Bridges {
            return vec![];
        }
        let member = |at: usize, untagged: bool| VlanRange {
            pvid: untagged,
            untagged,
            ..tagged(VLANS[at])
        };
        let state = |at: usize| if self.blocked.contains(&at) { 4 } else { 3 };
        match ifindex {
            VX0 | VX1 if self.layout == Layout::Vlans => {
                let at = self.other_end(usize::from(ifindex == VX1));
                let state = state(at);
                vec![VlanRange {
                    state,
                    ..member(at, true)
                }]
            }
            VX0 => {
                let mapped = |at: usize| VlanRange {
                    state: state(at),
                    tunnel: Some(VNIS[self.other_end(at)]),
                    ..member(at, false)
                };
                vec![pvid(1), mapped(0), mapped(1)]
            }
            _ => {
                let pvid = self.pvids.get(&ifindex);
                let tagged = self.tagged.iter().filter(|(port, _)| *port == ifindex);
                let tagged = tagged.filter(|(_, at)| Some(at) != pvid);
                let tagged = tagged.map(|(_, at)| member(*at, false));
                pvid.map(|at| member(*at, true))
                    .into_iter()
                    .chain(tagged)
                    .collect()
            }
        }
    }

    fn vnis(&self) -> Vec<VniRange> {
        let vnis = self.unfiltered_vnis.iter().map(|n| VNIS[*n]);
        vnis.map(|vni| VniRange {
            first: vni,
            last: vni,
        })
        .collect()
    }

    fn vlans_changed(&self, ifindex: IfIndex) -> Vec<Event> {
        match self.layout {
            Layout::Bridges => vec![],
            _ => vec![Event::Vlans(ifindex, self.vlans_of(ifindex))],
        }
    }

    pub fn is_v6(&self, n: usize) -> bool {
        self.layout != Layout::Single && n == V6
    }

    pub fn gateway(&self, n: usize) -> IpAddr {
        GATEWAYS[usize::from(self.is_v6(n))]
    }

    /// The entry an operation names: remote 3 is of the other family, 4 a nexthop
    /// group.
    fn tunnel(&self, n: usize, m: u8, remote: usize) -> FdbEntry {
        let family = usize::from(self.is_v6(n));
        let entry = FdbEntry {
            source_vni: (self.layout == Layout::Single).then(|| vni(VNIS[n])),
            ..tunnelled(self.vxlan(n), mac(m), REMOTES[family][remote % 3])
        };
        match remote {
            3 => FdbEntry {
                dst: Some(REMOTES[1 - family][0]),
                ..entry
            },
            4 => FdbEntry {
                dst: None,
                nexthop_id: Some(1),
                ..entry
            },
            _ => entry,
        }
    }

    fn at(&self, at: usize, port: usize, n: u8) -> FdbEntry {
        let port = PORTS.get(port).copied();
        let port = port.unwrap_or_else(|| self.vxlan(self.other_end(at)));
        FdbEntry {
            vlan: self.vlan(at),
            ..bridged(self.bridge(at), port, mac(n))
        }
    }

    /// Do it, and say what the kernel would notify.
    pub fn run(&mut self, op: &Op, sim: &mut Sim) -> Vec<Event> {
        match *op {
            Op::Bridged {
                bridge,
                port,
                mac,
                local,
            } => {
                let mut entry = self.at(bridge, port, mac);
                if local {
                    entry.state = bits::NUD_PERMANENT;
                }
                self.bridged.insert((bridge, entry.mac), entry.clone());
                vec![Event::Fdb(entry)]
            }
            Op::BridgedGone { bridge, port, mac } => {
                let entry = self.at(bridge, port, mac);
                let key = (bridge, entry.mac);
                if self
                    .bridged
                    .get(&key)
                    .is_some_and(|known| known.ifindex == entry.ifindex)
                {
                    self.bridged.remove(&key);
                }
                // Late ones are told as well (F1).
                vec![Event::FdbGone(entry)]
            }
            Op::Tunnelled { vxlan, mac, remote } => {
                let entry = self.tunnel(vxlan, mac, remote);
                self.tunnelled.insert((vxlan, entry.mac), entry.clone());
                vec![Event::Fdb(entry)]
            }
            Op::TunnelledGone { vxlan, mac, remote } => {
                let entry = self.tunnel(vxlan, mac, remote);
                let key = (vxlan, entry.mac);
                if self.tunnelled.get(&key) == Some(&entry) {
                    self.tunnelled.remove(&key);
                }
                vec![Event::FdbGone(entry)]
            }
            Op::Up { device, up } => {
                let devices = [ETH0, ETH1, BR0, BR1, VX0, VX1, TAP0, TAP1, TAP2];
                if !self.links.contains_key(&devices[device]) {
                    return vec![];
                }
                self.change(devices[device], |link| link.up = up)
            }
            Op::Master { port, bridge } if self.layout == Layout::Bridges => {
                self.change(PORTS[port], |link| {
                    link.master = bridge.map(|n| [BR0, BR1][n]);
                    link.bridge_port = bridge.map(|_| FORWARDING);
                })
            }
            Op::Master { port, bridge } => {
                let port = PORTS[port];
                match bridge {
                    Some(at) => self.pvids.insert(port, at),
                    None => self.pvids.remove(&port),
                };
                self.vlans_changed(port)
            }
            Op::Tagged { port, vlan, on } => {
                let member = (PORTS[port], vlan);
                if on {
                    self.tagged.insert(member);
                } else {
                    self.tagged.remove(&member);
                }
                self.vlans_changed(PORTS[port])
            }
            Op::Swap if self.layout == Layout::Bridges => vec![],
            Op::Swap => {
                self.swapped = !self.swapped;
                let mut events = self.vlans_changed(VX0);
                events.extend(self.vlans_changed(VX1));
                events
            }
            Op::Blocked { vlan, on } => {
                if on {
                    self.blocked.insert(vlan);
                } else {
                    self.blocked.remove(&vlan);
                }
                let mut events = self.vlans_changed(VX0);
                events.extend(self.vlans_changed(VX1));
                events
            }
            Op::VlanFiltering { .. } if self.layout == Layout::Bridges => vec![],
            Op::VlanFiltering { on } => self.change(BR0, |link| match &mut link.kind {
                LinkKind::Bridge(bridge) => bridge.vlan_filtering = on,
                other => panic!("{other:?}"),
            }),
            Op::VniFilter { n, on } => {
                if on {
                    self.unfiltered_vnis.insert(n);
                } else {
                    self.unfiltered_vnis.remove(&n);
                }
                vec![Event::Vnis(VX0, self.vnis())]
            }
            Op::Isolated { port, on } => self.change(PORTS[port], |link| {
                if let Some(port) = &mut link.bridge_port {
                    port.isolated = on;
                }
            }),
            Op::Offloads { port, on } => self.change(PORTS[port], |link| {
                link.kind = LinkKind::Tun(Tun {
                    tap: !on,
                    vnet_hdr: false,
                });
            }),
            Op::Learning { vxlan, on } => self.device(vxlan, |device| device.learning = on),
            Op::Ttl { vxlan, ttl } => self.device(vxlan, |device| device.ttl = ttl),
            Op::Reborn { port } => {
                let ifindex = PORTS[port];
                // The kernel flushes what was behind it.
                let behind = |entry: &FdbEntry| entry.ifindex == ifindex;
                let gone: Vec<_> = self
                    .bridged
                    .values()
                    .filter(|e| behind(e))
                    .cloned()
                    .collect();
                self.bridged.retain(|_, entry| !behind(entry));
                let mut events: Vec<Event> = gone.into_iter().map(Event::FdbGone).collect();
                events.push(Event::LinkGone(ifindex));
                let link = &self.links[&ifindex];
                events.push(Event::Link(link.clone()));
                events.extend(self.vlans_changed(ifindex));
                events
            }
            Op::Hop { eth: n, n: hop } => {
                let eth = eth(n);
                match hop {
                    Some(hop) => {
                        self.hops.insert(eth, hop);
                        GATEWAYS
                            .map(|ip| Event::Neighbour(neighbour(eth, ip, hop)))
                            .into()
                    }
                    None => {
                        self.hops.remove(&eth);
                        GATEWAYS
                            .map(|ip| Event::NeighbourGone(neighbour(eth, ip, 0)))
                            .into()
                    }
                }
            }
            Op::Route {
                family,
                remote,
                eth: n,
            } => {
                let device = n.map(eth);
                let remote = REMOTES[family][remote];
                self.routes.insert(remote, device);
                let route = device.map(|device| via(device, GATEWAYS[family]));
                sim.routes.insert(remote, route);
                vec![Event::RoutesChanged]
            }
            Op::Filter { on } => {
                self.filtered = on;
                sim.model.set_filters(self.filters());
                vec![]
            }
            Op::Resync => {
                sim.model.replace(self.snapshot());
                vec![]
            }
        }
    }

    fn device(&mut self, vxlan: usize, change: impl FnOnce(&mut VxlanDevice)) -> Vec<Event> {
        self.change(self.vxlan(vxlan), |link| match &mut link.kind {
            LinkKind::Vxlan(device) => change(device),
            other => panic!("{other:?}"),
        })
    }
}
