//! Hosts with two segments, in one of the layouts.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;
use vtep_common::MacAddr;
use vtep_tests::daemon::Daemon;
use vtep_tests::frames::{Socket, ethernet, ipv4_udp, is_udp_to};
use vtep_tests::lab::{Lab, Options, VM_MTU, Vm};
use vtep_tests::{Device, has_devices, is_root, wait_until};

pub const VLANS: [u16; 2] = [10, 20];
pub const VNIS: [u32; 2] = [100, 200];
pub const WAIT: Duration = Duration::from_secs(10);
/// Long enough for a frame that should not come, were it on its way.
pub const SILENCE: Duration = Duration::from_millis(300);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    Bridges,
    Vlans,
    Single,
}

impl Layout {
    #[must_use]
    pub fn works(self, test: &str) -> bool {
        let test = format!("{test} ({self:?})");
        match self {
            Self::Bridges => is_root(&test),
            Self::Vlans | Self::Single => has_devices(&test, &[Device::VlanAwareBridge]),
        }
    }

    pub fn bridge(self, n: usize) -> String {
        match self {
            Self::Bridges => format!("br{}", VNIS[n]),
            Self::Vlans | Self::Single => "br0".to_owned(),
        }
    }

    pub fn vxlan(self, n: usize) -> String {
        match self {
            Self::Single => "vxlan0".to_owned(),
            Self::Bridges | Self::Vlans => format!("vxlan{}", VNIS[n]),
        }
    }

    /// Not all of them the usual one.
    pub fn udp_port(self, n: usize) -> u16 {
        match self {
            Self::Single => 4789,
            Self::Bridges | Self::Vlans => [4789, 8472][n],
        }
    }

    /// Words of `bridge fdb` that name the segment in the bridge's table.
    pub fn in_bridge(self, n: usize) -> String {
        match self {
            Self::Bridges => "master".to_owned(),
            Self::Vlans | Self::Single => format!("master vlan {}", VLANS[n]),
        }
    }

    /// The same in the VXLAN device's.
    pub fn in_tunnel(self, n: usize) -> String {
        match self {
            Self::Single => format!("self src_vni {}", VNIS[n]),
            Self::Bridges | Self::Vlans => "self".to_owned(),
        }
    }

    /// Commands that make the segments of one host.
    pub fn commands(self, local: IpAddr) -> String {
        let mut lines = String::new();
        let mut add = |line: String| lines += &(line + "\n");
        if self != Self::Bridges {
            add("ip link add br0 type bridge vlan_filtering 1".to_owned());
        }
        if self == Self::Single {
            add(format!(
                "ip link add vxlan0 type vxlan external vnifilter learning local {local} dstport 4789"
            ));
            add(format!("ip link set vxlan0 mtu {VM_MTU} master br0"));
            add("bridge link set dev vxlan0 vlan_tunnel on".to_owned());
        }
        for (n, (vlan, vni)) in VLANS.iter().zip(VNIS).enumerate() {
            let (bridge, vxlan, port) = (self.bridge(n), self.vxlan(n), self.udp_port(n));
            match self {
                Self::Bridges => add(format!("ip link add {bridge} type bridge")),
                Self::Vlans => {}
                Self::Single => {
                    add(format!("bridge vlan add dev vxlan0 vid {vlan}"));
                    add(format!(
                        "bridge vlan add dev vxlan0 vid {vlan} tunnel_info id {vni}"
                    ));
                    add(format!("bridge vni add dev vxlan0 vni {vni}"));
                    continue;
                }
            }
            add(format!(
                "ip link add {vxlan} type vxlan id {vni} local {local} dstport {port}"
            ));
            add(format!("ip link set {vxlan} mtu {VM_MTU} master {bridge}"));
            if self == Self::Vlans {
                add(format!("bridge vlan del dev {vxlan} vid 1"));
                add(format!(
                    "bridge vlan add dev {vxlan} vid {vlan} pvid untagged"
                ));
            }
        }
        for n in 0..2 {
            add(format!("ip link set {} up", self.vxlan(n)));
            add(format!("ip link set {} up", self.bridge(n)));
        }
        lines
    }
}

pub struct Scene {
    layout: Layout,
    pub lab: Lab,
    pub daemons: Vec<Daemon>,
}

impl Scene {
    pub fn new(layout: Layout) -> Self {
        let lab = Lab::with(&Options {
            hosts: 3,
            segment: false,
            ..Options::default()
        })
        .unwrap();
        for host in &lab.hosts {
            host.netns.run_all(&layout.commands(host.address)).unwrap();
            let others = lab
                .hosts
                .iter()
                .filter(|other| other.address != host.address);
            for (n, other) in (0..2).flat_map(|n| others.clone().map(move |other| (n, other))) {
                let (vxlan, tunnel) = (layout.vxlan(n), layout.in_tunnel(n));
                let to = other.address;
                let line =
                    format!("bridge fdb append 00:00:00:00:00:00 dev {vxlan} {tunnel} dst {to}");
                host.netns.run(&line).unwrap();
            }
        }
        lab.warm_up().unwrap();
        Self {
            layout,
            lab,
            daemons: Vec::new(),
        }
    }

    /// A VM in no segment yet; `number` makes its MAC and address.
    pub fn add_loose_vm(&mut self, host: usize, number: u8) -> usize {
        let index = self.lab.add_vm(host).unwrap();
        let vm = &mut self.lab.vms[index];
        vm.mac = MacAddr([2, 0, 0, 0, 0, number]);
        vm.address = Ipv4Addr::new(10, 0, 0, number);
        vm.netns
            .run_all(&format!(
                "ip addr flush dev eth0
                 ip link set eth0 address {}
                 ip addr add {}/24 dev eth0",
                vm.mac, vm.address
            ))
            .unwrap();
        index
    }

    /// A VM in a segment.
    pub fn add_vm(&mut self, host: usize, n: usize, number: u8) -> usize {
        let index = self.add_loose_vm(host, number);
        let (port, bridge) = (&self.lab.vms[index].port, self.layout.bridge(n));
        let netns = &self.lab.hosts[host].netns;
        netns
            .run(&format!("ip link set {port} master {bridge}"))
            .unwrap();
        if self.layout != Layout::Bridges {
            let vlan = VLANS[n];
            netns
                .run_all(&format!(
                    "bridge vlan del dev {port} vid 1
                     bridge vlan add dev {port} vid {vlan} pvid untagged"
                ))
                .unwrap();
        }
        // See `lab::plug` for GRO.
        netns
            .run_all(&format!(
                "ip link set {port} up
                 ethtool -K {port} gro off
                 ethtool -K {port} gro on"
            ))
            .unwrap();
        index
    }

    /// Daemons on the first two hosts, all ports on the XDP hook.
    pub fn start(&mut self) {
        self.start_with(|_| "xdp");
    }

    /// The same with a choice of hooks.
    pub fn start_with(&mut self, hook: impl Fn(usize) -> &'static str) {
        let ports = self.lab.vms.iter().enumerate();
        let config: String = ports
            .map(|(index, vm)| format!("[ports.{}]\nhook = \"{}\"\n", vm.port, hook(index)))
            .collect();
        let daemons = (0..2).map(|i| Daemon::with_config(&self.lab.hosts[i], &config).unwrap());
        self.daemons = daemons.collect();
    }

    pub fn vm(&self, index: usize) -> &Vm {
        &self.lab.vms[index]
    }

    #[track_caller]
    pub fn ping(&self, from: usize, to: usize, count: u32) {
        let to = self.vm(to).address;
        self.vm(from)
            .netns
            .run(&format!("ping -c {count} -i 0.02 -W 2 {to}"))
            .unwrap();
    }

    /// Both hosts with daemons forward to a MAC of a segment.
    #[track_caller]
    pub fn wait_fast(&self, n: usize, mac: MacAddr) {
        for daemon in &self.daemons {
            wait_row(daemon, n, mac, |row| row["accelerated"] == true).unwrap();
        }
    }

    pub fn kernel_fdb(&self, host: usize) -> Vec<Value> {
        let text = self.lab.hosts[host]
            .netns
            .run("bridge -j fdb show")
            .unwrap();
        serde_json::from_str(&text).unwrap()
    }
}

pub fn row(daemon: &Daemon, n: usize, mac: MacAddr) -> Result<Option<Value>> {
    let rows = daemon.json(&[
        "fdb",
        "show",
        "--vni",
        &VNIS[n].to_string(),
        &mac.to_string(),
    ])?;
    Ok(rows.as_array().and_then(|rows| rows.first()).cloned())
}

pub fn wait_row(
    daemon: &Daemon,
    n: usize,
    mac: MacAddr,
    wanted: impl Fn(&Value) -> bool,
) -> Result<()> {
    wait_until(WAIT, &format!("{mac} in VNI {}", VNIS[n]), || {
        Ok(row(daemon, n, mac)?.is_some_and(|row| wanted(&row)))
    })
    .with_context(|| {
        let show = |words: &[&str]| daemon.cli(words).unwrap_or_else(|e| format!("{e:#}"));
        format!("{}\n{}", show(&["status"]), show(&["fdb", "show"]))
    })
    .map(drop)
}

/// Frames of a segment that ended in an outcome.
pub fn frames(daemon: &Daemon, n: usize, outcome: &str) -> u64 {
    let stats = daemon.json(&["stats"]).unwrap();
    let segments = stats["segments"].as_array().unwrap();
    let segment = segments
        .iter()
        .find(|s| s["vni"] == VNIS[n])
        .expect("a segment");
    segment["outcomes"][outcome]["frames"].as_u64().unwrap_or(0)
}

pub fn port_rows(daemon: &Daemon, port: &str) -> BTreeMap<u64, Value> {
    let rows = daemon.json(&["port", "show"]).unwrap();
    let rows = rows
        .as_array()
        .unwrap()
        .iter()
        .filter(|row| row["name"] == port);
    rows.map(|row| (row["vni"].as_u64().unwrap(), row.clone()))
        .collect()
}

/// One VM's end of its veth.
pub fn socket(vm: &Vm) -> Socket {
    vm.netns.enter(|| Socket::open("eth0")).unwrap()
}

/// A frame to `to`, known by its UDP port.
pub fn marked(from: &Vm, to: &Vm, mark: u16) -> Vec<u8> {
    let (source, destination) = (from.address.octets(), to.address.octets());
    let packet = ipv4_udp(source, destination, [mark, mark], &[0; 64]);
    ethernet(from.mac, to.mac, 0x0800, &packet)
}

/// Send marked frames; how many of them each of `ends` got.
pub fn deliver(from: &Vm, to: &Vm, mark: u16, count: usize, ends: &[&Vm]) -> Vec<usize> {
    let sender = socket(from);
    let listeners: Vec<Socket> = ends.iter().map(|vm| socket(vm)).collect();
    for _ in 0..count {
        sender.send(&marked(from, to, mark)).unwrap();
    }
    let heard = |socket: &Socket| {
        let first = socket.capture(count, WAIT.min(SILENCE * 3), |frame| is_udp_to(frame, mark));
        let more = socket.capture(1, SILENCE, |frame| is_udp_to(frame, mark));
        first.unwrap().len() + more.unwrap().len()
    };
    listeners.iter().map(heard).collect()
}
