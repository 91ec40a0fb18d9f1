//! Whether everything at rest is as it is said to be.

use layered_stores_model::StoreName;
use layered_stores_overlay::mountinfo::MountState;

use super::{
    Play, has, name,
    world::{Mount, NAMES},
};
use crate::{
    supervisor::{Problem, State},
    systemd::SocketState,
};

impl Play {
    /// What all stores have come to, in words that can be compared.
    pub(super) fn come_to(&self) -> Vec<String> {
        let of = |number| {
            let name = name(number);
            // What somebody else has mounted is left alone, and what one daemon knows of it the next need not.
            let is_theirs = self.spec_in_force(&name).is_some_and(|spec| {
                let mut world = self.world.lock();
                // They may have mounted it where it was declared before.
                let upper = &spec.layers.upper;
                let is_of_it = |mount: &Mount| mount.layers.as_ref().is_some_and(|layers| layers.upper == *upper);
                let is_there = world.state(&spec.layers) != MountState::Absent || world.mounts.iter().any(is_of_it);
                is_there && !world.store(&name).unit
            });
            match self.status(&name) {
                _ if is_theirs => format!("{name}: theirs"),
                Some(status) if status.declared || self.world.lock().store(&name).unit => {
                    format!("{name}: {}", status.state)
                }
                _ => format!("{name}: gone"),
            }
        };
        (0..NAMES.len()).map(of).collect()
    }

    /// Looks whether everything at rest is as it is said to be.
    pub(super) fn check(&self) {
        for of in 0..NAMES.len() {
            let name = name(of);
            let Some(status) = self.status(&name) else {
                self.check_gone(&name);
                continue;
            };
            let declared = self.spec(&name);
            let mut wrong = Vec::new();
            let mut world = self.world.lock();
            let mount = world.state(&status.spec.layers);
            let served = world.sockets.get(&name).cloned();
            let can_swap = world.can_swap;
            let store = world.store(&name);
            let is_mounted = matches!(mount, MountState::Mounted { twice: false, .. });
            match status.state {
                State::Active => {
                    wrong.extend((!is_mounted).then_some("it is not mounted"));
                    wrong.extend((!store.locked).then_some("it is not locked"));
                    wrong.extend(store.record.is_none().then_some("it has no record"));
                    let is_served = served == Some(SocketState::Listening);
                    wrong.extend(
                        (is_served != status.spec.daemon.is_some()).then_some("its Nix daemon is not as declared"),
                    );
                    let stale = store.stale.values().any(|needs_swap| !*needs_swap);
                    wrong.extend(stale.then_some("a path is stale that a reconfigure cures"));
                    let stale = can_swap && !store.lost && (store.behind || !store.stale.is_empty());
                    wrong.extend(stale.then_some("a path is stale that a swap cures"));
                }
                State::Inactive => {
                    wrong.extend((mount != MountState::Absent).then_some("it is mounted"));
                    wrong.extend(store.locked.then_some("it is locked"));
                }
                // Given up on until somebody asks.
                State::Failed => {}
                State::Activating | State::Deactivating => wrong.push("it is not at rest"),
            }
            let is_busy = has(&status, Problem::Busy);
            match declared {
                Some(spec)
                    if is_mounted
                        && store.unit
                        && *status.spec != spec
                        && !is_busy
                        && !has(&status, Problem::NotApplied) =>
                {
                    wrong.push("it is not as declared");
                }
                None if store.unit && !is_busy => wrong.push("it is declared no more, and not gone"),
                _ => {}
            }
            wrong.extend(store.busy_with.is_some().then_some("something is being done about it"));
            wrong.extend(has(&status, Problem::Stuck).then_some("it is said to be stuck"));
            drop(world);
            for wrong in wrong {
                let problems = &status.problems;
                let reason = &status.state_reason;
                self.world.blame(format!("{name} is {} ({reason}), {problems:?}, {mount:?}: {wrong}", status.state));
            }
        }
    }

    /// Looks whether nothing is left of a store that the daemon does not know. What could not be undone is for the
    /// next daemon, which the record tells of it.
    fn check_gone(&self, name: &StoreName) {
        let mut world = self.world.lock();
        let store = world.store(name);
        let is_left = store.locked || (store.unit && store.record.is_none());
        let text = format!("{name} is forgotten, and not all is undone: {store:?}");
        if is_left {
            world.violations.push(text);
        }
    }
}
