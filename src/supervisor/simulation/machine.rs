//! The simulated machine, as the engine has it.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use layered_stores_model::{
    AbsolutePath, MountUnitName, StoreName, StoreSpec,
    config::{Config, ConfigError},
};
use layered_stores_nix_db::index::protocol::Contents;
use layered_stores_overlay::{
    mountinfo::MountTable,
    place::MountId,
    progress::{Progress, Spot},
    refresh::Changes,
    remove::RemoveError,
    swap::OldSuperblock,
};
use rustix::io::Errno;
use tokio::{
    sync::{mpsc::WeakSender, watch},
    time::Instant,
};

use super::{
    operations::{Doing, Old, Waits},
    world::{NAMES, STATE_DIR, Store, World, parse, text},
};
use crate::supervisor::{
    handle::Command,
    jobs::{Findings, Kind},
    leases::{Report, Stores},
    looks::{Look, Sight},
    machine::{Begun, Guard, Later, Machine, Operated, Refreshed, Refreshing, SwappedOut},
    operation::{Held, Up},
    owed::Aim,
    record::{Known, RecordError},
};

/// What one daemon has of the simulated machine.
#[derive(Debug)]
pub(super) struct Simulated(pub(super) Arc<World>);

impl Simulated {
    fn begin<T, F>(&self, spec: &Arc<StoreSpec>, work: impl FnOnce(Doing) -> F) -> Begun<T>
    where
        F: Future<Output = T> + Send + 'static,
    {
        let waits = Arc::<Waits>::default();
        let doing = Doing { world: Arc::clone(&self.0), spec: Arc::clone(spec), waits: Arc::clone(&waits) };
        Begun { progress: waits, result: Box::pin(work(doing)) }
    }
}

/// What is found in every store: figures of which no two are the same.
fn found(is_lost: bool) -> Report {
    let contents = Contents {
        upper_paths: 70,
        upper_size: 7000,
        shadowed_paths: 20,
        shadowed_size: 2000,
        lower_paths: 30,
        lost_paths: if is_lost { 3 } else { 0 },
        lost: Vec::new(),
    };
    Report { contents: Some(contents), leases: 50, unreadable: None, unleased: None }
}

impl Machine for Simulated {
    fn mounts(&self, is_of_interest: &dyn Fn(&str) -> bool) -> io::Result<MountTable> {
        let mut world = self.0.lock();
        world.seen = world.mounts.clone();
        Ok(MountTable::parse(&text(&world.seen), is_of_interest))
    }

    fn mounts_changed(&self) -> Later<'_, io::Result<()>> {
        Box::pin(async {
            self.0.mounts_changed.notified().await;
            Ok(())
        })
    }

    fn layers_changed(&self) -> Later<'_, io::Result<()>> {
        Box::pin(async {
            self.0.layers_changed.notified().await;
            Ok(())
        })
    }

    fn changes(&self) -> Result<(HashMap<StoreName, Changes>, bool), Errno> {
        let mut world = self.0.lock();
        let unread = world.stores.iter_mut().filter(|(_, store)| !store.unread.is_empty());
        Ok((unread.map(|(name, store)| (name.clone(), std::mem::take(&mut store.unread))).collect(), false))
    }

    fn changes_of(&self, name: &StoreName) -> Result<HashMap<StoreName, Changes>, Errno> {
        let changes = std::mem::take(&mut self.0.lock().store(name).unread);
        Ok(if changes.is_empty() { HashMap::new() } else { HashMap::from([(name.clone(), changes)]) })
    }

    fn attend(&self, mut stores: watch::Receiver<Stores>, engine: WeakSender<Command>) -> Later<'static, ()> {
        let world = Arc::clone(&self.0);
        Box::pin(async move {
            loop {
                let up = Arc::clone(&stores.borrow_and_update());
                for attended in &*up {
                    tokio::time::sleep(world.pause()).await;
                    let Some(engine) = engine.upgrade() else { return };
                    let is_lost = world.lock().store(&attended.spec.name).lacks;
                    let found = Command::Found(attended.spec.name.clone(), Box::new(found(is_lost)));
                    if engine.send(found).await.is_err() {
                        return;
                    }
                }
                tokio::select! {
                    changed = stores.changed() => if changed.is_err() { return },
                    () = world.contents_changed.notified() => {}
                }
            }
        })
    }

    fn watch_sockets(&self, engine: WeakSender<Command>) -> Later<'static, ()> {
        let world = Arc::clone(&self.0);
        Box::pin(async move {
            loop {
                world.sockets_changed.notified().await;
                // What happens at the same instant has happened before.
                tokio::time::sleep(Duration::from_millis(1)).await;
                let asked = Instant::now();
                tokio::time::sleep(world.pause()).await;
                let sockets = world.lock().sockets.clone();
                let Some(engine) = engine.upgrade() else {
                    // Its daemon was killed: this is for the next one.
                    world.sockets_changed.notify_one();
                    return;
                };
                if engine.send(Command::Sockets(asked, sockets)).await.is_err() {
                    return;
                }
            }
        })
    }

    fn look_at_sockets(&self) {
        self.0.sockets_changed.notify_one();
    }

    fn is_ours(&self, unit: &MountUnitName) -> bool {
        let mut world = self.0.lock();
        let config = world.config();
        let name = |spec: &StoreSpec| (spec.mount_unit == *unit).then(|| spec.name.clone());
        let recorded = world.stores.values().filter_map(|store| store.record.as_deref()).find_map(name);
        let declared = recorded.or_else(|| config.stores.iter().find_map(name));
        declared.is_some_and(|name| world.store(&name).unit)
    }

    fn can_swap(&self) -> bool {
        self.0.lock().can_swap
    }

    fn left(&self, name: &StoreName) -> usize {
        self.0.lock().store(name).left
    }

    fn mount_point_of(&self, _: &Path) -> Option<String> {
        Some("/".to_owned())
    }

    fn records(&self) -> PathBuf {
        PathBuf::from(STATE_DIR)
    }

    fn configuration(&self) -> Later<'static, Result<Config, ConfigError>> {
        let world = Arc::clone(&self.0);
        Box::pin(async move {
            tokio::time::sleep(world.pause()).await;
            while world.lock().configuration_hangs {
                world.goes_on.notified().await;
            }
            let world = world.lock();
            let read = world.mistaken.as_deref().map_or_else(|| Ok(world.config()), parse);
            read.map_err(|diagnostics| ConfigError::Invalid { path: PathBuf::from("/config.toml"), diagnostics })
        })
    }

    fn recall(&self, _: Vec<StoreSpec>) -> Later<'static, Result<Known, RecordError>> {
        let world = Arc::clone(&self.0);
        Box::pin(async move {
            tokio::time::sleep(world.pause()).await;
            while world.lock().records_hang {
                world.goes_on.notified().await;
            }
            let stores = world.lock().stores.values().filter_map(|store| store.record.clone()).collect();
            Ok(Known { stores, unreadable: Vec::new() })
        })
    }

    fn asked(&self) -> HashMap<StoreName, bool> {
        let asked = |(name, store): (&StoreName, &Store)| Some((name.clone(), store.asked?));
        self.0.lock().stores.iter().filter_map(asked).collect()
    }

    fn keep_asked(&self, name: &StoreName, up: Option<bool>) {
        self.0.lock().store(name).asked = up;
    }

    fn swapped_out(&self) -> Vec<(StoreName, Arc<dyn SwappedOut>)> {
        let kept = self.0.lock().kept.clone();
        let old = |number| Arc::new(Old { world: Arc::clone(&self.0), number }) as Arc<dyn SwappedOut>;
        kept.into_iter().map(|(name, number)| (name, old(number))).collect()
    }

    fn start(&self, spec: &Arc<StoreSpec>, lock: Option<Guard>) -> Operated<Up> {
        self.begin(spec, |doing| doing.start(lock))
    }

    fn look_ahead(&self, spec: &Arc<StoreSpec>) -> Operated<()> {
        self.begin(spec, Doing::look_ahead)
    }

    fn adopt(&self, spec: &Arc<StoreSpec>, locked: bool, _: bool) -> Operated<Up> {
        self.begin(spec, |doing| doing.adopt(locked))
    }

    fn hold(&self, spec: &Arc<StoreSpec>, locked: bool) -> Operated<Held> {
        self.begin(spec, |doing| doing.hold(locked))
    }

    fn serve(&self, spec: &Arc<StoreSpec>, _: Option<Arc<StoreSpec>>) -> Operated<()> {
        self.begin(spec, Doing::serve)
    }

    fn stop(&self, spec: &Arc<StoreSpec>) -> Operated<()> {
        self.begin(spec, Doing::stop)
    }

    fn finish_swap(&self, spec: &Arc<StoreSpec>) -> Operated<Arc<dyn SwappedOut>> {
        self.begin(spec, Doing::finish_swap)
    }

    fn release(&self, spec: &Arc<StoreSpec>, forget: bool) -> Operated<()> {
        self.begin(spec, |doing| doing.release(forget))
    }

    fn glance(&self, spec: &Arc<StoreSpec>, aim: Aim, _: Option<MountId>) -> Operated<bool> {
        self.begin(spec, |doing| doing.glance(aim))
    }

    fn refresh(&self, spec: &Arc<StoreSpec>, refreshing: Refreshing) -> Begun<Refreshed> {
        self.begin(spec, |doing| doing.refresh(refreshing))
    }

    fn retire(&self, spec: Option<&Arc<StoreSpec>>, old: Arc<dyn SwappedOut>) -> Operated<OldSuperblock> {
        match spec {
            Some(spec) => self.begin(spec, |doing| doing.retire(old)),
            None => Begun { progress: Arc::<Waits>::default(), result: Box::pin(async move { Ok(old.retire()?) }) },
        }
    }

    fn let_go(&self, name: &StoreName, number: u64) {
        let mut world = self.0.lock();
        if !world.retired.contains(&number) {
            world.violations.push(format!("{name}: what was swapped out and still takes writes is let go"));
        }
        world.kept.remove(&(name.clone(), number));
    }

    fn look(&self, look: Look, spec: &Arc<StoreSpec>, _: Option<Arc<StoreSpec>>) -> Operated<Sight> {
        self.begin(spec, |doing| doing.look_at(look))
    }

    fn work(
        &self,
        kind: Kind,
        spec: &Arc<StoreSpec>,
        _: Option<MountId>,
        progress: Arc<Progress>,
    ) -> Operated<Findings> {
        self.begin(spec, |doing| doing.work(kind, progress))
    }

    fn remove(&self, spec: &Arc<StoreSpec>, lock: Option<Guard>, _: Option<AbsolutePath>) -> Operated<()> {
        self.begin(spec, |doing| doing.remove(lock))
    }

    fn remove_left_over(&self, directory: AbsolutePath) -> Operated<()> {
        let (world, waits) = (Arc::clone(&self.0), Arc::<Waits>::default());
        let progress = Arc::clone(&waits);
        let result = Box::pin(async move {
            waits.at(Spot::Root);
            tokio::time::sleep(world.pause()).await;
            let name = NAMES.into_iter().find(|name| directory.as_path().ends_with(name));
            let Some(name) = name else { return Err(RemoveError::Nothing(directory).into()) };
            world.until_it_answers(&name.parse().expect("valid")).await;
            Ok(())
        });
        Begun { progress, result }
    }
}
