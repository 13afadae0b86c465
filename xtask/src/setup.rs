//! `cargo xtask setup`: installs what a bare Debian machine lacks. Says what it
//! does and which way it takes; does nothing, quickly, where nothing is missing.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};

use crate::run::{as_root, capture, has, quiet, workspace};

const LINKER_VERSION: &str = "0.13.0";
/// Oldest kernel with everything the programs use.
const KERNEL_MIN: (u32, u32) = (5, 15);

/// Command that must be there, Debian package that brings it.
const TOOLS: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("bridge", "iproute2"),
    ("ethtool", "ethtool"),
    ("tcpdump", "tcpdump"),
    ("iperf3", "iperf3"),
    ("nft", "nftables"),
    ("ping", "iputils-ping"),
    ("cc", "gcc"),
];

/// How eBPF is built on this machine.
pub struct EbpfToolchain {
    /// The compiler, with its own library source.
    pub cargo: PathBuf,
    /// `None`: the one cargo finds.
    pub rustc: Option<PathBuf>,
    pub linker: PathBuf,
    /// LLVM of the compiler.
    pub llvm_major: u32,
}

/// A step that takes a while.
fn step<T>(text: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let bar = ProgressBar::new_spinner();
    bar.set_style(ProgressStyle::with_template(
        "setup: {msg} {elapsed} {spinner}",
    )?);
    bar.set_message(text.to_owned());
    bar.enable_steady_tick(Duration::from_millis(120));
    if bar.is_hidden() {
        eprintln!("setup: {text} ...");
    }
    let result = work();
    bar.finish_and_clear();
    if result.is_ok() {
        eprintln!("setup: {text}: done");
    }
    result
}

pub fn run() -> Result<()> {
    check_kernel()?;
    packages()?;
    bpf_file_system()?;
    ebpf_toolchain()?;
    Ok(())
}

fn check_kernel() -> Result<()> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|n| n.parse().unwrap_or(0));
    let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    ensure!(
        version >= KERNEL_MIN,
        "Linux {} is too old: {}.{} or newer is needed",
        release.trim(),
        KERNEL_MIN.0,
        KERNEL_MIN.1
    );
    let jit = fs::read_to_string("/proc/sys/net/core/bpf_jit_enable").unwrap_or_default();
    if jit.trim() == "0" {
        eprintln!(
            "setup: warning: the BPF JIT is off; turn it on: sysctl net.core.bpf_jit_enable=1"
        );
    }
    Ok(())
}

fn packages() -> Result<()> {
    let mut missing: Vec<&str> = TOOLS
        .iter()
        .filter(|(tool, _)| !has(tool))
        .map(|(_, package)| *package)
        .collect();
    missing.dedup();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(", ");
    ensure!(
        has("apt-get"),
        "these are missing and there is no apt-get to install them: {names}; install them by hand"
    );
    step(&format!("install {names} (Debian packages)"), || {
        install(&missing)
    })
}

fn install(packages: &[&str]) -> Result<()> {
    // Through `env`, so that sudo keeps the setting.
    quiet(as_root("env")?.args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "update", "-qq"]))?;
    quiet(
        as_root("env")?
            .args([
                "DEBIAN_FRONTEND=noninteractive",
                "apt-get",
                "install",
                "-y",
                "-qq",
            ])
            .arg("--no-install-recommends")
            .args(packages),
    )?;
    Ok(())
}

/// Pinned programs and maps live there.
fn bpf_file_system() -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mounted = |line: &str| {
        let mut words = line.split(' ');
        words.nth(1) == Some("/sys/fs/bpf") && words.next() == Some("bpf")
    };
    if mounts.lines().any(mounted) {
        return Ok(());
    }
    step("mount the BPF file system on /sys/fs/bpf", || {
        quiet(as_root("mount")?.args(["-t", "bpf", "bpf", "/sys/fs/bpf"]))?;
        Ok(())
    })
}

/// LLVM major and minor version of a compiler.
fn llvm_version(rustc: &Path) -> Result<(u32, u32)> {
    let text = capture(Command::new(rustc).arg("-vV"))?;
    let version = text.lines().find_map(|l| l.strip_prefix("LLVM version: "));
    let mut numbers = version
        .unwrap_or("")
        .split('.')
        .map(|n| n.parse().unwrap_or(0));
    let (major, minor) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    ensure!(
        major > 0,
        "{} does not say its LLVM version",
        rustc.display()
    );
    Ok((major, minor))
}

/// Find, or make, a compiler with library source and a linker on the same LLVM.
pub fn ebpf_toolchain() -> Result<EbpfToolchain> {
    match rustup_toolchain() {
        Ok(toolchain) => Ok(toolchain),
        Err(first) => {
            eprintln!("setup: the rustup toolchain cannot build eBPF ({first:#}): taking Debian's");
            debian_toolchain().with_context(|| {
                format!(
                    "no way to build eBPF on this machine. 1. rustup: {first:#}. 2. Debian's \
                     rustc-web and rust-web-src. Or build the object elsewhere and name its \
                     directory in VTEP_EBPF_DIR"
                )
            })
        }
    }
}

/// Way 1: the toolchain that builds user space.
fn rustup_toolchain() -> Result<EbpfToolchain> {
    let rustc = PathBuf::from("rustc");
    let sysroot = PathBuf::from(capture(Command::new(&rustc).args(["--print", "sysroot"]))?);
    if !sysroot.join("lib/rustlib/src/rust/library/core").is_dir() {
        ensure!(
            has("rustup"),
            "rust-src is missing and there is no rustup to add it"
        );
        step("add the library source (rustup component rust-src)", || {
            quiet(
                Command::new("rustup")
                    .args(["component", "add", "rust-src"])
                    .current_dir(workspace()),
            )?;
            Ok(())
        })?;
    }
    let (major, minor) = llvm_version(&rustc)?;
    let library = find_llvm(&sysroot.join("lib"), major, minor)?;
    // The linker's build looks for a directory with lib/libLLVM.so.
    let prefix = workspace().join("target/tools/llvm");
    fs::create_dir_all(prefix.join("lib"))?;
    let link = prefix.join("lib/libLLVM.so");
    if fs::read_link(&link).ok().as_deref() != Some(&library) {
        let _ = fs::remove_file(&link);
        symlink(&library, &link).with_context(|| link.display().to_string())?;
    }
    let linker = linker(&prefix, major, "rustup")?;
    Ok(EbpfToolchain {
        cargo: "cargo".into(),
        rustc: None,
        linker,
        llvm_major: major,
    })
}

/// The compiler's own LLVM: `libLLVM.so.22.1-rust-1.95.0-stable`.
fn find_llvm(directory: &Path, major: u32, minor: u32) -> Result<PathBuf> {
    let start = format!("libLLVM.so.{major}.{minor}-rust-");
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(&start) {
            return Ok(entry.path());
        }
    }
    bail!("the toolchain has no {start}* in {}", directory.display())
}

/// Way 2: Debian's compiler for web browsers, beside rustup's.
fn debian_toolchain() -> Result<EbpfToolchain> {
    let (cargo, rustc) = (
        PathBuf::from("/usr/bin/cargo"),
        PathBuf::from("/usr/bin/rustc"),
    );
    let source = Path::new("/usr/lib/rust-web/lib/rustlib/src/rust/library/core");
    let has_source = || source.is_dir() || Path::new("/usr/src/rustc-web").exists();
    if !rustc.is_file() || !cargo.is_file() || !has_source() {
        ensure!(
            has("apt-get"),
            "no apt-get to install rustc-web and rust-web-src"
        );
        step(
            "install rustc-web, cargo-web, rust-web-src, llvm-22-dev (Debian packages)",
            || install(&["rustc-web", "cargo-web", "rust-web-src"]),
        )?;
    }
    let (major, _) = llvm_version(&rustc)?;
    let prefix = PathBuf::from(format!("/usr/lib/llvm-{major}"));
    if !prefix.join("lib/libLLVM.so").exists() {
        step(
            &format!("install llvm-{major}-dev (Debian package)"),
            || install(&[&format!("llvm-{major}-dev")]),
        )?;
    }
    let linker = linker(&prefix, major, "debian")?;
    Ok(EbpfToolchain {
        cargo,
        rustc: Some(rustc),
        linker,
        llvm_major: major,
    })
}

/// bpf-linker on exactly this LLVM. Its default is another one, which breaks on
/// the first memset.
fn linker(prefix: &Path, llvm_major: u32, way: &str) -> Result<PathBuf> {
    let root = workspace().join("target/tools");
    let path = root.join("bin/bpf-linker");
    let stamp = root.join("bpf-linker.stamp");
    let library = fs::canonicalize(prefix.join("lib/libLLVM.so"))?;
    let wanted = format!("{LINKER_VERSION} {way} {}", library.display());
    if path.is_file() && fs::read_to_string(&stamp).is_ok_and(|s| s == wanted) {
        return Ok(path);
    }
    step(
        &format!("build bpf-linker {LINKER_VERSION} on LLVM {llvm_major} ({way}; about a minute)"),
        || {
            quiet(
                Command::new("cargo")
                    .args([
                        "install",
                        "bpf-linker",
                        "--version",
                        &format!("={LINKER_VERSION}"),
                    ])
                    .args(["--locked", "--force", "--no-default-features", "--features"])
                    .arg(format!("llvm-{llvm_major}"))
                    .arg("--root")
                    .arg(&root)
                    .env("LLVM_PREFIX", prefix)
                    .current_dir(workspace()),
            )?;
            fs::write(&stamp, &wanted)?;
            Ok(())
        },
    )?;
    Ok(path)
}
