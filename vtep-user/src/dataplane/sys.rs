//! The bpf(2) commands that aya keeps to itself: batches, links as plain file
//! descriptors, and facts about pinned objects of any type. Structures follow
//! `union bpf_attr` of include/uapi/linux/bpf.h. Used by `dataplane` only.

use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use aya::Pod;

const OBJ_PIN: u32 = 6;
const OBJ_GET: u32 = 7;
const PROG_GET_FD_BY_ID: u32 = 13;
const MAP_GET_FD_BY_ID: u32 = 14;
const OBJ_GET_INFO_BY_FD: u32 = 15;
const PROG_QUERY: u32 = 16;
const MAP_LOOKUP_BATCH: u32 = 24;
const LINK_CREATE: u32 = 28;
const LINK_UPDATE: u32 = 29;
const LINK_DETACH: u32 = 34;

const ATTACH_XDP: u32 = 37;
const ATTACH_TCX_INGRESS: u32 = 46;
const ATTACH_TCX_EGRESS: u32 = 47;
const LINK_TYPE_XDP: u32 = 6;
const LINK_TYPE_TCX: u32 = 11;

/// `XDP_FLAGS_SKB_MODE` and `XDP_FLAGS_DRV_MODE` (if_link.h).
pub const XDP_GENERIC: u32 = 1 << 1;
pub const XDP_NATIVE: u32 = 1 << 2;

/// Kernel-internal "operation not supported", which leaks to user space.
const ENOTSUPP: i32 = 524;

/// # Safety
///
/// `attr` must be the structure of `command`, and addresses in it must be valid
/// for what the command reads and writes.
unsafe fn bpf<T>(command: u32, attr: &mut T) -> io::Result<i64> {
    // SAFETY: the caller's promise; the size given is that of the structure.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            libc::c_long::from(command),
            std::ptr::from_mut(attr),
            size_of::<T>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// # Safety
///
/// As [`bpf`], and `command` must be one that returns a new file descriptor.
unsafe fn bpf_fd<T>(command: u32, attr: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise.
    unsafe {
        let fd = bpf(command, attr)?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

fn address<T>(slice: &[T]) -> u64 {
    slice.as_ptr().expose_provenance() as u64
}

fn address_mut<T>(slice: &mut [T]) -> u64 {
    slice.as_mut_ptr().expose_provenance() as u64
}

#[repr(C)]
struct PathAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from)
}

/// Give an object a name in bpffs.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = PathAttr {
        path: address(path.as_bytes_with_nul()),
        fd: raw(object),
        flags: 0,
    };
    // SAFETY: structure of the command; the path outlives the call.
    unsafe { bpf(OBJ_PIN, &mut attr) }.map(drop)
}

pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = PathAttr {
        path: address(path.as_bytes_with_nul()),
        fd: 0,
        flags: 0,
    };
    // SAFETY: structure of the command, which returns a descriptor.
    unsafe { bpf_fd(OBJ_GET, &mut attr) }
}

/// What a descriptor of a pinned object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Map,
    Program,
    Link,
    Other,
}

/// From the name that the kernel gives the anonymous inode.
pub fn kind(object: BorrowedFd<'_>) -> Kind {
    let name = std::fs::read_link(format!("/proc/self/fd/{}", object.as_raw_fd()));
    match name.as_deref().ok().and_then(Path::to_str) {
        Some("anon_inode:bpf-map") => Kind::Map,
        Some("anon_inode:bpf-prog") => Kind::Program,
        // The kernel spells it both ways (bpf_link_prime, bpf_link_new_fd).
        Some("anon_inode:bpf_link" | "anon_inode:bpf-link") => Kind::Link,
        _ => Kind::Other,
    }
}

#[repr(C)]
struct InfoAttr {
    fd: u32,
    len: u32,
    info: u64,
}

/// # Safety
///
/// `T` must be a prefix of the information structure of the object's type, made
/// of integers only.
unsafe fn info<T>(object: BorrowedFd<'_>) -> io::Result<T> {
    // SAFETY: `T` is made of integers; the kernel takes addresses in it as
    // buffers, and zero means none.
    let mut info: T = unsafe { MaybeUninit::zeroed().assume_init() };
    let mut attr = InfoAttr {
        fd: raw(object),
        len: size_of::<T>() as u32,
        info: std::ptr::from_mut(&mut info).expose_provenance() as u64,
    };
    // SAFETY: `info` is writable for `len` bytes.
    unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(info)
}

/// Prefix of `struct bpf_map_info`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct MapInfo {
    pub kind: u32,
    pub id: u32,
    pub key_bytes: u32,
    pub value_bytes: u32,
    pub max_entries: u32,
    pub flags: u32,
    name: [u8; 16],
}

impl MapInfo {
    pub fn name(&self) -> String {
        name(&self.name)
    }
}

/// Prefix of `struct bpf_prog_info`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ProgramInfo {
    pub kind: u32,
    pub id: u32,
    pub tag: [u8; 8],
    jited_bytes: u32,
    translated_bytes: u32,
    jited: u64,
    translated: u64,
    load_time_ns: u64,
    uid: u32,
    nr_map_ids: u32,
    map_ids: u64,
    name: [u8; 16],
}

impl ProgramInfo {
    pub fn name(&self) -> String {
        name(&self.name)
    }
}

fn name(bytes: &[u8; 16]) -> String {
    let len = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..len]).into_owned()
}

/// Prefix of `struct bpf_link_info`, XDP member of the union.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct LinkInfo {
    kind: u32,
    pub id: u32,
    pub program_id: u32,
    pad: u32,
    ifindex: u32,
    pad2: u32,
}

impl LinkInfo {
    /// Device of an XDP or tcx link; `None` once the device is gone or detached.
    pub fn ifindex(&self) -> Option<u32> {
        let on_device = matches!(self.kind, LINK_TYPE_XDP | LINK_TYPE_TCX);
        (on_device && self.ifindex != 0).then_some(self.ifindex)
    }
}

pub fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    // SAFETY: prefix of struct bpf_map_info, integers only.
    unsafe { info(map) }
}

pub fn program_info(program: BorrowedFd<'_>) -> io::Result<ProgramInfo> {
    // SAFETY: prefix of struct bpf_prog_info, integers only.
    unsafe { info(program) }
}

pub fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    // SAFETY: prefix of struct bpf_link_info, integers only.
    unsafe { info(link) }
}

#[repr(C)]
struct IdAttr {
    id: u32,
    next_id: u32,
    flags: u32,
}

fn by_id(command: u32, id: u32) -> io::Result<OwnedFd> {
    let mut attr = IdAttr {
        id,
        next_id: 0,
        flags: 0,
    };
    // SAFETY: structure of the commands, which return a descriptor.
    unsafe { bpf_fd(command, &mut attr) }
}

pub fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    by_id(PROG_GET_FD_BY_ID, id)
}

pub fn map_by_id(id: u32) -> io::Result<OwnedFd> {
    by_id(MAP_GET_FD_BY_ID, id)
}

#[repr(C)]
struct LinkCreateAttr {
    program: u32,
    ifindex: u32,
    attach_type: u32,
    flags: u32,
}

/// Attach an XDP program; it stays while the link is open or pinned. Not through
/// aya, which on EINVAL attaches by netlink: nothing that could be pinned.
pub fn link_create_xdp(
    program: BorrowedFd<'_>,
    ifindex: u32,
    xdp_flags: u32,
) -> io::Result<OwnedFd> {
    let mut attr = LinkCreateAttr {
        program: raw(program),
        ifindex,
        attach_type: ATTACH_XDP,
        flags: xdp_flags,
    };
    // SAFETY: structure of the command, which returns a descriptor.
    unsafe { bpf_fd(LINK_CREATE, &mut attr) }
}

/// Attach a program to the tcx ingress hook, behind those that are there.
pub fn link_create_tcx(program: BorrowedFd<'_>, ifindex: u32) -> io::Result<OwnedFd> {
    let mut attr = LinkCreateAttr {
        program: raw(program),
        ifindex,
        attach_type: ATTACH_TCX_INGRESS,
        flags: 0,
    };
    // SAFETY: as above.
    unsafe { bpf_fd(LINK_CREATE, &mut attr) }
}

#[repr(C)]
struct LinkUpdateAttr {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

/// Replace the program of a link; there is no moment without one.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdateAttr {
        link: raw(link),
        program: raw(program),
        flags: 0,
        old_program: 0,
    };
    // SAFETY: structure of the command.
    unsafe { bpf(LINK_UPDATE, &mut attr) }.map(drop)
}

/// Detach now, whoever else holds the link.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = raw(link);
    // SAFETY: the command's structure is one descriptor.
    unsafe { bpf(LINK_DETACH, &mut attr) }.map(drop)
}

/// The two hooks of tcx.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TcHook {
    Ingress,
    Egress,
}

#[repr(C)]
struct QueryAttr {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    program_ids: u64,
    count: u32,
    pad: u32,
    program_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// Programs on a tcx hook; none where the kernel has no tcx.
pub fn tcx_programs(ifindex: u32, hook: TcHook) -> io::Result<Vec<u32>> {
    match query_tcx(ifindex, hook) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => Ok(Vec::new()),
        other => other,
    }
}

/// Whether the kernel has tcx (6.6 and later).
pub fn has_tcx() -> bool {
    // Any device does: where there is no tcx, the hook is an invalid one.
    let loopback = query_tcx(1, TcHook::Ingress);
    !loopback.is_err_and(|e| e.raw_os_error() == Some(libc::EINVAL))
}

fn query_tcx(ifindex: u32, hook: TcHook) -> io::Result<Vec<u32>> {
    let mut ids = [0u32; 64];
    let mut attr = QueryAttr {
        target: ifindex,
        attach_type: match hook {
            TcHook::Ingress => ATTACH_TCX_INGRESS,
            TcHook::Egress => ATTACH_TCX_EGRESS,
        },
        query_flags: 0,
        attach_flags: 0,
        program_ids: address_mut(&mut ids),
        count: ids.len() as u32,
        pad: 0,
        program_attach_flags: 0,
        link_ids: 0,
        link_attach_flags: 0,
        revision: 0,
    };
    // SAFETY: structure of the command; `ids` is writable for `count` numbers.
    let found = match unsafe { bpf(PROG_QUERY, &mut attr) } {
        Ok(_) => attr.count as usize,
        // More programs than asked for.
        Err(e) if e.raw_os_error() == Some(libc::ENOSPC) => ids.len(),
        Err(e) => return Err(e),
    };
    Ok(ids.into_iter().take(found).collect())
}

#[derive(Default)]
#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

/// Elements `start..` of a per-CPU array, one value per possible CPU; as many
/// as fill `values`. False where the kernel has no such batch (before 5.13).
pub fn read_percpu_array<V: Pod>(
    map: BorrowedFd<'_>,
    start: u32,
    cpus: usize,
    values: &mut [V],
) -> io::Result<bool> {
    let count = values.len() / cpus;
    let mut keys = vec![0u32; count];
    let mut cursor = [0u32; 2];
    // The kernel starts behind the key it is given.
    let before = [start.wrapping_sub(1)];
    let mut attr = BatchAttr {
        in_batch: if start == 0 { 0 } else { address(&before) },
        out_batch: address_mut(&mut cursor),
        keys: address_mut(&mut keys),
        values: address_mut(values),
        count: count as u32,
        map: raw(map),
        ..BatchAttr::default()
    };
    // SAFETY: `values` holds `count` elements of one value per CPU, `keys` as many keys.
    match unsafe { bpf(MAP_LOOKUP_BATCH, &mut attr) } {
        Ok(_) => Ok(true),
        // The end of the array was reached.
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | ENOTSUPP)) => Ok(false),
        Err(e) => Err(e),
    }
}
