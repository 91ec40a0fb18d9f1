//! What is left of stores, and removing what is in them.

use std::{
    io::{self, IsTerminal as _, Write as _},
    process::ExitCode,
};

use anyhow::Result;
use layered_stores_client::{Client, ClientError};
use layered_stores_model::StoreName;
use serde_json::json;

use super::output::{complain, print, print_json};

/// It was called in a way that cannot be meant.
const USAGE: u8 = 2;

pub(super) async fn list_left_over(json: bool) -> Result<ExitCode> {
    let client = Client::connect().await?;
    let all = client.manager().await?.list_left_over().await.map_err(ClientError::from)?;
    if json {
        let object =
            |(name, directory, in_memory)| json!({"name": name, "directory": directory, "in-memory": in_memory});
        print_json(&all.into_iter().map(object).collect::<Vec<_>>())?;
    } else {
        let width = all.iter().map(|(name, ..)| name.len()).max().unwrap_or(0);
        let line = |(name, directory, in_memory): &(String, String, bool)| {
            format!("{name:width$}  {directory}{}\n", if *in_memory { " (in memory)" } else { "" })
        };
        print(&all.iter().map(line).collect::<String>())?;
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn remove_data(name: &StoreName, yes: bool) -> Result<ExitCode> {
    let client = Client::connect().await?;
    let manager = client.manager().await?;
    if !yes {
        if !io::stdin().is_terminal() {
            complain(&format!(
                "standard input is no terminal, so that nobody can be asked; `layered-stores remove-data --yes {name}` removes all \
                 that is in it without a question"
            ));
            return Ok(ExitCode::from(USAGE));
        }
        let left_over = manager.list_left_over().await.map_err(ClientError::from)?;
        let mut directories: Vec<_> =
            left_over.into_iter().filter(|(of, ..)| of == name.as_str()).map(|(_, directory, _)| directory).collect();
        match client.status(name).await {
            Ok(store) => directories.extend([store.upper_layer, store.state_dir]),
            // The daemon says best what is wrong with a name that nothing is known of.
            Err(error) if directories.is_empty() => return Err(error.into()),
            Err(_) => {}
        }
        if !confirms(&format!(
            "Remove all that is in {}? It cannot be brought back. [y/N] ",
            directories.join(" and ")
        ))? {
            complain("nothing was removed");
            return Ok(ExitCode::FAILURE);
        }
    }
    manager.remove_data(name.as_str()).await.map_err(ClientError::from)?;
    Ok(ExitCode::SUCCESS)
}

/// Asks the person at the terminal.
fn confirms(question: &str) -> Result<bool> {
    let mut terminal = io::stderr().lock();
    terminal.write_all(question.as_bytes())?;
    terminal.flush()?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
