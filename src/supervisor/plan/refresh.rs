//! Whose turn a refresh is, how far it may go, and what follows from what it has found: pure functions.

use layered_stores_overlay::refresh::Rung;
use tokio::time::Instant;

/// Who asks for a refresh of a store.
#[derive(Clone, Copy, Debug)]
pub(in crate::supervisor) struct Asking {
    /// Somebody waits for it.
    pub is_waited_for: bool,
    /// Root is among them.
    pub root_asks: bool,
    /// When there may be another one for those who wait; `None`: now.
    pub next: Option<Instant>,
    /// There may be another one now that nobody has asked for.
    pub has_room: bool,
}

/// For whom a refresh is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::supervisor) enum Turn {
    /// For those who wait: all that is owed.
    Asked,
    /// For nobody: what is due.
    Unasked,
    /// For nobody now.
    Nobody,
}

impl Asking {
    /// For whom the next refresh is, and when it is those who wait if it is not.
    pub(in crate::supervisor) fn turn(&self) -> (Turn, Option<Instant>) {
        let asked_at = self.next.filter(|_| self.is_waited_for && !self.root_asks);
        let turn = match (self.is_waited_for, asked_at) {
            (true, None) => Turn::Asked,
            _ if self.has_room => Turn::Unasked,
            _ => Turn::Nobody,
        };
        (turn, asked_at)
    }
}

/// What limits swaps: each makes a superblock, which lives as long as somebody has a file of it open.
#[derive(Clone, Copy, Debug)]
pub(in crate::supervisor) struct Swaps {
    /// When there may be another one; `None`: now.
    pub next: Option<Instant>,
    /// So many are held already that root has to ask for another one.
    pub are_held: bool,
}

/// How far a refresh may go that begins with `from`.
pub(in crate::supervisor) fn how_far(from: Rung, root_asks: bool, swaps: impl FnOnce() -> Swaps) -> Rung {
    // What lies on a superblock that was swapped out has to follow.
    if root_asks || from == Rung::Swap {
        return Rung::Swap;
    }
    let Swaps { next, are_held } = swaps();
    if next.is_none() && !are_held { Rung::Swap } else { Rung::Reconfigure }
}

/// What follows from what a refresh has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::supervisor) enum Verdict {
    /// All is right that it looked at.
    Right,
    /// All that can be done was done, and some of it is wrong all the same.
    Stale,
    /// Only a swap helps, and there is to be none as long as so many superblocks are held.
    Held,
    /// Only a swap helps, for which it is not the turn.
    Queue,
}

/// Judges what a refresh has found.
pub(in crate::supervisor) fn verdict(is_right: bool, may_swap_help: bool, are_held: bool) -> Verdict {
    match (is_right, may_swap_help) {
        (true, _) => Verdict::Right,
        (false, false) => Verdict::Stale,
        (false, true) if are_held => Verdict::Held,
        (false, true) => Verdict::Queue,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn those_who_wait_come_first_unless_they_ask_too_often() {
        let later = Instant::now() + Duration::from_secs(1);
        let idle = Asking { is_waited_for: false, root_asks: false, next: None, has_room: true };
        let asked = Asking { is_waited_for: true, ..idle };
        let often = Asking { next: Some(later), ..asked };
        for (what, asking, expected) in [
            ("what is due is done", idle, (Turn::Unasked, None)),
            ("not more than there is room for", Asking { has_room: false, ..idle }, (Turn::Nobody, None)),
            ("an earlier limit is of no account", Asking { next: Some(later), ..idle }, (Turn::Unasked, None)),
            ("who waits is served", asked, (Turn::Asked, None)),
            ("without room as well", Asking { has_room: false, ..asked }, (Turn::Asked, None)),
            ("who asks too often waits, and what is due is done", often, (Turn::Unasked, Some(later))),
            ("or is not", Asking { has_room: false, ..often }, (Turn::Nobody, Some(later))),
            ("root does not wait", Asking { root_asks: true, ..often }, (Turn::Asked, None)),
        ] {
            assert_eq!(asking.turn(), expected, "{what}");
        }
    }

    #[test]
    fn swaps_are_limited_but_for_root_and_for_what_lies_on_one() {
        let later = Instant::now() + Duration::from_secs(1);
        let free = Swaps { next: None, are_held: false };
        let often = Swaps { next: Some(later), ..free };
        let held = Swaps { are_held: true, ..free };
        for (what, from, root_asks, swaps, expected) in [
            ("free", Rung::Probe, false, free, Rung::Swap),
            ("too often", Rung::Probe, false, often, Rung::Reconfigure),
            ("too many", Rung::Reconfigure, false, held, Rung::Reconfigure),
            ("for root, too often", Rung::Probe, true, often, Rung::Swap),
            ("for root, too many", Rung::Probe, true, held, Rung::Swap),
            ("the one underneath was swapped", Rung::Swap, false, held, Rung::Swap),
        ] {
            assert_eq!(how_far(from, root_asks, || swaps), expected, "{what}");
        }
    }

    #[test]
    fn what_is_wrong_waits_for_a_swap_if_one_can_help() {
        for (is_right, may_swap_help, are_held, expected) in [
            (true, true, true, Verdict::Right),
            (true, false, false, Verdict::Right),
            (false, false, false, Verdict::Stale),
            (false, false, true, Verdict::Stale),
            (false, true, true, Verdict::Held),
            (false, true, false, Verdict::Queue),
        ] {
            assert_eq!(verdict(is_right, may_swap_help, are_held), expected);
        }
    }
}
