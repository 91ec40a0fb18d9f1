"""A booted Debian in systemd-nspawn: real systemd, real mounts, real D-Bus."""

import os
import subprocess
import threading
import time
from pathlib import Path

from .cgroup import Cgroup
from .disk import Disk
from .enclosure import MOUNT_POINT, Enclosure
from .errors import MachineError
from .log import Log

BOOT_TIMEOUT = 120.0
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "USER": "root",
    "LOGNAME": "root",
    "SHELL": "/bin/bash",
    "LANG": "C.UTF-8",
}
COMMAND = [
    *("systemd-nspawn", f"--directory={MOUNT_POINT}", "--machine=machine", "--boot"),
    *("--register=no", "--keep-unit", "--settings=no", "--capability=all"),
    *("--private-network", "--resolv-conf=off", "--timezone=off"),
    *("--link-journal=no", "--console=read-only"),
]
# Moves itself into a cgroup and becomes the program.
ENTER_CGROUP = ["sh", "-c", 'echo 0 >"$0/cgroup.procs" && exec "$@"']


class Nspawn:
    """One machine's processes and disk, on or off."""

    def __init__(self, image: Path, log: Log) -> None:
        """A machine that is off, on a copy of `image`."""
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._console: threading.Thread | None = None
        self._leader = 0
        self._commands: Path | None = None
        self._enclosure = Enclosure()
        self._cgroup: Cgroup | None = None
        self._disk: Disk | None = None
        try:
            self._cgroup = Cgroup()
            self._disk = Disk.copy_of(image, self._enclosure)
        except BaseException:
            self.close()
            raise

    def mount_disk(self) -> Path:
        """The machine's root as seen on the host, for installing things into it."""
        assert self._disk is not None
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

    def power_on(self) -> None:
        """Starts it; does not wait until it has booted."""
        assert self._cgroup is not None
        self.wait_until_off()
        self.mount_disk()
        env = {**ENVIRONMENT, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}
        self._leader = 0
        self._process = self._enclosure.spawn(
            [*ENTER_CGROUP, str(self._cgroup.path), *COMMAND], env
        )
        self._console = threading.Thread(target=self._read_console, args=[self._process])
        self._console.daemon = True
        self._console.start()

    def _read_console(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self._log.log_console(line.decode(errors="replace").rstrip())

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
        ask = self.command("systemctl is-active --quiet basic.target", 10)
        return subprocess.run(ask, capture_output=True).returncode == 0

    def _find_leader(self) -> int:
        """The machine's first process, by its number on the host; 0 if not yet there."""
        assert self._cgroup is not None
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
        assert self._cgroup is not None
        lines = Path(f"/proc/{self._leader}/cgroup").read_text().splitlines()
        inside = next(line for line in lines if line.startswith("0::")).removeprefix("0::")
        top = self._cgroup.path.parent / inside.strip("/").removesuffix("/init.scope")
        commands = top / "driver"
        commands.mkdir(exist_ok=True)
        return commands

    def command(self, shell_command: str, timeout: float | None) -> list[str]:
        """What to run on the host to run this inside, the way the NixOS driver runs it."""
        limit = [] if timeout is None else ["timeout", "--kill-after=10", f"{timeout:g}"]
        script = f"set -euo pipefail; {shell_command}"
        return self.bare_command([*limit, "bash", "-c", script])

    def bare_command(self, command: list[str]) -> list[str]:
        """The same for a program with its arguments."""
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
        if self._console is not None:
            self._console.join()
            self._console = None

    def cut_power(self) -> None:
        """All processes are gone at once, and so is what was not synced to the disk."""
        assert self._cgroup is not None
        assert self._disk is not None
        self._cgroup.freeze()
        self._disk.cut_power()
        self._cgroup.kill()
        self.wait_until_off()
        # The kernel counts how often a cgroup was killed, and where parent and child count
        # differently it kills what is started there later (CLONE_INTO_CGROUP, Linux 6.18).
        self._cgroup.remove()
        self._cgroup = Cgroup()
        self._disk.unmount()

    def close(self) -> None:
        """Ends the machine and leaves nothing of it."""
        self._enclosure.close()
        self.wait_until_off()
        if self._disk is not None:
            self._disk.close()
        if self._cgroup is not None:
            self._cgroup.remove()
