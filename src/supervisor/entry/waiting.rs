//! Those who wait for something of a store.

use layered_stores_model::StoreName;
use tokio::sync::oneshot;

use crate::supervisor::Error;

/// Where the answer to a command goes.
pub(in crate::supervisor) type Reply<T = ()> = oneshot::Sender<Result<T, Error>>;

/// Sends the same answer to all; whoever went away in the meantime misses it.
pub(in crate::supervisor) fn answer<T: Clone>(waiting: impl IntoIterator<Item = Reply<T>>, result: &Result<T, Error>) {
    for reply in waiting {
        let _ = reply.send(result.clone());
    }
}

/// Those who wait for something of a store.
#[derive(Debug, Default)]
pub(in crate::supervisor) struct Waiting {
    pub(in crate::supervisor) starting: Vec<Reply>,
    pub(in crate::supervisor) stopping: Vec<Reply>,
    /// Until what is in it is removed.
    pub(in crate::supervisor) removing: Vec<Reply>,
    /// For a refresh that has not begun, and for the one that has.
    pub(in crate::supervisor) remounting: Vec<Reply>,
    pub(in crate::supervisor) refreshing: Vec<Reply>,
    /// Root is among the first of these.
    pub(in crate::supervisor) root_asks: bool,
    /// For a refresh, before it is known whose store it is.
    pub(in crate::supervisor) unproven: Vec<(u32, Reply)>,
    /// Until there may be another swap.
    pub(in crate::supervisor) queueing: Vec<Reply>,
}

impl Waiting {
    /// Lets those wait for a refresh whose store it turns out to be, and sends the others away.
    pub(super) fn belongs_to(&mut self, name: &StoreName, owner_uid: u32) {
        for (uid, reply) in std::mem::take(&mut self.unproven) {
            if uid == owner_uid {
                self.remounting.push(reply);
            } else {
                let _ = reply.send(Err(Error::NotOwner(name.clone())));
            }
        }
    }

    /// Those who wait for a refresh that has not begun.
    pub(in crate::supervisor) fn all_remounting(&mut self) -> Vec<Reply> {
        self.root_asks = false;
        let mut all = std::mem::take(&mut self.remounting);
        all.append(&mut self.queueing);
        all.extend(self.unproven.drain(..).map(|(_, reply)| reply));
        all
    }

    /// Answers everybody with an error.
    pub(in crate::supervisor) fn answer_all(&mut self, error: &Error) {
        let waiting = [&mut self.starting, &mut self.stopping, &mut self.removing, &mut self.refreshing];
        answer(waiting.into_iter().flat_map(std::mem::take), &Err(error.clone()));
        answer(self.all_remounting(), &Err(error.clone()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> StoreName {
        "a".parse().expect("valid")
    }

    #[test]
    fn whose_store_it_turns_out_to_be_waits_on_and_the_others_are_sent_away() {
        let (mut waiting, [owner, other]) = (Waiting::default(), [0; 2].map(|_| oneshot::channel()));
        waiting.unproven = vec![(1000, owner.0), (7, other.0)];
        waiting.belongs_to(&name(), 1000);
        let (mut owner, mut other) = (owner.1, other.1);
        assert!(owner.try_recv().is_err(), "it waits");
        assert!(matches!(other.try_recv(), Ok(Err(Error::NotOwner(of))) if of == name()));
        answer(waiting.remounting, &Ok(()));
        assert!(matches!(owner.try_recv(), Ok(Ok(()))));
    }

    #[test]
    fn nobody_is_forgotten_when_all_are_answered() {
        let (mut waiting, mut answers) = (Waiting { root_asks: true, ..Waiting::default() }, Vec::new());
        let mut one = || {
            let (reply, answer) = oneshot::channel();
            answers.push(answer);
            reply
        };
        waiting.unproven.push((1000, one()));
        let Waiting { starting, stopping, removing, remounting, refreshing, queueing, .. } = &mut waiting;
        for who in [starting, stopping, removing, remounting, refreshing, queueing] {
            who.push(one());
        }
        waiting.answer_all(&Error::ShuttingDown);
        assert!(!waiting.root_asks);
        for mut answer in answers {
            assert!(matches!(answer.try_recv(), Ok(Err(Error::ShuttingDown))));
        }
    }
}
