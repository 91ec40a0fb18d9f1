//! The refreshes of a store: which are owed, which one is under way, and what those before have brought.

use std::time::Duration;

use layered_stores_model::StoreName;
use layered_stores_overlay::refresh::Fingerprint;
use tokio::time::Instant;

use super::realtime_usec;
use crate::supervisor::{
    limit::Limit,
    owed::{Aim, Owed},
};

/// How often a store is swapped, when it is not root who asks for it. Each swap makes a superblock, and who holds a file open
/// keeps it.
const SWAPS: Limit = Limit::new(8, SWAPS_APART);
pub(in crate::supervisor) const SWAPS_APART: Duration = Duration::from_secs(10);

/// How many superblocks swaps may have left behind that somebody holds, until it is root who asks for another one. An honest
/// store has one for each collection of garbage since its longest build began, if that.
pub(in crate::supervisor) const LEFT: usize = 32;

/// How often a store is refreshed for those who ask for it without a pause. They are all answered by one refresh.
const ASKED: Limit = Limit::new(1000, Duration::from_millis(5));

/// How many lines of the journal refreshes get; others are counted, and the next line has their number.
const LINES: Limit = Limit::new(10, Duration::from_secs(10));

/// The refreshes of a store.
#[derive(Debug)]
pub(in crate::supervisor) struct Refreshes {
    pub(in crate::supervisor) owed: Owed,
    /// What the one under way is to do.
    pub(in crate::supervisor) aim: Option<Aim>,
    /// When the one under way began, if nobody has asked for it.
    pub(in crate::supervisor) unasked: Option<Instant>,
    pub(in crate::supervisor) swaps: Limit,
    pub(in crate::supervisor) asked: Limit,
    /// When those who ask are served again, if they ask too often.
    pub(in crate::supervisor) asked_at: Option<Instant>,
    /// The fingerprint on record, if this run of the daemon has put it there.
    pub(in crate::supervisor) fingerprint: Option<Fingerprint>,
    lines: Limit,
    /// Those that no line of the journal has told of.
    untold: u64,
    /// When the last one was, in microseconds of real time, and how far it went.
    pub(super) last_usec: u64,
    pub(super) last: &'static str,
    pub(super) count: u64,
    pub(in crate::supervisor) swap_count: u64,
}

impl Default for Refreshes {
    fn default() -> Self {
        Self {
            owed: Owed::default(),
            aim: None,
            unasked: None,
            swaps: SWAPS,
            asked: ASKED,
            asked_at: None,
            fingerprint: None,
            lines: LINES,
            untold: 0,
            last_usec: 0,
            last: "",
            count: 0,
            swap_count: 0,
        }
    }
}

impl Refreshes {
    /// Notes that the store is down: what comes up next is a fresh view.
    pub(super) fn forget(&mut self) {
        self.owed = Owed::default();
        self.fingerprint = None;
    }

    /// Notes one that did something, and tells the journal of it.
    pub(in crate::supervisor) fn done(&mut self, name: &StoreName, refresh: &'static str, probed: usize, now: Instant) {
        self.count += 1;
        self.last = refresh;
        self.last_usec = realtime_usec(Duration::ZERO);
        if self.untold > 0 || self.lines.next(now).is_some() {
            self.untold += 1;
            return;
        }
        self.lines.count(now);
        tracing::info!(store = %name, refresh, probed, "{name}: {refresh} (paths probed: {probed})");
    }

    /// When the journal is to be told of those that had no line of their own.
    pub(in crate::supervisor) fn tell_at(&self, now: Instant) -> Option<Instant> {
        (self.untold > 0).then(|| self.lines.next(now).unwrap_or(now))
    }

    /// Tells the journal of them, if it is time.
    pub(in crate::supervisor) fn tell_rest(&mut self, name: &StoreName, now: Instant) {
        if self.tell_at(now).is_some_and(|at| at <= now) {
            self.lines.count(now);
            let (refreshes, swaps) = (std::mem::take(&mut self.untold), self.swap_count);
            tracing::info!(store = %name, refreshes, swaps, "{name}: refreshed {refreshes} times more ({swaps} swaps so far)");
        }
    }
}

#[cfg(test)]
mod tests {
    use layered_stores_overlay::refresh::Changes;

    use super::*;

    #[test]
    fn the_journal_gets_a_few_lines_and_later_the_number_of_the_rest() {
        let (mut refreshes, start) = (Refreshes::default(), Instant::now());
        let name: StoreName = "a".parse().expect("valid");
        for count in 1..=10 {
            refreshes.done(&name, "swapped", 0, start);
            assert_eq!((refreshes.count, refreshes.untold, refreshes.tell_at(start)), (count, 0, None));
        }
        refreshes.done(&name, "reconfigured", 0, start);
        let next = start + Duration::from_secs(10);
        assert_eq!((refreshes.untold, refreshes.tell_at(start)), (1, Some(next)));
        refreshes.done(&name, "reconfigured", 0, next);
        assert_eq!(refreshes.untold, 2, "those before it come first");
        refreshes.tell_rest(&name, start);
        assert_eq!((refreshes.untold, refreshes.tell_at(next)), (2, Some(next)), "it is not time");
        refreshes.tell_rest(&name, next);
        assert_eq!((refreshes.untold, refreshes.tell_at(next)), (0, None));
        refreshes.done(&name, "reconfigured", 0, next);
        assert_eq!(
            (refreshes.untold, refreshes.count, refreshes.last),
            (1, 13, "reconfigured"),
            "that was a line as well"
        );
        assert!(refreshes.last_usec > 0);
    }

    #[test]
    fn a_store_that_is_down_owes_nothing_but_has_been_refreshed() {
        let (mut refreshes, now) = (Refreshes::default(), Instant::now());
        refreshes.done(&"a".parse().expect("valid"), "swapped", 0, now);
        refreshes.owed.see(Changes::unknown(), now);
        refreshes.forget();
        assert_eq!((refreshes.owed.due(), refreshes.count), (None, 1));
    }
}
