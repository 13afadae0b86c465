//! The outer headers in the maps are those that the kernel's own driver writes:
//! a VM's frames pass to the kernel and are looked at on the wire.

use std::time::Duration;

use vtep_common::layout::{
    REMOTE_DF_INHERIT, REMOTE_TOS_INHERIT, REMOTE_TTL_INHERIT, REMOTE_UDP_CHECKSUM, Remote,
};
use vtep_tests::daemon::Daemon;
use vtep_tests::frames::{Socket, is_udp_to};
use vtep_tests::lab::{Family, Lab, Options};
use vtep_tests::maps::Maps;
use vtep_tests::on_both_underlays;

on_both_underlays!(
    r3_r5_r28_r29_r34_headers_are_those_the_kernel_writes,
    r28_r34_inherited_fields_are_those_the_kernel_writes,
    hop_limits_of_underlay_and_route_are_those_the_kernel_writes,
);

/// What a VXLAN device with `options` sends for a ping of the VM, and what the
/// maps have for it. `prepare` changes the underlay before.
struct Seen {
    family: Family,
    remote: Remote,
    frame: Vec<u8>,
}

fn look(family: Family, options: &str, ping: &str, prepare: impl Fn(&Lab)) -> Seen {
    let mut lab = Lab::with(&Options {
        vxlan: options.to_owned(),
        underlay: family,
        ..Options::default()
    })
    .unwrap();
    let (a, b) = (lab.add_vm(0).unwrap(), lab.add_vm(1).unwrap());
    prepare(&lab);
    // The port is not accelerated, so the kernel writes what the maps would make us write.
    let daemon = Daemon::with_config(&lab.hosts[0], "[ports.port1]\nhook = \"kernel\"").unwrap();
    lab.set_remote(0, lab.vms[b].mac, 1).unwrap();
    daemon.wait_accelerated(lab.vms[b].mac).unwrap();
    let maps = Maps::open(daemon.instance()).unwrap();
    let remote = maps.remote(1, lab.vms[b].mac).expect("a remote");
    let wire = lab.router.enter(|| Socket::open("to1")).unwrap();
    let line = format!("ping -c 1 -W 2 {ping} 10.0.0.2");
    lab.vms[a].netns.run(&line).unwrap();
    let inner = if family == Family::V4 { 50 } else { 70 };
    // The router sees the answer as well.
    let source = lab.hosts[0].uplink_mac.0;
    let is_ping = |frame: &[u8]| {
        let ipv4 = frame.get(inner + 12..inner + 14) == Some(&[8, 0]);
        is_udp_to(frame, 4789) && frame[6..12] == source && ipv4
    };
    let frames = wire.capture(1, Duration::from_secs(2), is_ping).unwrap();
    let frame = frames.into_iter().next().expect("an encapsulated ping");
    Seen {
        family,
        remote,
        frame,
    }
}

impl Seen {
    /// The frame's outer headers without what differs from frame to frame, and
    /// whether there is a UDP checksum.
    fn kernel(&self) -> (Vec<u8>, bool) {
        let (length, udp) = match self.family {
            Family::V4 => (16, 34),
            Family::V6 => (18, 54),
        };
        let mut header = self.frame[..udp + 8].to_vec();
        header[length..length + 2].fill(0);
        if self.family == Family::V4 {
            // Identification and checksum.
            header[18..20].fill(0);
            header[24..26].fill(0);
        }
        let checksum = header[udp + 6..udp + 8] != [0, 0];
        for field in [udp, udp + 4, udp + 6] {
            header[field..field + 2].fill(0);
        }
        (header, checksum)
    }

    fn source_port(&self) -> u16 {
        let udp = if self.family == Family::V4 { 34 } else { 54 };
        u16::from_be_bytes([self.frame[udp], self.frame[udp + 1]])
    }

    #[track_caller]
    fn compare(&self, what: &str) {
        let (header, checksum) = self.kernel();
        assert_eq!(self.remote.header[..header.len()], header, "{what}");
        let sends = self.remote.flags & REMOTE_UDP_CHECKSUM != 0;
        assert_eq!(sends, checksum, "{what}");
    }
}

fn r3_r5_r28_r29_r34_headers_are_those_the_kernel_writes(underlay: Family) {
    let of_family: &[&str] = match underlay {
        Family::V4 => &["udpcsum", "noudpcsum", "df set"],
        Family::V6 => &[
            "udp6zerocsumtx udp6zerocsumrx",
            "noudpcsum",
            "flowlabel 0xabcde tos 0xfc",
            "df set",
        ],
    };
    for options in ["", "tos 0xb8 ttl 9", "tos 3"].iter().chain(of_family) {
        look(underlay, options, "", |_| {}).compare(options);
    }
    let ports = look(underlay, "srcport 5000 5004", "", |_| {});
    ports.compare("srcport");
    let (min, count) = (ports.remote.port_min, ports.remote.port_count);
    assert!((min..min + count).contains(&ports.source_port()));
}

/// The programs copy what the flags say; the kernel does what they mean.
fn r28_r34_inherited_fields_are_those_the_kernel_writes(underlay: Family) {
    let options = "ttl inherit tos inherit df inherit";
    // iputils: -Q sets the TOS, -t the TTL, -M the DF bit.
    for (ping, tos, ttl, df) in [
        ("-Q 0xb8 -t 33 -M do", 0xb8, 33, true),
        ("-Q 0x28 -t 7 -M dont", 0x28, 7, false),
    ] {
        let seen = look(underlay, options, ping, |_| {});
        let inherit = REMOTE_TOS_INHERIT | REMOTE_TTL_INHERIT;
        let (mut remote, flags) = (seen.remote, seen.remote.flags);
        assert_eq!(flags & inherit, inherit);
        let header = &mut remote.header;
        match underlay {
            Family::V4 => {
                assert_eq!(flags & REMOTE_DF_INHERIT, REMOTE_DF_INHERIT);
                (header[15], header[22]) = (tos, ttl);
                header[20] = if df { 0x40 } else { 0 };
            }
            Family::V6 => {
                assert_eq!(flags & REMOTE_DF_INHERIT, 0);
                (header[14], header[15], header[21]) = (0x60 | tos >> 4, tos << 4, ttl);
            }
        }
        let (kernel, _) = seen.kernel();
        assert_eq!(header[..kernel.len()], kernel, "{ping}");
    }
}

fn hop_limits_of_underlay_and_route_are_those_the_kernel_writes(underlay: Family) {
    let route = |lab: &Lab| {
        let (to, via) = (lab.hosts[1].address, lab.hosts[0].gateway);
        let host = &lab.hosts[0].netns;
        host.run(&format!("ip route add {to} via {via} hoplimit 7"))
            .unwrap();
    };
    for options in ["", "ttl 5"] {
        look(underlay, options, "", route).compare("hop limit of the route");
    }
    if underlay == Family::V6 {
        let device = |lab: &Lab| {
            let path = "/proc/sys/net/ipv6/conf/uplink0/hop_limit";
            let set = || Ok(std::fs::write(path, "33")?);
            lab.hosts[0].netns.enter(set).unwrap();
        };
        let seen = look(underlay, "", "", device);
        seen.compare("hop limit of the device");
        assert_eq!(seen.remote.header[21], 33);
    }
}
