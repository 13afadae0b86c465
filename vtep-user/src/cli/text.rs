//! Answers of the daemon as text for people; JSON needs none of this. Pure:
//! values in, lines out. Called by `cli` for every command that shows.

use std::fmt::Display;

use super::table::{Colour, Table};
use crate::api::types::{
    FdbRow, Hook, IngressWay, Location, Owner, PortStatus, RemoteRow, ResyncReport, SegmentStatus,
    Stats, Status, UplinkStatus, VniRow, XdpMode,
};

fn or_dash(value: Option<impl Display>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

fn on_off(value: bool) -> String {
    if value { "on" } else { "off" }.to_owned()
}

/// Several in one cell.
fn list(values: &[impl Display]) -> String {
    let texts: Vec<String> = values.iter().map(ToString::to_string).collect();
    if texts.is_empty() {
        "-".to_owned()
    } else {
        texts.join(",")
    }
}

fn hook(hook: Option<Hook>) -> String {
    or_dash(hook.map(|hook| match hook {
        Hook::Xdp => "xdp",
        Hook::Tcx => "tcx",
    }))
}

fn ingress(way: Option<IngressWay>) -> String {
    or_dash(way.map(|way| match way {
        IngressWay::Xdp => "xdp",
        IngressWay::Gro => "gro",
        IngressWay::Stack => "stack",
        IngressWay::Kernel => "kernel",
    }))
}

fn mode(mode: Option<XdpMode>) -> String {
    or_dash(mode.map(|mode| match mode {
        XdpMode::Native => "native",
        XdpMode::Generic => "generic",
    }))
}

fn accelerated(accelerated: bool, reason: Option<&str>) -> String {
    match (accelerated, reason) {
        (true, None) => "yes".to_owned(),
        (true, Some(reason)) => format!("yes: {reason}"),
        (false, None) => "no".to_owned(),
        (false, Some(reason)) => format!("no: {reason}"),
    }
}

/// `vtep status`.
pub fn status(status: &Status, colour: Colour) -> String {
    let ready = if status.ready {
        colour.good("ready")
    } else {
        colour.notice("not ready: still reading the kernel's state or attaching")
    };
    let netns = status
        .netns
        .as_ref()
        .map_or_else(String::new, |netns| format!(", netns {netns}"));
    let mut out = format!(
        "instance {}: {ready} (vtep {}, kernel {}{netns})\n",
        status.instance, status.version, status.kernel
    );
    for warning in &status.warnings {
        out += &format!("{}\n", colour.notice(&format!("warning: {warning}")));
    }
    let sections = [
        (
            uplinks(&status.uplinks, colour),
            "no uplink: no route leads to a remote yet",
        ),
        (
            segments(&status.segments, colour),
            "no segment: make one with `vtep vni add`",
        ),
        (
            ports(&status.ports, colour),
            "no port: attach one with `vtep port add`",
        ),
    ];
    for (section, none) in sections {
        out.push('\n');
        if section.is_empty() {
            out += none;
            out.push('\n');
        } else {
            out += &section;
        }
    }
    let counters = &status.counters;
    out += &format!(
        "\nfdb {} of {} entries, {} map full, {} overruns, {} resyncs, {} updates\n",
        counters.fdb_entries,
        counters.fdb_capacity,
        counters.map_full,
        counters.overruns,
        counters.resyncs,
        counters.updates
    );
    out
}

fn uplinks(uplinks: &[UplinkStatus], colour: Colour) -> String {
    let mut table = Table::new(&["UPLINK", "HOOK", "MODE", "ACCELERATED"]);
    for uplink in uplinks {
        table.row(
            !uplink.accelerated,
            [
                uplink.name.clone(),
                hook(uplink.hook),
                mode(uplink.mode),
                accelerated(uplink.accelerated, uplink.reason.as_deref()),
            ],
        );
    }
    table.text(colour)
}

const SEGMENT_HEAD: [&str; 7] = [
    ">VNI", "BRIDGE", "VLAN", "VXLAN", "LOCAL", "UDP-PORT", "LEARNING",
];

fn segment_cells(segment: &SegmentStatus) -> Vec<String> {
    vec![
        segment.vni.to_string(),
        or_dash(segment.bridge.as_ref()),
        or_dash(segment.vlan),
        segment.vxlan.clone(),
        or_dash(segment.local),
        segment.udp_port.to_string(),
        on_off(segment.learning),
    ]
}

fn segments(segments: &[SegmentStatus], colour: Colour) -> String {
    let mut table = Table::new(&[&SEGMENT_HEAD[..], &["ACCELERATED"]].concat());
    for segment in segments {
        let mut cells = segment_cells(segment);
        cells.push(accelerated(segment.accelerated, segment.reason.as_deref()));
        table.row(!segment.accelerated, cells);
    }
    table.text(colour)
}

/// `vtep vni show`.
pub fn vnis(rows: &[VniRow], colour: Colour) -> String {
    let more: &[&str] = &[">MTU", "REMOTES", "PORTS", "ACCELERATED"];
    let mut table = Table::new(&[&SEGMENT_HEAD[..], more].concat());
    for row in rows {
        let mut cells = segment_cells(&row.segment);
        cells.extend([
            row.mtu.to_string(),
            list(&row.remotes),
            list(&row.ports),
            accelerated(row.segment.accelerated, row.segment.reason.as_deref()),
        ]);
        table.row(!row.segment.accelerated, cells);
    }
    table.text(colour)
}

/// `vtep port show`.
pub fn ports(rows: &[PortStatus], colour: Colour) -> String {
    let mut head = vec!["PORT", ">VNI", "HOOK", "MODE", "INGRESS", "ACCELERATED"];
    let vlans = rows.iter().any(|port| port.vlan.is_some());
    if vlans {
        head.insert(2, "VLAN");
    }
    let mut table = Table::new(&head);
    for port in rows {
        let mut cells = vec![
            port.name.clone(),
            port.vni.to_string(),
            hook(port.hook),
            mode(port.mode),
            ingress(port.ingress),
            accelerated(port.accelerated, port.reason.as_deref()),
        ];
        if vlans {
            cells.insert(2, or_dash(port.vlan));
        }
        table.row(!port.accelerated, cells);
    }
    table.text(colour)
}

/// `vtep fdb show`. Locations read like the options that set them.
pub fn fdb(rows: &[FdbRow], colour: Colour) -> String {
    let mut head = vec![
        ">VNI",
        "MAC",
        "LOCATION",
        "OWNER",
        ">GENERATION",
        "ENDPOINT",
        "ACCELERATED",
    ];
    let vlans = rows.iter().any(|row| row.vlan.is_some());
    if vlans {
        head.insert(1, "VLAN");
    }
    let mut table = Table::new(&head);
    for row in rows {
        let location = match &row.location {
            Location::Remote { remote } => format!("dst {remote}"),
            Location::Local { port } => format!("port {port}"),
            Location::Held => "held".to_owned(),
        };
        let owner = match row.owner {
            Owner::Kernel => "kernel",
            Owner::Static => "static",
            Owner::Api => "api",
        };
        let mut cells = vec![
            row.vni.to_string(),
            row.mac.to_string(),
            location,
            owner.to_owned(),
            row.generation.to_string(),
            or_dash(row.endpoint.as_ref()),
            accelerated(row.accelerated, None),
        ];
        if vlans {
            cells.insert(1, or_dash(row.vlan));
        }
        table.row(!row.accelerated, cells);
    }
    table.text(colour)
}

/// `vtep remote show`.
pub fn remotes(rows: &[RemoteRow], colour: Colour) -> String {
    let head = [
        "REMOTE",
        ">VNI",
        "UDP-PORT",
        "LOCAL",
        "DEV",
        "NEXT-HOP",
        "MAC",
        ">ENTRIES",
        "ACCELERATED",
    ];
    let mut table = Table::new(&head);
    for row in rows {
        table.row(
            !row.accelerated,
            [
                row.remote.to_string(),
                row.vni.to_string(),
                row.udp_port.to_string(),
                or_dash(row.local),
                or_dash(row.dev.as_ref()),
                or_dash(row.next_hop),
                or_dash(row.mac),
                row.fdb_entries.to_string(),
                accelerated(row.accelerated, row.reason.as_deref()),
            ],
        );
    }
    table.text(colour)
}

/// `vtep stats`: what happened at least once.
pub fn stats(stats: &Stats, colour: Colour) -> String {
    let mut outcomes = Table::new(&["OUTCOME", ">FRAMES", ">BYTES"]);
    for (name, count) in stats.outcomes.iter().filter(|(_, count)| count.frames != 0) {
        outcomes.row(
            false,
            [
                name.clone(),
                count.frames.to_string(),
                count.bytes.to_string(),
            ],
        );
    }
    let mut segments = Table::new(&[
        ">VNI",
        "DIRECTION",
        ">FAST-FRAMES",
        ">FAST-BYTES",
        ">PASSED-FRAMES",
        ">DROPPED-FRAMES",
    ]);
    for segment in &stats.segments {
        let directions = [("ingress", &segment.ingress), ("egress", &segment.egress)];
        for (direction, counts) in directions {
            segments.row(
                false,
                [
                    segment.vni.to_string(),
                    direction.to_owned(),
                    counts.fast.frames.to_string(),
                    counts.fast.bytes.to_string(),
                    counts.passed.frames.to_string(),
                    counts.dropped.frames.to_string(),
                ],
            );
        }
    }
    let (outcomes, segments) = (outcomes.text(colour), segments.text(colour));
    match (outcomes.is_empty(), segments.is_empty()) {
        (true, true) => "no frames yet\n".to_owned(),
        (true, false) => format!("no frames yet\n\n{segments}"),
        (false, true) => outcomes,
        (false, false) => format!("{outcomes}\n{segments}"),
    }
}

/// `vtep resync`.
pub fn resync(report: &ResyncReport, _: Colour) -> String {
    format!(
        "compared {} FDB entries in {} ms, {} updates were needed\n",
        report.fdb_entries, report.duration_ms, report.updates
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::testing;

    const PLAIN: Colour = Colour(false);

    #[test]
    fn status_says_what_is_accelerated_and_why_not() {
        assert_eq!(
            status(&testing::status(), PLAIN),
            "\
instance default: ready (vtep 0.1.0, kernel 6.18.5)
warning: eth1: the MTU leaves 1450 bytes: raise it by 50

UPLINK  HOOK  MODE    ACCELERATED
eth1    xdp   native  yes

VNI  BRIDGE  VLAN  VXLAN     LOCAL         UDP-PORT  LEARNING  ACCELERATED
100  br100   -     vxlan100  198.51.100.1  4789      on        yes

PORT   VNI  HOOK  MODE    INGRESS  ACCELERATED
tap0   100  xdp   native  xdp      yes
veth1  100  -     -       -        no: its owner uses offloads (tx-checksumming)

fdb 2 of 131072 entries, 0 map full, 1 overruns, 2 resyncs, 12 updates
"
        );
    }

    #[test]
    fn status_of_an_empty_host_names_the_next_steps() {
        let mut empty = testing::status();
        empty.ready = false;
        empty.netns = Some("blue".into());
        empty.uplinks.clear();
        empty.segments.clear();
        empty.ports.clear();
        empty.warnings.clear();
        let text = status(&empty, PLAIN);
        for part in [
            "not ready",
            "netns blue",
            "no uplink",
            "`vtep vni add`",
            "`vtep port add`",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn lists_are_tables() {
        assert_eq!(
            vnis(&[testing::vni_row()], PLAIN),
            "\
VNI  BRIDGE  VLAN  VXLAN     LOCAL         UDP-PORT  LEARNING   MTU  REMOTES                   PORTS       ACCELERATED
100  br100   -     vxlan100  198.51.100.1  4789      on        1450  198.51.100.2,203.0.113.7  tap0,veth1  yes
"
        );
        assert_eq!(
            fdb(&testing::fdb_rows(), PLAIN),
            "\
VNI  MAC                LOCATION          OWNER   GENERATION  ENDPOINT  ACCELERATED
100  02:00:00:00:00:01  dst 198.51.100.2  static           3  -         yes
100  02:00:00:00:00:02  port tap0         kernel           1  vm1       no
"
        );
        assert_eq!(
            remotes(&[testing::remote_row()], PLAIN),
            "\
REMOTE        VNI  UDP-PORT  LOCAL         DEV   NEXT-HOP        MAC  ENTRIES  ACCELERATED
198.51.100.2  100  4789      198.51.100.1  eth1  198.51.100.254  -          1  no: next hop not resolved
"
        );
        assert_eq!(
            vnis(&[], PLAIN) + &fdb(&[], PLAIN) + &remotes(&[], PLAIN),
            ""
        );
    }

    #[test]
    fn stats_list_only_what_happened() {
        assert_eq!(
            stats(&testing::stats(), PLAIN),
            "\
OUTCOME        FRAMES  BYTES
egress-remote    1000  64000

VNI  DIRECTION  FAST-FRAMES  FAST-BYTES  PASSED-FRAMES  DROPPED-FRAMES
100  ingress              0           0              0               0
100  egress            1000       64000              0               0
"
        );
        assert_eq!(stats(&Stats::default(), PLAIN), "no frames yet\n");
    }

    #[test]
    fn rows_that_are_not_accelerated_stand_out() {
        let text = ports(&testing::status().ports, Colour(true));
        let marked: Vec<bool> = text
            .lines()
            .map(|line| line.starts_with("\x1b[33m"))
            .collect();
        assert_eq!(marked, [false, false, true]);
    }
}
