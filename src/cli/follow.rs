//! Waiting for a job: shows how far it is, and cancels it on Ctrl-C.

use std::{
    convert::Infallible,
    io::{self, IsTerminal as _},
    time::Duration,
};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use layered_stores_client::{ClientError, Job};
use tokio::signal::unix::{SignalKind, signal};

/// How long a daemon may take to cancel. Who has pressed Ctrl-C wants to go.
const PATIENCE: Duration = Duration::from_secs(1);

/// How many columns the bar takes with the words around it.
const TEMPLATE: &str = "{prefix}: {wide_bar} {pos}/{len} paths";

/// It was cancelled by Ctrl-C: 128 and the number of the signal, as shells have it.
pub(super) const INTERRUPTED: u8 = 130;

/// A bar on the terminal, gone when it is dropped.
pub(super) struct Bar(ProgressBar);

/// A bar with what it is about in front of it.
pub(super) fn bar(title: &str) -> Bar {
    let style = ProgressStyle::with_template(TEMPLATE).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr()).with_style(style);
    Bar(bar.with_prefix(title.to_owned()))
}

impl Bar {
    /// Shows how far it is. Until it is known how much there is to do there is nothing to show.
    pub(super) fn show(&self, done: u64, total: u64) {
        if total > 0 {
            self.0.set_length(total);
            self.0.set_position(done);
        }
    }

    /// Has something said that stays on the terminal.
    pub(super) fn aside(&self, say: impl FnOnce()) {
        self.0.suspend(say);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// Whether somebody is there to see how far something is: not when what is printed goes elsewhere.
pub(super) fn is_watched() -> bool {
    io::stdout().is_terminal() && io::stderr().is_terminal()
}

/// Waits for what a job finds, and shows on the terminal how far it is if it is given a `title`. `None`: it was cancelled here.
pub(super) async fn follow(job: &Job, title: Option<&str>) -> Result<Option<Vec<(String, String)>>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let result = job.result();
    tokio::pin!(result);
    tokio::select! {
        result = &mut result => return Ok(Some(result?)),
        never = show(job, title) => match never {},
        _ = interrupt.recv() => {}
    }
    // It ends in any case when this process does.
    let cancelled = async {
        job.cancel().await?;
        result.await
    };
    let answer: Option<Result<_, ClientError>> = tokio::select! {
        answer = cancelled => Some(answer),
        () = tokio::time::sleep(PATIENCE) => None,
        _ = interrupt.recv() => None,
    };
    drop(answer);
    Ok(None)
}

/// Shows how far a job is. Never returns.
async fn show(job: &Job, title: Option<&str>) -> Infallible {
    let Some(title) = title else { return std::future::pending().await };
    let bar = bar(title);
    job.watch(|done, total| bar.show(done, total)).await
}
