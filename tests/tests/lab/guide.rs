//! `docs/two-hosts.md` works as it is written: its commands are read from the
//! page and carried out, on hosts that have neither bridge nor VXLAN device.

use std::process::Command;
use std::time::Duration;

use vtep_tests::daemon::{Daemon, binary};
use vtep_tests::is_root;
use vtep_tests::lab::{Lab, Options};
use vtep_tests::netns::execute;
use vtep_tests::streams::Session;

const PAGE: &str = include_str!("../../../docs/two-hosts.md");

/// All lines in fenced blocks of a language, without their indentation.
fn block(language: &str) -> String {
    let fence = format!("```{language}\n");
    let parts = PAGE.split(&fence).skip(1);
    let bodies = parts.map(|part| part.split("```").next().unwrap_or(""));
    let lines = bodies.flat_map(|body| body.lines().map(str::trim_start));
    lines
        .filter(|l| !l.is_empty())
        .map(|l| format!("{l}\n"))
        .collect()
}

#[test]
fn steps_of_the_guide_make_an_accelerated_segment() {
    if !is_root("steps_of_the_guide_make_an_accelerated_segment") {
        return;
    }
    let mut lab = Lab::with(&Options {
        segment: false,
        ..Options::default()
    })
    .unwrap();
    // As the page names them.
    assert_eq!(lab.hosts[0].address.to_string(), "192.0.2.2");
    assert_eq!(lab.hosts[1].address.to_string(), "198.51.100.2");
    let (a, b) = (lab.add_vm(0).unwrap(), lab.add_vm(1).unwrap());
    let mut daemons: Vec<Daemon> = Vec::new();
    let mut outputs = String::new();
    for line in block("console").lines() {
        let (place, command) = line.split_once("# ").unwrap();
        let number = |prefix: &str| -> Option<usize> {
            Some(place.strip_prefix(prefix)?.parse::<usize>().unwrap() - 1)
        };
        if command == "vtep vni del 100" && place == "host1" {
            // All steps are done: use it before it is removed.
            prove(&lab, &daemons, a, b);
        }
        let words: Vec<&str> = command.split(' ').collect();
        let output = match (number("host"), words.as_slice()) {
            (Some(host), ["vtep", "run"]) => {
                assert_eq!(host, daemons.len());
                daemons.push(Daemon::with_config(&lab.hosts[host], "").unwrap());
                String::new()
            }
            (Some(host), ["vtep", words @ ..]) => daemons[host].cli(words).unwrap(),
            (Some(host), _) => lab.hosts[host].netns.run(command).unwrap(),
            (None, _) => lab.vms[number("vm").unwrap()].netns.run(command).unwrap(),
        };
        outputs += &format!("{line}\n{output}");
    }
    println!("{outputs}");
    for part in [
        "5 received, 0% packet loss",
        "port1  100  tcx   -",
        "dst 198.51.100.2",
        "192.0.2.1",
        "egress-remote",
    ] {
        assert!(outputs.contains(part), "{part} is not in:\n{outputs}");
    }
    // `vni del` and `unload` left nothing but the VM's card and the uplink.
    for (i, host) in lab.hosts.iter().enumerate() {
        let links = host.netns.run("ip -br link").unwrap();
        assert!(
            !links.contains("br100") && !links.contains("vxlan"),
            "{links}"
        );
        assert!(links.contains(&format!("port{}", i + 1)), "{links}");
        let links = host.netns.run("ip -d link").unwrap();
        assert!(!links.contains("xdp"), "{links}");
    }
}

fn prove(lab: &Lab, daemons: &[Daemon], a: usize, b: usize) {
    let before: Vec<u64> = daemons
        .iter()
        .flat_map(|d| ["egress-remote", "ingress-local-stack"].map(|o| d.frames(o).unwrap()))
        .collect();
    let session = Session::start(&lab.vms[a], &lab.vms[b]).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let report = session.finish().unwrap();
    assert!(report.round_trips > 50, "{report:?}");
    let after = daemons
        .iter()
        .flat_map(|d| ["egress-remote", "ingress-local-stack"].map(|o| d.frames(o).unwrap()));
    for (before, after) in before.into_iter().zip(after) {
        assert!(
            after - before >= report.round_trips,
            "{before} {after} {report:?}"
        );
    }
}

#[test]
fn script_of_the_guide_runs_on_one_machine() {
    if !is_root("script_of_the_guide_runs_on_one_machine") {
        return;
    }
    let prefix = format!("vt-{}-guide", std::process::id());
    let script = block("sh").replace("demo", &prefix);
    assert!(script.contains("ip netns add"), "{script}");
    let path = format!(
        "{}:{}",
        binary().parent().unwrap().display(),
        std::env::var("PATH").unwrap()
    );
    // Whatever goes wrong, nothing of it stays.
    let script = format!(
        "trap 'set +e; for i in 1 2; do vtep --instance {prefix}-host$i unload; \
         ip netns del {prefix}-host$i; ip netns del {prefix}-vm$i; rm /run/vtep/{prefix}-host$i.lock; done 2>/dev/null' EXIT\n{script}"
    );
    let output = execute(
        Command::new("timeout")
            .args(["60", "sh", "-c", &script])
            .env("PATH", path),
    );
    let output = String::from_utf8_lossy(&output.unwrap().stdout).into_owned();
    println!("{output}");
    for part in ["5 received", "ready", "egress-remote", "ingress-local"] {
        assert!(output.contains(part), "{part} is not in:\n{output}");
    }
    let left = execute(Command::new("ip").args(["netns", "list"])).unwrap();
    assert!(!String::from_utf8_lossy(&left.stdout).contains(&prefix));
}
