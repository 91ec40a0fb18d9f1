# Makes of a Debian as much of a NixOS as switch-to-configuration asks for. That program is NixOS'
# own, and so are the units, which are evaluated; what it starts, stops and reloads is systemd's. Of
# NixOS alone there is: a system as a directory, and a script that makes it the running one.

import json
from typing import Any

from driver import nixpkgs

PROJECT = "/srv/project"
SYSTEMS = "/srv/systems"
UNITS = "/usr/lib/systemd/system"
PERL = {
    "perl": "/usr",
    "coreutils": "/usr",
    "utillinux": "/usr",
    "systemd": "/usr",
    "su": "/usr/bin/su",
    "shell": "/bin/sh",
    "distroId": "nixos",
    "installBootLoader": "/bin/true",
    "localeArchive": "",
}
ACTIVATE = """#!/bin/sh
set -eu
ln -sfn "$1/etc/systemd/system" /etc/systemd/system
ln -sfn "$1/etc/config.toml" /etc/layered-stores/config.toml
ln -sfn "$1/etc/nix.conf" /etc/nix/nix.conf
ln -sfn "$1" /run/current-system
"""


def write(path: str, text: str, mode: str = "644") -> None:
    machine.succeed(
        f"install -D -m {mode} /dev/stdin '{path}' <<'END-OF-FILE'\n{text}\nEND-OF-FILE"
    )


def make(name: str, system: dict[str, Any], program: str) -> str:
    """The directory of a system."""
    place = f"{SYSTEMS}/{name or 'base'}"
    etc = f"{place}/etc/systemd/system"
    machine.succeed(
        f"mkdir -p {place}/etc/systemd; cp -a {SYSTEMS}/debian {etc}",
        f"for unit in {UNITS}/layered-*; do "
        f"sed 's|/usr/bin/|{system['package']}/bin/|' $unit >{etc}/${{unit##*/}}; done",
        f"ln -s /usr {place}/sw; ln -s {SYSTEMS}/system.conf {place}/etc/systemd/system.conf",
        f"cp /etc/fstab {place}/etc/fstab; touch {place}/init-interface-version",
    )
    for unit, text in system["units"].items():
        write(f"{etc}/{unit}", text)
    for link in system["wants"]:
        directory, _, unit = link.partition("/")
        machine.succeed(f"mkdir -p {etc}/{directory}; ln -sfn ../{unit} {etc}/{link}")
    write(f"{place}/etc/config.toml", system["toml"])
    # There are no users to build as.
    write(f"{place}/etc/nix.conf", system["nixConf"] + "\nbuild-users-group =\n")
    for word, value in {**PERL, "out": place, "toplevel": place}.items():
        program = program.replace(f"@{word}@", value)
    write(f"{place}/bin/switch-to-configuration", program, "755")
    write(f"{place}/activate", ACTIVATE, "755")
    return place


nixpkgs.copy_to(machine, f"{PROJECT}/nixpkgs")
nixpkgs.copy_project_to(machine, PROJECT)
switched = json.loads(
    machine.succeed(
        f"NIXPKGS={PROJECT}/nixpkgs nix-instantiate --eval --strict --json --readonly-mode "
        f"{PROJECT}/nixos-tests/eval -A switched",
        timeout=600,
    )
)
machine.succeed(
    f"mkdir -p {SYSTEMS} /opt /etc/layered-stores; touch /etc/NIXOS /etc/fstab",
    # Another version of the package, which is the same but for its place.
    "ln -s /usr/bin /opt/bin",
    f"cp /etc/systemd/system.conf {SYSTEMS}/ 2>/dev/null || touch {SYSTEMS}/system.conf",
    f"ln -sf {SYSTEMS}/system.conf /etc/systemd/system.conf",
    f"mv /etc/systemd/system {SYSTEMS}/debian",
    f"echo '[Unit]' >{SYSTEMS}/debian/sysinit-reactivation.target",
)
for name, system in switched["systems"].items():
    make(name, system, switched["switchToConfiguration"])
machine.succeed(f"mkdir {SYSTEMS}/base/specialisation")
for name in filter(None, switched["systems"]):
    machine.succeed(f"ln -s {SYSTEMS}/{name} {SYSTEMS}/base/specialisation/{name}")
machine.succeed(
    f"{SYSTEMS}/base/activate {SYSTEMS}/base; ln -s {SYSTEMS}/base /run/booted-system",
    "systemctl daemon-reload; systemctl start layered-storesd.service layered-stores.target",
)
