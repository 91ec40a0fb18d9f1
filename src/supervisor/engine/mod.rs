//! The one task that owns the state of all stores.

mod ahead;
mod begin;
mod commands;
mod configuration;
mod contents;
mod done;
mod hold;
mod jobs;
mod looks;
mod neighbours;
mod recall;
mod reconcile;
mod refresh;
mod remove;
mod settle;
mod sockets;
mod stuck;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, RwLock},
    time::Duration,
};

use begin::Then;
use layered_stores_model::{
    AbsolutePath, Source, StoreName,
    config::{Config, ConfigError},
};
use layered_stores_overlay::refresh::Changes;
use remove::Removing;
use rustix::io::Errno;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::Instant,
};

use super::{
    Error,
    askers::Askers,
    entry::{Entry, Reply, answer},
    handle::{Command, Event, Handle, Registry},
    jobs::Jobs,
    leases::Stores,
    machine::{Host, Machine},
    plan::{Phase, Want},
    record::{Known, RecordError},
    retirement::Retirements,
    threads::DEADLINE,
};

/// How long the engine gathers news before it looks at the mount table: with a thousand mounts, a look costs a
/// millisecond, and in a burst of operations most of the looks would be in vain.
const GATHER: Duration = Duration::from_millis(2);
const GATHER_IN_BURST: Duration = Duration::from_millis(100);
const BURST: usize = 8;

/// How often it is told how far a start or a reload has come.
const PROGRESS: Duration = Duration::from_millis(100);

/// The engine itself.
pub struct Engine {
    machine: Arc<dyn Machine>,
    /// Where stores keep what the configuration gives no place of its own.
    state_dir: AbsolutePath,
    entries: BTreeMap<StoreName, Entry>,
    registry: Arc<RwLock<Registry>>,
    commands: mpsc::Receiver<Command>,
    events: mpsc::UnboundedSender<Event>,
    operations: JoinSet<(StoreName, Then)>,
    /// The directories of stores that are not declared any more which are being removed.
    removing: BTreeMap<StoreName, Removing>,
    jobs: Jobs,
    retirements: Retirements,
    /// When to look at the mount table and plan.
    look_at: Option<Instant>,
    /// Whether there are events of the layers that were seen and not read.
    unread: bool,
    /// Whether the mount table has changed since.
    mounts_changed: bool,
    /// When to look whether what is stuck goes on.
    look_at_stuck: Option<Instant>,
    /// The configuration on its way.
    loading: JoinSet<Result<Config, ConfigError>>,
    loading_since: Instant,
    /// Those who wait for the configuration to be read, and then for its stores.
    reloading: Askers<()>,
    reload_applied: Vec<Reply>,
    settling: bool,
    /// What was told last of how all stores are.
    told: String,
    /// The stores that are up, for those who look into them.
    up: watch::Sender<Stores>,
    /// The records of earlier runs, while they are being read.
    recalling: JoinSet<Result<Known, RecordError>>,
    /// Stores that may be mounted, of which nothing else is known.
    unreadable: Vec<String>,
}

/// Why there is no engine.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The mount table cannot be used.
    #[error("cannot watch mounts: {0}")]
    Kernel(#[from] std::io::Error),
    /// What earlier runs have left cannot be found out.
    #[error(transparent)]
    Records(#[from] RecordError),
}

impl Engine {
    /// Prepares the engine on the machine that the daemon runs on, with a configuration that was checked.
    ///
    /// # Errors
    /// [`EngineError`].
    pub async fn new(
        host: Host,
        config: Config,
        events: mpsc::UnboundedSender<Event>,
    ) -> Result<(Self, Handle), EngineError> {
        let state_dir = host.state_dir().clone();
        Self::on(Arc::new(host), state_dir, config, events).await
    }

    /// Prepares it on any machine. Without a place of their own, stores are below `state_dir`.
    pub(super) async fn on(
        machine: Arc<dyn Machine>,
        state_dir: AbsolutePath,
        config: Config,
        events: mpsc::UnboundedSender<Event>,
    ) -> Result<(Self, Handle), EngineError> {
        let (sender, commands) = mpsc::channel(64);
        let registry = Arc::<RwLock<Registry>>::default();
        let stores = state_dir.join("stores").map_err(std::io::Error::other)?;
        let mut recalling = JoinSet::new();
        recalling.spawn(machine.recall(config.stores.clone()));
        // What does not answer by then keeps nobody from what lies elsewhere.
        let known = match tokio::time::timeout(DEADLINE, recalling.join_next()).await {
            Ok(known) => known.transpose().map_err(std::io::Error::other)?.transpose()?.unwrap_or_default(),
            Err(_) => Known::default(),
        };
        let mut engine = Self {
            retirements: Retirements::new(Arc::clone(&machine)),
            machine,
            state_dir,
            entries: BTreeMap::new(),
            registry: Arc::clone(&registry),
            commands,
            jobs: Jobs::new(events.clone()),
            events,
            operations: JoinSet::new(),
            removing: BTreeMap::new(),
            look_at: None,
            unread: false,
            mounts_changed: true,
            look_at_stuck: None,
            loading: JoinSet::new(),
            loading_since: Instant::now(),
            reloading: Askers::default(),
            reload_applied: Vec::new(),
            settling: true,
            told: String::new(),
            up: watch::Sender::default(),
            recalling,
            unreadable: known.unreadable,
        };
        if !engine.recalling.is_empty() {
            tracing::error!("{}", engine.why_silent());
        }
        // What was touched earlier comes first, so that a declaration that changed meanwhile is seen as a change.
        for spec in known.stores {
            engine.add(spec, false);
        }
        engine.apply(Source::Configuration, config.stores);
        engine.were_asked();
        for (name, old) in engine.machine.swapped_out() {
            let spec = engine.entries.get(&name).map(|entry| Arc::clone(&entry.spec));
            engine.retirements.take_over(name, old, spec);
        }
        engine.reconcile();
        tokio::spawn(engine.machine.watch_sockets(sender.downgrade()));
        tokio::spawn(engine.machine.attend(engine.up.subscribe(), sender.downgrade()));
        Ok((engine, Handle::new(sender, registry, stores)))
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
        let machine = Arc::clone(&self.machine);
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
                    self.tell_summary();
                }
                command = self.commands.recv() => match command {
                    Some(command) => self.command(command),
                    None => break,
                },
                Some(done) = self.operations.join_next() => {
                    // All that has come to its end: with many stores, a turn of this loop is not for nothing.
                    let mut next = Some(done);
                    while let Some(done) = next {
                        // The threads catch panics of work on stores. What is left is a mistake in the engine itself, which may
                        // believe anything now: the next daemon begins anew.
                        let (name, then) = done.map_err(std::io::Error::other)?;
                        then(&mut self, &name);
                        next = self.operations.try_join_next();
                    }
                }
                Some(loaded) = self.loading.join_next() => self.loaded(loaded),
                Some(recalled) = self.recalling.join_next() => {
                    self.recalled(recalled.map_err(std::io::Error::other)?.map_err(std::io::Error::other)?);
                }
                changed = machine.mounts_changed() => {
                    changed?;
                    self.mounts_changed = true;
                    self.look_soon();
                }
                drained = readable(&*machine, self.unread) => {
                    drained?;
                    self.drain_watches();
                }
                () = sleep_until(deadline) => self.due(),
            }
        }
        for entry in self.entries.values_mut() {
            entry.waiting.answer_all(&Error::ShuttingDown);
        }
        let removing = std::mem::take(&mut self.removing).into_values().flat_map(|removing| removing.waiting);
        answer(removing, &Err(Error::ShuttingDown));
        let reloads = self.reloading.all().into_iter().chain(self.reload_applied.drain(..));
        answer(reloads, &Err(Error::ShuttingDown));
        self.jobs.shut_down().await;
        self.retirements.finish().await;
        Ok(())
    }

    /// When something is due that no event announces.
    fn deadline(&self) -> Option<Instant> {
        let now = Instant::now();
        let free = self.unasked_from(now);
        let of_entry = |entry: &Entry| {
            let retry = entry.retries.due().filter(|_| entry.op.is_none());
            let serve = entry.serving.due().filter(|_| entry.op.is_none());
            let times =
                [refresh::refresh_at(entry, free), retry, serve, entry.stuck_due(), entry.refreshes.tell_at(now)];
            times
                .into_iter()
                .chain([looks::look_due(entry), hold::hold_at(entry), entry.candidate_due()])
                .flatten()
                .min()
        };
        self.entries
            .values()
            .filter_map(of_entry)
            .chain(self.look_at)
            .chain(self.look_at_stuck)
            .chain(self.removing.values().filter_map(Removing::stuck_due))
            .chain(self.loading_due())
            .chain(self.jobs.due())
            .min()
    }

    fn due(&mut self) {
        let now = Instant::now();
        self.look_at_stuck(now);
        self.look_at_removals(now);
        self.look_at_loading(now);
        for entry in self.entries.values_mut() {
            if entry.candidate_due().is_some_and(|at| at <= now) {
                self.look_at = Some(now);
            }
            if entry.op.is_none() && entry.retries.due().is_some_and(|at| at <= now) {
                entry.try_again();
                self.look_at = Some(now);
            }
            if entry.op.is_none() && entry.serving.due().is_some_and(|at| at <= now) {
                entry.serving.at_once();
                self.look_at = Some(now);
            }
            entry.refreshes.tell_rest(&entry.spec.name, now);
        }
        self.hold_due(now);
        self.refresh_due(now);
        self.look_at_stores(now);
        self.jobs.look(now);
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

    /// Takes note of changes of layers. There may be more than it is the turn for.
    fn drain_watches(&mut self) {
        match self.machine.changes() {
            Ok((changes, more)) => {
                self.unread = more;
                self.see(changes);
            }
            Err(error) => self.cannot_drain(error),
        }
    }

    /// Takes note of all changes of a store's layers that there were up to now.
    fn drain_watches_of(&mut self, name: &StoreName) {
        match self.machine.changes_of(name) {
            Ok(changes) => self.see(changes),
            Err(error) => self.cannot_drain(error),
        }
    }

    fn cannot_drain(&mut self, error: Errno) {
        self.unread = false;
        tracing::error!("changes of layers cannot be read: {error}");
    }

    fn see(&mut self, changes: HashMap<StoreName, Changes>) {
        let now = Instant::now();
        for (name, changes) in changes {
            if let Some(entry) = self.entries.get_mut(&name) {
                entry.refreshes.owed.see(changes, now);
            }
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
        if !self.settling {
            return self.tell_summary();
        }
        settle::arrive(&mut self.entries);
        if !settle::have_arrived(&self.entries, !self.reload_applied.is_empty()) {
            return;
        }
        self.settling = false;
        answer(std::mem::take(&mut self.reload_applied), &Ok(()));
        self.told = self.summary();
        let _ = self.events.send(Event::Settled { summary: self.told.clone() });
    }

    /// Tells how all stores are, if that is something else than was told last.
    fn tell_summary(&mut self) {
        let summary = self.summary();
        if summary != self.told {
            self.told.clone_from(&summary);
            let _ = self.events.send(Event::Summary { summary });
        }
    }

    fn summary(&self) -> String {
        let declared: Vec<_> = self.entries.values().filter(|entry| entry.declared).collect();
        let active = declared.iter().filter(|entry| entry.phase == Phase::Active).count();
        let names = |is_so: fn(&Entry) -> bool| {
            let these = declared.iter().filter(|entry| is_so(entry));
            these.map(|entry| entry.spec.name.to_string()).collect::<Vec<_>>()
        };
        let failed = names(|entry| matches!(entry.phase, Phase::Failed { .. }));
        let stuck = names(|entry| entry.stuck.is_some());
        // Those that nobody wants up are no failure, and count all the same.
        let down = names(|entry| entry.want == Want::Down && entry.phase == Phase::Inactive).len();
        let down = if down == 0 { String::new() } else { format!("; not started: {down}") };
        let lists = [("failed", failed), ("stuck", stuck), ("records that cannot be read", self.unreadable.clone())];
        let lists = lists.iter().filter(|(_, names)| !names.is_empty());
        let rest: String = lists.map(|(what, names)| format!("; {what}: {}", names.join(", "))).collect();
        let silent = if self.recalling.is_empty() { String::new() } else { format!("; {}", self.why_silent()) };
        format!("{active} of {} active{rest}{down}{silent}", number(declared.len(), "store"))
    }
}

/// A number with its noun.
fn number(number: usize, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}

/// Waits until there are events, and takes note of it before they are read. If some are `unread`, everybody else has their turn
/// first.
async fn readable(machine: &dyn Machine, unread: bool) -> std::io::Result<()> {
    if unread {
        tokio::task::yield_now().await;
        return Ok(());
    }
    machine.layers_changed().await
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
