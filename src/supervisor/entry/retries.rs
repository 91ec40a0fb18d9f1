//! When what has failed about a store is tried again, and how often a mount that vanishes is made again.

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;

use super::realtime_usec;

/// How often a mount that vanishes is made again: this many times in [`REPAIR_WINDOW`].
pub(super) const REPAIRS: usize = 3;
pub(super) const REPAIR_WINDOW: Duration = Duration::from_secs(60);

/// Waiting times before a failed operation is tried again.
const FIRST: Duration = Duration::from_secs(5);
const MOST: Duration = Duration::from_secs(300);

/// How long something that has failed before is left alone.
pub(super) fn pause_after(failures: u32) -> Duration {
    FIRST.saturating_mul(1 << failures.min(8)).min(MOST)
}

/// When what has failed is tried again.
#[derive(Debug)]
pub(in crate::supervisor) struct Retries {
    /// Whether it may be tried now.
    allowed: bool,
    at: Option<Instant>,
    /// The same for people.
    at_usec: u64,
    failures: u32,
    repairs: VecDeque<Instant>,
}

impl Default for Retries {
    fn default() -> Self {
        Self { allowed: true, at: None, at_usec: 0, failures: 0, repairs: VecDeque::new() }
    }
}

impl Retries {
    /// Whether what has failed may be tried again now.
    pub(in crate::supervisor) fn is_allowed(&self) -> bool {
        self.allowed
    }

    /// When it is tried again; `None` if it is not, or may be now.
    pub(in crate::supervisor) fn due(&self) -> Option<Instant> {
        self.at
    }

    /// The same for people, in microseconds of real time; 0: it is not.
    pub(super) fn due_usec(&self) -> u64 {
        self.at_usec
    }

    /// Allows it at once.
    pub(super) fn at_once(&mut self) {
        (self.allowed, self.at, self.at_usec) = (true, None, 0);
    }

    /// Allows it later, after a pause that grows with each failure.
    pub(in crate::supervisor) fn later(&mut self, now: Instant) {
        let pause = pause_after(self.failures);
        (self.allowed, self.at, self.at_usec) = (false, Some(now + pause), realtime_usec(pause));
        self.failures += 1;
    }

    /// Allows it no more until something changes.
    pub(super) fn give_up(&mut self) {
        self.allowed = false;
    }

    /// Forgets earlier failures.
    pub(super) fn forget_failures(&mut self) {
        self.failures = 0;
    }

    /// Forgets earlier repairs.
    pub(super) fn forget_repairs(&mut self) {
        self.repairs.clear();
    }

    /// Whether a mount that vanished may be made again.
    pub(in crate::supervisor) fn may_repair(&mut self, now: Instant) -> bool {
        self.repairs.retain(|&at| now < at + REPAIR_WINDOW);
        self.repairs.len() < REPAIRS
    }

    /// Notes that one is.
    pub(in crate::supervisor) fn repaired(&mut self, now: Instant) {
        self.repairs.push_back(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_a_success_makes_them_short_again() {
        let (mut retries, now) = (Retries::default(), Instant::now());
        for seconds in [5, 10, 20, 40, 80, 160, 300, 300] {
            let before = realtime_usec(Duration::ZERO);
            retries.later(now);
            let after = realtime_usec(Duration::ZERO);
            assert!(!retries.is_allowed());
            assert_eq!(retries.due(), Some(now + Duration::from_secs(seconds)));
            let pause = seconds * 1_000_000;
            assert!((before + pause..=after + pause).contains(&retries.due_usec()));
            retries.at_once();
            assert!(retries.is_allowed() && retries.due().is_none() && retries.due_usec() == 0);
        }
        retries.forget_failures();
        retries.later(now);
        assert_eq!(retries.due(), Some(now + FIRST));
    }

    #[test]
    fn a_mount_that_vanishes_all_the_time_is_not_made_again_for_ever() {
        let (mut retries, now) = (Retries::default(), Instant::now());
        for _ in 0..REPAIRS {
            assert!(retries.may_repair(now));
            retries.repaired(now);
        }
        assert!(!retries.may_repair(now + REPAIR_WINDOW / 2));
        retries.forget_repairs();
        assert!(retries.may_repair(now), "somebody has asked for it");
        for _ in 0..REPAIRS {
            retries.repaired(now);
        }
        assert!(!retries.may_repair(now));
        assert!(retries.may_repair(now + REPAIR_WINDOW));
    }
}
