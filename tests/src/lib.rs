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
pub mod streams;
pub mod twins;

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Whether the kernel tests can run. Without root they are skipped, loudly, or
/// fail where VTEP_TESTS_REQUIRE=root is set.
#[must_use]
pub fn is_root(test: &str) -> bool {
    // SAFETY: no arguments, no memory, cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    let required = std::env::var("VTEP_TESTS_REQUIRE").is_ok_and(|what| what == "root");
    assert!(root || !required, "{test} needs root");
    if !root {
        eprintln!("SKIPPED {test}: needs root");
    }
    root
}

/// Poll until `done` says so; the error names what was waited for.
pub fn wait_until(
    time: Duration,
    what: &str,
    mut done: impl FnMut() -> Result<bool>,
) -> Result<Duration> {
    let start = Instant::now();
    loop {
        if done()? {
            return Ok(start.elapsed());
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
