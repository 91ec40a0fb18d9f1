//! Where a store comes from.

use serde::{Deserialize, Serialize};

/// Who has declared a store, and so decides for how long it is to be there.
///
/// It is in the record of a store: a version that does not know the source of a record cannot tell whether the store is still
/// wanted, and leaves it alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// The configuration: it is wanted for as long as the file declares it.
    #[default]
    Configuration,
}
