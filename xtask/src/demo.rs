//! `cargo xtask demo` and `cargo xtask bench`: build what they need as the user,
//! run it as root.

use std::process::Command;

use anyhow::Result;

use crate::run::{as_root, run, workspace};
use crate::{build, setup};

pub fn demo() -> Result<()> {
    prepare("vtep-tests")?;
    run(with_paths(as_root("env")?).arg(workspace().join("target/debug/vtep-demo")))
}

pub fn bench(options: &[String]) -> Result<()> {
    prepare("vtep-bench")?;
    run(with_paths(as_root("env")?)
        .arg(workspace().join("target/debug/vtep-bench"))
        .args(options))
}

fn prepare(package: &str) -> Result<()> {
    setup::run()?;
    build::run_all(false)?;
    run(Command::new("cargo")
        .args(["build", "--quiet", "--package", package])
        .current_dir(workspace()))
}

/// `env`, because sudo keeps no environment.
fn with_paths(mut env: Command) -> Command {
    env.arg(format!("VTEP_BIN={}", build::vtep_binary(false).display()));
    env.arg(format!("VTEP_EBPF_DIR={}", build::ebpf_dir().display()));
    env
}
