//! `cargo xtask demo` and `cargo xtask bench`: build what they need as the user,
//! run it as root.

use std::process::Command;

use anyhow::Result;

use crate::run::{as_root, run, workspace};
use crate::{build, setup};

pub fn demo() -> Result<()> {
    prepare("vtep-tests")?;
    run(with_paths(as_root("env")?).arg(workspace().join("target/release/vtep-demo")))
}

pub fn bench(options: &[String]) -> Result<()> {
    prepare("vtep-bench")?;
    run(with_paths(as_root("env")?)
        .arg(workspace().join("target/release/vtep-bench"))
        .args(options))
}

fn prepare(package: &str) -> Result<()> {
    setup::run()?;
    build::run_all(true)?;
    run(Command::new("cargo")
        .args(["build", "--quiet", "--release", "--package", package])
        .current_dir(workspace()))
}

/// `env`, because sudo keeps no environment.
fn with_paths(mut env: Command) -> Command {
    env.arg(format!("VTEP_BIN={}", build::vtep_binary(true).display()));
    env.arg(format!("VTEP_EBPF_DIR={}", build::ebpf_dir().display()));
    env
}
