"""Runs commands in a machine of its own: what nsenter(1) is for a container.

This file is copied into the machine, whose Python has little more than the language. It serves
every port of the machine's virtual serial device, one process for each. A frame is a letter, a
length and that many bytes. To the machine go "r", a command as JSON, "i", more for its stdin, and
"c", the end of its stdin; from it come "o" and "e", its stdout and stderr, and "x", its exit code.
"""

import fcntl
import json
import os
import select
import signal
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER = struct.Struct("=cI")
# A write to a port takes no more at once (port_fops_write, drivers/char/virtio_console.c).
CHUNK = 32 * 1024 - HEADER.size
COMMANDS = Path("/sys/fs/cgroup/driver")


class HungUp(Exception):
    """The other side is gone in the middle of a command."""


class Port:
    """The machine's end of a port."""

    def __init__(self, device: Path) -> None:
        self.fd = os.open(device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._read = b""
        self._unwritten = b""

    def events(self) -> int:
        """What to wait for."""
        return select.POLLIN | (select.POLLOUT if self._unwritten else 0)

    @property
    def congested(self) -> bool:
        """Whether the other side has to read first."""
        return len(self._unwritten) > CHUNK

    def send(self, kind: bytes, data: bytes) -> None:
        """Queues a frame."""
        self._unwritten += HEADER.pack(kind, len(data)) + data
        self.flush()

    def flush(self) -> None:
        """Writes what can be written."""
        try:
            while self._unwritten:
                written = os.write(self.fd, self._unwritten[: CHUNK + HEADER.size])
                self._unwritten = self._unwritten[written:]
        except BlockingIOError:
            pass

    def frames(self) -> Iterator[tuple[bytes, bytes]]:
        """The frames that are complete. Those that are not taken stay."""
        try:
            while data := os.read(self.fd, CHUNK):
                self._read += data
        except BlockingIOError:
            pass
        while len(self._read) >= HEADER.size:
            kind, length = HEADER.unpack_from(self._read)
            end = HEADER.size + length
            if len(self._read) < end:
                break
            data, self._read = self._read[HEADER.size : end], self._read[end:]
            yield kind, data

    def wait_for_request(self) -> dict[str, Any]:
        """The next command."""
        poll = select.poll()
        while True:
            for kind, data in self.frames():
                if kind == b"r":
                    request: dict[str, Any] = json.loads(data)
                    return request
            poll.register(self.fd, self.events())
            for _, event in poll.poll():
                if event & select.POLLHUP and not event & select.POLLIN:
                    # Nobody is there; the kernel signals when somebody comes (send_sigio_to_port).
                    self._read = self._unwritten = b""
                    signal.sigtimedwait([signal.SIGIO], 0.2)
                elif event & select.POLLOUT:
                    self.flush()


def serve(port: Port) -> None:
    """Runs what comes in at a port, one command after the other, for ever."""
    # What detached processes may still write to: the reader must be there, as in a container.
    orphaned: list[int] = []
    while True:
        request = port.wait_for_request()
        for fd in orphaned:
            _read_some(fd)
        process = subprocess.Popen(
            request["argv"],
            cwd=request["cwd"],
            env=request["env"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_leave_service,
        )
        assert process.stderr is not None
        orphaned.append(os.dup(process.stderr.fileno()))
        try:
            _relay(port, process)
        except HungUp:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _leave_service() -> None:
    (COMMANDS / "cgroup.procs").write_text("0")
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGIO])


def _read_some(fd: int) -> bytes | None:
    """What is there; empty at the end."""
    try:
        return os.read(fd, CHUNK)
    except BlockingIOError:
        return None


def _relay(port: Port, process: "subprocess.Popen[bytes]") -> None:
    """Is over when nobody holds stdout any more and the process has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    outputs = {process.stdout.fileno(): b"o", process.stderr.fileno(): b"e"}
    stdin, pending, closing = process.stdin.fileno(), b"", False
    for fd in (stdin, *outputs):
        os.set_blocking(fd, False)
    with process.stdin, process.stdout, process.stderr:
        while process.stdout.fileno() in outputs:
            # What came with the request is there already.
            for kind, data in port.frames():
                pending += data
                closing = closing or kind == b"c"
            if closing and not pending and not process.stdin.closed:
                process.stdin.close()
            poll = select.poll()
            poll.register(port.fd, port.events())
            if not port.congested:
                for fd in outputs:
                    poll.register(fd, select.POLLIN)
            if pending:
                poll.register(stdin, select.POLLOUT)
            for fd, event in poll.poll():
                if fd == port.fd:
                    if event & select.POLLHUP:
                        raise HungUp
                    port.flush()
                elif fd == stdin:
                    pending = _feed(stdin, pending)
                elif (read := _read_some(fd)) is not None:
                    if read:
                        port.send(outputs[fd], read)
                    else:
                        del outputs[fd]
        status = process.wait()
        while process.stderr.fileno() in outputs and (read := _read_some(process.stderr.fileno())):
            port.send(b"e", read)
    port.send(b"x", struct.pack("=I", status if status >= 0 else 128 - status))


def _feed(stdin: int, pending: bytes) -> bytes:
    """Writes to a command's stdin; returns what is left of it."""
    try:
        return pending[os.write(stdin, pending) :]
    except BlockingIOError:
        return pending
    except BrokenPipeError:
        return b""


def main() -> None:
    """Serves all ports."""
    COMMANDS.mkdir(exist_ok=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
    # No udev in the machine: /dev/virtio-ports is its work.
    names = sorted(path.name for path in Path("/sys/class/virtio-ports").iterdir())
    for name in names[1:]:
        if os.fork() == 0:
            names = [name]
            break
    port = Port(Path("/dev", names[0]))

    fcntl.fcntl(port.fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(port.fd, fcntl.F_SETFL, fcntl.fcntl(port.fd, fcntl.F_GETFL) | os.O_ASYNC)
    serve(port)


if __name__ == "__main__":
    main()
