//! Our D-Bus API: thin, and without decisions of its own.

mod authorization;
mod error;
mod manager;
mod publisher;
mod store;

pub use publisher::Publisher;

/// The well-known name of the daemon.
pub const BUS_NAME: &str = "org.layeredstores1";

/// The object of the manager and of the ObjectManager.
pub const MANAGER_PATH: &str = "/org/layeredstores1";

/// The object of a store.
pub fn store_path(name: &crate::store::StoreName) -> zbus::wire::OwnedObjectPath {
    let path = format!("{MANAGER_PATH}/store/{}", name.bus_label());
    zbus::wire::ObjectPath::try_from(path).expect("an escaped label makes a valid path").into()
}
