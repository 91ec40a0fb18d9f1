//! What each command does.

use std::{os::unix::process::CommandExt as _, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail};
use layered_stores_client::{Client, ClientError, Properties};
use layered_stores_model::{
    AbsolutePath, StoreName,
    config::{self, Defaults, Diagnostic, Keys},
};
use serde_json::json;

use super::{
    args::{Arguments, Command, Internal, PROBLEMS},
    collect::{How, become_user, gc, optimise, work},
    doctor::doctor,
    enter::enter,
    generate,
    log::log,
    metrics::{self, metrics},
    output::{complain, print, print_json, wrapped},
    owner::refuse_root,
    remove::{list_left_over, remove_data},
    render,
    status::status,
    uri::uri,
    usage,
    verify::verify,
};
use crate::supervisor::user_of;

/// The problem of a store that is not up as it is declared now.
const NOT_APPLIED: &str = "not-applied";

/// Something was not done.
const FAILURE: u8 = 1;

/// How often `wait` looks.
const WAIT_PAUSE: Duration = Duration::from_millis(100);

/// Carries a command out.
///
/// # Errors
/// Whatever went wrong, for people.
pub async fn run(arguments: Arguments) -> Result<ExitCode> {
    match arguments.command {
        Command::List { left_over: true, json } => list_left_over(json).await,
        Command::List { left_over: false, json } => list(json).await,
        Command::Status { names, json, watch } => status(&names, json, watch).await,
        Command::Uri { name, daemon } => uri(&name, daemon).await,
        Command::Start { names } => {
            each(names, async |client, name| Ok(client.store(&name).await?.start().await?)).await
        }
        Command::Stop { names } => each(names, async |client, name| Ok(client.store(&name).await?.stop().await?)).await,
        Command::Remount { names } => {
            each(names, async |client, name| Ok(client.store(&name).await?.remount().await?)).await
        }
        Command::Verify { name, json } => verify(&name, json).await,
        Command::Gc { name, until_free, older_than, dry_run, json } => {
            gc(&name, until_free, older_than, How { dry_run, json }).await
        }
        Command::Optimise { name, dry_run, json } => optimise(&name, How { dry_run, json }).await,
        Command::Log { name, shown } => match log(&name, &shown).await? {},
        Command::Metrics { textfile } => metrics(textfile.as_deref()).await,
        Command::RemoveData { name, yes } => remove_data(&name, yes).await,
        Command::Wait { names, timeout } => wait(&names, Duration::from_secs(timeout)).await,
        Command::Reload => reload().await,
        Command::CheckConfig { file, state_dir, nixos_options, json } => {
            let keys = if nixos_options { Keys::WithNixosOptions } else { Keys::Alone };
            check_config(&file, state_dir, keys, json)
        }
        Command::Doctor { json } => doctor(json).await,
        Command::Enter { name, command } => {
            let store = Client::connect().await?.status(&name).await?;
            refuse_root(&store, "enter")?;
            Err(enter(&store, command).into())
        }
    }
}

/// Carries out what is not for people.
///
/// # Errors
/// Whatever went wrong.
pub async fn run_internal(command: Internal) -> Result<ExitCode> {
    match command {
        Internal::Count => {
            usage::count().context("cannot count")?;
            Ok(ExitCode::SUCCESS)
        }
        Internal::CountRoom { points } => {
            metrics::count(points);
            Ok(ExitCode::SUCCESS)
        }
        Internal::ServeMetrics => {
            metrics::answer().await?;
            Ok(ExitCode::SUCCESS)
        }
        Internal::Collect { user: Some(uid) } => Err(become_user(uid)),
        Internal::Collect { user: None } => {
            work().await?;
            Ok(ExitCode::SUCCESS)
        }
        Internal::NixDaemon { name } => Err(nix_daemon(&name)),
        Internal::GenerateMan { directory } => {
            generate::man(&directory).context("cannot write the manual pages")?;
            Ok(ExitCode::SUCCESS)
        }
        Internal::GenerateCompletions { directory } => {
            generate::completions(&directory).context("cannot write the completions")?;
            Ok(ExitCode::SUCCESS)
        }
        Internal::StoreNames => {
            let names = Client::names().await.unwrap_or_default();
            print(&names.iter().map(|name| format!("{name}\n")).collect::<String>())?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Does the same for several stores; one that fails does not keep the others from it.
async fn each(
    names: Vec<StoreName>,
    act: impl AsyncFn(&Client, StoreName) -> Result<(), ClientError>,
) -> Result<ExitCode> {
    let client = Client::connect().await?;
    // An unknown name is told in the same words everywhere, and before anything is done.
    for name in &names {
        client.status(name).await?;
    }
    let mut code = 0;
    for name in names {
        match act(&client, name).await {
            Ok(()) => {}
            Err(error) => {
                complain(&error.to_string());
                let problem = matches!(error, ClientError::NotUp(_));
                code = code.max(if problem { PROBLEMS } else { FAILURE });
            }
        }
    }
    Ok(ExitCode::from(code))
}

/// Has the configuration read again, and names the stores that are not as it says.
async fn reload() -> Result<ExitCode> {
    let client = Client::connect().await?;
    client.manager().await?.reload().await.map_err(ClientError::from)?;
    let stores = client.all().await?;
    let mut code = ExitCode::SUCCESS;
    for store in stores.iter().filter(|store| !store.is_at_rest()) {
        code = ExitCode::from(PROBLEMS);
        complain(&format!("store {:?} is {}: {}", store.name, store.state, store.state_reason));
    }
    for store in &stores {
        if let Some((_, why)) = store.problems.iter().find(|(code, _)| code == NOT_APPLIED) {
            code = ExitCode::from(PROBLEMS);
            complain(&format!("store {:?} is not changed: {why}", store.name));
        }
    }
    Ok(code)
}

async fn list(json: bool) -> Result<ExitCode> {
    let client = Client::connect().await?;
    let stores = client.manager().await?.list_stores().await.map_err(ClientError::from)?;
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

async fn wait(names: &[StoreName], timeout: Duration) -> Result<ExitCode> {
    let deadline = tokio::time::Instant::now() + timeout;
    let client = Client::connect().await?;
    let mut told = false;
    loop {
        let stores = client.all().await?;
        if let Some(name) = names.iter().find(|name| !stores.iter().any(|store| store.name == name.as_str())) {
            return Err(client.no_such_store(name).await.into());
        }
        let waited_for = |store: &&Properties| {
            if names.is_empty() { store.required } else { names.iter().any(|name| name.as_str() == store.name) }
        };
        let missing: Vec<_> = stores.iter().filter(waited_for).filter(|store| store.state != "active").collect();
        if let Some(failed) = missing.iter().find(|store| store.state == "failed") {
            bail!("store {:?} failed: {}", failed.name, failed.state_reason);
        }
        let Some(first) = missing.first() else { return Ok(ExitCode::SUCCESS) };
        let stopped = missing.iter().find(|store| store.state == "inactive");
        if tokio::time::Instant::now() >= deadline {
            let why = match (stopped, first.state_reason.as_str()) {
                (Some(store), _) => format!("; nobody has started {0:?}: run `layered-stores start {0}`", store.name),
                (None, "") => String::new(),
                (None, why) => format!(": {why}"),
            };
            bail!("store {:?} is still {} after {} s{why}", first.name, first.state, timeout.as_secs());
        }
        if let (Some(store), false) = (stopped, told) {
            complain(&format!("store {0:?} is stopped; waiting for `layered-stores start {0}`", store.name));
            told = true;
        }
        tokio::time::sleep(WAIT_PAUSE).await;
    }
}

/// Replaces this process by the Nix daemon of a store. Returns only when that fails.
fn nix_daemon(name: &StoreName) -> anyhow::Error {
    // systemd hands the settings on (LoadCredential=): only root may read the file, and the daemon may be a user's.
    let Some(directory) = std::env::var_os("CREDENTIALS_DIRECTORY") else {
        return anyhow!(
            "this is for layered-stores-nix-daemon@{name}.service; a store has one if [stores.{name}.daemon] declares it"
        );
    };
    let settings = std::path::Path::new(&directory).join("nix.conf");
    let user = match std::fs::read_to_string(&settings) {
        Ok(text) => user_of(&text),
        Err(error) => return anyhow!("cannot read {}: {error}", settings.display()),
    };
    // Nix follows links that the owner of the store may have made. That systemd has read the drop-in with User= was checked;
    // whoever takes it away gets no daemon with root's rights for it.
    let uid = rustix::process::geteuid().as_raw();
    if user != Some(uid) && user != Some(0) {
        let user = user.map_or_else(|| "nobody".to_owned(), |user| format!("uid {user}"));
        return anyhow!(
            "the settings of this Nix daemon are for {user}, and it runs as uid {uid}; \
             run `systemctl restart layered-storesd`, which writes its drop-in anew"
        );
    }
    let error = std::process::Command::new("nix-daemon")
        .arg("--daemon")
        // The machine's own nix.conf counts as well, and less than this.
        .env("NIX_USER_CONF_FILES", &settings)
        .env_remove("NIX_REMOTE")
        .exec();
    anyhow!("cannot run nix-daemon: {error}; install Nix, or put it on the PATH of the service")
}

fn check_config(file: &std::path::Path, state_dir: AbsolutePath, keys: Keys, json: bool) -> Result<ExitCode> {
    // Where the hook is does not decide whether a configuration is right.
    let remount_hook = "/usr/bin/layered-stores-remount".parse().context("the default hook")?;
    if !file.exists() {
        let message =
            format!("there is no configuration {}; a daemon started with it would have no stores", file.display());
        if json {
            print_json(&[mistake(file, None, &message)])?;
            return Ok(ExitCode::FAILURE);
        }
        bail!(message);
    }
    let config = match config::load(file, &Defaults { state_dir, remount_hook }, keys) {
        Err(mistakes) if json => {
            let objects = match &mistakes {
                config::ConfigError::Invalid { diagnostics, .. } => {
                    diagnostics.iter().map(|found| mistake(file, Some(found), &found.message)).collect()
                }
                error => vec![mistake(file, None, &error.to_string())],
            };
            print_json(&objects)?;
            return Ok(ExitCode::FAILURE);
        }
        Err(mistakes @ config::ConfigError::Invalid { .. }) => {
            // As compilers print them, for editors to jump to.
            anstream::eprintln!("{}", wrapped(&mistakes.to_string(), 2, std::io::stderr()));
            return Ok(ExitCode::FAILURE);
        }
        // It says its cause itself, which `main` would say once more.
        config => config.map_err(|error| anyhow!("{error}"))?,
    };
    if json {
        let store = |spec: &layered_stores_model::StoreSpec| {
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

/// A mistake as `check-config --json` has it; `null` where it is about nothing of the kind.
fn mistake(file: &std::path::Path, found: Option<&Diagnostic>, message: &str) -> serde_json::Value {
    json!({
        "file": file,
        "line": found.map(|found| found.line),
        "column": found.map(|found| found.column),
        "store": found.and_then(|found| found.store.as_deref()),
        "key": found.and_then(|found| found.key.as_deref()),
        "value": found.and_then(|found| found.value.as_deref()),
        "message": message,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn why_a_file_cannot_be_read_is_said_once() {
        let state_dir = "/var/lib/layered-stores".parse().expect("valid");
        let error = check_config("/".as_ref(), state_dir, Keys::Alone, false).expect_err("a directory");
        // As `main` prints it.
        assert_eq!(format!("{error:#}"), "cannot read /: Is a directory (os error 21)");
    }
}
