//! The only place that names aya. Loads the programs, keeps maps and links
//! pinned so that they outlive this process, writes `TableUpdate`s, reads
//! everything back as `Tables`, reads counters. Decides nothing; `controller`
//! calls it, and makes sure that an instance has one caller.

mod counters;
mod error;
mod fdb;
mod hooks;
mod log;
mod mmap;
mod pins;
mod rtnl;
mod sys;
mod unload;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use aya::maps::xdp::DevMapHash;
use aya::maps::{Array, HashMap as HashMapOf, Map, MapData, MapError};
use aya::{Ebpf, EbpfLoader, Pod};
use vtep_common::fdb::Value;
use vtep_common::layout::{
    Config, FdbKey, Location, PeerKey, Place, Port, PortKey, Remote, Segment, SegmentId, VniKey,
};

pub use self::counters::SegmentCounters;
pub use self::error::DataplaneError;
pub use self::log::{LogLevel, ProgramLog};
pub use self::unload::Unloaded;

use self::counters::Counters;
use self::fdb::Fdb;
use self::hooks::{Hooks, Programs};
use self::mmap::MmapArray;
use self::pins::{Pins, Shape};
use crate::kernel::IfIndex;
use crate::tables::{Capacity, Hook, Program, Refused, TableUpdate, Tables};

/// A program as it is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramStatus {
    pub name: String,
    /// Kernel id, as `bpftool prog show` lists it.
    pub id: u32,
    /// Hash of the instructions, hexadecimal: the same for the same build.
    pub tag: String,
}

/// A program on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HookStatus {
    pub program: Program,
    pub hook: Hook,
    pub program_id: u32,
    pub link_id: u32,
}

/// The data path of one instance. Dropping it closes descriptors only: programs
/// keep running, maps keep their content.
pub struct Dataplane {
    fdb: Fdb,
    locations: MmapArray<Location>,
    remotes: MmapArray<Remote>,
    ports: HashMapOf<MapData, PortKey, Port>,
    segments: HashMapOf<MapData, VniKey, Segment>,
    peers: HashMapOf<MapData, PeerKey, u8>,
    targets: DevMapHash<MapData>,
    /// Identifies this instance in the metadata of frames: the id of a map,
    /// which no other has and which outlives this process.
    cookie: u32,
    config: Array<MapData, Config>,
    counters: Counters,
    hooks: Hooks,
    capacity: Capacity,
    log: Option<ProgramLog>,
}

impl Dataplane {
    /// Load `object` (aligned to 4 bytes) and take over what is pinned under
    /// `pins` (`/sys/fs/bpf/vtep/NAME`): maps keep their content, and the links'
    /// programs are replaced in place. All programs are loaded before the first
    /// link is touched. Returns what maps and hooks hold.
    ///
    /// Call it in the network namespace of the devices.
    pub fn open(
        object: &[u8],
        pins: &Path,
        capacity: Capacity,
        log: LogLevel,
    ) -> Result<(Self, Tables), DataplaneError> {
        let pins = Pins::new(pins)?;
        let device_value_bytes = if aya::features().devmap_prog_id() {
            8
        } else {
            4
        };
        let shapes = pins::shapes(&capacity, device_value_bytes);
        pins.check(&shapes)?;
        pins.create()?;

        let mut ebpf = load(object, &pins, &shapes, log)?;
        let log = match log {
            LogLevel::Off => None,
            _ => ProgramLog::take(&mut ebpf)?,
        };
        let programs = Programs {
            ingress: load_program(&mut ebpf, hooks::INGRESS)?,
            egress: load_program(&mut ebpf, hooks::EGRESS)?,
            port: load_program(&mut ebpf, hooks::PORT)?,
            uplink: load_program(&mut ebpf, hooks::UPLINK)?,
        };

        let fdb = take(&mut ebpf, "FDB")?;
        let locations = take(&mut ebpf, "LOCATIONS")?;
        let remotes = take(&mut ebpf, "REMOTES")?;
        let cookie = sys::map_info(array_fd("FDB", &fdb)?)
            .map_err(|e| DataplaneError::kernel("read the id of map FDB", e))?
            .id;
        let mut this = Self {
            fdb: Fdb::new(array_fd("FDB", &fdb)?, capacity.fdb)?,
            locations: map_memory("LOCATIONS", &locations, capacity.locations)?,
            remotes: map_memory("REMOTES", &remotes, capacity.remotes)?,
            ports: typed(take(&mut ebpf, "PORTS")?)?,
            segments: typed(take(&mut ebpf, "VNIS")?)?,
            peers: typed(take(&mut ebpf, "PEERS")?)?,
            targets: typed(take(&mut ebpf, "TX_PORTS")?)?,
            cookie,
            config: typed(take(&mut ebpf, "CONFIG")?)?,
            counters: Counters::new(take(&mut ebpf, "STATS")?, capacity.segments)?,
            hooks: Hooks::adopt(pins.links(), programs)?,
            capacity,
            log,
        };
        let tables = this.read()?;
        let numbers = tables.segments.values().map(|segment| segment.id);
        for number in numbers.chain(tables.ports.values().map(|port| port.segment)) {
            this.counters.note(number);
        }
        Ok((this, tables))
    }

    /// Detach and unpin everything under `pins`, of any layout version, whether
    /// or not a daemon runs. Nothing there is no error.
    pub fn unload(pins: &Path) -> Result<Unloaded, DataplaneError> {
        unload::unload(pins)
    }

    /// The programs' log lines, once, if a level was asked for.
    pub fn take_log(&mut self) -> Option<ProgramLog> {
        self.log.take()
    }

    /// Write the updates in their order. One that is refused does not stop the
    /// others. Removing what is not there is no error.
    pub fn apply(&mut self, updates: &[TableUpdate]) -> Vec<Refused> {
        let mut refused = Vec::new();
        for update in updates {
            if let Err(reason) = self.apply_one(update) {
                refused.push(Refused {
                    update: update.clone(),
                    reason,
                });
            }
        }
        refused
    }

    fn apply_one(&mut self, update: &TableUpdate) -> Result<(), String> {
        let capacity = self.capacity;
        match update {
            TableUpdate::Config(value) => {
                let value = Config {
                    fdb_mask: self.fdb.mask(),
                    cookie: self.cookie,
                    ..*value
                };
                self.config
                    .set(0, value, 0)
                    .map_err(|e| refusal("CONFIG", 1, &e))
            }
            TableUpdate::Remote { slot, value } => stored(
                self.remotes.store(*slot, value),
                "REMOTES",
                *slot,
                capacity.remotes,
            ),
            TableUpdate::Location { index, value } => stored(
                *index != Location::NONE && self.locations.store(*index, value),
                "LOCATIONS",
                *index,
                capacity.locations,
            ),
            TableUpdate::TargetAdd(ifindex) => self
                .targets
                .insert(*ifindex, *ifindex, None, 0)
                .map_err(|e| target_refusal(&e)),
            TableUpdate::TargetDel(ifindex) => removed("TX_PORTS", self.targets.remove(*ifindex)),
            TableUpdate::Segment { key, value } => {
                self.counters_exist(value.id)?;
                self.segments
                    .insert(key, value, 0)
                    .map_err(|e| refusal("VNIS", capacity.segments, &e))?;
                self.counters.note(value.id);
                Ok(())
            }
            TableUpdate::SegmentDel(key) => removed("VNIS", self.segments.remove(key)),
            TableUpdate::Peer(key) => self
                .peers
                .insert(key, 0, 0)
                .map_err(|e| refusal("PEERS", capacity.peers, &e)),
            TableUpdate::PeerDel(key) => removed("PEERS", self.peers.remove(key)),
            TableUpdate::Port { key, value } => {
                self.counters_exist(value.segment)?;
                self.ports
                    .insert(key, value, 0)
                    .map_err(|e| refusal("PORTS", capacity.ports, &e))?;
                self.counters.note(value.segment);
                Ok(())
            }
            TableUpdate::PortDel(key) => removed("PORTS", self.ports.remove(key)),
            TableUpdate::Fdb { key, value } => self.fdb.set(*key, *value),
            TableUpdate::FdbDel(key) => {
                self.fdb.remove(*key);
                Ok(())
            }
            TableUpdate::Attach {
                ifindex,
                program,
                hook,
            } => self.hooks.attach(*ifindex, *program, *hook),
            TableUpdate::Detach(ifindex) => self.hooks.detach(*ifindex),
        }
    }

    /// R42: a frame of a segment without counters would not be counted.
    fn counters_exist(&self, segment: SegmentId) -> Result<(), String> {
        if u32::from(segment) <= self.capacity.segments {
            Ok(())
        } else {
            Err(format!(
                "segment number {segment} is beyond the {} configured segments",
                self.capacity.segments
            ))
        }
    }

    /// Everything, from the kernel.
    pub fn read(&self) -> Result<Tables, DataplaneError> {
        let config: Config = self
            .config
            .get(&0, 0)
            .map_err(|e| map_error("read CONFIG", e))?;
        let unused = Location::new(Place::Kernel, 0);
        Ok(Tables {
            // A fresh map is all zero; a written one never is (`Config::EMPTY`).
            config: (config.uplink_macs[0] != 0).then_some(Config {
                // Ours alone, see `apply_one`.
                fdb_mask: 0,
                cookie: 0,
                ..config
            }),
            remotes: (0..self.remotes.entries())
                .filter_map(|slot| Some((slot, self.remotes.load(slot)?)))
                .filter(|(_, remote)| remote.ifindex != 0)
                .collect(),
            locations: (0..self.locations.entries())
                .filter_map(|index| Some((index, self.locations.load(index)?)))
                .filter(|(_, location)| *location != unused)
                .collect(),
            targets: self
                .targets
                .keys()
                .collect::<Result<_, _>>()
                .map_err(|e| map_error("read TX_PORTS", e))?,
            segments: entries("VNIS", &self.segments)?,
            peers: entries("PEERS", &self.peers)?.into_keys().collect(),
            ports: self.read_ports()?,
            fdb: self.fdb.iter().collect(),
            hooks: self
                .hooks()
                .into_iter()
                .map(|(ifindex, hook)| (ifindex, (hook.program, hook.hook)))
                .collect(),
        })
    }

    /// All FDB entries, with the epochs in which they last carried traffic.
    pub fn fdb(&self) -> impl Iterator<Item = (FdbKey, Value)> + '_ {
        self.fdb.iter()
    }

    /// All ports, with the epochs in which their first MAC last sent.
    pub fn read_ports(&self) -> Result<BTreeMap<PortKey, Port>, DataplaneError> {
        entries("PORTS", &self.ports)
    }

    /// Frames and bytes since the maps were made, summed over the CPUs; indexed
    /// by segment number, 0 for frames of no segment.
    pub fn stats(&self) -> Result<Vec<SegmentCounters>, DataplaneError> {
        self.counters.read()
    }

    /// The programs this process loaded.
    pub fn programs(&self) -> Result<Vec<ProgramStatus>, DataplaneError> {
        let programs = self.hooks.programs().all().into_iter();
        programs
            .map(|fd| {
                let info = sys::program_info(fd.as_fd())
                    .map_err(|e| DataplaneError::kernel("read the program's facts", e))?;
                Ok(ProgramStatus {
                    name: info.name(),
                    id: info.id,
                    tag: format!("{:016x}", u64::from_be_bytes(info.tag)),
                })
            })
            .collect()
    }

    /// What runs where, as the kernel has it now.
    pub fn hooks(&self) -> BTreeMap<IfIndex, HookStatus> {
        self.hooks.status()
    }

    /// Whether ports can have the tcx hook (Linux 6.6).
    pub fn has_tcx() -> bool {
        sys::has_tcx()
    }

    /// A tc program or filter of somebody else on the device, in words (R41).
    /// Looked at when a program is attached; later ones have to be asked for.
    pub fn foreign_tc(&self, ifindex: IfIndex) -> Result<Option<String>, DataplaneError> {
        self.hooks
            .foreign_tc(ifindex)
            .map_err(|e| DataplaneError::kernel(format!("read the tc hooks of {ifindex}"), e))
    }
}

fn load(
    object: &[u8],
    pins: &Pins,
    shapes: &[Shape],
    log: LogLevel,
) -> Result<Ebpf, DataplaneError> {
    let level = log as u8;
    let mut loader = EbpfLoader::new();
    loader.override_global(aya_log::LEVEL, &level, false);
    if log == LogLevel::Off {
        // Referred to by the programs, never written: the smallest there is.
        loader.map_max_entries(self::log::MAP, 1);
    }
    for shape in shapes {
        loader.map_max_entries(shape.name, shape.max_entries);
        loader.map_pin_path(shape.name, pins.map(shape.name));
    }
    let ebpf = loader.load(object).map_err(|e| DataplaneError::load(&e))?;
    for shape in shapes {
        let map = match ebpf.map(shape.name) {
            Some(
                Map::Array(map) | Map::HashMap(map) | Map::PerCpuArray(map) | Map::DevMapHash(map),
            ) => map,
            _ => {
                return Err(DataplaneError::OtherObject {
                    what: format!("no usable map {}", shape.name),
                });
            }
        };
        pins::check_loaded(shape, map.fd().as_fd())?;
    }
    Ok(ebpf)
}

/// Through the verifier. The descriptor is ours: aya's program, which detaches
/// what it attached when it is dropped, is not used for attaching.
fn load_program(ebpf: &mut Ebpf, name: &str) -> Result<OwnedFd, DataplaneError> {
    let fd = match ebpf.program_mut(name) {
        Some(aya::programs::Program::Xdp(program)) => program.load().and_then(|()| program.fd()),
        Some(aya::programs::Program::SchedClassifier(program)) => {
            program.load().and_then(|()| program.fd())
        }
        _ => {
            return Err(DataplaneError::OtherObject {
                what: format!("no program {name}"),
            });
        }
    };
    fd.map_err(|e| DataplaneError::load(&e))?
        .as_fd()
        .try_clone_to_owned()
        .map_err(|e| DataplaneError::kernel("keep the program", e))
}

fn take(ebpf: &mut Ebpf, name: &str) -> Result<Map, DataplaneError> {
    ebpf.take_map(name)
        .ok_or_else(|| DataplaneError::OtherObject {
            what: format!("no map {name}"),
        })
}

fn typed<T: TryFrom<Map, Error = MapError>>(map: Map) -> Result<T, DataplaneError> {
    T::try_from(map).map_err(|e| DataplaneError::OtherObject {
        what: e.to_string(),
    })
}

/// aya's typed maps do not show theirs.
fn clone_fd(map: &Map) -> Result<OwnedFd, DataplaneError> {
    let Map::PerCpuArray(map) = map else {
        return Err(DataplaneError::OtherObject {
            what: "a map of another type".to_owned(),
        });
    };
    map.fd()
        .as_fd()
        .try_clone_to_owned()
        .map_err(|e| DataplaneError::kernel("keep a map", e))
}

fn array_fd<'a>(name: &str, map: &'a Map) -> Result<BorrowedFd<'a>, DataplaneError> {
    match map {
        Map::Array(map) => Ok(map.fd().as_fd()),
        _ => Err(DataplaneError::OtherObject {
            what: format!("map {name} is no array"),
        }),
    }
}

fn map_memory<T: Pod>(name: &str, map: &Map, entries: u32) -> Result<MmapArray<T>, DataplaneError> {
    MmapArray::new(array_fd(name, map)?, entries)
        .map_err(|e| DataplaneError::kernel(format!("map {name} into memory"), e))
}

fn entries<K: Pod + Ord, V: Pod>(
    name: &str,
    map: &HashMapOf<MapData, K, V>,
) -> Result<BTreeMap<K, V>, DataplaneError> {
    map.iter()
        .collect::<Result<_, _>>()
        .map_err(|e| map_error(&format!("read {name}"), e))
}

/// The error of the system call inside, where there is one.
fn errno(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let mut cause = Some(error);
    while let Some(inner) = cause {
        if let Some(call) = inner.downcast_ref::<aya::sys::SyscallError>() {
            return call.io_error.raw_os_error();
        }
        if let Some(io) = inner.downcast_ref::<io::Error>() {
            return io.raw_os_error();
        }
        cause = inner.source();
    }
    None
}

fn map_error(what: &str, error: MapError) -> DataplaneError {
    let source = errno(&error).map_or_else(
        || io::Error::other(error.to_string()),
        io::Error::from_raw_os_error,
    );
    DataplaneError::kernel(what, source)
}

/// Why an element was not written.
fn refusal(map: &str, capacity: u32, error: &(dyn std::error::Error + 'static)) -> String {
    match errno(error) {
        Some(code) => errno_refusal(map, capacity, &io::Error::from_raw_os_error(code)),
        None => format!("{map}: {error}"),
    }
}

fn errno_refusal(map: &str, capacity: u32, error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::E2BIG) => format!("{map} is full ({capacity} entries)"),
        _ => format!("{map}: {error}"),
    }
}

fn target_refusal(error: &(dyn std::error::Error + 'static)) -> String {
    match errno(error) {
        Some(libc::EINVAL | libc::ENODEV) => "no such device".to_owned(),
        Some(libc::E2BIG | libc::ENOSPC) => "TX_PORTS is full".to_owned(),
        _ => format!("TX_PORTS: {error}"),
    }
}

fn removed(map: &str, result: Result<(), MapError>) -> Result<(), String> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(e) if errno(&e) == Some(libc::ENOENT) => Ok(()),
        Err(e) => Err(format!("{map}: {e}")),
        Ok(()) => Ok(()),
    }
}

fn stored(stored: bool, map: &str, index: u32, capacity: u32) -> Result<(), String> {
    if stored {
        Ok(())
    } else {
        Err(format!(
            "{map} has no usable element {index} (of {capacity})"
        ))
    }
}
