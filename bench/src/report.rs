//! Medians, spread and ratios: as a table for people and as JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::contest::{Contestant, Results};

/// Median, smallest and largest of a list that is not empty.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    pub fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let n = sorted.len();
        let median = match n {
            0 => f64::NAN,
            n if n % 2 == 1 => sorted[n / 2],
            n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
        };
        let end = |i: usize| sorted.get(i).copied().unwrap_or(f64::NAN);
        Self {
            median,
            min: end(0),
            max: end(n.wrapping_sub(1)),
        }
    }

    pub fn json(self) -> Value {
        json!({ "median": self.median, "min": self.min, "max": self.max })
    }
}

/// Ratio `a / b`, pair by pair: runs of the same turn stood side by side.
pub fn ratio(a: &[f64], b: &[f64]) -> Spread {
    let pairs: Vec<f64> = a.iter().zip(b).map(|(a, b)| a / b).collect();
    Spread::of(&pairs)
}

fn rates(results: &Results, contestant: Contestant) -> &[f64] {
    results
        .rates
        .iter()
        .find(|(c, _)| *c == contestant)
        .map_or(&[], |(_, r)| r)
}

/// Nanoseconds per frame beyond what generator and sink take by themselves.
fn marginal_ns(results: &Results, contestant: Contestant) -> f64 {
    let pairs: Vec<f64> = rates(results, contestant)
        .iter()
        .zip(rates(results, Contestant::Drop))
        .map(|(rate, drop)| 1e9 / rate - 1e9 / drop)
        .collect();
    Spread::of(&pairs).median
}

pub fn table(all: &[Results]) -> String {
    let mut out = String::new();
    for results in all {
        let _ = writeln!(
            out,
            "\n{}: 64-byte frames, one core (generator, way and sink share it)",
            results.scenario.name()
        );
        let _ = writeln!(
            out,
            "  {:<14}{:>10}{:>18}{:>12}{:>12}",
            "contestant", "Mframes/s", "min - max", "x kernel", "ns/frame"
        );
        for (contestant, rates) in &results.rates {
            let rate = Spread::of(rates);
            let to_kernel = ratio(rates, self::rates(results, Contestant::Kernel)).median;
            let marginal = marginal_ns(results, *contestant);
            let _ = writeln!(
                out,
                "  {:<14}{:>10.3}{:>18}{:>12.2}{:>12}",
                contestant.name(),
                rate.median / 1e6,
                format!("{:.3} - {:.3}", rate.min / 1e6, rate.max / 1e6),
                to_kernel,
                if marginal.is_nan() {
                    "-".to_owned()
                } else {
                    format!("{marginal:.0}")
                },
            );
        }
        let redirect = rates(results, Contestant::Redirect);
        let share = ratio(rates(results, Contestant::Vtep), redirect);
        if !redirect.is_empty() {
            let _ = writeln!(
                out,
                "  vtep keeps {:.2} of a plain redirect ({:.2} - {:.2})",
                share.median, share.min, share.max
            );
        }
    }
    out
}

pub fn json(all: &[Results]) -> Vec<Value> {
    let scenario = |results: &Results| {
        let contestants: Vec<_> = results
            .rates
            .iter()
            .map(|(contestant, rates)| {
                let to_kernel = ratio(rates, self::rates(results, Contestant::Kernel));
                json!({
                    "name": contestant.name(),
                    "frames_per_s": Spread::of(rates).json(),
                    "ratio_to_kernel": to_kernel.json(),
                    "marginal_ns_per_frame": marginal_ns(results, *contestant),
                    "runs": rates,
                })
            })
            .collect();
        json!({
            "scenario": results.scenario.direction.name(),
            "port": results.scenario.port.name(),
            "frame_bytes": 64,
            "flows": results.scenario.flows,
            "contestants": contestants,
        })
    };
    all.iter().map(scenario).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_ends() {
        assert_eq!(
            Spread::of(&[3.0, 1.0, 2.0]),
            Spread {
                median: 2.0,
                min: 1.0,
                max: 3.0
            }
        );
        assert_eq!(Spread::of(&[4.0, 1.0]).median, 2.5);
        assert!(Spread::of(&[]).median.is_nan());
    }
}
