//! What the engine is asked to do.

use layered_stores_model::StoreName;
use tokio::time::Instant;

use super::Engine;
use crate::supervisor::{
    Error,
    entry::Reply,
    handle::{Asker, Command},
    looks::Look,
    plan::{Phase, Want},
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
                entry.looks.soon(Look::Room, Instant::now());
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
            Command::Job(command) => self.job_command(command),
            Command::RemoveData(name, reply) => self.remove_data(name, reply),
            Command::Sockets(asked, sockets) => self.sockets_seen(asked, &sockets),
            Command::Found(name, report) => self.found(&name, *report),
            Command::Reload(reply) => {
                self.reloading.ask(reply);
                self.reload();
            }
        }
    }

    pub(super) fn command_start(&mut self, name: &StoreName, reply: Reply) {
        let Some(entry) = self.entries.get(name) else { return no_such_store(name, reply) };
        if let Some(stuck) = &entry.stuck {
            let _ = reply.send(Err(Error::Stuck(name.clone(), stuck.clone())));
            return;
        }
        if !entry.declared {
            let why =
                "it is declared no more, and is being taken down; declare it again, and run `layered-stores reload`";
            let _ = reply.send(Err(Error::StartFailed(name.clone(), why.to_owned())));
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
}

fn no_such_store<T>(name: &StoreName, reply: Reply<T>) {
    let _ = reply.send(Err(Error::NoSuchStore(name.to_string())));
}
