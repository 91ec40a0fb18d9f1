//! Orders of events that were wrong once.
//!
//! Who adds one: the property test prints it as a call of `play`.

use std::time::Duration;

use super::{
    Declared,
    Event::{Change, Hang, Kill, MountByHand, MountForeign, Reload, Restart, SocketFails, Start, Stop, Unmount, Wait},
    play,
};

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
