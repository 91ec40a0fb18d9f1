# A store's own Nix daemon: whoever it lets in builds into the store without being root, and nobody
# has to know of mounts. It is there when the store is, and goes with it.
import json
from typing import Any

CONFIG = "/etc/layered-stores/config.toml"
ROOT = "/var/lib/layered-stores/stores/ci/root"
MERGED = f"{ROOT}/nix/store"
DIRECTORY = "/run/layered-stores/ci"
SOCKET = f"{DIRECTORY}/daemon.sock"
SOCKET_UNIT = "layered-stores-nix-daemon@ci.socket"
SERVICE = "layered-stores-nix-daemon@ci.service"


def status() -> dict[str, Any]:
    """What `layered-stores status ci` says."""
    _, output = machine.execute("layered-stores status ci --json")
    properties: dict[str, Any] = json.loads(output)
    return properties


def as_user(user: str, command: str) -> str:
    """A command line that runs a command as somebody else."""
    return f"cd /tmp && runuser --user {user} -- env HOME=/tmp/{user} USER={user} {command}"


def build_command(user: str, name: str, script: str) -> str:
    """A command line with which a user has the store's Nix daemon build something."""
    derivation = (
        f'derivation {{ name = "{name}"; system = builtins.currentSystem; '
        f'builder = "/bin/sh"; args = [ "-c" "{script}" ]; }}'
    )
    command = f"nix build --store unix://{SOCKET} --no-link --print-out-paths --impure --expr"
    return as_user(user, f"{command} '{derivation}'")


def build(user: str, name: str, script: str) -> str:
    """Has it built, and returns its store path."""
    return machine.succeed(build_command(user, name, script)).strip()


def merged(path: str) -> str:
    """Where a store path is to be found outside of Nix."""
    return path.replace("/nix/store", MERGED)


def contents_of_host() -> str:
    """The machine's own store objects; `.links` and the like are not."""
    return machine.succeed("ls /nix/store")


def mount_id() -> str:
    return machine.succeed(f"awk '$5 == \"{MERGED}\" {{ print $1, $3 }}' /proc/self/mountinfo")


def start_host_daemon() -> None:
    """The machine's own Nix daemon, where it is not there already."""
    machine.succeed(
        "systemctl start nix-daemon.socket 2>/dev/null || "
        "systemd-run --quiet -E PATH --collect --unit=host-nix-daemon nix-daemon --daemon"
    )
    machine.wait_for_file("/nix/var/nix/daemon-socket/socket", timeout=60)


machine.start(allow_reboot=True)
machine.wait_for_unit("layered-storesd.service")
start_host_daemon()
machine.succeed(
    "install -d -o alice /tmp/alice; install -d -o bob /tmp/bob; mkdir -pm 777 /tmp/nobody"
)

with subtest("With the store comes a socket, and behind it nothing until somebody connects"):
    machine.wait_for_unit(SOCKET_UNIT)
    machine.succeed(f"test -S {SOCKET}", f"test $(stat -c %a {SOCKET}) = 666")
    machine.require_unit_state(SERVICE, "inactive")
    assert status()["daemon-uri"] == f"unix://{SOCKET}?root={ROOT}"
    assert status()["daemon-uri"] in machine.succeed("layered-stores status ci")
    assert machine.succeed("layered-stores uri --daemon ci").strip() == status()["daemon-uri"]
    # Its settings may hold secrets.
    machine.succeed(f"test $(stat -c %a:%U {DIRECTORY}/nix.conf) = 600:root")
    needed = machine.succeed(f"systemctl list-dependencies --plain '{SOCKET_UNIT}'")
    assert status()["mount-unit"] in needed, needed

with subtest("An unprivileged user builds into the store, and the machine's own is untouched"):
    before = contents_of_host()
    built = build("alice", "from-alice", "echo made by alice > $out")
    assert machine.succeed(f"cat {merged(built)}") == "made by alice\n"
    machine.fail(f"test -e {built}")
    assert contents_of_host() == before
    machine.require_unit_state(SERVICE)
    # What she could not do by herself.
    machine.fail(as_user("alice", f"touch {merged(built)}"))

with subtest("Two users share it, one of them through a group"):
    machine.succeed(as_user("bob", f"nix-store --store unix://{SOCKET} --check-validity {built}"))
    on_top = build(
        "bob",
        "from-bob",
        f"read -r line < ${{builtins.storePath {built}}}; echo $line, and bob > $out",
    )
    assert machine.succeed(f"cat {merged(on_top)}") == "made by alice, and bob\n"
    # Nix's older commands need to be told where the store objects are.
    machine.succeed(
        as_user("bob", f"nix-store --store 'unix://{SOCKET}?root={ROOT}' --realise {built}")
    )
    # What both want is built once.
    assert build("bob", "from-alice", "echo made by alice > $out") == built

with subtest("Inside of the store a user's Nix uses its daemon"):
    machine.succeed(as_user("alice", f"layered-stores enter ci -- nix path-info {built}"))

with subtest("Nobody else gets in"):
    machine.fail(build_command("nobody", "from-nobody", "echo > $out"))
    # Nix hangs up first and says so then.
    machine.wait_until_succeeds(
        f"journalctl --boot -u '{SERVICE}' | grep \"'nobody' is not allowed\"", timeout=60
    )

with subtest("The hook is called when the daemon deletes a path that is in both layers"):
    both = build("alice", "both", "echo both > $out")
    machine.succeed(
        f"nix-store --store 'unix://{SOCKET}?root={ROOT}' --export {both} | nix-store --import"
    )
    refreshes = int(status()["refresh-count"])
    machine.succeed(f"nix-store --store unix://{SOCKET} --delete {both}")
    assert int(status()["refresh-count"]) > refreshes, status()
    assert machine.succeed(f"cat {merged(both)}") == "both\n"

with subtest("A build that runs keeps the store, and the daemon goes on afterwards"):
    # Before it comes somebody with a name that a terminal would obey.
    machine.succeed(
        "systemd-run --quiet -E PATH --unit=loud --service-type=notify -p NotifyAccess=all "
        f'/bin/sh -c \'cd {ROOT}/nix/store; printf "\\033[2J" >/proc/self/comm; '
        "systemd-notify --ready --pid=parent; sleep infinity; :'"
    )
    # It runs until it is told to end, with what a shell has built in.
    script = "end() { echo > $out; exit; }; trap end USR1; while :; do :; done"
    slow = build_command("alice", "slow", script)
    machine.succeed(f"({slow}) >/tmp/slow.out 2>&1 &")
    # Until it catches that signal, which is bit 9.
    machine.wait_until_succeeds(
        "grep '^SigCgt:.*[2367abef]..$' /proc/$(pgrep -f '^sh -c end')/status", timeout=60
    )
    said = machine.fail("layered-stores stop ci 2>&1")
    assert "it is used by" in said and r"\u{1b}[2J (pid " in said, said
    shown = [machine.execute(f"layered-stores status ci {how}")[1] for how in ("", "--json")]
    assert "\x1b" not in "".join([said, *shown]), (said, shown)
    machine.succeed("systemctl stop loud")
    machine.wait_until_succeeds(f"systemctl is-active '{SOCKET_UNIT}'", timeout=60)
    build("bob", "meanwhile", "echo > $out")
    machine.succeed("pkill -USR1 -f '^sh -c end'")
    machine.wait_until_succeeds("grep -q ^/nix/store/ /tmp/slow.out", timeout=60)

with subtest("It goes with the store, and comes back with it"):
    machine.wait_until_succeeds("layered-stores stop ci", timeout=60)
    machine.require_unit_state(SERVICE, "inactive")
    machine.fail(f"test -e {SOCKET}")
    machine.succeed("layered-stores start ci")
    machine.succeed(f"test -S {SOCKET}")
    build("alice", "again", "echo > $out")

with subtest("A socket that somebody stopped, or that systemd gave up, is said, and started again"):

    def daemon_failed() -> str:
        """What is said about the Nix daemon; empty if all is well."""
        return "".join(p["message"] for p in status()["problems"] if p["code"] == "daemon-failed")

    def is_said(words: str) -> None:
        retry(lambda _: words in daemon_failed(), 60)

    def is_mended() -> None:
        retry(lambda _: not daemon_failed(), 120)
        machine.require_unit_state(SOCKET_UNIT)

    machine.succeed(f"systemctl stop '{SOCKET_UNIT}'")
    is_said("somebody has stopped its socket")
    is_mended()
    build("alice", "after-stop", "echo > $out")
    # A daemon that ends at once is started for the same connection again and again.
    drop_in = f"/run/systemd/system/{SERVICE}.d"
    machine.succeed(
        f"systemctl stop '{SERVICE}'",
        f"mkdir {drop_in}",
        f"printf '[Service]\\nExecStart=\\nExecStart=false\\n' >{drop_in}/fail.conf",
        "systemctl daemon-reload",
    )
    machine.fail(build_command("alice", "never", "echo > $out"))
    is_said("systemd has given its socket up (")
    machine.succeed(f"rm -r {drop_in}", "systemctl daemon-reload")
    is_mended()
    build("alice", "after-failure", "echo > $out")

with subtest("A restart of layered-storesd is nothing to it"):
    since = machine.get_unit_property(SERVICE, "InvocationID")
    socket_since = machine.get_unit_property(SOCKET_UNIT, "InvocationID")
    machine.succeed("systemctl restart layered-storesd")
    assert machine.get_unit_property(SERVICE, "InvocationID") == since
    assert machine.get_unit_property(SOCKET_UNIT, "InvocationID") == socket_since

with subtest("Who may is changed without the mount, and in force for the next connection"):
    before = mount_id()
    machine.succeed(
        f"cp --remove-destination $(readlink -f {CONFIG}) /srv/config.toml",
        f"rm {CONFIG}; sed 's/\"alice\", //' /srv/config.toml >{CONFIG}",
        "layered-stores reload",
    )
    machine.fail(build_command("alice", "no-more", "echo > $out"))
    build("bob", "still", "echo > $out")
    assert mount_id() == before

with subtest("Declared no more, it is gone, and the store stays"):
    machine.succeed(f"sed '/daemon[]]/,$d' /srv/config.toml >{CONFIG}", "layered-stores reload")
    machine.fail(f"test -e {SOCKET}")
    machine.fail(f"test -e {DIRECTORY}")
    assert status()["state"] == "active" and status()["daemon-uri"] == ""
    machine.succeed(f"cp /srv/config.toml {CONFIG}", "layered-stores reload", f"test -S {SOCKET}")
    assert mount_id() == before

with subtest("A socket that cannot be made is that store's problem, and the store is up"):
    machine.succeed(
        f"sed 's#allowed-users#socket-path = \"/proc/nope/sock\"\\n&#' /srv/config.toml >{CONFIG}",
        "layered-stores reload",
    )
    assert status()["state"] == "active"
    problems = {problem["code"]: problem["message"] for problem in status()["problems"]}
    assert list(problems) == ["daemon-failed"], problems
    assert SOCKET_UNIT in problems["daemon-failed"], problems
    machine.succeed(f"cp /srv/config.toml {CONFIG}", "layered-stores reload", f"test -S {SOCKET}")
    assert status()["problems"] == []

with subtest("It is back after a reboot"):
    machine.reboot()
    machine.wait_for_unit("layered-storesd.service")
    start_host_daemon()
    machine.wait_for_unit(SOCKET_UNIT)
    machine.succeed("install -d -o alice /tmp/alice")
    assert build("alice", "from-alice", "echo made by alice > $out") == built
