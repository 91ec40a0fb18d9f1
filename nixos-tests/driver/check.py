"""Lints and types the driver and the scenarios.

Scenarios that have a file for NixOS are looked at a second time as NixOS' own driver does before it
runs them: with pyflakes, and typed by its names where Nixpkgs is at hand.
"""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from . import nixpkgs, paths, portable, terminal
from .errors import PreconditionError

CONFIGURATION = paths.DRIVER / "ruff.toml"
PRELUDE = "from driver.symbols import *\n"
# Both drivers define these; a script for NixOS uses no others.
NAMES = "machine,log,t,start_all,join_all,subtest,retry"
PLACE = re.compile(r"^(?P<file>[^:\s]+\.py):(?P<line>\d+):", re.MULTILINE)


def check() -> bool:
    """Whether there is nothing to complain about. Complaints go to the terminal."""
    scenarios = sorted(paths.SCENARIOS.glob("*.py")) + sorted(paths.PREPARATIONS.glob("*.py"))
    on_nixos = [path for path in scenarios if path.with_suffix(".nix").exists()]
    checkout = nixpkgs.find()
    results = [
        _run("ruff", "check", f"--config={CONFIGURATION}", "--quiet", str(paths.SCENARIOS)),
        _run("ruff", "format", "--check", f"--config={CONFIGURATION}", "--quiet", *_formatted()),
        _run("mypy", *_mypy_options(), "--package=driver"),
        not scenarios or _check_types(scenarios, PRELUDE, _mypy_options()),
        _is_portable(on_nixos),
        _lint_as_nixos_does(on_nixos),
        checkout is None or _type_as_nixos_does(on_nixos, checkout),
    ]
    if all(results):
        terminal.say(f"the driver and {len(scenarios)} scenarios are typed and tidy")
        typed = "" if checkout else ", whose types were not at hand"
        terminal.say(f"{len(on_nixos)} of them pass what NixOS' driver looks for{typed}")
    return all(results)


def _formatted() -> list[str]:
    return [str(path) for path in sorted(paths.SCENARIOS.rglob("*.py"))]


def _mypy_options() -> list[str]:
    cache = paths.REPOSITORY / "target" / "mypy"
    return ["--strict", "--no-error-summary", "--python-version=3.11", f"--cache-dir={cache}"]


def _check_types(
    scenarios: list[Path],
    prelude: str,
    options: list[str],
    environment: dict[str, str] | None = None,
) -> bool:
    with tempfile.TemporaryDirectory() as directory:
        originals: dict[str, Path] = {}
        for scenario in scenarios:
            module = Path(directory, f"{scenario.parent.stem}_{scenario.stem}.py".replace("-", "_"))
            module.write_text(prelude + scenario.read_text())
            originals[str(module)] = scenario

        def original(match: re.Match[str]) -> str:
            scenario = originals.get(match["file"])
            if scenario is None:
                return match[0]
            line = int(match["line"]) - prelude.count("\n")
            return f"{scenario.relative_to(paths.REPOSITORY)}:{line}:"

        arguments = [*options, "--show-absolute-path", *originals]
        done = _start("mypy", *arguments, environment=environment)
        print(PLACE.sub(original, done.stdout), end="")
        return done.returncode == 0


def _is_portable(scenarios: list[Path]) -> bool:
    found = portable.check_rules()
    for scenario in scenarios:
        file = scenario.relative_to(paths.REPOSITORY)
        found += [
            f"{file}:{line}: not everywhere: {text}: {sentence}"
            for line, text, sentence in portable.find(scenario.read_text())
        ]
    print("".join(f"{line}\n" for line in found), end="")
    return not found


def _lint_as_nixos_does(scenarios: list[Path]) -> bool:
    done = _start("pyflakes", *map(str, scenarios), environment={"PYFLAKES_BUILTINS": NAMES})
    print(done.stdout.replace(f"{paths.REPOSITORY}/", ""), end="")
    return done.returncode == 0


def _type_as_nixos_does(scenarios: list[Path], checkout: Path) -> bool:
    cache = paths.REPOSITORY / "target" / "mypy-nixos"
    # What the driver imports beside itself is nowhere here.
    options = ["--no-implicit-optional", "--ignore-missing-imports", "--follow-imports=silent"]
    options += ["--no-error-summary", "--python-version=3.11", f"--cache-dir={cache}"]
    driver = checkout / "nixos" / "lib" / "test-driver"
    types = {"MYPYPATH": str(driver / "src" if (driver / "src").exists() else driver)}
    return _check_types(scenarios, _nixos_prelude(checkout), options, types)


def _nixos_prelude(checkout: Path) -> str:
    """What NixOS' driver puts before a script to type it."""
    types = (checkout / "nixos" / "lib" / "test-script-prepend.py").read_text()
    if not re.search(r"^t: ", types, re.MULTILINE):
        # Of NixOS 25.05, which is the first with a Nix that can do layered stores.
        types += "from unittest import TestCase\nt: TestCase\n"
    return types + "machine: Machine\n"


def _run(tool: str, *arguments: str) -> bool:
    done = _start(tool, *arguments)
    print(done.stdout, end="")
    return done.returncode == 0


def _start(
    tool: str, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    program = shutil.which(str(paths.REPOSITORY / "target/venv/bin" / tool)) or shutil.which(tool)
    if program is None:
        raise PreconditionError(f"{tool} is not installed: run tools/setup test")
    return subprocess.run(
        [program, *arguments],
        cwd=paths.SCENARIOS,
        env={
            **os.environ,
            "RUFF_CACHE_DIR": str(paths.REPOSITORY / "target" / "ruff"),
            **(environment or {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
