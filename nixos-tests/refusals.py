# What does not work on this machine is refused, in one clear sentence that names the store, the key
# and the way out, without harm to what is there or to other stores. What a configuration's text
# shows is the scenario mistakes.

import json
import re
from dataclasses import dataclass, field

CONFIGURATION = "/etc/layered-stores/config.toml"


@dataclass
class Case:
    """A store that cannot come up."""

    reason: str
    """What is said, as a regular expression."""
    spoil: str
    """Makes it so."""
    repair: str
    """Puts an end to it."""
    lower: str = "/srv/lower"
    keys: dict[str, str] = field(default_factory=dict)


def is_kept(name: str) -> str:
    """A command that succeeds while what somebody left in a store's directory is there."""
    return f"grep -q precious /srv/{name}/precious"


def merged(name: str) -> str:
    return f"/srv/{name}/root/nix/store"


UNIT = machine.succeed(f"systemd-escape --path --suffix=mount {merged('unit')}").strip()
DEEP = "/srv/too-deep/lower"
CASES = {
    "lower-missing": Case(
        r"lower-store: /srv/none/nix/store is not there; fill the lower store first, or mount the "
        r"filesystem it is on",
        "true",
        "mkdir -p /srv/none/nix/store",
        lower="/srv/none",
    ),
    "lower-file": Case(
        r"lower-store: /srv/file/nix/store is not a directory; move it away, or name another path",
        "mkdir -p /srv/file/nix; touch /srv/file/nix/store",
        "rm /srv/file/nix/store; mkdir /srv/file/nix/store",
        lower="/srv/file",
    ),
    "other-filesystem": Case(
        r"work-dir: /srv/other-filesystem/tmpfs/work is on another mount than the upper layer "
        r"/srv/other-filesystem/upper; put both on one filesystem",
        "mkdir /srv/other-filesystem/tmpfs; "
        "mount -t tmpfs -o mode=755 none /srv/other-filesystem/tmpfs",
        "umount /srv/other-filesystem/tmpfs",
        keys={"work-dir": "/srv/other-filesystem/tmpfs/work"},
    ),
    "other-mount": Case(
        r"work-dir: /srv/other-mount/bind/work is on another mount than the upper layer",
        "mkdir /srv/other-mount/bind; mount --bind /srv/other-mount/bind /srv/other-mount/bind",
        "umount /srv/other-mount/bind",
        keys={"work-dir": "/srv/other-mount/bind/work"},
    ),
    "filesystem-root": Case(
        r"upper-layer: /srv/filesystem-root/fs is the root of a mounted filesystem, where things "
        r"like lost\+found are no store paths; use a directory below it",
        "mkdir /srv/filesystem-root/fs; mount -t tmpfs none /srv/filesystem-root/fs",
        "umount /srv/filesystem-root/fs",
        keys={"upper-layer": "/srv/filesystem-root/fs"},
    ),
    "no-xattrs": Case(
        r"upper-layer: the filesystem of /srv/no-xattrs/fs/upper has no extended attributes, "
        r"which OverlayFS needs; use another filesystem",
        "mkdir /srv/no-xattrs/fs; mount -t ramfs none /srv/no-xattrs/fs",
        "umount /srv/no-xattrs/fs",
        keys={"upper-layer": "/srv/no-xattrs/fs/upper", "work-dir": "/srv/no-xattrs/fs/work"},
    ),
    "symlink": Case(
        r"upper-layer: /srv/symlink/link is a symbolic link; write the path it leads to",
        "mkdir /srv/symlink/real; ln -s real /srv/symlink/link",
        "rm /srv/symlink/link",
        keys={"upper-layer": "/srv/symlink/link/upper"},
    ),
    "symlink-at-the-end": Case(
        r"root: /srv/symlink-at-the-end/root/nix/store is a symbolic link; write the path it",
        "mkdir -p /srv/symlink-at-the-end/root/nix; "
        "ln -s /tmp /srv/symlink-at-the-end/root/nix/store",
        "rm /srv/symlink-at-the-end/root/nix/store",
    ),
    "writable": Case(
        r"upper-layer: /srv/writable can be changed by others than root, who could put something "
        r"else in its place; give it to root and take the right to write from all others \(now uid "
        r"0, mode 0777\), or name another path",
        "chmod 0777 /srv/writable",
        "chmod 0755 /srv/writable",
    ),
    "of-bob": Case(
        r"upper-layer: /srv/of-bob can be changed by others .* \(now uid \d+, mode 0755\)",
        "chown bob /srv/of-bob",
        "chown root /srv/of-bob",
        # Not even if the store is his.
        keys={"owner": "bob"},
    ),
    "lower-of-bob": Case(
        r"lower-store: /srv/lower-of-bob/lower can be changed by others than root, .*now uid \d+",
        "mkdir -p /srv/lower-of-bob/lower/nix/store; chown bob /srv/lower-of-bob/lower",
        "chown root /srv/lower-of-bob/lower",
        lower="/srv/lower-of-bob/lower",
    ),
    "lower-link": Case(
        r"lower-store: /srv/lower-link/lower/nix is a symbolic link; write the path it leads to",
        "mkdir -p /srv/lower-link/{lower,real/store}; ln -s ../real /srv/lower-link/lower/nix",
        "rm /srv/lower-link/lower/nix; mv /srv/lower-link/real /srv/lower-link/lower/nix",
        lower="/srv/lower-link/lower",
    ),
    "shared": Case(
        r"upper-layer: /srv/shared/tmp/upper would lie in /srv/shared/tmp, where others than root "
        r"can make files \(mode 1777\) and could have made it beforehand; make a directory of "
        r"root's there and go below it, or name another path",
        "mkdir -m 1777 /srv/shared/tmp",
        "chmod 755 /srv/shared/tmp",
        keys={"upper-layer": "/srv/shared/tmp/upper"},
    ),
    "work-of-bob": Case(
        r"work-dir: /srv/work-of-bob/work has to belong to root and be writable for nobody else "
        r"\(now uid \d+, mode 0700\), and what is in it may be somebody else's; move it away",
        "install -d -m 700 -o bob /srv/work-of-bob/work; touch /srv/work-of-bob/work/his",
        "mv /srv/work-of-bob/work /srv/work-of-bob/away",
    ),
    "upper-of-bob": Case(
        r"/srv/upper-of-bob/upper belongs to bob, and the store to root, .* or change `owner`",
        "install -d -o bob /srv/upper-of-bob/upper",
        "chown root /srv/upper-of-bob/upper",
    ),
    "upper-for-others": Case(
        r"upper-layer: /srv/upper-for-others/upper, with group users and mode 1775, is for others "
        r"than root to write to, .*; run `chmod go-w /srv/upper-for-others/upper`, take away what",
        "install -d -m 1775 -g users /srv/upper-for-others/upper",
        "chmod go-w /srv/upper-for-others/upper",
    ),
    "lower-for-others": Case(
        r"lower-store: root's Nix works in /srv/lower-for-others/nix/var/nix, .*; "
        r"/srv/lower-for-others/nix/var/nix can be changed by others than root \(now uid \d+, mode "
        r"0755\): give it to root alone",
        "mkdir -p /srv/lower-for-others/nix/{store,var/nix}; "
        "chown bob /srv/lower-for-others/nix/var/nix",
        "chown root /srv/lower-for-others/nix/var/nix",
        lower="/srv/lower-for-others",
    ),
    "in-the-way": Case(
        r"upper-layer: /srv/in-the-way/\.upper\.new, the name under which /srv/in-the-way/upper is "
        r"made, cannot be used: Directory not empty \(os error 39\); move it away",
        "install -d -o bob /srv/in-the-way/.upper.new; touch /srv/in-the-way/.upper.new/his",
        "rm -r /srv/in-the-way/.upper.new",
    ),
    "not-empty": Case(
        r'root: /srv/not-empty/root/nix/store is not empty \(it holds "something"\), and the mount '
        r"would hide what is in it; move it away, or name another root",
        "mkdir -p /srv/not-empty/root/nix/store/something",
        "rmdir /srv/not-empty/root/nix/store/something",
    ),
    "file-in-the-way": Case(
        r"upper-layer: /srv/file-in-the-way/upper is not a directory; move it away, or name",
        "touch /srv/file-in-the-way/upper",
        "rm /srv/file-in-the-way/upper",
    ),
    "unit": Case(
        rf"a unit {re.escape(UNIT)} that is not ours exists already .*; remove it from /etc/fstab "
        r"or /etc/systemd/system, or name another root",
        f"printf '[Mount]\\nWhat=none\\nType=tmpfs\\nWhere={merged('unit')}\\n' "
        f"> '/run/systemd/system/{UNIT}'; systemctl daemon-reload",
        f"rm '/run/systemd/system/{UNIT}'; systemctl daemon-reload",
    ),
    "fstab": Case(
        r"a unit srv-fstab-root-nix-store.mount that is not ours exists already .*; remove it from "
        r"/etc/fstab",
        "touch /etc/fstab; cp --remove-destination $(readlink -f /etc/fstab) /etc/fstab.new; "
        f"echo 'none {merged('fstab')} tmpfs noauto 0 0' >> /etc/fstab.new; "
        "mv /etc/fstab.new /etc/fstab; systemctl daemon-reload",
        "sed -i '/srv.fstab/d' /etc/fstab; systemctl daemon-reload",
    ),
    "foreign": Case(
        r"tmpfs from precious is mounted at /srv/foreign/root/nix/store, which is not this store; "
        r"it is left alone: unmount it, or name another root",
        f"mkdir -p {merged('foreign')}; mount -t tmpfs precious {merged('foreign')}; "
        f"touch {merged('foreign')}/theirs",
        f"test -e {merged('foreign')}/theirs; umount {merged('foreign')}",
    ),
    "locked": Case(
        r"upper-layer: /srv/locked/upper is locked by another process, most likely another "
        r"layered-storesd; two overlays on one upper layer corrupt it, so this store stays down",
        "mkdir /srv/locked/upper; (umask 077; touch /srv/locked/.upper.lock); "
        "systemd-run --quiet -E PATH --unit=locker --service-type=notify "
        "-p NotifyAccess=all flock --exclusive /srv/locked/.upper.lock "
        "/bin/sh -c 'systemd-notify --ready; exec sleep infinity'",
        "systemctl stop locker",
    ),
    "owner": Case(
        r'owner = "nobody-knows": there is no such user on this machine; create it, or name',
        "true",
        "useradd nobody-knows",
        keys={"owner": "nobody-knows"},
    ),
    "group": Case(
        r'group = "no-such-group": there is no such group on this machine; create it, or name',
        "true",
        "groupadd no-such-group",
        keys={"group": "no-such-group"},
    ),
    "other-owner": Case(
        r"/srv/other-owner/upper belongs to root, and the store to alice, as after root has run "
        r"Nix on it directly; .* or change `owner`",
        "mkdir /srv/other-owner/upper",
        "chown alice /srv/other-owner/upper",
        keys={"owner": "alice"},
    ),
    "read-only": Case(
        r"upper-layer: /srv/read-only/fs/upper is on a read-only filesystem; mount it for writing, "
        r"or name another path",
        "mkdir /srv/read-only/fs; mount -t tmpfs -o ro,mode=755 none /srv/read-only/fs",
        "mount -o remount,rw /srv/read-only/fs",
        keys={"upper-layer": "/srv/read-only/fs/upper", "work-dir": "/srv/read-only/fs/work"},
    ),
    # Made when it could be, and only then mounted for reading.
    "read-only-now": Case(
        r"upper-layer: /srv/read-only-now/fs/upper is on a read-only filesystem; mount it for "
        r"writing, or name another path",
        "mkdir /srv/read-only-now/fs; mount -t tmpfs -o mode=755 none /srv/read-only-now/fs; "
        "mkdir /srv/read-only-now/fs/{upper,work}; mount -o remount,ro /srv/read-only-now/fs",
        "mount -o remount,rw /srv/read-only-now/fs",
        keys={
            "upper-layer": "/srv/read-only-now/fs/upper",
            "work-dir": "/srv/read-only-now/fs/work",
        },
    ),
    "too-deep": Case(
        r"lower-store: .*the kernel stacks at most 2 overlays",
        f"mkdir -p {DEEP}/nix/store /srv/too-deep/{{first,a,b,c,d}}; mount -t overlay overlay "
        f"-o lowerdir={DEEP}/nix/store,upperdir=/srv/too-deep/a,workdir=/srv/too-deep/b "
        "/srv/too-deep/first; mount -t overlay overlay "
        "-o lowerdir=/srv/too-deep/first,upperdir=/srv/too-deep/c,workdir=/srv/too-deep/d "
        f"{DEEP}/nix/store",
        # In one step: a store that tries again in between would come up with a lower store that is
        # about to be taken away.
        f"umount {DEEP}/nix/store",
        lower=DEEP,
    ),
}


def declaration(name: str, lower: str, keys: dict[str, str]) -> str:
    own = {
        "lower-store": lower,
        "root": f"/srv/{name}/root",
        "upper-layer": f"/srv/{name}/upper",
        "work-dir": f"/srv/{name}/work",
        **keys,
    }
    return "\n".join([f"[stores.{name}]", *(f'{key} = "{value}"' for key, value in own.items())])


def status(name: str) -> dict[str, object]:
    _, output = machine.execute(f"layered-stores status {name} --json")
    found: dict[str, object] = json.loads(output)
    return found


def failed_status(name: str) -> dict[str, object]:
    """The status of a store that failed. While it is tried again, it is that of one on its way."""
    found: dict[str, object] = {}

    def has_failed(_last: bool) -> bool:
        nonlocal found
        found = status(name)
        return found["state"] == "failed"

    retry(has_failed, 60)
    return found


with subtest("Broken stores keep neither the daemon nor other stores from coming up"):
    machine.wait_for_unit("multi-user.target")
    machine.succeed("mkdir -p /srv/lower/nix/store")
    for name, case in CASES.items():
        machine.succeed(
            f"mkdir -p /srv/{name}; echo precious > /srv/{name}/precious", case.spoil, is_kept(name)
        )
    stores = [declaration(name, case.lower, case.keys) for name, case in CASES.items()]
    text = "\n".join([*stores, declaration("good", "/srv/lower", {})])
    machine.succeed(f"install -D -m 644 /dev/stdin {CONFIGURATION} << 'END'\n{text}\nEND")
    # Nothing of it can be seen in the text.
    machine.succeed("layered-stores check-config")
    mounts = machine.succeed("cut -d ' ' -f 5,9- /proc/self/mountinfo")
    machine.succeed("systemctl restart layered-storesd", timeout=60)
    machine.require_unit_state("layered-storesd")
    t.assertEqual(status("good")["state"], "active")
    summary = machine.get_unit_property("layered-storesd", "StatusText")
    t.assertIn(f"1 of {len(CASES) + 1} stores active; failed: ", summary)
    machine.fail("systemctl start layered-stores.target")

with subtest("Each says in one sentence what is wrong and what to do"):
    machine.succeed("journalctl --sync")
    for name, case in CASES.items():
        found = failed_status(name)
        reason = str(found["state-reason"])
        t.assertRegex(reason, case.reason)
        t.assertNotIn("\n", reason)
        t.assertEqual(machine.execute(f"layered-stores status {name}")[0], 3)
        t.assertIn(reason, machine.execute(f"layered-stores status {name}")[1])
        t.assertIn(reason, machine.succeed(f"journalctl -b -o cat -p warning STORE={name}"))

with subtest("Asked to start, they say it again"):
    for name, case in CASES.items():
        said = machine.fail(f"layered-stores start {name} 2>&1", timeout=60)
        t.assertEqual(said.count("\n"), 1, said)
        t.assertTrue(
            said.startswith(f'layered-stores: store "{name}" could not be started: '), said
        )
        t.assertRegex(said, case.reason)
    said = machine.fail(
        "SYSTEMD_LOG_LEVEL=debug busctl call org.layeredstores1 "
        "/org/layeredstores1/store/locked org.layeredstores1.Store Start 2>&1"
    )
    t.assertIn("error-name=org.layeredstores1.Error.StartFailed", said)

with subtest("Nothing is half done: no mount, and what was there is there"):
    after = machine.succeed(
        f"cut -d ' ' -f 5,9- /proc/self/mountinfo | grep -v '^{merged('good')} '"
    )
    t.assertEqual(after, mounts)
    for name in CASES:
        machine.succeed(is_kept(name))
    machine.succeed(
        "test -d /srv/not-empty/root/nix/store/something",
        f"test -e {merged('foreign')}/theirs",
        f"test -e '/run/systemd/system/{UNIT}'",
        "test $(stat -c %a:%U /srv/writable) = 777:root",
        "test $(stat -c %U /srv/other-owner/upper) = root",
        "test $(stat -c %U /srv/of-bob) = bob",
    )
    # What is not the daemon's to lock is not locked.
    t.assertNotIn("i", machine.succeed(f"lsattr -d {merged('not-empty')}").split()[0])
    machine.fail("test -e /srv/no-xattrs/fs/upper/x -o -e /srv/lower-missing/upper")

with subtest("Repaired, each starts"):
    for name, case in CASES.items():
        machine.succeed(case.repair, f"layered-stores start {name}", timeout=60)
        found = status(name)
        t.assertEqual((found["state"], found["problems"]), ("active", []), name)
        machine.succeed(f"mountpoint --quiet {merged(name)}", is_kept(name))
    machine.succeed("layered-stores status", "systemctl start layered-stores.target")
    machine.require_unit_state("layered-stores.target")
