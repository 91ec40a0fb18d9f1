//! The URL of a store; and one that no Nix opens, when there is none.
//!
//! `nix … --store "$(layered-stores uri NAME)"` goes on when the command in it fails, and Nix takes an empty store URL for
//! the host's store. So something is printed whatever happens.

use std::{
    ffi::{OsStr, OsString},
    io::{IsTerminal as _, Write as _},
    process::ExitCode,
};

use anyhow::{Result, anyhow, bail};
use clap::Parser as _;
use layered_stores_client::Client;
use layered_stores_model::StoreName;
use tokio::signal::unix::{SignalKind, signal};

use super::{
    args::{Arguments, Command, Internal, InternalArguments},
    output::{complain, print},
    owner::{not_theirs, refuse_root},
};

/// What was written on the command line.
#[derive(Debug)]
pub enum Invocation {
    /// By people.
    Command(Arguments),
    /// By units, completions and `make install`.
    Internal(Internal),
}

/// Reads the command line. Wrong use ends the process with code 2, as clap does it.
pub fn parse() -> Invocation {
    let words: Vec<OsString> = std::env::args_os().collect();
    if words.get(1).is_some_and(|word| InternalArguments::is_command(&word.to_string_lossy())) {
        return Invocation::Internal(InternalArguments::parse_from(&words).command);
    }
    // Not even a bug leaves the output empty.
    if is_uri(&words) {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            print_unopenable(None);
            hook(info);
        }));
    }
    Invocation::Command(Arguments::try_parse_from(&words).unwrap_or_else(|error| {
        // `layered-stores url NAME` is meant as well, where the output goes into another command.
        let is_command = words.get(1).is_some_and(|word| Arguments::is_command(&word.to_string_lossy()));
        if error.use_stderr() && (is_uri(&words) || !is_command && !std::io::stdout().is_terminal()) {
            print_unopenable(None);
        }
        error.exit()
    }))
}

fn is_uri(words: &[OsString]) -> bool {
    words.iter().skip(1).any(|word| word == OsStr::new("uri"))
}

/// Prints what has to be printed for a command that cannot even begin.
pub fn without_result(invocation: &Invocation) {
    if let Invocation::Command(Arguments { command: Command::Uri { name, .. } }) = invocation {
        print_unopenable(Some(name));
    }
}

/// Prints the URL of a store, whatever comes of it.
pub(super) async fn uri(name: &StoreName, daemon: bool) -> Result<ExitCode> {
    let found = interruptible(find(name, daemon)).await.unwrap_or_else(|| Err(anyhow!("interrupted")));
    match found {
        Ok(uri) => print(&format!("{uri}\n"))?,
        Err(error) => {
            print_unopenable(Some(name));
            return Err(error);
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn find(name: &StoreName, daemon: bool) -> Result<String> {
    let store = Client::connect().await?.status(name).await?;
    if daemon && store.daemon_uri.is_empty() {
        bail!("store {0:?} has no Nix daemon of its own; declare one with [stores.{0}.daemon]", name.as_str());
    }
    if !daemon {
        refuse_root(&store, "uri")?;
    }
    // Nix would write onto the bare mount point before it notices.
    if store.state != "active" {
        let state = store.state;
        let way_out = match state.as_str() {
            "activating" | "deactivating" => format!("wait for it with `layered-stores wait {name}`"),
            "failed" => format!("see `layered-stores status {name}`"),
            _ => format!("start it with `layered-stores start {name}`"),
        };
        bail!("store {:?} is {state}, and Nix cannot use it; {way_out}", name.as_str());
    }
    if !daemon && let Some(hint) = not_theirs(&store) {
        complain(&hint);
    }
    Ok(if daemon { store.daemon_uri } else { store.store_uri })
}

/// Awaits something; a signal that would end the process ends the waiting.
async fn interruptible<T>(work: impl Future<Output = T>) -> Option<T> {
    let ended = async |kind| match signal(kind) {
        Ok(mut signal) => drop(signal.recv().await),
        Err(_) => std::future::pending().await,
    };
    tokio::select! {
        done = work => Some(done),
        () = ended(SignalKind::interrupt()) => None,
        () = ended(SignalKind::terminate()) => None,
        () = ended(SignalKind::hangup()) => None,
    }
}

/// Prints what every Nix refuses to open. Nix 2.26 names no more of a URL than its scheme, so that is where the way out is.
fn print_unopenable(name: Option<&StoreName>) {
    let name = name.map(|name| format!("-{name}")).unwrap_or_default();
    // Nobody is there to be told when this fails.
    let _ = writeln!(std::io::stdout(), "layered-stores-error.see-layered-stores-status{name}://uri");
}
