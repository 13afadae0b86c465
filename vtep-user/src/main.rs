//! The `vtep` program: the command line of the library, connected to its
//! engine.

use std::process::ExitCode;

use vtep_user::controller;
use vtep_user::daemon::Engine;

fn main() -> ExitCode {
    vtep_user::cli::main(Engine {
        run: |options, commands| {
            Box::pin(async { controller::run(options, commands).await.map_err(Into::into) })
        },
        unload: |instance| controller::unload(instance).map_err(Into::into),
    })
}
