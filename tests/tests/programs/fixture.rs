//! The eBPF object with a small, fixed world in its maps: one uplink, two
//! ports, one segment (VNI 100) and its remote. Each test runs frames through
//! BPF_PROG_TEST_RUN and looks at verdict, frame and counter.

use std::ffi::CString;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::Command;

use aya::maps::{Array, DevMapHash, HashMap, MapData, PerCpuArray};
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions, Xdp, XdpMode};
use aya::{Ebpf, EbpfLoader};
use vtep_common::fdb::{self, Bucket, Value};
use vtep_common::layout::{
    Config, Counter, FdbKey, Location, Mark, PeerKey, Place, Port, PortKey, REMOTE_UDP_CHECKSUM,
    REMOTE_V6, Remote, SEGMENT_LEARNING, Segment, Via, VniKey, address_v4, stats_index, vni_word,
};
use vtep_common::{MacAddr, Outcome, Vni, checksum};

pub const XDP_DROP: u32 = 1;
pub const XDP_PASS: u32 = 2;
pub const XDP_REDIRECT: u32 = 4;
pub const TC_NEXT: u32 = u32::MAX;
pub const TC_REDIRECT: u32 = 7;

pub const LOCAL: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
pub const REMOTE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
pub const LOCAL_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2);
pub const REMOTE_V6_ADDRESS: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 2);
pub const OTHER_REMOTE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
pub const UPLINK_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xaa]);
pub const ROUTER_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xbb]);
/// First MAC of port 0, another one behind port 0, one behind port 1.
pub const VM0: MacAddr = MacAddr([2, 0, 0, 0, 1, 0]);
pub const VM0B: MacAddr = MacAddr([2, 0, 0, 0, 1, 9]);
pub const VM1: MacAddr = MacAddr([2, 0, 0, 0, 1, 1]);
/// Behind the remote; behind another remote; left to the kernel; nowhere.
pub const FAR: MacAddr = MacAddr([2, 0, 0, 0, 2, 0]);
pub const FAR2: MacAddr = MacAddr([2, 0, 0, 0, 2, 1]);
pub const KERNEL: MacAddr = MacAddr([2, 0, 0, 0, 3, 0]);
pub const BROADCAST: MacAddr = MacAddr([0xff; 6]);
pub const NOWHERE: MacAddr = MacAddr([2, 0, 0, 0, 4, 0]);
pub const VNI: u32 = 100;
pub const SEGMENT: u16 = 7;
pub const MTU: u16 = 1450;
pub const EPOCH: u8 = 5;
/// Size of the table in the tests.
const FDB_BUCKETS: u32 = 64;

pub fn object(name: &str) -> PathBuf {
    let default =
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/ebpf/bpfel-unknown-none/release");
    std::env::var_os("VTEP_EBPF_DIR")
        .map_or_else(default, PathBuf::from)
        .join(name)
}

fn ip(args: &str) {
    let status = Command::new("ip")
        .args(args.split_whitespace())
        .status()
        .expect("ip runs");
    assert!(status.success(), "ip {args}");
}

fn ifindex(name: &str) -> u32 {
    let name = CString::new(name).unwrap();
    // SAFETY: a valid C string.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    assert_ne!(index, 0, "device exists");
    index
}

/// What came of one frame.
#[derive(Debug)]
pub struct Run {
    pub action: u32,
    pub frame: Vec<u8>,
    pub outcome: Outcome,
    pub segment: u16,
    pub bytes: u64,
    /// What XDP left in front of the frame.
    pub mark: Option<Mark>,
}

pub struct World {
    ebpf: Ebpf,
    pub uplink: u32,
    pub ports: [u32; 2],
    before: Vec<Counter>,
}

impl World {
    /// Run `test` in a thread with a network namespace of its own.
    pub fn run(test: impl FnOnce(&mut World) + Send) {
        std::thread::scope(|scope| {
            let joined = scope
                .spawn(|| {
                    // SAFETY: affects this thread only.
                    let status = unsafe { libc::unshare(libc::CLONE_NEWNET) };
                    assert_eq!(
                        status,
                        0,
                        "unshare needs root: {}",
                        std::io::Error::last_os_error()
                    );
                    test(&mut World::new());
                })
                .join();
            if let Err(panic) = joined {
                std::panic::resume_unwind(panic);
            }
        });
    }

    fn new() -> Self {
        // Nothing but the test's own frames may reach the counters.
        std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
        for name in ["uplink", "port0", "port1"] {
            ip(&format!("link add {name} type veth peer name {name}peer"));
            ip(&format!("link set {name} up"));
            ip(&format!("link set {name}peer up"));
        }
        let mut ebpf = EbpfLoader::new()
            .map_max_entries("FDB", FDB_BUCKETS)
            .map_max_entries("STATS", 16 * Outcome::SLOTS)
            .load_file(object("vtep"))
            .expect("object loads: run `cargo xtask build` first");
        let uplink = ifindex("uplink");
        let ports = [ifindex("port0"), ifindex("port1")];
        // TEST_RUN takes an ingress device only when its receive queue is registered, which veth
        // does for an attached program.
        for (program, devices) in [
            ("vtep_ingress", &["uplink"][..]),
            ("vtep_egress", &["port0", "port1"]),
        ] {
            let program: &mut Xdp = ebpf.program_mut(program).unwrap().try_into().unwrap();
            program.load().unwrap_or_else(|e| panic!("verifier: {e:?}"));
            for device in devices {
                program.attach(device, XdpMode::Driver).unwrap();
            }
        }
        for program in ["vtep_port", "vtep_uplink"] {
            let program: &mut SchedClassifier =
                ebpf.program_mut(program).unwrap().try_into().unwrap();
            program.load().unwrap_or_else(|e| panic!("verifier: {e:?}"));
        }
        let mut world = Self {
            ebpf,
            uplink,
            ports,
            before: Vec::new(),
        };
        world.fill();
        world.before = world.counters();
        world
    }

    fn map<T>(&mut self, name: &str) -> T
    where
        T: TryFrom<aya::maps::Map, Error = aya::maps::MapError>,
    {
        use aya::maps::Map;
        let copy = match self.ebpf.map(name).unwrap() {
            Map::HashMap(data) => Map::HashMap(dup(data)),
            Map::Array(data) => Map::Array(dup(data)),
            Map::PerCpuArray(data) => Map::PerCpuArray(dup(data)),
            Map::DevMapHash(data) => Map::DevMapHash(dup(data)),
            other => panic!("{name}: unexpected {other:?}"),
        };
        T::try_from(copy).unwrap()
    }

    pub fn set_config(&mut self, config: Config) {
        self.map::<Array<MapData, Config>>("CONFIG")
            .set(0, config, 0)
            .unwrap();
    }

    pub fn config(&self) -> Config {
        let mut config = Config {
            epoch: EPOCH,
            fdb_mask: FDB_BUCKETS - 1,
            ..Config::EMPTY
        };
        config.uplink_macs[1] = UPLINK_MAC.to_bits();
        config.udp_ports[1] = 4789u16.to_be_bytes();
        config
    }

    pub fn set_fdb(&mut self, mac: MacAddr, location: u32) {
        let key = FdbKey::new(SEGMENT, mac);
        let mut buckets = self.map::<Array<MapData, Bucket>>("FDB");
        // Each key in its second bucket or its first, so that both are proven.
        let at = fdb::buckets(key)[mac.0[5] as usize & 1] & (FDB_BUCKETS - 1);
        let mut bucket = buckets.get(&at, 0).unwrap();
        let slot = bucket
            .keys
            .iter()
            .position(|k| *k == 0)
            .expect("a free slot");
        bucket.keys[slot] = key.word();
        bucket.values[slot] = Value::new(location, 0, EPOCH - 1).0;
        buckets.set(at, bucket, 0).unwrap();
    }

    /// Of every bucket the MAC may stand in.
    pub fn set_fdb_sequence(&mut self, mac: MacAddr, sequence: u32) {
        let mut buckets = self.map::<Array<MapData, Bucket>>("FDB");
        for at in fdb::buckets(FdbKey::new(SEGMENT, mac)) {
            let at = at & (FDB_BUCKETS - 1);
            let bucket = buckets.get(&at, 0).unwrap();
            buckets.set(at, Bucket { sequence, ..bucket }, 0).unwrap();
        }
    }

    pub fn fdb(&mut self, mac: MacAddr) -> Value {
        let key = FdbKey::new(SEGMENT, mac);
        let buckets = self.map::<Array<MapData, Bucket>>("FDB");
        fdb::buckets(key)
            .iter()
            .find_map(|at| {
                let bucket = buckets.get(&(at & (FDB_BUCKETS - 1)), 0).unwrap();
                let slot = bucket.keys.iter().position(|k| *k == key.word())?;
                Some(Value(bucket.values[slot]))
            })
            .expect("the entry is there")
    }

    pub fn set_location(&mut self, index: u32, place: Place) {
        self.map::<Array<MapData, Location>>("LOCATIONS")
            .set(index, Location::new(place, 1), 0)
            .unwrap();
    }

    pub fn set_remote(&mut self, slot: u32, remote: Remote) {
        self.map::<Array<MapData, Remote>>("REMOTES")
            .set(slot, remote, 0)
            .unwrap();
    }

    pub fn set_segment(&mut self, flags: u16) {
        let segment = Segment {
            local: address_v4(LOCAL.octets()),
            id: SEGMENT,
            flags,
            local_max_bytes: MTU + 14,
            pad: [0; 2],
        };
        let v6 = Segment {
            local: LOCAL_V6.octets(),
            ..segment
        };
        let vni = Vni::new(VNI).unwrap();
        let mut segments = self.map::<HashMap<MapData, VniKey, Segment>>("VNIS");
        segments.insert(VniKey::v4(vni, 4789), segment, 0).unwrap();
        segments.insert(VniKey::v6(vni, 4789), v6, 0).unwrap();
    }

    pub fn add_peer(&mut self, address: [u8; 16]) {
        let key = PeerKey {
            address,
            segment: SEGMENT,
            pad: [0; 2],
        };
        self.map::<HashMap<MapData, PeerKey, u8>>("PEERS")
            .insert(key, 0, 0)
            .unwrap();
    }

    pub fn set_port(&mut self, ifindex: u32, first: MacAddr) {
        let port = Port {
            first_key: FdbKey::new(SEGMENT, first).word(),
            vni_word: vni_word(Vni::new(VNI).unwrap()),
            segment: SEGMENT,
            tunnel_max_bytes: MTU + 14,
            local_max_bytes: MTU + 14,
            pad: [0; 5],
            epoch: EPOCH - 1,
        };
        self.map::<HashMap<MapData, PortKey, Port>>("PORTS")
            .insert(PortKey::new(ifindex, 0), port, 0)
            .unwrap();
    }

    pub fn port(&mut self, ifindex: u32) -> Port {
        self.map::<HashMap<MapData, PortKey, Port>>("PORTS")
            .get(&PortKey::new(ifindex, 0), 0)
            .unwrap()
    }

    pub fn remove_target(&mut self, ifindex: u32) {
        self.map::<DevMapHash<MapData>>("TX_PORTS")
            .remove(ifindex)
            .unwrap();
    }

    fn fill(&mut self) {
        let (uplink, ports) = (self.uplink, self.ports);
        self.set_config(self.config());
        let mut targets = self.map::<DevMapHash<MapData>>("TX_PORTS");
        for device in [uplink, ports[0], ports[1]] {
            targets.insert(device, device, None, 0).unwrap();
        }
        self.set_segment(SEGMENT_LEARNING);
        self.set_port(ports[0], VM0);
        self.set_port(ports[1], VM1);
        self.set_remote(3, remote(uplink, REMOTE, REMOTE_UDP_CHECKSUM));
        self.set_remote(4, remote(uplink, OTHER_REMOTE, 0));
        self.set_location(10, Place::Port(ports[0], Via::Xdp));
        self.set_location(11, Place::Port(ports[1], Via::Xdp));
        self.set_location(20, Place::Remote(3));
        self.set_location(21, Place::Remote(4));
        for (mac, location) in [
            (VM0, 10),
            (VM0B, 10),
            (VM1, 11),
            (FAR, 20),
            (FAR2, 21),
            (KERNEL, Location::NONE),
        ] {
            self.set_fdb(mac, location);
        }
    }

    fn counters(&mut self) -> Vec<Counter> {
        let stats = self.map::<PerCpuArray<MapData, Counter>>("STATS");
        (0..16 * Outcome::SLOTS)
            .map(|i| {
                stats
                    .get(&i, 0)
                    .unwrap()
                    .iter()
                    .fold(Counter::default(), |sum, c| Counter {
                        frames: sum.frames + c.frames,
                        bytes: sum.bytes + c.bytes,
                    })
            })
            .collect()
    }

    pub fn ingress(&mut self, frame: &[u8]) -> Run {
        self.test_run("vtep_ingress", self.uplink, frame)
    }

    pub fn egress(&mut self, port: usize, frame: &[u8]) -> Run {
        self.test_run("vtep_egress", self.ports[port], frame)
    }

    /// The tcx program of a port; `gso_size` 0: not a superframe.
    pub fn tcx_egress(&mut self, port: usize, frame: &[u8], gso_size: u32) -> Run {
        // struct __sk_buff (include/uapi/linux/bpf.h).
        let mut ctx = [0u8; 192];
        ctx[36..40].copy_from_slice(&self.ports[port].to_ne_bytes());
        ctx[176..180].copy_from_slice(&gso_size.to_ne_bytes());
        let program: &SchedClassifier = self.ebpf.program("vtep_port").unwrap().try_into().unwrap();
        let mut out = vec![0; frame.len() + 256];
        let result = program.test_run(TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(&ctx),
            ..TestRunOptions::new()
        });
        let result = result.unwrap_or_else(|e| panic!("test_run of {} bytes: {e:?}", frame.len()));
        out.truncate(result.data_size_out as usize);
        self.finish(result.return_value, out, None)
    }

    fn test_run(&mut self, program: &str, ifindex: u32, frame: &[u8]) -> Run {
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
        let mut ctx = [0u8; 24];
        ctx[4..8].copy_from_slice(&(frame.len() as u32).to_ne_bytes());
        ctx[12..16].copy_from_slice(&ifindex.to_ne_bytes());
        let mut ctx_out = [0u8; 24];
        let mut out = vec![0; frame.len() + 256];
        let program: &Xdp = self.ebpf.program(program).unwrap().try_into().unwrap();
        let result = program
            .test_run(TestRunOptions {
                data_in: Some(frame),
                data_out: Some(&mut out),
                ctx_in: Some(&ctx),
                ctx_out: Some(&mut ctx_out),
                ..TestRunOptions::new()
            })
            .unwrap_or_else(|e| panic!("test_run of {} bytes: {e:?}", frame.len()));
        out.truncate(result.data_size_out as usize);
        // Metadata comes out in front of the frame.
        let word = |b: &[u8]| u32::from_ne_bytes(b[..4].try_into().unwrap());
        let metadata = word(&ctx_out) as usize;
        let mark = (metadata == size_of::<Mark>()).then(|| Mark {
            cookie: word(&out),
            ifindex: word(&out[4..]),
        });
        self.finish(result.return_value, out.split_off(metadata), mark)
    }

    fn finish(&mut self, action: u32, frame: Vec<u8>, mark: Option<Mark>) -> Run {
        // R42: exactly one counter moved, by one.
        let now = self.counters();
        let mut changed = now
            .iter()
            .zip(&self.before)
            .enumerate()
            .filter(|(_, (n, b))| n != b);
        let (index, (after, before)) = changed.next().expect("the frame was counted");
        assert!(changed.next().is_none(), "the frame was counted once");
        assert_eq!(after.frames, before.frames + 1);
        let bytes = after.bytes - before.bytes;
        let segment = (index as u32 / Outcome::SLOTS) as u16;
        let outcome = *Outcome::ALL
            .iter()
            .find(|o| stats_index(segment, **o) == index as u32)
            .expect("a listed outcome");
        self.before = now;
        Run {
            action,
            frame,
            outcome,
            segment,
            bytes,
            mark,
        }
    }
}

fn dup(data: &MapData) -> MapData {
    let fd = std::os::fd::AsFd::as_fd(data.fd())
        .try_clone_to_owned()
        .unwrap();
    MapData::from_fd(fd).unwrap()
}

pub fn remote(uplink: u32, address: Ipv4Addr, flags: u16) -> Remote {
    let mut r = Remote {
        ifindex: uplink,
        flags,
        port_min: 49152,
        port_count: 16384,
        ..Remote::EMPTY
    };
    r.header[..6].copy_from_slice(&ROUTER_MAC.0);
    r.header[6..12].copy_from_slice(&UPLINK_MAC.0);
    r.header[12..14].copy_from_slice(&[8, 0]);
    r.header[14..26].copy_from_slice(&[0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0]);
    r.header[26..30].copy_from_slice(&LOCAL.octets());
    r.header[30..34].copy_from_slice(&address.octets());
    r.header[36..38].copy_from_slice(&4789u16.to_be_bytes());
    r.ip_sum = checksum::bytes(&r.header[14..34]);
    r
}

pub fn remote_v6(uplink: u32, address: Ipv6Addr, flags: u16) -> Remote {
    let mut r = remote(uplink, REMOTE, flags | REMOTE_V6);
    r.header[12..].fill(0);
    r.header[12..14].copy_from_slice(&[0x86, 0xdd]);
    r.header[14] = 0x60;
    r.header[20..22].copy_from_slice(&[17, 64]);
    r.header[22..38].copy_from_slice(&LOCAL_V6.octets());
    r.header[38..54].copy_from_slice(&address.octets());
    r.header[56..58].copy_from_slice(&4789u16.to_be_bytes());
    let sum = checksum::addresses_v6(&LOCAL_V6.octets(), &address.octets());
    r.ip_sum = checksum::fold(sum + 17u16.to_be() as u64);
    r
}
