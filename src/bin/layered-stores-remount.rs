//! Nix's remount hook: asks the daemon to make one merged directory right again.
//!
//! Nix calls it with the real store dir as its only argument, drops what it writes to standard output and shows what it writes
//! to standard error. It starts for every garbage collection that deleted something, so it brings no more than it needs:
//! no argument parser, no logging, no threads.

use std::{
    ffi::OsStr,
    io::Write as _,
    process::ExitCode,
    time::{Duration, Instant},
};

use layered_stores::cli;
use layered_stores_client::{
    BUS_NAME, MANAGER_PATH,
    hook::{AskError, ask_remount},
    why_it_cannot_come,
};
use layered_stores_overlay::refresh::reconfigure;
use zbus::DBusError as _;

/// How long all of it may take. A refresh takes milliseconds; with hundreds of thousands of paths to look at, seconds.
const TIMEOUT: Duration = Duration::from_secs(60);

/// For how long a daemon that went away is expected back, where nobody says anything about it.
const RESTART: Duration = Duration::from_secs(5);

/// Between two tries.
const PAUSE: Duration = Duration::from_millis(50);

const HELP: &str = "\
Usage: layered-stores-remount REAL_STORE_DIR

Nix's remount hook: makes the merged directory REAL_STORE_DIR of a layered store
agree with its layers again. Asks layered-storesd, over its socket or over
D-Bus, and waits up to 60 seconds, also for one that is started again; where
there is no daemon, reconfigures the overlay mount by itself if it is privileged
to.

Exit status: 0 done, 1 failed, 2 wrong use.
";

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(argument), None) = (arguments.next(), arguments.next()) else {
        say(&format!("one argument is expected, the real store dir\n{HELP}"));
        return ExitCode::from(2);
    };
    match argument.to_str() {
        Some("--help" | "-h") => write_out(HELP),
        Some("--version" | "-V") => write_out(concat!("layered-stores-remount ", env!("CARGO_PKG_VERSION"), "\n")),
        Some(dir) if dir.starts_with('/') => match remount(dir) {
            Ok(None) => {}
            Ok(Some(remark)) => say(&on_one_line(&remark)),
            Err(message) => {
                say(&on_one_line(&message));
                return ExitCode::FAILURE;
            }
        },
        _ => {
            say(&not_a_store_dir(&argument));
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

fn not_a_store_dir(argument: &OsStr) -> String {
    let what = if argument.to_str().is_some() { "an absolute path" } else { "UTF-8" };
    format!("{argument:?} is not {what}; give the real store dir")
}

/// What the daemon and the kernel say is shown on somebody's terminal.
fn on_one_line(message: &str) -> String {
    message.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Says something to the person. Nobody listening is no reason to fail.
fn say(message: &str) {
    let message = cli::wrapped(&format!("layered-stores-remount: {message}"), 2, std::io::stderr());
    let _ = writeln!(std::io::stderr(), "{message}");
}

fn write_out(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Has it done. What it returns is to be said.
fn remount(dir: &str) -> Result<Option<String>, String> {
    match ask(dir) {
        Ok(()) => Ok(None),
        Err(Unasked::Lost(message) | Unasked::Refused(message)) => Err(message),
        Err(Unasked::Unreachable { why, .. }) => match reconfigure(dir) {
            Ok(()) => Ok(Some(format!(
                "the daemon cannot be reached ({why}); reconfigured {dir} directly, which does not help paths that are held \
                 open"
            ))),
            Err(error) => Err(format!(
                "the daemon cannot be reached ({why}), and reconfiguring it directly did not work either: {error}; \
                 start it with `systemctl start layered-storesd`"
            )),
        },
    }
}

/// Why the daemon did not do it.
enum Unasked {
    /// It is not there. `for_good`: and it will not be.
    Unreachable { why: String, for_good: bool },
    /// It was there and went away without an answer.
    Lost(String),
    /// It is there and says no.
    Refused(String),
}

/// Over the daemon's own socket, or where that does not help, over the bus: it starts a daemon that is not running, and
/// has polkit decide about those who are neither root nor the store's owner. An answer is final; one that does not come because
/// the daemon died is asked for again.
fn ask(dir: &str) -> Result<(), Unasked> {
    let deadline = Instant::now() + TIMEOUT;
    let mut lost: Option<Instant> = None;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Unasked::Refused(no_answer()));
        }
        let asked = match ask_remount(dir, left) {
            Ok(()) => Ok(()),
            Err(AskError::Absent(_) | AskError::Elsewhere(_)) => ask_over_the_bus(dir, left),
            Err(error @ AskError::Lost) => Err(Unasked::Lost(error.to_string())),
            Err(AskError::Timeout) => Err(Unasked::Refused(no_answer())),
            Err(error @ AskError::Refused(_)) => Err(Unasked::Refused(error.to_string())),
        };
        match asked {
            Err(Unasked::Lost(_)) => lost = Some(Instant::now()),
            Err(Unasked::Unreachable { for_good: false, .. }) if lost.is_some_and(|at| at.elapsed() < RESTART) => {}
            answer => return answer,
        }
        std::thread::sleep(PAUSE);
    }
}

fn ask_over_the_bus(dir: &str, timeout: Duration) -> Result<(), Unasked> {
    let unreachable = |why: String| Unasked::Unreachable { why, for_good: false };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| unreachable(error.to_string()))?;
    let call = async {
        let connection = zbus::connection::Builder::system().build().await;
        let connection = connection.map_err(|error| unreachable(format!("no system bus: {error}")))?;
        let interface = "org.layeredstores1.Manager";
        let arguments = (dir,);
        let reply = connection.call_method(Some(BUS_NAME), MANAGER_PATH, Some(interface), "Remount", &arguments);
        tokio::select! {
            reply = reply => reply.map(drop).map_err(classify),
            // The bus would tell after 25 s that there is no daemon, and not why.
            why = why_it_cannot_come(&connection) => Err(Unasked::Unreachable { why, for_good: true }),
        }
    };
    let answer = runtime.block_on(async { tokio::time::timeout(timeout, call).await });
    answer.unwrap_or_else(|_| Err(Unasked::Refused(no_answer())))
}

fn no_answer() -> String {
    let seconds = TIMEOUT.as_secs();
    format!("the daemon has not answered within {seconds} s; see `systemctl status layered-storesd`")
}

/// What an error over the bus means: some are the bus's or systemd's, which answer in the daemon's place.
fn classify(error: zbus::Error) -> Unasked {
    let (name, message) = match error {
        zbus::Error::MethodError(name, message, _) => {
            let message = message.unwrap_or_else(|| name.to_string());
            (name.to_string(), message)
        }
        zbus::Error::FDO(error) => {
            let message = error.description().map_or_else(|| error.to_string(), str::to_owned);
            (error.name().to_string(), message)
        }
        zbus::Error::InputOutput(error) => {
            return Unasked::Lost(format!("the connection to the bus was lost: {error}"));
        }
        other => return Unasked::Refused(other.to_string()),
    };
    let unreachable = |for_good| Unasked::Unreachable { why: message.clone(), for_good };
    match name.strip_prefix("org.freedesktop.DBus.Error.").unwrap_or(&name) {
        "NoReply" | "Disconnected" | "org.layeredstores1.Error.ShuttingDown" => Unasked::Lost(message),
        "ServiceUnknown" | "NameHasNoOwner" => unreachable(false),
        // The bus has waited in vain for systemd to start the daemon.
        "TimedOut" | "Timeout" => unreachable(true),
        name if name.starts_with("Spawn.") || name.starts_with("org.freedesktop.systemd1.") => unreachable(true),
        _ => Unasked::Refused(message),
    }
}
