//! `cargo xtask load` and `unload`: the daemon on this machine's own NICs.

use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::run::{as_root, run};
use crate::{build, setup};

/// Time for the first dump and all hooks.
const READY_TIMEOUT: Duration = Duration::from_secs(20);

pub fn load(config: Option<&Path>, instance: &str) -> Result<()> {
    setup::run()?;
    build::run_all(true)?;
    let vtep = build::vtep_binary(true);
    if is_ready(&vtep, instance)? {
        eprintln!("load: a daemon is running on instance {instance} already");
        return run(as_root(&vtep)?.args(["--instance", instance, "status"]));
    }
    let log_path = crate::run::workspace().join(format!("target/vtep-{instance}.log"));
    let log = File::create(&log_path).with_context(|| log_path.display().to_string())?;
    let mut command = as_root(&vtep)?;
    command.args(["--instance", instance, "run"]);
    if let Some(config) = config {
        command.arg("--config").arg(config);
    }
    // Its own process group: Ctrl-C here does not reach it.
    let mut daemon = command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0)
        .spawn()
        .context("cannot start the daemon")?;
    let deadline = Instant::now() + READY_TIMEOUT;
    while !is_ready(&vtep, instance)? {
        if let Some(status) = daemon.try_wait()? {
            let text = std::fs::read_to_string(&log_path).unwrap_or_default();
            bail!(
                "the daemon ended ({status}): {}",
                text.lines().last().unwrap_or("no message")
            );
        }
        if Instant::now() > deadline {
            bail!(
                "the daemon is not ready after {} s: see {}",
                READY_TIMEOUT.as_secs(),
                log_path.display()
            );
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    eprintln!(
        "load: running as process {}, log in {}",
        daemon.id(),
        log_path.display()
    );
    run(as_root(&vtep)?.args(["--instance", instance, "status"]))
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

pub fn unload(instance: &str) -> Result<()> {
    let vtep = [true, false]
        .map(build::vtep_binary)
        .into_iter()
        .find(|path| path.is_file());
    let vtep = vtep.context("there is no vtep binary here: run `cargo xtask build` first")?;
    run(as_root(vtep)?.args(["--instance", instance, "unload"]))
}
