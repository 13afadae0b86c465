//! The maps and the look-ups, as the directions use them. A look-up copies
//! what it needs in one load: elements can be recycled under a reader.

use aya_ebpf::bindings::{BPF_F_MMAPABLE, xdp_action};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, DevMapHash, HashMap, PerCpuArray};
use vtep_common::Outcome;
use vtep_common::fdb::{self, Bucket, Value};
use vtep_common::layout::{
    Config, Counter, FdbKey, Location, PeerKey, Port, PortKey, Remote, Segment, SegmentId, VniKey,
    stats_index,
};

use crate::Verdict;

// Sizes are set when the object is loaded; these only have to be valid.
#[map]
static FDB: Array<Bucket> = Array::with_max_entries(1024, BPF_F_MMAPABLE);
#[map]
static LOCATIONS: Array<Location> = Array::with_max_entries(1024, BPF_F_MMAPABLE);
#[map]
static REMOTES: Array<Remote> = Array::with_max_entries(64, BPF_F_MMAPABLE);
#[map]
static PORTS: HashMap<PortKey, Port> = HashMap::with_max_entries(64, 0);
#[map]
static VNIS: HashMap<VniKey, Segment> = HashMap::with_max_entries(16, 0);
#[map]
static PEERS: HashMap<PeerKey, u8> = HashMap::with_max_entries(64, 0);
#[map]
static TX_PORTS: DevMapHash = DevMapHash::with_max_entries(64, 0);
#[map]
static CONFIG: Array<Config> = Array::with_max_entries(1, 0);
#[map]
static STATS: PerCpuArray<Counter> = PerCpuArray::with_max_entries(16 * Outcome::SLOTS, 0);

#[inline(always)]
pub fn config() -> Option<&'static Config> {
    CONFIG.get(0)
}

#[inline(always)]
pub fn segment(key: VniKey) -> Option<&'static Segment> {
    // SAFETY: elements are replaced, never edited; a recycled one reads as another segment of this
    // host, whose local address and FDB keys then do not match.
    unsafe { VNIS.get(key) }
}

/// R10: whether a strict segment takes frames from an address.
#[inline(always)]
pub fn is_peer(key: &PeerKey) -> bool {
    PEERS.get_ptr(key).is_some()
}

/// Segment, VNI and limits of the port a frame came from.
#[inline(always)]
pub fn port(key: PortKey) -> Option<&'static mut Port> {
    // SAFETY: as in `segment`; the program writes the epoch byte only.
    PORTS.get_ptr_mut(key).map(|port| unsafe { &mut *port })
}

#[inline(always)]
pub fn remote(slot: u32) -> Option<&'static Remote> {
    REMOTES.get(slot)
}

/// An entry of the FDB, copied at one moment.
pub struct Entry {
    value: Value,
    epoch: *mut u8,
}

impl Entry {
    /// The endpoint's location, one 8-byte load.
    #[inline(always)]
    pub fn location(&self) -> Option<Location> {
        let location = LOCATIONS.get_ptr(self.value.location())?;
        // SAFETY: aligned element of an array map; volatile, because user space stores to it.
        Some(unsafe { location.read_volatile() })
    }

    /// Note that the entry carried traffic in this epoch. Writes only when the
    /// epoch is new, so that the line stays shared between CPUs.
    #[inline(always)]
    pub fn mark(&self, epoch: u8) {
        if self.value.epoch() != epoch {
            // SAFETY: a byte of the bucket; if the slot has another key by now, a wrong mark
            // only delays its ageing.
            unsafe { self.epoch.write(epoch) };
        }
    }
}

#[inline(always)]
pub fn fdb(key: FdbKey, config: &Config) -> Option<Entry> {
    let [first, second] = fdb::buckets(key);
    if let Some(entry) = probe(key, first & config.fdb_mask) {
        return Some(entry);
    }
    probe(key, second & config.fdb_mask)
}

#[inline(always)]
fn probe(key: FdbKey, index: u32) -> Option<Entry> {
    let bucket = FDB.get_ptr_mut(index)?;
    // SAFETY: elements of an array map are always there.
    let found = unsafe { fdb::find(bucket, key) }?;
    // SAFETY: slot is below SLOTS.
    let epoch = unsafe {
        (&raw mut (*bucket).values)
            .cast::<u8>()
            .add(found.slot * 4 + Value::EPOCH_BYTE)
    };
    Some(Entry {
        value: found.value,
        epoch,
    })
}

/// Choose the device the frame leaves by. Nothing happens to the frame until
/// the program returns "redirect", so this comes before any byte is changed;
/// false where the device is not a target.
#[inline(always)]
#[must_use]
pub fn redirect(ifindex: u32) -> bool {
    TX_PORTS
        .redirect(ifindex, xdp_action::XDP_PASS as u64)
        .is_ok()
}

/// Frames of a segment that this CPU has encapsulated: what makes the outer
/// identifications of a flow differ.
#[inline(always)]
pub fn encapsulated_frames(segment: SegmentId) -> u32 {
    let counter = STATS.get(stats_index(segment, Outcome::EgressRemote));
    counter.map_or(0, |counter| counter.frames as u32)
}

/// One frame, one increment (R42).
#[inline(always)]
pub fn count(verdict: &Verdict) {
    let index = stats_index(verdict.segment, verdict.outcome);
    if let Some(counter) = STATS.get_ptr_mut(index) {
        // SAFETY: per-CPU element; XDP programs do not interrupt each other on a CPU.
        let counter = unsafe { &mut *counter };
        counter.frames += 1;
        counter.bytes += verdict.bytes as u64;
    }
}
