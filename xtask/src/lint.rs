//! `cargo xtask lint`: format, clippy for user space and for eBPF, file sizes.

use std::fs;
use std::process::Command;

use anyhow::{Result, bail};

use crate::build;
use crate::run::{capture, run, workspace};

const LINES_MAX: usize = 600;

pub fn run_all() -> Result<()> {
    run(Command::new("cargo")
        .args(["fmt", "--all", "--check"])
        .current_dir(workspace()))?;
    // Unknown target feature: LLVM knows it, rustc only passes it on.
    run(build::ebpf_cargo("clippy")?.args(["--release", "--", "--deny", "warnings"]))?;
    run(Command::new("cargo")
        .args([
            "clippy",
            "--workspace",
            "--exclude",
            "vtep-ebpf",
            "--all-targets",
        ])
        .args(["--", "--deny", "warnings"])
        .current_dir(workspace()))?;
    file_sizes()
}

fn file_sizes() -> Result<()> {
    let files = capture(
        Command::new("git")
            .args(["ls-files", "*.rs"])
            .current_dir(workspace()),
    )?;
    let mut long = Vec::new();
    for file in files.lines() {
        let lines = fs::read_to_string(workspace().join(file))?.lines().count();
        if lines > LINES_MAX {
            long.push(format!("{file} ({lines} lines)"));
        }
    }
    if !long.is_empty() {
        bail!(
            "longer than {LINES_MAX} lines, split them: {}",
            long.join(", ")
        );
    }
    Ok(())
}
