"""Runs one scenario on a machine of its own."""

import signal
import time
import traceback
from dataclasses import dataclass
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
    timeout: int = 900

    @property
    def name(self) -> str:
        """The script's name without `.py`."""
        return self.path.stem

    @property
    def configuration(self) -> Path | None:
        """The stores it needs from boot on, if any."""
        file = self.path.with_suffix(".toml")
        return file if file.exists() else None

    def run(self) -> bool:
        """Whether it passed. Says on the terminal what happened."""
        log = Log(paths.LOGS / f"{self.name}.log", self.verbose)
        started = time.monotonic()
        signal.signal(signal.SIGALRM, self._too_late)
        signal.alarm(self.timeout)
        try:
            with boot(self.suite, self.install, self.configuration, self.name, log) as machine:
                passed = self._run_on(machine, log)
        except (MachineError, PreconditionError, RequestedAssertionFailed) as error:
            log.tell(f"no machine: {error}", terminal.RED)
            passed = False
        finally:
            signal.alarm(0)
        word, colour = ("passed", terminal.GREEN) if passed else ("FAILED", terminal.RED)
        log.tell(f"{word} after {time.monotonic() - started:.1f} s", colour)
        log.close()
        return passed

    def _too_late(self, _signal: int, _frame: FrameType | None) -> None:
        raise RequestedAssertionFailed(f"the scenario took more than {self.timeout} seconds")

    def _run_on(self, machine: Machine, log: Log) -> bool:
        symbols: dict[str, object] = {
            "__name__": self.name,
            "machine": machine,
            "log": log,
            "t": Assertions(),
            "start_all": machine.start,
            "join_all": machine.wait_for_shutdown,
            "subtest": log.subtest,
            "retry": retry,
            "Skipped": Skipped,
        }
        try:
            exec(compile(self.path.read_text(), self.path, "exec"), symbols)
        except Skipped as reason:
            log.tell(f"SKIPPED: {reason}", terminal.BOLD)
        except Exception as error:
            signal.alarm(0)
            self._explain(error, machine, log)
            return False
        return True

    def _explain(self, error: Exception, machine: Machine, log: Log) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, (MachineError, RequestedAssertionFailed)):
            # The driver's own frames say nothing about the project.
            frames = traceback.StackSummary(f for f in frames if f.filename == str(self.path))
        for frame in frames:
            where = Path(frame.filename)
            if where.is_relative_to(paths.REPOSITORY):
                where = where.relative_to(paths.REPOSITORY)
            log.tell(f"{where}:{frame.lineno}: {frame.line}")
        log.tell(f"{type(error).__name__}: {error}", terminal.RED)
        unit = error.unit if isinstance(error, RequestedAssertionFailed) else None
        _show_journal(machine, log, {unit, SERVICE} - {None})


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
