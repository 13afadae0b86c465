//! `cargo xtask bench`: what this VTEP does against what would run instead.
//! One scenario per direction and number of flows; contestants are interleaved in one run, and only
//! ratios are results (PERFORMANCE traps: see ARCHITECTURE.md).

mod contest;
mod frames;
mod host;
mod report;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use vtep_tests::{daemon, generator};

use crate::contest::{Direction, Scenario};

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
    let time = Duration::from_millis(if args.quick { 700 } else { 1500 });
    let setup = contest::Setup {
        vtep: daemon::binary(),
        lab: generator::object(),
        time,
        rounds: args.rounds,
    };
    let mut results = Vec::new();
    for flows in if args.quick { vec![1] } else { vec![1, 16_384] } {
        for direction in [Direction::Egress, Direction::Ingress] {
            results.push(contest::run(
                &setup,
                Scenario { direction, flows },
                !args.json,
            )?);
        }
    }
    if args.json {
        println!("{}", report::json(&results)?);
    } else {
        print!("{}", report::table(&results));
    }
    Ok(())
}
