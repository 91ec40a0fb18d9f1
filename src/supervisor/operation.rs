//! What is done to a store: the side effects, one function each, that [`plan`](super::plan) asks for.
//!
//! Each can be interrupted anywhere and made again. Parts that block run on threads in PID 1's mount namespace.

use std::{sync::Arc, time::Duration};

use super::record::Records;
use crate::{
    overlay::{
        holders::holders,
        layers::{self, LayersError, UpperLock},
        mountinfo::{MountState, MountTable},
        probe::{self, Stale},
        refresh::{self, Changes, Fingerprint, RefreshError, Report, Rung},
        swap::{self, SwapError},
        watch::{WatchError, Watches},
    },
    store::StoreSpec,
    systemd::{UnitError, Units, is_transient},
};

/// How long a unit that another daemon's run has begun to start is waited for.
const BEGUN_ATTEMPTS: u32 = 200;
const BEGUN_PAUSE: Duration = Duration::from_millis(50);

/// What operations work with.
#[derive(Clone, Debug)]
pub(super) struct Tools {
    pub(super) units: Units,
    pub(super) watches: Arc<Watches>,
    pub(super) records: Records,
}

/// An operation that did not come off. The message is what people read.
#[derive(Debug, thiserror::Error)]
pub(super) enum OperationError {
    #[error(transparent)]
    Layers(#[from] LayersError),
    #[error(transparent)]
    Unit(#[from] UnitError),
    #[error("{unit}{}", .detail.as_ref().map(|d| format!(" — {d}")).unwrap_or_default())]
    Mount { unit: UnitError, detail: Option<String> },
    #[error("{unit}{}", in_use(.holders))]
    Unmount { unit: UnitError, holders: Vec<String> },
    #[error("the mount unit is up, but the mount table shows {0}")]
    ReadBack(String),
    #[error(transparent)]
    Record(#[from] super::record::RecordError),
    #[error(transparent)]
    Swap(#[from] SwapError),
    #[error(transparent)]
    Refresh(#[from] RefreshError),
    #[error("cannot read the mount table: {0}")]
    MountTable(std::io::Error),
    #[error("an operation panicked: {0}")]
    Panic(String),
}

fn in_use(holders: &[String]) -> String {
    if holders.is_empty() { String::new() } else { format!(" — used by {}", holders.join(", ")) }
}

/// A store that was brought up or taken over.
#[derive(Debug)]
pub(super) struct Up {
    pub(super) lock: Option<UpperLock>,
    /// What may be stale already.
    pub(super) changes: Changes,
    pub(super) owner_uid: u32,
    /// Set when changes of the layers will go unseen.
    pub(super) unwatched: Option<WatchError>,
}

/// Runs `work` on a thread in PID 1's mount namespace.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, OperationError> + Send + 'static,
) -> Result<T, OperationError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(OperationError::Panic(error.to_string())))
}

/// Brings a store up that is not mounted. A lock that is held from an earlier attempt is used.
pub(super) async fn start(tools: Tools, spec: Arc<StoreSpec>, lock: Option<UpperLock>) -> Result<Up, OperationError> {
    let prepare = {
        let (tools, spec) = (tools.clone(), Arc::clone(&spec));
        move || {
            tools.records.remember(&spec)?;
            drop(lock);
            let lock = layers::prepare(&spec)?;
            // Before the mount: a fresh mount shows what came before, and the watches tell what comes after.
            let unwatched = tools.watches.add(&spec.name, &spec.layers).err();
            Ok((lock, unwatched, Fingerprint::of(&spec.layers).ok()))
        }
    };
    let (lock, unwatched, fingerprint) = blocking(prepare).await?;
    match tools.units.start(&spec).await {
        Ok(()) => {}
        // Begun by a daemon that was killed: systemd carries the job out all the same.
        Err(UnitError::Exists(_)) if is_transient(&spec.mount_unit) => await_mount(&spec).await?,
        Err(unit @ UnitError::Job { .. }) => return Err(explain(unit, spec).await),
        Err(error) => return Err(error.into()),
    }
    blocking(move || {
        match mount_state(&spec)? {
            MountState::Mounted { .. } => {}
            MountState::Absent => return Err(OperationError::ReadBack("nothing".to_owned())),
            MountState::Covered { by: what } | MountState::Foreign { what } => {
                return Err(OperationError::ReadBack(what));
            }
        }
        if let Some(fingerprint) = fingerprint {
            tools.records.keep_fingerprint(&spec.name, &fingerprint);
        }
        let owner_uid = layers::upper_owner(&spec.layers.upper).unwrap_or_default();
        Ok(Up { lock: Some(lock), changes: Changes::default(), owner_uid, unwatched })
    })
    .await
}

/// Takes over a mount that is right already.
pub(super) async fn adopt(tools: Tools, spec: Arc<StoreSpec>, locked: bool) -> Result<Up, OperationError> {
    blocking(move || {
        let lock = if locked { None } else { Some(layers::lock(&spec)?) };
        tools.records.remember(&spec)?;
        let unwatched = tools.watches.add(&spec.name, &spec.layers).err();
        let now = Fingerprint::of(&spec.layers).ok();
        let unchanged = now.is_some() && tools.records.fingerprint(&spec.name) == now;
        let changes = if unchanged { Changes::default() } else { Changes::unknown() };
        let owner_uid = layers::upper_owner(&spec.layers.upper).unwrap_or_default();
        Ok(Up { lock, changes, owner_uid, unwatched })
    })
    .await
}

/// Takes a store down.
pub(super) async fn stop(tools: Tools, spec: Arc<StoreSpec>) -> Result<(), OperationError> {
    match tools.units.stop(&spec.mount_unit).await {
        Ok(()) => {
            tools.watches.remove(&spec.name);
            Ok(())
        }
        Err(unit @ UnitError::Job { .. }) => {
            blocking(move || {
                let holders = holders(&spec.layers.merged);
                Err(OperationError::Unmount { unit, holders })
            })
            .await
        }
        Err(error) => Err(error.into()),
    }
}

/// Takes the upper of two mounts away.
pub(super) async fn finish_swap(spec: Arc<StoreSpec>) -> Result<(), OperationError> {
    blocking(move || Ok(swap::detach_top(&spec.layers.merged)?)).await
}

/// Undoes what was prepared for a store that is not mounted. With `forget`, its record goes as well. Its data stays.
pub(super) async fn release(tools: Tools, spec: Arc<StoreSpec>, forget: bool) -> Result<(), OperationError> {
    blocking(move || {
        tools.watches.remove(&spec.name);
        layers::release_mount_point(&spec.layers.merged)?;
        if forget {
            tools.records.forget(&spec.name);
        }
        Ok(())
    })
    .await
}

/// Refreshes a store's merged view. `kept` is the fingerprint that is on record.
pub(super) async fn refresh(
    tools: Tools,
    spec: Arc<StoreSpec>,
    changes: Changes,
    from: Rung,
    kept: Option<Fingerprint>,
) -> Result<Report, OperationError> {
    blocking(move || {
        if changes.unknown || from == Rung::Swap {
            // A layer may have been replaced by another directory. That it goes unwatched was reported when it was mounted.
            let _ = tools.watches.add(&spec.name, &spec.layers);
        }
        let report = refresh::refresh(&spec.layers, &changes, from)?;
        if report.still_stale.is_empty() && kept != Some(report.fingerprint) {
            tools.records.keep_fingerprint(&spec.name, &report.fingerprint);
        }
        Ok(report)
    })
    .await
}

/// Looks at every path of a mounted store and changes nothing.
pub(super) async fn verify(spec: Arc<StoreSpec>) -> Result<Vec<Stale>, OperationError> {
    blocking(move || {
        let layers = &spec.layers;
        let names = probe::all_names(layers);
        let stale = names.and_then(|names| probe::stale(layers, names.iter().map(String::as_str)));
        Ok(stale.map_err(|errno| RefreshError::Probe(layers.merged.clone(), errno))?)
    })
    .await
}

async fn await_mount(spec: &Arc<StoreSpec>) -> Result<(), OperationError> {
    for _ in 0..BEGUN_ATTEMPTS {
        let spec = Arc::clone(spec);
        if blocking(move || mount_state(&spec)).await? != MountState::Absent {
            return Ok(());
        }
        tokio::time::sleep(BEGUN_PAUSE).await;
    }
    Err(UnitError::Exists(spec.mount_unit.clone()).into())
}

/// Asks the kernel itself why a mount failed: mount(8) says it only in the journal.
async fn explain(unit: UnitError, spec: Arc<StoreSpec>) -> OperationError {
    let detail = blocking(move || Ok(swap::why_not(&spec.layers))).await.ok().flatten();
    OperationError::Mount { unit, detail }
}

fn mount_state(spec: &StoreSpec) -> Result<MountState, OperationError> {
    let merged = spec.layers.merged.as_str();
    let table = MountTable::read(|point| point == merged).map_err(OperationError::MountTable)?;
    Ok(table.state(&spec.layers))
}
