//! Namespaces, the command-line tools, and a mirror that applies events the way
//! their documentation says.

use std::collections::BTreeMap;
use std::future::Future;
use std::process::Command;
use std::time::{Duration, Instant};

use vtep_common::MacAddr;
use vtep_user::kernel::{
    Address, Event, FdbEntry, FdbTable, IfIndex, Link, LinkKind, Neighbour, VlanRange, VniRange,
    VxlanDevice,
};
use vtep_user::netlink::{Events, Netlink};

/// Longer than anything here takes on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// Runs a test in a thread with a fresh network namespace, `lo` up.
pub fn in_namespace<F, Fut>(test: F)
where
    F: FnOnce() -> Fut + Send + 'static,
    Fut: Future<Output = ()>,
{
    // SAFETY: geteuid has no preconditions.
    if unsafe { libc::geteuid() } != 0 {
        let required = std::env::var("VTEP_TESTS_REQUIRE").is_ok_and(|need| need.contains("root"));
        assert!(
            !required,
            "this test needs root, and VTEP_TESTS_REQUIRE asks for it"
        );
        eprintln!("SKIPPED: this test needs root (network namespaces)");
        return;
    }
    let thread = std::thread::Builder::new()
        .name("nlk".into())
        .spawn(move || {
            enter_fresh_namespace();
            sh("ip link set lo up");
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("runtime")
                .block_on(test());
        });
    if let Err(panic) = thread.expect("thread").join() {
        std::panic::resume_unwind(panic);
    }
}

pub fn enter_fresh_namespace() {
    // SAFETY: changes the namespace of this thread only, and takes no pointers.
    let done = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(done, 0, "unshare: {}", std::io::Error::last_os_error());
}

/// Runs commands, separated by newlines or semicolons, in this thread's namespace.
#[track_caller]
pub fn sh(script: &str) {
    let output = run(script);
    assert!(
        output.status.success(),
        "`{script}`: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[track_caller]
pub fn output_of(script: &str) -> String {
    let output = run(script);
    assert!(
        output.status.success(),
        "`{script}`: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("text")
}

fn run(script: &str) -> std::process::Output {
    Command::new("sh")
        .args(["-e", "-c", script])
        .output()
        .expect("sh runs")
}

/// Feeds a file to `bridge -batch` or `ip -batch`.
#[track_caller]
pub fn batch(tool: &str, lines: &str) {
    let file = tempfile::NamedTempFile::new().expect("temporary file");
    std::fs::write(file.path(), lines).expect("batch file");
    sh(&format!("{tool} -batch {}", file.path().display()));
}

pub fn mac(text: &str) -> MacAddr {
    text.parse().expect("MAC address")
}

/// A second network namespace, held by a sleeping thread until dropped.
pub struct OtherNamespace {
    thread_id: libc::pid_t,
    release: Option<std::sync::mpsc::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl OtherNamespace {
    pub fn new() -> Self {
        let (tell, told) = std::sync::mpsc::channel();
        let (release, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            enter_fresh_namespace();
            tell.send(thread_id()).expect("the test waits");
            let _ = wait.recv();
        });
        let thread_id = told.recv().expect("namespace");
        Self {
            thread_id,
            release: Some(release),
            thread: Some(thread),
        }
    }

    /// For `ip link set ... netns`.
    pub fn id(&self) -> libc::pid_t {
        self.thread_id
    }

    #[track_caller]
    pub fn sh(&self, script: &str) {
        sh(&format!(
            "nsenter --net=/proc/{}/ns/net sh -ec '{script}'",
            self.thread_id
        ));
    }
}

impl Drop for OtherNamespace {
    fn drop(&mut self) {
        drop(self.release.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub fn thread_id() -> libc::pid_t {
    // SAFETY: gettid has no preconditions.
    unsafe { libc::gettid() }
}

/// Snapshot plus events.
pub struct Mirror {
    pub netlink: Netlink,
    pub events: Events,
    pub links: BTreeMap<IfIndex, Link>,
    pub vlans: BTreeMap<IfIndex, Vec<VlanRange>>,
    pub vnis: BTreeMap<IfIndex, Vec<VniRange>>,
    pub fdb: Vec<FdbEntry>,
    pub neighbours: Vec<Neighbour>,
    pub addresses: Vec<Address>,
    /// Counts of events without contents.
    pub routes_changed: usize,
    pub filters_changed: usize,
    pub overruns: usize,
}

impl Mirror {
    pub async fn start() -> Self {
        let events = Events::open().expect("events");
        let netlink = Netlink::open().expect("netlink");
        let mut mirror = Self {
            netlink,
            events,
            links: BTreeMap::new(),
            vlans: BTreeMap::new(),
            vnis: BTreeMap::new(),
            fdb: Vec::new(),
            neighbours: Vec::new(),
            addresses: Vec::new(),
            routes_changed: 0,
            filters_changed: 0,
            overruns: 0,
        };
        mirror.reload().await;
        mirror
    }

    pub async fn reload(&mut self) {
        let snapshot = self.netlink.snapshot().await.expect("snapshot");
        self.links = snapshot
            .links
            .into_iter()
            .map(|link| (link.ifindex, link))
            .collect();
        self.vlans = snapshot.vlans;
        self.vnis = snapshot.vnis;
        self.fdb = snapshot.fdb;
        self.neighbours = snapshot.neighbours;
        self.addresses = snapshot.addresses;
    }

    pub fn link(&self, name: &str) -> Option<&Link> {
        self.links.values().find(|link| link.name == name)
    }

    #[track_caller]
    pub fn index(&self, name: &str) -> IfIndex {
        self.link(name)
            .unwrap_or_else(|| panic!("no link {name}"))
            .ifindex
    }

    /// Applies events until `what` holds.
    pub async fn until(&mut self, description: &str, what: impl Fn(&Self) -> bool) {
        let end = Instant::now() + DEADLINE;
        while !what(self) {
            let left = end.saturating_duration_since(Instant::now());
            match tokio::time::timeout(left, self.events.next()).await {
                Ok(events) => events
                    .expect("events")
                    .into_iter()
                    .for_each(|e| self.apply(e)),
                Err(_) => panic!(
                    "in vain: {description}\nlinks: {:#?}\nfdb: {:#?}\nneighbours: {:#?}",
                    self.links, self.fdb, self.neighbours
                ),
            }
        }
    }

    /// Runs a command, waits until the mirrored link shows what is expected, and
    /// then until the whole mirror of links equals a fresh dump.
    pub async fn change(&mut self, script: &str, name: &str, expected: impl Fn(&Link) -> bool) {
        sh(script);
        self.until(&format!("`{script}` shows on {name}"), |mirror| {
            mirror.link(name).is_some_and(&expected)
        })
        .await;
        self.links_match(script).await;
    }

    /// The links built from events are exactly what the kernel has.
    pub async fn links_match(&mut self, after: &str) {
        let end = Instant::now() + DEADLINE;
        loop {
            let fresh: BTreeMap<_, _> = self
                .netlink
                .links()
                .await
                .expect("links")
                .into_iter()
                .map(|link| (link.ifindex, link))
                .collect();
            if fresh == self.links {
                return;
            }
            let left = end.saturating_duration_since(Instant::now());
            match tokio::time::timeout(left, self.events.next()).await {
                Ok(events) => events
                    .expect("events")
                    .into_iter()
                    .for_each(|e| self.apply(e)),
                Err(_) => panic!(
                    "after `{after}`: mirrored {:#?}\nbut the kernel has {fresh:#?}",
                    self.links
                ),
            }
        }
    }

    pub fn apply(&mut self, event: Event) {
        match event {
            Event::Link(link) => {
                self.links.insert(link.ifindex, link);
            }
            Event::LinkGone(ifindex) => {
                self.links.remove(&ifindex);
                self.fdb
                    .retain(|e| e.ifindex != ifindex && e.bridge != Some(ifindex));
            }
            Event::Fdb(entry) => {
                self.fdb.retain(|old| !replaces(&entry, old));
                self.fdb.push(entry);
            }
            Event::FdbGone(entry) => self.fdb.retain(|old| {
                let all = entry.table == FdbTable::Bridge;
                !(same_key(&entry, old) && (all || same_destination(&entry, old)))
            }),
            Event::Neighbour(neighbour) => {
                self.forget(&neighbour);
                self.neighbours.push(neighbour);
            }
            Event::NeighbourGone(neighbour) => self.forget(&neighbour),
            Event::Address(address) => {
                if !self.addresses.contains(&address) {
                    self.addresses.push(address);
                }
            }
            Event::AddressGone(address) => self.addresses.retain(|old| *old != address),
            Event::RoutesChanged => self.routes_changed += 1,
            Event::FiltersChanged => self.filters_changed += 1,
            Event::TargetsChanged => {}
            Event::TcChanged(_) => {}
            Event::Vlans(ifindex, vlans) => {
                self.vlans.insert(ifindex, vlans);
            }
            Event::Vnis(ifindex, vnis) => {
                self.vnis.insert(ifindex, vnis);
            }
            Event::Overrun => self.overruns += 1,
        }
    }

    fn forget(&mut self, neighbour: &Neighbour) {
        self.neighbours
            .retain(|old| (old.ifindex, old.address) != (neighbour.ifindex, neighbour.address));
    }

    pub fn entries(&self, address: &str) -> Vec<&FdbEntry> {
        let address = mac(address);
        self.fdb
            .iter()
            .filter(|entry| entry.mac == address)
            .collect()
    }
}

fn same_key(a: &FdbEntry, b: &FdbEntry) -> bool {
    let place = |e: &FdbEntry| match e.table {
        FdbTable::Bridge => e.bridge,
        FdbTable::Vxlan => Some(e.ifindex),
    };
    (a.table, place(a), a.mac, a.vlan, a.source_vni)
        == (b.table, place(b), b.mac, b.vlan, b.source_vni)
}

/// A station has one place; a multicast or all-zero address of a VXLAN device
/// has one entry for each destination.
fn replaces(new: &FdbEntry, old: &FdbEntry) -> bool {
    let single = new.table == FdbTable::Bridge || new.mac.is_station();
    same_key(new, old) && (single || same_destination(new, old))
}

fn same_destination(a: &FdbEntry, b: &FdbEntry) -> bool {
    (a.dst, a.udp_port, a.vni, a.via) == (b.dst, b.udp_port, b.vni, b.via)
}

pub fn vxlan(link: &Link) -> &VxlanDevice {
    match &link.kind {
        LinkKind::Vxlan(device) => device,
        other => panic!("{} is no vxlan device: {other:?}", link.name),
    }
}

/// A bridge `br0` with the veth port `va` (its peer is `vb`) and the VXLAN device
/// `vx` (VNI 100, 192.0.2.1 on `vb`), all up.
pub fn segment() {
    sh("ip link add br0 type bridge
        ip link add va type veth peer name vb
        ip addr add 192.0.2.1/24 dev vb
        ip link add vx type vxlan id 100 local 192.0.2.1 dstport 4789
        ip link set va master br0
        ip link set vx master br0
        ip link set br0 up
        ip link set va up
        ip link set vb up
        ip link set vx up");
}
