//! The command line.

use std::process::ExitCode;

use layered_stores::cli::{self, Invocation};

fn main() -> ExitCode {
    let invocation = cli::parse();
    // One thread: `enter` moves the process into namespaces, which the kernel allows only then.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(async {
            match invocation {
                Invocation::Command(arguments) => cli::run(arguments).await,
                Invocation::Internal(command) => cli::run_internal(command).await,
            }
        }),
        Err(error) => {
            cli::without_result(&invocation);
            Err(error.into())
        }
    };
    result.unwrap_or_else(|error| {
        cli::complain(&format!("{error:#}"));
        ExitCode::FAILURE
    })
}
