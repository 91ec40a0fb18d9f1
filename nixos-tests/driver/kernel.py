"""Kernels of Debian's for machines of their own, each with an initramfs, made once."""

import fcntl
import hashlib
import os
import shlex
import time
from pathlib import Path

from . import paths, terminal
from .enclosure import Enclosure
from .errors import PreconditionError
from .image import in_root, mmdebstrap

# The suites that the kernels come from.
KERNELS = {"6.1": "bookworm", "6.12": "trixie", "sid": "sid"}
PACKAGES = ("linux-image-cloud-amd64", "initramfs-tools", "lz4")
# The machine itself has neither modprobe(8) nor modules: all that it may want is loaded at boot.
MODULES = (
    *("virtio_pci", "virtio_blk", "virtio_console", "ext4"),
    *("overlay", "fuse", "cuse", "erofs", "squashfs", "loop", "tun"),
)
INITRAMFS = f"""
cd "$1/etc"
mkdir -p initramfs-tools/conf.d
printf '%s\\n' {" ".join(MODULES)} >initramfs-tools/modules
printf '%s\\n' MODULES=list COMPRESS=lz4 RESUME=none >initramfs-tools/conf.d/machine
"""


def kernel_files(kernel: str) -> tuple[Path, Path]:
    """The kernel and its initramfs. Makes them if there are none for today's recipe."""
    if kernel not in KERNELS:
        raise PreconditionError(f"there is no kernel {kernel}: use one of {', '.join(KERNELS)}")
    recipe = [*mmdebstrap(KERNELS[kernel], PACKAGES), INITRAMFS]
    digest = hashlib.sha256("\0".join(recipe).encode()).hexdigest()[:12]
    directory = paths.STATE / f"kernel-{kernel}-{digest}"
    paths.STATE.mkdir(parents=True, exist_ok=True)
    with (paths.STATE / f".kernel-{kernel}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "initrd").exists():
            _make(kernel, directory)
    return directory / "vmlinuz", directory / "initrd"


def _make(kernel: str, directory: Path) -> None:
    """A Debian just for this: its kernel package and what makes an initramfs of it."""
    started = time.monotonic()
    terminal.say(f"kernel {kernel}: taking it from Debian {KERNELS[kernel]}")
    log = paths.LOGS / f"kernel-{kernel}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    directory.mkdir(exist_ok=True)
    # The initramfs last: it says that all is there.
    take = f"""cd {shlex.quote(str(directory))}
cp "$1"/boot/vmlinuz-* vmlinuz
cp "$1"/boot/initrd.img-* initrd.new
mv initrd.new initrd
"""
    command = mmdebstrap(KERNELS[kernel], PACKAGES)
    hooks = [f"--essential-hook=set -e; {INITRAMFS}", f"--customize-hook=set -e; {take}"]
    enclosure = Enclosure()
    try:
        in_root(enclosure, [*command, "--format=null", *hooks], log)
    finally:
        enclosure.close()
    elapsed = time.monotonic() - started
    terminal.say(f"kernel {kernel}: done in {elapsed:.1f} s: {os.path.relpath(directory)}")
