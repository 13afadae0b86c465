//! Starts other programs: what runs is said, what fails is shown, root is asked
//! for only where it is needed. Every verb starts its programs through here.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead as _, BufReader, IsTerminal as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

/// Lines of a failed program that are shown.
const TAIL_LINES: usize = 20;

/// The workspace this was built from.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("."))
}

/// A cargo in the workspace. Everything goes to `target/`, whatever the caller's
/// environment says, because other programs look for it there.
pub fn cargo(program: &str, verb: &str) -> Command {
    let mut cargo = Command::new(program);
    cargo
        .arg(verb)
        .current_dir(workspace())
        .env_remove("CARGO_TARGET_DIR")
        .env_remove("CARGO_BUILD_TARGET_DIR")
        .env_remove("CARGO_BUILD_TARGET");
    cargo
}

pub fn is_root() -> bool {
    // SAFETY: no arguments, no memory, cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// A command that runs as root: as it is, or through sudo. May ask for a
/// password, once.
pub fn as_root(program: impl AsRef<OsStr>) -> Result<Command> {
    if is_root() {
        return Ok(Command::new(program));
    }
    can_be_root()?;
    let mut command = Command::new("sudo");
    command.args(["-n", "--"]).arg(program);
    Ok(command)
}

/// Whether [`as_root`] will work; the error says what to do.
pub fn can_be_root() -> Result<()> {
    static ANSWER: OnceLock<Result<(), &'static str>> = OnceLock::new();
    if is_root() {
        return Ok(());
    }
    let answer = ANSWER.get_or_init(|| {
        let sudo = |option: &str, words: &[&str]| {
            let mut command = Command::new("sudo");
            command.arg(option).args(words).stderr(Stdio::null());
            command.status().is_ok_and(|status| status.success())
        };
        if !has("sudo") {
            return Err("this needs root and there is no sudo: run the same command as root");
        }
        if sudo("-n", &["true"]) {
            return Ok(());
        }
        if !std::io::stdin().is_terminal() {
            return Err(
                "this needs root and sudo asks for a password: run it from a terminal or as root",
            );
        }
        eprintln!("xtask: some steps need root; sudo asks for your password");
        let status = Command::new("sudo").arg("-v").status();
        if status.is_ok_and(|status| status.success()) {
            Ok(())
        } else {
            Err("this needs root and sudo refused: run the same command as root")
        }
    });
    answer.map_err(anyhow::Error::msg)
}

/// PATH with the places of root's tools, which the PATH of a user may lack.
pub fn root_path() -> OsString {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let all = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    std::env::join_paths(all).unwrap_or(path)
}

/// Whether there is such a program.
pub fn has(program: &str) -> bool {
    std::env::split_paths(&root_path()).any(|dir| dir.join(program).is_file())
}

fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|w| w.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}

/// Run with its output shown; an error names the command.
pub fn run(command: &mut Command) -> Result<()> {
    let text = line(command);
    let status = command
        .status()
        .with_context(|| format!("cannot start `{text}`"))?;
    if !status.success() {
        bail!("`{text}` failed ({status})");
    }
    Ok(())
}

/// Run silently; an error carries what it printed last.
pub fn quiet(command: &mut Command) -> Result<Output> {
    let text = line(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{text}`"))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        let lines: Vec<&str> = stderr.trim().lines().collect();
        let tail = lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n");
        bail!("`{text}` failed ({}): {tail}", output.status);
    }
    Ok(output)
}

/// What a command prints, without the white space around it.
pub fn capture(command: &mut Command) -> Result<String> {
    Ok(String::from_utf8_lossy(&quiet(command)?.stdout)
        .trim()
        .to_owned())
}

/// One long step of `setup`: a spinner with the newest line of output on a
/// terminal, plain lines elsewhere.
pub struct Step {
    text: String,
    bar: ProgressBar,
    start: Instant,
}

impl Step {
    pub fn start(text: impl Into<String>) -> Result<Self> {
        let text = text.into();
        let bar = ProgressBar::new_spinner().with_style(ProgressStyle::with_template(
            "{spinner} {prefix} [{elapsed}] {wide_msg:.dim}",
        )?);
        bar.set_prefix(format!("setup: {text}"));
        bar.enable_steady_tick(Duration::from_millis(120));
        if bar.is_hidden() {
            eprintln!("setup: {text} ...");
        }
        Ok(Self {
            text,
            bar,
            start: Instant::now(),
        })
    }

    /// Run a program of this step; an error carries what it printed last.
    pub fn run(&self, command: &mut Command) -> Result<()> {
        let text = line(command);
        let (reader, writer) = std::io::pipe()?;
        let mut child = command
            .stdin(Stdio::null())
            .stdout(writer.try_clone()?)
            .stderr(writer)
            .spawn()
            .with_context(|| format!("cannot start `{text}`"))?;
        // `command` holds the writing ends; without this the pipe would never end.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut tail: Vec<String> = Vec::new();
        for bytes in BufReader::new(reader).split(b'\n') {
            let line = String::from_utf8_lossy(&bytes?).trim().to_owned();
            self.bar.set_message(line.clone());
            if tail.len() == TAIL_LINES {
                tail.remove(0);
            }
            tail.push(line);
        }
        let status = child.wait()?;
        if !status.success() {
            bail!("`{text}` failed ({status}): {}", tail.join("\n"));
        }
        Ok(())
    }

    pub fn done(self) {
        self.bar.finish_and_clear();
        let seconds = self.start.elapsed().as_secs_f32();
        eprintln!("setup: {}: done ({seconds:.0} s)", self.text);
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// SIGINT or SIGTERM came.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// From here on SIGINT and SIGTERM only set a flag: children in our process
/// group get Ctrl-C themselves, and we wait for them and clean up behind them.
pub fn handle_interrupt() {
    extern "C" fn note(_: libc::c_int) {
        INTERRUPTED.store(true, Ordering::Relaxed);
    }
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: the handler stores a flag, which is async-signal-safe; a handler (unlike SIG_IGN)
        // is reset in children by exec.
        unsafe { libc::signal(signal, note as *const () as libc::sighandler_t) };
    }
}
