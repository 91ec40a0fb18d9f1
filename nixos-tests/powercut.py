# The power fails in the middle of a build, of a swap, while a store is made, and while what is in
# one is removed: what was not on the disk is lost. The next boot brings the stores up, Nix's view
# is consistent, and nothing is left of what was half done; or the store says that it is, and what
# ends it.
import json
import re
import shlex

CONFIG = "/etc/layered-stores/config.toml"
LOWER = "/srv/base"
UPPER = "/srv/ci/upper"
MERGED = "/srv/ci/root/nix/store"

machine.start(allow_reboot=True)
machine.wait_for_unit("layered-storesd.service")
machine.succeed(
    f"nix-store --store {LOWER} --init",
    "layered-stores start ci",
)


def store_uri(name: str) -> str:
    """The URL for Nix, quoted for the shell."""
    return shlex.quote(machine.succeed(f"layered-stores uri {name}").strip())


def derivation(name: str, script: str) -> str:
    return (
        f'(derivation {{ name = "{name}"; system = builtins.currentSystem; '
        f'builder = "/bin/sh"; args = [ "-c" "{script}" ]; }})'
    )


def build_command(store: str, name: str, script: str) -> str:
    expression = shlex.quote(derivation(name, script))
    return f"nix-build --no-out-link --store {store} -E {expression}"


def build(store: str, name: str) -> str:
    """Has Nix build a file of some size; returns its store path."""
    script = "for i in 1 2 3 4 5 6 7 8; do echo a line of $i; done > $out"
    return machine.succeed(build_command(store, name, script)).strip()


def hold_at(call: str, path: str = "", number: int = 1) -> None:
    """From now on the daemon does not get past this system call, the next one or a later one.

    With `path` only calls count that are given it, or a descriptor of it.
    """
    pid = machine.get_unit_property("layered-storesd.service", "MainPID")
    of = f"-P {path}" if path else ""
    machine.succeed(
        "systemd-run --quiet -E PATH --collect --unit=tracer "
        f"strace -f -o /run/traced -p {pid} {of} -e trace={call} "
        f"-e inject={call}:delay_enter=3600s:when={number}+"
    )
    # Each thread, because it is one of the others that does it.
    machine.wait_until_succeeds(
        f"test -z \"$(grep -L 'TracerPid:.[1-9]' /proc/{pid}/task/*/status)\"", timeout=60
    )


def cut_power() -> None:
    """And on again."""
    machine.crash()
    machine.start(allow_reboot=True)
    machine.wait_for_unit("layered-storesd.service")


def all_is_well(*stores: str, lost: tuple[str, ...] = ()) -> None:
    """The stores are up and whole, and nobody would know that something was cut short."""
    machine.succeed(f"layered-stores wait {' '.join(stores)} --timeout 60")
    for store in stores:
        machine.succeed(f"layered-stores status {store}")
        root = f"/srv/{store}/root/nix/store"
        mounts = machine.succeed("cat /proc/self/mounts")
        assert mounts.count(f" {root} overlay ") == 1, mounts
        uri = store_uri(store)
        # Nix does not sync what it has built before it calls it valid, in any store.
        said = machine.execute(f"nix-store --store {uri} --verify --check-contents 2>&1")[1]
        broken = re.findall(r"path '(\S+)' (?:was modified|disappeared)", said)
        assert all(any(name in path for name in lost) for path in broken), said
        # What was built before what it was built from.
        for path in sorted(broken, key=lambda path: path.endswith(".drv")):
            machine.succeed(f"nix-store --store {uri} --delete {path}")
        machine.succeed(f"nix-store --store {uri} --verify --check-contents")
        machine.succeed(f"layered-stores verify {store}")
        # Nobody holds the lock: it can be let go of and taken, and the store be built into.
        machine.succeed(f"layered-stores stop {store}", f"layered-stores start {store}")
        build(uri, "after-the-cut")
    machine.succeed("sync")
    t.assertEqual(machine.succeed("find /srv /var/lib/layered-stores -name '.*.new'"), "")
    for file in machine.succeed("find /var/lib/layered-stores -name '*.json'").split():
        record = json.loads(machine.succeed(f"cat {file}"))
        assert record["name"] in stores, record
    machine.fail("find /var/lib/layered-stores -name '*.unreadable' | grep .")
    t.assertEqual(machine.get_unit_property("layered-storesd.service", "NRestarts"), "0")


ci = store_uri("ci")
kept = build(ci, "kept")
machine.succeed("sync")

for synced in (True, False):
    with subtest(f"In the middle of a build, {'just after' if synced else 'without'} a sync"):
        done = build(ci, f"done-{synced}")
        # What the shell has built in: a builder has no PATH.
        script = "for i in 1 2 3 4 5 6 7 8 9; do echo a line of $i; done > $out; "
        script += "echo > /srv/signals/building; read line < /srv/signals/never"
        machine.succeed("rm -rf /srv/signals; mkdir /srv/signals; mkfifo /srv/signals/never")
        machine.succeed(
            "systemd-run --quiet -E PATH --collect --unit=build "
            + build_command(ci, f"unfinished-{synced}", script)
            + " --option extra-sandbox-paths /srv/signals"
        )
        machine.wait_for_file("/srv/signals/building", timeout=60)
        path = shlex.quote(derivation(f"unfinished-{synced}", script) + ".outPath")
        unfinished = machine.succeed(f"nix-instantiate --store dummy:// --eval --raw -E {path}")
        if synced:
            machine.succeed("sync")
        cut_power()
        all_is_well("ci", lost=() if synced else ("-done-False", "-unfinished-False"))
        machine.fail(f"nix-store --store {ci} --check-validity {unfinished}")
        machine.succeed(f"nix-store --store {ci} --check-validity {kept}")
        if synced:
            machine.succeed(f"nix-store --store {ci} --check-validity {done}")
        # What is left of it is garbage to Nix like any other, or built over.
        machine.succeed(build_command(ci, f"unfinished-{synced}", "echo finished > $out"), "sync")

with subtest("In the middle of a swap"):
    base = f"{'0' * 32}-shadowed"
    for layer in (f"{LOWER}/nix/store", UPPER):
        machine.succeed(f"mkdir -p {layer}/{base}; echo {layer} > {layer}/{base}/file")
    machine.succeed("layered-stores remount ci", f"grep -q {UPPER} {MERGED}/{base}/file", "sync")
    swaps = tuple(map(int, machine.succeed("uname -r").split(".")[:2])) >= (6, 5)
    machine.succeed(
        "systemd-run --quiet -E PATH --collect --unit=holder --service-type=exec "
        f"-p StandardInput=file:{MERGED}/{base}/file sleep infinity"
    )
    hold_at("umount2")
    machine.succeed(f"rm -r {UPPER}/{base}")
    machine.succeed("systemd-run --quiet -E PATH --collect --unit=asker layered-stores remount ci")
    if swaps:
        # The fresh mount lies beneath the old one, and both are of the same layers.
        twice = f"test $(grep -c ' {MERGED} ' /proc/self/mountinfo) = 2"
        machine.wait_until_succeeds(twice, timeout=60)
    cut_power()
    all_is_well("ci")
    # Lost or not, the removal is not half there.
    expected = UPPER if machine.execute(f"test -e {UPPER}/{base}")[0] == 0 else LOWER
    machine.succeed(f"grep -q {expected} {MERGED}/{base}/file")


def fill() -> list[str]:
    """Puts paths into the store, and onto the disk."""
    names = [f"filled{number}" for number in range(8)]
    machine.succeed(
        "layered-stores start ci",
        "mkdir -p /srv/fill",
        *(f"seq 100 > /srv/fill/{name}" for name in names),
    )
    files = " ".join(f"/srv/fill/{name}" for name in names)
    paths = machine.succeed(f"nix-store --store {ci} --add {files}").split()
    t.assertEqual(len(paths), len(names))
    machine.succeed("layered-stores stop ci", "sync")
    return paths


def valid(paths: list[str]) -> int:
    """How many of them Nix would use."""
    check = f"nix-store --store {ci} --check-validity --print-invalid {' '.join(paths)}"
    return len(paths) - len(machine.succeed(check).split())


def ends_half_removed(paths: list[str]) -> None:
    """A store of which something may be gone does not come up, until all of it is."""
    t.assertIn(
        "run `layered-stores remove-data ci` again", machine.fail("layered-stores start ci 2>&1")
    )
    machine.fail(f"grep ' {MERGED} ' /proc/self/mounts")
    machine.succeed("layered-stores remove-data --yes ci", "layered-stores start ci")


MARK = "/srv/ci/.upper.removing"
with subtest(
    "While what is in a store is removed: it comes up whole or empty, and not with a half"
):
    for call, path, number in (
        # Nobody knows yet whether the mark is on the disk; then it is; then half of the upper
        # layer is gone; then all of it, and nothing but the mark is left.
        ("fsync", MARK, 1),
        ("renameat2", "/srv/ci/root/nix", 1),
        ("unlinkat", UPPER, 5),
        ("unlinkat", "/srv/ci", 1),
    ):
        paths = fill()
        hold_at(call, path, number)
        machine.succeed(
            "systemd-run --quiet -E PATH --collect --unit=asker layered-stores remove-data --yes ci"
        )
        machine.wait_until_succeeds(
            f"test $(grep -c '{call}(' /run/traced) -ge {number}", timeout=60
        )
        # What would be there after a cut that comes later.
        machine.succeed("sync" if call == "unlinkat" else "true")
        cut_power()
        here = machine.succeed(f"find {UPPER} -maxdepth 1 -name '*-filled*' | wc -l").strip()
        machine.log(f"the power was cut at {call} of {path}: {here} of {len(paths)} are here")
        marked = machine.execute(f"test -e {MARK}")[0] == 0
        if call != "fsync":
            assert marked, (call, path)
        if path == UPPER:
            assert 0 < int(here) < len(paths), here
        if marked:
            ends_half_removed(paths)
        left = valid(paths)
        t.assertEqual(left, 0 if marked else len(paths), (call, path))
        all_is_well("ci")

with subtest("What was said to be removed is, and the store can be used"):
    paths = fill()
    machine.succeed("layered-stores remove-data --yes ci")
    cut_power()
    machine.succeed("layered-stores start ci")
    t.assertEqual(valid(paths), 0)
    all_is_well("ci")
    kept = build(ci, "kept")
    machine.succeed("sync")

with subtest("While a store is made, at every step that others could see"):
    for number, call in enumerate(("renameat2", "fsetxattr", "fsmount")):
        name = f"new{number}"
        hold_at(call)
        machine.succeed(
            f"cat >>{CONFIG} <<'END'\n[stores.{name}]\nlower-store = \"{LOWER}\"\n"
            f'root = "/srv/{name}/root"\nupper-layer = "/srv/{name}/upper"\n'
            f'work-dir = "/srv/{name}/work"\nEND',
            f"sync {CONFIG}",
            "systemd-run --quiet -E PATH --collect --unit=asker layered-stores reload",
        )
        machine.wait_until_succeeds(f"grep -q {call} /run/traced", timeout=60)
        machine.succeed("sync" if number % 2 == 0 else "true")
        cut_power()
        all_is_well("ci", *(f"new{known}" for known in range(number + 1)))
        machine.succeed(f"nix-store --store {ci} --check-validity {kept}")
