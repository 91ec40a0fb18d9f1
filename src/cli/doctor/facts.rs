//! What a machine says about itself.

use std::{
    fs,
    path::Path,
    sync::mpsc,
    time::{Duration, Instant},
};

use layered_stores_client::{Client, Properties};
use layered_stores_model::config::{self, DEFAULT_PATH, DEFAULT_STATE_DIR, Defaults, Keys};
use rustix::fs::FsWord;

use crate::cli::program::said_by;

/// How long another program may take, and how long all filesystems together.
const PATIENCE: Duration = Duration::from_secs(5);

/// All of it. What could not be found out is empty or `None`.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    /// The kernel's release, as `uname -r` has it.
    pub(super) kernel: String,
    /// `/proc/filesystems`.
    pub(super) filesystems: String,
    /// Whether there is a module for OverlayFS that can be loaded.
    pub(super) has_module: bool,
    /// `mount --version`.
    pub(super) mount: Option<String>,
    /// `nix --version`.
    pub(super) nix: Option<String>,
    /// `nix config show --json`.
    pub(super) settings: Option<serde_json::Value>,
    /// The mistakes in the configuration.
    pub(super) mistakes: Option<String>,
    /// The names of the stores that the configuration declares.
    pub(super) declared: Vec<String>,
    /// What the daemon says of all stores, or why it says nothing.
    pub(super) stores: Result<Vec<Properties>, String>,
    /// The mount table of whoever asks.
    pub(super) mounts: String,
    /// The type of the filesystem of each lower store directory, as statfs(2) has it; `None`: it does not answer.
    pub(super) lower: Vec<(String, Option<FsWord>)>,
    /// The mount table of the machine's Nix daemon, if that has a mount namespace of its own.
    pub(super) daemon_mounts: Option<String>,
}

impl Facts {
    pub(super) async fn gather() -> Self {
        let kernel = read("/proc/sys/kernel/osrelease").trim().to_owned();
        let stores = stores().await;
        let (mistakes, declared) = configuration();
        let run = |program: &str, arguments: &[&str]| said_by(program, arguments, PATIENCE);
        let settings = run("nix", &["--extra-experimental-features", "nix-command", "config", "show", "--json"]);
        Self {
            has_module: has_module(&kernel),
            filesystems: read("/proc/filesystems"),
            mount: run("mount", &["--version"]),
            nix: run("nix", &["--version"]),
            settings: settings.and_then(|text| serde_json::from_str(&text).ok()),
            mistakes,
            declared,
            mounts: read("/proc/self/mountinfo"),
            lower: filesystems(stores.iter().flatten().map(|store| store.lower_store_dir.clone()).collect()),
            daemon_mounts: daemon_mounts(run("systemctl", &["show", "nix-daemon.service", "-P", "MainPID"])),
            kernel,
            stores,
        }
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn has_module(kernel: &str) -> bool {
    // NixOS has those of the kernel that runs in a place of their own.
    let modules =
        [format!("/lib/modules/{kernel}"), "/run/booted-system/kernel-modules/lib/modules".to_owned() + "/" + kernel];
    let lists =
        modules.iter().flat_map(|modules| ["modules.dep", "modules.builtin"].map(|list| format!("{modules}/{list}")));
    lists.into_iter().any(|list| read(&list).contains("/overlay.ko"))
}

async fn stores() -> Result<Vec<Properties>, String> {
    let stores = async { Client::connect().await?.all().await };
    stores.await.map_err(|error| error.to_string())
}

/// The mistakes in the configuration, and the names of what it declares.
fn configuration() -> (Option<String>, Vec<String>) {
    let path = Path::new(DEFAULT_PATH);
    if !path.exists() {
        return (None, Vec::new());
    }
    let (Ok(state_dir), Ok(remount_hook)) = (DEFAULT_STATE_DIR.parse(), "/usr/bin/layered-stores-remount".parse())
    else {
        return (None, Vec::new());
    };
    match config::load(path, &Defaults { state_dir, remount_hook }, Keys::Alone) {
        Ok(config) => (None, config.stores.iter().map(|store| store.name.to_string()).collect()),
        Err(error) => (Some(error.to_string()), Vec::new()),
    }
}

/// The filesystems that directories lie on. Each is asked by a thread of its own, and one that does not answer is left behind.
fn filesystems(mut directories: Vec<String>) -> Vec<(String, Option<FsWord>)> {
    directories.sort();
    directories.dedup();
    let (sender, answers) = mpsc::channel();
    for directory in directories.clone() {
        let sender = sender.clone();
        std::thread::spawn(move || {
            let of = rustix::fs::statfs(directory.as_str()).ok().map(|stat| stat.f_type);
            let _ = sender.send((directory, of));
        });
    }
    drop(sender);
    let (mut found, deadline) = (Vec::new(), Instant::now() + PATIENCE);
    while let Ok(answer) = answers.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        found.push(answer);
    }
    let silent = directories.into_iter().filter(|directory| !found.iter().any(|(known, _)| known == directory));
    let silent: Vec<_> = silent.map(|directory| (directory, None)).collect();
    found.extend(silent);
    found.sort();
    found
}

fn daemon_mounts(pid: Option<String>) -> Option<String> {
    let pid: u32 = pid?.trim().parse().ok().filter(|pid| *pid != 0)?;
    let namespace = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    if namespace(pid)? == namespace(1)? {
        return None;
    }
    fs::read_to_string(format!("/proc/{pid}/mountinfo")).ok()
}
