#!/usr/bin/env python3
"""Measures layered-stores against mount(8) and systemd's own mount units, on a booted Debian.

All sides are measured in one run, in turn, so that whatever else the machine does
hits them alike. Prints medians and ratios as the tables of docs/performance.md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from driver import boot
from driver.machine import Machine

REPOSITORY = Path(__file__).resolve().parent.parent
LOWER = "/srv/lower"
STORES = "/var/lib/layered-stores/stores"
PLAIN = "/srv/plain"
OPTIONS = (
    "nosuid,nodev,lowerdir={lower},upperdir={upper},workdir={work}"
    ",index=off,metacopy=off,nfs_export=off,redirect_dir=off,xino=off"
)
# Looks for paths before they come into the lower store, and says how many microseconds after that
# each is found in the merged directory.
FINDER = f"""
import os, sys, time
for number in range(int(sys.argv[1])):
    name = f"{{number:032d}}-awaited"
    found = "{STORES}/s0/root/nix/store/" + name
    if os.path.exists(found):
        raise SystemExit(f"{{name}} is there already")
    os.mkdir("{LOWER}/nix/store/" + name)
    began = time.monotonic()
    while not os.path.exists(found):
        time.sleep(0.0005)
    print(int((time.monotonic() - began) * 1e6))
    time.sleep(0.01)
"""
# Writes paths into the lower store as fast as it can, as a host that builds does, and takes the
# oldest away again, for the disk is not without end. The machine's Python has no shutil.
FILLER = f"""
import os
number = 0
while not os.path.exists("/run/filled"):
    path = f"{LOWER}/nix/store/{{number:032d}}-built"
    os.mkdir(path)
    for file in range(50):
        with open(f"{{path}}/{{file}}", "w") as content:
            content.write("x" * 4096)
    number += 1
    if number > 500:
        oldest = f"{LOWER}/nix/store/{{number - 501:032d}}-built"
        for file in range(50):
            os.remove(f"{{oldest}}/{{file}}")
        os.rmdir(oldest)
print(number)
"""


def build_measure() -> Path:
    """Compiles benches/measure.rs and finds the executable."""
    command = [
        "cargo",
        "bench",
        "--locked",
        "--bench",
        "measure",
        "--no-run",
        "--message-format=json",
    ]
    lines = subprocess.run(
        command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()
    messages = [json.loads(line) for line in lines]
    found = [
        m["executable"]
        for m in messages
        if m.get("executable") and m["target"]["name"] == "measure"
    ]
    return Path(found[-1])


def timed(machine: Machine, command: str) -> float:
    """Milliseconds of a command, as the machine's own clock has it."""
    output = machine.succeed(
        f"s=$(date +%s%N); {command} >/dev/null; e=$(date +%s%N); echo $(((e - s) / 1000))"
    )
    return int(output.split()[-1]) / 1000


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def milliseconds(values: list[float]) -> str:
    return f"{median(values):.2f}" if median(values) < 100 else f"{median(values):.0f}"


def bench_hook(machine: Machine, rounds: int) -> None:
    """The hook's round trip against other ways to refresh the same mount."""
    merged = f"{STORES}/s0/root/nix/store"
    jobs = {
        "`layered-stores-remount` (hook, daemon, refresh)": f"run layered-stores-remount {merged}",
        "`LIBMOUNT_FORCE_MOUNT2=always mount -o remount`": (
            f"run env LIBMOUNT_FORCE_MOUNT2=always mount -o remount {merged}"
        ),
        "`mount -o remount` less the cost of `env`": "run env true",
        "the bare system calls": f"reconfigure {merged}",
        "starting a process that does nothing (`true`)": "run true",
    }
    machine.succeed(f"/root/measure 20 {' , '.join(jobs.values())}")
    lines = machine.succeed(f"/root/measure {rounds} {' , '.join(jobs.values())}").splitlines()
    times = [[int(value) / 1000 for value in line.split()] for line in lines]
    hook, mount, env, bare, nothing = times
    # env(1) is one more execve; what it costs is env(1) around true less true.
    mount = [value - (median(env) - median(nothing)) for value in mount]
    print(f"\n### Hook round trip ({rounds} rounds, in turn)\n")
    print(row("way", "median, ms", "ratio to mount(8)"))
    print(row("---", "---:", "---:"))
    for name, values in zip(jobs, (hook, mount, None, bare, nothing), strict=True):
        if values is not None:
            print(row(name, f"{median(values):.3f}", f"{median(values) / median(mount):.2f}"))


def stop_everything(machine: Machine) -> None:
    machine.succeed("systemctl stop layered-storesd layered-stores.target")
    machine.succeed(
        "systemctl stop --no-block --all 'var-lib-layered*.mount' 'srv-plain*.mount' bench.target"
    )
    machine.wait_until_succeeds("! grep -q '^overlay ' /proc/mounts")
    machine.wait_until_succeeds('test -z "$(systemctl list-jobs --no-legend)"')
    # systemd notices an unmount up to a second later; who starts the unit before that has to wait.
    units = "systemctl list-units --no-legend 'var-lib-layered*.mount' 'srv-plain*.mount'"
    machine.wait_until_succeeds(f'test -z "$({units})"')
    # It looks at the mount table so often in a second and no more: what went before must not
    # count.
    machine.succeed("sleep 1.1")


def configure(machine: Machine, number: int) -> None:
    """Declares the same mounts on both sides."""
    layers = OPTIONS.format(
        lower=f"{LOWER}/nix/store", upper=f"{PLAIN}/$i/upper", work=f"{PLAIN}/$i/work"
    )
    machine.succeed(f"""
        mkdir -p /etc/layered-stores {PLAIN}
        rm -rf /run/systemd/system/srv-plain-*.mount /run/systemd/system/bench.target.wants
        mkdir -p /run/systemd/system/bench.target.wants
        echo '[Unit]' > /run/systemd/system/bench.target
        : > /etc/layered-stores/config.toml; : > /root/mount-loop
        for ((i = 0; i < {number}; i++)); do
            printf '[stores.s%d]\\nlower-store = "{LOWER}"\\n' $i >> /etc/layered-stores/config.toml
            mkdir -p {PLAIN}/$i/upper {PLAIN}/$i/work {PLAIN}/$i/root/nix/store
            unit=srv-plain-$i-root-nix-store.mount
            printf '[Unit]\\nRequiresMountsFor=%s %s %s\\n' \\
                {LOWER}/nix/store {PLAIN}/$i/upper {PLAIN}/$i/work > /run/systemd/system/$unit
            printf '[Mount]\\nWhat=overlay\\nWhere=%s\\nType=overlay\\nOptions=%s\\n' \\
                "{PLAIN}/$i/root/nix/store" "{layers}" \\
                >> /run/systemd/system/$unit
            ln -s ../$unit /run/systemd/system/bench.target.wants/
            echo "mount -t overlay overlay -o {layers} {PLAIN}/$i/root/nix/store" \\
                >> /root/mount-loop
        done
    """)


def bench_start(machine: Machine, number: int, rounds: int) -> dict[str, object]:
    """The time until so many stores are all active."""
    configure(machine, number)
    # Directories are made once, on both sides, as on a machine that has been set up.
    machine.succeed("systemctl restart layered-storesd")
    ours: list[float] = []
    plain: list[float] = []
    reload: list[float] = []
    loop: list[float] = []
    again: list[float] = []
    status: list[float] = []
    memory = 0
    for _ in range(rounds):
        stop_everything(machine)
        ours.append(timed(machine, "systemctl start layered-storesd"))
        mounted = int(machine.succeed("grep -c '^overlay ' /proc/mounts"))
        assert mounted == number, f"{mounted} of {number} stores are mounted"
        status.append(timed(machine, "layered-stores status"))
        rss = machine.succeed("grep VmRSS /proc/$(pidof layered-storesd)/status").split()[1]
        memory = max(memory, int(rss))
        again.append(timed(machine, "systemctl restart layered-storesd"))
        stop_everything(machine)
        reload.append(timed(machine, "systemctl daemon-reload"))
        plain.append(timed(machine, "systemctl start bench.target"))
        machine.wait_until_succeeds(f"test $(grep -c '^overlay ' /proc/mounts) = {number}")
        stop_everything(machine)
        loop.append(timed(machine, "sh /root/mount-loop"))
        machine.succeed("umount -a -t overlay")
    stop_everything(machine)
    return {
        "stores": number,
        "layered-stores": ours,
        "plain": plain,
        "daemon-reload": reload,
        "loop": loop,
        "restart": again,
        "status": status,
        "memory": memory / 1024,
    }


def processor_time(machine: Machine) -> float:
    """Seconds that the daemon has had of a processor."""
    stat = machine.succeed("cat /proc/$(pidof layered-storesd)/stat").rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) / 100


def bench_new_path(machine: Machine, number: int, rounds: int) -> tuple[str, ...]:
    """The time until a path of the lower store that was looked for before is found."""
    configure(machine, number)
    machine.succeed("systemctl restart layered-storesd; rm -f /run/filled")
    machine.succeed(f"cat >/root/finder.py <<'END'\n{FINDER}END\n")
    machine.succeed(f"cat >/root/filler.py <<'END'\n{FILLER}END\n")
    cells = [str(number)]
    for busy in (False, True):
        if busy:
            machine.succeed(
                "systemd-run --quiet --unit=filler -p RemainAfterExit=yes "
                "-p StandardOutput=truncate:/run/filler.said python3 /root/filler.py"
            )
        before, began = processor_time(machine), time.monotonic()
        output = machine.succeed(f"python3 /root/finder.py {rounds}", timeout=3600)
        share = (processor_time(machine) - before) / (time.monotonic() - began)
        times = sorted(int(line) / 1000 for line in output.split())
        cells += [f"{median(times):.2f}", f"{times[len(times) * 95 // 100]:.2f}", f"{share:.0%}"]
        if busy:
            elapsed = time.monotonic() - began
            machine.succeed("touch /run/filled")
            over = "systemctl show -P SubState filler | grep -E 'exited|failed'"
            machine.wait_until_succeeds(over)
            cells.append(f"{int(machine.succeed('cat /run/filler.said')) / elapsed:.0f}")
            machine.succeed("systemctl stop filler")
        machine.succeed(f"rm -r {LOWER}/nix/store/*-awaited")
    machine.succeed(f"find {LOWER}/nix/store -name '*-built' -prune -exec rm -r {{}} +")
    stop_everything(machine)
    return tuple(cells)


def describe(machine: Machine) -> None:
    versions = machine.succeed(
        "systemctl --version | head -n 1; mount --version; dbus-daemon --version | head -n 1"
    )
    date = time.strftime("%Y-%m-%d")
    print(f"Measured {date} on Linux {platform.release()}, {os.cpu_count()} cores;")
    print("in the machine: " + "; ".join(versions.splitlines()) + ".")


def print_sizes(machine: Machine) -> None:
    """What is read from the disk before the hook, or another of them, can begin."""
    print("\n### Size of the executables, KiB\n")
    print(row("executable", "KiB"))
    print(row("---", "---:"))
    for name in ("layered-stores-remount", "layered-stores", "layered-storesd"):
        size = machine.succeed(f"stat --dereference --format %s $(command -v {name})")
        print(row(f"`{name}`", f"{int(size) / 1024:.0f}"))


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--stores", type=int, nargs="+", default=[1, 10, 100, 1000])
    arguments.add_argument("--rounds", type=int, default=5, help="rounds of the start measurements")
    arguments.add_argument("--hook-rounds", type=int, default=1000)
    arguments.add_argument("--new-path-rounds", type=int, default=200)
    arguments.add_argument("--only-new-path", action="store_true", help="leave all else out")
    options = arguments.parse_args()

    measure = build_measure()
    with boot(install=True, name="bench") as machine:
        machine.copy_from_host(str(measure), "/root/measure")
        machine.succeed(
            f"chmod +x /root/measure; nix-store --store {LOWER} --init; mkdir -p {LOWER}/nix/store"
        )
        describe(machine)
        rows = [
            bench_new_path(machine, number, options.new_path_rounds)
            for number in options.stores
            if number <= 100
        ]
        print("\n### Time until a new path of the lower store is found that was looked for, ms\n")
        found = ("median", "95th percentile", "daemon's processor")
        building = tuple(f"{cell}, host builds" for cell in found)
        print(row("stores", *found, *building, "paths a second"))
        print(row(*["---:"] * 8))
        for cells in rows:
            print(row(*cells))
        if options.only_new_path:
            return 0
        configure(machine, 1)
        machine.succeed("systemctl start layered-storesd")
        print_sizes(machine)
        bench_hook(machine, options.hook_rounds)
        results = [bench_start(machine, number, options.rounds) for number in options.stores]

    print(
        f"\n### Time until all stores are active, ms ({options.rounds} rounds, in turn, medians)\n"
    )
    print(
        row(
            "stores",
            "layered-stores",
            "systemd mount units",
            "ratio",
            "their daemon-reload",
            "mount(8) in a loop",
        )
    )
    print(row(*["---:"] * 6))
    for result in results:
        sides = {key: value for key, value in result.items() if isinstance(value, list)}
        ratio = median(sides["layered-stores"]) / median(sides["plain"])
        shown = [
            milliseconds(sides[key]) for key in ("layered-stores", "plain", "daemon-reload", "loop")
        ]
        print(row(result["stores"], shown[0], shown[1], f"{ratio:.2f}", *shown[2:]))
    print("\n### The daemon at that size\n")
    print(
        row(
            "stores",
            "resident memory, MiB",
            "`layered-stores status`, ms",
            "restart that adopts all, ms",
        )
    )
    print(row(*["---:"] * 4))
    for result in results:
        sides = {key: value for key, value in result.items() if isinstance(value, list)}
        shown = [milliseconds(sides[key]) for key in ("status", "restart")]
        print(row(result["stores"], f"{result['memory']:.1f}", *shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
