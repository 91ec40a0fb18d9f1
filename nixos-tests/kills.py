# The daemon dies, is stopped and is started again, while hooks come all the time. Nix cannot try
# again, so no hook may fail for it; and however many hooks come, the daemon gets ready.
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

STORES = "/var/lib/layered-stores/stores"
MERGED = f"{STORES}/ci/root/nix/store"
HERS = f"{STORES}/hers/root/nix/store"
DAEMON_SOCKET = "layered-stores-nix-daemon@ci.socket"

# How soon the daemon is there again at the latest, whatever else the machine has to do; and in the
# middle of several times, where instructions are not emulated. Without load it takes a fifth of a
# second.
SOON = 45
MOSTLY = 2

# Calls the hook without a pause until it is told to end, and says how often, how it failed, and how
# long the longest call took.
CALLER = """
import json, os, subprocess, sys, time
calls, failures, longest = 0, [], 0.0
while not os.path.exists("/run/enough"):
    began = time.monotonic()
    hook = subprocess.run(["layered-stores-remount", sys.argv[1]], capture_output=True, text=True)
    longest = max(longest, time.monotonic() - began)
    calls += 1
    # A hook that did without the daemon has something to say.
    if hook.returncode or hook.stderr:
        failures.append(hook.stderr)
print(json.dumps({"calls": calls, "failures": failures, "longest": longest}))
"""
# Ten times a second, for ten seconds; on a slow machine for as long as that takes, but not for so
# long that hooks give up, which is a minute.
KILLER = """
import subprocess, time
kill = "systemctl kill --signal=KILL --kill-whom=main layered-storesd".split()
began = time.monotonic()
for number in range(100):
    if time.monotonic() > began + 30:
        break
    time.sleep(max(0, began + number / 10 - time.monotonic()))
    subprocess.run(kill, stderr=subprocess.DEVNULL)
"""
# By whom, for which store, and whether they find the hook's socket. Who does not asks over the bus.
CALLERS = {
    "caller-1": ("root", MERGED, True),
    "caller-2": ("root", MERGED, True),
    "caller-3": ("root", HERS, True),
    "caller-4": ("alice", HERS, True),
    "caller-5": ("root", MERGED, False),
}


def wait_until_ready(timeout: int = SOON) -> None:
    machine.wait_until_succeeds(
        "systemctl show -P ActiveState layered-storesd | grep -x active", timeout=timeout
    )


def are_quick(took: list[float], what: str) -> None:
    """That it mostly takes a moment."""
    median = statistics.median(took)
    machine.log(f"{what}: {median:.2f} s in the middle, {max(took):.2f} s at most")
    # With KVM this is another word.
    if machine.execute("systemd-detect-virt")[1].strip() != "qemu":
        t.assertLess(median, MOSTLY, f"{what}: {took}")


@contextmanager
def stream_of_hooks() -> Iterator[None]:
    """Hooks come all the while, and none of them fails."""
    machine.succeed("rm -f /run/enough")
    for name, (user, merged, finds_socket) in CALLERS.items():
        hidden = "" if finds_socket else "-p InaccessiblePaths=/run/layered-stores "
        machine.succeed(
            f"systemd-run --quiet --unit={name} --uid={user} -p RemainAfterExit=yes {hidden}"
            f"-p StandardOutput=truncate:/run/{name}.said "
            f'--setenv=PATH="$PATH" python3 /srv/caller.py {merged}'
        )
    yield
    machine.succeed("touch /run/enough")
    for name in CALLERS:
        ended = f"systemctl show -P SubState {name} | grep -E 'exited|failed'"
        machine.wait_until_succeeds(ended, timeout=90)
        said = json.loads(machine.succeed(f"cat /run/{name}.said; systemctl stop {name}"))
        machine.log(f"{name}: {said}")
        t.assertEqual(said["failures"], [], name)
        t.assertGreater(said["calls"], 0, name)


machine.wait_for_unit("layered-storesd.service")
for name, script in (("caller", CALLER), ("killer", KILLER)):
    machine.succeed(f"cat > /srv/{name}.py << 'END'\n{script}END\n")
machine.succeed(f"layered-stores-remount {MERGED}")

with subtest("A daemon that a hook has started gets ready"):
    for _ in range(10):
        machine.succeed(f"systemctl stop layered-storesd; layered-stores-remount {MERGED}")
        wait_until_ready()
        machine.require_unit_state(DAEMON_SOCKET)

with subtest("A restart under a stream of hooks is quick, and so is a reload"), stream_of_hooks():
    took: dict[str, list[float]] = {"restart": [], "reload": []}
    for verb in ("restart", "reload") * 5:
        began = time.monotonic()
        machine.succeed(f"systemctl {verb} layered-storesd", timeout=60)
        took[verb].append(time.monotonic() - began)
        t.assertLess(took[verb][-1], SOON, verb)
        machine.require_unit_state(DAEMON_SOCKET)
    for verb, times in took.items():
        are_quick(times, verb)

with (
    subtest("Killed under a stream of hooks it is back at once, and no hook fails"),
    stream_of_hooks(),
):
    ready: list[float] = []
    for _ in range(10):
        pid = machine.get_unit_property("layered-storesd", "MainPID")
        # By the machine's own clock, as systemd has it.
        killed = machine.succeed(
            "python3 -c 'import time; print(time.monotonic())'; "
            "systemctl kill --signal=KILL --kill-whom=main layered-storesd"
        )
        machine.wait_until_succeeds(
            "pid=$(systemctl show -P MainPID layered-storesd); "
            f"test $pid != 0 && test $pid != {pid} "
            "&& systemctl is-active --quiet layered-storesd",
            timeout=SOON,
        )
        active = machine.get_unit_property("layered-storesd", "ActiveEnterTimestampMonotonic")
        ready.append(int(active) / 1_000_000 - float(killed))
    are_quick(ready, "ready again")

with subtest("Killed ten times a second under a stream of hooks, and no hook fails"):
    restarts = int(machine.get_unit_property("layered-storesd", "NRestarts"))
    with stream_of_hooks():
        machine.succeed("python3 /srv/killer.py")
        wait_until_ready()
    after = int(machine.get_unit_property("layered-storesd", "NRestarts"))
    machine.log(f"the daemon was started {after - restarts} times again")
    t.assertGreater(after - restarts, 10)
    machine.succeed("layered-stores status", "layered-stores verify ci")

with subtest("A hook whose answer is lost waits for the next daemon, also if it cannot start one"):
    drop_ins = "/run/systemd/system/layered-storesd.service.d"
    machine.succeed(
        f"mkdir -p {drop_ins}; printf '[Service]\\nRestart=no\\n' >{drop_ins}/test.conf",
        "systemctl daemon-reload",
        "systemctl kill --signal=STOP --kill-whom=main layered-storesd",
        "systemd-run --quiet --unit=waiting -p RemainAfterExit=yes "
        "-p InaccessiblePaths=/run/dbus "
        f'--setenv=PATH="$PATH" layered-stores-remount {MERGED}',
    )
    # Until it is in the queue of the daemon's socket: that is bound elsewhere, in a network of the
    # daemon's own, and only who connects to it is seen here.
    machine.wait_until_succeeds(
        "grep ' /run/layered-stores/org.layeredstores1$' /proc/net/unix", timeout=60
    )
    # Its socket goes with it. Without the bus, only the next one brings another.
    machine.succeed(
        "systemctl kill --signal=KILL --kill-whom=main layered-storesd; "
        "until systemctl is-failed --quiet layered-storesd; do sleep 0.02; done; "
        "systemctl start layered-storesd",
        timeout=60,
    )
    ended = "systemctl show -P SubState waiting | grep -E 'exited|failed'"
    machine.wait_until_succeeds(ended, timeout=90)
    said = machine.succeed(
        "journalctl --sync",
        "journalctl --quiet -o cat -u waiting | grep layered-stores-remount: || true",
    )
    t.assertEqual((machine.get_unit_property("waiting", "ExecMainStatus"), said), ("0", ""))
    machine.succeed(f"rm {drop_ins}/test.conf; systemctl daemon-reload; systemctl stop waiting")

with subtest("A hook says clearly what it cannot use"):
    code, said = machine.execute("layered-stores-remount $'/srv/\\xff' 2>&1")
    t.assertEqual(code, 2, said)
    t.assertIn("is not UTF-8", said)
    t.assertIn("\\xFF", said)
