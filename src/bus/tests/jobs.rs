//! `org.layeredstores1.Job`, and those who wait for one.

use futures_util::StreamExt as _;
use layered_stores_client::JobProxy;
use tokio::task::JoinHandle;
use zbus::{Connection, proxy::CacheProperties, wire::OwnedObjectPath};

use super::{
    AUTO, NO, Setup, assert_refused, picture::Picture, polkit::Says, refused, store, with_daemon, with_daemon_on,
};
use crate::supervisor::{
    Error, Kind,
    simulation::{Event, name},
};

const STRANGER: u32 = 7;

type Found = zbus::Result<Vec<(String, String)>>;

async fn verify(connection: &Connection) -> OwnedObjectPath {
    store(connection, 0).await.verify().await.expect("a job")
}

/// A job, whose properties are asked for each time.
async fn job(connection: &Connection, path: &OwnedObjectPath) -> JobProxy<'static> {
    let proxy = JobProxy::builder(connection).path(path.clone()).cache_properties(CacheProperties::No);
    proxy.build().await.expect("a proxy")
}

async fn waits_for(connection: &Connection, path: &OwnedObjectPath) -> JoinHandle<Found> {
    let job = job(connection, path).await;
    tokio::spawn(async move { job.get_result().await })
}

fn cancelled() -> Error {
    Error::Cancelled(Kind::Verify, name(0))
}

/// Looks whether a job is there no more.
async fn assert_gone(connection: &Connection, path: &OwnedObjectPath) {
    let answer = refused(job(connection, path).await.get_result().await);
    assert_eq!(answer.0, "org.freedesktop.DBus.Error.UnknownObject", "{}", answer.1);
}

impl Setup {
    /// Has the first store hang, and a job begin on it.
    async fn hanging(&mut self, connection: &Connection) -> OwnedObjectPath {
        self.befall(Event::Hang(0)).await;
        verify(connection).await
    }
}

#[test]
fn a_job_says_how_far_it_is_and_what_it_has_found_and_goes_with_that() {
    // What only a swap cures stays.
    with_daemon_on(false, [AUTO, NO, NO], async |setup| {
        let client = setup.client(0).await;
        let picture = Picture::begin(setup.client(STRANGER).await).await;
        let path = setup.hanging(&client).await;
        let job = job(&client, &path).await;
        let mut over = job.receive_finished().await.expect("signals");
        setup.befall(Event::Change(0, 0, true, true)).await;
        let has = (job.kind().await, job.store().await, job.state().await, job.done().await, job.total().await);
        assert_eq!(has, (Ok("verify".to_owned()), Ok("a".to_owned()), Ok("running".to_owned()), Ok(0), Ok(4)));
        let waits = waits_for(&client, &path).await;
        setup.wait(1).await;
        let seen = &picture.objects()[&(path.to_string(), "org.layeredstores1.Job".to_owned())];
        assert!(seen["Total"].contains('4') && seen["State"].contains("running"), "{seen:?}");
        setup.befall(Event::GoOn(0)).await;
        let found = waits.await.expect("an answer").expect("a result");
        assert_eq!(found, [("path-0".to_owned(), "shows another file than its layer has".to_owned())]);
        let over = over.next().await.expect("it is over");
        let over = over.args().expect("arguments");
        assert_eq!((over.result().as_str(), over.error().as_str()), ("succeeded", ""));
        assert_gone(&client, &path).await;
        setup.wait(1).await;
        assert_eq!((picture.objects(), picture.wrong()), (picture.ask().await, Vec::new()));
    });
}

#[test]
fn what_comes_of_a_job_is_told_by_its_signals() {
    with_daemon([AUTO, NO, NO], async |setup| {
        let client = setup.client(0).await;
        let picture = Picture::begin(setup.client(STRANGER).await).await;
        let path = verify(&client).await;
        setup.wait(30).await;
        // Nobody has read what it has found: it is still there.
        let seen = &picture.objects()[&(path.to_string(), "org.layeredstores1.Job".to_owned())];
        for (property, value) in [("State", "succeeded"), ("Done", "4"), ("Total", "4")] {
            assert!(seen[property].contains(value), "{seen:?}");
        }
        assert_eq!((picture.objects(), picture.wrong()), (picture.ask().await, Vec::new()));
    });
}

#[test]
fn a_result_that_nobody_reads_is_kept_for_a_minute() {
    with_daemon([AUTO, NO, NO], async |setup| {
        let client = setup.client(0).await;
        let (read, unread) = (verify(&client).await, verify(&client).await);
        setup.wait(50).await;
        assert_eq!(job(&client, &read).await.get_result().await, Ok(Vec::new()));
        setup.wait(60).await;
        for path in [read, unread] {
            assert_gone(&client, &path).await;
        }
    });
}

#[test]
fn a_job_that_fails_says_why() {
    with_daemon([AUTO, NO, NO], async |setup| {
        let client = setup.client(0).await;
        let path = setup.hanging(&client).await;
        let waits = waits_for(&client, &path).await;
        let mut over = job(&client, &path).await.receive_finished().await.expect("signals");
        // There is more that is done about it, and takes its part of the failures.
        setup.befall(Event::Fail(0, 5)).await;
        setup.befall(Event::GoOn(0)).await;
        let error = Error::RefreshFailed(name(0), "cannot read the mount table: a step fails".to_owned());
        assert_refused(waits.await.expect("an answer"), "RefreshFailed", error.clone());
        let over = over.next().await.expect("it is over");
        let over = over.args().expect("arguments");
        assert_eq!((over.result().as_str(), over.error()), ("failed", &error.to_string()));
    });
}

#[test]
fn who_cancels_is_told_at_once_even_if_the_work_hangs() {
    with_daemon([AUTO, NO, NO], async |setup| {
        let client = setup.client(0).await;
        let path = setup.hanging(&client).await;
        let waits = waits_for(&client, &path).await;
        setup.wait(1).await;
        job(&client, &path).await.cancel().await.expect("it is ours");
        assert_refused(waits.await.expect("an answer"), "Cancelled", cancelled());
        assert_gone(&client, &path).await;
    });
}

#[test]
fn who_asks_while_one_waits_shares_it_and_leaves_alone() {
    with_daemon([AUTO, NO, NO], async |setup| {
        let [first, second, third] = [setup.client(0).await, setup.client(0).await, setup.client(0).await];
        let begun = setup.hanging(&first).await;
        let (path, same) = (verify(&second).await, verify(&third).await);
        assert!(path == same && path != begun, "{path} {same} {begun}");
        assert_eq!(job(&first, &path).await.state().await.as_deref(), Ok("waiting"));
        let waits = waits_for(&third, &path).await;
        second.close().await.expect("a connection");
        job(&first, &begun).await.cancel().await.expect("it is ours");
        setup.wait(1).await;
        setup.befall(Event::GoOn(0)).await;
        assert_eq!(waits.await.expect("an answer"), Ok(Vec::new()));
    });
}

#[test]
fn the_job_of_who_leaves_the_bus_is_over() {
    with_daemon([AUTO, NO, NO], async |setup| {
        let (client, other) = (setup.client(STRANGER).await, setup.client(0).await);
        setup.polkit.says(Says::Yes);
        let path = setup.hanging(&client).await;
        let mut over = job(&other, &path).await.receive_finished().await.expect("signals");
        let onlooker = waits_for(&other, &path).await;
        setup.wait(1).await;
        client.close().await.expect("a connection");
        assert_refused(onlooker.await.expect("an answer"), "Cancelled", cancelled());
        let over = over.next().await.expect("it is over");
        let over = over.args().expect("arguments");
        assert_eq!((over.result().as_str(), over.error()), ("cancelled", &cancelled().to_string()));
        assert_gone(&other, &path).await;
    });
}

#[test]
fn a_job_is_of_those_who_have_asked_for_it_and_of_root() {
    with_daemon([AUTO, NO, NO], async |setup| {
        let (client, stranger) = (setup.client(0).await, setup.client(STRANGER).await);
        let path = setup.hanging(&client).await;
        let theirs = job(&stranger, &path).await;
        let denied = "org.freedesktop.DBus.Error.AccessDenied";
        assert_refused(theirs.cancel().await, denied, Error::NotAsker(1));
        assert_refused(theirs.get_result().await, denied, Error::NotAsker(1));
        job(&setup.client(0).await, &path).await.cancel().await.expect("root may");
    });
}

#[test]
fn a_user_waits_for_only_so_many_jobs() {
    with_daemon([AUTO, NO, NO], async |setup| {
        setup.polkit.says(Says::Yes);
        let mut clients = Vec::new();
        for _ in 0..9 {
            clients.push(setup.client(STRANGER).await);
        }
        setup.befall(Event::Hang(0)).await;
        for client in &clients[..8] {
            verify(client).await;
        }
        let answer = store(&clients[8], 0).await.verify().await;
        assert_refused(answer, "org.freedesktop.DBus.Error.LimitsExceeded", Error::TooManyJobs(8));
    });
}

#[test]
fn a_job_on_a_filesystem_that_does_not_answer_is_over() {
    with_daemon([AUTO, NO, NO], async |setup| {
        let client = setup.client(0).await;
        let path = setup.hanging(&client).await;
        let waits = waits_for(&client, &path).await;
        let (name, message) = refused(waits.await.expect("an answer"));
        assert_eq!(name, "org.layeredstores1.Error.Stuck", "{message}");
        assert_gone(&client, &path).await;
    });
}
