//! The program as a shell sees it: exit status, what goes to which stream, and
//! errors of one line. Nothing here needs root or a daemon.

use std::process::{Command, Output};

/// An instance name nobody runs.
const NOBODY: &str = "exit-status-test";

fn vtep(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vtep"))
        .args(args)
        .env("VTEP_INSTANCE", NOBODY)
        .env_remove("VTEP_LOG")
        .output()
        .unwrap()
}

/// Fails with this status and one line; returns the line.
fn failure(args: &[&str], status: i32) -> String {
    let output = vtep(args);
    assert_eq!(output.status.code(), Some(status), "{args:?}: {output:?}");
    assert!(output.stdout.is_empty(), "{args:?}: {output:?}");
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.starts_with("vtep: ") && text.ends_with('\n'), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

#[test]
fn usage_errors_exit_2() {
    for (args, part) in [
        (&["vni", "add", "16777216"][..], "not a VNI"),
        (
            &[
                "fdb",
                "add",
                "01:00:5e:00:00:01",
                "--vni",
                "1",
                "--port",
                "a",
            ],
            "multicast",
        ),
        (
            &["fdb", "replace", "02:00:00:00:00:01", "--vni", "1"],
            "--dst",
        ),
        (&["fdb", "del", "02:00:00:00:00:01"], "--vni"),
        (
            &["vni", "add", "1", "--remote", "198.51.100.2", "2001:db8::2"],
            "IP families",
        ),
        (&["--instance", "a/b", "status"], "not an instance name"),
        (&["frobnicate"], "unrecognized subcommand"),
    ] {
        let line = failure(args, 2);
        assert!(line.contains(part), "{line}");
    }
    let output = vtep(&[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stdout.is_empty() && !output.stderr.is_empty());
}

#[test]
fn a_missing_daemon_exits_1_and_names_the_socket() {
    for args in [
        &["status"][..],
        &["--json", "fdb", "show"],
        &["vni", "del", "5"],
        &["resync"],
    ] {
        let line = failure(args, 1);
        assert!(line.contains(&format!("/run/vtep/{NOBODY}.sock")), "{line}");
        assert!(
            line.contains(&format!("`vtep --instance {NOBODY} run`")),
            "{line}"
        );
    }
}

#[test]
fn run_refuses_a_bad_configuration_and_a_missing_namespace_before_anything_else() {
    let dir = tempfile::TempDir::new().unwrap();
    let file = dir.path().join("vtep.toml");
    std::fs::write(&file, "[daemon]\nfdb_entries = 0\n").unwrap();
    let file = file.to_str().unwrap();
    let line = failure(&["run", "--config", file], 1);
    assert!(
        line.contains(&format!("{file}:2: `fdb_entries = 0`: 0 is out of range")),
        "{line}"
    );
    let line = failure(&["--netns", "vtep-no-such-namespace", "run"], 1);
    assert!(
        line.contains("vtep-no-such-namespace does not exist"),
        "{line}"
    );
    assert!(!std::path::Path::new(&format!("/run/vtep/{NOBODY}.sock")).exists());
}

#[test]
fn help_and_version_go_to_stdout_and_exit_0() {
    for args in [&["--help"][..], &["--version"], &["fdb", "add", "--help"]] {
        let output = vtep(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(
            !output.stdout.is_empty() && output.stderr.is_empty(),
            "{args:?}"
        );
    }
}
