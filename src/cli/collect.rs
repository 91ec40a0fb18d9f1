//! `layered-stores gc` and `layered-stores optimise`: making room in the upper layer of a store.
//!
//! The command talks to the daemon and to the person. What is done to the store is done by a process of its own ([`mod@work`]), which
//! is the owner's where the store has one ([`account`]).

mod account;
pub(super) mod amounts;
mod nix;
mod plan;
mod profiles;
mod task;
mod work;

use std::{
    io::{BufRead as _, BufReader, Read as _},
    process::{ChildStdout, ExitCode},
    time::Duration,
};

use account::Account;
use amounts::{Bytes, Days};
use anyhow::{Context as _, Result, anyhow, bail};
use layered_stores_client::{Client, ClientError, Properties};
use layered_stores_model::{StoreName, printable};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::json;
use task::{Event, Report, Task, What};
use tokio::{
    signal::unix::{Signal as Signals, SignalKind, signal},
    sync::mpsc,
};

pub(super) use account::become_user;
pub(super) use work::work;

use super::{
    args::PROBLEMS,
    follow::{INTERRUPTED, bar, is_watched},
    output::{complain, print, print_json},
    render,
    usage::human,
};

/// How long a store that is coming up is waited for: a timer may be due when the machine starts.
const COMING_UP: Duration = Duration::from_secs(120);

/// How often it is looked at meanwhile.
const PAUSE: Duration = Duration::from_millis(200);

/// How much the other process may say: the names of some million paths.
const MOST_SAID: u64 = 1 << 30;

/// How it is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct How {
    pub(super) dry_run: bool,
    pub(super) json: bool,
}

/// Collects the garbage of a store.
pub(super) async fn gc(name: &StoreName, free: Option<Bytes>, age: Option<Days>, how: How) -> Result<ExitCode> {
    let until_free = free.map(|Bytes(bytes)| bytes);
    let what = What::Collect { until_free, older_than: age.map(|Days(days)| days) };
    make_room(name, what, how).await
}

/// Removes what the lower store has as well from the upper layer.
pub(super) async fn optimise(name: &StoreName, how: How) -> Result<ExitCode> {
    make_room(name, What::Optimise, how).await
}

async fn make_room(name: &StoreName, what: What, how: How) -> Result<ExitCode> {
    let command = match what {
        What::Collect { .. } => "gc",
        What::Optimise => "optimise",
    };
    let client = Client::connect().await?;
    let store = once_up(&client, name).await?;
    let account = Account::of(&store, command)?;
    let task = Task {
        what,
        dry_run: how.dry_run,
        uri: store.store_uri,
        state_dir: store.state_dir,
        upper_layer: store.upper_layer,
        lower_store_dir: store.lower_store_dir,
    };
    let title = format!("{command} {name}");
    let (report, cancelled) = carry_out(account, &task, (!how.json && is_watched()).then_some(title.as_str())).await?;
    // Nix calls the remount hook at its end. When it does not get there, the daemon has noticed what is gone; asked, it makes that
    // good now.
    if !how.dry_run && report.as_ref().is_none_or(|report| report.owes_refresh) {
        let refreshed = async { Ok::<_, ClientError>(client.store(name).await?.remount().await?) };
        if let Err(error) = refreshed.await {
            complain(&format!("the store could not be refreshed: {error}; run `layered-stores remount {name}`"));
        }
    }
    let error = match &report {
        Some(report) => report.error.clone(),
        None => Some("the process that ran Nix has ended before it was done".to_owned()),
    };
    let report = report.unwrap_or_default();
    if how.json {
        print_json(&as_json(name, what, how, &report))?;
    } else if error.is_none() || !report.paths.is_empty() {
        print(&as_text(name, what, how, &report))?;
    }
    if cancelled {
        complain(&format!("{title}: cancelled"));
        return Ok(ExitCode::from(INTERRUPTED));
    }
    if let Some(error) = error {
        return Err(anyhow!("{title}: {}", printable(&error)));
    }
    Ok(match missing(what, how, &report) {
        Some(missing) => {
            complain(&format!(
                "{title}: {} less than that are free, and nothing else can go; \
                 see what is used with `nix-store --gc --print-roots` or make room elsewhere",
                human(missing)
            ));
            ExitCode::from(PROBLEMS)
        }
        None => ExitCode::SUCCESS,
    })
}

/// How much less is free than what was wanted.
fn missing(what: What, how: How, report: &Report) -> Option<u64> {
    let What::Collect { until_free: Some(wanted), .. } = what else { return None };
    let free = report.free + if how.dry_run { report.freed } else { 0 };
    (free < wanted).then(|| wanted - free)
}

/// A store that Nix can work on. One that is coming up is waited for.
async fn once_up(client: &Client, name: &StoreName) -> Result<Properties> {
    let deadline = tokio::time::Instant::now() + COMING_UP;
    loop {
        let store = client.status(name).await?;
        match store.state.as_str() {
            "active" => return Ok(store),
            "activating" if tokio::time::Instant::now() < deadline => tokio::time::sleep(PAUSE).await,
            "activating" | "deactivating" => {
                bail!("store {:?} is {}; wait for it with `layered-stores wait {name}`", name.as_str(), store.state)
            }
            "failed" => bail!("store {:?} failed; see `layered-stores status {name}`", name.as_str()),
            state => {
                bail!("store {:?} is {state}; start it with `layered-stores start {name}`", name.as_str())
            }
        }
    }
}

/// Has the other process do it, and says how far that is. Without a report it has ended early. Whether it was to end early, too.
async fn carry_out(account: Account, task: &Task, title: Option<&str>) -> Result<(Option<Report>, bool)> {
    let mut interrupts = Interrupts::listen()?;
    let mut child = account.command().spawn().context("cannot start a process for it")?;
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("the process has no number")?;
    if let Some(to) = child.stdin.take() {
        // It reads all of it before it does anything, or has ended, which is seen below.
        let _ = serde_json::to_writer(to, task);
    }
    let from = child.stdout.take().context("the process has no output")?;
    let (sender, mut events) = mpsc::channel(64);
    std::thread::spawn(move || read(from, &sender));
    let bar = title.map(bar);
    let mut cancelled = false;
    let report = loop {
        let event = tokio::select! {
            event = events.recv() => event,
            () = interrupts.next() => {
                let signal = if cancelled { Signal::KILL } else { Signal::TERM };
                // It leads no group yet when it is to become somebody else.
                let _ = kill_process_group(group, signal).or_else(|_| kill_process(group, signal));
                if cancelled {
                    break None;
                }
                cancelled = true;
                continue;
            }
        };
        match event {
            Some(Event::Progress { done, total }) => {
                if let Some(bar) = &bar {
                    bar.show(done, total);
                }
            }
            Some(Event::Said(words)) => match &bar {
                Some(bar) => bar.aside(|| complain(&printable(&words))),
                None => complain(&printable(&words)),
            },
            Some(Event::Over(report)) => break Some(report),
            None => break None,
        }
    };
    if report.is_none() {
        // Nobody is left who would say what becomes of a Nix that goes on.
        let _ = kill_process_group(group, Signal::TERM);
    }
    Ok((report, cancelled))
}

/// Hands on what the other process says, until it ends or says what is not understood.
fn read(from: ChildStdout, to: &mpsc::Sender<Event>) {
    for line in BufReader::new(from.take(MOST_SAID)).lines() {
        let event = line.ok().and_then(|line| serde_json::from_str(&line).ok());
        let Some(event) = event else { return };
        if to.blocking_send(event).is_err() {
            return;
        }
    }
}

/// The signals by which somebody wants a command to end.
struct Interrupts([Signals; 3]);

impl Interrupts {
    fn listen() -> Result<Self> {
        Ok(Self([signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?, signal(SignalKind::hangup())?]))
    }

    async fn next(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

fn as_json(name: &StoreName, what: What, how: How, report: &Report) -> serde_json::Value {
    let paths = report.paths.iter().map(|(path, bytes)| json!({"path": format!("/nix/store/{path}"), "bytes": bytes}));
    let paths: Vec<_> = paths.collect();
    let mut object = json!({
        "store": name,
        "dry-run": how.dry_run,
        "paths": paths,
        "freed": report.freed,
        "free": report.free,
        "error": report.error,
    });
    if let What::Collect { until_free, .. } = what {
        object["generations"] = json!(report.generations);
        object["enough"] = json!(until_free.map(|_| missing(what, how, report).is_none()));
    }
    object
}

fn as_text(name: &StoreName, what: What, how: How, report: &Report) -> String {
    let mut text = String::new();
    if how.dry_run {
        for generation in &report.generations {
            text += &format!("{:>10}  {}\n", "", printable(generation));
        }
        for (path, bytes) in &report.paths {
            text += &format!("{:>10}  /nix/store/{}\n", human(*bytes), printable(path));
        }
    }
    let (would, free) = (if how.dry_run { " would be" } else { "" }, human(report.free));
    let (paths, freed) = (render::count(report.paths.len(), "path"), human(report.freed));
    let freed = if how.dry_run { format!("that frees {freed}") } else { format!("{freed} freed") };
    if !report.generations.is_empty() {
        let generations = render::count(report.generations.len(), "old generation");
        text += &format!("{name}: {generations} of profiles{would} removed\n");
    }
    text + &match what {
        What::Collect { .. } => format!("{name}: {paths}{would} deleted, {freed}; {free} free\n"),
        What::Optimise => {
            format!(
                "{name}: {paths} that the lower store has as well{would} deleted from the upper layer, {freed}; {free} free\n"
            )
        }
    }
}
