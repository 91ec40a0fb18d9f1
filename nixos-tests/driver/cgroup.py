"""A cgroup for each machine, so that two systemds never share one."""

import itertools
import os
import time
from pathlib import Path

from .errors import PreconditionError

PREFIX = "layered-stores-machine-"
_numbers = itertools.count(1)


def hierarchy() -> Path:
    """Where cgroup2 is mounted."""
    for candidate in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
        if (candidate / "cgroup.procs").exists() and (candidate / "cgroup.controllers").exists():
            return candidate
    raise PreconditionError(
        "test machines need the cgroup2 hierarchy and none is mounted: "
        "run `mount -t cgroup2 none /sys/fs/cgroup`"
    )


class Cgroup:
    """A directory of the cgroup2 hierarchy."""

    def __init__(self) -> None:
        """Makes an empty one, and removes what killed drivers may have left."""
        for old in hierarchy().glob(PREFIX + "*"):
            driver = old.name.removeprefix(PREFIX).partition("-")[0]
            if not Path("/proc", driver).exists():
                _remove(old)
        self.path = hierarchy() / f"{PREFIX}{os.getpid()}-{next(_numbers)}"
        self.path.mkdir()

    def processes(self) -> list[int]:
        """Every process in it and below."""
        found: list[int] = []
        for file in self.path.glob("**/cgroup.procs"):
            try:
                found += map(int, file.read_text().split())
            except OSError:  # removed under us, or a threaded cgroup
                continue
        return found

    def freeze(self) -> None:
        """Stops the clock for all processes in it."""
        (self.path / "cgroup.freeze").write_text("1")
        deadline = time.monotonic() + 10
        while "frozen 1" not in (self.path / "cgroup.events").read_text():
            if time.monotonic() > deadline:  # one hangs in the kernel: it dies later
                break
            time.sleep(0.001)

    def kill(self) -> None:
        """SIGKILL for all processes in it."""
        (self.path / "cgroup.kill").write_text("1")
        (self.path / "cgroup.freeze").write_text("0")

    def remove(self) -> None:
        """Removes it with what is below. Its processes must be gone."""
        deadline = time.monotonic() + 5
        while not _remove(self.path) and time.monotonic() < deadline:
            time.sleep(0.01)


def _remove(path: Path) -> bool:
    """Whether it is gone."""
    for directory, _, _ in os.walk(path, topdown=False):
        try:
            os.rmdir(directory)
        except OSError:
            continue
    return not path.exists()
