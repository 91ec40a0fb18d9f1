# Directories that are not those of the store are neither taken nor emptied: a database of another
# upper layer, a copy, another store's, what was mistyped, what is mounted twice.
import json
import shlex

CONFIG = "/etc/layered-stores/config.toml"
STATE = "/var/lib/layered-stores"
MARK = "trusted.layered-stores.id"
UPPER_MARK = "trusted.layered-stores.upper-id"


def store(name: str, base: str, **others: str) -> str:
    """The declaration of a store with all its directories in one, but for others."""
    keys = {"lower-store": "local", "root": f"{base}/root", "upper-layer": f"{base}/upper"}
    keys |= {"work-dir": f"{base}/work"}
    keys |= {key.replace("_", "-"): value for key, value in others.items()}
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    return "\n".join([f"[stores.{name}]", "autostart = false", *lines, ""])


def declare(*stores: str) -> None:
    text = shlex.quote("\n".join(stores))
    machine.succeed(f"rm -f {CONFIG}; printf %s {text} >{CONFIG}", "layered-stores reload")


def store_uri(name: str) -> str:
    """The URL for Nix, quoted for the shell."""
    return shlex.quote(machine.succeed(f"layered-stores uri {name}").strip())


def fill(name: str) -> str:
    """Adds a file of its name to a store that is stopped. Returns the path in the upper layer."""
    machine.succeed(f"layered-stores start {name}; echo {name} >/tmp/{name}")
    added = machine.succeed(f"nix-store --store {store_uri(name)} --add /tmp/{name}").strip()
    machine.succeed(f"layered-stores stop {name}")
    return added.removeprefix("/nix/store/")


def is_well(name: str, path: str) -> None:
    """Starts a store, sees that it has a path, and stops it."""
    machine.succeed(f"layered-stores start {name}")
    check = f"nix-store --store {store_uri(name)} --check-validity /nix/store/{path}"
    machine.succeed(check, f"layered-stores stop {name}")


def refused(command: str, *words: str) -> str:
    """Has something tried that must be refused in these words, and leaves the store stopped."""
    code, said = machine.execute(f"{command} 2>&1 </dev/null")
    machine.execute(f"layered-stores stop {command.split()[-1]}")
    assert code != 0, (command, said)
    assert all(word in said for word in words), (command, said)
    return said


def remove(name: str) -> str:
    return f"layered-stores remove-data --yes {name}"


def make_disk(name: str, options: str = "") -> None:
    """A disk with a filesystem. A container has few devices of its own."""
    machine.succeed(
        "test -e /dev/loop-control || mknod /dev/loop-control c 10 237",
        "for n in $(seq 0 63); do test -e /dev/loop$n || mknod /dev/loop$n b 7 $n; done",
        f"truncate -s 64M /srv/{name}.img; mkfs.ext4 -q -F {options} /srv/{name}.img",
    )


def plug(name: str, directory: str) -> None:
    # Another machine on this computer may have been quicker with the loop device.
    machine.succeed(f"mkdir -p {directory}")
    machine.wait_until_succeeds(f"mount -o loop /srv/{name}.img {directory}", timeout=30)


def attribute(name: str, directory: str) -> str:
    return machine.succeed(f"getfattr --only-values -n {name} {directory}").strip()


machine.wait_for_unit("layered-storesd.service")

with subtest("An empty database that Nix makes at another root does not get the upper layer"):
    machine.succeed("mkdir -p /srv/a")
    declare(store("a", "/srv/a"))
    path = fill("a")
    machine.succeed("layered-stores start a")
    uri = store_uri("a").replace("/srv/a/root", "/srv/a/newroot")
    machine.succeed("layered-stores stop a")
    declare(store("a", "/srv/a", root="/srv/a/newroot"))
    refused("layered-stores start a", "does not have the database")
    machine.execute(f"nix-store --store {uri} --gc")
    machine.succeed("test -e /srv/a/newroot/nix/var/nix/db/db.sqlite")
    refused("layered-stores start a", "does not tell that it belongs to it", "`setfattr --name=")
    machine.succeed(f"test -e /srv/a/upper/{path}")
    declare(store("a", "/srv/a"))
    is_well("a", path)

with subtest("A database whose own filesystem is missing is missed"):
    machine.succeed("mkdir -p /srv/b")
    make_disk("db")
    declare(store("b", "/srv/b"))
    machine.succeed("layered-stores start b; layered-stores stop b")
    plug("db", "/srv/b/root/nix/var/nix/db")
    path = fill("b")
    machine.succeed("umount /srv/b/root/nix/var/nix/db")
    refused("layered-stores start b", "does not have the database")
    plug("db", "/srv/b/root/nix/var/nix/db")
    is_well("b", path)
    machine.succeed("umount /srv/b/root/nix/var/nix/db")

with subtest("A database behind a link is not taken for none"):
    machine.succeed("mkdir -p /srv/c /srv/fast")
    declare(store("c", "/srv/c"))
    path = fill("c")
    database = "/srv/c/root/nix/var/nix/db"
    machine.succeed(f"mv {database}/* /srv/fast; rmdir {database}; ln -s /srv/fast {database}")
    declare(store("c", "/srv/c", upper_layer="/srv/c/uper"))
    refused("layered-stores start c", "is a symbolic link")
    machine.succeed(f"rm {database}; mkdir {database}; mount --bind /srv/fast {database}")
    refused("layered-stores start c", "is not the directory that the database in")
    declare(store("c", "/srv/c"))
    is_well("c", path)
    machine.succeed(f"umount {database}")

with subtest("A copy and its original are not mistaken for each other"):
    machine.succeed("mkdir -p /srv/d /srv/e/root/nix")
    declare(store("d", "/srv/d"))
    first = fill("d")
    machine.succeed("cp -a /srv/d/upper /srv/e/; cp -a /srv/d/root/nix/var /srv/e/root/nix/")
    declare(store("d", "/srv/d"), store("e", "/srv/e"))
    second = fill("e")
    is_well("e", first)
    assert attribute(MARK, "/srv/d/upper") != attribute(MARK, "/srv/e/upper")
    crossed = store("e", "/srv/e", upper_layer="/srv/d/upper", work_dir="/srv/d/work")
    declare(crossed)
    refused("layered-stores start e", "is not the directory that the database in")
    declare(store("d", "/srv/d"), store("e", "/srv/e"))
    is_well("d", first)
    is_well("e", second)

with subtest("Its own upper layer and a copy of that are not used in turns"):
    machine.succeed("mkdir -p /srv/twin")
    here, there = (
        store("twin", "/srv/twin"),
        store("twin", "/srv/twin", upper_layer="/srv/twin/big"),
    )
    declare(here)
    first = fill("twin")
    machine.succeed("cp -a /srv/twin/upper /srv/twin/big")
    declare(there)
    refused(remove("twin"), "has never been the upper layer of this store")
    second = fill("twin")
    is_well("twin", first)
    # As a configuration that is rolled back.
    declare(here)
    refused("layered-stores start twin", "is not the directory that the database in")
    declare(there)
    is_well("twin", second)

with subtest("Nothing is removed by a record that cannot be read"):
    machine.succeed(
        "systemctl stop layered-storesd",
        f"echo '{{' >{STATE}/known/twin.json",
        "rm -f /run/layered-stores/twin.upper.json",
        "mkdir -p /srv/twin2/photos; echo precious >/srv/twin2/photos/one",
    )
    text = shlex.quote(store("twin", "/srv/twin2", upper_layer="/srv/twin2/photos"))
    machine.succeed(f"printf %s {text} >{CONFIG}; systemctl start layered-storesd")
    refused("layered-stores start twin", "/srv/twin2/photos is not empty")
    refused(remove("twin"), "twin.json.unreadable cannot be read")
    machine.succeed(f"rm {STATE}/known/twin.json.unreadable")
    refused(remove("twin"), "has never been the upper layer of this store")
    machine.succeed("grep precious /srv/twin2/photos/one")
    declare(there)
    is_well("twin", second)

with subtest("A database that was never the store's is not removed with it"):
    machine.succeed("mkdir -p /srv/f; echo x >/tmp/x; nix-store --store /srv/chroot --add /tmp/x")
    declare(store("f", "/srv/f"))
    path = fill("f")
    declare(store("f", "/srv/f", root="/srv/chroot"))
    machine.execute("layered-stores start f; layered-stores stop f")
    refused(remove("f"), "has never been that of this store")
    machine.succeed("test -e /srv/chroot/nix/var/nix/db/db.sqlite")
    declare(store("f", "/srv/f"))
    is_well("f", path)

with subtest("What a start has tried and what was filled since is not emptied"):
    machine.succeed("mkdir -p /srv/g/photos")
    mistyped = store("g", "/srv/g", lower_store="/srv/nowhere", upper_layer="/srv/g/photos")
    declare(mistyped)
    refused("layered-stores start g")
    machine.succeed("echo precious >/srv/g/photos/one")
    refused(remove("g"), "has never been the upper layer of this store")
    refused("layered-stores start g", "/srv/g/photos is not empty")
    machine.succeed("grep precious /srv/g/photos/one")

with subtest("One filesystem at two places has one store"):
    make_disk("h")
    machine.succeed("mkdir -p /srv/i")
    plug("h", "/srv/h")
    machine.succeed("mkdir /srv/h/s /srv/i/s")
    both = (store("h", "/srv/h/s"), store("i", "/srv/i/s"))
    declare(*both)
    path = fill("h")
    fill("i")
    machine.succeed("mount --bind /srv/h /srv/i")
    refused("layered-stores start i", "has what is in store h")
    refused(remove("i"), "has what is in store h")
    machine.succeed("umount /srv/i")
    is_well("h", path)

with subtest("A store that was never up does not take the disk of another one"):
    machine.succeed("mkdir -p /srv/j; umount /srv/h")
    plug("h", "/srv/j")
    declare(*both, store("j", "/srv/j/s"))
    refused("layered-stores start j", "has what is in store h")
    refused(remove("j"), "has what is in store h")
    machine.succeed("umount /srv/j")
    plug("h", "/srv/h")
    is_well("h", path)

with subtest("What is left of a store is not removed if another has it by another path"):
    declare("[stores.k]\nlower-store = 'local'\nautostart = false\n")
    path = fill("k")
    declare()
    machine.succeed(f"mkdir /srv/heir; mount --bind {STATE}/stores/k /srv/heir")
    declare(store("heir", "/srv/heir"))
    is_well("heir", path)
    refused(remove("k"), "has what is in store heir")
    is_well("heir", path)
    machine.succeed("umount /srv/heir")

with subtest("What was moved on purpose is taken when the other store has it no more"):
    machine.succeed("mkdir -p /srv/l /srv/m")
    declare(store("l", "/srv/l"), store("m", "/srv/m"))
    path = fill("l")
    machine.succeed("mv -T /srv/l /srv/m")
    refused("layered-stores start m", "has what is in store l", "take l out of the configuration")
    declare(store("m", "/srv/m"))
    is_well("m", path)


def cut_short(base: str) -> None:
    """Leaves a store as a removal does that was killed when the database was gone."""
    said = "\n".join(
        attribute(MARK, directory) for directory in (f"{base}/upper", f"{base}/root/nix/var/nix")
    )
    machine.succeed(
        f"printf '%s\\n' {shlex.quote(said)} >{base}/.upper.removing",
        f"rm -r {base}/root/nix/var; setfattr -x {MARK} {base}/upper",
    )


with subtest("A removal that was cut short leaves the database of another upper layer alone"):
    machine.succeed("mkdir -p /srv/n")
    declare(store("n", "/srv/n"))
    fill("n")
    cut_short("/srv/n")
    declare(store("n", "/srv/n", upper_layer="/srv/n/second"))
    refused("layered-stores start n", "/srv/n/root/nix/var/nix is not there")
    machine.succeed(remove("n"))
    path = fill("n")
    declare(store("n", "/srv/n"))
    refused("layered-stores start n", "did not come to its end")
    machine.succeed(remove("n"))
    assert machine.succeed("ls -A /srv/n/upper") == ""
    machine.succeed("journalctl --sync; journalctl -u layered-storesd | grep 'is left there'")
    declare(store("n", "/srv/n", upper_layer="/srv/n/second"))
    is_well("n", path)

with subtest("And is finished under another name"):
    machine.succeed("mkdir -p /srv/o")
    declare(store("o", "/srv/o"))
    fill("o")
    cut_short("/srv/o")
    declare(store("oo", "/srv/o"))
    refused("layered-stores start oo", "`layered-stores remove-data oo`")
    machine.succeed(remove("oo"))
    assert machine.succeed("ls -A /srv/o/upper") == ""
    fill("oo")

with subtest("A work dir with something else in it is not emptied"):
    machine.succeed("mkdir -p /srv/p /srv/photos/work; echo precious >/srv/photos/work/two")
    declare(store("p", "/srv/p"))
    path = fill("p")
    declare(store("p", "/srv/p", work_dir="/srv/photos"))
    refused("layered-stores start p", '/srv/photos is not empty (it holds "work/two")')
    refused(remove("p"), '/srv/photos is not empty (it holds "work/two")')
    machine.succeed("grep precious /srv/photos/work/two")
    declare(store("p", "/srv/p"))
    is_well("p", path)

with subtest("A disk that is gone for good is given up, where nothing can be made in its place"):
    make_disk("q")
    machine.succeed("mkdir -p /srv/q; chattr +i /srv/q")
    plug("q", "/srv/q")
    declare(store("q", "/srv/q", root="/srv/qroot"))
    fill("q")
    machine.succeed("umount /srv/q", remove("q"))
    machine.fail("test -e /srv/qroot/nix/var")
    refused("layered-stores start q", "`chattr -ia`")
    machine.succeed("chattr -i /srv/q", "layered-stores start q; layered-stores stop q")

with subtest("A start that fails does not forget what the store had"):
    make_disk("r")
    plug("r", "/srv/r")
    machine.succeed("mkdir -p /srv/r/s /srv/lower/nix/store")
    declare(store("r", "/srv/r/s", lower_store="/srv/lower"))
    machine.succeed("layered-stores start r; layered-stores stop r")
    before = machine.succeed(f"cat {STATE}/known/r.json")
    root = "/srv/r/s/root/nix/var/nix"
    for directory, name in (("/srv/r/s/upper", MARK), (root, UPPER_MARK)):
        machine.succeed(f"setfattr -n {name} -v {'a' * 32} {directory}")
    # Another whole store, by its marks.
    machine.succeed(f"setfattr -n {MARK} -v {'b' * 32} {root}; mkdir {root}/db")
    machine.succeed(f": >{root}/db/db.sqlite; mv /srv/lower/nix/store /srv/lower/nix/away")
    refused("layered-stores start r", "/srv/lower/nix/store is not there")
    assert machine.succeed(f"cat {STATE}/known/r.json") == before
    machine.succeed("umount /srv/r; mv /srv/lower/nix/away /srv/lower/nix/store")
    refused("layered-stores start r", "/srv/r/s/upper is not there")
    assert machine.succeed("ls -A /srv/r") == ""

with subtest("A database that moves to another root goes on to be its owner's"):
    machine.succeed("mkdir -p /srv/s")
    declare(store("s", "/srv/s", owner="alice"))
    machine.succeed("layered-stores start s; layered-stores stop s")
    database = "/srv/s/root/nix/var/nix/db"
    machine.succeed(
        f"runuser -u alice -- sh -c 'mkdir {database}; touch {database}/db.sqlite /srv/s/upper/x'"
    )
    declare(store("s", "/srv/s", owner="alice", root="/srv/s/moved"))
    there = "/srv/s/moved/nix/var/nix"
    refused("layered-stores start s", f"`mv -T OLD {there}`")
    machine.succeed(f"mkdir -p /srv/s/moved/nix/var; mv -T /srv/s/root/nix/var/nix {there}")
    machine.succeed("layered-stores start s", f"runuser -u alice -- touch {there}/new")
    machine.succeed("layered-stores stop s")

with subtest("On a full disk with the state directory a removal makes room"):
    make_disk("state", "-N 2000")
    declare()
    machine.succeed("systemctl stop layered-storesd", f"mv {STATE} /srv/state; mkdir {STATE}")
    plug("state", STATE)
    full = "[stores.t]\nlower-store = 'local'\nautostart = false\n"
    machine.succeed(f"printf %s {shlex.quote(full)} >{CONFIG}; systemctl start layered-storesd")
    fill("t")
    upper = f"{STATE}/stores/t/upper"
    machine.execute(f"seq 3000 | (cd {upper}; xargs touch); cat /dev/zero >{upper}/1")
    machine.fail(f"touch {STATE}/one")
    machine.succeed(remove("t"))
    assert machine.succeed(f"ls -A {upper}; ls -A {STATE}/stores/t | grep removing || true") == ""
    fill("t")
