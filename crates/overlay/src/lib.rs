//! The kernel's side: layer directories, the mount table, and keeping the merged view right.
//!
//! Everything here blocks and acts in the mount namespace of the calling thread; [`host`] says which that is.
//!
//! ```no_run
//! use layered_stores_model::StoreSpec;
//! use layered_stores_overlay::{
//!     identity::Known,
//!     layers::prepare,
//!     mount::{mount, unmount},
//!     refresh::{Changes, Rung, refresh},
//! };
//!
//! /// Mounts a store, and takes note of what has changed in its lower store since.
//! fn serve(store: &StoreSpec) -> Result<(), Box<dyn std::error::Error>> {
//!     let (_lock, marks) = prepare(store, Known::of(&[]))?;
//!     let upper = marks.upper.and_then(|mark| mark.id);
//!     mount(&store.layers, upper.as_ref())?;
//!     let rungs = (Rung::Reconfigure, Rung::Swap);
//!     let (report, _old) = refresh(&store.layers, &Changes::unknown(), rungs, None, &[], &());
//!     println!("{:?}", report?.outcome);
//!     Ok(unmount(&store.layers)?)
//! }
//! ```

pub mod context;
mod ephemeral;
pub mod glance;
pub mod holders;
pub mod host;
pub mod identity;
pub mod layers;
pub mod left;
pub mod lock;
mod mark;
pub mod mount;
pub mod mountinfo;
pub mod options;
pub mod owner;
pub mod place;
pub mod probe;
pub mod progress;
mod queue;
pub mod refresh;
pub mod remove;
pub mod room;
pub mod swap;
mod walk;
pub mod watch;
