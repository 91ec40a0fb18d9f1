# Fresh superblocks are slid under a store that is in use, a hundred of them in a row: nobody who
# reads or writes sees an error. It takes Linux 6.5.
import json

LOWER = "/srv/lower"
LOWER_DIR = f"{LOWER}/nix/store"
MERGED = "/srv/ci/root/nix/store"
UPPER = "/srv/ci/upper"

# How soon what nobody announced is seen by everybody.
SOON = 25


def swap_count() -> int:
    return int(json.loads(machine.succeed("layered-stores status ci --json"))["swap-count"])


# Makes a hundred swaps: a path in both layers, a file of it held open, gone from the upper layer,
# and the hook. Meanwhile others open paths, or write, as fast as they can.
SWAPPER = f"""
import os, subprocess, sys
merged, upper, lower = "{MERGED}", "{UPPER}", "{LOWER_DIR}"
for number in range(100):
    name = f"{{number:032d}}-{{sys.argv[1]}}"
    for layer in (lower, upper):
        os.mkdir(f"{{layer}}/{{name}}")
        with open(f"{{layer}}/{{name}}/file", "w") as file:
            file.write(layer)
    with open(f"{{merged}}/{{name}}/file") as pin:
        os.unlink(f"{{upper}}/{{name}}/file")
        os.rmdir(f"{{upper}}/{{name}}")
        subprocess.run(["layered-stores-remount", merged], check=True)
        with open(f"{{merged}}/{{name}}/file") as file:
            if file.read() != lower:
                sys.exit(f"{{name}} is stale")
        if pin.read() != upper:
            sys.exit(f"{{name}} was taken away from who had it open")
"""
READER = f"""
import os, sys
files = {{f"{MERGED}/{{sys.argv[1]}}/file": "above", f"{MERGED}/{{sys.argv[2]}}/file": "below"}}
directory = "{MERGED}"
opened = 0
while not os.path.exists("/run/swapped"):
    for file, expected in files.items():
        with open(file) as content:
            if content.read().strip() != expected:
                sys.exit(f"{{file}} has another content")
        os.stat(os.path.dirname(file))
        opened += 1
    names = os.listdir(directory)
    for file in files:
        if file.split("/")[-2] not in names:
            sys.exit(f"{{file}} is not listed")
print(opened)
"""
# rename(2) looks two paths up, and between the two there may be a swap. That cannot be helped, and
# Nix, as everybody who moves files, is prepared for EXDEV (moveFile() of libutil).
WRITER = f"""
import errno, os
written = 0
while not os.path.exists("/run/swapped"):
    directory = f"{MERGED}/tmp-{{written}}"
    os.mkdir(directory)
    with open(f"{{directory}}/file", "w") as file:
        file.write("x")
    try:
        os.rename(f"{{directory}}/file", f"{{directory}}/renamed")
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        os.rename(f"{{directory}}/file", f"{{directory}}/renamed")
    os.unlink(f"{{directory}}/renamed")
    os.rmdir(directory)
    written += 1
print(written)
"""


def through_a_hundred_swaps(scripts: dict[str, str]) -> dict[str, int]:
    """Runs scripts all the while, and returns how often each did what it does.

    They end with an error at the first thing that is wrong.
    """
    times = {}
    for name, script in scripts.items():
        machine.succeed(f"cat > /tmp/{name}.py << 'END'\n{script}END\n")
    machine.succeed(f"cat > /tmp/swapper.py << 'END'\n{SWAPPER}END\n", "rm -f /run/swapped")
    swaps = swap_count()
    for name in scripts:
        machine.succeed(
            f"systemd-run --quiet -E PATH --unit={name} -p RemainAfterExit=yes "
            f"-p StandardOutput=file:/run/{name}.said python3 /tmp/{name}.py {above} {below}"
        )
    machine.succeed(f"python3 /tmp/swapper.py {'-'.join(scripts)}", "touch /run/swapped")
    t.assertGreaterEqual(swap_count(), swaps + 100)
    for name in scripts:
        machine.wait_until_succeeds(f"systemctl show -P SubState {name} | grep -E 'exited|failed'")
        said = machine.succeed(f"cat /run/{name}.said")
        t.assertEqual(machine.get_unit_property(name, "Result"), "success", said)
        machine.log(f"{name}: {said.strip()} times")
        t.assertGreater(int(said), 100)
        machine.succeed(f"systemctl stop {name}")
        times[name] = int(said)
    return times


machine.wait_for_unit("multi-user.target")
machine.succeed(f"nix-store --store {LOWER} --init", "layered-stores start ci")
uri = machine.succeed("layered-stores uri ci").strip()

# Before Linux 6.5 nothing can be put in the place of a mount that is in use.
if tuple(map(int, machine.succeed("uname -r").split(".")[:2])) >= (6, 5):
    with subtest("Through a hundred swaps nobody who opens a path sees an error"):
        machine.succeed("rm -rf /tmp/loop; mkdir /tmp/loop; echo below > /tmp/loop/file")
        below = machine.succeed(f"nix-store --store {LOWER} --add /tmp/loop").strip()[11:]
        machine.succeed("echo above > /tmp/loop/file")
        above = machine.succeed(f"nix-store --store '{uri}' --add /tmp/loop").strip()[11:]
        through_a_hundred_swaps({"reader": READER})
        machine.succeed("layered-stores status ci", "layered-stores verify ci")
        t.assertEqual(machine.succeed("cat /proc/mounts").count(f" {MERGED} overlay "), 1)

    with subtest("Through a hundred swaps nobody who writes sees an error"):
        times = through_a_hundred_swaps({"writer": WRITER, "lister": READER})
        t.assertEqual(machine.succeed(f"ls {MERGED} | grep -c tmp- || true"), "0\n")
        # The fresh superblock may have seen names whose removal was on its way through the old one.
        names = f"seq --format={MERGED}/tmp-%.0f 0 {times['writer']}"
        clean = f"{names} | xargs rmdir 2>/dev/null || true"
        again = f"{clean}; {names} | xargs mkdir; {names} | xargs rmdir"
        machine.wait_until_succeeds(again, timeout=SOON)
