//! What is to be looked at again, and when.
//!
//! A place for checks that come back as long as there is something to check. Without that, nothing is due, and the engine sets no
//! timer: a daemon at rest is not woken.

use std::collections::BTreeMap;

use tokio::time::Instant;

/// Checks, each with the time at which it is due.
#[derive(Debug)]
pub(super) struct Schedule<Check> {
    due: BTreeMap<Check, Instant>,
}

impl<Check> Default for Schedule<Check> {
    fn default() -> Self {
        Self { due: BTreeMap::new() }
    }
}

impl<Check: Clone + Ord> Schedule<Check> {
    /// Has a check made at a time, or earlier if that was planned.
    pub(super) fn plan(&mut self, check: Check, at: Instant) {
        let planned = self.due.entry(check).or_insert(at);
        *planned = at.min(*planned);
    }

    /// Has a check not made.
    pub(super) fn drop(&mut self, check: &Check) {
        self.due.remove(check);
    }

    /// When the next check is due.
    pub(super) fn next(&self) -> Option<Instant> {
        self.due.values().min().copied()
    }

    /// The checks that are due. They are planned no more.
    pub(super) fn take(&mut self, now: Instant) -> Vec<Check> {
        let due: Vec<Check> = self.due.iter().filter(|(_, at)| **at <= now).map(|(check, _)| check.clone()).collect();
        self.due.retain(|_, at| *at > now);
        due
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn with_nothing_to_check_there_is_no_timer() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        assert_eq!(schedule.next(), None);
        let later = now + Duration::from_secs(1);
        schedule.plan("a", later);
        schedule.plan("a", later + Duration::from_secs(1));
        schedule.plan("b", now);
        schedule.plan("c", now);
        schedule.drop(&"c");
        assert_eq!(schedule.next(), Some(now));
        assert_eq!(schedule.take(now), ["b"]);
        assert_eq!(schedule.next(), Some(later), "the earlier of both times");
        assert_eq!(schedule.take(later), ["a"]);
        assert_eq!(schedule.next(), None);
    }
}
