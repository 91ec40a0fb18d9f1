# Somebody mounts over a directory above one of a store. What is mounted goes on, and whoever comes
# by path finds something else: the store says so, in one sentence whoever asks, does nothing to
# what is in the way nor with what it shows, and is well again when that is gone.
import json
from typing import Any

LOWER = "/srv/base"
DISK = "/srv/disk/ci"
MERGED = "/srv/ci/root/nix/store"
PATH = f"{'0' * 32}-path"
ADDED = f"{'1' * 32}-added"


def status() -> dict[str, Any]:
    _, output = machine.execute("layered-stores status ci --json")
    properties: dict[str, Any] = json.loads(output)
    return properties


def problems() -> dict[str, str]:
    return {problem["code"]: problem["message"] for problem in status()["problems"]}


def wait_for_state(state: str, store: str = "ci") -> None:
    machine.wait_until_succeeds(
        f"busctl get-property org.layeredstores1 /org/layeredstores1/store/{store} "
        f"org.layeredstores1.Store State | grep -Fx 's \"{state}\"'",
        timeout=60,
    )


def mount_ids() -> list[str]:
    """The numbers of the mounts in the store's place, hidden ones too."""
    return machine.succeed(f"awk '$5 == \"{MERGED}\" {{ print $1 }}' /proc/self/mountinfo").split()


def is_usable() -> None:
    assert (status()["state"], problems()) == ("active", {}), status()
    machine.succeed(f"grep -q first {MERGED}/{PATH}/file", "layered-stores verify ci")


def is_covered(sentence: str) -> None:
    """Whoever asks is told the same, and nothing is done."""
    wait_for_state("failed")
    assert list(problems()) == ["covered"], problems()
    assert sentence in problems()["covered"], problems()
    for command in (
        *(f"layered-stores {verb} ci" for verb in ("remount", "verify", "start", "stop")),
        f"layered-stores-remount {MERGED}",
    ):
        said = " ".join(machine.fail(f"{command} 2>&1", timeout=30).split())
        assert sentence in said, (command, said)
    assert mount_ids() == before, mount_ids()
    assert status()["state"] == "failed", status()


machine.wait_for_unit("layered-storesd.service")
machine.succeed(
    f"install -D /dev/stdin {LOWER}/nix/store/{PATH}/file <<<first", "layered-stores start ci"
)
is_usable()
before = mount_ids()

with subtest("A mount above the mount point hides the store, which is not mounted again on that"):
    for mount, what, point in (
        ("mount -t tmpfs theirs /srv/ci", "tmpfs from theirs", "/srv/ci"),
        ("mount -t tmpfs theirs /srv/ci/root/nix", "tmpfs from theirs", "/srv/ci/root/nix"),
        # Bound to itself, without what is mounted below.
        ("mount --bind /srv/ci /srv/ci", "", "/srv/ci"),
        ("mount -t tmpfs theirs /srv", "tmpfs from theirs", "/srv"),
    ):
        machine.succeed(mount)
        sentence = (
            f"{what} is mounted at {point} and hides {MERGED}; unmount it with `umount {point}`"
        )
        is_covered(sentence)
        machine.succeed("systemctl restart layered-storesd", timeout=60)
        is_covered(sentence)
        machine.succeed(f"umount {point}")
        wait_for_state("active")
        is_usable()
        assert mount_ids() == before, mount_ids()

with subtest("What is mounted on a cover is named first, as it has to be unmounted first"):
    machine.succeed(
        "mount -t tmpfs lower /srv/ci && mkdir /srv/ci/root && mount -t tmpfs higher /srv/ci/root"
    )
    is_covered(f"tmpfs from higher is mounted at /srv/ci/root and hides {MERGED}")
    machine.succeed("umount /srv/ci/root")
    is_covered(f"tmpfs from lower is mounted at /srv/ci and hides {MERGED}")
    machine.succeed("umount /srv/ci")
    wait_for_state("active")
    is_usable()

with subtest("Other directories in the place of its layers are not looked at, nor swapped to"):
    machine.succeed(f"mkdir {MERGED}/{ADDED}", f"echo kept >{MERGED}/{ADDED}/file")
    machine.succeed("layered-stores remount ci")
    swaps = status()["swap-count"]
    machine.succeed(
        f"mount -t tmpfs theirs {DISK} && mkdir -p {DISK}/upper/{PATH} && mkdir -m 700 {DISK}/work"
    )
    is_covered(f"tmpfs from theirs is mounted at {DISK} and hides {DISK}/upper")
    # What is mounted goes on with its own.
    machine.succeed(f"grep kept {MERGED}/{ADDED}/file", f"echo more >>{MERGED}/{ADDED}/file")
    machine.succeed(f"umount {DISK}")
    wait_for_state("active")
    machine.succeed(f"grep more {DISK}/upper/{ADDED}/file")
    is_usable()
    assert (mount_ids(), status()["swap-count"]) == (before, swaps), status()

with subtest("The same directories by way of another mount are the same"):
    machine.succeed(f"mount --bind {DISK} {DISK}", "layered-stores remount ci")
    is_usable()
    machine.succeed(f"umount {DISK}", "layered-stores remount ci")
    is_usable()
    assert mount_ids() == before, mount_ids()

with subtest("A lower store that is hidden is said to be, and the store goes on with what it had"):
    machine.succeed(f"mount -t tmpfs theirs {LOWER}")
    said = " ".join(machine.fail("layered-stores remount ci 2>&1", timeout=30).split())
    sentence = f"tmpfs from theirs is mounted at {LOWER} and hides {LOWER}/nix/store; unmount it"
    assert sentence in said, said
    assert status()["state"] == "active", status()
    assert list(problems()) == ["refresh-failed"], problems()
    assert sentence in problems()["refresh-failed"], problems()
    machine.succeed(f"grep first {MERGED}/{PATH}/file", f"umount {LOWER}")
    machine.wait_until_succeeds("layered-stores status ci", timeout=60)
    is_usable()

with subtest("What hides a store hides it from the one that lies on it"):
    machine.succeed("layered-stores start above", "mount -t tmpfs theirs /srv/ci")
    for store in ("ci", "above"):
        wait_for_state("failed", store)
    said = " ".join(machine.fail("layered-stores remount above 2>&1", timeout=30).split())
    assert f"tmpfs from theirs is mounted at /srv/ci and hides {MERGED}; unmount" in said, said
    machine.succeed("grep first /srv/above/root/nix/store/*/file", "umount /srv/ci")
    wait_for_state("active", "above")
    machine.succeed("layered-stores verify above", "layered-stores stop above")
    is_usable()
