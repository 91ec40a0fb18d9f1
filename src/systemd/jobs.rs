//! Starting and stopping mount units and waiting for what comes of it.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::StreamExt;
use tokio::sync::{Semaphore, SemaphorePermit, oneshot};
use zbus::{Connection, wire::OwnedObjectPath};

use super::{
    manager::{JobRemovedStream, ManagerProxy},
    mount_unit,
};
use crate::store::{MountUnitName, StoreSpec};

/// How long a job may take: systemd's own 90 s for a mount, and some more for what it waits for.
const JOB_TIMEOUT: Duration = Duration::from_secs(120);

/// How many results of jobs that nobody has asked for yet are kept. Other clients' jobs are among them.
const UNCLAIMED: usize = 4096;

/// How many calls may be without an answer: dbus-daemon allows a connection 128 (`max_replies_per_connection`).
///
/// How many jobs are under way is not limited. PID 1 reads the whole mount table when a mount process has ended and it has
/// changed; with many processes at a time it reads once for many.
const CALLS: usize = 100;

/// How long a unit that systemd still believes to be up, or is about to take down, is waited for. systemd looks at the mount
/// table up to a second late, because it limits how often it does (`manager_enumerate` in `src/core/mount.c`).
const SETTLE_ATTEMPTS: u32 = 100;
const SETTLE_PAUSE: Duration = Duration::from_millis(100);

/// How often a unit of the same name has to be met before it counts as somebody else's. One of ours that systemd was about
/// to unload loses its file between the call and the look at it, and systemd keeps a unit for a mount that is gone until it
/// has noticed.
const FOREIGN_ATTEMPTS: u32 = 15;

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

/// A mount unit could not be brought where it should be.
#[derive(Debug, thiserror::Error)]
pub enum UnitError {
    /// systemd refused the call.
    #[error("systemd refuses to {doing} {unit}: {source}")]
    Refused {
        /// What was asked for.
        doing: &'static str,
        /// The unit.
        unit: MountUnitName,
        /// Its answer.
        source: Box<zbus::Error>,
    },
    /// A unit of this name exists that was not made by us.
    #[error(
        "a unit {0} that is not ours exists already (see `systemctl cat {quoted}`); \
         remove it from /etc/fstab or /etc/systemd/system, or name another root",
        quoted = .0.quoted()
    )]
    Exists(MountUnitName),
    /// The job ended otherwise than well.
    #[error("the job to {doing} {unit} did not succeed: {result}; see `journalctl -u {}`", .unit.quoted())]
    Job {
        /// What was asked for.
        doing: &'static str,
        /// The unit.
        unit: MountUnitName,
        /// What came of it.
        result: JobResult,
    },
    /// systemd did not say in time what came of the job.
    #[error("systemd has not said for {} s what came of the job to {doing} {unit}", JOB_TIMEOUT.as_secs())]
    NoAnswer {
        /// What was asked for.
        doing: &'static str,
        /// The unit.
        unit: MountUnitName,
    },
}

/// Job results on their way to those who wait for them.
#[derive(Debug, Default)]
struct Jobs {
    waiting: HashMap<OwnedObjectPath, oneshot::Sender<JobResult>>,
    /// A signal may be handled before the reply that names its job.
    unclaimed: VecDeque<(OwnedObjectPath, JobResult)>,
}

/// The mount units of the system.
#[derive(Clone, Debug)]
pub struct Units {
    manager: ManagerProxy<'static>,
    jobs: Arc<Mutex<Jobs>>,
    calls: Arc<Semaphore>,
}

impl Units {
    /// Starts to listen for the ends of jobs.
    ///
    /// systemd sends `JobRemoved` to the client that made the job even if it never subscribed, so that the flood of
    /// signals a subscription brings stays away.
    ///
    /// # Errors
    /// When the bus or systemd do not answer.
    pub async fn connect(connection: &Connection) -> zbus::Result<Self> {
        let manager =
            ManagerProxy::builder(connection).cache_properties(zbus::proxy::CacheProperties::No).build().await?;
        let removed = manager.receive_job_removed().await?;
        let jobs = Arc::<Mutex<Jobs>>::default();
        tokio::spawn(dispatch(removed, Arc::clone(&jobs)));
        Ok(Self { manager, jobs, calls: Arc::new(Semaphore::new(CALLS)) })
    }

    /// Starts the mount unit of a store and waits for its job.
    ///
    /// `is_mounted` is asked when systemd says that there is such a unit already: a daemon that was killed may have begun the
    /// job, or systemd may not have noticed yet that the mount is gone.
    ///
    /// # Errors
    /// [`UnitError`]; nothing is mounted then.
    pub async fn start<F>(&self, spec: &StoreSpec, is_mounted: impl Fn() -> F) -> Result<(), UnitError>
    where
        F: Future<Output = bool>,
    {
        const DOING: &str = "start";
        let unit = &spec.mount_unit;
        for attempt in 1.. {
            let source = match self.call_start(spec).await {
                Ok(job) => return self.wait(job, DOING, unit).await,
                Err(error) => error,
            };
            let exists = is_named(&source, "org.freedesktop.systemd1.UnitExists");
            if exists && attempt >= FOREIGN_ATTEMPTS && !mount_unit::is_transient(unit) {
                return Err(UnitError::Exists(unit.clone()));
            }
            // A stop is under way, of the unit or of the whole machine.
            let conflicts = is_named(&source, "org.freedesktop.systemd1.TransactionIsDestructive");
            if !(exists || conflicts) || attempt == SETTLE_ATTEMPTS {
                return Err(UnitError::Refused { doing: DOING, unit: unit.clone(), source: Box::new(source) });
            }
            if is_mounted().await {
                return Ok(());
            }
            tokio::time::sleep(SETTLE_PAUSE).await;
        }
        unreachable!("the last attempt returns")
    }

    async fn call_start(&self, spec: &StoreSpec) -> zbus::Result<OwnedObjectPath> {
        let unit = spec.mount_unit.as_str();
        let _call = self.calls.acquire().await;
        // "fail": never cancel somebody else's job, such as the stop of a shutdown.
        let start = || self.manager.start_transient_unit(unit, "fail", mount_unit::properties(spec), &[]);
        match start().await {
            Err(error) if is_named(&error, "org.freedesktop.systemd1.UnitExists") => {
                // A unit that failed keeps its name until it is reset. One that runs cannot be reset away.
                let _ = self.manager.reset_failed_unit(unit).await;
                start().await
            }
            result => result,
        }
    }

    /// Stops a mount unit and waits until it is unmounted.
    ///
    /// # Errors
    /// [`UnitError`]; it is still mounted then, most likely because it is in use.
    pub async fn stop(&self, unit: &MountUnitName) -> Result<(), UnitError> {
        const DOING: &str = "stop";
        let stopped = {
            let _call = self.calls.acquire().await;
            self.manager.stop_unit(unit.as_str(), "fail").await
        };
        match stopped {
            Ok(job) => self.wait(job, DOING, unit).await,
            Err(error) if is_named(&error, "org.freedesktop.systemd1.NoSuchUnit") => Ok(()),
            Err(source) => Err(UnitError::Refused { doing: DOING, unit: unit.clone(), source: Box::new(source) }),
        }
    }

    async fn wait(&self, job: OwnedObjectPath, doing: &'static str, unit: &MountUnitName) -> Result<(), UnitError> {
        match self.result(job).await {
            Some(JobResult::Done) => Ok(()),
            Some(result) => Err(UnitError::Job { doing, unit: unit.clone(), result }),
            None => Err(UnitError::NoAnswer { doing, unit: unit.clone() }),
        }
    }

    /// What comes of a job; `None` when systemd does not say in time.
    pub(super) async fn result(&self, job: OwnedObjectPath) -> Option<JobResult> {
        let result = {
            let mut jobs = lock(&self.jobs);
            match jobs.unclaimed.iter().position(|(path, _)| *path == job) {
                Some(i) => Ok(jobs.unclaimed.remove(i).map_or(JobResult::Done, |(_, result)| result)),
                None => {
                    let (sender, receiver) = oneshot::channel();
                    jobs.waiting.insert(job.clone(), sender);
                    Err(receiver)
                }
            }
        };
        let result = match result {
            Ok(result) => Some(result),
            Err(receiver) => tokio::time::timeout(JOB_TIMEOUT, receiver).await.ok().and_then(Result::ok),
        };
        if result.is_none() {
            lock(&self.jobs).waiting.remove(&job);
        }
        result
    }

    /// systemd's manager.
    pub(super) fn manager(&self) -> &ManagerProxy<'static> {
        &self.manager
    }

    /// Waits until one more call may be made, which it may while the result is held.
    pub(super) async fn call(&self) -> Option<SemaphorePermit<'_>> {
        self.calls.acquire().await.ok()
    }
}

async fn dispatch(mut removed: JobRemovedStream, jobs: Arc<Mutex<Jobs>>) {
    while let Some(signal) = removed.next().await {
        let Ok(args) = signal.args() else { continue };
        let result = JobResult::from(args.result().clone());
        let mut jobs = lock(&jobs);
        match jobs.waiting.remove(args.job()) {
            // Whoever waited may have given up in this instant.
            Some(waiting) => drop(waiting.send(result)),
            None => {
                jobs.unclaimed.push_back((args.job().clone(), result));
                let excess = jobs.unclaimed.len().saturating_sub(UNCLAIMED);
                jobs.unclaimed.drain(..excess);
            }
        }
    }
}

fn lock(jobs: &Mutex<Jobs>) -> std::sync::MutexGuard<'_, Jobs> {
    // Nothing that holds it can panic halfway through a change.
    jobs.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn is_named(error: &zbus::Error, name: &str) -> bool {
    matches!(error, zbus::Error::MethodError(found, ..) if found.as_str() == name)
}
