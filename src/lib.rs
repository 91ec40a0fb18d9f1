//! Declares, mounts and looks after layered Nix stores.
//!
//! What the daemon is, without the bus on which others ask it:
//!
//! ```no_run
//! use layered_stores::{
//!     supervisor::{Engine, Host, Settings},
//!     systemd::Units,
//! };
//! use layered_stores_model::config::{self, Keys};
//!
//! async fn serve(settings: Settings) -> Result<(), Box<dyn std::error::Error>> {
//!     let declared = config::load(&settings.config, &settings.defaults, Keys::Alone)?;
//!     let units = Units::connect(&zbus::Connection::system().await?).await?;
//!     let host = Host::open(settings, units).await?;
//!     let (events, _news) = tokio::sync::mpsc::unbounded_channel();
//!     let (engine, handle) = Engine::new(host, declared, events).await?;
//!     println!("{} stores are declared", handle.stores().len());
//!     Ok(engine.run(std::future::pending(), None, || ()).await?)
//! }
//! ```
#![forbid(unsafe_code)]

pub mod bus;
pub mod cli;
mod file;
pub mod supervisor;
pub mod systemd;
pub mod varlink;
