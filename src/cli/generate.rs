//! Manual pages and completions, from the same definitions as the help texts.

use std::{fs, io, io::Write as _, path::Path};

use clap::CommandFactory as _;
use clap_complete::Shell;

use layered_stores_model::{Declaration, NixDaemon, config::Key};

use super::args::{Arguments, DaemonArguments, EXIT_STATUS, hook_command};

/// The example that is installed.
const EXAMPLE: &str = include_str!("../../data/config.toml");

/// What is said below the commands; `\n` stays what it is, and nothing is filled.
const EXAMPLES: &str = "\
# What is there, and what is wrong
layered-stores status
layered-stores status ci

# Build into the store \"ci\", as root or its owner
nix build --store \"$(layered-stores uri ci)\" nixpkgs#hello --no-link

# Build into it as anybody whom its Nix daemon lets in
export NIX_REMOTE=\"$(layered-stores uri --daemon ci)\"
nix build nixpkgs#hello --no-link --print-out-paths

# Use what was built
layered-stores enter ci -- /nix/store/\u{2026}-hello/bin/hello
";

const FILES: [(&str, &str); 4] = [
    ("/etc/layered-stores/config.toml", "what stores there are, see layered-stores.toml(5)"),
    ("/var/lib/layered-stores", "stores that are given no place of their own, and what the daemon remembers"),
    ("/run/layered-stores", "sockets and settings of the stores' Nix daemons, and notes until the next boot"),
    ("/run/layered-stores/host-nix", "where a command in enter finds the /nix of the machine"),
];

/// Writes `layered-stores.1`, one page a command, those of the daemon and the hook, and that of the configuration.
pub(super) fn man(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    clap_mangen::generate_to(Arguments::command().after_help(EXIT_STATUS), directory)?;
    let see = "layered-storesd(8), layered-stores.toml(5), nix(1)";
    append(&directory.join("layered-stores.1"), &[examples(EXAMPLES), files(), see_also(see)])?;
    for command in [DaemonArguments::command(), hook_command()] {
        let page = clap_mangen::Man::new(command).section("8");
        let path = directory.join(page.get_filename());
        page.render(&mut fs::File::create(&path)?)?;
        append(&path, &[files(), see_also("layered-stores(1), layered-stores.toml(5)")])?;
    }
    fs::write(directory.join("layered-stores.toml.5"), configuration())
}

fn append(page: &Path, sections: &[String]) -> io::Result<()> {
    fs::OpenOptions::new().append(true).open(page)?.write_all(sections.concat().as_bytes())
}

fn configuration() -> String {
    let title = format!(".TH layered-stores.toml 5 \"\" \"layered-stores {}\"\n", env!("CARGO_PKG_VERSION"));
    let name = ".SH NAME\nlayered\\-stores.toml \\- which layered Nix stores there are\n";
    let description = ".SH DESCRIPTION\n/etc/layered\\-stores/config.toml declares layered Nix stores, in TOML, a table \
                       for each. \\fBlayered\\-stores check\\-config\\fR says what is \
                       wrong with a file, \\fBlayered\\-stores reload\\fR puts a change in force, all of it or nothing. What \
                       is refused, and why, is in the manual: docs/configuration.md.\n";
    let keys = [keys("[stores.NAME]", Declaration::KEYS), keys("[stores.NAME.daemon]", NixDaemon::KEYS)].concat();
    let (examples, files, see) = (examples(EXAMPLE), files(), see_also("layered-stores(1)"));
    [title, name.to_owned(), description.to_owned(), keys, examples, files, see].concat()
}

/// The keys of a table, with all that there is to say about them.
fn keys(table: &str, keys: &[Key]) -> String {
    let entry = |key: &Key| {
        let (name, kind, default) = (prose(key.word()), prose(key.kind), prose(key.default));
        let entry = format!(".TP\n\\fB{}\\fR\n{}", name.trim_end(), prose(key.description));
        format!("{entry}.br\nType: {}. Default: {}.\n", kind.trim_end(), default.trim_end())
    };
    format!(".SH KEYS OF {}{}", verbatim(table), keys.iter().map(entry).collect::<String>())
}

/// Markdown, as far as the texts of keys have it: paragraphs, lists, code spans.
fn prose(text: &str) -> String {
    let line = |line: &str| match line.strip_prefix("- ") {
        Some(item) => format!(".IP \\(bu 2\n{}", fonts(item)),
        None => fonts(line),
    };
    let paragraph = |(number, text): (usize, &str)| {
        let lines: String = text.lines().map(line).collect();
        match (number, text.starts_with("- ")) {
            // An item makes room in front of itself.
            (_, true) => format!(".RS\n{lines}.RE\n"),
            (0, false) => lines,
            (_, false) => format!(".sp\n{lines}"),
        }
    };
    text.split("\n\n").enumerate().map(paragraph).collect()
}

/// A line with its code spans in bold.
fn fonts(line: &str) -> String {
    let line = verbatim(line);
    let mut parts = line.split('`');
    let first = parts.next().unwrap_or_default().to_owned();
    parts.zip(["\\fB", "\\fR"].iter().cycle()).fold(first, |line, (part, font)| line + font + part)
}

/// Text that stays as it is: no line is filled.
fn examples(text: &str) -> String {
    format!(".SH EXAMPLES\n.nf\n{}.fi\n", verbatim(text))
}

fn files() -> String {
    let entry = |(path, what): (&str, &str)| format!(".TP\n\\fI{}\\fR\n{}", verbatim(path).trim_end(), verbatim(what));
    format!(".SH FILES\n{}", FILES.map(entry).concat())
}

fn see_also(pages: &str) -> String {
    format!(".SH SEE ALSO\n{}", verbatim(pages))
}

/// Nothing in a text is a request or an escape of roff (groff(7)).
fn verbatim(text: &str) -> String {
    let line = |line: &str| {
        let line = line.replace('\\', "\\e").replace('-', "\\-").replace('\u{2026}', "...");
        let guard = if line.starts_with(['.', '\'']) { "\\&" } else { "" };
        format!("{guard}{line}\n")
    };
    text.lines().map(line).collect()
}

/// Writes the completions under the names their shells look for. Names of stores come from the daemon that runs.
pub(super) fn completions(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        let path = clap_complete::generate_to(shell, &mut Arguments::command(), "layered-stores", directory)?;
        let script = fs::read_to_string(&path)?;
        fs::write(path, with_names(shell, &script))?;
    }
    Ok(())
}

/// Whether an argument is a store, or several.
fn is_store(argument: &str) -> bool {
    matches!(argument, "name" | "names")
}

/// The commands whose arguments are stores.
fn of_stores() -> Vec<String> {
    let arguments = Arguments::command();
    let takes_stores = |command: &&clap::Command| {
        !command.is_hide_set() && command.get_positionals().any(|argument| is_store(argument.get_id().as_str()))
    };
    arguments.get_subcommands().filter(takes_stores).map(|command| command.get_name().to_owned()).collect()
}

fn with_names(shell: Shell, script: &str) -> String {
    match shell {
        Shell::Bash => {
            // clap_complete (4.6.11) takes the dash of the program's name for one between commands, here and not there: no
            // command would have its options completed.
            let script = script.replace("layered__subcmd__stores", "layered__stores");
            let commands = of_stores().join("|");
            format!(
                r#"{script}
_layered__stores_with_names() {{
    # That nothing of its own is offered is no failure.
    _layered__stores "$@" || :
    case ${{COMP_WORDS[1]}} in
    {commands})
        if [[ $COMP_CWORD -ge 2 && ${{COMP_WORDS[COMP_CWORD]}} != -* ]]; then
            mapfile -t COMPREPLY < <(compgen -W "$(layered-stores store-names 2>/dev/null)" -- "${{COMP_WORDS[COMP_CWORD]}}")
        fi
        ;;
    esac
}}
complete -F _layered__stores_with_names -o bashdefault -o default layered-stores
"#
            )
        }
        Shell::Zsh => {
            let names = "_layered-stores_names() {\n    local -a names\n    names=(${(f)\"$(layered-stores store-names \
                         2>/dev/null)\"})\n    compadd -a names\n}\n\n";
            // The arguments of these names are stores, in every command.
            let is_of_store = |line: &str| line.contains("name -- ") || line.contains("names -- ");
            let line = |line: &str| {
                let line = if is_of_store(line) {
                    line.replace(":_default", ":_layered-stores_names")
                } else {
                    line.to_owned()
                };
                line + "\n"
            };
            let script: String = script.lines().map(line).collect();
            script.replacen("\nautoload -U is-at-least\n", &format!("\nautoload -U is-at-least\n\n{names}"), 1)
        }
        _ => format!(
            "{script}complete -c layered-stores -n \"__fish_seen_subcommand_from {commands}\" -f -a \"(layered-stores \
             store-names 2>/dev/null)\"\n",
            commands = of_stores().join(" ")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prose_is_what_roff_takes_for_it() {
        let text = "A `key-a`, and\n\n- `\"x\"`;\n- .y.\n\n'z'";
        let page = "A \\fBkey\\-a\\fR, and\n.RS\n.IP \\(bu 2\n\\fB\"x\"\\fR;\n.IP \\(bu 2\n\\&.y.\n.RE\n.sp\n\\&'z'\n";
        assert_eq!(prose(text), page);
    }

    #[test]
    fn commands_whose_arguments_are_stores_have_them_completed() {
        let expected = [
            "status",
            "uri",
            "start",
            "stop",
            "remount",
            "verify",
            "gc",
            "optimise",
            "log",
            "remove-data",
            "wait",
            "enter",
        ];
        assert_eq!(of_stores(), expected);
    }

    #[test]
    fn bash_completes_the_options_of_every_command() {
        let dir = tempfile::tempdir().expect("a directory");
        completions(dir.path()).expect("written");
        let script = fs::read_to_string(dir.path().join("layered-stores.bash")).expect("written");
        let commands = script.split("cmd=\"").skip(1).filter_map(|rest| rest.split('"').next());
        let commands: Vec<_> = commands.filter(|command| !command.is_empty()).collect();
        assert!(commands.len() > 10, "{commands:?}");
        for command in commands {
            assert!(script.contains(&format!("\n        {command})\n")), "nothing is completed for {command}");
        }
    }

    #[test]
    fn the_manual_page_has_every_key() {
        let page = configuration();
        for key in Key::all() {
            let heading = format!("\n.TP\n\\fB{}\\fR\n", key.word().replace('-', "\\-"));
            assert!(page.contains(&heading), "{heading}");
        }
    }
}
