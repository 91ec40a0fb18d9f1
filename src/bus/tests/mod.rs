//! The D-Bus API as clients see it: our objects over connections of the bus library, with an engine on the
//! [simulated machine](crate::supervisor::simulation) behind them.
//!
//! What is simulated is below the engine and around the connections. All between is what the daemon runs; only the gate, which
//! reads sockets, has tests of its own.

mod authorization;
mod bus;
mod jobs;
mod manager;
mod picture;
mod polkit;
mod signals;
mod store;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bus::Bus;
use layered_stores_client::{BUS_NAME, ManagerProxy, StoreProxy, store_path};
use polkit::Polkit;
use tokio::sync::mpsc;
use zbus::{Connection, DBusError as _, Message, proxy::CacheProperties, wire::DynamicType};

use super::{Connections, Milestone, Publisher, connections::bus_over, gate::Gate};
use crate::supervisor::{
    self, Event as News, Handle,
    simulation::{self, Declared, Event, Play},
};

const NO: Declared = Declared { there: false, autostart: false, noatime: false, daemon: false, moved: false };
const AUTO: Declared = Declared { there: true, autostart: true, noatime: false, daemon: false, moved: false };
const BY_HAND: Declared = Declared { autostart: false, ..AUTO };

/// A machine with a daemon on a bus, and an authority.
struct Setup {
    play: Play,
    bus: Bus,
    polkit: Polkit,
    authority: Option<Connection>,
    milestones: Milestones,
}

/// What daemons have said about themselves.
type Milestones = Arc<Mutex<Vec<String>>>;

/// Tests a daemon whose stores have come to rest.
fn with_daemon(declared: [Declared; 3], test: impl AsyncFnOnce(&mut Setup)) {
    with_daemon_on(true, declared, test);
}

/// The same, on a machine that can swap mounts or not.
fn with_daemon_on(can_swap: bool, declared: [Declared; 3], test: impl AsyncFnOnce(&mut Setup)) {
    simulation::run(async {
        let mut setup = Setup::begin(1, can_swap, declared, || Duration::ZERO).await;
        setup.wait(60).await;
        test(&mut setup).await;
        assert_eq!(setup.play.violations(), Vec::<String>::new());
    });
}

impl Setup {
    /// Begins with a bus that takes what the daemon sends after a pause each.
    async fn begin(
        seed: u64,
        can_swap: bool,
        declared: [Declared; 3],
        pause: impl FnMut() -> Duration + Clone + Send + 'static,
    ) -> Self {
        let bus = Bus::default();
        let (polkit, authority) = Polkit::begin(&bus).await;
        let milestones = Milestones::default();
        let play = {
            let (bus, milestones) = (bus.clone(), Arc::clone(&milestones));
            let tell = move |handle, news| {
                let (bus, pause, milestones) = (bus.clone(), pause.clone(), Arc::clone(&milestones));
                tokio::spawn(async move { serve(&bus, pause, handle, news, &milestones).await.expect("a bus") });
            };
            Play::begin(seed, can_swap, &declared, Box::new(tell)).await
        };
        while !bus.knows(BUS_NAME) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Self { play, bus, polkit, authority: Some(authority), milestones }
    }

    async fn befall(&mut self, event: Event) {
        self.play.befall(event).await;
    }

    async fn wait(&mut self, seconds: u64) {
        self.befall(Event::Wait(Duration::from_secs(seconds))).await;
    }

    async fn client(&self, uid: u32) -> Connection {
        self.bus.connect(uid).await
    }

    /// Has the authority leave the bus.
    async fn end_polkit(&mut self) {
        if let Some(authority) = self.authority.take() {
            authority.close().await.expect("a connection");
        }
        self.wait(1).await;
    }

    /// The directory under which clients find a store.
    fn real_store_dir(&self, of: usize) -> String {
        self.play.spec(&simulation::name(of)).expect("it is declared").layers.merged.to_string()
    }
}

/// Puts an engine on the bus, as the daemon does.
async fn serve(
    bus: &Bus,
    pause: impl FnMut() -> Duration + Send + 'static,
    handle: Handle,
    news: mpsc::UnboundedReceiver<News>,
    milestones: &Milestones,
) -> zbus::Result<()> {
    let asking = bus_over(&bus.connect(0).await).await?;
    let serving = bus.connect_slowly(0, pause).await;
    let connections = Connections::of(asking, serving, Gate::unused(), bus.connect(0).await).await?;
    let publisher = Publisher::new(&connections, handle).await?;
    let reached = |milestone: Milestone<'_>| {
        milestones.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{milestone:?}"));
    };
    publisher.run(news, reached).await.expect("a bus");
    connections.close().await
}

async fn manager(connection: &Connection) -> ManagerProxy<'static> {
    ManagerProxy::builder(connection).cache_properties(CacheProperties::No).build().await.expect("a proxy")
}

async fn store(connection: &Connection, of: usize) -> StoreProxy<'static> {
    let path = store_path(&simulation::name(of));
    let proxy = StoreProxy::builder(connection).path(path).cache_properties(CacheProperties::No);
    proxy.build().await.expect("a proxy")
}

/// Calls a method of the manager that our own client has no use for.
async fn call_manager(
    connection: &Connection,
    method: &str,
    body: &(impl serde::Serialize + DynamicType),
) -> zbus::Result<Message> {
    let interface = Some("org.layeredstores1.Manager");
    connection.call_method(Some(BUS_NAME), layered_stores_client::MANAGER_PATH, interface, method, body).await
}

/// The name and the message of the error with which a call has failed.
#[track_caller]
fn refused<T: std::fmt::Debug>(answer: zbus::Result<T>) -> (String, String) {
    match answer {
        Err(zbus::Error::MethodError(name, message, _)) => (name.to_string(), message.unwrap_or_default()),
        Err(zbus::Error::FDO(error)) => (error.name().to_string(), error.description().unwrap_or_default().to_owned()),
        other => panic!("not refused: {other:?}"),
    }
}

/// Looks whether a call has failed under a name, with the words of the engine.
#[track_caller]
fn assert_refused<T: std::fmt::Debug>(answer: zbus::Result<T>, name: &str, error: supervisor::Error) {
    let full = if name.contains('.') { name.to_owned() } else { format!("org.layeredstores1.Error.{name}") };
    assert_eq!(refused(answer), (full, error.to_string()));
}
