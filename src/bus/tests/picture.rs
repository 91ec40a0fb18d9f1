//! What a client knows of the daemon's objects that has asked once, and has listened since.

use std::{
    collections::{BTreeMap, HashMap},
    num::NonZeroUsize,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures_util::StreamExt as _;
use layered_stores_client::{BUS_NAME, MANAGER_PATH};
use zbus::{
    Connection, MatchRule, Message, MessageStream,
    message::Type,
    wire::{OwnedObjectPath, OwnedVariant},
};

/// Properties and their values, in words.
type Properties = BTreeMap<String, String>;

/// The objects, by path and interface.
pub(super) type Objects = BTreeMap<(String, String), Properties>;

/// More signals than any test has on their way at a time.
const QUEUE: NonZeroUsize = NonZeroUsize::new(10_000).expect("not zero");

/// A client that listens.
pub(super) struct Picture {
    connection: Connection,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    objects: Objects,
    /// What was told of stores, but for what was known already.
    told: Vec<(String, Vec<String>)>,
    repeated: Vec<String>,
    wrong: Vec<String>,
}

impl Picture {
    /// Begins to listen, and then asks for all there is.
    pub(super) async fn begin(connection: Connection) -> Self {
        let rule = MatchRule::builder().msg_type(Type::Signal).path_namespace(MANAGER_PATH).build().expect("a rule");
        let signals = MessageStream::for_match_rule(rule, &connection, Some(QUEUE)).await.expect("a stream");
        let (objects, answered) = ask(&connection).await;
        let state = Arc::new(Mutex::new(State { objects, ..State::default() }));
        let listener = Arc::clone(&state);
        tokio::spawn(signals.for_each(move |signal| {
            let signal = signal.expect("a signal");
            // What has come before the answer is in it.
            if signal.recv_position() > answered {
                lock(&listener).take(&signal);
            }
            std::future::ready(())
        }));
        Self { connection, state }
    }

    /// What it has come to know.
    pub(super) fn objects(&self) -> Objects {
        lock(&self.state).objects.clone()
    }

    /// What there is, for whoever asks now.
    pub(super) async fn ask(&self) -> Objects {
        ask(&self.connection).await.0
    }

    /// The labels of the stores that it knows.
    pub(super) fn stores(&self) -> Vec<String> {
        let paths = self.objects().into_keys().map(|(path, _)| path);
        paths.filter_map(|path| path.strip_prefix("/org/layeredstores1/store/").map(str::to_owned)).collect()
    }

    /// What was told of stores since the last time: which, and which properties of it.
    pub(super) fn told(&self) -> Vec<(String, Vec<String>)> {
        std::mem::take(&mut lock(&self.state).told)
    }

    /// What was told of stores and is no news.
    pub(super) fn repeated(&self) -> Vec<String> {
        lock(&self.state).repeated.clone()
    }

    /// What of the signals cannot be.
    pub(super) fn wrong(&self) -> Vec<String> {
        lock(&self.state).wrong.clone()
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the bus library reads of interfaces with their properties.
type Interfaces = HashMap<String, HashMap<String, OwnedVariant>>;

async fn ask(connection: &Connection) -> (Objects, zbus::message::Sequence) {
    let interface = Some("org.freedesktop.DBus.ObjectManager");
    let call = connection.call_method(Some(BUS_NAME), MANAGER_PATH, interface, "GetManagedObjects", &());
    let reply = call.await.expect("an answer");
    let answer: HashMap<OwnedObjectPath, Interfaces> = reply.body().deserialize().expect("objects");
    let mut objects = Objects::new();
    for (path, interfaces) in answer {
        insert(&mut objects, path.as_str(), interfaces);
    }
    (objects, reply.recv_position())
}

fn insert(objects: &mut Objects, path: &str, interfaces: Interfaces) {
    for (interface, properties) in interfaces {
        // The others are the bus library's.
        if interface.starts_with("org.layeredstores1.") {
            let properties = properties.into_iter().map(|(name, value)| (name, format!("{value:?}")));
            objects.insert((path.to_owned(), interface), properties.collect());
        }
    }
}

impl State {
    fn take(&mut self, signal: &Message) {
        let (header, body) = (signal.header(), signal.body());
        match header.member().map(|member| member.as_str()) {
            Some("InterfacesAdded") => {
                let (path, interfaces): (OwnedObjectPath, Interfaces) = body.deserialize().expect("an object");
                insert(&mut self.objects, path.as_str(), interfaces);
            }
            Some("InterfacesRemoved") => {
                let (path, interfaces): (OwnedObjectPath, Vec<String>) = body.deserialize().expect("an object");
                for interface in interfaces.into_iter().filter(|name| name.starts_with("org.layeredstores1.")) {
                    let removed = self.objects.remove(&(path.to_string(), interface));
                    self.wrong.extend(removed.is_none().then(|| format!("{path} goes and was never there")));
                }
            }
            Some("PropertiesChanged") => {
                let path = header.path().map(|path| path.to_string()).unwrap_or_default();
                let (interface, changed, invalid): (String, HashMap<String, OwnedVariant>, Vec<String>) =
                    body.deserialize().expect("properties");
                self.wrong.extend((!invalid.is_empty()).then(|| format!("{path}: without values: {invalid:?}")));
                self.change(path, interface, changed);
            }
            _ => {}
        }
    }

    fn change(&mut self, path: String, interface: String, changed: HashMap<String, OwnedVariant>) {
        let is_store = interface == "org.layeredstores1.Store";
        let Some(properties) = self.objects.get_mut(&(path.clone(), interface)) else {
            self.wrong.push(format!("{path} is not there, and changes: {changed:?}"));
            return;
        };
        let mut news = Vec::new();
        for (name, value) in changed {
            let Some(known) = properties.get_mut(&name) else {
                self.wrong.push(format!("{path} has no property {name}"));
                continue;
            };
            let value = format!("{value:?}");
            // A job tells all that changes of it together.
            if *known == value && is_store {
                self.repeated.push(format!("{path}: {name} is still {value}"));
            } else {
                *known = value;
                news.push(name);
            }
        }
        if is_store {
            news.sort();
            self.told.push((path, news));
        }
    }
}
