"""Runs one command in a machine of its own, as nsenter(1) does in a container.

    python3 channel.py DIRECTORY REQUEST

A program and not a function, so that to its caller it is a process like the command itself:
stdin, stdout, stderr and the exit code are the command's. DIRECTORY has a socket for each port of
the machine; REQUEST is what driver/agent.py expects. The exit code is 255 when the machine is gone.
"""

import fcntl
import os
import selectors
import socket
import struct
import sys
from pathlib import Path

HEADER = struct.Struct("=cI")
CHUNK = 32 * 1024
GONE = 255


def main() -> int:
    """The command's exit code."""
    directory, request = Path(sys.argv[1]), sys.argv[2].encode()
    # The lock ends with this process. A port whose command was cut short keeps what is in it.
    lock, port = _free_port(directory)
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            os.write(lock, b"in use")
            # By way of /proc, because a path of a socket may not be long.
            there = os.open(directory, os.O_PATH)
            connection.connect(f"/proc/self/fd/{there}/{port}")
            connection.sendall(_frame(b"r", request))
            status = _relay(connection)
        except OSError as error:
            print(f"no connection to the machine: {error}", file=sys.stderr)
            return GONE
    if status is None:
        return GONE
    os.ftruncate(lock, 0)
    return status


def _free_port(directory: Path) -> tuple[int, str]:
    for path in sorted(directory.glob("*.lock")):
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        if os.fstat(lock).st_size == 0:
            return lock, path.stem
        os.close(lock)
    sys.exit("too many commands at once in this machine")


def _frame(kind: bytes, data: bytes) -> bytes:
    return HEADER.pack(kind, len(data)) + data


def _relay(connection: socket.socket) -> int | None:
    """The exit code; nothing when the machine is gone."""
    received = b""
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        stdin = sys.stdin.fileno()
        try:
            selector.register(stdin, selectors.EVENT_READ)
        except PermissionError:  # a file or /dev/null: always ready
            while data := os.read(stdin, CHUNK):
                connection.sendall(_frame(b"i", data))
            connection.sendall(_frame(b"c", b""))
        while True:
            for key, _ in selector.select():
                if key.fd == stdin:
                    data = os.read(stdin, CHUNK)
                    connection.sendall(_frame(b"i" if data else b"c", data))
                    if not data:
                        selector.unregister(stdin)
                    continue
                data = connection.recv(CHUNK)
                if not data:
                    return None
                received += data
            while len(received) >= HEADER.size:
                kind, length = HEADER.unpack_from(received)
                end = HEADER.size + length
                if len(received) < end:
                    break
                data, received = received[HEADER.size : end], received[end:]
                if kind == b"x":
                    return int(struct.unpack("=I", data)[0])
                _write(1 if kind == b"o" else 2, data)


def _write(fd: int, data: bytes) -> None:
    try:
        while data:
            data = data[os.write(fd, data) :]
    except BrokenPipeError:  # the caller has read enough
        pass


if __name__ == "__main__":
    sys.exit(main())
