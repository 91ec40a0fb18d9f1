//! What the engine is asked and tells about jobs.

use std::sync::Arc;

use layered_stores_model::StoreName;
use tokio_util::sync::CancellationToken;

use super::{Findings, Job, Kind};
use crate::supervisor::entry::Reply;

/// A connection to the bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Its unique name. The bus gives none twice.
    pub name: String,
    /// The user whose it is.
    pub uid: u32,
}

/// A job that somebody may wait for from now on.
#[derive(Debug)]
pub struct Asked {
    /// The job.
    pub job: Arc<Job>,
    /// Done when the caller does not wait any more; `None` for somebody who did already.
    pub waits_no_more: Option<CancellationToken>,
}

/// What the engine is asked about jobs.
#[derive(Debug)]
pub enum JobCommand {
    /// Have one done about a store, and wait for it.
    Ask(Kind, StoreName, Caller, Reply<Asked>),
    /// What a job has found, once it is over.
    Result(u64, Caller, Reply<Findings>),
    /// Wait for it no more; for root, end it whoever waits.
    Cancel(u64, Caller, Reply),
    /// The connection of this name has left the bus.
    Left(String),
}

/// What happened to jobs.
#[derive(Debug)]
pub enum JobNews {
    /// Somebody has asked for one. They are to be told once it can be found.
    Asked(Asked, Reply<Asked>),
    /// It is in another state, or has come further.
    Changed(Arc<Job>),
    /// It is over.
    Over(Arc<Job>),
    /// It is not there any more.
    Forgotten(u64),
}
