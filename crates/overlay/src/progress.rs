//! What work on a store is at, so that somebody else can tell what it hangs in.
//!
//! A system call that a filesystem does not answer cannot be asked what it waits for, and cannot be cut off. So whoever is
//! about to touch a directory says so first, with [`at`], and who looks from outside sees since when that is so. It costs some
//! tens of nanoseconds and takes no lock.
//!
//! The same way leads back: whoever looks from outside can [call work off](Progress::call_off), and work that may take long asks
//! between two steps whether to [`go_on`].

use std::{
    cell::RefCell,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::io::Errno;

/// What work can be at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Spot {
    /// Nothing that could be named.
    Elsewhere,
    /// Waiting for other work on the same filesystems, which has not come back.
    Others,
    /// The lower store's directory, or one above it.
    Lower,
    /// The upper layer.
    Upper,
    /// The work dir.
    Work,
    /// The directories down to the mount point, and the state dir.
    Root,
    /// The merged directory, which shows what is in both layers.
    Merged,
    /// User and group of the store, which a service on the network may know.
    Accounts,
    /// The daemon's own state directory.
    Records,
}

impl Spot {
    const ALL: [Self; 9] = [
        Self::Elsewhere,
        Self::Others,
        Self::Lower,
        Self::Upper,
        Self::Work,
        Self::Root,
        Self::Merged,
        Self::Accounts,
        Self::Records,
    ];
}

thread_local! {
    static OURS: RefCell<Option<Arc<Progress>>> = const { RefCell::new(None) };
}

static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Says what the work that this thread does is about to touch, and that it has come this far. Nothing on other threads.
pub fn at(spot: Spot) {
    OURS.with_borrow(|ours| {
        if let Some(progress) = ours {
            progress.mark(spot);
        }
    });
}

/// Says that the work that this thread does gets on with what it has said last.
pub fn goes_on() {
    OURS.with_borrow(|ours| {
        if let Some(progress) = ours {
            progress.note_time();
        }
    });
}

/// The same, for work that may be called off.
///
/// # Errors
/// `ECANCELED` when it is.
pub fn go_on() -> Result<(), Errno> {
    goes_on();
    let is_called_off = OURS.with_borrow(|ours| ours.as_ref().is_some_and(|progress| progress.is_called_off()));
    if is_called_off { Err(Errno::CANCELED) } else { Ok(()) }
}

/// Says how much the work that this thread does is about, as far as that is known.
pub fn expect(total: u64) {
    OURS.with_borrow(|ours| {
        if let Some(progress) = ours {
            progress.total.store(total, Ordering::Relaxed);
        }
    });
}

/// Says that one more of what the work is about is done.
pub fn one_more() {
    OURS.with_borrow(|ours| {
        if let Some(progress) = ours {
            progress.done.fetch_add(1, Ordering::Relaxed);
        }
    });
}

/// How far some work on a store has come.
#[derive(Debug, Default)]
pub struct Progress {
    spot: AtomicU8,
    /// When it came there, in milliseconds since [`EPOCH`] and one more; 0 while nothing is being done.
    since: AtomicU64,
    /// How much of it is done, and how much there was to do when it was counted.
    done: AtomicU64,
    total: AtomicU64,
    called_off: AtomicBool,
}

impl Progress {
    /// Notes that work has come to a spot.
    pub fn mark(&self, spot: Spot) {
        self.spot.store(spot as u8, Ordering::Relaxed);
        self.note_time();
    }

    fn note_time(&self) {
        let since = u64::try_from(EPOCH.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.since.store(since.saturating_add(1), Ordering::Release);
    }

    /// Notes that nothing is being done.
    pub fn rest(&self) {
        self.since.store(0, Ordering::Release);
    }

    /// What the work is at, and since when; `None` while nothing is being done.
    pub fn spot(&self) -> Option<(Spot, Instant)> {
        let since = self.since.load(Ordering::Acquire).checked_sub(1)?;
        let spot = Spot::ALL[usize::from(self.spot.load(Ordering::Relaxed)) % Spot::ALL.len()];
        Some((spot, *EPOCH + Duration::from_millis(since)))
    }

    /// How much is done, and how much there is to do as far as that is known. What has come since it was counted is in both.
    pub fn counts(&self) -> (u64, u64) {
        let done = self.done.load(Ordering::Relaxed);
        (done, self.total.load(Ordering::Relaxed).max(done))
    }

    /// Has the work end at its next step. A system call that it hangs in is not cut off.
    pub fn call_off(&self) {
        self.called_off.store(true, Ordering::Relaxed);
    }

    /// Whether the work was called off.
    pub fn is_called_off(&self) -> bool {
        self.called_off.load(Ordering::Relaxed)
    }

    /// Does work that says by [`at`] how far it has come.
    pub fn follow<T>(self: Arc<Self>, work: impl FnOnce() -> T) -> T {
        /// Also when the work panics: the thread goes on to other work.
        struct Following(Arc<Progress>);
        impl Drop for Following {
            fn drop(&mut self) {
                OURS.set(None);
                self.0.rest();
            }
        }
        self.mark(Spot::Elsewhere);
        OURS.set(Some(Arc::clone(&self)));
        let _following = Following(self);
        work()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_work_is_at_is_seen_from_outside_while_it_lasts() {
        let progress = Arc::<Progress>::default();
        at(Spot::Lower);
        assert_eq!(progress.spot(), None, "nobody follows this thread");
        let inside = Arc::clone(&progress).follow(|| {
            at(Spot::Upper);
            progress.spot().map(|(spot, since)| (spot, since.elapsed() < Duration::from_secs(5)))
        });
        assert_eq!(inside, Some((Spot::Upper, true)));
        assert_eq!(progress.spot(), None, "it is over");
    }

    #[test]
    fn work_that_is_called_off_ends_at_its_next_step() {
        let progress = Arc::<Progress>::default();
        assert_eq!(go_on(), Ok(()), "nobody follows this thread");
        let ended = Arc::clone(&progress).follow(|| {
            expect(3);
            for step in 0..3 {
                go_on()?;
                one_more();
                if step == 1 {
                    progress.call_off();
                }
            }
            Ok(())
        });
        assert_eq!((ended, progress.counts()), (Err(Errno::CANCELED), (2, 3)));
    }

    #[test]
    fn what_comes_on_top_of_what_was_counted_is_in_both_numbers() {
        let progress = Arc::<Progress>::default();
        Arc::clone(&progress).follow(|| {
            expect(1);
            one_more();
            one_more();
        });
        assert_eq!(progress.counts(), (2, 2));
    }

    #[test]
    fn every_spot_is_told_as_what_it_is() {
        let progress = Progress::default();
        for spot in Spot::ALL {
            progress.mark(spot);
            assert_eq!(progress.spot().map(|(told, _)| told), Some(spot));
        }
    }
}
