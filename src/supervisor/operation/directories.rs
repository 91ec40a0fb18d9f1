//! Whether the directories that are there are a store's, by what is known of them.

use layered_stores_model::StoreSpec;
use layered_stores_overlay::{
    identity::{self, Known},
    layers::LayersError,
};

/// Looks at a store's directories, with what is known of them; this is returned as well. The store's own records do not count if
/// other directories are there that belong together, such as a backup that was put back, which is told.
pub(super) fn with_what_is_there<'k, T>(
    spec: &StoreSpec,
    known: Known<'k>,
    look: impl Fn(&StoreSpec, Known<'_>) -> Result<T, LayersError>,
) -> Result<(Known<'k>, T), LayersError> {
    let (taken, found) = among_what_is_there(spec, known, look)?;
    if taken.own.len() < known.own.len() {
        let (name, upper) = (&spec.name, &spec.layers.upper);
        tracing::warn!(
            store = %name,
            "{name}: {upper} and the database in {} are not those it had before, and belong together; they are taken",
            spec.state_dir
        );
    }
    Ok((taken, found))
}

/// The same where nothing is taken yet.
pub(super) fn among_what_is_there<'k, T>(
    spec: &StoreSpec,
    known: Known<'k>,
    look: impl Fn(&StoreSpec, Known<'_>) -> Result<T, LayersError>,
) -> Result<(Known<'k>, T), LayersError> {
    let error = match look(spec, known) {
        Ok(found) => return Ok((known, found)),
        Err(error) => error,
    };
    if !matches!(error, LayersError::Another { .. }) || !identity::is_another_pair(spec, known)? {
        return Err(error);
    }
    let known = Known { own: &[], ..known };
    let found = look(spec, known)?;
    Ok((known, found))
}
