//! `org.layeredstores1.Job`.

use std::{collections::HashMap, sync::Arc};

use zbus::{interface, message::Header, object_server::SignalEmitter, wire::Variant};

use super::{authorization::Authorization, error::Result};
use crate::supervisor::{self, Command, Handle, JobCommand};

/// The object of one job.
pub(super) struct Job {
    pub(super) job: Arc<supervisor::Job>,
    pub(super) handle: Handle,
    pub(super) authorization: Authorization,
}

/// What changes of a job, as its properties have it.
pub(super) fn changing(job: &supervisor::Job) -> HashMap<&'static str, Variant<'static>> {
    let (done, total) = job.counts();
    HashMap::from([("State", job.state().into()), ("Done", done.into()), ("Total", total.into())])
}

/// Something long that is done about a store, for as long as somebody on the bus waits for it.
#[interface(name = "org.layeredstores1.Job")]
impl Job {
    /// Waits for the job no more, and ends it if nobody else does; whoever has called `GetResult` is told
    /// `org.layeredstores1.Error.Cancelled` at once. For connections that have asked for the job, for their users, and for
    /// root, who ends jobs of others whoever waits.
    async fn cancel(&self, #[zbus(header)] call: Header<'_>) -> Result<()> {
        let caller = self.authorization.caller(&call).await?;
        Ok(self.handle.ask(|reply| Command::Job(JobCommand::Cancel(self.job.id(), caller, reply))).await?)
    }

    /// What the job has found: pairs of what it is about and what there is to say about that, for `verify` of a path's name and
    /// what is wrong with it, the first 4096 of them. Returns
    /// when the job is over, and fails with the error that it has failed with. For connections that have asked for the job,
    /// once each, and for root.
    #[zbus(out_args("result"))]
    async fn get_result(&self, #[zbus(header)] call: Header<'_>) -> Result<Vec<(String, String)>> {
        let caller = self.authorization.caller(&call).await?;
        let found = self.handle.ask(|reply| Command::Job(JobCommand::Result(self.job.id(), caller, reply))).await?;
        Ok(found.iter().map(|finding| (finding.about.clone(), finding.what.clone())).collect())
    }

    /// The job is over: `succeeded`, `failed` or `cancelled`, and why if it has not succeeded.
    #[zbus(signal)]
    pub(super) async fn finished(emitter: &SignalEmitter<'_>, result: &str, error: &str) -> zbus::Result<()>;

    /// What it does: `verify`.
    #[zbus(property(emits_changed_signal = "const"))]
    fn kind(&self) -> String {
        self.job.kind().to_string()
    }

    /// The name of the store that it is about.
    #[zbus(property(emits_changed_signal = "const"))]
    fn store(&self) -> String {
        self.job.store().to_string()
    }

    /// `waiting` for an earlier one to come to its end, `running`, `succeeded`, `failed` or `cancelled`.
    #[zbus(property)]
    fn state(&self) -> String {
        self.job.state().to_owned()
    }

    /// How much of it is done, for `verify` how many paths were looked at. Changes are announced a few times in a second.
    #[zbus(property)]
    fn done(&self) -> u64 {
        self.job.counts().0
    }

    /// How much there is to do, for `verify` how many paths there are to look at; 0 until that is counted.
    #[zbus(property)]
    fn total(&self) -> u64 {
        self.job.counts().1
    }
}
