//! Removes what tests, demo and benchmarks left when they were killed: their
//! namespaces, pins, daemons and locks carry the process id of their maker in
//! the name (`vt-PID-..`, `lab-PID-..`), and only those of processes that are
//! gone are touched.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::run::{as_root, capture, quiet};

/// First words of the names, before the process id.
const MAKERS: &[&str] = &["vt", "lab", "dp", "bench"];
const RUN_DIR: &str = "/run/vtep";
const PIN_DIRS: [&str; 2] = ["/sys/fs/bpf/vtep", "/sys/fs/bpf"];

/// Failures are said, and are no reason to stop.
pub fn remove() {
    for name in names("/run/netns").iter().filter(|name| is_orphan(name)) {
        attempt(as_root("ip"), &["netns", "del", name]);
    }
    for name in names(RUN_DIR) {
        let path = format!("{RUN_DIR}/{name}");
        if is_orphan(&name) {
            if name.ends_with(".lock") {
                end_daemon(&path);
            }
            attempt(as_root("rm"), &["-f", &path]);
        }
    }
    for directory in PIN_DIRS {
        for name in names(directory).iter().filter(|name| is_orphan(name)) {
            attempt(as_root("rm"), &["-rf", &format!("{directory}/{name}")]);
        }
    }
}

/// Entries of a directory; root's eyes where ours are not allowed in.
fn names(directory: &str) -> Vec<String> {
    if !matches!(Path::new(directory).try_exists(), Ok(true) | Err(_)) {
        return Vec::new();
    }
    if let Ok(entries) = fs::read_dir(directory) {
        let name = |entry: fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
        return entries.flatten().map(name).collect();
    }
    let listing = as_root("ls").and_then(|mut ls| capture(ls.arg(directory)));
    listing
        .map(|text| text.lines().map(str::to_owned).collect())
        .unwrap_or_default()
}

fn is_orphan(name: &str) -> bool {
    owner(name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
}

/// Process id in the name of something a test made.
fn owner(name: &str) -> Option<u32> {
    let mut words = name.split('-');
    let maker = words.next()?;
    let pid = words.next()?.parse().ok()?;
    (MAKERS.contains(&maker) && words.next().is_some()).then_some(pid)
}

/// The lock holds the daemon's process id as text.
fn end_daemon(lock: &str) {
    let Ok(text) = as_root("cat").and_then(|mut cat| capture(cat.arg(lock))) else {
        return;
    };
    let Ok(pid) = text.trim().parse::<u32>() else {
        return;
    };
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    if name.trim() == "vtep" {
        attempt(as_root("kill"), &["-KILL", &pid.to_string()]);
    }
}

fn attempt(command: anyhow::Result<Command>, words: &[&str]) {
    if let Err(error) = command.and_then(|mut command| quiet(command.args(words))) {
        eprintln!("xtask: left over: {error:#}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_test_processes_have_an_owner() {
        assert_eq!(owner("vt-123-0-router"), Some(123));
        assert_eq!(owner("lab-77-1.lock"), Some(77));
        assert_eq!(owner("default"), None);
        assert_eq!(owner("default.lock"), None);
        assert_eq!(owner("vt-blue-1"), None);
        assert_eq!(owner("lab-77"), None, "an instance that somebody named so");
        assert_eq!(owner("other-77-1"), None);
    }
}
