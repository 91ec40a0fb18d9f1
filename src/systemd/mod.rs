//! PID 1's side: mount units, what systemd knows of them, their jobs, and sockets, over D-Bus.

mod fd_store;
mod index;
mod jobs;
mod known;
mod manager;
pub mod mount_unit;
pub mod nix_daemon_unit;
mod socket;
mod sockets;
mod units;

pub use fd_store::{FdStore, left_over};
pub use index::IndexError;
pub use jobs::JobResult;
pub use socket::SocketError;
pub use sockets::{SocketChanges, SocketState};
pub use units::{Clear, Seen, UnitError, Units};
