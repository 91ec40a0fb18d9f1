//! Whether a store still belongs to whom the configuration gives it.
//!
//! Nix that is run by root on a store directly, with build users on the machine, takes the store directory over
//! (`LocalStore::LocalStore`): the owner cannot write to the store any more. And what root's Nix daemon works in has to be
//! root's, because it follows links there.

use layered_stores_model::{AbsolutePath, StoreName, StoreSpec};
use nix::unistd::{Uid, User};
use rustix::io::Errno;

use super::layers::{LayersError, declared_owner, refuse_others};

/// A store does not belong to whom it should.
#[derive(Debug, thiserror::Error)]
pub enum OwnerError {
    /// There is no such user.
    #[error(transparent)]
    Account(#[from] LayersError),
    /// One of its directories cannot be looked at.
    #[error("cannot look at {path}: {errno}")]
    Look {
        /// The directory.
        path: AbsolutePath,
        /// The kernel's answer.
        errno: Errno,
    },
    /// It is root's, and others can change what root's Nix follows.
    #[error(transparent)]
    Others(LayersError),
    /// One of its directories is somebody else's.
    #[error(
        "{path} belongs to {found}, and the store to {wanted}, as after {found} has run Nix on it directly; give it back with \
         `layered-stores stop {name}`, `chown -hR {wanted}: {upper} {root}/nix/var/nix {root}/nix/var/log/nix` and \
         `layered-stores start {name}`, or change `owner`",
        name = spec.name,
        upper = spec.layers.upper,
        root = spec.root
    )]
    Other {
        /// The directory.
        path: AbsolutePath,
        /// Its owner.
        found: String,
        /// Whom the configuration names.
        wanted: String,
        /// The store.
        spec: Box<StoreSpec>,
    },
    /// Something is wrong with the layered store underneath, in which root's Nix works as well.
    #[error("the store {0} underneath: {1}")]
    Underneath(StoreName, Box<Self>),
}

impl OwnerError {
    /// Whether root's Nix goes where others lead it.
    pub fn leads_root(&self) -> bool {
        match self {
            Self::Others(_) => true,
            Self::Underneath(_, error) => error.leads_root(),
            Self::Account(_) | Self::Look { .. } | Self::Other { .. } => false,
        }
    }

    /// Whether directories were found to be others', and not only that it cannot be told whose they are.
    pub fn is_certain(&self) -> bool {
        match self {
            Self::Other { .. } | Self::Others(_) => true,
            Self::Underneath(_, error) => error.is_certain(),
            Self::Account(_) | Self::Look { .. } => false,
        }
    }
}

/// The user whom a store belongs to, by the configuration and by its directories, and by those of the layered store
/// `underneath` if root's Nix is to work there: what shows through from it, or is in its state directory, is followed as well.
///
/// # Errors
/// [`OwnerError`] when the two do not agree, or cannot be told.
pub fn owner(spec: &StoreSpec, underneath: Option<&StoreSpec>) -> Result<u32, OwnerError> {
    let owner = own(spec)?;
    if owner == 0
        && let Some(below) = underneath
    {
        own(below).map_err(|error| OwnerError::Underneath(below.name.clone(), Box::new(error)))?;
    }
    Ok(owner)
}

fn own(spec: &StoreSpec) -> Result<u32, OwnerError> {
    let wanted = declared_owner(&spec.ownership)?;
    for path in [&spec.layers.upper, &spec.state_dir] {
        let look = |errno| OwnerError::Look { path: path.clone(), errno };
        let found = rustix::fs::lstat(path.as_path()).map_err(look)?.st_uid;
        if found != wanted {
            let (found, wanted) = (user_name(found), user_name(wanted));
            return Err(OwnerError::Other { path: path.clone(), found, wanted, spec: Box::new(spec.clone()) });
        }
    }
    if wanted == 0 {
        match refuse_others(spec) {
            // Nobody could be told more by what cannot be looked at now, such as a lower store that is hidden.
            Ok(()) | Err(LayersError::LowerMissing(_) | LayersError::Sys { .. } | LayersError::NameService { .. }) => {}
            Err(error) => return Err(OwnerError::Others(error)),
        }
    }
    Ok(wanted)
}

/// The name of a user, or the number where there is none.
pub fn user_name(uid: u32) -> String {
    User::from_uid(Uid::from_raw(uid)).ok().flatten().map_or_else(|| uid.to_string(), |user| user.name)
}
