//! `cargo xtask bench`: what this VTEP does against what would run instead.
//! One scenario per direction and number of flows; contestants are interleaved in one run, and only
//! ratios are results (PERFORMANCE traps: see ARCHITECTURE.md).

mod contest;
mod frames;
mod host;
mod pair;
mod report;
mod tcp;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use serde_json::json;
use vtep_tests::{daemon, generator};

use crate::contest::{Direction, Port, Scenario};

/// Measure egress and ingress frames/s of this VTEP, of the kernel's bridge and
/// vxlan, and of a plain XDP redirect, on one core.
#[derive(Parser)]
#[command(name = "vtep-bench")]
struct Args {
    /// One flow only, short rounds: the whole run stays under two minutes.
    #[arg(long)]
    quick: bool,
    /// Print JSON instead of the table.
    #[arg(long)]
    json: bool,
    /// Ports with offloads instead: TCP streams, requests and responses, and
    /// 64-byte UDP; about four minutes.
    #[arg(long, conflicts_with = "quick")]
    tcp: bool,
    /// Rounds; every contestant runs twice in each (A B C, C B A).
    #[arg(long, default_value_t = 5)]
    rounds: u32,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let time = Duration::from_millis(match args {
        Args { quick: true, .. } => 700,
        Args { tcp: true, .. } => 500,
        _ => 1500,
    });
    let setup = contest::Setup {
        vtep: daemon::binary(),
        lab: generator::object(),
        time,
        rounds: args.rounds,
    };
    let mut scenarios = Vec::new();
    if args.tcp {
        for port in [Port::OffloadsSocket, Port::Offloads] {
            scenarios.push(Scenario {
                direction: Direction::Egress,
                port,
                flows: 1,
            });
        }
    } else {
        for flows in if args.quick { vec![1] } else { vec![1, 16_384] } {
            for direction in [Direction::Egress, Direction::Ingress] {
                scenarios.push(Scenario {
                    direction,
                    port: Port::Plain,
                    flows,
                });
            }
        }
    }
    let tcp = match args.tcp {
        true => tcp::run(args.rounds, !args.json)?,
        false => Vec::new(),
    };
    // What has been measured is seen, whatever comes of the rest.
    if !args.json {
        print!("{}", tcp::table(&tcp));
    }
    let results = scenarios
        .into_iter()
        .map(|scenario| contest::run(&setup, scenario, !args.json))
        .collect::<Result<Vec<_>>>()?;
    if args.json {
        let scenarios = [tcp::json(&tcp), report::json(&results)].concat();
        let report = json!({ "scenarios": scenarios });
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", report::table(&results));
    }
    Ok(())
}
