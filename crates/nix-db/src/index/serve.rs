//! Answering the daemon.

use std::{
    collections::{BTreeMap, HashSet},
    io::{self, BufRead as _, BufReader, BufWriter, Read as _, Write as _},
    os::unix::net::UnixStream,
    sync::mpsc::{self, RecvTimeoutError, Sender},
    time::{Duration, Instant},
};

use super::{
    catalog::{Catalog, Delta, Touched},
    protocol::{Answer, Contents, Failure, LONGEST_LINE, NAMES, Objects, Places, Request, StoreId},
    watch::{News, Queue, Role, Watched},
};

/// What comes in this time is read together. A change is in the log a moment before it is in the log's index, by which it is
/// found, and of that nobody tells: so it is looked again, and again.
const GATHER: Duration = Duration::from_millis(2);
const AGAIN: [Duration; 2] = [Duration::from_millis(20), Duration::from_secs(1)];

/// How soon it is looked where files are that have come, gone, or are nowhere.
const OBJECTS: Duration = Duration::from_millis(50);
const UNSURE: Duration = Duration::from_millis(600);

/// How soon it is tried again to read what cannot be read, and to find a database where there is none.
const FAILED: Duration = Duration::from_secs(5);
const ABSENT: Duration = Duration::from_secs(30);

/// How many stores are read at a time, for how long one counts that gets no further, and how many there are at all with those that
/// hang.
const READERS: usize = 2;
const STALL: Duration = Duration::from_secs(1);
const MOST: usize = 64;

/// How long the daemon may take to read what it is told.
const PATIENCE: Duration = Duration::from_secs(60);

/// What happens.
enum Event {
    Asked(Request),
    News(News),
    Updated(Box<Updated>),
    /// The daemon has gone, or something is wrong with what it says.
    Over(io::Result<()>),
}

/// A store that was read.
struct Updated {
    id: StoreId,
    generation: u64,
    catalog: Catalog,
    delta: Delta,
    failure: Option<Failure>,
    /// Which of its directories are watched since.
    watched: Vec<(i32, Role)>,
    synced: Vec<u64>,
}

/// A store that is watched.
struct Store {
    generation: u64,
    /// It is away while it is read.
    catalog: Option<Catalog>,
    reading_since: Option<Instant>,
    is_watched: bool,
    touched: Touched,
    syncs: Vec<u64>,
    /// When it is to be read.
    due: Vec<Instant>,
    told: Option<(Contents, Option<Failure>, bool)>,
}

/// Answers the daemon at the other end until that goes away.
///
/// # Errors
/// When the connection breaks, or what comes over it makes no sense.
pub fn serve(stream: UnixStream) -> io::Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    let (events, happened) = mpsc::channel();
    let queue = Queue::new()?;
    let (asked, news, followed) = (events.clone(), events.clone(), queue.clone());
    let reader = stream.try_clone()?;
    std::thread::spawn(move || {
        let result = listen(reader, &asked);
        let _ = asked.send(Event::Over(result));
    });
    std::thread::spawn(move || {
        let result = followed.follow(|of| news.send(Event::News(of)).is_ok());
        let _ = news.send(Event::Over(result.map_err(Into::into)));
    });
    let mut index = Index {
        queue,
        events,
        daemon: BufWriter::new(stream),
        stores: BTreeMap::new(),
        watched: Watched::default(),
        generation: 0,
    };
    loop {
        let event = match index.next().map(|at| at.saturating_duration_since(Instant::now())) {
            Some(wait) => happened.recv_timeout(wait),
            None => happened.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match event {
            Ok(Event::Over(result)) => return result,
            Ok(event) => {
                index.happens(event)?;
                // What has come meanwhile is taken together.
                while let Ok(event) = happened.try_recv() {
                    match event {
                        Event::Over(result) => return result,
                        event => index.happens(event)?,
                    }
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
        index.read_due()?;
    }
}

fn listen(stream: UnixStream, asked: &Sender<Event>) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        let limit = u64::try_from(LONGEST_LINE).unwrap_or(u64::MAX);
        if stream.by_ref().take(limit).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let request = serde_json::from_slice(&line)?;
        if asked.send(Event::Asked(request)).is_err() {
            return Ok(());
        }
    }
}

struct Index {
    queue: Queue,
    events: Sender<Event>,
    daemon: BufWriter<UnixStream>,
    stores: BTreeMap<StoreId, Store>,
    watched: Watched,
    generation: u64,
}

impl Store {
    fn new(generation: u64, places: Places) -> Self {
        Self {
            generation,
            catalog: Some(Catalog::new(places)),
            reading_since: None,
            is_watched: false,
            touched: Touched::All,
            syncs: Vec::new(),
            due: vec![Instant::now()],
            told: None,
        }
    }

    fn is_due(&self, now: Instant) -> bool {
        self.catalog.is_some() && self.due.iter().any(|at| *at <= now)
    }

    /// Has it read once at a time, or earlier.
    fn by(&mut self, at: Instant) {
        if !self.due.iter().any(|due| *due <= at) {
            self.due.push(at);
        }
    }

    fn touch(&mut self, name: &str) {
        if let Touched::Names(names) = &mut self.touched
            && let Ok(name) = name.parse()
        {
            names.insert(name);
            self.by(Instant::now() + OBJECTS);
        }
    }

    fn touch_all(&mut self) {
        self.touched = Touched::All;
        self.by(Instant::now() + OBJECTS);
    }

    fn database_changed(&mut self) {
        let now = Instant::now();
        self.by(now + GATHER);
        self.due.retain(|at| *at <= now + GATHER);
        self.due.extend(AGAIN.map(|later| now + later));
    }
}

impl Index {
    /// When something is due that nobody tells of.
    fn next(&self) -> Option<Instant> {
        let now = Instant::now();
        let due = self.stores.values().filter(|store| store.catalog.is_some()).flat_map(|store| &store.due).min()?;
        if *due > now || self.may_read(now) {
            return Some(*due);
        }
        // Until one of those that are being read has taken too long to count.
        self.stores
            .values()
            .filter_map(|store| store.reading_since)
            .map(|since| since + STALL)
            .filter(|at| *at > now)
            .min()
    }

    fn may_read(&self, now: Instant) -> bool {
        let reading: Vec<_> = self.stores.values().filter_map(|store| store.reading_since).collect();
        reading.len() < MOST && reading.iter().filter(|since| **since + STALL > now).count() < READERS
    }

    fn happens(&mut self, event: Event) -> io::Result<()> {
        match event {
            Event::Asked(request) => self.asked(request),
            Event::News(news) => self.hears(&news),
            Event::Updated(updated) => return self.updated(*updated),
            Event::Over(_) => {}
        }
        Ok(())
    }

    fn asked(&mut self, request: Request) {
        match request {
            Request::Watch { id, places } => {
                self.forget(id);
                self.generation += 1;
                self.stores.insert(id, Store::new(self.generation, places));
            }
            Request::Forget { id } => self.forget(id),
            Request::Sync { id, token } => {
                if let Some(store) = self.stores.get_mut(&id) {
                    store.syncs.push(token);
                    store.by(Instant::now());
                }
            }
        }
    }

    fn forget(&mut self, id: StoreId) {
        self.stores.remove(&id);
        for watch in self.watched.forget(id) {
            self.queue.remove(watch);
        }
    }

    fn hears(&mut self, news: &News) {
        match news {
            News::Name(watch, name) => {
                for (id, role) in self.watched.of(*watch) {
                    match (self.stores.get_mut(&id), role) {
                        (Some(store), Role::Database) => store.database_changed(),
                        (Some(store), Role::Objects) => store.touch(name),
                        (None, _) => {}
                    }
                }
            }
            News::Gone(watch) => {
                for (id, _) in self.watched.ended(*watch) {
                    if let Some(store) = self.stores.get_mut(&id) {
                        store.is_watched = false;
                        store.touch_all();
                    }
                }
            }
            News::Lost => {
                for store in self.stores.values_mut() {
                    store.touch_all();
                    store.database_changed();
                }
            }
        }
    }

    /// Reads what is due, as much as may be read at a time.
    fn read_due(&mut self) -> io::Result<()> {
        let now = Instant::now();
        let due: Vec<_> = self.stores.iter().filter(|(_, store)| store.is_due(now)).map(|(id, _)| *id).collect();
        for id in due {
            if !self.may_read(now) {
                break;
            }
            let Some(store) = self.stores.get_mut(&id) else { continue };
            let Some(mut catalog) = store.catalog.take() else { continue };
            store.reading_since = Some(now);
            store.due.retain(|at| *at > now);
            let (is_last, is_watched) = (store.due.is_empty(), store.is_watched);
            let touched = std::mem::replace(&mut store.touched, Touched::Names(HashSet::new()));
            let (generation, synced) = (store.generation, std::mem::take(&mut store.syncs));
            let (queue, events) = (self.queue.clone(), self.events.clone());
            let read = move || {
                let watched = if is_watched { Vec::new() } else { watch(&queue, catalog.places()) };
                let (delta, failure) = catalog.update(&touched);
                if is_last {
                    catalog.close();
                }
                let updated = Updated { id, generation, catalog, delta, failure, watched, synced };
                let _ = events.send(Event::Updated(Box::new(updated)));
            };
            std::thread::Builder::new().spawn(read)?;
        }
        Ok(())
    }

    fn updated(&mut self, updated: Updated) -> io::Result<()> {
        let Updated { id, generation, catalog, delta, failure, watched, synced } = updated;
        let mut is_early = false;
        let is_known = self.stores.get(&id).is_some_and(|store| store.generation == generation);
        if !is_known {
            // It was forgotten meanwhile. Its watches are, with the next that nobody has.
            for (watch, role) in watched {
                self.watched.note(watch, id, role);
            }
            if !self.stores.contains_key(&id) {
                self.forget(id);
            }
            return Ok(());
        }
        let is_whole = watched.len() == watches(catalog.places());
        for (watch, role) in watched {
            is_early |= self.watched.note(watch, id, role);
        }
        let Some(store) = self.stores.get_mut(&id) else { return Ok(()) };
        store.is_watched |= is_whole;
        store.reading_since = None;
        let now = Instant::now();
        if is_early {
            // It may have ended already: another store had it, and was forgotten.
            store.is_watched = false;
            store.touch_all();
            store.database_changed();
        }
        if catalog.is_unsure() && failure.is_none() {
            store.by(now + UNSURE);
        }
        if !store.is_watched && !is_early {
            store.by(now + FAILED);
        }
        if catalog.is_unsure() && failure.is_some() {
            store.is_watched = false;
        }
        if catalog.is_absent() {
            // Its directory may be there by then that is not now.
            store.is_watched = false;
            store.by(now + ABSENT);
        } else if failure.is_some() {
            store.by(now + FAILED);
        }
        let (contents, absent) = (catalog.contents().clone(), catalog.is_absent());
        store.catalog = Some(catalog);
        let state = Some((contents, failure, absent));
        let is_news = store.told != state || !synced.is_empty();
        store.told.clone_from(&state);
        if self.stores.values().all(|store| store.reading_since.is_none()) {
            self.watched.forget_early();
        }
        for added in delta.added.chunks(NAMES) {
            self.tell(&Answer::Used { id, added: added.into(), removed: Vec::new() })?;
        }
        for removed in delta.removed.chunks(NAMES) {
            self.tell(&Answer::Used { id, added: Vec::new(), removed: removed.into() })?;
        }
        if let Some((contents, failure, absent)) = state.filter(|_| is_news) {
            self.tell(&Answer::State { id, synced, contents, failure, absent })?;
        }
        self.daemon.flush()
    }

    fn tell(&mut self, answer: &Answer) -> io::Result<()> {
        serde_json::to_writer(&mut self.daemon, answer)?;
        self.daemon.write_all(b"\n")
    }
}

/// How many directories of a store there are to watch.
fn watches(places: &Places) -> usize {
    1 + places.objects.iter().flat_map(Objects::dirs).count()
}

/// Watches the directories of a store, as far as they are there. None of them: nothing is watched.
fn watch(queue: &Queue, places: &Places) -> Vec<(i32, Role)> {
    let database = places.db.ancestors().take(2).find_map(|dir| queue.add(dir, Role::Database).ok());
    let objects = places.objects.iter().flat_map(Objects::dirs);
    let objects = objects.filter_map(|dir| Some((queue.add(dir, Role::Objects).ok()?, Role::Objects)));
    database.map(|watch| (watch, Role::Database)).into_iter().chain(objects).collect()
}
