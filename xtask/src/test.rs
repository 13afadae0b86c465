//! `cargo xtask test`: the pure tests as they are, then, as root, everything
//! that needs the kernel. The last line is the sum over all of them.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::run::{is_root, quiet, workspace};
use crate::{build, setup};

#[derive(Default)]
struct Sum {
    passed: u32,
    failed: u32,
    ignored: u32,
    failures: Vec<String>,
}

pub fn run(filter: Option<&str>) -> Result<()> {
    setup::run()?;
    build::run_all(false)?;
    let mut sum = Sum::default();
    let mut pure = Command::new("cargo");
    pure.args(["test", "--no-fail-fast"]);
    suite(&mut sum, "pure tests", &mut pure, filter, &[])?;

    // Compiled as the user, run as root: cargo's own files stay the user's.
    let mut root = Command::new("cargo");
    root.args([
        "test",
        "--no-fail-fast",
        "--package",
        "vtep-tests",
        "--package",
        "vtep-bench",
    ]);
    root.env("VTEP_TESTS_REQUIRE", "root")
        .env("VTEP_EBPF_DIR", build::ebpf_dir());
    root.env("VTEP_BIN", build::vtep_binary(false));
    if !is_root() {
        let check = Command::new("sudo").args(["-n", "true"]).status();
        if !check.is_ok_and(|status| status.success()) {
            bail!(
                "the kernel tests need root: run as root, or as a user with sudo (`sudo -v` first)"
            );
        }
        root.env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER", "sudo -E");
    }
    // Most of them measure time or move a lot of frames: one after the other.
    suite(
        &mut sum,
        "kernel tests",
        &mut root,
        filter,
        &["--test-threads=1"],
    )?;
    for name in &sum.failures {
        eprintln!("failed: {name}");
    }
    remove_leftovers();
    let skipped = if sum.ignored > 0 {
        format!(", {} skipped", sum.ignored)
    } else {
        String::new()
    };
    println!("{} passed, {} failed{skipped}", sum.passed, sum.failed);
    if sum.failed > 0 {
        bail!("{} tests failed", sum.failed);
    }
    if sum.passed == 0 {
        bail!("no test matches");
    }
    Ok(())
}

/// Run one cargo invocation, show its lines, add up its results.
fn suite(
    sum: &mut Sum,
    what: &str,
    cargo: &mut Command,
    filter: Option<&str>,
    options: &[&str],
) -> Result<()> {
    eprintln!("test: {what}");
    cargo
        .args(filter)
        .arg("--")
        .args(options)
        .current_dir(workspace());
    let mut child = cargo
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo")?;
    let stdout = child.stdout.take().context("cargo's output")?;
    let mut results = 0;
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        println!("{line}");
        if let Some(name) = line
            .strip_prefix("test ")
            .and_then(|l| l.strip_suffix(" ... FAILED"))
        {
            sum.failures.push(name.to_owned());
        }
        if let Some(counts) = line.strip_prefix("test result: ") {
            results += 1;
            sum.passed += count(counts, " passed");
            sum.failed += count(counts, " failed");
            sum.ignored += count(counts, " ignored");
        }
    }
    let status = child.wait()?;
    if !status.success() && sum.failed == 0 {
        bail!(
            "{what}: cargo failed without a failed test ({status}, {results} results): see above"
        );
    }
    Ok(())
}

/// The number before a word: "3 passed; 0 failed".
fn count(text: &str, word: &str) -> u32 {
    let before = text.split(word).next().unwrap_or("");
    before
        .rsplit(' ')
        .next()
        .and_then(|n| n.parse().ok())
        .unwrap_or(0)
}

/// Namespaces of test processes that died without cleaning up.
fn remove_leftovers() {
    let Ok(list) = quiet(Command::new("ip").args(["netns", "list"])) else {
        return;
    };
    for line in String::from_utf8_lossy(&list.stdout).lines() {
        let name = line.split(' ').next().unwrap_or("");
        let owner = name
            .strip_prefix("vt-")
            .and_then(|rest| rest.split('-').next());
        let Some(pid) = owner.and_then(|pid| pid.parse::<u32>().ok()) else {
            continue;
        };
        if !std::path::Path::new(&format!("/proc/{pid}")).exists()
            && let Err(error) = quiet(Command::new("ip").args(["netns", "del", name]))
        {
            eprintln!("test: namespace {name} is left: {error:#}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_a_result_line() {
        let line = "FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 0 filtered out";
        assert_eq!(
            (
                count(line, " passed"),
                count(line, " failed"),
                count(line, " ignored")
            ),
            (12, 3, 1)
        );
        assert_eq!(count("nothing", " passed"), 0);
    }
}
