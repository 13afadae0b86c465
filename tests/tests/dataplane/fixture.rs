//! A network namespace and a pin directory for one test, and the ways to look
//! at the kernel that do not go through the code under test.

use std::ffi::CString;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use vtep_common::fdb::Value;
use vtep_common::layout::{
    Config, FdbKey, LAYOUT_VERSION, Location, PeerKey, Place, Port, PortKey, Remote, Segment, Via,
    VniKey, address_v4, vni_word,
};
use vtep_common::{MacAddr, Vni};
use vtep_user::dataplane::{Dataplane, LogLevel};
use vtep_user::tables::{Capacity, Hook, Program, TableUpdate, Tables, XdpMode};

pub const CAPACITY: Capacity = Capacity {
    fdb: 1000,
    locations: 100,
    remotes: 10,
    segments: 5,
    peers: 8,
    ports: 6,
};

pub fn object() -> Vec<u8> {
    let default =
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/ebpf/bpfel-unknown-none/release");
    let path = std::env::var_os("VTEP_EBPF_DIR")
        .map_or_else(default, PathBuf::from)
        .join("vtep");
    std::fs::read(path).expect("the eBPF object: run `cargo xtask build` first")
}

/// Output of a command that must succeed, run in this thread's namespace.
pub fn run(command: &str) -> String {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap())
        .args(words)
        .output()
        .expect("command runs");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

pub fn ip(args: &str) -> String {
    run(&format!("ip {args}"))
}

pub fn ifindex(name: &str) -> u32 {
    let name = CString::new(name).unwrap();
    // SAFETY: a valid C string.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    assert_ne!(index, 0, "device exists");
    index
}

/// Id and mode ("xdp", "xdpgeneric") of the XDP program on a device, as `ip` shows it.
pub fn xdp(device: &str) -> Option<(u32, String)> {
    let links: serde_json::Value =
        serde_json::from_str(&ip(&format!("-j -d link show dev {device}"))).unwrap();
    let xdp = &links[0]["xdp"];
    let id = xdp["prog"]["id"].as_u64()?;
    let mode = match xdp["mode"].as_u64().unwrap() {
        1 => "xdp",
        2 => "xdpgeneric",
        other => panic!("mode {other}"),
    };
    Some((id as u32, mode.to_owned()))
}

pub fn bpftool_has(kind: &str, id: u32) -> bool {
    Command::new("bpftool")
        .args([kind, "show", "id", &id.to_string()])
        .output()
        .expect("bpftool runs")
        .status
        .success()
}

/// Ids of the maps pinned in a directory.
pub fn pinned_map_ids(directory: &Path) -> Vec<u32> {
    let mut ids: Vec<u32> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let text = run(&format!("bpftool -j map show pinned {}", path.display()));
            let map: serde_json::Value = serde_json::from_str(&text).unwrap();
            map["id"].as_u64().unwrap() as u32
        })
        .collect();
    ids.sort();
    ids
}

/// Until `condition` holds.
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Run `body` in a thread with a new network namespace.
pub fn in_namespace<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let joined = scope
            .spawn(|| {
                // SAFETY: affects this thread only.
                let status = unsafe { libc::unshare(libc::CLONE_NEWNET) };
                let error = std::io::Error::last_os_error();
                assert_eq!(status, 0, "unshare needs root: {error}");
                // Nothing but the test's own frames may reach the counters.
                std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
                body()
            })
            .join();
        joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A namespace with veth pairs `port0`/`peer0` and `port1`/`peer1`.
pub struct World {
    pub pins: PathBuf,
    pub ports: [u32; 2],
}

impl World {
    pub fn run(name: &str, test: impl FnOnce(&World) + Send) {
        in_namespace(|| {
            mount_bpffs();
            for i in 0..2 {
                ip(&format!("link add port{i} type veth peer name peer{i}"));
                ip(&format!("link set port{i} up"));
                ip(&format!("link set peer{i} up"));
            }
            let world = World {
                pins: PathBuf::from(format!("/sys/fs/bpf/dp-{}-{name}", std::process::id())),
                ports: [ifindex("port0"), ifindex("port1")],
            };
            test(&world);
        });
    }

    pub fn layout(&self) -> PathBuf {
        self.pins.join(format!("v{LAYOUT_VERSION}"))
    }

    pub fn maps(&self) -> PathBuf {
        self.layout().join("maps")
    }

    pub fn links(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(self.layout().join("links"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    pub fn open(&self) -> (Dataplane, Tables) {
        Dataplane::open(&object(), &self.pins, CAPACITY, LogLevel::Off).expect("opens")
    }

    pub fn open_error(&self, capacity: Capacity) -> String {
        match Dataplane::open(&object(), &self.pins, capacity, LogLevel::Off) {
            Ok(_) => panic!("opened"),
            Err(error) => error.to_string(),
        }
    }

    pub fn attach(&self, port: usize, program: Program) -> TableUpdate {
        TableUpdate::Attach {
            ifindex: self.ports[port],
            program,
            hook: Hook::Xdp(XdpMode::Native),
        }
    }

    /// Every kind of update that adds something.
    pub fn updates(&self) -> Vec<TableUpdate> {
        let vni = Vni::new(100).unwrap();
        let [port0, port1] = self.ports;
        let mut config = Config::EMPTY;
        config.uplink_macs[0] = MacAddr([2, 0, 0, 0, 0, 0xaa]).to_bits();
        config.epoch = 7;
        let mut remote = Remote::EMPTY;
        remote.ifindex = port0;
        remote.port_min = 49152;
        remote.header = std::array::from_fn(|i| i as u8);
        let keys = [key(1), key(2)];
        let mut updates = vec![
            TableUpdate::Config(config),
            TableUpdate::Remote {
                slot: 9,
                value: remote,
            },
            TableUpdate::Location {
                index: 1,
                value: Location::new(Place::Remote(9), 3),
            },
            TableUpdate::Location {
                index: 99,
                value: Location::new(Place::Port(port1, Via::Xdp), 4),
            },
            TableUpdate::TargetAdd(port0),
            TableUpdate::TargetAdd(port1),
            TableUpdate::Segment {
                key: VniKey::v4(vni, 4789),
                value: Segment {
                    local: address_v4([192, 0, 2, 1]),
                    id: 5,
                    flags: 0,
                    local_max_bytes: 1514,
                    pad: [0; 2],
                },
            },
            TableUpdate::Port {
                key: PortKey::new(port1, 0),
                value: Port {
                    first_key: keys[0].word(),
                    vni_word: vni_word(vni),
                    segment: 5,
                    tunnel_max_bytes: 1464,
                    local_max_bytes: 1514,
                    pad: [0; 5],
                    epoch: 0,
                },
            },
        ];
        updates.extend(keys.map(|key| TableUpdate::Fdb {
            key,
            value: Value::new(1, Value::OWNER_API, 6),
        }));
        updates.extend([peer(1), peer(2)].map(TableUpdate::Peer));
        updates.push(self.attach(0, Program::Ingress));
        updates.push(self.attach(1, Program::Egress));
        updates
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Err(error) = Dataplane::unload(&self.pins) {
            eprintln!("left behind: {error}");
        }
    }
}

fn mount_bpffs() {
    static MOUNT: std::sync::Once = std::sync::Once::new();
    MOUNT.call_once(|| {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        if !mounts
            .lines()
            .any(|line| line.starts_with("bpf ") || line.contains(" /sys/fs/bpf bpf "))
        {
            run("mount -t bpf bpf /sys/fs/bpf");
        }
    });
}

pub fn key(i: u32) -> FdbKey {
    let [_, a, b, c] = i.to_be_bytes();
    FdbKey::new(5, MacAddr([2, 0, 0, a, b, c]))
}

pub fn peer(host: u8) -> PeerKey {
    PeerKey {
        address: address_v4([198, 51, 100, host]),
        segment: 5,
        pad: [0; 2],
    }
}

pub fn entries(count: u32, location: u32) -> Vec<TableUpdate> {
    (0..count)
        .map(|i| TableUpdate::Fdb {
            key: key(i),
            value: Value::new(location, 0, 1),
        })
        .collect()
}

/// What the tables are after `updates` were applied to empty ones.
pub fn expected(updates: &[TableUpdate]) -> Tables {
    let mut tables = Tables::default();
    for update in updates.iter().cloned() {
        match update {
            TableUpdate::Config(value) => tables.config = Some(value),
            TableUpdate::Remote { slot, value } => drop(tables.remotes.insert(slot, value)),
            TableUpdate::Location { index, value } => drop(tables.locations.insert(index, value)),
            TableUpdate::TargetAdd(ifindex) => tables.targets.push(ifindex),
            TableUpdate::TargetDel(ifindex) => tables.targets.retain(|t| *t != ifindex),
            TableUpdate::Segment { key, value } => drop(tables.segments.insert(key, value)),
            TableUpdate::SegmentDel(key) => drop(tables.segments.remove(&key)),
            TableUpdate::Peer(key) => drop(tables.peers.insert(key)),
            TableUpdate::PeerDel(key) => drop(tables.peers.remove(&key)),
            TableUpdate::Port { key, value } => drop(tables.ports.insert(key, value)),
            TableUpdate::PortDel(key) => drop(tables.ports.remove(&key)),
            TableUpdate::Fdb { key, value } => drop(tables.fdb.insert(key, value)),
            TableUpdate::FdbDel(key) => drop(tables.fdb.remove(&key)),
            TableUpdate::Attach {
                ifindex,
                program,
                hook,
            } => drop(tables.hooks.insert(ifindex, (program, hook))),
            TableUpdate::Detach(ifindex) => drop(tables.hooks.remove(&ifindex)),
        }
    }
    sorted(tables)
}

pub fn sorted(mut tables: Tables) -> Tables {
    tables.targets.sort();
    tables
}

/// A process of its own that ends only by being killed.
pub struct Child {
    pid: libc::pid_t,
    ready: UnixStream,
}

impl Child {
    /// `body` runs in the child, in this thread's namespace; then it sleeps.
    pub fn spawn(body: impl FnOnce()) -> Self {
        // Initialised before the fork: another thread may hold its lock.
        aya::features();
        let (ready, mut child_end) = UnixStream::pair().unwrap();
        // SAFETY: the child runs Rust code after fork; malloc is prepared for that by the C
        // library, and no other lock is shared with other threads.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0);
        if pid == 0 {
            // A failing test must not leave it behind.
            // SAFETY: plain system call.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).is_ok();
            let _ = child_end.write_all(&[u8::from(done)]);
            loop {
                // SAFETY: sleeps until the signal.
                unsafe { libc::pause() };
            }
        }
        Self { pid, ready }
    }

    pub fn wait_until_done(&mut self) {
        let mut done = [0];
        self.ready.read_exact(&mut done).unwrap();
        assert_eq!(done, [1], "the child panicked");
    }

    /// SIGKILL, and gone when this returns.
    pub fn kill(self) {
        // SAFETY: our own child, not waited for yet.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), 0);
        }
    }
}

/// Sends raw frames out of a device.
pub struct Sender {
    socket: OwnedFd,
    address: libc::sockaddr_ll,
}

impl Sender {
    pub fn new(device: &str) -> Self {
        // SAFETY: plain system call.
        let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) };
        assert!(socket >= 0);
        // SAFETY: integers and bytes only.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = ifindex(device) as i32;
        Self {
            // SAFETY: a new descriptor.
            socket: unsafe { OwnedFd::from_raw_fd(socket) },
            address,
        }
    }

    pub fn send(&self, frame: &[u8]) -> bool {
        // SAFETY: reads frame and address only.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                std::ptr::from_ref(&self.address).cast(),
                size_of_val(&self.address) as u32,
            )
        };
        sent == frame.len() as isize
    }
}

/// A program that passes every frame on, of the type given.
fn pass_program(kind: u32) -> OwnedFd {
    // r0 = 2 (XDP_PASS); exit. As a tc verdict 2 is TC_ACT_SHOT: no frame is sent through it.
    let instructions = [[0xb7u8, 0, 0, 0, 2, 0, 0, 0], [0x95, 0, 0, 0, 0, 0, 0, 0]];
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log: [u32; 4],
    }
    let mut attr = Load {
        kind,
        count: 2,
        instructions: instructions.as_ptr().expose_provenance() as u64,
        license: c"GPL".as_ptr().expose_provenance() as u64,
        log: [0; 4],
    };
    bpf(5, &mut attr)
}

fn bpf<T>(command: libc::c_long, attr: &mut T) -> OwnedFd {
    // SAFETY: attr is the command's structure, its addresses are valid; returns a descriptor.
    unsafe {
        let fd = libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attr),
            size_of::<T>(),
        );
        assert!(
            fd >= 0,
            "bpf {command}: {}",
            std::io::Error::last_os_error()
        );
        OwnedFd::from_raw_fd(fd as i32)
    }
}

/// Somebody else's program on a device, as long as it is held.
pub fn foreign_link(ifindex: u32, program_kind: u32, attach_type: u32) -> OwnedFd {
    let program = pass_program(program_kind);
    let mut attr = [
        program.as_raw_fd() as u32,
        ifindex,
        attach_type,
        0,
        0,
        0,
        0,
        0,
    ];
    bpf(28, &mut attr)
}

/// Program and attach types (bpf.h).
pub const XDP: (u32, u32) = (6, 37);
pub const TCX_INGRESS: (u32, u32) = (3, 46);

/// VXLAN to 192.0.2.1, from 192.0.2.1.
pub fn frame_from_ourselves() -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 0xaa, 2, 0, 0, 0, 0, 0xbb, 8, 0];
    let mut ip = [0u8; 20];
    ip[0] = 0x45;
    ip[3] = 20 + 8 + 8 + 60;
    ip[6] = 0x40;
    ip[8] = 64;
    ip[9] = 17;
    ip[12..16].copy_from_slice(&[192, 0, 2, 1]);
    ip[16..20].copy_from_slice(&[192, 0, 2, 1]);
    let sum: u32 = ip
        .chunks(2)
        .map(|c| u32::from(u16::from_be_bytes([c[0], c[1]])))
        .sum();
    let sum = !(((sum & 0xffff) + (sum >> 16)) as u16);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend(ip);
    frame.extend([0xc0, 0, 0x12, 0xb5, 0, 8 + 8 + 60, 0, 0]);
    frame.extend([8, 0, 0, 0, 0, 0, 100, 0]);
    frame.extend([0; 60]);
    frame
}
