"""Nixpkgs, for what evaluates the NixOS module and the tests of it. Not part of the project."""

import fcntl
import hashlib
import os
import shutil
import tarfile
from pathlib import Path

from . import paths
from .errors import PreconditionError, Skipped
from .machine import Machine

SHARED = paths.REPOSITORY.parent / "shared" / "nixpkgs"
HOW = (
    "point NIXPKGS at a checkout of Nixpkgs, or at an archive of one that ends in .tar.xz, "
    "or put nixpkgs=… into NIX_PATH"
)
# What evaluation reads of a checkout; the history would be much to copy.
PARTS = (".version", "default.nix", "lib", "maintainers", "nixos", "pkgs")
# What is left out of this repository.
UNREAD = (".git", "target")


def find() -> Path | None:
    """The checkout that was named, or the one that lies beside this repository, if there is one."""
    if path := os.environ.get("NIXPKGS"):
        return _checkout(Path(path))
    for entry in os.environ.get("NIX_PATH", "").split(":"):
        name, equals, path = entry.partition("=")
        if name == "nixpkgs" and equals and Path(path).exists():
            return _checkout(Path(path))
        if entry and Path(entry, "nixpkgs").exists():
            return _checkout(Path(entry, "nixpkgs"))
    archives = sorted(SHARED.glob("*.tar.xz"))
    return _checkout(archives[-1]) if archives else None


def copy_to(machine: Machine, target: str) -> None:
    """Copies it into a machine. Raises Skipped when there is none."""
    found = find()
    if found is None:
        raise Skipped(f"Nixpkgs is not at hand: {HOW}")
    for part in PARTS:
        if (found / part).exists():
            machine.copy_from_host(str(found / part), f"{target}/{part}")


def copy_project_to(machine: Machine, target: str) -> None:
    """Copies into a machine what of this repository is evaluated: the package has most of it."""
    for file in paths.REPOSITORY.iterdir():
        if file.name not in UNREAD:
            machine.copy_from_host(str(file), f"{target}/{file.name}")


def _checkout(place: Path) -> Path:
    found = _unpacked(place) if place.is_file() else place
    if not (found / "nixos" / "lib" / "eval-config.nix").exists():
        raise PreconditionError(f"{place} is no checkout of Nixpkgs: {HOW}")
    return found.resolve()


def _unpacked(archive: Path) -> Path:
    """An archive's only directory, below target/. It is unpacked once."""
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()[:12]
    state = paths.REPOSITORY / "target" / "nixpkgs"
    state.mkdir(parents=True, exist_ok=True)
    directory = state / digest
    with (state / ".lock").open("w") as lock:
        # Two scenarios at once unpack it once.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            unfinished = state / f"{digest}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            try:
                with tarfile.open(archive) as packed:
                    # Python before 3.11.4 has no such filter.
                    packed.extraction_filter = getattr(tarfile, "data_filter", None)
                    packed.extractall(unfinished)
            except (OSError, tarfile.TarError) as error:
                raise PreconditionError(f"{archive} is no archive of Nixpkgs: {error}") from error
            unfinished.rename(directory)
    [checkout] = directory.iterdir()
    return checkout
