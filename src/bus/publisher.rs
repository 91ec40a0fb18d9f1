//! Putting the engine's news on the bus.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use layered_stores_client::{BUS_NAME, MANAGER_PATH, job_path, store_path};
use layered_stores_model::StoreName;
use tokio::sync::mpsc;
use zbus::{
    Connection, DBusError as _, fdo,
    names::InterfaceName,
    object_server::{Interface as _, SignalEmitter},
    wire::{OwnedVariant, Variant},
};

use super::{
    Connections,
    authorization::Authorization,
    error::BusError,
    job::{self, Job},
    manager::Manager,
    store::Store,
};
use crate::supervisor::{self, Event, Handle, JobNews, Status, StatusCell};

/// How many events are gathered at the most before their changes are sent.
const BATCH: usize = 256;

/// How far publishing has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Milestone<'a> {
    /// How all stores are has changed: how they are.
    Summary(&'a str),
    /// Clients can find the daemon, and all that is there.
    Named,
    /// Everything is where it should be, or was given up on: how it is.
    Settled(&'a str),
}

/// Why there is nothing on the bus, or no more.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// A second daemon does not start.
    #[error("the bus name {BUS_NAME} is taken: another layered-storesd is running")]
    NameTaken,
    /// Most often the policy was installed and the bus has not read it.
    #[error(
        "cannot take the bus name {BUS_NAME}; is its policy installed, and has the bus read it (`systemctl reload dbus`)?"
    )]
    NoName(#[source] zbus::Error),
    /// The connection is lost.
    #[error(transparent)]
    Bus(#[from] zbus::Error),
}

/// Serves the manager and the stores.
pub struct Publisher {
    connection: Connection,
    handle: Handle,
    authorization: Authorization,
    /// Changes that are gathered to be sent as one signal a store: all that it was since the last one.
    changed: BTreeMap<StoreName, (Vec<Status>, StatusCell)>,
}

impl Publisher {
    /// Serves the manager; stores come with their events.
    ///
    /// # Errors
    /// When the bus does not answer.
    pub async fn new(connections: &Connections, handle: Handle) -> zbus::Result<Self> {
        let (connection, authorization) = (connections.serving.clone(), connections.authorization.clone());
        let server = connection.object_server();
        server.at(MANAGER_PATH, fdo::ObjectManager).await?;
        let manager = Manager { handle: handle.clone(), authorization: authorization.clone() };
        server.at(MANAGER_PATH, manager).await?;
        Ok(Self { connection, handle, authorization, changed: BTreeMap::new() })
    }

    /// Publishes events until there are no more, and takes the bus name once the first stores can be seen.
    ///
    /// # Errors
    /// [`PublishError`].
    pub async fn run(
        mut self,
        mut events: mpsc::UnboundedReceiver<Event>,
        mut reached: impl FnMut(Milestone<'_>),
    ) -> Result<(), PublishError> {
        let (mut batch, mut is_named) = (Vec::new(), false);
        while events.recv_many(&mut batch, BATCH).await > 0 {
            let mut settled = None;
            for event in batch.drain(..) {
                match &event {
                    Event::Summary { summary } => reached(Milestone::Summary(summary)),
                    Event::Settled { summary } => settled = Some(summary.clone()),
                    _ => {}
                }
                self.publish(event).await?;
            }
            self.flush().await?;
            if !is_named {
                self.take_name().await?;
                is_named = true;
                reached(Milestone::Named);
            }
            if let Some(summary) = settled {
                reached(Milestone::Settled(&summary));
            }
        }
        Ok(())
    }

    async fn take_name(&self) -> Result<(), PublishError> {
        // Waiting in the queue for it would be waiting for another daemon to go away.
        let flags = fdo::RequestNameFlags::DO_NOT_QUEUE;
        match self.connection.request_name_with_flags(BUS_NAME, flags).await {
            Ok(fdo::RequestNameReply::PrimaryOwner | fdo::RequestNameReply::AlreadyOwner) => Ok(()),
            Ok(_) | Err(zbus::Error::NameTaken) => Err(PublishError::NameTaken),
            Err(error) => Err(PublishError::NoName(error)),
        }
    }

    /// Takes an event. Changes are sent with the next [`flush`](Self::flush).
    async fn publish(&mut self, event: Event) -> zbus::Result<()> {
        match event {
            Event::Added(cell) => {
                let path = cell.read(|status| store_path(status.name()));
                let (handle, authorization) = (self.handle.clone(), self.authorization.clone());
                self.connection.object_server().at(path, Store { cell, handle, authorization }).await?;
            }
            Event::Changed { old, cell } => {
                let name = old.name().clone();
                self.changed.entry(name).or_insert_with(|| (Vec::new(), cell)).0.push(*old);
            }
            Event::Removed(name) => {
                self.changed.remove(&name);
                self.connection.object_server().remove::<Store, _>(store_path(&name)).await?;
            }
            Event::Job(news) => self.publish_job(news).await?,
            Event::Summary { .. } | Event::Settled { .. } => {}
        }
        Ok(())
    }

    async fn publish_job(&self, news: JobNews) -> zbus::Result<()> {
        let server = self.connection.object_server();
        match news {
            JobNews::Asked(asked, reply) => {
                let (handle, authorization) = (self.handle.clone(), self.authorization.clone());
                let job = Job { job: Arc::clone(&asked.job), handle, authorization };
                // Somebody else may have asked for it before.
                server.at(job_path(asked.job.id()), job).await?;
                let _ = reply.send(Ok(asked));
            }
            JobNews::Changed(job) => self.job_changed(&job).await?,
            JobNews::Over(job) => {
                self.job_changed(&job).await?;
                let error = job.outcome().and_then(Result::err).map(BusError::from);
                let error = error.as_ref().and_then(|error| error.description()).unwrap_or_default();
                let emitter = SignalEmitter::new(&self.connection, job_path(job.id()))?;
                Job::finished(&emitter, job.state(), error).await?;
            }
            JobNews::Forgotten(id) => drop(server.remove::<Job, _>(job_path(id)).await?),
        }
        Ok(())
    }

    async fn job_changed(&self, job: &supervisor::Job) -> zbus::Result<()> {
        let emitter = SignalEmitter::new(&self.connection, job_path(job.id()))?;
        fdo::Properties::properties_changed(&emitter, Job::name(), job::changing(job), Cow::Borrowed(&[])).await
    }

    /// Sends the changes gathered so far.
    async fn flush(&mut self) -> zbus::Result<()> {
        for (name, (earlier, cell)) in std::mem::take(&mut self.changed) {
            let emitter = SignalEmitter::new(&self.connection, store_path(&name))?;
            let Some((first, rest)) = earlier.split_first() else { continue };
            let last = cell.get();
            let now = self.properties(last.clone(), &emitter).await?;
            // What has changed and changed back is told as well: a client may have asked in between, and a signal tells what is
            // there when it is made, which may be ahead of what it is made for.
            let mut names = BTreeSet::new();
            let untold = rest.iter().filter(|status| !status.is_between(first, &last));
            for status in std::iter::once(first).chain(untold) {
                let then = self.properties(status.clone(), &emitter).await?;
                let other = now.iter().filter(|(name, value)| then.get(*name) != Some(*value));
                names.extend(other.map(|(name, _)| name.clone()));
            }
            let changed = now.into_iter().filter(|(name, _)| names.contains(name));
            let (names, values): (Vec<String>, Vec<OwnedVariant>) = changed.unzip();
            if !names.is_empty() {
                let changed = names.iter().map(String::as_str).zip(values.into_iter().map(Variant::from)).collect();
                let interface: InterfaceName<'_> = Store::name();
                fdo::Properties::properties_changed(&emitter, interface, changed, Cow::Borrowed(&[])).await?;
            }
        }
        Ok(())
    }

    /// What whoever asks for all properties of a store of this status is told. What they differ in is what has changed.
    async fn properties(
        &self,
        status: Status,
        emitter: &SignalEmitter<'_>,
    ) -> zbus::Result<HashMap<String, OwnedVariant>> {
        let (handle, authorization) = (self.handle.clone(), self.authorization.clone());
        let store = Store { cell: StatusCell::new(status), handle, authorization };
        Ok(store.get_all(self.connection.object_server(), &self.connection, None, emitter).await?)
    }
}
