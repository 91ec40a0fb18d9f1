//! The transient socket unit of a store's Nix daemon.
//!
//! It is bound to the store's mount, and the daemon's service (`layered-stores-nix-daemon@.service`) to the socket, so that
//! both end before the store does, whoever ends it.

use layered_stores_model::{MountUnitName, NixDaemon, StoreName};
use zbus::wire::Variant;

use super::{
    jobs::JobResult,
    manager::{self, ServiceProxy},
    nix_daemon_unit::service,
    units::{Units, is_named},
};

/// How often a socket that is on its way down, or whose mount systemd has not noticed yet, is waited for.
const ATTEMPTS: u32 = 50;
const PAUSE: std::time::Duration = std::time::Duration::from_millis(100);

/// The socket of a store's Nix daemon is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// systemd refused the call.
    #[error("systemd refuses to {0} {1}: {2}")]
    Refused(&'static str, String, Box<zbus::Error>),
    /// The job ended otherwise than well.
    #[error("the job to {0} {1} did not succeed: {2}; see `journalctl -u '{1}'`")]
    Job(&'static str, String, JobResult),
    /// systemd did not say in time what came of the job.
    #[error("systemd has not said what came of the job to {0} {1}")]
    NoAnswer(&'static str, String),
    /// Somebody else's drop-in has the service run as another user.
    #[error(
        "{unit} would run as {found:?} and not as uid {wanted}; take User= out of its drop-ins (see `systemctl cat '{unit}'`)"
    )]
    OtherUser {
        /// The service.
        unit: String,
        /// As whom.
        found: String,
        /// As whom it should.
        wanted: u32,
    },
}

/// The socket unit of a store's Nix daemon.
fn socket_unit(store: &StoreName) -> String {
    format!("layered-stores-nix-daemon@{store}.socket")
}

impl Units {
    /// Makes and starts the socket of a store's Nix daemon. One that listens already is taken for right: the caller knows
    /// whether anything about it has changed. `was_same`: so is one that was stopped and is still loaded, as it is while builds
    /// of the daemon run.
    ///
    /// # Errors
    /// [`SocketError`]; nobody can connect then.
    pub async fn start_socket(
        &self,
        store: &StoreName,
        daemon: &NixDaemon,
        mount: &MountUnitName,
        was_same: bool,
    ) -> Result<(), SocketError> {
        const DOING: &str = "start";
        let unit = socket_unit(store);
        for attempt in 1.. {
            let started = {
                let _call = self.calls.acquire().await;
                let properties = properties(store, daemon, mount);
                manager::answer(self.manager.start_transient_unit(&unit, "fail", properties, &[])).await
            };
            let error = match started {
                Ok(job) => return self.socket_job(job, DOING, unit).await,
                Err(error) => error,
            };
            if is_named(&error, "org.freedesktop.systemd1.UnitExists") {
                if self.is_active(&unit).await {
                    return Ok(());
                }
                // One that failed keeps its name until it is reset.
                let _ = manager::answer(self.manager.reset_failed_unit(&unit)).await;
                if was_same && let Ok(job) = manager::answer(self.manager.start_unit(&unit, "fail")).await {
                    return self.socket_job(job, DOING, unit).await;
                }
            }
            if attempt == ATTEMPTS {
                return Err(SocketError::Refused(DOING, unit, Box::new(error)));
            }
            tokio::time::sleep(PAUSE).await;
        }
        unreachable!("the last attempt returns")
    }

    /// Stops the socket of a store's Nix daemon and, with it, the daemon. Connections that are open stay.
    ///
    /// # Errors
    /// [`SocketError`].
    pub async fn stop_socket(&self, store: &StoreName) -> Result<(), SocketError> {
        self.stop_part(socket_unit(store)).await
    }

    /// Stops a store's Nix daemon; the next connection starts it again. Connections that are open stay.
    ///
    /// # Errors
    /// [`SocketError`].
    pub async fn stop_nix_daemon(&self, store: &StoreName) -> Result<(), SocketError> {
        self.stop_part(service(store)).await
    }

    /// Ends all processes of a store's Nix daemon, open connections and builds among them.
    pub async fn kill_nix_daemon(&self, store: &StoreName) {
        let _call = self.calls.acquire().await;
        // Most of the time there is none.
        let _ = manager::answer(self.manager.kill_unit(&service(store), "all", rustix::process::Signal::KILL.as_raw()))
            .await;
    }

    /// Makes sure that systemd will start a store's Nix daemon as the user whom its drop-in names.
    ///
    /// It reads drop-ins when it loads a unit. One that is loaded already, as it is while builds run, is read anew only with
    /// all others.
    ///
    /// # Errors
    /// [`SocketError`].
    pub async fn check_user(&self, store: &StoreName, wanted: u32) -> Result<(), SocketError> {
        let unit = service(store);
        let wanted_user = if wanted == 0 { String::new() } else { wanted.to_string() };
        let refused = |doing| {
            let unit = unit.clone();
            move |error| SocketError::Refused(doing, unit, Box::new(error))
        };
        let mut found = self.user_of(&unit).await.map_err(refused("tell of"))?;
        if found != wanted_user {
            {
                let _reloading = self.reloading.lock().await;
                manager::answer(self.manager.reload()).await.map_err(refused("read its units anew for"))?;
            }
            found = self.user_of(&unit).await.map_err(refused("tell of"))?;
            // Run as somebody else it has failed, maybe too often to be started again.
            let _ = manager::answer(self.manager.reset_failed_unit(&unit)).await;
        }
        // Whoever runs root's daemon as somebody else gives it less than it might have.
        if found == wanted_user || wanted == 0 { Ok(()) } else { Err(SocketError::OtherUser { unit, found, wanted }) }
    }

    async fn user_of(&self, unit: &str) -> zbus::Result<String> {
        let _call = self.calls.acquire().await;
        let path = manager::answer(self.manager.load_unit(unit)).await?;
        let service = ServiceProxy::builder(self.manager.inner().connection())
            .path(path)
            .cache_properties(zbus::proxy::CacheProperties::No)
            .build()
            .await?;
        manager::answer(service.user()).await
    }

    async fn stop_part(&self, unit: String) -> Result<(), SocketError> {
        const DOING: &str = "stop";
        let stopped = {
            let _call = self.calls.acquire().await;
            manager::answer(self.manager.stop_unit(&unit, "replace")).await
        };
        match stopped {
            Ok(job) => self.socket_job(job, DOING, unit).await,
            Err(error) if is_named(&error, "org.freedesktop.systemd1.NoSuchUnit") => Ok(()),
            Err(error) => Err(SocketError::Refused(DOING, unit, Box::new(error))),
        }
    }

    async fn is_active(&self, unit: &str) -> bool {
        let units = manager::answer(self.manager.list_units_by_patterns(&[], &[unit])).await.unwrap_or_default();
        units.iter().any(|(name, _, _, active, ..)| name == unit && active == "active")
    }

    pub(super) async fn socket_job(
        &self,
        job: zbus::wire::OwnedObjectPath,
        doing: &'static str,
        unit: String,
    ) -> Result<(), SocketError> {
        match self.jobs.result(job).await {
            Some(JobResult::Done) => Ok(()),
            Some(result) => Err(SocketError::Job(doing, unit, result)),
            None => Err(SocketError::NoAnswer(doing, unit)),
        }
    }
}

fn properties(store: &StoreName, daemon: &NixDaemon, mount: &MountUnitName) -> super::manager::Properties<'static> {
    let mount = vec![mount.to_string()];
    let listen = vec![("Stream".to_owned(), daemon.socket_path.to_string())];
    vec![
        ("Description", Variant::from(format!("Nix Daemon Socket of the Layered Store {store}"))),
        ("Listen", Variant::from(listen)),
        ("SocketMode", Variant::from(daemon.socket_mode)),
        ("RemoveOnStop", Variant::from(true)),
        ("BindsTo", Variant::from(mount.clone())),
        ("After", Variant::from(mount)),
    ]
}
