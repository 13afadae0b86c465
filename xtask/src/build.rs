//! `cargo xtask build`: the eBPF objects in a cargo invocation of their own
//! (another target, and no feature unification with user space), then user
//! space, which takes the object up at compile time.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};

use crate::run::{cargo, run, workspace};
use crate::toolchain::{self, Toolchain};

/// LLVM that knows the feature of the same name.
const MISALIGNED_LLVM: u32 = 22;

/// The user-space binary of a profile.
pub fn vtep_binary(release: bool) -> PathBuf {
    let profile = if release { "release" } else { "debug" };
    workspace().join("target").join(profile).join("vtep")
}

/// Where the eBPF objects are: `vtep`, the product, and `lab`, for tests.
pub fn ebpf_dir() -> PathBuf {
    prebuilt().unwrap_or_else(|| workspace().join("target/ebpf/bpfel-unknown-none/release"))
}

/// Objects from elsewhere, if VTEP_EBPF_DIR names them.
fn prebuilt() -> Option<PathBuf> {
    std::env::var_os("VTEP_EBPF_DIR").map(PathBuf::from)
}

/// eBPF, then user space.
pub fn all(release: bool) -> Result<()> {
    ebpf()?;
    user(release)
}

pub fn ebpf() -> Result<()> {
    if let Some(dir) = prebuilt() {
        ensure!(
            Path::new(&dir).join("vtep").is_file(),
            "VTEP_EBPF_DIR={}: there is no file `vtep`; name a directory with the eBPF objects, or \
             unset it to build them here",
            dir.display()
        );
        eprintln!("build: eBPF objects of {} (VTEP_EBPF_DIR)", dir.display());
        return Ok(());
    }
    let toolchain = toolchain::make()?;
    eprintln!("build: eBPF objects, with {}", toolchain.way);
    let mut flags = vec![
        format!("-Clinker={}", toolchain.linker.display()),
        // Maps and line numbers need BTF, which needs debug information.
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        // 32-bit operations and atomics that return a value.
        "-Ctarget-cpu=v3".to_owned(),
    ];
    if toolchain.llvm_major >= MISALIGNED_LLVM {
        // One load for a word of a packet instead of a load per byte. rustc passes the feature on
        // but warns in every crate that it does not know it; there is no narrower way to stop
        // that. Other warnings are shown, and refused, by `lint`.
        flags.push("-Ctarget-feature=+allows-misaligned-mem-access".to_owned());
        flags.push("-Awarnings".to_owned());
    }
    run(ebpf_cargo(&toolchain, "build", flags).arg("--release"))
}

/// cargo for the eBPF target. Compiling `core` needs unstable features, which
/// are allowed to this child alone.
pub fn ebpf_cargo(toolchain: &Toolchain, verb: &str, mut flags: Vec<String>) -> Command {
    flags.push("--cfg=bpf_target_arch=\"x86_64\"".to_owned());
    let mut cargo = toolchain.cargo(verb);
    cargo
        .args(["--package", "vtep-ebpf", "--target", "bpfel-unknown-none"])
        .args(["-Z", "build-std=core", "--target-dir", "target/ebpf"])
        // Wins over RUSTFLAGS and configuration files, which are meant for user space.
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .env("RUSTC_BOOTSTRAP", "1");
    cargo
}

pub fn user(release: bool) -> Result<()> {
    let mut cargo = cargo("cargo", "build");
    if release {
        cargo.arg("--release");
    }
    run(&mut cargo)
}
