//! A store's URL for those who see the store at `/nix`.
//!
//! The machine's own store is hidden from them. Where it is the lower store, it is reached at [`HOST_NIX`].

use layered_stores_model::url_parameter;
use percent_encoding::percent_decode_str;

/// Where `enter` shows the machine's own `/nix`. The daemon makes the directory.
pub(super) const HOST_NIX: &str = "/run/layered-stores/host-nix";

const OVERLAY: &str = "local-overlay://?";

/// The URL to be used where the store is at `/nix`; `None` if it is the same. `by_daemon` is whether `auto` is the
/// machine's Nix daemon, which depends on who asks.
pub(super) fn store_uri(uri: &str, by_daemon: bool) -> Option<String> {
    if let Some(parameters) = uri.strip_prefix(OVERLAY) {
        let mut changed = false;
        let parameters: Vec<_> = parameters
            .split('&')
            .map(|parameter| {
                let lower = parameter.strip_prefix("lower-store=")?;
                let lower = percent_decode_str(lower).decode_utf8().ok()?;
                let lower = store_uri(&lower, by_daemon)?;
                changed = true;
                Some(format!("lower-store={}", url_parameter(&lower)))
            })
            .zip(parameters.split('&'))
            .map(|(new, old)| new.unwrap_or_else(|| old.to_owned()))
            .collect();
        return changed.then(|| format!("{OVERLAY}{}", parameters.join("&")));
    }
    let (store, parameters) = uri.split_once('?').unwrap_or((uri, ""));
    let elsewhere =
        parameters.split('&').any(|parameter| ["root=", "real="].iter().any(|key| parameter.starts_with(key)));
    let with = |base: String, separator: char| match parameters {
        "" => base,
        parameters => format!("{base}{separator}{parameters}"),
    };
    let daemon = || with(format!("unix://{HOST_NIX}/var/nix/daemon-socket/socket"), '?');
    // Where its files are is compared with the mount's options, and where it has its database is not.
    let local = || with(format!("local?real=/nix/store&state={HOST_NIX}/var/nix&log={HOST_NIX}/var/log/nix"), '&');
    match store {
        "daemon" | "unix://" => Some(daemon()),
        "auto" | "" if by_daemon => Some(daemon()),
        "auto" | "" | "local" | "local://" if !elsewhere => Some(local()),
        _ => {
            let below = store.strip_prefix("unix:///nix/")?;
            Some(with(format!("unix://{HOST_NIX}/{below}"), '?'))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_on_the_machines_own_store_finds_it_elsewhere() {
        let daemon = "unix:///run/layered-stores/host-nix/var/nix/daemon-socket/socket";
        let local = "local?real=/nix/store&state=/run/layered-stores/host-nix/var/nix&log=/run/layered-stores/host-nix/var/log/nix";
        for (lower, by_daemon, seen) in [
            ("daemon", false, Some(daemon.to_owned())),
            ("daemon?max-connections=2", false, Some(format!("{daemon}?max-connections=2"))),
            ("auto", true, Some(daemon.to_owned())),
            ("auto", false, Some(local.to_owned())),
            ("local", false, Some(local.to_owned())),
            ("local?read-only=true", true, Some(format!("{local}&read-only=true"))),
            ("unix:///nix/var/nix/daemon-socket/socket", false, Some(daemon.to_owned())),
            ("unix:///run/other/socket", false, None),
            ("local?root=/srv/base", false, None),
            ("/srv/base", false, None),
        ] {
            assert_eq!(store_uri(lower, by_daemon), seen, "{lower}");
            let url =
                |lower: &str| format!("local-overlay://?root=/r&lower-store={}&upper-layer=/u", url_parameter(lower));
            assert_eq!(store_uri(&url(lower), by_daemon), seen.as_deref().map(url), "{lower}");
            // One on top of it.
            let two = |lower: &str| url(&url(lower));
            assert_eq!(store_uri(&two(lower), by_daemon), seen.as_deref().map(two), "{lower}");
        }
    }
}
