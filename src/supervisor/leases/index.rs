//! Asking the indexes: one connection for each user whom databases belong to.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use layered_stores_nix_db::index::protocol::{Answer, LONGEST_LINE, NAMES, Places, Request, StoreId};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::UnixStream,
    sync::mpsc::{self, UnboundedReceiver, UnboundedSender},
    time::Instant,
};

use crate::systemd::Units;

/// How soon it is tried again to reach an index, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// How many messages are kept of one store for which the lower store's filesystem does not answer. Each has some thousand names.
const KEPT: usize = 128;

/// How long it is waited for that it is fewer.
const DRAIN: Duration = Duration::from_secs(20);

/// How much an index may say: so many bytes at once, and so many a second after that. It runs as the owner of the stores, who can
/// have it say anything.
const BURST: u64 = 16 << 20;
const PACE: u64 = 8 << 20;

/// What is heard of a store.
#[derive(Debug)]
pub(super) enum Told {
    /// All of it is told from here on.
    Begun,
    /// Something of it.
    Answer(Answer),
    /// Nothing is told, for a reason.
    Unreachable(String),
}

enum Ask {
    Watch(StoreId, Places, Ear),
    Forget(StoreId),
    Sync(StoreId, u64),
}

/// Where a store's news go.
struct Ear {
    told: UnboundedSender<Told>,
    kept: Arc<AtomicUsize>,
}

impl Ear {
    fn tell(&self, told: Told) {
        self.kept.fetch_add(1, Ordering::Relaxed);
        let _ = self.told.send(told);
    }
}

/// All indexes.
#[derive(Clone, Debug)]
pub(super) struct Indexes(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    units: Units,
    next: AtomicU64,
    /// The way to the task that has the connection to the index of a user.
    asks: Mutex<HashMap<u32, UnboundedSender<Ask>>>,
}

/// A store that is watched, for as long as this is there.
pub(super) struct Watching {
    id: StoreId,
    asks: UnboundedSender<Ask>,
    told: UnboundedReceiver<Told>,
    kept: Arc<AtomicUsize>,
}

impl Watching {
    /// What is heard next.
    pub(super) async fn next(&mut self) -> Option<Told> {
        let told = self.told.recv().await;
        self.kept.fetch_sub(1, Ordering::Relaxed);
        told
    }

    /// Has the database read now. What comes of it has the token with it.
    pub(super) fn sync(&self, token: u64) {
        let _ = self.asks.send(Ask::Sync(self.id, token));
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        let _ = self.asks.send(Ask::Forget(self.id));
    }
}

impl Indexes {
    pub(super) fn new(units: Units) -> Self {
        Self(Arc::new(Inner { units, next: AtomicU64::new(1), asks: Mutex::default() }))
    }

    /// Watches a store whose database belongs to a user.
    pub(super) fn watch(&self, uid: u32, places: Places) -> Watching {
        let (told, receiver) = mpsc::unbounded_channel();
        let kept = Arc::<AtomicUsize>::default();
        let id = self.0.next.fetch_add(1, Ordering::Relaxed);
        let mut asks = self.0.asks.lock().unwrap_or_else(PoisonError::into_inner);
        let asks = asks.entry(uid).or_insert_with(|| {
            let (asks, asked) = mpsc::unbounded_channel();
            tokio::spawn(follow(Arc::clone(&self.0), uid, asked));
            asks
        });
        let _ = asks.send(Ask::Watch(id, places, Ear { told, kept: Arc::clone(&kept) }));
        Watching { id, asks: asks.clone(), told: receiver, kept }
    }
}

/// The stores of one user.
#[derive(Default)]
struct Stores(BTreeMap<StoreId, (Places, Ear)>);

impl Stores {
    fn tell_all(&self, told: impl Fn() -> Told) {
        for (_, ear) in self.0.values() {
            ear.tell(told());
        }
    }

    /// Takes note of what is asked, and says what the index is to be told of it.
    fn take(&mut self, ask: Ask) -> Request {
        match ask {
            Ask::Watch(id, places, ear) => {
                self.0.insert(id, (places.clone(), ear));
                Request::Watch { id, places }
            }
            Ask::Forget(id) => {
                self.0.remove(&id);
                Request::Forget { id }
            }
            Ask::Sync(id, token) => Request::Sync { id, token },
        }
    }
}

/// Keeps a connection to the index of a user for as long as somebody watches a store.
async fn follow(inner: Arc<Inner>, uid: u32, mut asked: UnboundedReceiver<Ask>) {
    let (mut stores, mut pause) = (Stores::default(), FIRST_PAUSE);
    loop {
        while let Ok(ask) = asked.try_recv() {
            stores.take(ask);
        }
        if stores.0.is_empty() {
            let mut asks = inner.asks.lock().unwrap_or_else(PoisonError::into_inner);
            // Who asks holds the lock, so that nobody is left with a task that has ended.
            if asked.is_empty() {
                asks.remove(&uid);
                return;
            }
            continue;
        }
        let began = Instant::now();
        let why = match inner.units.connect_index(uid).await {
            Ok(stream) => match talk(stream, &mut stores, &mut asked).await {
                Ok(()) => continue,
                Err(error) => error.to_string(),
            },
            Err(error) => error.to_string(),
        };
        tracing::warn!(
            uid,
            "the index of uid {uid} tells nothing: {why}; see `journalctl -u 'layered-stores-index@{uid}'`"
        );
        stores.tell_all(|| Told::Unreachable(why.clone()));
        if began.elapsed() > LONGEST_PAUSE {
            pause = FIRST_PAUSE;
        }
        let rest = tokio::time::sleep(pause);
        tokio::pin!(rest);
        loop {
            tokio::select! {
                () = &mut rest => break,
                Some(ask) = asked.recv() => drop(stores.take(ask)),
            }
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Talks with an index until nobody watches a store any more.
async fn talk(mut stream: UnixStream, stores: &mut Stores, asked: &mut UnboundedReceiver<Ask>) -> io::Result<()> {
    let (reader, mut writer) = stream.split();
    let mut reader = BufReader::new(reader);
    stores.tell_all(|| Told::Begun);
    for (id, (places, _)) in &stores.0 {
        send(&mut writer, &Request::Watch { id: *id, places: places.clone() }).await?;
    }
    let (mut line, limit) = (Vec::new(), u64::try_from(LONGEST_LINE).unwrap_or(u64::MAX));
    // When all that was said so far would have been said at the pace that is allowed.
    let ahead = Duration::from_secs(BURST / PACE);
    let began = Instant::now();
    let mut paced = began.checked_sub(ahead).unwrap_or(began);
    loop {
        let mut bounded = (&mut reader).take(limit);
        // Reading can be interrupted: what was read stays in `line`.
        let length = tokio::select! {
            read = bounded.read_until(b'\n', &mut line) => read?,
            Some(ask) = asked.recv() => {
                let request = stores.take(ask);
                if stores.0.is_empty() {
                    return Ok(());
                }
                if let Request::Watch { id, .. } = &request
                    && let Some((_, ear)) = stores.0.get(id)
                {
                    ear.tell(Told::Begun);
                }
                send(&mut writer, &request).await?;
                continue;
            }
        };
        if length == 0 && line.is_empty() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it has ended"));
        }
        if line.last() != Some(&b'\n') {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it says something endless"));
        }
        let answer: Answer = serde_json::from_slice(&line)?;
        let time = Duration::from_secs_f64(line.len() as f64 / PACE as f64);
        line.clear();
        if let Answer::Used { added, removed, .. } = &answer
            && added.len() + removed.len() > NAMES
        {
            return Err(io::Error::other("it says more at once than is allowed"));
        }
        let (Answer::Used { id, .. } | Answer::State { id, .. }) = &answer;
        if let Some((_, ear)) = stores.0.get(id) {
            let kept = Arc::clone(&ear.kept);
            ear.tell(Told::Answer(answer));
            // Filesystems take their time. One that hangs is not to fill the memory.
            let until = Instant::now() + DRAIN;
            while kept.load(Ordering::Relaxed) > KEPT {
                if Instant::now() >= until {
                    return Err(io::Error::other("it says more than can be done"));
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        let now = Instant::now();
        paced = paced.max(now.checked_sub(ahead).unwrap_or(now)) + time;
        if paced > now {
            tokio::time::sleep_until(paced).await;
        }
    }
}

async fn send(writer: &mut (impl tokio::io::AsyncWrite + Unpin), request: &Request) -> io::Result<()> {
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    writer.write_all(&line).await
}
