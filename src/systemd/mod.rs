//! PID 1's side: mount units, what systemd knows of them, their jobs, and sockets, over D-Bus.

mod jobs;
mod known;
mod manager;
pub mod mount_unit;
mod socket;
mod units;

pub use jobs::JobResult;
pub use socket::SocketError;
pub use units::{Clear, Seen, UnitError, Units};
