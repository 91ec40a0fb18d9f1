//! Superblocks that were swapped out, until they take no more writes.

use std::{sync::Arc, time::Duration};

use layered_stores_model::StoreName;
use layered_stores_overlay::{
    progress::{self, Spot},
    refresh,
    swap::{OldMount, OldSuperblock, RetireError, SafeKeeping as _},
};
use tokio::{sync::watch, task::JoinSet};

use super::{operation::OperationError, threads::Errand};
use crate::systemd::FdStore;

/// Waiting times between two tries, while a process has a file open for writing.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MOST: Duration = Duration::from_secs(60);

/// How long the end of the daemon waits for them: the rest of [`OldMount::GRACE`], and what the kernel takes.
const LAST: Duration = Duration::from_secs(2);

/// All superblocks that were swapped out and still take writes.
#[derive(Debug)]
pub(super) struct Retirements {
    tasks: JoinSet<()>,
    ends: watch::Sender<bool>,
}

impl Retirements {
    pub(super) fn new() -> Self {
        Self { tasks: JoinSet::new(), ends: watch::Sender::new(false) }
    }

    /// Brings the second half of a swap to its end, after [`OldMount::GRACE`].
    pub(super) fn add(&mut self, name: StoreName, old: OldMount, errand: Errand) {
        self.begin(name, old, Some(errand), OldMount::GRACE);
    }

    /// Does so for one that an earlier run has left, of a store that may not be known any more.
    pub(super) fn take_over(&mut self, name: StoreName, old: OldMount, errand: Option<Errand>) {
        tracing::info!(store = %name, "{name}: an earlier run has swapped a mount out and left it to this one");
        self.begin(name, old, errand, Duration::ZERO);
    }

    fn begin(&mut self, name: StoreName, old: OldMount, errand: Option<Errand>, grace: Duration) {
        while self.tasks.try_join_next().is_some() {}
        let ends = self.ends.subscribe();
        self.tasks.spawn(async move {
            tokio::time::sleep(grace).await;
            retire(name, old, errand, ends).await;
        });
    }

    /// Makes what can be made of them before the daemon ends. PID 1 keeps the rest for the next run.
    pub(super) async fn finish(&mut self) {
        self.ends.send_replace(true);
        let all = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(LAST, all).await.is_err() {
            tracing::warn!(
                "a mount that was swapped out does not become read-only in time; the next run goes on with it"
            );
        }
    }
}

async fn retire(name: StoreName, old: OldMount, errand: Option<Errand>, mut ends: watch::Receiver<bool>) {
    let number = old.number();
    let old = Arc::new(old);
    let mut pause = RETRY_FIRST;
    let mut said = None;
    loop {
        let why = match attempt(Arc::clone(&old), errand.as_ref()).await {
            Ok(Ok(OldSuperblock::Retired)) => {
                tracing::debug!(store = %name, "{name}: the mount that was swapped out is read-only");
                break;
            }
            Ok(Ok(OldSuperblock::StillMounted)) => break,
            Ok(Ok(OldSuperblock::StillWritten)) => "a process goes on writing through it".to_owned(),
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        if said.as_ref() != Some(&why) {
            let what = "the mount that was swapped out does not become read-only";
            tracing::warn!(store = %name, "{name}: {what}: {why}; it is tried again");
            said = Some(why);
        }
        if *ends.borrow_and_update() {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = ends.changed() => {}
        }
        pause = (pause * 2).min(RETRY_MOST);
    }
    FdStore(&name).let_go(number);
}

async fn attempt(
    old: Arc<OldMount>,
    errand: Option<&Errand>,
) -> Result<Result<OldSuperblock, RetireError>, OperationError> {
    let Some(errand) = errand else {
        let retired = tokio::task::spawn_blocking(move || old.retire()).await;
        return retired.map_err(|error| OperationError::Panic(error.to_string()));
    };
    let spec = Arc::clone(&errand.spec);
    let retire = move || {
        progress::at(Spot::Upper);
        let retired = old.retire();
        // Calls that were under way in the old superblock may have changed what the new one has looked at since.
        // The store may have been stopped by now.
        let _ = refresh::reconfigure_store(&spec.layers, None);
        Ok(retired)
    };
    errand.run(retire).await
}
