//! The configuration file of `vtep run`: TOML, everything optional, nothing
//! unknown accepted. Parsed once, before anything is touched; errors name file,
//! line and key.
//!
//! See [`EXAMPLE`] for every key with its default.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, de};
use vtep_common::Vni;
use vtep_common::layout::UPLINKS_MAX;

use crate::api::types::{PortHook, XdpMode};
use crate::api::values::IfName;
use crate::instance::reason;

/// A file with every key; apart from the lists and the port, all defaults.
pub const EXAMPLE: &str = r#"# Devices towards the underlay. Default: found from the routes to the remotes.
uplinks = ["eth1"]
# VXLAN devices to accelerate. Default: all of the network namespace.
vxlan = ["vxlan100"]
# Whether VXLAN frames from hosts that no forwarding entry of their VNI names
# are dropped.
strict = false

# Sizes of the maps. What does not fit is left to the kernel and counted.
[daemon]
fdb_entries = 131072
segments = 256
ports = 1024
remotes = 4096

[xdp]
# "generic" runs behind the driver: slow, but works on any device.
mode = "native"

# One table for each port that is not to be decided by its offload features.
[ports.tap0]
# "auto", "xdp", "tcx" or "kernel" (never accelerated).
hook = "xdp"

# One table for each VNI that is not to be treated as the others.
[vnis.100]
strict = true
"#;

/// The whole file.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// `None`: found from the routes to the remotes.
    #[serde(deserialize_with = "uplinks")]
    pub uplinks: Option<Vec<IfName>>,
    /// `None`: every VXLAN device.
    #[serde(deserialize_with = "names")]
    pub vxlan: Option<Vec<IfName>>,
    /// Frames from strangers are dropped (R10).
    pub strict: bool,
    pub daemon: Daemon,
    pub xdp: Xdp,
    pub ports: BTreeMap<IfName, Port>,
    #[serde(deserialize_with = "by_vni")]
    pub vnis: BTreeMap<Vni, VniOptions>,
}

/// `[daemon]`: how much the maps hold.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Daemon {
    /// MAC addresses, all segments together.
    #[serde(deserialize_with = "size::<16_777_216, _>")]
    pub fdb_entries: u32,
    #[serde(deserialize_with = "size::<65_535, _>")]
    pub segments: u32,
    #[serde(deserialize_with = "size::<65_536, _>")]
    pub ports: u32,
    #[serde(deserialize_with = "size::<1_048_576, _>")]
    pub remotes: u32,
}

impl Default for Daemon {
    fn default() -> Self {
        Self {
            fdb_entries: 131_072,
            segments: 256,
            ports: 1024,
            remotes: 4096,
        }
    }
}

/// `[xdp]`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Xdp {
    pub mode: XdpMode,
}

/// `[ports.NAME]`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Port {
    pub hook: PortHook,
}

/// `[vnis.N]`: what differs from the rest of the file.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VniOptions {
    pub strict: Option<bool>,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration {}: {}", path.display(), reason(source))]
    Read { path: PathBuf, source: io::Error },
    #[error("{}:{line}: `{text}`: {message}", path.display())]
    Parse {
        path: PathBuf,
        line: usize,
        /// The line itself, which shows the key.
        text: String,
        message: String,
    },
}

impl Config {
    /// Read and check a file.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path)
    }

    /// `path` is for the error only.
    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| {
            let start = error.span().map_or(0, |span| span.start.min(text.len()));
            let line = text[..start].matches('\n').count();
            ConfigError::Parse {
                path: path.to_owned(),
                line: line + 1,
                text: text.lines().nth(line).unwrap_or("").trim().to_owned(),
                message: error.message().replace('\n', ", "),
            }
        })
    }
}

/// A map size from 1 to `MAX`.
fn size<'de, const MAX: u32, D: Deserializer<'de>>(d: D) -> Result<u32, D::Error> {
    let value = i64::deserialize(d)?;
    match u32::try_from(value) {
        Ok(size) if (1..=MAX).contains(&size) => Ok(size),
        _ => Err(de::Error::custom(format!(
            "{value} is out of range: 1 to {MAX}"
        ))),
    }
}

fn uplinks<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Vec<IfName>>, D::Error> {
    let list = names(d)?;
    match &list {
        Some(uplinks) if uplinks.len() > UPLINKS_MAX => Err(de::Error::custom(format!(
            "{} uplinks are too many: at most {UPLINKS_MAX}",
            uplinks.len()
        ))),
        _ => Ok(list),
    }
}

/// Keys of a TOML table are text.
fn by_vni<'de, D: Deserializer<'de>>(d: D) -> Result<BTreeMap<Vni, VniOptions>, D::Error> {
    let tables = BTreeMap::<String, VniOptions>::deserialize(d)?.into_iter();
    let parsed =
        tables.map(|(vni, options)| Ok((vni.parse().map_err(de::Error::custom)?, options)));
    parsed.collect()
}

/// Device names, at least one, each once.
fn names<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Vec<IfName>>, D::Error> {
    let list = Vec::<IfName>::deserialize(d)?;
    if list.is_empty() {
        return Err(de::Error::custom(
            "the list is empty: leave the key out for the default",
        ));
    }
    for (i, name) in list.iter().enumerate() {
        if list[..i].contains(name) {
            return Err(de::Error::custom(format!("{name} is named twice")));
        }
    }
    Ok(Some(list))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("vtep.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn an_empty_file_is_the_default() {
        assert_eq!(parse("").unwrap(), Config::default());
        assert_eq!(parse("[daemon]\n[xdp]\n").unwrap(), Config::default());
    }

    #[test]
    fn the_example_shows_every_key_and_the_defaults() {
        let config = parse(EXAMPLE).unwrap();
        let name = |text: &str| text.parse::<IfName>().unwrap();
        assert_eq!(config.uplinks, Some(vec![name("eth1")]));
        assert_eq!(config.vxlan, Some(vec![name("vxlan100")]));
        assert_eq!(config.daemon, Daemon::default());
        assert_eq!(config.xdp, Xdp::default());
        let port = Port {
            hook: PortHook::Xdp,
        };
        assert_eq!(config.ports, BTreeMap::from([(name("tap0"), port)]));
        assert!(!config.strict);
        let strict = VniOptions { strict: Some(true) };
        let vnis = BTreeMap::from([(Vni::new(100).unwrap(), strict)]);
        assert_eq!(config.vnis, vnis);
    }

    #[test]
    fn values_are_taken_over() {
        let config = parse("[daemon]\nfdb_entries = 1_000\n[xdp]\nmode = \"generic\"").unwrap();
        assert_eq!(config.daemon.fdb_entries, 1000);
        assert_eq!(config.daemon.segments, 256);
        assert_eq!(config.xdp.mode, XdpMode::Generic);
    }

    #[test]
    fn errors_name_file_line_and_key() {
        for (text, line, key, why) in [
            (
                "\nuplink = [\"eth1\"]",
                2,
                "uplink",
                "unknown field `uplink`",
            ),
            ("[daemon]\nsize = 3", 2, "size", "unknown field `size`"),
            (
                "[xdp]\nmode = \"skb\"",
                2,
                "mode",
                "expected `native` or `generic`",
            ),
            (
                "[ports.tap0]\nhook = \"tc\"",
                2,
                "hook",
                "unknown variant `tc`",
            ),
            (
                "[ports.\"a/b\"]\nhook = \"xdp\"",
                1,
                "ports",
                "not a device name",
            ),
            (
                "[daemon]\nfdb_entries = \"x\"",
                2,
                "fdb_entries",
                "invalid type",
            ),
            (
                "[daemon]\n\nfdb_entries = 0",
                3,
                "fdb_entries",
                "0 is out of range",
            ),
            ("[daemon]\nsegments = 65536", 2, "segments", "1 to 65535"),
            ("[daemon]\nremotes = -1", 2, "remotes", "-1 is out of range"),
            ("vxlan = []", 1, "vxlan", "leave the key out"),
            ("vxlan = [\"a\", \"a\"]", 1, "vxlan", "a is named twice"),
            ("uplinks = [\"a b\"]", 1, "uplinks", "not a device name"),
            (
                "uplinks = [\"1\",\"2\",\"3\",\"4\",\"5\",\"6\",\"7\",\"8\",\"9\"]",
                1,
                "uplinks",
                "9 uplinks are too many",
            ),
            ("strict = 1", 1, "strict", "invalid type"),
            ("[vnis.16777216]\nstrict = true", 1, "vnis", "16777216"),
            ("[vnis.1]\nstrickt = true", 2, "strickt", "unknown field"),
            ("[daemon\n", 1, "[daemon", ""),
            ("[daemon]\nports = 1\nports = 2", 3, "ports", "duplicate"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(
                error.starts_with(&format!("vtep.toml:{line}: `")),
                "{error}"
            );
            assert!(error.contains(key) && error.contains(why), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Config::read(Path::new("/nonexistent/vtep.toml")).unwrap_err();
        let text =
            "cannot read the configuration /nonexistent/vtep.toml: No such file or directory";
        assert_eq!(error.to_string(), text);
    }
}
