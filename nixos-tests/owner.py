# A store that belongs to a user: what its Nix daemon does it does as that user, without any right
# of root, and nothing that root runs follows what the user owns. Build users are there, as on every
# machine with Nix for many.
import json
import shlex
from typing import Any

CONFIG = "/etc/layered-stores/config.toml"
STORE = "/var/lib/layered-stores/stores/own"
UPPER = f"{STORE}/upper"
STATE = f"{STORE}/root/nix/var/nix"
MERGED = f"{STORE}/root/nix/store"
SOCKET = "/run/layered-stores/own/daemon.sock"
SOCKET_UNIT = "layered-stores-nix-daemon@own.socket"
SERVICE = "layered-stores-nix-daemon@own.service"
# What root has, and nobody else may change.
ROOTS = "/srv/roots"


def status(store: str = "own") -> dict[str, Any]:
    """What `layered-stores status` says."""
    _, output = machine.execute(f"layered-stores status {store} --json")
    properties: dict[str, Any] = json.loads(output)
    return properties


def problems() -> dict[str, str]:
    """The store's problems, by their codes."""
    return {problem["code"]: problem["message"] for problem in status()["problems"]}


def as_user(user: str, command: str) -> str:
    """A command line that runs a command as somebody else."""
    if user == "root":
        return command
    return f"cd /tmp && runuser --user {user} -- env HOME=/tmp/{user} USER={user} {command}"


def expression(name: str, script: str) -> str:
    """A derivation, quoted for the shell."""
    return shlex.quote(
        f'derivation {{ name = "{name}"; system = builtins.currentSystem; '
        f'builder = "/bin/sh"; args = [ "-c" {json.dumps(script)} ]; }}'
    )


def build_command(user: str, url: str, name: str, script: str, options: str = "--no-link") -> str:
    """A command line with which a user builds something in a store."""
    command = f"nix build --store {url} {options} --print-out-paths --impure --expr"
    return as_user(user, f"{command} {expression(name, script)}")


def build(
    user: str, name: str, script: str = "echo made > $out", options: str = "--no-link"
) -> str:
    """Has the store's Nix daemon build something, and returns its store path."""
    return machine.succeed(build_command(user, f"unix://{SOCKET}", name, script, options)).strip()


def merged(path: str) -> str:
    """Where a store path is to be found outside of Nix."""
    return path.replace("/nix/store", MERGED)


def configure(sed: str) -> None:
    """Changes the configuration that the machine has booted with, and puts it in force."""
    machine.succeed(
        f"test -e /srv/config.toml || cp $(readlink -f {CONFIG}) /srv/config.toml",
        f"rm {CONFIG}; sed {shlex.quote(sed)} /srv/config.toml >{CONFIG}",
        "layered-stores reload",
    )


def owner_and_mode(path: str) -> str:
    return machine.succeed(f"stat --format '%U %a' {path}").strip()


def process_status(pid: int) -> dict[str, str]:
    """What the kernel says of a process (proc_pid_status(5))."""
    lines = machine.succeed(f"cat /proc/{pid}/status").splitlines()
    return {
        key: " ".join(value.split()) for key, _, value in (line.partition(":") for line in lines)
    }


def daemon_pid() -> int:
    return int(machine.get_unit_property(SERVICE, "MainPID"))


def start_host_daemon() -> None:
    """The machine's own Nix daemon, where it is not there already."""
    machine.succeed(
        "systemctl start nix-daemon.socket 2>/dev/null || "
        "systemd-run --quiet -E PATH --collect --unit=host-nix-daemon nix-daemon --daemon"
    )
    machine.wait_for_file("/nix/var/nix/daemon-socket/socket", timeout=60)


machine.start(allow_reboot=True)
machine.wait_for_unit("layered-storesd.service")
machine.succeed(
    # NixOS has them.
    "getent group nixbld >/dev/null || { groupadd --system nixbld; for i in 1 2 3 4; do "
    "useradd --system --gid nixbld --groups nixbld --home-dir /var/empty "
    "--shell /bin/sh nixbld$i; done; }",
    "! grep -q '^build-users-group = *$' /etc/nix/nix.conf || "
    "sed -i 's/^build-users-group.*/build-users-group = nixbld/' /etc/nix/nix.conf",
)
start_host_daemon()
machine.succeed(
    "install -d -o alice /tmp/alice; install -d -o bob /tmp/bob",
    f"install -d -m 0755 {ROOTS}",
)

with subtest("Links in the state dir lead its Nix daemon to nothing of root's"):
    machine.succeed(
        as_user("alice", f"mkdir -p {STATE}/profiles {STATE}/gcroots"),
        as_user("alice", f"ln -sfn {ROOTS} {STATE}/profiles/per-user"),
        as_user("alice", f"ln -sfn {ROOTS} {STATE}/gcroots/auto"),
        f"chmod 0700 {ROOTS}",
    )
    # Whether this works is the owner's own affair.
    machine.execute(build_command("alice", f"unix://{SOCKET}", "linked", "echo > $out"))
    assert owner_and_mode(ROOTS) == "root 700", owner_and_mode(ROOTS)
    machine.succeed(f"chmod 0755 {ROOTS}")
    # An indirect root is a link that the daemon makes; it fails, or is nowhere of root's.
    machine.execute(
        build_command("alice", f"unix://{SOCKET}", "script", "echo > $out", "-o /tmp/alice/script")
    )
    assert machine.succeed(f"ls -A {ROOTS}") == "", machine.succeed(f"ls -lA {ROOTS}")
    machine.succeed(f"rm {STATE}/profiles/per-user {STATE}/gcroots/auto")
    built = build("alice", "from-alice")

with subtest(
    "It runs as the owner, with no capability and none to be had, and keeps out of their home"
):
    kernel = process_status(daemon_pid())
    alice = machine.succeed("id -u alice").strip()
    assert kernel["Uid"] == " ".join([alice] * 4), kernel
    capabilities = {key: int(value, 16) for key, value in kernel.items() if key.startswith("Cap")}
    assert len(capabilities) == 5 and not any(capabilities.values()), capabilities
    assert kernel["NoNewPrivs"] == "1", kernel
    environment = machine.succeed(f"tr '\\0' '\\n' </proc/{daemon_pid()}/environ").splitlines()
    assert "HOME=/var/cache/layered-stores/own" in environment, environment
    assert owner_and_mode("/var/cache/layered-stores/own") == "alice 700"

with subtest("Its settings may hold secrets: they are root's, and nobody else's but the daemon's"):
    assert owner_and_mode("/run/layered-stores/own/nix.conf") == "root 600"
    machine.fail(as_user("alice", "cat /run/layered-stores/own/nix.conf"))
    machine.fail(as_user("bob", f"cat /run/credentials/{SERVICE}/nix.conf"))
    # The daemon keeps them with all that it knows of the store.
    assert owner_and_mode("/var/lib/layered-stores/known/own.json") == "root 600"
    machine.fail(as_user("bob", "cat /var/lib/layered-stores/known/own.json"))

with subtest(
    "What it builds is the owner's, for the owner, for whom it lets in, and for nobody else"
):
    assert owner_and_mode(merged(built)).startswith("alice "), owner_and_mode(merged(built))
    machine.succeed(as_user("bob", f"nix-store --store unix://{SOCKET} --check-validity {built}"))
    on_top = build(
        "bob",
        "from-bob",
        f"read -r line < ${{builtins.storePath {built}}}; echo $line, and bob > $out",
    )
    assert machine.succeed(f"cat {merged(on_top)}") == "made, and bob\n"
    said = machine.fail(build_command("nobody", f"unix://{SOCKET}", "no", "echo > $out") + " 2>&1")
    assert "cannot open connection" in said, said
    # Root may use it like everybody else.
    build("root", "from-root")
    assert owner_and_mode(UPPER) == "alice 755", owner_and_mode(UPPER)

with subtest("The owner opens the store without it as well"):
    uri = shlex.quote(machine.succeed(as_user("alice", "layered-stores uri own")).strip())
    direct = machine.succeed(
        build_command(
            "alice",
            uri,
            "direct",
            f"read -r line < ${{builtins.storePath {on_top}}}; echo $line > $out",
        )
    ).strip()
    machine.succeed(as_user("bob", f"nix-store --store unix://{SOCKET} --check-validity {direct}"))

with subtest("Its builds are sandboxed where the kernel lets users make namespaces"):
    # In a container parts of /proc are covered, and then the kernel lets nobody mount another.
    machine.succeed(
        "findmnt --raw --noheadings --output TARGET | awk '/^.proc./' | tac | "
        "while read -r covered; do umount --lazy $covered 2>/dev/null || true; done"
    )
    since = machine.get_unit_property(SERVICE, "InvocationID")
    configure("s/^settings = { max-jobs = 2/&, sandbox = true, sandbox-fallback = false/")
    # Changed settings are in force for the next connection: by a daemon that was started with them.
    inside = build("bob", "sandboxed", "echo $$ > $out; test ! -e /srv")
    assert machine.get_unit_property(SERVICE, "InvocationID") != since
    assert machine.succeed(f"cat {merged(inside)}") == "1\n"
    assert owner_and_mode(merged(inside)).startswith("alice "), owner_and_mode(merged(inside))
    configure("")

with subtest("The hook is called for the owner, and garbage is collected as the owner"):
    both = build("alice", "both", "echo both > $out")
    machine.succeed(
        f"nix-store --store 'unix://{SOCKET}?root={STORE}/root' --export {both} | "
        "nix-store --import"
    )
    refreshes = int(status()["refresh-count"])
    machine.succeed(as_user("bob", f"nix-store --store unix://{SOCKET} --delete {both}"))
    assert int(status()["refresh-count"]) > refreshes, status()
    assert machine.succeed(f"cat {merged(both)}") == "both\n"
    build("alice", "kept", options="-o /tmp/alice/kept")
    kept = machine.succeed("readlink /tmp/alice/kept").strip()
    machine.succeed(as_user("bob", f"nix store gc --store unix://{SOCKET}"))
    machine.succeed(f"test -e {merged(kept)}")
    machine.fail(f"test -e {merged(inside)}")

with subtest("Root is kept from opening it directly, and told how else"):
    said = machine.fail("layered-stores uri own 2>&1")
    assert "belongs to alice" in said and "uri --daemon own" in said, said
    # With the store at /nix, what root runs there may be the owner's, and Nix makes profiles where
    # their links lead, also when it uses the store's Nix daemon.
    profiles = f"{STORE}/root/nix/var/nix/profiles"
    planted = f"{profiles}/default/bin/nix"
    machine.succeed(
        as_user("alice", f"sh -c 'mkdir -p {profiles}/default/bin && echo id >{planted}'"),
        f"chmod 755 {planted}",
    )
    said = machine.fail(
        "PATH=/nix/var/nix/profiles/default/bin:$PATH "
        "layered-stores enter own -- nix --version 2>&1"
    )
    assert "uid=0" not in said and "runuser -u alice -- layered-stores enter own" in said, said
    machine.succeed(f"rm -r {profiles}/default")
    machine.succeed(as_user("alice", f"layered-stores enter own -- nix path-info {kept}"))
    assert owner_and_mode(UPPER) == "alice 755", owner_and_mode(UPPER)
    machine.succeed("layered-stores uri --daemon own")
    machine.succeed(as_user("alice", "layered-stores uri own"))
    machine.succeed("layered-stores uri sys")
    # Its own stores root goes on opening as before.
    machine.succeed(build_command("root", "$(layered-stores uri sys)", "roots", "echo > $out"))

with subtest("Root's Nix takes a store over all the same; that is said, with a way out that works"):
    uri = shlex.quote(str(status()["store-uri"]))
    machine.succeed(build_command("root", uri, "taken", "echo > $out"))
    assert owner_and_mode(UPPER) == "root 1775", owner_and_mode(UPPER)
    machine.wait_until_succeeds(
        "(layered-stores status own --json || true) | grep other-owner", timeout=60
    )
    message = problems()["other-owner"]
    assert "belongs to root" in message and "the store to alice" in message, message
    # Restarted as it is, it is refused for the same reason.
    machine.succeed("layered-stores stop own")
    said = machine.fail("layered-stores start own 2>&1")
    assert "chown -hR" in said, said
    for command in message.split("`")[1:6:2]:
        machine.succeed(command)
    assert status()["problems"] == [] and status()["state"] == "active", status()
    machine.succeed(build_command("alice", uri, "direct-again", "echo > $out"))
    build("bob", "through-it-again")

with subtest("What a person puts on the template or the instance is in force beside it"):
    units = "/run/systemd/system/layered-stores-nix-daemon"
    machine.succeed(
        f"mkdir -p {units}@.service.d {units}@own.service.d",
        "printf '[Service]\\nEnvironment=http_proxy=http://proxy:1\\n' "
        f">{units}@.service.d/overrides.conf",
        f"printf '[Service]\\nTasksMax=4321\\n' >{units}@own.service.d/limits.conf",
        f"systemctl daemon-reload; systemctl stop '{SERVICE}'",
    )
    build("bob", "with-drop-ins")
    environment = machine.succeed(f"tr '\\0' '\\n' </proc/{daemon_pid()}/environ").splitlines()
    assert "http_proxy=http://proxy:1" in environment, environment
    assert machine.get_unit_property(SERVICE, "TasksMax") == "4321"
    assert process_status(daemon_pid())["Uid"] == " ".join([alice] * 4)
    machine.succeed(f"rm -r {units}@.service.d {units}@own.service.d/limits.conf")

with subtest("Without its drop-in it does not run as root instead"):
    machine.succeed(
        f"rm {units}@own.service.d/*; systemctl daemon-reload; systemctl stop '{SERVICE}'"
    )
    machine.fail(build_command("bob", f"unix://{SOCKET}", "as-root", "echo > $out"))
    machine.wait_until_succeeds(f"journalctl -u '{SERVICE}' | grep 'runs as uid 0'", timeout=60)
    machine.succeed("systemctl restart layered-storesd")
    machine.wait_until_succeeds(f"systemctl is-active '{SOCKET_UNIT}'", timeout=60)
    build("bob", "as-alice")
    assert process_status(daemon_pid())["Uid"] == " ".join([alice] * 4)

with subtest("Nor does it with a drop-in that says so: that is a problem, and nobody connects"):
    machine.succeed(
        f"printf '[Service]\\nUser=root\\n' >{units}@own.service.d/99-root.conf",
        "systemctl daemon-reload; systemctl restart layered-storesd",
    )
    machine.wait_until_succeeds(
        "(layered-stores status own --json || true) | grep daemon-failed", timeout=60
    )
    assert "User=" in problems()["daemon-failed"], problems()
    machine.fail(f"test -e {SOCKET}")
    machine.succeed(f"rm {units}@own.service.d/99-root.conf", "layered-stores reload")
    machine.wait_until_succeeds(f"systemctl is-active '{SOCKET_UNIT}'", timeout=60)
    build("bob", "alices-again")
    assert status()["problems"] == [], status()

with subtest("A store of root's has root's Nix daemon, as ever"):
    machine.succeed(
        build_command("alice", "unix:///run/layered-stores/sys/daemon.sock", "sys", "echo > $out")
    )
    pid = int(machine.get_unit_property("layered-stores-nix-daemon@sys.service", "MainPID"))
    assert process_status(pid)["Uid"] == "0 0 0 0"
    upper = str(status("sys")["upper-layer"])
    assert machine.succeed(f"stat --format '%U:%G %a' {upper}") == "root:nixbld 1775\n"

with subtest("Where others can put links for root's Nix to follow, there is none"):
    # Seen when somebody asks for a refresh, as Nix does.
    machine.succeed(f"chgrp users {upper}", "layered-stores remount sys")
    machine.wait_until_succeeds(
        "(layered-stores status sys --json || true) | grep other-owner", timeout=60
    )
    machine.wait_until_fails("test -e /run/layered-stores/sys/daemon.sock", timeout=60)
    # What lies on it works in it as well.
    machine.wait_until_succeeds(
        "(layered-stores status top --json || true) | grep 'the store sys underneath'", timeout=60
    )
    machine.wait_until_fails("test -e /run/layered-stores/top/daemon.sock", timeout=60)
    machine.succeed("layered-stores stop top", "layered-stores stop sys")
    said = machine.fail("layered-stores start sys 2>&1")
    assert f"{upper}, with group users and mode 1775, is for others than root" in said, said
    machine.succeed(f"chgrp nixbld {upper}", "layered-stores start top")
    for name in ("sys", "top"):
        machine.succeed(f"test -S /run/layered-stores/{name}/daemon.sock")
        assert status(name)["problems"] == [], status(name)
    # Nix makes files of its lower store's state dir also where it is only to read.
    lower = "/srv/alices"
    machine.succeed(
        f"nix-store --store 'local?root={lower}' --add /etc/hostname",
        f"chown -R alice {lower}/nix/var/nix; chmod 755 {lower}",
    )
    reserved = f"{lower}/nix/var/nix/db/reserved"
    machine.succeed(as_user("alice", f"ln -sfn {ROOTS}/planted {reserved}"))
    machine.execute(
        "nix --extra-experimental-features read-only-local-store store info "
        f"--store 'local?root={lower}&read-only=true'"
    )
    machine.succeed(f"rm {ROOTS}/planted")

with subtest("The example that is shipped has no mistakes, and its store of an owner works"):
    program = "readlink -f $(command -v layered-stores)"
    example = machine.succeed(
        f"echo $(dirname $({program}))/../share/doc/layered-stores/examples/config.toml"
    ).strip()
    machine.succeed(f"layered-stores check-config {example}")
    machine.succeed(
        # Its lower store is there to be read; opened once, it has all that Nix looks for.
        "nix-store --store 'local?root=/srv/stores/base' --add /etc/hostname",
        # On NixOS accounts are declared; there as here they may be made by hand.
        "groupadd ci; useradd --gid ci --home-dir /var/empty --shell /bin/sh ci",
        f"cp {example} {CONFIG}.new; rm {CONFIG}; mv {CONFIG}.new {CONFIG}",
        "layered-stores reload",
        "layered-stores start ci scratch feature",
    )
    machine.wait_until_succeeds("layered-stores list | grep 'ci *active'", timeout=60)
    made = machine.succeed(
        build_command("ci", "unix:///run/layered-stores/ci/daemon.sock", "example", "echo > $out")
    ).strip()
    assert machine.succeed(f"stat --format %U /srv/stores/ci/root{made}") == "ci\n"
    configure("")

with subtest("It is the same after a reboot"):
    machine.reboot()
    machine.wait_for_unit("layered-storesd.service")
    start_host_daemon()
    machine.wait_for_unit(SOCKET_UNIT)
    machine.succeed("install -d -o bob /tmp/bob")
    build("bob", "after-reboot")
    assert process_status(daemon_pid())["Uid"] == " ".join([alice] * 4)
