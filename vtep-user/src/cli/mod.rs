//! The command line: parse (`args`), then either run the daemon and unload
//! (`run`) or ask the daemon and print (`text`, JSON). Exit 0 done, 1 failed,
//! 2 wrong usage; every error is one line on stderr. Called by `main`.

mod args;
mod run;
mod table;
mod text;

#[cfg(test)]
mod tests;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use anyhow::Context;
use serde::Serialize;

use self::args::{
    Cli, Command, FdbCommand, FdbEntry, PortCommand, RemoteCommand, Request, VniCommand,
};
use self::table::Colour;
use crate::api::Client;
use crate::api::types::{FdbFilter, PortSpec, WriteMode};
use crate::daemon::Engine;
use crate::host;

/// The whole program.
pub fn main(engine: Engine) -> ExitCode {
    let cli = match args::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    match execute(cli, engine) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader has seen enough: `vtep fdb show | head`.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vtep: {}", one_line(&error));
            ExitCode::from(1)
        }
    }
}

fn usage(error: &clap::Error) -> ExitCode {
    match args::usage_error(error) {
        Some(line) => eprintln!("vtep: {line}"),
        // Nothing can be done about a closed terminal.
        None => drop(error.print()),
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// An error and those below it that say something new.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = match cause.downcast_ref::<io::Error>() {
            Some(error) => crate::instance::reason(error),
            None => cause.to_string(),
        };
        if line.is_empty() {
            line = text;
        } else if !line.contains(&text) {
            line += &format!(": {text}");
        }
    }
    line.replace('\n', " ")
}

fn execute(cli: Cli, engine: Engine) -> anyhow::Result<()> {
    // Before any thread exists: each keeps the namespace it was born in.
    if let Some(netns) = &cli.netns {
        host::enter_netns(netns)?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    match cli.command {
        Command::Run { config } => {
            run::run(&runtime, cli.instance, config.as_deref(), cli.netns, engine)
        }
        Command::Unload => run::unload(&runtime, &cli.instance, engine),
        Command::Ask(request) => runtime.block_on(async {
            let mut client = Client::connect(&cli.instance).await?;
            let stdout = io::stdout();
            let colour = Colour(stdout.is_terminal() && colours_wanted());
            let mut out = Output {
                to: stdout.lock(),
                json: cli.json,
                colour,
            };
            ask(request, &mut client, &mut out).await
        }),
    }
}

/// <https://no-color.org>: set and not empty means no.
fn colours_wanted() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
        && std::env::var_os("TERM").is_none_or(|value| value != "dumb")
}

/// Where answers go, and in which form.
struct Output<W> {
    to: W,
    json: bool,
    colour: Colour,
}

impl<W: Write> Output<W> {
    fn show<T: Serialize + ?Sized>(
        &mut self,
        value: &T,
        text: impl FnOnce(&T, Colour) -> String,
    ) -> anyhow::Result<()> {
        if self.json {
            let json = serde_json::to_string_pretty(value)?;
            writeln!(self.to, "{json}")?;
        } else {
            self.to.write_all(text(value, self.colour).as_bytes())?;
        }
        Ok(self.to.flush()?)
    }
}

/// Carry out one request. Writes print nothing.
async fn ask(
    request: Request,
    client: &mut Client,
    out: &mut Output<impl Write>,
) -> anyhow::Result<()> {
    match request {
        Request::Status => out.show(&client.status().await?, text::status)?,
        Request::Vni(VniCommand::Show) => out.show(&client.vni_show().await?[..], text::vnis)?,
        Request::Vni(VniCommand::Add(add)) => client.vni_add(&add.spec()).await?,
        Request::Vni(VniCommand::Del { vni }) => client.vni_del(vni).await?,
        Request::Port(PortCommand::Show) => {
            out.show(&client.port_show().await?[..], text::ports)?;
        }
        Request::Port(PortCommand::Add { name, vni, hook }) => {
            client.port_add(&PortSpec { name, vni, hook }).await?;
        }
        Request::Port(PortCommand::Del { name }) => client.port_del(&name).await?,
        Request::Fdb(FdbCommand::Show { mac, vni }) => {
            out.show(
                &client.fdb_show(FdbFilter { vni, mac }).await?[..],
                text::fdb,
            )?;
        }
        Request::Fdb(FdbCommand::Add(entry)) => write(client, &entry, WriteMode::Add).await?,
        Request::Fdb(FdbCommand::Replace(entry)) => {
            write(client, &entry, WriteMode::Replace).await?;
        }
        Request::Fdb(FdbCommand::Del { mac, vni }) => client.fdb_del(vni, mac).await?,
        Request::Remote(RemoteCommand::Show) => {
            out.show(&client.remote_show().await?[..], text::remotes)?;
        }
        Request::Stats => out.show(&client.stats().await?, text::stats)?,
        Request::Resync => out.show(&client.resync().await?, text::resync)?,
    }
    Ok(())
}

async fn write(client: &mut Client, entry: &FdbEntry, mode: WriteMode) -> anyhow::Result<()> {
    let spec = entry
        .spec()
        .context("name a place: --dst IP or --port IFNAME")?;
    Ok(client.fdb_write(&spec, mode).await?)
}
