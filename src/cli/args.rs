//! What can be written on the command line.

use std::{ffi::OsString, path::PathBuf};

use clap::{CommandFactory as _, Parser, Subcommand};
use layered_stores_model::{AbsolutePath, StoreName, config};

use super::{
    collect::amounts::{Bytes, Days},
    log::Shown,
};

/// Declares, mounts and looks after layered Nix stores.
///
/// A layered store is a writable Nix store over a shared read-only one. Stores are declared in
/// /etc/layered-stores/config.toml; layered-storesd mounts and supervises them.
#[derive(Debug, Parser)]
#[command(name = "layered-stores", version, after_help = format!("{EXIT_STATUS}\n\n{FIRST_STEPS}"), max_term_width = 100)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

impl Arguments {
    /// Whether a word is the name of a command.
    pub fn is_command(word: &str) -> bool {
        Self::command().get_subcommands().any(|command| command.get_name() == word)
    }
}

/// The code that a command ends with when there are problems with what was looked at.
pub(super) const PROBLEMS: u8 = 3;

/// What the codes mean that commands end with.
pub(super) const EXIT_STATUS: &str = "\
Exit status: 0 success, 1 failure, 2 wrong use, 3 there are problems (status, verify,
doctor), stores that are not active (start, reload) or less free than wanted (gc), 130
cancelled by Ctrl-C (verify, gc, optimise).";

const FIRST_STEPS: &str = "\
Build into the store \"ci\":  nix build --store \"$(layered-stores uri ci)\" …
Use what was built there:   layered-stores enter ci -- /nix/store/…/bin/hello";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Name all stores and their states
    List {
        /// Name what is left of stores that are not declared any more, and where it is
        #[arg(long)]
        left_over: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show how stores are: is it up, what is underneath, what is in it, what is wrong and what to do
    Status {
        /// The stores; all, a line each, when none is named
        names: Vec<StoreName>,
        /// Print JSON: one object for one named store, an array else
        #[arg(long)]
        json: bool,
        /// Go on showing it, until interrupted
        #[arg(long, conflicts_with = "json")]
        watch: bool,
    },
    /// Print the URL under which Nix opens a store
    ///
    /// Whatever fails, something is printed all the same that no Nix opens: Nix would take nothing at all for the machine's
    /// own store. A store that is not active has no URL.
    Uri {
        /// The store
        name: StoreName,
        /// The URL of the store's own Nix daemon, which may be used by others than root and the store's owner
        #[arg(long)]
        daemon: bool,
    },
    /// Bring stores up, and those they lie on
    Start {
        /// The stores
        #[arg(required = true)]
        names: Vec<StoreName>,
    },
    /// Take stores down; their data stays
    Stop {
        /// The stores
        #[arg(required = true)]
        names: Vec<StoreName>,
    },
    /// Make the merged view of stores agree with their layers again, as Nix's remount hook does
    Remount {
        /// The stores
        #[arg(required = true)]
        names: Vec<StoreName>,
    },
    /// Look at every path of a store and name those whose merged view is wrong
    ///
    /// On a terminal it is shown how far that is. Ctrl-C cancels it; once more, and nobody waits for the daemon to do so.
    Verify {
        /// The store
        name: StoreName,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Delete what nothing uses from the upper layer of a store, and say how much that has freed
    ///
    /// Nix does it, as whoever the store belongs to; the lower store is not touched. What is in use is what Nix's garbage
    /// collector takes for it. Ctrl-C ends it after the path at which it is, and the store is refreshed.
    Gc {
        /// The store
        name: StoreName,
        /// Delete no more than it takes until so much is free on the filesystem of the upper layer, the oldest first
        #[arg(long, value_name = "SIZE")]
        until_free: Option<Bytes>,
        /// Remove old generations of the profiles in the store's state directory first, as nix-collect-garbage
        /// --delete-older-than does it, such as 30d
        #[arg(long, value_name = "AGE")]
        older_than: Option<Days>,
        /// Say what would go, and change nothing
        #[arg(long)]
        dry_run: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Delete what the lower store has as well from the upper layer of a store
    ///
    /// Nix does it, as whoever the store belongs to. Nobody sees any of it: the same paths show through from below.
    Optimise {
        /// The store
        name: StoreName,
        /// Say what would go, and change nothing
        #[arg(long)]
        dry_run: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what the journal has about a store, by running journalctl
    ///
    /// Entries are those of layered-storesd with the store's name in their field STORE; those about a problem have its code in the
    /// field PROBLEM. What its Nix daemon and its builds say is in `journalctl -u layered-stores-nix-daemon@NAME`.
    Log {
        /// The store
        name: StoreName,
        /// Which entries, and how
        #[command(flatten)]
        shown: Shown,
    },
    /// Print figures for Prometheus: states, problems, refreshes, room, jobs
    ///
    /// A daemon that does not run is one of them (layered_stores_up 0), and is not started. layered-stores-metrics.timer has the
    /// figures written for a node exporter, layered-stores-metrics.socket answers who asks it over HTTP.
    Metrics {
        /// Put them into this file, in one step, for the node exporter's textfile collector
        #[arg(long, value_name = "FILE")]
        textfile: Option<PathBuf>,
    },
    /// Remove all that is in a store that is stopped, or what is left of one that is not declared any more
    ///
    /// Its paths, its database and its build logs are gone then. A declared store is empty when it is started the next time.
    /// What is interrupted is finished by running it again.
    RemoveData {
        /// The store
        name: StoreName,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Wait until stores are active
    Wait {
        /// The stores; all required ones when none is named
        names: Vec<StoreName>,
        /// How long to wait, in seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 300)]
        timeout: u64,
    },
    /// Make the daemon read its configuration again; with mistakes in it, the old one stays
    Reload,
    /// Check a configuration without a daemon
    CheckConfig {
        /// The configuration
        #[arg(default_value = config::DEFAULT_PATH)]
        file: PathBuf,
        /// Where stores live that are given no place of their own
        #[arg(long, value_name = "DIRECTORY", default_value = config::DEFAULT_STATE_DIR)]
        state_dir: AbsolutePath,
        /// Name the option of the NixOS module beside each key
        #[arg(long)]
        nixos_options: bool,
        /// Print JSON: what is declared, or with mistakes, these
        #[arg(long)]
        json: bool,
    },
    /// Look at the machine: kernel, Nix and its settings, the daemon, what was mounted by hand
    ///
    /// Says of each whether it is as layered stores need it, and what to do if it is not. Nothing is changed. Run by root it
    /// sees more than run by others.
    Doctor {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Run a command that sees a store at /nix, in a mount namespace of its own
    Enter {
        /// The store
        name: StoreName,
        /// The command and its arguments; a shell when none is given
        #[arg(last = true)]
        command: Vec<OsString>,
    },
}

/// What others than people run: not among the commands, so that nothing offers it.
#[derive(Debug, Parser)]
#[command(name = "layered-stores")]
pub struct InternalArguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Internal,
}

impl InternalArguments {
    /// Whether a word is the name of such a command.
    pub fn is_command(word: &str) -> bool {
        Self::command().get_subcommands().any(|command| command.get_name() == word)
    }
}

/// The commands that units, completions and `make install` run.
#[derive(Debug, Subcommand)]
pub enum Internal {
    /// Become the Nix daemon of a store; layered-stores-nix-daemon@.service runs this
    NixDaemon {
        /// The store
        name: StoreName,
    },
    /// Answer one client of layered-stores-metrics.socket, which is standard input; layered-stores-metrics@.service runs this
    ServeMetrics,
    /// Say what room there is on the filesystems that are mounted there; `metrics` runs this
    CountRoom {
        /// The mount points
        points: Vec<String>,
    },
    /// Do what standard input says to a store; `gc` and `optimise` run this
    Collect {
        /// Become this user first
        #[arg(long = "as", value_name = "UID")]
        user: Option<u32>,
    },
    /// Count what directories hold that are named on standard input; `status` runs this
    Count,
    /// Write the manual pages into a directory
    GenerateMan {
        /// The directory
        directory: PathBuf,
    },
    /// Write the completions for shells into a directory
    GenerateCompletions {
        /// The directory
        directory: PathBuf,
    },
    /// Name the stores, for completions: quickly, and without starting a daemon
    StoreNames,
}

/// Makes layered Nix stores exist, keeps them right, and tells the truth about them over D-Bus.
///
/// Started by systemd as layered-storesd.service. SIGHUP reloads the configuration.
#[derive(Debug, Parser)]
#[command(name = "layered-storesd", version, max_term_width = 100)]
pub struct DaemonArguments {
    /// Configuration file; one that does not exist declares no stores
    #[arg(long, value_name = "FILE", default_value = config::DEFAULT_PATH)]
    pub config: PathBuf,

    /// Where stores live that the configuration gives no place of their own
    #[arg(long, value_name = "DIRECTORY", default_value = config::DEFAULT_STATE_DIR)]
    pub state_dir: AbsolutePath,

    /// Where notes are kept until the next boot
    #[arg(long, value_name = "DIRECTORY", default_value = config::DEFAULT_RUNTIME_DIR)]
    pub runtime_dir: PathBuf,

    /// The executable Nix calls when a store has to be refreshed [default: beside this one]
    #[arg(long, value_name = "FILE", env = "LAYERED_STORES_REMOUNT_HOOK")]
    pub remount_hook: Option<AbsolutePath>,
}

/// The remount hook's command line, for its manual page; the hook itself reads its one argument by hand.
pub fn hook_command() -> clap::Command {
    let argument = clap::Arg::new("real_store_dir").value_name("REAL_STORE_DIR").required(true);
    clap::Command::new("layered-stores-remount")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Makes the merged directory of a layered Nix store agree with its layers again")
        .long_about(
            "Nix's remount hook: makes the merged directory REAL_STORE_DIR of a layered store agree with its layers \
             again. It asks layered-storesd, over its socket or over D-Bus, and waits up to 60 seconds; where there is no daemon, it \
             reconfigures the overlay mount by itself if it is privileged to. Nix is told to call it by the store URL \
             that `layered-stores uri` prints.",
        )
        .after_help("Exit status: 0 done, 1 failed, 2 wrong use.")
        .arg(argument.help("Nix's real store dir: <root>/nix/store"))
}
