//! Having the daemon there, and finding out why it is not.
//!
//! The bus starts the daemon for whoever asks for it, and tells only after 25 s that this failed, and not why. systemd knows
//! at once. Until these 25 s are over the bus has whoever asks next wait for that same start, and does not ask systemd again
//! (dbus-daemon, `bus_activation_activate_service`): root asks systemd itself, and others are told how that start ended.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use zbus::{
    Connection, fdo,
    names::WellKnownName,
    proxy,
    wire::{DeserializeDict, OwnedObjectPath, Type},
};

use crate::BUS_NAME;
use crate::client::ClientError;

/// How long systemd may take to answer.
const SYSTEMD_PATIENCE: Duration = Duration::from_secs(5);

/// How often systemd is asked while the daemon starts.
const PAUSE: Duration = Duration::from_millis(100);

/// How long the bus waits for the daemon, and root as well.
const START_PATIENCE: Duration = Duration::from_secs(25);

/// How long the bus and systemd may take to begin with a start. A daemon that has not been started again by then, and had
/// failed before, is one for which the bus waits in vain.
const BEGIN_PATIENCE: Duration = Duration::from_secs(2);

/// The daemon's unit.
const UNIT: &str = "layered-storesd.service";
const UNIT_PATH: &str = "/org/freedesktop/systemd1/unit/layered_2dstoresd_2eservice";

/// How often it may fail before it is given up on.
const TRIES: u32 = 2;

/// `EX_CONFIG` of sysexits.h, with which the daemon ends when its configuration is wrong.
const EX_CONFIG: i32 = 78;

#[proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1"
)]
trait SystemdManager {
    fn start_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
}

/// What systemd knows about the daemon.
#[derive(DeserializeDict, Type)]
#[zbus(signature = "a{sv}", rename_all = "PascalCase")]
struct Unit {
    active_state: String,
    unit_file_state: String,
    #[zbus(rename = "InvocationID")]
    invocation_id: Vec<u8>,
    n_restarts: u32,
    result: String,
    exec_main_status: i32,
    status_text: String,
}

impl Unit {
    /// `None` if systemd does not answer, or knows of no such unit.
    async fn look(connection: &Connection) -> Option<Self> {
        let asked = timeout(SYSTEMD_PATIENCE, Self::ask(connection)).await;
        asked.ok()?.ok()
    }

    async fn ask(connection: &Connection) -> zbus::Result<Self> {
        // All in one answer, of all interfaces (""), as systemctl asks: between two, a daemon that has failed may be started
        // again, and half of one run with half of another tells of a failure that there never was.
        let interface = Some("org.freedesktop.DBus.Properties");
        let call = connection.call_method(Some("org.freedesktop.systemd1"), UNIT_PATH, interface, "GetAll", &("",));
        call.await?.body().deserialize()
    }

    /// Why it will not come up, if it has failed since `before`, or is not going to be started again. `said` is what it has said
    /// last: that is gone when it is started again.
    fn failure(&self, before: Option<&Self>, said: &str, has_to_have_begun: bool) -> Option<ClientError> {
        match self.unit_file_state.as_str() {
            "masked" => return Some(ClientError::Masked { unmask: "unmask" }),
            "masked-runtime" => return Some(ClientError::Masked { unmask: "unmask --runtime" }),
            _ => {}
        }
        let is_new = before.is_none_or(|before| before.invocation_id != self.invocation_id);
        let gave_up = self.active_state == "failed" && (is_new || has_to_have_begun);
        let tries = self.n_restarts.saturating_sub(before.map_or(0, |before| before.n_restarts));
        if !gave_up && tries < TRIES {
            return None;
        }
        Some(match (said, self.exec_main_status) {
            // systemd forgets the result with the next try.
            ("", _) if self.result == "success" => {
                ClientError::NoDaemon("it ends again and again before it is up".to_owned())
            }
            ("", _) => ClientError::NoDaemon(format!("it failed, with systemd's result {:?}", self.result)),
            (said, EX_CONFIG) => ClientError::Configuration(said.to_owned()),
            (said, _) => ClientError::NoDaemon(said.to_owned()),
        })
    }
}

/// A start of the daemon, as systemd tells of it.
struct Start {
    before: Option<Unit>,
    began: Instant,
    /// What the daemon has said last.
    said: String,
}

impl Start {
    async fn begin(connection: &Connection) -> Self {
        Self { before: Unit::look(connection).await, began: Instant::now(), said: String::new() }
    }

    /// Why it will not come up, as far as that can be told yet. `by_bus`: it was the bus that was asked for it, which may not have
    /// asked systemd.
    async fn failure(&mut self, connection: &Connection, by_bus: bool) -> Option<ClientError> {
        let has_to_have_begun = by_bus && self.began.elapsed() > BEGIN_PATIENCE;
        self.failure_by_now(connection, has_to_have_begun).await
    }

    /// The same, if it `has_to_have_begun`: then an earlier failure is the one.
    async fn failure_by_now(&mut self, connection: &Connection, has_to_have_begun: bool) -> Option<ClientError> {
        let unit = Unit::look(connection).await?;
        if !unit.status_text.is_empty() {
            self.said.clone_from(&unit.status_text);
        }
        unit.failure(self.before.as_ref(), &self.said, has_to_have_begun)
    }
}

/// Whether the daemon runs.
pub(super) async fn is_running(connection: &Connection) -> Result<bool, ClientError> {
    let name = WellKnownName::try_from(BUS_NAME)?;
    Ok(fdo::DBusProxy::new(connection).await?.name_has_owner(name.into()).await?)
}

/// Starts the daemon if it is not running, and returns when it can be asked.
pub(super) async fn reach(connection: &Connection) -> Result<(), ClientError> {
    if is_running(connection).await? {
        return Ok(());
    }
    let is_root = rustix::process::geteuid().is_root();
    let mut watched = Start::begin(connection).await;
    if let Some(error @ ClientError::Masked { .. }) =
        watched.before.as_ref().and_then(|unit| unit.failure(Some(unit), "", false))
    {
        return Err(error);
    }
    let start = start(connection, is_root);
    tokio::pin!(start);
    let mut is_asked = false;
    while watched.began.elapsed() < START_PATIENCE + SYSTEMD_PATIENCE {
        tokio::select! {
            started = &mut start, if !is_asked => match started {
                Ok(()) => is_asked = true,
                // The bus may have given up on the start that an earlier caller has asked for.
                Err(error) => return Err(watched.failure_by_now(connection, !is_root).await.unwrap_or(error)),
            },
            () = sleep(PAUSE) => {}
        }
        if is_running(connection).await? {
            return Ok(());
        }
        if let Some(error) = watched.failure(connection, !is_root).await {
            return Err(error);
        }
    }
    Err(ClientError::NoDaemon(format!("it is not up after {} s", watched.began.elapsed().as_secs())))
}

/// Waits until it is certain that a daemon which somebody has asked for does not come before a person has done something about
/// it, and returns why.
pub async fn why_it_cannot_come(connection: &Connection) -> String {
    let mut start = Start::begin(connection).await;
    loop {
        sleep(PAUSE).await;
        let failure = start.failure(connection, true).await;
        if let Some(error @ (ClientError::Configuration(_) | ClientError::Masked { .. })) = failure {
            return error.to_string();
        }
    }
}

/// Asks for the daemon. For root, returns when it is being started; for others, when it is there.
async fn start(connection: &Connection, is_root: bool) -> Result<(), ClientError> {
    if is_root {
        let systemd = SystemdManagerProxy::new(connection).await?;
        let asked = timeout(START_PATIENCE, systemd.start_unit(UNIT, "replace")).await;
        asked.map_err(|_| ClientError::NoDaemon("systemd does not answer".to_owned()))??;
    } else {
        let bus = fdo::DBusProxy::new(connection).await?;
        bus.start_service_by_name(WellKnownName::try_from(BUS_NAME)?, 0).await?;
    }
    Ok(())
}
