# How far the units of the daemon and of stores' Nix daemons are closed, and that all works in them
# that has to. On a machine with build users, as every one with Nix for many.
import json
import shlex

UNIT = "layered-stores-nix-daemon@{}.service"
SOCKET = "/run/layered-stores/{}/daemon.sock"
MERGED = "/var/lib/layered-stores/stores/sys/root/nix/store"
# A binary cache over HTTP.
SERVER = """
import socket
listener = socket.create_server(("127.0.0.1", 8123))
while True:
    connection, _ = listener.accept()
    path = connection.recv(65536).split()[1].decode()
    try:
        status, body = "200 OK", open("/srv/cache" + path, "rb").read()
    except OSError:
        status, body = "404 Not Found", b""
    head = f"HTTP/1.1 {status}\\r\\nContent-Length: {len(body)}\\r\\nConnection: close\\r\\n\\r\\n"
    connection.sendall(head.encode() + body)
    connection.close()
"""


def as_alice(command: str) -> str:
    """A command line that runs a command as somebody without rights."""
    return f"cd /tmp && runuser --user alice -- env HOME=/tmp/alice USER=alice {command}"


def build_command(name: str, script: str, attributes: str = "", store: str = "sys") -> str:
    """A command line with which alice has a store's Nix daemon build something."""
    derivation = (
        f'derivation {{ name = "{name}"; system = builtins.currentSystem; '
        f'builder = "/bin/sh"; args = [ "-c" {json.dumps(script)} ]; {attributes} }}'
    )
    command = f"nix build --store unix://{SOCKET.format(store)} --no-link --print-out-paths"
    return as_alice(f"{command} --impure --expr {shlex.quote(derivation)}")


def build(name: str, script: str, attributes: str = "", store: str = "sys") -> str:
    """Has it built, and returns its store path."""
    return machine.succeed(build_command(name, script, attributes, store)).strip()


def merged(path: str) -> str:
    """Where a store path is to be found outside of Nix."""
    return path.replace("/nix/store", MERGED)


def cached(name: str) -> str:
    """A path that is nowhere but in the binary cache."""
    machine.succeed(f"echo {name} >/tmp/{name}")
    path = machine.succeed(f"nix-store --add /tmp/{name}").strip()
    machine.succeed(f"nix copy --to file:///srv/cache {path}", f"nix-store --delete {path}")
    return path


machine.wait_for_unit("layered-storesd.service")
machine.succeed(
    # NixOS has them.
    "getent group nixbld >/dev/null || { groupadd --system nixbld; for i in 1 2 3 4; do "
    "useradd --system --gid nixbld --groups nixbld --home-dir /var/empty "
    "--shell /bin/sh nixbld$i; done; }",
    "! grep -q '^build-users-group = *$' /etc/nix/nix.conf || "
    "sed -i 's/^build-users-group.*/build-users-group = nixbld/' /etc/nix/nix.conf",
    "systemctl start nix-daemon.socket 2>/dev/null || "
    "systemd-run --quiet -E PATH --collect --unit=host-nix-daemon nix-daemon --daemon",
    "install -d -o alice /tmp/alice",
    # In a container parts of /proc are covered, and then the kernel lets no sandbox mount another.
    "findmnt --raw --noheadings --output TARGET | awk '/^.proc./' | tac | "
    "while read -r covered; do umount --lazy $covered 2>/dev/null || true; done",
)
machine.wait_for_file("/nix/var/nix/daemon-socket/socket", timeout=60)

with subtest("The units are as closed as docs/security.md says"):
    for unit, threshold in {
        "layered-storesd.service": 24,
        UNIT.format("sys"): 64,
        UNIT.format("hers"): 46,
        "layered-stores-gc@sys.service": 43,
    }.items():
        said = machine.succeed(f"systemd-analyze security --no-pager '{unit}' | tail -n 1").strip()
        machine.log(said)
        machine.succeed(f"systemd-analyze security --threshold={threshold} '{unit}' >/dev/null")

with subtest("The daemon has the capabilities that docs/security.md gives reasons for"):
    # More of them than one hardly count in what systemd-analyze says.
    kept = "chown dac_override dac_read_search fowner fsetid linux_immutable setfcap"
    kept += " sys_admin sys_chroot sys_ptrace"
    shown = machine.get_unit_property("layered-storesd.service", "CapabilityBoundingSet")
    assert sorted(shown.split()) == [f"cap_{name}" for name in kept.split()], shown

with subtest("There is only so much of the machine that the daemon may take"):
    for name, most in {
        "MemoryHigh": 256 * 1024**2,
        "MemoryMax": 512 * 1024**2,
        "TasksMax": 512,
    }.items():
        t.assertEqual(machine.get_unit_property("layered-storesd.service", name), str(most), name)

with subtest("The daemon executes nothing but itself"):
    pid = machine.get_unit_property("layered-storesd.service", "MainPID")
    program = "/srv/program -c true"
    machine.succeed(f"install -m 755 $(readlink -f $(command -v bash)) /srv/program && {program}")
    enter = f"nsenter --target {pid} --mount -- "
    said = machine.fail(f"{enter} {program} 2>&1")
    assert "Permission denied" in said, said
    machine.succeed(f"{enter} $(readlink -f /proc/{pid}/exe) --version")

with subtest("Builds are sandboxed and run as build users"):
    inside = build("inside", "echo $$ $NIX_BUILD_TOP > $out; test ! -e /srv")
    assert machine.succeed(f"cat {merged(inside)}") == "1 /build\n"
    assert machine.succeed(f"stat --format %U {merged(inside)}") == "root\n"
    # It runs until it is told to end.
    slow = build_command("slow", "end() { echo > $out; exit; }; trap end USR1; while :; do :; done")
    machine.succeed(f"({slow}) >/tmp/slow.out 2>&1 &")
    builder = "pgrep --uid $(id -u nixbld1) -f '^[^ ]*sh -c end'"
    # Until it catches that signal, which is bit 9.
    machine.wait_until_succeeds(
        f"grep '^SigCgt:.*[2367abef]..$' /proc/$({builder})/status", timeout=60
    )
    machine.succeed(f"kill -USR1 $({builder})")
    machine.wait_until_succeeds("grep -q ^/nix/store/ /tmp/slow.out", timeout=120)

with subtest("And for a machine of 32 bits, where this one can do that"):
    machine.succeed(
        "test $(uname -m) != x86_64 || "
        + build_command("old", "echo > $out").replace("builtins.currentSystem", '"i686-linux"')
    )

with subtest("A user's Nix daemon builds in a sandbox as well"):
    build("hers", "echo > $out; test ! -e /srv", store="hers")

with subtest("Substitutes come from a directory, and over the network"):
    path = cached("from-a-directory")
    url = f"unix://{SOCKET.format('sys')}"
    # Without a network Nix would not look for any.
    realise = f"nix build --store {url} --no-link --option substitute true"
    machine.succeed(as_alice(f"{realise} {path}"))
    assert machine.succeed(f"cat {merged(path)}") == "from-a-directory\n"
    machine.succeed(
        f"systemd-run --quiet -E PATH --collect --unit=cache python3 -c {shlex.quote(SERVER)}"
    )
    connect = 'import socket; socket.create_connection(("127.0.0.1", 8123)).send(b"GET / HTTP/1.1")'
    machine.wait_until_succeeds(f"python3 -c {shlex.quote(connect)}", timeout=20)
    path = cached("over-the-network")
    machine.succeed(
        # Root is trusted and may name another cache.
        f"{realise} --option substituters http://127.0.0.1:8123 {path}"
    )
    assert machine.succeed(f"cat {merged(path)}") == "over-the-network\n"

with subtest("Builds are handed on to other machines, and the result comes back"):
    away = build("away", "echo built away > $out", 'requiredSystemFeatures = [ "elsewhere" ];')
    assert machine.succeed(f"cat {merged(away)}") == "built away\n"
    machine.require_unit_state(UNIT.format("remote"))
    upper = "/var/lib/layered-stores/stores/remote/upper"
    machine.succeed(f"test -e {upper}/{away.removeprefix('/nix/store/')}")

with subtest("Garbage is collected, and not what a process of somebody else uses"):
    used = build("used", "echo > $out")
    machine.succeed(
        "systemd-run --quiet -E PATH --unit=user --service-type=exec --uid=alice "
        f"-E USES={used} sleep infinity"
    )
    garbage = build("garbage", "echo > $out")
    machine.succeed(as_alice(f"nix store gc --store {url}"))
    machine.succeed(f"test -e {merged(used)}")
    machine.fail(f"test -e {merged(garbage)}")
    machine.succeed("systemctl stop user")

with subtest("In the merged directory everything works that a store needs"):
    name = f"{'0' * 32}-files"
    machine.succeed(
        f"install -d /nix/store/{name}/below; echo below >/nix/store/{name}/below/file",
        f"install -d -m 2755 {MERGED}/{'1' * 32}-above",
    )
    machine.succeed(
        f"cd {MERGED} && test $(stat --format %a {'1' * 32}-above) = 2755",
        # Whiteouts, opaque directories, copies up, hard links, attributes.
        f"cd {MERGED}/{name} && mv below/file below/moved && ln below/moved below/linked",
        f"cd {MERGED}/{name} && chown alice:nixbld below/moved && chmod 0640 below/moved",
        f"cd {MERGED}/{name} && setfattr -n security.capability "
        f"-v 0x0100000200040000000000000000000000000000 below/moved",
        f"cd {MERGED}/{name} && getfattr -n security.capability below/moved",
        f'cd {MERGED}/{name} && rm -r below && mkdir below && test -z "$(ls below)"',
        f"cd {MERGED} && rm -r {name} && test ! -e {name} && mkdir {name} && rmdir {name}",
        f"test -f /nix/store/{name}/below/file; rm -r {MERGED}/{'1' * 32}-above",
    )
