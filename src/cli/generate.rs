//! Manual pages and completions, from the same definitions as the help texts.

use std::{fs, io, path::Path};

use clap::CommandFactory as _;
use clap_complete::Shell;

use super::args::Arguments;

/// Writes `layered-stores.1` and one page a command.
pub(super) fn man(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    clap_mangen::generate_to(Arguments::command(), directory)
}

/// Writes the completions under the names their shells look for.
pub(super) fn completions(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut Arguments::command(), "layered-stores", directory)?;
    }
    Ok(())
}
