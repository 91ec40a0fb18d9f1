//! What is in stores, and what they need of the stores underneath.
//!
//! For each store that is up, the [index](layered_stores_nix_db::index) of whoever owns it tells which lower paths its database
//! refers to. Each of them has a root in the lower store (`gcroots/layered-stores/NAME/`) for as long as that is so, and with the
//! lower store's garbage collector [turns] are taken.
//!
//! Nothing here decides about a store or waits for the engine: it is told which stores are up, and tells what is found.

mod attendant;
mod index;
mod lower;
mod turns;

use std::{
    collections::{BTreeMap, HashMap},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use attendant::Attendant;
use index::Indexes;
use layered_stores_model::{AbsolutePath, Leases, StoreName, StoreSpec};
use layered_stores_nix_db::{
    index::protocol::{Contents, EXAMPLES, Lost},
    roots::Roots,
};
use lower::{Claim, LeaseError, Lower};
use tokio::{
    sync::{mpsc, watch},
    task::AbortHandle,
};
use turns::{Member, take_turns};

use super::handle::Command;
use crate::systemd::Units;

/// How long it is gathered which stores come up and go down: at a start, hundreds do.
const GATHER: Duration = Duration::from_millis(20);

/// A store that is up.
#[derive(Clone, Debug)]
pub(super) struct Attended {
    pub(super) spec: Arc<StoreSpec>,
    /// The layered stores that it lies on, the nearest first.
    pub(super) beneath: Vec<Arc<StoreSpec>>,
    /// Whom its database belongs to.
    pub(super) uid: u32,
    /// How often all of it was to be looked at anew.
    pub(super) round: u64,
}

impl PartialEq for Attended {
    fn eq(&self, other: &Self) -> bool {
        let Self { spec, beneath, uid, round } = self;
        let is_beneath = |(one, other): (&Arc<StoreSpec>, &Arc<StoreSpec>)| Arc::ptr_eq(one, other);
        Arc::ptr_eq(spec, &other.spec)
            && beneath.len() == other.beneath.len()
            && beneath.iter().zip(&other.beneath).all(is_beneath)
            && (uid, round) == (&other.uid, &other.round)
    }
}

/// All stores that are up.
pub(super) type Stores = Arc<Vec<Attended>>;

/// What was found of a store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What is in it, once that is known.
    pub(super) contents: Option<Contents>,
    /// How many paths are kept for it in the lower store.
    pub(super) leases: u64,
    /// Why its database cannot be read.
    pub(super) unreadable: Option<String>,
    /// Why what it uses is not kept in the lower store.
    pub(super) unleased: Option<String>,
}

impl Report {
    /// What is in the store, once that is known.
    pub fn contents(&self) -> Option<&Contents> {
        self.contents.as_ref()
    }

    /// How many paths are kept for it in the lower store.
    pub fn leases(&self) -> u64 {
        self.leases
    }

    /// What is said of paths whose files are nowhere, if there are any.
    pub(super) fn lost(&self, name: &StoreName) -> Option<String> {
        let contents = self.contents.as_ref().filter(|contents| contents.lost_paths > 0)?;
        let one = |lost: &Lost| match lost.referrers.as_slice() {
            [] => lost.name.to_string(),
            [referrer, ..] => format!("{} (needed by {referrer})", lost.name),
        };
        let named = contents.lost.iter().map(one).collect::<Vec<_>>().join(", ");
        let are_all = usize::try_from(contents.lost_paths).is_ok_and(|count| count <= EXAMPLES);
        let and_more = if are_all { "" } else { ", …" };
        let count = match contents.lost_paths {
            1 => "a valid path is".to_owned(),
            count => format!("{count} valid paths are"),
        };
        Some(format!(
            "{count} neither in the upper layer nor in the lower store: {named}{and_more}; copy what is needed into the lower store \
             again; a garbage collection in store {name} forgets the rest"
        ))
    }
}

/// Tells what was found of a store.
type Tell = Arc<dyn Fn(&StoreName, Report) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

/// What is done for one store.
struct Attendance {
    attended: Attended,
    /// The stores that it is a member of, and what is used of the nearest.
    lowers: Vec<Arc<Lower>>,
    task: AbortHandle,
}

impl Drop for Attendance {
    fn drop(&mut self) {
        self.task.abort();
        for lower in &self.lowers {
            lower.members().remove(&self.attended.spec.name);
        }
    }
}

/// Attends to the stores that are up, for as long as the engine tells which these are.
pub(super) async fn keep(mut stores: watch::Receiver<Stores>, units: Units, engine: mpsc::WeakSender<Command>) {
    let indexes = Indexes::new(units);
    let lowers = Lowers::default();
    let mut attendances: BTreeMap<StoreName, Attendance> = BTreeMap::new();
    let tell: Tell = Arc::new(move |name, report| {
        let (engine, name) = (engine.clone(), name.clone());
        Box::pin(async move {
            if let Some(engine) = engine.upgrade() {
                let _ = engine.send(Command::Found(name, Box::new(report))).await;
            }
        })
    });
    loop {
        let up = Arc::clone(&stores.borrow_and_update());
        let by_name: HashMap<_, _> = up.iter().map(|attended| (&attended.spec.name, attended)).collect();
        attendances.retain(|name, attendance| by_name.get(name).is_some_and(|now| **now == attendance.attended));
        for attended in &*up {
            attendances
                .entry(attended.spec.name.clone())
                .or_insert_with(|| begin(attended, &lowers, &indexes, Arc::clone(&tell)));
        }
        if stores.changed().await.is_err() {
            return;
        }
        tokio::time::sleep(GATHER).await;
    }
}

fn begin(attended: &Attended, lowers: &Lowers, indexes: &Indexes, tell: Tell) -> Attendance {
    let spec = &attended.spec;
    let lower = Arc::new(Lower::new(spec.lower_state_dir()));
    let (sync, syncs) = mpsc::channel(1);
    let shared: Vec<_> = match spec.leases {
        // With nobody's collector are turns taken for it.
        Leases::None => Vec::new(),
        Leases::Used | Leases::All => {
            let chain = std::iter::once(spec).chain(&attended.beneath);
            chain.map(|spec| lowers.of(&spec.lower_state_dir())).collect()
        }
    };
    for lower in &shared {
        let member = Member { spec: Arc::clone(spec), sync: sync.clone() };
        lower.members().insert(spec.name.clone(), member);
    }
    let lower = shared.first().cloned().unwrap_or(lower);
    let attendant = Attendant::new(attended, lower, indexes, syncs, tell);
    let task = tokio::spawn(attendant.attend(indexes.clone())).abort_handle();
    Attendance { attended: attended.clone(), lowers: shared, task }
}

/// Keeps nothing more in the lower store for a store that is gone. Blocks.
///
/// # Errors
/// When that cannot be looked into.
pub(super) fn give_up(spec: &StoreSpec) -> Result<bool, LeaseError> {
    let state_dir = spec.lower_state_dir();
    let claim = Claim::take(&state_dir, &spec.name);
    claim.with(|| Ok(Roots::drop_all(Lower::open(&state_dir)?, spec.name.as_str())?))
}

/// The stores underneath, each for as long as somebody has it.
#[derive(Clone, Default)]
struct Lowers(Arc<Mutex<HashMap<AbsolutePath, Weak<Lower>>>>);

impl Lowers {
    fn of(&self, state_dir: &AbsolutePath) -> Arc<Lower> {
        let mut lowers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lowers.retain(|_, lower| lower.strong_count() > 0);
        if let Some(lower) = lowers.get(state_dir).and_then(Weak::upgrade) {
            return lower;
        }
        let lower = Arc::new(Lower::new(state_dir.clone()));
        lowers.insert(state_dir.clone(), Arc::downgrade(&lower));
        tokio::spawn(take_turns(Arc::downgrade(&lower), self.clone()));
        lower
    }

    /// A store underneath, if somebody has it.
    fn known(&self, state_dir: &AbsolutePath) -> Option<Arc<Lower>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(state_dir)?.upgrade()
    }
}
