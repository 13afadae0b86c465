//! The real `vtep` on one host of the laboratory.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use tempfile::TempDir;

use crate::lab::Host;
use crate::netns::execute;
use crate::{complain, wait_until};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A daemon; stopped and unloaded when dropped.
#[derive(Debug)]
pub struct Daemon {
    vtep: PathBuf,
    netns: String,
    instance: String,
    child: Option<Child>,
    directory: TempDir,
}

/// The binary under test: VTEP_BIN, or where cargo leaves it.
pub fn binary() -> PathBuf {
    std::env::var_os("VTEP_BIN").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/debug/vtep"),
        PathBuf::from,
    )
}

/// Run a command that must fail with one line on stderr and nothing on stdout.
pub fn refusal(command: &mut Command) -> Result<(i32, String)> {
    let output = command.stdin(Stdio::null()).output()?;
    let (out, line) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    let code = output.status.code().context("killed")?;
    if code == 0 || !out.is_empty() || line.lines().count() != 1 || !line.starts_with("vtep: ") {
        bail!("{command:?}: exit {code}, stdout:\n{out}\nstderr:\n{line}");
    }
    Ok((code, line.trim_end().to_owned()))
}

impl Daemon {
    /// Start on `host` with all of `ports` on the XDP hook, and wait until it is
    /// ready.
    pub fn start(host: &Host, ports: &[&str]) -> Result<Self> {
        let config: String = ports
            .iter()
            .map(|port| format!("[ports.{port}]\nhook = \"xdp\"\n"))
            .collect();
        Self::with_config(host, &config)
    }

    pub fn with_config(host: &Host, config: &str) -> Result<Self> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let directory = tempfile::tempdir()?;
        std::fs::write(directory.path().join("vtep.toml"), config)?;
        let mut this = Self {
            vtep: binary(),
            netns: host.netns.name().to_owned(),
            instance: format!("lab-{}-{number}", std::process::id()),
            child: None,
            directory,
        };
        this.spawn()?;
        this.wait_ready()?;
        Ok(this)
    }

    pub fn instance(&self) -> &str {
        &self.instance
    }

    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    fn log_path(&self) -> PathBuf {
        self.directory.path().join("log")
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Start the process; it may adopt what an earlier one left.
    pub fn spawn(&mut self) -> Result<()> {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log_path())?;
        let child = Command::new(&self.vtep)
            .args([
                "--instance",
                &self.instance,
                "--netns",
                &self.netns,
                "run",
                "--config",
            ])
            .arg(self.directory.path().join("vtep.toml"))
            // Every table update, for the log of a failed test.
            .env("VTEP_LOG", "vtep_user=debug")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| {
                format!("{}: build it with `cargo xtask build`", self.vtep.display())
            })?;
        self.child = Some(child);
        Ok(())
    }

    pub fn wait_ready(&mut self) -> Result<Duration> {
        let result = wait_until(Duration::from_secs(10), "the daemon is ready", || {
            if let Some(child) = &mut self.child
                && let Some(status) = child.try_wait()?
            {
                bail!("the daemon ended: {status}");
            }
            Ok(self
                .json(&["status"])
                .is_ok_and(|status| status["ready"] == Value::Bool(true)))
        });
        result.with_context(|| format!("log:\n{}", self.log()))
    }

    /// A command of this instance; its output.
    pub fn cli(&self, words: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.vtep);
        command.args(["--instance", &self.instance]).args(words);
        Ok(String::from_utf8_lossy(&execute(&mut command)?.stdout).into_owned())
    }

    /// A command that must fail: exit status and the one line it says.
    pub fn refusal(&self, words: &[&str]) -> Result<(i32, String)> {
        let mut command = Command::new(&self.vtep);
        command.args(["--instance", &self.instance]).args(words);
        refusal(&mut command)
    }

    /// A command with `--json`; the parsed answer.
    pub fn json(&self, words: &[&str]) -> Result<Value> {
        let mut all = vec!["--json"];
        all.extend(words);
        Ok(serde_json::from_str(&self.cli(&all)?)?)
    }

    /// The row of a list in `status` ("uplinks", "segments", "ports") whose
    /// `key` is `value`.
    pub fn status_row(&self, list: &str, key: &str, value: &str) -> Result<Option<Value>> {
        let status = self.json(&["status"])?;
        let rows = status[list].as_array().context("no such list")?;
        Ok(rows.iter().find(|row| row[key] == *value).cloned())
    }

    /// The FDB row of a MAC in the laboratory's segment.
    pub fn fdb(&self, mac: vtep_common::MacAddr) -> Result<Option<Value>> {
        let vni = crate::lab::VNI.to_string();
        let rows = self.json(&["fdb", "show", "--vni", &vni, &mac.to_string()])?;
        Ok(rows.as_array().and_then(|rows| rows.first()).cloned())
    }

    /// Wait until the maps forward to a MAC.
    pub fn wait_accelerated(&self, mac: vtep_common::MacAddr) -> Result<Duration> {
        wait_until(
            Duration::from_secs(5),
            &format!("{mac} is accelerated"),
            || {
                Ok(self
                    .fdb(mac)?
                    .is_some_and(|row| row["accelerated"] == Value::Bool(true)))
            },
        )
        .with_context(|| {
            let show =
                |words: &[&str]| self.cli(words).unwrap_or_else(|error| format!("{error:#}"));
            format!(
                "{}\n{}\n{}\nlog:\n{}",
                show(&["status"]),
                show(&["fdb", "show"]),
                show(&["remote", "show"]),
                self.log()
            )
        })
    }

    /// Frames that ended in an outcome so far.
    pub fn frames(&self, outcome: &str) -> Result<u64> {
        let stats = self.json(&["stats"])?;
        stats["outcomes"][outcome]["frames"]
            .as_u64()
            .with_context(|| format!("no outcome {outcome}"))
    }

    /// SIGKILL: the data path must not notice.
    pub fn kill9(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            complain(&format!(
                "log of the daemon {}:\n{}",
                self.instance,
                self.log()
            ));
        }
        if let Err(error) = self.kill9().and_then(|()| self.cli(&["unload"]).map(drop)) {
            complain(&format!("{}: {error:#}", self.instance));
        }
        // Nobody will use the name again, so nobody can be waiting for the lock.
        let _ = std::fs::remove_file(format!("/run/vtep/{}.lock", self.instance));
    }
}
