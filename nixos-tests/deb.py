# The Debian package: on a machine without anything of ours it brings the daemon up, an upgrade
# keeps what is mounted, and its removal leaves stores and data alone.

import io
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

from driver import paths

TREE = paths.REPOSITORY / "target" / "deb-root"
PACKAGES = paths.REPOSITORY / "target" / "debian"
DAEMON = "layered-storesd.service"
METRICS = "layered-stores-metrics.socket"
STORE = "/var/lib/layered-stores/stores/ci"
NIX_DAEMON = "layered-stores-nix-daemon@ci"
SOCKET = "/run/layered-stores/ci/daemon.sock"
CONFIGURATION = """
[stores.ci]
lower-store = "/srv/base"
daemon.allowed-users = ["alice"]
"""
NOTE = """
{ text }: derivation {
  name = "note";
  system = builtins.currentSystem;
  builder = "/bin/sh";
  args = [ "-c" "echo ${text} >$out" ];
}
"""
TOML_BLOCK = re.compile(r"^```toml\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def on_host(*command: str) -> str:
    """Runs a command beside the machine."""
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def packed(package: Path) -> dict[str, int]:
    """The files of a package and their modes. Pages have the names of before their compression."""
    unpack = ["dpkg-deb", "--fsys-tarfile", str(package)]
    archive = subprocess.run(unpack, stdout=subprocess.PIPE, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        files = [member for member in tar if not member.isdir()]
    t.assertEqual({(file.uid, file.gid) for file in files}, {(0, 0)})
    return {re.sub(r"(/man/.*)\.gz$", r"\1", file.name.lstrip("./")): file.mode for file in files}


def write(path: str, text: str) -> None:
    machine.succeed(f"install -D -m 644 /dev/stdin '{path}' <<'END-OF-FILE'\n{text}\nEND-OF-FILE")


def build(store: str, text: str) -> str:
    command = f"nix build --store '{store}' --file /tmp/note.nix --argstr text {text} --no-link"
    return machine.succeed(f"{command} --print-out-paths").strip()


def build_as_alice(text: str) -> str:
    """Builds through the store's Nix daemon."""
    command = f"nix build --file /tmp/note.nix --argstr text {text} --no-link --print-out-paths"
    return machine.succeed(
        f"cd /home/alice; NIX_REMOTE=unix://{SOCKET} runuser -u alice -- {command}"
    ).strip()


def mount() -> str:
    """Differs once the store was unmounted, however briefly."""
    return machine.succeed(f"findmnt --noheadings --output ID,MAJ:MIN {STORE}/root/nix/store")


def main_pid(unit: str) -> str:
    return machine.get_unit_property(unit, "MainPID")


for program in ("dpkg-deb", "cargo-deb"):
    if shutil.which(program) is None:
        raise Skipped(f"{program} is not installed: make deb installs what it needs on a Debian")
shutil.rmtree(PACKAGES, ignore_errors=True)
on_host("make", "--no-print-directory", "-C", str(paths.REPOSITORY), "deb")
[package] = PACKAGES.glob("*.deb")

with subtest("The package holds what make install installs, and its licence"):
    files = packed(package)
    licence = files.pop("usr/share/doc/layered-stores/copyright", None)
    t.assertEqual(licence, 0o644)
    installed = {
        str(Path(directory, name).relative_to(TREE)): Path(directory, name).stat().st_mode & 0o7777
        for directory, _, names in os.walk(TREE)
        for name in names
    }
    t.assertEqual(files, installed)

# The driver has run make install, which is what this is not about.
machine.succeed(*(f"rm -f -- '/{file}'" for file in files), "systemctl daemon-reload")
machine.fail("command -v layered-stores || systemctl cat layered-storesd layered-stores.target")

write("/tmp/note.nix", NOTE)
lower = build("/srv/base", "below")
write("/etc/layered-stores/config.toml", CONFIGURATION)
machine.copy_from_host(str(package), "/tmp/layered-stores.deb")

with subtest("Installed, it is enabled and up, and so is the store that was declared"):
    machine.succeed("dpkg --install /tmp/layered-stores.deb 2>&1")
    machine.wait_for_unit("layered-stores.target")
    machine.require_unit_state(DAEMON)
    for unit in (DAEMON, "layered-stores.target"):
        t.assertEqual(machine.succeed(f"systemctl is-enabled {unit}").strip(), "enabled")
    t.assertEqual(machine.execute(f"systemctl is-enabled {METRICS}")[1].strip(), "disabled")
    machine.succeed("layered-stores status ci")
    machine.succeed("dpkg --audit")

with subtest("Nix builds into it, and the hook is the installed one"):
    uri = machine.succeed("layered-stores uri ci").strip()
    t.assertIn("remount-hook=/usr/bin/layered-stores-remount", uri)
    path = build(uri, "mine")
    t.assertEqual(
        machine.succeed(f"layered-stores enter ci -- cat {path} {lower}"), "mine\nbelow\n"
    )

with subtest("A user without rights builds through the store's Nix daemon"):
    hers = build_as_alice("hers")
    t.assertEqual(machine.succeed(f"layered-stores enter ci -- cat {hers}"), "hers\n")

with subtest("Everybody may look, and polkit knows who may do more"):
    machine.succeed("runuser -u alice -- layered-stores status ci")
    said = machine.fail("runuser -u alice -- layered-stores stop ci 2>&1")
    t.assertIn("polkit does not allow it", said)

with subtest("Every configuration in the documents is one that the daemon takes"):
    checked = 0
    for page in [paths.REPOSITORY / "README.md", *(paths.REPOSITORY / "docs").glob("*.md")]:
        for block in TOML_BLOCK.findall(page.read_text()):
            write("/tmp/documented.toml", block)
            code, said = machine.execute("layered-stores check-config /tmp/documented.toml 2>&1")
            t.assertEqual(code, 0, f"{page.name}:\n{block}\n{said}")
            checked += 1
    t.assertGreater(checked, 5)

with subtest("An upgrade restarts the daemon, and nobody notices"):
    before = mount(), main_pid(DAEMON)
    nix_daemon = main_pid(NIX_DAEMON)
    target = machine.get_unit_property("layered-stores.target", "InvocationID")
    machine.succeed("dpkg --install /tmp/layered-stores.deb 2>&1")
    machine.require_unit_state(DAEMON)
    t.assertNotEqual(main_pid(DAEMON), before[1])
    t.assertEqual(mount(), before[0])
    t.assertEqual(machine.get_unit_property("layered-stores.target", "InvocationID"), target)
    t.assertNotEqual(main_pid(NIX_DAEMON), nix_daemon)
    machine.succeed("layered-stores status ci")
    build_as_alice("again")

with subtest("An upgrade leaves disabled what was disabled, and enabled what was enabled"):
    machine.succeed(
        f"systemctl enable --now {METRICS} 2>&1",
        f"systemctl disable {DAEMON} 2>&1",
        "dpkg --install /tmp/layered-stores.deb 2>&1",
    )
    t.assertEqual(machine.execute(f"systemctl is-enabled {DAEMON}")[1].strip(), "disabled")
    t.assertEqual(machine.succeed(f"systemctl is-enabled {METRICS}").strip(), "enabled")
    machine.succeed(f"systemctl is-active {METRICS}", f"systemctl enable {DAEMON} 2>&1")

with subtest("Removed, it is gone, and stores, their data and their configuration are not"):
    machine.succeed("dpkg --remove layered-stores 2>&1")
    machine.fail(f"systemctl is-active {DAEMON}", "command -v layered-stores")
    machine.fail(f"systemctl is-active {NIX_DAEMON}", f"test -e {SOCKET}")
    machine.fail(f"systemctl is-active {METRICS}", "test -e /run/layered-stores-metrics.sock")
    t.assertEqual(mount(), before[0])
    t.assertEqual(
        machine.succeed(f"cat {STORE}/root{path} {STORE}/upper/{Path(path).name}"), "mine\nmine\n"
    )
    t.assertEqual(
        machine.succeed("cat /etc/layered-stores/config.toml").strip(), CONFIGURATION.strip()
    )

with subtest("Purged, likewise; installed again, it takes over what is mounted"):
    machine.succeed("dpkg --purge layered-stores 2>&1", f"test -e {STORE}/upper{path[10:]}")
    t.assertEqual(mount(), before[0])
    machine.succeed("dpkg --install /tmp/layered-stores.deb 2>&1", "layered-stores wait ci")
    t.assertEqual(mount(), before[0])
    machine.succeed("layered-stores verify ci", "systemctl is-enabled layered-storesd")
    build_as_alice("later")
