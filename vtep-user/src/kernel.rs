//! Facts about the kernel's network state, as plain values: what `netlink`
//! reports and what `model` decides on. No I/O here. One `Event` is one netlink
//! notification; a `Snapshot` is one full dump.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use vtep_common::{MacAddr, Vni};

/// Kernel interface index.
pub type IfIndex = u32;

/// One change in the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Link(Link),
    LinkGone(IfIndex),
    /// New or changed. A station address has one entry per table; only multicast
    /// and all-zero addresses of a VXLAN device have one for each destination.
    Fdb(FdbEntry),
    /// In a bridge's table the port does not count: the bridge may have taken the
    /// address over from the port it was last reported on, without a notification.
    FdbGone(FdbEntry),
    /// The VLANs that a bridge port is a member of now, all of them.
    Vlans(IfIndex, Vec<VlanRange>),
    /// The VNIs that a VXLAN device with `vnifilter` takes now, all of them.
    Vnis(IfIndex, Vec<VniRange>),
    Neighbour(Neighbour),
    NeighbourGone(Neighbour),
    Address(Address),
    AddressGone(Address),
    /// A route or rule changed: every next hop has to be resolved again.
    RoutesChanged,
    /// An nftables table, chain or rule changed: `Filters` has to be read again.
    FiltersChanged,
    /// A device came, went, or takes redirected frames or not any more:
    /// `Snapshot::redirect_targets` has to be read again.
    TargetsChanged,
    /// A tc qdisc or filter of a device changed: somebody else may have to see its
    /// frames now.
    TcChanged(IfIndex),
    /// Notifications were lost (ENOBUFS): only a full dump helps.
    Overrun,
}

/// The whole state at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    pub links: Vec<Link>,
    /// Of every bridge and bridge port that has any.
    pub vlans: BTreeMap<IfIndex, Vec<VlanRange>>,
    /// Of every VXLAN device with `vnifilter` that has any.
    pub vnis: BTreeMap<IfIndex, Vec<VniRange>>,
    pub addresses: Vec<Address>,
    pub fdb: Vec<FdbEntry>,
    pub neighbours: Vec<Neighbour>,
    pub filters: Filters,
    /// Devices that take redirected frames; `None` where the kernel does not tell
    /// (before Linux 6.3).
    pub redirect_targets: Option<BTreeSet<IfIndex>>,
}

/// A network device (RTM_NEWLINK).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub ifindex: IfIndex,
    pub name: String,
    /// `None` for devices without an Ethernet address.
    pub mac: Option<MacAddr>,
    /// Largest payload behind the Ethernet header, bytes.
    pub mtu: u32,
    /// IFF_UP.
    pub up: bool,
    /// IFF_LOOPBACK.
    pub loopback: bool,
    /// IFLA_MASTER.
    pub master: Option<IfIndex>,
    pub kind: LinkKind,
    /// Set while the device is a port of a bridge.
    pub bridge_port: Option<BridgePort>,
    /// XDP program attached to the device (IFLA_XDP), any mode. One attached
    /// through a bpf link comes and goes without a notification.
    pub xdp: Option<XdpAttachment>,
    /// net.ipv6.conf.DEVICE.hop_limit: of IPv6 packets whose route names none;
    /// `None` without IPv6.
    pub hop_limit_v6: Option<u8>,
}

/// IFLA_XDP: what runs on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct XdpAttachment {
    /// XDP_ATTACHED_DRV = 1, SKB = 2, HW = 3, MULTI = 4 (if_link.h).
    pub mode: u8,
    pub program_id: u32,
}

/// IFLA_INFO_KIND with the data the mirror needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkKind {
    /// No IFLA_INFO_KIND: physical and other driver-made devices.
    Plain,
    Bridge(Bridge),
    Vxlan(Box<VxlanDevice>),
    Veth,
    Tun(Tun),
    /// Any other kind, by its name ("vlan", "bond", "macvlan", ...).
    Other(String),
}

/// IFLA_BR_*.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bridge {
    pub vlan_filtering: bool,
    /// IFLA_BR_VLAN_DEFAULT_PVID.
    pub default_pvid: u16,
    /// IFLA_BR_VLAN_PROTOCOL is 802.1ad: VLANs are those of outer service tags.
    pub service_vlans: bool,
    /// BR_BOOLOPT_MST_ENABLE: what forwards is decided per spanning-tree instance.
    pub mst: bool,
    /// Lifetime of an idle dynamic entry, milliseconds.
    pub ageing_ms: u64,
    /// IFLA_BR_NF_CALL_IPTABLES, _IP6TABLES or _ARPTABLES: frames of this bridge
    /// pass the IP filters even where `Filters::bridge_nf_call` is off.
    pub nf_call: bool,
}

/// IFLA_TUN_*.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tun {
    /// IFF_TAP (Ethernet) as opposed to IFF_TUN.
    pub tap: bool,
    /// The owner exchanges virtio-net headers: offloads are possible.
    pub vnet_hdr: bool,
}

/// IFLA_BRPORT_* (net/bridge/br_netlink.c).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BridgePort {
    /// BR_STATE_*: 3 is forwarding.
    pub state: u8,
    pub learning: bool,
    pub unicast_flood: bool,
    pub hairpin: bool,
    pub isolated: bool,
    pub locked: bool,
    /// MAC authentication bypass.
    pub mab: bool,
    pub neigh_suppress: bool,
    pub neigh_vlan_suppress: bool,
    pub vlan_tunnel: bool,
    pub proxy_arp: bool,
    pub backup_port: Option<IfIndex>,
}

/// VLANs in a row that a bridge port belongs to in the same way
/// (BRIDGE_VLANDB_ENTRY).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VlanRange {
    pub first: u16,
    pub last: u16,
    /// Frames that come untagged belong to it; at most one VLAN of a port.
    pub pvid: bool,
    /// Frames leave untagged.
    pub untagged: bool,
    /// BR_STATE_* within these VLANs: 3 is forwarding.
    pub state: u8,
    /// Tunnel key (VNI) that `first` is mapped to with `vlan_tunnel`; those of the
    /// others count up from it.
    pub tunnel: Option<u32>,
}

/// VNIs in a row, both ends included (VXLAN_VNIFILTER_ENTRY).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VniRange {
    pub first: u32,
    pub last: u32,
}

/// IFLA_VXLAN_* (drivers/net/vxlan/vxlan_core.c, vxlan_fill_info).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VxlanDevice {
    pub vni: Vni,
    pub local: Option<IpAddr>,
    /// IFLA_VXLAN_GROUP: default remote or multicast group.
    pub group: Option<IpAddr>,
    /// IFLA_VXLAN_LINK: underlay device.
    pub link: Option<IfIndex>,
    /// UDP destination port.
    pub udp_port: u16,
    /// UDP source ports; (0, 0) means the kernel default range.
    pub source_ports: (u16, u16),
    pub learning: bool,
    /// Lifetime of an idle learned entry, seconds; 0: for ever.
    pub ageing_s: u32,
    /// 0: the route's hop limit.
    pub ttl: u8,
    pub ttl_inherit: bool,
    /// Bit 0 set: inherit the inner field.
    pub tos: u8,
    /// IFLA_VXLAN_DF: 0 unset, 1 set, 2 inherit.
    pub df: u8,
    pub udp_checksum: bool,
    pub udp6_zero_checksum_tx: bool,
    pub udp6_zero_checksum_rx: bool,
    /// IPv6 flow label of all outer headers, 20 bits.
    pub flow_label: u32,
    /// `external`.
    pub collect_metadata: bool,
    pub vnifilter: bool,
    /// Names of options that are on and change frames in a way that is not
    /// mirrored: "gbp", "gpe", "remcsumtx", "remcsumrx", "proxy", "rsc",
    /// "l2miss", "l3miss", "reserved_bits", "flowlabel inherit".
    pub foreign_options: Vec<&'static str>,
}

/// Which of the two tables of a bridged VXLAN device an entry stands in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FdbTable {
    /// The bridge's own (`master`): MAC -> port.
    Bridge,
    /// The VXLAN device's (`self`): MAC -> remote.
    Vxlan,
}

/// A forwarding entry (RTM_NEWNEIGH, AF_BRIDGE).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FdbEntry {
    pub table: FdbTable,
    /// The port or VXLAN device; for entries of the bridge itself, the bridge.
    pub ifindex: IfIndex,
    /// NDA_MASTER.
    pub bridge: Option<IfIndex>,
    /// All zero: the default destinations (flood list) of a VXLAN device.
    pub mac: MacAddr,
    /// NDA_VLAN; `None` is VLAN 0 (not VLAN-aware).
    pub vlan: Option<u16>,
    pub dst: Option<IpAddr>,
    /// NDA_PORT, host order.
    pub udp_port: Option<u16>,
    /// NDA_VNI: the VNI the remote expects.
    pub vni: Option<Vni>,
    /// NDA_SRC_VNI: the segment on a single VXLAN device.
    pub source_vni: Option<Vni>,
    /// NDA_IFINDEX: fixed outgoing device.
    pub via: Option<IfIndex>,
    /// NDA_NH_ID.
    pub nexthop_id: Option<u32>,
    /// NUD_* bits.
    pub state: u16,
    /// NTF_* bits.
    pub flags: u8,
}

impl FdbEntry {
    /// A static entry of the table, without VLAN and destination.
    pub fn new(table: FdbTable, ifindex: IfIndex, mac: MacAddr) -> Self {
        Self {
            table,
            ifindex,
            bridge: None,
            mac,
            vlan: None,
            dst: None,
            udp_port: None,
            vni: None,
            source_vni: None,
            via: None,
            nexthop_id: None,
            // What `bridge fdb .. static` says: a VXLAN device refuses NOARP alone
            // (vxlan_core.c, vxlan_fdb_add).
            state: bits::NUD_NOARP | bits::NUD_REACHABLE,
            flags: 0,
        }
    }
}

/// NUD_* and NTF_* bits the project looks at (include/uapi/linux/neighbour.h).
pub mod bits {
    pub const NUD_INCOMPLETE: u16 = 0x01;
    pub const NUD_REACHABLE: u16 = 0x02;
    pub const NUD_STALE: u16 = 0x04;
    pub const NUD_DELAY: u16 = 0x08;
    pub const NUD_PROBE: u16 = 0x10;
    pub const NUD_FAILED: u16 = 0x20;
    pub const NUD_NOARP: u16 = 0x40;
    pub const NUD_PERMANENT: u16 = 0x80;
    /// A neighbour in one of these states has a usable address (NUD_VALID).
    pub const NUD_VALID: u16 =
        NUD_PERMANENT | NUD_NOARP | NUD_REACHABLE | NUD_PROBE | NUD_STALE | NUD_DELAY;
    pub const NTF_USE: u8 = 0x01;
    pub const NTF_SELF: u8 = 0x02;
    pub const NTF_MASTER: u8 = 0x04;
    pub const NTF_EXT_LEARNED: u8 = 0x10;
    pub const NTF_OFFLOADED: u8 = 0x20;
    pub const NTF_STICKY: u8 = 0x40;
}

/// An ARP or neighbour-discovery entry.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Neighbour {
    pub ifindex: IfIndex,
    pub address: IpAddr,
    pub mac: Option<MacAddr>,
    /// NUD_* bits.
    pub state: u16,
}

/// An address of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    pub ifindex: IfIndex,
    pub address: IpAddr,
}

/// How the kernel would reach a remote (RTM_GETROUTE).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    pub ifindex: IfIndex,
    /// `None`: the remote is on the link.
    pub gateway: Option<IpAddr>,
    /// Source address the kernel would take.
    pub source: Option<IpAddr>,
    /// RTAX_MTU, if the route or a path-MTU exception sets one.
    pub mtu: Option<u32>,
    /// RTAX_HOPLIMIT, if the route sets one.
    pub hop_limit: Option<u8>,
}

/// Packet filters that bridged frames pass through (R41).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filters {
    /// net.bridge.bridge-nf-call-iptables, -ip6tables or -arptables is 1.
    pub bridge_nf_call: bool,
    /// Names ("table/chain") of nftables base chains with at least one rule or
    /// a drop policy, family bridge or netdev.
    pub bridge_chains: Vec<String>,
    /// Same, families ip, ip6, inet, arp; legacy iptables tables count too.
    /// They see bridged frames only where `bridge_nf_call` is on.
    pub ip_chains: Vec<String>,
}
