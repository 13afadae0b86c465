//! `cargo xtask test --oracle`: see `vtep_tests::oracle`.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use vtep_tests::oracle::{Plan, check};

/// Send generated frames through a host without and a host with the daemon, and
/// report every difference.
#[derive(Parser)]
#[command(name = "vtep-oracle")]
struct Args {
    /// Frames, over all devices
    #[arg(long, default_value_t = 100_000)]
    frames: u64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// This VXLAN device alone; an unknown name lists them
    #[arg(long)]
    device: Option<String>,
    /// This frame of the device alone, with everything that comes out
    #[arg(long, requires = "device")]
    only: Option<u32>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let plan = Plan {
        frames: args.frames,
        seed: args.seed,
        device: args.device,
        only: args.only,
    };
    let bar = ProgressBar::with_draw_target(Some(plan.frames), ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template(
        "oracle: {prefix:10} {bar:30} {human_pos}/{human_len} [{eta}] {msg}",
    ) {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    let result = check(&plan, &mut |device, summary| {
        bar.set_prefix(device.to_owned());
        bar.set_position(summary.frames);
        bar.set_message(format!(
            "{} differences, {:.2} % fast",
            summary.differences,
            summary.fast_percent()
        ));
    });
    bar.finish_and_clear();
    match result {
        Ok(text) => {
            println!("oracle: {text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("oracle: {error:#}");
            ExitCode::FAILURE
        }
    }
}
