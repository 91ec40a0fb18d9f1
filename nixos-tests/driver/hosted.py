"""What every machine is to the computer that it runs on: a disk, and processes that end with it."""

import subprocess
import threading
from contextlib import ExitStack
from pathlib import Path

from .cgroup import Cgroup
from .disk import Disk
from .enclosure import Enclosure
from .log import Log


class Hosted:
    """One machine's disk and enclosure; how it is switched on and off is for each kind to say."""

    def __init__(self, image: Path, log: Log) -> None:
        """A machine that is off, on a copy of `image`."""
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._readers: list[threading.Thread] = []
        with ExitStack() as undo:
            self._enclosure = Enclosure()
            undo.callback(self._enclosure.close)
            self._cgroup = Cgroup()
            undo.callback(self._cgroup.remove)
            self._disk = Disk.copy_of(image, self._enclosure)
            undo.pop_all()

    def mount_disk(self) -> Path:
        """The root of a machine that is off as seen on the host, for installing things into it."""
        if not self._disk.mounted:
            self._disk.mount()
        return self._enclosure.root

    def run_on_host(self, command: list[str]) -> None:
        """Runs a host program that sees the machine's root at MOUNT_POINT."""
        self._enclosure.check(command)

    @property
    def is_on(self) -> bool:
        """Whether the machine runs. One that has powered itself off does not."""
        return self._process is not None and self._process.poll() is None

    def _log_output(self, process: subprocess.Popen[bytes]) -> None:
        """From now on what it prints is in the log, until _join_readers()."""
        reader = threading.Thread(target=self._read_console, args=[process], daemon=True)
        reader.start()
        self._readers.append(reader)

    def _read_console(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self._log.log_console(line.decode(errors="replace").rstrip())

    def _join_readers(self) -> None:
        for reader in self._readers:
            reader.join()
        self._readers.clear()

    def _renew_cgroup(self) -> None:
        """After all in it was killed.

        The kernel counts how often a cgroup was killed, and where parent and child count
        differently it kills what is started there later (CLONE_INTO_CGROUP, Linux 6.18).
        """
        self._cgroup.remove()
        self._cgroup = Cgroup()

    def close(self) -> None:
        """Ends the machine and leaves nothing of it."""
        self._enclosure.close()
        if self._process is not None:
            self._process.wait()
            self._process = None
        self._join_readers()
        self._disk.close()
        self._cgroup.remove()
