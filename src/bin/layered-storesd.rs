//! The daemon: makes layered stores exist, keeps them right, and tells the truth about them over D-Bus.

use std::{path::Path, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result};
use clap::Parser as _;
use layered_stores::{
    bus::{Connections, Milestone, PublishError, Publisher},
    cli::args::DaemonArguments,
    supervisor::{self, Command, Engine, EngineError, Handle, Host, Settings},
    systemd::Units,
    varlink,
};
use layered_stores_client::{BUS_NAME, hook::SOCKET};
use layered_stores_model::{
    AbsolutePath,
    config::{self, ConfigError, Defaults, Keys},
};
use layered_stores_overlay::{host, swap};
use sd_notify::NotifyState;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tracing_subscriber::{EnvFilter, layer::SubscriberExt as _, util::SubscriberInitExt as _};

/// How long the configuration and the system bus may take to answer at the start, and the bus to be told good-bye.
const PATIENCE: Duration = Duration::from_secs(60);
const BUS_FAREWELL: Duration = Duration::from_secs(1);

/// How long going down may take. What remains then is a filesystem that does not answer.
const FAREWELL: Duration = Duration::from_secs(2);

/// `EX_CONFIG` of sysexits.h: the configuration is wrong, and trying again does not make it better.
const EX_CONFIG: u8 = 78;

/// `EX_SOFTWARE`: there is a mistake in the daemon itself.
const EX_SOFTWARE: i32 = 70;

/// How long a daemon that failed waits before it ends: what is in the way is most often not gone in a tenth of a second.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let arguments = DaemonArguments::parse();
    start_logging();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let why = explain(&error);
            tracing::error!("{why}");
            let _ = sd_notify::notify(&[NotifyState::Status(&one_line(&why))]);
            if error.is::<ConfigError>() {
                return ExitCode::from(EX_CONFIG);
            }
            // systemd starts it again at once, as one that was killed has to be.
            if std::env::var_os("INVOCATION_ID").is_some() {
                std::thread::sleep(PAUSE_AFTER_FAILURE);
            }
            ExitCode::FAILURE
        }
    }
}

/// An error with its causes, as far as it does not tell of them by itself.
fn explain(error: &anyhow::Error) -> String {
    let mut why = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !why.contains(&cause) {
            why = format!("{why}: {cause}");
        }
    }
    why
}

/// Logs to the journal when standard error leads there, else to standard error.
fn start_logging() {
    let filter =
        EnvFilter::try_from_env("LAYERED_STORES_LOG").unwrap_or_else(|_| EnvFilter::new("layered_stores=info"));
    let to_journal = std::env::var_os("JOURNAL_STREAM").is_some();
    let journal =
        to_journal.then(tracing_journald::layer).and_then(Result::ok).map(|layer| layer.with_field_prefix(None));
    let stderr = journal.is_none().then(|| tracing_subscriber::fmt::layer().with_writer(std::io::stderr));
    tracing_subscriber::registry().with(filter).with(journal).with(stderr).init();
}

fn run(arguments: DaemonArguments) -> Result<()> {
    let remount_hook = match arguments.remount_hook {
        Some(hook) => hook,
        None => beside_this_executable()?,
    };
    let defaults = Defaults { state_dir: arguments.state_dir, remount_hook };
    let settings = Settings { config: arguments.config, defaults, runtime_dir: arguments.runtime_dir };

    // `layered-stores enter` shows the machine's own /nix there; without it, it says so.
    let _ = std::fs::create_dir_all(settings.runtime_dir.join("host-nix"));

    // Every thread of the pool works in PID 1's mount namespace. Whether they can is found out on one that is thrown away.
    std::thread::spawn(host::enter).join().unwrap_or(Ok(()))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(supervisor::THREADS)
        // A thread that has to be made first would be felt in the hook.
        .thread_keep_alive(Duration::from_secs(3600))
        .on_thread_start(|| {
            if let Err(error) = host::enter() {
                tracing::error!("{error}");
                std::process::exit(1);
            }
        })
        .build()
        .context("cannot start the runtime")?;
    end_with_this_thread();
    let result = runtime.block_on(serve(settings));
    // A thread that hangs in a filesystem is not waited for.
    runtime.shutdown_background();
    result
}

/// Has a panic on this thread end the process. All that decides and answers runs here, in tasks whose end nobody would notice, and
/// what they have left undone is found by the next daemon. What panics on other threads is [caught](supervisor::THREADS).
fn end_with_this_thread() {
    let (hook, this) = (std::panic::take_hook(), std::thread::current().id());
    std::panic::set_hook(Box::new(move |info| {
        hook(info);
        if std::thread::current().id() == this {
            tracing::error!("this is a mistake in the daemon; please report it: {info}");
            std::process::exit(EX_SOFTWARE);
        }
    }));
}

fn beside_this_executable() -> Result<AbsolutePath> {
    let this = std::env::current_exe().context("cannot find this executable")?;
    let hook = this.parent().unwrap_or(Path::new("/")).join("layered-stores-remount");
    let hook = hook.to_string_lossy();
    hook.parse()
        .with_context(|| format!("the remount hook {hook} has a path that Nix cannot be given; use --remount-hook"))
}

async fn serve(settings: Settings) -> Result<()> {
    let (mut hangup, mut terminate) = (signal(SignalKind::hangup())?, signal(SignalKind::terminate())?);
    let mut interrupt = signal(SignalKind::interrupt())?;
    let load = settings.clone();
    let reading = tokio::task::spawn_blocking(move || config::load(&load.config, &load.defaults, Keys::Alone));
    let config = tokio::time::timeout(PATIENCE, reading).await;
    let config = config.context("the configuration does not answer; see to the filesystem it is on")???;

    let connect = async {
        let connections = Connections::open().await.context("cannot reach the system bus")?;
        // Found out before anything is touched; the name itself is taken when there is something to serve.
        let bus = zbus::fdo::DBusProxy::new(&connections.serving).await?;
        if bus.name_has_owner(BUS_NAME.try_into()?).await? {
            return Err(PublishError::NameTaken.into());
        }
        let units = Units::connect(&connections.engine).await.context("cannot reach systemd over the bus")?;
        anyhow::Ok((connections, units))
    };
    let connected = tokio::time::timeout(PATIENCE, connect).await;
    let (connections, units) = connected.context("the system bus does not answer; see `systemctl status dbus`")??;
    if !swap::is_possible() {
        tracing::warn!(
            "this kernel cannot replace a mount that is in use, as Linux 6.5 and newer can: a path that is deleted from an \
             upper layer while a process has it open stays wrong in its store until that process lets go of it"
        );
    }
    let (events_sender, events) = mpsc::unbounded_channel();
    let host = Host::open(settings, units).await.map_err(EngineError::from)?;
    let (engine, handle) = Engine::new(host, config, events_sender).await?;

    let publisher = Publisher::new(&connections, handle.clone()).await.context("cannot serve the bus")?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping; mounts stay");
        notify(&[NotifyState::Stopping]);
        // Whatever hangs from here on, such as closing a file on a filesystem that does not answer, nothing is lost by it.
        std::thread::spawn(|| {
            std::thread::sleep(FAREWELL);
            std::process::exit(0);
        });
    };
    let alive = || notify(&[NotifyState::Watchdog]);
    let watchdog = sd_notify::watchdog_enabled();
    let reloader = handle.clone();
    let reload = async move {
        while hangup.recv().await.is_some() {
            reload_for_systemd(&reloader).await;
        }
        Ok(())
    };
    let publish = publisher.run(events, |milestone| match milestone {
        // More than a courtesy: PID 1 of systemd 257 sometimes falls asleep over a burst of calls, with calls read and not
        // carried out, until anything else wakes it.
        Milestone::Summary(summary) => notify(&[NotifyState::Status(summary)]),
        Milestone::Named => serve_hook(handle.clone()),
        Milestone::Settled(summary) => {
            tracing::info!("{summary}");
            notify(&[NotifyState::Ready, NotifyState::Status(summary)]);
        }
    });
    let result = tokio::select! {
        result = engine.run(stop, watchdog, alive) => result.map_err(Into::into),
        result = publish => result.map_err(Into::into),
        result = reload => result,
        () = connections.closed() => anyhow::bail!("the connection to the system bus was lost"),
    };
    // A thread that hangs in the kernel keeps every file of the process open, and with these the bus name.
    let _ = tokio::time::timeout(BUS_FAREWELL, connections.close()).await;
    result
}

/// Opens the hook's own way to the daemon. Only who has the bus name does, so that no two daemons are after the socket.
fn serve_hook(handle: Handle) {
    match varlink::listen(Path::new(SOCKET)) {
        Ok(listener) => drop(tokio::spawn(varlink::serve(listener, handle))),
        Err(error) => tracing::warn!("cannot open {}: {error}; the hook asks over the bus", SOCKET),
    }
}

/// Reloads as `Type=notify-reload` wants it (systemd.service(5)).
async fn reload_for_systemd(handle: &Handle) {
    if let Ok(now) = NotifyState::monotonic_usec_now() {
        notify(&[NotifyState::Reloading, now]);
    }
    // Good or bad, the reload is over; a bad configuration was logged, and the old one is in force.
    match handle.ask(Command::Reload).await {
        Ok(()) => notify(&[NotifyState::Ready]),
        Err(error) => {
            notify(&[NotifyState::Ready, NotifyState::Status(&one_line(&error.to_string()))]);
        }
    }
}

/// systemd shows one line, and takes a second one for something else (sd_notify(3)).
fn one_line(message: &str) -> String {
    message.replacen(":\n", ": ", 1).replace('\n', "; ")
}

fn notify(states: &[NotifyState<'_>]) {
    // Without systemd there is nobody to tell.
    let _ = sd_notify::notify(states);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_a_task_ends_the_daemon_and_one_of_work_does_not() {
        const WHERE: &str = "LAYERED_STORES_TEST_PANICS";
        let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        if let Ok(place) = std::env::var(WHERE) {
            end_with_this_thread();
            return runtime().block_on(async {
                let work = || panic!("a test panics");
                if place == "task" {
                    let _ = tokio::spawn(async move { work() }).await;
                } else {
                    let _ = tokio::task::spawn_blocking(work).await;
                }
            });
        }
        for (place, code) in [("task", Some(EX_SOFTWARE)), ("work", Some(0))] {
            let mut again = std::process::Command::new(std::env::current_exe().expect("this test"));
            again.args(["a_panic_of_a_task", "--nocapture"]).env(WHERE, place);
            assert_eq!(again.output().expect("it runs").status.code(), code, "{place}");
        }
    }

    #[test]
    fn a_cause_is_told_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot watch: {0}")]
        struct Watch(#[source] std::io::Error);

        let error = anyhow::Error::new(Watch(std::io::Error::other("too many"))).context("cannot start");
        assert_eq!(explain(&error), "cannot start: cannot watch: too many");
    }
}
