//! Two hosts on one wire, a guest behind each, and TCP between the guests:
//! streams by iperf3, requests and responses by code of our own.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use vtep_common::MacAddr;
use vtep_tests::daemon::Daemon;
use vtep_tests::lab::Host;
use vtep_tests::netns::{Netns, execute};
use vtep_tests::streams::{connect, pin_to_cpu, transfer};

/// What the sender and what the receiver of a stream runs on.
const SENDER_CPU: usize = 0;
const RECEIVER_CPU: usize = 1;
/// Checked byte by byte before anything is timed.
const CHECK_BYTES: usize = 1 << 20;

/// What sits between the guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Kernel,
    /// This VTEP, with the hook that the ports' features call for.
    Vtep,
}

/// One contestant; dropped, nothing of it is left.
pub struct Pair {
    guests: [Netns; 2],
    daemons: Vec<Daemon>,
    server: Child,
    /// The server says when it has closed one test and waits for the next.
    listens: Receiver<()>,
    // Behind the daemons, which unload when they are dropped.
    _hosts: [Host; 2],
}

impl Drop for Pair {
    fn drop(&mut self) {
        // It may have ended by itself; there is nothing else to lose.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

const fn guest_address(number: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, number as u8 + 1)
}

impl Pair {
    /// `offloads`: guests use what a veth offers; else they send plain frames.
    pub fn build(way: Way, offloads: bool, vxlan: &str) -> Result<Self> {
        let hosts = [host(0)?, host(1)?];
        wire(&hosts)?;
        let guests = [Netns::new("guest1")?, Netns::new("guest2")?];
        for number in 0..2 {
            segment(&hosts[number], hosts[1 - number].address, vxlan)?;
            guest(&hosts[number].netns, &guests[number], number, offloads)?;
        }
        let mut daemons = Vec::new();
        if way == Way::Vtep {
            // Nobody can tell from a veth that its owner sends plain frames.
            let config = if offloads {
                ""
            } else {
                "[ports.port0]\nhook = \"xdp\"\n"
            };
            for host in &hosts {
                daemons.push(Daemon::with_config(host, config)?);
            }
        }
        let (server, listens) = serve(&guests[1])?;
        let pair = Self {
            guests,
            daemons,
            server,
            listens,
            _hosts: hosts,
        };
        pair.check()?;
        Ok(pair)
    }

    /// Bytes arrive as they were sent, and the contestant itself carries them.
    fn check(&self) -> Result<()> {
        self.guests[0].run(&format!("ping -c 2 -i 0.2 -W 2 {}", guest_address(1)))?;
        for daemon in &self.daemons {
            for number in 0..2 {
                daemon.wait_accelerated(mac(number))?;
            }
        }
        let before = self.fast_frames()?;
        let (near, far) = self.connection()?;
        transfer(&near, &far, CHECK_BYTES)?;
        transfer(&far, &near, CHECK_BYTES)?;
        for (before, now) in before.iter().zip(self.fast_frames()?) {
            // Superframes that need an outer checksum are the kernel's; what is small is ours.
            ensure!(now > *before, "TCP did not take the fast path");
        }
        Ok(())
    }

    fn fast_frames(&self) -> Result<Vec<u64>> {
        let frames = |daemon: &Daemon| daemon.frames("egress-remote");
        self.daemons.iter().map(frames).collect()
    }

    fn connection(&self) -> Result<(TcpStream, TcpStream)> {
        connect(&self.guests[0], &self.guests[1], guest_address(1).into())
    }

    /// Bits/s that arrived over `flows` connections; `reverse`: from the second
    /// guest to the first.
    pub fn stream(&self, flows: u32, reverse: bool, time: Duration) -> Result<f64> {
        let mut command = self.guests[0].command("iperf3");
        let cpus = match reverse {
            false => format!("{SENDER_CPU},{RECEIVER_CPU}"),
            true => format!("{RECEIVER_CPU},{SENDER_CPU}"),
        };
        command.args(["--json", "--client", &guest_address(1).to_string()]);
        command.args(["--affinity", &cpus, "--parallel", &flows.to_string()]);
        command.args(["--time", &time.as_secs().max(1).to_string()]);
        if reverse {
            command.arg("--reverse");
        }
        self.listens
            .recv_timeout(Duration::from_secs(10))
            .context("iperf3 does not listen")?;
        let output = execute(&mut command)?;
        let report: Value = serde_json::from_slice(&output.stdout)?;
        let rate = report["end"]["sum_received"]["bits_per_second"].as_f64();
        rate.with_context(|| format!("iperf3: {}", report["error"]))
    }

    /// Round trips/s of one byte, on one CPU.
    pub fn request_response(&self, time: Duration) -> Result<f64> {
        let (mut client, mut server) = self.connection()?;
        let server = std::thread::spawn(move || -> Result<()> {
            pin_to_cpu(SENDER_CPU);
            let mut byte = [0];
            while server.read(&mut byte)? == 1 {
                server.write_all(&byte)?;
            }
            Ok(())
        });
        let client = std::thread::spawn(move || -> Result<f64> {
            pin_to_cpu(SENDER_CPU);
            let mut byte = [0];
            let mut trip = || -> Result<()> {
                client.write_all(&[1])?;
                Ok(client.read_exact(&mut byte)?)
            };
            for _ in 0..100 {
                trip()?;
            }
            let (start, mut trips) = (Instant::now(), 0u32);
            while start.elapsed() < time {
                trip()?;
                trips += 1;
            }
            Ok(f64::from(trips) / start.elapsed().as_secs_f64())
        });
        let rate = client
            .join()
            .unwrap_or_else(|p| std::panic::resume_unwind(p));
        server
            .join()
            .unwrap_or_else(|p| std::panic::resume_unwind(p))?;
        rate
    }
}

fn mac(guest: usize) -> MacAddr {
    MacAddr([2, 0, 0, 0, 0, guest as u8 + 1])
}

fn host(number: usize) -> Result<Host> {
    let [address, gateway] = [number, 1 - number].map(|n| Ipv4Addr::new(192, 0, 2, n as u8 + 1));
    let [uplink_mac, gateway_mac] =
        [number, 1 - number].map(|n| MacAddr([2, 0, 0, 0xff, 0, n as u8]));
    Ok(Host {
        netns: Netns::new(&format!("bench{}", number + 1))?,
        address: address.into(),
        gateway: gateway.into(),
        uplink_mac,
        gateway_mac,
    })
}

/// The wire carries frames of a wire's size: superframes on it would make every
/// encapsulation look free.
fn wire([a, b]: &[Host; 2]) -> Result<()> {
    a.netns.run(&format!(
        "ip link add uplink0 address {} type veth peer name uplink0 address {} netns {}",
        a.uplink_mac,
        b.uplink_mac,
        b.netns.name()
    ))?;
    for host in [a, b] {
        host.netns.run_all(&format!(
            "ethtool -K uplink0 tso off gso off tx off txvlan off
             ip addr add {}/24 dev uplink0
             ip link set uplink0 up",
            host.address
        ))?;
    }
    // Only now: an end that is down does not tell the other that it polls.
    for host in [a, b] {
        host.netns.run("ethtool -K uplink0 gro on")?;
    }
    Ok(())
}

fn segment(host: &Host, remote: IpAddr, vxlan: &str) -> Result<()> {
    host.netns.run_all(&format!(
        "ip link add br0 type bridge
         ip link add vxlan0 type vxlan id 100 local {} dstport 4789 {vxlan}
         ip link set vxlan0 mtu 1450 master br0
         ip link set vxlan0 up
         ip link set br0 up
         bridge fdb append 00:00:00:00:00:00 dev vxlan0 dst {remote}",
        host.address
    ))
}

fn guest(host: &Netns, guest: &Netns, number: usize, offloads: bool) -> Result<()> {
    host.run(&format!(
        "ip link add port0 type veth peer name eth0 address {} netns {}",
        mac(number),
        guest.name()
    ))?;
    if !offloads {
        guest.run("ethtool -K eth0 tso off gso off tx off")?;
    }
    guest.run_all(&format!(
        "ip link set eth0 mtu 1450
         ip addr add {}/24 dev eth0
         ip link set eth0 up",
        guest_address(number)
    ))?;
    host.run_all(
        "ip link set port0 master br0
         ip link set port0 up",
    )?;
    guest.run("ethtool -K eth0 gro on")?;
    Ok(())
}

/// iperf3's server.
fn serve(guest: &Netns) -> Result<(Child, Receiver<()>)> {
    let mut server = guest
        .command("iperf3")
        .args(["--server", "--forceflush"])
        .stdout(Stdio::piped())
        .spawn()
        .context("iperf3")?;
    let output = server.stdout.take().context("iperf3 without output")?;
    let (says, listens) = channel();
    // Reads on to the end, so that the server never waits for a reader.
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if line.contains("listening") {
                // Nobody may be left to hear it.
                let _ = says.send(());
            }
        }
    });
    Ok((server, listens))
}
