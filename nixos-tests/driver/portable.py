"""Finds in scenarios what works here and now, and would not on NixOS or another time.

The scripts that have a file for NixOS run on both, and they are written where there is no NixOS to
try them on. What it lacks is looked for in every text of a script: in the commands and in the files
that it writes.
"""

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple


class Rule(NamedTuple):
    """Something that is not there on NixOS, and what to write."""

    pattern: re.Pattern[str]
    sentence: str
    unless: re.Pattern[str] | None = None
    """Anywhere in the same text, this makes it right."""


class Finding(NamedTuple):
    """A use in a script."""

    line: int
    text: str
    sentence: str


# Below another directory (/run/current-system/sw/bin, {prefix}/bin) something else is meant.
ROOT = r"(?<![\w.})*-])"
# A command begins a text, or follows another.
BEGIN = r"(?:^|[;&|({]|\b(?:sudo|env|then|do)\b)\s*"
PATH_IS_SET = re.compile(r"(?:--setenv=|-E ?|Environment=)[\"']?PATH\b")
PREFIX = "begin at the package, $(readlink -f $(command -v layered-stores))"

RULES = (
    Rule(
        re.compile(ROOT + r"/(?!bin/sh\b|usr/bin/env\b)(?:usr/(?:local/)?)?s?bin/\w[\w.-]*"),
        "only /bin/sh and /usr/bin/env are there; name the program alone, or ask `command -v`",
    ),
    Rule(
        re.compile(ROOT + r"/(?:usr/(?:local/)?(?:share|lib|libexec|include)\b|lib(?:64)?/\w+)"),
        f"there is no such directory; {PREFIX}",
    ),
    Rule(
        re.compile(r"/sw/share\b"),
        f"a system has what its options link there, completions of enabled shells only; {PREFIX}",
    ),
    Rule(
        re.compile(r"\bsystemd-run (?=-)(?!.*--scope)", re.DOTALL),
        "units have no PATH; add -E PATH",
        PATH_IS_SET,
    ),
    Rule(
        re.compile(r"^Exec\w+=[-+!@:|]*(?![/{$\\\s-])\S+", re.MULTILINE),
        "systemd has no PATH; write what `command -v` says",
    ),
    Rule(
        re.compile(r"^Exec\w+=[-+!@:|]*/bin/sh\b", re.MULTILINE),
        "units have no PATH; add Environment=PATH=… with that of the machine",
        PATH_IS_SET,
    ),
    Rule(
        re.compile(r"(?:>|\btee |\bln |\bmkdir |\binstall )[^;&|\n]*/etc/systemd/"),
        "this cannot be written to; use /run/systemd/",
    ),
    Rule(
        re.compile(ROOT + r"/etc/(?:apt|default|init\.d|network|alternatives)\b"),
        "only Debian has this",
    ),
    Rule(
        re.compile(
            BEGIN + r"(?:apt|apt-get|apt-cache|dpkg(?:-\w+)?|adduser|addgroup) ", re.MULTILINE
        ),
        "only Debian has this; nixos-tests/machine.nix names packages",
    ),
    Rule(
        re.compile(r"\| *(?:e?grep|fgrep) (?:-\w+ )*-\w*[qm]"),
        "it may end before what it reads from, and pipefail is set: that one has failed then",
    ),
    Rule(
        re.compile(r"\bcat /proc/\["),
        "processes end, and pipefail is set; `grep -s` says nothing of those that did",
    ),
)


def find(source: str) -> list[Finding]:
    """What a script uses that NixOS does not have."""
    return [
        Finding(line, match[0].strip(), rule.sentence)
        for line, text in sorted(_texts(ast.parse(source)))
        for rule in RULES
        if rule.unless is None or not rule.unless.search(text)
        for match in rule.pattern.finditer(text)
    ]


def _texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every string of a script with its line, but for those that nobody uses: documentation."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.Expr(value=ast.Constant()):
                continue
            case ast.Constant(value=str(text)):
                yield node.lineno, text
            case ast.JoinedStr(values=values):
                yield (
                    node.lineno,
                    "".join(
                        str(part.value) if isinstance(part, ast.Constant) else "{}"
                        for part in values
                    ),
                )
                for part in values:
                    if isinstance(part, ast.FormattedValue):
                        yield from _texts(part)
            case _:
                yield from _texts(node)


# What has to be found, and what must not be. Each is a script.
BAD = (
    "machine.succeed('/usr/bin/stat x')",
    "machine.succeed('true; /bin/sleep 1')",
    "machine.succeed(f'exec /sbin/{name}; /usr/sbin/nologin')",
    "machine.succeed('printf ExecStart=/bin/sleep')",
    "find = 'find /usr/share -name x'",
    "machine.succeed('cat /usr/local/lib/systemd/system/x.service')",
    "machine.succeed('/lib/systemd/systemd --version')",
    "machine.succeed('ls /run/current-system/sw/share/zsh')",
    "machine.succeed('systemd-run --quiet sh -c \\'exec sleep 1\\'')",
    "machine.succeed(\n    'systemd-run -p User=alice '\n    f'sleep {time}')",
    "unit = '[Service]\\nExecStart=sleep 1'",
    "unit = '[Service]\\nExecStartPre=-!sleep 1'",
    "unit = '[Service]\\nExecStart=/bin/sh -c \\'sleep 1\\''",
    "machine.succeed('ln -s /dev/null /etc/systemd/system/x.service')",
    "machine.succeed(f'printf x > /etc/systemd/system/{unit}')",
    "machine.succeed('cat /etc/apt/sources.list')",
    "machine.succeed('true && apt-get install x')",
    "machine.succeed('dpkg -l x')",
    "machine.succeed('journalctl | grep -q x')",
    "machine.succeed('journalctl | grep -E -m1 x')",
    "machine.succeed('cat /proc/[0-9]*/comm | sort')",
)
GOOD = (
    'derivation = \'builder = "/bin/sh"; args = [ "-c" "echo" ];\'',
    "script = '#!/usr/bin/env python3'",
    "machine.succeed('ls /run/current-system/sw/bin/nix')",
    "machine.succeed(f'{prefix}/bin/x; find {prefix}/share/zsh')",
    "machine.succeed('systemd-run --setenv=PATH sh -c \\'exec sleep 1\\'')",
    "machine.succeed('systemd-run --scope sleep 1')",
    "with subtest('systemd-run is not meant here'):\n    pass",
    "unit = f'[Service]\\nExecStart={sleep} 1\\nExecStop='",
    "unit = f'[Service]\\nEnvironment=PATH={path}\\nExecStart=/bin/sh -c \\'sleep 1\\''",
    "machine.succeed('test -e /etc/systemd/system.conf', 'mkdir /run/systemd/system/x.d')",
    "def f() -> None:\n    '''Not /usr/bin/stat.'''",
    "t.assertIn('a unit of /etc/systemd/system', said)",
    "machine.succeed('grep -q x file | true', 'journalctl | grep -e quiet')",
)


def check_rules() -> list[str]:
    """Which of the examples are not told apart."""
    missed = [f"not found: {script}" for script in BAD if not find(script)]
    wrong = [f"found: {script}: {found[0].sentence}" for script in GOOD if (found := find(script))]
    return missed + wrong
