//! Why declarations do not make a stack, in words for people.

use super::MAX_DEPTH;
use crate::{AbsolutePath, PathError, StoreName, UnitNameTooLong};

/// Why declarations do not make a stack. Each names the store, the key, the value and the way out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Conflict {
    /// The store whose declaration has to change.
    pub store: StoreName,
    /// The key that holds the offending value.
    pub key: &'static str,
    /// The offending value.
    pub value: String,
    /// What is wrong and what to do.
    pub reason: Reason,
}

/// The reasons of a [`Conflict`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// `layered:NAME` without a store of that name.
    #[error("no store {0:?} is declared here{hint}", hint = did_you_mean(.1.as_deref()))]
    NoSuchStore(StoreName, Option<String>),
    /// A store that lies on itself.
    #[error("the store lies on itself ({}); let one of them have a lower store of its own", chain(.0))]
    Loop(Vec<StoreName>),
    /// More levels than the kernel takes.
    #[error(
        "the kernel stacks at most {MAX_DEPTH} overlays and this would be number {} ({}); \
         use the lower store of {} instead",
        .0.len(), chain(.0), .0[1]
    )]
    TooDeep(Vec<StoreName>),
    /// A store on one that belongs to somebody else. Nix opens both, as one user: as root it would follow what the other's owner
    /// has put there, and as anybody else it cannot write to the other's database.
    #[error(
        "the store {0:?} belongs to {1} and this one to {2}, and Nix opens both as one user; give both the same owner"
    )]
    OtherOwner(StoreName, String, String),
    /// Two directories that are one, or one inside the other.
    #[error("{relation} {key} of {owner} ({value}); give each a directory of its own",
        relation = if *.nested { "it lies inside the" } else { "it is also the" },
        owner = of_store(.owner.as_ref()))]
    Overlap {
        /// The other directory's store; `None` for the same store.
        owner: Option<StoreName>,
        /// The other directory's key.
        key: &'static str,
        /// The other directory.
        value: AbsolutePath,
        /// Whether one is inside the other.
        nested: bool,
    },
    /// A path where `layered:NAME` is meant.
    #[error("this is the store {0:?} of this configuration; write \"layered:{0}\"")]
    WriteLayered(StoreName),
    /// A lower store in a directory that the store itself writes.
    #[error("the lower store's directory {dir} lies inside the {key} of {owner} ({value}); a lower store has to lie apart",
        owner = of_store(.owner.as_ref()))]
    LowerInside {
        /// The lower store's directory.
        dir: AbsolutePath,
        /// The other directory's store; `None` for the same store.
        owner: Option<StoreName>,
        /// The other directory's key.
        key: &'static str,
        /// The other directory.
        value: AbsolutePath,
    },
    /// A path derived from the root is no path the kernel takes.
    #[error("with {tail} below it: {error}")]
    Derived {
        /// What is appended.
        tail: &'static str,
        /// Why the whole is refused.
        error: PathError,
    },
    /// Two Nix daemons on one socket.
    #[error("it is also the socket of store {0:?}; give each a socket of its own")]
    SharedSocket(StoreName),
    /// The mount unit's name would be too long.
    #[error(transparent)]
    UnitName(#[from] UnitNameTooLong),
}

fn did_you_mean(nearest: Option<&str>) -> String {
    nearest.map(|n| format!("; did you mean {n:?}?")).unwrap_or_else(|| "; declare it, or name another".to_owned())
}

fn chain(names: &[StoreName]) -> String {
    names.iter().map(StoreName::as_str).collect::<Vec<_>>().join(" on ")
}

fn of_store(owner: Option<&StoreName>) -> String {
    owner.map_or_else(|| "the same store".to_owned(), |name| format!("store {name:?}"))
}
