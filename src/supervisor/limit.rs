//! How often something may be done: a few times at once, and then one at a time.

use std::time::Duration;

use tokio::time::Instant;

/// A limit of `burst` times at once, and one more each `every` after that: a token bucket, kept as the time at which it is
/// full again.
#[derive(Debug)]
pub(super) struct Limit {
    burst: u32,
    every: Duration,
    full_at: Option<Instant>,
}

impl Limit {
    pub(super) const fn new(burst: u32, every: Duration) -> Self {
        Self { burst, every, full_at: None }
    }

    /// When it may be done again; `None`: now.
    pub(super) fn next(&self, now: Instant) -> Option<Instant> {
        let next = self.full_at?.checked_sub(self.every * self.burst.saturating_sub(1))?;
        (next > now).then_some(next)
    }

    /// Notes that it was done. Done in spite of the limit, it counts for no more than one that was next.
    pub(super) fn count(&mut self, now: Instant) {
        let most = now + self.every * self.burst;
        self.full_at = Some((self.full_at.map_or(now, |at| at.max(now)) + self.every).min(most));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_at_once_and_then_one_at_a_time() {
        let every = Duration::from_secs(10);
        let start = Instant::now();
        let mut limit = Limit::new(3, every);
        for _ in 0..3 {
            assert_eq!(limit.next(start), None);
            limit.count(start);
        }
        assert_eq!(limit.next(start), Some(start + every));
        // Whoever was let through all the same does not make others wait longer.
        limit.count(start);
        assert_eq!(limit.next(start), Some(start + every));

        let later = start + every;
        assert_eq!(limit.next(later), None);
        limit.count(later);
        assert_eq!(limit.next(later), Some(later + every));
        // After a rest it is as it was at the beginning.
        let rested = later + every * 3;
        for _ in 0..3 {
            assert_eq!(limit.next(rested), None);
            limit.count(rested);
        }
        assert_eq!(limit.next(rested), Some(rested + every));
    }
}
