//! What is done to a store: the side effects, one function each, that [`plan`](super::plan) asks for.
//!
//! Each can be interrupted anywhere and made again. Parts that block run on threads in PID 1's mount namespace.

use std::{io, path::PathBuf, sync::Arc};

use super::{nix_daemon, record::Records};
use crate::{
    overlay::{
        holders::holders,
        layers::{self, LayersError, UpperLock},
        mount::{self, MountError},
        mountinfo::{MountState, MountTable},
        probe::{self, Stale},
        refresh::{self, Changes, Fingerprint, RefreshError, Report, Rung},
        swap::{self, OldMount, OldSuperblock, SwapError},
        watch::{WatchError, Watches},
    },
    store::{MountUnitName, StoreSpec},
    systemd::{Clear, Seen, SocketError, UnitError, Units, mount_unit},
};

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
    #[error("cannot write the unit file of {unit}: {source}")]
    UnitFile { unit: MountUnitName, source: io::Error },
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error("{}", in_use(.why, .holders))]
    Unmount { why: String, holders: Vec<String> },
    #[error(transparent)]
    Record(#[from] super::record::RecordError),
    #[error(transparent)]
    Swap(#[from] SwapError),
    #[error(transparent)]
    Refresh(#[from] RefreshError),
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("cannot write {}: {source}", .file.display())]
    NixConf { file: PathBuf, source: io::Error },
    #[error("cannot read the mount table: {0}")]
    MountTable(io::Error),
    #[error("an operation panicked: {0}")]
    Panic(String),
}

fn in_use(why: &str, holders: &[String]) -> String {
    if holders.is_empty() { why.to_owned() } else { format!("it is used by {}", holders.join(", ")) }
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
    /// Whether there is anything of a Nix daemon of the store.
    pub(super) served: bool,
}

/// Runs `work` on a thread in PID 1's mount namespace.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, OperationError> + Send + 'static,
) -> Result<T, OperationError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(OperationError::Panic(error.to_string())))
}

/// Brings a store up that is not mounted, until systemd has seen it. Whether the mount is what it should be, only a look at
/// the mount table tells, which the engine takes for many stores at a time.
///
/// The mount is made here and not by systemd, which would run mount(8) for each. Of what systemd has to know, the unit file
/// comes first: it is loaded when the mount shows up.
pub(super) async fn start(tools: Tools, spec: Arc<StoreSpec>, lock: Option<UpperLock>) -> Result<Up, OperationError> {
    let unit = &spec.mount_unit;
    let prepare = {
        let (tools, spec) = (tools.clone(), Arc::clone(&spec));
        move || {
            tools.units.refuse_foreign(&spec.mount_unit)?;
            tools.records.remember(&spec)?;
            drop(lock);
            let lock = layers::prepare(&spec)?;
            // Before the mount: a fresh mount shows what came before, and the watches tell what comes after.
            let unwatched = tools.watches.add(&spec.name, &spec.layers).err();
            Ok((lock, unwatched, Fingerprint::of(&spec.layers).ok()))
        }
    };
    let (lock, unwatched, fingerprint) = blocking(prepare).await?;
    let clear = tools.units.clear(unit, || is_mounted(Arc::clone(&spec))).await?;
    if clear == Clear::ToBeLoaded {
        let written = Arc::clone(&spec);
        blocking(move || write_unit(&written)).await?;
        if let Err(error) = tools.units.load(unit).await {
            remove_unit(&spec).await;
            return Err(error.into());
        }
    }
    let mount = {
        let (tools, spec) = (tools.clone(), Arc::clone(&spec));
        move || {
            if clear != Clear::Mounted {
                write_unit(&spec)?;
                mount::mount(&spec.layers).inspect_err(|_| mount_unit::remove(&spec.mount_unit))?;
            }
            if let Some(fingerprint) = fingerprint {
                tools.records.keep_fingerprint(&spec.name, &fingerprint);
            }
            let owner_uid = layers::upper_owner(&spec.layers.upper).unwrap_or_default();
            let served = is_served(&tools, &spec);
            Ok(Up { lock: Some(lock), changes: Changes::default(), owner_uid, unwatched, served })
        }
    };
    let up = blocking(mount).await?;
    if clear == Clear::Mounted {
        return Ok(up);
    }
    let error = match tools.units.seen(unit, || is_mounted(Arc::clone(&spec))).await {
        Ok(Seen::Ours | Seen::Gone) => return Ok(up),
        Ok(Seen::NotOurs) => UnitError::Exists(unit.clone()),
        Err(error) => error,
    };
    // Nobody was told that it is up.
    blocking(move || {
        take_down(&spec)?;
        Err(error.into())
    })
    .await
}

/// Takes over a mount that is right already.
pub(super) async fn adopt(tools: Tools, spec: Arc<StoreSpec>, locked: bool) -> Result<Up, OperationError> {
    // A daemon that was killed may have left a unit file without a mount, and somebody may have mounted it by hand since.
    let unit = &spec.mount_unit;
    if mount_unit::is_ours(unit)
        && let Ok(Seen::NotOurs) = tools.units.seen(unit, || is_mounted(Arc::clone(&spec))).await
    {
        remove_unit(&spec).await;
    }
    blocking(move || {
        let lock = if locked { None } else { Some(layers::lock(&spec)?) };
        tools.records.remember(&spec)?;
        let unwatched = tools.watches.add(&spec.name, &spec.layers).err();
        let now = Fingerprint::of(&spec.layers).ok();
        let unchanged = now.is_some() && tools.records.fingerprint(&spec.name) == now;
        let changes = if unchanged { Changes::default() } else { Changes::unknown() };
        let owner_uid = layers::upper_owner(&spec.layers.upper).unwrap_or_default();
        let served = is_served(&tools, &spec);
        Ok(Up { lock, changes, owner_uid, unwatched, served })
    })
    .await
}

fn is_served(tools: &Tools, spec: &StoreSpec) -> bool {
    nix_daemon::directory(tools.records.runtime(), &spec.name).exists()
}

/// Takes a store down.
pub(super) async fn stop(tools: Tools, spec: Arc<StoreSpec>) -> Result<(), OperationError> {
    let stopped = tools.units.stop(&spec.mount_unit).await;
    blocking(move || {
        match stopped {
            Ok(()) => take_down(&spec)?,
            Err(unit @ UnitError::Job { .. }) => {
                let holders = holders(&spec.layers.merged);
                return Err(OperationError::Unmount { why: unit.to_string(), holders });
            }
            Err(error) => return Err(error.into()),
        }
        tools.watches.remove(&spec.name);
        Ok(())
    })
    .await
}

/// Takes the upper of two mounts away.
pub(super) async fn finish_swap(spec: Arc<StoreSpec>) -> Result<(), OperationError> {
    blocking(move || Ok(swap::detach_top(&spec.layers.merged)?)).await
}

/// Undoes what was prepared for a store that is not mounted. With `forget`, its record goes as well. Its data stays.
pub(super) async fn release(tools: Tools, spec: Arc<StoreSpec>, forget: bool) -> Result<(), OperationError> {
    blocking(move || {
        tools.watches.remove(&spec.name);
        // What a daemon that was killed did not come to.
        mount_unit::remove(&spec.mount_unit);
        layers::release_mount_point(&spec.layers.merged)?;
        if forget {
            tools.records.forget(&spec.name);
        }
        Ok(())
    })
    .await
}

/// Refreshes a store's merged view. `kept` is the fingerprint on record, if this run of the daemon has put it there.
pub(super) async fn refresh(
    tools: Tools,
    spec: Arc<StoreSpec>,
    changes: Changes,
    from: Rung,
    kept: Option<Fingerprint>,
) -> Result<Report, OperationError> {
    blocking(move || {
        // No watch tells that a directory above the lower one was replaced; whoever asks for a refresh finds out.
        let on_record = kept.or_else(|| tools.records.fingerprint(&spec.name));
        let now = Fingerprint::of(&spec.layers).ok();
        let is_other = on_record.zip(now).is_some_and(|(then, now)| !now.has_lower_of(&then));
        let (changes, from) = if is_other { (Changes::unknown(), Rung::Swap) } else { (changes, from) };
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

/// Brings the second half of a swap to its end, after [`OldMount::GRACE`].
///
/// Calls that were under way in the old superblock may have changed what the new one has looked at in the meantime, so the
/// new one is reconfigured once more.
pub(super) async fn retire(old: OldMount, spec: Arc<StoreSpec>) -> OldSuperblock {
    tokio::time::sleep(OldMount::GRACE).await;
    let retired = blocking(move || {
        let retired = old.retire();
        // The store may have been stopped by now.
        let _ = refresh::reconfigure(spec.layers.merged.as_str());
        Ok(retired)
    });
    retired.await.unwrap_or(OldSuperblock::Retired)
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

fn write_unit(spec: &StoreSpec) -> Result<(), OperationError> {
    mount_unit::write(spec).map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => UnitError::Exists(spec.mount_unit.clone()).into(),
        _ => OperationError::UnitFile { unit: spec.mount_unit.clone(), source },
    })
}

async fn remove_unit(spec: &Arc<StoreSpec>) {
    let spec = Arc::clone(spec);
    let _ = blocking(move || {
        mount_unit::remove(&spec.mount_unit);
        Ok(())
    })
    .await;
}

/// Unmounts a store as far as systemd has not done that, and removes its unit file.
fn take_down(spec: &StoreSpec) -> Result<(), OperationError> {
    let merged = &spec.layers.merged;
    // systemd need not have seen a mount that a daemon made just before it was killed.
    if mount::is_mount_point(merged) && matches!(mount_state(spec)?, MountState::Mounted { .. }) {
        mount::unmount(merged)
            .map_err(|error| OperationError::Unmount { why: error.to_string(), holders: holders(merged) })?;
    }
    mount_unit::remove(&spec.mount_unit);
    Ok(())
}

async fn is_mounted(spec: Arc<StoreSpec>) -> bool {
    blocking(move || mount_state(&spec)).await.is_ok_and(|state| matches!(state, MountState::Mounted { .. }))
}

fn mount_state(spec: &StoreSpec) -> Result<MountState, OperationError> {
    let merged = spec.layers.merged.as_str();
    let table = MountTable::read(|point| point == merged).map_err(OperationError::MountTable)?;
    Ok(table.state(&spec.layers))
}
