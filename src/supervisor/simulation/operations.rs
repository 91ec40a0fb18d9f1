//! How things are done on the simulated machine: in steps, between which anything may happen, and each of which may hang, fail,
//! or be the last of a daemon that is killed.

use std::sync::{Arc, Mutex, PoisonError};

use layered_stores_model::{StoreName, StoreSpec};
use layered_stores_overlay::{
    mountinfo::MountState,
    probe::{Stale, Symptom},
    progress::{self, Progress, Spot},
    refresh::{Changes, Fingerprint, Outcome, Report, Rung},
    room::Room,
    swap::{OldSuperblock, RetireError},
};
use rustix::io::Errno;
use tokio::time::Instant;

use super::world::World;
use crate::{
    supervisor::{
        jobs::{Findings, Kind},
        looks::{Look, Sight},
        machine::{Follow, Guard, Refreshed, Refreshing, SwappedOut},
        operation::{Held, OperationError, Up},
        owed::Aim,
    },
    systemd::SocketState,
};

/// How many paths a look at all of them comes by.
pub(super) const PATHS: u64 = 4;

type Result<T> = std::result::Result<T, OperationError>;

fn failed(why: &str) -> OperationError {
    OperationError::MountTable(std::io::Error::other(why.to_owned()))
}

/// Since when something waits, and for what.
#[derive(Debug, Default)]
pub(super) struct Waits(Mutex<Option<(Spot, Instant)>>);

impl Waits {
    pub(super) fn at(&self, spot: Spot) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((spot, Instant::now()));
    }
}

impl Follow for Waits {
    fn waits_for(&self) -> Option<(Spot, Instant)> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The lock of an upper layer.
#[derive(Debug)]
struct Lock {
    world: Arc<World>,
    name: StoreName,
}

impl Drop for Lock {
    fn drop(&mut self) {
        self.world.lock().store(&self.name).locked = false;
    }
}

/// What a swap has left.
#[derive(Debug)]
pub(super) struct Old {
    pub(super) world: Arc<World>,
    pub(super) number: u64,
}

impl SwappedOut for Old {
    fn number(&self) -> u64 {
        self.number
    }

    fn retire(&self) -> std::result::Result<OldSuperblock, RetireError> {
        let mut world = self.world.lock();
        match world.random(4) {
            0 => Ok(OldSuperblock::StillWritten),
            1 if world.random(4) == 0 => Err(RetireError::Unknown(std::io::Error::from(Errno::IO))),
            _ => {
                world.retired.insert(self.number);
                Ok(OldSuperblock::Retired)
            }
        }
    }
}

/// Something that is done about a store.
#[derive(Clone, Debug)]
pub(super) struct Doing {
    pub(super) world: Arc<World>,
    pub(super) spec: Arc<StoreSpec>,
    pub(super) waits: Arc<Waits>,
}

/// That nothing else is done about a store meanwhile.
struct Alone<'a>(&'a Doing);

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.0.world.lock().store(&self.0.spec.name).busy_with = None;
    }
}

/// That nobody else looks ahead meanwhile.
struct LookingAhead<'a>(&'a Doing);

impl Drop for LookingAhead<'_> {
    fn drop(&mut self) {
        let is_other = |other: &Arc<StoreSpec>| !Arc::ptr_eq(other, &self.0.spec);
        self.0.world.lock().store(&self.0.spec.name).looked_ahead.retain(is_other);
    }
}

impl Doing {
    fn name(&self) -> &StoreName {
        &self.spec.name
    }

    fn point(&self) -> &str {
        self.spec.layers.merged.as_str()
    }

    /// Begins something that nothing else may be done beside.
    fn alone(&self, what: &'static str) -> Alone<'_> {
        let other = self.world.lock().store(self.name()).busy_with.replace(what);
        if let Some(other) = other {
            self.world.blame(format!("{}: {what} beside {other}", self.name()));
        }
        Alone(self)
    }

    /// Begins a look ahead, of which there is one at a time for a specification.
    fn look(&self) -> LookingAhead<'_> {
        let mut world = self.world.lock();
        let looked_ahead = &mut world.store(self.name()).looked_ahead;
        let is_same = |other: &Arc<StoreSpec>| !other.needs_restart_for(&self.spec);
        let are_two = looked_ahead.iter().any(is_same);
        looked_ahead.push(Arc::clone(&self.spec));
        drop(world);
        if are_two {
            self.world.blame(format!("{}: two look ahead at a time", self.name()));
        }
        LookingAhead(self)
    }

    /// Begins something that is right only if the daemon has seen a certain state.
    fn having_seen(&self, what: &str, is_right: impl FnOnce(&MountState) -> bool) {
        let seen = self.world.lock().seen_state(&self.spec.layers);
        if !is_right(&seen) {
            self.world.blame(format!("{}: {what}, though it is {seen:?}", self.name()));
        }
    }

    /// Takes a step: something else may happen before it, and it may hang or fail.
    pub(super) async fn step(&self, spot: Spot) -> Result<()> {
        self.waits.at(spot);
        tokio::time::sleep(self.world.pause()).await;
        self.world.until_it_answers(self.name()).await;
        self.waits.at(spot);
        let mut world = self.world.lock();
        let store = world.store(self.name());
        if store.failures > 0 {
            store.failures -= 1;
            return Err(failed("a step fails"));
        }
        Ok(())
    }

    async fn lock(&self) -> Result<Guard> {
        for _ in 0..20 {
            let was_locked = std::mem::replace(&mut self.world.lock().store(self.name()).locked, true);
            if !was_locked {
                return Ok(Box::new(Lock { world: Arc::clone(&self.world), name: self.name().clone() }));
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        Err(failed("it is locked"))
    }

    fn is_mounted(&self) -> bool {
        matches!(self.world.lock().state(&self.spec.layers), MountState::Mounted { .. })
    }

    fn up(&self, lock: Option<Guard>, changes: Changes) -> Up {
        let mut world = self.world.lock();
        let served = world.sockets.contains_key(self.name());
        let store = world.store(self.name());
        store.watched = true;
        let room = if store.full { Room::ReadOnly(Errno::ROFS) } else { Room::Enough };
        let held = Held { lock, unwatched: None, unrecorded: None };
        Up { held, mount: None, changes, owner_uid: super::OWNER, room, served }
    }

    pub(super) async fn look_ahead(self) -> Result<()> {
        let _look = self.look();
        self.step(Spot::Lower).await?;
        let cannot_change = self.world.lock().store(self.name()).cannot_change;
        if cannot_change { Err(failed("its directories are not there")) } else { Ok(()) }
    }

    pub(super) async fn start(self, lock: Option<Guard>) -> Result<Up> {
        let _alone = self.alone("start");
        self.having_seen("start", |seen| *seen == MountState::Absent);
        self.step(Spot::Records).await?;
        {
            let mut world = self.world.lock();
            let store = world.store(self.name());
            store.record = Some(Arc::clone(&self.spec));
            let is_another = |was: &Arc<StoreSpec>| was.needs_restart_for(&self.spec);
            if store.cannot_change && store.was_up_as.as_ref().is_some_and(is_another) {
                return Err(failed("its directories are not there"));
            }
        }
        drop(lock);
        self.step(Spot::Upper).await?;
        let lock = self.lock().await?;
        self.world.lock().store(self.name()).watched = true;
        let version = self.world.lock().store(self.name()).version;
        self.step(Spot::Lower).await?;
        let was_mounted = self.is_mounted();
        if was_mounted {
            self.world.lock().store(self.name()).lost = true;
        } else {
            let mut world = self.world.lock();
            if world.state(&self.spec.layers) != MountState::Absent {
                return Err(failed("something is mounted there"));
            }
            let lower = self.spec.layers.lower.as_str();
            if self.spec.lower_name().is_some() && world.top_at(lower).is_none_or(|mount| mount.layers.is_none()) {
                return Err(failed("its lower store is not mounted"));
            }
            world.mount(self.point(), Some(self.spec.layers.clone()));
            world.is_another(self.name());
            let store = world.store(self.name());
            store.unit = true;
            store.was_up_as = Some(Arc::clone(&self.spec));
            store.stale.clear();
            (store.behind, store.lost, store.right) = (false, false, Some(version));
        }
        self.world.mounts_changed.notify_one();
        if let Err(error) = self.step(Spot::Elsewhere).await {
            // systemd does not see it.
            let mut world = self.world.lock();
            world.unmount(self.point(), |mount| mount.is_of(&self.spec.layers));
            world.store(self.name()).unit = false;
            self.world.mounts_changed.notify_one();
            return Err(error);
        }
        Ok(self.up(Some(lock), if was_mounted { Changes::lost() } else { Changes::default() }))
    }

    pub(super) async fn adopt(self, locked: bool) -> Result<Up> {
        let _alone = self.alone("adopt");
        self.having_seen("adopt", |seen| matches!(seen, MountState::Mounted { twice: false, .. }));
        self.step(Spot::Upper).await?;
        let lock = if locked { None } else { Some(self.lock().await?) };
        let unchanged = {
            let mut world = self.world.lock();
            let store = world.store(self.name());
            store.record = Some(Arc::clone(&self.spec));
            store.watched = true;
            store.right == Some(store.version) && !store.behind
        };
        self.step(Spot::Lower).await?;
        if !unchanged {
            self.world.lock().store(self.name()).lost = true;
        }
        Ok(self.up(lock, if unchanged { Changes::default() } else { Changes::lost() }))
    }

    pub(super) async fn hold(self, locked: bool) -> Result<Held> {
        let _alone = self.alone("hold");
        self.step(Spot::Upper).await?;
        let lock = if locked { None } else { Some(self.lock().await?) };
        Ok(Held { lock, unwatched: None, unrecorded: None })
    }

    pub(super) async fn serve(self) -> Result<()> {
        let _alone = self.alone("serve");
        self.having_seen("serve", |seen| matches!(seen, MountState::Mounted { .. }));
        self.step(Spot::Upper).await?;
        let mut world = self.world.lock();
        match self.spec.daemon {
            Some(_) => world.sockets.insert(self.name().clone(), SocketState::Listening),
            None => world.sockets.remove(self.name()),
        };
        self.world.sockets_changed.notify_one();
        Ok(())
    }

    pub(super) async fn stop(self) -> Result<()> {
        let _alone = self.alone("stop");
        self.having_seen("stop", |seen| matches!(seen, MountState::Mounted { .. }));
        if !self.world.lock().store(self.name()).unit {
            self.world.blame(format!("{}: what is not ours is stopped", self.name()));
        }
        // The socket goes with the mount unit, and is gone even if that stays.
        self.world.lock().sockets.remove(self.name());
        self.world.sockets_changed.notify_one();
        self.step(Spot::Merged).await?;
        {
            let mut world = self.world.lock();
            if world.store(self.name()).in_use {
                return Err(failed("it is in use"));
            }
            if !matches!(world.state(&self.spec.layers), MountState::Mounted { .. } | MountState::Absent) {
                return Err(failed("something is mounted on it"));
            }
            world.unmount(self.point(), |mount| mount.is_of(&self.spec.layers));
        }
        self.world.mounts_changed.notify_one();
        self.step(Spot::Merged).await?;
        let mut world = self.world.lock();
        let store = world.store(self.name());
        (store.unit, store.watched) = (false, false);
        Ok(())
    }

    pub(super) async fn finish_swap(self) -> Result<Arc<dyn SwappedOut>> {
        let _alone = self.alone("finish-swap");
        self.having_seen("finish-swap", |seen| matches!(seen, MountState::Mounted { twice: true, .. }));
        self.step(Spot::Merged).await?;
        if !matches!(self.world.lock().state(&self.spec.layers), MountState::Mounted { twice: true, .. }) {
            return Err(failed("there are no two mounts"));
        }
        self.take_upper_away().ok_or_else(|| failed("there is none"))
    }

    /// Takes the upper of two mounts away, which PID 1 keeps until it is retired.
    fn take_upper_away(&self) -> Option<Arc<dyn SwappedOut>> {
        let mut world = self.world.lock();
        let number = world.unmount(self.point(), |mount| mount.is_of(&self.spec.layers))?;
        world.kept.insert((self.name().clone(), number));
        let store = world.store(self.name());
        store.stale.clear();
        (store.behind, store.lost) = (false, false);
        world.is_another(self.name());
        drop(world);
        self.world.mounts_changed.notify_one();
        Some(Arc::new(Old { world: Arc::clone(&self.world), number }))
    }

    pub(super) async fn release(self, forget: bool) -> Result<()> {
        let _alone = self.alone("release");
        self.having_seen("release", |seen| matches!(seen, MountState::Absent | MountState::Foreign { .. }));
        self.step(Spot::Root).await?;
        let mut world = self.world.lock();
        let store = world.store(self.name());
        (store.unit, store.watched) = (false, false);
        if forget {
            store.record = None;
        }
        Ok(())
    }

    pub(super) async fn glance(self, aim: Aim) -> Result<bool> {
        let _alone = self.alone("glance");
        self.step(Spot::Upper).await?;
        if !self.is_mounted() {
            return Err(failed("it is not mounted"));
        }
        let mut world = self.world.lock();
        let store = world.store(self.name());
        let is_stale = aim.changes.names.iter().any(|name| store.stale.get(name) == Some(&false));
        let reconfigures = is_stale || aim.from > Rung::Probe;
        if reconfigures {
            store.stale.retain(|_, needs_swap| *needs_swap);
        }
        Ok(reconfigures)
    }

    pub(super) async fn refresh(self, refreshing: Refreshing) -> Refreshed {
        let _alone = self.alone("refresh");
        match self.try_refresh(refreshing).await {
            Ok((report, old)) => (Ok(report), old),
            Err(error) => (Err(error), None),
        }
    }

    async fn try_refresh(&self, refreshing: Refreshing) -> Result<(Report, Option<Arc<dyn SwappedOut>>)> {
        let Refreshing { aim: Aim { changes, from, whole, .. }, to, .. } = refreshing;
        let version = self.world.lock().store(self.name()).version;
        self.step(Spot::Upper).await?;
        if !self.is_mounted() {
            return Err(failed("it is not mounted"));
        }
        let stale = |needs_swap: bool| {
            let mut world = self.world.lock();
            let store = world.store(self.name());
            let concerned = store.stale.iter().filter(|(name, _)| changes.unknown || changes.names.contains(*name));
            // What is in no layer any more is found by its name alone.
            concerned
                .filter(|(name, is)| **is == needs_swap && (!needs_swap || changes.names.contains(*name)))
                .map(|(name, _)| Stale { name: name.clone(), symptom: Symptom::OtherFile })
                .collect::<Vec<_>>()
        };
        // The directory of the lower store is another one then, which the fingerprint tells.
        let is_behind = self.world.lock().store(self.name()).behind;
        let (from, to) = if is_behind { (Rung::Swap, Rung::Swap) } else { (from, to) };
        let mut outcome = Outcome::Current;
        if from > Rung::Probe || !stale(false).is_empty() || !stale(true).is_empty() {
            self.step(Spot::Merged).await?;
            self.world.lock().store(self.name()).stale.retain(|_, needs_swap| *needs_swap);
            outcome = Outcome::Reconfigured;
        }
        let mut old = None;
        let swaps = from == Rung::Swap || changes.is_lost() || !stale(true).is_empty();
        if swaps && to == Rung::Swap && self.world.lock().can_swap {
            self.step(Spot::Merged).await?;
            {
                let mut world = self.world.lock();
                if !matches!(world.state(&self.spec.layers), MountState::Mounted { twice: false, .. }) {
                    return Err(failed("it is not mounted"));
                }
                world.mount_beneath(self.point(), self.spec.layers.clone());
            }
            self.world.mounts_changed.notify_one();
            // A daemon that is killed here leaves both.
            tokio::time::sleep(self.world.pause()).await;
            if !matches!(self.world.lock().state(&self.spec.layers), MountState::Mounted { twice: true, .. }) {
                return Err(failed("the old mount is gone"));
            }
            old = self.take_upper_away();
            outcome = Outcome::Swapped;
        }
        let lost = changes.is_lost() && outcome != Outcome::Swapped;
        let still_stale = if outcome == Outcome::Swapped { Vec::new() } else { stale(true) };
        let report = Report { outcome, mount: None, still_stale, lost, probed: 0, fingerprint: fingerprint(version) };
        if whole && report.is_right() {
            self.world.lock().store(self.name()).right = Some(version);
        }
        Ok((report, old))
    }

    pub(super) async fn retire(self, old: Arc<dyn SwappedOut>) -> Result<OldSuperblock> {
        self.step(Spot::Upper).await?;
        Ok(old.retire()?)
    }

    pub(super) async fn look_at(self, look: Look) -> Result<Sight> {
        self.step(Spot::Upper).await?;
        let full = self.world.lock().store(self.name()).full;
        Ok(match look {
            Look::Room => Sight::Room(if full { Room::ReadOnly(Errno::ROFS) } else { Room::Enough }),
            Look::Owner => Sight::Owner(None),
        })
    }

    pub(super) async fn work(self, kind: Kind, progress: Arc<Progress>) -> Result<Findings> {
        match kind {
            Kind::Verify => self.verify(progress).await,
        }
    }

    async fn verify(self, progress: Arc<Progress>) -> Result<Findings> {
        Arc::clone(&progress).follow(|| progress::expect(PATHS));
        for _ in 0..PATHS {
            self.step(Spot::Merged).await?;
            Arc::clone(&progress).follow(progress::one_more);
        }
        let mut world = self.world.lock();
        let stale = world.store(self.name()).stale.keys();
        Ok(stale.map(|name| Stale { name: name.clone(), symptom: Symptom::OtherFile }.into()).collect())
    }

    pub(super) async fn remove(self, lock: Option<Guard>) -> Result<()> {
        let _alone = self.alone("remove");
        self.having_seen("remove", |seen| *seen == MountState::Absent);
        drop(lock);
        self.step(Spot::Upper).await?;
        if !self.world.lock().store(self.name()).may_be_emptied {
            self.world.blame(format!("{}: emptied, and nobody has asked for that", self.name()));
        }
        Ok(())
    }
}

/// A fingerprint of its own for each version of the layers.
fn fingerprint(version: u64) -> Fingerprint {
    let stamp = format!(r#"{{"device":[0,1],"inode":1,"seconds":{version},"nanoseconds":0}}"#);
    serde_json::from_str(&format!(r#"{{"upper":{stamp},"lower":{stamp}}}"#)).expect("a fingerprint")
}
