//! What is on the simulated machine, and what befalls it.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use layered_stores_model::{
    Layers, StoreName, StoreSpec,
    config::{self, Config, Defaults, Diagnostic, Keys},
};
use layered_stores_overlay::{mountinfo::MountState, options::mount_options, refresh::Changes};
use tokio::sync::Notify;

use crate::systemd::SocketState;

/// The directory of all stores.
pub(super) const STATE_DIR: &str = "/state";

/// The stores that may be declared: two by themselves, of which one has a Nix daemon, and one that lies on the first.
pub(super) const NAMES: [&str; 3] = ["a", "b", "c"];

/// A mount of the simulated machine.
#[derive(Clone, Debug)]
pub(super) struct Mount {
    pub(super) id: u64,
    pub(super) parent: u64,
    pub(super) point: String,
    /// The layers, if it is a store's.
    pub(super) layers: Option<Layers>,
}

impl Mount {
    /// Whether it is made of a store's layers, whatever its flags.
    pub(super) fn is_of(&self, layers: &Layers) -> bool {
        let is_same =
            |mine: &Layers| (&mine.lower, &mine.upper, &mine.work) == (&layers.lower, &layers.upper, &layers.work);
        self.layers.as_ref().is_some_and(is_same)
    }
}

/// What the directories of a store hold, and what of it is in memory.
#[derive(Debug, Default)]
pub(super) struct Store {
    /// Whether its mount unit is the daemon's.
    pub(super) unit: bool,
    pub(super) record: Option<Arc<StoreSpec>>,
    pub(super) locked: bool,
    /// Names whose merged view is wrong, and whether only a swap helps.
    pub(super) stale: BTreeMap<OsString, bool>,
    /// It refers to the superblock of a lower store that was swapped out.
    pub(super) behind: bool,
    /// What the daemon was not told of, so that only who asks gets it right.
    pub(super) lost: bool,
    pub(super) watched: bool,
    /// Changes that were not read.
    pub(super) unread: Changes,
    /// Counts the changes, as times of directories do.
    pub(super) version: u64,
    /// The version that was found right.
    pub(super) right: Option<u64>,
    /// Its filesystems do not answer.
    pub(super) hangs: bool,
    /// What is done about it next fails so often.
    pub(super) failures: u32,
    /// Somebody has a file of it open.
    pub(super) in_use: bool,
    /// So many superblocks that swaps have left are held.
    pub(super) left: usize,
    /// Its upper layer takes no writes.
    pub(super) full: bool,
    /// Whether files of valid paths of it are nowhere.
    pub(super) lacks: bool,
    /// What the next daemon is told that somebody has asked for.
    pub(super) asked: Option<bool>,
    /// What is being done about it that nothing else may be done beside.
    pub(super) busy_with: Option<&'static str>,
    /// Somebody has asked for its data to be removed.
    pub(super) may_be_emptied: bool,
    /// The directories of its next specification are not there, or not its own.
    pub(super) cannot_change: bool,
    /// The specification with which it was up last.
    pub(super) was_up_as: Option<Arc<StoreSpec>>,
    /// The specifications of which somebody looks whether they are.
    pub(super) looked_ahead: Vec<Arc<StoreSpec>>,
}

/// All that there is.
#[derive(Debug)]
pub(super) struct Contents {
    pub(super) mounts: Vec<Mount>,
    pub(super) stores: BTreeMap<StoreName, Store>,
    pub(super) sockets: BTreeMap<StoreName, SocketState>,
    /// What PID 1 keeps for the next daemon.
    pub(super) kept: BTreeSet<(StoreName, u64)>,
    /// What was swapped out and takes no more writes.
    pub(super) retired: BTreeSet<u64>,
    /// The filesystem of the configuration does not answer, or that of the records.
    pub(super) configuration_hangs: bool,
    pub(super) records_hang: bool,
    pub(super) configuration: String,
    /// What is in the file instead of it and holds mistakes.
    pub(super) mistaken: Option<String>,
    pub(super) can_swap: bool,
    /// What the daemon saw when it last looked at the mount table.
    pub(super) seen: Vec<Mount>,
    /// What must not happen, and did.
    pub(super) violations: Vec<String>,
    next_id: u64,
    seed: u64,
}

/// The simulated machine, which outlives its daemons.
#[derive(Debug)]
pub(super) struct World {
    contents: Mutex<Contents>,
    pub(super) mounts_changed: Notify,
    pub(super) layers_changed: Notify,
    pub(super) sockets_changed: Notify,
    pub(super) contents_changed: Notify,
    /// What hung may go on.
    pub(super) goes_on: Notify,
}

impl World {
    pub(super) fn new(seed: u64, can_swap: bool) -> Arc<Self> {
        let contents = Contents {
            mounts: Vec::new(),
            stores: NAMES.map(|name| (name.parse().expect("valid"), Store::default())).into(),
            sockets: BTreeMap::new(),
            kept: BTreeSet::new(),
            retired: BTreeSet::new(),
            configuration_hangs: false,
            records_hang: false,
            configuration: String::new(),
            mistaken: None,
            can_swap,
            seen: Vec::new(),
            violations: Vec::new(),
            next_id: 100,
            seed: seed | 1,
        };
        Arc::new(Self {
            contents: Mutex::new(contents),
            mounts_changed: Notify::new(),
            layers_changed: Notify::new(),
            sockets_changed: Notify::new(),
            contents_changed: Notify::new(),
            goes_on: Notify::new(),
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that something has happened that must not.
    pub(super) fn blame(&self, what: String) {
        self.lock().violations.push(what);
    }

    /// Waits until the filesystems of a store answer.
    pub(super) async fn until_it_answers(&self, name: &StoreName) {
        loop {
            let goes_on = self.goes_on.notified();
            if !self.lock().store(name).hangs {
                return;
            }
            goes_on.await;
        }
    }

    /// How long the next step takes: most often next to nothing, sometimes long enough for everything else to come in between.
    pub(super) fn pause(&self) -> Duration {
        let mut contents = self.lock();
        match contents.random(8) {
            0..4 => Duration::ZERO,
            4..7 => Duration::from_millis(1 + contents.random(20)),
            _ => Duration::from_millis(100 + contents.random(2000)),
        }
    }
}

impl Contents {
    /// A number below another one (xorshift64).
    pub(super) fn random(&mut self, below: u64) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        (self.seed >> 16) % below
    }

    pub(super) fn store(&mut self, name: &StoreName) -> &mut Store {
        self.stores.get_mut(name).expect("one of the three")
    }

    /// The configuration as it is declared now.
    pub(super) fn config(&self) -> Config {
        parse(&self.configuration).expect("a configuration without mistakes")
    }

    /// The specifications with which stores are or were last up, and of the others those declared.
    pub(super) fn in_force(&self) -> Vec<StoreSpec> {
        let declared = self.config().stores.into_iter().filter(|spec| self.stores[&spec.name].record.is_none());
        self.stores.values().filter_map(|store| store.record.as_deref().cloned()).chain(declared).collect()
    }

    /// Puts a mount on top of all at a point.
    pub(super) fn mount(&mut self, point: &str, layers: Option<Layers>) -> u64 {
        let parent = self.top_at(point).map_or(1, |mount| mount.id);
        self.next_id += 1;
        self.mounts.push(Mount { id: self.next_id, parent, point: point.to_owned(), layers });
        self.next_id
    }

    /// Slides a mount beneath the one on top.
    pub(super) fn mount_beneath(&mut self, point: &str, layers: Layers) {
        self.next_id += 1;
        let id = self.next_id;
        let Some(top) = self.top_at(point).map(|mount| mount.id) else { return };
        let Some(top) = self.mounts.iter_mut().find(|mount| mount.id == top) else { return };
        let parent = std::mem::replace(&mut top.parent, id);
        self.mounts.push(Mount { id, parent, point: point.to_owned(), layers: Some(layers) });
    }

    /// The mount that nothing else at its point lies on.
    pub(super) fn top_at(&self, point: &str) -> Option<&Mount> {
        let here = || self.mounts.iter().filter(|mount| mount.point == point);
        here().find(|mount| !here().any(|other| other.parent == mount.id))
    }

    /// Takes the topmost mount at a point away, if it is as wanted.
    pub(super) fn unmount(&mut self, point: &str, is_wanted: impl FnOnce(&Mount) -> bool) -> Option<u64> {
        let id = self.top_at(point).filter(|mount| is_wanted(mount)).map(|mount| mount.id)?;
        self.mounts.retain(|mount| mount.id != id);
        Some(id)
    }

    /// What is mounted at a store's place.
    pub(super) fn state(&self, layers: &Layers) -> MountState {
        layered_stores_overlay::mountinfo::MountTable::parse(&text(&self.mounts), |_| true).state(layers)
    }

    /// What the daemon believes to be mounted there.
    pub(super) fn seen_state(&self, layers: &Layers) -> MountState {
        layered_stores_overlay::mountinfo::MountTable::parse(&text(&self.seen), |_| true).state(layers)
    }

    /// Notes that a store has another superblock now: what lies on it goes on with the old one.
    pub(super) fn is_another(&mut self, name: &StoreName) {
        let above: Vec<_> = self.in_force().into_iter().filter(|spec| spec.lower_name() == Some(name)).collect();
        for spec in above {
            if matches!(self.state(&spec.layers), MountState::Mounted { .. }) {
                self.store(&spec.name).behind = true;
            }
        }
    }

    /// Changes a name of a layer of a store, and so what stores on it show.
    pub(super) fn change(&mut self, name: &StoreName, path: &str, needs_swap: bool, is_seen: bool) {
        let store = self.store(name);
        store.version += 1;
        store.stale.insert(path.into(), needs_swap);
        if !store.watched {
            store.lost |= needs_swap;
        } else if is_seen {
            store.unread.names.insert(path.into());
            store.unread.taken |= needs_swap;
        } else {
            store.unread.merge(Changes::lost());
            store.lost |= needs_swap;
        }
    }
}

/// The mount table as the kernel writes it.
pub(super) fn text(mounts: &[Mount]) -> String {
    let line = |mount: &Mount| {
        let Mount { id, parent, point, layers } = mount;
        let rest = match layers {
            None => "rw - tmpfs tmpfs rw".to_owned(),
            Some(layers) => {
                let (flags, options): (Vec<_>, Vec<_>) =
                    mount_options(layers).split(',').map(str::to_owned).partition(|word| !word.contains('='));
                let access_times = if flags.iter().any(|flag| flag == "noatime") { "" } else { ",relatime" };
                format!("rw,{}{access_times} - overlay overlay rw,{}", flags.join(","), options.join(","))
            }
        };
        format!("{id} {parent} 0:{id} / {point} {rest}")
    };
    let root = "1 0 0:1 / / rw - ext4 /dev/vda rw".to_owned();
    std::iter::once(root).chain(mounts.iter().map(line)).collect::<Vec<_>>().join("\n")
}

/// Reads a configuration of the simulated machine.
pub(super) fn parse(text: &str) -> Result<Config, Vec<Diagnostic>> {
    let path = |path: &str| path.parse().expect("valid");
    let defaults = Defaults { state_dir: path(STATE_DIR), remount_hook: path("/hook") };
    config::parse(text, &defaults, Keys::Alone)
}
