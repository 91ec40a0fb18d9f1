"""Loop devices that detach themselves.

The device is attached through an open file, so that the file may already be
deleted, and with autoclear, so that nothing is left when its users are gone.
Layouts and numbers: linux/loop.h.
"""

import errno
import fcntl
import os
import stat
import struct

from .errors import PreconditionError

LOOP_CONFIGURE = 0x4C0A
LOOP_CTL_GET_FREE = 0x4C82
LO_FLAGS_AUTOCLEAR = 4
LOOP_MAJOR = 7
# struct loop_config: fd, block_size, struct loop_info64 (232 bytes, lo_flags
# at byte 52 of it), eight reserved words.
LOOP_CONFIG = "=II52xI176x64x"


class LoopDevice:
    """A block device over an open file, for as long as this object is open."""

    def __init__(self, backing: int) -> None:
        """Attaches the open file `backing`; the caller may close it then."""
        self._fd = -1
        with open("/dev/loop-control", "rb+", buffering=0) as control:
            while True:
                number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
                self.name = f"loop{number}"
                self.path = f"/dev/{self.name}"
                self._fd = _open_node(self.path, number)
                config = struct.pack(LOOP_CONFIG, backing, 0, LO_FLAGS_AUTOCLEAR)
                try:
                    fcntl.ioctl(self._fd, LOOP_CONFIGURE, config)
                    return
                except OSError as error:
                    os.close(self._fd)
                    # Somebody else was quicker with this one: take the next.
                    if error.errno != errno.EBUSY:
                        raise

    def close(self) -> None:
        """Lets go of the device. It detaches when nothing is mounted from it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _open_node(path: str, number: int) -> int:
    if not os.path.exists(path):
        # Containers do not see the nodes that the kernel adds.
        os.mknod(path, 0o660 | stat.S_IFBLK, os.makedev(LOOP_MAJOR, number))
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise PreconditionError(
            f"cannot open the loop device {path} ({error.strerror}): "
            "run this where loop devices may be used, such as a computer or a VM"
        ) from error
