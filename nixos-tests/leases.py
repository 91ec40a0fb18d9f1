# What layered stores use of a lower store stays there, whoever collects garbage, and what was lost
# all the same is said.
import json
import shlex

BASE = "/srv/base"
ROOTS = f"{BASE}/nix/var/nix/gcroots/layered-stores"
COLLECT = f"nix-store --store {BASE} --gc"


def status(name: str) -> dict[str, object]:
    _, output = machine.execute(f"layered-stores status {name} --json")
    found: dict[str, object] = json.loads(output)
    return found


def until(name: str, **wanted: object) -> dict[str, object]:
    """What a store's status says once it says all that is wanted."""
    found: dict[str, object] = {}

    def is_so(last: bool) -> bool:
        found.update(status(name))
        if last:
            machine.log(f"{name}: {found}")
        return all(found[key.replace("_", "-")] == value for key, value in wanted.items())

    retry(is_so, 30)
    return found


def until_problems(name: str, *codes: str) -> str:
    """What is said of a store once it has these problems and no others."""
    said = ""

    def is_so(last: bool) -> bool:
        nonlocal said
        problems = status(name)["problems"]
        assert isinstance(problems, list)
        said = "\n".join(problem["message"] for problem in problems)
        if last:
            machine.log(f"{name}: {problems}")
        return sorted(problem["code"] for problem in problems) == sorted(codes)

    retry(is_so, 30)
    return said


def uri(name: str) -> str:
    return shlex.quote(machine.succeed(f"layered-stores uri {name}").strip())


def add(store: str, name: str, content: str, *, user: str = "root") -> str:
    """A path with some content, in the store at a (quoted) URL."""
    command = f"echo {content} > /tmp/{name}; nix-store --store {store} --add /tmp/{name}"
    return machine.succeed(f"su {user} -s /bin/sh -c {shlex.quote(command)}").strip()


def build(store: str, name: str, uses: str) -> str:
    """Builds a derivation in a store that refers to a path of the lower store."""
    expression = (
        f'derivation {{ name = "{name}"; system = builtins.currentSystem; builder = "/bin/sh"; '
        f"args = [ \"-c\" ''echo {uses} > $out'' ]; dependency = builtins.storePath {uses}; }}"
    )
    command = f"nix build --impure --no-link --print-out-paths --expr {shlex.quote(expression)}"
    return machine.succeed(f"{command} --store {store}").strip()


def script(name: str, text: str) -> None:
    """A shell script that everybody can run."""
    machine.succeed(f"printf %s {shlex.quote(text)} > /tmp/{name}; chmod 644 /tmp/{name}")


def roots(name: str) -> set[str]:
    return set(machine.succeed(f"ls {ROOTS}/{name} 2>/dev/null || true").split())


def base(path: str) -> str:
    return path.removeprefix("/nix/store/")


machine.wait_for_unit("multi-user.target")
machine.succeed(
    f"nix-store --store {BASE} --init; mkdir -p {BASE}/nix/store",
    "layered-stores reload || true; for store in ci own over; do layered-stores start $store; done",
)

with subtest("A store that was never used has nothing in it, and nothing is wrong"):
    until("ci", contents_known=True, upper_path_count=0, lease_count=0)
    until_problems("ci")
    t.assertEqual(roots("ci"), set())

with subtest("What a store refers to in its lower store outlives a garbage collection there"):
    used = add(BASE, "used", "something that is used")
    unused = add(BASE, "unused", "something that nobody uses")
    made = build(uri("ci"), "made", used)
    # What was built, and how.
    until("ci", lease_count=1, lower_path_count=1, upper_path_count=2)
    t.assertEqual(roots("ci"), {base(used)})
    machine.succeed(COLLECT)
    machine.succeed(f"test -e {BASE}{used} && ! test -e {BASE}{unused}")
    machine.succeed(f'test "$(cat /srv/ci/root{made})" = {used}')
    until_problems("ci")

with subtest("It is dropped when nothing refers to it any more"):
    machine.succeed(f"nix-store --store {uri('ci')} --gc")
    until("ci", lease_count=0, upper_path_count=0)
    t.assertEqual(roots("ci"), set())
    machine.succeed(COLLECT)
    machine.fail(f"test -e {BASE}{used}")

with subtest("A store of a user is read as that user"):
    used = add(BASE, "hers", "something that she uses")
    machine.succeed(f"mkdir -p {BASE}/nix/var/nix/temproots {BASE}/nix/store/.links")
    path_info = f'nix path-info --store "$(layered-stores uri own)" {used}'
    machine.succeed(f"su - alice -c {shlex.quote(path_info)}")
    until("own", lease_count=1)
    users = machine.succeed("ps -C layered-stores-index -o user=,cmd= || true")
    machine.log(users)
    t.assertIn("alice", machine.succeed("ps -eo user:20,comm | grep layered-stores-"))
    machine.succeed(COLLECT, f"test -e {BASE}{used}")

with subtest(
    "What is lost all the same is named, with what needs it, and is cured by what is said"
):
    used = add(BASE, "taken", "something that is taken away")
    made = build(uri("ci"), "needs", used)
    until("ci", lease_count=1)
    machine.succeed(
        f"rm {ROOTS}/ci/{base(used)}", f"nix-store --store {BASE} --delete {used} --ignore-liveness"
    )
    said = until_problems("ci", "paths-lost")
    assert f"{base(used)} (needed by " in said, said
    add(BASE, "taken", "something that is taken away")
    until_problems("ci")

with subtest("What is first used while garbage is collected is not lost"):
    # A collector that never rests, and builds in three stores. Each uses a path that nothing else
    # does.
    for store in ("ci", "over", "own"):
        machine.succeed(f"mkdir -p /tmp/{store}; chmod 777 /tmp/{store}")
    machine.succeed(
        "systemd-run --quiet --unit=collector -E PATH bash -c "
        + shlex.quote(f"while :; do {COLLECT} || exit 1; sleep 0.2; done")
    )
    # Each adds a path to the lower store that nobody keeps there, and builds something with it.
    # The path may be gone before anybody has used it.
    script(
        "fresh",
        """
        set -eu; cd /tmp/$1
        for i in $(seq 40); do
            echo $1-$i > fresh-$1-$i
            path=$(nix-store --store /srv/base --add fresh-$1-$i)
            made=$(runuser -u $2 -- bash /tmp/make $1 $path fresh-$i 2>>failed) || continue
            echo $path $made >> made
        done
        """,
    )
    script(
        "make",
        """
        uri=$(layered-stores uri $1)
        nix build --store "$uri" --impure --no-link --print-out-paths --expr "derivation {
            name = \\"$3\\"; system = builtins.currentSystem; builder = \\"/bin/sh\\";
            args = [ \\"-c\\" \\"read -r line < $2; echo $2 > \\$out\\" ];
            dependency = builtins.storePath $2; }"
        """.replace("\\\\", "\\"),
    )
    accounts = {"ci": "root", "over": "root", "own": "alice"}
    for store, user in accounts.items():
        machine.succeed(
            f"systemd-run --quiet --unit=uses-{store} -E PATH bash /tmp/fresh {store} {user}"
        )
    machine.wait_until_fails("systemctl is-active uses-ci uses-over uses-own", timeout=600)
    machine.fail("systemctl is-failed uses-ci uses-over uses-own")
    machine.succeed("systemctl stop collector")
    # No collector waits for longer than it takes to keep what is used, however many there are.
    machine.succeed(*[f"timeout 30 {COLLECT}"] * 5)
    machine.succeed(f"timeout 30 bash -c '{COLLECT} & {COLLECT} & wait -n && wait -n'")
    for store in accounts:
        machine.log(
            machine.succeed(
                f"cat /tmp/{store}/failed | grep error: | sort | uniq -c | tail -20 || true"
            )
        )
        built = machine.succeed(f"cat /tmp/{store}/made").split()
        machine.log(f"{store}: {len(built) // 2} of 40 were built")
        assert len(built) >= 10, built
        gone = machine.succeed(
            f"for path in {' '.join(built)}; do [ -e /srv/{store}/root$path ] || echo $path; done"
        )
        t.assertEqual(gone, "", "used and lost")
    # What was asked about when it was about to go, and is needed by nothing that was built.
    for store in ("ci", "over"):
        machine.succeed(f"nix-store --store {uri(store)} --gc")
        machine.succeed(f"nix-store --store {uri(store)} --verify")
        until_problems(store)

with subtest(
    "Whatever ends the daemon or the index, what is used stays kept and a collector is not held"
):
    used = add(BASE, "kept", "something that is kept")
    build(uri("ci"), "keeps", used)
    retry(lambda _last: base(used) in roots("ci"), 30)
    machine.succeed("systemctl kill --signal=KILL layered-storesd", COLLECT)
    machine.wait_until_succeeds("layered-stores status ci >/dev/null || test $? = 3")
    machine.succeed("systemctl kill --signal=KILL 'layered-stores-index@*.service'", COLLECT)
    machine.succeed(f"test -e {BASE}{used}")
    # The next index tells all anew, and what came meanwhile.
    used = add(BASE, "later", "something that is used later")
    build(uri("ci"), "later", used)
    retry(lambda _last: base(used) in roots("ci"), 60)
    machine.succeed("systemctl stop layered-storesd", COLLECT, "systemctl start layered-storesd")
    machine.succeed(COLLECT, f"test -e {BASE}{used}")

with subtest("What is declared decides what is kept"):
    unused = add(BASE, "unused", "something that nobody uses")
    declare = (
        "sed -i '/^leases/d; s/^\\[stores.ci\\]/&\\nleases = \"{}\"/' "
        "/etc/layered-stores/config.toml; "
        "layered-stores reload"
    )
    machine.succeed(declare.format("all"))
    retry(lambda _last: {base(unused), base(used)} <= roots("ci"), 30)
    machine.succeed(COLLECT, f"test -e {BASE}{unused}")
    machine.succeed(declare.format("used"))
    retry(lambda _last: base(unused) not in roots("ci"), 30)
    machine.succeed(COLLECT, f"test -e {BASE}{used} && ! test -e {BASE}{unused}")
    machine.succeed(declare.format("none"))
    retry(lambda _last: roots("ci") == set(), 30)
    machine.succeed(declare.format("used"))
    retry(lambda _last: base(used) in roots("ci"), 30)

with subtest("Where nothing can be kept it is said once"):
    machine.succeed(f"mount --bind {BASE}/nix/var/nix/gcroots {BASE}/nix/var/nix/gcroots")
    machine.succeed(f"mount -o remount,bind,ro {BASE}/nix/var/nix/gcroots")
    used = add(BASE, "unkept", "something that is not kept")
    build(uri("ci"), "unkept", used)
    assert "Read-only file system" in until_problems("ci", "unleased"), "it is not said"
    machine.succeed(f"umount {BASE}/nix/var/nix/gcroots")
    until_problems("ci")
    assert base(used) in roots("ci")

with subtest("A database that cannot be read is said, and what was used stays kept"):
    kept = roots("ci")
    assert base(used) in kept
    machine.succeed("mv /srv/ci/root/nix/var/nix/db /srv/ci/db.away")
    until_problems("ci", "database-unreadable")
    t.assertEqual(roots("ci"), kept)
    machine.succeed("mv /srv/ci/db.away /srv/ci/root/nix/var/nix/db")
    until_problems("ci")

with subtest("With what is in a store goes what is kept for it"):
    machine.succeed(
        "layered-stores stop over; layered-stores stop own; layered-stores remove-data --yes own"
    )
    t.assertEqual(roots("own"), set())
