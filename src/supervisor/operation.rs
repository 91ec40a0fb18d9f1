//! What is done to a store: the side effects, one function each, that [`plan`](super::plan) asks for.
//!
//! Each can be interrupted anywhere and made again. Parts that block run on [threads](super::threads).

mod directories;
mod error;

use std::{io, sync::Arc};

pub(super) use error::OperationError;

use layered_stores_model::{AbsolutePath, StoreSpec};
use layered_stores_overlay::{
    glance,
    holders::holders,
    identity::{self, Id, Known, Marks},
    layers::{self, LayersError},
    left::Left,
    mount,
    mountinfo::{MountState, MountTable},
    owner::{self, OwnerError},
    place::{MountId, Top},
    probe,
    progress::{self, Spot},
    refresh::{self, Changes, Fingerprint, RefreshError, Report, Rung},
    remove::{self, RemoveError},
    room::{self, Room},
    swap::{self, OldMount, OldSuperblock},
    watch::{WatchError, Watches},
};

use rustix::io::Errno;

use self::directories::{among_what_is_there, with_what_is_there};
use super::{
    jobs::{Finding, Findings, Kind},
    leases,
    looks::{Look, Sight},
    machine::{Guard, Refreshing, SwappedOut},
    nix_daemon,
    owed::Aim,
    record::Records,
    threads::{Errand, Threads},
};
use crate::systemd::{Clear, FdStore, Seen, UnitError, Units, mount_unit};

/// What operations work with.
#[derive(Clone, Debug)]
pub(super) struct Tools {
    pub(super) units: Units,
    pub(super) watches: Arc<Watches>,
    pub(super) left: Arc<Left>,
    pub(super) records: Records,
    pub(super) threads: Threads,
}

/// What is held of a store as long as it is up.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// `None` if it was held before, or cannot be had.
    pub(super) lock: Option<Guard>,
    /// Set when changes of the layers will go unseen.
    pub(super) unwatched: Option<WatchError>,
    /// Set when what the next daemon is to find could not be written.
    pub(super) unrecorded: Option<OperationError>,
}

/// A store that was brought up or taken over.
#[derive(Debug)]
pub(super) struct Up {
    pub(super) held: Held,
    /// The store's mount, by which it is known again. The first refresh finds one out that was taken over.
    pub(super) mount: Option<MountId>,
    /// What may be stale already.
    pub(super) changes: Changes,
    pub(super) owner_uid: u32,
    /// Whether its upper layer takes writes.
    pub(super) room: Room,
    /// Whether there is anything of a Nix daemon of the store.
    pub(super) served: bool,
}

/// Brings a store up that is not mounted, until systemd has seen it. Whether the mount is what it should be, only a look at
/// the mount table tells, which the engine takes for many stores at a time.
///
/// The mount is made here and not by systemd, which would run mount(8) for each. Of what systemd has to know, the unit file
/// comes first: it is loaded when the mount shows up.
pub(super) async fn start(tools: Tools, errand: Errand, lock: Option<Guard>) -> Result<Up, OperationError> {
    let spec = &errand.spec;
    let unit = &spec.mount_unit;
    let prepare = {
        let (tools, spec) = (tools.clone(), Arc::clone(spec));
        move || {
            tools.units.refuse_foreign(&spec.mount_unit)?;
            let records = tools.records.marks(&spec)?;
            // Before the record: the state directory may be what is missing.
            let others = |id: &Id| tools.records.with_mark(Some(&spec.name), id);
            let known = Known { own: &records, others: &others };
            let (known, ()) = with_what_is_there(&spec, known, identity::require)?;
            // Until there are others, it keeps to those it had: what was found may be gone before it is its own.
            tools.records.remember(&spec, &identity::retained(&spec, &records))?;
            drop(lock);
            let (lock, marks) = layers::prepare(&spec, known).map_err(|error| taken_over(&spec, error))?;
            tools.records.remember(&spec, &marks)?;
            // Before the mount: a fresh mount shows what came before, and the watches tell what comes after.
            let unwatched = tools.watches.add(&spec.name, &spec.layers).err();
            Ok((lock, marks, unwatched, Fingerprint::of(&spec.layers).ok()))
        }
    };
    let (lock, marks, unwatched, fingerprint) = errand.run(prepare).await?;
    let clear = tools.units.clear(unit, || is_mounted(errand.clone())).await?;
    if clear == Clear::ToBeLoaded {
        let written = Arc::clone(spec);
        errand.run(move || write_unit(&written)).await?;
        if let Err(error) = tools.units.load(unit).await {
            remove_unit(&errand).await;
            return Err(error.into());
        }
    }
    let mount = {
        let (tools, spec) = (tools.clone(), Arc::clone(spec));
        move || {
            let mut mount = None;
            if clear != Clear::Mounted {
                write_unit(&spec)?;
                let upper = marks.upper.as_ref().and_then(|mark| mark.id.as_ref());
                let made = mount::mount(&spec.layers, upper);
                mount = Some(made.inspect_err(|_| mount_unit::remove(&spec.mount_unit))?);
            }
            if let Some(fingerprint) = fingerprint {
                tools.records.keep_fingerprint(&spec.name, &fingerprint);
            }
            progress::at(Spot::Upper);
            let owner_uid = layers::upper_owner(&spec.layers.upper).unwrap_or_default();
            let (served, room) = (is_served(&tools, &spec), room::look(&spec.layers));
            let held = Held { lock: Some(Box::new(lock)), unwatched, unrecorded: None };
            // What somebody else has mounted meanwhile may be older than the watches.
            let changes = if clear == Clear::Mounted { Changes::lost() } else { Changes::default() };
            Ok(Up { held, mount, changes, owner_uid, room, served })
        }
    };
    let up = errand.run(mount).await?;
    if clear == Clear::Mounted {
        return Ok(up);
    }
    let error = match tools.units.seen(unit, || is_mounted(errand.clone())).await {
        Ok(Seen::Ours | Seen::Gone) => return Ok(up),
        Ok(Seen::NotOurs) => UnitError::Exists(unit.clone()),
        Err(error) => error,
    };
    // Nobody was told that it is up.
    let taken_down = Arc::clone(spec);
    let down = move || {
        take_down(&taken_down)?;
        Err(error.into())
    };
    errand.run(down).await
}

/// Looks whether a store could come up otherwise than it is.
pub(super) async fn look_ahead(tools: Tools, errand: Errand) -> Result<(), OperationError> {
    let spec = Arc::clone(&errand.spec);
    let look = move || {
        let records = tools.records.marks(&spec)?;
        let others = |id: &Id| tools.records.with_mark(Some(&spec.name), id);
        match among_what_is_there(&spec, Known { own: &records, others: &others }, layers::look_ahead) {
            // That one may be about to give them away.
            Ok(_) | Err(LayersError::OfOther { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    };
    errand.run(look).await
}

/// Takes over a mount that is right already, but for its flags if these `differ`.
pub(super) async fn adopt(tools: Tools, errand: Errand, locked: bool, differ: bool) -> Result<Up, OperationError> {
    let spec = Arc::clone(&errand.spec);
    // A daemon that was killed may have left a unit file without a mount, and somebody may have mounted it by hand since.
    let unit = &spec.mount_unit;
    if mount_unit::is_ours(unit)
        && let Ok(Seen::NotOurs) = tools.units.seen(unit, || is_mounted(errand.clone())).await
    {
        remove_unit(&errand).await;
    }
    let adopt = move || {
        let held = take_hold(&tools, &spec, locked)?;
        // What the daemon has mounted it also puts right; of what somebody else has mounted it says what is wrong.
        if differ
            && mount_unit::is_ours(&spec.mount_unit)
            && let Some(differ) = mount::correct_flags(&spec.layers)?
        {
            let name = &spec.name;
            tracing::warn!(store = %name, "{name}: it was mounted {differ}, other than declared; that is put right");
        }
        let now = Fingerprint::of(&spec.layers).ok();
        let unchanged = now.is_some() && tools.records.fingerprint(&spec.name) == now;
        let changes = if unchanged { Changes::default() } else { Changes::lost() };
        progress::at(Spot::Upper);
        let owner_uid = layers::upper_owner(&spec.layers.upper).unwrap_or_default();
        let (served, room) = (is_served(&tools, &spec), room::look(&spec.layers));
        Ok(Up { held, mount: None, changes, owner_uid, room, served })
    };
    errand.run(adopt).await
}

/// Takes hold of what could not be had when a store came up. Whether it is locked already is told by `locked`.
pub(super) async fn hold(tools: Tools, errand: Errand, locked: bool) -> Result<Held, OperationError> {
    let spec = Arc::clone(&errand.spec);
    errand.run(move || take_hold(&tools, &spec, locked)).await
}

/// A store that is mounted goes on without what cannot be written: taken down, it would be worse off. But it is not for two, and
/// it is made of its own directories.
fn take_hold(tools: &Tools, spec: &Arc<StoreSpec>, locked: bool) -> Result<Held, OperationError> {
    let records = tools.records.marks_at_hand(spec)?;
    let others = |id: &Id| tools.records.with_mark(Some(&spec.name), id);
    let (_, marks) = with_what_is_there(spec, Known { own: &records, others: &others }, layers::look_over)?;
    let mut held = Held::default();
    if !locked {
        match layers::lock(spec) {
            Ok(lock) => held.lock = Some(Box::new(lock)),
            Err(error @ LayersError::Locked(_)) => return Err(error.into()),
            Err(error) => held.unrecorded = Some(error.into()),
        }
    }
    if let Err(error) = tools.records.keep(spec, &marks) {
        held.unrecorded.get_or_insert(error.into());
    }
    held.unwatched = tools.watches.add(&spec.name, &spec.layers).err();
    Ok(held)
}

fn is_served(tools: &Tools, spec: &StoreSpec) -> bool {
    nix_daemon::directory(tools.records.runtime(), &spec.name).exists()
}

/// Takes a store down.
pub(super) async fn stop(tools: Tools, errand: Errand) -> Result<(), OperationError> {
    let spec = Arc::clone(&errand.spec);
    // systemd unmounts whatever is on top when it comes to that.
    let look = {
        let spec = Arc::clone(&spec);
        move || match mount_state(&spec)? {
            MountState::Covered(cover) => Err(OperationError::NotOnTop(cover.to_string())),
            MountState::Foreign { what } => {
                let at = &spec.layers.merged;
                Err(OperationError::NotOnTop(format!("{what} is mounted at {at}; unmount it with `umount {at}`")))
            }
            _ => Ok(()),
        }
    };
    errand.run(look).await?;
    let stopped = tools.units.stop(&spec.mount_unit).await;
    let rest = move || {
        match stopped {
            Ok(()) => take_down(&spec)?,
            Err(unit @ UnitError::Job { .. }) => {
                progress::at(Spot::Merged);
                let holders = holders(&spec.layers.merged);
                return Err(OperationError::Unmount { why: unit.to_string(), holders });
            }
            Err(error) => return Err(error.into()),
        }
        tools.watches.remove(&spec.name);
        Ok(())
    };
    errand.run(rest).await
}

/// Takes the upper of two mounts away.
pub(super) async fn finish_swap(errand: Errand) -> Result<OldMount, OperationError> {
    let spec = Arc::clone(&errand.spec);
    errand.run(move || Ok(swap::finish(&spec.layers, &FdStore(&spec.name))?)).await
}

/// Undoes what was prepared for a store that is not mounted. With `forget`, its record goes as well. Its data stays.
pub(super) async fn release(tools: Tools, errand: Errand, forget: bool) -> Result<(), OperationError> {
    let spec = Arc::clone(&errand.spec);
    let release = move || {
        tools.watches.remove(&spec.name);
        // What a daemon that was killed did not come to.
        mount_unit::remove(&spec.mount_unit);
        layers::release_mount_point(&spec.layers.merged)?;
        if forget {
            tools.records.forget(&spec.name)?;
        }
        Ok(())
    };
    errand.run(release).await
}

/// Has a glance at what changed just now, and reconfigures if the kernel remembers it otherwise. Whether it did.
pub(super) async fn glance(errand: Errand, aim: Aim, mount: Option<MountId>) -> Result<bool, OperationError> {
    let spec = Arc::clone(&errand.spec);
    let glance = move || {
        let layers = &spec.layers;
        let is_stale = glance::is_stale(layers, &aim.changes.names);
        let is_stale = is_stale.map_err(|errno| RefreshError::look(layers, errno))?;
        let reconfigures = is_stale || aim.from > Rung::Probe;
        if reconfigures {
            refresh::reconfigure_store(layers, mount)?;
        }
        Ok(reconfigures)
    };
    errand.run(glance).await
}

/// Refreshes a store's merged view.
pub(super) async fn refresh(
    tools: Tools,
    errand: Errand,
    refreshing: Refreshing,
) -> Result<(Result<Report, OperationError>, Option<OldMount>), OperationError> {
    let Refreshing { aim: Aim { changes, from, whole, .. }, to, kept, mount, above } = refreshing;
    let looks_at_all = changes.unknown;
    let spec = Arc::clone(&errand.spec);
    let refresh = move || {
        // No watch tells that a directory above the lower one was replaced; whoever asks for a refresh finds out.
        let on_record = kept.or_else(|| tools.records.fingerprint(&spec.name));
        let now = look(&spec)?;
        let is_other = on_record.is_some_and(|then| !now.has_lower_of(&then));
        if is_other && from == Rung::Probe && is_empty(&spec.layers.lower) {
            // What is mounted goes on with the old one, and nobody has asked for this.
            return Err(OperationError::LowerTakenAway(spec.layers.lower.clone()));
        }
        let other = (Changes::unknown(), Rung::Swap, Rung::Swap);
        let (changes, from, to) = if is_other { other } else { (changes, from, to) };
        // A layer may have been replaced by another directory, or given to somebody else. That it goes unwatched was reported when it
        // was mounted.
        let _ = tools.watches.add(&spec.name, &spec.layers);
        let above: Vec<_> = above.iter().map(|spec| &spec.layers).collect();
        let (report, old) = refresh::refresh(&spec.layers, &changes, (from, to), mount, &above, &FdStore(&spec.name));
        // One that cannot be followed is not counted. The kernel has enough of it to say so elsewhere.
        let _ = old.as_ref().map(|old| tools.left.follow(&spec.name, old));
        if let Ok(report) = &report
            && let Some(fingerprint) = report.on_record(whole && report.is_right())
            && kept != Some(fingerprint)
        {
            tools.records.keep_fingerprint(&spec.name, &fingerprint);
        }
        Ok((report.map_err(OperationError::from), old))
    };
    if looks_at_all { errand.run_long(refresh).await } else { errand.run(refresh).await }
}

/// The layers as they are now.
fn look(spec: &StoreSpec) -> Result<Fingerprint, RefreshError> {
    Fingerprint::of(&spec.layers).map_err(|errno| RefreshError::look(&spec.layers, errno))
}

fn is_empty(dir: &AbsolutePath) -> bool {
    progress::at(Spot::Lower);
    std::fs::read_dir(dir.as_path()).is_ok_and(|mut entries| entries.next().is_none())
}

/// Has what was swapped out take no more writes.
pub(super) async fn retire(errand: Errand, old: Arc<dyn SwappedOut>) -> Result<OldSuperblock, OperationError> {
    let spec = Arc::clone(&errand.spec);
    let retire = move || {
        progress::at(Spot::Upper);
        let retired = old.retire();
        // Calls that were under way in the old superblock may have changed what the new one has looked at since.
        // The store may have been stopped by now.
        let _ = refresh::reconfigure_store(&spec.layers, None);
        Ok(retired?)
    };
    errand.run(retire).await
}

/// Does so for one of a store that is not known any more.
pub(super) async fn retire_unknown(old: Arc<dyn SwappedOut>) -> Result<OldSuperblock, OperationError> {
    let retired = tokio::task::spawn_blocking(move || old.retire()).await;
    Ok(retired.map_err(|error| OperationError::Panic(error.to_string()))??)
}

/// Says the way out where the owner's directories are somebody else's.
fn taken_over(spec: &StoreSpec, error: LayersError) -> OperationError {
    match (&error, owner::owner(spec, None)) {
        (LayersError::OtherOwner { .. }, Err(other @ OwnerError::Other { .. })) => other.into(),
        _ => error.into(),
    }
}

/// Looks at something of a store that is up.
pub(super) async fn look_at(
    look: Look,
    errand: Errand,
    below: Option<Arc<StoreSpec>>,
) -> Result<Sight, OperationError> {
    let spec = Arc::clone(&errand.spec);
    match look {
        Look::Room => errand.run(move || Ok(Sight::Room(room::look(&spec.layers)))).await,
        Look::Owner => errand.run_asking(move || Ok(Sight::Owner(other_owner(&spec, below.as_deref())))).await,
    }
}

/// What is wrong with whom a store belongs to, or the one `below`. What cannot be told is not wrong.
fn other_owner(spec: &StoreSpec, below: Option<&StoreSpec>) -> Option<String> {
    progress::at(Spot::Upper);
    owner::owner(spec, below).err().filter(OwnerError::is_certain).map(|error| error.to_string())
}

/// Removes the directory that a store had for itself which is declared no more.
pub(super) fn remove_left_over(records: &Records, directory: &AbsolutePath) -> Result<(), RemoveError> {
    remove::directory(directory, &|id| records.with_mark(None, id))
}

/// Removes all that is in a store that is not mounted. `own` is the directory it has for itself, if it was not given others.
pub(super) async fn remove(
    tools: Tools,
    errand: Errand,
    lock: Option<Guard>,
    own: Option<AbsolutePath>,
) -> Result<(), OperationError> {
    let spec = Arc::clone(&errand.spec);
    let remove = move || {
        drop(lock);
        tools.records.refuse_unreadable(&spec.name)?;
        let record = |marks: &Marks| tools.records.begin_anew(&spec.name, marks).map_err(io::Error::other);
        let records = tools.records.marks(&spec)?;
        let others = |id: &Id| tools.records.with_mark(Some(&spec.name), id);
        if let Some(left) = remove::contents(&spec, Known { own: &records, others: &others }, record)? {
            let name = &spec.name;
            tracing::warn!(store = %name, "{name}: the database in {left} belongs to another upper layer, and is left there");
        }
        own.as_ref().map_or(Ok(()), remove::rest)?;
        // Last: what is still there needs it. And where it cannot be, nothing but space is lost.
        if let Err(error) = leases::give_up(&spec) {
            let name = &spec.name;
            tracing::warn!(store = %name, "{name}: what was kept for it in {} stays: {error}", spec.lower_state_dir());
        }
        Ok(())
    };
    errand.run_long(remove).await
}

/// Does the work of a job.
pub(super) async fn work(kind: Kind, errand: Errand, mount: Option<MountId>) -> Result<Findings, OperationError> {
    match kind {
        Kind::Verify => verify(errand, mount).await,
    }
}

/// Looks at every path of a mounted store and changes nothing. `mount` is the store's mount, if it is known. How many paths
/// there are is counted first, for the errand's progress, by which it can be called off.
async fn verify(errand: Errand, mount: Option<MountId>) -> Result<Findings, OperationError> {
    let spec = Arc::clone(&errand.spec);
    let verify = move || {
        // Nothing of it stays open: whoever stops the store meanwhile would find it in use for as long as that.
        Top::of(&spec.layers, mount).map_err(RefreshError::from)?;
        look(&spec)?;
        let layers = &spec.layers;
        let (stale, _) = probe::expect_all(layers).and_then(|()| probe::stale_of_all(layers)).map_err(|errno| {
            // What is called off looks at nothing more, not even for what is wrong.
            let is_called_off = errno == Errno::CANCELED;
            if is_called_off { OperationError::CalledOff } else { RefreshError::look(layers, errno).into() }
        })?;
        Ok(stale.into_iter().map(Finding::from).collect())
    };
    errand.run_job(verify).await
}

fn write_unit(spec: &StoreSpec) -> Result<(), OperationError> {
    mount_unit::write(spec).map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => UnitError::Exists(spec.mount_unit.clone()).into(),
        _ => OperationError::UnitFile { unit: spec.mount_unit.clone(), source },
    })
}

async fn remove_unit(errand: &Errand) {
    let spec = Arc::clone(&errand.spec);
    let remove = move || {
        mount_unit::remove(&spec.mount_unit);
        Ok(())
    };
    let _ = errand.run(remove).await;
}

/// Unmounts a store as far as systemd has not done that, and removes its unit file.
fn take_down(spec: &StoreSpec) -> Result<(), OperationError> {
    let merged = &spec.layers.merged;
    progress::at(Spot::Merged);
    // systemd need not have seen a mount that a daemon made just before it was killed.
    if mount::is_mount_point(merged) && matches!(mount_state(spec)?, MountState::Mounted { .. }) {
        mount::unmount(&spec.layers)
            .map_err(|error| OperationError::Unmount { why: error.to_string(), holders: holders(merged) })?;
    }
    mount_unit::remove(&spec.mount_unit);
    Ok(())
}

async fn is_mounted(errand: Errand) -> bool {
    let spec = Arc::clone(&errand.spec);
    errand.run(move || mount_state(&spec)).await.is_ok_and(|state| matches!(state, MountState::Mounted { .. }))
}

fn mount_state(spec: &StoreSpec) -> Result<MountState, OperationError> {
    let table = MountTable::read_on_the_way_to(spec.layers.merged.as_str()).map_err(OperationError::MountTable)?;
    Ok(table.state(&spec.layers))
}
