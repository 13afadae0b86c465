//! The pinned maps of an instance, read as the programs read them: what counts
//! is what stands there, not what the daemon says.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Map, MapData, MapInfo, PerCpuArray};
use vtep_common::fdb::{Bucket, SLOTS, Value, buckets};
use vtep_common::layout::{
    Counter, FdbKey, LAYOUT_VERSION, Location, Place, Remote, SegmentId, stats_index,
};
use vtep_common::{MacAddr, Outcome};

/// An array map, mapped for reading.
struct Words {
    start: NonNull<AtomicU64>,
    count: usize,
}

// SAFETY: shared memory that is only touched through atomics.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    fn open(directory: &Path, name: &str, element_words: usize) -> Result<Self> {
        let path = directory.join(name);
        let map = MapData::from_pin(&path).with_context(|| path.display().to_string())?;
        let info = MapInfo::from_pin(&path)?;
        ensure!(info.value_size() as usize == element_words * 8, "{name}");
        let count = info.max_entries() as usize * element_words;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                count * 8,
                libc::PROT_READ,
                libc::MAP_SHARED,
                map.fd().as_fd().as_raw_fd(),
                0,
            )
        };
        ensure!(
            address != libc::MAP_FAILED,
            "{name}: {}",
            std::io::Error::last_os_error()
        );
        let start = NonNull::new(address.cast()).context("mapped at 0")?;
        Ok(Self { start, count })
    }

    fn word(&self, index: usize) -> u64 {
        assert!(index < self.count);
        // SAFETY: inside the mapping, which lives as long as `self`.
        unsafe { self.start.add(index).as_ref() }.load(Ordering::Acquire)
    }

    fn bytes<const N: usize>(&self, first: usize) -> [u8; N] {
        let mut bytes = [0; N];
        for (i, chunk) in bytes.chunks_exact_mut(8).enumerate() {
            chunk.copy_from_slice(&self.word(first + i).to_ne_bytes());
        }
        bytes
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: mapped by `open`, and nothing borrows from it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.count * 8) };
    }
}

/// Where the maps send frames for a MAC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    Kernel,
    /// Interface index.
    Port(u32),
    Remote(IpAddr),
}

pub struct Maps {
    fdb: Words,
    locations: Words,
    remotes: Words,
}

fn pins(instance: &str) -> PathBuf {
    let directory = Path::new("/sys/fs/bpf/vtep").join(instance);
    directory.join(format!("v{LAYOUT_VERSION}/maps"))
}

const BUCKET_WORDS: usize = size_of::<Bucket>() / 8;
const REMOTE_WORDS: usize = size_of::<Remote>() / 8;

impl Maps {
    pub fn open(instance: &str) -> Result<Self> {
        let directory = pins(instance);
        Ok(Self {
            fdb: Words::open(&directory, "FDB", BUCKET_WORDS)?,
            locations: Words::open(&directory, "LOCATIONS", 1)?,
            remotes: Words::open(&directory, "REMOTES", REMOTE_WORDS)?,
        })
    }

    fn bucket(&self, index: usize) -> impl Iterator<Item = (FdbKey, Value)> {
        let bytes: [u8; size_of::<Bucket>()] = self.fdb.bytes(index * BUCKET_WORDS);
        // SAFETY: plain integers, any bytes are a bucket.
        let bucket: Bucket = unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) };
        (0..SLOTS)
            .map(move |slot| (bucket.keys[slot], bucket.values[slot]))
            .filter(|(word, _)| *word != 0)
            .map(|(word, value)| (FdbKey::from_word(word), Value(value)))
    }

    fn place(&self, value: Value) -> Place {
        Location(self.locations.word(value.location() as usize)).place()
    }

    fn slot(&self, slot: u32) -> Remote {
        let bytes: [u8; size_of::<Remote>()] = self.remotes.bytes(slot as usize * REMOTE_WORDS);
        // SAFETY: plain integers, any bytes are a remote.
        unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) }
    }

    fn way(&self, value: Value) -> Way {
        match self.place(value) {
            Place::Port(ifindex, _) => Way::Port(ifindex),
            Place::Remote(slot) => {
                let remote = self.slot(slot);
                let v6: [u8; 16] = std::array::from_fn(|i| remote.header[38 + i]);
                Way::Remote(if remote.is_destination_v6(&v6) {
                    v6.into()
                } else {
                    remote.destination_v4().into()
                })
            }
            _ => Way::Kernel,
        }
    }

    /// `None`: no entry, so the kernel takes it as well.
    pub fn get(&self, segment: SegmentId, mac: MacAddr) -> Option<Way> {
        self.find(segment, mac).map(|value| self.way(value))
    }

    /// The headers that frames to a MAC get, if it is behind a remote.
    pub fn remote(&self, segment: SegmentId, mac: MacAddr) -> Option<Remote> {
        match self.place(self.find(segment, mac)?) {
            Place::Remote(slot) => Some(self.slot(slot)),
            _ => None,
        }
    }

    fn find(&self, segment: SegmentId, mac: MacAddr) -> Option<Value> {
        let key = FdbKey::new(segment, mac);
        let mask = self.fdb.count / BUCKET_WORDS - 1;
        let choices = buckets(key).map(|bucket| bucket as usize & mask);
        let mut found = choices.into_iter().flat_map(|bucket| self.bucket(bucket));
        found.find(|(k, _)| *k == key).map(|(_, value)| value)
    }

    /// All entries of a segment.
    pub fn all(&self, segment: SegmentId) -> BTreeMap<MacAddr, Way> {
        let every = (0..self.fdb.count / BUCKET_WORDS).flat_map(|bucket| self.bucket(bucket));
        every
            .filter(|(key, _)| key.segment() == segment)
            .map(|(key, value)| (key.mac(), self.way(value)))
            .collect()
    }

    /// Locations that say something else than "kernel".
    pub fn locations_in_use(&self) -> usize {
        let words = (0..self.locations.count).map(|i| Location(self.locations.word(i)));
        words.filter(|l| l.place() != Place::Kernel).count()
    }
}

/// The counters of an instance, read where the programs count.
pub struct Counters(PerCpuArray<MapData, Counter>);

/// Segments a test may have, and the one of frames that belong to none.
const SEGMENTS: SegmentId = 8;

impl Counters {
    pub fn open(instance: &str) -> Result<Self> {
        let map = MapData::from_pin(pins(instance).join("STATS"))?;
        Ok(Self(PerCpuArray::try_from(Map::PerCpuArray(map))?))
    }

    /// Frames of every outcome so far.
    pub fn frames(&self) -> Result<BTreeMap<&'static str, u64>> {
        let frames = |outcome: &Outcome| {
            let mut sum = 0;
            for segment in 0..SEGMENTS {
                let counters = self.0.get(&stats_index(segment, *outcome), 0)?;
                sum += counters.iter().map(|c| c.frames).sum::<u64>();
            }
            Ok((outcome.name(), sum))
        };
        Outcome::ALL.iter().map(frames).collect()
    }
}
