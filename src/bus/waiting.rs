//! Those who wait for jobs: who leaves the bus waits no more.

use tokio_util::sync::CancellationToken;

use super::authorization::Authorization;
use crate::supervisor::{Caller, Command, Handle, JobCommand};

/// Tells the engine when a caller leaves the bus, unless it waits for its job no more before that.
pub(super) fn follow(caller: Caller, waits_no_more: CancellationToken, authorization: Authorization, handle: Handle) {
    tokio::spawn(async move {
        tokio::select! {
            // A bus that cannot be asked says nothing about the caller.
            gone = authorization.gone(&caller) => if gone.is_ok() {
                handle.tell(Command::Job(JobCommand::Left(caller.name))).await;
            },
            () = waits_no_more.cancelled() => {}
        }
    });
}
