//! The work on jobs: called off with them, and joined when the daemon goes down.

use std::{sync::Arc, time::Duration};

use layered_stores_overlay::progress::{Progress, Spot};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// How long the end of all work is waited for. What does not end by then hangs in a filesystem.
const JOIN: Duration = Duration::from_millis(500);

/// All work on jobs.
#[derive(Debug, Default)]
pub(in crate::supervisor) struct Works {
    tracker: TaskTracker,
    all: CancellationToken,
}

impl Works {
    /// What calls the work of one job off.
    pub(super) fn token(&self) -> CancellationToken {
        self.all.child_token()
    }

    /// Follows work until it is done or called off. `None`: it was called off before it had a thread.
    pub(in crate::supervisor) fn follow<F: Future>(
        &self,
        cancel: CancellationToken,
        progress: Arc<Progress>,
        work: F,
    ) -> impl Future<Output = Option<F::Output>> + use<F> {
        self.tracker.track_future(async move {
            let mut work = Box::pin(work);
            tokio::select! {
                done = &mut work => return Some(done),
                () = cancel.cancelled() => progress.call_off(),
            }
            if has_thread(&progress) {
                // It holds its place until it comes back, or others would find a thread too many there.
                return Some(work.await);
            }
            drop(work);
            progress.rest();
            None
        })
    }

    /// Calls all work off and waits until it has come back, or for as long as that makes sense.
    pub(super) async fn join(&self) {
        self.all.cancel();
        self.tracker.close();
        if tokio::time::timeout(JOIN, self.tracker.wait()).await.is_err() {
            tracing::warn!(jobs = self.tracker.len(), "jobs hang and are left behind: {}", self.tracker.len());
        }
    }
}

fn has_thread(progress: &Progress) -> bool {
    progress.spot().is_some_and(|(spot, _)| spot != Spot::Others)
}
