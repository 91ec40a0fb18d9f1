//! What was seen to about a store's Nix daemon, and when it is seen to again.

use std::time::Duration;

use layered_stores_model::Service;
use tokio::time::Instant;

use super::retries::pause_after;

/// A Nix daemon that was connected to for so long has nothing to do with an earlier failure.
const SERVED_WELL: Duration = Duration::from_secs(600);

/// What there is of a Nix daemon, as far as that is known.
#[derive(Debug, Default)]
enum Made {
    /// Nobody has seen to it.
    #[default]
    Unknown,
    /// Nothing.
    Nothing,
    /// The socket and the settings of this one.
    Daemon(Service),
}

/// A store's Nix daemon, or that it has none.
#[derive(Debug, Default)]
pub(in crate::supervisor) struct Serving {
    made: Made,
    since: Option<Instant>,
    /// When it is seen to again, after a failure, and how many failures there were.
    at: Option<Instant>,
    failures: u32,
}

impl Serving {
    /// Whether there is what is `wanted`, and nothing else.
    pub(super) fn is(&self, wanted: Option<&Service>) -> bool {
        match (&self.made, wanted) {
            (Made::Unknown, _) => false,
            (Made::Nothing, wanted) => wanted.is_none(),
            (Made::Daemon(made), wanted) => wanted == Some(made),
        }
    }

    /// Notes that it was seen to.
    pub(in crate::supervisor) fn made(&mut self, service: Option<Service>, now: Instant) {
        self.made = service.map_or(Made::Nothing, Made::Daemon);
        self.since = Some(now);
    }

    /// Notes whether there is something of it, of which no more is known.
    pub(in crate::supervisor) fn found(&mut self, something: bool) {
        self.made = if something { Made::Unknown } else { Made::Nothing };
    }

    /// Notes that something has become of it, if it has one.
    pub(in crate::supervisor) fn disturbed(&mut self) {
        if matches!(self.made, Made::Daemon(_)) {
            self.made = Made::Unknown;
        }
    }

    /// Notes that the store is down, and its Nix daemon with it.
    pub(super) fn forget(&mut self) {
        self.made = Made::Unknown;
    }

    /// Whether it had a daemon at a time, and has it still as far as is known.
    pub(in crate::supervisor) fn had_daemon_at(&self, time: Instant) -> bool {
        matches!(self.made, Made::Daemon(_)) && self.since.is_some_and(|since| since < time)
    }

    /// Whether it has one that was not there yet at a time, or may not have been.
    pub(in crate::supervisor) fn has_daemon_since(&self, time: Instant) -> bool {
        matches!(self.made, Made::Daemon(_)) && !self.had_daemon_at(time)
    }

    /// Has it seen to again, after a pause that grows with each failure.
    pub(in crate::supervisor) fn failed(&mut self, now: Instant) {
        self.made = Made::Unknown;
        if self.since.take().is_some_and(|since| now >= since + SERVED_WELL) {
            self.failures = 0;
        }
        self.at = Some(now + pause_after(self.failures));
        self.failures += 1;
    }

    /// When it is seen to again, after a failure.
    pub(in crate::supervisor) fn due(&self) -> Option<Instant> {
        self.at
    }

    /// Has it seen to at once.
    pub(in crate::supervisor) fn at_once(&mut self) {
        self.at = None;
    }
}

#[cfg(test)]
mod tests {
    use layered_stores_model::fixture;

    use super::*;

    /// The Nix daemons of two stores.
    fn services() -> [Service; 2] {
        ["a", "b"].map(|name| {
            let text = format!("[stores.{name}]\nlower-store = \"/srv\"\n[stores.{name}.daemon]\n");
            fixture::declared("/state", &text).remove(0).service().expect("declared")
        })
    }

    #[test]
    fn a_daemon_is_the_one_that_was_made_until_something_becomes_of_it() {
        let ([mine, other], now) = (services(), Instant::now());
        let made = || {
            let mut serving = Serving::default();
            serving.made(Some(mine.clone()), now);
            serving
        };
        assert!(made().is(Some(&mine)) && !made().is(Some(&other)) && !made().is(None));
        let lost: [fn(&mut Serving); 4] = [
            Serving::disturbed,
            Serving::forget,
            |serving| serving.found(true),
            |serving| serving.failed(Instant::now()),
        ];
        for lose in lost {
            let mut serving = made();
            lose(&mut serving);
            assert!(!serving.is(Some(&mine)) && !serving.is(None), "nobody knows");
        }
        let mut serving = made();
        serving.found(false);
        serving.disturbed();
        assert!(serving.is(None) && !serving.is(Some(&mine)), "nothing has become of nothing");
    }

    #[test]
    fn what_was_seen_of_sockets_tells_of_daemons_that_were_there_before() {
        let ([mine, _], now) = (services(), Instant::now());
        let later = now + Duration::from_millis(1);
        let has = |serving: &Serving, time| (serving.had_daemon_at(time), serving.has_daemon_since(time));
        let mut serving = Serving::default();
        assert_eq!(has(&serving, later), (false, false));
        serving.made(Some(mine), now);
        assert_eq!(has(&serving, now), (false, true), "it may have been made after the look");
        assert_eq!(has(&serving, later), (true, false));
        serving.disturbed();
        assert_eq!(has(&serving, now), (false, false));
        assert_eq!(has(&serving, later), (false, false));
    }

    #[test]
    fn who_asks_has_it_seen_to_at_once_and_the_next_failure_is_one_more() {
        let (mut serving, now) = (Serving::default(), Instant::now());
        serving.failed(now);
        serving.at_once();
        assert_eq!(serving.due(), None);
        serving.failed(now);
        assert_eq!(serving.due(), Some(now + pause_after(1)));
    }

    #[test]
    fn what_failed_soon_is_left_alone_for_longer_each_time() {
        let (mut serving, mut now) = (Serving::default(), Instant::now());
        assert!(!serving.is(None), "nobody has looked");
        for failures in 0..3 {
            serving.made(None, now);
            assert!(serving.is(None) && !serving.had_daemon_at(now + SERVED_WELL), "there is nothing that could fail");
            serving.failed(now);
            assert!(!serving.is(None));
            assert_eq!(serving.due(), Some(now + pause_after(failures)));
            now += pause_after(failures);
        }
        serving.made(None, now);
        now += SERVED_WELL;
        serving.failed(now);
        assert_eq!(serving.due(), Some(now + pause_after(0)), "it has been well for long");
    }
}
