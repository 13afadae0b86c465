//! What the model wants to be in the BPF maps, as values: the only language
//! between `model` (decides) and `dataplane` (writes). No I/O.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use vtep_common::fdb::Value;
use vtep_common::layout::{
    Config, FdbKey, Location, PeerKey, Port, PortKey, Remote, Segment, VniKey,
};

use crate::kernel::IfIndex;

/// Which program runs on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Program {
    /// On an uplink, XDP: from the wire towards the VMs. The tcx program that
    /// finishes the way through the stack comes and goes with it.
    Ingress,
    /// On a port: from a VM towards the wire.
    Egress,
}

/// Where on a device a program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Hook {
    Xdp(XdpMode),
    /// On socket buffers that come from the device: offloads are kept. Ports only.
    Tcx,
}

/// How XDP runs on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum XdpMode {
    /// In the driver.
    Native,
    /// On socket buffers (slow; only when asked for).
    Generic,
}

/// One write. A list of updates is applied in its order; the model orders them
/// so that no entry ever names something that is not there yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TableUpdate {
    Config(Config),
    /// A slot that no location names.
    Remote {
        slot: u32,
        value: Remote,
    },
    /// One aligned 8-byte store.
    Location {
        index: u32,
        value: Location,
    },
    /// Devices that frames may be redirected to.
    TargetAdd(IfIndex),
    TargetDel(IfIndex),
    Segment {
        key: VniKey,
        value: Segment,
    },
    SegmentDel(VniKey),
    /// An address that a strict segment takes frames from.
    Peer(PeerKey),
    PeerDel(PeerKey),
    Port {
        key: PortKey,
        value: Port,
    },
    PortDel(PortKey),
    Fdb {
        key: FdbKey,
        value: Value,
    },
    FdbDel(FdbKey),
    Attach {
        ifindex: IfIndex,
        program: Program,
        hook: Hook,
    },
    Detach(IfIndex),
}

/// An update that the kernel refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    pub update: TableUpdate,
    /// Without the name of the device: "Device or resource busy (os error 16)".
    pub reason: String,
}

/// The content of all maps and hooks: read back at a restart, so that the model
/// keeps slots and numbers and only differences are written.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tables {
    pub config: Option<Config>,
    /// By slot; only slots that are in use (non-zero ifindex).
    pub remotes: BTreeMap<u32, Remote>,
    /// By index; only locations that are not `Location(0)`.
    pub locations: BTreeMap<u32, Location>,
    pub targets: Vec<IfIndex>,
    pub segments: BTreeMap<VniKey, Segment>,
    pub peers: BTreeSet<PeerKey>,
    pub ports: BTreeMap<PortKey, Port>,
    pub fdb: HashMap<FdbKey, Value>,
    pub hooks: BTreeMap<IfIndex, (Program, Hook)>,
}

/// Sizes of the maps, entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    pub fdb: u32,
    pub locations: u32,
    pub remotes: u32,
    pub segments: u32,
    /// Addresses of strict segments.
    pub peers: u32,
    pub ports: u32,
}

impl Default for Capacity {
    fn default() -> Self {
        Self {
            fdb: 131_072,
            locations: 16_384,
            remotes: 4_096,
            segments: 256,
            peers: 16_384,
            ports: 1_024,
        }
    }
}
