# Somebody changes what the daemon has made: stops the mount unit, unmounts, mounts over it,
# remounts it, replaces the lower store. The daemon notices by itself, says so, and repairs what
# is its own to repair. It never unmounts what it did not mount.
import json
import time
from typing import Any

CONFIG = "/etc/layered-stores/config.toml"
LOWER = "/srv/base"
UPPER = "/srv/ci/upper"
MERGED = "/srv/ci/root/nix/store"
UNIT = "srv-ci-root-nix-store.mount"
OBJECT = "/org/layeredstores1/store/ci"
PATH = f"{'0' * 32}-path"
# By when something has happened by itself. What it takes is a fraction of a second, and up to one
# where systemd has to look at the mount table; the rest is for a machine that has much to do.
SOON = 30
OPTIONS = (
    f"nosuid,nodev,lowerdir={LOWER}/nix/store,upperdir={UPPER},workdir=/srv/ci/work,"
    "index=off,metacopy=off,nfs_export=off,redirect_dir=off,xino=off"
)


def status() -> dict[str, Any]:
    """What `layered-stores status ci` says."""
    code, output = machine.execute("layered-stores status ci --json")
    properties: dict[str, Any] = json.loads(output)
    # Whoever only looks at the exit code learns whether something is wrong.
    wrong = properties["state"] == "failed" or properties["problems"] != []
    assert code == (3 if wrong else 0), (code, output)
    return properties


def problems() -> dict[str, str]:
    return {problem["code"]: problem["message"] for problem in status()["problems"]}


def wait_for_state(state: str, timeout: int = SOON) -> None:
    get = f"busctl get-property org.layeredstores1 {OBJECT} org.layeredstores1.Store State"
    machine.wait_until_succeeds(f"{get} | grep -Fx 's \"{state}\"'", timeout=timeout)


def wait_for_problem(code: str, timeout: int = SOON) -> None:
    get = f"busctl get-property org.layeredstores1 {OBJECT} org.layeredstores1.Store Problems"
    machine.wait_until_succeeds(f"{get} | grep -F '\"{code}\"'", timeout=timeout)


def mounts() -> list[str]:
    """The types of what is mounted in the store's place, from the oldest to the newest."""
    table = machine.succeed("cat /proc/self/mounts").splitlines()
    return [line.split()[2] for line in table if line.split()[1] == MERGED]


def mount_id() -> str:
    return machine.succeed(f"awk '$5 == \"{MERGED}\" {{ print $1 }}' /proc/self/mountinfo")


def changes() -> list[dict[str, Any]]:
    """What the daemon has announced on the bus. The last line may be half written."""
    lines = machine.succeed("cat /run/signals").splitlines(keepends=True)
    signals = [json.loads(line) for line in lines if line.endswith("\n")]
    return [
        signal["payload"]["data"][1]
        for signal in signals
        if signal["member"] == "PropertiesChanged" and signal["path"] == OBJECT
    ]


def announced() -> list[str]:
    """The states that the daemon has announced since this was asked last. The store is active."""
    global heard
    # What came before is there once this is.
    machine.succeed("layered-stores remount ci")
    count = status()["refresh-count"]
    counts = "RefreshCount"
    retry(lambda _: any(c[counts]["data"] >= count for c in changes() if counts in c), 60)
    states = [change["State"]["data"] for change in changes() if "State" in change]
    new, heard = states[heard:], len(states)
    return new


def is_usable() -> None:
    assert status()["state"] == "active", status()
    assert status()["problems"] == [], status()
    assert mounts() == ["overlay"], mounts()
    machine.succeed(f"grep -q first {MERGED}/{PATH}/file")
    # systemd agrees. It looks at the mount table only so often.
    machine.wait_until_succeeds(f"systemctl is-active --quiet {UNIT}", timeout=SOON)


heard = 0
machine.start(allow_reboot=True)
machine.wait_for_unit("layered-storesd.service")
machine.succeed(
    f"install -D /dev/stdin {LOWER}/nix/store/{PATH}/file <<<first",
    "layered-stores start ci",
    "systemd-run --quiet -E PATH --unit=monitor --property=StandardOutput=truncate:/run/signals "
    "busctl monitor --json=short --match \"type='signal',sender='org.layeredstores1'\"",
)
is_usable()

with subtest("The bus tells what happens"):
    # The monitor may not listen yet.
    machine.wait_until_succeeds("layered-stores remount ci; test -s /run/signals", timeout=60)
    assert announced() == []
    machine.succeed("layered-stores stop ci", "layered-stores start ci")
    states = announced()
    assert states == ["deactivating", "inactive", "activating", "active"], states

# Taken away

with subtest("Unmounted by hand, it is mounted again"):
    before = mount_id()
    machine.succeed(f"umount {MERGED}")
    machine.wait_until_succeeds(f"mountpoint -q {MERGED}", timeout=SOON)
    wait_for_state("active")
    is_usable()
    states = announced()
    assert states == ["activating", "active"], states
    machine.succeed(
        "journalctl --sync",
        "journalctl --unit=layered-storesd | grep 'ci: its mount is gone and is made again'",
    )
    # Asking for it first starts counting from zero.
    machine.succeed("layered-stores start ci")

with subtest("Its unit stopped, it is started again"):
    machine.succeed(f"systemctl stop {UNIT}")
    machine.wait_until_succeeds(f"mountpoint -q {MERGED}", timeout=SOON)
    wait_for_state("active")
    is_usable()
    states = announced()
    assert states == ["activating", "active"], states

with subtest("Whoever takes it away again and again gets the better of the daemon"):
    machine.succeed("layered-stores stop ci", "layered-stores start ci")
    for _ in range(3):
        is_usable()
        machine.succeed(f"umount {MERGED}")
        machine.wait_until_succeeds(f"mountpoint -q {MERGED}", timeout=SOON)
        wait_for_state("active")
    machine.succeed(f"umount {MERGED}")
    wait_for_state("failed")
    assert list(problems()) == ["mount-lost"], problems()
    assert "3 times within 60 s" in problems()["mount-lost"], problems()
    assert "`layered-stores start ci`" in problems()["mount-lost"], problems()
    assert status()["state-reason"] == problems()["mount-lost"]
    # It stays so, and whoever does not notice that nothing is mounted writes nowhere.
    machine.fail(f"touch {MERGED}/stray")
    output = machine.fail("layered-stores remount ci 2>&1")
    assert "3 times within 60 s" in output, output
    assert mounts() == []

with subtest("The way out works"):
    machine.succeed("layered-stores start ci")
    is_usable()

# Covered and replaced

with subtest("With something mounted on top it is not usable, and that is left alone"):
    before = mount_id()
    announced()
    machine.succeed(f"mount -t tmpfs covering {MERGED}")
    wait_for_state("failed")
    assert list(problems()) == ["covered"], problems()
    assert "tmpfs from covering" in problems()["covered"], problems()
    assert f"`umount {MERGED}`" in problems()["covered"], problems()
    for command in ["start", "stop", "remount"]:
        output = machine.fail(f"layered-stores {command} ci 2>&1")
        assert "tmpfs from covering is mounted on top" in output, output
        assert "in use" not in output, output
    assert mounts() == ["overlay", "tmpfs"], mounts()

with subtest("Once that is gone, it is active again, and was never unmounted"):
    machine.succeed(f"umount {MERGED}")
    wait_for_state("active")
    is_usable()
    assert mount_id() == before
    states = announced()
    assert states == ["failed", "activating", "active"], states

with subtest("A daemon that starts under a cover comes to the same conclusion"):
    machine.succeed(f"mount -t tmpfs covering {MERGED}")
    machine.succeed("systemctl restart layered-storesd", timeout=60)
    wait_for_state("failed")
    assert list(problems()) == ["covered"], problems()
    # Even if it should go.
    machine.succeed(f"mv {CONFIG} /srv/config.toml")
    for command in ["! layered-stores reload", "systemctl restart layered-storesd"]:
        machine.succeed(command, timeout=60)
        assert list(problems()) == ["covered"], problems()
    assert mounts() == ["overlay", "tmpfs"], mounts()
    machine.succeed(f"mv /srv/config.toml {CONFIG}")
    machine.fail("layered-stores reload", timeout=60)
    machine.succeed(f"umount {MERGED}")
    wait_for_state("active")
    is_usable()
    assert mount_id() == before

with subtest("What is mounted in the place of a stopped store is not its own"):
    for mount, description in [
        (f"mount -t tmpfs foreign {MERGED}", "tmpfs from foreign"),
        (
            "mkdir -p /srv/foreign/upper /srv/foreign/work && mount -t overlay overlay "
            f"-o lowerdir=/srv,upperdir=/srv/foreign/upper,workdir=/srv/foreign/work {MERGED}",
            "an overlay of /srv/foreign/upper over /srv",
        ),
    ]:
        machine.succeed("layered-stores stop ci", mount)
        found = mount_id()
        # Nobody wants the store, so nothing is wrong.
        assert status()["state"] == "inactive", status()
        output = machine.fail("layered-stores start ci 2>&1")
        assert f"{description} is mounted at {MERGED}, which is not this store" in output, output
        assert status()["state"] == "failed", status()
        assert list(problems()) == ["foreign"], problems()
        machine.succeed("systemctl restart layered-storesd")
        assert list(problems()) == ["foreign"], problems()
        assert mount_id() == found
        # It was asked for, so it comes up as soon as it can.
        machine.succeed(f"umount {MERGED}")
        wait_for_state("active")
        is_usable()

with subtest("What is mounted by hand as it should be is taken over, and left mounted"):
    machine.succeed("layered-stores stop ci", f"mount -t overlay overlay -o {OPTIONS} {MERGED}")
    found = mount_id()
    machine.succeed("layered-stores start ci")
    is_usable()
    assert mount_id() == found
    # A stop that is refused has no effect.
    output = machine.fail("layered-stores stop ci 2>&1")
    assert "was not mounted by the daemon" in output, output
    assert "in use" not in output, output
    # It is taken over once more.
    wait_for_state("active")
    is_usable()
    # Declared no more, it should go, and who has to see to that is said.
    machine.succeed(f"mv {CONFIG} /srv/config.toml")
    for command in ["! layered-stores reload", "systemctl restart layered-storesd"]:
        # Neither waits for that.
        machine.succeed(command, timeout=60)
        assert status()["state"] == "failed", status()
        assert list(problems()) == ["not-ours"], problems()
        assert f"`umount {MERGED}`" in problems()["not-ours"], problems()
        assert mount_id() == found
    machine.succeed(f"mv /srv/config.toml {CONFIG}", "layered-stores reload")
    is_usable()
    assert mount_id() == found
    # Unmounted, it is mounted again, by the daemon this time.
    machine.succeed(f"umount {MERGED}")
    machine.wait_until_succeeds(f"mountpoint -q {MERGED}", timeout=SOON)
    wait_for_state("active")
    is_usable()
    machine.succeed("layered-stores stop ci", "layered-stores start ci")

# Changed

with subtest("Turned read-only, it says so"):
    # The kernel does that by itself when the upper layer's filesystem has errors. mount(8) needs
    # to be told to use the old system call, the new one refuses.
    machine.succeed(f"LIBMOUNT_FORCE_MOUNT2=always mount -o remount,ro {MERGED}")
    machine.fail(f"touch {MERGED}/.x")
    wait_for_problem("read-only")
    assert status()["state"] == "active"
    machine.succeed(f"LIBMOUNT_FORCE_MOUNT2=always mount -o remount,rw {MERGED}")
    machine.wait_until_succeeds("layered-stores status ci", timeout=SOON)
    is_usable()

with subtest("Mounted by hand with options that make changes of layers dangerous, it says so"):
    machine.succeed("layered-stores stop ci")
    options = OPTIONS.replace("metacopy=off", "metacopy=on").replace(
        "redirect_dir=off", "redirect_dir=on"
    )
    machine.succeed(f"mount -t overlay overlay -o {options} {MERGED}", "layered-stores start ci")
    assert status()["state"] == "active"
    assert list(problems()) == ["mount-options"], problems()
    machine.succeed(f"umount {MERGED}")
    # It is made once systemd has noticed that the other mount is gone.
    machine.wait_until_succeeds(f"mountpoint -q {MERGED}", timeout=SOON)
    wait_for_state("active")
    is_usable()

with subtest("The lower store grows and shrinks under it"):
    added = f"{'1' * 32}-added"
    # The kernel remembers that this was not there.
    machine.fail(f"stat {MERGED}/{added}")
    machine.succeed(f"install -D /dev/stdin {LOWER}/nix/store/{added}/file <<<added")
    machine.wait_until_succeeds(f"grep added {MERGED}/{added}/file", timeout=SOON)
    machine.succeed(f"rm -r {LOWER}/nix/store/{added}")
    machine.wait_until_fails(f"stat {MERGED}/{added}", timeout=SOON)
    is_usable()


# Writes into a path of the lower store without a pause, and takes away again what it has written.
FILLER = f"""
import os, time
path = "{LOWER}/nix/store/{"2" * 32}-filled"
os.mkdir(path)
end = time.monotonic() + 12
while time.monotonic() < end:
    for change in (lambda name: open(name, "w").close(), os.unlink):
        for number in range(2000):
            change(f"{{path}}/{{number}}")
"""
# Looks for paths before they come, and says how many milliseconds after that each is found.
FINDER = f"""
import os, time
for number in range(30):
    name = f"{{number:032d}}-awaited"
    found = "{MERGED}/" + name
    if os.path.exists(found):
        raise SystemExit(f"{{name}} is there already")
    os.mkdir("{LOWER}/nix/store/" + name)
    began = time.monotonic()
    while not os.path.exists(found):
        time.sleep(0.001)
    print(int((time.monotonic() - began) * 1000))
"""

with subtest("A new path is found at once while the lower store is filled, and without a swap"):
    for name, script in (("filler", FILLER), ("finder", FINDER)):
        machine.succeed(f"cat > /srv/{name}.py << 'END'\n{script}END\n")
    swaps = status()["swap-count"]
    machine.succeed("systemd-run --quiet --unit=filler -E PATH python3 /srv/filler.py")
    times = sorted(int(line) for line in machine.succeed("python3 /srv/finder.py").splitlines())
    machine.log(f"found after {times[len(times) // 2]} ms, the slowest after {times[-1]} ms")
    # Who waits until the layers have come to rest finds none in less than 300 ms. How many are
    # found sooner than that depends on how much else the machine has to do.
    assert times[len(times) // 4] < 250, times
    machine.wait_until_fails("systemctl is-active --quiet filler", timeout=60)
    assert status()["swap-count"] == swaps, status()
    machine.succeed(f"rm -r {LOWER}/nix/store/*-awaited {LOWER}/nix/store/*-filled")
    machine.succeed("layered-stores remount ci")
    is_usable()


with subtest("The lower store directory is replaced by another one"):
    directory = f"{LOWER}/nix/store"
    machine.succeed(
        f"cp -a {directory} {directory}.new",
        f"echo second >{directory}.new/{PATH}/file",
        f"mv {directory} {directory}.old && mv {directory}.new {directory}",
    )
    machine.wait_until_succeeds(f"grep second {MERGED}/{PATH}/file", timeout=SOON)
    assert status()["state"] == "active"
    assert mounts() == ["overlay"], mounts()
    machine.succeed(f"rm -r {directory} && mv {directory}.old {directory}")
    machine.wait_until_succeeds(f"grep first {MERGED}/{PATH}/file", timeout=SOON)
    is_usable()

with subtest("A directory above it is replaced: a remount makes the store see that"):
    machine.succeed(
        f"cp -a {LOWER} {LOWER}.new",
        f"echo second >{LOWER}.new/nix/store/{PATH}/file",
        f"mv {LOWER} {LOWER}.old && mv {LOWER}.new {LOWER}",
    )
    machine.succeed("layered-stores remount ci", f"grep second {MERGED}/{PATH}/file")
    machine.succeed(f"rm -r {LOWER} && mv {LOWER}.old {LOWER}")
    machine.succeed("layered-stores remount ci", f"grep first {MERGED}/{PATH}/file")
    is_usable()

with subtest("The lower store is gone for a while"):
    machine.succeed("layered-stores stop ci", f"mv {LOWER} {LOWER}.away")
    output = machine.fail("layered-stores start ci 2>&1")
    assert f"lower-store: {LOWER}/nix/store is not there" in output, output
    assert list(problems()) == ["start-failed"], problems()
    # It is tried again by itself.
    machine.succeed(f"mv {LOWER}.away {LOWER}")
    wait_for_state("active", timeout=60)
    is_usable()

# Depended on

with subtest("What depends on the store's unit comes after it and goes with it"):
    machine.succeed("layered-stores stop ci")
    sleep = machine.succeed("command -v sleep").strip()
    for name, dependency in [
        ("after", f"After={UNIT}"),
        ("needs", f"RequiresMountsFor={MERGED}"),
        ("bound", f"BindsTo={UNIT}\nAfter={UNIT}"),
    ]:
        service = f"[Unit]\n{dependency}\n[Service]\nExecStart={sleep} 1000"
        machine.succeed(f"printf '{service}\n' >/run/systemd/system/{name}.service")
    # Running while there is no such unit yet, this one makes systemd remember that.
    machine.succeed("systemctl start after")
    assert machine.succeed(f"systemctl show -P LoadState {UNIT}") == "not-found\n"
    machine.succeed("layered-stores start ci", "systemctl start needs bound")
    is_usable()
    assert machine.succeed(f"systemctl show -P Description {UNIT}") == "Layered Nix store ci\n"
    requires = machine.succeed(f"systemctl show -P RequiresMountsFor {UNIT}").split()
    assert f"{LOWER}/nix/store" in requires, requires
    machine.succeed(f"systemctl show -P After needs | grep -wF {UNIT}")
    for name in ["needs", "bound"]:
        machine.require_unit_state(f"{name}.service")
    machine.succeed(f"systemctl stop {UNIT}")
    for name in ["needs", "bound"]:
        machine.wait_until_fails(f"systemctl is-active --quiet {name}", timeout=SOON)
    machine.wait_until_succeeds(f"mountpoint -q {MERGED}", timeout=SOON)
    wait_for_state("active")
    is_usable()

with subtest("What systemd keeps of a mount made by hand is not in the way of the store's own"):
    machine.succeed("layered-stores stop ci", f"mount -t overlay overlay -o {OPTIONS} {MERGED}")
    # after.service keeps the unit loaded, without a file.
    machine.wait_until_succeeds(f"systemctl is-active --quiet {UNIT}", timeout=SOON)
    machine.succeed(f"umount {MERGED}", "layered-stores start ci", timeout=60)
    is_usable()
    assert machine.succeed(f"systemctl show -P Description {UNIT}") == "Layered Nix store ci\n"
    machine.succeed(
        "systemctl stop after",
        "rm /run/systemd/system/{after,needs,bound}.service",
        "systemctl daemon-reload",
    )
    is_usable()

# Shutdown

with subtest("When the machine goes down, so do the mounts, and nobody brings them back"):
    machine.succeed(
        "mkdir -p /run/systemd/journald.conf.d /var/log/journal",
        "printf '[Journal]\\nStorage=persistent\\n' >/run/systemd/journald.conf.d/zz.conf",
        "systemctl restart systemd-journald && journalctl --flush",
        # What does not want to stop is to take longer than all else, however slow the machine is.
        "mkdir -p /run/systemd/system.conf.d",
        "printf '[Manager]\\nDefaultTimeoutStopSec=90s\\n' >/run/systemd/system.conf.d/zz.conf",
        "systemctl daemon-reload",
        # Somebody uses the store until the end.
        f"systemd-run --quiet -E PATH --unit=user sh -c 'exec sleep 1000 <{MERGED}/{PATH}/file'",
    )
    machine.succeed("logger 'now it goes down'; journalctl --sync")
    began = time.monotonic()
    machine.shutdown()
    took = time.monotonic() - began
    machine.start(allow_reboot=True)
    machine.wait_for_unit("layered-storesd.service")
    is_usable()
    last_words = machine.succeed("journalctl --boot=-1 --output=cat").partition("now it goes down")[
        2
    ]
    assert f"Unmounted {UNIT}" in last_words, last_words
    # What systemd goes on without is no failure: newer ones miss a file of the container's cgroups.
    words = [line for line in last_words.splitlines() if not line.endswith(": No data available")]
    last_words = "\n".join(words)
    for sign in [
        "made again",
        f"Mounting {UNIT}",
        f"Mounted {UNIT}",
        "problem",
        "failed",
        "Failed",
    ]:
        assert sign not in last_words, last_words
    # A unit that does not want to stop would cost 90 seconds.
    assert took < 60, took
