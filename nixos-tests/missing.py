# The filesystem of an upper layer, of a database, or of both is late or taken away. What is beneath
# it is not built into: the store says what is missing, and is well when that is there again.
import json
import re
import shlex

CONFIG = "/etc/layered-stores/config.toml"
STATE = "/var/lib/layered-stores"
NOTES = "/run/layered-stores"
DISK = "/srv/disk"
UPPER = f"{DISK}/fast/upper"
MERGED = "/srv/fast/root/nix/store"
DATABASE = "/srv/fast/root/nix/var/nix"
SCRATCH = f"{STATE}/stores/scratch"
MARK = "trusted.layered-stores.id"


def status(store: str) -> dict[str, object]:
    """What `layered-stores status` says."""
    _, output = machine.execute(f"layered-stores status {store} --json")
    properties: dict[str, object] = json.loads(output)
    return properties


def problems(store: str) -> dict[str, str]:
    found = status(store)["problems"]
    assert isinstance(found, list), found
    return {problem["code"]: problem["message"] for problem in found}


def missing(store: str, directory: str) -> str:
    """Waits until a store says what is missing, and sees that it is this, with the way out."""
    found: dict[str, object] = {}

    def is_said(_last: bool) -> bool:
        """While it is tried again, the store is no longer failed, and not yet once more."""
        nonlocal found
        found = status(store)
        return found["state"] == "failed" and "upper-missing" in json.dumps(found["problems"])

    retry(is_said, 60)
    assert isinstance(found["problems"], list), found
    [said] = [p["message"] for p in found["problems"] if p["code"] == "upper-missing"]
    assert isinstance(said, str), said
    assert re.search(f" {directory} (is|has) ", said), said
    assert f"`layered-stores remove-data {store}`" in said or "was moved away" in said, said
    assert found["state-reason"] == said, found
    return said


def well(store: str, path: str) -> None:
    """Waits until a store is there, without being asked, and has a path."""
    machine.wait_until_succeeds(
        f'layered-stores status {store} --json | grep \'"state": "active"\'', timeout=60
    )
    machine.succeed(f"nix-store --store {store_uri(store)} --check-validity {path}")
    merged = status(store)["real-store-dir"]
    machine.succeed(f"test -e {merged}/{path.removeprefix('/nix/store/')}")


def store_uri(store: str) -> str:
    """The URL for Nix, quoted for the shell."""
    return shlex.quote(machine.succeed(f"layered-stores uri {store}").strip())


def add(store: str, name: str) -> str:
    """Adds a file to a store, and returns its store path."""
    machine.succeed(f"echo {name} >/tmp/{name}")
    return machine.succeed(f"nix-store --store {store_uri(store)} --add /tmp/{name}").strip()


def configure(sed: str) -> None:
    """Changes the configuration the machine has booted with."""
    machine.succeed(
        f"test -e /srv/config.toml || cp $(readlink -f {CONFIG}) /srv/config.toml",
        f"rm {CONFIG}; sed {shlex.quote(sed)} /srv/config.toml >{CONFIG}",
    )


def reload() -> None:
    machine.execute("layered-stores reload")


def mark(directory: str) -> str:
    return machine.succeed(f"getfattr --only-values -n {MARK} {directory}").strip()


def make_disk(name: str) -> None:
    """A disk with a filesystem. A container has few devices of its own."""
    machine.succeed(
        "test -e /dev/loop-control || mknod /dev/loop-control c 10 237",
        "for n in $(seq 0 63); do test -e /dev/loop$n || mknod /dev/loop$n b 7 $n; done",
        f"test -e /srv/{name}.img || {{ truncate -s 64M /srv/{name}.img; "
        f"mkfs.ext4 -q -F /srv/{name}.img; }}",
    )


def plug(name: str, directory: str) -> None:
    # Another machine on this computer may have been quicker with the loop device.
    machine.wait_until_succeeds(f"mount -o loop /srv/{name}.img {directory}", timeout=30)


def unplug(directory: str) -> None:
    """Takes a filesystem away that is in use, as a disk that falls off or an admin in a hurry."""
    machine.succeed(f"umount --lazy {directory}")


def nothing_made() -> None:
    found = machine.succeed(f"ls -A {DISK}")
    assert found == "", found


def forget_marks() -> None:
    """Leaves all as a version leaves it that gives no marks."""
    record = f"{STATE}/known/fast.json"
    script = f"import json; r = json.load(open('{record}')); del r['marks']; print(json.dumps(r))"
    machine.succeed(
        f"setfattr -x {MARK} {UPPER}; setfattr -x {MARK} {DATABASE}; "
        f"setfattr -x trusted.layered-stores.upper-id {DATABASE}; rm {NOTES}/*.upper.json",
        f"python3 -c {shlex.quote(script)} >/tmp/record",
        f"cp /tmp/record {record}",
    )


machine.start(allow_reboot=True)
machine.wait_for_unit("layered-storesd.service")
make_disk("fast")
machine.succeed(f"mkdir -p {DISK}")
plug("fast", DISK)
configure("/autostart/d")
machine.succeed("layered-stores reload", "layered-stores start fast")
first = add("fast", "first")

with subtest("Upper layer and database have a mark that the records have as well"):
    for directory in (UPPER, DATABASE):
        assert re.fullmatch("[0-9a-f]{32}", mark(directory)), mark(directory)
        for record in (f"{STATE}/known/fast.json", f"{NOTES}/fast.upper.json"):
            machine.succeed(f"grep {mark(directory)} {record}")
    # What somebody builds as root does not take it along.
    assert mark(MERGED) == mark(UPPER)
    machine.fail(f"getfattr -n {MARK} {MERGED}/{first.removeprefix('/nix/store/')}")
    machine.fail(f"runuser -u alice -- setfattr -n {MARK} -v x {UPPER}")

with subtest("Its filesystem is taken away under a running store, and with it the mount"):
    unplug(DISK)
    # What is mounted goes on.
    second = add("fast", "second")
    machine.succeed(f"umount --lazy {MERGED}")
    missing("fast", UPPER)
    nothing_made()
    machine.fail("layered-stores start fast")
    machine.fail(f"mountpoint {MERGED}")
    nothing_made()

with subtest("A daemon that starts meanwhile makes nothing either, nor with its notes lost"):
    machine.succeed("systemctl restart layered-storesd")
    missing("fast", UPPER)
    machine.succeed("systemctl stop layered-storesd", f"rm {NOTES}/fast.upper.json")
    machine.succeed("systemctl start layered-storesd")
    missing("fast", UPPER)
    nothing_made()

with subtest("When it is there again, so is the store, without waiting for the next try"):
    # Until it is left alone for longer than it takes to come up.
    next_try = (
        "busctl get-property org.layeredstores1 /org/layeredstores1/store/fast "
        "org.layeredstores1.Store NextTryUSec"
    )
    machine.wait_until_succeeds(
        f"test $({next_try} | cut -d' ' -f2) -gt $(date -d '15 sec' +%s%6N)", timeout=90
    )
    at = machine.succeed(next_try).split()[1]
    plug("fast", DISK)
    well("fast", first)
    since = status("fast")["state-change-usec"]
    assert isinstance(since, int) and since < int(at), (since, at)
    well("fast", second)

with subtest("What is in its place, and is not it, is not taken"):
    machine.succeed("layered-stores stop fast")
    unplug(DISK)
    machine.succeed(f"mkdir -p {UPPER}")
    machine.fail("layered-stores start fast")
    said = missing("fast", UPPER)
    assert "it has no mark" in said, said
    machine.succeed(f"mkdir {UPPER}/{'0' * 32}-path")
    machine.fail("layered-stores start fast")
    missing("fast", UPPER)
    machine.succeed(f"setfattr -n {MARK} -v {'0' * 32} {UPPER}")
    machine.fail("layered-stores start fast")
    assert f"it has the mark {'0' * 32}" in missing("fast", UPPER)
    machine.succeed(f"rm -r {DISK}/fast")
    plug("fast", DISK)
    well("fast", first)

with subtest("Nor is it slid under a store that is mounted, or taken over with it"):
    unplug(DISK)
    machine.succeed(
        f"mkdir -p {UPPER} {DISK}/fast/work && chmod 700 {DISK}/fast/work",
        # Only a swap helps, because the path is open.
        f"install -D /dev/stdin /nix/store/{'1' * 32}-held/file <<<lower",
    )
    before = machine.succeed(f"stat -c %d {MERGED}")
    machine.execute("layered-stores remount fast")
    machine.succeed(f"test -e {MERGED}/{first.removeprefix('/nix/store/')}")
    assert machine.succeed(f"stat -c %d {MERGED}") == before
    machine.succeed("systemctl restart layered-storesd")
    missing("fast", UPPER)
    machine.succeed(f"test -e {MERGED}/{first.removeprefix('/nix/store/')}")
    machine.succeed(f"rm -r {DISK}/fast /nix/store/{'1' * 32}-held")
    plug("fast", DISK)
    well("fast", second)

with subtest("A copy in its place has the same mark, and does not get what is mounted"):
    make_disk("copy")
    machine.succeed("mkdir -p /srv/copy")
    plug("copy", "/srv/copy")
    machine.succeed(f"cp -a {DISK}/fast /srv/copy/ && umount /srv/copy")
    later = add("fast", "later")
    unplug(DISK)
    plug("copy", DISK)
    machine.execute("layered-stores remount fast")
    machine.succeed(f"test -e {MERGED}/{later.removeprefix('/nix/store/')}")
    machine.succeed("systemctl restart layered-storesd")
    said = problems("fast")["upper-missing"]
    assert f" {UPPER} is another directory now than the one that is mounted" in said, said
    machine.succeed(f"test -e {MERGED}/{later.removeprefix('/nix/store/')}")
    # The daemon may be looking at it just now.
    machine.wait_until_succeeds(f"umount {DISK}", timeout=60)
    plug("fast", DISK)
    well("fast", later)

with subtest("It is copied to another disk"):
    make_disk("other")
    machine.succeed("layered-stores stop fast", "mkdir -p /srv/other")
    plug("other", "/srv/other")
    machine.succeed(f"cp -a {DISK}/fast /srv/other/", f"umount {DISK} /srv/other")
    plug("other", DISK)
    machine.succeed("layered-stores start fast")
    well("fast", first)

with subtest("Restored without extended attributes, it is taken when somebody says so"):
    machine.succeed("layered-stores stop fast", f"setfattr -x {MARK} {UPPER}")
    machine.fail("layered-stores start fast")
    said = missing("fast", UPPER)
    command = re.search("`(setfattr [^`]+)`", said)
    assert command, said
    machine.succeed(command[1], "layered-stores start fast")
    well("fast", first)

with subtest("Its database is on a filesystem that is missing"):
    make_disk("database")
    machine.succeed("layered-stores stop fast", "mv /srv/fast /srv/aside; mkdir /srv/fast")
    machine.fail("layered-stores start fast")
    said = missing("fast", DATABASE)
    assert said.startswith("root: "), said
    assert machine.succeed("ls -A /srv/fast") == ""
    machine.succeed("rmdir /srv/fast; mv /srv/aside /srv/fast", "layered-stores start fast")
    well("fast", first)

ANOTHER = f"{DISK}/fast/another"
TO_ANOTHER = f"/autostart/d; s:{UPPER}:{ANOTHER}:"

with subtest("A database does not get another upper layer than its own"):
    configure(TO_ANOTHER)
    # One that is up goes on as it was.
    assert "it goes on as it was" in machine.fail("layered-stores reload 2>&1")
    assert (status("fast")["state"], list(problems("fast"))) == ("active", ["not-applied"])
    machine.succeed(f"nix-store --store {store_uri('fast')} --check-validity {first}")
    machine.succeed("layered-stores stop fast")
    machine.fail("layered-stores start fast")
    said = missing("fast", ANOTHER)
    assert f"the database in {DATABASE} belongs to, and which has the mark {mark(UPPER)}" in said
    machine.fail(f"test -e {ANOTHER}")
    machine.succeed(f"mkdir {ANOTHER}")
    machine.fail("layered-stores start fast")
    missing("fast", ANOTHER)
    machine.succeed(f"rmdir {ANOTHER}; mv {UPPER} {ANOTHER}", "layered-stores start fast")
    well("fast", first)
    machine.succeed("layered-stores stop fast", f"mv {ANOTHER} {UPPER}")
    # With a root of its own there is nothing to mistake.
    configure(f"/autostart/d; s:{UPPER}:{DISK}/fast/third:; s:/srv/fast/root:/srv/fast/anew:")
    machine.succeed("layered-stores reload", "layered-stores start fast")
    assert machine.succeed(f"ls -A {DISK}/fast/third") == ""
    assert mark(f"{DISK}/fast/third") != mark(UPPER)
    configure("/autostart/d")
    machine.succeed("layered-stores reload")
    well("fast", first)

with subtest("Nor where no record tells, because the store has another name by now"):
    machine.succeed("layered-stores stop fast", f"umount {DISK}")
    for edit in (TO_ANOTHER, "/autostart/d"):
        configure(edit)
        machine.execute("layered-stores reload; layered-stores start fast")
        missing("fast", ANOTHER if edit == TO_ANOTHER else UPPER)
    RENAMED = "/autostart/d; s:stores.fast:stores.renamed:"
    configure(RENAMED)
    machine.execute("layered-stores reload; layered-stores start renamed")
    missing("renamed", UPPER)
    nothing_made()
    plug("other", DISK)
    well("renamed", first)
    configure("/autostart/d")
    machine.succeed("layered-stores reload", "layered-stores start fast")
    well("fast", first)

with subtest("A backup that is put back is taken, with its database"):
    machine.succeed("layered-stores stop fast", "mkdir /srv/backup")
    machine.succeed(f"cp -a {DISK}/fast /srv/backup/disk; cp -a /srv/fast /srv/backup/root")
    machine.succeed("layered-stores remove-data --yes fast", "layered-stores start fast")
    add("fast", "after")
    machine.succeed("layered-stores stop fast", f"chattr -i {MERGED}; rm -r /srv/fast")
    machine.succeed(f"rm -r {DISK}/fast; cp -a /srv/backup/root /srv/fast")
    machine.fail("layered-stores start fast")
    missing("fast", UPPER)
    machine.succeed(f"cp -a /srv/backup/disk {DISK}/fast", "layered-stores start fast")
    well("fast", first)
    machine.succeed(
        "journalctl --sync",
        "journalctl --unit=layered-storesd | grep 'and belong together; they are taken'",
    )

with subtest("A store and its copy are two, and each can be emptied"):
    copy = [f"lower-store = {json.dumps('local')}", 'root = "/srv/copied/root"']
    copy += ['upper-layer = "/srv/copied/upper"', 'work-dir = "/srv/copied/work"']
    machine.succeed("layered-stores stop fast", "mkdir -p /srv/copied/root/nix")
    machine.succeed(
        f"cp -a {UPPER} /srv/copied/upper; cp -a /srv/fast/root/nix/var /srv/copied/root/nix/"
    )
    configure("/autostart/d; $a [stores.copied]\\n" + "\\n".join(copy))
    machine.succeed("layered-stores reload")
    well("copied", first)
    machine.succeed("layered-stores stop copied", "layered-stores remove-data --yes copied")
    assert machine.succeed("ls -A /srv/copied/upper") == ""
    machine.succeed("layered-stores start fast")
    well("fast", first)
    configure("/autostart/d")
    machine.succeed("layered-stores reload")

with subtest("What was never a store's is not emptied, for a path that was mistyped"):
    machine.succeed(f"mkdir {DISK}/photos; touch {DISK}/photos/one")
    configure(f"/autostart/d; s:{UPPER}:{DISK}/photos:")
    machine.fail("layered-stores reload")
    machine.succeed("layered-stores stop fast")
    machine.fail("layered-stores start fast")
    missing("fast", f"{DISK}/photos")
    said = machine.fail("layered-stores remove-data --yes fast 2>&1")
    assert "has never been the upper layer of this store" in said, said
    machine.succeed(f"rm {DISK}/photos/one; rmdir {DISK}/photos", f"test -e {DATABASE}/db")
    configure("/autostart/d")
    machine.succeed("layered-stores reload")
    well("fast", first)

with subtest("What is no mark is in its place"):
    machine.succeed("layered-stores stop fast", "systemctl stop layered-storesd")
    forget_marks()
    machine.succeed(f"setfattr -n {MARK} -v {'z' * 32} {UPPER}", "systemctl start layered-storesd")
    machine.succeed("layered-stores start fast")
    well("fast", first)
    assert re.fullmatch("[0-9a-f]{32}", mark(UPPER)), mark(UPPER)
    machine.succeed(f"grep {mark(UPPER)} {STATE}/known/fast.json")

with subtest("The disk of another store is in its place, and is not emptied"):
    machine.succeed("layered-stores start kept")
    held = add("kept", "held")
    theirs = f"{STATE}/stores/kept/upper"
    machine.succeed("layered-stores stop kept", "layered-stores stop fast", f"umount {DISK}")
    machine.succeed(f"mkdir {DISK}/fast && mv {theirs} {DISK}/fast/")
    machine.fail("layered-stores start fast")
    reason = status("fast")["state-reason"]
    assert f"{UPPER} has what is in store kept, and not what is in store fast" in str(reason), (
        reason
    )
    assert "upper-missing" in problems("fast"), problems("fast")
    said = machine.fail("layered-stores remove-data --yes fast 2>&1")
    assert "has what is in store kept" in said, said
    machine.succeed(f"test -e {UPPER}/{held.removeprefix('/nix/store/')}", f"test -e {DATABASE}/db")
    machine.succeed(f"mv {UPPER} {theirs}; rm -r {DISK}/fast", "layered-stores start kept")
    well("kept", held)
    plug("other", DISK)
    well("fast", first)

with subtest("A store of a version that gave no marks gets them"):
    machine.succeed("systemctl stop layered-storesd")
    forget_marks()
    machine.succeed("systemctl start layered-storesd")
    well("fast", first)
    machine.succeed(f"grep {mark(UPPER)} {STATE}/known/fast.json")

with subtest("And if its filesystem is missing just then, that is known as well"):
    machine.succeed("layered-stores stop fast", "systemctl stop layered-storesd")
    forget_marks()
    machine.succeed(f"umount {DISK}", "systemctl start layered-storesd")
    machine.fail("layered-stores start fast")
    missing("fast", UPPER)
    nothing_made()
    plug("other", DISK)
    well("fast", first)

with subtest("At a boot it is late"):
    machine.succeed("sync")
    machine.reboot()
    machine.wait_for_unit("layered-storesd.service")
    make_disk("other")
    missing("fast", UPPER)
    nothing_made()
    plug("other", DISK)
    well("fast", first)

with subtest("The filesystem in memory of an ephemeral store is taken away"):
    path = add("scratch", "small")
    machine.succeed(f"umount --recursive --lazy {SCRATCH}")
    missing("scratch", f"{SCRATCH}/upper")
    machine.succeed("systemctl restart layered-storesd")
    missing("scratch", f"{SCRATCH}/upper")
    machine.fail(f"mountpoint {SCRATCH}")
    assert machine.succeed(f"ls -A {SCRATCH}") == ""
    machine.succeed(
        "layered-stores remove-data --yes scratch",
        "layered-stores start scratch",
        f"findmnt -t tmpfs {SCRATCH}",
    )
    machine.fail(f"nix-store --store {store_uri('scratch')} --check-validity {path}")
    well("scratch", add("scratch", "small"))

with subtest("The whole state directory is on a disk that is taken away"):
    kept = add("kept", "kept")
    make_disk("state")
    machine.succeed("layered-stores stop kept", "layered-stores stop scratch")
    machine.succeed(
        "systemctl stop layered-storesd", f"umount {SCRATCH}; mv {STATE} /srv/state; mkdir {STATE}"
    )
    plug("state", STATE)
    machine.succeed(f"cp -a /srv/state/. {STATE}/", f"rm -f {NOTES}/scratch.upper.json")
    machine.succeed("systemctl start layered-storesd", "layered-stores start kept scratch")
    well("kept", kept)
    unplug(STATE)
    missing("kept", f"{STATE}/stores/kept/upper")
    machine.fail(f"test -e {STATE}/stores")
    machine.succeed("systemctl restart layered-storesd")
    missing("kept", f"{STATE}/stores/kept/upper")
    machine.fail(f"test -e {STATE}/stores")
    plug("state", STATE)
    well("kept", kept)

with subtest("What is in the store is removed, and it begins anew"):
    before = mark(UPPER)
    machine.succeed("layered-stores stop fast", "layered-stores remove-data --yes fast")
    machine.succeed("layered-stores start fast")
    # Had it been another store's, with the disks exchanged, that one would miss it.
    assert mark(UPPER) != before
    machine.fail(f"nix-store --store {store_uri('fast')} --check-validity {first}")
    third = add("fast", "third")
    well("fast", third)

with subtest("So it does if its disk is gone for good, which is not taken later"):
    machine.succeed("layered-stores stop fast", f"umount {DISK}")
    machine.fail("layered-stores start fast")
    missing("fast", UPPER)
    machine.succeed("layered-stores remove-data --yes fast", "layered-stores start fast")
    fourth = add("fast", "fourth")
    machine.succeed("layered-stores stop fast")
    plug("other", DISK)
    machine.fail("layered-stores start fast")
    said = missing("fast", UPPER)
    assert "another directory" in said, said
    machine.wait_until_succeeds(f"umount {DISK}", timeout=60)
    well("fast", fourth)

with subtest("Nor is it taken with a new database if it comes back at once"):
    machine.succeed("layered-stores stop fast", f"mv {DISK}/fast /srv/away")
    machine.fail("layered-stores start fast")
    machine.succeed(
        # Or it begins anew at once.
        "layered-stores stop fast",
        "layered-stores remove-data --yes fast",
        f"mv /srv/away {DISK}/fast",
    )
    machine.fail("layered-stores start fast")
    said = missing("fast", UPPER)
    assert f"{DATABASE} does not have the database" in said, said
    # It may be anybody's by now.
    said = machine.fail("layered-stores remove-data --yes fast 2>&1")
    assert "has never been the upper layer of this store" in said, said
    machine.succeed(f"test -e {UPPER}/{fourth.removeprefix('/nix/store/')}")
    machine.succeed("layered-stores stop fast", f"rm -r {DISK}/fast", "layered-stores start fast")
    well("fast", add("fast", "fifth"))
