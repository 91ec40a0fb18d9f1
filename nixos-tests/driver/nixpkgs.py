"""The Nixpkgs library, for scenarios that evaluate the NixOS module. Not part of the project."""

import os
import shutil
from pathlib import Path

from .errors import Skipped

HOW = (
    "point NIXPKGS at a checkout of Nixpkgs or at its library alone "
    "(the directory lib, or one that holds it), or put nixpkgs=… into NIX_PATH"
)
# What else than the library tells how NixOS writes units (nixos-tests/eval/nixos.nix).
NIXOS_LIB = ("utils.nix", "systemd-lib.nix", "systemd-types.nix", "systemd-unit-options.nix")


def copy_library(target: Path) -> None:
    """Copies the library to `target`/lib, and beside it what the machine uses of the rest.

    Raises Skipped when there is no library.
    """
    found = _find()
    library = found / "lib" if (found / "lib" / "modules.nix").exists() else found
    if not (library / "modules.nix").exists():
        raise Skipped(f"{found} is not the Nixpkgs library: {HOW}")
    shutil.copytree(library, target / "lib")
    nixos = found / "nixos" / "lib"
    if all((nixos / file).exists() for file in NIXOS_LIB):
        shutil.copytree(nixos, target / "nixos" / "lib", symlinks=True)


def _find() -> Path:
    """Where Nixpkgs is said to be."""
    if path := os.environ.get("NIXPKGS"):
        return Path(path)
    for entry in os.environ.get("NIX_PATH", "").split(":"):
        name, equals, path = entry.partition("=")
        if name == "nixpkgs" and equals and Path(path).exists():
            return Path(path)
        if entry and Path(entry, "nixpkgs").exists():
            return Path(entry, "nixpkgs")
    raise Skipped(f"the Nixpkgs library is not at hand: {HOW}")
