//! What the engine is asked to do.

use std::{
    path::Path,
    sync::{Arc, PoisonError},
};

use layered_stores_model::{
    Layers, Source, StoreName, StoreSpec,
    config::{self, Config},
};
use layered_stores_overlay::mountinfo::MountState;
use tokio::time::Instant;

use super::{Engine, number};
use crate::supervisor::{
    Error,
    entry::{Entry, Reply, answer},
    handle::{Asker, Command, Event},
    plan::{Phase, Want},
    threads::DEADLINE,
};

impl Engine {
    pub(super) fn command(&mut self, command: Command) {
        match command {
            Command::Start(name, reply) => self.command_start(&name, reply),
            Command::Stop(name, reply) => self.command_stop(&name, reply),
            Command::Remount(name, asker, reply) => {
                let Some(entry) = self.entries.get_mut(&name) else { return no_such_store(&name, reply) };
                if let Some(stuck) = &entry.stuck {
                    let _ = reply.send(Err(Error::Stuck(name, stuck.clone())));
                    return;
                }
                // Nix cannot try again: whoever asks while the store comes up waits until it has.
                let is_active = entry.phase == Phase::Active;
                if !is_active && !entry.is_coming_up() {
                    let _ = reply.send(Err(entry.not_active()));
                    return;
                }
                entry.rooms.soon(Instant::now());
                match asker {
                    Asker::User(uid) if !is_active => entry.waiting.unproven.push((uid, reply)),
                    Asker::User(uid) if uid != entry.owner_uid => {
                        let _ = reply.send(Err(Error::NotOwner(name)));
                    }
                    _ => {
                        entry.waiting.remounting.push(reply);
                        entry.waiting.root_asks |= asker == Asker::Root;
                        self.refresh(&name);
                    }
                }
            }
            Command::Verify(name, caller, reply) => self.verify(&name, caller, reply),
            Command::Job(command) => self.job_command(command),
            Command::RemoveData(name, reply) => self.remove_data(name, reply),
            Command::Sockets(asked, sockets) => self.sockets_seen(asked, &sockets),
            Command::Reload(reply) => {
                self.reloading.ask(reply);
                self.reload();
            }
        }
    }

    /// Reads the configuration, if somebody waits for that and nobody does it.
    fn reload(&mut self) {
        if self.reloading.begin() {
            self.loading.spawn(self.machine.configuration());
            self.loading_since = Instant::now();
        }
    }

    /// When the configuration is waited for no longer.
    pub(super) fn loading_due(&self) -> Option<Instant> {
        (!self.reloading.is_empty() && !self.loading.is_empty()).then(|| self.loading_since + DEADLINE)
    }

    /// Gives up waiting for a configuration whose filesystem does not answer. It is put in force when it does.
    pub(super) fn look_at_loading(&mut self, now: Instant) {
        if self.loading_due().is_some_and(|at| at <= now) {
            let seconds = DEADLINE.as_secs();
            let why = format!(
                "its file has not answered for {seconds} s; see to the filesystem it is on; it is put in force when that answers"
            );
            tracing::error!("the configuration was not changed: {why}");
            answer(self.reloading.all(), &Err(Error::InvalidConfiguration(why)));
        }
    }

    pub(super) fn command_start(&mut self, name: &StoreName, reply: Reply) {
        let Some(entry) = self.entries.get(name) else { return no_such_store(name, reply) };
        if let Some(stuck) = &entry.stuck {
            let _ = reply.send(Err(Error::Stuck(name.clone(), stuck.clone())));
            return;
        }
        // As systemd does it: what a store requires is started with it.
        let mut next = Some(name.clone());
        while let Some(entry) = next.and_then(|name| self.entries.get_mut(&name)) {
            if entry.want == Want::Gone {
                break;
            }
            if entry.phase != Phase::Active || entry.want != Want::Up {
                entry.want(Want::Up);
            } else if entry.candidate.is_some() || entry.next.is_some() {
                entry.try_again();
            }
            entry.forget_failure();
            next = entry.spec.lower_name().cloned();
        }
        if let Some(entry) = self.entries.get_mut(name) {
            entry.waiting.starting.push(reply);
        }
        self.reconcile();
    }

    pub(super) fn command_stop(&mut self, name: &StoreName, reply: Reply) {
        let carried: Vec<_> = self.on_top_of(name).map(|entry| entry.spec.name.to_string()).collect();
        let Some(entry) = self.entries.get_mut(name) else { return no_such_store(name, reply) };
        if let Some(stuck) = &entry.stuck {
            let _ = reply.send(Err(Error::Stuck(name.clone(), stuck.clone())));
        } else if carried.is_empty() {
            entry.want(if entry.declared { Want::Down } else { Want::Gone });
            entry.waiting.stopping.push(reply);
            self.reconcile();
        } else {
            let _ = reply.send(Err(Error::LowerOf(name.clone(), carried)));
        }
    }

    /// The stores that lie on a store and are mounted or on their way up.
    pub(super) fn on_top_of(&self, name: &StoreName) -> impl Iterator<Item = &Entry> {
        let is_on_top = move |entry: &&Entry| entry.spec.lower_name() == Some(name);
        self.entries.values().filter(is_on_top).filter(|entry| entry.mount != MountState::Absent || entry.op.is_some())
    }

    pub(super) fn loaded(&mut self, loaded: Result<Result<Config, config::ConfigError>, tokio::task::JoinError>) {
        match loaded {
            Ok(Ok(config)) => {
                tracing::info!(
                    stores = config.stores.len(),
                    "configuration reloaded: {} declared",
                    number(config.stores.len(), "store")
                );
                self.apply(Source::Configuration, config.stores);
                self.reload_applied.append(&mut self.reloading.end());
                self.entries.values_mut().for_each(|entry| entry.reached = false);
                self.settling = true;
                self.reconcile();
            }
            Ok(Err(error)) => self.reload_failed(&error.to_string()),
            Err(error) => self.reload_failed(&error.to_string()),
        }
        self.reload();
    }

    pub(super) fn reload_failed(&mut self, why: &str) {
        tracing::error!("the configuration was not changed:\n{why}");
        let error = Error::InvalidConfiguration(why.to_owned());
        answer(self.reloading.end(), &Err(error));
    }

    /// Turns what a source declares now into what is wanted of each store. Those of other sources stay as they are.
    pub(super) fn apply(&mut self, source: Source, specs: Vec<StoreSpec>) {
        for entry in self.entries.values_mut().filter(|entry| entry.spec.source == source) {
            if !specs.iter().any(|spec| spec.name == entry.spec.name) && entry.declared {
                tracing::info!(store = %entry.spec.name, "{}: no longer declared", entry.spec.name);
                entry.declared = false;
                entry.withdraw();
                entry.want(Want::Gone);
            }
        }
        for spec in specs {
            let Some(entry) = self.entries.get_mut(&spec.name) else {
                self.add(Arc::new(spec), true);
                continue;
            };
            if !entry.declared {
                entry.declared = true;
                entry.want(if spec.autostart { Want::Up } else { Want::Down });
            }
            if entry.spec.needs_restart_for(&spec) {
                entry.propose(Arc::new(spec));
                entry.try_again();
            } else {
                entry.withdraw();
                if *entry.spec != spec {
                    entry.spec = Arc::new(spec);
                    entry.try_again();
                }
            }
            // Whoever reloads has most likely changed something that was in the way.
            if matches!(entry.phase, Phase::Failed { .. }) {
                entry.want(entry.want);
            }
        }
    }

    pub(super) fn add(&mut self, spec: Arc<StoreSpec>, declared: bool) {
        let entry = Entry::new(spec, declared);
        let name = entry.spec.name.clone();
        let _ = self.events.send(Event::Added(entry.cell.clone()));
        self.register(&entry);
        self.entries.insert(name, entry);
    }

    pub(super) fn register(&self, entry: &Entry) {
        let mut registry = self.registry.write().unwrap_or_else(PoisonError::into_inner);
        let name = &entry.spec.name;
        registry.by_path.retain(|_, of| of != name);
        registry.by_path.insert(entry.spec.layers.merged.to_string(), name.clone());
        registry.by_name.insert(name.clone(), entry.cell.clone());
        let Layers { lower, upper, work, merged, .. } = &entry.spec.layers;
        for dir in [lower, upper, work, merged, &entry.spec.state_dir] {
            let above = dir.as_path().ancestors().filter_map(Path::to_str);
            // What is above a directory that is known is known as well.
            for dir in
                above.take_while(|dir| !registry.on_the_way.contains(*dir)).map(str::to_owned).collect::<Vec<_>>()
            {
                registry.on_the_way.insert(dir);
            }
        }
    }
}

fn no_such_store<T>(name: &StoreName, reply: Reply<T>) {
    let _ = reply.send(Err(Error::NoSuchStore(name.to_string())));
}
