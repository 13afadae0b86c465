//! `cargo xtask`: everything a developer or operator does with the checkout.
//! One file per verb; this one only dispatches.

mod build;
mod demo;
mod leftovers;
mod lint;
mod load;
mod results;
mod run;
mod setup;
mod test;
mod toolchain;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Set up, build, load and test the accelerated VTEP.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Bring this machine to the point where everything builds and runs
    Setup {
        /// Only say what is missing; exit 1 if anything is
        #[arg(long)]
        check: bool,
    },
    /// Build the eBPF objects, then user space
    Build {
        /// Optimised user space (eBPF always is)
        #[arg(long)]
        release: bool,
        /// No user space
        #[arg(long, conflicts_with = "release")]
        ebpf_only: bool,
    },
    /// Two subnets, one segment: traffic, a moving VM, measured and shown
    Demo,
    /// Compare with the kernel's bridge and vxlan: frames/s, one core
    Bench {
        /// Short rounds: under two minutes
        #[arg(long)]
        quick: bool,
        /// Ports with offloads instead: TCP, and 64-byte UDP; about four minutes
        #[arg(long, conflicts_with = "quick")]
        tcp: bool,
        /// JSON instead of the table
        #[arg(long)]
        json: bool,
        /// Rounds; every contestant runs twice in each
        #[arg(long, default_value_t = 5)]
        rounds: u32,
    },
    /// Format, clippy (user space and eBPF), long files
    Lint,
    /// Run every test; the last line is the sum
    Test {
        /// Only tests whose name contains this
        #[arg(conflicts_with = "oracle")]
        filter: Option<String>,
        /// Instead of the tests: generated frames through a host without and a host
        /// with vtep; every difference is reported
        #[arg(long)]
        oracle: bool,
        #[command(flatten)]
        options: test::OracleOptions,
    },
    /// Lab tests in a virtual machine with a distribution's kernel
    Vm {
        /// Only tests whose name contains this
        filter: Option<String>,
        /// Series of Debian's kernels
        #[arg(long, value_enum, default_value_t = vm::Series::V6_12)]
        kernel: vm::Series,
    },
    /// Start the daemon on this machine's own NICs and wait until it is ready
    Load {
        /// Configuration of the daemon
        #[arg(long)]
        config: Option<PathBuf>,
        #[arg(long, default_value = "default")]
        instance: String,
    },
    /// Stop the daemon and remove everything it attached
    Unload {
        #[arg(long, default_value = "default")]
        instance: String,
    },
}

fn main() -> ExitCode {
    run::handle_interrupt();
    let result = match Args::parse().verb {
        Verb::Setup { check: false } => setup::run(),
        Verb::Setup { check: true } => setup::check(),
        Verb::Build {
            ebpf_only: true, ..
        } => build::ebpf(),
        Verb::Build { release, .. } => build::all(release),
        Verb::Demo => demo::demo(),
        Verb::Bench {
            quick,
            tcp,
            json,
            rounds,
        } => {
            let mut options = vec![format!("--rounds={rounds}")];
            options.extend(quick.then(|| "--quick".to_owned()));
            options.extend(tcp.then(|| "--tcp".to_owned()));
            options.extend(json.then(|| "--json".to_owned()));
            demo::bench(&options)
        }
        Verb::Lint => lint::run_all(),
        Verb::Test {
            oracle: true,
            options,
            ..
        } => test::oracle(&options),
        Verb::Test { filter, .. } => return test::run_all(filter.as_deref()),
        Verb::Vm { filter, kernel } => return vm::verb(filter.as_deref(), kernel),
        Verb::Load { config, instance } => load::load(config.as_deref(), &instance),
        Verb::Unload { instance } => load::unload(&instance),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
