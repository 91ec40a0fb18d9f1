"""A booted Debian with a kernel of its own, in qemu without KVM."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from . import paths
from .enclosure import MOUNT_POINT
from .errors import MachineError, PreconditionError
from .hardware import ENTER_CGROUP, ENVIRONMENT
from .hosted import Hosted
from .log import Log

TOOLS = {"qemu-system-x86_64": "qemu-system-x86", "nbdkit": "nbdkit"}
BOOT_TIMEOUT = 600.0
PORTS = 8
# A directory that is seen inside the enclosure only.
RUN = str(Path(MOUNT_POINT).parent / "qemu")
# Protections that cost much where every instruction is emulated, and protect nobody here.
KERNEL_OPTIONS = (
    "root=/dev/vda rw console=ttyS0 panic=-1 mitigations=off nokaslr systemd.getty_auto=no"
)
COMMAND = [
    *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
    # One processor: where a kernel changes its own code (static branches), another may still run
    # what has been replaced, and the kernel panics over it (seen with qemu 7.2 and Linux 6.12).
    *("-machine", "q35", "-accel", "tcg,tb-size=512", "-cpu", "max", "-smp", "1"),
    *("-m", "2048", "-serial", "stdio"),
    *("-kernel", f"{RUN}/vmlinuz", "-initrd", f"{RUN}/initrd", "-append", KERNEL_OPTIONS),
    # Every flush of the machine reaches the server of its disk.
    *("-drive", f"if=virtio,format=raw,cache=writeback,file=nbd+unix:///?socket={RUN}/disk"),
    *("-device", "virtio-serial"),
]
# A disk with a cache of its own that a power cut empties: what is written stays in a file that
# nobody else sees, until it is flushed to the device. (The power of the host is not cut: it need
# not flush.)
DISK_SERVER = [
    *("nbdkit", "--foreground", "--unix", f"{RUN}/disk", "--filter=cache", "--filter=fua"),
    *("file", "DEVICE", "cache=writeback", "cache-min-block-size=4k", "fuamode=discard"),
]
AGENT = "usr/local/lib/driver-agent.py"
AGENT_UNIT = f"""[Unit]
DefaultDependencies=no
After=basic.target
[Service]
ExecStart=/usr/bin/python3 /{AGENT}
"""


class Qemu(Hosted):
    """One machine's computer and disk, on or off."""

    patience = 10.0

    def __init__(self, image: Path, kernel: tuple[Path, Path], log: Log) -> None:
        """A machine that is off, on a copy of `image`, with a kernel and its initramfs."""
        super().__init__(image, log)
        try:
            self._run = Path(f"/proc/{self._enclosure.pid}/root{RUN}")
            self._run.mkdir()
            for file in kernel:
                shutil.copyfile(file, self._run / file.name)
            self._install_agent()
        except BaseException:
            self.close()
            raise

    def _install_agent(self) -> None:
        root = self.mount_disk()
        shutil.copyfile(paths.DRIVER / "agent.py", root / AGENT)
        unit = root / "etc/systemd/system/driver-agent.service"
        unit.write_text(AGENT_UNIT)
        wants = unit.with_name("multi-user.target.wants")
        wants.mkdir(exist_ok=True)
        (wants / unit.name).symlink_to(unit.relative_to(root))

    def power_on(self) -> None:
        """Starts it; does not wait until it has booted."""
        self.wait_until_off()
        if self._disk.mounted:
            self._disk.unmount()
        device = self._disk.path
        server = self._spawn([device if word == "DEVICE" else word for word in DISK_SERVER])
        self._wait_for_socket("disk", server)
        ports = []
        for number in range(PORTS):
            (self._run / f"port{number}.lock").write_bytes(b"")
            path = f"{RUN}/port{number}"
            ports += ["-chardev", f"socket,id=port{number},server=on,wait=off,path={path}"]
            ports += ["-device", f"virtserialport,chardev=port{number},name=port{number}"]
        self._process = self._spawn([*COMMAND, *ports])
        self._wait_for_socket(f"port{PORTS - 1}", self._process)

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        process = self._enclosure.spawn([*ENTER_CGROUP, str(self._cgroup.path), *command])
        self._log_output(process)
        return process

    def _wait_for_socket(self, name: str, process: subprocess.Popen[bytes]) -> None:
        while not (self._run / name).exists():
            if process.poll() is not None:
                console = "\n".join(self._log.console)
                raise MachineError(f"the machine cannot be switched on:\n{console}")
            time.sleep(0.01)

    def wait_until_booted(self) -> None:
        """Returns when basic.target is reached, as the NixOS driver's shell waits for."""
        what = "did not boot in time"
        try:
            # Commands are run once it is.
            ask = subprocess.run(
                self.bare_command(["true"]),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=BOOT_TIMEOUT,
                start_new_session=True,
            )
            if ask.returncode == 0:
                return
            what = "stopped while it was booting"
        except subprocess.TimeoutExpired:
            pass
        console = "\n".join(self._log.console)
        raise MachineError(f"the machine {what}; the end of its console:\n{console}")

    def bare_command(self, command: list[str]) -> list[str]:
        """What to run on the host to run a program with its arguments inside."""
        request = json.dumps({"argv": command, "env": ENVIRONMENT, "cwd": "/tmp"})
        # -IS: it starts in half the time.
        channel = str(paths.DRIVER / "channel.py")
        return [sys.executable, "-IS", channel, str(self._run), request]

    def wait_until_off(self, timeout: float | None = None) -> None:
        """Waits until it is off by itself."""
        if self._process is None:
            return
        self._process.wait(timeout)
        self._process = None
        # Before the machine switched itself off, it has flushed its disk.
        self._end_processes()

    def _end_processes(self) -> None:
        """The server of the disk with what it has not been told to flush, and qemu if it is on."""
        self._cgroup.kill()
        self._join_readers()
        self._renew_cgroup()
        for socket in ("disk", *(f"port{number}" for number in range(PORTS))):
            (self._run / socket).unlink(missing_ok=True)

    def cut_power(self) -> None:
        """All processes are gone at once, and so is what was not synced to the disk."""
        # Both stop before one ends, so that the machine never sees the other's end.
        self._cgroup.freeze()
        self._end_processes()
        if self._process is not None:
            self._process.wait()
            self._process = None


def check_qemu() -> None:
    """Raises PreconditionError unless machines of their own can run here."""
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if missing:
        raise PreconditionError(
            f"other kernels need the packages {', '.join(missing)}: run tools/setup kernels"
        )
