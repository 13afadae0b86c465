//! The `vtep` program: the command line of the library, connected to its
//! engine.

use std::process::ExitCode;

use vtep_user::daemon::Engine;

fn main() -> ExitCode {
    vtep_user::cli::main(Engine {
        run: |_, _| Box::pin(async { Err("this build has no controller".into()) }),
        unload: |_| Err("this build has no data path".into()),
    })
}
