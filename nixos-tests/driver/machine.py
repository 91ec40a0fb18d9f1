"""The `machine` object of scenarios.

Names, arguments and behaviour are those of the NixOS test driver's machine
(NixOS manual, "Machine objects"), so that one script runs on both. What is
different: loops poll faster, and messages carry the output of the command.
"""

import os
import re
import shlex
import signal
import subprocess
import tempfile
import threading
from collections import deque
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

from .errors import MachineError, RequestedAssertionFailed
from .hardware import Hardware
from .hardware import command as hardware_command
from .log import Log
from .polling import retry

PROPERTY = re.compile(r"^([^=\n]+)=(.*)$", re.MULTILINE)


class Machine:
    """A Debian machine. It starts by itself at the first command."""

    def __init__(self, name: str, hardware: Hardware, log: Log, out_dir: Path) -> None:
        """`out_dir` is where copy_from_machine puts things."""
        self.name = name
        self.out_dir = out_dir
        self._hardware = hardware
        self._log = log
        self._connected = False
        self._allow_reboot = False
        self._last_stderr: deque[str] = deque(maxlen=20)

    def __repr__(self) -> str:
        return f"<Machine '{self.name}'>"

    # The machine's life

    @property
    def booted(self) -> bool:
        """Whether it is on."""
        return self._hardware.is_on

    def is_up(self) -> bool:
        """Whether it is on and takes commands."""
        return self.booted and self._connected

    def start(self, allow_reboot: bool = False) -> None:
        """Switches it on; does not wait until it has booted."""
        if self.booted:
            return
        self.log("starting the machine")
        self._connected = False
        self._allow_reboot = allow_reboot
        self._hardware.power_on()

    def connect(self) -> None:
        """Switches it on if it is off, and waits until it takes commands."""
        if self.is_up():
            return
        with self.nested("waiting for the machine to finish booting"):
            self.start()
            self._hardware.wait_until_booted()
            self._connected = True

    def shutdown(self) -> None:
        """Shuts it down in good order."""
        if not self.booted:
            return
        self.connect()
        self.execute("systemctl poweroff", check_return=False)
        self.wait_for_shutdown()

    def wait_for_shutdown(self) -> None:
        """Waits until it is off. Does not switch it off."""
        with self.nested("waiting for the machine to power off"):
            self._hardware.wait_until_off()
            self._connected = False

    def crash(self) -> None:
        """A power cut: processes are gone at once, and so is what was not synced."""
        if not self.booted:
            return
        self.log("power cut")
        self._connected = False
        self._hardware.cut_power()

    def reboot(self) -> None:
        """Reboots it in good order. As on NixOS, it must allow that from the start."""
        if not self._allow_reboot:
            raise MachineError(
                "reboot() needs machine.start(allow_reboot=True): "
                "without it the NixOS driver's machine would not come back"
            )
        self.connect()
        self.execute("systemctl reboot", check_return=False)
        self.wait_for_shutdown()
        self.start(allow_reboot=True)

    def patient(self, seconds: float) -> float:
        """How long to wait on this machine for what takes at most that long on a usual one."""
        return seconds * self._hardware.patience

    # Commands

    def _command(self, shell_command: str, timeout: float | None) -> list[str]:
        limit = None if timeout is None else self.patient(timeout)
        return hardware_command(self._hardware, shell_command, limit)

    def execute(
        self,
        command: str,
        check_return: bool = True,
        check_output: bool = True,
        timeout: float | None = 900,
    ) -> tuple[int, str]:
        """Runs a shell command as root, and returns its exit code and what it printed.

        It runs under `set -euo pipefail`, in /tmp, and is over when nobody holds
        its stdout any more. What it writes to stderr goes to the log. The code is
        124 after a timeout, -1 without `check_return`.
        """
        self.connect()
        self._last_stderr = deque(maxlen=20)
        process = subprocess.Popen(
            self._command(command, timeout),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if check_output else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stderr is not None
        reader = threading.Thread(target=self._read_stderr, args=[process.stderr], daemon=True)
        reader.start()
        threading.Thread(target=_keep_going, args=[process.pid], daemon=True).start()
        if process.stdout is None:
            return -2, ""
        with process.stdout:
            output = process.stdout.read().decode(errors="replace")
        status = process.wait()
        # A process that detached may hold stderr for ever: what is there has been read by now.
        reader.join(0.2)
        return (status if check_return else -1), output

    def _read_stderr(self, stderr: IO[bytes]) -> None:
        last = self._last_stderr
        with stderr:
            for raw in stderr:
                line = raw.decode(errors="replace").rstrip()
                last.append(line)
                self.log(f"stderr: {line}")

    def stream(self, command: str) -> int:
        """Runs a shell command whose output goes to the terminal as it comes."""
        self.connect()
        return subprocess.run(self._command(command, None), stdin=subprocess.DEVNULL).returncode

    def interact(self, term: str | None = None) -> int:
        """A root shell for a person (with `term`, on a terminal of its own), until it ends."""
        self.connect()
        shell = ["bash", "--login"]
        if term is not None:
            shell = ["env", f"TERM={term}", "script", "-qec", "bash --login", "/dev/null"]
        return subprocess.run(self._hardware.bare_command(shell)).returncode

    def succeed(self, *commands: str, timeout: float | None = None) -> str:
        """Runs commands that must exit with 0; returns what they printed."""
        printed = ""
        for command in commands:
            with self.nested(f"must succeed: {command}"):
                status, output = self.execute(command, timeout=timeout)
                if status != 0:
                    raise self._failure(command, f"failed (exit code {status})", output)
                printed += output
        return printed

    def fail(self, *commands: str, timeout: float | None = None) -> str:
        """Runs commands that must not exit with 0; returns what they printed."""
        printed = ""
        for command in commands:
            with self.nested(f"must fail: {command}"):
                status, output = self.execute(command, timeout=timeout)
                if status == 0:
                    raise self._failure(command, "unexpectedly succeeded", output)
                printed += output
        return printed

    def wait_until_succeeds(self, command: str, timeout: float = 900) -> str:
        """Repeats a command until it exits with 0; returns what it printed then."""
        return self._repeat(command, timeout, wanted=True)

    def wait_until_fails(self, command: str, timeout: float = 900) -> str:
        """Repeats a command until it does not exit with 0; returns what it printed then."""
        return self._repeat(command, timeout, wanted=False)

    def _repeat(self, command: str, timeout: float, wanted: bool) -> str:
        status, output = 0, ""

        def attempt(_last: bool) -> bool:
            nonlocal status, output
            status, output = self.execute(command, timeout=timeout)
            return (status == 0) == wanted

        with self.nested(f"waiting for {'success' if wanted else 'failure'}: {command}"):
            try:
                retry(attempt, self.patient(timeout))
            except RequestedAssertionFailed as error:
                what = f"{error}, last exit code {status}"
                raise self._failure(command, what, output) from None
        return output

    def _failure(self, command: str, what: str, output: str) -> RequestedAssertionFailed:
        message = f"command `{command}` {what}"
        for title, text in (("stdout", output), ("stderr", "\n".join(self._last_stderr))):
            if text.strip():
                message += f"\n{title}:\n" + "\n".join(text.rstrip().splitlines()[-20:])
        self.log(message)
        return RequestedAssertionFailed(message)

    # Units

    def systemctl(self, q: str, user: str | None = None) -> tuple[int, str]:
        """Runs `systemctl q`, or with `user` that user's `systemctl --user q`."""
        if user is None:
            return self.execute(f"systemctl {q}")
        script = f"XDG_RUNTIME_DIR=/run/user/$(id -u) systemctl --user {q}"
        return self.execute(f"su -l {user} --shell /bin/sh -c {shlex.quote(script)}")

    def get_unit_info(self, unit: str, user: str | None = None) -> dict[str, str]:
        """All properties of a unit."""
        status, lines = self.systemctl(f'--no-pager show "{unit}"', user)
        if status != 0:
            raise RequestedAssertionFailed(f'no properties of unit "{unit}" (exit code {status})')
        return dict(PROPERTY.findall(lines))

    def get_unit_property(self, unit: str, property: str, user: str | None = None) -> str:
        """One property of a unit."""
        query = f'--no-pager show "{unit}" --property="{property}"'
        status, lines = self.systemctl(query, user)
        found: dict[str, str] = dict(PROPERTY.findall(lines))
        if status != 0 or property not in found:
            raise RequestedAssertionFailed(
                f'no property "{property}" of unit "{unit}" (exit code {status}): {lines}', unit
            )
        return found[property]

    def require_unit_state(self, unit: str, require_state: str = "active") -> None:
        """Fails unless the unit is in that state now."""
        with self.nested(f"checking that unit {unit} is {require_state}"):
            state = self.get_unit_property(unit, "ActiveState")
            if state != require_state:
                message = f'unit "{unit}" should be {require_state} and is {state}'
                raise RequestedAssertionFailed(message, unit)

    def wait_for_unit(self, unit: str, user: str | None = None, timeout: float = 900) -> None:
        """Waits until a unit is active; fails at once if it will not become so."""

        def is_active(_last: bool) -> bool:
            state = self.get_unit_property(unit, "ActiveState", user)
            if state == "failed":
                result = self.get_unit_info(unit, user).get("Result", "unknown")
                raise RequestedAssertionFailed(f'unit "{unit}" failed (Result={result})', unit)
            if state == "inactive":
                _, jobs = self.systemctl("list-jobs --full 2>&1", user)
                # Only together with a second look: the job may just have ended.
                state = self.get_unit_property(unit, "ActiveState", user)
                if "No jobs" in jobs and state == "inactive":
                    message = f'unit "{unit}" is inactive and there are no pending jobs'
                    raise RequestedAssertionFailed(message, unit)
            return state == "active"

        with self.nested(f"waiting for unit {unit}" + (f" of user {user}" if user else "")):
            try:
                retry(is_active, self.patient(timeout))
            except RequestedAssertionFailed as error:
                raise RequestedAssertionFailed(
                    f'waiting for unit "{unit}": {error}', unit
                ) from None

    def start_job(self, jobname: str, user: str | None = None) -> tuple[int, str]:
        """Starts a unit."""
        return self.systemctl(f"start {jobname}", user)

    def stop_job(self, jobname: str, user: str | None = None) -> tuple[int, str]:
        """Stops a unit."""
        return self.systemctl(f"stop {jobname}", user)

    # Files

    def wait_for_file(self, filename: str, timeout: float = 900) -> None:
        """Waits until a file exists."""
        with self.nested(f"waiting for file {filename}"):
            retry(lambda _last: self.execute(f"test -e {filename}")[0] == 0, self.patient(timeout))

    def wait_for_open_unix_socket(
        self, addr: str, is_datagram: bool = False, timeout: float = 900
    ) -> None:
        """Waits until somebody listens on a Unix socket."""
        kind = "SOCK_DGRAM" if is_datagram else "SOCK_STREAM"
        script = f"import socket; socket.socket(socket.AF_UNIX, socket.{kind}).connect({addr!r})"
        command = f"python3 -c {shlex.quote(script)} 2>/dev/null"
        with self.nested(f"waiting for the Unix socket {addr}"):
            retry(lambda _last: self.execute(command)[0] == 0, self.patient(timeout))

    def copy_from_host(self, source: str, target: str) -> None:
        """Copies a file or directory into the machine, as root's."""
        path = Path(source).resolve()
        with tempfile.TemporaryFile() as archive:
            pack = ["tar", "--create", "--owner=0", "--group=0", f"--directory={path.parent}"]
            subprocess.run([*pack, "--", path.name], stdout=archive, check=True)
            archive.seek(0)
            name = shlex.quote(path.name)
            self._pipe(
                f"directory=$(mktemp -d); tar --extract --directory=$directory; "
                f"mkdir -p -- $(dirname -- {shlex.quote(target)}); "
                f"cp -r -- $directory/{name} {shlex.quote(target)}; rm -r $directory",
                stdin=archive,
            )

    def copy_from_host_via_shell(self, source: str, target: str) -> None:
        """The same as copy_from_host, here."""
        self.copy_from_host(source, target)

    def copy_from_machine(self, source: str, target_dir: str = "") -> None:
        """Copies a file or directory out of the machine, into `out_dir`."""
        target = self.out_dir / target_dir
        target.mkdir(parents=True, exist_ok=True)
        path = Path(source)
        with tempfile.TemporaryFile() as archive:
            where, name = shlex.quote(str(path.parent)), shlex.quote(path.name)
            self._pipe(f"tar --create --directory={where} -- {name}", stdout=archive)
            archive.seek(0)
            unpack = ["tar", "--extract", "--no-same-owner", f"--directory={target}"]
            subprocess.run(unpack, stdin=archive, check=True)

    def _pipe(
        self, command: str, stdin: IO[bytes] | None = None, stdout: IO[bytes] | None = None
    ) -> None:
        self.connect()
        done = subprocess.run(
            self._command(command, 900),
            stdin=stdin or subprocess.DEVNULL,
            stdout=stdout or subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        if done.returncode != 0:
            message = done.stderr.decode(errors="replace")
            raise RequestedAssertionFailed(f"`{command}` failed ({done.returncode}): {message}")

    # Everything else

    def sleep(self, secs: float) -> None:
        """Lets time pass in the machine."""
        self.succeed(f"sleep {secs}")

    def log(self, msg: str) -> None:
        """A line in the log."""
        self._log.log(msg)

    def nested(self, msg: str, attrs: dict[str, str] | None = None) -> AbstractContextManager[None]:
        """Groups lines of the log."""
        return self._log.nested(msg)


def _keep_going(pid: int) -> None:
    """Continues a command that is stopped, until it has ended.

    systemd stops all processes before it ends them for a soft reboot, and nsenter(1) stops itself
    with what it has started (util-linux, `continue_as_child`): nobody would continue it.
    """
    try:
        while True:
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
            if ended is None or ended.si_code != os.CLD_STOPPED:
                return
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG)
            os.kill(pid, signal.SIGCONT)
    except (ChildProcessError, ProcessLookupError):
        # Somebody else has waited for it.
        pass
