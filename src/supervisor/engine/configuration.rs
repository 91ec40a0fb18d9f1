//! Reading the configuration, and turning what is declared into what is wanted.

use std::{
    path::Path,
    sync::{Arc, PoisonError},
};

use layered_stores_model::{
    Layers, Source, StoreSpec,
    config::{Config, ConfigError},
};
use tokio::{task::JoinError, time::Instant};

use super::{Engine, number};
use crate::supervisor::{
    Error,
    entry::{Entry, answer},
    handle::Event,
    plan::{Phase, Want},
    threads::DEADLINE,
};

impl Engine {
    /// Reads the configuration, if somebody waits for that and nobody does it.
    pub(super) fn reload(&mut self) {
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

    pub(super) fn loaded(&mut self, loaded: Result<Result<Config, ConfigError>, JoinError>) {
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

    fn reload_failed(&mut self, why: &str) {
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
