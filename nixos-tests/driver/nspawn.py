"""A booted Debian in systemd-nspawn: real systemd, real mounts, real D-Bus."""

import os
import subprocess
import time
from pathlib import Path

from .enclosure import MOUNT_POINT
from .errors import MachineError
from .hardware import ENTER_CGROUP, ENVIRONMENT, command
from .hosted import Hosted
from .log import Log

BOOT_TIMEOUT = 120.0
COMMAND = [
    *("systemd-nspawn", f"--directory={MOUNT_POINT}", "--machine=machine", "--boot"),
    *("--register=no", "--keep-unit", "--settings=no", "--capability=all"),
    *("--private-network", "--resolv-conf=off", "--timezone=off"),
    *("--link-journal=no", "--console=read-only"),
]


class Nspawn(Hosted):
    """One machine's processes and disk, on or off."""

    patience = 1.0

    def __init__(self, image: Path, log: Log) -> None:
        """A machine that is off, on a copy of `image`."""
        super().__init__(image, log)
        self._leader = 0
        self._commands: Path | None = None

    def power_on(self) -> None:
        """Starts it; does not wait until it has booted."""
        self.wait_until_off()
        self.mount_disk()
        # Its filter answers ENOSYS to system calls that are newer than itself, such as
        # statmount(2), which a computer of its own has.
        env = {
            **ENVIRONMENT,
            "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
            "SYSTEMD_SECCOMP": "0",
        }
        self._leader = 0
        self._process = self._enclosure.spawn(
            [*ENTER_CGROUP, str(self._cgroup.path), *COMMAND], env
        )
        self._log_output(self._process)

    def wait_until_booted(self) -> None:
        """Returns when basic.target is reached, as the NixOS driver's shell waits for."""
        deadline = time.monotonic() + BOOT_TIMEOUT
        while not self._has_booted():
            if not self.is_on or time.monotonic() > deadline:
                console = "\n".join(self._log.console)
                what = "did not boot in time" if self.is_on else "stopped while it was booting"
                raise MachineError(f"the machine {what}; the end of its console:\n{console}")
            time.sleep(0.02)

    def _has_booted(self) -> bool:
        if self._leader == 0:
            self._leader = self._find_leader()
            return False
        # The socket first: looking costs nothing, asking costs two processes.
        if not os.path.exists(f"/proc/{self._leader}/root/run/systemd/private"):
            return False
        self._commands = self._make_commands_cgroup()
        ask = command(self, "systemctl is-active --quiet basic.target", 10)
        return subprocess.run(ask, capture_output=True).returncode == 0

    def _find_leader(self) -> int:
        """The machine's first process, by its number on the host; 0 if not yet there."""
        for pid in self._cgroup.processes():
            try:
                program = os.readlink(f"/proc/{pid}/exe")
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:  # gone already
                continue
            numbers = next(line for line in status.splitlines() if line.startswith("NSpid:"))
            # Before it is systemd it is nspawn, and its namespaces are not complete.
            if numbers.split()[-1] == "1" and program.endswith("/systemd"):
                return pid
        return 0

    def _make_commands_cgroup(self) -> Path:
        """A cgroup beside the machine's init.scope, for what the driver runs in it."""
        lines = Path(f"/proc/{self._leader}/cgroup").read_text().splitlines()
        inside = next(line for line in lines if line.startswith("0::")).removeprefix("0::")
        top = self._cgroup.path.parent / inside.strip("/").removesuffix("/init.scope")
        commands = top / "driver"
        commands.mkdir(exist_ok=True)
        return commands

    def bare_command(self, command: list[str]) -> list[str]:
        """What to run on the host to run a program with its arguments inside."""
        assert self._commands is not None
        variables = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
        return [
            *(*ENTER_CGROUP, str(self._commands)),
            *("nsenter", f"--target={self._leader}", "--all", "--"),
            *("/usr/bin/env", "--ignore-environment", "--chdir=/tmp", *variables, *command),
        ]

    def wait_until_off(self, timeout: float | None = None) -> None:
        """Waits until it is off by itself."""
        if self._process is not None:
            self._process.wait(timeout)
            self._process = None
        self._join_readers()

    def cut_power(self) -> None:
        """All processes are gone at once, and so is what was not synced to the disk."""
        self._cgroup.freeze()
        self._disk.cut_power()
        self._cgroup.kill()
        self.wait_until_off()
        self._renew_cgroup()
        self._disk.unmount()
