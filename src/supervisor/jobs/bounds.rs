//! How many jobs there may be, and how long those are kept that are over.

use std::time::Duration;

use super::Jobs;
use crate::supervisor::Error;

/// How many jobs a user may wait for, and all users together. Root is in neither. It is half of the calls that may be worked on
/// at a time: whoever waits has one open, and the other half is for what else they ask, such as to cancel.
pub(super) const EACH: usize = 8;
pub(super) const USERS: usize = 64;

/// How many jobs may be under way, root's among them.
pub(super) const IN_ALL: usize = 1024;

/// How many jobs are kept that are over and whose result was not read, and for how long.
pub(super) const KEPT: usize = 32;
pub(super) const KEEP: Duration = Duration::from_secs(60);

impl Jobs {
    /// Whether somebody may wait for one more, which may have to be made.
    pub(super) fn has_room(&self, makes: bool, uid: u32) -> Result<(), Error> {
        let under_way = || self.all.values().filter(|record| !record.job.is_over());
        if makes && under_way().count() >= IN_ALL {
            return Err(Error::TooManyJobs(IN_ALL));
        }
        if uid == 0 {
            return Ok(());
        }
        let users = || under_way().flat_map(|record| &record.asks).map(|ask| ask.caller.uid).filter(|&uid| uid != 0);
        let own = users().filter(|&of| of == uid).count();
        if own >= EACH || users().count() >= USERS { Err(Error::TooManyJobs(own)) } else { Ok(()) }
    }

    /// Forgets the oldest of whoever leaves the most unread, while there are too many.
    pub(super) fn keep_only_so_many(&mut self) {
        loop {
            let kept = self.all.values().filter(|record| record.job.is_over());
            let of: Vec<(u32, u64)> =
                kept.filter_map(|record| Some((record.asks.first()?.caller.uid, record.job.id()))).collect();
            if of.len() <= KEPT {
                return;
            }
            let by = |uid| of.iter().filter(|(other, _)| *other == uid).count();
            let Some(most) = of.iter().map(|&(uid, _)| uid).max_by_key(|&uid| by(uid)) else { return };
            let Some(&(_, oldest)) = of.iter().find(|(uid, _)| *uid == most) else { return };
            self.forget(oldest);
        }
    }
}
