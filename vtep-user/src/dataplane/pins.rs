//! The pin directory `NAME/v<layout>/{maps,links}`: which maps there are, and
//! whether what lies there already can be adopted. Used by `dataplane` only.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use vtep_common::Outcome;
use vtep_common::fdb::{Bucket, SLOTS};
use vtep_common::layout::{
    Config, Counter, LAYOUT_VERSION, Location, PeerKey, Port, PortKey, Remote, Segment,
    UPLINKS_MAX, VniKey,
};

use super::DataplaneError;
use super::sys::{self, Kind, MapInfo};
use crate::fdb::bucket_count;
use crate::tables::Capacity;

const BPF_FS_MAGIC: libc::c_long = 0xcafe_4a11_u32 as libc::c_long;

const HASH: u32 = 1;
const ARRAY: u32 = 2;
const PERCPU_ARRAY: u32 = 6;
const DEVMAP_HASH: u32 = 25;

/// Set by the kernel itself on device maps (kernel/bpf/devmap.c).
const BPF_F_RDONLY_PROG: u32 = 1 << 7;
const BPF_F_MMAPABLE: u32 = 1 << 10;

/// Type, sizes and flags of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub name: &'static str,
    kind: u32,
    key_bytes: u32,
    value_bytes: u32,
    pub max_entries: u32,
    flags: u32,
    /// What is configured for one element of the map; 4 for a bucket of the FDB.
    unit: u32,
}

impl Shape {
    const fn new<K, V>(name: &'static str, kind: u32, max_entries: u32, flags: u32) -> Self {
        Self {
            name,
            kind,
            key_bytes: size_of::<K>() as u32,
            value_bytes: size_of::<V>() as u32,
            max_entries,
            flags,
            unit: 1,
        }
    }

    fn text(&self) -> String {
        format!(
            "type {}, key {} bytes, value {} bytes, flags {:#x}",
            self.kind, self.key_bytes, self.value_bytes, self.flags
        )
    }

    /// Why `info` is not this map, found at `path`.
    fn check(&self, path: &Path, info: &MapInfo) -> Result<(), DataplaneError> {
        let found = Self {
            name: self.name,
            kind: info.kind,
            key_bytes: info.key_bytes,
            value_bytes: info.value_bytes,
            max_entries: info.max_entries,
            flags: info.flags & !BPF_F_RDONLY_PROG,
            unit: self.unit,
        };
        if found == *self {
            Ok(())
        } else if found.text() == self.text() {
            Err(DataplaneError::OtherCapacity {
                path: path.to_owned(),
                found: found.max_entries.saturating_mul(self.unit),
                wanted: self.max_entries.saturating_mul(self.unit),
            })
        } else {
            Err(DataplaneError::OtherShape {
                path: path.to_owned(),
                found: found.text(),
                wanted: self.text(),
            })
        }
    }
}

/// Every pinned map. `device_value_bytes`: 8 where device maps can carry a
/// program (Linux 5.8 and later), else 4.
pub fn shapes(capacity: &Capacity, device_value_bytes: u32) -> [Shape; 9] {
    // Segment 0 counts frames of no segment.
    let counters = (capacity.segments + 1) * Outcome::SLOTS;
    let targets = capacity.ports + UPLINKS_MAX as u32;
    let mut devices = Shape::new::<u32, u32>("TX_PORTS", DEVMAP_HASH, targets, 0);
    devices.value_bytes = device_value_bytes;
    let buckets = bucket_count(capacity.fdb);
    let mut fdb = Shape::new::<u32, Bucket>("FDB", ARRAY, buckets, BPF_F_MMAPABLE);
    fdb.unit = SLOTS as u32 - 1;
    [
        fdb,
        Shape::new::<u32, Location>("LOCATIONS", ARRAY, capacity.locations, BPF_F_MMAPABLE),
        Shape::new::<u32, Remote>("REMOTES", ARRAY, capacity.remotes, BPF_F_MMAPABLE),
        Shape::new::<PortKey, Port>("PORTS", HASH, capacity.ports, 0),
        Shape::new::<VniKey, Segment>("VNIS", HASH, capacity.segments, 0),
        Shape::new::<PeerKey, u8>("PEERS", HASH, capacity.peers, 0),
        devices,
        Shape::new::<u32, Config>("CONFIG", ARRAY, 1, 0),
        Shape::new::<u32, Counter>("STATS", PERCPU_ARRAY, counters, 0),
    ]
}

/// The directories of one instance.
#[derive(Debug, Clone)]
pub struct Pins {
    instance: PathBuf,
}

impl Pins {
    pub fn new(instance: &Path) -> Result<Self, DataplaneError> {
        let path = instance.to_owned();
        if instance.as_os_str().as_bytes().contains(&b'.') {
            return Err(DataplaneError::BadName { path });
        }
        if !in_bpffs(instance) {
            return Err(DataplaneError::NoBpffs { path });
        }
        Ok(Self { instance: path })
    }

    fn ours() -> String {
        format!("v{LAYOUT_VERSION}")
    }

    pub fn map(&self, name: &str) -> PathBuf {
        self.instance.join(Self::ours()).join("maps").join(name)
    }

    pub fn links(&self) -> PathBuf {
        self.instance.join(Self::ours()).join("links")
    }

    pub fn instance(&self) -> &Path {
        &self.instance
    }

    /// The directories of every layout version that exist.
    pub fn layouts(&self) -> Result<Vec<PathBuf>, DataplaneError> {
        let mut found: Vec<PathBuf> = entries(&self.instance)?
            .into_iter()
            .filter(|path| {
                path.file_name()
                    .and_then(|name| name.to_str()?.strip_prefix('v')?.parse::<u32>().ok())
                    .is_some()
            })
            .collect();
        found.sort();
        Ok(found)
    }

    pub fn create(&self) -> Result<(), DataplaneError> {
        for path in [self.links(), self.map("")] {
            fs::create_dir_all(&path)
                .map_err(|e| DataplaneError::kernel(format!("create {}", path.display()), e))?;
        }
        Ok(())
    }

    /// Nothing of another layout, and every map that lies here is as expected.
    /// Maps may be missing: an earlier start may have died between two.
    pub fn check(&self, shapes: &[Shape]) -> Result<(), DataplaneError> {
        let ours = Self::ours();
        for path in self.layouts()? {
            let found = path.file_name().unwrap_or_default().to_string_lossy();
            if found != ours.as_str() {
                let found = found.into_owned();
                return Err(DataplaneError::OtherLayout { path, found, ours });
            }
        }
        for shape in shapes {
            let path = self.map(shape.name);
            let pinned = match sys::open_pin(&path) {
                Ok(fd) => fd,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => {
                    return Err(DataplaneError::kernel(
                        format!("open {}", path.display()),
                        e,
                    ));
                }
            };
            if sys::kind(pinned.as_fd()) != Kind::Map {
                return Err(DataplaneError::OtherShape {
                    path,
                    found: "no map".to_owned(),
                    wanted: shape.text(),
                });
            }
            shape.check(&path, &read_info(&path, pinned.as_fd())?)?;
        }
        Ok(())
    }
}

/// After loading: the object's own idea of the map must be ours.
pub fn check_loaded(shape: &Shape, map: BorrowedFd<'_>) -> Result<(), DataplaneError> {
    let path = Path::new(shape.name);
    shape
        .check(path, &read_info(path, map)?)
        .map_err(|error| match error {
            DataplaneError::OtherShape { found, wanted, .. } => DataplaneError::OtherObject {
                what: format!("map {}: {found}; expected {wanted}", shape.name),
            },
            other => other,
        })
}

fn read_info(path: &Path, map: BorrowedFd<'_>) -> Result<MapInfo, DataplaneError> {
    sys::map_info(map)
        .map_err(|e| DataplaneError::kernel(format!("read the shape of {}", path.display()), e))
}

/// Paths in a directory; none where it does not exist.
pub fn entries(directory: &Path) -> Result<Vec<PathBuf>, DataplaneError> {
    let failed = |e| DataplaneError::kernel(format!("list {}", directory.display()), e);
    match fs::read_dir(directory) {
        Ok(list) => list
            .map(|entry| Ok(entry?.path()))
            .collect::<io::Result<_>>()
            .map_err(failed),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(failed(e)),
    }
}

/// Whether the nearest directory that exists lies in a BPF file system.
fn in_bpffs(path: &Path) -> bool {
    let Some(existing) = path.ancestors().find(|p| p.is_dir()) else {
        return false;
    };
    let Ok(c_path) = std::ffi::CString::new(existing.as_os_str().as_bytes()) else {
        return false;
    };
    let mut stat = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: a C string and a structure to fill in.
    let status = unsafe { libc::statfs(c_path.as_ptr(), stat.as_mut_ptr()) };
    // SAFETY: filled in where the call succeeded.
    status == 0 && unsafe { stat.assume_init() }.f_type as u32 == BPF_FS_MAGIC as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn map_names_fit_the_kernel_and_are_unique() {
        let shapes = shapes(&Capacity::default(), 8);
        for (i, shape) in shapes.iter().enumerate() {
            assert!(shape.name.len() <= 15, "{}", shape.name);
            assert!(shapes[..i].iter().all(|other| other.name != shape.name));
        }
    }

    #[test]
    fn every_segment_number_has_counters() {
        let capacity = Capacity::default();
        let [.., stats] = shapes(&capacity, 8);
        let last = vtep_common::layout::stats_index(
            capacity.segments as u16,
            *Outcome::ALL.last().unwrap(),
        );
        assert_eq!(stats.name, "STATS");
        assert!(last < stats.max_entries);
    }

    #[test]
    fn dots_and_plain_directories_are_refused_with_the_remedy() {
        let error = Pins::new(Path::new("/sys/fs/bpf/vtep/a.b")).unwrap_err();
        assert!(error.to_string().contains("dots"), "{error}");
        let error = Pins::new(Path::new("/proc/vtep")).unwrap_err();
        assert!(error.to_string().contains("--netns"), "{error}");
    }
}
