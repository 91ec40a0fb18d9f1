# Two hundred stores on one lower store: what one of them does is no concern of the others.
import json
import time
from collections.abc import Iterable

CONFIG = "/etc/layered-stores/config.toml"
LOWER = "/srv/base"
PATH = f"{'0' * 32}-path"
MIB = 1024


def name(number: int) -> str:
    return f"store-{number:03}"


def declare(first: int, last: int) -> None:
    """Writes a configuration of the stores with these numbers. It is not in force yet."""
    # Where it is a link to something that cannot be written, as on NixOS, it is replaced.
    machine.succeed(
        f"""
        mkdir -p $(dirname {CONFIG})
        rm -f {CONFIG}
        for number in $(seq -f %03g {first} {last}); do
            echo "[stores.store-$number]"
            echo 'lower-store = "{LOWER}"'
            for key in root upper-layer work-dir; do
                echo "$key = \\"/srv/many/store-$number/$key\\""
            done
        done >{CONFIG}
        """
    )


def states() -> dict[str, str]:
    """The state of every store, from `layered-stores list`."""
    return dict(line.split() for line in machine.succeed("layered-stores list").splitlines())


def mounts() -> dict[str, str]:
    """The number of every store's mount, by store."""
    table = machine.succeed("cat /proc/self/mountinfo").splitlines()
    found = [(line.split()[4].split("/"), line.split()[0]) for line in table]
    here = [(path[3], number) for path, number in found if path[1:3] == ["srv", "many"]]
    assert len(dict(here)) == len(here), "something is mounted twice"
    return dict(here)


def all_active(numbers: Iterable[int]) -> None:
    found = states()
    assert set(found) == {name(number) for number in numbers}, found.keys()
    assert set(mounts()) == set(found), mounts()
    not_active = {store: state for store, state in found.items() if state != "active"}
    assert not_active == {}, not_active


def usable(stores: Iterable[str]) -> None:
    """Each shows the path of the lower store, and takes writes."""
    for store in stores:
        merged = f"/srv/many/{store}/root/nix/store"
        machine.succeed(
            f"grep -q lower {merged}/{PATH}/file && touch {merged}/.x && rm {merged}/.x"
        )


def timed(what: str, command: str) -> str:
    began = time.monotonic()
    output = machine.succeed(command, timeout=300)
    log.info(f"{what}: {time.monotonic() - began:.2f} s")
    return output


def memory() -> int:
    """What the daemon keeps in memory, in KiB."""
    pid = machine.get_unit_property("layered-storesd.service", "MainPID")
    return int(machine.succeed(f"awk '/^VmRSS/ {{ print $2 }}' /proc/{pid}/status"))


machine.succeed(f"install -D /dev/stdin {LOWER}/nix/store/{PATH}/file <<<lower")

with subtest("Two hundred stores come up with the daemon"):
    declare(0, 199)
    machine.succeed(f"layered-stores check-config {CONFIG}")
    # It is ready when all are active.
    timed("200 stores active", "systemctl restart layered-storesd")
    all_active(range(200))
    machine.succeed(
        "systemctl show -P StatusText layered-storesd | grep -x '200 of 200 stores active'"
    )
    usable(name(number) for number in range(0, 200, 20))
    log.info(f"the daemon's memory: {memory()} KiB")
    assert memory() < 30 * MIB, memory()

with subtest("Their status takes one question"):
    output = timed("status of 200 stores", "layered-stores status")
    assert output.count("active") == 200, output
    assert len(json.loads(machine.succeed("layered-stores status --json"))) == 200
    machine.succeed("strace -f -qq -o /tmp/trace -e trace=sendmsg layered-stores status >/dev/null")
    sent = int(machine.succeed("grep -c sendmsg /tmp/trace"))
    assert sent < 20, sent

with subtest("Whoever remounts one does not touch the others"):
    before = mounts()
    machine.succeed("layered-stores remount store-007")
    counts = {
        store["name"]: store["refresh-count"]
        for store in json.loads(machine.succeed("layered-stores status --json"))
    }
    assert counts.pop("store-007") == 1
    assert set(counts.values()) == {0}, counts
    assert mounts() == before

with subtest("A new path of the lower store shows up in all of them"):
    new = f"{'1' * 32}-new"
    everywhere = "/srv/many/*/root/nix/store"
    # None has it, and none remembers that.
    machine.fail(f"cat {everywhere}/{new}/file")
    machine.fail(f"for store in {everywhere}; do stat $store/{new} && exit; done; exit 1")
    machine.succeed(f"install -D /dev/stdin {LOWER}/nix/store/{new}/file <<<new")
    machine.wait_until_succeeds(
        f"for store in {everywhere}; do cat $store/{new}/file; done | grep -c new | grep -x 200",
        timeout=60,
    )

with subtest("A restart of the daemon takes them all over"):
    before = mounts()
    timed("200 stores adopted", "systemctl restart layered-storesd")
    all_active(range(200))
    assert mounts() == before
    machine.succeed("layered-stores status")

with subtest("So does a crash"):
    pid = machine.get_unit_property("layered-storesd.service", "MainPID")
    machine.succeed("systemctl kill --signal=KILL layered-storesd")
    machine.wait_until_succeeds(
        f"new=$(systemctl show -P MainPID layered-storesd); test $new != 0; test $new != {pid}; "
        "systemctl is-active --quiet layered-storesd",
        timeout=60,
    )
    all_active(range(200))
    assert mounts() == before

with subtest("One that cannot come up keeps none of the others down"):
    machine.succeed("systemctl stop layered-storesd")
    machine.succeed("umount /srv/many/*/root/nix/store")
    machine.succeed(
        "mv /srv/many/store-100/upper-layer /srv/aside", "touch /srv/many/store-100/upper-layer"
    )
    timed("199 of 200 stores active", "systemctl start layered-storesd")
    failed = "199 of 200 stores active; failed: store-100"
    machine.succeed(f"systemctl show -P StatusText layered-storesd | grep -x '{failed}'")
    # It is tried again every few seconds.
    machine.wait_until_succeeds("layered-stores list | grep 'store-100 *failed'", timeout=60)
    assert list(states().values()).count("active") == 199
    code, output = machine.execute("layered-stores status")
    assert code == 3, code
    message = "store-100: upper-layer: /srv/many/store-100/upper-layer is not a directory"
    assert message in output, output
    usable(name(number) for number in range(0, 200, 20) if number != 100)
    # And it is easily helped.
    machine.succeed(
        "rm /srv/many/store-100/upper-layer",
        "mv /srv/aside /srv/many/store-100/upper-layer",
        "layered-stores start store-100",
    )
    all_active(range(200))
    machine.succeed("layered-stores status")

with subtest("A reload takes fifty away, adds fifty, and leaves the rest alone"):
    before = mounts()
    machine.succeed(f"touch /srv/many/{name(0)}/root/nix/store/data")
    declare(50, 249)
    timed("50 stores gone and 50 new", "layered-stores reload")
    all_active(range(50, 250))
    after = mounts()
    for number in range(50, 200):
        assert after[name(number)] == before[name(number)], name(number)
    usable(name(number) for number in range(200, 250, 10))
    # What is gone has left its data, and a directory that can be written and deleted again.
    machine.succeed(
        f"test -e /srv/many/{name(0)}/upper-layer/data", f"rm -r /srv/many/{name(0)}/root"
    )
    log.info(f"the daemon's memory: {memory()} KiB")

with subtest("A configuration with one mistake changes nothing at all"):
    before = mounts()
    declare(100, 299)
    machine.succeed(f"echo 'lower = 1' >>{CONFIG}")
    output = machine.fail("layered-stores reload 2>&1")
    assert name(299) in output and "lower-store" in output, output
    assert mounts() == before
    all_active(range(50, 250))

with subtest("Without a configuration there are no stores, and nothing is left of them but data"):
    machine.succeed(f"rm {CONFIG}")
    timed("200 stores gone", "layered-stores reload")
    assert states() == {}
    assert mounts() == {}
    # systemd forgets them when it comes to it.
    units = "systemctl list-units --all --plain --no-legend 'srv-many-*'"
    machine.wait_until_succeeds(f'test -z "$({units})"', timeout=60)
    machine.succeed('test -z "$(ls -A /var/lib/layered-stores/known)"')
    log.info(f"the daemon's memory: {memory()} KiB")
    # No directory is immutable any more.
    machine.succeed("rm -r /srv/many")
    machine.succeed("systemctl restart layered-storesd", "layered-stores status")
