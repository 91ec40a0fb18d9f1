# The owner of a store has it refreshed as often as they can. Each swap makes a superblock in the
# kernel, so there is a limit; an honest garbage collection never notices it, and nobody else
# notices who does.
import json
import time

STORES = "/var/lib/layered-stores/stores"
MERGED = f"{STORES}/ci/root/nix/store"
HERS = f"{STORES}/hers/root/nix/store"
UPPER = f"{STORES}/hers/upper"

# As many swaps as there may be at once, and how long it takes until there may be another one.
AT_ONCE = 8
APART = 10
# How many superblocks may be held open.
HELD = 32

# Holds a file of a path that is taken away from the upper layer, where only a swap helps, and calls
# the hook; again and again, and keeps the files. Says how often that was, and what the hook said.
SWAPPER = f"""
import json, os, subprocess, sys, time
end, rounds, said, held = time.monotonic() + 12, 0, [], []
while time.monotonic() < end:
    name = f"{{rounds:032d}}-{{sys.argv[1]}}"
    os.mkdir(f"{HERS}/{{name}}")
    open(f"{HERS}/{{name}}/file", "w").close()
    held = [*held[-500:], open(f"{HERS}/{{name}}/file")]
    os.unlink(f"{UPPER}/{{name}}/file")
    os.rmdir(f"{UPPER}/{{name}}")
    rounds += 1
    if sys.argv[2] == "hook":
        hook = subprocess.run(["layered-stores-remount", "{HERS}"], capture_output=True, text=True)
        if hook.returncode or hook.stderr:
            said.append(hook.stderr)
        if os.path.exists(f"{HERS}/{{name}}"):
            said.append(f"{{name}} is there still")
    if sys.argv[2] == "once":
        hook = subprocess.run(["layered-stores-remount", "{HERS}"], capture_output=True, text=True)
        said.append(hook.stderr)
        break
print(json.dumps([rounds, said]))
"""
# Has root swap the store again and again, and holds a file of each.
HOLDER = f"""
import os, subprocess, time
held = []
for number in range({HELD}):
    name = f"{{number:032d}}-root"
    os.mkdir(f"{HERS}/{{name}}")
    open(f"{HERS}/{{name}}/file", "w").close()
    held.append(open(f"{HERS}/{{name}}/file"))
    os.unlink(f"{UPPER}/{{name}}/file")
    os.rmdir(f"{UPPER}/{{name}}")
    subprocess.run(["layered-stores-remount", "{HERS}"], check=True)
subprocess.run(["systemd-notify", "--ready", f"--pid={{os.getpid()}}"], check=True)
time.sleep(1000)
"""
# Makes any number of names, as long as names can be.
NAMER = f"""
import os
for number in range(100_000):
    os.symlink("x", f"{UPPER}/{{number:032d}}-{{'x' * 222}}")
"""
# Calls the hook without a pause.
CALLER = f"""
import subprocess, time
end = time.monotonic() + 8
while time.monotonic() < end:
    subprocess.run(["layered-stores-remount", "{HERS}"], check=True)
"""


def count(key: str, store: str = "hers") -> int:
    _, output = machine.execute(f"layered-stores status {store} --json")
    return int(json.loads(output)[key])


def lines() -> int:
    """How many lines the daemon has written into the journal."""
    return int(machine.succeed("journalctl --unit=layered-storesd --output=cat | wc -l"))


def by_alice(unit: str, script: str, *arguments: str) -> None:
    machine.succeed(
        f"systemd-run --quiet --unit={unit} --uid=alice -p RemainAfterExit=yes "
        f"-p StandardOutput=truncate:/run/{unit}.said "
        f'--setenv=PATH="$PATH" python3 /srv/{script}.py {" ".join(arguments)}'
    )


def ended(unit: str) -> str:
    """Waits for one of alice's units, and returns what it has written."""
    done = f"systemctl show -P SubState {unit} | grep -E 'exited|failed'"
    machine.wait_until_succeeds(done, timeout=180)
    t.assertEqual(machine.get_unit_property(unit, "Result"), "success")
    return machine.succeed(f"cat /run/{unit}.said; systemctl stop {unit}")


def hooks_of_root(seconds: int) -> None:
    """Root's hook for another store is answered at once all the while."""
    took = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.monotonic()
        machine.succeed(f"layered-stores-remount {MERGED}")
        took.append(time.monotonic() - began)
    took.sort()
    machine.log(f"{len(took)} hooks of root: median {took[len(took) // 2]:.3f} s, {took[-1]:.3f} s")
    # Who has to wait for a swap waits for longer than that.
    t.assertLess(took[len(took) // 2], APART / 4)
    t.assertLess(took[-1], APART)


machine.wait_for_unit("layered-storesd.service")
for name, script in (
    ("swapper", SWAPPER),
    ("holder", HOLDER),
    ("caller", CALLER),
    ("namer", NAMER),
):
    machine.succeed(f"cat > /srv/{name}.py << 'END'\n{script}END\n")
machine.succeed("layered-stores-remount " + MERGED, "layered-stores-remount " + HERS)

with subtest("An owner who asks for swaps without end gets few, and no hook fails"):
    swaps, before, began = count("swap-count"), lines(), time.monotonic()
    attackers = {"with-hook-1": "hook", "with-hook-2": "hook", "without-hook": "no-hook"}
    for unit, how in attackers.items():
        by_alice(unit, "swapper", unit, how)
    hooks_of_root(12)
    for unit, how in attackers.items():
        rounds, said = json.loads(ended(unit))
        machine.log(f"{unit}: {rounds} rounds")
        t.assertEqual(said, [], unit)
        t.assertGreaterEqual(rounds, 1 if how == "hook" else 100, unit)
    made, most = count("swap-count") - swaps, AT_ONCE + (time.monotonic() - began) / APART + 1
    machine.log(f"{made} swaps, {lines() - before} lines")
    t.assertGreaterEqual(made, AT_ONCE)
    t.assertLessEqual(made, most)
    t.assertLess(lines() - before, 100)

with subtest("Who waits for a swap is told so, and gets it"):
    machine.wait_until_succeeds("layered-stores status hers", timeout=9 * APART)
    machine.succeed("layered-stores verify hers")
    machine.succeed(f'test -z "$(ls {HERS} | grep hook)"')

with subtest("An owner who calls the hook without end gets neither the journal nor the daemon"):
    refreshes, before = count("refresh-count"), lines()
    for number in range(8):
        by_alice(f"caller-{number}", "caller")
    hooks_of_root(8)
    for number in range(8):
        ended(f"caller-{number}")
    made = count("refresh-count") - refreshes
    machine.log(f"{made} refreshes, {lines() - before} lines")
    t.assertLess(lines() - before, 100)
    machine.succeed("layered-stores status", "layered-stores verify hers")

with subtest("Superblocks that somebody holds open are not without number"):
    # Root makes as many as root likes. Somebody holds a file of each.
    machine.succeed(
        "systemd-run --quiet --unit=holder -p Type=notify -p NotifyAccess=all "
        '--setenv=PATH="$PATH" python3 /srv/holder.py'
    )
    t.assertGreaterEqual(count("swap-count"), HELD)
    machine.wait_until_succeeds("layered-stores status hers")
    by_alice("one-more", "swapper", "one-more", "once")
    rounds, said = json.loads(ended("one-more"))
    t.assertIn(f"{HELD} superblocks open that earlier swaps have left", said[0])
    code, shown = machine.execute("layered-stores status hers")
    t.assertEqual(code, 3)
    t.assertIn("held open by processes", shown)
    # They are gone with who holds them.
    machine.succeed("systemctl stop holder")
    machine.wait_until_succeeds("runuser -u alice -- layered-stores-remount " + HERS, timeout=60)
    machine.succeed("layered-stores status hers", "layered-stores verify hers")
    t.assertEqual(machine.succeed(f"ls {HERS} | grep -c one-more || true"), "0\n")

with subtest("An owner who makes names without number does not have the daemon remember them"):
    by_alice("names", "namer")
    ended("names")
    # Nobody has looked at all of them yet, so that both commands do.
    machine.succeed("layered-stores verify hers", "layered-stores-remount " + HERS)
    pid = machine.get_unit_property("layered-storesd", "MainPID")
    most = int(machine.succeed(f"grep VmHWM /proc/{pid}/status").split()[1])
    machine.log(f"at most {most} KiB of memory")
    t.assertLess(most, 32 * 1024)
    machine.succeed(f"find {UPPER} -mindepth 1 -delete")

with subtest("What is taken away while no daemon runs, and is in use, is gone after the next hook"):
    path = f"{'1' * 32}-in-use"
    script = f"exec 3< {MERGED}/{path}/file && systemd-notify --ready && exec sleep 1000"
    machine.succeed(
        f"mkdir {MERGED}/{path} && touch {MERGED}/{path}/file",
        f"systemd-run --quiet --unit=in-use -p Type=notify -p NotifyAccess=all "
        f"--setenv=PATH=\"$PATH\" bash -c '{script}'",
        # Until nothing of it is to be looked at any more.
        "layered-stores remount ci && systemctl stop layered-storesd",
        f"rm -r {STORES}/ci/upper/{path} && test -e {MERGED}/{path}",
        f"layered-stores-remount {MERGED} && test ! -e {MERGED}/{path}",
        "systemctl stop in-use && layered-stores verify ci",
    )
