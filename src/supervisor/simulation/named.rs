//! Orders of events that were wrong once.
//!
//! Who adds one: the property test prints it as a call of `play`.

use std::time::Duration;

use super::{
    Command, Declared, Error,
    Event::{
        CannotChange, Change, Fail, GoOn, Hang, HangConfiguration, HangRecords, Kill, Left, MountByHand, MountForeign,
        Reload, Remount, RemoveData, Restart, SocketFails, Start, Stop, Unmount, UnmountForeign, Use, Wait,
    },
    News, OWNER, Play, Problem, State, has, name, play, run, tell_nobody,
};
use crate::supervisor::Asker;

const NO: Declared = Declared { there: false, autostart: false, noatime: false, daemon: false, moved: false };
const AUTO: Declared = Declared { there: true, autostart: true, noatime: false, daemon: false, moved: false };
const BY_HAND: Declared = Declared { autostart: false, ..AUTO };

fn noatime(declared: Declared) -> Declared {
    Declared { noatime: true, ..declared }
}

fn milliseconds(number: u64) -> super::Event {
    Wait(Duration::from_millis(number))
}

fn holds(seed: u64, declared: [Declared; 3], events: Vec<super::Event>) {
    let violations = play(seed, false, &declared, events);
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

#[test]
fn a_store_that_was_started_by_hand_is_left_up_by_the_next_daemon() {
    for end in [Kill, Restart] {
        holds(0, [BY_HAND, NO, NO], vec![Start(0), milliseconds(5000), end]);
    }
}

#[test]
fn who_waits_for_a_start_is_sent_away_by_a_stop_and_the_other_way_round() {
    for seed in 0..8 {
        holds(seed, [BY_HAND, NO, NO], vec![Start(0), Stop(0)]);
        holds(seed, [AUTO, NO, NO], vec![milliseconds(5000), Stop(0), Start(0)]);
    }
}

#[test]
fn a_store_that_was_covered_goes_down_once_it_is_not() {
    holds(0, [AUTO, NO, NO], vec![milliseconds(5000), MountForeign(0), milliseconds(100), Reload([NO, NO, NO])]);
    let changed = [noatime(AUTO), AUTO, AUTO];
    holds(
        3845605155400618582,
        [AUTO, AUTO, AUTO],
        vec![milliseconds(52), MountForeign(0), Reload(changed), milliseconds(16_219)],
    );
}

#[test]
fn a_store_that_cannot_go_for_what_somebody_has_mounted_on_it_keeps_nobody_waiting() {
    holds(
        0,
        [AUTO, NO, BY_HAND],
        vec![milliseconds(5000), MountByHand(2), Reload([noatime(AUTO), NO, BY_HAND]), Start(2)],
    );
    holds(0, [AUTO, NO, AUTO], vec![MountByHand(2), milliseconds(5000), Reload([noatime(AUTO), NO, AUTO])]);
}

#[test]
fn a_store_is_not_started_on_one_that_goes_down() {
    for seed in [11614465006779636004, 1, 2, 3] {
        holds(seed, [AUTO, NO, BY_HAND], vec![milliseconds(3000), Stop(0), Start(2), Change(0, 0, false, false)]);
    }
}

#[test]
fn a_store_whose_mount_was_taken_away_is_in_nobodys_way() {
    for seed in 0..8 {
        let changed = [noatime(AUTO), AUTO, AUTO];
        holds(seed, [AUTO, AUTO, AUTO], vec![milliseconds(5000), Reload(changed), Unmount(2)]);
    }
}

#[test]
fn a_reload_does_not_wait_for_what_lies_on_a_store_that_hangs() {
    let later = [noatime(BY_HAND), NO, AUTO];
    holds(
        0,
        [AUTO, NO, NO],
        vec![milliseconds(3000), Reload(later), Hang(0), milliseconds(30_000), milliseconds(30_001)],
    );
}

#[test]
fn who_starts_a_store_has_what_failed_or_waits_tried_at_once() {
    run(async {
        let mut play = Play::begin(0, true, &[AUTO, BY_HAND, NO], Box::new(tell_nobody)).await;
        go_on(&mut play, vec![milliseconds(5000), Fail(1, 1)]).await;
        let handle = play.handle().clone();
        let start = async |of| {
            let begun = tokio::time::Instant::now();
            let answer = handle.ask(|reply| Command::Start(name(of), reply)).await;
            (answer, begun.elapsed().as_millis())
        };
        assert!(matches!(start(1).await, (Err(Error::StartFailed(..)), _)));
        assert!(matches!(start(1).await, (Ok(()), ..900)), "and not when its turn comes again");

        let changed = Reload([noatime(AUTO), BY_HAND, NO]);
        go_on(&mut play, vec![CannotChange(0, true), changed, milliseconds(15_000), CannotChange(0, false)]).await;
        assert!(has(&status(&play, 0), Problem::NotApplied));
        let answer = start(0).await;
        assert!(matches!(answer, (Ok(()), ..4000)), "{answer:?}");
        let status = status(&play, 0);
        assert!(!has(&status, Problem::NotApplied) && Some(&*status.spec) == play.spec(&name(0)).as_ref());
    });
}

#[test]
fn root_has_a_swap_whatever_earlier_ones_have_left() {
    run(async {
        let mut play = Play::begin(0, true, &[AUTO, NO, NO], Box::new(tell_nobody)).await;
        go_on(&mut play, vec![milliseconds(5000), Left(0, 40), Change(0, 0, true, true)]).await;
        let handle = play.handle().clone();
        let ask = async |asker| handle.ask(|reply| Command::Remount(name(0), asker, reply)).await;
        assert!(matches!(ask(Asker::Allowed).await, Err(Error::Held(..))));
        assert!(matches!(ask(Asker::Root).await, Ok(())));
        assert!(play.world.lock().store(&name(0)).stale.is_empty());
    });
}

#[test]
fn a_stop_that_has_not_begun_when_a_store_gets_stuck_is_refused_and_one_that_has_is_finished() {
    let state = |events| {
        let mut state = None;
        see([AUTO, NO, NO], events, |play| state = Some(status(play, 0).state));
        state.expect("looked at")
    };
    let (hang, go_on) = (vec![milliseconds(5000), Hang(0)], vec![milliseconds(15_000), GoOn(0), milliseconds(60_000)]);
    let refreshed = vec![Remount(0, Asker::Root), milliseconds(100), Stop(0)];
    assert_eq!(state([hang.clone(), refreshed, go_on.clone()].concat()), State::Active);
    assert_eq!(state([hang, vec![Stop(0)], go_on].concat()), State::Inactive);
}

#[test]
fn a_store_that_somebody_has_started_again_may_lose_its_mount_again() {
    run(async {
        let mut play = Play::begin(0, true, &[AUTO, NO, NO], Box::new(tell_nobody)).await;
        go_on(&mut play, vec![milliseconds(5000)]).await;
        while status(&play, 0).state != State::Failed {
            go_on(&mut play, vec![Unmount(0), milliseconds(2000)]).await;
        }
        go_on(&mut play, vec![Start(0), milliseconds(2000), Unmount(0), milliseconds(2000)]).await;
        assert_eq!(status(&play, 0).state, State::Active);
    });
}

#[test]
fn who_names_a_store_that_is_not_there_is_told_so() {
    run(async {
        let play = Play::begin(0, true, &[AUTO, NO, NO], Box::new(tell_nobody)).await;
        let handle = play.handle().clone();
        let answers = tokio::join!(
            handle.ask(|reply| Command::Start(name(1), reply)),
            handle.ask(|reply| Command::Stop(name(1), reply)),
            handle.ask(|reply| Command::Remount(name(1), Asker::Root, reply)),
        );
        let is_told = |answer: Result<(), Error>| matches!(answer, Err(Error::NoSuchStore(named)) if named == "b");
        assert!(is_told(answers.0) && is_told(answers.1) && is_told(answers.2));
    });
}

#[test]
fn who_asks_for_a_refresh_of_a_store_that_comes_up_waits_until_it_has() {
    run(async {
        let mut play = Play::begin(0, true, &[AUTO, BY_HAND, NO], Box::new(tell_nobody)).await;
        let of_asker = |of, asker| move |reply| Command::Remount(name(of), asker, reply);
        let ask = |of| of_asker(of, Asker::Root);
        let handle = play.handle().clone();
        assert_ne!(status(&play, 0).state, State::Active);
        // Whose it is, is known once it is up.
        let (owner, stranger) = (of_asker(0, Asker::User(OWNER)), of_asker(0, Asker::User(OWNER + 1)));
        let answers = tokio::join!(handle.ask(ask(0)), handle.ask(owner), handle.ask(stranger));
        assert!(matches!(answers, (Ok(()), Ok(()), Err(Error::NotOwner(_)))), "{answers:?}");
        assert_eq!(status(&play, 0).state, State::Active);
        let (owner, stranger) = (of_asker(0, Asker::User(OWNER)), of_asker(0, Asker::User(OWNER + 1)));
        let answers = tokio::join!(handle.ask(owner), handle.ask(stranger));
        assert!(matches!(answers, (Ok(()), Err(Error::NotOwner(_)))), "{answers:?}");
        let error = handle.ask(ask(1)).await.expect_err("nobody has started it");
        assert!(error.to_string().contains("layered-stores start b"), "{error}");
        play.befall(Start(1)).await;
        handle.ask(ask(1)).await.expect("a refresh");
    });
}

#[test]
fn who_asks_for_a_refresh_is_answered_about_what_had_changed_by_then() {
    // Whichever the engine comes to first: the question, or the news of what has changed.
    for path in 0..20 {
        run(async {
            let mut play = Play::begin(path, true, &[AUTO, NO, NO], Box::new(tell_nobody)).await;
            play.befall(Wait(Duration::from_secs(60))).await;
            let handle = play.handle().clone();
            let ask = |reply| Command::Remount(name(0), Asker::Root, reply);
            play.world.lock().change(&name(0), "path", true, true);
            play.world.layers_changed.notify_one();
            handle.ask(ask).await.expect("a refresh");
            let stale = play.world.lock().store(&name(0)).stale.clone();
            assert!(stale.is_empty(), "it was told to be right, with {stale:?}");
        });
    }
}

#[test]
fn a_socket_that_fails_at_once_is_seen_to() {
    let served = Declared { daemon: true, ..AUTO };
    for wait in (0..2000).step_by(100) {
        holds(2490941471149497150, [served, NO, NO], vec![milliseconds(wait), SocketFails(0)]);
    }
}

/// Plays events one after the other, and looks at what has come of them.
fn see(declared: [Declared; 3], events: Vec<super::Event>, look: impl FnOnce(&Play)) {
    run(async {
        let mut play = Play::begin(0, true, &declared, Box::new(tell_nobody)).await;
        go_on(&mut play, events).await;
        look(&play);
        assert_eq!(play.violations(), [""; 0]);
    });
}

async fn go_on(play: &mut Play, events: Vec<super::Event>) {
    for event in events {
        play.befall(event).await;
    }
}

fn status(play: &Play, of: usize) -> super::Status {
    play.status(&name(of)).expect("declared")
}

/// Has a store that is up declared otherwise, while it could not come up like that, and then could.
fn goes_on_as_it_was(change: fn(Declared) -> Declared, what_is_wrong: super::Event, what_puts_it_right: super::Event) {
    run(async {
        let mut play = Play::begin(0, true, &[AUTO, NO, AUTO], Box::new(tell_nobody)).await;
        go_on(&mut play, vec![milliseconds(5000)]).await;
        let before = [0, 2].map(|of| status(&play, of).spec);
        let changed = Reload([change(AUTO), NO, AUTO]);
        go_on(&mut play, vec![what_is_wrong, changed, milliseconds(15_000), Remount(0, Asker::Root)]).await;
        assert_eq!([0, 2].map(|of| status(&play, of).state), [State::Active; 2]);
        assert_eq!([0, 2].map(|of| status(&play, of).spec), before);
        assert!(has(&status(&play, 0), Problem::NotApplied));
        // Longer than a thread for each try would do.
        go_on(&mut play, vec![milliseconds(3_600_000), what_puts_it_right, milliseconds(301_000)]).await;
        assert!(play.waiters.is_empty(), "who has reloaded was answered");
        for of in [0, 2] {
            let (status, declared) = (status(&play, of), play.spec(&name(of)));
            assert_eq!((status.state, Some(&*status.spec)), (State::Active, declared.as_ref()));
            assert!(!has(&status, Problem::NotApplied));
        }
        play.check();
        assert_eq!(play.violations(), [""; 0]);
    });
}

fn moved(declared: Declared) -> Declared {
    Declared { moved: true, ..declared }
}

#[test]
fn a_store_that_would_not_come_up_as_it_is_declared_now_goes_on_as_it_was() {
    goes_on_as_it_was(noatime, CannotChange(0, true), CannotChange(0, false));
}

#[test]
fn those_that_lie_on_a_store_that_goes_on_where_it_was_do_so_too() {
    goes_on_as_it_was(moved, CannotChange(0, true), CannotChange(0, false));
}

#[test]
fn a_store_that_moves_stays_if_what_lies_on_it_would_not_come_up_again() {
    goes_on_as_it_was(moved, CannotChange(2, true), CannotChange(2, false));
}

#[test]
fn a_store_whose_next_directories_do_not_answer_goes_on_as_it_was() {
    goes_on_as_it_was(noatime, Hang(0), GoOn(0));
}

#[test]
fn a_store_that_stays_as_it_was_comes_back_so_from_wherever_it_was() {
    let changed = Reload([noatime(AUTO), NO, NO]);
    let in_vain = vec![milliseconds(5000), CannotChange(0, true), changed, milliseconds(3000)];
    let way_and_back = [
        vec![Use(0, true), Stop(0), milliseconds(5000), Use(0, false)],
        vec![MountForeign(0), milliseconds(5000), UnmountForeign(0)],
        vec![Unmount(0)],
        vec![Fail(0, 1), Unmount(0)],
    ];
    for events in way_and_back {
        see([AUTO, NO, NO], [in_vain.clone(), events, vec![milliseconds(20_000)]].concat(), |play| {
            let status = status(play, 0);
            assert_eq!(status.state, State::Active, "{}", status.state_reason);
            assert!(status.spec.layers.options.is_empty() && has(&status, Problem::NotApplied));
        });
    }
    // It makes way for the one underneath, which changes.
    let both = Reload([noatime(AUTO), NO, noatime(AUTO)]);
    see([AUTO, NO, AUTO], vec![milliseconds(5000), CannotChange(2, true), both, milliseconds(20_000)], |play| {
        assert_eq!([0, 2].map(|of| status(play, of).state), [State::Active; 2]);
        assert_eq!([0, 2].map(|of| status(play, of).spec.layers.options.len()), [1, 0]);
        assert!(has(&status(play, 2), Problem::NotApplied) && !has(&status(play, 0), Problem::NotApplied));
    });
}

#[test]
fn a_store_that_failed_changes_at_once_and_a_change_of_mind_is_forgotten() {
    let events = vec![milliseconds(5000), Fail(0, 1), Kill, milliseconds(3000), Reload([noatime(AUTO), NO, NO])];
    see([AUTO, NO, NO], [events, vec![milliseconds(4000)]].concat(), |play| {
        assert_eq!(Some(&*status(play, 0).spec), play.spec(&name(0)).as_ref());
        assert_eq!(status(play, 0).state, State::Active);
    });
    let in_vain = vec![milliseconds(5000), CannotChange(0, true), Reload([noatime(AUTO), NO, NO]), milliseconds(5000)];
    let gone = vec![Use(0, true), Reload([NO, NO, NO]), milliseconds(5000)];
    let back = vec![Reload([AUTO, NO, NO]), milliseconds(5000)];
    see([AUTO, NO, NO], [in_vain, gone, back].concat(), |play| {
        assert_eq!((status(play, 0).state, status(play, 0).problems), (State::Active, Vec::new()));
    });
}

#[test]
fn a_store_that_is_covered_keeps_nobody_waiting_for_one_that_changes() {
    let covered = vec![milliseconds(5000), MountForeign(2), milliseconds(1000)];
    let changed = vec![Reload([noatime(AUTO), NO, AUTO]), milliseconds(30_000)];
    see([AUTO, NO, AUTO], [covered, changed].concat(), |play| {
        assert!(play.waiters.is_empty());
        assert!(has(&status(play, 0), Problem::Busy), "{:?}", status(play, 0).problems);
    });
}

#[test]
fn a_removal_that_hangs_keeps_nobody_waiting() {
    let removed = vec![Hang(0), RemoveData(0), milliseconds(15_000)];
    let declared = vec![Reload([AUTO, AUTO, NO]), milliseconds(20_000)];
    see([NO, NO, NO], [removed, declared].concat(), |play| {
        assert!(play.waiters.is_empty());
        assert_eq!([0, 1].map(|of| status(play, of).state), [State::Failed, State::Active]);
        let reason = status(play, 0).state_reason;
        assert!(reason.contains("is being removed") && reason.contains("has not answered"), "{reason}");
    });
    holds(0, [NO, NO, NO], vec![Hang(0), RemoveData(0), Reload([AUTO, AUTO, NO]), milliseconds(40_000), RemoveData(0)]);
}

#[test]
fn a_configuration_that_does_not_answer_is_put_in_force_when_it_does() {
    let changed = [noatime(AUTO), NO, NO];
    let hangs = vec![milliseconds(5000), HangConfiguration(true), Reload(changed), milliseconds(15_000)];
    let again = vec![Reload(changed), milliseconds(1000)];
    let is_changed = |play: &Play| Some(&*status(play, 0).spec) == play.spec(&name(0)).as_ref();
    see([AUTO, NO, NO], [hangs.clone(), again.clone()].concat(), |play| {
        assert!(play.waiters.is_empty() && !is_changed(play));
    });
    let answers = vec![HangConfiguration(false), milliseconds(5000)];
    see([AUTO, NO, NO], [hangs, again, answers].concat(), |play| assert!(is_changed(play)));
}

#[test]
fn a_store_that_is_not_to_come_back_does_not_have_those_on_it_make_way() {
    let declared = [noatime(BY_HAND), AUTO, noatime(BY_HAND)];
    holds(
        5396678929305429826,
        [AUTO, NO, noatime(AUTO)],
        vec![Kill, milliseconds(10), Remount(2, Asker::Root), Reload(declared), Kill, Fail(2, 1), milliseconds(2)],
    );
}

#[test]
fn a_store_waits_for_the_one_on_it_that_may_be_about_to_let_go() {
    run(async {
        let mut play = Play::begin(0, true, &[AUTO, NO, AUTO], Box::new(tell_nobody)).await;
        for event in [milliseconds(5000), Reload([NO, NO, AUTO]), milliseconds(1)] {
            play.befall(event).await;
        }
        while let Some(status) = play.status(&name(0)) {
            assert!(!has(&status, Problem::Busy), "nothing keeps it");
            play.befall(milliseconds(1)).await;
        }
    });
}

#[test]
fn what_was_given_up_on_for_a_store_that_was_to_be_stopped_and_stays_comes_up() {
    let served = Declared { daemon: true, ..AUTO };
    let events = vec![milliseconds(2), Use(0, true), Kill, Kill, Stop(0), Change(0, 0, false, false), MountForeign(0)];
    for seed in [12841921040181042034, 1, 2, 3] {
        holds(seed, [AUTO, served, AUTO], events.clone());
    }
}

#[test]
fn a_store_that_has_to_stay_for_what_lies_on_it_keeps_its_nix_daemon() {
    let (served, declared) = (Declared { daemon: true, ..BY_HAND }, Declared { daemon: true, ..AUTO });
    let before = [moved(declared), NO, AUTO];
    holds(
        0,
        before,
        vec![milliseconds(5000), Kill, Reload([served, NO, noatime(AUTO)]), Restart, milliseconds(60_000)],
    );
}

#[test]
fn a_store_that_cannot_go_is_taken_over_after_a_failure() {
    let before = [AUTO, NO, AUTO];
    holds(
        3560083040,
        before,
        vec![milliseconds(763), Fail(0, 1), Reload([BY_HAND, NO, AUTO]), Kill, milliseconds(875)],
    );
}

#[test]
fn a_store_that_is_taken_over_while_the_one_underneath_comes_up_anew_goes_over_to_that() {
    let served = Declared { daemon: true, ..AUTO };
    let events = vec![
        milliseconds(1),
        Change(0, 0, false, false),
        milliseconds(1078),
        Remount(1, Asker::Allowed),
        HangRecords(true),
        milliseconds(5),
        Unmount(0),
        Kill,
        milliseconds(2),
    ];
    for seed in [8791573551842192600, 1, 2, 3, 4, 5, 6, 7] {
        let violations = play(seed, true, &[served; 3], events.clone());
        assert!(violations.is_empty(), "{}", violations.join("\n"));
    }
}

#[test]
fn how_all_stores_are_is_told_whenever_it_changes() {
    run(async {
        let (told, mut is_told) = tokio::sync::mpsc::unbounded_channel();
        let tell = move |_, mut news: tokio::sync::mpsc::UnboundedReceiver<News>| {
            let told = told.clone();
            tokio::spawn(async move {
                while let Some(news) = news.recv().await {
                    if let News::Summary { summary } | News::Settled { summary } = news {
                        let _ = told.send(summary);
                    }
                }
            });
        };
        let mut play = Play::begin(0, true, &[AUTO, AUTO, NO], Box::new(tell)).await;
        let mut last = async |play: &mut Play, event| {
            go_on(play, vec![event, milliseconds(5000)]).await;
            std::iter::from_fn(|| is_told.try_recv().ok()).last()
        };
        let is = |text: &str| Some(text.to_owned());
        assert_eq!(last(&mut play, milliseconds(0)).await, is("2 of 2 stores active"));
        assert_eq!(last(&mut play, Stop(0)).await, is("1 of 2 stores active; not started: 1"));
        assert_eq!(last(&mut play, Remount(1, Asker::Root)).await, None, "nothing else has changed");
        assert_eq!(last(&mut play, Start(0)).await, is("2 of 2 stores active"));
    });
}
