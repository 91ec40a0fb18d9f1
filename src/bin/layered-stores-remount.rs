//! Nix's remount hook: asks the daemon to make one merged directory right again.
//!
//! Nix calls it with the real store dir as its only argument, drops what it writes to standard output and shows what it writes
//! to standard error. It starts for every garbage collection that deleted something, so it brings no more than it needs:
//! no argument parser, no logging, no threads.

use std::{process::ExitCode, time::Duration};

use layered_stores::{
    bus::{BUS_NAME, MANAGER_PATH},
    overlay::refresh::reconfigure,
    varlink::{AskError, ask_remount},
};

/// How long the daemon may take. A refresh takes milliseconds; with hundreds of thousands of paths to look at, seconds.
const TIMEOUT: Duration = Duration::from_secs(60);

const HELP: &str = "\
Usage: layered-stores-remount REAL_STORE_DIR

Nix's remount hook: makes the merged directory REAL_STORE_DIR of a layered store
agree with its layers again. Asks layered-storesd, over its socket or over
D-Bus, and waits up to 60 seconds; where there is no daemon, reconfigures the
overlay mount by itself if it is privileged to.

Exit status: 0 done, 1 failed, 2 wrong use.
";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (Some(argument), None) = (arguments.next(), arguments.next()) else {
        eprint!("layered-stores-remount: one argument is expected, the real store dir\n{HELP}");
        return ExitCode::from(2);
    };
    match argument.as_str() {
        "--help" | "-h" => print!("{HELP}"),
        "--version" | "-V" => println!("layered-stores-remount {}", env!("CARGO_PKG_VERSION")),
        dir if !dir.starts_with('/') => {
            eprintln!("layered-stores-remount: {dir:?} is not an absolute path; give the real store dir");
            return ExitCode::from(2);
        }
        dir => {
            if let Err(message) = remount(dir) {
                eprintln!("layered-stores-remount: {}", message.replace('\n', " "));
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

fn remount(dir: &str) -> Result<(), String> {
    match ask(dir) {
        Ok(()) => Ok(()),
        Err(Unasked::Refused(message)) => Err(message),
        Err(Unasked::Unreachable(why)) => match reconfigure(dir) {
            Ok(()) => {
                eprintln!(
                    "layered-stores-remount: the daemon cannot be reached ({why}); reconfigured {dir} directly, \
                     which does not help paths that are held open"
                );
                Ok(())
            }
            Err(error) => Err(format!(
                "the daemon cannot be reached ({why}), and reconfiguring it directly did not work either: {error}; \
                 start it with `systemctl start layered-storesd`"
            )),
        },
    }
}

/// Why the daemon did not do it.
enum Unasked {
    /// It is not there.
    Unreachable(String),
    /// It is there and says no.
    Refused(String),
}

/// Over the daemon's own socket, or where that does not help, over the bus: it starts a daemon that is not running, and
/// has polkit decide about those who are neither root nor the store's owner.
fn ask(dir: &str) -> Result<(), Unasked> {
    match ask_remount(dir, TIMEOUT) {
        Ok(()) => Ok(()),
        Err(AskError::Elsewhere(_)) => ask_over_the_bus(dir),
        Err(error) => Err(Unasked::Refused(error.to_string())),
    }
}

fn ask_over_the_bus(dir: &str) -> Result<(), Unasked> {
    let unreachable = |error: std::io::Error| Unasked::Unreachable(error.to_string());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(unreachable)?;
    runtime.block_on(async {
        let connection = zbus::connection::Builder::system().method_timeout(TIMEOUT).build().await;
        let connection = connection.map_err(|error| Unasked::Unreachable(format!("no system bus: {error}")))?;
        let interface = "org.layeredstores1.Manager";
        let reply = connection.call_method(Some(BUS_NAME), MANAGER_PATH, Some(interface), "Remount", &(dir,)).await;
        reply.map(drop).map_err(classify)
    })
}

fn classify(error: zbus::Error) -> Unasked {
    match &error {
        zbus::Error::MethodError(name, message, _) => {
            let message = message.clone().unwrap_or_else(|| name.to_string());
            let name = name.as_str();
            // What the bus or systemd answer in the daemon's place.
            let absent = ["ServiceUnknown", "NameHasNoOwner", "Disconnected"].iter().any(|end| name.ends_with(end))
                || name.starts_with("org.freedesktop.DBus.Error.Spawn.")
                || name.starts_with("org.freedesktop.systemd1.");
            if absent { Unasked::Unreachable(message) } else { Unasked::Refused(message) }
        }
        zbus::Error::FDO(fdo) => match &**fdo {
            zbus::fdo::Error::ServiceUnknown(message)
            | zbus::fdo::Error::NameHasNoOwner(message)
            | zbus::fdo::Error::Disconnected(message)
            // The bus has waited in vain for systemd to start the daemon.
            | zbus::fdo::Error::TimedOut(message)
            | zbus::fdo::Error::SpawnExecFailed(message)
            | zbus::fdo::Error::SpawnFailed(message) => Unasked::Unreachable(message.clone()),
            zbus::fdo::Error::AccessDenied(message) | zbus::fdo::Error::InteractiveAuthorizationRequired(message) => {
                Unasked::Refused(message.clone())
            }
            other => Unasked::Refused(other.to_string()),
        },
        zbus::Error::InputOutput(_) => Unasked::Refused(format!(
            "the daemon has not answered within {} s; see `systemctl status layered-storesd`",
            TIMEOUT.as_secs()
        )),
        other => Unasked::Refused(other.to_string()),
    }
}
