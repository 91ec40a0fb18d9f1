# What is in a store that is down can be removed, and what is left of one that is not declared: all
# of it and nothing else, whatever its owner puts there, and whenever the daemon is killed.
import json
import shlex

CONFIG = "/etc/layered-stores/config.toml"
STORES = "/var/lib/layered-stores/stores"
OWN = "/srv/own"
# What root has, and an owner would like to see removed.
ROOTS = "/srv/roots"
MARK = f"{OWN}/.upper.removing"

# Makes what is hard to remove: directories too deep for paths, read-only ones, links to what is
# root's, and many of all.
PLANT = f"""
import os
os.chdir("{OWN}/upper")
for target, name in [("{ROOTS}", "link"), ("{ROOTS}/open", "file"), ("..", "up"), ("/", "root")]:
    os.symlink(target, name)
try:
    os.link("{ROOTS}/open", "hard")
except OSError:
    pass
for number in range(400):
    os.makedirs(f"{{number}}/a/b")
    os.symlink("{ROOTS}", f"{{number}}/a/link")
    open(f"{{number}}/a/b/file", "w").close()
    os.chmod(f"{{number}}/a/b", 0o555)
os.mkdir("deep"); os.chdir("deep")
for _ in range(3000):
    os.symlink("{ROOTS}", "link"); os.mkdir("d"); os.chdir("d")
"""

# Puts links to what is root's in the place of directories and back, and goes on making files.
SWAP = f"""
import os
while True:
    try:
        os.chdir("{OWN}/upper")
        for name in ["x", "x/y"]:
            if os.path.islink(name):
                os.unlink(name)
        os.makedirs("x/y/z", exist_ok=True)
        open("x/y/open", "w").close()
        for name, aside in [("x/y", "x/away"), ("x/y", "/srv/alice/y"), ("x", "away")]:
            os.rename(name, aside)
            os.symlink("{ROOTS}", name)
            os.unlink(name)
            os.rename(aside, name)
        os.symlink("{ROOTS}", "seen")
    except OSError:
        pass
"""

# Goes on making directories without a pause: beside each other, in each other, and so deep that
# they are brought up.
WRITE = f"""
import os, sys
below = {{"flat": "", "nested": "a/b/c/d/e/f", "deep": "x/" * 60}}[sys.argv[1]]
number = 0
while True:
    number += 1
    try:
        os.chdir("{OWN}/upper")
        os.makedirs(f"{{sys.argv[2]}}-{{number}}/{{below}}")
    except OSError:
        pass
"""


def status(store: str) -> dict[str, str]:
    """What `layered-stores status` says."""
    _, output = machine.execute(f"layered-stores status {store} --json")
    properties: dict[str, str] = json.loads(output)
    return properties


def store_uri(store: str) -> str:
    """The URL for Nix, quoted for the shell."""
    return shlex.quote(machine.succeed(f"layered-stores uri {store}").strip())


def add(store: str, name: str) -> str:
    """Adds a file to a store, and returns its store path."""
    machine.succeed(f"echo {name} >/tmp/{name}")
    return machine.succeed(f"nix-store --store {store_uri(store)} --add /tmp/{name}").strip()


def check(store: str, path: str) -> str:
    """A command line that asks a store whether a path is valid."""
    return f'nix-store --store "$(layered-stores uri {store})" --check-validity {path}'


def refused(command: str, code: int = 1) -> str:
    """Has something tried that must fail, and returns what is said about it."""
    found, output = machine.execute(f"{command} 2>&1 </dev/null")
    assert found == code, (command, found, output)
    return output


def remove(store: str) -> str:
    return f"layered-stores remove-data --yes {store}"


def left_over(user: str = "root") -> dict[str, tuple[str, bool]]:
    """What is left over: directories, and whether they are in memory."""
    output = machine.succeed(f"runuser -u {user} -- layered-stores list --left-over --json")
    return {left["name"]: (left["directory"], left["in-memory"]) for left in json.loads(output)}


def as_alice(script: str) -> str:
    """A command line that runs a Python script as the owner."""
    machine.succeed(f"printf %s {shlex.quote(script)} >/tmp/script.py")
    return "runuser -u alice -- python3 /tmp/script.py"


def roots() -> str:
    """All that is root's and must not be touched."""
    return machine.succeed(
        f"find {ROOTS} -exec stat --format '%n %i %u %a' {{}} + | sort",
        f"cat {ROOTS}/open {ROOTS}/closed",
    )


def configure(*without: str, extra: str = "") -> None:
    """Declares what the machine has booted with, without some stores."""
    machine.succeed(
        f"test -e /srv/config.toml || cp $(readlink -f {CONFIG}) /srv/config.toml", f"rm {CONFIG}"
    )
    blocks = machine.succeed("cat /srv/config.toml").split("\n[")
    kept = [
        block
        for block in blocks
        if not any(block.lstrip("\n[").startswith(f"stores.{name}]") for name in without)
    ]
    text = "\n[".join(kept)
    text = text if text.startswith(("[", "#", "\n")) else f"[{text}"
    machine.succeed(f"printf '%s\n' {shlex.quote(text + extra)} >{CONFIG}")
    machine.execute("layered-stores reload")


def fill() -> None:
    """Puts so much into the owner's store that it takes a while to remove."""
    machine.succeed(
        "layered-stores start own",
        "layered-stores stop own",
        as_alice(
            "import os\n"
            f"os.chdir('{OWN}/upper')\n"
            "for number in range(20000):\n"
            "    os.makedirs(f'{number}/a')\n"
        ),
        f"touch {OWN}/root/nix/var/nix/db-of-old",
    )


until_marked = f"until test -e {MARK}; do sleep 0.01; done"

machine.wait_for_unit("layered-storesd.service")
machine.succeed(
    f"install -d {ROOTS} {ROOTS}/below; install -d -o alice /srv/alice",
    f"install -m 0666 /dev/stdin {ROOTS}/open <<<precious",
    f"install -m 0600 /dev/stdin {ROOTS}/closed <<<precious",
    "layered-stores start above",
    "layered-stores status",
)
before = roots()
first = add("old", "first")

with subtest("Nothing is removed that is in use, unknown, not confirmed, or for others to remove"):
    assert "run `layered-stores stop own` first" in refused(remove("own")), refused(remove("own"))
    assert "lower store of above" in refused(remove("old")), refused(remove("old"))
    assert "there is no store" in refused(remove("odl")), refused(remove("odl"))
    assert "--yes" in refused("layered-stores remove-data own", 2)
    machine.succeed("layered-stores stop own above old")
    denied = refused(f"runuser -u alice -- {remove('own')}")
    assert 'org.layeredstores1.remove-data on store "own"' in denied, denied
    answer = "script --quiet --return --command 'layered-stores remove-data old' /dev/null"
    machine.fail(f"echo n | {answer}")
    machine.succeed("layered-stores start old", check("old", first))
    machine.succeed("layered-stores stop old")

with subtest("A store that was emptied comes up empty, and Nix can work in it"):
    machine.succeed(f"echo y | {answer}")
    machine.succeed(
        f"test -z \"$(ls -A {STORES}/old/upper {STORES}/old/work | grep -v ':$')\"",
        f"test ! -e {STORES}/old/root/nix/var",
        "layered-stores start old",
    )
    machine.fail(check("old", first))
    machine.succeed(check("old", add("old", "second")), "layered-stores verify old")
    assert add("old", "first") == first

with subtest("So does one in memory, whose filesystem goes at once"):
    path = add("scratch", "small")
    machine.succeed("layered-stores stop scratch", f"findmnt {STORES}/scratch", remove("scratch"))
    machine.fail(f"findmnt {STORES}/scratch")
    machine.succeed("layered-stores start scratch")
    machine.fail(check("scratch", path))

with subtest("Whatever an owner puts there, nothing of root's is touched"):
    machine.succeed(as_alice(PLANT), remove("own"))
    assert machine.succeed(f"ls -A {OWN}/upper") == ""
    assert machine.succeed(f"stat --format %U {OWN}/upper").strip() == "alice"
    assert roots() == before

with subtest("Nor while they put links in the place of what is being removed"):
    for _ in range(5):
        machine.succeed("rm -rf /srv/alice/*", as_alice(PLANT))
        command = as_alice(SWAP)
        machine.succeed(f"systemd-run --quiet -E PATH --unit=swap {command}")
        machine.wait_until_succeeds(f"test -L {OWN}/upper/seen", timeout=60)
        code, said = machine.execute(f"{remove('own')} 2>&1")
        assert code == 0 or "goes on making files" in said, said
        machine.succeed("systemctl stop swap", remove("own"))
        assert machine.succeed(f"ls -A {OWN}/upper") == ""
        assert roots() == before

with subtest("Who goes on making files without end keeps nobody waiting without end"):
    command = as_alice(WRITE)
    for kind in ["flat", "nested", "deep"]:
        for number in range(3):
            machine.succeed(
                f"systemd-run --quiet -E PATH --unit=writer-{number} {command} {kind} {number}"
            )
        machine.wait_until_succeeds(f"test -e {OWN}/upper/2-9", timeout=60)
        code, said = machine.execute(f"timeout 400 {remove('own')} 2>&1")
        assert code == 0 or "goes on making files" in said, (kind, code, said)
        # Others are not kept waiting meanwhile.
        machine.succeed("layered-stores status scratch")
        machine.succeed("systemctl stop 'writer-*'", remove("own"))
        assert machine.succeed(f"ls -A {OWN}/upper") == ""
        assert roots() == before

with subtest("What cannot be removed is named, with the way out"):
    for attribute, target, named in [("i", "a/b/file", "file"), ("a", "a/b", "b")]:
        machine.succeed(
            f"mkdir -p {OWN}/upper/a/b; touch {OWN}/upper/a/b/file",
            f"chattr +{attribute} {OWN}/upper/{target}",
        )
        said = refused(remove("own"))
        assert f"{OWN}/upper/…/{named} cannot be removed" in said and "`chattr -ia`" in said, said
        assert "did not come to its end" in refused("layered-stores start own", 3)
        machine.succeed(f"chattr -ia {OWN}/upper/a/b {OWN}/upper/a/b/file")
        machine.succeed("layered-stores stop own", remove("own"))
        assert machine.succeed(f"ls -A {OWN}/upper") == ""

with subtest("Names are no way out, whatever is in them"):
    script = f"""
import os
os.chdir("{OWN}/upper")
for byte in set(range(1, 256)) - {{ord("/")}}:
    os.mkdir(b"d" + bytes([byte]))
    open(b"d" + bytes([byte]) + b"/\\xff\\n\\x1b[31m", "w").close()
os.mkdir(".removing-0")
open(".removing-1", "w").close()
os.makedirs(b"of \\x1b[31m another")
"""
    machine.succeed(as_alice(script))
    odd = f"{OWN}/upper/$'of \\x1b[31m another'"
    machine.succeed(f"mount -t tmpfs none {odd}")
    said = refused(remove("own"))
    assert "\x1b" not in said and "\\u{1b}[31m" in said, said
    machine.succeed(f"umount {odd}", remove("own"))
    assert machine.succeed(f"ls -A {OWN}/upper") == ""

with subtest("What a user has mounted in a namespace of their own is not in the way, and not seen"):
    machine.succeed(f"install -d -o alice {OWN}/upper/hers {OWN}/upper/roots")
    machine.succeed(
        "systemd-run --quiet -E PATH --uid=alice --unit=namespace unshare --user --map-root-user "
        f"--mount sh -c 'mount -t tmpfs none {OWN}/upper/hers && mount --bind {ROOTS} "
        f"{OWN}/upper/roots && cd {OWN}/upper/hers && touch here && sleep infinity'"
    )
    machine.wait_until_succeeds("pgrep -u alice -x sleep", timeout=60)
    machine.succeed(remove("own"))
    assert machine.succeed(f"ls -A {OWN}/upper") == ""
    assert roots() == before
    machine.succeed("systemctl stop namespace")

with subtest("What is mounted below is named and not touched"):
    machine.succeed(
        f"mkdir -p {OWN}/upper/mine/point",
        f"mount --bind {ROOTS} {OWN}/upper/mine/point",
    )
    said = refused(remove("own"))
    assert f"`umount {OWN}/upper/mine/point`" in said, said
    assert roots() == before
    machine.succeed(f"umount {OWN}/upper/mine/point", remove("own"))

with subtest("While it lasts, the store does not start"):
    fill()
    machine.succeed(
        # Closely looked at: it does not last long.
        f"systemd-run --quiet -E PATH --unit=removal {remove('own')}; {until_marked}",
        timeout=60,
    )
    machine.succeed("layered-stores start own")
    machine.succeed(f"test ! -e {MARK}")
    assert machine.succeed(f"ls -A {OWN}/upper") == ""
    machine.succeed("layered-stores stop own")

with subtest("Nobody who asks has to stay for it to come to its end, and two are one"):
    fill()
    machine.succeed(
        f"systemd-run --quiet -E PATH --unit=impatient {remove('own')}; "
        f"systemd-run --quiet -E PATH --unit=patient -r {remove('own')}; {until_marked}; "
        "systemctl kill --signal=INT impatient || true",
        timeout=60,
    )
    assert status("own")["state"] == "inactive", status("own")
    machine.wait_until_succeeds("systemctl show -P SubState patient | grep exited", timeout=120)
    machine.succeed(f"test ! -e {MARK}; systemctl stop patient")
    assert machine.succeed(f"ls -A {OWN}/upper") == ""

with subtest("Killed in the middle, it does not come up until it is removed to the end"):
    for _ in range(5):
        fill()
        # Nix's database goes first, and is out of the way in one step.
        began = f"test -e {MARK} -a ! -e {OWN}/root/nix/var/nix/db-of-old"
        machine.execute(
            f"systemd-run --quiet -E PATH --collect {remove('own')}; "
            f"until {began}; do sleep 0.01; done; "
            "systemctl kill --signal=KILL layered-storesd",
            # Or it was over before it was seen.
            timeout=30,
        )
        if machine.execute(f'test -e {MARK} && test -n "$(ls {OWN}/upper)"')[0] == 0:
            break
        machine.succeed(f"{remove('own')} || true")
    else:
        raise AssertionError("it was never killed in the middle")
    # It was stopped, and stays so until somebody starts it.
    machine.wait_until_succeeds("layered-stores list", timeout=60)
    machine.fail("layered-stores start own")
    machine.succeed("(layered-stores status own || true) | grep remove-data")
    machine.fail(f"test -e {OWN}/root/nix/var/nix/db-of-old")
    # It is tried again every few seconds.
    retry(lambda _last: status("own")["state"] == "failed", 60)
    machine.succeed(remove("own"))
    machine.wait_until_succeeds("layered-stores status own", timeout=60)
    assert machine.succeed(f"ls -A {OWN}/upper") == ""
    assert "removing" not in machine.succeed(f"ls -A {OWN}/root/nix")
    machine.fail(f"test -e {MARK}")

with subtest("What was taken out of the configuration is listed, by anybody"):
    second = add("old", "second")
    path = add("scratch", "small")
    assert left_over() == {}
    configure("old", "above", "scratch")
    expected = {
        name: (f"{STORES}/{name}", name == "scratch") for name in ["above", "old", "scratch"]
    }
    machine.wait_until_succeeds("layered-stores list --left-over | grep 'in memory'", timeout=20)
    assert left_over("alice") == expected, left_over()
    said = refused(f"runuser -u alice -- {remove('scratch')}")
    assert 'org.layeredstores1.remove-data on store "scratch"' in said, said

with subtest("But not what another store uses"):
    heir = f'\n[stores.heir]\nlower-store = "local"\nupper-layer = "{STORES}/old/upper"\n'
    heir += f'work-dir = "{STORES}/old/work"\nroot = "{STORES}/old/root"\n'
    configure("old", "above", "scratch", extra=heir)
    machine.succeed("layered-stores status heir")
    assert "old" not in left_over(), left_over()
    said = refused(remove("old"))
    assert 'store "heir" has directories' in said, said
    configure("old", "above", "scratch")
    machine.wait_until_succeeds("! layered-stores status heir", timeout=20)

with subtest("It is removed, if nobody uses it"):
    held = f"{STORES}/scratch/upper/{path.removeprefix('/nix/store/')}"
    machine.succeed(
        "systemd-run --quiet -E PATH --unit=holder --service-type=exec "
        f"-p StandardInput=file:{held} sleep 600"
    )
    said = refused(remove("scratch"))
    assert "sleep (pid" in said, said
    machine.succeed("systemctl stop holder")
    # As a daemon leaves it that is killed before it has given the mount point back.
    machine.succeed(f"chattr +i {STORES}/old/root/nix/store")
    machine.succeed(*(remove(name) for name in ["scratch", "old", "above"]))
    assert left_over() == {}, left_over()
    assert machine.succeed(f"ls -A {STORES}") == ""
    machine.fail(f"findmnt {STORES}/scratch")
    assert "nothing is left of one" in refused(remove("old")), refused(remove("old"))

with subtest("What a daemon that was killed has not come to is listed and removed as well"):
    machine.succeed(f"mkdir -p {STORES}/.old.removing/upper/some")
    assert left_over() == {"old": (f"{STORES}/.old.removing", False)}, left_over()
    machine.succeed(remove("old"))
    assert machine.succeed(f"ls -A {STORES}") == ""

with subtest("Also if the store was declared again in the meantime"):
    machine.succeed(f"mkdir -p {STORES}/.old.removing/upper/some")
    configure()
    machine.succeed("layered-stores stop above old", remove("old"))
    assert left_over() == {}, left_over()
    machine.succeed("layered-stores start old")

with subtest("Declared again, they are empty"):
    machine.succeed("layered-stores status old scratch")
    machine.fail(check("old", second))
    machine.fail(check("scratch", path))
    assert add("old", "second") == second
    assert roots() == before
