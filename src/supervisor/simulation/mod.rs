//! The engine on a simulated machine, driven through orders of events that no real machine would show.
//!
//! Time is simulated as well (tokio's paused clock): what takes half an hour takes a millisecond. A daemon can be killed between
//! any two steps of anything, and the next one finds the machine as it was left.
//!
//! `src/bus/tests` puts the D-Bus API on top of it.

mod check;
mod machine;
mod named;
mod operations;
pub(crate) mod properties;
mod world;

use std::{
    fmt::Write as _,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use layered_stores_model::{StoreName, StoreSpec};
use layered_stores_overlay::mountinfo::MountState;
use machine::Simulated;
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::Instant,
};
use world::{NAMES, STATE_DIR, World};

use super::{
    Asker, Caller, Command, Engine, Error, Event as News, Handle, JobCommand, JobNews, Kind, Problem, State, Status,
    entry::Reply,
};
use crate::systemd::SocketState;

/// The user who owns all stores.
pub(crate) const OWNER: u32 = 1000;

/// Whoever asks for something is answered by then, whatever hangs: a start has to wait for the store underneath, which may have
/// to be given up on first.
const PATIENCE: Duration = Duration::from_secs(60);

/// By then everything has come to rest that can: what failed is tried again after a quarter of an hour at the latest.
const REST: Duration = Duration::from_secs(40 * 60);

/// How a store is declared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Declared {
    pub(crate) there: bool,
    pub(crate) autostart: bool,
    /// With another mount option, which takes a restart of the store.
    pub(crate) noatime: bool,
    /// With a Nix daemon.
    pub(crate) daemon: bool,
    /// At another root.
    pub(crate) moved: bool,
}

/// Something that befalls the daemon or its machine. Numbers are those of stores.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    Start(usize),
    Stop(usize),
    Remount(usize, Asker),
    Verify(usize),
    RemoveData(usize),
    Reload([Declared; 3]),
    /// Mistakes are written into the file of the configuration, or corrected.
    Mistake(bool),
    /// A name of a layer changes: whether only a swap helps, and whether the daemon is told.
    Change(usize, u8, bool, bool),
    /// Somebody takes a store's mount away.
    Unmount(usize),
    /// Somebody mounts something else at a store's place.
    MountForeign(usize),
    /// And takes it away again.
    UnmountForeign(usize),
    /// Somebody mounts the store by hand.
    MountByHand(usize),
    Hang(usize),
    GoOn(usize),
    /// What is done next about a store fails so often.
    Fail(usize, u32),
    /// Whether somebody has files of it open.
    Use(usize, bool),
    Left(usize, usize),
    Full(usize, bool),
    /// Files of valid paths of a store are nowhere, or there again.
    Lose(usize, bool),
    /// Whether with another declaration a store would not come up.
    CannotChange(usize, bool),
    /// The filesystem of the configuration, or of the records, does not answer, or does again.
    HangConfiguration(bool),
    HangRecords(bool),
    SocketFails(usize),
    /// The daemon is killed, and started again.
    Kill,
    /// It is stopped as it should be, and started again.
    Restart,
    Wait(Duration),
}

pub(crate) fn name(number: usize) -> StoreName {
    NAMES[number].parse().expect("valid")
}

/// A machine on which nothing happens.
pub(in crate::supervisor) fn machine() -> impl super::machine::Machine {
    Simulated(World::new(0, true))
}

/// Whether a store is said to have a problem.
fn has(status: &Status, problem: Problem) -> bool {
    status.problems.iter().any(|(is, _)| *is == problem)
}

/// The text of a configuration.
fn configuration(declared: &[Declared; 3]) -> String {
    let mut text = String::new();
    for (number, store) in declared.iter().enumerate().filter(|(_, store)| store.there) {
        // One that lies on a store that is not declared would be a mistake.
        let lower = if number == 2 && declared[0].there { "layered:a" } else { "/lower" };
        let _ =
            write!(text, "[stores.{}]\nlower-store = \"{lower}\"\nautostart = {}\n", NAMES[number], store.autostart);
        if store.moved {
            let _ = writeln!(text, "root = \"/elsewhere/{}\"", NAMES[number]);
        }
        if store.noatime {
            text.push_str("mount-options = [\"noatime\"]\n");
        }
        if number == 1 {
            text.push_str("required = false\n");
        }
        if store.daemon {
            let _ = writeln!(text, "[stores.{}.daemon]", NAMES[number]);
        }
    }
    text
}

/// A daemon that runs on the simulated machine.
struct Daemon {
    handle: Handle,
    engine: JoinHandle<std::io::Result<()>>,
    stop: oneshot::Sender<()>,
    /// When it has said last that it is alive.
    alive: Arc<Mutex<Instant>>,
}

/// How often it has to say so, or the watchdog ends it.
const WATCHDOG: Duration = Duration::from_secs(30);

/// Somebody who has asked for something.
struct Waiter {
    what: String,
    since: Instant,
    answer: JoinHandle<Result<(), Error>>,
}

/// The machine, its daemon, and everybody else.
pub(crate) struct Play {
    world: Arc<World>,
    daemon: Daemon,
    waiters: Vec<Waiter>,
    tell: Tell,
    /// What is declared may not be what was read last.
    had_mistakes: bool,
}

/// Takes the news of a daemon that begins.
pub(crate) type Tell = Box<dyn Fn(Handle, mpsc::UnboundedReceiver<News>)>;

impl Play {
    pub(crate) async fn begin(seed: u64, can_swap: bool, declared: &[Declared; 3], tell: Tell) -> Self {
        let world = World::new(seed, can_swap);
        world.lock().configuration = configuration(declared);
        let daemon = Daemon::start(&world, &tell).await;
        Self { world, daemon, waiters: Vec::new(), tell, had_mistakes: false }
    }

    /// Writes a configuration that is not read before somebody asks for that.
    pub(crate) fn declare(&self, declared: &[Declared; 3]) {
        self.world.lock().configuration = configuration(declared);
    }

    /// The way to the daemon that runs.
    pub(crate) fn handle(&self) -> &Handle {
        &self.daemon.handle
    }

    fn ask<T: Send + 'static>(&mut self, what: String, command: impl FnOnce(Reply<T>) -> Command + Send + 'static) {
        let handle = self.daemon.handle.clone();
        let answer = tokio::spawn(async move { handle.ask(command).await.map(drop) });
        self.waiters.push(Waiter { what, since: Instant::now(), answer });
    }

    fn verify(&mut self, of: usize) {
        let handle = self.daemon.handle.clone();
        let caller = Caller { name: ":1.7".to_owned(), uid: 0 };
        let answer = tokio::spawn(async move {
            let verify = |reply| Command::Job(JobCommand::Ask(Kind::Verify, name(of), caller.clone(), reply));
            let asked = handle.ask(verify).await?;
            let result = |reply| Command::Job(JobCommand::Result(asked.job.id(), caller, reply));
            match handle.ask(result).await {
                // It was over, and this caller has read it as another asker.
                Err(Error::NoSuchJob(_)) => Ok(()),
                result => result.map(drop),
            }
        });
        self.waiters.push(Waiter { what: format!("verify {of}"), since: Instant::now(), answer });
    }

    /// The configured specification of a store.
    pub(crate) fn spec(&self, name: &StoreName) -> Option<StoreSpec> {
        self.world.lock().config().stores.into_iter().find(|spec| spec.name == *name)
    }

    /// The specification with which a store is or was last up.
    fn spec_in_force(&self, name: &StoreName) -> Option<StoreSpec> {
        let recorded = self.world.lock().store(name).record.as_deref().cloned();
        recorded.or_else(|| self.spec(name))
    }

    pub(crate) async fn befall(&mut self, event: Event) {
        let world = Arc::clone(&self.world);
        match event {
            Event::Start(of) => self.ask(format!("start {of}"), move |reply| Command::Start(name(of), reply)),
            Event::Stop(of) => self.ask(format!("stop {of}"), move |reply| Command::Stop(name(of), reply)),
            Event::Remount(of, asker) => {
                self.ask(format!("remount {of} for {asker:?}"), move |reply| Command::Remount(name(of), asker, reply));
            }
            Event::Verify(of) => self.verify(of),
            Event::RemoveData(of) => {
                world.lock().store(&name(of)).may_be_emptied = true;
                self.ask(format!("remove-data {of}"), move |reply| Command::RemoveData(name(of), reply));
            }
            Event::Reload(declared) => {
                self.declare(&declared);
                self.ask("reload".to_owned(), Command::Reload);
            }
            Event::Mistake(is_there) => {
                self.had_mistakes |= is_there;
                let text = format!("{}[stores.a.b]\n", world.lock().configuration);
                world.lock().mistaken = is_there.then_some(text);
            }
            Event::Change(of, path, needs_swap, is_seen) => {
                let path = format!("path-{path}");
                let mut world = world.lock();
                world.change(&name(of), &path, needs_swap, is_seen);
                let is_on_it = |spec: &StoreSpec| spec.lower_name() == Some(&name(of));
                if let Some(above) = world.in_force().into_iter().find(is_on_it) {
                    // Its lower store is a merged directory, of which no watch tells what its layers have got.
                    let above = world.store(&above.name);
                    above.version += 1;
                    above.stale.insert(path.into(), needs_swap);
                    above.lost |= needs_swap && !is_seen;
                }
            }
            Event::Unmount(of) => {
                if let Some(spec) = self.spec_in_force(&name(of)) {
                    world.lock().unmount(spec.layers.merged.as_str(), |mount| mount.layers.is_some());
                }
            }
            Event::MountForeign(of) => {
                if let Some(spec) = self.spec_in_force(&name(of)) {
                    world.lock().mount(spec.layers.merged.as_str(), None);
                }
            }
            Event::UnmountForeign(of) => {
                if let Some(spec) = self.spec_in_force(&name(of)) {
                    world.lock().unmount(spec.layers.merged.as_str(), |mount| mount.layers.is_none());
                }
            }
            Event::MountByHand(of) => {
                if let Some(spec) = self.spec(&name(of)) {
                    let mut world = world.lock();
                    if world.state(&spec.layers) == MountState::Absent {
                        world.mount(spec.layers.merged.as_str(), Some(spec.layers.clone()));
                        let store = world.store(&name(of));
                        store.stale.clear();
                        (store.behind, store.lost) = (false, false);
                    }
                }
            }
            Event::Hang(of) => world.lock().store(&name(of)).hangs = true,
            Event::GoOn(of) => world.lock().store(&name(of)).hangs = false,
            Event::Fail(of, times) => world.lock().store(&name(of)).failures = times,
            Event::Use(of, is_used) => world.lock().store(&name(of)).in_use = is_used,
            Event::Left(of, left) => world.lock().store(&name(of)).left = left,
            Event::Full(of, is_full) => world.lock().store(&name(of)).full = is_full,
            Event::Lose(of, is_lost) => {
                world.lock().store(&name(of)).lacks = is_lost;
                world.contents_changed.notify_one();
            }
            Event::CannotChange(of, cannot) => world.lock().store(&name(of)).cannot_change = cannot,
            Event::HangConfiguration(hangs) => world.lock().configuration_hangs = hangs,
            Event::HangRecords(hangs) => world.lock().records_hang = hangs,
            Event::SocketFails(of) => {
                if let Some(socket) = world.lock().sockets.get_mut(&name(of)) {
                    *socket = SocketState::Failed("trigger-limit-hit".to_owned());
                }
                world.sockets_changed.notify_one();
            }
            Event::Kill => {
                self.daemon.engine.abort();
                let _ = (&mut self.daemon.engine).await;
                self.daemon = Daemon::start(&world, &self.tell).await;
            }
            Event::Restart => {
                let begun = Instant::now();
                let (stop, _) = oneshot::channel();
                let _ = std::mem::replace(&mut self.daemon.stop, stop).send(());
                let ended = (&mut self.daemon.engine).await;
                if !matches!(ended, Ok(Ok(()))) || begun.elapsed() > Duration::from_secs(3) {
                    world.blame(format!("the daemon ended with {ended:?} after {:?}", begun.elapsed()));
                }
                self.daemon = Daemon::start(&world, &self.tell).await;
            }
            Event::Wait(time) => tokio::time::sleep(time).await,
        }
        // Whoever waits for news of these looks at all of them.
        self.world.mounts_changed.notify_one();
        self.world.layers_changed.notify_one();
        self.world.goes_on.notify_waiters();
        self.look().await;
    }

    /// Looks whether something is wrong already.
    async fn look(&mut self) {
        tokio::task::yield_now().await;
        if self.daemon.engine.is_finished() {
            self.world.blame("the engine has ended".to_owned());
        }
        if self.daemon.alive.lock().unwrap_or_else(PoisonError::into_inner).elapsed() > WATCHDOG {
            self.world.blame("the watchdog has ended the daemon".to_owned());
        }
        self.waiters.retain(|waiter| !waiter.answer.is_finished());
        for waiter in self.waiters.iter().filter(|waiter| waiter.since.elapsed() > PATIENCE) {
            self.world.blame(format!("whoever asked for {} still waits", waiter.what));
        }
    }

    /// Has all that is in the way go away, and everything come to rest.
    pub(crate) async fn rest(&mut self) {
        for of in 0..NAMES.len() {
            let mut world = self.world.lock();
            let store = world.store(&name(of));
            (store.hangs, store.failures, store.in_use, store.left, store.full) = (false, 0, false, 0, false);
            store.cannot_change = false;
            world.mounts.retain(|mount| mount.layers.is_some());
        }
        (self.world.lock().configuration_hangs, self.world.lock().records_hang) = (false, false);
        if std::mem::take(&mut self.had_mistakes) {
            self.world.lock().mistaken = None;
            self.ask("reload".to_owned(), Command::Reload);
        }
        self.befall(Event::Wait(Duration::ZERO)).await;
        self.befall(Event::Wait(REST)).await;
        if let Some(waiter) = self.waiters.first() {
            self.world.blame(format!("whoever asked for {} waits for ever", waiter.what));
        }
    }

    fn status(&self, name: &StoreName) -> Option<Status> {
        self.daemon.handle.store(name.as_str()).ok().map(|cell| cell.get())
    }

    /// Has everybody start what is declared, and refresh it, after which all is as it should be.
    async fn put_right(&mut self) {
        for of in 0..NAMES.len() {
            if self.spec(&name(of)).is_some() {
                self.befall(Event::Start(of)).await;
                self.befall(Event::Wait(PATIENCE)).await;
                self.befall(Event::Remount(of, Asker::Root)).await;
                self.befall(Event::Wait(PATIENCE)).await;
            }
        }
        self.befall(Event::Wait(PATIENCE)).await;
        for of in 0..NAMES.len() {
            let name = name(of);
            let (Some(_), Some(status)) = (self.spec(&name), self.status(&name)) else { continue };
            let mut world = self.world.lock();
            let (can_swap, store) = (world.can_swap, world.store(&name));
            let is_right = store.stale.is_empty() && !store.behind || !can_swap;
            let text = format!("{name} is {} ({}) after all: {store:?}", status.state, status.state_reason);
            if (status.state != State::Active && !has(&status, Problem::NotOurs)) || !is_right {
                world.violations.push(text);
            }
        }
        self.check();
    }

    /// What must not have happened.
    pub(crate) fn violations(&self) -> Vec<String> {
        self.world.lock().violations.clone()
    }
}

impl Daemon {
    async fn start(world: &Arc<World>, tell: &Tell) -> Self {
        let (events, news) = mpsc::unbounded_channel();
        let state_dir = STATE_DIR.parse().expect("valid");
        let config = world.lock().config();
        let machine = Arc::new(Simulated(Arc::clone(world)));
        let (engine, handle) = Engine::on(machine, state_dir, config, events).await.expect("an engine");
        tell(handle.clone(), news);
        let (stop, stops) = oneshot::channel();
        let stops = async move {
            // Whoever drops the sender has something else in mind.
            if stops.await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let alive = Arc::new(Mutex::new(Instant::now()));
        let said = Arc::clone(&alive);
        let say = move || *said.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        Self { handle, engine: tokio::spawn(engine.run(stops, Some(WATCHDOG), say)), stop, alive }
    }
}

/// Tells nobody, and has askers of jobs go on as the bus does, once there is an object for the job.
fn tell_nobody(_: Handle, mut news: mpsc::UnboundedReceiver<News>) {
    tokio::spawn(async move {
        while let Some(news) = news.recv().await {
            if let News::Job(JobNews::Asked(asked, reply)) = news {
                let _ = reply.send(Ok(asked));
            }
        }
    });
}

/// Runs a test on one thread, with a clock that jumps to the next time at which there is something to do.
pub(crate) fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    runtime.expect("a runtime").block_on(test)
}

/// Plays events, and returns what must not have happened.
fn play(seed: u64, can_swap: bool, declared: &[Declared; 3], events: Vec<Event>) -> Vec<String> {
    run(async {
        let mut play = Play::begin(seed, can_swap, declared, Box::new(tell_nobody)).await;
        for event in events {
            play.befall(event).await;
        }
        play.rest().await;
        play.check();
        let before = play.come_to();
        play.befall(Event::Kill).await;
        play.rest().await;
        play.check();
        let after = play.come_to();
        if before != after {
            play.world.blame(format!("{before:?} was {after:?} after a restart"));
        }
        play.put_right().await;
        play.violations()
    })
}
