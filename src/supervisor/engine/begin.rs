//! Beginning what takes time, and taking what it has brought.

use std::sync::Arc;

use layered_stores_model::{StoreName, StoreSpec};

use super::Engine;
use crate::supervisor::{
    entry::Op,
    machine::{Begun, Machine, Operated},
    operation::Up,
};

/// What follows from something that has come to its end, said by whoever has begun it.
pub(super) type Then = Box<dyn FnOnce(&mut Engine, &StoreName) + Send>;

impl Engine {
    /// Begins to do something about a store, beside which nothing else is done about it.
    pub(super) fn begin<T: Send + 'static>(
        &mut self,
        name: &StoreName,
        op: Op,
        begin: impl FnOnce(&(dyn Machine + 'static), &Arc<StoreSpec>) -> Begun<T>,
        then: impl FnOnce(&mut Self, &StoreName, T) + Send + 'static,
    ) {
        self.begin_until(name, op, begin, move |engine, name, brought| {
            engine.has_ended(name, op, |engine| then(engine, name, brought));
        });
    }

    /// Begins to bring a store up, or to take it over, which ends once the mount table [shows](Self::confirm) that.
    pub(super) fn begin_up(
        &mut self,
        name: &StoreName,
        op: Op,
        begin: impl FnOnce(&(dyn Machine + 'static), &Arc<StoreSpec>) -> Operated<Up>,
    ) {
        self.begin_until(name, op, begin, move |engine, name, up| match (up, engine.entries.get_mut(name)) {
            (_, None) => {}
            (Ok(up), Some(entry)) => {
                entry.forget_ended();
                entry.unconfirmed = Some(Box::new(up));
                engine.look_soon();
            }
            (Err(error), Some(_)) => engine.has_ended(name, op, |engine| engine.is_not_up(name, &error)),
        });
    }

    fn begin_until<T: Send + 'static>(
        &mut self,
        name: &StoreName,
        op: Op,
        begin: impl FnOnce(&(dyn Machine + 'static), &Arc<StoreSpec>) -> Begun<T>,
        then: impl FnOnce(&mut Self, &StoreName, T) + Send + 'static,
    ) {
        if let Some(entry) = self.entries.get_mut(name) {
            entry.op = Some(op);
            let begun = begin(&*self.machine, &entry.spec);
            entry.follow(&begun.progress);
            self.once(name, begun.result, then);
        }
    }

    /// Has something follow from what comes to its end later. The store may be there no more by then.
    pub(super) fn once<T: Send + 'static>(
        &mut self,
        name: &StoreName,
        result: impl Future<Output = T> + Send + 'static,
        then: impl FnOnce(&mut Self, &StoreName, T) + Send + 'static,
    ) {
        let name = name.clone();
        self.operations.spawn(async move {
            let brought = result.await;
            let then: Then = Box::new(move |engine, name| then(engine, name, brought));
            (name, then)
        });
    }

    /// Takes what was done about a store, and goes on with it.
    fn has_ended(&mut self, name: &StoreName, op: Op, then: impl FnOnce(&mut Self)) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        entry.forget_ended();
        entry.op = None;
        // A refresh does not change what the mount table says of a store.
        let is_news = !matches!(op, Op::Refresh | Op::Hold) || entry.passed_over;
        then(self);
        self.publish(name);
        self.refresh_if_asked(name);
        if is_news {
            self.look_soon();
        }
    }
}
