//! What is not accelerated is named with its reason, within a second of the
//! change; the kernel carries its frames meanwhile, and the fast path comes
//! back when the reason goes (R41).

use std::path::{Path, PathBuf};
use std::time::Duration;

use aya::programs::{Xdp, XdpMode};
use serde_json::Value;
use vtep_tests::daemon::Daemon;
use vtep_tests::lab::Lab;
use vtep_tests::netns::Netns;
use vtep_tests::streams::Session;
use vtep_tests::{is_root, skip, wait_until};

/// Two hosts with daemons, a TCP session between their VMs on the fast path.
struct Scene {
    lab: Lab,
    daemons: Vec<Daemon>,
    session: Session,
}

impl Scene {
    fn new() -> Self {
        let mut lab = Lab::new().unwrap();
        let (a, b) = (lab.add_vm(0).unwrap(), lab.add_vm(1).unwrap());
        let daemons = (0..2).map(|i| Daemon::start(&lab.hosts[i], &[&lab.vms[i].port]).unwrap());
        let daemons: Vec<Daemon> = daemons.collect();
        let session = Session::start(&lab.vms[a], &lab.vms[b]).unwrap();
        for daemon in &daemons {
            daemon.wait_accelerated(lab.vms[a].mac).unwrap();
            daemon.wait_accelerated(lab.vms[b].mac).unwrap();
        }
        let scene = Self {
            lab,
            daemons,
            session,
        };
        scene.flows();
        assert!(scene.fast() > 0);
        scene
    }

    fn host(&self) -> &Netns {
        &self.lab.hosts[0].netns
    }

    /// The session makes progress.
    #[track_caller]
    fn flows(&self) {
        let before = self.session.round_trips();
        wait_until(Duration::from_secs(5), "the session goes on", || {
            Ok(self.session.round_trips() > before + 20)
        })
        .unwrap();
    }

    /// Frames of host 1 that took the fast path.
    fn fast(&self) -> u64 {
        let frames = |outcome| self.daemons[0].frames(outcome).unwrap();
        frames("egress-remote") + frames("ingress-local")
    }

    fn row(&self, list: &str, key: &str, name: &str) -> Value {
        let row = self.daemons[0].status_row(list, key, name).unwrap();
        row.unwrap_or(Value::Null)
    }

    /// Devices that cannot take frames from XDP are served through the stack.
    #[track_caller]
    fn ingress_is(&self, port: &str, way: &str) {
        let what = format!("{port}: {way}");
        wait_until(Duration::from_secs(1), &what, || {
            Ok(self.row("ports", "name", port)["ingress"] == way)
        })
        .unwrap();
    }

    /// `status` says within a second that a thing is left to the kernel, and
    /// why; text and JSON.
    #[track_caller]
    fn refused(&self, list: &str, key: &str, name: &str, reason: &str) {
        let says = || {
            let row = self.row(list, key, name);
            row["accelerated"] == false
                && row["reason"].as_str().is_some_and(|r| r.contains(reason))
        };
        let what = format!("{name} is refused: {reason}");
        let result = wait_until(Duration::from_secs(1), &what, || Ok(says()));
        let after = result.unwrap_or_else(|e| panic!("{e}: {}", self.row(list, key, name)));
        println!("{what}: after {after:?}");
        let text = self.daemons[0].cli(&["status"]).unwrap();
        assert!(
            text.lines().any(|l| l.contains(name) && l.contains(reason)),
            "{text}"
        );
    }

    /// Nothing of it takes the fast path any more, and traffic flows.
    #[track_caller]
    fn kernel_only(&self) {
        let before = self.fast();
        self.flows();
        assert_eq!(self.fast(), before);
    }

    /// The fast path is back within a second, with traffic on it.
    #[track_caller]
    fn back(&self) {
        let done = || {
            let lists = [
                ("uplinks", "name", "uplink0"),
                ("segments", "vxlan", "vxlan100"),
                ("ports", "name", "port1"),
            ];
            lists
                .iter()
                .all(|(list, key, name)| self.row(list, key, name)["accelerated"] == true)
        };
        let result = wait_until(
            Duration::from_secs(1),
            "acceleration is back",
            || Ok(done()),
        );
        result.unwrap_or_else(|e| panic!("{e}: {}", self.daemons[0].cli(&["status"]).unwrap()));
        let before = self.fast();
        wait_until(Duration::from_secs(5), "frames take the fast path", || {
            Ok(self.fast() > before + 40)
        })
        .unwrap();
    }
}

fn object(name: &str) -> PathBuf {
    let default =
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/ebpf/bpfel-unknown-none/release");
    std::env::var_os("VTEP_EBPF_DIR")
        .map_or_else(default, PathBuf::from)
        .join(name)
}

#[test]
fn flags_set_at_runtime_stop_a_port_at_once() {
    if !is_root("flags_set_at_runtime_stop_a_port_at_once") {
        return;
    }
    let scene = Scene::new();
    for (on, off, reason) in [
        (
            "bridge link set dev port1 isolated on",
            "bridge link set dev port1 isolated off",
            "isolated",
        ),
        (
            "bridge link set dev port1 locked on",
            "bridge link set dev port1 locked off",
            "locked",
        ),
    ] {
        scene.host().run(on).unwrap();
        scene.refused("ports", "name", "port1", reason);
        scene.kernel_only();
        scene.host().run(off).unwrap();
        scene.back();
    }
    scene
        .host()
        .run("bridge link set dev vxlan100 isolated on")
        .unwrap();
    scene.refused("segments", "vxlan", "vxlan100", "isolated");
    scene.kernel_only();
    scene
        .host()
        .run("bridge link set dev vxlan100 isolated off")
        .unwrap();
    scene.back();
    scene.session.finish().unwrap();
}

#[test]
fn filters_set_at_runtime_stop_what_they_see() {
    if !is_root("filters_set_at_runtime_stop_what_they_see") {
        return;
    }
    let scene = Scene::new();
    let host = scene.host();
    let chain = |family: &str| {
        format!(
            "nft add table {family} t
             nft add chain {family} t c {{ type filter hook forward priority 0 ; }}"
        )
    };
    // A chain that accepts everything filters nothing.
    host.run_all(&chain("bridge")).unwrap();
    scene.flows();
    scene.back();
    host.run("nft add rule bridge t c counter").unwrap();
    scene.refused("segments", "vxlan", "vxlan100", "t/c");
    scene.kernel_only();
    host.run("nft delete table bridge t").unwrap();
    scene.back();

    // IP chains count where br_netfilter gives them bridged frames.
    host.run_all(&chain("ip")).unwrap();
    host.run("nft add rule ip t c accept").unwrap();
    scene.flows();
    scene.back();
    host.run("ip link set br100 type bridge nf_call_iptables 1")
        .unwrap();
    scene.refused("segments", "vxlan", "vxlan100", "bridge-nf-call");
    scene.kernel_only();
    host.run("ip link set br100 type bridge nf_call_iptables 0")
        .unwrap();
    scene.back();
    host.enter(|| {
        Ok(std::fs::write(
            "/proc/sys/net/bridge/bridge-nf-call-iptables",
            "1",
        )?)
    })
    .unwrap();
    // The switch itself says nothing: a rule, or the next look, does.
    host.run("nft add rule ip t c accept").unwrap();
    scene.refused("segments", "vxlan", "vxlan100", "bridge-nf-call");
    scene.kernel_only();
    host.run("nft delete table ip t").unwrap();
    scene.back();

    for device in ["port1", "uplink0"] {
        host.run_all(&format!(
            "tc qdisc add dev {device} clsact
             tc filter add dev {device} ingress protocol all u32 match u32 0 0"
        ))
        .unwrap();
        let list = if device == "port1" {
            "ports"
        } else {
            "uplinks"
        };
        scene.refused(list, "name", device, "tc filter of somebody else");
        scene.kernel_only();
        host.run(&format!("tc filter del dev {device} ingress"))
            .unwrap();
        scene.back();
        host.run(&format!(
            "tc filter add dev {device} egress protocol all u32 match u32 0 0"
        ))
        .unwrap();
        scene.refused(list, "name", device, "tc filter of somebody else");
        scene.kernel_only();
        host.run(&format!("tc qdisc del dev {device} clsact"))
            .unwrap();
        scene.back();
    }
    scene.session.finish().unwrap();
}

#[test]
fn devices_that_go_down_or_leave_the_bridge_are_named() {
    if !is_root("devices_that_go_down_or_leave_the_bridge_are_named") {
        return;
    }
    let scene = Scene::new();
    for (off, on, list, key, name, reason) in [
        (
            "ip link set port1 down",
            "ip link set port1 up",
            "ports",
            "name",
            "port1",
            "down",
        ),
        (
            "ip link set vxlan100 down",
            "ip link set vxlan100 up",
            "segments",
            "vxlan",
            "vxlan100",
            "down",
        ),
        (
            "ip link set br100 down",
            "ip link set br100 up",
            "segments",
            "vxlan",
            "vxlan100",
            "br100 is down",
        ),
        (
            "ip link set vxlan100 nomaster",
            "ip link set vxlan100 master br100",
            "segments",
            "vxlan",
            "vxlan100",
            "not in a bridge",
        ),
    ] {
        scene.host().run(off).unwrap();
        scene.refused(list, key, name, reason);
        scene.host().run(on).unwrap();
        scene.flows();
        scene.back();
    }
    // Without its route the remote cannot be reached, which the kernel notices
    // without saying so.
    scene.host().run("ip link set uplink0 down").unwrap();
    let remote = || scene.daemons[0].json(&["remote", "show"]).unwrap()[0].clone();
    wait_until(Duration::from_secs(1), "the remote is refused", || {
        Ok(remote()["accelerated"] == false && remote()["reason"].is_string())
    })
    .unwrap_or_else(|e| panic!("{e}: {}", remote()));
    println!("{}", remote());
    scene.host().run("ip link set uplink0 up").unwrap();
    let gateway = scene.lab.hosts[0].gateway;
    scene
        .host()
        .run(&format!("ip route add default via {gateway}"))
        .unwrap();
    scene.flows();
    scene.back();
    scene.session.finish().unwrap();
}

#[test]
fn options_that_are_not_understood_leave_the_segment_to_the_kernel() {
    if !is_root("options_that_are_not_understood_leave_the_segment_to_the_kernel") {
        return;
    }
    let scene = Scene::new();
    let host = scene.host();
    host.run_all(
        "ip link add br200 type bridge
         ip link set br200 up
         ip link add vxlan200 type vxlan id 200 dstport 4790 local 192.0.2.2 gbp
         ip link set vxlan200 up master br200
         ip link add vxlan300 type vxlan id 300 dstport 4789 local 192.0.2.2
         ip link set vxlan300 up
         ip link add br400 type bridge
         ip link set br400 up
         ip link add vxlan400 type vxlan external dstport 4791
         ip link set vxlan400 up master br400",
    )
    .unwrap();
    scene.refused("segments", "vxlan", "vxlan200", "gbp");
    scene.refused("segments", "vxlan", "vxlan300", "not in a bridge");
    scene.refused("segments", "vxlan", "vxlan400", "not VLAN-aware");
    scene.back();
    // Entries behind them are shown, not accelerated, and writing them works.
    scene.daemons[0]
        .cli(&[
            "fdb",
            "add",
            "02:00:00:00:09:01",
            "--vni",
            "200",
            "--dst",
            "198.51.100.2",
        ])
        .unwrap();
    let rows = scene.daemons[0]
        .json(&["fdb", "show", "--vni", "200"])
        .unwrap();
    assert_eq!(
        (&rows[0]["mac"], &rows[0]["accelerated"]),
        (&"02:00:00:00:09:01".into(), &false.into()),
        "{rows}"
    );
    // A second VXLAN device in the bridge: which of them is meant?
    host.run("ip link set vxlan300 master br100").unwrap();
    scene.refused("segments", "vxlan", "vxlan100", "second VXLAN device");
    scene.kernel_only();
    host.run("ip link set vxlan300 nomaster").unwrap();
    scene.back();
    match host.run("ip link set br100 type bridge vlan_filtering 1") {
        Ok(_) => {
            scene.refused("segments", "vxlan", "vxlan100", "VLAN-aware");
            scene.kernel_only();
            host.run("ip link set br100 type bridge vlan_filtering 0")
                .unwrap();
            scene.back();
        }
        Err(error) => skip(
            "VLAN-aware bridge",
            &format!("this kernel has none ({error:#})"),
        ),
    }
    scene.session.finish().unwrap();
}

/// An uplink that drops what is redirected to it: frames are still stripped, but
/// not encapsulated. (For ports see `traffic`.)
#[test]
fn uplink_that_would_drop_redirected_frames_gets_none_from_xdp() {
    if !is_root("uplink_that_would_drop_redirected_frames_gets_none_from_xdp") {
        return;
    }
    let scene = Scene::new();
    scene.lab.router.run("ethtool -K to1 gro off").unwrap();
    let daemon = &scene.daemons[0];
    let missed = || daemon.frames("egress-pass-no-target");
    wait_until(Duration::from_secs(2), "XDP has no target any more", || {
        Ok(missed()? > 0)
    })
    .unwrap();
    let before = daemon.frames("egress-remote").unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(daemon.frames("egress-remote").unwrap(), before);
    scene.lab.router.run("ethtool -K to1 gro on").unwrap();
    wait_until(Duration::from_secs(2), "and accelerated again", || {
        Ok(daemon.frames("egress-remote")? > before + 10)
    })
    .unwrap();
    scene.session.finish().unwrap();
}

/// A veth whose peer does not poll drops what XDP redirects to it.
#[test]
fn veths_that_would_drop_redirected_frames_are_served_through_the_stack() {
    if !is_root("veths_that_would_drop_redirected_frames_are_served_through_the_stack") {
        return;
    }
    let scene = Scene::new();
    let vm = &scene.lab.vms[0].netns;
    scene.ingress_is("port1", "xdp");
    for (state, way, outcome) in [
        ("off", "stack", "ingress-local-stack"),
        ("on", "xdp", "ingress-local"),
    ] {
        vm.run(&format!("ethtool -K eth0 gro {state}")).unwrap();
        scene.ingress_is("port1", way);
        let frames = || scene.daemons[0].frames(outcome).unwrap();
        let before = frames();
        scene.flows();
        assert!(frames() > before, "{outcome}");
    }
    scene.session.finish().unwrap();
}

#[test]
fn programs_of_somebody_else_stay() {
    if !is_root("programs_of_somebody_else_stay") {
        return;
    }
    let mut scene = Scene::new();
    let number = scene.lab.add_vm(0).unwrap();
    let port = scene.lab.vms[number].port.clone();
    scene.daemons[0]
        .cli(&["port", "add", &port, "--vni", "100", "--hook", "kernel"])
        .unwrap();
    let mut ebpf = aya::Ebpf::load_file(object("lab")).unwrap();
    let program: &mut Xdp = ebpf.program_mut("lab_pass").unwrap().try_into().unwrap();
    program.load().unwrap();
    let link = scene.lab.hosts[0]
        .netns
        .enter(|| Ok(program.attach(&port, XdpMode::Driver)?))
        .unwrap();
    scene.daemons[0]
        .cli(&["port", "add", &port, "--vni", "100", "--hook", "xdp"])
        .unwrap();
    scene.refused("ports", "name", &port, "another XDP program");
    scene.lab.vms[number]
        .netns
        .run("ping -c 2 -i 0.2 -W 2 10.0.0.2")
        .unwrap();
    let id = scene
        .host()
        .run(&format!("ip -d link show {port}"))
        .unwrap();
    assert!(id.contains("name lab_pass"), "{id}");
    // It goes without a word; trying again notices.
    program.detach(link).unwrap();
    let row = || scene.row("ports", "name", &port);
    let after = wait_until(Duration::from_secs(10), "the port is accelerated", || {
        Ok(row()["accelerated"] == true)
    });
    println!("attached {:?} after the other left", after.unwrap());
    scene.back();
    scene.session.finish().unwrap();
}

/// An uplink with jumbo frames is none of it: see F18 in `offload`.
#[test]
fn xdp_port_with_a_too_large_mtu_is_named() {
    if !is_root("xdp_port_with_a_too_large_mtu_is_named") {
        return;
    }
    let mut lab = Lab::new().unwrap();
    let (a, b) = (lab.add_vm(0).unwrap(), lab.add_vm(1).unwrap());
    lab.vms[a].netns.run("ip link set eth0 mtu 9000").unwrap();
    let daemon = Daemon::start(&lab.hosts[0], &[&lab.vms[a].port]).unwrap();
    let row = || {
        daemon
            .status_row("ports", "name", "port1")
            .unwrap()
            .unwrap()
    };
    let reason = row()["reason"].as_str().unwrap_or("").to_owned();
    assert!(
        reason.contains("MTU is too large") && reason.contains("1500"),
        "{}",
        row()
    );
    // The peer's MTU is what counts, and nobody hears of it; trying again does.
    lab.vms[a].netns.run("ip link set eth0 mtu 1450").unwrap();
    let session = Session::start(&lab.vms[a], &lab.vms[b]).unwrap();
    let after = wait_until(Duration::from_secs(10), "the port is accelerated", || {
        Ok(row()["accelerated"] == true)
    });
    println!("attached {:?} after the MTU was right", after.unwrap());
    wait_until(Duration::from_secs(5), "frames take the fast path", || {
        Ok(daemon.frames("egress-remote")? > 100)
    })
    .unwrap();
    session.finish().unwrap();
}
