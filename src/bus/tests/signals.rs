//! Signals: what a client knows that has asked once and has listened since is what there is.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use layered_stores_client::store_path;
use proptest::{prelude::*, test_runner::RngSeed};

use super::{AUTO, BY_HAND, NO, Setup, manager, picture::Picture, with_daemon};
use crate::supervisor::simulation::{
    self, Event, name,
    properties::{declared, events},
};

impl Setup {
    /// Looks whether a client's picture is right.
    async fn look_at(&self, picture: &Picture) -> Result<(), String> {
        let (known, there) = (picture.objects(), picture.ask().await);
        if known != there {
            return Err(format!("a client knows {known:#?}\nand there is {there:#?}"));
        }
        let listed = manager(&self.client(7).await).await.list_stores().await.expect("a list");
        let listed: Vec<_> = listed.into_iter().map(|(name, ..)| name).collect();
        if picture.stores() != listed {
            return Err(format!("a client knows {:?}, and there are {listed:?}", picture.stores()));
        }
        let wrong = picture.wrong();
        if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n")) }
    }
}

#[test]
fn who_has_started_the_daemon_is_told_how_far_it_is() {
    with_daemon([AUTO, AUTO, BY_HAND], async |setup| {
        setup.befall(Event::Stop(1)).await;
        setup.wait(1).await;
        let said = setup.milestones.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let now =
            ["Settled(\"2 of 3 stores active; not started: 1\")", "Summary(\"1 of 3 stores active; not started: 2\")"];
        assert!(said.ends_with(&now.map(str::to_owned)), "{said:?}");
        let before = &said[..said.len() - 2];
        let is_summary = |said: &&String| said.starts_with("Summary(");
        assert_eq!(before.iter().filter(|said| !is_summary(said)).collect::<Vec<_>>(), ["Named"]);
        assert!(before.iter().any(|said| is_summary(&said)), "how far it is while it starts: {said:?}");
    });
}

#[test]
fn what_changes_is_told_and_nothing_else() {
    with_daemon([AUTO, AUTO, BY_HAND], async |setup| {
        let picture = Picture::begin(setup.client(7).await).await;
        let state = ["State", "StateChangeUSec"];
        let contents = [
            "ContentsKnown",
            "LeaseCount",
            "LowerPathCount",
            "ShadowedNarSize",
            "ShadowedPathCount",
            "UpperNarSize",
            "UpperPathCount",
        ];
        let moved = [&state[..], &contents].concat();
        let refresh = ["LastRefresh", "LastRefreshUSec", "RefreshCount"];
        let foreign = [&["Problems", "StateReason"], &moved[..]].concat();
        for (event, of, expected) in [
            (Event::Wait(Duration::from_secs(1)), 1, &[][..]),
            (Event::Stop(1), 1, &moved),
            (Event::Start(1), 1, &moved),
            (Event::Lose(1, true), 1, &["LostPathCount", "Problems"]),
            (Event::Lose(1, false), 1, &["LostPathCount", "Problems"]),
            (Event::Change(1, 0, false, true), 1, &refresh),
            (Event::Full(1, true), 1, &["Problems"]),
            (Event::Full(1, false), 1, &["Problems"]),
            (Event::MountForeign(0), 0, &foreign),
        ] {
            let what = format!("{event:?}");
            setup.befall(event).await;
            setup.wait(120).await;
            let path = store_path(&name(of)).to_string();
            let told = picture.told();
            assert!(told.iter().all(|(about, news)| *about == path && !news.is_empty()), "{what}: {told:?}");
            let told: BTreeSet<_> = told.iter().flat_map(|(_, news)| news).map(String::as_str).collect();
            assert_eq!(told, expected.iter().copied().collect(), "{what}");
            assert_eq!(setup.look_at(&picture).await, Ok(()), "{what}");
        }
        assert_eq!(picture.repeated(), Vec::<String>::new());
    });
}

#[test]
fn stores_that_come_and_go_are_told_of() {
    with_daemon([AUTO, NO, NO], async |setup| {
        let picture = Picture::begin(setup.client(7).await).await;
        let root = setup.client(0).await;
        let noatime = simulation::Declared { noatime: true, ..AUTO };
        for (declared, stores) in [
            ([AUTO, AUTO, AUTO], &["a", "b", "c"][..]),
            ([NO, AUTO, NO], &["b"]),
            ([NO, NO, NO], &[]),
            ([noatime, NO, BY_HAND], &["a", "c"]),
            ([AUTO, NO, AUTO], &["a", "c"]),
        ] {
            setup.play.declare(&declared);
            manager(&root).await.reload().await.expect("a reload");
            setup.wait(60).await;
            assert_eq!(picture.stores(), stores);
            assert_eq!(setup.look_at(&picture).await, Ok(()));
        }
    });
}

#[test]
fn who_has_asked_in_between_is_told_of_what_has_changed_back() {
    const HOUR: u64 = 3600;
    simulation::run(async {
        let seconds = Arc::<AtomicU64>::default();
        let pause = {
            let seconds = Arc::clone(&seconds);
            move || Duration::from_secs(seconds.load(Ordering::Relaxed))
        };
        let mut setup = Setup::begin(1, true, [AUTO, AUTO, NO], pause).await;
        setup.wait(60).await;
        // The bus is full, and a signal about another store has to wait.
        seconds.store(HOUR, Ordering::Relaxed);
        for _ in 0..3 {
            let manager = manager(&setup.client(7).await).await;
            tokio::spawn(async move { manager.list_stores().await });
        }
        setup.wait(1).await;
        setup.befall(Event::Stop(0)).await;
        setup.wait(60).await;
        setup.befall(Event::Full(1, true)).await;
        setup.wait(120).await;
        let picture = tokio::spawn(Picture::begin(setup.client(7).await));
        setup.wait(1).await;
        setup.befall(Event::Full(1, false)).await;
        setup.wait(120).await;
        seconds.store(0, Ordering::Relaxed);
        setup.wait(2 * HOUR).await;
        let picture = picture.await.expect("a picture");
        assert_eq!(setup.look_at(&picture).await, Ok(()));
        let told = |(path, news): (String, Vec<String>)| path.ends_with("/b") && news == ["Problems"];
        assert!(picture.told().into_iter().any(told), "it was right by itself: nothing was asked in between");
    });
}

/// How long a busy bus takes for each message: most often nothing, sometimes so long that all else goes on meanwhile.
fn slowly(seed: u64) -> impl FnMut() -> Duration + Clone + Send + 'static {
    let mut random = seed | 1;
    move || {
        // xorshift64.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let number = random >> 16;
        match number % 8 {
            0..5 => Duration::ZERO,
            5..7 => Duration::from_millis(1 + number / 8 % 20),
            _ => Duration::from_millis(50 + number / 8 % 500),
        }
    }
}

/// Plays events while two clients listen, one from the beginning and one from the middle. Returns what is wrong.
fn listen(seed: u64, can_swap: bool, declared: [simulation::Declared; 3], events: Vec<Event>) -> Result<(), String> {
    simulation::run(async {
        let mut setup = Setup::begin(seed, can_swap, declared, slowly(seed)).await;
        let early = Picture::begin(setup.client(7).await).await;
        let (half, mut late) = (events.len() / 2, None);
        for (number, event) in events.into_iter().enumerate() {
            // The daemon's objects go with it.
            if matches!(event, Event::Kill | Event::Restart) {
                continue;
            }
            if number >= half && late.is_none() {
                late = Some(Picture::begin(setup.client(7).await).await);
            }
            setup.befall(event).await;
        }
        setup.play.rest().await;
        setup.look_at(&early).await?;
        if let Some(late) = late {
            setup.look_at(&late).await?;
        }
        let violations = setup.play.violations();
        if violations.is_empty() { Ok(()) } else { Err(violations.join("\n")) }
    })
}

proptest! {
    // The same orders for everybody, as those of the simulation itself.
    #![proptest_config(ProptestConfig {
        cases: 32,
        max_shrink_iters: 200,
        rng_seed: RngSeed::Fixed(1),
        ..ProptestConfig::default()
    })]

    /// Whatever happens, and however slowly the bus takes what the daemon says: once all is at rest, a client that has listened
    /// knows what one knows that asks now.
    #[test]
    fn who_listens_knows_what_there_is(
        seed: u64,
        can_swap in prop::bool::weighted(0.9),
        declared in declared(),
        events in prop::collection::vec(events(), 0..40),
    ) {
        let story = format!("listen({seed}, {can_swap}, {declared:?}, vec!{events:?})");
        if let Err(wrong) = listen(seed, can_swap, declared, events) {
            prop_assert!(false, "{wrong}\n{story}");
        }
    }
}
