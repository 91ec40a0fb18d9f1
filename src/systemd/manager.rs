//! The part of `org.freedesktop.systemd1.Manager` that is used (org.freedesktop.systemd1(5)).

use std::{io, time::Duration};

use zbus::{
    proxy,
    wire::{OwnedObjectPath, Variant},
};

/// How long systemd and the bus may take to answer a call. They answer at once as a rule; PID 1 of systemd 257 was seen to
/// fall asleep for 15 s.
const CALL_TIMEOUT: Duration = Duration::from_secs(45);

/// Awaits the answer to a call, for so long. Also that it can be sent: a bus that does not read takes no more calls either.
pub(super) async fn answer<T>(call: impl Future<Output = zbus::Result<T>>) -> zbus::Result<T> {
    answer_within(CALL_TIMEOUT, call).await
}

async fn answer_within<T>(patience: Duration, call: impl Future<Output = zbus::Result<T>>) -> zbus::Result<T> {
    tokio::time::timeout(patience, call).await.unwrap_or_else(|_| {
        let text = format!("systemd has not answered for {} s; see `systemctl status`", patience.as_secs());
        Err(zbus::Error::from(io::Error::new(io::ErrorKind::TimedOut, text)))
    })
}

/// Properties of a unit, by name.
pub(super) type Properties<'a> = Vec<(&'a str, Variant<'a>)>;

/// What systemd tells of a unit: name, description, load state, active state, sub state, the unit it follows, its object,
/// and number, type and object of its job.
pub(super) type ListedUnit =
    (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);

#[proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1"
)]
pub(super) trait Manager {
    #[zbus(property)]
    fn unit_path(&self) -> zbus::Result<Vec<String>>;

    #[zbus(property)]
    fn soft_reboots_count(&self) -> zbus::Result<u32>;

    fn list_units_by_patterns(&self, states: &[&str], patterns: &[&str]) -> zbus::Result<Vec<ListedUnit>>;

    fn load_unit(&self, name: &str) -> zbus::Result<OwnedObjectPath>;

    fn reload(&self) -> zbus::Result<()>;

    fn subscribe(&self) -> zbus::Result<()>;

    fn start_transient_unit(
        &self,
        name: &str,
        mode: &str,
        properties: Properties<'_>,
        aux: &[(&str, Properties<'_>)],
    ) -> zbus::Result<OwnedObjectPath>;

    fn start_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;

    fn stop_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;

    fn kill_unit(&self, name: &str, whom: &str, signal: i32) -> zbus::Result<()>;

    fn reset_failed_unit(&self, name: &str) -> zbus::Result<()>;

    #[zbus(signal)]
    fn job_removed(&self, id: u32, job: OwnedObjectPath, unit: String, result: String) -> zbus::Result<()>;
}

#[proxy(interface = "org.freedesktop.systemd1.Service", default_service = "org.freedesktop.systemd1")]
pub(super) trait Service {
    #[zbus(property)]
    fn user(&self) -> zbus::Result<String>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_systemd_that_does_not_answer_is_an_error() {
        let patience = Duration::from_millis(50);
        let error = answer_within::<()>(patience, std::future::pending()).await.expect_err("no answer").to_string();
        assert!(error.contains("has not answered"), "{error}");
        assert!(answer_within(Duration::from_secs(60), std::future::ready(Ok(()))).await.is_ok());
    }
}
