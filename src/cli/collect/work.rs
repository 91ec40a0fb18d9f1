//! Doing it: what runs as whoever the store belongs to.

use std::{
    collections::HashSet,
    io::{self, Write as _},
    sync::atomic::Ordering,
};

use anyhow::{Context as _, Result, bail};
use layered_stores_nix_db::{Keep, ObjectName};
use percent_encoding::percent_decode_str;
use tokio::signal::unix::{SignalKind, signal};

use super::{
    nix::{CANCELLED, CHUNK, Ended, Nix, Roots, Said, keep, name_in},
    plan::{Plan, Upper, graph, names_below},
    profiles,
    task::{Event, Report, Task, What},
};
use crate::cli::usage::human;

/// Reads on standard input what is to be done, does it, and says on standard output how that goes.
pub(in crate::cli) async fn work() -> Result<()> {
    // Nix is told by the same signal, ends after the path at which it is, and then there is still a report to be made.
    let (mut terminate, mut hangup) = (signal(SignalKind::terminate())?, signal(SignalKind::hangup())?);
    let task: Task = serde_json::from_reader(io::stdin()).context("there is nothing to do on standard input")?;
    let work = tokio::task::spawn_blocking(move || carry_out(&task));
    tokio::pin!(work);
    let report = loop {
        tokio::select! {
            report = &mut work => break report?,
            _ = terminate.recv() => CANCELLED.store(true, Ordering::Relaxed),
            _ = hangup.recv() => CANCELLED.store(true, Ordering::Relaxed),
        }
    };
    tell(&Event::Over(report));
    Ok(())
}

/// Says something to the command. When that has gone, what is begun is done all the same.
fn tell(event: &Event) {
    if let Ok(line) = serde_json::to_string(event) {
        let _ = writeln!(io::stdout(), "{line}");
    }
}

/// How far it is, as far as there is something new to say.
#[derive(Default)]
struct Progress {
    done: u64,
    total: u64,
}

impl Progress {
    fn at(&mut self, done: u64, total: u64) {
        if (self.done, self.total) != (done, total) {
            (self.done, self.total) = (done, total);
            tell(&Event::Progress { done, total });
        }
    }
}

/// One task on its way.
struct Work<'t> {
    task: &'t Task,
    nix: Nix<'t>,
    upper: Upper,
    progress: Progress,
    report: Report,
}

fn carry_out(task: &Task) -> Report {
    let begun = Upper::open(&task.upper_layer).map(|upper| Work {
        task,
        nix: Nix { uri: &task.uri },
        upper,
        progress: Progress::default(),
        report: Report::default(),
    });
    let mut work = match begun {
        Ok(work) => work,
        Err(error) => return Report { error: Some(format!("{error:#}")), ..Report::default() },
    };
    let done = match task.what {
        What::Collect { until_free, older_than } => work.collect(until_free, older_than),
        What::Optimise => work.optimise(),
    };
    let free = work.upper.free();
    let error = done.err().or_else(|| free.as_ref().err().map(|error| anyhow::anyhow!("{error:#}")));
    Report { error: error.map(|error| format!("{error:#}")), free: free.unwrap_or(0), ..work.report }
}

impl Work<'_> {
    fn collect(&mut self, until_free: Option<u64>, older_than: Option<u32>) -> Result<()> {
        let Task { state_dir, dry_run, .. } = self.task;
        if let Some(bytes) = until_free {
            let capacity = self.upper.capacity()?;
            if bytes > capacity {
                let (bytes, capacity) = (human(bytes), human(capacity));
                bail!(
                    "{bytes} can never be free: the filesystem of the upper layer has {capacity} in all; name less with --until-free"
                );
            }
        }
        if let Some(days) = older_than {
            profiles::remove(&self.nix, state_dir, days, *dry_run, &mut self.report.generations)?;
        }
        let (keep, none) = (keep(), HashSet::new());
        match (until_free, dry_run) {
            (None, true) => {
                let plan = self.plan(keep)?;
                self.would(&plan, plan.all().into_iter().collect());
            }
            (Some(bytes), true) => {
                let needed = bytes.saturating_sub(self.upper.free()?);
                let plan = self.plan(keep)?;
                self.would(&plan, plan.oldest(needed, &none).concat().into_iter().collect());
            }
            (None, false) => {
                let plan = self.plan(keep)?;
                let ended = self.run(&plan, &plan.all(), &["--gc"])?;
                self.count(&plan, true);
                if !ended.is_well() {
                    bail!(ended.error());
                }
            }
            (Some(bytes), false) => self.make_room(bytes, keep)?,
        }
        Ok(())
    }

    fn plan(&self, keep: Keep) -> Result<Plan> {
        // In this order: opening the store makes the database of one that was never used.
        let roots = self.nix.roots()?;
        self.plan_with(&roots, keep)
    }

    fn plan_with(&self, roots: &Roots, keep: Keep) -> Result<Plan> {
        // In a dry run they are still there, and keep nothing.
        let doomed = if self.task.dry_run { self.report.generations.as_slice() } else { &[] };
        Plan::make(&self.upper, &self.task.state_dir, roots, doomed, keep)
    }

    /// Deletes garbage, the oldest first, until so many bytes are free. Nix's own limits count what is deleted, and in a layered
    /// store count wrongly.
    fn make_room(&mut self, bytes: u64, keep: Keep) -> Result<()> {
        // What turned out to be in use meanwhile.
        let mut kept = HashSet::new();
        loop {
            // Before it is looked what is free: Nix keeps some room back for itself (`gc-reserved-space`), gives it up while it
            // deletes, and takes it again the next time that it opens the store.
            let roots = self.nix.roots()?;
            let needed = bytes.saturating_sub(self.upper.free()?);
            if needed == 0 {
                return Ok(());
            }
            let plan = self.plan_with(&roots, keep)?;
            let groups = plan.oldest(needed, &kept);
            if groups.is_empty() {
                return Ok(());
            }
            let all = groups.concat();
            let deleted = self.delete(&plan, groups, &mut kept);
            let gone = self.count(&plan, true);
            if deleted? {
                // A Nix that is content and has deleted nothing would be asked for ever.
                kept.extend(all.iter().filter(|place| !gone.contains(place)).map(|place| plan.name(*place).clone()));
            }
        }
    }

    /// Deletes some paths, in as many turns as their number takes. Whether Nix has come to the last.
    fn delete(&mut self, plan: &Plan, groups: Vec<Vec<usize>>, kept: &mut HashSet<ObjectName>) -> Result<bool> {
        let mut turns: Vec<Vec<usize>> = vec![Vec::new()];
        for group in groups {
            match turns.last_mut() {
                Some(turn) if turn.is_empty() || turn.len() + group.len() <= CHUNK => turn.extend(group),
                _ => turns.push(group),
            }
        }
        for turn in turns {
            let paths: Vec<_> = turn.iter().map(|place| format!("/nix/store/{}", plan.name(*place))).collect();
            let mut arguments = vec!["--delete"];
            arguments.extend(paths.iter().map(String::as_str));
            let ended = self.run(plan, &turn, &arguments)?;
            if ended.is_well() {
                continue;
            }
            // Somebody has begun to use one since it was looked at. Nix then does nothing about those behind it.
            match ended.path_in_error().filter(|name| turn.iter().any(|place| plan.name(*place) == name)) {
                Some(name) if kept.insert(name.clone()) => return Ok(false),
                _ => bail!(ended.error()),
            }
        }
        Ok(true)
    }

    fn optimise(&mut self) -> Result<()> {
        let below = names_below(&self.task.lower_store_dir)?;
        let mut both = self.upper.names()?;
        both.retain(|name| below.contains(name));
        if self.task.dry_run {
            let graph = graph(&self.task.state_dir)?;
            both.retain(|name| graph.contains(name));
            let paths: Vec<_> = both.iter().map(|name| format!("/nix/store/{name}")).collect();
            let invalid = Nix { uri: &lower_store(&self.task.uri)? }.invalid_of(&paths)?;
            both.retain(|name| !invalid.contains(name));
        }
        let plan = Plan::of_names(&self.upper, &both)?;
        if self.task.dry_run {
            self.would(&plan, plan.all().into_iter().collect());
            return Ok(());
        }
        let ended = self.run(&plan, &[], &["--optimise"])?;
        self.count(&plan, false);
        if ended.is_well() { Ok(()) } else { bail!(ended.error()) }
    }

    /// Has Nix delete something, and says how far it is with what is expected to go.
    fn run(&mut self, plan: &Plan, expected: &[usize], arguments: &[&str]) -> Result<Ended> {
        let mut left: HashSet<_> = expected.iter().map(|place| plan.name(*place)).collect();
        let total = left.len() as u64;
        let progress = &mut self.progress;
        let ended = self.nix.run("nix-store", arguments, |said| match said {
            Said::Progress(done, total) => progress.at(done, total),
            // Older Nix wants settings of the lower store's daemon that it does not let everybody have.
            Said::Words(1, words) if !words.contains("ignoring the client-specified setting") => {
                tell(&Event::Said(words.to_owned()));
            }
            Said::Words(_, words) => {
                if name_in_store(words).is_some_and(|name| left.remove(&name)) {
                    progress.at(total - left.len() as u64, total);
                }
            }
        })?;
        self.report.owes_refresh |= !ended.is_well();
        Ok(ended)
    }

    /// Counts what has gone.
    fn count(&mut self, plan: &Plan, with_links: bool) -> HashSet<usize> {
        let gone = plan.gone(&self.upper);
        self.note(plan, &gone, with_links);
        gone
    }

    /// Counts what would go.
    fn would(&mut self, plan: &Plan, places: HashSet<usize>) {
        self.note(plan, &places, self.task.what != What::Optimise);
    }

    fn note(&mut self, plan: &Plan, places: &HashSet<usize>, with_links: bool) {
        self.report.paths.extend(plan.listed(places));
        self.report.freed += plan.freed(places, with_links);
    }
}

/// The store path that Nix says it deletes: the name at the end of where its files are.
fn name_in_store(words: &str) -> Option<ObjectName> {
    words.strip_prefix("deleting ").and_then(name_in)
}

/// The URL of the lower store in that of a layered one.
fn lower_store(uri: &str) -> Result<String> {
    let parameters = uri.split_once('?').map_or("", |(_, parameters)| parameters);
    let lower = parameters.split('&').find_map(|parameter| parameter.strip_prefix("lower-store="));
    let lower = lower.context("the store's URL names no lower store")?;
    Ok(percent_decode_str(lower).decode_utf8()?.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lower_store_is_that_of_the_store_itself() {
        let uri =
            "local-overlay://?root=/r&lower-store=local-overlay%3A//%3Froot%3D/b%26lower-store%3D/l&upper-layer=/u";
        let lower = lower_store(uri).expect("it has one");
        assert_eq!(lower, "local-overlay://?root=/b&lower-store=/l");
        assert_eq!(lower_store(&lower).expect("it has one"), "/l");
        assert!(lower_store("daemon").is_err());
    }
}
