"""What this computer must have, said in one sentence when it does not."""

import os
import shutil

from .errors import PreconditionError

TOOLS = {
    "systemd-nspawn": "systemd-container",
    "mmdebstrap": "mmdebstrap",
    "mkfs.ext4": "e2fsprogs",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "mount": "mount",
}


def check_preconditions() -> None:
    """Raises PreconditionError unless machines can run here."""
    if os.geteuid() != 0:
        raise PreconditionError(
            "test machines need root (mounts and containers): run this with sudo"
        )
    os.environ["PATH"] = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    if missing:
        raise PreconditionError(
            f"test machines need the packages {', '.join(missing)}: run tools/setup test"
        )
    if not os.path.exists("/dev/loop-control"):
        raise PreconditionError(
            "test machines need loop devices and /dev/loop-control is not there: run "
            "`modprobe loop` on the host, or give the container /dev/loop-control and /dev/loop*"
        )
