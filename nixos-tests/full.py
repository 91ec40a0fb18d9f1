# The filesystem of an upper layer turns read-only, by hand and by an error, or is full: of space
# for everybody, for all but root, or of files. The overlay's own mount says nothing of it. The
# store does, by itself and over a restart of the daemon, and says when it is over.
import json
from typing import Any

LOWER = "/srv/base"
DISK = "/srv/disk"
MERGED = "/srv/ci/root/nix/store"
PATH = f"{'0' * 32}-path"
# What it takes by itself is a minute; the rest is for a machine that has much to do.
BY_ITSELF = 150


def status() -> dict[str, Any]:
    _, output = machine.execute("layered-stores status ci --json")
    properties: dict[str, Any] = json.loads(output)
    return properties


def problems() -> dict[str, str]:
    return {problem["code"]: problem["message"] for problem in status()["problems"]}


def wait_for(problem: str, timeout: int) -> None:
    machine.wait_until_succeeds(
        "busctl get-property org.layeredstores1 /org/layeredstores1/store/ci "
        f"org.layeredstores1.Store Problems | grep -F '\"{problem}\"'",
        timeout=timeout,
    )
    # With it the store is up all the same, also for a daemon that finds it so.
    assert (status()["state"], list(problems())) == ("active", [problem]), status()
    machine.succeed(f"grep -q first {MERGED}/{PATH}/file")


def survives_restart(problem: str) -> None:
    machine.succeed("systemctl restart layered-storesd", timeout=60)
    wait_for(problem, timeout=30)


def is_over() -> None:
    """Whoever asks something of the store has it looked at."""
    machine.wait_until_succeeds("layered-stores remount ci && layered-stores status ci", timeout=60)
    machine.succeed(f"mkdir {MERGED}/.try && rmdir {MERGED}/.try")


def mount_disk() -> None:
    # Another machine on this computer may have been quicker with the loop device.
    machine.wait_until_succeeds(f"mount -o loop /srv/image {DISK}", timeout=60)


def new_disk(options: str) -> None:
    """A filesystem that nobody has written to, and the store on it."""
    machine.succeed(
        "layered-stores stop ci 2>/dev/null || true",
        f"mountpoint --quiet {DISK} && umount {DISK} || true",
        "rm -f /srv/image; truncate --size=32M /srv/image",
        f"mkfs.ext4 -q {options} /srv/image",
        f"mkdir -p {DISK}",
    )
    mount_disk()
    machine.succeed(
        "layered-stores remove-data --yes ci 2>/dev/null || true",
        "layered-stores start ci",
    )
    assert (status()["state"], problems()) == ("active", {}), status()


machine.wait_for_unit("layered-storesd.service")
machine.succeed(
    # A container has the loop devices of the kernel, and no nodes for them.
    "test -e /dev/loop-control || mknod /dev/loop-control c 10 237",
    "for number in $(seq 0 63); do test -e /dev/loop$number || mknod /dev/loop$number b 7 $number; "
    "done",
    f"install -D /dev/stdin {LOWER}/nix/store/{PATH}/file <<<first",
)

with subtest("Turned read-only by hand, it says so as soon as somebody asks something of it"):
    new_disk("")
    # A daemon that makes the file it locks has that open for writing.
    machine.succeed("systemctl restart layered-storesd", timeout=60)
    machine.succeed(f"mount -o remount,ro {DISK}")
    machine.fail(f"mkdir {MERGED}/.try")
    # The overlay does not say so.
    machine.succeed(f"awk '$2 == \"{MERGED}\" {{ print $4 }}' /proc/self/mounts | grep -w rw")
    machine.succeed("layered-stores remount ci")
    wait_for("read-only", timeout=60)
    way_out = f"mount -o remount,rw {DISK}"
    assert f"`{way_out}`" in problems()["read-only"], problems()
    survives_restart("read-only")
    machine.succeed(way_out)
    is_over()

with subtest("An error turns it read-only, and it says so by itself"):
    machine.succeed(f"mount -o remount,abort {DISK}")
    wait_for("read-only", timeout=BY_ITSELF)
    assert f"upper layer {DISK}/ci/upper takes no writes: Read-only" in problems()["read-only"]
    survives_restart("read-only")
    # As the message has it.
    machine.succeed(
        "layered-stores stop ci",
        f"umount {DISK}",
        "fsck.ext4 -p /srv/image || test $? = 1",
    )
    mount_disk()
    machine.succeed("layered-stores start ci")
    is_over()

with subtest("Full for everybody, it says so and what it has, and when it is over"):
    machine.execute(f"dd if=/dev/zero of={DISK}/filler bs=64k 2>/dev/null; sync")
    machine.succeed("layered-stores verify ci")
    wait_for("full", timeout=60)
    message = problems()["full"]
    assert f"upper layer {DISK}/ci/upper is full: less than 1 of " in message, message
    assert f"delete something else below {DISK}" in message, message
    assert int(status()["free-bytes"]) < 1 << 20, status()
    survives_restart("full")
    machine.succeed(f"rm {DISK}/filler; sync")
    machine.wait_until_succeeds("layered-stores status ci", timeout=BY_ITSELF)
    is_over()

with subtest("Blocks that only root may use are no room"):
    new_disk("-m 20")
    machine.succeed(f"fallocate --length=$(($(stat -f -c '%a * %S' {DISK}))) {DISK}/filler")
    machine.succeed(f"echo root >{MERGED}/.root && rm {MERGED}/.root")
    machine.succeed("layered-stores remount ci")
    wait_for("full", timeout=60)
    machine.succeed(f"rm {DISK}/filler")
    is_over()

with subtest("Without files it is full, however much space there is"):
    new_disk("-N 64")
    machine.succeed(
        f"mkdir {DISK}/files; i=0; while touch {DISK}/files/$i; do i=$((i + 1)); done 2>&-"
    )
    machine.fail(f"mkdir {MERGED}/.try")
    machine.succeed("layered-stores remount ci")
    wait_for("full", timeout=60)
    assert "no file can be made there, though it has space" in problems()["full"], problems()
    survives_restart("full")
    machine.succeed(f"rm -r {DISK}/files")
    is_over()
