//! The one task that owns the state of all stores.

mod commands;
mod outcome;
mod reconcile;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, RwLock},
    time::Duration,
};

use outcome::Done;
use tokio::{io::Interest, sync::mpsc, task::JoinSet, time::Instant};

use super::{
    Error,
    entry::{Entry, Reply, answer},
    handle::{Command, Event, Handle, Registry},
    mounts::MountMonitor,
    operation::Tools,
    plan::{Phase, Want},
    record::Records,
};
use crate::{
    config::{self, Config, Defaults},
    overlay::{host, watch::Watches},
    store::StoreName,
    systemd::Units,
};

/// How long the engine gathers news before it looks at the mount table: with a thousand mounts, a look costs a
/// millisecond, and in a burst of operations most of the looks would be in vain.
const GATHER: Duration = Duration::from_millis(2);
const GATHER_IN_BURST: Duration = Duration::from_millis(100);
const BURST: usize = 8;

/// How often it is told how far a start or a reload has come.
const PROGRESS: Duration = Duration::from_millis(100);

/// What a daemon is told when it starts.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The configuration file.
    pub config: PathBuf,
    /// What the configuration's defaults are made from.
    pub defaults: Defaults,
    /// Where notes are kept until the next boot.
    pub runtime_dir: PathBuf,
}

/// The engine itself.
pub struct Engine {
    settings: Settings,
    tools: Tools,
    mounts: MountMonitor,
    entries: BTreeMap<StoreName, Entry>,
    registry: Arc<RwLock<Registry>>,
    commands: mpsc::Receiver<Command>,
    events: mpsc::UnboundedSender<Event>,
    operations: JoinSet<(StoreName, Done)>,
    /// When to look at the mount table and plan.
    look_at: Option<Instant>,
    /// The configuration on its way.
    loading: JoinSet<Result<Config, config::ConfigError>>,
    reload_waiting: Vec<Reply>,
    reload_applied: Vec<Reply>,
    settling: bool,
}

impl Engine {
    /// Prepares the engine with a configuration that was checked.
    ///
    /// # Errors
    /// When the mount table or inotify cannot be used.
    pub async fn new(
        settings: Settings,
        config: Config,
        units: Units,
        events: mpsc::UnboundedSender<Event>,
    ) -> std::io::Result<(Self, Handle)> {
        let (sender, commands) = mpsc::channel(64);
        let registry = Arc::<RwLock<Registry>>::default();
        let records = Records::new(settings.defaults.state_dir.as_path(), &settings.runtime_dir);
        let tools = Tools { units, watches: Arc::new(Watches::new()?), records };
        let mut engine = Self {
            settings,
            tools,
            mounts: MountMonitor::open().await?,
            entries: BTreeMap::new(),
            registry: Arc::clone(&registry),
            commands,
            events,
            operations: JoinSet::new(),
            look_at: None,
            loading: JoinSet::new(),
            reload_waiting: Vec::new(),
            reload_applied: Vec::new(),
            settling: true,
        };
        // What was touched earlier comes first, so that a declaration that changed meanwhile is seen as a change.
        for spec in engine.tools.records.known() {
            engine.add(spec, false);
        }
        engine.apply(config);
        engine.reconcile();
        Ok((engine, Handle::new(sender, registry)))
    }

    /// Supervises until the commands' senders are gone or `stop` is done. `alive` is called at least twice in
    /// `alive_every`.
    ///
    /// # Errors
    /// When the kernel's notifications cannot be read any more.
    pub async fn run(
        mut self,
        stop: impl Future<Output = ()>,
        alive_every: Option<Duration>,
        alive: impl Fn(),
    ) -> std::io::Result<()> {
        let watches = Arc::clone(&self.tools.watches);
        let inotify = host::readiness(watches.as_fd().try_clone_to_owned()?, Interest::READABLE)?;
        let mut tick = tokio::time::interval(alive_every.unwrap_or(Duration::from_secs(3600)) / 2);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut progress = tokio::time::interval(PROGRESS);
        progress.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        tokio::pin!(stop);
        loop {
            let deadline = self.deadline();
            tokio::select! {
                () = &mut stop => break,
                _ = tick.tick() => alive(),
                _ = progress.tick(), if self.settling && !self.operations.is_empty() => {
                    let _ = self.events.send(Event::Progress { summary: self.summary() });
                }
                command = self.commands.recv() => match command {
                    Some(command) => self.command(command),
                    None => break,
                },
                Some(done) = self.operations.join_next() => match done {
                    Ok((name, done)) => self.done(&name, done),
                    // Operations catch panics of their blocking parts; what is left is a bug in this file.
                    Err(error) => tracing::error!("an operation was lost: {error}"),
                },
                Some(loaded) = self.loading.join_next() => self.loaded(loaded),
                changed = self.mounts.changed() => {
                    changed?;
                    self.look_soon();
                }
                ready = inotify.readable() => {
                    ready?.clear_ready();
                    self.drain_watches();
                }
                () = sleep_until(deadline) => self.due(),
            }
        }
        for entry in self.entries.values_mut() {
            entry.answer_all(&Error::ShuttingDown);
        }
        answer(self.reload_waiting.drain(..).chain(self.reload_applied.drain(..)), &Err(Error::ShuttingDown));
        Ok(())
    }

    /// When something is due that no event announces.
    fn deadline(&self) -> Option<Instant> {
        let of_entry = |entry: &Entry| {
            let refresh = entry.owed.due.filter(|_| entry.op.is_none() && entry.phase == Phase::Active);
            let retry = entry.retry_at.filter(|_| entry.op.is_none());
            [refresh, retry].into_iter().flatten().min()
        };
        self.entries.values().filter_map(of_entry).chain(self.look_at).min()
    }

    fn due(&mut self) {
        let now = Instant::now();
        for entry in self.entries.values_mut() {
            if entry.op.is_none() && entry.retry_at.is_some_and(|at| at <= now) {
                entry.try_again();
                self.look_at = Some(now);
            }
        }
        let due: Vec<StoreName> = self
            .entries
            .values()
            .filter(|entry| entry.owed.due.is_some_and(|at| at <= now))
            .map(|entry| entry.spec.name.clone())
            .collect();
        for name in due {
            self.refresh(&name);
        }
        if self.look_at.is_some_and(|at| at <= now) {
            self.look_at = None;
            self.reconcile();
        }
    }

    fn look_soon(&mut self) {
        let gather = if self.operations.len() > BURST { GATHER_IN_BURST } else { GATHER };
        let at = Instant::now() + gather;
        // What ends a burst is not gathered for.
        self.look_at = Some(self.look_at.map_or(at, |planned| planned.min(at)));
    }

    fn drain_watches(&mut self) {
        let now = Instant::now();
        match self.tools.watches.drain() {
            Ok(changes) => {
                for (name, changes) in changes {
                    if let Some(entry) = self.entries.get_mut(&name) {
                        entry.owed.see(changes, now);
                    }
                }
            }
            Err(error) => tracing::error!("changes of layers cannot be read: {error}"),
        }
    }

    fn publish(&self, name: &StoreName) {
        if let Some(entry) = self.entries.get(name)
            && let Some(old) = entry.publish()
        {
            let _ = self.events.send(Event::Changed { old: Box::new(old), cell: entry.cell.clone() });
        }
    }

    fn publish_all(&self) {
        for name in self.entries.keys() {
            self.publish(name);
        }
    }

    /// Announces that everything is where it should be, once after each start and reload.
    ///
    /// Stores that are not required do not delay it.
    fn check_settled(&mut self) {
        let waited_for = |entry: &&Entry| entry.spec.required || !self.reload_applied.is_empty();
        // A store that waits for the one on top of it to become free has been given up on for now as well.
        let is_blocked = |entry: &Entry| {
            let above = |other: &&Entry| other.spec.lower_name() == Some(&entry.spec.name);
            self.entries.values().filter(above).any(|other| other.retry_at.is_some())
        };
        let is_settled = |entry: &Entry| entry.is_settled() || is_blocked(entry);
        if !self.settling || !self.entries.values().filter(waited_for).all(is_settled) {
            return;
        }
        self.settling = false;
        answer(std::mem::take(&mut self.reload_applied), &Ok(()));
        let _ = self.events.send(Event::Settled { summary: self.summary() });
    }

    fn summary(&self) -> String {
        let wanted: Vec<_> = self.entries.values().filter(|entry| entry.want == Want::Up).collect();
        let active = wanted.iter().filter(|entry| entry.phase == Phase::Active).count();
        let failed: Vec<_> = wanted
            .iter()
            .filter(|entry| matches!(entry.phase, Phase::Failed { .. }))
            .map(|entry| entry.spec.name.as_str())
            .collect();
        let failed = if failed.is_empty() { String::new() } else { format!("; failed: {}", failed.join(", ")) };
        format!("{active} of {} stores active{failed}", wanted.len())
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
