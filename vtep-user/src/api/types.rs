//! Requests and answers of the control interface. Their JSON is the interface:
//! what `vtep --json` prints and the daemon's socket speaks (`openapi.yaml`
//! describes the same, a test compares). No logic beyond checks of a request.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use vtep_common::layout::{SegmentId, Via};
use vtep_common::{MacAddr, Vni};

use super::values::{HostIp, IfName, StationMac};
use crate::tables;

/// Destination port of VXLAN (RFC 7348 section 5).
pub const DEFAULT_UDP_PORT: u16 = 4789;

/// Where a program of ours sits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Hook {
    Xdp,
    Tcx,
}

/// How XDP runs: in the driver, or behind it (slow; only when asked for).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum XdpMode {
    #[default]
    Native,
    Generic,
}

impl From<XdpMode> for tables::XdpMode {
    fn from(mode: XdpMode) -> Self {
        match mode {
            XdpMode::Native => Self::Native,
            XdpMode::Generic => Self::Generic,
        }
    }
}

impl From<tables::XdpMode> for XdpMode {
    fn from(mode: tables::XdpMode) -> Self {
        match mode {
            tables::XdpMode::Native => Self::Native,
            tables::XdpMode::Generic => Self::Generic,
        }
    }
}

impl From<tables::Hook> for Hook {
    fn from(hook: tables::Hook) -> Self {
        match hook {
            tables::Hook::Xdp(_) => Self::Xdp,
            tables::Hook::Tcx => Self::Tcx,
        }
    }
}

/// How frames from the wire reach a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IngressWay {
    /// Redirected by XDP.
    Xdp,
    /// TCP merged by GRO, other frames redirected by XDP.
    Gro,
    /// Through the stack: the device takes no frames from XDP.
    Stack,
    /// Left to the kernel: jumbo frames.
    Kernel,
}

impl From<Via> for IngressWay {
    fn from(via: Via) -> Self {
        match via {
            Via::Xdp => Self::Xdp,
            Via::Gro => Self::Gro,
            Via::Stack => Self::Stack,
            Via::Kernel => Self::Kernel,
        }
    }
}

/// What the user wants at a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum PortHook {
    /// Decided from the port's offload features.
    #[default]
    Auto,
    /// XDP, whatever the features say.
    Xdp,
    /// tcx: offloads are kept.
    Tcx,
    /// Never accelerated.
    Kernel,
}

/// `GET /v1/status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The first full dump is applied and all hooks are attached.
    pub ready: bool,
    pub instance: String,
    /// As given to `--netns`; `None`: the namespace the daemon was started in.
    pub netns: Option<String>,
    /// Of this program.
    pub version: String,
    /// Release of the running kernel.
    pub kernel: String,
    pub uplinks: Vec<UplinkStatus>,
    pub segments: Vec<SegmentStatus>,
    pub ports: Vec<PortStatus>,
    pub counters: Counters,
    /// Whole sentences, each with what to do about it.
    pub warnings: Vec<String>,
}

/// A NIC towards the underlay. `hook` and `mode` are `None` and `reason` is set
/// where it is not accelerated; the same holds for segments and ports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UplinkStatus {
    pub name: String,
    pub ifindex: u32,
    pub accelerated: bool,
    pub hook: Option<Hook>,
    pub mode: Option<XdpMode>,
    pub reason: Option<String>,
}

/// A bridge (or a VLAN of it) and the VNI it is mapped to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentStatus {
    pub vni: Vni,
    /// Number in the maps; `None` while the segment is left to the kernel.
    pub segment: Option<SegmentId>,
    /// `None`: the VXLAN device is in no bridge.
    pub bridge: Option<String>,
    /// VLAN of a VLAN-aware bridge.
    pub vlan: Option<u16>,
    pub vxlan: String,
    pub local: Option<IpAddr>,
    pub udp_port: u16,
    pub learning: bool,
    /// Frames from hosts that no entry names are dropped.
    pub strict: bool,
    pub accelerated: bool,
    pub reason: Option<String>,
}

/// A bridge port as member of a segment: one for each of its VLANs on a VLAN-aware
/// bridge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortStatus {
    pub name: String,
    pub ifindex: u32,
    pub vni: Vni,
    /// Of a VLAN-aware bridge.
    pub vlan: Option<u16>,
    pub hook: Option<Hook>,
    pub mode: Option<XdpMode>,
    /// How frames from the wire reach it; `None` where it is not accelerated.
    pub ingress: Option<IngressWay>,
    pub accelerated: bool,
    pub reason: Option<String>,
}

/// Health of the mirror (R40). All but `fdb_entries` and `fdb_capacity` count
/// events since the daemon started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counters {
    /// Netlink notifications lost; each is followed by a resync.
    pub overruns: u64,
    /// Full dumps applied after the first.
    pub resyncs: u64,
    /// Table updates written to the maps.
    pub updates: u64,
    /// Entries left to the kernel because a map was full.
    pub map_full: u64,
    /// Entries in the `FDB` map now.
    pub fdb_entries: u64,
    /// Entries the `FDB` map can hold.
    pub fdb_capacity: u64,
}

/// `POST /v1/vnis`: make a bridge and a VXLAN device for a VNI.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VniSpec {
    pub vni: Vni,
    /// Tunnel source; default: what the route to the first remote says.
    #[serde(default)]
    pub local: Option<HostIp>,
    /// Underlay device; default: any.
    #[serde(default)]
    pub dev: Option<IfName>,
    /// UDP destination port.
    #[serde(default = "default_udp_port")]
    pub udp_port: u16,
    /// Flood list: who gets broadcast and unknown unicast.
    #[serde(default)]
    pub remotes: Vec<HostIp>,
    /// Learn remote MACs from the frames that arrive.
    #[serde(default = "default_learning")]
    pub learning: bool,
    /// Of bridge and VXLAN device, bytes behind the Ethernet header; default:
    /// what the underlay leaves.
    #[serde(default)]
    pub mtu: Option<u32>,
    /// Default: `br` and the VNI.
    #[serde(default)]
    pub bridge: Option<IfName>,
    /// Default: `vxlan` and the VNI.
    #[serde(default)]
    pub vxlan: Option<IfName>,
}

fn default_udp_port() -> u16 {
    DEFAULT_UDP_PORT
}

fn default_learning() -> bool {
    true
}

/// A request whose parts are right but do not fit together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    #[error("UDP port 0 cannot be used: the usual one is 4789")]
    UdpPort,
    #[error("MTU {0} is out of range: 68 to 65535 bytes")]
    Mtu(u32),
    #[error("{0} and {1} are of different IP families: a tunnel has one")]
    MixedFamilies(IpAddr, IpAddr),
    #[error("remote {0} is named twice")]
    RemoteTwice(IpAddr),
    #[error("{0} is the local address: a remote is another host")]
    RemoteIsLocal(IpAddr),
    #[error("bridge and VXLAN device are both called {0}: give them different names")]
    SameName(String),
}

impl VniSpec {
    /// Only the VNI, everything else as by default.
    pub fn new(vni: Vni) -> Self {
        Self {
            vni,
            local: None,
            dev: None,
            udp_port: DEFAULT_UDP_PORT,
            remotes: Vec::new(),
            learning: true,
            mtu: None,
            bridge: None,
            vxlan: None,
        }
    }

    /// Name of the bridge, given or default.
    pub fn bridge_name(&self) -> String {
        self.bridge
            .as_ref()
            .map_or_else(|| format!("br{}", self.vni), ToString::to_string)
    }

    /// Name of the VXLAN device, given or default.
    pub fn vxlan_name(&self) -> String {
        self.vxlan
            .as_ref()
            .map_or_else(|| format!("vxlan{}", self.vni), ToString::to_string)
    }

    /// Whether the parts fit together.
    pub fn check(&self) -> Result<(), SpecError> {
        if self.udp_port == 0 {
            return Err(SpecError::UdpPort);
        }
        if let Some(mtu) = self.mtu
            && !(68..=65535).contains(&mtu)
        {
            return Err(SpecError::Mtu(mtu));
        }
        let addresses: Vec<IpAddr> = self
            .local
            .iter()
            .chain(&self.remotes)
            .map(|ip| ip.get())
            .collect();
        if let Some(first) = addresses.first()
            && let Some(other) = addresses.iter().find(|ip| ip.is_ipv4() != first.is_ipv4())
        {
            return Err(SpecError::MixedFamilies(*first, *other));
        }
        for (i, remote) in self.remotes.iter().enumerate() {
            if Some(*remote) == self.local {
                return Err(SpecError::RemoteIsLocal(remote.get()));
            }
            if self.remotes[..i].contains(remote) {
                return Err(SpecError::RemoteTwice(remote.get()));
            }
        }
        if self.bridge_name() == self.vxlan_name() {
            return Err(SpecError::SameName(self.bridge_name()));
        }
        Ok(())
    }
}

/// One line of `vni show`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VniRow {
    #[serde(flatten)]
    pub segment: SegmentStatus,
    /// Of the VXLAN device, bytes behind the Ethernet header.
    pub mtu: u32,
    /// Flood list.
    pub remotes: Vec<IpAddr>,
    /// Names of the segment's ports.
    pub ports: Vec<String>,
}

/// `POST /v1/ports`: make a device a port of a segment's bridge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortSpec {
    pub name: IfName,
    pub vni: Vni,
    #[serde(default)]
    pub hook: PortHook,
}

/// Where an entry points, as shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Location {
    Remote { remote: IpAddr },
    Local { port: String },
    Held,
}

/// Who made an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Owner {
    /// Learned by the kernel, or installed by a routing daemon.
    Kernel,
    /// Permanent, set by hand.
    Static,
    /// Set through this interface.
    Api,
}

/// One line of `fdb show`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdbRow {
    pub vni: Vni,
    /// Of a VLAN-aware bridge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    pub mac: MacAddr,
    pub location: Location,
    /// Name of the endpoint the MAC belongs to.
    pub endpoint: Option<String>,
    pub owner: Owner,
    /// Counts the moves of the entry's location.
    pub generation: u64,
    /// Frames to it take the fast path.
    pub accelerated: bool,
}

/// Which entries to show; `None`: all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FdbFilter {
    pub vni: Option<Vni>,
    pub mac: Option<MacAddr>,
}

/// Where an entry shall point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Target {
    Remote { remote: HostIp },
    Local { port: IfName },
}

/// Body of `POST /v1/fdb` (add) and `PUT /v1/fdb` (replace). The location has
/// the form in which entries are shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FdbSpec {
    pub vni: Vni,
    pub mac: StationMac,
    pub location: Target,
}

/// What to do about an entry that exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteMode {
    /// Refuse (`Conflict`).
    Add,
    /// Move it, without a moment in which it points nowhere (R37).
    Replace,
}

/// One line of `remote show`: a peer as one VXLAN device reaches it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteRow {
    pub remote: IpAddr,
    /// The VNI the peer expects.
    pub vni: Vni,
    pub udp_port: u16,
    /// Outer source address.
    pub local: Option<IpAddr>,
    /// Underlay device; `None`: no route.
    pub dev: Option<String>,
    /// The router, or the peer itself where it is on the link.
    pub next_hop: Option<IpAddr>,
    /// Link-layer address of the next hop; `None`: not resolved.
    pub mac: Option<MacAddr>,
    /// Number of FDB entries that point here.
    pub fdb_entries: u64,
    pub accelerated: bool,
    pub reason: Option<String>,
}

/// Frames and bytes since the programs were loaded, as a program met them: a
/// superframe of a port with offloads counts once, with its own length. Bytes
/// count whole Ethernet frames: of fast ones from the wire the inner frame, of
/// passed and dropped ones all that came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Count {
    pub frames: u64,
    pub bytes: u64,
}

/// `GET /v1/stats`. Outcome names are those of `vtep_common::Outcome`; every
/// outcome is listed in `outcomes`, also at zero.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Stats {
    pub outcomes: BTreeMap<String, Count>,
    pub segments: Vec<SegmentStats>,
}

/// Counters of one segment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentStats {
    pub vni: Vni,
    pub segment: SegmentId,
    /// From the wire.
    pub ingress: DirectionStats,
    /// From ports.
    pub egress: DirectionStats,
    /// The non-zero ones.
    pub outcomes: BTreeMap<String, Count>,
}

/// All frames of one direction; every frame is in exactly one of the three.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DirectionStats {
    /// Forwarded past the kernel.
    pub fast: Count,
    /// Left to the kernel.
    pub passed: Count,
    pub dropped: Count,
}

/// Answer of `POST /v1/resync`: what the full dump led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResyncReport {
    /// FDB entries in the dump.
    pub fdb_entries: u64,
    /// Table updates that were needed; 0: the maps were right.
    pub updates: u64,
    pub duration_ms: u64,
}

/// Body of every answer that is not a success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    pub error: String,
}
