//! The refreshes that a store should get, and when.
//!
//! A change of a layer is looked into twice. The first time at once, for what was looked for before it came: builds wait for it.
//! That glance reconfigures at most. The second time when the layers have come to rest, and then the refresh goes as far as it
//! has to: a swap for a path that is still being written, or taken away, would be one in vain.

use std::{collections::BTreeSet, ffi::OsStr, time::Duration};

use layered_stores_overlay::refresh::{Changes, Rung};
use tokio::time::Instant;

/// Changes of a layer are looked into to the end once they pause this long, and at the latest after [`SETTLE_MOST`]. Nix calls
/// the hook when it has deleted everything, which is most often sooner.
const SETTLE: Duration = Duration::from_millis(300);
const SETTLE_MOST: Duration = Duration::from_secs(3);

/// Between two glances passes at least this long, and this many times as long as the last one was in coming: of a processor
/// that has other things to do, glances take a share and no more, whatever happens in the layers and however many stores are
/// on one lower store.
const GLANCES_APART: Duration = Duration::from_millis(10);
const GLANCE_SHARE: u32 = 4;

/// How long what stays wrong, or what fails, is left alone before the next try; doubled with each that nobody has asked for.
const RETRY_FIRST: Duration = Duration::from_secs(30);
const RETRY_MOST: Duration = Duration::from_secs(15 * 60);

/// What one refresh is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Aim {
    pub(super) changes: Changes,
    /// The step it begins with.
    pub(super) from: Rung,
    /// A glance: when it was due. It goes no further than to reconfigure.
    pub(super) glance: Option<Instant>,
    /// Whether all is right once what it is to look at is.
    pub(super) whole: bool,
}

/// The refreshes that a store should get.
#[derive(Debug, Default)]
pub(super) struct Owed {
    changes: Changes,
    from: Rung,
    since: Option<Instant>,
    due: Option<Instant>,
    no_look_before: Option<Instant>,
    /// Names were lost, and the swap that this takes was not made, because nobody has asked.
    lost: bool,
    /// What nobody has had a glance at.
    fresh: Changes,
    glance: Option<Instant>,
    no_glance_before: Option<Instant>,
    /// What stayed wrong after all that could be done, or failed: not to be tried with every change that has nothing to do
    /// with it.
    put_off: Changes,
    put_off_until: Option<Instant>,
    tries: u32,
}

impl Owed {
    /// Adds changes that were seen; more of them may follow at once.
    pub(super) fn see(&mut self, changes: Changes, now: Instant) {
        self.fresh.merge(changes.clone());
        self.changes.merge(changes);
        self.glance.get_or_insert(self.no_glance_before.map_or(now, |at| at.max(now)));
        let since = *self.since.get_or_insert(now);
        self.due = Some((now + SETTLE).min(since + SETTLE_MOST));
    }

    /// Whether a path has changed, and was not looked at to the end since.
    pub(super) fn has_seen(&self, name: &OsStr) -> bool {
        self.changes.names.contains(name)
    }

    /// Whether any path may have.
    pub(super) fn has_seen_anything(&self) -> bool {
        self.changes.unknown
    }

    /// Adds what cannot wait for the layers to come to rest.
    pub(super) fn demand(&mut self, changes: Changes, from: Rung, due: Instant) {
        self.changes.merge(changes);
        self.from = self.from.max(from);
        self.since.get_or_insert(due);
        self.due = Some(self.due.map_or(due, |before| before.min(due)));
    }

    /// Leaves names that were lost to who asks next. Without that, a daemon that starts would swap every store in which
    /// something was built meanwhile, for a path that was most likely not taken away, and not in use.
    pub(super) fn leave_lost(&mut self, aim: &mut Aim) {
        if aim.changes.is_lost() {
            aim.changes.taken = false;
            self.lost = true;
        }
    }

    /// Whether names that were lost were left.
    pub(super) fn has_left_lost(&self) -> bool {
        self.lost
    }

    /// Notes that the view is a fresh one, in which nothing is left.
    pub(super) fn is_fresh(&mut self) {
        self.lost = false;
    }

    /// Adds what an aim has not brought about. Returns how long it is left alone.
    pub(super) fn put_off(&mut self, changes: Changes, now: Instant) -> Duration {
        self.put_off.merge(changes);
        let pause = RETRY_FIRST.saturating_mul(1 << self.tries.min(8)).min(RETRY_MOST);
        self.put_off_until = Some(now + pause);
        pause
    }

    /// Adds what was found to be wrong, for who asks for a refresh.
    pub(super) fn found(&mut self, changes: Changes) {
        self.put_off.merge(changes);
    }

    /// Notes that an aim has come off. If nothing is put off any more, what fails next is new.
    pub(super) fn is_right(&mut self) {
        if self.put_off.is_empty() {
            self.tries = 0;
        }
    }

    /// Notes that a glance that was due at `due` has ended.
    pub(super) fn glanced(&mut self, due: Instant, now: Instant) {
        let pause = (now.saturating_duration_since(due) * GLANCE_SHARE).clamp(GLANCES_APART, SETTLE_MOST);
        self.no_glance_before = Some(now + pause);
        self.glance = self.glance.map(|at| at.max(now + pause));
    }

    /// Notes that a look at all paths that nobody has asked for began at `since`. It takes as long as there are paths, of which an
    /// owner can have any number: like glances, such looks take a share of a processor and no more.
    pub(super) fn looked_at_all(&mut self, since: Instant, now: Instant) {
        let pause = (now.saturating_duration_since(since) * GLANCE_SHARE).min(RETRY_FIRST);
        self.no_look_before = Some(now + pause);
    }

    /// When the next one is due.
    pub(super) fn due(&self) -> Option<Instant> {
        [self.look_due(), self.glance, self.put_off_until].into_iter().flatten().min()
    }

    fn look_due(&self) -> Option<Instant> {
        let not_before = self.no_look_before.filter(|_| self.changes.unknown);
        self.due.map(|due| not_before.map_or(due, |at| at.max(due)))
    }

    /// Takes what is due, or if somebody has `asked`, all there is.
    pub(super) fn take(&mut self, now: Instant, asked: bool) -> Option<Aim> {
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        let put_off = is_due(self.put_off_until);
        if asked || put_off || is_due(self.look_due()) {
            if asked || put_off {
                // Hooks that are called often say nothing about how long it will stay wrong.
                self.tries += u32::from(put_off);
                self.changes.merge(std::mem::take(&mut self.put_off));
                self.put_off_until = None;
            }
            if asked && std::mem::take(&mut self.lost) {
                self.changes.merge(Changes::lost());
            }
            self.fresh = Changes::default();
            (self.since, self.due, self.glance) = (None, None, None);
            let from = std::mem::take(&mut self.from).max(if asked { Rung::Reconfigure } else { Rung::Probe });
            let (changes, whole) = (std::mem::take(&mut self.changes), self.put_off.is_empty());
            return Some(Aim { changes, from, glance: None, whole });
        }
        if !is_due(self.glance) {
            return None;
        }
        let Changes { names, unknown, .. } = std::mem::take(&mut self.fresh);
        // Where anything may have changed, a reconfigure is little, and looking at every path is much.
        let from = if unknown { Rung::Reconfigure } else { Rung::Probe };
        let names = if unknown { BTreeSet::new() } else { names };
        let changes = Changes { names, ..Changes::default() };
        Some(Aim { changes, from, glance: self.glance.take(), whole: false })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changes(name: &str) -> Changes {
        Changes { names: [name.into()].into(), ..Changes::default() }
    }

    fn glance(changes: Changes, due: Instant) -> Option<Aim> {
        Some(Aim { changes, from: Rung::Probe, glance: Some(due), whole: false })
    }

    fn full(changes: Changes, from: Rung) -> Option<Aim> {
        Some(Aim { changes, from, glance: None, whole: true })
    }

    #[test]
    fn a_change_gets_a_glance_at_once_and_a_look_when_the_layers_have_come_to_rest() {
        let (mut owed, start) = (Owed::default(), Instant::now());
        owed.see(changes("a"), start);
        assert_eq!(owed.due(), Some(start));
        assert_eq!(owed.take(start, false), glance(changes("a"), start));
        owed.glanced(start, start + Duration::from_millis(1));
        assert_eq!(owed.take(start + Duration::from_millis(1), false), None);
        assert_eq!(owed.due(), Some(start + SETTLE));
        assert_eq!(owed.take(start + SETTLE, false), full(changes("a"), Rung::Probe));
        assert_eq!(owed.due(), None);
    }

    #[test]
    fn glances_leave_the_processor_to_others() {
        let (mut owed, start) = (Owed::default(), Instant::now());
        let took = Duration::from_millis(100);
        owed.see(changes("a"), start);
        assert!(owed.take(start, false).is_some());
        owed.see(changes("b"), start + took);
        owed.glanced(start, start + took);
        owed.see(changes("c"), start + took);
        let next = start + took + took * GLANCE_SHARE;
        assert_eq!(owed.take(start + took, false), None);
        // By then the layers have been at rest for long enough, were it not for one more.
        owed.see(changes("d"), next);
        let mut all = changes("b");
        all.merge(changes("c"));
        all.merge(changes("d"));
        assert_eq!(owed.take(next, false), glance(all, next));
    }

    #[test]
    fn a_change_soon_after_a_glance_waits_for_its_turn() {
        let (mut owed, start) = (Owed::default(), Instant::now());
        for (took, pause) in [(0, 10), (1, 10), (20, 80), (10_000, 3000)] {
            let end = start + Duration::from_millis(took);
            owed.glanced(start, end);
            owed.see(changes("a"), end);
            let next = end + Duration::from_millis(pause);
            assert_eq!(owed.glance.take(), Some(next), "{took} ms");
            owed.see(changes("a"), next + SETTLE);
            assert_eq!(owed.glance.take(), Some(next + SETTLE), "the pause is over");
        }
    }

    #[test]
    fn what_is_demanded_does_not_wait_for_the_layers_to_come_to_rest() {
        let (mut owed, start) = (Owed::default(), Instant::now());
        owed.see(changes("a"), start);
        owed.glance = None;
        owed.demand(changes("b"), Rung::Reconfigure, start);
        owed.demand(Changes::default(), Rung::Probe, start + SETTLE);
        assert_eq!(owed.due(), Some(start), "the first of them counts");
        let mut both = changes("a");
        both.merge(changes("b"));
        assert_eq!(owed.take(start, false), full(both, Rung::Reconfigure));
        assert_eq!(owed.due(), None);
        owed.demand(changes("a"), Rung::Probe, start + SETTLE);
        assert_eq!(owed.take(start, false), None);
        assert_eq!(owed.take(start + SETTLE, false), full(changes("a"), Rung::Probe));
    }

    #[test]
    fn what_has_changed_is_known_until_it_was_looked_at_to_the_end() {
        let (mut owed, start) = (Owed::default(), Instant::now());
        let seen = |owed: &Owed| ["a", "b"].map(|name| owed.has_seen(OsStr::new(name)));
        assert_eq!((seen(&owed), owed.has_seen_anything()), ([false, false], false));
        owed.see(changes("a"), start);
        assert!(owed.take(start, false).is_some_and(|aim| aim.glance.is_some()));
        assert_eq!((seen(&owed), owed.has_seen_anything()), ([true, false], false));
        owed.see(Changes::unknown(), start);
        assert!(owed.has_seen_anything());
        assert!(owed.take(start, true).is_some());
        assert_eq!((seen(&owed), owed.has_seen_anything()), ([false, false], false));
    }

    #[test]
    fn layers_that_do_not_come_to_rest_are_looked_into_all_the_same() {
        let (mut owed, start) = (Owed::default(), Instant::now());
        let mut now = start;
        while now < start + SETTLE_MOST {
            owed.see(changes("a"), now);
            owed.glance = None;
            assert_eq!(owed.take(now, false), None);
            now += SETTLE / 2;
        }
        assert_eq!(owed.take(start + SETTLE_MOST, false), full(changes("a"), Rung::Probe));
    }

    #[test]
    fn who_asks_gets_all_there_is_at_once() {
        let (mut owed, start) = (Owed::default(), Instant::now());
        assert_eq!(owed.take(start, true), full(Changes::default(), Rung::Reconfigure));
        owed.see(changes("a"), start);
        owed.put_off(changes("b"), start);
        let mut all = changes("a");
        all.merge(changes("b"));
        assert_eq!(owed.take(start, true), full(all, Rung::Reconfigure));
        assert_eq!(owed.due(), None);
    }

    #[test]
    fn what_was_found_to_be_wrong_is_for_who_asks() {
        let (mut owed, start) = (Owed::default(), Instant::now());
        owed.found(changes("a"));
        assert_eq!((owed.due(), owed.take(start, false)), (None, None));
        assert_eq!(owed.take(start, true), full(changes("a"), Rung::Reconfigure));
    }

    #[test]
    fn what_stays_wrong_is_left_alone_for_longer_each_time() {
        let (mut owed, start) = (Owed::default(), Instant::now());
        let mut now = start;
        for seconds in [30, 60, 120, 240, 480, 900, 900] {
            let pause = Duration::from_secs(seconds);
            assert_eq!(owed.put_off(changes("a"), now), pause);
            // Other changes do not bring it up again.
            owed.see(changes("b"), now);
            let other = full(changes("b"), Rung::Probe).map(|aim| Aim { whole: false, ..aim });
            assert_eq!(owed.take(now + SETTLE, false), other);
            owed.is_right();
            assert_eq!(owed.due(), Some(now + pause));
            now += pause;
            assert_eq!(owed.take(now, false), full(changes("a"), Rung::Probe));
        }
        owed.is_right();
        assert_eq!(owed.put_off(changes("a"), now), RETRY_FIRST);
    }

    #[test]
    fn who_asks_in_between_does_not_put_off_the_next_try() {
        let (mut owed, start) = (Owed::default(), Instant::now());
        for seconds in 0..10 {
            let now = start + Duration::from_secs(seconds);
            assert_eq!(owed.put_off(changes("a"), now), RETRY_FIRST);
            assert_eq!(owed.take(now, true), full(changes("a"), Rung::Reconfigure));
        }
    }

    #[test]
    fn looks_at_all_paths_leave_the_processor_to_others() {
        let (mut owed, start) = (Owed::default(), Instant::now());
        let took = Duration::from_secs(2);
        owed.looked_at_all(start, start + took);
        let next = start + took + took * GLANCE_SHARE;
        owed.see(changes("a"), start + took);
        owed.glance = None;
        assert_eq!(owed.due(), Some(start + took + SETTLE), "one path is looked at soon");
        owed.see(Changes::unknown(), start + took);
        owed.glance = None;
        assert_eq!(owed.due(), Some(next));
        assert_eq!(owed.take(next - SETTLE, false), None);
        assert!(owed.take(next, false).is_some());
        owed.see(Changes::unknown(), start + took);
        assert!(owed.take(start + took, true).is_some(), "who asks does not wait");
    }

    #[test]
    fn names_that_were_lost_are_left_to_who_asks() {
        let (mut owed, start) = (Owed::default(), Instant::now());
        owed.see(Changes::lost(), start);
        owed.glance = None;
        let mut aim = owed.take(start + SETTLE, false).expect("due");
        owed.leave_lost(&mut aim);
        assert_eq!(Some(aim), full(Changes::unknown(), Rung::Probe));
        assert!(owed.has_left_lost());
        assert_eq!(owed.take(start, true), full(Changes::lost(), Rung::Reconfigure));
        assert_eq!(owed.take(start, true), full(Changes::default(), Rung::Reconfigure));
    }

    #[test]
    fn nothing_is_left_in_a_fresh_view() {
        let (mut owed, start) = (Owed::default(), Instant::now());
        let mut aim = Aim { changes: Changes::lost(), from: Rung::Probe, glance: None, whole: true };
        owed.leave_lost(&mut aim);
        owed.is_fresh();
        assert!(!owed.has_left_lost());
        assert_eq!(owed.take(start, true), full(Changes::default(), Rung::Reconfigure));
        let mut aim = Aim { changes: changes("a"), ..aim };
        owed.leave_lost(&mut aim);
        assert!(!owed.has_left_lost() && aim.changes == changes("a"), "none were lost");
    }

    #[test]
    fn when_anything_may_have_changed_a_glance_reconfigures() {
        let (mut owed, start) = (Owed::default(), Instant::now());
        owed.see(Changes::unknown(), start);
        let changes = Changes::default();
        let aim = Aim { changes, from: Rung::Reconfigure, glance: Some(start), whole: false };
        assert_eq!(owed.take(start, false), Some(aim));
        assert_eq!(owed.take(start + SETTLE, false), full(Changes::unknown(), Rung::Probe));
    }
}
