//! Guests that use offloads: unfinished checksums, superframes, merged frames.
//! Everything here is done for every kind of port and for tunnels with and
//! without outer checksum, by the kernel alone and by the accelerated host.

mod checksums;
mod gso;
mod mixed;
mod mtu;
mod neighbour;
mod stats;
mod tcp;

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use serde_json::Value;
use vtep_tests::daemon::Daemon;
use vtep_tests::lab::{Family, Guest, Lab, Options, VM_MTU, Vm};
use vtep_tests::wait_until;

/// One kind of port and tunnel.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub guest: Guest,
    pub underlay: Family,
    /// Outer UDP checksum, which is the kernel's default.
    pub udpcsum: bool,
    pub underlay_mtu: u32,
}

impl Case {
    fn lab(&self) -> Lab {
        let vxlan = match (self.underlay, self.udpcsum) {
            (Family::V4, true) => "udpcsum",
            (Family::V4, false) => "noudpcsum",
            (Family::V6, true) => "",
            (Family::V6, false) => "udp6zerocsumtx udp6zerocsumrx",
        };
        let mut lab = Lab::with(&Options {
            vxlan: vxlan.into(),
            underlay: self.underlay,
            underlay_mtu: Some(self.underlay_mtu),
            ..Options::default()
        })
        .unwrap();
        for host in 0..2 {
            let vm = lab.add_guest(host, self.guest).unwrap();
            let Vm { netns, address, .. } = &lab.vms[vm];
            netns
                .enter(|| {
                    Ok(std::fs::write(
                        "/proc/sys/net/ipv6/conf/eth0/disable_ipv6",
                        "0",
                    )?)
                })
                .unwrap();
            let v6 = v6(&lab.vms[vm]);
            netns
                .run(&format!("ip addr add {v6}/64 dev eth0 nodad"))
                .unwrap_or_else(|error| panic!("{address}: {error:#}"));
        }
        lab.warm_up().unwrap();
        lab
    }
}

/// A VM's second address.
pub fn v6(vm: &Vm) -> IpAddr {
    let [.., last] = vm.address.octets();
    Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last.into()).into()
}

/// Two hosts with a VM each; the daemon on both.
pub struct World {
    guest: Guest,
    pub lab: Lab,
    pub daemons: Vec<Daemon>,
    /// Fast frames from ports and from the wire at the last look.
    seen: Vec<[u64; 2]>,
}

impl World {
    /// Everything resolved and learned.
    pub fn new(case: &Case) -> Self {
        let mut world = Self::without_daemons(case);
        world.start();
        world
    }

    fn without_daemons(case: &Case) -> Self {
        Self {
            guest: case.guest,
            lab: case.lab(),
            daemons: Vec::new(),
            seen: Vec::new(),
        }
    }

    fn start(&mut self) {
        self.start_cold();
        self.meet();
        self.look();
    }

    /// Without a frame.
    fn start_cold(&mut self) {
        for (host, vm) in self.lab.hosts.iter().zip(&self.lab.vms) {
            self.daemons.push(match self.guest {
                Guest::Plain => Daemon::start(host, &[&vm.port]).unwrap(),
                _ => Daemon::with_config(host, "").unwrap(),
            });
        }
    }

    /// Both VMs speak, over both families.
    fn meet(&self) {
        let [a, b] = self.vms();
        for address in [IpAddr::from(b.address), v6(b)] {
            a.netns
                .run(&format!("ping -c 2 -i 0.2 -W 2 {address}"))
                .unwrap();
        }
        for daemon in &self.daemons {
            for vm in [a, b] {
                wait_until(
                    Duration::from_secs(5),
                    &format!("{} is known", vm.mac),
                    || Ok(daemon.fdb(vm.mac)?.is_some()),
                )
                .unwrap();
            }
            let jumbo = self.lab.vm_mtu > VM_MTU;
            if !jumbo || self.port(daemon)["accelerated"] == Value::Bool(true) {
                daemon.wait_accelerated(a.mac).unwrap();
                daemon.wait_accelerated(b.mac).unwrap();
            }
        }
    }

    pub fn vms(&self) -> [&Vm; 2] {
        [&self.lab.vms[0], &self.lab.vms[1]]
    }

    /// The port of a daemon's host in its status.
    fn port(&self, daemon: &Daemon) -> Value {
        daemon.json(&["status"]).unwrap()["ports"][0].clone()
    }

    fn look(&mut self) {
        self.seen = self
            .daemons
            .iter()
            .map(|daemon| {
                [
                    daemon.frames("egress-remote").unwrap(),
                    fast_ingress(daemon),
                ]
            })
            .collect();
    }

    /// Since the last time, both hosts carried at least so many frames in both
    /// directions on the fast path, by the hook for this kind of port.
    pub fn assert_fast(&mut self, frames: u64) {
        let before = std::mem::take(&mut self.seen);
        self.look();
        for ((daemon, before), now) in self.daemons.iter().zip(&before).zip(&self.seen) {
            let port = self.port(daemon);
            let jumbo = self.lab.vm_mtu > VM_MTU;
            if jumbo && port["accelerated"] == Value::Bool(false) {
                assert!(port["reason"].is_string(), "{port}");
                continue;
            }
            let hook = if self.guest == Guest::Plain {
                "xdp"
            } else {
                "tcx"
            };
            assert_eq!(port["hook"], hook, "{port}");
            for (direction, (now, before)) in
                ["egress", "ingress"].iter().zip(now.iter().zip(before))
            {
                if jumbo && *direction == "ingress" && port["ingress"] == "kernel" {
                    continue;
                }
                assert!(
                    now - before >= frames,
                    "{direction}: {} of {frames} frames, {}",
                    now - before,
                    daemon.cli(&["stats"]).unwrap()
                );
            }
        }
    }
}

fn fast_ingress(daemon: &Daemon) -> u64 {
    let frames = |outcome| daemon.frames(outcome).unwrap();
    frames("ingress-local") + frames("ingress-local-stack")
}

/// One test for every kind of port and tunnel.
macro_rules! for_all_ports {
    ($($name:ident: $test:expr;)*) => {$(
        mod $name {
            use super::*;
            use $crate::offload::Case;
            use vtep_tests::{is_root, lab::{Family, Guest, VM_MTU}};

            $crate::offload::for_all_ports!(@ports $name, $test,
                plain_udpcsum: Plain, V4, true;
                plain_noudpcsum: Plain, V4, false;
                veth_udpcsum: Veth, V4, true;
                veth_noudpcsum: Veth, V4, false;
                polling_veth_udpcsum: PollingVeth, V4, true;
                polling_veth_noudpcsum: PollingVeth, V4, false;
                tap_udpcsum: Tap, V4, true;
                tap_noudpcsum: Tap, V4, false;
                veth_on_ipv6: Veth, V6, true;
                veth_on_ipv6_zerocsum: Veth, V6, false;
                tap_on_ipv6: Tap, V6, true;
                tap_on_ipv6_zerocsum: Tap, V6, false;
            );
        }
    )*};
    (@ports $name:ident, $test:expr, $($port:ident: $guest:ident, $underlay:ident, $udpcsum:literal;)*) => {$(
        #[test]
        fn $port() {
            if is_root(concat!(stringify!($name), "::", stringify!($port))) {
                $test(&Case {
                    guest: Guest::$guest,
                    underlay: Family::$underlay,
                    udpcsum: $udpcsum,
                    underlay_mtu: VM_MTU + Family::$underlay.overhead(),
                });
            }
        }
    )*};
}
pub(crate) use for_all_ports;
