//! The daemon: makes layered stores exist, keeps them right, and tells the truth about them over D-Bus.

use std::{path::Path, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::Parser as _;
use layered_stores::{
    bus::{BUS_NAME, Publisher},
    cli::args::DaemonArguments,
    config::{self, ConfigError, Defaults},
    overlay::host,
    store::AbsolutePath,
    supervisor::{Command, Engine, Event, Handle, Settings},
    systemd::Units,
    varlink,
};
use sd_notify::NotifyState;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tracing_subscriber::{EnvFilter, layer::SubscriberExt as _, util::SubscriberInitExt as _};

/// How many threads work on stores. Their work is system calls, and a filesystem that hangs must not hold up all stores.
const BLOCKING_THREADS: usize = 8;

/// Why a second daemon does not start.
const ANOTHER: &str = "the bus name org.layeredstores1 is taken: another layered-storesd is running";

/// `EX_CONFIG` of sysexits.h: the configuration is wrong, and trying again does not make it better.
const EX_CONFIG: u8 = 78;

fn main() -> ExitCode {
    let arguments = DaemonArguments::parse();
    start_logging();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            let _ = sd_notify::notify(&[NotifyState::Status(&format!("{error:#}"))]);
            if error.is::<ConfigError>() { ExitCode::from(EX_CONFIG) } else { ExitCode::FAILURE }
        }
    }
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

    // Every thread of the pool works in PID 1's mount namespace. Whether they can is found out on one that is thrown away.
    std::thread::spawn(host::enter).join().unwrap_or(Ok(()))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        // A thread that has to be made first would be felt in the hook.
        .thread_keep_alive(std::time::Duration::from_secs(3600))
        .on_thread_start(|| {
            if let Err(error) = host::enter() {
                tracing::error!("{error}");
                std::process::exit(1);
            }
        })
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(serve(settings))
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
    let config = tokio::task::spawn_blocking(move || config::load(&load.config, &load.defaults)).await??;

    let connection = zbus::Connection::system().await.context("cannot reach the system bus")?;
    // Found out before anything is touched; the name itself is taken when there is something to serve.
    let bus = zbus::fdo::DBusProxy::new(&connection).await?;
    if bus.name_has_owner(BUS_NAME.try_into()?).await? {
        anyhow::bail!(ANOTHER);
    }
    let units = Units::connect(&connection).await.context("cannot reach systemd over the bus")?;
    let (events_sender, events) = mpsc::unbounded_channel();
    let (engine, handle) = Engine::new(settings, config, units, events_sender).await.context("cannot watch mounts")?;

    let mut publisher = Publisher::new(connection.clone(), handle.clone()).await.context("cannot serve the bus")?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping; mounts stay");
        notify(&[NotifyState::Stopping]);
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
    let publish = async move {
        let mut events = events;
        let mut batch = Vec::new();
        let mut named = false;
        while events.recv_many(&mut batch, 256).await > 0 {
            let mut settled = None;
            for event in batch.drain(..) {
                match &event {
                    Event::Settled { summary } => settled = Some(summary.clone()),
                    // More than a courtesy: PID 1 of systemd 257 sometimes falls asleep over a burst of calls, with calls read
                    // and not carried out, until anything else wakes it.
                    Event::Progress { summary } => notify(&[NotifyState::Status(summary)]),
                    _ => {}
                }
                publisher.publish(event).await?;
            }
            publisher.flush().await?;
            // Clients that find the name find the stores.
            if !named {
                publisher.take_name().await.context(ANOTHER)?;
                serve_hook(handle.clone());
                named = true;
            }
            if let Some(summary) = settled {
                tracing::info!("{summary}");
                notify(&[NotifyState::Ready, NotifyState::Status(&summary)]);
            }
        }
        Ok(())
    };
    tokio::select! {
        result = engine.run(stop, watchdog, alive) => Ok(result?),
        result = publish => result,
        result = reload => result,
        () = connection.closed() => anyhow::bail!("the connection to the system bus was lost"),
    }
}

/// Opens the hook's own way to the daemon. Only who has the bus name does, so that no two daemons are after the socket.
fn serve_hook(handle: Handle) {
    match varlink::listen(Path::new(varlink::SOCKET)) {
        Ok(listener) => drop(tokio::spawn(varlink::serve(listener, handle))),
        Err(error) => tracing::warn!("cannot open {}: {error}; the hook asks over the bus", varlink::SOCKET),
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
            // systemd shows one line.
            let status = error.to_string().replacen(":\n", ": ", 1).replace('\n', "; ");
            notify(&[NotifyState::Ready, NotifyState::Status(&status)]);
        }
    }
}

fn notify(states: &[NotifyState<'_>]) {
    // Without systemd there is nobody to tell.
    let _ = sd_notify::notify(states);
}
