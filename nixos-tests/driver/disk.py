"""The disk of one machine: a throw-away copy of an image, and its filesystem."""

import fcntl
import os
import struct
import subprocess
import time
from pathlib import Path

from .enclosure import MOUNT_POINT, Enclosure
from .errors import MachineError
from .loop import LoopDevice

# _IOR('X', 125, __u32) and the flag for "flush nothing, not even the journal":
# fs/ext4/ext4.h. What xfstests uses to cut the power of a filesystem.
EXT4_IOC_SHUTDOWN = 0x8004587D
EXT4_GOING_FLAGS_NOLOGFLUSH = 2


class Disk:
    """An ext4 filesystem, mounted in an enclosure at MOUNT_POINT or not at all."""

    def __init__(self, enclosure: Enclosure, backing: int) -> None:
        """Uses the open image file `backing`; the caller may close it then."""
        self._enclosure = enclosure
        self._device = LoopDevice(backing)
        self.mounted = False

    @classmethod
    def copy_of(cls, image: Path, enclosure: Enclosure) -> "Disk":
        """A disk with the content of `image`. Its file is never seen in a directory."""
        path = image.with_name(f".run-{os.getpid()}-{enclosure.pid}.img")
        copy = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            path.unlink()
            subprocess.run(
                ["cp", "--reflink=auto", "--sparse=always", image, f"/proc/self/fd/{copy}"],
                pass_fds=[copy],
                check=True,
                start_new_session=True,
            )
            return cls(enclosure, copy)
        finally:
            os.close(copy)

    @property
    def path(self) -> str:
        """The device's node."""
        return self._device.path

    def mount(self) -> None:
        """Mounts it; a journal that a power cut left is replayed."""
        options = "noatime,noinit_itable"
        self._enclosure.check(["mount", "-t", "ext4", "-o", options, self.path, MOUNT_POINT])
        self.mounted = True

    def unmount(self) -> None:
        """Unmounts it and waits until the kernel has let go of the filesystem."""
        self._enclosure.check(["umount", MOUNT_POINT])
        self.mounted = False
        deadline = time.monotonic() + 10
        while os.path.exists(f"/sys/fs/ext4/{self._device.name}"):
            if time.monotonic() > deadline:
                raise MachineError("somebody still uses the machine's disk 10 s after its end")
            time.sleep(0.005)

    def cut_power(self) -> None:
        """From now on nothing reaches the disk, and what was not synced is lost."""
        root = os.open(self._enclosure.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            flags = struct.pack("=I", EXT4_GOING_FLAGS_NOLOGFLUSH)
            fcntl.ioctl(root, EXT4_IOC_SHUTDOWN, flags)
        finally:
            os.close(root)

    def close(self) -> None:
        """Lets go of the device, which detaches once it is unmounted."""
        self._device.close()
