//! The laboratory: hosts as network namespaces, the real daemon, frames on the
//! wire. Used by the lab tests, the demo and the benchmarks. Everything made
//! here is removed when its owner is dropped.

pub mod corpus;
pub mod daemon;
pub mod frames;
pub mod generator;
pub mod lab;
pub mod maps;
pub mod netns;
pub mod oracle;
pub mod segments;
pub mod streams;
pub mod tap;
pub mod twins;
pub mod vnet;
pub mod wiretap;

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Whether the kernel tests can run. Without root they are skipped, loudly, or
/// fail where VTEP_TESTS_REQUIRE lists `root`.
#[must_use]
pub fn is_root(test: &str) -> bool {
    // SAFETY: no arguments, no memory, cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    assert!(root || !is_required("root"), "{test} needs root");
    if !root {
        skip(test, "needs root");
    }
    root
}

/// Whether VTEP_TESTS_REQUIRE lists this need, so that a skip is a failure.
fn is_required(need: &str) -> bool {
    let list = std::env::var("VTEP_TESTS_REQUIRE").unwrap_or_default();
    list.split(',').any(|word| word == need)
}

/// Say that a test, or a part of one, proves nothing here. Goes past the test
/// harness, which shows nothing of tests that pass, on a line of its own.
pub fn skip(test: &str, reason: &str) {
    complain(&format!("\nSKIPPED {test}: {reason}"));
}

/// Devices that not every kernel makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    VlanAwareBridge,
    /// A bridge port or NIC with a VLAN tag of its own (8021q).
    Vlan,
    Dummy,
    Vrf,
    Bond,
}

impl Device {
    /// Words after `ip link add`.
    fn probe(self) -> &'static str {
        match self {
            Self::VlanAwareBridge => "name probe type bridge vlan_filtering 1",
            Self::Vlan => "link under name probe type vlan id 2",
            Self::Dummy => "name probe type dummy",
            Self::Vrf => "name probe type vrf table 10",
            Self::Bond => "name probe type bond mode active-backup",
        }
    }
}

/// Whether a test has root and the running kernel makes these devices. Without,
/// it is skipped, loudly, or fails where VTEP_TESTS_REQUIRE lists `devices`, as
/// `cargo xtask vm` does.
#[must_use]
pub fn has_devices(test: &str, devices: &[Device]) -> bool {
    if !is_root(test) {
        return false;
    }
    let netns = netns::Netns::new("probe").unwrap();
    netns
        .run("ip link add under type veth peer name other")
        .unwrap();
    for device in devices {
        if let Err(error) = netns.run(&format!("ip link add {}", device.probe())) {
            assert!(
                !is_required("devices"),
                "{test} needs {device:?}: {error:#}"
            );
            skip(
                test,
                &format!("this kernel has no {device:?} (`cargo xtask vm` boots one that has)"),
            );
            return false;
        }
        netns.run("ip link del probe").unwrap();
    }
    true
}

/// Poll until `done` says so; the error names what was waited for. Where the
/// machine is slow, VTEP_TESTS_PATIENCE multiplies the time.
pub fn wait_until(
    time: Duration,
    what: &str,
    mut done: impl FnMut() -> Result<bool>,
) -> Result<Duration> {
    let patience = std::env::var("VTEP_TESTS_PATIENCE").ok();
    let patience = patience.and_then(|factor| factor.parse().ok());
    let time = time * patience.unwrap_or(1);
    let start = Instant::now();
    loop {
        let asked = Instant::now();
        if done()? {
            return Ok(start.elapsed());
        }
        if patience.is_some() {
            // Asking must not take the CPU from what is waited for.
            std::thread::sleep(asked.elapsed());
        }
        if start.elapsed() > time {
            bail!("{what}: not within {time:?}");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// To stderr from a destructor: a closed pipe must not stop the cleaning up.
pub fn complain(text: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Makes a test of each of the functions for both kinds of underlay: `v4::NAME`
/// and `v6::NAME`.
#[macro_export]
macro_rules! on_both_underlays {
    ($($name:ident),* $(,)?) => {
        $crate::on_both_underlays!(@ v4 V4 $($name)*);
        $crate::on_both_underlays!(@ v6 V6 $($name)*);
    };
    (@ $module:ident $family:ident $($name:ident)*) => {
        mod $module {$(
            #[test]
            fn $name() {
                if $crate::is_root(stringify!($name)) {
                    super::$name($crate::lab::Family::$family);
                }
            }
        )*}
    };
}
