use layered_stores_overlay::progress::Spot;
use tokio::sync::oneshot::{self, Receiver, error::TryRecvError};

use super::{
    bounds::{EACH, IN_ALL, KEPT, USERS},
    *,
};

/// Jobs, and what is told of them.
struct Setup {
    jobs: Jobs,
    events: mpsc::UnboundedReceiver<Event>,
    now: Instant,
}

type Answer<T = ()> = Receiver<Result<T, Error>>;

fn setup() -> Setup {
    let (sender, events) = mpsc::unbounded_channel();
    Setup { jobs: Jobs::new(sender), events, now: Instant::now() }
}

fn store(name: &str) -> StoreName {
    name.parse().expect("valid")
}

fn caller(name: &str, uid: u32) -> Caller {
    Caller { name: name.to_owned(), uid }
}

fn findings() -> Findings {
    Arc::new([Finding { about: "path".to_owned(), what: "missing".to_owned() }])
}

fn cancelled(name: &str) -> Error {
    Error::Cancelled(Kind::Verify, store(name))
}

impl Setup {
    /// What is told of jobs, as words. Whoever has asked is answered, as the bus does it.
    fn news(&mut self) -> Vec<String> {
        let mut news = Vec::new();
        while let Ok(event) = self.events.try_recv() {
            news.push(match event {
                Event::Job(JobNews::Asked(asked, reply)) => {
                    let told = format!("asked {}", asked.job.id());
                    let _ = reply.send(Ok(asked));
                    told
                }
                Event::Job(JobNews::Changed(job)) => format!("{} {} {:?}", job.id(), job.state(), job.counts()),
                Event::Job(JobNews::Over(job)) => format!("over {} {}", job.id(), job.state()),
                Event::Job(JobNews::Forgotten(id)) => format!("forgotten {id}"),
                other => panic!("{other:?}"),
            });
        }
        news
    }

    fn ask(&mut self, name: &str, by: &Caller) -> Result<Asked, Error> {
        // What came before.
        self.news();
        let (reply, mut answer) = oneshot::channel();
        self.jobs.ask(Kind::Verify, &store(name), by.clone(), reply);
        let mut others = self.news();
        others.retain(|news| !news.starts_with("asked"));
        assert_eq!(others, [""; 0], "asking changes nothing else");
        answer.try_recv().expect("an answer")
    }

    fn id(&mut self, name: &str, by: &Caller) -> u64 {
        self.ask(name, by).expect("room").job.id()
    }

    fn begin(&mut self, name: &str) -> Option<(u64, CancellationToken, Arc<Progress>)> {
        let progress = Arc::<Progress>::default();
        let (id, cancel) = self.jobs.begin(Kind::Verify, &store(name), &progress, self.now)?;
        self.news();
        Some((id, cancel, progress))
    }

    fn result(&mut self, id: u64, by: &Caller) -> Answer<Findings> {
        let (reply, answer) = oneshot::channel();
        self.jobs.result(id, by, reply);
        answer
    }

    fn came_back(&mut self, id: u64) {
        self.jobs.came_back(id, Some(Ok(findings())), self.now);
    }
}

#[test]
fn a_job_that_began_earlier_answers_nobody_who_has_asked_since() {
    let mut setup = setup();
    let (alice, bob) = (caller(":1.1", 1000), caller(":1.2", 1001));
    let first = setup.id("ci", &alice);
    assert_eq!(setup.id("ci", &bob), first, "one that has not begun is shared");
    assert_ne!(setup.id("other", &bob), first, "but not by stores");
    assert_eq!(setup.begin("ci").expect("nothing is at work").0, first);
    let second = setup.id("ci", &bob);
    assert_ne!(second, first);
    assert!(setup.begin("ci").is_none(), "one at a time on a store");

    let (mut of_alice, mut of_bob) = (setup.result(first, &alice), setup.result(second, &bob));
    setup.came_back(first);
    assert_eq!(of_alice.try_recv(), Ok(Ok(findings())));
    assert_eq!(of_bob.try_recv(), Err(TryRecvError::Empty));
    assert_eq!(setup.begin("ci").expect("nothing is at work").0, second);
    setup.came_back(second);
    assert_eq!(of_bob.try_recv(), Ok(Ok(findings())));
}

#[test]
fn a_job_is_told_of_before_its_caller_knows_it_and_until_its_result_was_read() {
    let mut setup = setup();
    let root = caller(":1.1", 0);
    let (reply, _answer) = oneshot::channel();
    setup.jobs.ask(Kind::Verify, &store("ci"), root.clone(), reply);
    let (id, ..) = setup.jobs.begin(Kind::Verify, &store("ci"), &Arc::default(), setup.now).expect("it waits");
    assert_eq!(setup.news(), ["asked 1", "1 running (0, 0)"]);
    setup.came_back(id);
    assert_eq!(setup.news(), ["1 succeeded (0, 0)", "over 1 succeeded"][1..]);
    assert_eq!(setup.result(id, &root).try_recv(), Ok(Ok(findings())), "however late it asks");
    assert_eq!(setup.news(), ["forgotten 1"]);
    assert_eq!(setup.result(id, &root).try_recv(), Ok(Err(Error::NoSuchJob(id))));
    assert_eq!(setup.jobs.due(), Some(setup.now + PACE), "the last look at how far it is");
    setup.jobs.look(setup.now + PACE);
    assert_eq!(setup.jobs.due(), None, "nothing is left to be looked at");
}

#[test]
fn what_nobody_reads_is_forgotten_after_a_while() {
    let mut setup = setup();
    let asked = setup.ask("ci", &caller(":1.1", 0)).expect("room");
    let waits_no_more = asked.waits_no_more.expect("it did not wait before");
    let (id, ..) = setup.begin("ci").expect("it waits");
    setup.came_back(id);
    setup.jobs.look(setup.now + KEEP - Duration::from_millis(1));
    assert_eq!(setup.news(), ["over 1 succeeded"]);
    assert!(!waits_no_more.is_cancelled());
    setup.jobs.look(setup.now + KEEP);
    assert_eq!(setup.news(), ["forgotten 1"]);
    assert!(waits_no_more.is_cancelled(), "the bus need not look after its caller any more");
    assert_eq!(setup.jobs.due(), None);
}

#[test]
fn a_job_goes_on_while_somebody_waits_for_it() {
    let mut setup = setup();
    let (alice, bob) = (caller(":1.1", 1000), caller(":1.2", 1001));
    let id = setup.id("ci", &alice);
    let waits_no_more = setup.ask("ci", &bob).expect("room").waits_no_more.expect("it did not wait before");
    assert!(setup.ask("ci", &bob).expect("room").waits_no_more.is_none(), "it waits already");
    let (_, cancel, _) = setup.begin("ci").expect("it waits");
    let mut of_bob = setup.result(id, &bob);
    assert_eq!(setup.jobs.cancel(id, &bob, setup.now), Ok(()));
    assert_eq!(of_bob.try_recv(), Ok(Err(cancelled("ci"))), "at once");
    assert!(waits_no_more.is_cancelled() && !cancel.is_cancelled());
    assert_eq!(setup.news(), [""; 0]);

    setup.jobs.left(&alice.name, setup.now);
    assert!(cancel.is_cancelled());
    assert_eq!(setup.news(), ["over 1 cancelled", "forgotten 1"]);
}

#[test]
fn a_job_that_hangs_is_over_for_those_who_wait_and_its_store_is_not_free() {
    let mut setup = setup();
    let alice = caller(":1.1", 1000);
    let id = setup.id("ci", &alice);
    setup.begin("ci").expect("it waits");
    let mut result = setup.result(id, &alice);
    assert_eq!(setup.jobs.cancel(id, &alice, setup.now), Ok(()));
    assert_eq!(result.try_recv(), Ok(Err(cancelled("ci"))));
    let next = setup.id("ci", &alice);
    assert!(setup.begin("ci").is_none(), "its thread has not come back");
    setup.came_back(id);
    assert_eq!(setup.begin("ci").expect("now it has").0, next);
}

#[test]
fn only_root_and_who_has_asked_may_cancel_and_read() {
    let mut setup = setup();
    let (root, alice, bob) = (caller(":1.1", 0), caller(":1.2", 1000), caller(":1.3", 1001));
    let id = setup.id("ci", &alice);
    assert_eq!(setup.jobs.cancel(id, &bob, setup.now), Err(Error::NotAsker(id)));
    assert_eq!(setup.result(id, &bob).try_recv(), Ok(Err(Error::NotAsker(id))));
    assert_eq!(setup.result(id, &caller(":1.9", 1000)).try_recv(), Ok(Err(Error::NotAsker(id))), "it did not ask");
    let mut of_root = setup.result(id, &root);
    assert_eq!(setup.jobs.cancel(id, &root, setup.now), Ok(()));
    assert_eq!(of_root.try_recv(), Ok(Err(cancelled("ci"))));
    assert_eq!(setup.result(id, &alice).try_recv(), Ok(Err(cancelled("ci"))), "it is told what has become of it");

    // From another connection of the same user, as with busctl.
    let id = setup.id("ci", &alice);
    assert_eq!(setup.jobs.cancel(id, &caller(":1.9", 1000), setup.now), Ok(()));
    assert_eq!(setup.result(id, &alice).try_recv(), Ok(Err(Error::NoSuchJob(id))));
    // Root's own connection cancels for itself alone.
    let id = setup.id("ci", &alice);
    assert_eq!(setup.id("ci", &root), id);
    assert_eq!(setup.jobs.cancel(id, &root, setup.now), Ok(()));
    assert_eq!(setup.result(id, &alice).try_recv(), Err(TryRecvError::Empty));
}

#[test]
fn a_user_waits_for_so_many_jobs_and_root_for_more() {
    let mut setup = setup();
    let by = |number: usize, uid| caller(&format!(":1.{number}"), uid);
    for number in 0..EACH {
        setup.id(&format!("store-{}", number % 4), &by(number, 1000));
    }
    assert_eq!(setup.ask("store-0", &by(EACH, 1000)).expect_err("too many"), Error::TooManyJobs(EACH));
    for number in EACH..USERS {
        setup.id("store-0", &by(number, 2000 + u32::try_from(number).expect("few")));
    }
    assert_eq!(setup.ask("store-0", &by(USERS, 3000)).expect_err("too many"), Error::TooManyJobs(0));
    for number in 0..IN_ALL - 4 {
        setup.id(&format!("other-{number}"), &by(5000, 0));
    }
    assert_eq!(setup.ask("one-more", &by(5000, 0)).expect_err("too many"), Error::TooManyJobs(IN_ALL));
    setup.id("other-1", &by(5001, 0));
    setup.jobs.left(":1.0", setup.now);
    setup.news();
    setup.id("store-1", &by(EACH, 1000));
}

#[test]
fn who_reads_nothing_does_not_have_others_forgotten() {
    let mut setup = setup();
    let (alice, bob) = (caller(":1.1", 1000), caller(":1.2", 1001));
    let of_bob = setup.id("ci", &bob);
    setup.begin("ci").expect("it waits");
    setup.came_back(of_bob);
    for number in 0..KEPT * 2 {
        setup.news();
        let id = setup.id(&format!("store-{number}"), &alice);
        setup.begin(&format!("store-{number}")).expect("it waits");
        setup.came_back(id);
    }
    assert_eq!(setup.jobs.all.len(), KEPT);
    assert_eq!(setup.result(of_bob, &bob).try_recv(), Ok(Ok(findings())));
    let oldest = setup.jobs.all.keys().next().copied();
    assert_eq!(oldest, Some(u64::try_from(KEPT).expect("few") + 3), "the oldest have gone");
}

#[test]
fn progress_is_told_while_there_is_some() {
    let mut setup = setup();
    setup.id("ci", &caller(":1.1", 0));
    let (id, _, progress) = setup.begin("ci").expect("it waits");
    let step = |total| {
        Arc::clone(&progress).follow(|| {
            layered_stores_overlay::progress::expect(total);
            layered_stores_overlay::progress::one_more();
        });
    };
    step(5);
    setup.jobs.look(setup.now + PACE);
    assert_eq!(setup.news(), ["1 running (1, 5)"]);
    setup.jobs.look(setup.now + PACE * 2);
    assert_eq!(setup.news(), [""; 0], "no news");
    step(5);
    setup.came_back(id);
    let job = &setup.jobs.all[&id].job;
    assert_eq!((job.state(), job.counts()), ("succeeded", (2, 2)), "what has gone meanwhile is not missing");
    setup.jobs.look(setup.now + PACE * 3);
    assert_eq!(setup.jobs.due(), Some(setup.now + KEEP));
}

#[test]
fn what_happens_to_a_store_ends_its_jobs() {
    let mut setup = setup();
    let root = caller(":1.1", 0);
    let (first, other) = (setup.id("ci", &root), setup.id("other", &root));
    setup.begin("ci").expect("it waits");
    let second = setup.id("ci", &root);
    let mut answers = [first, second, other].map(|id| setup.result(id, &root));
    let stuck = Error::Stuck(store("ci"), "it hangs".to_owned());
    setup.jobs.fail_all_of(&store("ci"), &stuck, setup.now);
    let told = answers.each_mut().map(Receiver::try_recv);
    assert_eq!(told, [Ok(Err(stuck.clone())), Ok(Err(stuck)), Err(TryRecvError::Empty)]);
    // What comes back later says nothing any more.
    setup.news();
    setup.came_back(first);
    assert_eq!(setup.news(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn going_down_ends_all_jobs_and_joins_their_work_but_for_what_hangs() {
    for hangs in [false, true] {
        let mut setup = setup();
        let root = caller(":1.1", 0);
        let id = setup.id("ci", &root);
        let (_, cancel, progress) = setup.begin("ci").expect("it waits");
        progress.mark(Spot::Lower);
        let (go_on, step) = oneshot::channel::<()>();
        let seen = Arc::clone(&progress);
        let work = async move {
            while hangs || !seen.is_called_off() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            drop(go_on);
        };
        let work = tokio::spawn(setup.jobs.works().follow(cancel, progress, work));
        let mut result = setup.result(id, &root);
        let began = Instant::now();
        setup.jobs.shut_down().await;
        assert_eq!(result.try_recv(), Ok(Err(Error::ShuttingDown)));
        assert_eq!(work.is_finished(), !hangs);
        assert!(began.elapsed() <= Duration::from_secs(1), "{:?}", began.elapsed());
        drop(step);
        work.abort();
    }
}

#[tokio::test]
async fn work_that_waits_for_a_thread_is_dropped_when_it_is_cancelled() {
    let setup = setup();
    let works = setup.jobs.works();
    for (spot, is_dropped) in [(None, true), (Some(Spot::Others), true), (Some(Spot::Lower), false)] {
        let (cancel, progress) = (works.token(), Arc::<Progress>::default());
        if let Some(spot) = spot {
            progress.mark(spot);
        }
        let (answer, work) = oneshot::channel::<u8>();
        let followed = tokio::spawn(works.follow(cancel.clone(), Arc::clone(&progress), work));
        tokio::task::yield_now().await;
        cancel.cancel();
        while !progress.is_called_off() {
            tokio::task::yield_now().await;
        }
        let _ = answer.send(7);
        let brought = followed.await.expect("it does not panic").map(|answer| answer.expect("it was sent"));
        assert_eq!(brought, (!is_dropped).then_some(7), "{spot:?}");
        assert_eq!(progress.spot().is_none(), is_dropped);
    }
}
