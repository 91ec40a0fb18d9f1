//! `layered-stores-index`: reads the databases of a user's stores for the daemon, as that user.
//!
//! Started by systemd (`layered-stores-index@UID.service`) when the daemon connects to its socket, which is its standard input.
//! It serves one connection and ends.

use std::{
    io,
    os::{fd::AsFd as _, unix::net::UnixListener},
    process::ExitCode,
};

use layered_stores_nix_db::index;
use rustix::net::sockopt;

fn main() -> ExitCode {
    if std::env::args_os().len() > 1 {
        eprintln!("layered-stores-index takes no arguments; systemd starts it for layered-storesd");
        return ExitCode::from(2);
    }
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("layered-stores-index: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> io::Result<()> {
    let listener = UnixListener::from(io::stdin().as_fd().try_clone_to_owned()?);
    let (stream, _) = listener.accept()?;
    // The socket's mode says so as well.
    if !sockopt::socket_peercred(&stream)?.uid.is_root() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "only layered-storesd may ask"));
    }
    index::serve(stream)
}
