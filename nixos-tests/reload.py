# A new configuration is put in force as a whole or not at all, and only where it differs from the
# one before. Data is never deleted.

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

CONFIGURATION = "/etc/layered-stores/config.toml"
MANAGER = "org.layeredstores1 /org/layeredstores1 org.layeredstores1.Manager"
RELOAD = "layered-stores reload"


def store(name: str, directory: str = "", lower: str = "local", **more: str | bool) -> str:
    """The declaration of a store in a directory of its own."""
    place = directory or f"/srv/{name}"
    keys: dict[str, str | bool] = {
        "lower-store": lower,
        "root": f"{place}/root",
        "upper-layer": f"{place}/upper",
        "work-dir": f"{place}/work",
    }
    keys |= {key.replace("_", "-"): value for key, value in more.items()}
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    return "\n".join([f"[stores.{name}]", *lines, ""])


def configure(*stores: str) -> None:
    """Writes a configuration; it is not in force yet."""
    text = "\n".join(stores)
    machine.succeed(f"install -D -m 644 /dev/stdin {CONFIGURATION} <<'END'\n{text}\nEND")


def status(name: str) -> dict[str, object]:
    _, output = machine.execute(f"layered-stores status {name} --json")
    found: dict[str, object] = json.loads(output)
    return found


def problems_of(name: str) -> list[dict[str, str]]:
    found = status(name)["problems"]
    assert isinstance(found, list)
    return found


def status_between_tries(name: str) -> dict[str, object]:
    """The status of a store that cannot be stopped. Now and then that is tried again."""
    found: dict[str, object] = {}

    def is_active(_last: bool) -> bool:
        nonlocal found
        found = status(name)
        return found["state"] == "active"

    retry(is_active, 60)
    return found


def states() -> dict[str, str]:
    listed = json.loads(machine.succeed("layered-stores list --json"))
    return {row["name"]: row["state"] for row in listed}


def identity(name: str) -> str:
    """Differs once a store was unmounted, however briefly, or swapped."""
    unit = shlex.quote(str(status(name)["mount-unit"]))
    merged = status(name)["real-store-dir"]
    return machine.succeed(
        f"systemctl show -P InvocationID {unit}",
        f"findmnt --noheadings --output ID,MAJ:MIN {merged}",
    )


def is_immutable(directory: str) -> bool:
    return "i" in machine.succeed(f"lsattr -d {directory}").split()[0]


def add(name: str, content: str) -> str:
    """Adds a file to a store; returns the path."""
    uri = shlex.quote(machine.succeed(f"layered-stores uri {name}").strip())
    machine.succeed(f"echo '{content}' > /tmp/text")
    return machine.succeed(f"nix-store --store {uri} --add /tmp/text").strip()


@contextmanager
def signals() -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """Listens to the daemon's signals; what is yielded gives those of a name that have come."""
    machine.succeed(
        "rm -f /run/monitor; systemd-run --quiet -E PATH --unit=monitor "
        "-p StandardOutput=file:/run/monitor busctl --json=short monitor "
        "--match \"type='signal',path_namespace='/org/layeredstores1'\""
    )
    listens = "layered-stores remount kept; grep -q RefreshCount /run/monitor"
    machine.wait_until_succeeds(listens, timeout=60)

    def heard() -> list[dict[str, Any]]:
        # The last line may be half written.
        lines = machine.succeed("cat /run/monitor").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def refreshes_heard() -> int:
        of_kept = [s for s in heard() if s["path"] == "/org/layeredstores1/store/kept"]
        changes = [s["payload"]["data"][1] for s in of_kept if s["member"] == "PropertiesChanged"]
        counts = [change["RefreshCount"]["data"] for change in changes if "RefreshCount" in change]
        return max(counts, default=0)

    def named(member: str) -> list[dict[str, Any]]:
        # What came before is there once this one is.
        machine.succeed("layered-stores remount kept")
        made = int(str(status("kept")["refresh-count"]))
        retry(lambda _last: refreshes_heard() >= made, 60)
        return [signal for signal in heard() if signal["member"] == member]

    yield named
    machine.succeed("systemctl stop monitor")


machine.wait_for_unit("layered-storesd")
machine.wait_for_unit("multi-user.target")
t.assertEqual(states(), {"kept": "active"})
kept = identity("kept")

with subtest("However one asks for a reload, the new store is up when the answer comes"):
    stores = [store("kept")]
    ways = ("systemctl reload layered-storesd", RELOAD, f"busctl call {MANAGER} Reload")
    with signals() as named:
        for number, reload in enumerate(ways):
            stores.append(store(f"new-{number}"))
            configure(*stores)
            machine.succeed(reload)
            t.assertEqual(states()[f"new-{number}"], "active", reload)
        stores.append(store("new-3"))
        configure(*stores)
        machine.succeed("systemctl kill --signal=HUP layered-storesd")
        machine.wait_until_succeeds("layered-stores list | grep 'new-3 *active'", timeout=60)
        added = [signal["payload"]["data"][0] for signal in named("InterfacesAdded")]
    t.assertEqual(added, [f"/org/layeredstores1/store/new_2d{number}" for number in range(4)])
    t.assertEqual(identity("kept"), kept)
    machine.require_unit_state("layered-storesd")
    t.assertEqual(machine.get_unit_property("layered-storesd", "NRestarts"), "0")

with subtest("A store that is declared no more is stopped and forgotten, and its data stays"):
    path = add("new-0", "kept forever")
    unit = shlex.quote(str(status("new-0")["mount-unit"]))
    configure(*(stores[0], *stores[2:]))
    with signals() as named:
        machine.succeed(RELOAD)
        removed = [signal["payload"]["data"] for signal in named("InterfacesRemoved")]
    t.assertEqual(len(removed), 1)
    t.assertEqual(removed[0][0], "/org/layeredstores1/store/new_2d0")
    t.assertIn("org.layeredstores1.Store", removed[0][1])
    t.assertNotIn("new-0", states())
    machine.fail(f"busctl call {MANAGER} GetStore s new-0")
    machine.fail("mountpoint --quiet /srv/new-0/root/nix/store")
    machine.fail(f"systemctl is-active {unit}")
    machine.succeed(f"test -e /srv/new-0/upper/{path.removeprefix('/nix/store/')}")
    # As it was before there was a daemon: root may write again, or remove it all.
    t.assertFalse(is_immutable("/srv/new-0/root/nix/store"))
    machine.succeed("touch /srv/new-0/root/nix/store/x; rm /srv/new-0/root/nix/store/x")

with subtest("Declared again, it has all it had"):
    configure(*stores)
    machine.succeed(RELOAD)
    t.assertEqual(states()["new-0"], "active")
    t.assertEqual(machine.succeed(f"cat /srv/new-0/root{path}"), "kept forever\n")
    uri = shlex.quote(machine.succeed("layered-stores uri new-0").strip())
    machine.succeed(f"nix path-info --store {uri} {path}")

with subtest("A reload of the same configuration touches nothing"):

    def everything() -> tuple[list[dict[str, Any]], str]:
        found: list[dict[str, Any]] = json.loads(machine.succeed("layered-stores status --json"))
        for each in found:
            # The whole machine writes to that filesystem.
            each.pop("free-bytes")
        return found, machine.succeed("cat /proc/self/mountinfo")

    before = everything()
    machine.succeed(RELOAD, "systemctl reload layered-storesd")
    t.assertEqual(everything(), before)

with subtest("A change that does not concern the mount leaves it alone"):
    with signals() as named:
        configure(store("kept", lower="daemon", required=False, mode="0750"), *stores[1:])
        machine.succeed(RELOAD)
        changes = [signal["payload"]["data"][1] for signal in named("PropertiesChanged")]
    t.assertEqual(identity("kept"), kept)
    t.assertEqual(status("kept")["required"], False)
    t.assertEqual(status("kept")["lower-store"], "daemon")
    t.assertIn("lower-store=daemon&", str(status("kept")["store-uri"]))
    changed = [change for change in changes if "Required" in change]
    t.assertEqual([sorted(change) for change in changed], [["LowerStore", "Required", "StoreUri"]])
    # Whoever made the directories may have had reasons for their mode.
    t.assertEqual(machine.succeed("stat --format %a /srv/kept/upper").strip()[-3:], "755")

with subtest("A change of the layers restarts the store, and no other"):
    path = add("new-1", "in the first layer")
    others = identity("new-2"), identity("new-3"), kept
    # Its database stays with the upper layer that it knows.
    moved = store("new-1", upper_layer="/srv/new-1/moved", root="/srv/new-1/root-moved")
    configure(stores[0], stores[1], moved, *stores[3:])
    machine.succeed(RELOAD)
    t.assertEqual(states()["new-1"], "active")
    t.assertEqual(status("new-1")["upper-layer"], "/srv/new-1/moved")
    machine.fail(f"test -e /srv/new-1/root-moved{path}")
    machine.succeed(f"test -e /srv/new-1/upper/{path.removeprefix('/nix/store/')}")
    t.assertEqual((identity("new-2"), identity("new-3"), identity("kept")), others)
    configure(*stores)
    machine.succeed(RELOAD, f"grep first /srv/new-1/root{path}")

with subtest("A store that would not come up as it is declared now goes on as it was"):
    was = identity("new-1")
    for other, why in (
        ({"upper_layer": "/srv/new-1/uper"}, "/srv/new-1/uper is not the directory that"),
        ({"lower": "/srv/nowhere"}, "/srv/nowhere/nix/store is not there"),
    ):
        configure(stores[0], stores[1], store("new-1", **other), *stores[3:])
        for ask in (RELOAD, "layered-stores start new-1"):
            code, output = machine.execute(f"{ask} 2>&1")
            t.assertEqual(code, 3, output)
            t.assertIn("it goes on as it was", output)
            t.assertIn(why, output)
        t.assertEqual([problem["code"] for problem in problems_of("new-1")], ["not-applied"])
        t.assertEqual((identity("new-1"), states()["new-1"]), (was, "active"))
        machine.succeed(f"grep first /srv/new-1/root{path}", "layered-stores remount new-1")
    # What was missing is found.
    machine.succeed("mkdir -p /srv/nowhere/nix/store", "layered-stores start new-1")
    t.assertEqual((status("new-1")["lower-store"], problems_of("new-1")), ("/srv/nowhere", []))
    configure(*stores)
    machine.succeed(RELOAD, f"grep first /srv/new-1/root{path}")

with subtest("A changed root moves the mount, and gives the old mount point back"):
    configure(stores[0], stores[1], store("new-1", root="/srv/new-1/elsewhere"), *stores[3:])
    said = machine.fail(f"{RELOAD} 2>&1")
    t.assertIn("/srv/new-1/elsewhere/nix/var/nix does not have the database that knows of it", said)
    machine.fail("test -e /srv/new-1/elsewhere")
    machine.succeed(
        "layered-stores stop new-1",
        "mkdir -p /srv/new-1/elsewhere/nix && mv /srv/new-1/root/nix/var /srv/new-1/elsewhere/nix/",
        f"layered-stores start new-1 && grep first /srv/new-1/elsewhere{path}",
        f"nix-store --store $(layered-stores uri new-1) --check-validity {path}",
    )
    machine.fail("mountpoint --quiet /srv/new-1/root/nix/store")
    t.assertFalse(is_immutable("/srv/new-1/root/nix/store"))
    elsewhere = machine.succeed(
        f"busctl --json=short call {MANAGER} GetStoreByPath s /srv/new-1/elsewhere/nix/store"
    )
    t.assertEqual(json.loads(elsewhere)["data"], ["/org/layeredstores1/store/new_2d1"])
    machine.fail(f"busctl call {MANAGER} GetStoreByPath s /srv/new-1/root/nix/store")
    machine.succeed(
        "layered-stores stop new-1; mv /srv/new-1/elsewhere/nix/var /srv/new-1/root/nix/"
    )
    configure(*stores)
    machine.succeed(RELOAD, "layered-stores start new-1", f"grep first /srv/new-1/root{path}")

with subtest("A wrong configuration is refused as a whole, and everything stays as it is"):
    before = everything()
    # Two mistakes, and three changes that would be fine.
    configure(store("kept", uper_layer="/x"), store("new-9"), store("new-1", mode="0777"))
    for reload in (RELOAD, f"busctl call {MANAGER} Reload"):
        said = machine.fail(f"{reload} 2>&1")
        for mistake in (
            rf'{CONFIGURATION}:\d+:1: store "kept": unknown key "uper-layer"; did you mean',
            rf'{CONFIGURATION}:\d+:8: store "new-1": mode = "0777": everybody could write',
        ):
            t.assertRegex(said, mistake)
    said = machine.fail(f"SYSTEMD_LOG_LEVEL=debug busctl call {MANAGER} Reload 2>&1")
    t.assertIn("error-name=org.layeredstores1.Error.InvalidConfiguration", said)
    t.assertEqual(everything(), before)

with subtest("systemd's reload says so in the journal and the status, and the service stays up"):
    machine.succeed("systemctl reload layered-storesd")
    machine.require_unit_state("layered-storesd")
    t.assertEqual(machine.get_unit_property("layered-storesd", "SubState"), "running")
    t.assertIn("uper-layer", machine.get_unit_property("layered-storesd", "StatusText"))
    machine.succeed("journalctl --sync")
    errors = machine.succeed("journalctl --boot --output=cat --priority=err -u layered-storesd")
    t.assertIn('unknown key "uper-layer"; did you mean "upper-layer"?', errors)
    t.assertEqual(everything(), before)
    for broken in ("[stores.kept", "stores = 1", "[stores.kept]\nlower-store = 'ssh://x'"):
        configure(broken)
        machine.fail(RELOAD)
    machine.succeed(f"rm {CONFIGURATION}; mkdir {CONFIGURATION}")
    t.assertIn(f"cannot read {CONFIGURATION}", machine.fail(f"{RELOAD} 2>&1"))
    t.assertEqual(everything(), before)
    machine.succeed(f"rmdir {CONFIGURATION}")
    configure(*stores)
    machine.succeed(RELOAD)
    # Who waits is answered first.
    machine.wait_until_fails("systemctl show -P StatusText layered-storesd | grep uper-layer", 60)

with subtest("A store in use that is declared no more stays until it is free"):
    # Not with WorkingDirectory=, which would have systemd stop the service for the mount to go.
    squat = (
        "systemd-run --quiet -E PATH --unit=squatter --service-type=notify "
        "-p NotifyAccess=all /bin/sh -c "
        "'cd /srv/new-2/root/nix/store; systemd-notify --ready --pid=parent; exec sleep infinity'"
    )
    machine.succeed(squat)
    pid = machine.succeed("systemctl show -P MainPID squatter").strip()
    machine.wait_until_succeeds(f"grep -x sleep /proc/{pid}/comm", timeout=60)
    mount = identity("new-2")
    configure(*stores[:3], stores[4])
    machine.succeed(RELOAD, timeout=60)
    found = status_between_tries("new-2")
    t.assertEqual((found["state"], found["declared"]), ("active", False))
    problems = json.dumps(found["problems"])
    t.assertIn('"code": "busy"', problems)
    said = machine.fail(f"layered-stores start {found['name']} 2>&1")
    t.assertIn("it is declared no more, and is being taken down; declare it again", said)
    t.assertIn(f"sleep (pid {pid})", problems)
    t.assertEqual(machine.execute("layered-stores status new-2")[0], 3)
    t.assertEqual(identity("new-2"), mount)
    machine.succeed("systemctl stop squatter")
    machine.wait_until_fails("layered-stores uri new-2", timeout=120)
    t.assertNotIn("new-2", states())
    machine.fail("mountpoint --quiet /srv/new-2/root/nix/store")
    machine.succeed("test -d /srv/new-2/upper")

with subtest("Declared again while it is in use, it is as if nothing had been"):
    configure(*stores)
    machine.succeed(RELOAD, squat)
    mount = identity("new-2")
    configure(*stores[:3], stores[4])
    machine.succeed(RELOAD, timeout=60)
    t.assertEqual(status("new-2")["declared"], False)
    configure(*stores)
    machine.succeed(RELOAD, timeout=60)
    found = status("new-2")
    t.assertEqual((found["state"], found["declared"], found["problems"]), ("active", True, []))
    t.assertEqual(identity("new-2"), mount)
    machine.succeed("layered-stores status new-2")

with subtest("A store in use whose layers change waits for its turn as well"):
    configure(*stores[:3], store("new-2", upper_layer="/srv/new-2/moved"), stores[4])
    machine.succeed(RELOAD, timeout=60)
    found = status_between_tries("new-2")
    t.assertEqual((found["state"], found["upper-layer"]), ("active", "/srv/new-2/upper"))
    t.assertIn(
        f"sleep (pid {machine.succeed('systemctl show -P MainPID squatter').strip()})",
        json.dumps(found["problems"]),
    )
    machine.succeed("systemctl stop squatter")
    machine.wait_until_succeeds(
        'layered-stores status new-2 --json | grep \'"upper-layer": "/srv/new-2/moved"\'',
        timeout=120,
    )
    machine.succeed("layered-stores wait new-2 --timeout 60", "layered-stores status new-2")
    configure(*stores)
    machine.succeed(RELOAD)

with subtest("What was stopped by hand stays so"):
    machine.succeed("layered-stores stop new-3")
    machine.succeed(RELOAD)
    t.assertEqual(states()["new-3"], "inactive")
    configure(*stores[:4], store("new-3", required=False))
    machine.succeed(RELOAD)
    t.assertEqual(states()["new-3"], "inactive")
    machine.succeed("layered-stores start new-3")

with subtest("A store without autostart is declared, and started by hand"):
    by_hand = store("by-hand", autostart=False)
    configure(*stores, by_hand)
    machine.succeed(RELOAD)
    t.assertEqual(states()["by-hand"], "inactive")
    machine.fail("test -e /srv/by-hand")
    machine.succeed("layered-stores start by-hand", RELOAD)
    t.assertEqual(states()["by-hand"], "active")

with subtest("What was started or stopped by hand stays so when the daemon is started again"):
    for restart in (
        "systemctl restart layered-storesd",
        "systemctl kill --signal=KILL layered-storesd",
    ):
        machine.succeed(restart)
        machine.wait_until_succeeds(
            "systemctl is-active --quiet layered-storesd && layered-stores list"
        )
        machine.wait_until_succeeds("layered-stores list | grep 'by-hand *active'")
    machine.succeed("layered-stores stop by-hand new-3", "systemctl restart layered-storesd")
    for name in ("by-hand", "new-3"):
        t.assertEqual(states()[name], "inactive")
    machine.succeed("layered-stores start by-hand new-3")

with subtest("A store that failed is tried again"):
    configure(*stores, store("late", lower="/srv/late-lower"))
    code, output = machine.execute(f"{RELOAD} 2>&1")
    t.assertEqual(code, 3)
    t.assertIn('store "late" is failed: lower-store: /srv/late-lower', output)
    t.assertEqual(states()["late"], "failed")
    machine.succeed("mkdir -p /srv/late-lower/nix/store", RELOAD)
    t.assertEqual(states()["late"], "active")

with subtest("A store that gets another name keeps its directories and what is in them"):
    path = add("late", "under another name")
    configure(*stores, store("renamed", directory="/srv/late", lower="/srv/late-lower"))
    machine.succeed(RELOAD, "layered-stores wait renamed --timeout 60")
    t.assertNotIn("late", states())
    machine.succeed(f"grep another /srv/late/root{path}", "layered-stores status renamed")

with subtest("Two stores trade their directories"):
    one, two = add("new-1", "one"), add("new-2", "two")
    theirs = [store("new-1", directory="/srv/new-2"), store("new-2", directory="/srv/new-1")]
    configure(*stores[:2], *theirs, stores[4])
    machine.succeed(RELOAD, "layered-stores wait new-1 new-2 --timeout 60")
    machine.succeed(f"grep two /srv/new-2/root{two}", f"grep one /srv/new-1/root{one}")
    t.assertEqual(status("new-1")["upper-layer"], "/srv/new-2/upper")
    machine.succeed("layered-stores status")
    configure(*stores)
    machine.succeed(RELOAD, "layered-stores wait new-1 new-2 --timeout 60")
    machine.succeed(f"grep one /srv/new-1/root{one}")

with subtest("What was changed while the daemon was stopped is found when it starts"):
    machine.succeed("systemctl stop layered-storesd")
    configure(stores[0], moved, *stores[3:])
    machine.succeed("mountpoint --quiet /srv/new-0/root/nix/store")
    machine.succeed("systemctl start layered-storesd")
    machine.succeed("layered-stores wait new-1 kept new-2 new-3 --timeout 60")
    t.assertEqual(states(), dict.fromkeys(["kept", "new-1", "new-2", "new-3"], "active"))
    t.assertEqual(status("new-1")["upper-layer"], "/srv/new-1/moved")
    machine.fail("mountpoint --quiet /srv/new-0/root/nix/store")
    t.assertFalse(is_immutable("/srv/new-0/root/nix/store"))
    machine.succeed("test -d /srv/new-0/upper")
    t.assertEqual(identity("kept"), kept)

with subtest("With no configuration at all there are no stores, and the daemon runs"):
    machine.succeed(f"rm {CONFIGURATION}", RELOAD)
    t.assertEqual(states(), {})
    machine.require_unit_state("layered-storesd")
    t.assertNotIn("/srv/", machine.succeed("cat /proc/mounts"))
    t.assertIn("No stores are declared", machine.succeed("layered-stores status"))
    machine.succeed("systemctl restart layered-storesd", "layered-stores list")
    configure(*stores)
    machine.succeed(RELOAD)
    t.assertEqual(states()["kept"], "active")
