//! What stores that lie on one another mean for one another: pure functions.

use super::{Carries, Lower, Want};

/// What is being done about a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::supervisor) enum Doing {
    Nothing,
    /// It is on its way down.
    TakingDown,
    SomethingElse,
}

/// What the stores on top of one have to know of it.
#[derive(Clone, Copy, Debug)]
pub(in crate::supervisor) struct Underneath {
    pub want: Want,
    /// A specification waits that needs the mount to be made anew.
    pub respecify: bool,
    pub is_active: bool,
    /// It is wanted up, and was not given up on.
    pub is_coming_up: bool,
    /// It is to go down, or to be made anew, and cannot for now.
    pub cannot_go: bool,
    pub is_stuck: bool,
    pub doing: Doing,
}

/// What a store is for those on top of it.
pub(in crate::supervisor) fn lower(of: &Underneath) -> Lower {
    if of.want != Want::Up {
        return Lower::Unavailable;
    }
    if of.respecify {
        // As long as it hangs, is in use, or is not the daemon's to take down, nobody knows how long it will be.
        return if of.is_stuck || of.cannot_go { Lower::Unavailable } else { Lower::Leaving };
    }
    match of.doing {
        // On its way down it would be gone from beneath what was begun on it.
        Doing::Nothing | Doing::SomethingElse if of.is_active => Lower::Ready,
        _ if of.is_stuck => Lower::Unavailable,
        Doing::TakingDown | Doing::SomethingElse => Lower::Pending,
        Doing::Nothing if of.is_coming_up => Lower::Pending,
        Doing::Nothing => Lower::Unavailable,
    }
}

/// What a store has to know of one on top of it that is mounted, or on its way up.
#[derive(Clone, Copy, Debug)]
pub(in crate::supervisor) struct OnTop {
    pub want: Want,
    /// A specification waits that needs the mount to be made anew, and may be put in force.
    pub respecify: bool,
    /// It was given up on, and what it was given up on for is still there.
    pub is_given_up: bool,
    /// What is mounted in its place was not made by the daemon.
    pub is_not_ours: bool,
    pub doing: Doing,
}

/// What the stores on top mean for one that is to go down, and to come back if it is wanted up.
pub(in crate::supervisor) fn carries(want: Want, above: impl IntoIterator<Item = OnTop>) -> Carries {
    // For a store that comes back they make way, and for one that does not they go only if they are to.
    let is_to_stay = |on_top: &OnTop| want != Want::Up && on_top.want == Want::Up && !on_top.respecify;
    let stays = |on_top: OnTop| {
        on_top.doing == Doing::Nothing && (on_top.is_given_up || on_top.is_not_ours || is_to_stay(&on_top))
    };
    let staying = above.into_iter().map(|on_top| if stays(on_top) { Carries::Staying } else { Carries::Leaving });
    staying.fold(Carries::Nothing, |all, one| if all == Carries::Staying { all } else { one })
}

#[cfg(test)]
mod tests {
    use super::*;

    const UP: Underneath = Underneath {
        want: Want::Up,
        respecify: false,
        is_active: true,
        is_coming_up: true,
        cannot_go: false,
        is_stuck: false,
        doing: Doing::Nothing,
    };
    const DOWN: Underneath = Underneath { is_active: false, ..UP };
    const ABOVE: OnTop =
        OnTop { want: Want::Up, respecify: false, is_given_up: false, is_not_ours: false, doing: Doing::Nothing };

    #[test]
    fn what_a_store_is_for_those_on_top_of_it() {
        let failed = Underneath { is_coming_up: false, ..DOWN };
        let changes = Underneath { respecify: true, ..UP };
        for (what, of, expected) in [
            ("one that is up is ready", UP, Lower::Ready),
            ("also while it is refreshed", Underneath { doing: Doing::SomethingElse, ..UP }, Lower::Ready),
            ("also when it hangs: what is mounted stays", Underneath { is_stuck: true, ..UP }, Lower::Ready),
            ("not while it is taken down", Underneath { doing: Doing::TakingDown, ..UP }, Lower::Pending),
            ("one that comes up is waited for", DOWN, Lower::Pending),
            ("not when it hangs", Underneath { is_stuck: true, ..DOWN }, Lower::Unavailable),
            ("one that was given up on is not", failed, Lower::Unavailable),
            ("it may be what is being mended", Underneath { doing: Doing::SomethingElse, ..failed }, Lower::Pending),
            ("one that is to be down is not", Underneath { want: Want::Down, ..UP }, Lower::Unavailable),
            ("one that is to be gone is not", Underneath { want: Want::Gone, ..UP }, Lower::Unavailable),
            ("for one that changes they make way", changes, Lower::Leaving),
            ("not for one that does not come back", Underneath { want: Want::Down, ..changes }, Lower::Unavailable),
            ("but not when it hangs", Underneath { is_stuck: true, ..changes }, Lower::Unavailable),
            ("and not when it is in use", Underneath { cannot_go: true, ..changes }, Lower::Unavailable),
        ] {
            assert_eq!(lower(&of), expected, "{what}");
        }
    }

    #[test]
    fn who_is_on_top_stays_or_leaves() {
        for (what, want, above, expected) in [
            ("nobody", Want::Down, vec![], Carries::Nothing),
            ("for one that comes back they make way", Want::Up, vec![ABOVE], Carries::Leaving),
            ("for one that does not they stay", Want::Down, vec![ABOVE], Carries::Staying),
            ("unless they go", Want::Gone, vec![OnTop { want: Want::Down, ..ABOVE }], Carries::Leaving),
            ("or change", Want::Gone, vec![OnTop { respecify: true, ..ABOVE }], Carries::Leaving),
            ("or are not settled", Want::Gone, vec![OnTop { doing: Doing::SomethingElse, ..ABOVE }], Carries::Leaving),
            ("what is given up on stays", Want::Up, vec![OnTop { is_given_up: true, ..ABOVE }], Carries::Staying),
            ("what is not ours stays", Want::Up, vec![OnTop { is_not_ours: true, ..ABOVE }], Carries::Staying),
            ("one is enough", Want::Up, vec![OnTop { is_not_ours: true, ..ABOVE }, ABOVE], Carries::Staying),
            ("wherever", Want::Up, vec![ABOVE, OnTop { is_not_ours: true, ..ABOVE }], Carries::Staying),
        ] {
            assert_eq!(carries(want, above), expected, "{what}");
        }
    }
}
