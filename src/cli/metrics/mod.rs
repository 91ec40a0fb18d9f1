//! `layered-stores metrics`: figures for Prometheus.
//!
//! What there is to be seen is gathered first ([`Seen`]), from the daemon in one call and from the filesystems of upper layers.
//! What is made of it is a table ([`figures`]).

mod figures;
mod http;
mod room;

use std::{collections::HashMap, path::Path, process::ExitCode};

use anyhow::{Context as _, Result};
use layered_stores_client::{Client, ClientError, Snapshot};

use self::room::Room;
use super::output::{complain, print};
use crate::file::{FOR_ALL, replace_among_others};

pub(super) use http::answer;
pub(super) use room::count;

/// What the figures are made of.
#[derive(Debug, Default)]
struct Seen {
    /// What the daemon says, if one runs and answers.
    daemon: Option<Snapshot>,
    /// What room there is on the filesystems of the stores' upper layers, by the stores' names.
    room: HashMap<String, Room>,
}

impl Seen {
    /// # Errors
    /// When nobody can be asked. A daemon that does not run or does not answer is a fact like others.
    async fn gather() -> Result<Self, ClientError> {
        let daemon = match Client::snapshot().await {
            Err(error @ ClientError::NoBus(_)) => return Err(error),
            Err(error) => {
                complain(&error.to_string());
                None
            }
            Ok(daemon) => daemon,
        };
        let stores = daemon.as_ref().map_or(&[][..], |daemon| &daemon.stores);
        let room = room::of(stores);
        Ok(Self { daemon, room })
    }
}

/// Prints the figures, or puts them into a file in one step.
pub(super) async fn metrics(textfile: Option<&Path>) -> Result<ExitCode> {
    let text = figures::text(Seen::gather().await?)?;
    match textfile {
        None => print(&text)?,
        Some(file) => replace_among_others(file, text.as_bytes(), FOR_ALL).with_context(|| {
            format!(
                "cannot write {}; its directory has to be there, with no symbolic link on the way, and take files of yours",
                file.display()
            )
        })?,
    }
    Ok(ExitCode::SUCCESS)
}
