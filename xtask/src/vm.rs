//! `cargo xtask vm`: the lab tests in a virtual machine with a distribution's
//! kernel, for what the running kernel lacks (VLAN-aware bridges, VRFs, bonds,
//! dummies) or is too new to show. Needs no root beyond two Debian packages.

mod cpio;
mod kernel;
mod machine;
mod modules;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::results::{Shown, Sum};
use crate::run::{capture, cargo, has, quiet, root_path, workspace};
use crate::setup::install_packages;
use crate::{build, setup};
use cpio::Archive;
use kernel::Kernel;
pub use kernel::Series;
use machine::Machine;

/// Program that must be there, Debian package that brings it.
const TOOLS: &[(&str, &str)] = &[
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("xz", "xz-utils"),
    ("strip", "binutils"),
];
/// Programs that the tests start, beside busybox's.
const PROGRAMS: &[&str] = &[
    "sh", "ip", "bridge", "tc", "ethtool", "nft", "bpftool", "ping", "ps", "sysctl", "setpriv",
    "unshare", "nsenter", "timeout", "tcpdump",
];
/// Where things are inside.
const VTEP: &str = "/usr/bin/vtep";
const TESTS: &str = "/usr/bin/lab";
const EBPF_DIR: &str = "/usr/lib/vtep";
pub const WHAT: &str = "tests in a virtual machine";
const STREAM: &str = "the machine is too slow for its stream of frames";
const MEASURES: &str = "it measures time";
/// Tests that are not run inside, by the last part of their names, with the reason.
const LEFT_OUT: &[(&str, &str)] = &[
    ("kernel_path_carries_ping_tcp_and_100k_frames", STREAM),
    ("r37_replace_under_load_loses_nothing", STREAM),
    (
        "r39_kill_and_restart_under_100k_frames_lose_nothing",
        STREAM,
    ),
    ("unload_leaves_nothing_and_the_kernel_goes_on", STREAM),
    ("ping_tcp_and_udp_take_the_fast_path_on_both_hosts", STREAM),
    (
        "port_that_would_lose_redirected_frames_is_served_through_the_stack",
        STREAM,
    ),
    (
        "r42_a_hundred_thousand_generated_frames_equal_the_kernel",
        STREAM,
    ),
    ("a_replaced_entry_is_in_the_maps_within_5_ms", MEASURES),
    (
        "ten_thousand_entries_in_a_second_and_in_little_memory",
        MEASURES,
    ),
    ("busy_entries_stay_and_idle_ones_age", MEASURES),
];

/// How much slower than a real machine it is, for the deadlines of tests.
const PATIENCE: u32 = 10;
/// At a time; each takes some 400 MiB.
const MACHINES_MAX: usize = 4;
/// Time for all of them.
const LIMIT: Duration = Duration::from_secs(3600);

pub fn verb(filter: Option<&str>, series: Series) -> ExitCode {
    let mut sum = Sum::default();
    let result = setup::run()
        .and_then(|()| build::all(false))
        .and_then(|()| prepare(series))
        .and_then(|kernel| {
            run(
                &kernel,
                &|test| filter.is_none_or(|filter| test.contains(filter)),
                &mut sum,
            )
        });
    if let Err(error) = result {
        eprintln!("vm: {error:#}");
        sum.failed += 1;
    }
    sum.report()
}

/// QEMU and the kernel, fetched where they are missing.
pub fn prepare(series: Series) -> Result<Kernel> {
    let missing: Vec<&str> = TOOLS
        .iter()
        .filter(|(tool, _)| !has(tool))
        .map(|(_, package)| *package)
        .collect();
    if !missing.is_empty() {
        install_packages(&missing)?;
    }
    kernel::get(series)
}

/// Run the tests that `wanted` names, add up. Each processor of this host gets a
/// machine with its share of them.
pub fn run(kernel: &Kernel, wanted: &dyn Fn(&str) -> bool, sum: &mut Sum) -> Result<()> {
    eprintln!("test: {WHAT}: compiling");
    let tests = compile_tests()?;
    let names = names(&tests, wanted)?;
    ensure!(!names.is_empty(), "no lab test is named like that");
    let directory = workspace().join(format!("target/vm/run-{}", std::process::id()));
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    let _cleanup = Cleanup(&directory);
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let machines = processors.min(MACHINES_MAX).min(names.len());
    let initramfs = directory.join("initramfs.cpio");
    let mut bytes = fs::read(&kernel.modules)?;
    bytes.extend(userland(&tests, &names, machines, &directory)?);
    fs::write(&initramfs, bytes)?;
    eprintln!("test: {WHAT}: booting, {machines} of them");
    let shown = Mutex::new(Shown::new(WHAT));
    let results: Vec<(Sum, Result<()>)> = std::thread::scope(|scope| {
        let start = |number: usize| {
            let machine = Machine {
                number,
                kernel: kernel.image.clone(),
                initramfs: initramfs.clone(),
                log: workspace().join(format!("target/vm/kernel-{number}.log")),
                limit: LIMIT,
            };
            let shown = &shown;
            scope.spawn(move || {
                let mut sum = Sum::default();
                let result = share(&machine, shown, &mut sum);
                (sum, result)
            })
        };
        let running: Vec<_> = (0..machines).map(start).collect();
        running.into_iter().filter_map(|r| r.join().ok()).collect()
    });
    drop(shown);
    let mut all = Ok(());
    for (part, result) in results {
        sum.merge(part);
        all = all.and(result);
    }
    all
}

/// One machine's tests.
fn share(machine: &Machine, shown: &Mutex<Shown>, sum: &mut Sum) -> Result<()> {
    // Lines of one test stay together.
    let mut lines: Vec<String> = Vec::new();
    let show = |lines: &mut Vec<String>| {
        if let Ok(mut shown) = shown.lock() {
            lines.drain(..).for_each(|line| shown.line(&line));
        }
    };
    let status = machine.run(|line| {
        sum.add(line);
        lines.push(line.to_owned());
        if !sum.is_inside_test() {
            show(&mut lines);
        }
    });
    show(&mut lines);
    if status? != 0 && sum.failed == 0 {
        bail!("the test program ended with a status without a failed test: see above");
    }
    ensure!(
        sum.open == 0,
        "the test program ended in the middle: see above"
    );
    Ok(())
}

/// The path of the compiled lab tests.
fn compile_tests() -> Result<PathBuf> {
    let output = quiet(cargo("cargo", "test").args([
        "--package",
        "vtep-tests",
        "--test",
        "lab",
        "--no-run",
        "--message-format",
        "json",
    ]))?;
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        // The binaries of the package are built as well.
        .filter(|message| message["target"]["name"] == "lab")
        .find_map(|message| Some(PathBuf::from(message["executable"].as_str()?)))
        .context("cargo names no test program")
}

/// Names of the tests that are run; those that are not are said.
fn names(tests: &Path, wanted: &dyn Fn(&str) -> bool) -> Result<Vec<String>> {
    let list = capture(Command::new(tests).arg("--list"))?;
    let mut names: Vec<String> = list
        .lines()
        .filter_map(|line| line.strip_suffix(": test"))
        .filter(|name| wanted(name))
        .map(str::to_owned)
        .collect();
    names.retain(|name| match left_out(name) {
        Some(reason) => {
            eprintln!("test: {WHAT}: without {name}: {reason}");
            false
        }
        None => true,
    });
    Ok(names)
}

/// Why a test is not run inside.
pub fn left_out(name: &str) -> Option<&'static str> {
    let last = name.rsplit("::").next()?;
    let (_, reason) = LEFT_OUT.iter().find(|(test, _)| *test == last)?;
    Some(reason)
}

/// Everything but the modules.
fn userland(tests: &Path, names: &[String], machines: usize, scratch: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for directory in [
        "dev", "proc", "sys", "run", "tmp", "root", "etc", "usr/bin", "usr/sbin",
    ] {
        archive.directory(directory);
    }
    archive.device("dev/console", 5, 1);
    archive.file("init", 0o755, include_bytes!("vm/init.sh"));
    for number in 0..machines {
        let share: Vec<&str> = names
            .iter()
            .skip(number)
            .step_by(machines)
            .map(String::as_str)
            .collect();
        archive.file(&format!("work-{number}.sh"), 0o644, work(&share).as_bytes());
    }
    let users = b"root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n";
    archive.file("etc/passwd", 0o644, users);
    let mut libraries = BTreeSet::new();
    let busybox = find("busybox")?;
    archive.file("bin/busybox", 0o755, &fs::read(&busybox)?);
    for program in PROGRAMS {
        let path = find(program)?;
        let real = path.canonicalize()?;
        archive.file(&real.to_string_lossy(), 0o755, &fs::read(&real)?);
        // The name that was asked for, of a program that is known by several.
        let name = format!("/usr/bin/{program}");
        if real.file_name() != path.file_name() {
            archive.link(&name, &real.to_string_lossy());
        }
        libraries.extend(libraries_of(&real)?);
    }
    archive.link("/bin/sh", &find("sh")?.canonicalize()?.to_string_lossy());
    for (path, inside) in [(build::vtep_binary(false), VTEP), (tests.to_owned(), TESTS)] {
        let stripped = scratch.join("stripped");
        quiet(
            Command::new("strip")
                .args(["--strip-debug", "-o"])
                .args([&stripped, &path]),
        )?;
        archive.file(inside, 0o755, &fs::read(&stripped)?);
        libraries.extend(libraries_of(&path)?);
    }
    let ebpf = build::ebpf_dir();
    for name in ["vtep", "lab"] {
        let path = ebpf.join(name);
        let object = fs::read(&path).with_context(|| path.display().to_string())?;
        archive.file(&format!("{EBPF_DIR}/{name}"), 0o644, &object);
    }
    for path in libraries {
        archive.file(&path.to_string_lossy(), 0o755, &fs::read(&path)?);
    }
    Ok(archive.finish())
}

/// What a machine does.
fn work(names: &[&str]) -> String {
    format!(
        "export VTEP_BIN={VTEP} VTEP_EBPF_DIR={EBPF_DIR} VTEP_TESTS_REQUIRE=root,devices \
         VTEP_TESTS_PATIENCE={PATIENCE}\n\
         exec {TESTS} --test-threads=1 --exact {}\n",
        names.join(" ")
    )
}

fn find(program: &str) -> Result<PathBuf> {
    std::env::split_paths(&root_path())
        .map(|directory| directory.join(program))
        .find(|path| path.is_file())
        .with_context(|| format!("no program {program}"))
}

/// Shared libraries and loader of a program.
fn libraries_of(program: &Path) -> Result<Vec<PathBuf>> {
    let text = capture(Command::new("ldd").arg(program))
        .with_context(|| format!("{} is linked statically?", program.display()))?;
    let path = |line: &str| {
        let word = line.split_whitespace().find(|word| word.starts_with('/'));
        word.map(PathBuf::from)
    };
    Ok(text.lines().filter_map(path).collect())
}

struct Cleanup<'a>(&'a Path);

impl Drop for Cleanup<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(self.0);
    }
}
