# What `layered-stores uri` prints works for every command of Nix, or for none: an empty store URL
# would be the host's store.
import shlex

# Something to build, and something to run. In the sandbox that Nix makes for a store elsewhere a
# builder has nothing but a shell, which makes no executables; so what is run was added.
NOTE = """
{ text }: rec {
  note = derivation {
    name = "note";
    system = builtins.currentSystem;
    builder = "/bin/sh";
    args = [ "-c" "echo ${text} >$out" ];
  };
  app = {
    inherit (note) type name drvPath outputName system;
    outPath = "${builtins.path { path = /srv/tool; name = text; }}";
    meta.mainProgram = "tool";
  };
}
"""
FILE = "--file /srv/note.nix --argstr text"
# What a URL is given to. $URL is one; $TEXT is new each time.
NIX_COMMANDS = [
    'nix build --store "$URL" --file /srv/note.nix --argstr text $TEXT note --no-link',
    'nix-build --store "$URL" /srv/note.nix --argstr text $TEXT -A note --no-out-link',
    'nix-store --store "$URL" --add /srv/tool',
    'nix-store --store "$URL" --gc',
    'nix run --store "$URL" --file /srv/note.nix --argstr text $TEXT app',
    'nix path-info --store "$URL" --all',
    'NIX_REMOTE="$URL" nix build --file /srv/note.nix --argstr text $TEXT note --no-link',
    'NIX_REMOTE="$URL" nix-build /srv/note.nix --argstr text $TEXT -A note --no-out-link',
    'NIX_REMOTE="$URL" nix-store --gc',
]


def contents_of_host() -> str:
    """The machine's own store, and whether Nix has opened it."""
    # A Nix daemon takes away what its processes leave when it comes to it, and what is kept there
    # for stores on top comes and goes.
    passing = "-name '*-wal' -o -name '*-shm' -o -path '*/temproots/*' -o -name layered-stores"
    return machine.succeed(
        f"ls -A /nix/store; find /nix/var -maxdepth 3 -not \\( {passing} \\) 2>/dev/null || true"
    )


def refused(command: str, said: str, code: int = 1) -> str:
    """Runs a command line that cannot have a URL; returns what Nix says to what it prints."""
    before = contents_of_host()
    status, url = machine.execute(f"{command} 2>/tmp/said")
    t.assertEqual(status, code, command)
    t.assertRegex(url, r"\Alayered-stores-error[a-z0-9.-]*://[a-z]+\n\Z", command)
    t.assertIn(said, machine.succeed("cat /tmp/said"))
    for number, use in enumerate(NIX_COMMANDS):
        nix = f"TEXT=refused{number}; URL=$({command} 2>/dev/null) || true; {use} 2>&1"
        # One command line whose only check is Nix's own.
        answer = machine.fail(f"set +e; {nix}")
        t.assertIn("layered-stores-error", answer)
    t.assertEqual(contents_of_host(), before, f"something came into the host's store by {command}")
    return answer


machine.start()
machine.wait_for_unit("layered-storesd.service")
machine.succeed(
    f"cat >/srv/note.nix <<'END'\n{NOTE}\nEND",
    "mkdir -p /srv/tool/bin; printf '#!/bin/sh\necho the tool\n' >/srv/tool/bin/tool",
    "chmod 755 /srv/tool/bin/tool",
    f"nix build --store /srv/base {FILE} below note --no-link",
    "layered-stores start ci",
)

with subtest("What has no URL has one that no Nix opens, which says where to look"):
    answer = refused("layered-stores uri cj", 'there is no store "cj"')
    t.assertIn("see-layered-stores-status-cj", answer)
    refused("layered-stores uri C_I", "the name holds 'C'", code=2)
    refused("layered-stores uri", "required", code=2)
    refused("layered-stores uri ''", "a store's name is empty", code=2)
    refused("layered-stores uri --deamon ci", "--daemon", code=2)
    refused("layered-stores url ci", "uri", code=2)
    refused("layered-stores", "Usage", code=2)
    refused("layered-stores uri --daemon plain", "has no Nix daemon of its own")
    # Not even what it takes to ask anybody.
    refused("sh -c 'ulimit -n 4; exec layered-stores uri ci'", "Too many open files")

with subtest("A store that is not active is no store to open"):
    said = 'store "plain" is inactive, and Nix cannot use it; start it'
    refused("layered-stores uri plain", said)
    refused("layered-stores uri broken", 'store "broken" is failed')

with subtest("Without the bus, without the daemon, and interrupted"):
    away = "DBUS_SYSTEM_BUS_ADDRESS=unix:path=/nowhere layered-stores uri ci"
    refused(away, "cannot reach the system bus")
    machine.succeed("systemctl mask --runtime --now layered-storesd")
    refused("layered-stores uri ci", "masked")
    machine.succeed("systemctl unmask --runtime layered-storesd", "systemctl start layered-storesd")
    # As if somebody pressed a key: once it catches the signal, which is bit 14.
    machine.succeed(
        """cat >/srv/interrupted <<'END'
layered-stores uri ci &
for _ in $(seq 6000); do
    ! grep -q '^SigCgt:.*[4-7c-f]...$' /proc/$!/status || break
    sleep 0.01
done
kill $!
wait $!
END""",
        # All of this may take longer than systemd waits for a daemon that does not answer.
        "systemctl service-watchdogs no",
        "systemctl kill --signal=STOP layered-storesd",
    )
    refused("sh /srv/interrupted", "interrupted")
    machine.succeed(
        "systemctl kill --signal=CONT layered-storesd", "systemctl service-watchdogs yes"
    )

with subtest("A script with `set -e` stops, and one that hides the failure goes nowhere"):
    script = "set -e; URL=$(layered-stores uri cj 2>/dev/null); echo went on"
    t.assertEqual(machine.fail(f"sh -c {shlex.quote(script)}"), "")
    script = "set -e; export NIX_REMOTE=$(layered-stores uri cj 2>/dev/null); nix-store --gc 2>&1"
    t.assertIn("layered-stores-error", machine.fail(f"sh -c {shlex.quote(script)}"))

with subtest("The URL of a store's Nix daemon is good for every command of Nix, for a user"):
    machine.succeed("install -d -o alice /tmp/alice")
    before = contents_of_host()
    for number, how in enumerate(('--store "$URL"', "")):
        script = f"""
            set -eu; cd /tmp/alice
            URL=$(layered-stores uri --daemon ci)
            {"unset NIX_REMOTE" if how else 'export NIX_REMOTE="$URL"'}
            path=$(nix build {how} {FILE} a{number} note --no-link --print-out-paths)
            nix path-info {how} $path
            nix-store {how} --realise $path
            nix-store {how} --query --requisites $path
            nix-build {how} /srv/note.nix --argstr text b{number} -A note --no-out-link
            nix-build {how} /srv/note.nix --argstr text b{number} -A note --out-link result{number}
            tool=$(nix-store {how} --add /srv/tool)
            nix shell {how} $tool --command tool
            nix run {how} {FILE} c{number} app
            layered-stores enter ci -- cat $path
        """
        command = f"runuser --user alice -- env HOME=/tmp/alice sh -c {shlex.quote(script)}"
        lines = machine.succeed(command).splitlines()
        # nix shell, nix run, and what is seen in the store.
        printed = [line for line in lines if not line.startswith("/")]
        t.assertEqual(printed, ["the tool", "the tool", f"a{number}"])
    t.assertEqual(contents_of_host(), before)

with subtest("In `enter`, Nix finds the lower store also where that is the machine's own"):
    machine.succeed(
        "systemctl start nix-daemon.socket 2>/dev/null || "
        "systemd-run --quiet -E PATH --collect --unit=host-nix-daemon nix-daemon --daemon"
    )
    machine.wait_for_file("/nix/var/nix/daemon-socket/socket", timeout=60)
    below = machine.succeed(
        f"nix build --store daemon {FILE} host note --no-link --print-out-paths"
    )
    machine.succeed("layered-stores start hosted direct")
    before = contents_of_host()
    for name in ("hosted", "direct"):
        inside = f"layered-stores enter {name} --"
        built = machine.succeed(
            f"{inside} nix build {FILE} {name} note --no-link --print-out-paths"
        )
        t.assertEqual(machine.succeed(f"{inside} cat {built}"), f"{name}\n")
        machine.succeed(f"test -e /var/lib/layered-stores/stores/{name}/upper/$(basename {built})")
        # It is valid there because it is below.
        machine.succeed(f"{inside} nix path-info {below}")
        machine.succeed(f"{inside} nix-store --verify --check-contents 2>&1")
    t.assertEqual(contents_of_host(), before)
