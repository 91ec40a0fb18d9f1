//! The part of `org.freedesktop.systemd1.Manager` that is used (org.freedesktop.systemd1(5)).

use zbus::{
    proxy,
    wire::{OwnedObjectPath, Variant},
};

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

    fn list_units_by_patterns(&self, states: &[&str], patterns: &[&str]) -> zbus::Result<Vec<ListedUnit>>;

    fn load_unit(&self, name: &str) -> zbus::Result<OwnedObjectPath>;

    fn reload(&self) -> zbus::Result<()>;

    fn start_transient_unit(
        &self,
        name: &str,
        mode: &str,
        properties: Properties<'_>,
        aux: &[(&str, Properties<'_>)],
    ) -> zbus::Result<OwnedObjectPath>;

    fn start_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;

    fn stop_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;

    fn reset_failed_unit(&self, name: &str) -> zbus::Result<()>;

    #[zbus(signal)]
    fn job_removed(&self, id: u32, job: OwnedObjectPath, unit: String, result: String) -> zbus::Result<()>;
}
