//! Looking after the sockets of stores' Nix daemons.

use std::collections::BTreeMap;

use layered_stores_model::StoreName;
use tokio::time::Instant;

use super::Engine;
use crate::{
    supervisor::{
        entry::Op,
        plan::{Phase, Want},
        status::Problem,
    },
    systemd::SocketState,
};

impl Engine {
    /// Takes how sockets were at a time.
    pub(super) fn sockets_seen(&mut self, asked: Instant, sockets: &BTreeMap<StoreName, SocketState>) {
        let now = Instant::now();
        let mut failed = Vec::new();
        for (name, entry) in &mut self.entries {
            let is_served = entry.serving.had_daemon_at(asked)
                && entry.phase == Phase::Active
                && entry.want == Want::Up
                && !entry.respecifies()
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
            if entry.serving.has_daemon_since(asked) {
                // What was made meanwhile may be gone already.
                self.machine.look_at_sockets();
            }
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
