//! Server and client against each other over a real socket, and both against
//! `openapi.yaml`.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use vtep_common::{MacAddr, Vni};

use super::client::{Client, ClientError};
use super::command::{Commands, ErrorKind};
use super::server::{self, OPENAPI};
use super::testing;
use super::types::*;
use crate::instance::Instance;

/// A server in front of the fixed answers of `testing::controller`.
struct Fixture {
    instance: Instance,
    controller: JoinHandle<Vec<String>>,
    _dir: TempDir,
}

impl Fixture {
    fn start() -> Self {
        let dir = TempDir::new().unwrap();
        let instance = Instance::in_dirs("default", dir.path(), "/sys/fs/bpf").unwrap();
        let listener = UnixListener::bind(instance.socket_path()).unwrap();
        let (commands, receiver) = Commands::channel();
        tokio::spawn(server::serve(listener, commands, std::future::pending()));
        let controller = tokio::spawn(testing::controller(receiver));
        Self {
            instance,
            controller,
            _dir: dir,
        }
    }

    async fn client(&self) -> Client {
        Client::connect(&self.instance).await.unwrap()
    }
}

fn refused(error: ClientError) -> (ErrorKind, String) {
    match error {
        ClientError::Refused(error) => (error.kind, error.message),
        other => panic!("not refused but {other:?}"),
    }
}

fn fdb_spec() -> FdbSpec {
    FdbSpec {
        vni: testing::vni(),
        mac: "02:00:00:00:00:01".parse().unwrap(),
        location: Target::Remote {
            remote: "198.51.100.2".parse().unwrap(),
        },
    }
}

#[tokio::test]
async fn every_read_arrives_as_it_was_sent() {
    let fixture = Fixture::start();
    let mut client = fixture.client().await;
    assert_eq!(client.status().await.unwrap(), testing::status());
    assert_eq!(client.vni_show().await.unwrap(), [testing::vni_row()]);
    assert_eq!(client.port_show().await.unwrap(), testing::status().ports);
    assert_eq!(client.remote_show().await.unwrap(), [testing::remote_row()]);
    assert_eq!(client.stats().await.unwrap(), testing::stats());
    assert_eq!(client.resync().await.unwrap(), testing::resync());
    let all = client.fdb_show(FdbFilter::default()).await.unwrap();
    assert_eq!(all, testing::fdb_rows());
}

#[tokio::test]
async fn fdb_filters_reach_the_controller() {
    let fixture = Fixture::start();
    let mut client = fixture.client().await;
    let mac = Some(MacAddr([2, 0, 0, 0, 0, 2]));
    let filter = FdbFilter {
        vni: Some(testing::vni()),
        mac,
    };
    assert_eq!(
        client.fdb_show(filter).await.unwrap(),
        testing::fdb_rows()[1..]
    );
    let filter = FdbFilter {
        vni: Vni::new(101),
        mac: None,
    };
    assert_eq!(client.fdb_show(filter).await.unwrap(), []);
}

#[tokio::test]
async fn writes_arrive_complete_and_unload_ends_the_controller() {
    let fixture = Fixture::start();
    let mut client = fixture.client().await;
    let mut vni = VniSpec::new(testing::vni());
    vni.remotes = vec!["198.51.100.2".parse().unwrap()];
    vni.mtu = Some(1400);
    let port = PortSpec {
        name: "tap0".parse().unwrap(),
        vni: testing::vni(),
        hook: PortHook::Kernel,
    };
    let odd_name = "a#b?c".parse().unwrap();
    client.vni_add(&vni).await.unwrap();
    client.port_add(&port).await.unwrap();
    client.port_del(&odd_name).await.unwrap();
    client
        .fdb_write(&fdb_spec(), WriteMode::Replace)
        .await
        .unwrap();
    client
        .fdb_del(testing::vni(), fdb_spec().mac)
        .await
        .unwrap();
    client.unload().await.unwrap();
    assert_eq!(
        fixture.controller.await.unwrap(),
        [
            format!("add {vni:?}"),
            format!("add {port:?}"),
            "delete port a#b?c".into(),
            format!("replace {:?}", fdb_spec()),
            "delete 02:00:00:00:00:01 in 100".into(),
            "unload".into(),
        ]
    );
}

#[tokio::test]
async fn refusals_keep_kind_and_message() {
    let fixture = Fixture::start();
    let mut client = fixture.client().await;
    let error = client.vni_del(testing::vni()).await.unwrap_err();
    assert_eq!(
        refused(error),
        (
            ErrorKind::NotFound,
            "no VNI 100: see `vtep vni show`".into()
        )
    );
    let error = client
        .fdb_write(&fdb_spec(), WriteMode::Add)
        .await
        .unwrap_err();
    assert_eq!(refused(error).0, ErrorKind::Conflict);
    let mut spec = VniSpec::new(testing::vni());
    spec.local = Some("2001:db8::1".parse().unwrap());
    spec.remotes = vec!["198.51.100.2".parse().unwrap()];
    let (kind, message) = refused(client.vni_add(&spec).await.unwrap_err());
    assert_eq!(kind, ErrorKind::BadRequest);
    assert!(message.contains("different IP families"), "{message}");
    drop(client);
    fixture.controller.abort();
    while !fixture.controller.is_finished() {
        tokio::task::yield_now().await;
    }
    let error = fixture.client().await.status().await.unwrap_err();
    assert_eq!(refused(error).0, ErrorKind::Internal);
}

#[tokio::test]
async fn a_missing_daemon_is_told_from_a_failing_one() {
    let dir = TempDir::new().unwrap();
    let instance = Instance::in_dirs("blue", dir.path(), "/sys/fs/bpf").unwrap();
    let error = Client::connect(&instance).await.unwrap_err().to_string();
    let path = instance.socket_path();
    let expected = format!(
        "no daemon for instance blue ({}: No such file or directory): start it with `vtep --instance blue run`",
        path.display()
    );
    assert_eq!(error, expected);
    // What a dead daemon leaves.
    drop(UnixListener::bind(&path).unwrap());
    let error = Client::connect(&instance).await.unwrap_err().to_string();
    assert!(error.contains("Connection refused"), "{error}");
}

/// One request written by hand; the whole answer as text.
async fn raw(fixture: &Fixture, head: &str, body: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let path = fixture.instance.socket_path();
    let mut stream = tokio::net::UnixStream::connect(path).await.unwrap();
    let length = body.len();
    let request = format!(
        "{head} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn wrong_requests_get_one_json_line_that_says_what_is_wrong() {
    let fixture = Fixture::start();
    let broadcast = r#"{"vni":1,"mac":"ff:ff:ff:ff:ff:ff","location":{"kind":"local","port":"a"}}"#;
    for (head, body, status, text) in [
        ("GET /v2/status", "", 404, "there is no /v2/status"),
        ("PUT /v1/status", "", 405, "no such method"),
        ("POST /v1/vnis", "{", 400, "request body: EOF"),
        ("POST /v1/vnis", r#"{"vni":16777216}"#, 400, "not a VNI"),
        (
            "POST /v1/vnis",
            r#"{"vni":1,"udp_port":0}"#,
            400,
            "UDP port 0",
        ),
        ("POST /v1/vnis", r#"{"vni":1,"mtu":20}"#, 400, "MTU 20"),
        (
            "POST /v1/vnis",
            r#"{"vni":1,"lokal":"::1"}"#,
            400,
            "unknown field `lokal`",
        ),
        (
            "POST /v1/ports",
            r#"{"vni":1,"name":"a/b"}"#,
            400,
            "not a device name",
        ),
        ("POST /v1/fdb", broadcast, 400, "multicast"),
        ("DELETE /v1/vnis/x", "", 400, "`x` is not a VNI"),
        ("DELETE /v1/fdb/1/ff:ff:ff:ff:ff:ff", "", 400, "multicast"),
        ("GET /v1/fdb?vlan=3", "", 400, "`vlan=3` is no filter"),
        ("GET /v1/fdb?mac=zz", "", 400, "not a MAC"),
    ] {
        let answer = raw(&fixture, head, body).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{head}: {answer}"
        );
        let json = answer.split_once("\r\n\r\n").unwrap().1;
        let error: ErrorBody = serde_json::from_str(json).unwrap();
        assert!(error.error.contains(text), "{head}: {}", error.error);
        assert!(!error.error.contains('\n'), "{}", error.error);
    }
}

#[tokio::test]
async fn the_socket_serves_its_own_description_and_metrics() {
    let fixture = Fixture::start();
    let answer = raw(&fixture, "GET /v1/openapi.yaml", "").await;
    assert_eq!(answer.split_once("\r\n\r\n").unwrap().1, OPENAPI);
    let answer = raw(&fixture, "GET /metrics", "").await;
    assert!(
        answer.contains("content-type: application/openmetrics-text"),
        "{answer}"
    );
    assert!(
        answer.contains("\nvtep_frames_total{outcome=\"egress-remote\"} 1000\n"),
        "{answer}"
    );
}

/// The keys of `openapi.yaml` at a depth of nested keys, with their parents.
/// Enough for a file we write ourselves: two spaces a level, no flow mapping
/// above the level asked for.
fn yaml_keys(parents: &[&str]) -> Vec<(usize, String)> {
    let mut stack: Vec<String> = Vec::new();
    let mut found = Vec::new();
    for line in OPENAPI.lines() {
        let indent = line.len() - line.trim_start().len();
        let Some((key, _)) = line.trim_start().split_once(':') else {
            continue;
        };
        if indent % 2 != 0 || key.contains(' ') {
            continue;
        }
        stack.truncate(indent / 2);
        let inside = stack.len() >= parents.len()
            && stack.iter().zip(parents).all(|(have, want)| have == want);
        if inside {
            found.push((indent / 2 - parents.len(), key.to_owned()));
        }
        stack.push(key.to_owned());
    }
    found
}

#[test]
fn openapi_lists_exactly_the_routes_of_the_server() {
    let mut described = BTreeSet::new();
    let mut path = String::new();
    for (depth, key) in yaml_keys(&["paths"]) {
        match depth {
            0 => path = key,
            1 => drop(described.insert(format!("{key} {path}"))),
            _ => {}
        }
    }
    assert_eq!(described, server::route_names().collect());
}

#[test]
fn openapi_lists_exactly_the_fields_of_the_types() {
    fn keys(value: impl Serialize) -> BTreeSet<String> {
        let json = serde_json::to_value(value).unwrap();
        json.as_object().unwrap().keys().cloned().collect()
    }
    let status = testing::status();
    let local = keys(Location::Local {
        port: "tap0".into(),
    });
    let location = keys(&testing::fdb_rows()[0].location);
    let types = BTreeMap::from([
        (
            "Error",
            keys(ErrorBody {
                error: String::new(),
            }),
        ),
        ("Status", keys(&status)),
        ("Uplink", keys(&status.uplinks[0])),
        ("Segment", keys(&status.segments[0])),
        ("Port", keys(&status.ports[0])),
        ("Counters", keys(status.counters)),
        ("Vni", keys(testing::vni_row())),
        ("VniSpec", keys(VniSpec::new(testing::vni()))),
        (
            "PortSpec",
            keys(PortSpec {
                name: "a".parse().unwrap(),
                vni: testing::vni(),
                hook: PortHook::Auto,
            }),
        ),
        (
            "FdbEntry",
            keys(FdbRow {
                vlan: Some(10),
                ..testing::fdb_rows().remove(0)
            }),
        ),
        ("FdbSpec", keys(fdb_spec())),
        ("Location", location.union(&local).cloned().collect()),
        ("Remote", keys(testing::remote_row())),
        ("Count", keys(Count::default())),
        ("Stats", keys(testing::stats())),
        ("SegmentStats", keys(&testing::stats().segments[0])),
        ("DirectionStats", keys(DirectionStats::default())),
        ("ResyncReport", keys(testing::resync())),
    ]);
    let mut described: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let (mut name, mut in_properties) = (String::new(), false);
    for (depth, key) in yaml_keys(&["components", "schemas"]) {
        match depth {
            0 => name = key,
            1 => in_properties = key == "properties",
            2 if in_properties => drop(described.entry(name.clone()).or_default().insert(key)),
            _ => {}
        }
    }
    let types: BTreeMap<String, BTreeSet<String>> = types
        .into_iter()
        .map(|(name, keys)| (name.to_owned(), keys))
        .collect();
    assert_eq!(described, types);
}
