//! As whom it is done: as whoever the store belongs to.
//!
//! Nix follows links that the owner of a store may have made. Root's command therefore has all of it done by a process that
//! becomes the owner before it looks at anything of the owner's, with no way back, and that has nothing of root's: no
//! capability, no file, no terminal, no environment.

use std::{
    fs, io,
    os::unix::process::CommandExt as _,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, anyhow, bail};
use layered_stores_client::Properties;
use layered_stores_overlay::owner::user_name;
use nix::unistd::{Uid, User};
use rustix::{
    process::{geteuid, setsid},
    thread::{CapabilitySet, CapabilitySets},
};

use crate::cli::owner::refuse_root;

/// What it is called in a list of processes.
const NAME: &str = "layered-stores";

/// The problem of a store whose directories are somebody else's.
const OTHER_OWNER: &str = "other-owner";

/// What of root's environment the owner's process gets: none of it is a secret.
const INHERITED: [&str; 4] = ["PATH", "LANG", "LC_ALL", "TZ"];

/// Whose the process is that does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Account {
    /// That of whoever has called.
    Caller,
    /// The owner's, by number, and root has called.
    Owner(u32),
}

impl Account {
    /// Whose it has to be. `what` is the command.
    ///
    /// # Errors
    /// For people: neither root nor the owner has called, or it is not clear whose the store is.
    pub(super) fn of(store: &Properties, what: &str) -> Result<Self> {
        if let Some((_, why)) = store.problems.iter().find(|(code, _)| code == OTHER_OWNER) {
            bail!("store {:?}: {why}", store.name);
        }
        // Every directory above it is root's, so that nobody else decides what is found there.
        let owner = rustix::fs::lstat(store.upper_layer.as_str());
        let owner = owner.with_context(|| format!("cannot look at the upper layer {}", store.upper_layer))?.st_uid;
        let caller = geteuid();
        match (caller.is_root(), owner) {
            (true, 0) => refuse_root(store, what).map(|()| Self::Caller),
            (true, owner) => Ok(Self::Owner(owner)),
            (false, owner) if owner == caller.as_raw() => Ok(Self::Caller),
            (false, owner) => {
                let (name, owner) = (&store.name, user_name(owner));
                let through_daemon = match what {
                    "gc" if !store.daemon_uri.is_empty() => {
                        format!(", or `nix store gc --store \"$(layered-stores uri --daemon {name})\"`")
                    }
                    _ => String::new(),
                };
                let whose = if owner == "root" { owner } else { format!("root or {owner}") };
                bail!(
                    "store {name:?} is not yours, and `{what}` works in its directories; have {whose} run `layered-stores {what} \
                     {name}`{through_daemon}"
                )
            }
        }
    }

    /// The process, before it is started.
    pub(super) fn command(self) -> Command {
        let mut command = Command::new("/proc/self/exe");
        command.arg0(NAME).arg("collect");
        // Ctrl-C is for this process to hand on.
        match self {
            Self::Caller => command.process_group(0),
            // It begins a session, which who leads a group already cannot.
            Self::Owner(uid) => command.args(["--as", &uid.to_string()]),
        };
        // What it says it says through its standard output.
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        command
    }
}

/// Becomes a user, and begins anew as that. Returns only when that fails.
pub(in crate::cli) fn become_user(uid: u32) -> anyhow::Error {
    match try_become(uid) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

fn try_become(uid: u32) -> Result<std::convert::Infallible> {
    let user = User::from_uid(Uid::from_raw(uid)).with_context(|| format!("cannot look up the user {uid}"))?;
    let user = user.ok_or_else(|| anyhow!("the store belongs to uid {uid}, and there is no such user; make one"))?;
    // The user could put input into a terminal that controls the session, as if somebody had typed it (TIOCSTI).
    setsid().context("cannot begin a session of its own")?;
    rustix::thread::set_no_new_privs(true).context("cannot give up the right to gain rights")?;
    // Those that a program could be given stay with whoever becomes another user.
    let sets = rustix::thread::capabilities(None).context("cannot look at capabilities")?;
    rustix::thread::set_capabilities(None, CapabilitySets { inheritable: CapabilitySet::empty(), ..sets })
        .context("cannot give up capabilities")?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    close_others().context("cannot close files that the caller has left open")?;
    let inherited = INHERITED.into_iter().filter_map(|key| Some((key, std::env::var_os(key)?)));
    // Without an owner's groups it can open no more than the owner's own. `uid` gives up root's groups, and with the user goes
    // every capability (capabilities(7)).
    let error = Command::new("/proc/self/exe")
        .arg0(NAME)
        .arg("collect")
        .env_clear()
        .envs(inherited)
        .env("HOME", &user.dir)
        .env("USER", &user.name)
        .env("LOGNAME", &user.name)
        .current_dir("/")
        .gid(user.gid.as_raw())
        .uid(uid)
        .exec();
    Err(anyhow!("cannot become {}: {error}", user.name))
}

/// Has the next program get no open file but the standard ones.
fn close_others() -> io::Result<()> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        numbers.extend(entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    for number in numbers.into_iter().filter(|number| *number > 2) {
        // What was only open for the list is closed by now.
        let _ = nix::unistd::close(number);
    }
    Ok(())
}
