//! Starts other programs: what runs is said, what fails is shown, and nothing
//! is left running when the user presses Ctrl-C.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, Result, bail};

/// The workspace this was built from.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("."))
}

pub fn is_root() -> bool {
    // SAFETY: no arguments, no memory, cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// A command that runs as root: as it is, or through sudo.
pub fn as_root(program: impl AsRef<OsStr>) -> Result<Command> {
    if is_root() {
        return Ok(Command::new(program));
    }
    if !has("sudo") {
        bail!("this step needs root and there is no sudo: run the same command as root");
    }
    let mut command = Command::new("sudo");
    command.arg("--").arg(program);
    Ok(command)
}

/// Whether a program is on PATH (or in the places a user's PATH may lack).
pub fn has(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .any(|dir| dir.join(program).is_file())
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
        let tail = lines[lines.len().saturating_sub(15)..].join("\n");
        bail!("`{text}` failed ({}):\n{tail}", output.status);
    }
    Ok(output)
}

/// First line of what a command prints.
pub fn capture(command: &mut Command) -> Result<String> {
    Ok(String::from_utf8_lossy(&quiet(command)?.stdout)
        .trim()
        .to_owned())
}

/// Children are in our process group and get Ctrl-C themselves; wait for them
/// to clean up instead of dying before them.
pub fn handle_interrupt() {
    extern "C" fn note(_: libc::c_int) {}
    // SAFETY: the handler does nothing, which is async-signal-safe; a handler (unlike SIG_IGN) is
    // reset in children by exec.
    unsafe { libc::signal(libc::SIGINT, note as *const () as libc::sighandler_t) };
}
