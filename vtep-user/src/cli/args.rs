//! The command line as types: noun then verb. Every value is checked while it
//! is parsed, so a wrong one is a usage error (exit 2) before anything happens.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{ArgAction, Args, CommandFactory, Parser, Subcommand};
use vtep_common::{MacAddr, Vni};

use crate::api::types::{DEFAULT_UDP_PORT, FdbSpec, PortHook, Target, VniSpec};
use crate::api::values::{HostIp, IfName, StationMac};
use crate::instance::Instance;

/// Heading of the options that every command has.
const GLOBAL: &str = "Global options";

/// Accelerates the VXLAN devices of the Linux kernel: frames it knows the way
/// of take an XDP fast path, everything else stays with the kernel.
#[derive(Debug, Parser)]
#[command(
    name = "vtep",
    version,
    arg_required_else_help = true,
    disable_help_subcommand = true,
    after_help = "\
Examples:
  vtep run                              mirror and accelerate what the kernel has
  vtep status                           what is accelerated, and why not
  vtep vni add 100 --local 198.51.100.1 --remote 198.51.100.2
  vtep port add tap0 --vni 100
  vtep --json fdb show | jq '.[] | .mac'

Exit status: 0 done, 1 failed, 2 wrong usage."
)]
pub struct Cli {
    /// Print JSON instead of text
    #[arg(long, global = true, help_heading = GLOBAL)]
    pub json: bool,

    /// Which daemon: names its socket, lock and pin directory
    #[arg(long, global = true, env = "VTEP_INSTANCE", default_value = Instance::DEFAULT)]
    #[arg(value_name = "NAME", hide_env_values = true, help_heading = GLOBAL)]
    pub instance: Instance,

    /// Work in this network namespace (`ip netns exec` would hide /sys/fs/bpf)
    #[arg(long, global = true, value_name = "NAME|PATH", help_heading = GLOBAL)]
    pub netns: Option<String>,

    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon: mirror the kernel, accelerate, answer the other commands
    #[command(after_help = "\
Logs go to stderr; VTEP_LOG sets what is logged (default `info`, for example
`debug` or `vtep_user::netlink=trace`). SIGTERM and SIGINT end the daemon and
leave the programs attached: traffic flows on. `vtep unload` removes them.

Examples:
  vtep run
  vtep run --config /etc/vtep.toml
  vtep --netns blue --instance blue run")]
    Run {
        /// TOML file; everything in it is optional
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Detach and unpin everything of this instance; a running daemon ends
    #[command(after_help = "\
The kernel carries all traffic from then on; its devices stay as they are.

Examples:
  vtep unload
  vtep --instance blue unload")]
    Unload,
    #[command(flatten)]
    Ask(Request),
}

/// What a running daemon answers.
#[derive(Debug, Subcommand)]
pub enum Request {
    /// Show uplinks, segments and ports: accelerated, or the reason why not
    #[command(after_help = "\
Examples:
  vtep status
  vtep --json status | jq .ready")]
    Status,
    /// Make, remove and list segments
    #[command(subcommand)]
    Vni(VniCommand),
    /// Attach, detach and list ports
    #[command(subcommand)]
    Port(PortCommand),
    /// Show and change forwarding entries
    #[command(subcommand)]
    Fdb(FdbCommand),
    /// Show peers
    #[command(subcommand)]
    Remote(RemoteCommand),
    /// Show frames and bytes per outcome, segment and direction
    #[command(after_help = "\
Only outcomes that happened are listed; JSON has all of them.
Frames are counted as a program meets them: a superframe of a port with offloads
counts once, with its own length. Bytes are those of whole Ethernet frames: of
fast ones from the wire the inner frame, of passed and dropped ones all that came.

Examples:
  vtep stats
  vtep --json stats | jq '.outcomes[\"egress-remote\"].frames'")]
    Stats,
    /// Compare everything with the kernel now and repair the maps
    #[command(after_help = "Example:\n  vtep resync")]
    Resync,
}

#[derive(Debug, Subcommand)]
pub enum VniCommand {
    /// Make a segment: a bridge and a VXLAN device for a VNI
    #[command(after_help = "\
Examples:
  vtep vni add 100 --local 198.51.100.1 --remote 198.51.100.2 203.0.113.7
  vtep vni add 200 --dev eth1 --learning off --mtu 1400")]
    Add(Box<VniAdd>),
    /// Remove the bridge and the VXLAN device of a VNI
    #[command(after_help = "Example:\n  vtep vni del 100")]
    Del {
        /// 0 to 16777215
        vni: Vni,
    },
    /// List segments with flood lists and ports
    #[command(after_help = "Examples:\n  vtep vni show\n  vtep --json vni show")]
    Show,
}

#[derive(Debug, Args)]
pub struct VniAdd {
    /// 0 to 16777215
    vni: Vni,
    /// Tunnel source address [default: by the route to the first remote]
    #[arg(long, value_name = "IP")]
    local: Option<HostIp>,
    /// Underlay device [default: any]
    #[arg(long, value_name = "UPLINK")]
    dev: Option<IfName>,
    /// UDP destination port
    #[arg(long, value_name = "PORT", default_value_t = DEFAULT_UDP_PORT)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    udp_port: u16,
    /// Flood list: peers that get broadcast and unknown unicast
    #[arg(long = "remote", value_name = "IP", num_args = 1..)]
    remotes: Vec<HostIp>,
    /// Learn where MACs are from the frames that arrive
    #[arg(long, value_name = "on|off", default_value = "on")]
    #[arg(value_parser = on_off, action = ArgAction::Set)]
    learning: bool,
    /// Largest payload of the segment's frames, bytes [default: what the underlay leaves]
    #[arg(long, value_name = "BYTES")]
    #[arg(value_parser = clap::value_parser!(u32).range(68..=65535))]
    mtu: Option<u32>,
    /// Name of the bridge [default: br and the VNI]
    #[arg(long, value_name = "NAME")]
    bridge: Option<IfName>,
    /// Name of the VXLAN device [default: vxlan and the VNI]
    #[arg(long, value_name = "NAME")]
    vxlan: Option<IfName>,
}

impl VniAdd {
    /// As the daemon takes it.
    pub fn spec(&self) -> VniSpec {
        VniSpec {
            vni: self.vni,
            local: self.local,
            dev: self.dev.clone(),
            udp_port: self.udp_port,
            remotes: self.remotes.clone(),
            learning: self.learning,
            mtu: self.mtu,
            bridge: self.bridge.clone(),
            vxlan: self.vxlan.clone(),
        }
    }
}

fn on_off(text: &str) -> Result<bool, &'static str> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("it is `on` or `off`"),
    }
}

#[derive(Debug, Subcommand)]
pub enum PortCommand {
    /// Attach a device (tap, veth) to a segment
    #[command(after_help = "\
Examples:
  vtep port add tap0 --vni 100
  vtep port add veth1 --vni 100 --hook kernel")]
    Add {
        /// Device of this network namespace
        #[arg(value_name = "IFNAME")]
        name: IfName,
        /// Segment
        #[arg(long, value_name = "N")]
        vni: Vni,
        /// auto: by the port's offload features; xdp: its owner sends plain frames; tcx: it uses
        /// offloads; kernel: never accelerated
        #[arg(long, value_enum, hide_possible_values = true)]
        #[arg(default_value = "auto", value_name = "auto|xdp|tcx|kernel")]
        hook: PortHook,
    },
    /// Detach a device from its segment
    #[command(after_help = "Example:\n  vtep port del tap0")]
    Del {
        /// Device of this network namespace
        #[arg(value_name = "IFNAME")]
        name: IfName,
    },
    /// List ports
    #[command(after_help = "Examples:\n  vtep port show\n  vtep --json port show")]
    Show,
}

#[derive(Debug, Subcommand)]
pub enum FdbCommand {
    /// List entries
    #[command(after_help = "\
Examples:
  vtep fdb show
  vtep fdb show --vni 100 02:00:00:00:00:01
  vtep --json fdb show --vni 100")]
    Show {
        /// Only this address
        mac: Option<MacAddr>,
        /// Only this segment
        #[arg(long, value_name = "N")]
        vni: Option<Vni>,
    },
    /// Add an entry; fails if one was set for the address before
    #[command(after_help = "\
Answered when the kernel and the maps hold the entry. What the kernel has only
learned by itself gives way.

Examples:
  vtep fdb add 02:00:00:00:00:01 --vni 100 --dst 198.51.100.2
  vtep fdb add 02:00:00:00:00:02 --vni 100 --port tap0")]
    Add(FdbEntry),
    /// Add or move an entry; a move has no moment without a destination
    #[command(after_help = "\
Answered when the kernel and the maps hold the entry.

Example:
  vtep fdb replace 02:00:00:00:00:01 --vni 100 --dst 203.0.113.7")]
    Replace(FdbEntry),
    /// Delete an entry
    #[command(after_help = "Example:\n  vtep fdb del 02:00:00:00:00:01 --vni 100")]
    Del {
        /// Unicast address of a VM
        mac: StationMac,
        /// Segment
        #[arg(long, value_name = "N")]
        vni: Vni,
    },
}

#[derive(Debug, Args)]
pub struct FdbEntry {
    /// Unicast address of a VM
    mac: StationMac,
    /// Segment
    #[arg(long, value_name = "N")]
    vni: Vni,
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Place {
    /// Behind this peer
    #[arg(long, value_name = "IP")]
    dst: Option<HostIp>,
    /// Behind this port of this host
    #[arg(long, value_name = "IFNAME")]
    port: Option<IfName>,
}

impl FdbEntry {
    /// As the daemon takes it; `None` without a place, which the parser refuses.
    pub fn spec(&self) -> Option<FdbSpec> {
        let location = match (&self.place.dst, &self.place.port) {
            (Some(remote), None) => Target::Remote { remote: *remote },
            (None, Some(port)) => Target::Local { port: port.clone() },
            _ => return None,
        };
        Some(FdbSpec {
            vni: self.vni,
            mac: self.mac,
            location,
        })
    }
}

#[derive(Debug, Subcommand)]
pub enum RemoteCommand {
    /// List peers and how the underlay reaches them
    #[command(after_help = "Examples:\n  vtep remote show\n  vtep --json remote show")]
    Show,
}

/// Parse and check; the error is for `usage_error`.
pub fn parse(
    args: impl IntoIterator<Item = impl Into<OsString> + Clone>,
) -> Result<Cli, clap::Error> {
    let cli = Cli::try_parse_from(args)?;
    if let Command::Ask(Request::Vni(VniCommand::Add(add))) = &cli.command {
        add.spec()
            .check()
            .map_err(|error| Cli::command().error(ErrorKind::ValueValidation, error))?;
    }
    Ok(cli)
}

/// A usage error as one line: what is wrong, and the usage where that helps.
/// `None`: it is no error but help or version, to be printed as it is.
pub fn usage_error(error: &clap::Error) -> Option<String> {
    use ErrorKind::{
        DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand, DisplayVersion, InvalidValue,
        ValueValidation,
    };
    let kind = error.kind();
    if matches!(
        kind,
        DisplayHelp | DisplayVersion | DisplayHelpOnMissingArgumentOrSubcommand
    ) {
        return None;
    }
    let text = error.render().to_string();
    let mut line = String::new();
    for paragraph in text.split("\n\n") {
        let joined = paragraph.split_whitespace().collect::<Vec<_>>().join(" ");
        if let Some(what) = joined.strip_prefix("error: ") {
            line = what.to_owned();
        } else if let Some(tip) = joined.strip_prefix("tip: ")
            && tip.contains("similar")
        {
            line += &format!(" ({tip})");
        } else if let Some(usage) = joined.strip_prefix("Usage: ")
            && !matches!(kind, InvalidValue | ValueValidation)
        {
            line += &format!(" (usage: {usage})");
        }
    }
    Some(line)
}
