//! What to do next about a store, given what is wanted and what is: a pure function.
//!
//! Nothing is remembered between two calls but what is in [`View`], so a daemon that was killed and started again comes to
//! the same answers as one that was not.

pub(super) mod change;
pub(super) mod refresh;
pub(super) mod stack;

use layered_stores_overlay::mountinfo::{Cover, MountState};

/// What is wanted of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    /// Mounted and kept right.
    Up,
    /// Not mounted.
    Down,
    /// Not mounted, and forgotten: its declaration is gone.
    Gone,
}

/// Where the engine believes a store is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing was done about it, or it was taken down.
    Inactive,
    /// It was brought up or adopted.
    Active,
    /// It was given up on, and stays so while the mount table shows this.
    Failed {
        /// What was mounted then.
        seen: MountState,
    },
}

/// The store underneath, if that is a layered store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lower {
    /// There is none, or it is active.
    Ready,
    /// It may become active.
    Pending,
    /// It is to go down and come back.
    Leaving,
    /// It failed, is not wanted, or is to go down and cannot.
    Unavailable,
    /// It is up, and not where it would have to be.
    Elsewhere,
}

/// The layered stores on top that are mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Carries {
    /// None.
    Nothing,
    /// They go down as well, or may.
    Leaving,
    /// One of them was given up on, and stays.
    Staying,
}

/// All that a decision depends on.
#[derive(Clone, Debug)]
pub(super) struct View<'a> {
    pub want: Want,
    pub phase: &'a Phase,
    pub mount: &'a MountState,
    pub lower: Lower,
    /// A specification waits that needs the mount to be made anew.
    pub respecify: bool,
    /// Layered stores on top of this one are mounted.
    pub carries: Carries,
    /// The mount was made by the daemon.
    pub ours: bool,
    /// A mount that vanished may be made again: it has not happened too often.
    pub repair: bool,
    /// An operation that failed may be tried again now.
    pub retry: bool,
    /// Its Nix daemon, or that it has none, is to be seen to.
    pub serve: bool,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing now.
    Rest,
    /// It is not mounted and that is as wanted.
    Settle,
    /// Bring it up.
    Start {
        /// Its mount was taken away behind the daemon's back.
        repair: bool,
    },
    /// Take over a mount that is right already.
    Adopt,
    /// Take the upper of two mounts away, which an interrupted swap left.
    FinishSwap,
    /// Have its Nix daemon be what is declared.
    Serve,
    /// Take it down.
    Stop,
    /// Tell that it cannot be taken down for now, because what lies on it stays.
    Refuse,
    /// Put the waiting specification in force.
    Respecify,
    /// Undo what was prepared and forget it.
    Forget,
    /// Give up until something changes.
    Fail(Failure),
}

/// Why a store is given up on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// The store underneath is not there.
    Lower,
    /// The store underneath is not where it is declared.
    LowerElsewhere,
    /// Something is mounted on top of it, or of a directory above one of its own.
    Covered(Cover),
    /// Something else is mounted in its place.
    Foreign(String),
    /// Its mount vanished too often.
    MountLost,
    /// It should be taken down, and the mount was not made by the daemon.
    NotOurs,
}

/// Decides. Deciding again after the step was carried out converges to [`Step::Rest`].
pub(super) fn plan(view: &View<'_>) -> Step {
    let given_up = |failure: Failure| {
        // Whoever has it tried again hears so again.
        let is_so = *view.phase == (Phase::Failed { seen: view.mount.clone() }) && !view.retry;
        if is_so { Step::Rest } else { Step::Fail(failure) }
    };
    // What was in the way of a store that was given up on is gone.
    let is_free = matches!(view.phase, Phase::Failed { seen } if seen != view.mount);
    let may_stop = view.retry || is_free;
    let down = view.want != Want::Up || view.respecify;
    match (down, view.mount) {
        (true, MountState::Absent) => match (view.want, view.phase) {
            (Want::Gone, _) => Step::Forget,
            _ if view.respecify => Step::Respecify,
            (_, Phase::Inactive) => Step::Rest,
            _ => Step::Settle,
        },
        (true, MountState::Mounted { twice: true, .. }) => Step::FinishSwap,
        (true, MountState::Mounted { .. }) if !view.ours => given_up(Failure::NotOurs),
        // Those on top go first; until then there is nothing to do.
        (true, MountState::Mounted { .. }) if view.carries == Carries::Leaving => Step::Rest,
        (true, MountState::Mounted { .. }) => match view.phase {
            // It was not taken over, and stays.
            Phase::Failed { .. } if may_stop && view.carries == Carries::Staying => Step::Adopt,
            _ if may_stop && view.carries == Carries::Staying => Step::Refuse,
            _ if may_stop => Step::Stop,
            // It stays up for now, and as long as it does, it is looked after.
            Phase::Inactive => Step::Adopt,
            Phase::Active if view.serve => Step::Serve,
            _ => Step::Rest,
        },
        // systemd would unmount what is on top, which is not ours to unmount.
        (true, MountState::Covered(cover)) => given_up(Failure::Covered(cover.clone())),
        // Whatever it is, the store is not up.
        (true, MountState::Foreign { .. }) => match view.want {
            Want::Gone => Step::Forget,
            _ if view.respecify => Step::Respecify,
            _ if *view.phase == Phase::Inactive => Step::Rest,
            _ => Step::Settle,
        },

        (false, MountState::Absent) => match view.phase {
            Phase::Failed { seen: MountState::Absent } if !view.retry => Step::Rest,
            // Its mount was taken away, and cannot be made again yet.
            Phase::Active if matches!(view.lower, Lower::Pending | Lower::Leaving) => Step::Settle,
            _ if matches!(view.lower, Lower::Pending | Lower::Leaving) => Step::Rest,
            _ if view.lower == Lower::Unavailable => given_up(Failure::Lower),
            _ if view.lower == Lower::Elsewhere => given_up(Failure::LowerElsewhere),
            Phase::Active if view.repair => Step::Start { repair: true },
            Phase::Active => Step::Fail(Failure::MountLost),
            _ => Step::Start { repair: false },
        },
        (false, MountState::Mounted { twice: true, .. }) => Step::FinishSwap,
        // It has to make way for the store underneath, and comes back after it.
        (false, MountState::Mounted { .. }) if view.lower == Lower::Leaving && view.ours => {
            if may_stop && view.carries == Carries::Nothing { Step::Stop } else { Step::Rest }
        }
        (false, mount @ MountState::Mounted { .. }) => match view.phase {
            Phase::Active if view.serve => Step::Serve,
            Phase::Active => Step::Rest,
            Phase::Failed { seen } if seen == mount && !view.retry => Step::Rest,
            _ if view.lower == Lower::Pending => Step::Rest,
            _ => Step::Adopt,
        },
        (false, MountState::Covered(cover)) => given_up(Failure::Covered(cover.clone())),
        (false, MountState::Foreign { what }) => given_up(Failure::Foreign(what.clone())),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cover() -> Cover {
        let point = "/srv/root/nix/store".to_owned();
        Cover { what: "tmpfs".to_owned(), hides: point.clone(), point }
    }

    fn mount_states() -> impl Strategy<Value = MountState> {
        prop_oneof![
            Just(MountState::Absent),
            (any::<bool>(), any::<bool>()).prop_map(|(read_only, twice)| MountState::Mounted {
                read_only,
                twice,
                unpinned: None,
                flags: None
            }),
            Just(MountState::Covered(cover())),
            Just(MountState::Foreign { what: "tmpfs".into() }),
        ]
    }

    fn phases() -> impl Strategy<Value = Phase> {
        prop_oneof![Just(Phase::Inactive), Just(Phase::Active), mount_states().prop_map(|seen| Phase::Failed { seen })]
    }

    proptest! {
        /// Whatever the situation: carrying out what is planned, with each step doing what it should, comes to rest, and at
        /// rest the store is where it should be or something is in the way.
        #[test]
        fn every_situation_comes_to_rest(
            want in prop_oneof![Just(Want::Up), Just(Want::Down), Just(Want::Gone)],
            mut phase in phases(),
            mut mount in mount_states(),
            lower in prop_oneof![
                Just(Lower::Ready),
                Just(Lower::Pending),
                Just(Lower::Leaving),
                Just(Lower::Unavailable),
                Just(Lower::Elsewhere)
            ],
            mut respecify in any::<bool>(),
            carries in prop_oneof![Just(Carries::Nothing), Just(Carries::Leaving), Just(Carries::Staying)],
            (mut ours, repair, mut retry, mut serve) in any::<(bool, bool, bool, bool)>(),
        ) {
            let mounted = MountState::Mounted { read_only: false, twice: false, unpinned: None, flags: None };
            for _ in 0..9 {
                let view =
                    View { want, phase: &phase, mount: &mount, lower, respecify, carries, ours, repair, retry, serve };
                match plan(&view) {
                    Step::Rest => {
                        let up = matches!(mount, MountState::Mounted { .. });
                        let failed = matches!(phase, Phase::Failed { .. });
                        match want {
                            Want::Up if !respecify => {
                                let active = up && phase == Phase::Active && (!serve || lower == Lower::Leaving);
                                prop_assert!(active || failed || lower != Lower::Ready, "{:?} {:?}", mount, phase);
                            }
                            // What is in the way of a change, or of an end, is the same.
                            Want::Down if !respecify && !up => {}
                            _ => {
                                prop_assert!(mount != MountState::Absent);
                                prop_assert!(failed || carries == Carries::Leaving || phase == Phase::Active && !retry, "{:?} {:?}", mount, phase);
                            }
                        }
                        return Ok(());
                    }
                    Step::Forget => {
                        prop_assert_eq!(want, Want::Gone);
                        let is_ours = matches!(mount, MountState::Mounted { .. } | MountState::Covered(_));
                        prop_assert!(!is_ours);
                        return Ok(());
                    }
                    Step::Settle => phase = Phase::Inactive,
                    Step::Start { .. } => {
                        prop_assert_eq!(&mount, &MountState::Absent);
                        prop_assert_eq!(lower, Lower::Ready);
                        (mount, phase, ours) = (mounted.clone(), Phase::Active, true);
                    }
                    Step::Adopt => phase = Phase::Active,
                    Step::FinishSwap => mount = mounted.clone(),
                    Step::Serve => {
                        let is_up = phase == Phase::Active && matches!(mount, MountState::Mounted { .. });
                        prop_assert!(is_up, "only a store that is up has one");
                        serve = false;
                    }
                    Step::Stop => {
                        prop_assert!(ours && carries == Carries::Nothing, "never unmount what is not ours or is stood on");
                        (mount, phase) = (MountState::Absent, Phase::Inactive);
                    }
                    Step::Refuse => {
                        prop_assert_eq!(carries, Carries::Staying);
                        retry = false;
                        if let Phase::Failed { seen } = &mut phase {
                            seen.clone_from(&mount);
                        }
                    }
                    Step::Respecify => (respecify, phase) = (false, Phase::Inactive),
                    Step::Fail(_) => (phase, retry) = (Phase::Failed { seen: mount.clone() }, false),
                }
            }
            prop_assert!(false, "no rest");
        }
    }

    #[test]
    fn decisions_are_as_people_expect_them() {
        let mounted = MountState::Mounted { read_only: false, twice: false, unpinned: None, flags: None };
        let covered = MountState::Covered(cover());
        let base = View {
            want: Want::Up,
            phase: &Phase::Inactive,
            mount: &MountState::Absent,
            lower: Lower::Ready,
            respecify: false,
            carries: Carries::Nothing,
            ours: true,
            repair: true,
            retry: true,
            serve: false,
        };
        let failed = Phase::Failed { seen: covered.clone() };
        let failed_as_mounted = Phase::Failed { seen: mounted.clone() };
        let failed_as_absent = Phase::Failed { seen: MountState::Absent };
        let foreign = MountState::Foreign { what: "tmpfs".to_owned() };
        for (what, view, step) in [
            ("a declared store is started", base.clone(), Step::Start { repair: false }),
            ("a mount that is right is adopted", View { mount: &mounted, ..base.clone() }, Step::Adopt),
            (
                "a mount that vanished is made again",
                View { phase: &Phase::Active, ..base.clone() },
                Step::Start { repair: true },
            ),
            (
                "a mount that vanishes all the time is not",
                View { phase: &Phase::Active, repair: false, ..base.clone() },
                Step::Fail(Failure::MountLost),
            ),
            (
                "a store that is up has its Nix daemon seen to",
                View { mount: &mounted, phase: &Phase::Active, serve: true, ..base.clone() },
                Step::Serve,
            ),
            ("a store waits for the one underneath", View { lower: Lower::Pending, ..base.clone() }, Step::Rest),
            (
                "so does one whose mount was taken away, which is down until then",
                View { phase: &Phase::Active, lower: Lower::Leaving, ..base.clone() },
                Step::Settle,
            ),
            (
                "and one that is mounted and not taken over yet",
                View { mount: &mounted, lower: Lower::Pending, ..base.clone() },
                Step::Rest,
            ),
            (
                "what was given up on is not tried again by itself",
                View { phase: &failed_as_absent, retry: false, ..base.clone() },
                Step::Rest,
            ),
            (
                "but when somebody asks",
                View { phase: &failed_as_absent, ..base.clone() },
                Step::Start { repair: false },
            ),
            (
                "nor is a mount that was given up on taken over",
                View { mount: &mounted, phase: &failed_as_mounted, retry: false, ..base.clone() },
                Step::Rest,
            ),
            (
                "but when somebody asks for that",
                View { mount: &mounted, phase: &failed_as_mounted, ..base.clone() },
                Step::Adopt,
            ),
            (
                "where something else is mounted, a store is down as it should be",
                View { mount: &foreign, want: Want::Down, ..base.clone() },
                Step::Rest,
            ),
            (
                "and is noted to be, if it was up",
                View { mount: &foreign, want: Want::Down, phase: &Phase::Active, ..base.clone() },
                Step::Settle,
            ),
            (
                "a store does not start without the one underneath",
                View { lower: Lower::Unavailable, ..base.clone() },
                Step::Fail(Failure::Lower),
            ),
            (
                "a store does not start on one that is not where it is declared",
                View { lower: Lower::Elsewhere, ..base.clone() },
                Step::Fail(Failure::LowerElsewhere),
            ),
            (
                "a covered store is not usable",
                View { mount: &covered, phase: &Phase::Active, ..base.clone() },
                Step::Fail(Failure::Covered(cover())),
            ),
            (
                "a store makes way for the one underneath that changes",
                View { mount: &mounted, phase: &Phase::Active, lower: Lower::Leaving, ..base.clone() },
                Step::Stop,
            ),
            ("uncovered, it is usable again", View { mount: &mounted, phase: &failed, ..base.clone() }, Step::Adopt),
            (
                "what covers it is not unmounted to stop it",
                View { mount: &covered, want: Want::Down, ..base.clone() },
                Step::Fail(Failure::Covered(cover())),
            ),
            (
                "uncovered, it is stopped as it should be",
                View { mount: &mounted, want: Want::Down, phase: &failed, retry: false, ..base.clone() },
                Step::Stop,
            ),
            (
                "what the daemon did not mount it does not unmount",
                View { mount: &mounted, want: Want::Gone, ours: false, ..base.clone() },
                Step::Fail(Failure::NotOurs),
            ),
            (
                "a store that carries another one waits for that to go",
                View { mount: &mounted, want: Want::Down, carries: Carries::Leaving, ..base.clone() },
                Step::Rest,
            ),
            (
                "a store that carries one that stays cannot go",
                View { mount: &mounted, want: Want::Down, carries: Carries::Staying, ..base.clone() },
                Step::Refuse,
            ),
            (
                "a store that cannot go for now is looked after",
                View { mount: &mounted, want: Want::Gone, retry: false, ..base.clone() },
                Step::Adopt,
            ),
            (
                "also if that has failed before",
                View { mount: &mounted, want: Want::Down, phase: &failed, carries: Carries::Staying, ..base.clone() },
                Step::Adopt,
            ),
            (
                "its Nix daemon as well",
                View {
                    mount: &mounted,
                    want: Want::Gone,
                    phase: &Phase::Active,
                    retry: false,
                    serve: true,
                    ..base.clone()
                },
                Step::Serve,
            ),
            (
                "a changed store is taken down before it is made anew",
                View { mount: &mounted, phase: &Phase::Active, respecify: true, ..base },
                Step::Stop,
            ),
        ] {
            assert_eq!(plan(&view), step, "{what}");
        }
    }
}
