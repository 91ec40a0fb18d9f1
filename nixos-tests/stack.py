# A layered store on a layered store: ordered by systemd, opened by Nix with a URL in a URL, and
# right all the way up when something changes at the bottom.

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

LOWER = "/srv/lower"
BOTTOM = "/srv/bottom/root/nix/store"
TOP = "/srv/top/root/nix/store"
STORE = "org.layeredstores1.Store"
CONFIGURATION = "/etc/layered-stores/config.toml"

# How soon a change at the bottom is seen at the top.
SOON = 25

machine.start(allow_reboot=True)
# Before Linux 6.5 nothing can be put in the place of a mount that is in use.
SWAPS = tuple(map(int, machine.succeed("uname -r").split(".")[:2])) >= (6, 5)


def status(store: str) -> dict[str, object]:
    _, output = machine.execute(f"layered-stores status {store} --json")
    found: dict[str, object] = json.loads(output)
    return found


def text(store: str, key: str) -> str:
    return str(status(store)[key])


def swaps(store: str) -> int:
    return int(text(store, "swap-count"))


def wait_for_swaps(store: str, number: int) -> None:
    """Where the hook is slow the store has found out by itself, and is swapped once more."""
    retry(lambda _last: swaps(store) >= number, SOON)
    assert SWAPS or swaps(store) == 0, swaps(store)


def states() -> list[str]:
    return [text(store, "state") for store in ("bottom", "top")]


def store_uri(name: str) -> str:
    """The URL for Nix, quoted for the shell."""
    return shlex.quote(machine.succeed(f"layered-stores uri {name}").strip())


def add(store: str, name: str, content: str) -> str:
    """Adds a directory with one file to the store at a (quoted) URL; returns the base name."""
    machine.succeed(f"rm -rf /tmp/{name}; mkdir /tmp/{name}; echo '{content}' > /tmp/{name}/file")
    path = machine.succeed(f"nix-store --store {store} --add /tmp/{name}").strip()
    return path.removeprefix("/nix/store/")


def build(store: str, name: str, script: str) -> str:
    """Builds a derivation whose builder is a shell script, into the store at a (quoted) URL."""
    derivation = (
        f'derivation {{ name = "{name}"; system = builtins.currentSystem; builder = "/bin/sh"; '
        f"args = [ \"-c\" ''{script}'' ]; }}"
    )
    command = f"nix build --impure --no-link --print-out-paths --expr {shlex.quote(derivation)}"
    return machine.succeed(f"{command} --store {store}").strip()


@contextmanager
def held_open(file: str) -> Iterator[None]:
    """A process has a file open."""
    machine.succeed(
        "systemd-run --quiet -E PATH --unit=holder --service-type=exec "
        f"-p StandardInput=file:{file} sleep infinity"
    )
    yield
    machine.succeed("systemctl stop holder")


def configure(text: str) -> None:
    machine.succeed(f"install -D -m 644 /dev/stdin {CONFIGURATION} <<'END'\n{text}\nEND")


with subtest("A store waits for the one it lies on, and says so"):
    machine.wait_for_unit("multi-user.target")
    machine.wait_until_succeeds("layered-stores list | grep 'top *failed'")

    def says_so(_last: bool) -> bool:
        """Every few seconds they are tried again."""
        reason = "its lower store bottom is not up; see `layered-stores status bottom`"
        return states() == ["failed", "failed"] and text("top", "state-reason") == reason

    retry(says_so, 60)

with subtest("Starting the top starts the bottom"):
    machine.succeed(f"nix-store --store {LOWER} --init", "layered-stores start top")
    t.assertEqual(states(), ["active", "active"])
    t.assertEqual(text("top", "lower-store"), "layered:bottom")
    t.assertEqual(text("top", "lower-store-dir"), BOTTOM)
    bottom_unit, top_unit = text("bottom", "mount-unit"), text("top", "mount-unit")

with subtest("systemd knows which of the two comes first"):
    for dependency in ("After", "Requires", "RequiresMountsFor"):
        value = machine.get_unit_property(top_unit, dependency)
        expected = BOTTOM if dependency == "RequiresMountsFor" else bottom_unit
        t.assertIn(expected, value.split(), dependency)

with subtest("Nix opens the top, and builds from all three levels"):
    bottom, top = store_uri("bottom"), store_uri("top")
    below = add(LOWER, "below", "from the lower store")
    between = add(bottom, "between", "from the bottom")
    above = add(top, "above", "from the top")
    reads = "; ".join(
        f'read line < ${{builtins.storePath "/nix/store/{base}"}}/file; echo "$line" >> $out'
        for base in (below, between, above)
    )
    built = build(top, "all", f"{reads}; echo ${{builtins.storePath /nix/store/{between}}} >> $out")
    t.assertEqual(
        machine.succeed(f"cat /srv/top/root{built}").splitlines(),
        [
            "from the lower store",
            "from the bottom",
            "from the top",
            f"/nix/store/{between}",
        ],
    )
    t.assertEqual(
        machine.succeed(f"nix-store --store {top} --query --references {built}").split(),
        [f"/nix/store/{between}"],
    )
    machine.succeed(
        f"nix store verify --no-trust --store {top} {built} /nix/store/{below} "
        f"/nix/store/{between} /nix/store/{above}"
    )
    # Each level holds its own, and nothing of the others.
    machine.succeed(f"test -e /srv/top/upper/{above} -a -e /srv/bottom/upper/{between}")
    machine.fail(f"test -e /srv/top/upper/{between} -o -e /srv/bottom/upper/{above}")
    machine.fail(f"nix path-info --store {bottom} {built}")

with subtest("What is built at the bottom shows up at the top, even if it was looked for before"):
    script = "echo at the bottom > $out"
    coming = build("/srv/elsewhere", "coming", script)
    machine.fail(f"test -e /srv/top/root{coming}")
    t.assertEqual(build(bottom, "coming", script), coming)
    machine.wait_until_succeeds(f"test -e /srv/top/root{coming}", timeout=SOON)
    t.assertEqual(machine.succeed(f"cat /srv/top/root{coming}"), "at the bottom\n")
    t.assertEqual(build(top, "coming", script), coming)
    machine.fail(f"test -e /srv/top/upper/{coming.removeprefix('/nix/store/')}")

with subtest("What is deleted at the bottom is right at the top, whoever holds it open"):
    # In the lower store and in the bottom's upper layer, with another content each.
    for holder in (BOTTOM, TOP):
        base = add(bottom, f"shadowed-{holder[5:8]}", "from the bottom")
        add(LOWER, f"shadowed-{holder[5:8]}", "from the bottom")
        file = f"{LOWER}/nix/store/{base}/file"
        machine.succeed(f"chmod u+w {file}; echo 'from the lower store' > {file}")
        machine.wait_until_succeeds(f"grep bottom {TOP}/{base}/file", timeout=SOON)
        before = {store: swaps(store) for store in ("bottom", "top")}
        with held_open(f"{holder}/{base}/file") if SWAPS else nullcontext():
            seen = machine.succeed(
                f"nix store delete --store {bottom} /nix/store/{base} >&2; cat {BOTTOM}/{base}/file"
            )
            t.assertEqual(seen, "from the lower store\n")
            machine.wait_until_succeeds(f"grep lower {TOP}/{base}/file", timeout=SOON)
            t.assertEqual(machine.succeed(f"ls {TOP}/{base}"), "file\n")
        # A swap below leaves those above on a superblock that is history.
        t.assertEqual(swaps("bottom"), before["bottom"] + SWAPS)
        wait_for_swaps("top", before["top"] + SWAPS)
        machine.succeed("layered-stores verify bottom", "layered-stores verify top")
    machine.succeed(f"nix path-info --store {top} {built} /nix/store/{between} /nix/store/{base}")
    for merged in (BOTTOM, TOP):
        t.assertEqual(machine.succeed("cat /proc/mounts").count(f" {merged} overlay "), 1)

with subtest("What is deleted at the top shows what is below"):
    add(top, "both", "from the top")
    base = add(bottom, "both", "from the top")
    file = f"/srv/bottom/upper/{base}/file"
    machine.succeed(f"chmod u+w {file}; echo 'from the bottom' > {file}")
    t.assertEqual(machine.succeed(f"cat {TOP}/{base}/file"), "from the top\n")
    seen = machine.succeed(
        f"nix store delete --store {top} /nix/store/{base} >&2; cat {TOP}/{base}/file"
    )
    t.assertEqual(seen, "from the bottom\n")

with subtest("The bottom is not stopped under the top"):
    said = machine.fail("layered-stores stop bottom 2>&1")
    t.assertEqual(
        said, 'layered-stores: store "bottom" is the lower store of top; stop top first\n'
    )
    said = machine.fail(
        "SYSTEMD_LOG_LEVEL=debug busctl call org.layeredstores1 "
        f"/org/layeredstores1/store/bottom {STORE} Stop 2>&1"
    )
    t.assertIn("error-name=org.layeredstores1.Error.LowerOfOthers", said)
    t.assertEqual(states(), ["active", "active"])
    machine.succeed(f"cat /srv/top/root{built}", "layered-stores status")

with subtest("Both stop in order, and start again together"):
    machine.succeed("layered-stores stop top bottom")
    t.assertEqual(states(), ["inactive", "inactive"])
    machine.fail(f"test -e {TOP}/{above}")
    machine.succeed("layered-stores start top")
    t.assertEqual(states(), ["active", "active"])
    machine.succeed(f"nix path-info --store {top} {built}")

with subtest("A daemon that starts again takes both over as they are"):
    same = "grep ' overlay ' /proc/self/mountinfo | cut -d ' ' -f 1,3,5"
    mounts = machine.succeed(same)
    machine.succeed("systemctl restart layered-storesd", "layered-stores wait bottom top")
    t.assertEqual(machine.succeed(same), mounts)

with subtest("A reboot brings both back"):
    machine.reboot()
    machine.wait_for_unit("multi-user.target")
    machine.succeed("layered-stores wait bottom top --timeout 60")
    machine.succeed(
        f"nix path-info --store {top} {built} /nix/store/{below} /nix/store/{between}",
        f"grep 'from the lower store' /srv/top/root{built}",
        "layered-stores status",
    )
    started = [
        machine.get_unit_property(unit, "ActiveEnterTimestampMonotonic")
        for unit in (bottom_unit, top_unit)
    ]
    t.assertLess(int(started[0]), int(started[1]))

original = machine.succeed(f"cat {CONFIGURATION}")

with subtest("Stacks that the kernel does not take are refused before anything is done"):

    def refused(text: str) -> str:
        machine.succeed(f"cat > /tmp/stack.toml <<'END'\n{text}\nEND")
        code, said = machine.execute("layered-stores check-config /tmp/stack.toml 2>&1")
        t.assertEqual(code, 1)
        return said

    third = '[stores.third]\nlower-store = "layered:top"'
    said = refused(f"{original}\n{third}")
    t.assertEqual(len(said.splitlines()), 1)
    t.assertIn('store "third": lower-store = "layered:top": the kernel stacks at most 2', said)
    t.assertIn("(third on top on bottom); use the lower store of top instead", said)
    line = 1 + f"{original}\n{third}".splitlines().index('lower-store = "layered:top"')
    t.assertIn(f"/tmp/stack.toml:{line}:15: ", said)
    said = refused('[stores.a]\nlower-store = "layered:b"\n[stores.b]\nlower-store = "layered:a"')
    t.assertEqual(said.count("lies on itself"), 2)
    t.assertIn('no store "c" is declared', refused('[stores.a]\nlower-store = "layered:c"'))
    said = refused(f'{original}\n[stores.x]\nlower-store = "/srv/bottom/root"')
    t.assertIn('this is the store "bottom" of this configuration; write "layered:bottom"', said)
    configure(f"{original}\n{third}")
    machine.fail("layered-stores reload")
    t.assertEqual(states(), ["active", "active"])
    t.assertEqual(machine.succeed("layered-stores list").count("\n"), 2)

with subtest("Removed together, both go, the top first"):
    configure("")
    machine.succeed("layered-stores reload", timeout=60)
    t.assertEqual(machine.succeed("layered-stores list"), "")
    t.assertNotIn("/srv/", machine.succeed("cat /proc/mounts"))
    machine.succeed(f"test -e /srv/top/upper/{above} -a -e /srv/bottom/upper/{between}")
    configure(original)
    machine.succeed("layered-stores reload", timeout=60)
    machine.succeed("layered-stores wait bottom top", f"nix path-info --store {top} {built}")

with subtest("A bottom whose layers change takes the top down with it, and up again"):
    # The database stays with the upper layer that it knows.
    layers = "s,/srv/bottom/upper,/srv/bottom/moved,; s,/srv/bottom/root,/srv/bottom/anew,"
    moved = machine.succeed(f"sed '{layers}' {CONFIGURATION}")
    configure(moved)
    machine.succeed("layered-stores reload", timeout=60)
    machine.succeed("layered-stores wait bottom top --timeout 60")
    t.assertEqual(text("bottom", "upper-layer"), "/srv/bottom/moved")
    machine.succeed(f"test ! -e {TOP}/{between} -a -e {TOP}/{below} -a -e {TOP}/{above}")
    configure(original)
    machine.succeed("layered-stores reload", timeout=60)
    machine.succeed("layered-stores wait bottom top --timeout 60")
    machine.succeed(f"test -e {TOP}/{between}", f"nix path-info --store {top} {built}")

with subtest("A bottom that would not come up elsewhere stays, and the top with it"):
    configure(moved.replace(f'lower-store = "{LOWER}"', 'lower-store = "/srv/nowhere"'))
    code, said = machine.execute("layered-stores reload 2>&1", timeout=60)
    t.assertEqual(code, 3, said)
    t.assertIn("/srv/nowhere/nix/store is not there", text("bottom", "problems"))
    t.assertIn("its lower store bottom goes on as it was", text("top", "problems"))
    t.assertEqual(states(), ["active", "active"])
    t.assertEqual(text("bottom", "upper-layer"), "/srv/bottom/upper")
    machine.succeed(f"nix path-info --store {top} {built}", f"cat /srv/top/root{built}")
    configure(original)
    machine.succeed("layered-stores reload", "layered-stores status", timeout=60)

with subtest("A top that is in use is waited for, and nothing is pulled from under it"):
    machine.succeed(
        "systemd-run --quiet -E PATH --unit=squatter --service-type=notify "
        "-p NotifyAccess=all /bin/sh -c "
        f"'cd {TOP}; systemd-notify --ready --pid=parent; exec sleep infinity'"
    )
    comm = "/proc/$(systemctl show -P MainPID squatter)/comm"
    machine.wait_until_succeeds(f"grep -x sleep {comm}", timeout=60)
    configure(moved)
    machine.succeed("layered-stores reload", timeout=60)
    # The next attempt may be under way.
    retry(lambda _last: states() == ["active", "active"], SOON)
    t.assertEqual(text("bottom", "upper-layer"), "/srv/bottom/upper")
    t.assertIn("sleep (pid", text("top", "problems"))
    machine.succeed(f"nix path-info --store {top} {built}", f"cat /srv/top/root{built}")
    machine.succeed("systemctl stop squatter")
    retry(lambda _last: text("bottom", "upper-layer") == "/srv/bottom/moved", 120)
    machine.succeed("layered-stores wait bottom top --timeout 60", "layered-stores status")
    configure(original)
    machine.succeed("layered-stores reload", timeout=60)
    machine.succeed("layered-stores wait bottom top --timeout 60")

with subtest("A top that is put on another lower store lets go of the bottom"):
    alone = original[original.index("[stores.top]") :].replace("layered:bottom", LOWER)
    configure(alone)
    machine.succeed("layered-stores reload", timeout=60)
    machine.succeed("layered-stores wait top --timeout 60", "layered-stores status")
    t.assertEqual(text("top", "lower-store-dir"), f"{LOWER}/nix/store")
    machine.succeed(f"test -e {TOP}/{above} -a -e {TOP}/{below} -a ! -e {TOP}/{between}")
    t.assertEqual(machine.succeed("layered-stores list"), "top  active\n")
    t.assertNotIn(BOTTOM, machine.succeed("cat /proc/mounts"))
    configure(original)
    machine.succeed("layered-stores reload", timeout=60)
    machine.succeed("layered-stores wait bottom top --timeout 60")
    machine.succeed(f"nix path-info --store {top} {built} /nix/store/{between}")
