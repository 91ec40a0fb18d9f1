# Everybody may look. Root may do everything, the owner of a store may have it remounted, and beyond
# that polkit decides. What nobody has thought about is refused by the bus itself.
import json
import shlex
import time
from typing import Any

LOWER = "/srv/base"
MERGED = "/srv/ci/root/nix/store"
MANAGER = "org.layeredstores1 /org/layeredstores1 org.layeredstores1.Manager"
STORE = "org.layeredstores1 /org/layeredstores1/store/ci org.layeredstores1.Store"
PROPERTIES = "org.layeredstores1 /org/layeredstores1/store/ci org.freedesktop.DBus.Properties"
ACTIONS = ["reload", "remount", "remove-data", "start", "stop", "verify"]
RULES = "/run/polkit-1/rules.d"


def by(user: str, command: str) -> str:
    """The command, run by that user."""
    return f"runuser -u {user} -- {command}"


def refused(user: str, command: str) -> str:
    """Has a user try something that must fail with 1; returns what is said about it."""
    code, output = machine.execute(by(user, command) + " 2>&1")
    assert code == 1, (command, code, output)
    # One line for people, without the names that errors have for programs.
    assert len(output.strip().splitlines()) == 1, output
    assert "org.freedesktop" not in output, output
    return output


def status(name: str) -> dict[str, Any]:
    properties: dict[str, Any] = json.loads(machine.succeed(f"layered-stores status {name} --json"))
    return properties


def everything() -> tuple[str, list[dict[str, Any]]]:
    """What would show that somebody got through: mounts, and all that is known of all stores."""
    mounts = machine.succeed("grep ' /srv/.*/nix/store ' /proc/self/mountinfo")
    stores: list[dict[str, Any]] = json.loads(machine.succeed("layered-stores status --json"))
    for store in stores:
        # The whole machine writes to that filesystem.
        store.pop("free-bytes")
    return mounts, stores


machine.wait_for_unit("layered-storesd.service")
machine.succeed(f"mkdir -p {LOWER}/nix/store", "layered-stores start ci hers his")

with subtest("polkit knows the actions, and asks for an administrator unless told otherwise"):
    for action in ACTIONS:
        known = machine.succeed(f"pkaction --verbose --action-id org.layeredstores1.{action}")
        for line in ["implicit any:      auth_admin", "implicit inactive: auth_admin"]:
            assert line in known, known
        # What cannot be brought back is asked about each time.
        keeps = "auth_admin" if action == "remove-data" else "auth_admin_keep"
        assert f"implicit active:   {keeps}\n" in known, known

with subtest("A user without any rights may look at everything"):
    for command in [
        "layered-stores list",
        "layered-stores status",
        "layered-stores status ci",
        "layered-stores status ci --json",
        "layered-stores uri ci",
    ]:
        assert "ci" in machine.succeed(by("alice", command))
    for command, answer in {
        f"busctl call {MANAGER} ListStores": '"ci" "active" "/org/layeredstores1/store/ci"',
        f"busctl call {MANAGER} GetStore s ci": 'o "/org/layeredstores1/store/ci"',
        f"busctl call {MANAGER} GetStoreByPath s {MERGED}": 'o "/org/layeredstores1/store/ci"',
        f"busctl get-property {MANAGER} Version": "s ",
        f"busctl get-property {STORE} State": 's "active"',
        f"busctl call {PROPERTIES} GetAll s org.layeredstores1.Store": "StoreUri",
        f"busctl introspect {STORE}": ".Remount",
        "busctl tree org.layeredstores1": "/org/layeredstores1/store/hers",
        "busctl call org.layeredstores1 /org/layeredstores1 "
        "org.freedesktop.DBus.ObjectManager GetManagedObjects": "LowerStoreDir",
    }.items():
        output = machine.succeed(by("alice", command))
        assert answer in output, (command, output)

with subtest("And hears of changes"):
    machine.succeed(
        "systemd-run --quiet -E PATH --uid=alice --unit=listener --property=RemainAfterExit=yes "
        "busctl wait /org/layeredstores1/store/ci org.freedesktop.DBus.Properties PropertiesChanged"
    )
    machine.wait_until_succeeds(
        "layered-stores remount ci; test $(systemctl show -P SubState listener) = exited",
        timeout=20,
    )
    # The journal may be behind.
    machine.succeed("journalctl --sync; journalctl --unit=listener | grep RefreshCount")

with subtest("But may change nothing, and is told which permission that takes"):
    before = everything()
    for action in ["start", "stop", "remount", "verify"]:
        output = refused("alice", f"layered-stores {action} ci")
        said = f'layered-stores: org.layeredstores1.{action} on store "ci" '
        assert output.startswith(said), output
        assert "root" in output, output
    output = refused("alice", "layered-stores reload")
    assert output.startswith("layered-stores: org.layeredstores1.reload is refused: "), output
    # Nor is it of use to own another store.
    output = refused("bob", "layered-stores remount hers")
    assert 'org.layeredstores1.remount on store "hers"' in output, output
    # An action on several stores is refused for each.
    code, output = machine.execute(by("alice", "layered-stores stop ci his hers 2>&1"))
    assert (code, output.count("org.layeredstores1.stop on store")) == (1, 3), output
    assert everything() == before

with subtest("Programs get errors with names"):
    before = everything()
    calls = {
        f"{STORE} {action.title()}": action for action in ["start", "stop", "remount", "verify"]
    }
    calls |= {f"{MANAGER} Reload": "reload", f"{MANAGER} Remount s {MERGED}": "remount"}
    for call, action in calls.items():
        # Whoever can show a question is asked by polkit; there is no agent here that would.
        output = machine.fail(by("alice", f"busctl call {call} 2>&1"))
        assert "Access denied" in output, output
        output = machine.fail(
            by("alice", f"busctl --allow-interactive-authorization=no call {call} 2>&1")
        )
        assert f"org.layeredstores1.{action}" in output, output
        destination, path, interface, *rest = call.split()
        member, arguments = rest[0], "".join(f" string:{a}" for a in rest[2:])
        output = machine.fail(
            by(
                "alice",
                f"dbus-send --system --print-reply --dest={destination} {path} "
                f"{interface}.{member}{arguments} 2>&1",
            )
        )
        name = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"
        assert f"Error {name}: org.layeredstores1.{action}" in output, output
    assert everything() == before

with subtest("The bus refuses what is not on the list, and nobody else gets the name"):
    before = everything()
    for call in [
        f"{PROPERTIES} Set ssv org.layeredstores1.Store State s failed",
        f"{STORE} Destroy",
        f"{MANAGER} Destroy",
        "org.layeredstores1 /org/layeredstores1 org.freedesktop.DBus.Peer Destroy",
    ]:
        machine.fail(by("alice", f"busctl call {call}"))
        # The daemon was not even asked: the bus answers in its place, with its own words.
        destination, path, interface, member = call.split()[:4]
        output = machine.fail(
            by(
                "alice",
                f"dbus-send --system --print-reply --dest={destination} {path} "
                f"{interface}.{member} 2>&1",
            )
        )
        assert "org.freedesktop.DBus.Error.AccessDenied" in output, output
    bus = "org.freedesktop.DBus /org/freedesktop/DBus org.freedesktop.DBus"
    request = f"busctl call {bus} RequestName su "
    machine.fail(by("alice", f"{request} org.layeredstores1 0"))
    machine.succeed("systemctl stop layered-storesd")
    machine.fail(by("alice", f"{request} org.layeredstores1 0"))
    machine.succeed("systemctl start layered-storesd")
    # Root is let through and learns that a property cannot be set.
    machine.fail(f"busctl call {PROPERTIES} Set ssv org.layeredstores1.Store State s failed")
    assert status("ci")["state"] == "active"

with subtest("The owner may remount her store, in every way there is, and nothing else"):
    machine.succeed("test $(stat -c %U /srv/hers/upper) = alice")
    hers = "/srv/hers/root/nix/store"
    # Sees to all that is to be seen to, so that from here on only who asks is counted.
    machine.succeed("layered-stores remount hers")
    for command in [
        "layered-stores remount hers",
        f"layered-stores-remount {hers}",
        f"busctl call {MANAGER} Remount s {hers}",
        "busctl call org.layeredstores1 /org/layeredstores1/store/hers "
        "org.layeredstores1.Store Remount",
    ]:
        count = status("hers")["refresh-count"]
        machine.succeed(by("alice", command))
        assert status("hers")["refresh-count"] == count + 1, command
    for action in ["start", "stop", "verify"]:
        output = refused("alice", f"layered-stores {action} hers")
        assert f'org.layeredstores1.{action} on store "hers"' in output, output
    assert status("hers")["state"] == "active"

with subtest("Nix's hook, started by somebody who may not, says who could"):
    before = everything()
    output = refused("alice", f"layered-stores-remount {MERGED}")
    said = 'layered-stores-remount: org.layeredstores1.remount on store "ci" '
    assert output.startswith(said), output
    output = refused("alice", "layered-stores-remount /srv/nowhere")
    assert "/srv/nowhere" in output, output
    assert everything() == before

with subtest("Somebody who keeps the daemon's socket busy keeps nobody from remounting"):
    # Each of these connects and then says nothing. Alice owns a store, so she is listened to.
    silent = "strace -f -qq -o /dev/null -e trace=write,sendto"
    silent += " -e inject=write,sendto:delay_enter=100s"
    hook = f"{silent} layered-stores-remount {MERGED}"
    machine.succeed(
        "systemd-run --quiet --unit=crowd --uid=alice --setenv=PATH=$PATH sh -c "
        + shlex.quote(f"for _ in $(seq 100); do {hook} & done; wait")
    )
    # Until none of them takes time any more: each was stopped before its first word.
    machine.wait_until_succeeds(
        "test $(ps -u alice -o stat=,comm= | grep -c '^t.* layered-stores') = 100", timeout=120
    )
    for user, directory in [("root", MERGED), ("bob", "/srv/his/root/nix/store")]:
        began = time.monotonic()
        machine.succeed(by(user, f"layered-stores-remount {directory}"), timeout=30)
        took = time.monotonic() - began
        # One that is silent is listened to for 5 s.
        assert took < 4, (user, took)
    machine.succeed("systemctl kill --signal=KILL crowd")

with subtest("An administrator lets a user remount a store, and the daemon need not be told"):
    pid = machine.get_unit_property("layered-storesd.service", "MainPID")
    rule = (
        "polkit.addRule(function(action, subject) {\n"
        '  if (action.id == "org.layeredstores1.remount" && action.lookup("store") == "ci" &&\n'
        '      subject.user == "alice") return polkit.Result.YES;\n'
        "});"
    )
    machine.succeed(
        f"mkdir -p {RULES}",
        f"cat >{RULES}/10-alice.rules <<'END'\n{rule}\nEND",
        # polkit itself looks into this directory only if it was there when it started.
        "systemctl restart polkit",
    )
    machine.succeed("layered-stores remount ci")
    count = status("ci")["refresh-count"]
    machine.succeed(
        by("alice", "layered-stores remount ci"), by("alice", f"layered-stores-remount {MERGED}")
    )
    assert status("ci")["refresh-count"] == count + 2
    # That, and no more.
    for command in ["stop ci", "verify ci", "remount his", "reload"]:
        refused("alice", f"layered-stores {command}")
    refused("bob", "layered-stores remount ci")
    machine.succeed(f"rm {RULES}/10-alice.rules")
    machine.wait_until_fails(by("alice", "layered-stores remount ci"), timeout=60)
    assert machine.get_unit_property("layered-storesd.service", "MainPID") == pid

with subtest("Without polkit, root and owners do what they may, and everybody else is refused"):
    # The bus would start it again for whoever asks, were its unit not spoilt.
    machine.succeed(
        "mkdir -p /run/systemd/system/polkit.service.d",
        "printf '[Service]\\nExecStart=\\n' >/run/systemd/system/polkit.service.d/test.conf",
        "systemctl daemon-reload && systemctl stop polkit",
    )
    machine.succeed(
        "layered-stores stop ci",
        "layered-stores start ci",
        "layered-stores remount ci",
        "layered-stores verify ci",
        "layered-stores reload",
        by("alice", "layered-stores remount hers"),
        by("alice", "layered-stores status"),
    )
    output = refused("alice", "layered-stores stop ci")
    assert 'org.layeredstores1.stop on store "ci" is refused: polkit cannot be asked' in output
    assert status("ci")["state"] == "active"
