"""A private mount and process namespace that ends with the driver.

Its first process reads a pipe that only the driver holds. When the driver is
done, or is killed in whatever way, the pipe closes, that process ends, and the
kernel kills everything else in the namespace and drops every mount.
"""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from .errors import MachineError

MOUNT_POINT = "/run/systemd/nspawn/root"
"""Where a machine's root is mounted, inside."""

# systemd-nspawn keeps locks and sockets by machine name in its directory: a
# private one lets machines of one name run side by side. Nothing reaches the host.
_FIRST_PROCESS = f"""
mkdir -p {os.path.dirname(MOUNT_POINT)}
mount -t tmpfs -o mode=755 machine {os.path.dirname(MOUNT_POINT)}
mkdir {MOUNT_POINT} {os.path.dirname(MOUNT_POINT)}/tmp
echo ready
exec cat >/dev/null
"""


class Enclosure:
    """Runs host programs where their mounts and processes cannot outlive the driver."""

    def __init__(self) -> None:
        """Makes the namespaces."""
        self._process = subprocess.Popen(
            ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child"]
            + ["--mount-proc", "sh", "-euc", _FIRST_PROCESS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ctrl-C is for the driver, which then ends this in its own time.
            start_new_session=True,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise MachineError("cannot make a private mount and process namespace (see above)")
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        self.pid = int(children.read_text().split()[0])

    def close(self) -> None:
        """Kills what runs in it and drops its mounts."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    @property
    def root(self) -> Path:
        """The mounted machine's root, as seen from outside."""
        return Path(f"/proc/{self.pid}/root{MOUNT_POINT}")

    def _command(self, command: Sequence[str]) -> list[str]:
        return ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--", *command]

    def run(
        self, command: Sequence[str], output: IO[bytes], env: Mapping[str, str] | None = None
    ) -> int:
        """Runs a program in it, and returns its exit code."""
        return subprocess.run(
            self._command(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        ).returncode

    def check(self, command: Sequence[str]) -> None:
        """Runs a program in it that must succeed."""
        done = subprocess.run(
            self._command(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        if done.returncode != 0:
            output = done.stdout.decode(errors="replace").strip()
            raise MachineError(f"`{' '.join(command)}` failed ({done.returncode}): {output}")

    def spawn(
        self, command: Sequence[str], env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Starts a program in it; what it prints is for the caller to read."""
        return subprocess.Popen(
            self._command(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
