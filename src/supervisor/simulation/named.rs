//! Orders of events that were wrong once.
//!
//! Who adds one: the property test prints it as a call of `play`.

use std::time::Duration;

use super::{
    Declared,
    Event::{
        CannotChange, Change, Fail, GoOn, Hang, Kill, MountByHand, MountForeign, Reload, Remount, Restart, SocketFails,
        Start, Stop, Unmount, Wait,
    },
    Play, Problem, State, has, name, play, run, tell_nobody,
};
use crate::supervisor::Asker;

const NO: Declared = Declared { there: false, autostart: false, noatime: false, daemon: false };
const AUTO: Declared = Declared { there: true, autostart: true, noatime: false, daemon: false };
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
fn a_socket_that_fails_at_once_is_seen_to() {
    let served = Declared { daemon: true, ..AUTO };
    for wait in (0..2000).step_by(100) {
        holds(2490941471149497150, [served, NO, NO], vec![milliseconds(wait), SocketFails(0)]);
    }
}

/// Has a store that is up declared otherwise, while it could not come up like that, and then could.
fn goes_on_as_it_was(what_is_wrong: super::Event, what_puts_it_right: super::Event) {
    run(async {
        let mut play = Play::begin(0, true, &[AUTO, NO, AUTO], Box::new(tell_nobody)).await;
        let changed = Reload([noatime(AUTO), NO, AUTO]);
        for event in [milliseconds(5000), what_is_wrong, changed, milliseconds(15_000), Remount(0, Asker::Root)] {
            play.befall(event).await;
        }
        let status = |play: &Play, of| play.status(&name(of)).expect("declared");
        let is_changed = |play: &Play| status(play, 0).spec.layers.options != status(play, 2).spec.layers.options;
        assert_eq!([0, 2].map(|of| status(&play, of).state), [State::Active; 2]);
        assert!(!is_changed(&play) && has(&status(&play, 0), Problem::NotApplied));
        play.befall(what_puts_it_right).await;
        play.befall(milliseconds(301_000)).await;
        assert!(play.waiters.is_empty(), "who has reloaded was answered");
        assert!(is_changed(&play) && !has(&status(&play, 0), Problem::NotApplied));
        play.check();
        assert_eq!(play.violations(), [""; 0]);
    });
}

#[test]
fn a_store_that_would_not_come_up_as_it_is_declared_now_goes_on_as_it_was() {
    goes_on_as_it_was(CannotChange(0, true), CannotChange(0, false));
}

#[test]
fn a_store_whose_next_directories_do_not_answer_goes_on_as_it_was() {
    goes_on_as_it_was(Hang(0), GoOn(0));
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
