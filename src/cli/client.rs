//! The daemon as its clients see it.

use std::collections::HashMap;

use serde::Serialize;
use zbus::{
    Connection, fdo, proxy,
    wire::{DeserializeDict, OwnedObjectPath, Type},
};

use crate::{
    bus::{BUS_NAME, MANAGER_PATH, store_path},
    store::StoreName,
};

#[proxy(
    interface = "org.layeredstores1.Manager",
    default_service = "org.layeredstores1",
    default_path = "/org/layeredstores1"
)]
pub(super) trait Manager {
    fn list_stores(&self) -> zbus::Result<Vec<(String, String, OwnedObjectPath)>>;

    #[zbus(allow_interactive_auth)]
    fn reload(&self) -> zbus::Result<()>;
}

#[proxy(interface = "org.layeredstores1.Store", default_service = "org.layeredstores1")]
pub(super) trait Store {
    #[zbus(allow_interactive_auth)]
    fn start(&self) -> zbus::Result<()>;

    #[zbus(allow_interactive_auth)]
    fn stop(&self) -> zbus::Result<()>;

    #[zbus(allow_interactive_auth)]
    fn remount(&self) -> zbus::Result<()>;

    #[zbus(allow_interactive_auth)]
    fn verify(&self) -> zbus::Result<Vec<(String, String)>>;
}

/// The properties of a store. As JSON, the names in kebab-case.
#[derive(Clone, Debug, DeserializeDict, Serialize, Type)]
#[zbus(signature = "a{sv}", rename_all = "PascalCase")]
#[serde(rename_all = "kebab-case")]
pub(super) struct Properties {
    pub(super) name: String,
    pub(super) state: String,
    pub(super) state_reason: String,
    #[serde(serialize_with = "problems")]
    pub(super) problems: Vec<(String, String)>,
    pub(super) store_uri: String,
    pub(super) daemon_uri: String,
    pub(super) lower_store: String,
    pub(super) lower_store_dir: String,
    pub(super) upper_layer: String,
    pub(super) work_dir: String,
    pub(super) real_store_dir: String,
    pub(super) state_dir: String,
    pub(super) mount_unit: String,
    pub(super) declared: bool,
    pub(super) required: bool,
    #[zbus(rename = "LastRefreshUSec")]
    pub(super) last_refresh_usec: u64,
    pub(super) last_refresh: String,
    pub(super) refresh_count: u64,
    pub(super) swap_count: u64,
}

/// The interfaces of an object, as the ObjectManager lists them.
#[derive(DeserializeDict, Type)]
#[zbus(signature = "a{sa{sv}}")]
struct Interfaces {
    #[zbus(rename = "org.layeredstores1.Store")]
    store: Option<Properties>,
}

/// Objects read better in JSON than pairs.
fn problems<S: serde::Serializer>(problems: &[(String, String)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(problems.iter().map(|(code, message)| HashMap::from([("code", code), ("message", message)])))
}

/// Why a command failed, for people.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    #[error("cannot reach the system bus: {0}")]
    NoBus(zbus::Error),
    #[error(
        "layered-storesd is not running ({0}); see `systemctl status layered-storesd`, start it with `systemctl start layered-storesd`"
    )]
    NoDaemon(String),
    #[error("{0}")]
    Daemon(String),
    #[error("the daemon answers in a way this command line does not understand: {0}; are both of one version?")]
    Answer(String),
}

impl From<zbus::Error> for ClientError {
    fn from(error: zbus::Error) -> Self {
        match error {
            zbus::Error::MethodError(name, message, _) => {
                let message = message.unwrap_or_else(|| name.to_string());
                if name.as_str().starts_with("org.freedesktop.systemd1.") {
                    Self::NoDaemon(message)
                } else {
                    Self::Daemon(message)
                }
            }
            zbus::Error::FDO(error) => (*error).into(),
            error => Self::Daemon(error.to_string()),
        }
    }
}

impl From<fdo::Error> for ClientError {
    fn from(error: fdo::Error) -> Self {
        match error {
            fdo::Error::ServiceUnknown(message)
            | fdo::Error::NameHasNoOwner(message)
            // The bus has waited in vain for systemd to start the daemon.
            | fdo::Error::TimedOut(message) => Self::NoDaemon(message),
            fdo::Error::AccessDenied(message) | fdo::Error::InteractiveAuthorizationRequired(message) => {
                Self::Daemon(message)
            }
            fdo::Error::ZBus(error) => error.into(),
            error => Self::Daemon(error.to_string()),
        }
    }
}

/// A connection to the daemon.
pub(super) struct Client {
    connection: Connection,
}

impl Client {
    pub(super) async fn connect() -> Result<Self, ClientError> {
        Ok(Self { connection: Connection::system().await.map_err(ClientError::NoBus)? })
    }

    pub(super) async fn manager(&self) -> Result<ManagerProxy<'_>, ClientError> {
        Ok(ManagerProxy::new(&self.connection).await?)
    }

    pub(super) async fn store(&self, name: &StoreName) -> Result<StoreProxy<'_>, ClientError> {
        Ok(StoreProxy::builder(&self.connection).path(store_path(name)).build().await?)
    }

    /// The properties of one store.
    pub(super) async fn status(&self, name: &StoreName) -> Result<Properties, ClientError> {
        let interface = Some("org.freedesktop.DBus.Properties");
        let arguments = ("org.layeredstores1.Store",);
        let path = store_path(name);
        let reply = self.connection.call_method(Some(BUS_NAME), path, interface, "GetAll", &arguments).await;
        match reply {
            Ok(reply) => reply.body().deserialize().map_err(|error| ClientError::Answer(error.to_string())),
            Err(error) => Err(match ClientError::from(error) {
                // The bus library's words for an object that is not there say nothing about stores.
                ClientError::Daemon(message) if message.contains("Unknown object") => {
                    let message = format!("there is no store {name:?}; `layered-stores list` names those there are");
                    ClientError::Daemon(message)
                }
                error => error,
            }),
        }
    }

    /// The properties of all stores, in one call.
    pub(super) async fn all(&self) -> Result<Vec<Properties>, ClientError> {
        let interface = Some("org.freedesktop.DBus.ObjectManager");
        let reply =
            self.connection.call_method(Some(BUS_NAME), MANAGER_PATH, interface, "GetManagedObjects", &()).await?;
        let body = reply.body();
        let objects: HashMap<OwnedObjectPath, Interfaces> =
            body.deserialize().map_err(|error| ClientError::Answer(error.to_string()))?;
        let mut stores: Vec<_> = objects.into_values().filter_map(|interfaces| interfaces.store).collect();
        stores.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(stores)
    }
}
