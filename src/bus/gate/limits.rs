//! How much of us callers may use.
//!
//! The bus limits calls that want a reply, for each connection. Here is counted by user, however many connections they have,
//! and whether they want a reply or not. Root is not limited: nothing that somebody else does makes root wait.

use std::{
    collections::{HashMap, VecDeque},
    num::NonZeroU32,
    time::{Duration, Instant},
};

/// How many calls of one user, and of all users, are worked on at a time.
const RUNNING: usize = 16;
const RUNNING_IN_ALL: usize = 128;

/// How much of one user, and of all users, waits for its turn. More is refused.
const WAITING: usize = 64;
const WAITING_BYTES: usize = 256 * 1024;
const WAITING_BYTES_IN_ALL: usize = 8 * 1024 * 1024;

/// How many connections may wait for the bus to say whose they are, and how much of theirs is kept until then. The bus says it at
/// once, and what comes when there is no more room waits for that in the socket: it may be root's.
const UNKNOWN: usize = 1024;
const UNKNOWN_BYTES: usize = 1024 * 1024;

/// How many connections are remembered that have nothing under way.
const REMEMBERED: usize = 1024;

/// What a user may use at once and in each second. A call costs 1, and its answer 1 for each [`COST_BYTES`].
const BURST: f64 = 1000.0;
const RATE: f64 = 200.0;
const COST_BYTES: f64 = 4096.0;

/// A method call on its way in.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Call {
    /// The unique name of the caller, which the bus vouches for.
    pub(super) sender: String,
    pub(super) serial: NonZeroU32,
    pub(super) wants_reply: bool,
    /// The whole message.
    pub(super) bytes: Vec<u8>,
}

/// What becomes of a call that has come in.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Arrival {
    /// It is or will be let in.
    Taken,
    /// It waits until it is known whose connection it comes from.
    Unknown,
    /// It is too much.
    Refused(Call),
    /// It is to come again once somebody was [`identified`](Limits::identified). Then there is more room.
    Later,
}

/// Who calls, and what of theirs is under way.
#[derive(Debug, Default)]
pub(super) struct Limits {
    callers: HashMap<String, Caller>,
    users: HashMap<u32, User>,
    /// What is let in next.
    next: VecDeque<Vec<u8>>,
    unknown: usize,
    unknown_bytes: usize,
    running: usize,
    waiting_bytes: usize,
}

#[derive(Debug)]
enum Caller {
    Unknown {
        held: Vec<Call>,
    },
    Known {
        uid: u32,
        /// The calls that are worked on, and whether each wants a reply. None of root's are counted.
        running: HashMap<NonZeroU32, bool>,
    },
}

#[derive(Debug)]
struct User {
    running: usize,
    waiting: VecDeque<Call>,
    waiting_bytes: usize,
    /// What is left to use; less than nothing after a large answer.
    balance: f64,
    at: Instant,
}

impl User {
    fn new(now: Instant) -> Self {
        Self { running: 0, waiting: VecDeque::new(), waiting_bytes: 0, balance: BURST, at: now }
    }

    fn refill(&mut self, now: Instant) {
        let earned = now.saturating_duration_since(self.at).as_secs_f64() * RATE;
        self.balance = (self.balance + earned).min(BURST);
        self.at = now;
    }

    fn is_idle(&self) -> bool {
        self.running == 0 && self.waiting.is_empty() && self.balance >= BURST
    }
}

impl Limits {
    /// Takes a call that has come in.
    pub(super) fn arrive(&mut self, call: Call, now: Instant) -> Arrival {
        match self.callers.get_mut(&call.sender) {
            Some(Caller::Known { uid: 0, .. }) => {
                self.next.push_back(call.bytes);
                Arrival::Taken
            }
            Some(Caller::Known { uid, .. }) => {
                let uid = *uid;
                self.queue(uid, call, now).map_or_else(Arrival::Refused, |()| Arrival::Taken)
            }
            // There is somebody to wait for, as one call alone is shorter than that.
            _ if self.unknown_bytes + call.bytes.len() > UNKNOWN_BYTES => Arrival::Later,
            Some(Caller::Unknown { held }) => {
                self.unknown_bytes += call.bytes.len();
                held.push(call);
                Arrival::Taken
            }
            None if self.unknown == UNKNOWN => Arrival::Later,
            None => {
                self.forget_idle(now);
                self.unknown += 1;
                self.unknown_bytes += call.bytes.len();
                self.callers.insert(call.sender.clone(), Caller::Unknown { held: vec![call] });
                Arrival::Unknown
            }
        }
    }

    /// Takes what the bus says about whose connection that is; nothing when it is gone. Returns calls that are too much.
    pub(super) fn identified(&mut self, sender: &str, uid: Option<u32>, now: Instant) -> Vec<Call> {
        let Some(Caller::Unknown { held }) = self.callers.get_mut(sender) else { return Vec::new() };
        let held = std::mem::take(held);
        self.callers.remove(sender);
        self.unknown -= 1;
        self.unknown_bytes -= held.iter().map(|call| call.bytes.len()).sum::<usize>();
        let Some(uid) = uid else { return Vec::new() };
        self.callers.insert(sender.to_owned(), Caller::Known { uid, running: HashMap::new() });
        let arrive = |call| match self.arrive(call, now) {
            Arrival::Refused(call) => Some(call),
            Arrival::Taken | Arrival::Unknown | Arrival::Later => None,
        };
        held.into_iter().filter_map(arrive).collect()
    }

    /// Takes note of an answer on its way out. Returns whether it is wanted.
    pub(super) fn answered(&mut self, destination: &str, serial: NonZeroU32, bytes: usize, now: Instant) -> bool {
        let Some(Caller::Known { uid, running }) = self.callers.get_mut(destination) else { return true };
        let (uid, Some(wanted)) = (*uid, running.remove(&serial)) else { return true };
        let was_full = self.running == RUNNING_IN_ALL;
        self.running -= 1;
        if let Some(user) = self.users.get_mut(&uid) {
            user.running -= 1;
            user.refill(now);
            #[expect(clippy::cast_precision_loss, reason = "a message has less than 2^52 bytes")]
            let cost = bytes as f64 / COST_BYTES;
            user.balance -= cost;
        }
        self.advance(uid, now);
        if was_full {
            self.tick(now);
        }
        wanted
    }

    /// Lets in what has waited for its user's balance.
    pub(super) fn tick(&mut self, now: Instant) {
        let waiting: Vec<u32> =
            self.users.iter().filter(|(_, user)| !user.waiting.is_empty()).map(|(uid, _)| *uid).collect();
        for uid in waiting {
            self.advance(uid, now);
        }
    }

    /// When [`tick`](Self::tick) has something to do.
    pub(super) fn due(&self) -> Option<Instant> {
        let blocked = |user: &&User| !user.waiting.is_empty() && user.running < RUNNING && user.balance < 1.0;
        let due = |user: &User| user.at + Duration::from_secs_f64((1.0 - user.balance).max(0.0) / RATE);
        self.users.values().filter(blocked).map(due).min()
    }

    /// Whether there is a message to let in.
    pub(super) fn has_next(&self) -> bool {
        !self.next.is_empty()
    }

    /// The next message to let in.
    pub(super) fn next(&mut self) -> Option<Vec<u8>> {
        self.next.pop_front()
    }

    /// Whose connection that is, if it has called.
    pub(super) fn uid(&self, sender: &str) -> Option<u32> {
        match self.callers.get(sender)? {
            Caller::Known { uid, .. } => Some(*uid),
            Caller::Unknown { .. } => None,
        }
    }

    fn queue(&mut self, uid: u32, call: Call, now: Instant) -> Result<(), Call> {
        let user = self.users.entry(uid).or_insert_with(|| User::new(now));
        let size = call.bytes.len();
        if user.waiting.len() == WAITING
            || user.waiting_bytes + size > WAITING_BYTES
            || self.waiting_bytes + size > WAITING_BYTES_IN_ALL
        {
            return Err(call);
        }
        user.waiting.push_back(call);
        user.waiting_bytes += size;
        self.waiting_bytes += size;
        self.advance(uid, now);
        Ok(())
    }

    /// Lets in what a user may have worked on now.
    fn advance(&mut self, uid: u32, now: Instant) {
        let Some(user) = self.users.get_mut(&uid) else { return };
        user.refill(now);
        while user.running < RUNNING && self.running < RUNNING_IN_ALL && user.balance >= 1.0 {
            let Some(mut call) = user.waiting.pop_front() else { return };
            user.waiting_bytes -= call.bytes.len();
            self.waiting_bytes -= call.bytes.len();
            let Some(Caller::Known { running, .. }) = self.callers.get_mut(&call.sender) else { continue };
            // One serial, one call (D-Bus specification, "Header Fields"). Twice, only one of them would end.
            if running.contains_key(&call.serial) {
                continue;
            }
            running.insert(call.serial, call.wants_reply);
            user.running += 1;
            user.balance -= 1.0;
            self.running += 1;
            super::frame::ask_for_reply(&mut call.bytes);
            self.next.push_back(call.bytes);
        }
    }

    /// Forgets who has nothing under way, once there are many. The bus gives no name twice.
    fn forget_idle(&mut self, now: Instant) {
        if self.callers.len() >= REMEMBERED {
            let waits = |uid: &u32| self.users.get(uid).is_some_and(|user| !user.waiting.is_empty());
            self.callers.retain(|_, caller| match caller {
                Caller::Unknown { .. } => true,
                Caller::Known { uid, running } => !running.is_empty() || waits(uid),
            });
            self.users.retain(|_, user| {
                user.refill(now);
                !user.is_idle()
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn call(sender: &str, serial: u32, size: usize) -> Call {
        let serial = NonZeroU32::new(serial).expect("not zero");
        Call { sender: sender.to_owned(), serial, wants_reply: serial.get().is_multiple_of(2), bytes: vec![1; size] }
    }

    /// A caller whom the bus has told us about.
    fn known(limits: &mut Limits, sender: &str, uid: u32, now: Instant) {
        assert_eq!(limits.arrive(call(sender, 1_000_000, 100), now), Arrival::Unknown);
        assert_eq!(limits.uid(sender), None);
        assert_eq!(limits.identified(sender, Some(uid), now), []);
        assert_eq!(limits.uid(sender), Some(uid));
        assert!(limits.next().is_some());
        limits.answered(sender, NonZeroU32::new(1_000_000).expect("not zero"), 0, now);
    }

    fn let_in(limits: &mut Limits) -> usize {
        std::iter::from_fn(|| limits.next()).count()
    }

    #[test]
    fn a_user_has_so_many_calls_at_a_time_over_however_many_connections() {
        let (mut limits, now) = (Limits::default(), Instant::now());
        let senders: Vec<String> = (0..20).map(|number| format!(":1.{number}")).collect();
        for sender in &senders {
            known(&mut limits, sender, 1000, now);
        }
        for sender in &senders {
            assert_eq!(limits.arrive(call(sender, 1, 100), now), Arrival::Taken);
        }
        assert_eq!(let_in(&mut limits), RUNNING);
        // One ends, the next begins.
        assert!(!limits.answered(&senders[0], NonZeroU32::MIN, 100, now), "this one wanted no reply");
        assert_eq!(let_in(&mut limits), 1);
        // An answer to what did not come through the gate goes out.
        assert!(limits.answered(&senders[0], NonZeroU32::MIN, 100, now));
        assert_eq!(let_in(&mut limits), 0);
    }

    #[test]
    fn what_is_beyond_waiting_is_refused_and_root_and_others_are_not() {
        let (mut limits, now) = (Limits::default(), Instant::now());
        known(&mut limits, ":1.1", 1000, now);
        known(&mut limits, ":1.2", 1001, now);
        known(&mut limits, ":1.3", 0, now);
        for serial in 1..=u32::try_from(RUNNING + WAITING).expect("few") {
            assert_eq!(limits.arrive(call(":1.1", serial, 100), now), Arrival::Taken);
        }
        assert_eq!(limits.arrive(call(":1.1", 999, 100), now), Arrival::Refused(call(":1.1", 999, 100)));
        assert_eq!(let_in(&mut limits), RUNNING);
        assert_eq!(limits.arrive(call(":1.2", 1, 100), now), Arrival::Taken);
        for serial in 1..=1000 {
            assert_eq!(limits.arrive(call(":1.3", serial, 100), now), Arrival::Taken);
        }
        assert_eq!(let_in(&mut limits), 1 + 1000);
    }

    #[test]
    fn a_user_has_so_much_in_a_second_and_large_answers_count() {
        let (mut limits, now) = (Limits::default(), Instant::now());
        known(&mut limits, ":1.1", 1000, now);
        let later = |seconds| now + Duration::from_secs(seconds);
        assert_eq!(limits.arrive(call(":1.1", 1, 100), now), Arrival::Taken);
        assert_eq!(let_in(&mut limits), 1);
        limits.answered(":1.1", NonZeroU32::MIN, 4096 * 1400, now);
        assert_eq!(limits.arrive(call(":1.1", 2, 100), now), Arrival::Taken);
        assert_eq!(let_in(&mut limits), 0);
        let due = limits.due().expect("it will be let in");
        assert!(due > later(1) && due < later(3), "{:?}", due - now);
        limits.tick(later(1));
        assert_eq!(let_in(&mut limits), 0);
        limits.tick(due + Duration::from_millis(1));
        assert_eq!(let_in(&mut limits), 1);
        assert_eq!(limits.due(), None);
    }

    #[test]
    fn a_caller_that_is_gone_before_it_is_known_takes_its_calls_along() {
        let (mut limits, now) = (Limits::default(), Instant::now());
        assert_eq!(limits.arrive(call(":1.1", 1, 100), now), Arrival::Unknown);
        assert_eq!(limits.arrive(call(":1.1", 2, 100), now), Arrival::Taken);
        assert_eq!(limits.identified(":1.1", None, now), []);
        assert_eq!((let_in(&mut limits), limits.unknown, limits.unknown_bytes), (0, 0, 0));
    }

    #[test]
    fn root_is_not_refused_before_it_is_known_that_it_is_root() {
        let (mut limits, now) = (Limits::default(), Instant::now());
        // Others have as much waiting as there may be.
        for user in 0..40 {
            let sender = format!(":2.{user}");
            known(&mut limits, &sender, 1000 + user, now);
            for serial in 1..40 {
                limits.arrive(call(&sender, serial, 32_000), now);
            }
        }
        let_in(&mut limits);
        assert!(limits.waiting_bytes + 40_000 > WAITING_BYTES_IN_ALL);
        // And as many of others as may be are not known yet, with as much as may be kept.
        let mut last = 0;
        while limits.arrive(call(&format!(":1.{last}"), 1, 40_000), now) == Arrival::Unknown {
            last += 1;
        }
        assert_eq!(limits.arrive(call(":1.0", 2, 40_000), now), Arrival::Later);
        for number in last..UNKNOWN {
            assert_eq!(limits.arrive(call(&format!(":1.{number}"), 1, 1), now), Arrival::Unknown);
        }
        assert_eq!(limits.arrive(call(":3.1", 1, 1), now), Arrival::Later);
        // One of them is known, and there is room.
        assert_eq!(limits.identified(":1.0", Some(2000), now).len(), 1, "nothing more of theirs can wait");
        assert_eq!(limits.arrive(call(":3.1", 1, 10_000), now), Arrival::Unknown);
        assert_eq!(limits.arrive(call(":3.1", 2, 10_000), now), Arrival::Taken);
        assert_eq!(limits.identified(":3.1", Some(0), now), []);
        assert_eq!(let_in(&mut limits), 2);
    }

    #[test]
    fn who_comes_and_goes_is_forgotten() {
        let (mut limits, now) = (Limits::default(), Instant::now());
        for number in 0..10_000 {
            known(&mut limits, &format!(":1.{number}"), number % 3000, now);
        }
        assert!(limits.callers.len() <= REMEMBERED, "{}", limits.callers.len());
    }

    #[derive(Clone, Debug)]
    enum Step {
        Arrive { sender: u32, size: usize },
        Identify { sender: u32, gone: bool },
        Answer { which: usize, size: usize },
        Wait { ms: u64 },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => (0..40u32, 16..70_000usize).prop_map(|(sender, size)| Step::Arrive { sender, size }),
            4 => (0..40u32, prop::bool::weighted(0.1)).prop_map(|(sender, gone)| Step::Identify { sender, gone }),
            4 => (any::<usize>(), 0..1_000_000usize).prop_map(|(which, size)| Step::Answer { which, size }),
            1 => (0..2_000u64).prop_map(|ms| Step::Wait { ms }),
        ]
    }

    proptest! {
        #[test]
        fn whatever_comes_the_limits_hold_and_nothing_is_left_behind(steps in prop::collection::vec(step(), 1..400)) {
            let (mut limits, mut now) = (Limits::default(), Instant::now());
            let uid = |sender: u32| sender % 5;
            let name = |sender: u32| format!(":1.{sender}");
            let (mut serial, mut running, mut open) = (0, Vec::new(), 0);
            let mut refused = 0;
            let take = |limits: &mut Limits, running: &mut Vec<(u32, u32)>, open: &mut usize| {
                while let Some(bytes) = limits.next() {
                    let number = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
                    *open -= 1;
                    if uid(number(8)) != 0 {
                        running.push((number(8), number(12)));
                    }
                }
            };
            for step in steps {
                match step {
                    Step::Arrive { sender, size } => {
                        serial += 1;
                        let mut call = call(&name(sender), serial, size);
                        call.bytes[8..12].copy_from_slice(&sender.to_le_bytes());
                        call.bytes[12..16].copy_from_slice(&serial.to_le_bytes());
                        match limits.arrive(call, now) {
                            Arrival::Refused(_) => {
                                prop_assert_ne!(uid(sender), 0);
                                refused += 1;
                            }
                            Arrival::Taken | Arrival::Unknown => open += 1,
                            Arrival::Later => prop_assert!(limits.unknown > 0),
                        }
                    }
                    Step::Identify { sender, gone } => {
                        if gone && let Some(Caller::Unknown { held }) = limits.callers.get(&name(sender)) {
                            open -= held.len();
                        }
                        let refused = limits.identified(&name(sender), (!gone).then_some(uid(sender)), now);
                        prop_assert!(uid(sender) != 0 || refused.is_empty());
                        open -= refused.len();
                    }
                    Step::Answer { which, size } if !running.is_empty() => {
                        let (sender, serial) = running.swap_remove(which % running.len());
                        let serial = NonZeroU32::new(serial).expect("not zero");
                        prop_assert_eq!(limits.answered(&name(sender), serial, size, now), serial.get().is_multiple_of(2));
                    }
                    Step::Answer { .. } => {}
                    Step::Wait { ms } => {
                        now += Duration::from_millis(ms);
                        limits.tick(now);
                    }
                }
                take(&mut limits, &mut running, &mut open);
                prop_assert_eq!(limits.running, running.len());
                prop_assert!(running.len() <= RUNNING_IN_ALL && limits.waiting_bytes <= WAITING_BYTES_IN_ALL);
                prop_assert!(limits.unknown <= UNKNOWN && limits.unknown_bytes <= UNKNOWN_BYTES);
                for user in limits.users.values() {
                    prop_assert!(user.running <= RUNNING && user.waiting.len() <= WAITING);
                    prop_assert!(user.waiting_bytes <= WAITING_BYTES);
                }
            }
            for sender in 0..40 {
                open -= limits.identified(&name(sender), Some(uid(sender)), now).len();
            }
            take(&mut limits, &mut running, &mut open);
            // Whatever is answered, and however late: all that was not refused is let in.
            loop {
                if running.is_empty() {
                    // What waits for its user's balance, and for nothing else.
                    now += Duration::from_secs(3600);
                    limits.tick(now);
                    take(&mut limits, &mut running, &mut open);
                }
                let Some((sender, serial)) = running.pop() else { break };
                limits.answered(&name(sender), NonZeroU32::new(serial).expect("not zero"), 100, now);
                take(&mut limits, &mut running, &mut open);
            }
            prop_assert_eq!((open, limits.running, limits.waiting_bytes), (0, 0, 0), "{}", refused);
            prop_assert_eq!((limits.unknown, limits.unknown_bytes), (0, 0));
        }
    }
}
