//! The methods of `org.layeredstores1.Store`.

use std::collections::BTreeMap;

use layered_stores_client::{BUS_NAME, Properties, StoreProxy, store_path};
use serde_json::json;

use super::{AUTO, BY_HAND, NO, Setup, assert_refused, store, with_daemon, with_daemon_on};
use crate::supervisor::{
    Asker, Command, Error, Problem, Status,
    simulation::{Declared, Event, name},
};

impl Setup {
    /// What root may ask of a store.
    async fn store(&self, of: usize) -> StoreProxy<'static> {
        store(&self.client(0).await, of).await
    }

    fn state(&self, of: usize) -> String {
        let cell = self.play.handle().store(name(of).as_str()).expect("it is there");
        cell.read(|status| status.state.to_string())
    }

    /// What the engine answers to whoever asks for a refresh without the bus.
    async fn remount(&self, of: usize) -> Error {
        let ask = |reply| Command::Remount(name(of), Asker::Allowed, reply);
        self.play.handle().ask(ask).await.expect_err("it is not refreshed")
    }
}

/// A step of the simulated machine that fails.
fn step_fails() -> String {
    "cannot read the mount table: a step fails".to_owned()
}

/// What there is to say about a store, under the names that clients use in JSON.
fn described(status: &Status) -> serde_json::Value {
    let (spec, layers) = (&status.spec, &status.spec.layers);
    let found = status.found.as_deref().cloned().unwrap_or_default();
    let contents = found.contents().cloned().unwrap_or_default();
    let problem = |(code, message): &(Problem, String)| json!({ "code": code.to_string(), "message": message });
    json!({
        "name": spec.name.as_str(),
        "state": status.state.to_string(),
        "state-reason": status.state_reason,
        "state-change-usec": status.state_change_usec,
        "next-try-usec": status.next_try_usec,
        "problems": status.problems.iter().map(problem).collect::<Vec<_>>(),
        "store-uri": spec.uri(),
        "daemon-uri": spec.daemon_uri().unwrap_or_default(),
        "lower-store": spec.lower_store.to_string(),
        "lower-store-dir": layers.lower.as_str(),
        "upper-layer": layers.upper.as_str(),
        "work-dir": layers.work.as_str(),
        "real-store-dir": layers.merged.as_str(),
        "state-dir": spec.state_dir.as_str(),
        "mount-unit": spec.mount_unit.to_string(),
        "declared": status.declared,
        "required": spec.required,
        "last-refresh-usec": status.last_refresh_usec,
        "last-refresh": status.last_refresh,
        "refresh-count": status.refresh_count,
        "swap-count": status.swap_count,
        "contents-known": found.contents().is_some(),
        "upper-path-count": contents.upper_paths,
        "upper-nar-size": contents.upper_size,
        "shadowed-path-count": contents.shadowed_paths,
        "shadowed-nar-size": contents.shadowed_size,
        "lower-path-count": contents.lower_paths,
        "lost-path-count": contents.lost_paths,
        "lease-count": found.leases(),
    })
}

#[test]
fn properties_are_what_the_engine_says() {
    let served = Declared { daemon: true, ..AUTO };
    with_daemon([served, AUTO, BY_HAND], async |setup| {
        for path in 0..3 {
            setup.befall(Event::Change(0, path, true, true)).await;
            setup.wait(120).await;
        }
        setup.befall(Event::Fail(2, 1)).await;
        setup.store(2).await.start().await.expect_err("a step fails");
        setup.befall(Event::Lose(0, true)).await;
        // One that goes, but cannot.
        setup.befall(Event::Use(1, true)).await;
        setup.befall(Event::Reload([served, NO, BY_HAND])).await;
        let client = setup.client(7).await;
        let mut seen = BTreeMap::new();
        for (of, event) in [(0, None), (1, None), (2, None), (2, Some(Event::MountForeign(2)))] {
            if let Some(event) = event {
                setup.befall(event).await;
                setup.wait(60).await;
            }
            let (path, interface) = (store_path(&name(of)), Some("org.freedesktop.DBus.Properties"));
            let call = client.call_method(Some(BUS_NAME), path, interface, "GetAll", &"org.layeredstores1.Store");
            let properties: Properties = call.await.expect("an answer").body().deserialize().expect("properties");
            let said = serde_json::to_value(properties).expect("text");
            let cell = setup.play.handle().store(name(of).as_str()).expect("it is there");
            assert_eq!(said, described(&cell.get()));
            for (property, value) in said.as_object().expect("properties") {
                seen.entry(property.clone()).or_insert_with(Vec::new).push(value.to_string());
            }
        }
        // Each was seen with a value that says something.
        for (property, values) in seen {
            let says_something = |value: &String| !matches!(value.as_str(), "0" | "1" | "\"\"" | "[]" | "true");
            assert!(values.iter().any(says_something), "{property}: {values:?}");
        }
    });
}

#[test]
fn a_store_is_stopped_and_started_with_what_it_lies_on() {
    with_daemon([AUTO, BY_HAND, AUTO], async |setup| {
        for of in [2, 0] {
            setup.store(of).await.stop().await.expect("it is free");
            assert_eq!(setup.state(of), "inactive");
        }
        setup.store(2).await.start().await.expect("a start");
        assert_eq!([0, 1, 2].map(|of| setup.state(of)), ["active", "inactive", "active"]);
    });
}

#[test]
fn a_refresh_returns_when_the_store_is_right() {
    with_daemon([AUTO, AUTO, NO], async |setup| {
        setup.befall(Event::Change(1, 0, true, false)).await;
        setup.store(1).await.remount().await.expect("a refresh");
        let cell = setup.play.handle().store("b").expect("it is there");
        assert_eq!(cell.read(|status| status.last_refresh), "swapped");
    });
}

#[test]
fn what_cannot_be_started_says_why() {
    with_daemon([BY_HAND, NO, NO], async |setup| {
        setup.befall(Event::Fail(0, 1)).await;
        let answer = setup.store(0).await.start().await;
        assert_refused(answer, "StartFailed", Error::StartFailed(name(0), step_fails()));
    });
}

#[test]
fn what_is_in_use_or_lies_below_others_stays_up() {
    with_daemon([AUTO, AUTO, AUTO], async |setup| {
        setup.befall(Event::Use(1, true)).await;
        let why = "cannot read the mount table: it is in use".to_owned();
        assert_refused(setup.store(1).await.stop().await, "Busy", Error::Busy(name(1), why));
        let carries = Error::LowerOf(name(0), vec!["c".to_owned()]);
        assert_refused(setup.store(0).await.stop().await, "LowerOfOthers", carries);
        setup.wait(60).await;
        assert_eq!([0, 1, 2].map(|of| setup.state(of)), ["active"; 3]);
    });
}

#[test]
fn what_is_down_is_neither_refreshed_nor_verified() {
    with_daemon([BY_HAND, NO, NO], async |setup| {
        let store = setup.store(0).await;
        let not_active = || Error::NotActive(name(0), "start it with `layered-stores start a`".to_owned());
        assert_refused(store.remount().await, "NotActive", not_active());
        assert_refused(store.verify().await, "NotActive", not_active());
    });
}

#[test]
fn a_refresh_that_fails_says_why() {
    with_daemon([NO, AUTO, NO], async |setup| {
        // There is more that is done about it, and takes its part of the failures.
        setup.befall(Event::Fail(1, 5)).await;
        let answer = setup.store(1).await.remount().await;
        assert_refused(answer, "RefreshFailed", Error::RefreshFailed(name(1), step_fails()));
    });
}

#[test]
fn a_refresh_that_does_not_help_names_what_is_stale() {
    with_daemon_on(false, [NO, AUTO, NO], async |setup| {
        setup.befall(Event::Change(1, 0, true, true)).await;
        setup.wait(60).await;
        let answer = setup.store(1).await.remount().await;
        let error = setup.remount(1).await;
        assert!(error.to_string().contains("path-0"), "{error}");
        assert_refused(answer, "Stale", error);
    });
}

#[test]
fn a_refresh_that_would_leave_too_much_behind_is_refused_as_stale() {
    with_daemon([NO, AUTO, NO], async |setup| {
        setup.befall(Event::Left(1, 40)).await;
        setup.befall(Event::Change(1, 0, true, true)).await;
        let answer = setup.store(1).await.remount().await;
        let error = setup.remount(1).await;
        assert!(matches!(error, Error::Held(..)), "{error}");
        assert_refused(answer, "Stale", error);
    });
}

#[test]
fn nobody_waits_for_a_filesystem_that_does_not_answer() {
    with_daemon([NO, AUTO, NO], async |setup| {
        let store = setup.store(1).await;
        setup.befall(Event::Hang(1)).await;
        let waited_for = store.remount().await;
        let error = setup.remount(1).await;
        assert!(matches!(error, Error::Stuck(..)), "{error}");
        assert_refused(waited_for, "Stuck", error.clone());
        assert_refused(store.remount().await, "Stuck", error.clone());
        assert_refused(store.start().await, "Stuck", error.clone());
        assert_refused(store.stop().await, "Stuck", error.clone());
        assert_refused(store.verify().await, "Stuck", error);
        setup.befall(Event::GoOn(1)).await;
        setup.wait(60).await;
        store.remount().await.expect("it answers again");
    });
}

#[test]
fn who_waits_while_the_daemon_goes_down_is_told() {
    with_daemon([BY_HAND, NO, NO], async |setup| {
        let store = setup.store(0).await;
        setup.befall(Event::Hang(0)).await;
        let waits = tokio::spawn(async move { store.start().await });
        setup.wait(1).await;
        setup.befall(Event::Restart).await;
        assert_refused(waits.await.expect("an answer"), "ShuttingDown", Error::ShuttingDown);
    });
}
