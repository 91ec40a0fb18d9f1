//! What is seen of a store: its mount, and where its directories lie.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use layered_stores_overlay::{
    mountinfo::{MountState, MountTable},
    refresh::{Changes, Rung},
};
use tokio::time::Instant;

use super::{Entry, Op};
use crate::supervisor::{plan::Phase, status::Problem};

impl Entry {
    /// Notes what the mount table says: what is mounted, and whether whoever comes by path finds it and what it is made of.
    pub(in crate::supervisor) fn look_at(&mut self, table: &MountTable) {
        let layers = &self.spec.layers;
        self.mount = table.state(layers);
        if !self.is_mounted() {
            return;
        }
        if self.unconfirmed.is_some() {
            self.whereabouts.note(layers, table, self.op == Some(Op::Start));
        }
        if let Some(cover) = self.whereabouts.cover(layers, table) {
            self.mount = MountState::Covered(cover);
        }
    }

    /// Notes what the mount table says about a mount that is in use.
    pub(in crate::supervisor) fn look_at_mount(&mut self) {
        let MountState::Mounted { read_only, unpinned, flags, .. } = self.mount.clone() else { return };
        self.read_only = read_only;
        self.look_at_room();
        match (unpinned, flags) {
            (Some(option), _) => {
                let message = format!(
                    "it is mounted with {option}, which makes changes of its layers dangerous; run `layered-stores stop {0}` \
                     and `start {0}`",
                    self.spec.name
                );
                self.problem(Problem::MountOptions, message);
            }
            (None, Some(differ)) => {
                let at = &self.spec.layers.merged;
                let message = format!(
                    "it is mounted {differ}, other than declared; unmount it with `umount {at}`, and it is mounted anew"
                );
                self.problem(Problem::MountOptions, message);
            }
            (None, None) => self.clear(&[Problem::MountOptions]),
        }
    }

    /// Notes whether it takes writes: its mount, and the filesystem of its upper layer.
    pub(in crate::supervisor) fn look_at_room(&mut self) {
        let mut wrong = self.room.clone();
        if self.read_only {
            let message =
                "the kernel refuses writes to it; look for errors of the upper layer's filesystem, or remount it rw";
            wrong = Some((Problem::ReadOnly, message.to_owned()));
        }
        for problem in [Problem::ReadOnly, Problem::Full] {
            match &wrong {
                Some((is, message)) if *is == problem => self.problem(problem, message.clone()),
                _ => self.clear(&[problem]),
            }
        }
    }

    /// Notes which mount its lower store lies on. When that is another, what it shows of the lower store is looked at anew:
    /// a filesystem whose server has ended comes back as another mount, of which no watch tells.
    pub(in crate::supervisor) fn look_at_lower(&mut self, table: &MountTable, now: Instant) {
        // A layered store underneath tells by itself when it is swapped.
        if self.spec.lower_name().is_some() {
            return;
        }
        let is_other = self.whereabouts.lower_is_other(&self.spec.layers, table);
        if is_other && self.phase == Phase::Active {
            self.round += 1;
            self.refreshes.owed.demand(Changes::unknown(), Rung::Probe, now);
        } else if is_other && self.retries.due().is_some() {
            self.try_again();
        }
    }

    /// Notes where its upper layer and its state dir lie. When that is elsewhere, what has failed is tried again: the
    /// filesystem that was missing may be there.
    pub(in crate::supervisor) fn look_at_own(&mut self, table: &MountTable) {
        let seen = [&self.spec.layers.upper, &self.spec.state_dir].map(|dir| table.location(dir.as_str()));
        let mut hasher = DefaultHasher::new();
        seen.hash(&mut hasher);
        let before = self.own_seen.replace(hasher.finish());
        let is_other = before.is_some() && before != self.own_seen;
        if is_other && self.retries.due().is_some() && matches!(self.phase, Phase::Failed { .. }) {
            self.try_again();
        }
    }
}
