//! One job, as it is published.

use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use layered_stores_model::StoreName;
use layered_stores_overlay::{probe::Stale, progress::Progress};
use serde::Serialize;

use crate::supervisor::Error;

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Looks at all paths of a store.
    Verify,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

impl Kind {
    /// All there are.
    pub(crate) const ALL: [Self; 1] = [Self::Verify];

    /// The error of one that could not come to its end.
    pub(super) fn failed(self, store: &StoreName, why: String) -> Error {
        match self {
            Self::Verify => Error::RefreshFailed(store.clone(), why),
        }
    }
}

/// Something that a job has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What it is about, such as the name of a path, as it can be shown.
    pub about: String,
    /// What there is to say about it.
    pub what: String,
}

impl From<Stale> for Finding {
    fn from(stale: Stale) -> Self {
        Self { about: stale.shown_name(), what: stale.symptom.to_string() }
    }
}

/// What a job has found.
pub(crate) type Findings = Arc<[Finding]>;

/// Something long that is done about a store. Everybody may look at it; what becomes of it, the engine decides.
#[derive(Debug)]
pub struct Job {
    id: u64,
    kind: Kind,
    store: StoreName,
    stage: RwLock<Stage>,
}

#[derive(Debug)]
enum Stage {
    /// An earlier one of its kind has not come back yet.
    Waiting,
    Running(Arc<Progress>),
    Over {
        outcome: Result<Findings, Error>,
        counts: (u64, u64),
    },
}

impl Job {
    pub(super) fn new(id: u64, kind: Kind, store: StoreName) -> Self {
        Self { id, kind, store, stage: RwLock::new(Stage::Waiting) }
    }

    /// Its number.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// What it does.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The store that it is about.
    pub fn store(&self) -> &StoreName {
        &self.store
    }

    /// `waiting`, `running`, `succeeded`, `failed` or `cancelled`.
    pub fn state(&self) -> &'static str {
        self.read(|stage| match stage {
            Stage::Waiting => "waiting",
            Stage::Running(_) => "running",
            Stage::Over { outcome: Ok(_), .. } => "succeeded",
            Stage::Over { outcome: Err(Error::Cancelled(..)), .. } => "cancelled",
            Stage::Over { outcome: Err(_), .. } => "failed",
        })
    }

    /// How much is done, and how much there is to do; nothing of both until that was counted.
    pub fn counts(&self) -> (u64, u64) {
        self.read(|stage| match stage {
            Stage::Waiting => (0, 0),
            Stage::Running(progress) => progress.counts(),
            Stage::Over { counts, .. } => *counts,
        })
    }

    /// What has become of it, once it is over.
    pub fn outcome(&self) -> Option<Result<Findings, Error>> {
        self.read(|stage| match stage {
            Stage::Over { outcome, .. } => Some(outcome.clone()),
            _ => None,
        })
    }

    /// That it was cancelled.
    pub(super) fn cancelled(&self) -> Error {
        Error::Cancelled(self.kind, self.store.clone())
    }

    pub(super) fn is_of(&self, kind: Kind, store: &StoreName) -> bool {
        self.kind == kind && self.store == *store
    }

    pub(super) fn is_waiting(&self) -> bool {
        self.read(|stage| matches!(stage, Stage::Waiting))
    }

    pub(super) fn is_running(&self) -> bool {
        self.read(|stage| matches!(stage, Stage::Running(_)))
    }

    pub(super) fn is_over(&self) -> bool {
        self.read(|stage| matches!(stage, Stage::Over { .. }))
    }

    pub(super) fn begin(&self, progress: Arc<Progress>) {
        self.set(Stage::Running(progress));
    }

    pub(super) fn end(&self, outcome: Result<Findings, Error>) {
        let (done, total) = self.counts();
        let counts = (done, if outcome.is_ok() { done } else { total });
        self.set(Stage::Over { outcome, counts });
    }

    fn read<T>(&self, look: impl FnOnce(&Stage) -> T) -> T {
        look(&self.stage.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn set(&self, stage: Stage) {
        *self.stage.write().unwrap_or_else(PoisonError::into_inner) = stage;
    }
}
