//! How a store goes over to what is declared of it.

use super::*;
use crate::supervisor::plan::change::Stay;

fn because(why: &str) -> Option<Stay> {
    Some(Stay::Because(why.to_owned()))
}

#[test]
fn one_that_is_up_is_looked_at_once_and_again_after_a_failure() {
    let mut entry = proposed();
    let now = Instant::now();
    assert!(entry.is_considered() && !entry.respecifies() && entry.may_respecify() && !entry.is_settled());
    let spec = entry.begin_to_look(now).expect("it is due");
    let progress: Arc<dyn Follow> = Arc::new(Waits(Some((Spot::Upper, now))));
    entry.looks_ahead(&spec, &progress, now);
    assert!(entry.begin_to_look(now).is_none(), "somebody looks");
    assert_eq!(entry.candidate_due(), Some(now + DEADLINE));
    entry.look_came_back(&spec, Some("it is mistyped".to_owned()), now);
    entry.decide(because("it is mistyped"));
    assert!(!entry.is_considered() && !entry.may_respecify() && entry.is_settled());
    assert!(entry.message(Problem::NotApplied).is_some_and(|told| told.contains("it is mistyped")));
    assert!(entry.begin_to_look(now).is_none(), "not all the time");
    assert!(entry.next_try_usec() > 0);
    let due = entry.candidate_due().expect("it is tried again");
    let spec = entry.begin_to_look(due).expect("it is due");
    for stay in [None, Some(Stay::ForNow)] {
        if stay.is_some() {
            entry.decide(stay);
        }
        assert!(entry.is_considered() && entry.has(Problem::NotApplied), "what was said holds until more is known");
    }
    entry.looks_ahead(&spec, &progress, due);
    entry.look_came_back(&spec, None, due);
    entry.decide(None);
    assert!(entry.respecifies() && !entry.has(Problem::NotApplied) && !entry.is_settled());
}

#[test]
fn a_look_that_does_not_come_back_is_waited_for_once_and_no_other_begins_of_the_same() {
    let mut entry = proposed();
    let now = Instant::now();
    let first = entry.begin_to_look(now).expect("it is due");
    let progress: Arc<dyn Follow> = Arc::new(Waits(Some((Spot::Upper, now))));
    entry.looks_ahead(&first, &progress, now);
    assert_eq!(entry.look_is_silent(now + DEADLINE / 2), None);
    for _ in 0..2 {
        assert_eq!(entry.look_is_silent(now + DEADLINE), Some(Spot::Upper));
        entry.look_is_given_up("it does not answer".to_owned(), now + DEADLINE);
        entry.decide(because("it does not answer"));
        assert!(!entry.is_considered(), "nobody waits for it");
        entry.try_again();
        assert!(entry.begin_to_look(now + DEADLINE).is_none(), "the first look is out");
    }
    let mut other = (*first).clone();
    other.layers.options.clear();
    other.layers.upper = "/right".parse().expect("valid");
    assert!(entry.has(Problem::NotApplied));
    entry.propose(Arc::new(other));
    entry.decide(Some(Stay::ForNow));
    assert!(!entry.has(Problem::NotApplied), "of this one nothing is known");
    assert!(entry.begin_to_look(now + DEADLINE / 2).is_none() && entry.is_considered());
    assert_eq!((entry.candidate_due(), entry.look_is_silent(now + DEADLINE)), (Some(now + DEADLINE), None));
    let second = entry.begin_to_look(now + DEADLINE).expect("of another declaration that says nothing");
    entry.looks_ahead(&second, &progress, now + DEADLINE);
    entry.look_came_back(&first, None, now + DEADLINE);
    assert!(entry.is_considered() && entry.begin_to_look(now + DEADLINE).is_none(), "the second look is out");
    entry.look_came_back(&second, None, now + DEADLINE);
    entry.decide(None);
    assert_eq!(entry.next, Some(second));
}

#[test]
fn one_that_was_up_has_something_to_lose_until_it_is_down() {
    let changed = |change: fn(&mut Entry)| {
        let mut entry = proposed();
        entry.up();
        change(&mut entry);
        assert_eq!(entry.has_something_to_lose(), entry.begin_to_look(Instant::now()).is_some());
        entry.has_something_to_lose()
    };
    assert!(changed(|_| {}));
    assert!(changed(|entry| entry.want(Want::Down)), "the stop may be refused");
    assert!(changed(|entry| entry.mount = MountState::Absent), "it comes back");
    assert!(changed(|entry| entry.fail(Problem::StartFailed, String::new())), "it is tried again");
    assert!(changed(|entry| {
        let point = entry.spec.layers.merged.to_string();
        entry.mount = MountState::Covered(Cover { what: "tmpfs".to_owned(), hides: point.clone(), point });
        entry.fail(Problem::Covered, String::new());
    }));
    assert!(!changed(|entry| {
        entry.want(Want::Down);
        entry.mount = MountState::Absent;
        entry.down();
    }));
    assert!(
        !changed(|entry| {
            entry.want(Want::Down);
            entry.mount = MountState::Absent;
            entry.down();
            entry.want(Want::Up);
        }),
        "started again it may be another one"
    );
    assert!(!changed(|entry| {
        entry.decide(None);
        entry.respecify();
        entry.mount = MountState::Absent;
        let mut other = (*entry.spec).clone();
        other.layers.options.clear();
        entry.propose(Arc::new(other));
    }));
}

#[test]
fn what_is_withdrawn_is_said_no_more() {
    let mut entry = proposed();
    entry.decide(because("it is mistyped"));
    entry.withdraw();
    assert!(entry.candidate.is_none() && codes(&entry).is_empty());
    let mut entry = respecified();
    entry.problem(Problem::Busy, String::new());
    let next = Arc::clone(entry.declared_spec());
    entry.propose(next);
    assert!(entry.respecifies() && entry.has(Problem::Busy), "that is on its way");
    entry.withdraw();
    assert!(!entry.respecifies() && codes(&entry).is_empty());
}

#[test]
fn a_mount_that_somebody_has_made_takes_other_options_and_no_other_directories() {
    let mut entry = respecified();
    entry.mount = MountState::Absent;
    entry.take_next_in_place();
    assert!(entry.next.is_some(), "it is not mounted");
    entry.mount = MOUNTED;
    entry.take_next_in_place();
    assert!(entry.next.is_none() && entry.spec.layers.options.len() == 1);
    let mut next = (*entry.spec).clone();
    next.layers.upper = "/elsewhere".parse().expect("valid");
    entry.next = Some(Arc::new(next));
    entry.take_next_in_place();
    assert!(entry.next.is_some());
}

#[test]
fn what_is_to_go_is_in_the_way_while_it_cannot() {
    let busy = |mut entry: Entry| {
        entry.problem(Problem::Busy, "it is in use".to_owned());
        entry
    };
    let gone = |mut entry: Entry| {
        entry.want(Want::Gone);
        entry
    };
    let states = |entry: &Entry| (entry.is_to_go(), entry.is_in_the_way());
    assert_eq!(states(&up()), (false, false));
    assert_eq!(states(&busy(up())), (false, false), "it stays");
    assert_eq!(states(&gone(up())), (true, false));
    assert_eq!(states(&busy(gone(up()))), (true, true));
    assert_eq!(states(&respecified()), (true, false));
    assert_eq!(states(&busy(respecified())), (true, true));
    let mut stuck = gone(up());
    stuck.stuck = Some("it does not answer".to_owned());
    assert_eq!(states(&stuck), (true, true));
}
