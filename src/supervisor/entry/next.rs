//! A specification that waits to be put in force, for which the store has to go down.

use std::sync::Arc;

use layered_stores_model::StoreSpec;

/// What is known of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Looked {
    NotYet,
    UnderWay,
    /// The store can most likely come up with it.
    ItIsFine,
}

/// A specification that waits.
///
/// A store that is up and comes up no more for a mistyped directory is what nobody who reloads wants. So it is looked ahead
/// whether its directories are there and the store's, before the mount that works is taken away.
#[derive(Debug)]
pub(in crate::supervisor) struct Next {
    pub(in crate::supervisor) spec: Arc<StoreSpec>,
    looked: Looked,
}

impl Next {
    pub(in crate::supervisor) fn new(spec: Arc<StoreSpec>) -> Self {
        Self { spec, looked: Looked::NotYet }
    }

    /// Whether somebody should look.
    pub(super) fn is_to_be_looked_at(&self) -> bool {
        self.looked == Looked::NotYet
    }

    /// Whether somebody does.
    pub(in crate::supervisor) fn is_being_looked_at(&self) -> bool {
        self.looked == Looked::UnderWay
    }

    /// Whether a store that is up can go down for it.
    pub(super) fn is_fine(&self) -> bool {
        self.looked == Looked::ItIsFine
    }

    /// Notes that somebody looks.
    pub(in crate::supervisor) fn begin_to_look(&mut self) {
        self.looked = Looked::UnderWay;
    }

    /// Notes what was found.
    pub(in crate::supervisor) fn was_looked_at(&mut self, is_fine: bool) {
        self.looked = if is_fine { Looked::ItIsFine } else { Looked::NotYet };
    }
}
