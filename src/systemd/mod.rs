//! PID 1's side: mount units and their jobs, over D-Bus.

mod jobs;
mod manager;
mod mount_unit;
mod socket;

pub use jobs::{JobResult, UnitError, Units};
pub use mount_unit::is_transient;
pub use socket::{SocketError, socket_unit};
