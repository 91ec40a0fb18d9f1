//! Looking at the mount table, planning, and beginning what is planned.

use std::sync::{Arc, PoisonError};

use tokio::time::Instant;

use super::{
    Engine,
    outcome::{Done, Release},
};
use crate::{
    overlay::mountinfo::MountState,
    store::StoreName,
    supervisor::{
        Error,
        entry::{Entry, Op, answer},
        nix_daemon, operation,
        plan::{Action, Lower, Phase, View, Want, plan},
        status::Problem,
    },
    systemd::mount_unit,
};

impl Engine {
    /// Looks at the mount table, plans for every store that nothing is being done about, and begins what is planned.
    pub(super) fn reconcile(&mut self) {
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
    pub(super) fn confirm(&mut self, now: Instant) {
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
            let reason = format!("it was mounted, but the mount table shows {shown}");
            entry.fail(Problem::StartFailed, reason);
            entry.retry_later(now);
        }
        for (name, up, adopted) in confirmed {
            self.is_up(&name, up, adopted);
            self.refresh_if_asked(&name);
        }
    }

    /// Carries out the next action for a store. Whether there may be another one.
    pub(super) fn step(&mut self, name: &StoreName, now: Instant) -> bool {
        let Some(entry) = self.entries.get(name) else { return false };
        // A refresh may be in flight while the mount is lost; what comes of it does not matter then.
        if entry.op.is_some() {
            return false;
        }
        if entry.want == Want::Up && entry.is_to_be_served() && matches!(entry.mount, MountState::Mounted { .. }) {
            let (tools, spec) = (self.tools.clone(), Arc::clone(&entry.spec));
            self.spawn(name, Op::Serve, async move {
                Done::Served(spec.daemon.clone(), nix_daemon::serve(tools, spec).await)
            });
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
            ours: !(goes_down || lower == Lower::Leaving) || mount_unit::is_ours(&entry.spec.mount_unit),
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

    pub(super) fn release(&mut self, name: &StoreName, why: Release) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        entry.lock = None;
        let (tools, spec) = (self.tools.clone(), Arc::clone(&entry.spec));
        self.spawn(name, Op::Release, async move {
            Done::Released(operation::release(tools, spec, why == Release::Forget).await, why)
        });
    }

    pub(super) fn spawn(&mut self, name: &StoreName, op: Op, work: impl Future<Output = Done> + Send + 'static) {
        if let Some(entry) = self.entries.get_mut(name) {
            entry.op = Some(op);
            let name = name.clone();
            self.operations.spawn(async move { (name, work.await) });
        }
    }

    /// Whether another store that is on its way down still has one of a store's directories: it was given another name.
    pub(super) fn is_occupied(&self, entry: &Entry) -> bool {
        let is_leaving = |other: &&Entry| other.want == Want::Gone || other.next.is_some();
        self.entries
            .values()
            .filter(is_leaving)
            .any(|other| other.spec.name != entry.spec.name && other.spec.shares_directories_with(&entry.spec))
    }

    pub(super) fn lower_state(&self, lower: &StoreName) -> Lower {
        match self.entries.get(lower) {
            Some(entry) if entry.next.is_some() => Lower::Leaving,
            Some(entry) if entry.phase == Phase::Active => Lower::Ready,
            Some(entry) if entry.want == Want::Up && !matches!(entry.phase, Phase::Failed { .. }) => Lower::Pending,
            Some(entry) if entry.op.is_some() => Lower::Pending,
            _ => Lower::Unavailable,
        }
    }

    /// Answers those who wait for a store to come to rest.
    pub(super) fn rested(&mut self, name: &StoreName) {
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
}
