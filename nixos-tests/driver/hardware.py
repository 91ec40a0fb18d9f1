"""What a machine runs on: a container of this computer's kernel, or a computer of its own."""

from pathlib import Path
from typing import Protocol

ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "USER": "root",
    "LOGNAME": "root",
    "SHELL": "/bin/bash",
    "LANG": "C.UTF-8",
}
"""What commands find in their environment."""

# Moves itself into a cgroup and becomes the program.
ENTER_CGROUP = ["sh", "-c", 'echo 0 >"$0/cgroup.procs" && exec "$@"']


class Hardware(Protocol):
    """One machine's processes and disk, on or off."""

    patience: float
    """How many times longer than in a container things may take."""

    def mount_disk(self) -> Path:
        """The root of a machine that is off as seen on the host, for installing things into it."""

    def run_on_host(self, command: list[str]) -> None:
        """Runs a host program that sees the machine's root at MOUNT_POINT."""

    @property
    def is_on(self) -> bool:
        """Whether the machine runs. One that has powered itself off does not."""

    def power_on(self) -> None:
        """Starts it; does not wait until it has booted."""

    def wait_until_booted(self) -> None:
        """Returns when basic.target is reached, as the NixOS driver's shell waits for."""

    def bare_command(self, command: list[str]) -> list[str]:
        """What to run on the host to run a program with its arguments inside."""

    def wait_until_off(self, timeout: float | None = None) -> None:
        """Waits until it is off by itself."""

    def cut_power(self) -> None:
        """All processes are gone at once, and so is what was not synced to the disk."""

    def close(self) -> None:
        """Ends the machine and leaves nothing of it."""


def command(hardware: Hardware, shell_command: str, timeout: float | None) -> list[str]:
    """What to run on the host to run this inside, the way the NixOS driver runs it."""
    limit = [] if timeout is None else ["timeout", "--kill-after=10", f"{timeout:g}"]
    script = f"set -euo pipefail; {shell_command}"
    return hardware.bare_command([*limit, "bash", "-c", script])
