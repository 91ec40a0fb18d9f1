"""The base image: a Debian on an ext4 filesystem in a file, made once.

An image file, because a machine makes its own directories immutable and fills
them with trusted attributes: deleting the file deletes all of it.
"""

import fcntl
import hashlib
import os
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from . import paths, terminal
from .disk import Disk
from .enclosure import MOUNT_POINT, Enclosure
from .errors import MachineError, PreconditionError

SUITES = ("trixie", "sid")
SIZE = 6 * 1024**3
PACKAGES = (
    *("systemd", "systemd-sysv", "libpam-systemd", "libnss-systemd", "dbus", "polkitd", "nix-bin"),
    *("mount", "util-linux", "procps", "e2fsprogs", "acl", "attr"),
    *("strace", "jq", "python3-minimal"),
    # For NixOS' switch-to-configuration.
    *("libconfig-inifiles-perl", "libfile-slurp-perl"),
)
# Not installed but there, so that a scenario without a network can do what a guide says.
KEPT_PACKAGES = (
    *("nix-setup-systemd", "dbus-broker"),
    *("prometheus", "promtool", "prometheus-node-exporter", "adduser"),
)
KEPT_IN = "/var/cache/packages"
UNWANTED_FILES = ("doc", "man", "locale", "info", "lintian", "bug")
PROVISION = paths.DRIVER / "provision.sh"


def base_image(suite: str) -> Path:
    """The image of a suite. Builds it if there is none for today's recipe."""
    if suite not in SUITES:
        raise PreconditionError(f"there is no suite {suite}: use one of {', '.join(SUITES)}")
    recipe = [*mmdebstrap(suite, PACKAGES), ""]
    digest = hashlib.sha256("\0".join(recipe).encode() + PROVISION.read_bytes())
    image = paths.STATE / f"{suite}-{digest.hexdigest()[:12]}.img"
    paths.STATE.mkdir(parents=True, exist_ok=True)
    with (paths.STATE / f".{suite}.lock").open("w") as lock:
        # Two runs at once build one image.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not image.exists():
            _build(suite, image)
    return image


def mmdebstrap(suite: str, packages: Sequence[str]) -> list[str]:
    """The command that makes a Debian. What it makes of it is still to be added."""
    command = ["mmdebstrap", "--mode=root", "--variant=apt", "--format=directory"]
    command += [f"--include={','.join(packages)}"]
    command += ['--aptopt=APT::Install-Recommends "false"']
    command += [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in UNWANTED_FILES]
    download = f'APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get download {" ".join(KEPT_PACKAGES)}'
    kept = f'mkdir -p "$1{KEPT_IN}" && cd "$1{KEPT_IN}" && {download}'
    command += [f"--customize-hook={kept}"]
    if suite == "sid":
        command += ['--aptopt=Acquire::Check-Valid-Until "false"']
    return [*command, suite]


def _build(suite: str, image: Path) -> None:
    started = time.monotonic()
    log = paths.LOGS / f"image-{suite}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    unfinished = image.with_suffix(".unfinished")

    def stage(text: str) -> None:
        terminal.say(f"image {suite}: [{time.monotonic() - started:5.1f} s] {text}")

    try:
        with unfinished.open("wb+") as file:
            stage("making an empty filesystem")
            file.truncate(SIZE)
            _make_filesystem(unfinished)
            enclosure = Enclosure()
            disk = Disk(enclosure, file.fileno())
            try:
                disk.mount()
                stage(f"installing Debian {suite} with {len(PACKAGES)} packages and what they need")
                in_root(enclosure, [*mmdebstrap(suite, PACKAGES), MOUNT_POINT], log)
                stage("making it a quick, quiet machine")
                script = PROVISION.read_text()
                in_root(enclosure, ["chroot", MOUNT_POINT, "sh", "-euc", script], log)
                disk.unmount()
            finally:
                enclosure.close()
                disk.close()
            os.fsync(file.fileno())
        unfinished.rename(image)
    finally:
        unfinished.unlink(missing_ok=True)
    for old in image.parent.glob(f"{suite}-*.img"):
        if old != image:
            old.unlink()
    used = image.stat().st_blocks * 512 // 1024**2
    stage(f"done: {os.path.relpath(image)} ({used} MiB)")


def _make_filesystem(path: Path) -> None:
    subprocess.run(
        ["mkfs.ext4", "-q", "-F", "-m", "0", "-L", "machine", "-J", "size=32"]
        + ["-E", "lazy_itable_init=1", str(path)],
        check=True,
        start_new_session=True,
    )


def in_root(enclosure: Enclosure, command: list[str], log: Path) -> None:
    """Runs a step of building something, whose output goes to a log."""
    env = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "HOME": "/root",
        # In the enclosure, so that an interrupted build leaves nothing behind.
        "TMPDIR": f"{os.path.dirname(MOUNT_POINT)}/tmp",
        **{name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")},
    }
    with log.open("ab") as output:
        output.write(f"$ {' '.join(command[:2])} …\n".encode())
        output.flush()
        status = enclosure.run(command, output, env)
    if status != 0:
        with log.open(errors="replace") as lines:
            tail = "".join(deque(lines, maxlen=20))
        raise MachineError(
            f"{command[0]} failed (exit code {status}); the end of {os.path.relpath(log)}:\n{tail}"
        )
