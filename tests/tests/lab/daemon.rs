//! The daemon as a process: why it does not run, and what its socket speaks.

use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use vtep_tests::daemon::{binary, refusal};
use vtep_tests::is_root;

use crate::control::{bare, two_hosts, words};

#[test]
fn daemons_that_cannot_run_say_why() {
    if !is_root("daemons_that_cannot_run_say_why") {
        return;
    }
    let (lab, daemons) = bare(1);
    let instance = daemons[0].instance();
    let netns = lab.hosts[0].netns.name();
    let vtep = |line: &str| {
        let mut command = Command::new(binary());
        command.args(words(line));
        command
    };
    // A second one on the same instance.
    let mut second = vtep(&format!("--instance {instance} --netns {netns} run"));
    let (code, text) = refusal(&mut second).unwrap();
    assert_eq!(code, 1, "{text}");
    let pid = daemons[0].pid().unwrap();
    assert!(
        text.contains("already running") && text.contains(&format!("pid {pid}")),
        "{text}"
    );
    assert!(text.contains("--instance"), "{text}");
    daemons[0].json(&["status"]).unwrap();

    // Not root.
    let as_nobody = |line: &str| {
        let mut command = Command::new("setpriv");
        command.args([
            "--reuid",
            "65534",
            "--regid",
            "65534",
            "--clear-groups",
            "--",
        ]);
        // A copy where anybody may execute it.
        command.arg(std::env::temp_dir().join(format!("vtep-{}", std::process::id())));
        command.args(words(line));
        refusal(&mut command).unwrap()
    };
    let copy = std::env::temp_dir().join(format!("vtep-{}", std::process::id()));
    std::fs::copy(binary(), &copy).unwrap();
    let results = [
        as_nobody("--instance lab-nobody run"),
        as_nobody(&format!("--instance {instance} status")),
        as_nobody(&format!("--instance {instance} unload")),
        as_nobody(&format!("--netns {netns} --instance lab-nobody run")),
    ];
    std::fs::remove_file(&copy).unwrap();
    for (code, text) in results {
        assert_eq!(code, 1, "{text}");
        assert!(text.contains("root"), "{text}");
        assert!(!text.contains("os error"), "{text}");
    }

    // `ip netns exec` hides the BPF file system.
    let mut hidden = Command::new("ip");
    hidden.args(["netns", "exec", netns]).arg(binary());
    hidden.args(["--instance", "lab-hidden", "run"]);
    let (code, text) = refusal(&mut hidden).unwrap();
    assert_eq!(code, 1, "{text}");
    for part in ["/sys/fs/bpf", "--netns"] {
        assert!(text.contains(part), "{text}");
    }
    // Nobody there.
    let (code, text) = refusal(&mut vtep("--instance lab-nobody status")).unwrap();
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("no daemon for instance lab-nobody"), "{text}");
    assert!(text.contains("vtep --instance lab-nobody run"), "{text}");
    let (code, text) = refusal(&mut vtep("--netns lab-none --instance lab-nobody run")).unwrap();
    assert_eq!(code, 1, "{text}");
    assert!(
        text.contains("lab-none") && text.contains("ip netns"),
        "{text}"
    );
    let (code, text) = refusal(&mut vtep("--instance a/b status")).unwrap();
    assert_eq!(code, 2, "{text}");
    for left in [
        "/run/vtep/lab-hidden.sock",
        "/sys/fs/bpf/vtep/lab-hidden",
        "/sys/fs/bpf/vtep/lab-nobody",
    ] {
        assert!(!std::path::Path::new(left).exists(), "{left}");
    }
}

#[test]
fn socket_speaks_plain_http() {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;

    if !is_root("socket_speaks_plain_http") {
        return;
    }
    let (lab, daemons) = two_hosts();
    lab.vms[0].netns.run("ping -c 1 -W 2 10.0.0.2").unwrap();
    let ask = |request: &str| {
        let path = format!("/run/vtep/{}.sock", daemons[0].instance());
        let mut stream = UnixStream::connect(path).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let get = |path: &str| {
        ask(&format!(
            "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        ))
    };
    let send = |method: &str, path: &str, body: &str| {
        ask(&format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ))
    };
    let metrics = get("/metrics");
    assert!(metrics.starts_with("HTTP/1.1 200 OK\r\n"), "{metrics}");
    for line in [
        "vtep_ready 1",
        "vtep_port_accelerated{vni=\"100\",port=\"port1\"} 1",
        "# EOF",
    ] {
        assert!(metrics.lines().any(|l| l == line), "{line}: {metrics}");
    }
    let status = get("/v1/status");
    let body: Value = serde_json::from_str(status.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    assert_eq!(body["ready"], true);
    let entry =
        r#"{"vni":100,"mac":"02:00:00:00:00:07","location":{"kind":"local","port":"port1"}}"#;
    assert!(send("POST", "/v1/fdb", entry).starts_with("HTTP/1.1 204"));
    assert!(send("POST", "/v1/fdb", entry).starts_with("HTTP/1.1 409"));
    assert!(send("PUT", "/v1/fdb", entry).starts_with("HTTP/1.1 204"));
    assert!(get("/v1/fdb?vni=100&mac=02%3A00%3A00%3A00%3A00%3A07").contains("\"owner\":\"api\""));
    assert!(send("DELETE", "/v1/fdb/100/02:00:00:00:00:07", "").starts_with("HTTP/1.1 204"));
    assert!(send("DELETE", "/v1/fdb/100/02:00:00:00:00:07", "").starts_with("HTTP/1.1 404"));
    let answer = send("POST", "/v1/fdb", "{");
    assert!(
        answer.starts_with("HTTP/1.1 400") && answer.contains("request body"),
        "{answer}"
    );
    assert!(get("/v1/nothing").starts_with("HTTP/1.1 404"));
    assert!(send("DELETE", "/v1/status", "").starts_with("HTTP/1.1 405"));
    assert!(get("/v1/openapi.yaml").contains("openapi: 3.1"));
}
