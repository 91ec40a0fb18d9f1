//! Looking after the sockets of stores' Nix daemons.

use std::collections::BTreeMap;

use layered_stores_model::StoreName;
use tokio::{sync::mpsc, time::Instant};

use super::Engine;
use crate::{
    supervisor::{
        entry::Op,
        handle::Command,
        plan::{Phase, Want},
        status::Problem,
    },
    systemd::{SocketState, Units},
};

/// Tells the engine how sockets are, each time one has changed.
pub(super) async fn watch(units: Units, commands: mpsc::WeakSender<Command>) {
    let mut changes = match units.socket_changes().await {
        Ok(changes) => changes,
        Err(error) => {
            tracing::warn!("what becomes of the sockets of Nix daemons goes unseen: {error}");
            return;
        }
    };
    loop {
        let (asked, sockets) = match changes.next().await {
            Ok(seen) => seen,
            Err(error) => {
                tracing::warn!("systemd does not tell how the sockets of Nix daemons are: {error}");
                continue;
            }
        };
        let Some(commands) = commands.upgrade() else { return };
        if commands.send(Command::Sockets(asked.into(), sockets)).await.is_err() {
            return;
        }
    }
}

impl Engine {
    /// Takes how sockets were at a time.
    pub(super) fn sockets_seen(&mut self, asked: Instant, sockets: &BTreeMap<StoreName, SocketState>) {
        let now = Instant::now();
        let mut failed = Vec::new();
        for (name, entry) in &mut self.entries {
            let is_served = entry.serving.had_daemon_at(asked)
                && entry.phase == Phase::Active
                && entry.want == Want::Up
                && entry.next.is_none()
                && entry.op != Some(Op::Serve);
            let why = match sockets.get(name) {
                Some(SocketState::Listening | SocketState::Changing) => continue,
                Some(SocketState::Failed(result)) => {
                    format!(
                        "systemd has given its socket up ({result}); see `journalctl -u layered-stores-nix-daemon@{name}`"
                    )
                }
                Some(SocketState::Stopped) | None => "somebody has stopped its socket".to_owned(),
            };
            if is_served {
                entry.serving.failed(now);
                entry.problem(Problem::DaemonFailed, format!("its Nix daemon: {why}; it is started again"));
                failed.push(name.clone());
            }
        }
        for name in failed {
            self.publish(&name);
        }
    }
}
