//! The standard laboratory: a router, hosts in subnets of their own, on each an
//! ordinary kernel bridge and VXLAN device, VMs as namespaces behind veths.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result, bail};
use vtep_common::MacAddr;

use crate::netns::Netns;
use crate::tap::Machine;

/// VNI of the segment that every host has.
pub const VNI: u32 = 100;
/// MTU inside the VMs, where nothing else is said.
pub const VM_MTU: u32 = 1450;
/// MTU of a veth that nobody changed.
const VETH_MTU: u32 = 1500;

/// What the hosts reach each other by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Family {
    #[default]
    V4,
    V6,
}

impl Family {
    /// What a tunnel takes from the MTU.
    pub const fn overhead(self) -> u32 {
        match self {
            Self::V4 => 50,
            Self::V6 => 70,
        }
    }

    const fn host_bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }

    const fn subnet_bits(self) -> u8 {
        match self {
            Self::V4 => 24,
            Self::V6 => 64,
        }
    }

    /// An address in the subnet of a host; the router has 1, the host 2.
    pub fn address(self, number: usize, host: u8) -> IpAddr {
        // Documentation networks, RFC 5737, then the benchmarking network, RFC 2544.
        let [a, b, c] = match number {
            0 => [192, 0, 2],
            1 => [198, 51, 100],
            2 => [203, 0, 113],
            n => [198, 18, n as u8],
        };
        match self {
            Self::V4 => Ipv4Addr::new(a, b, c, host).into(),
            Self::V6 => {
                let (subnet, host) = (number as u16 + 1, host.into());
                Ipv6Addr::new(0x2001, 0xdb8, subnet, 0, 0, 0, 0, host).into()
            }
        }
    }
}

/// How the hosts' VXLAN devices are made.
#[derive(Debug, Clone)]
pub struct Options {
    pub hosts: usize,
    /// Options of `ip link add .. type vxlan`, beside id, local address and port.
    pub vxlan: String,
    pub udp_port: u16,
    pub underlay: Family,
    /// `None`: just enough for [`VM_MTU`].
    pub underlay_mtu: Option<u32>,
    /// Whether hosts have bridge and VXLAN device, and VMs are plugged in;
    /// without, the test makes them.
    pub segment: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            hosts: 2,
            vxlan: String::new(),
            udp_port: 4789,
            underlay: Family::V4,
            underlay_mtu: None,
            segment: true,
        }
    }
}

/// One hypervisor.
#[derive(Debug)]
pub struct Host {
    pub netns: Netns,
    pub address: IpAddr,
    pub gateway: IpAddr,
    pub uplink_mac: MacAddr,
    pub gateway_mac: MacAddr,
}

impl Host {
    /// Its address on an IPv4 underlay.
    pub fn ipv4(&self) -> Result<[u8; 4]> {
        match self.address {
            IpAddr::V4(address) => Ok(address.octets()),
            IpAddr::V6(address) => bail!("{address} is not IPv4"),
        }
    }
}

/// Devices of a host.
pub const UPLINK: &str = "uplink0";
pub const BRIDGE: &str = "br100";
pub const VXLAN: &str = "vxlan100";

/// How a VM is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guest {
    /// A veth without offloads: frames as they look on a wire.
    Plain,
    /// A veth as it is made: unfinished checksums and superframes both ways. Its
    /// end does not poll, so it loses redirected frames.
    Veth,
    /// The same, with GRO on in the guest: it polls.
    PollingVeth,
    /// A tap whose owner exchanges virtio-net headers.
    Tap,
}

/// One VM: a namespace with `eth0`, whose other end is a port of a host's bridge.
#[derive(Debug)]
pub struct Vm {
    pub netns: Netns,
    pub mac: MacAddr,
    pub address: Ipv4Addr,
    /// Name of the host's end.
    pub port: String,
    /// Of a tap.
    pub machine: Option<Machine>,
}

#[derive(Debug)]
pub struct Lab {
    pub router: Netns,
    pub hosts: Vec<Host>,
    pub vms: Vec<Vm>,
    pub underlay: Family,
    /// Inside the VMs.
    pub vm_mtu: u32,
    underlay_mtu: u32,
    segment: bool,
}

impl Lab {
    /// Two hosts, default options.
    pub fn new() -> Result<Self> {
        Self::with(&Options::default())
    }

    /// Two hosts on an underlay of either family.
    pub fn on(underlay: Family) -> Result<Self> {
        Self::with(&Options {
            underlay,
            ..Options::default()
        })
    }

    pub fn with(options: &Options) -> Result<Self> {
        let router = Netns::new("router")?;
        router.enter(|| {
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
            Ok(std::fs::write(
                "/proc/sys/net/ipv6/conf/all/forwarding",
                "1",
            )?)
        })?;
        let overhead = options.underlay.overhead();
        let underlay_mtu = options.underlay_mtu.unwrap_or(VM_MTU + overhead);
        let mut lab = Self {
            router,
            hosts: Vec::new(),
            vms: Vec::new(),
            underlay: options.underlay,
            vm_mtu: underlay_mtu - overhead,
            underlay_mtu,
            segment: options.segment,
        };
        for number in 0..options.hosts {
            lab.add_host(number, options)?;
        }
        Ok(lab)
    }

    fn add_host(&mut self, number: usize, options: &Options) -> Result<()> {
        let underlay = options.underlay;
        let uplink_mac = MacAddr([2, 0, 0, 0xff, number as u8, 2]);
        let gateway_mac = MacAddr([2, 0, 0, 0xff, number as u8, 1]);
        let netns = Netns::new(&format!("host{}", number + 1))?;
        let far = format!("to{}", number + 1);
        self.router.run(&format!(
            "ip link add {far} address {gateway_mac} type veth peer name {UPLINK} address {uplink_mac} netns {}",
            netns.name()
        ))?;
        let ends = [(&self.router, &*far), (&netns, UPLINK)];
        for (netns, device) in ends {
            wire(netns, device, self.underlay_mtu)?;
            netns.run(&format!("ip link set {device} up"))?;
        }
        // Both up, each tells the other that it polls, see `plug`.
        for (netns, device) in ends {
            netns.run(&format!("ethtool -K {device} gro off"))?;
            netns.run(&format!("ethtool -K {device} gro on"))?;
        }
        let [gateway, address] = self.connect(number, &netns, underlay)?;
        let host = Host {
            netns,
            address,
            gateway,
            uplink_mac,
            gateway_mac,
        };
        if options.segment {
            self.add_segment(&host, options)?;
        }
        self.hosts.push(host);
        Ok(())
    }

    /// Addresses of a family on both ends of an uplink: the router's, the host's.
    fn connect(&self, number: usize, host: &Netns, family: Family) -> Result<[IpAddr; 2]> {
        let [gateway, address] = [1, 2].map(|host| family.address(number, host));
        let far = format!("to{}", number + 1);
        for (netns, device, address) in [(&self.router, &*far, gateway), (host, UPLINK, address)] {
            if family == Family::V6 {
                enable_ipv6(netns, device)?;
            }
            add_address(netns, address, family.subnet_bits(), device)?;
        }
        host.run(&format!("ip route add default via {gateway}"))?;
        Ok([gateway, address])
    }

    /// A second family on the same underlay; the hosts' addresses.
    pub fn add_family(&self, family: Family) -> Result<Vec<IpAddr>> {
        let hosts = self.hosts.iter().enumerate();
        hosts
            .map(|(number, host)| Ok(self.connect(number, &host.netns, family)?[1]))
            .collect()
    }

    fn add_segment(&self, host: &Host, options: &Options) -> Result<()> {
        let (netns, address) = (&host.netns, host.address);
        let Options {
            vxlan, udp_port, ..
        } = options;
        netns.run_all(&format!(
            "ip link add {BRIDGE} type bridge
             ip link add {VXLAN} type vxlan id {VNI} local {address} dstport {udp_port} {vxlan}
             ip link set {VXLAN} mtu {} master {BRIDGE}
             ip link set {VXLAN} up
             ip link set {BRIDGE} up",
            self.vm_mtu
        ))?;
        // Everybody floods to everybody else.
        for other in &self.hosts {
            netns.run(&format!(
                "bridge fdb append 00:00:00:00:00:00 dev {VXLAN} dst {}",
                other.address
            ))?;
            other.netns.run(&format!(
                "bridge fdb append 00:00:00:00:00:00 dev {VXLAN} dst {address}"
            ))?;
        }
        Ok(())
    }

    /// A VM that sends plain frames (no offloads) behind a port of `host`.
    pub fn add_vm(&mut self, host: usize) -> Result<usize> {
        self.add_guest(host, Guest::Plain)
    }

    /// A VM behind a port of `host`.
    pub fn add_guest(&mut self, host: usize, guest: Guest) -> Result<usize> {
        let number = self.vms.len() as u8 + 1;
        let mac = MacAddr([2, 0, 0, 0, 0, number]);
        let address = Ipv4Addr::new(10, 0, 0, number);
        let netns = Netns::new(&format!("vm{number}"))?;
        let port = format!("port{number}");
        let host = &self.hosts[host].netns;
        let mut machine = None;
        if guest == Guest::Tap {
            machine = Some(Machine::start(&netns, host, &port)?);
            netns.run(&format!("ip link set eth0 address {mac}"))?;
        } else {
            host.run(&format!(
                "ip link add {port} type veth peer name eth0 address {mac} netns {}",
                netns.name()
            ))?;
        }
        if guest == Guest::Plain {
            wire(&netns, "eth0", self.vm_mtu)?;
        }
        netns.run_all(&format!(
            "ip link set eth0 mtu {}
             ip addr add {address}/24 dev eth0
             ip link set eth0 up",
            self.vm_mtu
        ))?;
        if guest == Guest::PollingVeth {
            netns.run("ethtool -K eth0 gro on")?;
        }
        if self.vm_mtu > VETH_MTU {
            host.run(&format!("ip link set {port} mtu {}", self.vm_mtu))?;
        }
        if self.segment {
            plug(host, &port, guest)?;
        } else {
            host.run(&format!("ethtool -K {port} gro on"))?;
        }
        self.vms.push(Vm {
            netns,
            mac,
            address,
            port,
            machine,
        });
        Ok(self.vms.len() - 1)
    }

    /// Move a VM's network card: the host's end of its veth goes to another
    /// host's namespace and bridge. Nobody is told; see [`Vm::announce`].
    pub fn move_vm(&self, vm: usize, from: usize, to: usize) -> Result<()> {
        let port = &self.vms[vm].port;
        let to = &self.hosts[to].netns;
        self.hosts[from]
            .netns
            .run(&format!("ip link set {port} netns {}", to.name()))?;
        plug(to, port, Guest::Plain)
    }

    /// A second address of a host's uplink, by which the router reaches it too.
    pub fn add_address(&self, host: usize, address: IpAddr) -> Result<()> {
        let bits = self.underlay.host_bits();
        add_address(&self.hosts[host].netns, address, bits, UPLINK)?;
        let via = self.hosts[host].address;
        self.router
            .run(&format!("ip route add {address}/{bits} via {via}"))?;
        Ok(())
    }

    /// The host's static entry for a MAC behind another host, in both tables.
    pub fn set_remote(&self, host: usize, mac: MacAddr, remote: usize) -> Result<()> {
        let remote = self.hosts[remote].address;
        let netns = &self.hosts[host].netns;
        netns.run(&format!(
            "bridge fdb replace {mac} dev {VXLAN} self static dst {remote}"
        ))?;
        netns.run(&format!(
            "bridge fdb replace {mac} dev {VXLAN} master static"
        ))?;
        Ok(())
    }

    /// Resolve every host's gateway, as traffic would.
    pub fn warm_up(&self) -> Result<()> {
        for host in &self.hosts {
            let ping = format!("ping -c 1 -W 2 {}", host.gateway);
            host.netns.run(&ping).context("underlay")?;
        }
        Ok(())
    }
}

/// Frames as a NIC would see them: no superframes, no unfinished checksums; and
/// GRO, because a veth only receives redirected frames where it polls.
fn wire(netns: &Netns, device: &str, mtu: u32) -> Result<()> {
    netns.run_all(&format!(
        "ethtool -K {device} tso off gso off tx off txvlan off gro on
         ip link set {device} mtu {mtu}"
    ))
}

/// Namespaces begin without IPv6. Addresses are usable at once, the link-local
/// one too: the kernel asks for neighbours from it.
fn enable_ipv6(netns: &Netns, device: &str) -> Result<()> {
    netns.enter(|| {
        for (device, key, value) in [
            (device, "accept_dad", "0"),
            (device, "accept_ra", "0"),
            (device, "disable_ipv6", "0"),
            ("lo", "disable_ipv6", "0"),
        ] {
            let path = format!("/proc/sys/net/ipv6/conf/{device}/{key}");
            std::fs::write(&path, value).context(path)?;
        }
        Ok(())
    })
}

/// Usable at once: no duplicate address detection.
fn add_address(netns: &Netns, address: IpAddr, bits: u8, device: &str) -> Result<()> {
    let nodad = if address.is_ipv6() { "nodad" } else { "" };
    netns.run(&format!(
        "ip addr add {address}/{bits} dev {device} {nodad}"
    ))?;
    Ok(())
}

/// GRO is turned on after "up", and off before, because only a change while the
/// device is up tells the peer that redirected frames are taken
/// (drivers/net/veth.c, veth_set_features).
fn plug(host: &Netns, port: &str, guest: Guest) -> Result<()> {
    host.run_all(&format!(
        "ip link set {port} master {BRIDGE}
         ip link set {port} up"
    ))?;
    if matches!(guest, Guest::Plain | Guest::PollingVeth) {
        host.run_all(&format!(
            "ethtool -K {port} gro off
             ethtool -K {port} gro on"
        ))?;
    }
    Ok(())
}
