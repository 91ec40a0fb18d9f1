//! The daemon as its clients see it.

use std::{collections::HashMap, path::Path, time::Duration};

use layered_stores_model::{
    StoreName,
    config::{DEFAULT_PATH, declared_names},
    nearest,
};
use zbus::{
    Connection, fdo,
    names::BusName,
    proxy::CacheProperties,
    wire::{DeserializeDict, OwnedObjectPath, Type},
};

use crate::reach::{is_running, reach};
use crate::{
    BUS_NAME, MANAGER_PATH,
    job::Job,
    proxy::{JobProperties, ManagerProxy, Properties, StoreProxy},
    store_path,
};

/// The interfaces of an object, as the ObjectManager lists them.
#[derive(DeserializeDict, Type)]
#[zbus(signature = "a{sa{sv}}")]
struct Interfaces {
    #[zbus(rename = "org.layeredstores1.Store")]
    store: Option<Properties>,
    #[zbus(rename = "org.layeredstores1.Job")]
    job: Option<JobProperties>,
}

/// What the daemon that runs has to say.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Its version.
    pub version: String,
    /// All stores, by name.
    pub stores: Vec<Properties>,
    /// All jobs.
    pub jobs: Vec<JobProperties>,
}

/// Why a command failed, for people.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no bus.
    #[error("cannot reach the system bus: {0}")]
    NoBus(zbus::Error),
    /// The daemon does not run, and cannot be started.
    #[error(
        "layered-storesd is not running ({0}); see `systemctl status layered-storesd`, start it with `systemctl start layered-storesd`"
    )]
    NoDaemon(String),
    /// The daemon does not start for its configuration.
    #[error(
        "layered-storesd does not start, because its configuration is wrong: {0}; correct it, check it with \
         `layered-stores check-config`, and run this again"
    )]
    Configuration(String),
    /// The daemon is not to be started.
    #[error(
        "layered-storesd does not run, because its unit is masked; run `systemctl {unmask} layered-storesd`, and this again"
    )]
    Masked {
        /// What has systemctl allow it again.
        unmask: &'static str,
    },
    /// The daemon says no.
    #[error("{0}")]
    Daemon(String),
    /// A store that was to be started, and is not active.
    #[error("{0}")]
    NotUp(String),
    /// The daemon that was asked has ended before it had answered.
    #[error("layered-storesd has ended meanwhile; see `systemctl status layered-storesd`, and run this again")]
    Gone,
    /// It does not answer.
    #[error("no answer within {} s; see `systemctl status layered-storesd dbus`", .0.as_secs())]
    Silent(Duration),
    /// What it answers is not understood.
    #[error("the daemon answers in a way this command line does not understand: {0}; are both of one version?")]
    Answer(String),
}

impl From<zbus::Error> for ClientError {
    fn from(error: zbus::Error) -> Self {
        match error {
            zbus::Error::MethodError(name, message, _) => {
                let message = message.unwrap_or_else(|| name.to_string());
                match name.as_str() {
                    "org.layeredstores1.Error.StartFailed" => Self::NotUp(message),
                    name if name.starts_with("org.freedesktop.systemd1.") => Self::NoDaemon(message),
                    _ => Self::Daemon(message),
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

/// How long the daemon may take to tell what it knows already.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long for a program that looks again and again, and has somebody waiting for at most 10 s (Prometheus' default).
const SOON: Duration = Duration::from_secs(5);

/// How long somebody waits for a completion.
const AT_ONCE: Duration = Duration::from_secs(1);

async fn in_time<T>(call: impl Future<Output = T>) -> Result<T, ClientError> {
    tokio::time::timeout(PATIENCE, call).await.map_err(|_| ClientError::Silent(PATIENCE))
}

/// A connection to the daemon.
pub struct Client {
    connection: Connection,
}

impl Client {
    /// Connects, and has the daemon started if it does not run.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn connect() -> Result<Self, ClientError> {
        let connection = in_time(Connection::system()).await?.map_err(ClientError::NoBus)?;
        reach(&connection).await?;
        Ok(Self { connection })
    }

    /// The names of the stores, if the daemon runs and answers at once.
    pub async fn names() -> Option<Vec<String>> {
        let names = async {
            let connection = Connection::system().await.ok()?;
            if !is_running(&connection).await.ok()? {
                return None;
            }
            let stores = Self { connection }.manager().await.ok()?.list_stores().await.ok()?;
            Some(stores.into_iter().map(|(name, ..)| name).collect())
        };
        tokio::time::timeout(AT_ONCE, names).await.ok()?
    }

    /// What the daemon that runs has to say, in one call whatever there is, besides its version; `None`: none runs, and none is
    /// started.
    ///
    /// # Errors
    /// [`ClientError::NoBus`] when nobody can be asked; others when a daemon that runs does not answer as it should.
    pub async fn snapshot() -> Result<Option<Snapshot>, ClientError> {
        tokio::time::timeout(SOON, Self::snapshot_now()).await.map_err(|_| ClientError::Silent(SOON))?
    }

    async fn snapshot_now() -> Result<Option<Snapshot>, ClientError> {
        let connection = Connection::system().await.map_err(ClientError::NoBus)?;
        let bus = fdo::DBusProxy::new(&connection).await.map_err(ClientError::NoBus)?;
        // By its unique name: the bus starts a daemon for whoever calls one by the other.
        let owner = match bus.get_name_owner(BUS_NAME.try_into()?).await {
            Ok(owner) => owner.into_inner(),
            Err(fdo::Error::NameHasNoOwner(_)) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let manager = ManagerProxy::builder(&connection).destination(owner.clone());
        let manager = manager.cache_properties(CacheProperties::No).build().await?;
        let (stores, jobs) = managed(&connection, owner.into()).await?;
        Ok(Some(Snapshot { version: manager.version().await?, stores, jobs }))
    }

    /// The daemon as a whole.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn manager(&self) -> Result<ManagerProxy<'_>, ClientError> {
        Ok(ManagerProxy::new(&self.connection).await?)
    }

    /// One store, whether there is one or not.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn store(&self, name: &StoreName) -> Result<StoreProxy<'_>, ClientError> {
        Ok(StoreProxy::builder(&self.connection).path(store_path(name)).build().await?)
    }

    /// Has every path of a store looked at.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn verify(&self, name: &StoreName) -> Result<Job, ClientError> {
        Job::begin(&self.connection, name, async |store| store.verify().await).await
    }

    /// The properties of one store.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn status(&self, name: &StoreName) -> Result<Properties, ClientError> {
        let interface = Some("org.freedesktop.DBus.Properties");
        let arguments = ("org.layeredstores1.Store",);
        let path = store_path(name);
        let call = self.connection.call_method(Some(BUS_NAME), path, interface, "GetAll", &arguments);
        match in_time(call).await? {
            Ok(reply) => reply.body().deserialize().map_err(|error| ClientError::Answer(error.to_string())),
            Err(error) => Err(match ClientError::from(error) {
                // The bus library's words for an object that is not there say nothing about stores.
                ClientError::Daemon(message) if message.contains("Unknown object") => self.no_such_store(name).await,
                error => error,
            }),
        }
    }

    /// That there is no store of a name, and what to do.
    pub async fn no_such_store(&self, name: &StoreName) -> ClientError {
        let known = async { self.manager().await.ok()?.list_stores().await.ok() };
        let known = in_time(known).await.ok().flatten().unwrap_or_default();
        let known: Vec<String> = known.into_iter().map(|(name, ..)| name).collect();
        ClientError::Daemon(no_such_store(name.as_str(), &known, &declared_names(Path::new(DEFAULT_PATH))))
    }

    /// The properties of all stores, in one call.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn all(&self) -> Result<Vec<Properties>, ClientError> {
        Ok(in_time(managed(&self.connection, BUS_NAME.try_into()?)).await??.0)
    }
}

/// All stores, by name, and all jobs.
async fn managed(
    connection: &Connection,
    daemon: BusName<'_>,
) -> Result<(Vec<Properties>, Vec<JobProperties>), ClientError> {
    let interface = Some("org.freedesktop.DBus.ObjectManager");
    let reply = connection.call_method(Some(daemon), MANAGER_PATH, interface, "GetManagedObjects", &()).await?;
    let body = reply.body();
    let objects: HashMap<OwnedObjectPath, Interfaces> =
        body.deserialize().map_err(|error| ClientError::Answer(error.to_string()))?;
    let (mut stores, mut jobs) = (Vec::new(), Vec::new());
    for interfaces in objects.into_values() {
        stores.extend(interfaces.store);
        jobs.extend(interfaces.job);
    }
    stores.sort_by(|a, b| a.name.cmp(&b.name));
    Ok((stores, jobs))
}

/// Whoever has written a store into the file most often has not told the daemon; else a name was misspelt.
fn no_such_store(name: &str, known: &[String], declared: &[String]) -> String {
    let of = |names: &[String]| nearest(name, names.iter().map(String::as_str)).map(str::to_owned);
    if declared.iter().any(|declared| declared == name) {
        format!(
            "there is no store {name:?} yet, because the daemon has not read it in {DEFAULT_PATH}; run `layered-stores reload`"
        )
    } else if let Some(meant) = of(known) {
        format!("there is no store {name:?}; did you mean {meant:?}?")
    } else if let Some(meant) = of(declared) {
        format!(
            "there is no store {name:?}; if you mean {meant:?} of {DEFAULT_PATH}, run `layered-stores reload` first"
        )
    } else {
        format!("there is no store {name:?}; `layered-stores list` names those there are")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_that_is_not_there_may_be_unread_or_misspelt() {
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        for (known, declared, says) in [
            (&[][..], &["builds"][..], "run `layered-stores reload`"),
            (&["build"], &["build", "builds"], "run `layered-stores reload`"),
            (&["build", "other"], &["build"], "did you mean \"build\"?"),
            (&["other"], &["build"], "if you mean \"build\""),
            (&["other"], &[], "`layered-stores list`"),
        ] {
            let said = no_such_store("builds", &names(known), &names(declared));
            assert!(said.contains(says), "{said}");
        }
    }
}
