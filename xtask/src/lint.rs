//! `cargo xtask lint`: format, clippy for user space and for eBPF, and a list of
//! files that have grown too long.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};

use crate::build;
use crate::run::{Step, cargo, has, run, workspace};
use crate::setup::install_packages;
use crate::toolchain::{self, Way};

const LINES_MAX: usize = 600;

pub fn run_all() -> Result<()> {
    let toolchain = toolchain::make()?;
    add_components()?;
    run(cargo("cargo", "fmt").args(["--all", "--check"]))?;
    if toolchain.way == Way::Debian && !Path::new("/usr/bin/cargo-clippy").is_file() {
        install_packages(&["rust-web-clippy"])?;
    }
    run(build::ebpf_cargo(&toolchain, "clippy", Vec::new()).args([
        "--release",
        "--",
        "--deny",
        "warnings",
    ]))?;
    run(cargo("cargo", "clippy")
        .args(["--workspace", "--exclude", "vtep-ebpf", "--all-targets"])
        .args(["--", "--deny", "warnings"]))?;
    let mut files = Vec::new();
    rust_files(workspace(), &mut files)?;
    for file in files {
        let lines = fs::read_to_string(&file)?.lines().count();
        if lines > LINES_MAX {
            let name = file.strip_prefix(workspace()).unwrap_or(&file).display();
            eprintln!("lint: {name} has {lines} lines, more than {LINES_MAX}: split it");
        }
    }
    Ok(())
}

/// Only this verb needs them, so rust-toolchain.toml does not: rustup would
/// fetch missing ones, and with them a newer compiler, before anything runs.
fn add_components() -> Result<()> {
    let answers = |program: &str| {
        let output = Command::new(program).arg("--version").output();
        output.is_ok_and(|output| output.status.success())
    };
    if answers("cargo-fmt") && answers("cargo-clippy") {
        return Ok(());
    }
    ensure!(
        has("rustup"),
        "rustfmt or clippy is missing and there is no rustup to add it: install both"
    );
    let step = Step::start("rustfmt and clippy (rustup components)")?;
    step.run(Command::new("rustup").args(["component", "add", "rustfmt", "clippy"]))?;
    step.done();
    Ok(())
}

/// Sources of the workspace, `target` and hidden directories left out.
fn rust_files(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            rust_files(&path, files)?;
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    Ok(())
}
