# The merged view of a store agrees with its layers again: when Nix calls the hook, when nobody
# does, and whatever processes hold on to. Nobody else notices while it happens.
#
# Paths that are in both layers have the same content in both. Here the lower store's copy is given
# another one behind Nix's back, so that everybody can see which of the two is shown.

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

LOWER = "/srv/lower"
LOWER_DIR = f"{LOWER}/nix/store"
MERGED = "/srv/ci/root/nix/store"
UPPER = "/srv/ci/upper"
STORE = "org.layeredstores1 /org/layeredstores1/store/ci org.layeredstores1.Store"
NO_BUS = "DBUS_SYSTEM_BUS_ADDRESS=unix:path=/nonexistent"

# How soon a change that nobody announced is seen by everybody. It takes some seconds at the most,
# and half a minute if the first try failed.
SOON = 25


def status(store: str = "ci") -> dict[str, object]:
    _, output = machine.execute(f"layered-stores status {store} --json")
    found: dict[str, object] = json.loads(output)
    return found


def count(key: str, store: str = "ci") -> int:
    return int(str(status(store)[key]))


def store_uri(name: str) -> str:
    """The URL for Nix, quoted for the shell."""
    # Root is not given that of another's store.
    properties = json.loads(machine.succeed(f"layered-stores status {name} --json"))
    return shlex.quote(properties["store-uri"])


def in_both_layers(name: str, store: str = "") -> str:
    """The base name of a new path that is in both layers; the upper one is shown."""
    machine.succeed(f"rm -rf /tmp/{name}; mkdir /tmp/{name}; echo {name} above > /tmp/{name}/file")
    path = machine.succeed(f"nix-store --store {store or ci} --add /tmp/{name}").strip()
    machine.succeed(f"nix-store --store {LOWER} --add /tmp/{name}")
    base = path.removeprefix("/nix/store/")
    below = f"{LOWER_DIR}/{base}"
    machine.succeed(f"chmod u+w {below}/file; echo {name} below > {below}/file")
    return base


def shown(base: str, merged: str = MERGED) -> str:
    """What the file of a path says in the merged directory."""
    return machine.execute(f"cat {merged}/{base}/file 2>&1")[1].strip()


def delete(base: str, store: str = "") -> str:
    """Has Nix delete a path. Nix calls the hook before it returns."""
    command = f"nix store delete --store {store or ci} /nix/store/{base} 2>&1"
    return machine.succeed(command)


@contextmanager
def held_open(base: str, merged: str = MERGED) -> Iterator[None]:
    """A process has the path's file open, and reads it only at the end."""
    machine.succeed(
        "rm -f /run/held.*",
        "systemd-run --quiet -E PATH --unit=holder --service-type=oneshot --no-block /bin/sh -c "
        f"'exec 3< {merged}/{base}/file; touch /run/held.open; "
        "until test -e /run/held.end; do sleep 0.05; done; cat <&3 > /run/held.content'",
    )
    machine.wait_for_file("/run/held.open")
    yield
    machine.succeed("touch /run/held.end")
    machine.wait_until_succeeds("systemctl show -P ActiveState holder | grep inactive")
    name = base.partition("-")[2]
    t.assertEqual(machine.succeed("cat /run/held.content"), f"{name} above\n")


@contextmanager
def daemon_asleep() -> Iterator[None]:
    """Whatever is right in here was not made right by the daemon."""
    machine.succeed("systemctl kill --signal=STOP layered-storesd")
    yield
    machine.succeed("systemctl kill --signal=CONT layered-storesd")


machine.wait_for_unit("multi-user.target")
# Before Linux 6.5 nothing can be put in the place of a mount that is in use.
SWAPS = tuple(map(int, machine.succeed("uname -r").split(".")[:2])) >= (6, 5)
# Where every instruction is emulated, the daemon still sees to what was done to the layers before.
EMULATED = machine.execute("systemd-detect-virt")[1].strip() == "qemu"
machine.succeed(f"nix-store --store {LOWER} --init")
machine.succeed("layered-stores start ci hers")
ci = store_uri("ci")
hers = store_uri("hers")

with subtest("Nix deletes a path that is in both layers, and calls the hook: the view is right"):
    base = in_both_layers("plain")
    t.assertEqual(shown(base), "plain above")
    before = count("refresh-count")
    # In one command, so that nobody but the hook has the time to help.
    seen = machine.succeed(
        f"nix store delete --store {ci} /nix/store/{base} >&2; cat {MERGED}/{base}/file"
    )
    t.assertEqual(seen, "plain below\n")
    machine.fail(f"test -e {UPPER}/{base}")
    t.assertGreater(count("refresh-count"), before)
    t.assertEqual(count("swap-count"), 0)
    t.assertEqual(status()["last-refresh"], "reconfigured")
    age = machine.succeed("date +%s%6N")
    t.assertLess(abs(int(age) - count("last-refresh-usec")), 60_000_000)
    machine.succeed(f"nix path-info --store {ci} /nix/store/{base}")

with subtest("Without the hook it would not be"):
    base = in_both_layers("unhooked")
    with daemon_asleep():
        t.assertEqual(shown(base), "unhooked above")
        said = delete(base, re.sub("&remount-hook=[^&']*", "", ci))
        t.assertIn("needs remounting", said)
        t.assertNotEqual(shown(base), "unhooked below")
    machine.wait_until_succeeds(f"grep -q below {MERGED}/{base}/file", timeout=SOON)

with subtest("Garbage collection calls the hook as well"):
    bases = [in_both_layers(f"garbage-{number}") for number in range(3)]
    for base in bases:
        t.assertRegex(shown(base), "above")
    files = " ".join(f"{MERGED}/{base}/file" for base in bases)
    seen = machine.succeed(f"nix store gc --store {ci} >&2; cat {files}")
    t.assertEqual(seen, "".join(f"garbage-{number} below\n" for number in range(3)))

if not SWAPS:
    with subtest("Where the kernel cannot swap, that is said once, and what it means"):
        # On a slow machine the watchdog may have ended one that was stopped, and this is the next.
        run = machine.succeed("systemctl show -P InvocationID layered-storesd").strip()
        said = machine.succeed(f"journalctl --output=cat _SYSTEMD_INVOCATION_ID={run}")
        t.assertEqual(said.count("this kernel cannot replace a mount that is in use"), 1, said)
        base = in_both_layers("held")
        t.assertEqual(shown(base), "held above")
        with held_open(base):
            # Nix has deleted by then, and passes on what the hook says.
            said = machine.fail(f"nix store delete --store {ci} /nix/store/{base} 2>&1")
            t.assertIn("1 of its paths, used by a process until whose end, before Linux 6.5", said)
            t.assertIn("`layered-stores stop ci`", said)
            code, said = machine.execute("layered-stores status ci")
            t.assertEqual(code, 3)
            t.assertRegex(said, r"before Linux 6\.5(.|\n)*\[stale\]")
            t.assertEqual(status()["state"], "active")
            # No second superblock of the same layers was made for nothing.
            machine.fail("dmesg | grep -E 'overlayfs: (upper|work)dir is in-use'")
            # Nobody else has to wait for it.
            other = in_both_layers("not-held")
            t.assertEqual(shown(other), "not-held above")
            machine.execute(f"nix store delete --store {ci} /nix/store/{other}")
            t.assertEqual(shown(other), "not-held below")
        # By itself. Who looks at the path just then may keep its directory once more.
        machine.wait_until_succeeds(f"grep -q below {MERGED}/{base}/file", timeout=60)
        machine.succeed("layered-stores remount ci", "layered-stores status ci")
        machine.succeed("layered-stores verify ci")
        t.assertEqual(count("swap-count"), 0)

if SWAPS:
    with subtest("A process that holds a file of the path leaves nobody else with the old one"):
        machine.succeed(
            "systemd-run --quiet -E PATH --unit=monitor -p StandardOutput=file:/run/monitor "
            "busctl --json=short monitor "
            "--match \"type='signal',path='/org/layeredstores1/store/ci'\"",
            # A service with a mount namespace of its own, from before the swap.
            "systemd-run --quiet -E PATH --unit=viewer --service-type=exec -p PrivateTmp=yes "
            "-p ProtectSystem=strict -p ProtectHome=yes sleep infinity",
        )
        listens = "layered-stores remount ci; grep -q RefreshCount /run/monitor"
        machine.wait_until_succeeds(listens, timeout=SOON)
        viewer = machine.succeed("systemctl show -P MainPID viewer").strip()
        as_seen_there = f"nsenter --target {viewer} --mount --"
        machine.fail(f"test $(readlink /proc/{viewer}/ns/mnt) = $(readlink /proc/1/ns/mnt)")
        mount_unit = str(status()["mount-unit"])
        flags = machine.succeed(f"findmnt --noheadings --output VFS-OPTIONS {MERGED}")
        t.assertTrue(flags.startswith("rw,nosuid,nodev,"), flags)
        refreshes, swaps = count("refresh-count"), count("swap-count")
        base = in_both_layers("held")
        t.assertEqual(shown(base), "held above")
        with held_open(base):
            delete(base)
            t.assertEqual(shown(base), "held below")
            t.assertEqual(
                machine.succeed(f"{as_seen_there} cat {MERGED}/{base}/file"), "held below\n"
            )
            t.assertEqual(machine.succeed(f"ls {MERGED}/{base}"), "file\n")
            machine.succeed(f"runuser -u bob -- grep below {MERGED}/{base}/file")
        t.assertEqual(count("swap-count"), swaps + 1)
        t.assertGreater(count("refresh-count"), refreshes)
        t.assertEqual(status()["problems"], [])

    with subtest("Clients are told of it"):
        machine.wait_until_succeeds("grep -q SwapCount /run/monitor", timeout=SOON)
        # The last line may be half written.
        lines = machine.succeed("cat /run/monitor").splitlines(keepends=True)
        signals = [json.loads(line) for line in lines if line.endswith("\n")]
        changes = [
            signal["payload"]["data"][1]
            for signal in signals
            if signal["member"] == "PropertiesChanged"
            and "SwapCount" in signal["payload"]["data"][1]
        ]
        t.assertEqual(len(changes), 1)
        t.assertEqual(changes[0]["SwapCount"]["data"], swaps + 1)
        t.assertEqual(changes[0]["LastRefresh"]["data"], "swapped")
        # By now somebody may have looked again who was not asked.
        found, announced = status(), changes[0]["RefreshCount"]["data"]
        if found["refresh-count"] == announced:
            t.assertEqual(found["last-refresh"], "swapped")
        else:
            t.assertGreater(found["refresh-count"], announced)
        machine.succeed("systemctl stop monitor")

    with subtest("The fresh mount is as the old one: one mount, its flags, its unit"):
        t.assertEqual(machine.succeed(f"findmnt --noheadings --output VFS-OPTIONS {MERGED}"), flags)
        for where in ("", as_seen_there):
            table = machine.succeed(f"{where} cat /proc/self/mounts")
            t.assertEqual(table.count(f" {MERGED} overlay "), 1)
        machine.require_unit_state(mount_unit)
        t.assertEqual(machine.get_unit_property(mount_unit, "SubState"), "mounted")
        t.assertEqual(machine.get_unit_property("layered-storesd", "NRestarts"), "0")
        machine.succeed(f"nix path-info --store {ci} /nix/store/{base}")

with subtest("OverlayFS writes with the rights of who made it: setgid bits and capabilities stay"):
    # cap_net_raw=ep, as setcap(8) writes it (linux/capability.h, vfs_cap_data).
    set_capability = (
        "import os, struct; "
        f"os.setxattr('{MERGED}/tmp-file', 'security.capability', "
        "struct.pack('<5I', 0x02000001, 1 << 13, 0, 0, 0))"
    )
    machine.succeed(
        f"mkdir {MERGED}/tmp-dir; touch {MERGED}/tmp-file; chgrp nogroup {MERGED}/tmp-*",
        f"chmod 2755 {MERGED}/tmp-dir {MERGED}/tmp-file",
        f'python3 -c "{set_capability}"',
    )
    modes = machine.succeed(f"stat --format %a {MERGED}/tmp-dir {UPPER}/tmp-dir {UPPER}/tmp-file")
    t.assertEqual(modes.split(), ["2755"] * 3)
    listed = machine.succeed(f"python3 -c \"import os; print(os.listxattr('{UPPER}/tmp-file'))\"")
    t.assertIn("security.capability", listed)
    machine.succeed(f"rm -r {MERGED}/tmp-dir {MERGED}/tmp-file")

with subtest("What happens in the upper layer without a call of the hook is made good by itself"):
    base = in_both_layers("silent")
    t.assertEqual(shown(base), "silent above")
    machine.succeed(f"rm -r {UPPER}/{base}")
    machine.wait_until_succeeds(f"grep -q below {MERGED}/{base}/file", timeout=SOON)
    if SWAPS:
        base = in_both_layers("silent-and-held")
        swaps = count("swap-count")
        with held_open(base):
            machine.succeed(f"rm -r {UPPER}/{base}")
            machine.wait_until_succeeds(f"grep -q below {MERGED}/{base}/file", timeout=SOON)
        # It is counted when it has been looked at.
        retry(lambda _last: count("swap-count") > swaps, SOON)

with subtest("The lower store gains a path that was looked for before"):
    machine.succeed("mkdir -p /tmp/later; echo later > /tmp/later/file")
    later = machine.succeed(f"nix-store --store {LOWER} --add /tmp/later").strip()[11:]
    machine.succeed(f"nix-store --store {LOWER} --delete /nix/store/{later}")
    machine.wait_until_fails(f"test -e {MERGED}/{later}", timeout=SOON)
    with daemon_asleep():
        machine.fail(f"test -e {MERGED}/{later}")
        machine.succeed(f"nix-store --store {LOWER} --add /tmp/later")
        machine.succeed(f"ls {MERGED} | grep {later}")
        machine.fail(f"test -e {MERGED}/{later}")
    machine.wait_until_succeeds(f"test -e {MERGED}/{later}", timeout=SOON)
    t.assertEqual(shown(later), "later")

with subtest("The lower store loses a path"):
    with daemon_asleep():
        machine.succeed(f"test -e {MERGED}/{later}")
        # Nix would wait for its garbage collector's lock, which the daemon holds.
        machine.succeed(f"rm -r {LOWER}/nix/store/{later}")
        machine.succeed(f"test -e {MERGED}/{later}")
    machine.wait_until_fails(f"test -e {MERGED}/{later}", timeout=SOON)
    machine.succeed(f"nix-store --store {LOWER} --delete /nix/store/{later}")
    machine.succeed("layered-stores verify ci")

with subtest("A command line `remount`, and the methods of manager and store, do as the hook does"):
    for command in (
        "layered-stores remount ci",
        f"layered-stores-remount {MERGED}",
        f"layered-stores-remount {MERGED}/",
        f"busctl call {STORE} Remount",
        "busctl call org.layeredstores1 /org/layeredstores1 org.layeredstores1.Manager Remount "
        f"s {MERGED}",
        "varlinkctl --quiet call /run/layered-stores/org.layeredstores1 org.layeredstores1.Remount "
        f'\'{{"realStoreDir": "{MERGED}"}}\'',
    ):
        before = count("refresh-count")
        t.assertEqual(machine.succeed(f"{command} 2>&1"), "")
        t.assertGreater(count("refresh-count"), before, command)


def one_line(command: str, code: int) -> str:
    """Runs a hook that has something to say, and returns it."""
    status, output = machine.execute(f"{command} 2>&1 >/dev/null")
    t.assertEqual(status, code, output)
    t.assertEqual(len(output.splitlines()), 1, output)
    t.assertTrue(output.startswith("layered-stores-remount: "), output)
    return output


with subtest("Where there is no bus, the hook finds the daemon all the same"):
    base = in_both_layers("busless")
    t.assertEqual(shown(base), "busless above")
    before = count("refresh-count")
    with held_open(base) if SWAPS else nullcontext():
        seen = machine.succeed(
            f"{NO_BUS} nix store delete --store {ci} /nix/store/{base} >&2; "
            f"cat {MERGED}/{base}/file"
        )
        t.assertEqual(seen, "busless below\n")
    t.assertGreater(count("refresh-count"), before)
    # Who is neither root nor the owner needs the bus, because polkit decides.
    said = one_line(f"{NO_BUS} runuser -u bob -- layered-stores-remount {MERGED}", 1)
    t.assertIn("no system bus", said)

with subtest("Without bus and daemon it reconfigures by itself, if it may, and says so"):
    base = in_both_layers("alone")
    t.assertEqual(shown(base), "alone above")
    machine.succeed("systemctl stop layered-storesd")
    said = machine.succeed(f"{NO_BUS} nix store delete --store {ci} /nix/store/{base} 2>&1")
    t.assertIn(f"reconfigured {MERGED} directly", said)
    t.assertEqual(shown(base), "alone below")
    said = one_line(f"{NO_BUS} layered-stores-remount {MERGED}", 0)
    t.assertIn(f"reconfigured {MERGED} directly", said)
    said = one_line(f"{NO_BUS} runuser -u bob -- layered-stores-remount {MERGED}", 1)
    t.assertIn("systemctl start layered-storesd", said)
    for directory in ("/tmp", "/nonexistent", "/"):
        said = one_line(f"{NO_BUS} layered-stores-remount {directory}", 1)
        t.assertIn(f"{directory} is not an overlay mount", said)
    machine.succeed("systemctl start layered-storesd")

with subtest("A daemon that is not running is started by the hook"):
    base = in_both_layers("activated")
    t.assertEqual(shown(base), "activated above")
    machine.succeed("systemctl stop layered-storesd")
    t.assertEqual(delete(base).count("layered-stores-remount"), 0)
    t.assertEqual(shown(base), "activated below")
    # It may still be about other stores.
    machine.wait_for_unit("layered-storesd")

with subtest("A daemon that cannot be started is done without"):
    base = in_both_layers("masked")
    t.assertEqual(shown(base), "masked above")
    mask = "/run/systemd/system.control/layered-storesd.service"
    machine.succeed("systemctl stop layered-storesd; mkdir -p /run/systemd/system.control")
    machine.succeed(f"ln -s /dev/null {mask}; systemctl daemon-reload")
    said = delete(base)
    t.assertIn("the daemon cannot be reached", said)
    t.assertIn(f"reconfigured {MERGED} directly", said)
    t.assertEqual(shown(base), "masked below")
    machine.succeed(f"rm {mask}; systemctl daemon-reload; systemctl start layered-storesd")
    machine.succeed("layered-stores wait ci hers")

with subtest("The owner of a store may call the hook, and nobody else but root"):
    t.assertEqual(machine.succeed("stat --format %U:%a /srv/hers/upper"), "alice:755\n")
    # Sees to all that is to be seen to, so that from here on only who asks is counted.
    machine.succeed("layered-stores remount hers")
    before = count("refresh-count", "hers")
    machine.succeed("runuser -u alice -- layered-stores-remount /srv/hers/root/nix/store")
    after = count("refresh-count", "hers")
    assert after == before + 1 or (EMULATED and after > before), (before, after)
    said = one_line("runuser -u bob -- layered-stores-remount /srv/hers/root/nix/store", 1)
    t.assertIn('store "hers"', said)
    said = one_line(f"runuser -u alice -- layered-stores-remount {MERGED}", 1)
    t.assertIn('store "ci"', said)
    said = machine.fail(
        f"SYSTEMD_LOG_LEVEL=debug runuser -u bob -- busctl call {STORE} Remount 2>&1"
    )
    t.assertRegex(
        said,
        "error-name=org.freedesktop.DBus.Error.(AccessDenied|InteractiveAuthorizationRequired)",
    )
    if not EMULATED:
        t.assertEqual(count("refresh-count", "hers"), after)

with subtest("Nix, run by the owner of a store, deletes and has the hook called"):
    as_alice = "runuser -u alice -- env HOME=/home/alice"
    machine.succeed("rm -rf /tmp/alices; mkdir /tmp/alices; echo alices above > /tmp/alices/file")
    path = machine.succeed(f"{as_alice} nix-store --store {hers} --add /tmp/alices").strip()
    machine.succeed(f"nix-store --store {LOWER} --add /tmp/alices")
    below = f"{LOWER}{path}/file"
    machine.succeed(f"chmod u+w {below}; echo alices below > {below}")
    machine.succeed(f"grep above /srv/hers/root{path}/file")
    seen = machine.succeed(
        f"{as_alice} nix store delete --store {hers} {path} >&2; cat /srv/hers/root{path}/file"
    )
    t.assertEqual(seen, "alices below\n")

with subtest("The hook is precise about what it is not meant for"):
    machine.succeed("mkdir -p /tmp/plain-directory")
    for directory in ("/tmp/plain-directory", "/nonexistent", "/", "/srv/ci/root"):
        said = one_line(f"layered-stores-remount {directory}", 1)
        t.assertIn(f'no layered store has the real store dir "{directory}"', said)
        t.assertIn("`layered-stores status`", said)
    for arguments in ("", f"{MERGED} {MERGED}", "", "srv/ci/root/nix/store", "''"):
        code, said = machine.execute(f"layered-stores-remount {arguments} 2>&1")
        t.assertEqual(code, 2, arguments)
        t.assertIn("real store dir", said)
    machine.succeed("layered-stores-remount --help | grep REAL_STORE_DIR")
    machine.succeed("layered-stores stop hers")
    said = one_line("layered-stores-remount /srv/hers/root/nix/store", 1)
    t.assertIn('store "hers" is not active', said)
    t.assertIn("`layered-stores start hers`", said)
    machine.succeed("layered-stores start hers")

with subtest("What changed while the daemon was away is made good when it is back"):
    base = in_both_layers("stopped")
    with held_open(base) if SWAPS else nullcontext():
        machine.succeed("systemctl stop layered-storesd")
        # The kernel is to remember it: a late look of the daemon's may have had it forget.
        t.assertNotEqual(shown(base), "stopped below")
        machine.succeed(f"rm -r {UPPER}/{base}")
        t.assertNotEqual(shown(base), "stopped below")
        machine.succeed("systemctl start layered-storesd")
        machine.wait_until_succeeds(f"grep -q below {MERGED}/{base}/file", timeout=SOON)
    base = in_both_layers("killed")
    with held_open(base) if SWAPS else nullcontext():
        # One that is stopped first cannot be back before it was seen what it leaves.
        machine.succeed("systemctl kill --signal=STOP layered-storesd")
        t.assertNotEqual(shown(base), "killed below")
        machine.succeed(f"rm -r {UPPER}/{base}")
        t.assertNotEqual(shown(base), "killed below")
        machine.succeed("systemctl kill --signal=KILL layered-storesd")
        machine.wait_until_succeeds(f"grep -q below {MERGED}/{base}/file", timeout=SOON)
    machine.wait_for_unit("layered-storesd")
    if not EMULATED:
        wanted = "swapped" if SWAPS else "reconfigured"
        retry(lambda _last: status()["last-refresh"] == wanted, SOON)

with subtest("One who is inside with `layered-stores enter` sees what is new, too"):
    machine.succeed("mkdir -p /tmp/inside; echo inside > /tmp/inside/file")
    host = store_uri("host")
    path = machine.succeed(f"nix-store --store {host} --add /tmp/inside").strip()
    machine.succeed("nix-store --store local --add /tmp/inside")
    merged = str(status("host")["real-store-dir"])
    machine.succeed(
        "systemd-run --quiet -E PATH --unit=guest layered-stores enter host -- sleep infinity",
    )
    machine.wait_until_succeeds("test $(cat /proc/$(systemctl show -P MainPID guest)/comm) = sleep")
    guest = machine.succeed("systemctl show -P MainPID guest").strip()
    inode = f"nsenter --target {guest} --mount -- stat --format %i {path}/file"
    above = machine.succeed(f"stat --format %i {status('host')['upper-layer']}{path[10:]}/file")
    t.assertEqual(machine.succeed(inode), above)
    if SWAPS:
        machine.succeed(
            "systemd-run --quiet -E PATH --unit=pin --service-type=exec "
            f"-p StandardInput=file:{merged}{path[10:]}/file sleep infinity"
        )
    delete(path.removeprefix("/nix/store/"), host)
    t.assertEqual(count("swap-count", "host"), int(SWAPS))
    t.assertEqual(machine.succeed(inode), machine.succeed(f"stat --format %i {path}/file"))
    machine.succeed("systemctl stop guest; systemctl stop pin || true")

if SWAPS:
    with subtest("When a swap is impossible the hook fails, and everybody is told"):
        drop_in = "/run/systemd/system/layered-storesd.service.d"
        machine.succeed(
            f"mkdir -p {drop_in}; printf '[Service]\\nSystemCallFilter=~move_mount\\n' "
            f"> {drop_in}/no-swap.conf; systemctl daemon-reload; systemctl restart layered-storesd",
            "layered-stores wait ci",
        )
        base = in_both_layers("doomed")
        with held_open(base):
            machine.succeed(f"rm -r {UPPER}/{base}")
            said = one_line(f"layered-stores-remount {MERGED}", 1)
            t.assertIn('store "ci" could not be refreshed', said)
            t.assertEqual(machine.execute("layered-stores status ci")[0], 3)
            t.assertIn("[refresh-failed]", machine.execute("layered-stores status ci")[1])
            t.assertEqual(status()["state"], "active")
            code, said = machine.execute("layered-stores verify ci")
            t.assertEqual(code, 3)
            t.assertIn(base, said)
            code, said = machine.execute("layered-stores verify ci --json")
            t.assertEqual((code, [stale["path"] for stale in json.loads(said)]), (3, [base]))
            # Nix has deleted by then, and passes the failure on.
            other = in_both_layers("doomed-too")
            shown(other)
            said = machine.fail(f"nix store delete --store {ci} /nix/store/{other} 2>&1")
            t.assertIn("layered-stores-remount: ", said)
            machine.succeed(f"rm -r {drop_in}; systemctl daemon-reload")
            machine.succeed("systemctl restart layered-storesd; layered-stores wait ci")
            machine.wait_until_succeeds(f"grep -q below {MERGED}/{base}/file", timeout=SOON)
            machine.succeed("layered-stores status ci", "layered-stores verify ci")
