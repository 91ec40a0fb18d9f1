//! The jobs systemd carries out, and what comes of them.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::StreamExt;
use tokio::sync::oneshot;
use zbus::wire::OwnedObjectPath;

use super::manager::{JobRemovedStream, ManagerProxy};

/// How long a job may take: systemd's own 90 s for a mount, and some more for what it waits for.
pub(super) const JOB_TIMEOUT: Duration = Duration::from_secs(120);

/// How many results of jobs that nobody has asked for yet are kept. Other clients' jobs are among them.
const UNCLAIMED: usize = 4096;

/// What came of a job (`result` of `JobRemoved`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobResult {
    /// The unit is as it was asked to be.
    Done,
    /// The unit's own process failed.
    Failed,
    /// A unit it requires failed.
    Dependency,
    /// It took too long.
    Timeout,
    /// Another job took its place, such as that of a shutdown.
    Canceled,
    /// Something else.
    Other(String),
}

impl From<String> for JobResult {
    fn from(result: String) -> Self {
        match result.as_str() {
            "done" => Self::Done,
            "failed" => Self::Failed,
            "dependency" => Self::Dependency,
            "timeout" => Self::Timeout,
            "canceled" => Self::Canceled,
            _ => Self::Other(result),
        }
    }
}

impl fmt::Display for JobResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Dependency => "a unit it requires failed",
            Self::Timeout => "it took too long",
            Self::Canceled => "another job took its place",
            Self::Other(result) => result,
        })
    }
}

/// Job results on their way to those who wait for them.
#[derive(Debug, Default)]
struct Results {
    waiting: HashMap<OwnedObjectPath, oneshot::Sender<JobResult>>,
    /// A signal may be handled before the reply that names its job.
    unclaimed: VecDeque<(OwnedObjectPath, JobResult)>,
}

/// The jobs that were asked for.
#[derive(Clone, Debug)]
pub(super) struct Jobs(Arc<Mutex<Results>>);

impl Jobs {
    /// Starts to listen for the ends of jobs.
    ///
    /// systemd sends `JobRemoved` to the client that made the job even if it never subscribed, so that the flood of
    /// signals a subscription brings stays away.
    pub(super) async fn listen(manager: &ManagerProxy<'_>) -> zbus::Result<Self> {
        let removed = manager.receive_job_removed().await?;
        let results = Arc::<Mutex<Results>>::default();
        tokio::spawn(dispatch(removed, Arc::clone(&results)));
        Ok(Self(results))
    }

    /// Waits for the end of a job; `None` after [`JOB_TIMEOUT`].
    pub(super) async fn result(&self, job: OwnedObjectPath) -> Option<JobResult> {
        let receiver = {
            let mut results = lock(&self.0);
            if let Some(i) = results.unclaimed.iter().position(|(path, _)| *path == job) {
                return results.unclaimed.remove(i).map(|(_, result)| result);
            }
            let (sender, receiver) = oneshot::channel();
            results.waiting.insert(job.clone(), sender);
            receiver
        };
        let result = tokio::time::timeout(JOB_TIMEOUT, receiver).await.ok().and_then(Result::ok);
        if result.is_none() {
            lock(&self.0).waiting.remove(&job);
        }
        result
    }
}

async fn dispatch(mut removed: JobRemovedStream, results: Arc<Mutex<Results>>) {
    while let Some(signal) = removed.next().await {
        let Ok(args) = signal.args() else { continue };
        let result = JobResult::from(args.result().clone());
        let mut results = lock(&results);
        match results.waiting.remove(args.job()) {
            // Whoever waited may have given up in this instant.
            Some(waiting) => drop(waiting.send(result)),
            None => {
                results.unclaimed.push_back((args.job().clone(), result));
                let excess = results.unclaimed.len().saturating_sub(UNCLAIMED);
                results.unclaimed.drain(..excess);
            }
        }
    }
}

fn lock(results: &Mutex<Results>) -> std::sync::MutexGuard<'_, Results> {
    // Nothing that holds it can panic halfway through a change.
    results.lock().unwrap_or_else(PoisonError::into_inner)
}
