//! The one task that owns the state of all stores.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::{
    io::Interest,
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::Instant,
};

use super::{
    Error,
    entry::{Entry, Op, Reply, answer},
    mounts::MountMonitor,
    operation::{self, OperationError, Tools, Up},
    plan::{Action, Lower, Phase, View, Want, plan},
    record::Records,
    status::{Problem, Status, StatusCell},
};
use crate::{
    config::{self, Config, Defaults},
    overlay::{
        host,
        mountinfo::MountState,
        probe::Stale,
        refresh::{Changes, Outcome, Report, Rung},
        swap::OldSuperblock,
        watch::Watches,
    },
    store::{StoreName, StoreSpec},
    systemd::{Units, is_transient},
};

/// How long the engine gathers news before it looks at the mount table: with a thousand mounts, a look costs a
/// millisecond, and in a burst of operations most of the looks would be in vain.
const GATHER: Duration = Duration::from_millis(2);
const GATHER_IN_BURST: Duration = Duration::from_millis(20);
const BURST: usize = 8;

/// How long paths that stay stale after a swap are left alone before the next try.
const STALE_RETRY: Duration = Duration::from_secs(30);

/// How many stale paths a message names.
const NAMED_STALE: usize = 3;

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

/// Something the engine is asked to do.
#[derive(Debug)]
pub enum Command {
    /// Bring a store up, and those it lies on.
    Start(StoreName, Reply),
    /// Take a store down.
    Stop(StoreName, Reply),
    /// Refresh a store's merged view now.
    Remount(StoreName, Reply),
    /// Look at all paths of a store.
    Verify(StoreName, Reply<Vec<Stale>>),
    /// Read the configuration again.
    Reload(Reply),
}

/// Something that happened, for those who tell others.
#[derive(Debug)]
pub enum Event {
    /// There is a new store.
    Added(StatusCell),
    /// A store's status changed.
    Changed {
        /// The status before.
        old: Box<Status>,
        /// The status now.
        cell: StatusCell,
    },
    /// A store is gone.
    Removed(StoreName),
    /// All stores are where they should be or were given up on, for the first time since the start or a reload.
    Settled {
        /// One line for people.
        summary: String,
    },
}

/// All stores, for looking them up.
#[derive(Debug, Default)]
struct Registry {
    by_name: BTreeMap<StoreName, StatusCell>,
    by_path: HashMap<String, StoreName>,
}

/// The way to the engine for everybody else.
#[derive(Clone, Debug)]
pub struct Handle {
    commands: mpsc::Sender<Command>,
    registry: Arc<RwLock<Registry>>,
}

impl Handle {
    /// The published status of all stores, by name.
    pub fn stores(&self) -> Vec<StatusCell> {
        self.registry.read().unwrap_or_else(PoisonError::into_inner).by_name.values().cloned().collect()
    }

    /// The published status of a store.
    ///
    /// # Errors
    /// [`Error::NoSuchStore`].
    pub fn store(&self, name: &str) -> Result<StatusCell, Error> {
        let registry = self.registry.read().unwrap_or_else(PoisonError::into_inner);
        registry.by_name.get(name).cloned().ok_or_else(|| Error::NoSuchStore(name.to_owned()))
    }

    /// The published status of the store with a real store dir.
    ///
    /// # Errors
    /// [`Error::NoStoreAtPath`].
    pub fn store_at(&self, real_store_dir: &str) -> Result<StatusCell, Error> {
        let registry = self.registry.read().unwrap_or_else(PoisonError::into_inner);
        let path = real_store_dir.trim_end_matches('/');
        let name = registry.by_path.get(path).ok_or_else(|| Error::NoStoreAtPath(real_store_dir.to_owned()))?;
        registry.by_name.get(name).cloned().ok_or_else(|| Error::NoStoreAtPath(real_store_dir.to_owned()))
    }

    /// Whether a user owns a store.
    pub fn is_owner(&self, uid: u32) -> bool {
        self.stores().iter().any(|cell| cell.read(|status| status.owner_uid == uid))
    }

    /// Sends a command and awaits its answer.
    ///
    /// # Errors
    /// Whatever the engine answers; [`Error::ShuttingDown`] when it is gone.
    pub async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| Error::ShuttingDown)?;
        answer.await.map_err(|_| Error::ShuttingDown)?
    }
}

/// What an operation brought.
enum Done {
    Up(Result<Up, OperationError>),
    Stopped(Result<(), OperationError>),
    SwapFinished(Result<(), OperationError>),
    Released(Result<(), OperationError>, Release),
    Refreshed(Result<Report, OperationError>),
    Retired(OldSuperblock),
    Verified(Result<Vec<Stale>, OperationError>),
}

/// Why something is undone.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Release {
    Forget,
    Respecify,
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
        Ok((engine, Handle { commands: sender, registry }))
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
        tokio::pin!(stop);
        loop {
            let deadline = self.deadline();
            tokio::select! {
                () = &mut stop => break,
                _ = tick.tick() => alive(),
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
        self.look_at.get_or_insert_with(|| Instant::now() + gather);
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

    fn command(&mut self, command: Command) {
        match command {
            Command::Start(name, reply) => self.command_start(&name, reply),
            Command::Stop(name, reply) => self.command_stop(&name, reply),
            Command::Remount(name, reply) => {
                let Some(entry) = self.entries.get_mut(&name) else { return no_such_store(&name, reply) };
                // Nix cannot try again: whoever asks while the store comes up waits until it has.
                if entry.phase == Phase::Active || entry.is_coming_up() {
                    entry.remounting.push(reply);
                    self.refresh(&name);
                } else {
                    let _ = reply.send(Err(entry.not_active()));
                }
            }
            Command::Verify(name, reply) => {
                let Some(entry) = self.entries.get_mut(&name) else { return no_such_store(&name, reply) };
                if entry.phase == Phase::Active {
                    entry.verifying.push(reply);
                    let spec = Arc::clone(&entry.spec);
                    self.operations.spawn(async move { (name, Done::Verified(operation::verify(spec).await)) });
                } else {
                    let _ = reply.send(Err(entry.not_active()));
                }
            }
            Command::Reload(reply) => {
                self.reload_waiting.push(reply);
                if self.loading.is_empty() {
                    let Settings { config, defaults, .. } = self.settings.clone();
                    self.loading.spawn_blocking(move || config::load(&config, &defaults));
                }
            }
        }
    }

    fn command_start(&mut self, name: &StoreName, reply: Reply) {
        if !self.entries.contains_key(name) {
            return no_such_store(name, reply);
        }
        // As systemd does it: what a store requires is started with it.
        let mut next = Some(name.clone());
        while let Some(entry) = next.and_then(|name| self.entries.get_mut(&name)) {
            if entry.want == Want::Gone {
                break;
            }
            if entry.phase != Phase::Active {
                entry.want(Want::Up);
                if entry.op.is_none() {
                    entry.phase = Phase::Inactive;
                }
            }
            entry.want = Want::Up;
            next = entry.spec.lower_name().cloned();
        }
        if let Some(entry) = self.entries.get_mut(name) {
            entry.starting.push(reply);
        }
        self.reconcile();
    }

    fn command_stop(&mut self, name: &StoreName, reply: Reply) {
        let carried = self.on_top_of(name);
        let Some(entry) = self.entries.get_mut(name) else { return no_such_store(name, reply) };
        if carried.is_empty() {
            entry.want(if entry.declared { Want::Down } else { Want::Gone });
            entry.stopping.push(reply);
            self.reconcile();
        } else {
            let carried = carried.iter().map(ToString::to_string).collect();
            let _ = reply.send(Err(Error::LowerOf(name.clone(), carried)));
        }
    }

    /// The stores that lie on a store and are mounted or on their way up.
    fn on_top_of(&self, name: &StoreName) -> Vec<StoreName> {
        self.entries
            .values()
            .filter(|entry| entry.spec.lower_name() == Some(name))
            .filter(|entry| entry.mount != MountState::Absent || entry.op.is_some() || entry.phase == Phase::Active)
            .map(|entry| entry.spec.name.clone())
            .collect()
    }

    fn loaded(&mut self, loaded: Result<Result<Config, config::ConfigError>, tokio::task::JoinError>) {
        match loaded {
            Ok(Ok(config)) => {
                tracing::info!(
                    stores = config.stores.len(),
                    "configuration reloaded: {} stores declared",
                    config.stores.len()
                );
                self.apply(config);
                self.reload_applied.append(&mut self.reload_waiting);
                self.settling = true;
                self.reconcile();
            }
            Ok(Err(error)) => self.reload_failed(&error.to_string()),
            Err(error) => self.reload_failed(&error.to_string()),
        }
    }

    fn reload_failed(&mut self, why: &str) {
        tracing::error!("the configuration was not changed:\n{why}");
        let error = Error::InvalidConfiguration(why.to_owned());
        answer(std::mem::take(&mut self.reload_waiting), &Err(error));
    }

    /// Turns a configuration into what is wanted of each store.
    fn apply(&mut self, config: Config) {
        for entry in self.entries.values_mut() {
            if !config.stores.iter().any(|spec| spec.name == entry.spec.name) && entry.declared {
                tracing::info!(store = %entry.spec.name, "{}: no longer declared", entry.spec.name);
                entry.declared = false;
                entry.next = None;
                entry.want(Want::Gone);
            }
        }
        for spec in config.stores {
            let Some(entry) = self.entries.get_mut(&spec.name) else {
                self.add(spec, true);
                continue;
            };
            if !entry.declared {
                entry.declared = true;
                entry.want(if spec.autostart { Want::Up } else { Want::Down });
            }
            if entry.spec.needs_restart_for(&spec) {
                entry.next = Some(Arc::new(spec));
                entry.try_again();
            } else {
                if entry.next.take().is_some() {
                    entry.clear(&[Problem::Busy]);
                }
                if *entry.spec != spec {
                    entry.spec = Arc::new(spec);
                }
            }
            // Whoever reloads has most likely changed something that was in the way.
            if matches!(entry.phase, Phase::Failed { .. }) {
                entry.want(entry.want);
            }
        }
    }

    fn add(&mut self, spec: StoreSpec, declared: bool) {
        let entry = Entry::new(spec, declared);
        let name = entry.spec.name.clone();
        let _ = self.events.send(Event::Added(entry.cell.clone()));
        self.register(&entry);
        self.entries.insert(name, entry);
    }

    fn register(&self, entry: &Entry) {
        let mut registry = self.registry.write().unwrap_or_else(PoisonError::into_inner);
        let name = &entry.spec.name;
        registry.by_path.retain(|_, of| of != name);
        registry.by_path.insert(entry.spec.layers.merged.to_string(), name.clone());
        registry.by_name.insert(name.clone(), entry.cell.clone());
    }

    /// Looks at the mount table, plans for every store that nothing is being done about, and begins what is planned.
    fn reconcile(&mut self) {
        let now = Instant::now();
        // Interest follows the entries; with none there is nothing to read.
        let registry = Arc::clone(&self.registry);
        let registry = registry.read().unwrap_or_else(PoisonError::into_inner);
        match self.mounts.read(|point| registry.by_path.contains_key(point)) {
            Ok(table) => {
                for entry in self.entries.values_mut() {
                    entry.mount = table.state(&entry.spec.layers);
                    entry.look_at_mount();
                }
            }
            Err(error) => tracing::error!("the mount table cannot be read: {error}"),
        }
        drop(registry);
        self.confirm(now);
        for name in self.entries.keys().cloned().collect::<Vec<_>>() {
            // Planning for one store can take several steps, and none of them more than once.
            for _ in 0..4 {
                if !self.step(&name, now) {
                    break;
                }
            }
        }
        self.publish_all();
        self.check_settled();
    }

    /// Lets what operations have brought count, now that the mount table was read.
    fn confirm(&mut self, now: Instant) {
        let confirmable = |entry: &&mut Entry| entry.unconfirmed.is_some();
        let mut confirmed = Vec::new();
        for entry in self.entries.values_mut().filter(confirmable) {
            let adopted = entry.op.take() == Some(Op::Adopt);
            let Some(up) = entry.unconfirmed.take() else { continue };
            let shown = match &entry.mount {
                MountState::Mounted { .. } => {
                    confirmed.push((entry.spec.name.clone(), up, adopted));
                    continue;
                }
                MountState::Absent => "nothing there",
                MountState::Covered { by: what } | MountState::Foreign { what } => what,
            };
            let reason = format!("the mount unit is up, but the mount table shows {shown}");
            entry.fail(Problem::StartFailed, reason);
            entry.retry_later(now);
        }
        for (name, up, adopted) in confirmed {
            self.is_up(&name, up, adopted);
            self.refresh_if_asked(&name);
        }
    }

    /// Carries out the next action for a store. Whether there may be another one.
    fn step(&mut self, name: &StoreName, now: Instant) -> bool {
        let Some(entry) = self.entries.get(name) else { return false };
        // A refresh may be in flight while the mount is lost; what comes of it does not matter then.
        if entry.op.is_some() {
            return false;
        }
        let lower = if entry.phase != Phase::Active && self.is_occupied(entry) {
            Lower::Pending
        } else {
            entry.spec.lower_name().map_or(Lower::Ready, |lower| self.lower_state(lower))
        };
        let goes_down = entry.want != Want::Up || entry.next.is_some();
        let carries = goes_down && !self.on_top_of(name).is_empty();
        let Some(entry) = self.entries.get_mut(name) else { return false };
        let view = View {
            want: entry.want,
            lower,
            respecify: entry.next.is_some(),
            carries,
            ours: !(goes_down || lower == Lower::Leaving) || is_transient(&entry.spec.mount_unit),
            repair: entry.may_repair(now),
            retry: entry.retry,
            phase: &entry.phase,
            mount: &entry.mount,
        };
        let action = plan(&view);
        if action != Action::Rest {
            tracing::debug!(store = %name, "{name}: planned: {action:?}");
        }
        match action {
            Action::Rest => {
                self.rested(name);
                false
            }
            Action::Settle => {
                entry.down();
                true
            }
            Action::Fail(failure) => {
                entry.give_up(failure);
                true
            }
            Action::Start { repair } => {
                if repair {
                    tracing::warn!(store = %name, "{name}: its mount is gone and is made again");
                    entry.repaired(now);
                }
                let (tools, spec, lock) = (self.tools.clone(), Arc::clone(&entry.spec), entry.lock.take());
                self.spawn(name, Op::Start, async move { Done::Up(operation::start(tools, spec, lock).await) });
                false
            }
            Action::Adopt => {
                let (tools, spec, locked) = (self.tools.clone(), Arc::clone(&entry.spec), entry.lock.is_some());
                self.spawn(name, Op::Adopt, async move { Done::Up(operation::adopt(tools, spec, locked).await) });
                false
            }
            Action::Stop => {
                let (tools, spec) = (self.tools.clone(), Arc::clone(&entry.spec));
                self.spawn(name, Op::Stop, async move { Done::Stopped(operation::stop(tools, spec).await) });
                false
            }
            Action::FinishSwap => {
                let spec = Arc::clone(&entry.spec);
                let work = async move { Done::SwapFinished(operation::finish_swap(spec).await) };
                self.spawn(name, Op::FinishSwap, work);
                false
            }
            Action::Respecify => {
                self.release(name, Release::Respecify);
                false
            }
            Action::Forget => {
                self.release(name, Release::Forget);
                false
            }
        }
    }

    fn release(&mut self, name: &StoreName, why: Release) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        entry.lock = None;
        let (tools, spec) = (self.tools.clone(), Arc::clone(&entry.spec));
        self.spawn(name, Op::Release, async move {
            Done::Released(operation::release(tools, spec, why == Release::Forget).await, why)
        });
    }

    fn spawn(&mut self, name: &StoreName, op: Op, work: impl Future<Output = Done> + Send + 'static) {
        if let Some(entry) = self.entries.get_mut(name) {
            entry.op = Some(op);
            let name = name.clone();
            self.operations.spawn(async move { (name, work.await) });
        }
    }

    /// Whether another store that is on its way down still has one of a store's directories: it was given another name.
    fn is_occupied(&self, entry: &Entry) -> bool {
        let is_leaving = |other: &&Entry| other.want == Want::Gone || other.next.is_some();
        self.entries
            .values()
            .filter(is_leaving)
            .any(|other| other.spec.name != entry.spec.name && other.spec.shares_directories_with(&entry.spec))
    }

    fn lower_state(&self, lower: &StoreName) -> Lower {
        match self.entries.get(lower) {
            Some(entry) if entry.next.is_some() => Lower::Leaving,
            Some(entry) if entry.phase == Phase::Active => Lower::Ready,
            Some(entry) if entry.want == Want::Up && !matches!(entry.phase, Phase::Failed { .. }) => Lower::Pending,
            Some(entry) if entry.op.is_some() => Lower::Pending,
            _ => Lower::Unavailable,
        }
    }

    /// Answers those who wait for a store to come to rest.
    fn rested(&mut self, name: &StoreName) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        match &entry.phase {
            Phase::Active => answer(std::mem::take(&mut entry.starting), &Ok(())),
            Phase::Failed { .. } => {
                let reason = entry.reason.clone();
                let not_active = Err(entry.not_active());
                answer(std::mem::take(&mut entry.remounting), &not_active);
                let failed = Err(Error::StartFailed(name.clone(), reason.clone()));
                answer(std::mem::take(&mut entry.starting), &failed);
                let asked = std::mem::take(&mut entry.stopping);
                if !asked.is_empty() && entry.want == Want::Down {
                    // A stop that is refused has no effect, now or later.
                    entry.want(Want::Up);
                    self.look_at.get_or_insert(Instant::now());
                }
                answer(asked, &Err(Error::Busy(name.clone(), reason)));
            }
            Phase::Inactive if entry.want != Want::Up => {
                let not_active = Err(entry.not_active());
                answer(std::mem::take(&mut entry.remounting), &not_active);
                answer(std::mem::take(&mut entry.stopping), &Ok(()));
            }
            Phase::Inactive => {}
        }
    }

    /// Takes what an operation brought.
    fn done(&mut self, name: &StoreName, done: Done) {
        let now = Instant::now();
        if let Done::Retired(old) = done {
            if old == OldSuperblock::StillWritten {
                tracing::warn!(store = %name, "{name}: a process goes on writing through the mount that was swapped out");
            }
            return;
        }
        let Some(entry) = self.entries.get_mut(name) else { return };
        if let Done::Verified(result) = done {
            let result = result.map_err(|error| Error::RefreshFailed(name.clone(), error.to_string()));
            answer(std::mem::take(&mut entry.verifying), &result);
            return;
        }
        if let Done::Up(Ok(up)) = done {
            entry.unconfirmed = Some(up);
            self.look_soon();
            return;
        }
        entry.op = None;
        let refreshed = matches!(done, Done::Refreshed(_));
        match done {
            Done::Up(Err(error)) => {
                entry.fail(Problem::StartFailed, error.to_string());
                entry.retry_later(now);
                let failed = Err(Error::StartFailed(name.clone(), error.to_string()));
                answer(std::mem::take(&mut entry.starting), &failed);
            }
            Done::Stopped(Ok(())) => {
                tracing::info!(store = %name, "{name}: stopped");
                entry.down();
            }
            Done::Stopped(Err(error)) => self.is_busy(name, &error.to_string()),
            Done::SwapFinished(Ok(())) => {
                tracing::info!(store = %name, "{name}: a swap that was interrupted is finished");
                entry.owed.demand(Changes::unknown(), Rung::Probe, now);
            }
            Done::SwapFinished(Err(error)) => {
                entry.fail(Problem::RefreshFailed, error.to_string());
                entry.retry_later(now);
            }
            Done::Released(result, why) => self.is_released(name, result, why),
            Done::Refreshed(Ok(report)) => self.is_refreshed(name, report),
            Done::Refreshed(Err(error)) => {
                let message = error.to_string();
                let changes = std::mem::take(&mut entry.paying);
                entry.owed.demand(changes, Rung::Reconfigure, now + STALE_RETRY);
                entry.problem(Problem::RefreshFailed, message.clone());
                let failed = Err(Error::RefreshFailed(name.clone(), message));
                answer(std::mem::take(&mut entry.refreshing), &failed);
            }
            Done::Up(Ok(_)) | Done::Verified(_) | Done::Retired(_) => {}
        }
        self.publish(name);
        self.refresh_if_asked(name);
        // A refresh does not change what the mount table says of a store.
        if !refreshed {
            self.look_soon();
        }
    }

    fn is_up(&mut self, name: &StoreName, up: Up, adopted: bool) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        let how = if adopted { "adopted" } else { "mounted" };
        tracing::info!(store = %name, adopted, "{name}: active, {how} at {}", entry.spec.layers.merged);
        entry.up();
        if let Some(lock) = up.lock {
            entry.lock = Some(lock);
        }
        entry.owner_uid = up.owner_uid;
        if !up.changes.is_empty() {
            entry.owed.demand(up.changes, Rung::Probe, Instant::now());
        }
        match up.unwatched {
            Some(error) => {
                let message = format!("{error}; until then it is refreshed only when the hook asks for it");
                entry.problem(Problem::Unwatched, message);
            }
            None => entry.clear(&[Problem::Unwatched]),
        }
        for above in self.entries.values_mut().filter(|entry| entry.spec.lower_name() == Some(name)) {
            above.try_again();
        }
    }

    fn is_busy(&mut self, name: &StoreName, why: &str) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        let asked = std::mem::take(&mut entry.stopping);
        if !asked.is_empty() && entry.want == Want::Down {
            // All or nothing: it stays up and looked after.
            entry.want(Want::Up);
        } else {
            entry.retry_later(Instant::now());
            entry.problem(Problem::Busy, format!("it should be down and stays mounted: {why}; it is tried again"));
        }
        answer(asked, &Err(Error::Busy(name.clone(), why.to_owned())));
    }

    fn is_released(&mut self, name: &StoreName, result: Result<(), OperationError>, why: Release) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        if let Err(error) = result {
            // The mount point keeps its attribute; a note is all there is to do about it.
            tracing::warn!(store = %name, "{name}: the mount point was not given back: {error}");
        }
        match why {
            Release::Respecify => {
                if let Some(next) = entry.next.take() {
                    entry.spec = next;
                }
                entry.down();
                entry.try_again();
                let entry = &self.entries[name];
                self.register(entry);
            }
            // Declared again in the meantime: it stays.
            Release::Forget if entry.want != Want::Gone => entry.down(),
            Release::Forget => {
                answer(std::mem::take(&mut entry.stopping), &Ok(()));
                entry.answer_all(&Error::NoSuchStore(name.to_string()));
                tracing::info!(store = %name, "{name}: forgotten; its data stays in {}", entry.spec.layers.upper);
                self.entries.remove(name);
                let mut registry = self.registry.write().unwrap_or_else(PoisonError::into_inner);
                registry.by_name.remove(name);
                registry.by_path.retain(|_, of| of != name);
                let _ = self.events.send(Event::Removed(name.clone()));
            }
        }
    }

    /// Serves those who have asked while something else was being done.
    fn refresh_if_asked(&mut self, name: &StoreName) {
        if self.entries.get(name).is_some_and(|entry| !entry.remounting.is_empty()) {
            self.refresh(name);
        }
    }

    /// Begins the refresh that is owed or asked for, if nothing else is being done about the store.
    fn refresh(&mut self, name: &StoreName) {
        // What was changed before the command came is in the queue by now, and counts.
        self.drain_watches();
        let Some(entry) = self.entries.get_mut(name) else { return };
        if entry.op.is_some() || entry.phase != Phase::Active {
            return;
        }
        let (changes, owed) = entry.owed.take();
        let asked = if entry.remounting.is_empty() { Rung::Probe } else { Rung::Reconfigure };
        entry.refreshing.append(&mut entry.remounting);
        entry.paying = changes.clone();
        let (tools, spec, kept) = (self.tools.clone(), Arc::clone(&entry.spec), entry.fingerprint);
        self.spawn(name, Op::Refresh, async move {
            Done::Refreshed(operation::refresh(tools, spec, changes, owed.max(asked), kept).await)
        });
    }

    fn is_refreshed(&mut self, name: &StoreName, report: Report) {
        let now = Instant::now();
        let Some(entry) = self.entries.get_mut(name) else { return };
        let changes = std::mem::take(&mut entry.paying);
        // Whoever waits is answered before anything is logged or published: it is Nix that waits.
        let asked = std::mem::take(&mut entry.refreshing);
        entry.clear(&[Problem::RefreshFailed]);
        if report.still_stale.is_empty() {
            answer(asked, &Ok(()));
            entry.fingerprint = Some(report.fingerprint);
            entry.clear(&[Problem::Stale]);
        } else {
            let names = report.still_stale.iter().map(|stale| stale.name.clone()).collect();
            entry.owed.demand(Changes { names, unknown: false }, Rung::Probe, now + STALE_RETRY);
            let named: Vec<_> = report.still_stale.iter().take(NAMED_STALE).map(ToString::to_string).collect();
            let message = format!("{} of its paths: {}", report.still_stale.len(), named.join("; "));
            answer(asked, &Err(Error::Stale(name.clone(), message.clone())));
            entry.problem(Problem::Stale, message);
        }
        let (how, above) = match report.outcome {
            Outcome::Current => return,
            Outcome::Reconfigured => ("reconfigured", Rung::Reconfigure),
            Outcome::Swapped => ("swapped", Rung::Swap),
        };
        entry.refresh_count += 1;
        entry.last_refresh = how;
        entry.last_refresh_usec = realtime_usec();
        tracing::info!(store = %name, refresh = how, probed = report.probed, "{name}: {how} (paths probed: {})", report.probed);
        if let Some(old) = report.old {
            entry.swap_count += 1;
            let (name, spec) = (name.clone(), Arc::clone(&entry.spec));
            self.operations.spawn(async move { (name, Done::Retired(operation::retire(old, spec).await)) });
        }
        // What lies on top has looked at the old view, and after a swap refers to the old superblock.
        for entry in self.entries.values_mut().filter(|entry| entry.spec.lower_name() == Some(name)) {
            entry.owed.demand(changes.clone(), above, now);
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

fn no_such_store<T>(name: &StoreName, reply: Reply<T>) {
    let _ = reply.send(Err(Error::NoSuchStore(name.to_string())));
}

fn realtime_usec() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_micros()).unwrap_or(u64::MAX)
}
