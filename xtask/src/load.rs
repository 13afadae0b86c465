//! `cargo xtask load` and `unload`: the daemon on this machine's own NICs.

use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::run::{as_root, interrupted, run, workspace};
use crate::{build, setup};

/// Time for the first dump and all hooks.
const READY_TIMEOUT: Duration = Duration::from_secs(20);

pub fn load(config: Option<&Path>, instance: &str) -> Result<()> {
    let config = match config {
        None => None,
        Some(path) => Some(std::path::absolute(path).and_then(|p| p.canonicalize()))
            .transpose()
            .with_context(|| format!("--config {}", path.display()))?,
    };
    setup::run()?;
    build::all(true)?;
    let vtep = build::vtep_binary(true);
    let status = || run(as_root(&vtep)?.args(["--instance", instance, "status"]));
    if is_ready(&vtep, instance)? {
        eprintln!(
            "load: a daemon runs on instance {instance} already (`cargo xtask unload` ends it)"
        );
        return status();
    }
    let log_path = workspace().join(format!("target/vtep-{instance}.log"));
    let log = File::create(&log_path).with_context(|| log_path.display().to_string())?;
    let mut command = as_root(&vtep)?;
    command.args(["--instance", instance, "run"]);
    if let Some(config) = config {
        command.arg("--config").arg(config);
    }
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    // A session of its own: neither Ctrl-C here nor the end of the terminal reaches it.
    // SAFETY: setsid is async-signal-safe and has no arguments.
    unsafe {
        command.pre_exec(|| match libc::setsid() {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    let mut daemon = command.spawn().context("cannot start the daemon")?;
    let deadline = Instant::now() + READY_TIMEOUT;
    while !is_ready(&vtep, instance)? {
        let text = || std::fs::read_to_string(&log_path).unwrap_or_default();
        if let Some(status) = daemon.try_wait()? {
            bail!(
                "the daemon ended ({status}): {}",
                text().trim().lines().last().unwrap_or("no message")
            );
        }
        if Instant::now() > deadline || interrupted() {
            bail!(
                "the daemon is not ready yet, and goes on trying: see {}, or end it with `cargo \
                 xtask unload --instance {instance}`",
                log_path.display()
            );
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    eprintln!("load: ready, log in {}", log_path.display());
    status()
}

fn is_ready(vtep: &Path, instance: &str) -> Result<bool> {
    let output = as_root(vtep)?
        .args(["--json", "--instance", instance, "status"])
        .output()?;
    if !output.status.success() {
        return Ok(false);
    }
    let status: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    Ok(status["ready"] == serde_json::Value::Bool(true))
}

/// The daemon ends and everything it attached is removed.
pub fn unload(instance: &str) -> Result<()> {
    let vtep = [true, false]
        .map(build::vtep_binary)
        .into_iter()
        .find(|path| path.is_file())
        .context("there is no vtep binary here: run `cargo xtask build` first")?;
    run(as_root(vtep)?.args(["--instance", instance, "unload"]))
}
