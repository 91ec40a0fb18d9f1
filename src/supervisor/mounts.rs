//! Noticing that the mount table of PID 1's namespace changes.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _},
    os::fd::OwnedFd,
    sync::{Mutex, PoisonError},
};

use layered_stores_overlay::{host, mountinfo::MountTable};
use tokio::io::{Interest, unix::AsyncFd};

/// The mount table as it changes.
#[derive(Debug)]
pub(super) struct MountMonitor {
    file: File,
    /// The same open file: what counts as a change is relative to the last time it was waited for.
    readiness: AsyncFd<OwnedFd>,
    /// What was read last, to be read into again.
    text: Mutex<Vec<u8>>,
}

impl MountMonitor {
    /// Opens the table on a thread in PID 1's mount namespace; read elsewhere, it goes on showing that namespace.
    pub(super) async fn open() -> io::Result<Self> {
        let file = tokio::task::spawn_blocking(|| File::open("/proc/thread-self/mountinfo")).await??;
        // The kernel signals a change as "exceptional condition" (proc_pid_mounts(5)).
        let readiness = host::readiness(file.try_clone()?.into(), Interest::PRIORITY | Interest::ERROR)?;
        Ok(Self { file, readiness, text: Mutex::default() })
    }

    /// Waits until the table has changed since the last time it was waited for.
    pub(super) async fn changed(&self) -> io::Result<()> {
        let mut guard = self.readiness.ready(Interest::PRIORITY | Interest::ERROR).await?;
        guard.clear_ready();
        Ok(())
    }

    /// Reads the table. A millisecond for a thousand mounts, so it is done on the spot: what is read is never older than
    /// the operations that have finished.
    pub(super) fn read(&self, is_of_interest: impl Fn(&str) -> bool) -> io::Result<MountTable> {
        let mut text = self.text.lock().unwrap_or_else(PoisonError::into_inner);
        text.clear();
        let mut file = &self.file;
        file.rewind()?;
        file.read_to_end(&mut text)?;
        Ok(MountTable::parse(&String::from_utf8_lossy(&text), is_of_interest))
    }
}
