//! `cargo xtask demo` and `cargo xtask bench`: build what they need as the user,
//! run it as root.

use std::process::Command;

use anyhow::Result;

use crate::run::{as_root, cargo, root_path, run, workspace};
use crate::{build, leftovers, setup};

pub fn demo() -> Result<()> {
    run_binary("vtep-tests", "vtep-demo", &[])
}

pub fn bench(options: &[String]) -> Result<()> {
    run_binary("vtep-bench", "vtep-bench", options)
}

/// A program of a package: set up, built and run as root.
pub fn run_binary(package: &str, binary: &str, options: &[String]) -> Result<()> {
    setup::run()?;
    build::all(false)?;
    run(cargo("cargo", "build").args(["--quiet", "--package", package]))?;
    let path = workspace().join("target/debug").join(binary);
    let result = run(with_paths(as_root("env")?).arg(path).args(options));
    leftovers::remove();
    result
}

/// `env`, because sudo keeps no environment.
fn with_paths(mut env: Command) -> Command {
    env.arg(format!("PATH={}", root_path().display()));
    env.arg(format!("VTEP_BIN={}", build::vtep_binary(false).display()));
    env.arg(format!("VTEP_EBPF_DIR={}", build::ebpf_dir().display()));
    env
}
