"""Lints and types the driver and the scenarios."""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from . import paths, terminal
from .errors import PreconditionError

CONFIGURATION = paths.DRIVER / "ruff.toml"
PRELUDE = "from driver.symbols import *\n"
PLACE = re.compile(r"^(?P<file>[^:\s]+\.py):(?P<line>\d+):", re.MULTILINE)


def check() -> bool:
    """Whether there is nothing to complain about. Complaints go to the terminal."""
    scenarios = sorted(paths.SCENARIOS.glob("*.py"))
    results = [
        _run("ruff", "check", f"--config={CONFIGURATION}", "--quiet", str(paths.SCENARIOS)),
        _run("ruff", "format", "--check", f"--config={CONFIGURATION}", "--quiet", *_formatted()),
        _run("mypy", *_mypy_options(), "--package=driver"),
        not scenarios or _check_types(scenarios),
    ]
    if all(results):
        terminal.say(f"the driver and {len(scenarios)} scenarios are typed and tidy")
    return all(results)


def _formatted() -> list[str]:
    return [str(path) for path in sorted(paths.SCENARIOS.rglob("*.py"))]


def _mypy_options() -> list[str]:
    cache = paths.REPOSITORY / "target" / "mypy"
    return ["--strict", "--no-error-summary", "--python-version=3.11", f"--cache-dir={cache}"]


def _check_types(scenarios: list[Path]) -> bool:
    with tempfile.TemporaryDirectory() as directory:
        originals: dict[str, Path] = {}
        for scenario in scenarios:
            module = Path(directory, scenario.stem.replace("-", "_") + ".py")
            module.write_text(PRELUDE + scenario.read_text())
            originals[str(module)] = scenario

        def original(match: re.Match[str]) -> str:
            scenario = originals.get(match["file"])
            if scenario is None:
                return match[0]
            line = int(match["line"]) - PRELUDE.count("\n")
            return f"{scenario.relative_to(paths.REPOSITORY)}:{line}:"

        done = _start("mypy", *_mypy_options(), "--show-absolute-path", *originals)
        print(PLACE.sub(original, done.stdout), end="")
        return done.returncode == 0


def _run(tool: str, *arguments: str) -> bool:
    done = _start(tool, *arguments)
    print(done.stdout, end="")
    return done.returncode == 0


def _start(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which(str(paths.REPOSITORY / "target/venv/bin" / tool)) or shutil.which(tool)
    if program is None:
        raise PreconditionError(f"{tool} is not installed: run tools/setup test")
    return subprocess.run(
        [program, *arguments],
        cwd=paths.SCENARIOS,
        env={**os.environ, "RUFF_CACHE_DIR": str(paths.REPOSITORY / "target" / "ruff")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
