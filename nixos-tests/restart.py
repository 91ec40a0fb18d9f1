# The daemon goes away: it is restarted, upgraded, hung, misconfigured, and taken down with the
# whole machine. Stores stay usable meanwhile, and the next daemon finds everything as it should be.
# What becomes of one that is killed on the way is the scenario killpoints.
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

# Where every instruction is emulated, all takes longer.
PATIENCE = 10 if machine.execute("systemd-detect-virt")[1].strip() == "qemu" else 1

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
    # One mount and none beneath it, of the store's layers.
    layers = f"lowerdir={LOWER}/nix/store,upperdir={UPPER}"
    machine.succeed(
        f"test $(grep -c ' {MERGED} ' /proc/self/mountinfo) = 1",
        f"grep '^overlay {MERGED} .*[ ,]{layers},' /proc/self/mounts",
        f"grep below {merged(below)}",
        f"grep above {merged(above)}",
    )
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
