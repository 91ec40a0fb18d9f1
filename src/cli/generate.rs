//! Manual pages and completions, from the same definitions as the help texts.

use std::{fs, io, path::Path};

use clap::CommandFactory as _;
use clap_complete::Shell;

use super::args::{Arguments, DaemonArguments, hook_command};

/// Writes `layered-stores.1`, one page a command, and those of the daemon and the hook.
pub(super) fn man(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    clap_mangen::generate_to(Arguments::command(), directory)?;
    for command in [DaemonArguments::command(), hook_command()] {
        let page = clap_mangen::Man::new(command).section("8");
        page.render(&mut fs::File::create(directory.join(page.get_filename()))?)?;
    }
    Ok(())
}

/// Writes the completions under the names their shells look for.
pub(super) fn completions(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut Arguments::command(), "layered-stores", directory)?;
    }
    Ok(())
}
