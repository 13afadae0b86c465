//! TCP between guests of two hosts, accelerated against the kernel's bridge and
//! vxlan: stream throughput in both directions, request/response rate; guests
//! with and without offloads.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};

use crate::pair::{Pair, Way};
use crate::report::{Spread, ratio};

/// iperf3 counts whole seconds.
const STREAM_TIME: Duration = Duration::from_secs(1);
const REQUEST_TIME: Duration = Duration::from_millis(500);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Load {
    Stream { flows: u32, reverse: bool },
    RequestResponse,
}

const LOADS: [Load; 5] = [
    Load::Stream {
        flows: 1,
        reverse: false,
    },
    Load::Stream {
        flows: 1,
        reverse: true,
    },
    Load::Stream {
        flows: 4,
        reverse: false,
    },
    Load::Stream {
        flows: 4,
        reverse: true,
    },
    Load::RequestResponse,
];

/// Guests and tunnel of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Group {
    offloads: bool,
    /// Outer checksums, the kernel's default. A superframe that needs one is left
    /// to the kernel.
    udpcsum: bool,
}

const GROUPS: [Group; 4] = [
    Group {
        offloads: true,
        udpcsum: true,
    },
    Group {
        offloads: true,
        udpcsum: false,
    },
    Group {
        offloads: false,
        udpcsum: true,
    },
    Group {
        offloads: false,
        udpcsum: false,
    },
];

impl Group {
    fn name(self) -> String {
        format!(
            "guests with{} offloads, outer checksums {}",
            if self.offloads { "" } else { "out" },
            if self.udpcsum { "on" } else { "off" }
        )
    }

    /// Several flows only where everything is as by default, for the time it takes.
    fn runs(self, load: Load) -> bool {
        self.udpcsum || !matches!(load, Load::Stream { flows: 4, .. })
    }

    fn pair(self, way: Way) -> Result<Pair> {
        let vxlan = if self.udpcsum { "udpcsum" } else { "noudpcsum" };
        Pair::build(way, self.offloads, vxlan)
    }
}

impl Load {
    fn name(self) -> String {
        match self {
            Self::Stream { flows, reverse } => {
                let direction = if reverse { "back" } else { "there" };
                format!(
                    "stream, {flows} flow{}, {direction}",
                    if flows == 1 { "" } else { "s" }
                )
            }
            Self::RequestResponse => "request/response".to_owned(),
        }
    }

    /// What a rate is divided by to be shown, and what it is then.
    const fn unit(self) -> (f64, &'static str) {
        match self {
            Self::Stream { .. } => (1e9, "Gbit/s"),
            Self::RequestResponse => (1e3, "k/s"),
        }
    }

    fn run(self, pair: &Pair) -> Result<f64> {
        match self {
            Self::Stream { flows, reverse } => pair.stream(flows, reverse, STREAM_TIME),
            Self::RequestResponse => pair.request_response(REQUEST_TIME),
        }
    }
}

/// Rates of every run; runs of one number stood side by side.
pub struct Results {
    group: Group,
    load: Load,
    vtep: Vec<f64>,
    kernel: Vec<f64>,
}

pub fn run(rounds: u32, progress: bool) -> Result<Vec<Results>> {
    let mut all = Vec::new();
    for group in GROUPS {
        let [vtep, kernel] = [group.pair(Way::Vtep)?, group.pair(Way::Kernel)?];
        let loads = LOADS.into_iter().filter(|load| group.runs(*load));
        let mut results: Vec<Results> = loads
            .map(|load| Results {
                group,
                load,
                vtep: Vec::new(),
                kernel: Vec::new(),
            })
            .collect();
        for round in 0..rounds {
            for (number, result) in results.iter_mut().enumerate() {
                let Results { load, .. } = *result;
                // A B, B A, A B: nobody is always the first.
                let vtep_first = (round as usize + number).is_multiple_of(2);
                if vtep_first {
                    result.vtep.push(load.run(&vtep)?);
                }
                result.kernel.push(load.run(&kernel)?);
                if !vtep_first {
                    result.vtep.push(load.run(&vtep)?);
                }
            }
            if progress {
                let what = group.name();
                eprintln!("TCP, {what}: round {} of {rounds}", round + 1);
            }
        }
        all.extend(results);
    }
    Ok(all)
}

pub fn table(all: &[Results]) -> String {
    let mut out = String::new();
    for group in GROUPS {
        let mut rows = all.iter().filter(|r| r.group == group).peekable();
        if rows.peek().is_none() {
            continue;
        }
        let _ = writeln!(
            out,
            "\nTCP, {}, wire-sized frames between the hosts",
            group.name()
        );
        let _ = writeln!(
            out,
            "  {:<26}{:>8}{:>18}{:>8}{:>18}  {:<8}{:>9}{:>14}",
            "", "vtep", "min - max", "kernel", "min - max", "", "x kernel", "min - max"
        );
        for results in rows {
            let (scale, unit) = results.load.unit();
            let [vtep, kernel] = [&results.vtep, &results.kernel].map(|rates| Spread::of(rates));
            let to_kernel = ratio(&results.vtep, &results.kernel);
            let range =
                |spread: Spread| format!("{:.2} - {:.2}", spread.min / scale, spread.max / scale);
            let _ = writeln!(
                out,
                "  {:<26}{:>8.2}{:>18}{:>8.2}{:>18}  {:<8}{:>9.2}{:>14}",
                results.load.name(),
                vtep.median / scale,
                range(vtep),
                kernel.median / scale,
                range(kernel),
                unit,
                to_kernel.median,
                format!("{:.2} - {:.2}", to_kernel.min, to_kernel.max),
            );
        }
    }
    out
}

pub fn json(all: &[Results]) -> Vec<Value> {
    let row = |results: &Results| {
        let contestants = [("vtep", &results.vtep), ("kernel", &results.kernel)];
        let unit = match results.load {
            Load::Stream { .. } => "bits_per_s",
            Load::RequestResponse => "transactions_per_s",
        };
        json!({
            "scenario": results.load.name(),
            "guest_offloads": results.group.offloads,
            "outer_checksums": results.group.udpcsum,
            "unit": unit,
            "ratio_to_kernel": ratio(&results.vtep, &results.kernel).json(),
            "contestants": contestants.map(|(name, rates)| json!({
                "name": name,
                "rate": Spread::of(rates).json(),
                "runs": rates,
            })),
        })
    };
    all.iter().map(row).collect()
}
