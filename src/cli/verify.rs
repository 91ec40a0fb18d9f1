//! `layered-stores verify`: is the merged view what the layers say?

use std::process::ExitCode;

use anyhow::Result;
use layered_stores_client::Client;
use layered_stores_model::{StoreName, printable};
use serde_json::json;

use super::{
    args::PROBLEMS,
    follow::{INTERRUPTED, follow, is_watched},
    output::{complain, print, print_json},
    render,
};

/// Has the daemon look at every path of a store, and names those that are wrong.
pub(super) async fn verify(name: &StoreName, json: bool) -> Result<ExitCode> {
    let client = Client::connect().await?;
    client.status(name).await?;
    let job = client.verify(name).await?;
    let title = format!("verify {name}");
    let Some(stale) = follow(&job, (!json && is_watched()).then_some(title.as_str())).await? else {
        complain(&format!("verify {name}: cancelled"));
        return Ok(ExitCode::from(INTERRUPTED));
    };
    if json {
        let objects = stale.iter().map(|(path, problem)| json!({"path": path, "problem": problem}));
        print_json(&objects.collect::<Vec<_>>())?;
    } else if stale.is_empty() {
        print(&format!("{name}: every path of the merged directory is what its layers say\n"))?;
    } else {
        let lines = stale.iter().map(|(path, problem)| format!("{}: {problem}\n", printable(path)));
        let number = render::count(stale.len(), "path");
        print(&format!("{}{name}: {number} stale; run `layered-stores remount {name}`\n", lines.collect::<String>()))?;
    }
    Ok(if stale.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(PROBLEMS) })
}
