//! The machine that the daemon runs on.

use std::{
    collections::HashMap,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use layered_stores_model::{
    AbsolutePath, MountUnitName, StoreName, StoreSpec,
    config::{self, Config, ConfigError, Defaults, Keys},
};
use layered_stores_overlay::{
    host,
    left::Left,
    mountinfo::MountTable,
    place::MountId,
    progress::Progress,
    refresh::Changes,
    swap::{self, OldSuperblock, SafeKeeping as _},
    watch::Watches,
};
use rustix::io::Errno;
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{Notify, mpsc::WeakSender, watch},
};

use super::{Begun, Guard, Later, Machine, Operated, Refreshed, Refreshing, SwappedOut};
use crate::{
    supervisor::{
        handle::Command,
        jobs::{Findings, Kind},
        leases::{self, Stores},
        looks::{Look, Sight},
        mounts::MountMonitor,
        nix_daemon,
        operation::{self, Held, OperationError, Tools, Up},
        owed::Aim,
        record::{Known, RecordError, Records},
        threads::{Errand, Threads},
    },
    systemd::{self, FdStore, Units, mount_unit},
};

/// How long systemd is left alone that has not told how sockets are.
const ASK_AGAIN: Duration = Duration::from_secs(10);

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

/// The machine that the daemon runs on.
#[derive(Debug)]
pub struct Host {
    settings: Settings,
    tools: Tools,
    mounts: MountMonitor,
    /// Tells of changes of layers; made when the first is watched.
    layers: OnceLock<AsyncFd<OwnedFd>>,
    sockets_changed: Arc<Notify>,
}

impl Host {
    /// Opens what is needed of it.
    ///
    /// # Errors
    /// When the mount table cannot be read.
    pub async fn open(settings: Settings, units: Units) -> io::Result<Self> {
        let records = Records::new(settings.defaults.state_dir.as_path(), &settings.runtime_dir);
        let records = records.since(units.soft_reboots());
        let (watches, left) = (Arc::<Watches>::default(), Arc::<Left>::default());
        let tools = Tools { units, watches, left, records, threads: Threads::new().await? };
        Ok(Self {
            settings,
            tools,
            mounts: MountMonitor::open().await?,
            layers: OnceLock::new(),
            sockets_changed: Arc::default(),
        })
    }

    /// Where stores keep what the configuration gives no place of its own.
    pub(in crate::supervisor) fn state_dir(&self) -> &AbsolutePath {
        &self.settings.defaults.state_dir
    }

    fn begin<T, F>(&self, spec: &Arc<StoreSpec>, work: impl FnOnce(Tools, Errand) -> F) -> Begun<T>
    where
        F: Future<Output = T> + Send + 'static,
    {
        let errand = self.tools.threads.errand(Arc::clone(spec));
        Begun { progress: errand.progress.clone(), result: Box::pin(work(self.tools.clone(), errand)) }
    }
}

impl Machine for Host {
    fn mounts(&self, is_of_interest: &dyn Fn(&str) -> bool) -> io::Result<MountTable> {
        self.mounts.read(is_of_interest)
    }

    fn mounts_changed(&self) -> Later<'_, io::Result<()>> {
        Box::pin(self.mounts.changed())
    }

    fn layers_changed(&self) -> Later<'_, io::Result<()>> {
        Box::pin(async {
            let readiness = match (self.layers.get(), self.tools.watches.fd()) {
                (Some(readiness), _) => readiness,
                (None, Some(fd)) => {
                    let readiness = host::readiness(fd.try_clone_to_owned()?, Interest::READABLE)?;
                    self.layers.get_or_init(|| readiness)
                }
                // Whoever begins to watch is done with an operation, after which the engine asks again.
                (None, None) => return std::future::pending().await,
            };
            readiness.readable().await?.clear_ready();
            Ok(())
        })
    }

    fn changes(&self) -> Result<(HashMap<StoreName, Changes>, bool), Errno> {
        self.tools.watches.drain()
    }

    fn changes_of(&self, name: &StoreName) -> Result<HashMap<StoreName, Changes>, Errno> {
        self.tools.watches.drain_for(name)
    }

    fn attend(&self, stores: watch::Receiver<Stores>, engine: WeakSender<Command>) -> Later<'static, ()> {
        Box::pin(leases::keep(stores, self.tools.units.clone(), engine))
    }

    fn watch_sockets(&self, engine: WeakSender<Command>) -> Later<'static, ()> {
        Box::pin(watch_sockets(self.tools.units.clone(), Arc::clone(&self.sockets_changed), engine))
    }

    fn look_at_sockets(&self) {
        self.sockets_changed.notify_one();
    }

    fn is_ours(&self, unit: &MountUnitName) -> bool {
        mount_unit::is_ours(unit)
    }

    fn can_swap(&self) -> bool {
        swap::is_possible()
    }

    fn left(&self, name: &StoreName) -> usize {
        self.tools.left.count(name)
    }

    fn mount_point_of(&self, path: &Path) -> Option<String> {
        self.tools.threads.mount_point_of(path)
    }

    fn records(&self) -> PathBuf {
        self.tools.records.directory().to_owned()
    }

    fn configuration(&self) -> Later<'static, Result<Config, ConfigError>> {
        let Settings { config, defaults, .. } = self.settings.clone();
        blocking(move || config::load(&config, &defaults, Keys::Alone))
    }

    fn recall(&self, declared: Vec<StoreSpec>) -> Later<'static, Result<Known, RecordError>> {
        let records = self.tools.records.clone();
        blocking(move || records.known(&declared))
    }

    fn asked(&self) -> HashMap<StoreName, bool> {
        self.tools.records.asked()
    }

    fn keep_asked(&self, name: &StoreName, up: Option<bool>) {
        self.tools.records.keep_asked(name, up);
    }

    fn swapped_out(&self) -> Vec<(StoreName, Arc<dyn SwappedOut>)> {
        let left = systemd::left_over().into_iter();
        left.map(|(name, old)| (name, Arc::new(old) as Arc<dyn SwappedOut>)).collect()
    }

    fn start(&self, spec: &Arc<StoreSpec>, lock: Option<Guard>) -> Operated<Up> {
        self.begin(spec, |tools, errand| operation::start(tools, errand, lock))
    }

    fn look_ahead(&self, spec: &Arc<StoreSpec>) -> Operated<()> {
        self.begin(spec, operation::look_ahead)
    }

    fn adopt(&self, spec: &Arc<StoreSpec>, locked: bool, differ: bool) -> Operated<Up> {
        self.begin(spec, |tools, errand| operation::adopt(tools, errand, locked, differ))
    }

    fn hold(&self, spec: &Arc<StoreSpec>, locked: bool) -> Operated<Held> {
        self.begin(spec, |tools, errand| operation::hold(tools, errand, locked))
    }

    fn serve(&self, spec: &Arc<StoreSpec>, below: Option<Arc<StoreSpec>>) -> Operated<()> {
        self.begin(spec, |tools, errand| nix_daemon::serve(tools, errand, below))
    }

    fn stop(&self, spec: &Arc<StoreSpec>) -> Operated<()> {
        self.begin(spec, operation::stop)
    }

    fn finish_swap(&self, spec: &Arc<StoreSpec>) -> Operated<Arc<dyn SwappedOut>> {
        self.begin(spec, async move |_, errand| Ok(Arc::new(operation::finish_swap(errand).await?) as _))
    }

    fn release(&self, spec: &Arc<StoreSpec>, forget: bool) -> Operated<()> {
        self.begin(spec, |tools, errand| operation::release(tools, errand, forget))
    }

    fn glance(&self, spec: &Arc<StoreSpec>, aim: Aim, mount: Option<MountId>) -> Operated<bool> {
        self.begin(spec, |_, errand| operation::glance(errand, aim, mount))
    }

    fn refresh(&self, spec: &Arc<StoreSpec>, refreshing: Refreshing) -> Begun<Refreshed> {
        self.begin(spec, async move |tools, errand| match operation::refresh(tools, errand, refreshing).await {
            Ok((report, old)) => (report, old.map(|old| Arc::new(old) as _)),
            Err(error) => (Err(error), None),
        })
    }

    fn retire(&self, spec: Option<&Arc<StoreSpec>>, old: Arc<dyn SwappedOut>) -> Operated<OldSuperblock> {
        match spec {
            Some(spec) => self.begin(spec, |_, errand| operation::retire(errand, old)),
            None => Begun { progress: Arc::<Progress>::default(), result: Box::pin(operation::retire_unknown(old)) },
        }
    }

    fn let_go(&self, name: &StoreName, number: u64) {
        FdStore(name).let_go(number);
    }

    fn look(&self, look: Look, spec: &Arc<StoreSpec>, below: Option<Arc<StoreSpec>>) -> Operated<Sight> {
        self.begin(spec, |_, errand| operation::look_at(look, errand, below))
    }

    fn work(
        &self,
        kind: Kind,
        spec: &Arc<StoreSpec>,
        mount: Option<MountId>,
        progress: Arc<Progress>,
    ) -> Operated<Findings> {
        let errand = self.tools.threads.errand_with(Arc::clone(spec), Arc::clone(&progress));
        Begun { progress, result: Box::pin(operation::work(kind, errand, mount)) }
    }

    fn remove(&self, spec: &Arc<StoreSpec>, lock: Option<Guard>, own: Option<AbsolutePath>) -> Operated<()> {
        self.begin(spec, |tools, errand| operation::remove(tools, errand, lock, own))
    }

    fn remove_left_over(&self, directory: AbsolutePath) -> Operated<()> {
        let (records, progress) = (self.tools.records.clone(), Arc::<Progress>::default());
        let followed = Arc::clone(&progress);
        let remove = move || followed.follow(|| operation::remove_left_over(&records, &directory));
        let thread = tokio::task::spawn_blocking(remove);
        let result =
            Box::pin(async move { Ok(thread.await.map_err(|error| OperationError::Panic(error.to_string()))??) });
        Begun { progress, result }
    }
}

/// Does something on a thread. One that panics takes the engine with it, which may believe anything then.
fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Later<'static, T> {
    let thread = tokio::task::spawn_blocking(work);
    Box::pin(async move { thread.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic())) })
}

/// Tells the engine how sockets are, each time one has changed.
async fn watch_sockets(units: Units, changed: Arc<Notify>, engine: WeakSender<Command>) {
    let mut changes = match units.socket_changes(Arc::clone(&changed)).await {
        Ok(changes) => changes,
        Err(error) => {
            tracing::warn!("what becomes of the sockets of Nix daemons goes unseen: {error}");
            return;
        }
    };
    loop {
        let (asked, sockets) = match changes.next().await {
            Ok(seen) => seen,
            Err(error) => {
                tracing::warn!("systemd does not tell how the sockets of Nix daemons are: {error}; it is asked again");
                tokio::time::sleep(ASK_AGAIN).await;
                changed.notify_one();
                continue;
            }
        };
        let Some(engine) = engine.upgrade() else { return };
        if engine.send(Command::Sockets(asked.into(), sockets)).await.is_err() {
            return;
        }
    }
}
