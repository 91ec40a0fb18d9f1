//! Bringing mount units where they should be.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use layered_stores_model::MountUnitName;
use tokio::sync::{Mutex, Semaphore};
use zbus::Connection;

use super::{
    jobs::{JOB_TIMEOUT, JobResult, Jobs},
    known::{Known, Looks},
    manager::{self, ManagerProxy},
    mount_unit,
};

/// How many calls may be without an answer: dbus-daemon allows a connection 128 (`max_replies_per_connection`).
const CALLS: usize = 100;

/// How long a unit that is on its way down, or that systemd has something else than our file of, is waited for.
const SETTLE_ATTEMPTS: u32 = 100;
const SETTLE_PAUSE: Duration = Duration::from_millis(100);

/// How often a unit that is not ours has to be met before it counts as more than what is left of a mount that is gone: then
/// systemd is told to read its units anew, and if that does not help, it is somebody's.
const REMNANT_ATTEMPTS: u32 = 3;
const FOREIGN_ATTEMPTS: u32 = 6;

/// How long systemd may take to see a mount, and how often it is looked whether that is still there. systemd limits how often
/// it reads the mount table: as a rule it has seen a mount after a second.
const SEE_TIMEOUT: Duration = Duration::from_secs(60);
const SEE_CHECK: Duration = Duration::from_secs(1);

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
    /// A unit does not come to rest.
    #[error(
        "systemd has been at work on {0} for {seconds} s; see `systemctl status {quoted}`",
        seconds = (SETTLE_PAUSE * SETTLE_ATTEMPTS).as_secs(),
        quoted = .0.quoted()
    )]
    Changing(MountUnitName),
    /// The job ended otherwise than well.
    #[error("the job to stop {unit} did not succeed: {result}; see `journalctl -u {}`", .unit.quoted())]
    Job {
        /// The unit.
        unit: MountUnitName,
        /// What came of it.
        result: JobResult,
    },
    /// systemd did not say in time what came of the job.
    #[error("systemd has not said for {seconds} s what came of the job to stop {0}", seconds = JOB_TIMEOUT.as_secs())]
    NoAnswer(MountUnitName),
    /// systemd does not see the mount.
    #[error("{0} is mounted, and systemd has not noticed for {seconds} s", seconds = SEE_TIMEOUT.as_secs())]
    Unseen(MountUnitName),
}

/// Whether a mount can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clear {
    /// Once the unit file is written.
    Yes,
    /// Once the unit file is written, and systemd was told to [load](Units::load) it.
    ToBeLoaded,
    /// It is there already.
    Mounted,
}

/// What systemd has made of a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// It is an active unit with our file.
    Ours,
    /// It is an active unit without our file.
    NotOurs,
    /// It is gone again.
    Gone,
}

/// The mount units of the system.
#[derive(Clone, Debug)]
pub struct Units {
    pub(super) manager: ManagerProxy<'static>,
    pub(super) jobs: Jobs,
    looks: Looks,
    pub(super) calls: Arc<Semaphore>,
    pub(super) reloading: Arc<Mutex<()>>,
    unit_path: Arc<[PathBuf]>,
    soft_reboots: u32,
}

impl Units {
    /// Prepares for calls to systemd.
    ///
    /// # Errors
    /// When the bus or systemd do not answer.
    pub async fn connect(connection: &Connection) -> zbus::Result<Self> {
        let manager =
            ManagerProxy::builder(connection).cache_properties(zbus::proxy::CacheProperties::No).build().await?;
        let jobs = Jobs::listen(&manager).await?;
        let unit_path = manager::answer(manager.unit_path()).await?.into_iter().map(PathBuf::from).collect();
        // A systemd that does not know what that is has made none (before 254).
        let soft_reboots = manager::answer(manager.soft_reboots_count()).await.unwrap_or_default();
        let (looks, calls) = (Looks::new(manager.clone()), Arc::new(Semaphore::new(CALLS)));
        Ok(Self { manager, jobs, looks, calls, reloading: Arc::default(), unit_path, soft_reboots })
    }

    /// How often everything but the kernel was started anew since that was.
    pub fn soft_reboots(&self) -> u32 {
        self.soft_reboots
    }

    /// Refuses a unit that somebody else has a file of. Blocks.
    ///
    /// # Errors
    /// [`UnitError::Exists`].
    pub fn refuse_foreign(&self, unit: &MountUnitName) -> Result<(), UnitError> {
        match mount_unit::foreign_file(unit, &self.unit_path) {
            Some(_) => Err(UnitError::Exists(unit.clone())),
            None => Ok(()),
        }
    }

    /// Waits until systemd has nothing of a unit that would be in the way of a mount of ours.
    ///
    /// A mount made while systemd is about to unmount would be unmounted with the other one. `is_mounted` is asked while there
    /// is something in the way: somebody else may have started the unit.
    ///
    /// # Errors
    /// [`UnitError`].
    pub async fn clear<F>(&self, unit: &MountUnitName, is_mounted: impl Fn() -> F) -> Result<Clear, UnitError>
    where
        F: Future<Output = bool>,
    {
        for attempt in 1..=SETTLE_ATTEMPTS {
            match self.look(unit).await? {
                // What systemd believes to be mounted is gone, which it need not know.
                Known::No | Known::Idle { ours: true } | Known::Mounted { ours: true } => return Ok(Clear::Yes),
                Known::Missing => return Ok(Clear::ToBeLoaded),
                // As long as another unit refers to it, systemd keeps what it had of a mount that is gone.
                Known::Idle { ours: false } if attempt == REMNANT_ATTEMPTS => self.drop_remnants(unit).await?,
                Known::Idle { ours: false } if attempt >= FOREIGN_ATTEMPTS => {
                    return Err(UnitError::Exists(unit.clone()));
                }
                _ => {}
            }
            if is_mounted().await {
                return Ok(Clear::Mounted);
            }
            tokio::time::sleep(SETTLE_PAUSE).await;
        }
        Err(UnitError::Changing(unit.clone()))
    }

    /// Has systemd look for the file of a unit that it did not find before.
    ///
    /// # Errors
    /// [`UnitError::Refused`].
    pub async fn load(&self, unit: &MountUnitName) -> Result<(), UnitError> {
        let _call = self.calls.acquire().await;
        manager::answer(self.manager.load_unit(unit.as_str()))
            .await
            .map(drop)
            .map_err(|source| refused("load", unit, source))
    }

    /// Waits until systemd has seen a mount, and says what it has made of it.
    ///
    /// # Errors
    /// [`UnitError`].
    pub async fn seen<F>(&self, unit: &MountUnitName, is_mounted: impl Fn() -> F) -> Result<Seen, UnitError>
    where
        F: Future<Output = bool>,
    {
        let began = Instant::now();
        let mut checked = began;
        while began.elapsed() < SEE_TIMEOUT {
            match self.look(unit).await? {
                Known::Mounted { ours: true } => return Ok(Seen::Ours),
                Known::Mounted { ours: false } => return Ok(Seen::NotOurs),
                _ => {}
            }
            if checked.elapsed() >= SEE_CHECK {
                checked = Instant::now();
                if !is_mounted().await {
                    return Ok(Seen::Gone);
                }
            }
        }
        Err(UnitError::Unseen(unit.clone()))
    }

    /// Stops a mount unit and waits until it is unmounted, as far as systemd knows of the mount.
    ///
    /// # Errors
    /// [`UnitError`]; it is still mounted then, most likely because it is in use.
    pub async fn stop(&self, unit: &MountUnitName) -> Result<(), UnitError> {
        let stopped = {
            let _call = self.calls.acquire().await;
            // "fail": never cancel somebody else's job.
            manager::answer(self.manager.stop_unit(unit.as_str(), "fail")).await
        };
        let job = match stopped {
            Ok(job) => job,
            Err(error) if is_named(&error, "org.freedesktop.systemd1.NoSuchUnit") => return Ok(()),
            Err(source) => return Err(refused("stop", unit, source)),
        };
        match self.jobs.result(job).await {
            Some(JobResult::Done) => Ok(()),
            Some(result) => Err(UnitError::Job { unit: unit.clone(), result }),
            None => Err(UnitError::NoAnswer(unit.clone())),
        }
    }

    async fn look(&self, unit: &MountUnitName) -> Result<Known, UnitError> {
        self.looks.at(unit).await.map_err(|source| refused("tell of", unit, source))
    }

    /// Makes systemd drop what it has of units without a file, once for all who wait for that.
    async fn drop_remnants(&self, unit: &MountUnitName) -> Result<(), UnitError> {
        let _reloading = self.reloading.lock().await;
        if self.look(unit).await? == (Known::Idle { ours: false }) {
            manager::answer(self.manager.reload())
                .await
                .map_err(|source| refused("read its units anew for", unit, source))?;
        }
        Ok(())
    }
}

fn refused(doing: &'static str, unit: &MountUnitName, source: zbus::Error) -> UnitError {
    UnitError::Refused { doing, unit: unit.clone(), source: Box::new(source) }
}

pub(super) fn is_named(error: &zbus::Error, name: &str) -> bool {
    matches!(error, zbus::Error::MethodError(found, ..) if found.as_str() == name)
}
