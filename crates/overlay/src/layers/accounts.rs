//! Whom the directories of a store are for.

use std::{
    cell::OnceCell,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use layered_stores_model::{BUILD_USERS, Ownership, StoreSpec};
use nix::unistd::{Gid, Group, Uid, User};
use rustix::fs::Mode;

use super::{LayersError, Owner};
use crate::progress::{self, Spot};

/// Where Nix's settings for the whole machine are.
const NIX_CONF: &str = "/etc/nix/nix.conf";

/// For how long an answer of the name service is as good as a new one.
const RECENTLY: Duration = Duration::from_secs(1);

/// The setting with the group of Nix's build users.
const SETTING: &str = "build-users-group";

pub(super) fn resolve_owner(spec: &StoreSpec, build_users: &BuildUsers<'_>) -> Result<Owner, LayersError> {
    // The name service may ask somebody over the network.
    progress::at(Spot::Accounts);
    let ownership = &spec.ownership;
    let (uid, own_gid) = resolve_user(ownership)?;
    let builders = if uid.is_root() { build_users.gids()? } else { &[] };
    let gid = match &ownership.group {
        Some(name) => {
            let by_number = |id| Group::from_gid(Gid::from_raw(id));
            account("group", "group", name, Group::from_name(name), by_number)?.gid
        }
        None => builders.first().copied().unwrap_or(own_gid),
    };
    // What Nix itself gives its store directory when it runs as root with build users (`LocalStore`).
    let default_mode = if builders.contains(&gid) { 0o1775 } else { 0o755 };
    Ok(Owner { uid, gid, mode: Mode::from_raw_mode(ownership.mode.unwrap_or(default_mode)) })
}

/// The groups of Nix's build users, whose members do nothing but build. The name service is asked once, and only if somebody wants
/// to know.
pub(super) struct BuildUsers<'s> {
    spec: &'s StoreSpec,
    gids: OnceCell<Vec<Gid>>,
}

impl<'s> BuildUsers<'s> {
    /// Those of who builds in a store.
    pub(super) fn of(spec: &'s StoreSpec) -> Self {
        Self { spec, gids: OnceCell::new() }
    }

    /// That of a new directory comes first.
    pub(super) fn gids(&self) -> Result<&[Gid], LayersError> {
        if let Some(gids) = self.gids.get() {
            return Ok(gids);
        }
        let gids = build_users(self.spec)?;
        Ok(self.gids.get_or_init(|| gids))
    }
}

fn build_users(spec: &StoreSpec) -> Result<Vec<Gid>, LayersError> {
    progress::at(Spot::Accounts);
    let of_daemon = spec.daemon.as_ref().and_then(|daemon| daemon.settings.get(SETTING));
    let of_machine = std::fs::read_to_string(NIX_CONF).unwrap_or_default();
    let names = [of_daemon.map(String::as_str), last_value(&of_machine, SETTING), Some(BUILD_USERS)];
    let names: Vec<_> = names.into_iter().flatten().filter(|name| !name.is_empty()).map(str::to_owned).collect();
    static ANSWERS: Answers = Answers::new();
    ANSWERS.groups(names, |name| Ok(found("group", name, Group::from_name(name))?.map(|group| group.gid)))
}

/// What the name service has said just now: a thousand stores that come up together have the same build users.
struct Answers(Mutex<Option<Answer>>);

struct Answer {
    at: Instant,
    names: Vec<String>,
    gids: Vec<Gid>,
}

impl Answers {
    const fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// The groups of some names. Nothing is locked while the name service is asked.
    fn groups(
        &self,
        names: Vec<String>,
        ask: impl Fn(&str) -> Result<Option<Gid>, LayersError>,
    ) -> Result<Vec<Gid>, LayersError> {
        let last = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(answer) = &*last()
            && answer.at.elapsed() < RECENTLY
            && answer.names == names
        {
            return Ok(answer.gids.clone());
        }
        let mut gids = Vec::new();
        for name in &names {
            gids.extend(ask(name)?);
        }
        *last() = Some(Answer { at: Instant::now(), names, gids: gids.clone() });
        Ok(gids)
    }
}

/// The last value that a text in the format of nix.conf(5) gives a setting of one word. What it includes is not read.
fn last_value<'t>(text: &'t str, setting: &str) -> Option<&'t str> {
    let value = |line: &'t str| {
        let mut words = line.split('#').next()?.split_ascii_whitespace();
        let is_it = words.next() == Some(setting) && words.next() == Some("=");
        if is_it { words.next() } else { None }
    };
    text.lines().filter_map(value).next_back()
}

pub(super) fn resolve_user(ownership: &Ownership) -> Result<(Uid, Gid), LayersError> {
    let Some(name) = &ownership.owner else { return Ok((Uid::from_raw(0), Gid::from_raw(0))) };
    let by_number = |id| User::from_uid(Uid::from_raw(id));
    let user = account("owner", "user", name, User::from_name(name), by_number)?;
    Ok((user.uid, user.gid))
}

/// The account of a name; failing that, of the number that it is.
fn account<T>(
    key: &'static str,
    kind: &'static str,
    name: &str,
    by_name: nix::Result<Option<T>>,
    by_number: impl FnOnce(u32) -> nix::Result<Option<T>>,
) -> Result<T, LayersError> {
    if let Some(account) = found(key, name, by_name)? {
        return Ok(account);
    }
    let by_number = name.parse().map_or(Ok(None), by_number);
    found(key, name, by_number)?.ok_or_else(|| LayersError::NoSuchAccount { key, name: name.to_owned(), kind })
}

/// What the name service says. That it cannot say is something else than that there is nobody.
fn found<T>(key: &'static str, name: &str, answer: nix::Result<Option<T>>) -> Result<Option<T>, LayersError> {
    use nix::errno::Errno;
    match answer {
        // What getpwnam(3) lists for "the given name was not found".
        Err(Errno::ENOENT | Errno::ESRCH | Errno::EBADF | Errno::EPERM) => Ok(None),
        Err(errno) => Err(LayersError::NameService { key, name: name.to_owned(), source: errno.into() }),
        Ok(account) => Ok(account),
    }
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;

    #[test]
    fn that_the_name_service_cannot_say_is_not_that_there_is_nobody() {
        let look_up = |by_name, by_number| account("owner", "user", "7", by_name, |_| by_number);
        assert!(matches!(look_up(Ok(Some(1)), Err(Errno::EIO)), Ok(1)), "found by name");
        assert!(matches!(look_up(Ok(None), Ok(Some(2))), Ok(2)), "found by number");
        for nobody in [Ok(None), Err(Errno::ENOENT), Err(Errno::ESRCH)] {
            let error = look_up(nobody, Ok(None::<u32>)).expect_err("nobody").to_string();
            assert!(error.contains("no such user"), "{error}");
        }
        for (by_name, by_number) in [(Err(Errno::ETIMEDOUT), Ok(Some(2))), (Ok(None), Err(Errno::EIO))] {
            let error = look_up(by_name, by_number).expect_err("unknown").to_string();
            assert!(error.contains("cannot say who that is"), "{error}");
        }
    }

    #[test]
    fn many_stores_that_come_up_together_ask_for_a_group_once() {
        let asked = std::cell::Cell::new(0);
        let ask = |gid| {
            asked.set(asked.get() + 1);
            Ok(Some(Gid::from_raw(gid)))
        };
        let answers = Answers::new();
        let of = |name: &str, gid| answers.groups(vec![name.to_owned()], |_| ask(gid)).expect("answered");
        assert_eq!(of("a", 1), of("a", 1));
        assert_eq!(asked.get(), 1);
        assert_eq!(of("b", 2), [Gid::from_raw(2)], "those of another name are others");
        std::thread::sleep(RECENTLY);
        assert_eq!(of("b", 3), [Gid::from_raw(3)], "they may have changed");
        let fails = answers.groups(vec!["c".to_owned()], |_| {
            Err(LayersError::NoSuchAccount { key: "group", name: "c".into(), kind: "group" })
        });
        assert!(fails.is_err() && of("c", 4) == [Gid::from_raw(4)], "that it could not say is no answer");
    }

    #[test]
    fn the_last_value_of_a_setting_holds() {
        for (text, value) in [
            ("", None),
            ("build-users-group = nixbld", Some("nixbld")),
            ("build-users-group =\nmax-jobs = 4", None),
            ("build-users-group = a\n  build-users-group = b # and not c\nx = y\n", Some("b")),
            ("# build-users-group = a\nextra-build-users-group = b\nbuild-users-group a", None),
        ] {
            assert_eq!(last_value(text, SETTING), value, "{text:?}");
        }
    }
}
