//! `layered-stores status`: how stores are.

use std::{io::IsTerminal as _, process::ExitCode, time::Duration};

use anyhow::Result;
use layered_stores_client::{Client, Properties};
use layered_stores_model::StoreName;
use serde::Serialize;

use super::{
    args::PROBLEMS,
    log,
    output::print,
    program::said_by,
    render,
    usage::{self, Usage},
};

/// How often `--watch` looks.
const WATCH_PAUSE: Duration = Duration::from_secs(2);

/// How many lines of the journal are shown, and how long journalctl may take for them.
const JOURNAL_LINES: &str = "--lines=5";
const JOURNAL_PATIENCE: Duration = Duration::from_secs(2);

/// A store as `--json` has it: what the daemon says, and what was counted; `null` where it could not be.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Json<'a> {
    #[serde(flatten)]
    properties: &'a Properties,
    paths: Option<usize>,
    bytes: Option<u64>,
    free_bytes: Option<u64>,
    limit_bytes: Option<u64>,
    lower_paths: Option<usize>,
}

impl<'a> Json<'a> {
    fn of((properties, usage): (&'a Properties, &Usage)) -> Self {
        Self {
            properties,
            paths: usage.upper.map(|held| held.paths),
            bytes: usage.upper.map(|held| held.bytes),
            free_bytes: usage.upper.map(|held| held.free),
            limit_bytes: usage.upper.and_then(|held| held.limited).map(|(_, limit)| limit),
            lower_paths: usage.lower,
        }
    }
}

/// Prints how the named stores are, or all of them.
pub(super) async fn status(names: &[StoreName], json: bool, watch: bool) -> Result<ExitCode> {
    let client = Client::connect().await?;
    let mut before = String::new();
    loop {
        let (text, problems) = look(&client, names, json, watch).await?;
        if !watch {
            print(&text)?;
            return Ok(if problems { ExitCode::from(PROBLEMS) } else { ExitCode::SUCCESS });
        }
        if std::io::stdout().is_terminal() {
            // Home, the text, and away with what was there before.
            let lines = text.lines().map(|line| format!("{line}\x1b[K\n")).collect::<String>();
            print(&format!("\x1b[H{lines}\x1b[J"))?;
        } else if text != before {
            print(&format!("{text}\n"))?;
            before = text;
        }
        tokio::time::sleep(WATCH_PAUSE).await;
    }
}

/// What there is to say, and whether somebody should look at it.
async fn look(client: &Client, names: &[StoreName], json: bool, watch: bool) -> Result<(String, bool)> {
    let stores = if names.is_empty() {
        client.all().await?
    } else {
        let mut stores = Vec::new();
        for name in names {
            stores.push(client.status(name).await?);
        }
        stores
    };
    let usages = usage::of(&stores);
    let problems = stores.iter().any(render::has_problems);
    let all = || stores.iter().zip(&usages);
    let text = if json {
        let objects: Vec<_> = all().map(Json::of).collect();
        let text = match (names, &objects[..]) {
            ([_], [one]) => serde_json::to_string_pretty(one)?,
            _ => serde_json::to_string_pretty(&objects)?,
        };
        format!("{text}\n")
    } else if names.is_empty() {
        render::table(&all().map(|(store, usage)| (store, usage.upper.map(|held| held.paths))).collect::<Vec<_>>())
    } else {
        let one = |(store, usage): (&Properties, &Usage)| {
            let journal = if watch { String::new() } else { journal(&store.name) };
            render::one(store, *usage) + &journal
        };
        all().map(one).collect::<Vec<_>>().join("\n")
    };
    Ok((text, problems))
}

/// The last lines that the journal has about a store, as far as whoever asks may read it.
fn journal(name: &str) -> String {
    let [unit, store] = log::matches(name);
    let arguments = ["--quiet", "--no-pager", "--boot", JOURNAL_LINES, &unit, &store];
    let text = said_by("journalctl", &arguments, JOURNAL_PATIENCE).unwrap_or_default();
    let lines = text.lines().map(|line| format!("{}\n", layered_stores_model::printable(line)));
    let lines: String = lines.collect();
    if lines.is_empty() { lines } else { format!("\n{lines}") }
}
