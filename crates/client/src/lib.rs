//! How programs speak to layered-storesd.
//!
//! [`Client`] speaks over D-Bus, and has the daemon started if it is not there. [`hook`] is the way of Nix's remount hook.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let client = layered_stores_client::Client::connect().await?;
//! client.store(&"ci".parse()?).await?.start().await?;
//! for store in client.all().await? {
//!     println!("{} is {}", store.name, store.state);
//! }
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod client;
pub mod hook;
mod job;
mod proxy;
mod reach;

use layered_stores_model::StoreName;
use zbus::wire::{ObjectPath, OwnedObjectPath};

pub use client::{Client, ClientError, Snapshot};
pub use job::Job;
pub use proxy::{JobProperties, JobProxy, ManagerProxy, Properties, StoreProxy};
pub use reach::why_it_cannot_come;

/// The well-known name of the daemon.
pub const BUS_NAME: &str = "org.layeredstores1";

/// The object of the manager and of the ObjectManager.
pub const MANAGER_PATH: &str = "/org/layeredstores1";

/// The object of a job.
pub fn job_path(id: u64) -> OwnedObjectPath {
    ObjectPath::try_from(format!("{MANAGER_PATH}/job/{id}")).expect("digits make a valid path").into()
}

/// The object of a store.
pub fn store_path(name: &StoreName) -> OwnedObjectPath {
    let path = format!("{MANAGER_PATH}/store/{}", name.bus_label());
    ObjectPath::try_from(path).expect("an escaped label makes a valid path").into()
}
