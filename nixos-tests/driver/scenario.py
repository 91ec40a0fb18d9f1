"""Runs one scenario on a machine of its own."""

import signal
import time
import traceback
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import FrameType
from unittest import TestCase

from . import paths, terminal
from .boot import boot
from .errors import MachineError, PreconditionError, RequestedAssertionFailed, Skipped
from .install import SERVICE
from .log import Log
from .machine import Machine
from .polling import retry


def log_path(script: Path, kernel: str | None) -> Path:
    """Where the log of a scenario is."""
    name = script.stem if kernel is None else f"{script.stem}-{kernel}"
    return paths.LOGS / f"{name}.log"


class Outcome(IntEnum):
    """How a scenario ended, as the exit code of the process that ran it."""

    PASSED = 0
    FAILED = 1
    SKIPPED = 77
    """As automake's and meson's tests say it."""


WORDS = {
    Outcome.PASSED: ("passed", terminal.GREEN),
    Outcome.FAILED: ("FAILED", terminal.RED),
    Outcome.SKIPPED: ("SKIPPED", terminal.BOLD),
}


class Assertions(TestCase):
    """`t.assertEqual(…)` and its siblings."""

    failureException = RequestedAssertionFailed


@dataclass(frozen=True)
class Scenario:
    """A script, and how to run it."""

    path: Path
    suite: str = "trixie"
    install: bool = True
    verbose: bool = False
    timeout: int = 2400
    kernel: str | None = None

    @property
    def name(self) -> str:
        """The script's name without `.py`."""
        return self.path.stem

    @property
    def log_path(self) -> Path:
        """Where its log is."""
        return log_path(self.path, self.kernel)

    @property
    def configuration(self) -> Path | None:
        """The stores it needs from boot on, if any."""
        file = self.path.with_suffix(".toml")
        return file if file.exists() else None

    @property
    def preparation(self) -> Path:
        """The script that makes of a Debian what a file for NixOS declares, if there is one."""
        return paths.PREPARATIONS / self.path.name

    def run(self) -> Outcome:
        """Runs it. Says on the terminal what happened."""
        log = Log(self.log_path, self.verbose)
        started = time.monotonic()
        signal.signal(signal.SIGALRM, self._too_late)
        try:
            with boot(
                *(self.suite, self.install, self.configuration, self.name, log, self.kernel)
            ) as machine:
                signal.alarm(int(machine.patient(self.timeout)))
                outcome = self._run_on(machine, log)
        except (MachineError, PreconditionError, RequestedAssertionFailed) as error:
            log.tell(f"no machine: {error}", terminal.RED)
            outcome = Outcome.FAILED
        finally:
            signal.alarm(0)
        word, colour = WORDS[outcome]
        log.tell(f"{word} after {time.monotonic() - started:.1f} s", colour)
        log.close()
        return outcome

    def _too_late(self, _signal: int, _frame: FrameType | None) -> None:
        raise RequestedAssertionFailed(f"the scenario took more than {self.timeout} seconds")

    def _run_on(self, machine: Machine, log: Log) -> Outcome:
        symbols: dict[str, object] = {
            "__name__": self.name,
            "machine": machine,
            "log": log,
            "t": Assertions(),
            "start_all": machine.start,
            "join_all": machine.wait_for_shutdown,
            "subtest": log.subtest,
            "retry": lambda fn, timeout_seconds=900.0: retry(fn, machine.patient(timeout_seconds)),
            "Skipped": Skipped,
        }
        try:
            if self.preparation.exists():
                _execute(self.preparation, dict(symbols))
            _execute(self.path, symbols)
        except Skipped as reason:
            log.tell(f"nothing to do here: {reason}", terminal.BOLD)
            return Outcome.SKIPPED
        except Exception as error:
            signal.alarm(0)
            self._explain(error, machine, log)
            return Outcome.FAILED
        return Outcome.PASSED

    def _explain(self, error: Exception, machine: Machine, log: Log) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, (MachineError, RequestedAssertionFailed)):
            # The driver's own frames say nothing about the project.
            frames = traceback.StackSummary(
                f for f in frames if Path(f.filename).name == self.path.name
            )
        unit = error.unit if isinstance(error, RequestedAssertionFailed) else None
        _show_journal(machine, log, {unit, SERVICE} - {None})
        # What matters most comes last, where a screen and a log that was cut short still have it.
        for frame in frames:
            where = Path(frame.filename)
            if where.is_relative_to(paths.REPOSITORY):
                where = where.relative_to(paths.REPOSITORY)
            log.tell(f"{where}:{frame.lineno}: {frame.line}")
        log.tell(f"{type(error).__name__}: {error}", terminal.RED)


def _execute(script: Path, symbols: dict[str, object]) -> None:
    exec(compile(script.read_text(), script, "exec"), symbols)


def _show_journal(machine: Machine, log: Log, units: set[str | None]) -> None:
    if not machine.is_up():
        log.tell("the machine is off; the end of its console:\n" + "\n".join(log.console))
        return
    for unit in sorted(filter(None, units)):
        command = f"journalctl --boot --no-pager --quiet --lines=25 --unit='{unit}'"
        _, lines = machine.execute(command, timeout=20)
        if lines.strip():
            log.tell(f"the end of the journal of {unit}:\n{lines.rstrip()}")
    _, failed = machine.execute("systemctl --failed --plain --no-legend --no-pager", timeout=20)
    if failed.strip():
        log.tell(f"failed units:\n{failed.rstrip()}")
