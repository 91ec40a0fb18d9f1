# What nothing uses goes from the upper layer, and only that: how much it frees is measured, a dry
# run changes nothing, and whatever becomes of Nix meanwhile, the store is refreshed.
import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STORES = "/var/lib/layered-stores/stores"
MIB = 1 << 20


def upper(store: str) -> str:
    return f"{STORES}/{store}/upper"


def state(store: str) -> str:
    return f"{STORES}/{store}/root/nix/var/nix"


def merged(store: str, path: str) -> str:
    return path.replace("/nix/store", f"{STORES}/{store}/root/nix/store")


def owner(store: str) -> str:
    return "alice" if store == "hers" else "root"


def by(user: str, command: str) -> str:
    """The command, run by that user."""
    if user == "root":
        return command
    home = f"HOME=/tmp/{user} USER={user}"
    return f"cd /tmp && runuser -u {user} -- env {home} sh -c {shlex.quote(command)}"


def base(store: str) -> str:
    """Its lower store, which is root's."""
    return "daemon" if store == "hers" else "/srv/base"


def nix_store(store: str, arguments: str, url: str = "") -> str:
    """What nix-store prints, run on a store by whom it belongs to, or on a lower store."""
    command = f"nix-store --store {url or f'$(layered-stores uri {store})'} {arguments}"
    return machine.succeed(command if url else by(owner(store), command)).strip()


def add(store: str, *names: str, size: int = 100, url: str = "") -> list[str]:
    """Adds a file of each name, with so many bytes."""
    files = " ".join(f"/srv/files/{name}" for name in names)
    if not url:
        make = f"head -c {size} /dev/urandom >$file; chmod 644 $file"
        machine.succeed(f"for file in {files}; do {make}; done")
    return nix_store(store, f"--add {files}", url).splitlines()


def add_to_both(store: str, *names: str, size: int = 100) -> list[str]:
    """The same in both layers, as when the lower store has got it later."""
    paths = add(store, *names, size=size)
    t.assertEqual(add(store, *names, url=base(store)), paths)
    return paths


def root(store: str, name: str, path: str) -> None:
    """Keeps a path."""
    link = f"{state(store)}/gcroots/{name}"
    machine.succeed(by(owner(store), f"ln -sfn {path} {link}"))


def in_upper(store: str) -> set[str]:
    return {f"/nix/store/{name}" for name in machine.succeed(f"ls {upper(store)}").split()}


def used(store: str) -> int:
    """What is in the upper layer takes so much of the disk."""
    return int(machine.succeed(f"sync; du --block-size=1 --summarize {upper(store)}").split()[0])


def lower(store: str) -> str:
    """All that is in its lower store."""
    directory = status(store)["lower-store-dir"]
    return machine.succeed(f"find {directory} -printf '%p %i %s %T@ %l\\n' | sort")


def everything(store: str) -> str:
    """All that is in the store, in the lower store and in the database."""
    files = f"find {upper(store)} -printf '%p %i %s %T@ %l\\n' | sort"
    links = f"find {state(store)}/gcroots {state(store)}/profiles -printf '%p %l\\n' | sort"
    found = machine.succeed(f"{files}; {links}") + nix_store(store, "--dump-db")
    return found + lower(store) + str(refreshes(store))


def status(store: str) -> dict[str, Any]:
    _, output = machine.execute(f"layered-stores status {store} --json")
    properties: dict[str, Any] = json.loads(output)
    return properties


def refreshes(store: str) -> int:
    return int(status(store)["refresh-count"])


def run(command: str, code: int = 0, user: str = "root") -> dict[str, Any]:
    """Runs `layered-stores … --json`."""
    status, output = machine.execute(
        f"({by(user, f'layered-stores {command} --json')}) 2>/tmp/said"
    )
    said = machine.succeed("cat /tmp/said")
    t.assertEqual(status, code, f"{command}: {output}{said}")
    result: dict[str, Any] = json.loads(output)
    t.assertEqual(result["error"] is not None, code == 1, command)
    return result


def paths_of(result: dict[str, Any]) -> set[str]:
    return {entry["path"] for entry in result["paths"]}


def is_right(store: str) -> None:
    """Nix and the daemon find nothing wrong with a store."""
    machine.succeed(f"layered-stores verify {store}")
    nix_store(store, "--verify --check-contents")


@contextmanager
def held(store: str) -> Iterator[None]:
    """Somebody has the lock that a Nix which deletes waits for, before it looks at roots."""
    machine.succeed(
        "systemd-run --quiet --unit=lock --property=RemainAfterExit=yes "
        '--setenv=PATH="$PATH" '
        f'"$(command -v flock)" {state(store)}/gc.lock '
        "sh -c 'echo held >/run/held; exec sleep infinity'",
    )
    machine.wait_for_file("/run/held")
    yield
    machine.succeed("systemctl stop lock; rm /run/held")


def look_at(store: str) -> None:
    """Has the kernel know every path, so that it shows what is gone until there is a refresh."""
    machine.succeed(f"ls -lR {STORES}/{store}/root/nix/store >/dev/null")


def wait_until_some_are_gone(store: str, paths: list[str]) -> str:
    """A command line that returns when that is so, and a part of them is still there."""
    count = f"$(ls {upper(store)} | grep -c -- -many-)"
    return f"until test {count} -lt {len(paths) - 5}; do :; done"


machine.wait_for_unit("layered-storesd.service")
machine.succeed(
    "install -d -o alice /tmp/alice; install -d -o bob /tmp/bob",
    "nix-store --store /srv/base --init; mkdir -p /srv/base/nix/store",
    "systemctl start nix-daemon.socket 2>/dev/null || "
    "systemd-run --quiet -E PATH --collect --unit=host-nix-daemon nix-daemon --daemon",
)
machine.wait_for_file("/nix/var/nix/daemon-socket/socket", timeout=60)
machine.succeed("layered-stores reload; layered-stores start ci hers small")
machine.succeed("mkdir /srv/files; echo below >/srv/files/below")
[below] = add("ci", "below", url=base("ci"))

with subtest("What would go is said, and nothing is changed"):
    [kept] = add("ci", "kept", size=MIB)
    # Kept by what refers to it, and by what it has made.
    text = '${builtins.toFile "library" "text"}'
    expression = (
        'derivation { name = "application"; system = builtins.currentSystem; builder = "/bin/sh"; '
        f'args = [ "-c" "echo {text} > $out" ]; }}'
    )
    application = machine.succeed(
        'nix build --store "$(layered-stores uri ci)" --no-link --print-out-paths --impure '
        f"--expr {shlex.quote(expression)}"
    ).strip()
    library = nix_store("ci", f"--query --references {application}")
    derivation = nix_store("ci", f"--query --deriver {application}")
    live = {kept, application, library, derivation}
    root("ci", "kept", kept)
    root("ci", "application", application)
    garbage = add("ci", "one", "two", size=3 * MIB)
    garbage += add_to_both("ci", "both", size=2 * MIB)
    # Somebody looks for it, and Nix notes that there is one in the lower store.
    nix_store("ci", f"--query --hash {below}")
    # Left behind by a build that was killed.
    stray = "/nix/store/00000000000000000000000000000000-stray"
    machine.succeed(f"mkdir {merged('ci', stray)}; echo >{merged('ci', stray)}/file")
    before = everything("ci")
    planned = run("gc ci --dry-run")
    t.assertEqual(everything("ci"), before)
    t.assertEqual(paths_of(planned), {*garbage, stray})
    t.assertEqual((planned["dry-run"], planned["enough"], planned["generations"]), (True, None, []))
    said = machine.succeed("layered-stores gc ci --dry-run")
    t.assertRegex(said, rf"(?m)^ +3 MiB  {garbage[0]}$")
    t.assertRegex(said, r"(?m)^ci: 4 paths would be deleted, that frees 8(\.\d)? MiB; .* free$")

with subtest("Garbage goes, what it took is free, and all else stays"):
    look_at("ci")
    before_it, had, count = used("ci"), lower("ci"), refreshes("ci")
    done = run("gc ci")
    t.assertEqual(paths_of(done), paths_of(planned))
    t.assertAlmostEqual(done["freed"], before_it - used("ci"), delta=16 * 1024)
    t.assertGreaterEqual(done["freed"], 8 * MIB)
    t.assertEqual(sum(entry["bytes"] for entry in done["paths"]), done["freed"])
    t.assertEqual(planned["freed"], done["freed"])
    t.assertEqual(lower("ci"), had)
    t.assertEqual(in_upper("ci"), live)
    machine.succeed(
        f"cmp {merged('ci', kept)} /srv/files/kept", f"cmp {merged('ci', below)} /srv/files/below"
    )

with subtest("The store was refreshed once, and shows what is in the lower store"):
    t.assertEqual(refreshes("ci"), count + 1)
    machine.succeed(f"cmp {merged('ci', garbage[2])} /srv/files/both")
    is_right("ci")
    said = machine.succeed("layered-stores gc ci")
    t.assertRegex(said, r"\Aci: 0 paths deleted, 0 B freed; .* free\n\Z")

with subtest("Optimised, a store has nothing that the lower store has as well"):
    shadowing = add_to_both("ci", "shadowing", size=MIB)
    root("ci", "shadowing", shadowing[0])
    before = everything("ci")
    t.assertEqual(paths_of(run("optimise ci --dry-run")), set(shadowing))
    t.assertEqual(everything("ci"), before)
    look_at("ci")
    before_it, had, count = used("ci"), lower("ci"), refreshes("ci")
    done = run("optimise ci")
    t.assertEqual(paths_of(done), set(shadowing))
    t.assertAlmostEqual(done["freed"], before_it - used("ci"), delta=16 * 1024)
    t.assertEqual((refreshes("ci"), lower("ci")), (count + 1, had))
    t.assertEqual(in_upper("ci"), live)
    machine.succeed(f"cmp {merged('ci', shadowing[0])} /srv/files/shadowing")
    is_right("ci")
    t.assertEqual(run("optimise ci")["paths"], [])

with subtest("Old generations go if that is wanted, and the machine's own stay"):
    generations = add("ci", "first", "second", "third")
    profile = f"{state('ci')}/profiles/it"
    hosts = "/nix/var/nix/profiles/it"
    machine.succeed(f"mkdir -p {state('ci')}/profiles /nix/var/nix/profiles")
    for number, path in enumerate(generations, 1):
        age = [60, 40, 0][number - 1]
        machine.succeed(
            *(
                f"ln -s {path} {at}-{number}-link; ln -sfn it-{number}-link {at}; "
                f"touch --no-dereference --date '{age} days ago' {at}-{number}-link"
                for at in (profile, hosts)
            )
        )
    before = everything("ci")
    t.assertEqual(run("gc ci --dry-run")["paths"], [])
    planned = run("gc ci --older-than 30d --dry-run")
    t.assertEqual(everything("ci"), before)
    # The second was in use thirty days ago.
    t.assertEqual(planned["generations"], [f"{profile}-1-link"])
    t.assertEqual(paths_of(planned), {generations[0]})
    done = run("gc ci --older-than 30d")
    t.assertEqual(done["generations"], planned["generations"])
    t.assertEqual(paths_of(done), {generations[0]})
    links = f"! test -L {profile}-1-link && test -L {profile}-2-link && test -L {profile}-3-link"
    machine.succeed(links, f"test -L {hosts}-1-link", f"rm {hosts}*")

with subtest("No more goes than it takes until enough is free, and the oldest first"):
    [rooted] = add("small", "rooted", size=8 * MIB)
    root("small", "rooted", rooted)
    [oldest] = add("small", "oldest", size=4 * MIB)
    machine.wait_until_succeeds(f"test $(date +%s) -gt {machine.succeed('date +%s')}")
    others = add("small", *(f"later-{n}" for n in range(5)), size=4 * MIB)
    free = run("gc small --dry-run")["free"]
    t.assertEqual(run(f"gc small --until-free {free}")["paths"], [])
    wanted = free + 2 * MIB
    planned = run(f"gc small --until-free {wanted} --dry-run")
    t.assertEqual((paths_of(planned), planned["enough"]), ({oldest}, True))
    done = run(f"gc small --until-free {wanted}")
    t.assertEqual((paths_of(done), done["free"] >= wanted), ({oldest}, True))
    t.assertEqual(in_upper("small"), {rooted, *others})
    is_right("small")

with subtest("What is in use by the time it would go stays, and something else goes"):
    [mine] = add("small", "a-mine", size=4 * MIB)
    wanted = run("gc small --dry-run")["free"] + 22 * MIB
    with held("small"):
        machine.succeed(
            "systemd-run --quiet --unit=room --property=RemainAfterExit=yes "
            '--setenv=PATH="$PATH" --property=StandardError=journal '
            "--property=StandardOutput=truncate:/run/room.said "
            f'"$(command -v layered-stores)" gc small --until-free {wanted} --json'
        )
        machine.wait_until_succeeds("pgrep --full -- 'nix-store .*--delete'", timeout=60)
        root("small", "mine", mine)
    machine.wait_until_succeeds("systemctl show -P SubState room | grep -xE 'exited|failed'")
    t.assertEqual(machine.get_unit_property("room.service", "ExecMainStatus"), "3")
    t.assertEqual(paths_of(json.loads(machine.succeed("cat /run/room.said"))), set(others))
    t.assertEqual(in_upper("small"), {rooted, mine})
    machine.succeed(f"systemctl stop room; rm {state('small')}/gcroots/mine")
    others = add("small", *(f"again-{n}" for n in range(5)), size=4 * MIB) + [mine]

with subtest("What cannot be had is told with another code: all garbage has gone then"):
    done = run("gc small --until-free 63M --dry-run", code=3)
    t.assertEqual((paths_of(done), done["enough"]), (set(others), False))
    code, said = machine.execute("layered-stores gc small --until-free 63M 2>&1")
    t.assertEqual(code, 3, said)
    t.assertRegex(said, r"gc small: .* MiB less than that are free, and nothing else can go")
    t.assertEqual(in_upper("small"), {rooted})
    said = machine.fail("layered-stores gc small --until-free 1T 2>&1")
    t.assertIn("1 TiB can never be free: the filesystem of the upper layer has 64 MiB in all", said)

with subtest("A wrong word is answered with the right ones"):
    for command, words in (
        ("gc ci --until-free lots", "such as 20G"),
        ("gc ci --older-than 30", "such as 30d"),
        ("gc ci --max-freed 1G", "--max-freed"),
        ("optimise ci --until-free 1G", "--until-free"),
    ):
        code, said = machine.execute(f"layered-stores {command} 2>&1")
        t.assertEqual(code, 2, said)
        t.assertIn(words, said)
    for command, words in (
        ("layered-stores gc cu", 'did you mean "ci"?'),
        ("PATH=/srv/none $(command -v layered-stores) gc ci", "install Nix"),
        (by("bob", "layered-stores gc ci"), "have root run `layered-stores gc ci`"),
        (
            by("bob", "layered-stores optimise hers"),
            "have root or alice run `layered-stores optimise",
        ),
    ):
        code, said = machine.execute(f"({command}) 2>&1")
        t.assertEqual(code, 1, said)
        t.assertIn(words, " ".join(said.split()))
    machine.succeed("layered-stores stop small")
    code, said = machine.execute("layered-stores gc small 2>&1")
    t.assertEqual((code, "`layered-stores start small`" in said), (1, True), said)

# So many that Nix takes a while.
many = [f"many-{number}" for number in range(200)]


def garbage_in_both(store: str) -> list[str]:
    """So much that Nix needs time for it, all of it known to the kernel."""
    paths = add_to_both(store, *many)
    look_at(store)
    return paths


with subtest("Nix is killed midway: it is said, the store is refreshed, the next time goes on"):
    paths = garbage_in_both("ci")
    # Without the daemon, nobody refreshes anything before somebody asks for it.
    code, said = machine.execute(
        f"({wait_until_some_are_gone('ci', paths)}; pkill --signal STOP --exact nix-store; "
        "systemctl stop layered-storesd; pkill --signal KILL --exact nix-store) & "
        "layered-stores gc ci 2>&1",
        timeout=120,
    )
    left = len(in_upper("ci") & set(paths))
    t.assertEqual(code, 1, said)
    t.assertIn("Nix has ended early (signal: 9 (SIGKILL))", said)
    t.assertRegex(said, rf"(?m)^ci: {len(paths) - left} paths deleted, ")
    assert 0 < left < len(paths), left
    machine.require_unit_state("layered-storesd.service")
    machine.succeed("layered-stores verify ci")
    t.assertGreater(refreshes("ci"), 0)
    done = run("gc ci")
    t.assertEqual(len(paths_of(done)), left)
    is_right("ci")

with subtest("All of it is killed midway, and the daemon makes good what is owed"):
    paths = garbage_in_both("ci")
    count = refreshes("ci")
    machine.succeed(
        'systemd-run --quiet --unit=whole --setenv=PATH="$PATH" '
        '"$(command -v layered-stores)" gc ci',
        f"{wait_until_some_are_gone('ci', paths)}; systemctl kill --signal=KILL whole",
        timeout=120,
    )
    machine.wait_until_succeeds("! systemctl is-active whole")
    machine.fail("pgrep --exact nix-store")
    assert 0 < len(in_upper("ci") & set(paths)) < len(paths)
    machine.wait_until_succeeds("layered-stores verify ci", timeout=30)
    t.assertGreater(refreshes("ci"), count)
    run("gc ci")
    is_right("ci")

with subtest("Ctrl-C ends it after a path, with a refreshed store"):
    for store, user in (("ci", "root"), ("hers", "root"), ("hers", "alice")):
        paths = garbage_in_both(store)
        count = refreshes(store)
        code, said = machine.execute(
            f"({wait_until_some_are_gone(store, paths)}; "
            f"pkill --signal INT --full --exact 'layered-stores gc {store}') & "
            + by(user, f"exec layered-stores gc {store} 2>&1"),
            timeout=120,
        )
        t.assertEqual(code, 130, said)
        t.assertIn(f"gc {store}: cancelled", said)
        left = len(in_upper(store) & set(paths))
        assert 0 < left < len(paths), left
        machine.fail("pgrep --exact nix-store")
        machine.succeed(f"layered-stores verify {store}")
        t.assertGreater(refreshes(store), count)
        run(f"gc {store}", user=user)
        is_right(store)

with subtest("Root's command is the owner's in a store of theirs, and follows nothing of theirs"):
    [hers] = add("hers", "hers", size=MIB)
    # Where root's Nix would take away what leads nowhere.
    machine.succeed(
        "rm -rf /srv/roots; mkdir /srv/roots; ln -s /srv/nowhere /srv/roots/link",
        by(
            "alice",
            f"rm -rf {state('hers')}/gcroots/auto; ln -s /srv/roots {state('hers')}/gcroots/auto",
        ),
    )
    with held("hers"):
        machine.succeed(
            "systemd-run --quiet --unit=hers --property=RemainAfterExit=yes --setenv=SECRET=secret "
            '--setenv=PATH="$PATH" "$(command -v sh)" '
            '-c "exec 7</etc/shadow; exec layered-stores gc hers"'
        )
        machine.wait_until_succeeds("pgrep --uid alice --exact nix-store", timeout=60)
        ours = "pgrep --uid alice --full --exact 'layered-stores collect'"
        for process in (ours, "pgrep --uid alice --exact nix-store"):
            pid = machine.succeed(process).strip()
            lines = machine.succeed(f"cat /proc/{pid}/status").splitlines()
            kernel = {
                key: " ".join(value.split()) for key, _, value in (x.partition(":") for x in lines)
            }
            alice = machine.succeed("id -u alice").strip()
            t.assertEqual(kernel["Uid"], " ".join([alice] * 4))
            t.assertEqual(kernel["Gid"], " ".join([machine.succeed("id -g alice").strip()] * 4))
            t.assertEqual((kernel["Groups"], kernel["NoNewPrivs"]), ("", "1"))
            # But for the bounding set, from which nobody who has NoNewPrivs gets anything.
            kernel.pop("CapBnd")
            capabilities = [value for key, value in kernel.items() if key.startswith("Cap")]
            t.assertEqual({int(value, 16) for value in capabilities}, {0})
            machine.fail(f"ls -l /proc/{pid}/fd | grep -E 'shadow|/dev/(pts|tty|console)'")
            machine.fail(f"grep -z SECRET /proc/{pid}/environ")
            # Field 7 is the terminal that controls it, and 6 the session.
            stat = machine.succeed(f"cat /proc/{pid}/stat").rpartition(")")[2].split()
            t.assertEqual(stat[4], "0")
            t.assertEqual(stat[3], machine.succeed(ours).strip())
    machine.wait_until_succeeds("systemctl show -P SubState hers | grep -x exited", timeout=60)
    t.assertEqual(machine.get_unit_property("hers.service", "ExecMainStatus"), "0")
    machine.succeed("systemctl stop hers")
    t.assertEqual(in_upper("hers"), set())
    machine.succeed("test -L /srv/roots/link")
    t.assertEqual(machine.succeed(f"find {state('hers')} {upper('hers')} -user root"), "")
    machine.succeed(by("alice", f"rm {state('hers')}/gcroots/auto"))

with subtest("Nothing is run in a store whose files are somebody else's by mistake"):
    machine.succeed(f"chown bob {upper('ci')}")
    machine.wait_until_succeeds(
        "layered-stores remount ci; (layered-stores status ci || true) | grep -F '[other-owner]'",
        timeout=150,
    )
    said = machine.fail("layered-stores gc ci 2>&1")
    t.assertIn(f"{upper('ci')} belongs to bob", " ".join(said.split()))
    machine.succeed(f"chown root {upper('ci')}")
    machine.wait_until_succeeds(
        "layered-stores remount ci && layered-stores status ci", timeout=150
    )

with subtest("The service of the timer does it, in a store of root's and in one of a user's"):
    for store in ("ci", "hers"):
        paths = add(store, f"for-{store}", size=MIB)
        machine.succeed(f"systemctl start layered-stores-gc@{store}.service", timeout=120)
        assert not in_upper(store) & set(paths), in_upper(store)
        said = machine.succeed(
            "journalctl --sync", f"journalctl -q -o cat -u layered-stores-gc@{store}"
        )
        t.assertRegex(said, rf"(?m)^{store}: 1 path deleted, 1 MiB freed; .* free$")
        t.assertNotRegex(said, "(?i)error|warning")
        is_right(store)

with subtest("Its options are in a drop-in, and what it cannot do makes it fail"):
    machine.succeed("layered-stores start small", f"test -d {upper('small')}")
    root("small", "rooted", rooted)
    drop_in = "/run/systemd/system/layered-stores-gc@small.service.d/options.conf"
    machine.succeed(
        f"install -D -m 644 /dev/stdin {drop_in} "
        "<<'END'\n[Service]\nEnvironment=\"OPTIONS=--until-free 63M --older-than 30d\"\nEND",
        "systemctl daemon-reload",
    )
    paths = add("small", "for-small", size=MIB)
    machine.fail("systemctl start layered-stores-gc@small.service", timeout=120)
    t.assertEqual(
        machine.get_unit_property("layered-stores-gc@small.service", "ExecMainStatus"), "3"
    )
    t.assertEqual(in_upper("small"), {rooted})
    machine.fail("systemctl start layered-stores-gc@nothing.service")

with subtest("The timer starts it when it is due"):
    paths = add("ci", "for-the-timer")
    machine.succeed("systemctl start layered-stores-gc@ci.timer")
    due = machine.get_unit_property("layered-stores-gc@ci.timer", "TimersCalendar")
    t.assertRegex(due, r"OnCalendar=\*-\*-\* 03:15:00 ; next_elapse=\S+")
    machine.succeed(
        "install -D -m 644 /dev/stdin /run/systemd/system/layered-stores-gc@ci.timer.d/now.conf "
        "<<'END'\n[Timer]\nOnCalendar=\nOnCalendar=*:*:*\nAccuracySec=1s\nEND",
        "systemctl daemon-reload; systemctl restart layered-stores-gc@ci.timer",
    )
    machine.wait_until_fails(f"test -e {upper('ci')}/{paths[0].removeprefix('/nix/store/')}")
    machine.succeed("systemctl stop layered-stores-gc@ci.timer")
