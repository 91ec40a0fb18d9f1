//! What each command does.

use std::{
    io::{self, Write as _},
    os::unix::process::CommandExt as _,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use serde::Serialize;
use serde_json::json;

use super::{
    args::{Arguments, Command},
    client::{Client, Properties},
    enter::enter,
    generate, render, usage,
};
use crate::{
    config::{self, DEFAULT_RUNTIME_DIR, Defaults},
    store::{AbsolutePath, StoreName},
    supervisor::nix_conf,
};

/// There are problems with what was looked at.
const PROBLEMS: u8 = 3;

/// How often `wait` looks.
const WAIT_PAUSE: Duration = Duration::from_millis(100);

/// Carries a command out.
///
/// # Errors
/// Whatever went wrong, for people.
pub async fn run(arguments: Arguments) -> Result<ExitCode> {
    match arguments.command {
        Command::List { json } => list(json).await,
        Command::Status { name, json } => status(name, json).await,
        Command::Uri { name, daemon } => {
            let store = Client::connect().await?.status(&name).await?;
            if daemon && store.daemon_uri.is_empty() {
                bail!("store {0:?} has no Nix daemon of its own; declare one with [stores.{0}.daemon]", name.as_str());
            }
            print(&format!("{}\n", if daemon { store.daemon_uri } else { store.store_uri }))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Start { names } => {
            each(names, async |client, name| Ok(client.store(&name).await?.start().await?)).await
        }
        Command::Stop { names } => each(names, async |client, name| Ok(client.store(&name).await?.stop().await?)).await,
        Command::Remount { names } => {
            each(names, async |client, name| Ok(client.store(&name).await?.remount().await?)).await
        }
        Command::Verify { name, json } => verify(&name, json).await,
        Command::Wait { names, timeout } => wait(&names, Duration::from_secs(timeout)).await,
        Command::Reload => {
            Client::connect().await?.manager().await?.reload().await.map_err(super::client::ClientError::from)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::CheckConfig { file, state_dir, json } => check_config(&file, state_dir, json),
        Command::Enter { name, command } => {
            let store = Client::connect().await?.status(&name).await?;
            Err(enter(&store, command).into())
        }
        Command::NixDaemon { name } => Err(nix_daemon(&name)),
        Command::GenerateMan { directory } => {
            generate::man(&directory).context("cannot write the manual pages")?;
            Ok(ExitCode::SUCCESS)
        }
        Command::GenerateCompletions { directory } => {
            generate::completions(&directory).context("cannot write the completions")?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Does the same for several stores; one that fails does not keep the others from it.
async fn each(
    names: Vec<StoreName>,
    act: impl AsyncFn(&Client, StoreName) -> Result<(), super::client::ClientError>,
) -> Result<ExitCode> {
    let client = Client::connect().await?;
    let mut code = ExitCode::SUCCESS;
    for name in names {
        // An unknown name is told in the same words everywhere.
        client.status(&name).await?;
        if let Err(error) = act(&client, name).await {
            anstream::eprintln!("layered-stores: {error}");
            code = ExitCode::FAILURE;
        }
    }
    Ok(code)
}

async fn list(json: bool) -> Result<ExitCode> {
    let client = Client::connect().await?;
    let stores = client.manager().await?.list_stores().await.map_err(super::client::ClientError::from)?;
    if json {
        let objects =
            stores.iter().map(|(name, state, object)| json!({"name": name, "state": state, "object": object}));
        print_json(&objects.collect::<Vec<_>>())?;
    } else {
        let width = stores.iter().map(|(name, ..)| name.len()).max().unwrap_or(0);
        print(&stores.iter().map(|(name, state, _)| format!("{name:width$}  {state}\n")).collect::<String>())?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn status(name: Option<StoreName>, json: bool) -> Result<ExitCode> {
    let client = Client::connect().await?;
    let code = |problems: bool| if problems { ExitCode::from(PROBLEMS) } else { ExitCode::SUCCESS };
    if let Some(name) = name {
        let store = client.status(&name).await?;
        if json {
            print_json(&store)?;
        } else {
            // Whoever may not look into the upper layer sees everything else.
            print(&render::one(&store, usage::usage(&store.upper_layer).ok()))?;
        }
        return Ok(code(render::has_problems(&store)));
    }
    let stores = client.all().await?;
    let problems = stores.iter().any(render::has_problems);
    if json {
        print_json(&stores)?;
    } else {
        let with_paths = |store: Properties| {
            let paths = usage::paths(&store.upper_layer).ok();
            (store, paths)
        };
        print(&render::table(&stores.into_iter().map(with_paths).collect::<Vec<_>>()))?;
    }
    Ok(code(problems))
}

async fn verify(name: &StoreName, json: bool) -> Result<ExitCode> {
    let client = Client::connect().await?;
    client.status(name).await?;
    let stale = client.store(name).await?.verify().await.map_err(super::client::ClientError::from)?;
    if json {
        let objects = stale.iter().map(|(path, problem)| json!({"path": path, "problem": problem}));
        print_json(&objects.collect::<Vec<_>>())?;
    } else if stale.is_empty() {
        print(&format!("{name}: every path of the merged directory is what its layers say\n"))?;
    } else {
        let lines = stale.iter().map(|(path, problem)| format!("{path}: {problem}\n"));
        let number = render::count(stale.len(), "path");
        print(&format!("{}{name}: {number} stale; run `layered-stores remount {name}`\n", lines.collect::<String>()))?;
    }
    Ok(if stale.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(PROBLEMS) })
}

async fn wait(names: &[StoreName], timeout: Duration) -> Result<ExitCode> {
    let deadline = tokio::time::Instant::now() + timeout;
    let client = Client::connect().await?;
    loop {
        let stores = client.all().await?;
        if let Some(name) = names.iter().find(|name| !stores.iter().any(|store| store.name == name.as_str())) {
            bail!("there is no store {:?}; `layered-stores list` names those there are", name.as_str());
        }
        let waited_for = |store: &&Properties| {
            if names.is_empty() { store.required } else { names.iter().any(|name| name.as_str() == store.name) }
        };
        let missing: Vec<_> = stores.iter().filter(waited_for).filter(|store| store.state != "active").collect();
        if let Some(failed) = missing.iter().find(|store| store.state == "failed") {
            bail!("store {:?} failed: {}", failed.name, failed.state_reason);
        }
        let Some(first) = missing.first() else { return Ok(ExitCode::SUCCESS) };
        if tokio::time::Instant::now() >= deadline {
            bail!("store {:?} is still {} after {} s", first.name, first.state, timeout.as_secs());
        }
        tokio::time::sleep(WAIT_PAUSE).await;
    }
}

/// Replaces this process by the Nix daemon of a store. Returns only when that fails.
fn nix_daemon(name: &StoreName) -> anyhow::Error {
    let settings = nix_conf(std::path::Path::new(DEFAULT_RUNTIME_DIR), name);
    if let Err(error) = std::fs::File::open(&settings) {
        let path = settings.display();
        return match error.kind() {
            io::ErrorKind::NotFound => anyhow!(
                "store {:?} has no Nix daemon; declare one with [stores.{name}.daemon], and start the store",
                name.as_str()
            ),
            _ => anyhow!("cannot read {path}: {error}; this is for layered-stores-nix-daemon@{name}.service, as root"),
        };
    }
    let error = std::process::Command::new("nix-daemon")
        .arg("--daemon")
        // The machine's own nix.conf counts as well, and less than this.
        .env("NIX_USER_CONF_FILES", &settings)
        .env_remove("NIX_REMOTE")
        .exec();
    anyhow!("cannot run nix-daemon: {error}; install Nix, or put it on the PATH of the service")
}

fn check_config(file: &std::path::Path, state_dir: AbsolutePath, json: bool) -> Result<ExitCode> {
    if !file.exists() {
        bail!("there is no configuration {}; a daemon started with it would have no stores", file.display());
    }
    // Where the hook is does not decide whether a configuration is right.
    let remount_hook = "/usr/bin/layered-stores-remount".parse().context("the default hook")?;
    let config = match config::load(file, &Defaults { state_dir, remount_hook }) {
        Err(mistakes @ config::ConfigError::Invalid { .. }) => {
            // As compilers print them, for editors to jump to.
            anstream::eprintln!("{mistakes}");
            return Ok(ExitCode::FAILURE);
        }
        config => config?,
    };
    if json {
        let store = |spec: &crate::store::StoreSpec| {
            json!({
                "name": spec.name,
                "lower-store": spec.lower_store,
                "lower-store-dir": spec.layers.lower,
                "upper-layer": spec.layers.upper,
                "work-dir": spec.layers.work,
                "real-store-dir": spec.layers.merged,
                "state-dir": spec.state_dir,
                "mount-unit": spec.mount_unit,
                "daemon-uri": spec.daemon_uri(),
                "required": spec.required,
                "autostart": spec.autostart,
            })
        };
        print_json(&config.stores.iter().map(store).collect::<Vec<_>>())?;
    } else {
        print(&format!("{}: no mistakes, {}\n", file.display(), render::count(config.stores.len(), "store")))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn print_json(value: &impl Serialize) -> Result<()> {
    print(&format!("{}\n", serde_json::to_string_pretty(value)?))
}

/// Prints, with colour only on terminals; a reader that has seen enough (`| head`) is no failure.
fn print(text: &str) -> Result<()> {
    match anstream::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}
