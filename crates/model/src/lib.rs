//! What a layered store *is*: names, paths, URLs, the specification, the stack of stores.
//!
//! Nothing here does I/O: everything can be tested with values alone.
//!
//! ```
//! use layered_stores_model::config::{self, Defaults, Keys};
//!
//! let text = r#"
//!     [stores.ci]
//!     lower-store = "/mnt/base"
//! "#;
//! let defaults = Defaults {
//!     state_dir: "/var/lib/layered-stores".parse()?,
//!     remount_hook: "/usr/bin/layered-stores-remount".parse()?,
//! };
//! let stores = config::parse(text, &defaults, Keys::Alone).expect("no mistakes").stores;
//! assert_eq!(stores[0].layers.lower.as_str(), "/mnt/base/nix/store");
//! assert_eq!(stores[0].layers.merged.as_str(), "/var/lib/layered-stores/stores/ci/root/nix/store");
//! # Ok::<(), layered_stores_model::PathError>(())
//! ```

pub mod config;
mod declaration;
mod ephemeral;
#[cfg(any(test, feature = "test-util"))]
pub mod fixture;
mod leases;
mod lower;
mod mount_option;
mod name;
mod nix_daemon;
mod nixos_option;
mod path;
mod printable;
mod source;
mod spec;
mod stack;
mod unit_name;

pub use declaration::{Declaration, Terms};
pub use ephemeral::{Ephemeral, EphemeralSize, NoSize};
pub use leases::{Leases, LeasesError};
pub use lower::{LowerStore, LowerStoreError};
pub use mount_option::{MountOption, UnknownMountOption};
pub use name::{NameError, StoreName};
pub use nix_daemon::{MAX_SOCKET_PATH_LEN, NixDaemon, refuse_setting, refuse_user};
pub use path::{AbsolutePath, PathError};
pub use printable::{excerpt, printable, unprintable};
pub use source::Source;
pub use spec::{BUILD_USERS, Layers, Ownership, Service, StoreSpec, url_parameter};
pub use stack::{Conflict, MAX_DEPTH, Reason, nearest, stack};
pub use unit_name::{MountUnitName, UnitNameTooLong};

/// Where every Nix store this project layers believes its objects are.
///
/// Nix calls it the *store directory*; a store path is only valid below the one it was built for,
/// so all layers of one store have to share it.
pub const NIX_STORE_DIR: &str = "/nix/store";
