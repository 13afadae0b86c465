//! `cargo xtask build`: the eBPF objects in a cargo invocation of their own
//! (another target, and no feature unification with user space), then user
//! space, which takes the object up at compile time.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::run::{run, workspace};
use crate::setup;

/// Where the eBPF objects are: `vtep`, the product, and `lab`, for tests.
pub fn ebpf_dir() -> PathBuf {
    match std::env::var_os("VTEP_EBPF_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => workspace().join("target/ebpf/bpfel-unknown-none/release"),
    }
}

/// The user-space binary of a profile.
pub fn vtep_binary(release: bool) -> PathBuf {
    let profile = if release { "release" } else { "debug" };
    workspace().join("target").join(profile).join("vtep")
}

pub fn run_ebpf() -> Result<()> {
    if let Some(dir) = std::env::var_os("VTEP_EBPF_DIR") {
        eprintln!(
            "build: prebuilt eBPF objects of {}",
            Path::new(&dir).display()
        );
        return Ok(());
    }
    run(ebpf_cargo("build")?.arg("--release"))
}

/// cargo for the eBPF target, with the toolchain that `setup` found.
pub fn ebpf_cargo(verb: &str) -> Result<Command> {
    let toolchain = setup::ebpf_toolchain()?;
    // BTF needs debug information; v3 has 32-bit jumps and atomics. The machine loads unaligned
    // words; without being told so LLVM takes packet fields apart into bytes.
    let mut flags = vec![
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        "-Ctarget-cpu=v3".to_owned(),
        "--cfg=bpf_target_arch=\"x86_64\"".to_owned(),
        format!("-Clinker={}", toolchain.linker.display()),
    ];
    if toolchain.llvm_major >= 22 {
        flags.push("-Ctarget-feature=+allows-misaligned-mem-access".to_owned());
    }
    let mut cargo = Command::new(&toolchain.cargo);
    cargo
        .args([
            verb,
            "--package",
            "vtep-ebpf",
            "--target",
            "bpfel-unknown-none",
        ])
        .args(["-Z", "build-std=core", "--target-dir", "target/ebpf"])
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        // The library's source only compiles with unstable features, for this child alone.
        .env("RUSTC_BOOTSTRAP", "1")
        // Those of the cargo that runs this program.
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("CARGO")
        .current_dir(workspace());
    match &toolchain.rustc {
        Some(rustc) => cargo.env("RUSTC", rustc),
        None => cargo.env_remove("RUSTC"),
    };
    Ok(cargo)
}

pub fn run_user(release: bool) -> Result<()> {
    let mut cargo = Command::new("cargo");
    cargo.arg("build").current_dir(workspace());
    if release {
        cargo.arg("--release");
    }
    run(&mut cargo)
}

pub fn run_all(release: bool) -> Result<()> {
    run_ebpf()?;
    run_user(release)
}
