//! What of a store may be removed: what it is known to have made and filled.
//!
//! A path may have been mistyped, a filesystem may be mounted at two places, and a removal that was cut short may be begun again
//! with other directories. So a directory has to be on record for the store, or a mark beside it tells that it was being emptied
//! before. A state dir goes with its own upper layer, and never with that of another database.

use std::os::fd::{AsFd as _, OwnedFd};

use layered_stores_model::{AbsolutePath, StoreSpec};

use super::{RemoveError, existing, sys};
use crate::{
    identity::{self, Expected, Id, Known},
    mark::Removing,
    walk::Walk,
};

/// What may be removed.
pub(super) struct Claim {
    /// The upper layer. `None` if it is not there, or empty and not known to be the store's.
    pub(super) upper: Option<OwnedFd>,
    /// Whether the state dir goes.
    pub(super) state: bool,
    /// A state dir that is left alone, because its database belongs to another upper layer.
    pub(super) left: Option<AbsolutePath>,
    /// The marks of what goes.
    pub(super) removing: Removing,
}

/// Says what of a store may be removed. `begun` is what the mark of an earlier removal says.
pub(super) fn claim(spec: &StoreSpec, known: Known<'_>, begun: Option<&Removing>) -> Result<Claim, RemoveError> {
    let (upper, state) = identity::expected(spec, known);
    let (upper_dir, found) = directory("upper-layer", &spec.layers.upper, &upper)?;
    let is_upper = is_own(&upper, upper_dir.as_ref(), found.as_ref())?
        // One that has a mark by now is another one.
        || (found.is_none() && upper.is_unmarked())
        || begun.is_some_and(|begun| begun.is_of_upper(found.as_ref()));
    if !is_upper && let Some(dir) = &upper_dir {
        let path = &spec.layers.upper;
        if identity::example_of(dir.as_fd()).map_err(sys("list", path.as_str()))?.is_some() {
            return Err(RemoveError::Strange { path: path.clone(), store: spec.name.to_string() });
        }
    }
    // The marks that this upper layer has, or had when it was there.
    let mut uppers: Vec<&Id> = upper.ids().chain(begun.and_then(|begun| begun.upper.as_ref())).collect();
    uppers.extend(found.as_ref().filter(|_| is_upper));

    let (state_dir, id) = directory("root", &spec.state_dir, &state)?;
    let mut claim = Claim { upper: None, state: false, left: None, removing: Removing::default() };
    if let Some(dir) = &state_dir {
        let look = sys("look at", spec.state_dir.as_str());
        let told = Id::of_upper(dir).map_err(&look)?;
        claim.state = match &told {
            Some(_) => {
                uppers.iter().try_fold(false, |told, id| Ok(told || identity::tells(dir, id)?)).map_err(&look)?
            }
            None => {
                is_own(&state, state_dir.as_ref(), id.as_ref())?
                    || (id.is_none() && state.is_unmarked())
                    || begun.is_some_and(|begun| begun.is_of_state(id.as_ref()))
            }
        };
        // What Nix has not used yet can stay: the store begins anew with it.
        if !claim.state && identity::has_database(dir.as_fd()).map_err(&look)? {
            let state_dir = spec.state_dir.clone();
            match (begun, told) {
                (Some(_), _) => claim.left = Some(state_dir),
                (None, Some(_)) => {
                    let upper = spec.layers.upper.clone();
                    return Err(RemoveError::OtherPair { state_dir, upper });
                }
                (None, None) => {
                    let store = spec.name.to_string();
                    return Err(RemoveError::StrangeDatabase { state_dir, store });
                }
            }
        }
    }
    // A mark that is not there any more is that which a state dir belongs to.
    claim.removing.upper = found.filter(|_| is_upper).or_else(|| upper.ids().next().cloned());
    claim.removing.state = id.filter(|_| claim.state);
    claim.upper = upper_dir.filter(|_| is_upper);
    Ok(claim)
}

fn is_own(expected: &Expected<'_>, dir: Option<&OwnedFd>, found: Option<&Id>) -> Result<bool, RemoveError> {
    Ok(dir.map(|dir| expected.is_own(found, dir.as_fd())).transpose()?.unwrap_or_default())
}

/// A directory that is there, and its mark. Another store's is refused.
fn directory(
    key: &'static str,
    path: &AbsolutePath,
    expected: &Expected<'_>,
) -> Result<(Option<OwnedFd>, Option<Id>), RemoveError> {
    let Some(dir) = existing(Walk::new(key).to(path))? else { return Ok((None, None)) };
    let found = expected.refuse_others(dir.as_fd())?;
    Ok((Some(dir), found))
}
