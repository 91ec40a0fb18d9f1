"""The log of one machine: everything into a file, the steps onto the terminal."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from . import terminal


class Log:
    """Has the methods that scenarios use on the NixOS driver's `log`."""

    def __init__(self, path: Path | None, verbose: bool = False) -> None:
        self._started = time.monotonic()
        self._verbose = verbose
        self._lock = threading.Lock()
        self._depth = 0
        self._file: TextIO | None = None
        self.console: deque[str] = deque(maxlen=30)
        """The last lines of the machine's console, for when it does not boot."""
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")

    def close(self) -> None:
        """Ends the file. Later lines go to the terminal only, if anywhere."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def log(self, message: str) -> None:
        """A line of detail: in the file, and on the terminal when verbose."""
        elapsed = time.monotonic() - self._started
        with self._lock:
            for line in message.splitlines() or [""]:
                text = f"[{elapsed:8.3f}] {'  ' * self._depth}{line}"
                if self._file is not None:
                    self._file.write(text + "\n")
                    self._file.flush()
                if self._verbose:
                    terminal.say(terminal.paint(text, terminal.DIM))

    info = log
    warning = log
    error = log

    def log_console(self, line: str) -> None:
        """A line the machine wrote on its console."""
        self.console.append(line)
        self.log(f"console: {line}")

    def tell(self, message: str, colour: str | None = None) -> None:
        """A line that people see, verbose or not."""
        self.log(message)
        if not self._verbose:
            terminal.say(terminal.paint(message, colour) if colour else message)

    @contextmanager
    def nested(self, message: str) -> Iterator[None]:
        """Groups lines, and says how long the group took."""
        self.log(message)
        started = time.monotonic()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            self.log(f"({message.splitlines()[0][:100]}: {time.monotonic() - started:.2f} s)")

    @contextmanager
    def subtest(self, name: str) -> Iterator[None]:
        """A named step: a line on the terminal when it is over."""
        self.log(f"subtest: {name}")
        started = time.monotonic()
        self._depth += 1
        try:
            yield
        except BaseException:
            self._depth -= 1
            self.tell(f"FAILED  {name} ({time.monotonic() - started:.1f} s)", terminal.RED)
            raise
        self._depth -= 1
        self.tell(f"ok      {name} ({time.monotonic() - started:.1f} s)", terminal.GREEN)
