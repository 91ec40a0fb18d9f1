//! The command line.

use std::process::ExitCode;

use clap::Parser as _;
use layered_stores::cli::{self, args::Arguments};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // One thread: `enter` moves the process into namespaces, which the kernel allows only then.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(cli::run(arguments)),
        Err(error) => Err(error.into()),
    };
    result.unwrap_or_else(|error| {
        anstream::eprintln!("layered-stores: {error:#}");
        ExitCode::FAILURE
    })
}
