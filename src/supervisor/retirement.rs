//! Superblocks that were swapped out, until they take no more writes.

use std::{sync::Arc, time::Duration};

use layered_stores_model::{StoreName, StoreSpec};
use layered_stores_overlay::swap::{OldMount, OldSuperblock};
use tokio::{sync::watch, task::JoinSet};

use super::machine::{Machine, SwappedOut};

/// Waiting times between two tries, while a process has a file open for writing.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MOST: Duration = Duration::from_secs(60);

/// How long the end of the daemon waits for them: the rest of [`OldMount::GRACE`], and what the kernel takes.
const LAST: Duration = Duration::from_secs(2);

/// All superblocks that were swapped out and still take writes.
#[derive(Debug)]
pub(super) struct Retirements {
    machine: Arc<dyn Machine>,
    tasks: JoinSet<()>,
    ends: watch::Sender<bool>,
}

impl Retirements {
    pub(super) fn new(machine: Arc<dyn Machine>) -> Self {
        Self { machine, tasks: JoinSet::new(), ends: watch::Sender::new(false) }
    }

    /// Brings the second half of a swap to its end, after [`OldMount::GRACE`].
    pub(super) fn add(&mut self, name: StoreName, old: Arc<dyn SwappedOut>, spec: Arc<StoreSpec>) {
        self.begin(name, old, Some(spec), OldMount::GRACE);
    }

    /// Does so for one that an earlier run has left, of a store that may not be known any more.
    pub(super) fn take_over(&mut self, name: StoreName, old: Arc<dyn SwappedOut>, spec: Option<Arc<StoreSpec>>) {
        tracing::info!(store = %name, "{name}: an earlier run has swapped a mount out and left it to this one");
        self.begin(name, old, spec, Duration::ZERO);
    }

    fn begin(&mut self, name: StoreName, old: Arc<dyn SwappedOut>, spec: Option<Arc<StoreSpec>>, grace: Duration) {
        while self.tasks.try_join_next().is_some() {}
        let (machine, ends) = (Arc::clone(&self.machine), self.ends.subscribe());
        self.tasks.spawn(async move {
            tokio::time::sleep(grace).await;
            retire(&*machine, &name, old, spec, ends).await;
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

async fn retire(
    machine: &dyn Machine,
    name: &StoreName,
    old: Arc<dyn SwappedOut>,
    spec: Option<Arc<StoreSpec>>,
    mut ends: watch::Receiver<bool>,
) {
    let mut pause = RETRY_FIRST;
    let mut said = None;
    loop {
        let why = match machine.retire(spec.as_ref(), Arc::clone(&old)).result.await {
            Ok(OldSuperblock::Retired) => {
                tracing::debug!(store = %name, "{name}: the mount that was swapped out is read-only");
                break;
            }
            Ok(OldSuperblock::StillMounted) => break,
            Ok(OldSuperblock::StillWritten) => "a process goes on writing through it".to_owned(),
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
    machine.let_go(name, old.number());
}
