//! Command lines in, output and exit status out; the daemon behind the socket
//! is the one of `api::testing`.

use tempfile::TempDir;
use tokio::net::UnixListener;

use super::*;
use crate::api::{Commands, server, testing};
use crate::instance::Instance;

/// A usage error as `main` prints it.
fn usage_line(args: &str) -> String {
    let words = ["vtep"].into_iter().chain(args.split(' '));
    let error = args::parse(words).expect_err(args);
    assert_eq!(error.exit_code(), 2, "{args}");
    args::usage_error(&error).expect(args)
}

#[test]
fn wrong_values_are_one_line_that_names_value_and_rule() {
    let add = "fdb add 02:00:00:00:00:01 --vni 100";
    for (line, parts) in [
        ("vni add 16777216", &["16777216", "0 to 16777215"][..]),
        ("vni add -1", &["-1"]),
        ("vni add 1 --udp-port 0", &["'0'", "--udp-port"]),
        ("vni add 1 --udp-port 65536", &["65536", "--udp-port"]),
        ("vni add 1 --mtu 67", &["67", "--mtu"]),
        ("vni add 1 --learning yes", &["yes", "`on` or `off`"]),
        (
            "vni add 1 --local 198.51.100",
            &["198.51.100", "is not an IP address"],
        ),
        (
            "vni add 1 --remote 239.1.1.1",
            &["239.1.1.1", "cannot be a tunnel end"],
        ),
        (
            "vni add 1 --bridge sixteen-bytes-xx",
            &["is not a device name"],
        ),
        (
            "vni add 1 --local 198.51.100.1 --remote 2001:db8::2",
            &["different IP families"],
        ),
        (
            "vni add 1 --remote 198.51.100.2 198.51.100.2",
            &["198.51.100.2 is named twice"],
        ),
        ("vni add 1 --bridge x --vxlan x", &["both called x"]),
        (
            "port add tap0 --vni 100 --hook tc",
            &["'tc'", "auto, xdp, tcx, kernel"],
        ),
        ("port add a/b --vni 100", &["`a/b` is not a device name"]),
        (
            "fdb add ff:ff:ff:ff:ff:ff --vni 1 --dst 198.51.100.2",
            &["multicast"],
        ),
        (
            "fdb add 00:00:00:00:00:00 --vni 1 --dst 198.51.100.2",
            &["all-zero"],
        ),
        ("fdb show 02:00:00:00:00", &["is not a MAC address"]),
        (
            "--instance ../x status",
            &["`../x` is not an instance name"],
        ),
        // Missing, too many, unknown.
        (add, &["--dst <IP>|--port <IFNAME>", "usage: vtep fdb add"]),
        (
            &format!("{add} --dst 198.51.100.2 --port tap0"),
            &["cannot be used with"],
        ),
        (
            "fdb del 02:00:00:00:00:01",
            &["--vni <N>", "usage: vtep fdb del"],
        ),
        (
            "statsu",
            &["unrecognized subcommand 'statsu'", "similar", "stats"],
        ),
        (
            "vni add 1 --learnin on",
            &["'--learnin'", "similar", "--learning"],
        ),
        ("status now", &["'now'", "usage: vtep status"]),
    ] {
        let text = usage_line(line);
        for part in parts {
            assert!(
                text.contains(part),
                "`{line}` gives `{text}` without `{part}`"
            );
        }
        assert!(!text.contains('\n') && !text.starts_with("error"), "{text}");
    }
}

#[test]
fn help_and_version_are_no_errors_and_every_command_has_an_example() {
    for line in ["--help", "--version", "fdb --help"] {
        let error = args::parse(["vtep"].into_iter().chain(line.split(' '))).unwrap_err();
        assert_eq!(
            (error.exit_code(), args::usage_error(&error)),
            (0, None),
            "{line}"
        );
    }
    let error = args::parse(["vtep"]).unwrap_err();
    assert_eq!((error.exit_code(), args::usage_error(&error)), (2, None));

    fn check(command: &clap::Command, path: &str) {
        let leaf = command.get_subcommands().next().is_none();
        let help = command
            .get_after_help()
            .map(ToString::to_string)
            .unwrap_or_default();
        assert!(
            !leaf || help.contains(&format!("  vtep {path}")) || help.contains(&format!(" {path}")),
            "no example for `vtep {path}`"
        );
        for child in command.get_subcommands() {
            check(child, format!("{path} {}", child.get_name()).trim());
        }
    }
    use clap::CommandFactory;
    Cli::command().debug_assert();
    check(&Cli::command(), "");
}

/// Run command lines against one daemon; returns what they print, or their
/// errors, and what reached the controller.
async fn session(lines: &[&str]) -> (Vec<Result<String, String>>, Vec<String>) {
    let dir = TempDir::new().unwrap();
    let instance = Instance::in_dirs("default", dir.path(), "/sys/fs/bpf").unwrap();
    let listener = UnixListener::bind(instance.socket_path()).unwrap();
    let (commands, receiver) = Commands::channel();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn(server::serve(listener, commands, async {
        let _ = stopped.await;
    }));
    let controller = tokio::spawn(testing::controller(receiver));
    let mut results = Vec::new();
    for line in lines {
        let cli = args::parse(["vtep"].into_iter().chain(line.split(' '))).unwrap();
        let Command::Ask(request) = cli.command else {
            panic!("{line}")
        };
        let mut client = Client::connect(&instance).await.unwrap();
        let mut out = Output {
            to: Vec::new(),
            json: cli.json,
            colour: Colour(false),
        };
        let result = ask(request, &mut client, &mut out).await;
        let text = String::from_utf8(out.to).unwrap();
        results.push(result.map(|()| text).map_err(|error| one_line(&error)));
    }
    drop(stop);
    serving.await.unwrap().unwrap();
    (results, controller.await.unwrap())
}

#[tokio::test]
async fn reads_print_text_or_json() {
    let lines = [
        "status",
        "vni show",
        "port show",
        "fdb show",
        "remote show",
        "stats",
        "resync",
    ];
    let (texts, _) = session(&lines).await;
    let status = testing::status();
    let plain = Colour(false);
    let expected = [
        text::status(&status, plain),
        text::vnis(&[testing::vni_row()], plain),
        text::ports(&status.ports, plain),
        text::fdb(&testing::fdb_rows(), plain),
        text::remotes(&[testing::remote_row()], plain),
        text::stats(&testing::stats(), plain),
        text::resync(&testing::resync(), plain),
    ];
    assert_eq!(texts, expected.map(Ok));

    let lines = lines.map(|line| format!("--json {line}"));
    let (texts, _) = session(&lines.each_ref().map(String::as_str)).await;
    for (line, text) in lines.iter().zip(texts) {
        let text = text.unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert!(json.is_object() || json.is_array(), "{line}: {text}");
        assert!(
            text.ends_with("}\n") || text.ends_with("]\n"),
            "{line}: {text}"
        );
    }
}

#[tokio::test]
async fn json_of_the_fixed_interfaces_is_as_designed() {
    let lines = [
        "--json fdb show --vni 100 02:00:00:00:00:01",
        "--json fdb show",
        "--json stats",
    ];
    let (texts, _) = session(&lines).await;
    let json = |i: usize| -> serde_json::Value {
        serde_json::from_str(texts[i].as_ref().unwrap()).unwrap()
    };
    let remote = serde_json::json!({
        "vni": 100, "mac": "02:00:00:00:00:01",
        "location": {"kind": "remote", "remote": "198.51.100.2"},
        "endpoint": null, "owner": "static", "generation": 3, "accelerated": true,
    });
    let local = serde_json::json!({
        "vni": 100, "mac": "02:00:00:00:00:02",
        "location": {"kind": "local", "port": "tap0"},
        "endpoint": "vm1", "owner": "kernel", "generation": 1, "accelerated": false,
    });
    assert_eq!(json(0), serde_json::json!([remote]));
    assert_eq!(json(1), serde_json::json!([remote, local]));
    let counted = serde_json::json!({"frames": 1000, "bytes": 64000});
    let zero = serde_json::json!({"frames": 0, "bytes": 0});
    let stats = json(2);
    assert_eq!(stats["outcomes"]["egress-remote"], counted);
    assert_eq!(stats["outcomes"]["ingress-local"], zero);
    assert_eq!(
        stats["segments"],
        serde_json::json!([{
            "vni": 100, "segment": 1,
            "ingress": {"fast": zero, "passed": zero, "dropped": zero},
            "egress": {"fast": counted, "passed": zero, "dropped": zero},
            "outcomes": {"egress-remote": counted},
        }])
    );
    let held = serde_json::to_value(crate::api::types::Location::Held).unwrap();
    assert_eq!(held, serde_json::json!({"kind": "held"}));
}

#[tokio::test]
async fn writes_reach_the_controller_with_every_option_and_print_nothing() {
    let (texts, log) = session(&[
        "vni add 7 --local 198.51.100.1 --dev eth1 --udp-port 8472 --learning off --mtu 1400 \
         --bridge lan --vxlan vx --remote 198.51.100.2 198.51.100.3",
        "vni add 8",
        "port add tap0 --vni 100 --hook kernel",
        "port add tap1 --vni 100",
        "port del tap0",
        "fdb replace 02:00:00:00:00:01 --vni 100 --dst 198.51.100.2",
        "fdb replace 02:00:00:00:00:01 --vni 100 --port tap0",
        "fdb del 02:00:00:00:00:01 --vni 100",
    ])
    .await;
    assert_eq!(texts, vec![Ok(String::new()); 8]);
    assert_eq!(
        log,
        [
            "add VniSpec { vni: Vni(7), local: Some(198.51.100.1), dev: Some(eth1), \
             udp_port: 8472, remotes: [198.51.100.2, 198.51.100.3], learning: false, \
             mtu: Some(1400), bridge: Some(lan), vxlan: Some(vx) }",
            "add VniSpec { vni: Vni(8), local: None, dev: None, udp_port: 4789, remotes: [], \
             learning: true, mtu: None, bridge: None, vxlan: None }",
            "add PortSpec { name: tap0, vni: Vni(100), hook: Kernel }",
            "add PortSpec { name: tap1, vni: Vni(100), hook: Auto }",
            "delete port tap0",
            "replace FdbSpec { vni: Vni(100), mac: 02:00:00:00:00:01, \
             location: Remote { remote: 198.51.100.2 } }",
            "replace FdbSpec { vni: Vni(100), mac: 02:00:00:00:00:01, \
             location: Local { port: tap0 } }",
            "delete 02:00:00:00:00:01 in 100",
        ]
    );
}

#[tokio::test]
async fn refusals_of_the_daemon_are_printed_as_they_came() {
    let (texts, _) = session(&[
        "vni del 9",
        "fdb add 02:00:00:00:00:01 --vni 100 --port tap0",
    ])
    .await;
    assert_eq!(
        texts,
        [
            Err("no VNI 9: see `vtep vni show`".to_owned()),
            Err("02:00:00:00:00:01 exists: use `vtep fdb replace`".to_owned()),
        ]
    );
}

#[test]
fn an_error_is_one_line_without_repetition() {
    let inner = io::Error::from_raw_os_error(libc::ENODEV);
    let error = anyhow::Error::from(inner).context("cannot attach to eth1");
    assert_eq!(one_line(&error), "cannot attach to eth1: No such device");
    let error = error.context("cannot attach to eth1: No such device: is it there?");
    assert_eq!(
        one_line(&error),
        "cannot attach to eth1: No such device: is it there?"
    );
}
