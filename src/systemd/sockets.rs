//! Noticing what becomes of the sockets of stores' Nix daemons.
//!
//! systemd gives a socket up when the daemon behind it ends again and again (`service-start-limit-hit`), and anybody who may
//! can stop it.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::StreamExt as _;
use layered_stores_model::StoreName;
use tokio::sync::Notify;
use zbus::{
    MatchRule, MessageStream,
    fdo::PropertiesProxy,
    message,
    wire::{ObjectPath, OwnedObjectPath},
};

use super::{manager, units::Units};

const SOCKET: &str = "org.freedesktop.systemd1.Socket";
const PREFIX: &str = "layered-stores-nix-daemon@";
const SUFFIX: &str = ".socket";

/// What comes in this time is looked at together.
const GATHER: Duration = Duration::from_millis(100);

/// How a socket is that nobody can connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SocketState {
    /// systemd listens.
    Listening,
    /// On its way.
    Changing,
    /// Somebody has stopped it.
    Stopped,
    /// systemd has given it up, for a reason of systemd.socket(5).
    Failed(String),
}

/// Hears of changes of sockets.
pub struct SocketChanges {
    units: Units,
    changed: Arc<Notify>,
}

impl Units {
    /// Starts to listen for changes of sockets. Whoever notifies of one as well has them looked at.
    ///
    /// # Errors
    /// When the bus or systemd do not answer.
    pub async fn socket_changes(&self, changed: Arc<Notify>) -> zbus::Result<SocketChanges> {
        // Signals about the sockets of all units, which are few; those about other properties have another argument.
        let rule = MatchRule::builder()
            .msg_type(message::Type::Signal)
            .sender("org.freedesktop.systemd1")
            .interface("org.freedesktop.DBus.Properties")
            .member("PropertiesChanged")
            .path_namespace("/org/freedesktop/systemd1/unit")
            .arg(0, SOCKET)
            .build()?;
        let signals = MessageStream::for_match_rule(rule, self.manager.inner().connection(), None).await?;
        // Without this systemd says nothing, unless somebody else wants to know: as a rule, systemd-logind does.
        manager::answer(self.manager.subscribe()).await?;
        tokio::spawn(take_note(signals, Arc::clone(&changed)));
        Ok(SocketChanges { units: self.clone(), changed })
    }

    /// How the sockets of Nix daemons are. One that is missing is stopped.
    async fn sockets(&self) -> zbus::Result<BTreeMap<StoreName, SocketState>> {
        let pattern = format!("{PREFIX}*{SUFFIX}");
        let units = {
            let _call = self.calls.acquire().await;
            manager::answer(self.manager.list_units_by_patterns(&[], &[&pattern])).await?
        };
        let mut sockets = BTreeMap::new();
        for (name, _, _, active, _, _, path, ..) in units {
            let store = name.strip_prefix(PREFIX).and_then(|name| name.strip_suffix(SUFFIX));
            let Some(Ok(store)) = store.map(str::parse::<StoreName>) else { continue };
            let state = match active.as_str() {
                "active" => SocketState::Listening,
                "inactive" => SocketState::Stopped,
                "failed" => SocketState::Failed(self.socket_result(path).await.unwrap_or_default()),
                _ => SocketState::Changing,
            };
            sockets.insert(store, state);
        }
        Ok(sockets)
    }

    async fn socket_result(&self, path: OwnedObjectPath) -> zbus::Result<String> {
        let properties = PropertiesProxy::builder(self.manager.inner().connection())
            .destination("org.freedesktop.systemd1")
            .path(ObjectPath::from(path))
            .build()
            .await?;
        let result = properties.get(SOCKET.try_into()?, "Result");
        let result = manager::answer(async { Ok(result.await?) }).await?;
        String::try_from(result)
    }
}

impl SocketChanges {
    /// Waits for a change, and tells how all sockets are, and when that was asked.
    ///
    /// # Errors
    /// When systemd does not answer.
    pub async fn next(&mut self) -> zbus::Result<(Instant, BTreeMap<StoreName, SocketState>)> {
        self.changed.notified().await;
        tokio::time::sleep(GATHER).await;
        let asked = Instant::now();
        Ok((asked, self.units.sockets().await?))
    }
}

/// Takes signals as they come: while they wait in a full queue, no answer to a call is read either.
async fn take_note(mut signals: MessageStream, changed: Arc<Notify>) {
    while let Some(signal) = signals.next().await {
        if is_ours(&signal) {
            changed.notify_one();
        }
    }
}

/// Whether a signal may be about a socket of ours; object paths are escaped, `-` as `_2d` and `@` as `_40`.
fn is_ours(signal: &zbus::Result<zbus::Message>) -> bool {
    let Ok(signal) = signal else { return true };
    let header = signal.header();
    header.path().is_some_and(|path| path.as_str().contains("layered_2dstores_2dnix_2ddaemon_40"))
}
