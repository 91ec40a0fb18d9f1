"""Puts the project into a machine that is off."""

import fcntl
import shutil
from pathlib import Path

from . import paths
from .enclosure import MOUNT_POINT
from .hardware import Hardware

CONFIGURATION = "etc/layered-stores/config.toml"
SERVICE = "layered-storesd.service"
UNITS = (SERVICE, "layered-stores.target")


def install_project(hardware: Hardware) -> None:
    """Runs `make install` into it."""
    hardware.mount_disk()
    make = ["make", "--no-print-directory", "-C", str(paths.REPOSITORY)]
    # One at a time, because it may have to compile.
    with (paths.STATE / ".install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        hardware.run_on_host([*make, "install", f"DESTDIR={MOUNT_POINT}", "PREFIX=/usr"])


def configure(hardware: Hardware, configuration: Path) -> None:
    """Gives it a configuration, and has the daemon start at boot, as the NixOS module does."""
    root = hardware.mount_disk()
    target = root / CONFIGURATION
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(configuration, target)
    target.chmod(0o644)
    wants = root / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(parents=True, exist_ok=True)
    for unit in UNITS:
        (wants / unit).symlink_to(f"/usr/lib/systemd/system/{unit}")
