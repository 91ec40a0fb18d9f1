"""Runs scenarios side by side, each in a process of its own."""

import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import paths, terminal
from .errors import PreconditionError
from .host import check_preconditions
from .image import base_image
from .kernel import kernel_files
from .qemu import check_qemu
from .scenario import Outcome, log_path

# How many lines of what a scenario said in failing are said again at the end.
SAID_AGAIN = 16


def find_scenarios(names: Sequence[str]) -> list[Path]:
    """The scripts of these names; all when there are none."""
    known = {path.stem: path for path in sorted(paths.SCENARIOS.glob("*.py"))}
    wanted = [Path(name).stem for name in names] or list(known)
    for name in wanted:
        if name not in known:
            choice = ", ".join(known) or "none"
            raise PreconditionError(f"there is no scenario {name}: there is {choice}")
    return [known[name] for name in wanted]


class Runner:
    """A number of worker processes and what they said."""

    def __init__(self, options: Sequence[str], prefix: bool) -> None:
        """`options` are passed on to `python3 -m driver scenario NAME`."""
        self._options = options
        self._prefix = prefix
        self._lock = threading.Lock()
        self._stopped = False
        self._running: set[subprocess.Popen[bytes]] = set()
        self.said: dict[Path, deque[str]] = {}
        """The last lines of each."""

    def run(self, scenario: Path) -> Outcome:
        """Runs one."""
        command = [sys.executable, "-m", "driver", "scenario", scenario.stem, *self._options]
        with self._lock:
            if self._stopped:
                return Outcome.FAILED
            # The worker ends when its stdin does: when this process is killed.
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(paths.SCENARIOS)},
                start_new_session=True,
            )
            self._running.add(process)
        assert process.stdout is not None
        said = self.said[scenario] = deque(maxlen=SAID_AGAIN)
        with process.stdout:
            for raw in process.stdout:
                line = raw.decode(errors="replace").rstrip("\n")
                said.append(line)
                terminal.say(f"{scenario.stem}: {line}" if self._prefix else line)
        status = process.wait()
        with self._lock:
            self._running.discard(process)
        # Anything else is how a process ends that was killed.
        return Outcome(status) if status in list(Outcome) else Outcome.FAILED

    def stop(self) -> None:
        """Ends all workers; they clean up after themselves."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


def run_scenarios(
    scenarios: Sequence[Path], suite: str, kernel: str | None, jobs: int, options: Sequence[str]
) -> bool:
    """Runs all; whether none failed. Its last line is `N passed, N failed, N skipped`."""
    check_preconditions()
    base_image(suite)
    if kernel is not None:
        check_qemu()
        kernel_files(kernel)
    runner = Runner(options, prefix=True)
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        try:
            results = list(pool.map(runner.run, scenarios))
        except BaseException:
            runner.stop()
            raise
    failed = [
        path for path, outcome in zip(scenarios, results, strict=True) if outcome is Outcome.FAILED
    ]
    for path in failed:
        # Other scenarios have said much since, and the log may be out of reach.
        said = runner.said.get(path, ())
        terminal.say("\n".join(["", f"The end of what {path.stem} said:", *said]))
    for path in failed:
        log = os.path.relpath(log_path(path, kernel))
        terminal.say(terminal.paint(f"{path.stem} failed, its log is {log}", terminal.RED))
    passed, skipped = (results.count(outcome) for outcome in (Outcome.PASSED, Outcome.SKIPPED))
    terminal.say(f"{passed} passed, {len(failed)} failed, {skipped} skipped")
    return not failed
