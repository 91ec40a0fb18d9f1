//! Putting the engine's news on the bus.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
};

use layered_stores_client::{BUS_NAME, MANAGER_PATH, store_path};
use layered_stores_model::StoreName;
use zbus::{
    Connection, fdo,
    names::InterfaceName,
    object_server::{Interface as _, SignalEmitter},
    wire::Variant,
};

use super::{
    Connections,
    authorization::Authorization,
    manager::Manager,
    store::{Store, problems},
};
use crate::supervisor::{Event, Handle, Status, StatusCell};

/// Serves the manager and the stores.
pub struct Publisher {
    connection: Connection,
    handle: Handle,
    authorization: Authorization,
    /// Changes that are gathered to be sent as one signal a store: the status as clients know it.
    changed: BTreeMap<StoreName, (Box<Status>, StatusCell)>,
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

    /// Takes the bus name, from when on clients find the daemon.
    ///
    /// # Errors
    /// When another process has the name, or the bus policy refuses it.
    pub async fn take_name(&self) -> zbus::Result<()> {
        // Waiting in the queue for it would be waiting for another daemon to go away.
        let flags = fdo::RequestNameFlags::DO_NOT_QUEUE;
        match self.connection.request_name_with_flags(BUS_NAME, flags).await? {
            fdo::RequestNameReply::PrimaryOwner | fdo::RequestNameReply::AlreadyOwner => Ok(()),
            _ => Err(zbus::Error::NameTaken),
        }
    }

    /// Takes an event. Changes are sent with the next [`flush`](Self::flush).
    ///
    /// # Errors
    /// When the connection is lost.
    pub async fn publish(&mut self, event: Event) -> zbus::Result<()> {
        match event {
            Event::Added(cell) => {
                let path = cell.read(|status| store_path(status.name()));
                let (handle, authorization) = (self.handle.clone(), self.authorization.clone());
                self.connection.object_server().at(path, Store { cell, handle, authorization }).await?;
            }
            Event::Changed { old, cell } => {
                let name = old.name().clone();
                self.changed.entry(name).or_insert((old, cell));
            }
            Event::Removed(name) => {
                self.changed.remove(&name);
                self.connection.object_server().remove::<Store, _>(store_path(&name)).await?;
            }
            Event::Progress { .. } | Event::Settled { .. } => {}
        }
        Ok(())
    }

    /// Sends the changes gathered so far.
    ///
    /// # Errors
    /// When the connection is lost.
    pub async fn flush(&mut self) -> zbus::Result<()> {
        for (name, (old, cell)) in std::mem::take(&mut self.changed) {
            let changed = cell.read(|new| difference(&old, new));
            if !changed.is_empty() {
                let emitter = SignalEmitter::new(&self.connection, store_path(&name))?;
                let interface: InterfaceName<'_> = Store::name();
                fdo::Properties::properties_changed(&emitter, interface, changed, Cow::Borrowed(&[])).await?;
            }
        }
        Ok(())
    }
}

/// The properties that differ, with their new values.
fn difference(old: &Status, new: &Status) -> HashMap<&'static str, Variant<'static>> {
    let old: HashMap<_, _> = changing_properties(old).into();
    changing_properties(new).into_iter().filter(|(name, value)| old.get(name) != Some(value)).collect()
}

/// The properties that may change in a store's life.
fn changing_properties(status: &Status) -> [(&'static str, Variant<'static>); 20] {
    let spec = &status.spec;
    [
        ("State", Variant::from(status.state.to_string())),
        ("StateReason", Variant::from(status.state_reason.clone())),
        ("StateChangeUSec", Variant::from(status.state_change_usec)),
        ("NextTryUSec", Variant::from(status.next_try_usec)),
        ("Problems", Variant::from(problems(status))),
        ("StoreUri", Variant::from(spec.uri())),
        ("DaemonUri", Variant::from(spec.daemon_uri().unwrap_or_default())),
        ("LowerStore", Variant::from(spec.lower_store.to_string())),
        ("LowerStoreDir", Variant::from(spec.layers.lower.to_string())),
        ("UpperLayer", Variant::from(spec.layers.upper.to_string())),
        ("WorkDir", Variant::from(spec.layers.work.to_string())),
        ("RealStoreDir", Variant::from(spec.layers.merged.to_string())),
        ("MountUnit", Variant::from(spec.mount_unit.to_string())),
        ("StateDir", Variant::from(spec.state_dir.to_string())),
        ("Declared", Variant::from(status.declared)),
        ("Required", Variant::from(spec.required)),
        ("LastRefreshUSec", Variant::from(status.last_refresh_usec)),
        ("LastRefresh", Variant::from(status.last_refresh.to_owned())),
        ("RefreshCount", Variant::from(status.refresh_count)),
        ("SwapCount", Variant::from(status.swap_count)),
    ]
}
