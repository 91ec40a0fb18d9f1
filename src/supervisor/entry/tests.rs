//! What is noted about a store, and what follows from it.

mod candidate;

use layered_stores_model::{Layers, fixture};
use layered_stores_overlay::{
    mountinfo::{Cover, MountTable},
    refresh::Changes,
    room::Room,
};
use tokio::sync::oneshot;

use super::*;
use crate::supervisor::operation::Held;

const MOUNTED: MountState = MountState::Mounted { read_only: false, twice: false, unpinned: None, flags: None };
const BELOW: &str = "[stores.a]\nlower-store = \"/srv\"\n";
const ABOVE: &str = "[stores.a]\nlower-store = \"/srv\"\n[stores.b]\nlower-store = \"layered:a\"\n";

/// The last store of a configuration.
fn entry(text: &str) -> Entry {
    Entry::new(Arc::new(fixture::declared("/state", text).pop().expect("declared")), true)
}

fn failed() -> Phase {
    Phase::Failed { seen: MountState::Absent }
}

/// One that is where it should be.
fn up() -> Entry {
    let mut entry = entry(BELOW);
    entry.serving.made(None, Instant::now());
    (entry.mount, entry.phase) = (MOUNTED, Phase::Active);
    entry
}

/// One that is to have another mount option.
fn proposed() -> Entry {
    let mut entry = up();
    let mut next = (*entry.spec).clone();
    next.layers.options.push(layered_stores_model::MountOption::Noatime);
    entry.propose(Arc::new(next));
    entry
}

/// The same, and it can.
fn respecified() -> Entry {
    let mut entry = proposed();
    entry.decide(None);
    entry
}

fn codes(entry: &Entry) -> Vec<Problem> {
    entry.problems.keys().copied().collect()
}

#[derive(Debug)]
struct Waits(Option<(Spot, Instant)>);

impl Follow for Waits {
    fn waits_for(&self) -> Option<(Spot, Instant)> {
        self.0
    }
}

#[test]
fn a_store_waits_for_what_has_not_answered_for_the_longest_until_that_ends() {
    let (mut entry, now) = (entry(BELOW), Instant::now());
    let earlier = now - Duration::from_secs(1);
    let errands = [None, Some((Spot::Upper, now)), Some((Spot::Lower, earlier))]
        .map(|waits_for| Arc::new(Waits(waits_for)) as Arc<dyn Follow>);
    assert_eq!((entry.waits_for(), entry.stuck_due()), (None, None));
    for errand in &errands {
        entry.follow(errand);
    }
    assert_eq!(entry.waits_for(), Some((Spot::Lower, earlier)));
    assert_eq!(entry.stuck_due(), Some(earlier + DEADLINE));
    entry.stuck = Some("it is".to_owned());
    assert_eq!(entry.stuck_due(), None, "that is known");
    let [idle, still, ended] = errands;
    drop(ended);
    entry.forget_ended();
    assert_eq!((entry.errands.len(), entry.waits_for()), (2, Some((Spot::Upper, now))));
    drop((idle, still));
    entry.forget_ended();
    assert!(entry.errands.is_empty());
}

#[test]
fn what_is_wanted_sends_those_away_who_wait_for_something_else_and_is_worth_another_try() {
    for (want, starting_waits) in [(Want::Up, true), (Want::Down, false), (Want::Gone, false)] {
        let mut entry = entry(BELOW);
        let ([starting, stopping], now) = ([0; 2].map(|_| oneshot::channel()), Instant::now());
        entry.waiting.starting.push(starting.0);
        entry.waiting.stopping.push(stopping.0);
        entry.problem(Problem::Busy, "it is in use".to_owned());
        for _ in 0..REPAIRS {
            entry.retries.later(now);
            entry.retries.repaired(now);
        }
        entry.want(want);
        let (mut starting, mut stopping) = (starting.1, stopping.1);
        assert_eq!(starting.try_recv().is_err(), starting_waits, "{want:?}");
        assert_eq!(stopping.try_recv().is_err(), !starting_waits, "{want:?}");
        assert!(entry.want == want && entry.retries.is_allowed() && entry.retries.may_repair(now));
        assert!(!entry.has(Problem::Busy));
        entry.retries.later(now);
        assert_eq!(entry.retries.due(), Some(now + retries::pause_after(0)));
    }
}

#[test]
fn what_was_asked_for_is_kept_where_it_is_not_what_the_configuration_says_and_only_once() {
    for (autostart, other, same) in [(true, Want::Down, Want::Up), (false, Want::Up, Want::Down)] {
        let mut entry = entry(&format!("{BELOW}autostart = {autostart}"));
        assert_eq!((entry.want, entry.asked()), (same, None));
        assert!(!entry.keeps_asked(None));
        entry.want(other);
        assert_eq!(entry.asked(), Some(!autostart));
        assert!(entry.keeps_asked(Some(!autostart)) && !entry.keeps_asked(Some(!autostart)));
        entry.want(same);
        assert_eq!(entry.asked(), None);
        assert!(entry.keeps_asked(None));

        entry.retries.later(Instant::now());
        entry.was_asked(autostart);
        assert!(!entry.retries.is_allowed(), "it is wanted so");
        entry.was_asked(!autostart);
        assert!(entry.want == other && entry.retries.is_allowed());
        assert!(!entry.keeps_asked(entry.asked()), "it is kept");
        entry.want(Want::Gone);
        entry.declared = false;
        entry.was_asked(!autostart);
        assert_eq!(entry.want, Want::Gone);
    }
}

#[test]
fn a_failure_takes_the_place_of_an_earlier_one_and_goes_when_the_store_is_up_or_down() {
    let mut entry = entry(BELOW);
    entry.fail(Problem::StartFailed, "one".to_owned());
    entry.problem(Problem::Full, "there is no room".to_owned());
    entry.fail(Problem::Foreign, "two\n".to_owned());
    assert_eq!((codes(&entry), entry.reason.as_str()), (vec![Problem::Foreign, Problem::Full], "two\\n"));
    assert!(entry.is_given_up() && !entry.retries.is_allowed());

    entry.mount = MOUNTED;
    assert!(!entry.is_given_up(), "something else is there");
    entry.fail_at_what_is_seen();
    assert!(entry.is_given_up(), "in vain as well");
    entry.try_again();
    assert!(!entry.is_given_up());

    entry.op = Some(Op::Stop);
    entry.forget_failure();
    assert!(matches!(entry.phase, Phase::Failed { .. }), "something is being done about it");
    entry.op = None;
    entry.forget_failure();
    assert_eq!(entry.phase, Phase::Inactive);

    entry.fail(Problem::MountLost, "three".to_owned());
    entry.retries.later(Instant::now());
    entry.up();
    assert_eq!((entry.phase.clone(), codes(&entry)), (Phase::Active, vec![Problem::Full]));
    assert!(entry.reason.is_empty() && entry.retries.is_allowed());
    entry.fail_at_what_is_seen();
    entry.forget_failure();
    assert_eq!(entry.phase, Phase::Active);
    entry.down();
    assert_eq!((entry.phase.clone(), codes(&entry)), (Phase::Inactive, vec![]));
}

#[test]
fn why_a_store_was_given_up_on_is_said_with_the_way_out() {
    let cover = Cover { what: "tmpfs".to_owned(), point: "/srv".to_owned(), hides: "/srv/a".to_owned() };
    for (failure, problem, said) in [
        (Failure::Lower, Problem::StartFailed, "`layered-stores status a`"),
        (Failure::Covered(cover), Problem::Covered, "`umount /srv`"),
        (Failure::Foreign("tmpfs".to_owned()), Problem::Foreign, "tmpfs is mounted at"),
        (Failure::MountLost, Problem::MountLost, "`layered-stores start b`"),
        (Failure::NotOurs, Problem::NotOurs, "unmount it with `umount"),
    ] {
        let mut entry = entry(ABOVE);
        entry.give_up(failure);
        assert_eq!(codes(&entry), [problem]);
        assert!(entry.reason.contains(said), "{}", entry.reason);
    }
}

#[tokio::test]
async fn the_upper_layer_is_given_back_where_a_mount_was_lost_and_kept_where_something_is_in_the_way() {
    /// Tells when it is dropped.
    #[derive(Debug)]
    struct Lock(#[expect(dead_code, reason = "it is dropped")] oneshot::Sender<()>);

    for (failure, is_given_back) in [(Failure::MountLost, true), (Failure::Foreign("tmpfs".to_owned()), false)] {
        let (mut entry, (held, dropped)) = (entry(BELOW), oneshot::channel());
        entry.lock = Some(Box::new(Lock(held)));
        entry.give_up(failure);
        assert_eq!(entry.lock.is_none(), is_given_back);
        entry.down();
        assert!(dropped.await.is_err() && entry.lock.is_none());
    }
}

#[test]
fn a_nix_daemon_is_seen_to_as_long_as_the_store_is_up_and_a_failure_is_waited_out() {
    let unserved = || {
        let mut entry = up();
        entry.serving.found(true);
        entry
    };
    assert!(unserved().is_to_be_served() && !up().is_to_be_served());
    let not_yet: [fn(&mut Entry); 2] =
        [|entry| entry.phase = Phase::Inactive, |entry| entry.serving.failed(Instant::now())];
    for change in not_yet {
        let mut entry = unserved();
        change(&mut entry);
        assert!(!entry.is_to_be_served());
    }
}

#[test]
fn a_store_that_failed_or_is_given_up_on_cannot_go_for_now() {
    assert!(!up().cannot_go());
    let mut later = up();
    later.retries.later(Instant::now());
    assert!(later.cannot_go());
    later.op = Some(Op::Stop);
    assert!(!later.cannot_go(), "it may be going");
    let mut given_up = up();
    given_up.fail(Problem::NotOurs, String::new());
    assert!(given_up.cannot_go());
    given_up.op = Some(Op::Release);
    assert!(!given_up.cannot_go());
}

#[test]
fn who_wants_something_of_a_store_that_is_not_up_hears_why_and_whether_to_wait() {
    for (want, phase, is_coming, said) in [
        (Want::Up, Phase::Inactive, true, "it is on its way up"),
        (Want::Up, failed(), false, "it failed"),
        (Want::Down, Phase::Inactive, false, "start it with"),
        (Want::Down, failed(), false, "it failed"),
    ] {
        let mut entry = entry(BELOW);
        (entry.want, entry.phase, entry.reason) = (want, phase, "it failed".to_owned());
        assert_eq!(entry.is_coming_up(), is_coming);
        let told = entry.not_active().to_string();
        assert!(told.contains(said), "{told}");
    }
}

#[test]
fn a_store_is_settled_when_it_is_where_it_should_be_or_was_given_up_on_for_now() {
    let change = |change: fn(&mut Entry), mut entry: Entry| {
        change(&mut entry);
        entry.is_settled()
    };
    assert!(change(|_| {}, up()));
    assert!(!change(|_| {}, entry(BELOW)), "it is not up");
    assert!(!change(|_| {}, respecified()), "it is another one");
    assert!(!change(|up| up.serving.found(true), up()), "its Nix daemon was not seen to");
    assert!(change(|up| up.op = Some(Op::Refresh), up()));
    assert!(!change(|up| up.op = Some(Op::Stop), up()));
    assert!(!change(|up| (up.op, up.phase) = (Some(Op::Start), failed()), up()));
    for (phase, is_settled) in [(Phase::Inactive, true), (Phase::Active, false), (failed(), true)] {
        let mut down = up();
        (down.want, down.phase) = (Want::Down, phase);
        assert_eq!(down.is_settled(), is_settled, "{:?}", down.phase);
    }
    assert!(!change(|next| (next.want, next.phase) = (Want::Down, Phase::Inactive), respecified()));
    for phase in [Phase::Inactive, Phase::Active] {
        let mut gone = up();
        (gone.want, gone.phase) = (Want::Gone, phase);
        assert!(!gone.is_settled());
        gone.retries.later(Instant::now());
        assert!(gone.is_settled());
    }
    assert!(change(|stuck| (stuck.stuck, stuck.op) = (Some(String::new()), Some(Op::Start)), entry(BELOW)));
}

#[test]
fn what_is_done_about_a_store_and_where_it_is_make_its_state() {
    for (want, op, phase, state) in [
        (Want::Up, Some(Op::Start), Phase::Inactive, State::Activating),
        (Want::Up, Some(Op::Adopt), Phase::Inactive, State::Activating),
        (Want::Up, Some(Op::Stop), Phase::Active, State::Deactivating),
        (Want::Down, Some(Op::Release), failed(), State::Deactivating),
        (Want::Down, Some(Op::Refresh), Phase::Active, State::Active),
        (Want::Up, None, failed(), State::Failed),
        (Want::Up, None, Phase::Inactive, State::Activating),
        (Want::Down, None, Phase::Inactive, State::Inactive),
        (Want::Gone, None, Phase::Inactive, State::Inactive),
    ] {
        let mut entry = entry(BELOW);
        (entry.want, entry.op, entry.phase) = (want, op, phase);
        entry.publish();
        assert_eq!(entry.cell.get().state, state, "{want:?} {op:?} {:?}", entry.phase);
    }
}

#[test]
fn the_reason_of_a_state_says_what_is_failed_waited_for_or_removed() {
    let reason = |change: fn(&mut Entry)| {
        let mut entry = entry(ABOVE);
        entry.reason = "it failed".to_owned();
        change(&mut entry);
        entry.publish();
        entry.cell.get().state_reason
    };
    let stick = |entry: &mut Entry| entry.stuck = Some("it is stuck".to_owned());
    assert_eq!(reason(|entry| entry.phase = failed()), "it failed");
    assert_eq!(reason(|_| {}), "waits for its lower store a");
    assert_eq!(reason(|entry| entry.op = Some(Op::Start)), "");
    assert_eq!(reason(stick), "it is stuck");
    assert_eq!(reason(|entry| entry.phase = Phase::Active), "");
    assert_eq!(
        reason(|entry| (entry.phase, entry.op) = (Phase::Active, Some(Op::Remove))),
        "what is in it is being removed"
    );
    let stuck = reason(|entry| (entry.op, entry.stuck) = (Some(Op::Remove), Some("it is stuck".to_owned())));
    assert_eq!(stuck, "it is stuck", "of both the more urgent");
}

#[test]
fn the_time_of_a_state_is_when_it_began() {
    for (before, since, is_kept) in
        [(State::Active, 1, true), (State::Active, 0, false), (State::Inactive, 1, false), (State::Inactive, 0, false)]
    {
        let entry = up();
        let status = entry.cell.get();
        entry.cell.replace(Status { state: before, state_change_usec: since, ..status.clone() });
        assert!(entry.publish().is_some() || before == State::Active && since == 1);
        let now = realtime_usec(Duration::ZERO);
        let since = entry.cell.get().state_change_usec;
        assert_eq!(since == 1, is_kept, "{before} {since}");
        assert!(is_kept || (now - 60_000_000..=now).contains(&since));
    }
}

/// A mount table with the store's overlay, and more.
fn table(entry: &Entry, more: &[&str]) -> MountTable {
    let Layers { lower, upper, work, merged, .. } = &entry.spec.layers;
    let overlay = format!(
        "23 22 0:23 / {merged} rw,nosuid,nodev,relatime - overlay overlay rw,lowerdir={lower},upperdir={upper},workdir={work}"
    );
    let more = more.iter().zip(30..).map(|(point, id)| format!("{id} 22 0:{id} / {point} rw - tmpfs theirs rw"));
    let lines: Vec<_> = ["22 1 0:22 / / rw - ext4 /dev/vda rw".to_owned(), overlay].into_iter().chain(more).collect();
    MountTable::parse(&lines.join("\n"), |_| true)
}

#[test]
fn a_mount_whose_layers_were_hidden_since_it_was_made_is_covered() {
    let mut entry = entry(BELOW);
    let upper = entry.spec.layers.upper.to_string();
    let (bare, hidden) = (table(&entry, &[]), table(&entry, &[&upper]));
    entry.look_at(&hidden);
    assert_eq!(entry.mount, MOUNTED, "nobody knows what it was made of");
    (entry.op, entry.unconfirmed) = (Some(Op::Start), Some(Box::new(a_start())));
    entry.look_at(&hidden);
    assert_eq!(entry.mount, MOUNTED, "it was mounted on that");
    entry.look_at(&bare);
    (entry.op, entry.unconfirmed) = (Some(Op::Adopt), Some(Box::new(a_start())));
    entry.look_at(&hidden);
    assert!(matches!(&entry.mount, MountState::Covered(cover) if cover.hides == upper), "{:?}", entry.mount);
    entry.look_at(&MountTable::parse("22 1 0:22 / / rw - ext4 /dev/vda rw", |_| true));
    assert_eq!(entry.mount, MountState::Absent);
}

#[test]
fn a_mount_with_other_options_or_without_writes_is_told_of_until_it_is_right() {
    let mut entry = up();
    let mut told = |read_only: bool, unpinned: Option<&str>, flags: Option<&str>| {
        let (unpinned, flags) = (unpinned.map(str::to_owned), flags.map(str::to_owned));
        entry.mount = MountState::Mounted { read_only, twice: false, unpinned, flags };
        entry.look_at_mount();
        codes(&entry)
    };
    assert_eq!(told(false, Some("metacopy=on"), None), [Problem::MountOptions]);
    assert_eq!(told(true, None, Some("without nodev")), [Problem::MountOptions, Problem::ReadOnly]);
    assert_eq!(told(true, None, None), [Problem::ReadOnly]);
    assert_eq!(told(false, None, None), []);
    entry.room = Some((Problem::Full, "there is no room".to_owned()));
    entry.look_at_room();
    assert_eq!(codes(&entry), [Problem::Full]);
    entry.mount = MountState::Absent;
    entry.room = None;
    entry.look_at_mount();
    assert_eq!(codes(&entry), [Problem::Full], "nothing is seen of what is not mounted");
}

#[test]
fn another_mount_below_the_lower_store_is_looked_into_or_is_worth_another_try() {
    let now = Instant::now();
    let moved = |text: &str, change: fn(&mut Entry)| {
        let mut entry = entry(text);
        entry.retries.later(now);
        change(&mut entry);
        entry.look_at_lower(&table(&entry, &[]), now);
        assert_eq!((entry.refreshes.owed.due(), entry.retries.is_allowed()), (None, false), "the first look");
        entry.look_at_lower(&table(&entry, &[]), now);
        assert_eq!((entry.refreshes.owed.due(), entry.retries.is_allowed()), (None, false), "it is where it was");
        let at = entry.spec.layers.lower.to_string();
        entry.look_at_lower(&table(&entry, &[&at]), now);
        (entry.refreshes.owed.due(), entry.retries.is_allowed())
    };
    assert_eq!(moved(BELOW, |entry| entry.phase = Phase::Active), (Some(now), false));
    assert_eq!(moved(BELOW, |_| {}), (None, true));
    assert_eq!(moved(ABOVE, |entry| entry.phase = Phase::Active), (None, false), "a store tells by itself");
    assert_eq!(moved(BELOW, |entry| entry.retries.give_up()), (None, true));
    let given_up = |entry: &mut Entry| {
        entry.retries = Retries::default();
        entry.fail(Problem::Foreign, String::new());
    };
    assert_eq!(moved(BELOW, given_up), (None, false), "that has nothing to do with it");
}

#[test]
fn what_failed_is_tried_again_when_its_own_directories_lie_elsewhere() {
    let now = Instant::now();
    let moved = |change: fn(&mut Entry), to: &dyn Fn(&StoreSpec) -> Option<String>| {
        let mut entry = entry(BELOW);
        entry.fail(Problem::UpperMissing, String::new());
        entry.retries.later(now);
        change(&mut entry);
        let is_allowed = entry.retries.is_allowed();
        entry.look_at_own(&table(&entry, &[]));
        assert_eq!(entry.retries.is_allowed(), is_allowed, "the first look");
        let point = to(&entry.spec);
        entry.look_at_own(&table(&entry, &point.iter().map(String::as_str).collect::<Vec<_>>()));
        entry.retries.is_allowed()
    };
    assert!(moved(|_| {}, &|spec| Some(spec.layers.upper.to_string())));
    assert!(moved(|_| {}, &|spec| Some(spec.state_dir.to_string())));
    assert!(!moved(|_| {}, &|_| None));
    assert!(!moved(|_| {}, &|_| Some("/elsewhere".to_owned())));
    assert!(!moved(|entry| entry.phase = Phase::Active, &|spec| Some(spec.layers.upper.to_string())));
    let given_up = |entry: &mut Entry| {
        entry.retries = Retries::default();
        entry.fail(Problem::Foreign, String::new());
    };
    assert!(!moved(given_up, &|spec| Some(spec.layers.upper.to_string())));
}

fn a_start() -> Up {
    Up {
        held: Held::default(),
        mount: None,
        changes: Changes::default(),
        owner_uid: 0,
        room: Room::Enough,
        served: false,
    }
}
