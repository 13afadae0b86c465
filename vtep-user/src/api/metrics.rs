//! Status and counters as Prometheus (OpenMetrics) text. A pure function of
//! what the controller answers: nothing is kept between two scrapes. Called by
//! `server` for `/metrics`.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use super::types::{Count, SegmentStats, Stats, Status};

/// Of the answer.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The whole page.
pub fn text(status: Status, stats: Stats) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Page { status, stats }));
    let mut text = String::new();
    // Writing to a String does not fail, and the labels below are plain text.
    if let Err(error) = encode(&mut text, &registry) {
        tracing::error!("cannot write metrics: {error}");
    }
    text
}

#[derive(Debug)]
struct Page {
    status: Status,
    stats: Stats,
}

impl Collector for Page {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let out = &mut encoder;
        let Self { status, stats } = self;
        let counters = &status.counters;
        gauge(
            out,
            "vtep_ready",
            "1 once everything is mirrored and attached",
            status.ready,
        )?;
        gauge(
            out,
            "vtep_fdb_entries",
            "Entries in the FDB map",
            counters.fdb_entries,
        )?;
        gauge(
            out,
            "vtep_fdb_capacity",
            "Entries the FDB map can hold",
            counters.fdb_capacity,
        )?;
        for (name, help, value) in [
            (
                "vtep_overruns",
                "Netlink notifications lost",
                counters.overruns,
            ),
            (
                "vtep_resyncs",
                "Full dumps applied after the first",
                counters.resyncs,
            ),
            (
                "vtep_updates",
                "Table updates written to the maps",
                counters.updates,
            ),
            (
                "vtep_map_full",
                "Entries left to the kernel because a map was full",
                counters.map_full,
            ),
        ] {
            let metric = out.encode_descriptor(name, help, None, MetricType::Counter)?;
            ConstCounter::new(value).encode(metric)?;
        }

        let mut frames = family(out, "vtep_frames", "Frames by outcome", MetricType::Counter)?;
        for (name, count) in &stats.outcomes {
            counter(&mut frames, &[("outcome", name)], count.frames)?;
        }
        let mut bytes = family(out, "vtep_bytes", "Bytes by outcome", MetricType::Counter)?;
        for (name, count) in &stats.outcomes {
            counter(&mut bytes, &[("outcome", name)], count.bytes)?;
        }

        let help = "Frames by segment, direction and fate";
        let mut frames = family(out, "vtep_segment_frames", help, MetricType::Counter)?;
        for (labels, count) in directions(&stats.segments) {
            counter(&mut frames, &labels.each(), count.frames)?;
        }
        let help = "Bytes by segment, direction and fate";
        let mut bytes = family(out, "vtep_segment_bytes", help, MetricType::Counter)?;
        for (labels, count) in directions(&stats.segments) {
            counter(&mut bytes, &labels.each(), count.bytes)?;
        }

        let help = "1: the uplink is accelerated";
        let mut uplinks = family(out, "vtep_uplink_accelerated", help, MetricType::Gauge)?;
        for uplink in &status.uplinks {
            flag(
                &mut uplinks,
                &[("uplink", &uplink.name)],
                uplink.accelerated,
            )?;
        }
        let help = "1: the segment is accelerated";
        let mut segments = family(out, "vtep_segment_accelerated", help, MetricType::Gauge)?;
        for segment in &status.segments {
            let labels = [
                ("vni", segment.vni.to_string()),
                ("vxlan", segment.vxlan.clone()),
            ];
            flag(&mut segments, &labels, segment.accelerated)?;
        }
        let help = "1: the port is accelerated";
        let mut ports = family(out, "vtep_port_accelerated", help, MetricType::Gauge)?;
        for port in &status.ports {
            let labels = [("vni", port.vni.to_string()), ("port", port.name.clone())];
            flag(&mut ports, &labels, port.accelerated)?;
        }
        Ok(())
    }
}

struct Labels {
    vni: String,
    direction: &'static str,
    fate: &'static str,
}

impl Labels {
    fn each(&self) -> [(&str, &str); 3] {
        let Self {
            vni,
            direction,
            fate,
        } = self;
        [("vni", vni), ("direction", direction), ("fate", fate)]
    }
}

fn directions(segments: &[SegmentStats]) -> impl Iterator<Item = (Labels, Count)> {
    segments.iter().flat_map(|segment| {
        let both = [("ingress", segment.ingress), ("egress", segment.egress)];
        both.into_iter().flat_map(|(direction, counts)| {
            let fates = [
                ("fast", counts.fast),
                ("passed", counts.passed),
                ("dropped", counts.dropped),
            ];
            fates.map(|(fate, count)| {
                let vni = segment.vni.to_string();
                let labels = Labels {
                    vni,
                    direction,
                    fate,
                };
                (labels, count)
            })
        })
    })
}

fn gauge(
    out: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    value: impl Into<u64>,
) -> Result<(), fmt::Error> {
    let metric = out.encode_descriptor(name, help, None, MetricType::Gauge)?;
    ConstGauge::new(value.into()).encode(metric)
}

fn family<'e>(
    out: &'e mut DescriptorEncoder<'_>,
    name: &'e str,
    help: &str,
    kind: MetricType,
) -> Result<MetricEncoder<'e>, fmt::Error> {
    out.encode_descriptor(name, help, None, kind)
}

fn counter(
    family: &mut MetricEncoder<'_>,
    labels: &[(&str, &str)],
    value: u64,
) -> Result<(), fmt::Error> {
    ConstCounter::new(value).encode(family.encode_family(&labels)?)
}

fn flag<L: EncodeLabelSet>(
    family: &mut MetricEncoder<'_>,
    labels: &L,
    value: bool,
) -> Result<(), fmt::Error> {
    ConstGauge::new(u64::from(value)).encode(family.encode_family(labels)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::testing;

    #[test]
    fn the_page_holds_every_outcome_and_every_state() {
        let text = text(testing::status(), testing::stats());
        for line in [
            "vtep_ready 1",
            "vtep_fdb_entries 2",
            "vtep_fdb_capacity 131072",
            "vtep_overruns_total 1",
            "vtep_resyncs_total 2",
            "vtep_updates_total 12",
            "vtep_map_full_total 0",
            "vtep_bytes_total{outcome=\"egress-remote\"} 64000",
            "vtep_segment_frames_total{vni=\"100\",direction=\"egress\",fate=\"fast\"} 1000",
            "vtep_segment_bytes_total{vni=\"100\",direction=\"ingress\",fate=\"passed\"} 0",
            "vtep_uplink_accelerated{uplink=\"eth1\"} 1",
            "vtep_segment_accelerated{vni=\"100\",vxlan=\"vxlan100\"} 1",
            "vtep_port_accelerated{vni=\"100\",port=\"veth1\"} 0",
        ] {
            assert!(
                text.lines().any(|have| have == line),
                "{line} is not in:\n{text}"
            );
        }
        for outcome in vtep_common::Outcome::ALL {
            let start = format!("vtep_frames_total{{outcome=\"{}\"}} ", outcome.name());
            assert!(text.lines().any(|have| have.starts_with(&start)), "{start}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
