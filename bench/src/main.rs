//! `cargo xtask bench`: what this VTEP does against what would run instead.
//! One scenario per direction; contestants are interleaved in one run, and only
//! ratios are results (PERFORMANCE traps: see ARCHITECTURE.md).

mod contest;
mod frames;
mod host;
mod report;

use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use vtep_tests::{daemon, generator};

/// Measure egress and ingress frames/s of this VTEP, of the kernel's bridge and
/// vxlan, and of a plain XDP redirect, on one core.
#[derive(Parser)]
#[command(name = "vtep-bench")]
struct Args {
    /// Short rounds: the whole run stays under two minutes.
    #[arg(long)]
    quick: bool,
    /// Print JSON instead of the table.
    #[arg(long)]
    json: bool,
    /// Rounds; every contestant runs twice in each (A B C, C B A).
    #[arg(long, default_value_t = 5)]
    rounds: u32,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let time = Duration::from_millis(if args.quick { 700 } else { 3000 });
    let setup = contest::Setup {
        vtep: daemon::binary(),
        lab: generator::object(),
        time,
        rounds: args.rounds,
    };
    let mut results = Vec::new();
    for direction in [contest::Direction::Egress, contest::Direction::Ingress] {
        results.push(contest::run(&setup, direction, !args.json)?);
    }
    if args.json {
        println!("{}", report::json(&results)?);
    } else {
        print!("{}", report::table(&results));
    }
    Ok(())
}
