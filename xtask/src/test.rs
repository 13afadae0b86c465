//! `cargo xtask test`: sets up, builds, runs the pure tests as the user and
//! everything that needs the kernel as root. Whatever happens, namespaces are
//! removed and the last line is the sum over all tests.

use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::results::{Shown, Sum};
use crate::run::{as_root, can_be_root, cargo, interrupted, is_root, root_path, run};
use crate::{build, demo, leftovers, setup, vm};

/// Time for test programs to end after Ctrl-C.
const GRACE: Duration = Duration::from_secs(3);
/// Variables of the kernel tests that go through sudo.
const FORWARDED: &[&str] = &[
    "VTEP_EBPF_DIR",
    "VTEP_BIN",
    "VTEP_LOG",
    "RUST_BACKTRACE",
    "PATH",
];

/// What `vtep-oracle` is told.
#[derive(clap::Args)]
pub struct OracleOptions {
    /// Frames, over all VXLAN devices that are compared [default: 100000]
    #[arg(long, requires = "oracle")]
    frames: Option<u64>,
    /// The same seed makes the same frames [default: 1]
    #[arg(long, requires = "oracle")]
    seed: Option<u64>,
    /// One VXLAN device alone
    #[arg(long, requires = "oracle")]
    device: Option<String>,
    /// One frame of the device alone, with everything that comes out
    #[arg(long, requires_all = ["oracle", "device"])]
    only: Option<u32>,
}

/// The kernel's driver as oracle, for as many frames as one likes.
pub fn oracle(options: &OracleOptions) -> Result<()> {
    let mut words = Vec::new();
    words.extend(options.frames.map(|n| format!("--frames={n}")));
    words.extend(options.seed.map(|n| format!("--seed={n}")));
    words.extend(options.device.as_ref().map(|n| format!("--device={n}")));
    words.extend(options.only.map(|n| format!("--only={n}")));
    demo::run_binary("vtep-tests", "vtep-oracle", &words)
}

pub fn run_all(filter: Option<&str>) -> ExitCode {
    let mut sum = Sum::default();
    if let Err(error) = suites(&mut sum, filter) {
        eprintln!("test: {error:#}");
        sum.failed += 1;
    }
    leftovers::remove();
    sum.report()
}

fn suites(sum: &mut Sum, filter: Option<&str>) -> Result<()> {
    setup::run()?;
    build::all(false)?;
    can_be_root().context("the kernel tests")?;
    leftovers::remove();
    let pure = Suite {
        what: "pure tests",
        cargo: &|| Ok(cargo("cargo", "test")),
        options: &[],
    };
    let kernel = Suite {
        what: "kernel tests",
        cargo: &kernel_cargo,
        // Most of them measure time or move many frames: one after the other.
        options: &["--test-threads=1"],
    };
    // What does not compile or crashes in one says nothing about the other.
    for suite in [pure, kernel] {
        if let Err(error) = suite.run(sum, filter) {
            eprintln!("test: {}: {error:#}", suite.what);
            sum.failed += 1;
        }
        if interrupted() {
            return Ok(());
        }
    }
    in_machine(sum);
    if sum.passed + sum.failed + sum.skipped == 0 {
        bail!("no test is named like `{}`", filter.unwrap_or(""));
    }
    Ok(())
}

/// Tests that the running kernel could not run. Where no virtual machine can be
/// had they are skipped, loudly.
fn in_machine(sum: &mut Sum) {
    let (left_out, names): (Vec<String>, Vec<String>) = sum
        .take_for_machine()
        .into_iter()
        .partition(|name| vm::left_out(name).is_some());
    for name in left_out {
        let reason = vm::left_out(&name).unwrap_or_default();
        sum.skip(&format!("not in {}: {reason}", vm::WHAT), &[name]);
    }
    if names.is_empty() {
        return;
    }
    match vm::prepare(vm::Series::V6_12) {
        Ok(kernel) => {
            if let Err(error) = vm::run(&kernel, &|test| names.iter().any(|n| n == test), sum) {
                eprintln!("test: {}: {error:#}", vm::WHAT);
                sum.failed += 1;
            }
        }
        Err(error) => sum.skip(&format!("no virtual machine: {error:#}"), &names),
    }
}

/// Compiled as the user, run as root: cargo's own files stay the user's.
fn kernel_cargo() -> Result<Command> {
    let mut command = cargo("cargo", "test");
    command.args(["--package", "vtep-tests", "--package", "vtep-bench"]);
    command
        .env("VTEP_TESTS_REQUIRE", "root")
        .env("VTEP_BIN", build::vtep_binary(false))
        .env("PATH", root_path());
    if !is_root() {
        let mut words = vec!["sudo".to_owned(), "-n".into(), "env".into()];
        words.push("VTEP_TESTS_REQUIRE=root".to_owned());
        let given = |name: &str| {
            let own = command.get_envs().find(|(key, _)| *key == name);
            own.and_then(|(_, value)| value.map(ToOwned::to_owned))
                .or_else(|| std::env::var_os(name))
        };
        for name in FORWARDED {
            if let Some(value) = given(name) {
                words.push(format!("{name}={}", value.to_string_lossy()));
            }
        }
        let runner = serde_json::to_string(&words)?;
        command.args(["--config", &format!("target.'cfg(all())'.runner={runner}")]);
    }
    Ok(command)
}

/// One cargo invocation.
struct Suite<'a> {
    what: &'a str,
    cargo: &'a dyn Fn() -> Result<Command>,
    options: &'a [&'a str],
}

impl Suite<'_> {
    /// Compile, run, show, add up. An error: it does not compile, or programs
    /// ended without a result.
    fn run(&self, sum: &mut Sum, filter: Option<&str>) -> Result<()> {
        eprintln!("test: {}: compiling", self.what);
        run((self.cargo)()?.arg("--no-run"))?;
        if interrupted() {
            return Ok(());
        }
        eprintln!("test: {}: running", self.what);
        let (reader, writer) = std::io::pipe()?;
        let mut command = (self.cargo)()?;
        command
            .arg("--no-fail-fast")
            .args(filter)
            .arg("--")
            .args(self.options)
            .stdin(Stdio::null())
            .stdout(writer.try_clone()?)
            .stderr(writer)
            // A group of its own, so that all of it can be ended.
            .process_group(0);
        let mut child = command.spawn().context("cannot start cargo")?;
        // It holds the writing ends; the pipe has to end with the programs.
        drop(command);
        let group = child.id();
        let over = AtomicBool::new(false);
        let failed_before = sum.failed;
        let status = std::thread::scope(|scope| {
            scope.spawn(|| end_when_interrupted(group, &over));
            let mut shown = Shown::new(self.what);
            for bytes in BufReader::new(reader).split(b'\n') {
                let Ok(bytes) = bytes else { break };
                let line = String::from_utf8_lossy(&bytes);
                sum.add(&line);
                shown.line(&line);
            }
            let status = child.wait();
            over.store(true, Ordering::Relaxed);
            status
        })?;
        let crashed = std::mem::take(&mut sum.open);
        if crashed > 0 && !interrupted() {
            bail!("{crashed} test programs ended in the middle: see above");
        }
        if !status.success() && sum.failed == failed_before && !interrupted() {
            bail!("cargo failed ({status}) without a failed test: see above");
        }
        Ok(())
    }
}

/// Ctrl-C ends all programs of the group, through sudo where they are root's.
fn end_when_interrupted(group: u32, over: &AtomicBool) {
    let mut signal = "-INT";
    let mut since = Instant::now();
    while !over.load(Ordering::Relaxed) {
        if interrupted() && (signal == "-INT" || since.elapsed() > GRACE) {
            if let Ok(mut kill) = as_root("kill") {
                // Not being there any more is fine.
                let _ = kill
                    .args([signal, "--", &format!("-{group}")])
                    .stderr(Stdio::null())
                    .status();
            }
            signal = "-KILL";
            since = Instant::now();
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
