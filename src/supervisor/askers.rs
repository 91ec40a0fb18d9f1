//! Those who wait for a look at something.

use super::entry::Reply;

/// Those who wait for the result of a look. A look that had begun when somebody asked may have passed what has changed since,
/// so it does not answer them: the next one does.
#[derive(Debug)]
pub(super) struct Askers<T> {
    next: Vec<Reply<T>>,
    now: Vec<Reply<T>>,
    looks: bool,
}

impl<T> Default for Askers<T> {
    fn default() -> Self {
        Self { next: Vec::new(), now: Vec::new(), looks: false }
    }
}

impl<T> Askers<T> {
    /// Adds somebody.
    pub(super) fn ask(&mut self, reply: Reply<T>) {
        self.next.push(reply);
    }

    /// Whether nobody waits.
    pub(super) fn is_empty(&self) -> bool {
        self.next.is_empty() && self.now.is_empty()
    }

    /// Whether a look is to be begun, which has begun with that.
    pub(super) fn begin(&mut self) -> bool {
        let begins = !self.looks && !self.next.is_empty();
        if begins {
            self.looks = true;
            self.now.append(&mut self.next);
        }
        begins
    }

    /// The look has come to its end: those whom it answers.
    pub(super) fn end(&mut self) -> Vec<Reply<T>> {
        self.looks = false;
        std::mem::take(&mut self.now)
    }

    /// All of them. A look that goes on answers nobody then.
    pub(super) fn all(&mut self) -> Vec<Reply<T>> {
        self.now.append(&mut self.next);
        std::mem::take(&mut self.now)
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;
    use crate::supervisor::entry::answer;

    #[test]
    fn a_look_that_began_earlier_answers_nobody_who_has_asked_since() {
        let mut askers = Askers::<u32>::default();
        assert!(!askers.begin(), "nobody has asked");
        let ask = |askers: &mut Askers<u32>| {
            let (reply, answer) = oneshot::channel();
            askers.ask(reply);
            answer
        };
        let mut first = ask(&mut askers);
        assert!(askers.begin());
        let mut second = ask(&mut askers);
        assert!(!askers.begin(), "one look at a time");
        answer(askers.end(), &Ok(1));
        assert_eq!(first.try_recv(), Ok(Ok(1)));
        assert!(second.try_recv().is_err());
        assert!(askers.begin());
        answer(askers.end(), &Ok(2));
        assert_eq!(second.try_recv(), Ok(Ok(2)));
        assert!(!askers.begin());
    }

    #[test]
    fn who_was_sent_away_is_not_answered_by_the_look_that_goes_on() {
        let mut askers = Askers::<u32>::default();
        askers.ask(oneshot::channel().0);
        assert!(askers.begin());
        assert_eq!(askers.all().len(), 1);
        askers.ask(oneshot::channel().0);
        assert!(!askers.begin(), "it goes on");
        assert!(askers.end().is_empty());
        assert!(askers.begin());
    }
}
