# The daemon goes away: it is killed at every step of what it does, restarted, upgraded, hung,
# misconfigured, and taken down with the whole machine. Stores stay usable meanwhile, and the next
# daemon finds or makes everything as it should be.
import json
import time
from typing import Any

CONFIG = "/etc/layered-stores/config.toml"
DROP_INS = "/run/systemd/system/layered-storesd.service.d"
LOWER = "/srv/base"
UPPER = "/srv/ci/upper"
MERGED = "/srv/ci/root/nix/store"
UNIT = "srv-ci-root-nix-store.mount"


def derivation(name: str, script: str) -> str:
    """The least that Nix builds: a shell script that writes a file."""
    return (
        f'derivation {{ name = "{name}"; system = builtins.currentSystem; '
        f'builder = "/bin/sh"; args = [ "-c" "{script}" ]; }}'
    )


def build(store: str, name: str, script: str) -> str:
    """Has Nix build something, and returns its store path."""
    return machine.succeed(
        f"nix-build --no-out-link --store '{store}' -E '{derivation(name, script)}'"
    ).strip()


def write(path: str, *lines: str) -> None:
    """Writes a text file."""
    text = "\n".join(lines)
    machine.succeed(f"cat >{path} <<'END'\n{text}\nEND")


def merged(path: str) -> str:
    """Where a store path is to be found outside of Nix."""
    return path.replace("/nix/store", MERGED)


def status() -> dict[str, Any]:
    """What `layered-stores status ci` says."""
    code, output = machine.execute("layered-stores status ci --json")
    assert code in (0, 3), output
    properties: dict[str, Any] = json.loads(output)
    return properties


def identity() -> str:
    """Differs once the store was unmounted, however briefly.

    The mount's number alone would not do: the kernel gives it out again.
    """
    return machine.succeed(
        f"awk '$5 == \"{MERGED}\" {{ print $1, $3 }}' /proc/self/mountinfo",
        f"systemctl show -P ActiveEnterTimestampMonotonic {UNIT}",
    )


def start_reader() -> None:
    """Reads from the store without a pause, until that fails once."""
    loop = f"while read -r line <{merged(below)}; do :; done"
    machine.succeed(f"systemd-run --quiet -E PATH --collect --unit=reader sh -c '{loop}'")


def reader_saw_no_gap() -> None:
    machine.require_unit_state("reader.service")
    machine.succeed("systemctl stop reader.service")


def main_pid() -> str:
    return machine.get_unit_property("layered-storesd.service", "MainPID")


def wait_for_next_daemon(after: str) -> None:
    """Waits until there is a daemon that is not this process, and it is ready."""
    # In this order: one that was killed may be active still when it has no process any more.
    machine.wait_until_succeeds(
        "pid=$(systemctl show -P MainPID layered-storesd); "
        f"test $pid != 0 && test $pid != {after} && systemctl is-active --quiet layered-storesd",
        timeout=60,
    )


def drop_in(*lines: str) -> None:
    """Changes the daemon's unit, until no_drop_in()."""
    machine.succeed(f"mkdir -p {DROP_INS}")
    write(f"{DROP_INS}/test.conf", "[Service]", *lines)
    machine.succeed("systemctl daemon-reload")


def no_drop_in() -> None:
    machine.succeed(f"rm {DROP_INS}/test.conf", "systemctl daemon-reload")


machine.start(allow_reboot=True)
machine.wait_for_unit("layered-storesd.service")

with subtest("There is a store, over a lower store that Nix fills"):
    below = build(LOWER, "below", "echo below > $out")
    machine.succeed("layered-stores start ci")
    uri = machine.succeed("layered-stores uri ci").strip()
    above = build(uri, "above", "echo above > $out")
    machine.succeed(f"grep below {merged(below)}", f"grep above {merged(above)}")

# Kill points
#
# What a killed process leaves depends on how far it came. It is killed just before each call of
# these system calls, which are those that change something or hand something on to somebody else.
PREPARE = "mkdirat fchown fchmod renameat2 fsetxattr fremovexattr flock ioctl"
RECORD = "mkdir rename fsync"
THREADS = "unshare setns inotify_add_watch"
TALK = "sendmsg recvmsg"
UNIT_FILE = "linkat utimensat"
MOUNT = "fsopen fsconfig fsmount move_mount"
SWAP = f"fspick {MOUNT} umount2"

# doomed.service is the daemon as it is, hardening included, under a strace that kills it. strace
# needs ptrace(2), which the filter of system calls is there to keep away from the daemon, and does
# not reload anything.
machine.succeed(
    r"""
    sed -e '/^BusName=/d; /^SystemCallFilter=/d; /^NoExecPaths=/d' \
        -e 's/^Restart=.*/Restart=no/; s/^Type=.*/Type=notify/' \
        -e 's|^ExecStart=|&strace -f -qq -o /dev/null $KILL |' \
        -e '/^\[Service\]/a NotifyAccess=all\nEnvironmentFile=/run/doomed' \
        "$(systemctl show -P FragmentPath layered-storesd)" >/run/systemd/system/doomed.service
    sed -i "s|=strace |=$(command -v strace) |" /run/systemd/system/doomed.service
    systemctl daemon-reload
    """
)


# Where every instruction is emulated, every place would take hours. There it is about another
# kernel: of the calls of which kernels have something to say, the first of each.
EMULATED = machine.execute("systemd-detect-virt")[1].strip() == "qemu"
OF_KERNELS = ("ioctl", "renameat2", "fspick", "fsmount", "move_mount", "umount2")
PATIENCE = 10 if EMULATED else 1
# Before Linux 6.5 nothing can be put in the place of a mount that is in use.
SWAPS = tuple(map(int, machine.succeed("uname -r").split(".")[:2])) >= (6, 5)


def kill_at_every(calls: str, before: str, errand: str, after: str, meanwhile: str = "") -> int:
    """Kills the daemon at every call, has the next one take over, and looks at the result.

    Returns how often it was killed.
    """
    kills = 0
    for call in calls.split():
        if EMULATED and call not in OF_KERNELS:
            continue
        # What a slow machine has more of is what is heard and said while it waits.
        for number in range(1, 2 if EMULATED else 300):
            kill = f"-e trace=?{call} -e inject=?{call}:signal=SIGKILL:when={number}"
            result = machine.succeed(
                f"""
                systemctl stop layered-storesd
                {before}
                echo "KILL={kill}" >/run/doomed
                {{ systemctl start doomed && {errand}; }} >/dev/null 2>&1 || true
                systemctl stop doomed
                {meanwhile}
                systemctl start layered-storesd
                {after}
                systemctl show -P Result doomed
                """
            )
            if result.strip() == "success":
                break
            kills += 1
        else:
            assert EMULATED, f"there is no end of calls of {call}"
    return kills


# Up: one mount and none beneath it, of the store's layers, as Nix wants to see it in the mount
# table; directories with the owner and mode they should have, none of them half-made.
UP = f"""
test "$(layered-stores list)" = 'ci  active'
layered-stores status >/dev/null
test "$(grep -c ' {MERGED} ' /proc/self/mountinfo)" = 1
grep -q '^overlay {MERGED} .*[ ,]lowerdir={LOWER}/nix/store,upperdir={UPPER},' /proc/self/mounts
cd /srv/ci
for owned in upper:root:755 work:root:700 root:root:755 root/nix/store:root:755 \
    root/nix/var/nix:root:755 root/nix/var/log/nix:root:755
do
    test "$(stat -c %n:%U:%a "${{owned%%:*}}")" = "$owned"
done
test -z "$(find /srv/ci -name '*.new')"
for marked in upper root/nix/var/nix
do
    id=$(getfattr --only-values -n trusted.layered-stores.id $marked 2>/dev/null)
    test ${{#id}} = 32
    grep -q $id /var/lib/layered-stores/known/ci.json
done
grep -q below {merged(below)}
"""
# And nothing is lost, says Nix, which looks at the mount as well.
UP_WITH_DATA = f"""
{UP}
grep -q above {merged(above)}
nix-store --store '{uri}' --check-validity {above} {below}
"""
# What an administrator would see without the mount: a directory that takes no writes.
UNMOUNT = f"""
systemctl stop {UNIT}
lsattr -d {MERGED} | cut -d' ' -f1 | grep i >/dev/null
"""
STORE = "org.layeredstores1 /org/layeredstores1/store/ci org.layeredstores1.Store"
kills = 0

with subtest("Killed while it brings a store up for the first time"):
    # Put what there is aside, so that everything is still to be made.
    machine.succeed(
        f"systemctl stop layered-storesd\n{UNMOUNT}\nchattr -i {MERGED}",
        "mv /srv/ci /srv/kept",
    )
    nothing_there = f"""
    ! mountpoint --quiet {MERGED} || systemctl stop {UNIT}
    chattr -f -i {MERGED} || true
    rm -rf /srv/ci /var/lib/layered-stores/known /run/layered-stores/*
    """
    kills += kill_at_every(
        f"{PREPARE} {RECORD} {THREADS} {UNIT_FILE} {MOUNT}", nothing_there, "true", UP
    )
    machine.succeed(f"systemctl stop layered-storesd\n{nothing_there}\nmv /srv/kept /srv/ci")
    machine.succeed(f"systemctl start layered-storesd\n{UP_WITH_DATA}")

with subtest("Killed while it brings a store up that has data, as after a reboot"):
    as_after_a_reboot = f"{UNMOUNT}\nrm -r /run/layered-stores/*"
    kills += kill_at_every(
        f"flock rename {UNIT_FILE} {MOUNT} {TALK}", as_after_a_reboot, "true", UP_WITH_DATA
    )

with subtest("Killed while it takes a store over, and while it stops it"):
    # The bus must not start the next daemon for this call: it would do what it is asked for.
    stop = f"busctl --auto-start=no call {STORE} Stop"
    # Whether it had heard of the stop or not, the next one does not keep the store from coming up.
    up_again = f"layered-stores start ci\n{UP_WITH_DATA}"
    kills += kill_at_every(f"flock unlink {TALK}", "", stop, up_again)

if SWAPS:
    with subtest("Killed while it slides a fresh superblock under a store"):
        # A path in both layers, held open while it is deleted: a reconfigure does not help there.
        shadowed = f"{'0' * 32}-shadowed"
        machine.succeed(f"install -D /dev/stdin {LOWER}/nix/store/{shadowed}/file <<<lower")
        pinned = f"""
        install -D /dev/stdin {UPPER}/{shadowed}/file <<<upper
        systemctl start layered-storesd
        layered-stores remount ci
        systemctl stop layered-storesd
        exec 3<{MERGED}/{shadowed}/file
        sleep 1000 <&3 >/dev/null 2>&1 &
        holder=$!
        exec 3<&-
        """
        delete = f"rm -r {UPPER}/{shadowed} && busctl --auto-start=no call {STORE} Remount"
        # One that is killed as it starts was never there to delete under.
        no_gap = f"grep -q below {merged(below)}\nrm -rf {UPPER}/{shadowed}"
        seen = f"until grep -qs lower {MERGED}/{shadowed}/file; do sleep 0.02; done"
        right = f"""
        timeout {20 * PATIENCE} sh -c '{seen}'
        {UP_WITH_DATA}
        layered-stores verify ci >/dev/null
        kill $holder
        """
        kills += kill_at_every(SWAP, pinned, delete, right, meanwhile=no_gap)

with subtest("Killed while it makes a store anew whose declaration has changed"):
    change = f"""
    if grep -q /srv/ci/other-work {CONFIG}
    then sed -i s:/srv/ci/other-work:/srv/ci/work: {CONFIG}
    else sed -i s:/srv/ci/work:/srv/ci/other-work: {CONFIG}
    fi
    """
    changed = f"""
    {UP_WITH_DATA}
    wanted=$(sed -n 's/^work-dir = "\\(.*\\)"/\\1/p' {CONFIG})
    grep -q "^overlay {MERGED} .*,workdir=$wanted[, ]" /proc/self/mounts
    """
    kills += kill_at_every(
        f"ioctl rename renameat2 unlink {UNIT_FILE} {MOUNT} sendmsg", change, "true", changed
    )
    machine.succeed(f"sed -i s:/srv/ci/other-work:/srv/ci/work: {CONFIG}")
    machine.succeed(f"systemctl restart layered-storesd\n{changed}")

with subtest("Killed while it takes down a store that is declared no more"):
    undeclared = f"""
    cp {CONFIG} /srv/config.toml
    systemctl start layered-storesd
    {UP_WITH_DATA}
    systemctl stop layered-storesd
    rm {CONFIG}
    """
    gone = f"""
    test -z "$(layered-stores list)"
    test -z "$(systemctl list-units --all --plain --no-legend {UNIT})"
    test ! -e /run/systemd/system/{UNIT}
    test -z "$(ls -A /var/lib/layered-stores/known)"
    grep -q above {UPPER}/{above.removeprefix("/nix/store/")}
    touch {MERGED}/.writable
    rm {MERGED}/.writable
    cp /srv/config.toml {CONFIG}
    """
    kills += kill_at_every("ioctl unlink sendmsg", undeclared, "true", gone)
    machine.succeed(f"systemctl restart layered-storesd\n{UP_WITH_DATA}")

with subtest("Killed while it removes what is in a store"):
    machine.succeed(
        f"systemctl stop layered-storesd\n{UNMOUNT}\nchattr -i {MERGED}",
        "mv /srv/ci /srv/kept",
        f"{nothing_there}\nsystemctl start layered-storesd",
    )
    old = f"{UPPER}/{'0' * 32}-old"
    database = "/srv/ci/root/nix/var/nix/db/db.sqlite"
    filled = f"mkdir -p {old}/a/b $(dirname {database}); touch {old}/file {old}/a/b/file {database}"
    remove = f"""busctl --auto-start=no call {STORE} Stop && busctl --auto-start=no call \
        org.layeredstores1 /org/layeredstores1 org.layeredstores1.Manager RemoveData s ci"""
    # It is all there, or none of it, or the store is not up and says what to do.
    all_or_nothing = f"""
    layered-stores start ci 2>/dev/null || true
    if layered-stores status ci >/dev/null
    then
        test -e {old}/file -a -e {old}/a/b/file -a -e {database} ||
            test ! -e {old} -a ! -e {database}
    else
        {{ layered-stores status ci || true; }} | grep 'run `layered-stores remove-data' >/dev/null
        layered-stores remove-data --yes ci
        layered-stores start ci
        test ! -e {old} -a ! -e {database}
    fi
    test -z "$(find /srv/ci -name '*.removing*')"
    """
    kills += kill_at_every("unlinkat renameat2 fsync", filled, remove, all_or_nothing)
    machine.succeed(f"systemctl stop layered-storesd\n{nothing_there}\nmv /srv/kept /srv/ci")
    machine.succeed(f"systemctl start layered-storesd\n{UP_WITH_DATA}")

log.info(f"The daemon was killed at {kills} places")
assert kills > (10 if EMULATED else 100), f"only {kills} kills: has strace lost its grip?"

# Restarts

with subtest("A restart, a crash, and systemd's own reloads leave the mount alone"):
    before = identity()
    start_reader()
    pid = main_pid()
    machine.succeed("systemctl restart layered-storesd")
    wait_for_next_daemon(pid)
    pid = main_pid()
    machine.succeed("systemctl kill --signal=KILL layered-storesd")
    wait_for_next_daemon(pid)
    machine.succeed("systemctl daemon-reload")
    machine.succeed("systemctl daemon-reexec")
    assert status()["state"] == "active"
    assert identity() == before
    reader_saw_no_gap()
    machine.succeed("systemctl show -P StatusText layered-storesd | grep -x '1 of 1 store active'")

with subtest("After systemd has executed itself anew, the daemon still hears from it"):
    machine.succeed("layered-stores stop ci", "layered-stores start ci")
    assert status()["state"] == "active"

with subtest("The daemon is upgraded under a running build"):
    # As a distribution does it: other files, and a restart.
    machine.succeed(
        "mkdir -p /srv/upgraded /srv/signals && mkfifo /srv/signals/go",
        'cp "$(command -v layered-storesd)" "$(command -v layered-stores-remount)" /srv/upgraded',
    )
    script = "echo >/srv/signals/started; read go </srv/signals/go; echo built > $out"
    write("/srv/slow.nix", derivation("slow", script))
    machine.succeed(
        "systemd-run --quiet -E PATH --unit=build --property=RemainAfterExit=yes "
        f"nix-build --no-out-link --store '{uri}' /srv/slow.nix "
        "--option extra-sandbox-paths /srv/signals"
    )
    machine.wait_for_file("/srv/signals/started", timeout=60)
    before = identity()
    start_reader()
    machine.succeed("systemctl stop layered-storesd")
    # A daemon may execute what is where it was installed, and nothing else.
    upgraded = "ExecStart=/srv/upgraded/layered-storesd"
    drop_in("ExecStart=", upgraded, "ExecPaths=/srv/upgraded")
    machine.succeed("systemctl start layered-storesd")
    machine.succeed("echo >/srv/signals/go")
    machine.wait_until_fails("test $(systemctl show -P SubState build) = running", timeout=60)
    machine.require_unit_state("build.service")
    slow = machine.succeed(
        "nix-instantiate --store dummy:// --eval --raw -E '(import /srv/slow.nix).outPath'"
    )
    machine.succeed(f"grep built {merged(slow)}", "systemctl stop build")
    # The new daemon's hook is the one that Nix will call from now on.
    assert status()["state"] == "active"
    assert "remount-hook=/srv/upgraded/layered-stores-remount" in status()["store-uri"]
    no_drop_in()
    machine.succeed("systemctl restart layered-storesd")
    assert machine.succeed("layered-stores uri ci").strip() == uri
    assert identity() == before
    reader_saw_no_gap()

with subtest("A second daemon is turned away and leaves everything as it was"):
    before = identity()
    # It would share an upper layer, and bring a store of its own up.
    write(
        "/srv/other.toml",
        *("[stores.other]", f'lower-store = "{LOWER}"', 'root = "/srv/other/root"'),
        *('upper-layer = "/srv/other/upper"', 'work-dir = "/srv/other/work"'),
        *("[stores.same]", f'lower-store = "{LOWER}"', 'root = "/srv/same/root"'),
        *(f'upper-layer = "{UPPER}"', 'work-dir = "/srv/ci/same-work"'),
    )
    pid = main_pid()
    code, output = machine.execute(
        f"timeout {20 * PATIENCE} layered-storesd --config /srv/other.toml "
        "--state-dir /srv/other-state --runtime-dir /srv/other-run 2>&1"
    )
    assert code == 1, (code, output)
    assert "another layered-storesd" in output, output
    # One sentence, and nothing before it.
    assert len(output.strip().splitlines()) == 1, output
    machine.fail("ls -d /srv/other /srv/same /srv/ci/same-work /srv/other-state 2>/dev/null")
    assert machine.succeed("layered-stores list") == "ci  active\n"
    assert main_pid() == pid
    assert identity() == before

with subtest("A daemon that hangs is replaced"):
    before = identity()
    drop_in(f"WatchdogSec={5 * PATIENCE}s")
    machine.succeed("systemctl restart layered-storesd")
    start_reader()
    pid = main_pid()
    machine.succeed("systemctl kill --signal=STOP layered-storesd")
    wait_for_next_daemon(pid)
    assert machine.get_unit_property("layered-storesd.service", "NRestarts") == "1"
    machine.succeed("journalctl --sync; journalctl --unit=layered-storesd | grep -i watchdog")
    assert status()["state"] == "active"
    assert identity() == before
    reader_saw_no_gap()
    machine.succeed("systemctl show -P StatusText layered-storesd | grep -x '1 of 1 store active'")
    no_drop_in()

with subtest("A daemon that is alive is not, however short the watchdog"):
    # No shorter than a process may have to wait for a processor.
    watchdog = 2 * PATIENCE
    drop_in(f"WatchdogSec={watchdog}s")
    machine.succeed("systemctl restart layered-storesd")
    end = time.monotonic() + 3 * watchdog
    while time.monotonic() < end:
        machine.succeed("layered-stores remount ci")
    assert machine.get_unit_property("layered-storesd.service", "NRestarts") == "0"
    no_drop_in()
    machine.succeed("systemctl restart layered-storesd")

with subtest("With a wrong configuration it gives up at once, and the store stays up"):
    before = identity()
    start_reader()
    wrong = f"sed '/^\\[stores/a uper-layer = 1' /srv/config.toml >{CONFIG}"
    machine.succeed(f"cp {CONFIG} /srv/config.toml", f"rm {CONFIG}", wrong)
    machine.fail("systemctl restart layered-storesd")
    daemon = machine.get_unit_info("layered-storesd.service")
    assert daemon["ActiveState"] == "failed", daemon["ActiveState"]
    assert daemon["ExecMainStatus"] == "78", daemon["ExecMainStatus"]
    assert daemon["NRestarts"] == "0", daemon["NRestarts"]
    # The status line and the journal say where the mistake is, and what was meant.
    mistake = f'{CONFIG}:2:1: store "ci": unknown key "uper-layer"; did you mean "upper-layer"?'
    assert daemon["StatusText"] == mistake, daemon["StatusText"]
    machine.succeed(
        "journalctl --sync",
        f"journalctl --unit=layered-storesd --priority=err | grep -F '{mistake}'",
    )
    # Nix goes on.
    build(uri, "without-a-daemon", "echo on > $out")
    machine.succeed(f"cp /srv/config.toml {CONFIG}", "systemctl start layered-storesd")
    assert status()["state"] == "active"
    assert identity() == before
    reader_saw_no_gap()

with subtest("Records of earlier runs that cannot be read are not taken for none"):
    before = identity()
    known = "/var/lib/layered-stores/known"
    status_text = "systemctl show -P StatusText layered-storesd"
    # The directory: which stores are mounted and declared no more, nobody could tell.
    machine.succeed("systemctl stop layered-storesd", f"mv {known} /srv/known && touch {known}")
    machine.fail("systemctl start layered-storesd")
    # It is started again and again, and has said nothing yet each time.
    said = f"cannot read {known}: .* stay mounted and unseen"
    machine.wait_until_succeeds(f"{status_text} | grep '{said}'", timeout=60)
    machine.succeed("systemctl stop layered-storesd", f"rm {known} && mv /srv/known {known}")
    # One record of a store that is declared, and one of a store that is not.
    machine.succeed(f"echo '{{' | tee {known}/gone.json >{known}/ci.json")
    for _ in range(2):
        machine.succeed("systemctl restart layered-storesd")
        machine.succeed(f"{status_text} | grep 'records that cannot be read: gone'")
    machine.succeed(
        "journalctl --sync",
        "journalctl --unit=layered-storesd | grep 'gone is not declared any more'",
    )
    machine.succeed(f"jq -e '.name == \"ci\"' {known}/ci.json", f"rm {known}/ci.json.unreadable")
    assert identity() == before
    machine.succeed(f"rm {known}/gone.json", "systemctl restart layered-storesd")
    assert status()["state"] == "active"

# The whole machine

with subtest("A path in both layers is deleted from the upper one"):
    both = build(uri, "both", "echo both > $out")
    assert build(LOWER, "both", "echo both > $out") == both
    name = both.removeprefix("/nix/store/")
    machine.succeed(f"test -e {UPPER}/{name}")
    machine.succeed(f"nix-store --store '{uri}' --delete {both}")
    machine.succeed(f"test ! -e {UPPER}/{name}", f"grep both {merged(both)}")
    assert status()["refresh-count"] >= 1, status()


def everything_is_back() -> None:
    machine.wait_for_unit("layered-storesd.service")
    machine.wait_for_unit("layered-stores.target")
    assert status()["state"] == "active", status()
    assert status()["problems"] == [], status()
    machine.succeed(UP_WITH_DATA)
    # The database knows what was built, and what was deleted from the upper layer is the lower's.
    machine.succeed(f"nix-store --store '{uri}' --check-validity {above} {slow}")
    machine.succeed(f"test ! -e {UPPER}/{name}", f"grep both {merged(both)}")
    machine.succeed("layered-stores verify ci")
    build(uri, "after-boot", "echo $PPID > $out")


with subtest("A reboot brings it all back"):
    machine.reboot()
    everything_is_back()

with subtest("So does a power cut"):
    machine.succeed("sync")
    machine.crash()
    machine.start(allow_reboot=True)
    everything_is_back()

with subtest("And one just after a store was brought up"):
    machine.succeed("layered-stores stop ci", "sync", "layered-stores start ci")
    machine.crash()
    machine.start(allow_reboot=True)
    everything_is_back()
