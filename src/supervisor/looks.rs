//! Looks at stores that are up, each again and again: at what, and when.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::LazyLock,
    time::Duration,
};

use layered_stores_model::StoreName;
use layered_stores_overlay::room::Room;
use tokio::time::Instant;

/// How often a store is looked at, and how soon after the last time if somebody asks something of the store.
const EVERY: Duration = Duration::from_secs(60);
const APART: Duration = Duration::from_secs(1);

/// What is looked at. None of it waits for what is being done about a store, and nothing waits for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Look {
    /// Whether the upper layer takes writes.
    Room,
    /// Whether the store, and the layered one underneath, still belong to whom they should.
    Owner,
}

/// What was seen.
#[derive(Debug)]
pub(super) enum Sight {
    Room(Room),
    /// What is wrong with whom the directories belong to.
    Owner(Option<String>),
}

impl Look {
    pub(super) const ALL: [Self; 2] = [Self::Room, Self::Owner];
}

/// When one look is made.
#[derive(Debug)]
struct Times {
    /// `None` while it is being made.
    due: Option<Instant>,
    seen_at: Instant,
}

/// When a store is looked at. There is nothing in it while the store is down.
#[derive(Debug, Default)]
pub(super) struct Looks(BTreeMap<Look, Times>);

impl Looks {
    /// When the next look is due.
    pub(super) fn due(&self) -> Option<Instant> {
        self.0.values().filter_map(|times| times.due).min()
    }

    /// The looks that are due. Each is begun with that.
    pub(super) fn take(&mut self, now: Instant) -> Vec<Look> {
        let is_due = |(_, times): &(&Look, &mut Times)| times.due.is_some_and(|due| due <= now);
        let begin = |(look, times): (&Look, &mut Times)| {
            times.due = None;
            *look
        };
        self.0.iter_mut().filter(is_due).map(begin).collect()
    }

    /// Notes that a store has come up, and that all was seen with that. Stores that come up together are not looked at together
    /// later.
    pub(super) fn begin(&mut self, name: &StoreName, now: Instant) {
        for look in Look::ALL {
            let mut hasher = DefaultHasher::new();
            (name, look).hash(&mut hasher);
            let due = on_the_second(now + Duration::from_secs(hasher.finish() % EVERY.as_secs()));
            self.0.insert(look, Times { due: Some(due), seen_at: now });
        }
    }

    /// Notes that a look has come to its end. Whether the store is still up, so that what was seen counts.
    pub(super) fn seen(&mut self, look: Look, now: Instant) -> bool {
        let times = self.0.get_mut(&look);
        times.map(|times| *times = Times { due: Some(on_the_second(now + EVERY)), seen_at: now }).is_some()
    }

    /// Has a look made soon: somebody has asked something of the store.
    pub(super) fn soon(&mut self, look: Look, now: Instant) {
        if let Some(times) = self.0.get_mut(&look) {
            let at = (times.seen_at + APART).max(now);
            times.due = times.due.map(|due| due.min(at));
        }
    }

    /// Has a look made at once.
    pub(super) fn at_once(&mut self, look: Look, now: Instant) {
        if let Some(times) = self.0.get_mut(&look) {
            times.due = times.due.map(|due| due.min(now));
        }
    }
}

/// The last full second before. A thousand stores wake the engine once a second so, and not seventeen times.
fn on_the_second(at: Instant) -> Instant {
    static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);
    *EPOCH + Duration::from_secs(at.saturating_duration_since(*EPOCH).as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(number: u32) -> StoreName {
        format!("store-{number}").parse().expect("valid")
    }

    #[test]
    fn looks_are_spread() {
        let now = Instant::now();
        for look in Look::ALL {
            let (mut early, mut late) = (now + EVERY, now);
            for number in 0..1000 {
                let mut looks = Looks::default();
                looks.begin(&name(number), now);
                let due = looks.0[&look].due.expect("a time");
                assert!(due <= now + EVERY);
                (early, late) = (early.min(due), late.max(due));
            }
            assert!(early < now + EVERY / 10 && late > now + EVERY * 9 / 10, "spread over all of the minute");
        }
    }

    #[test]
    fn who_asks_has_a_look_made_soon_but_not_one_for_each_time() {
        let (mut looks, now) = (Looks::default(), Instant::now());
        looks.soon(Look::Room, now);
        looks.at_once(Look::Room, now);
        assert_eq!(looks.due(), None, "it is down");
        assert!(!looks.seen(Look::Room, now), "nothing counts");

        looks.begin(&name(0), now);
        assert!(looks.seen(Look::Room, now) && looks.seen(Look::Owner, now));
        assert!(looks.due().is_some_and(|due| due <= now + EVERY && due + APART > now + EVERY));
        looks.soon(Look::Room, now);
        assert_eq!(looks.due(), Some(now + APART));
        looks.soon(Look::Room, now + EVERY / 2);
        assert_eq!(looks.due(), Some(now + APART));
        assert_eq!(looks.take(now), []);
        assert_eq!(looks.take(now + APART), [Look::Room]);
        looks.soon(Look::Room, now + EVERY);
        looks.at_once(Look::Room, now + EVERY);
        assert_eq!(looks.take(now + EVERY), [Look::Owner], "the other one is being made");
        assert_eq!(looks.due(), None);
        assert!(looks.seen(Look::Owner, now + EVERY));
        looks.at_once(Look::Owner, now + EVERY);
        assert_eq!(looks.take(now + EVERY), [Look::Owner]);
    }
}
