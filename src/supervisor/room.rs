//! When it is looked whether a store's upper layer takes writes, and what was seen.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::LazyLock,
    time::Duration,
};

use layered_stores_model::{StoreName, StoreSpec};
use layered_stores_overlay::room::Room;
use tokio::time::Instant;

use super::status::Problem;

/// How often it is looked, and how soon after the last time if somebody asks something of the store.
const EVERY: Duration = Duration::from_secs(60);
const APART: Duration = Duration::from_secs(1);

/// When it is looked, and what was seen.
#[derive(Debug, Default)]
pub(super) struct Rooms {
    /// When it is looked next; `None` while somebody looks, or the store is down.
    due: Option<Instant>,
    seen_at: Option<Instant>,
    /// What is wrong.
    pub(super) wrong: Option<(Problem, String)>,
}

impl Rooms {
    /// When it is looked next.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Notes that somebody looks.
    pub(super) fn begin(&mut self) {
        self.due = None;
    }

    /// Notes what was seen when the store came up. Stores that come up together are not looked at together later.
    pub(super) fn begins_with(&mut self, name: &StoreName, wrong: Option<(Problem, String)>, now: Instant) {
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        self.wrong = wrong;
        self.seen_at = Some(now);
        self.due = Some(on_the_second(now + Duration::from_secs(hasher.finish() % EVERY.as_secs())));
    }

    /// Notes what was seen.
    pub(super) fn seen(&mut self, wrong: Option<(Problem, String)>, now: Instant) {
        self.wrong = wrong;
        self.seen_at = Some(now);
        self.due = Some(on_the_second(now + EVERY));
    }

    /// Has it looked soon: somebody has asked something of the store.
    pub(super) fn soon(&mut self, now: Instant) {
        let at = self.seen_at.map_or(now, |seen| (seen + APART).max(now));
        self.due = self.due.map(|due| due.min(at));
    }
}

/// The last full second before. A thousand stores wake the engine once a second so, and not seventeen times.
fn on_the_second(at: Instant) -> Instant {
    static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);
    *EPOCH + Duration::from_secs(at.saturating_duration_since(*EPOCH).as_secs())
}

/// What is wrong, and the way out. `point` is where the filesystem of the upper layer is mounted.
pub(super) fn describe(spec: &StoreSpec, room: Room, point: &str) -> Option<(Problem, String)> {
    let upper = &spec.layers.upper;
    let make_room = || match &spec.ephemeral {
        Some(ephemeral) => format!(
            "collect garbage in the store, or raise ephemeral-size (now \"{}\") and run `layered-stores reload`",
            ephemeral.size
        ),
        None => format!("collect garbage in the store, delete something else below {point}, or make it larger"),
    };
    match room {
        Room::Enough => None,
        Room::ReadOnly(errno) => Some((
            Problem::ReadOnly,
            format!(
                "the filesystem of its upper layer {upper} takes no writes: {errno}; `journalctl -k` may say why. Run `mount -o \
                 remount,rw {point}`; if it had an error, stop the store, unmount it, check it with fsck and mount it again"
            ),
        )),
        Room::NoSpace(of) => Some((
            Problem::Full,
            format!(
                "the filesystem of its upper layer {upper} is full: less than 1 of {} MiB is free for others than root; {}",
                of >> 20,
                make_room()
            ),
        )),
        Room::NoFiles(errno) => Some((
            Problem::Full,
            format!(
                "the filesystem of its upper layer {upper} is full: no file can be made there, though it has space: {errno}; {}",
                make_room()
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_are_spread_and_who_asks_has_one_soon() {
        let now = Instant::now();
        let (mut early, mut late) = (now + EVERY, now);
        for number in 0..1000 {
            let mut rooms = Rooms::default();
            let name = format!("store-{number}").parse().expect("valid");
            rooms.begins_with(&name, None, now);
            let due = rooms.due().expect("a time");
            assert!(due <= now + EVERY);
            (early, late) = (early.min(due), late.max(due));
        }
        assert!(early < now + EVERY / 10 && late > now + EVERY * 9 / 10, "spread over all of the minute");

        let mut rooms = Rooms::default();
        rooms.soon(now);
        assert_eq!(rooms.due(), None, "it is down");
        rooms.seen(None, now);
        assert!(rooms.due().is_some_and(|due| due <= now + EVERY && due + APART > now + EVERY));
        rooms.soon(now);
        assert_eq!(rooms.due(), Some(now + APART), "but not for each of those who ask");
        rooms.soon(now + EVERY / 2);
        assert_eq!(rooms.due(), Some(now + APART));
        rooms.begin();
        rooms.soon(now + EVERY);
        assert_eq!(rooms.due(), None, "somebody looks");
    }
}
