# A store that is thrown away: all of it is in memory, takes no more than it may, survives whatever
# happens to the daemon, and is gone with the next boot.
import json
import shlex

CONFIG = "/etc/layered-stores/config.toml"
DIRECTORY = "/var/lib/layered-stores/stores/scratch"
MERGED = f"{DIRECTORY}/root/nix/store"


def text(store: str, key: str) -> str:
    """A property of a store."""
    _, output = machine.execute(f"layered-stores status {store} --json")
    return str(json.loads(output)[key])


def store_uri(store: str) -> str:
    """The URL for Nix, quoted for the shell."""
    return shlex.quote(machine.succeed(f"layered-stores uri {store}").strip())


def add(store: str, name: str, content: str) -> str:
    """Adds a file to a store, and returns its store path."""
    machine.succeed(f"echo '{content}' >/tmp/{name}")
    return machine.succeed(f"nix-store --store {store_uri(store)} --add /tmp/{name}").strip()


def configure(sed: str) -> None:
    """Changes the configuration the machine has booted with."""
    machine.succeed(
        f"test -e /srv/config.toml || cp $(readlink -f {CONFIG}) /srv/config.toml",
        f"rm {CONFIG}; sed {shlex.quote(sed)} /srv/config.toml >{CONFIG}",
    )


def filesystem() -> str:
    """What is mounted at the store's directory, and how large it is."""
    return machine.succeed(
        f"findmnt --noheadings --output FSTYPE,SOURCE,SIZE {DIRECTORY} | xargs"
    ).strip()


machine.start(allow_reboot=True)
machine.wait_for_unit("layered-storesd.service")

with subtest("It is in memory, and no larger than it may be"):
    machine.succeed("layered-stores status")
    assert filesystem() == "tmpfs layered-stores 64M", filesystem()
    path = add("scratch", "small", "small")
    machine.succeed(f"grep small {MERGED}/{path.removeprefix('/nix/store/')}")
    machine.succeed("head -c 80M /dev/zero >/tmp/large")
    said = machine.fail(f"nix-store --store {store_uri('scratch')} --add /tmp/large 2>&1")
    assert "No space left" in said, said
    # Its mount was chosen not to keep access times, and the other store's was not.
    options = "findmnt --noheadings --output OPTIONS"
    assert "noatime" in machine.succeed(f"{options} {MERGED}")
    assert "noatime" not in machine.succeed(f"{options} {text('kept', 'real-store-dir')}")

with subtest("The options stay when a fresh superblock takes its place"):
    name = f"{'0' * 32}-held"
    machine.succeed(
        f"install -D /dev/stdin {DIRECTORY}/upper/{name}/file <<<upper",
        f"install -D /dev/stdin /nix/store/{name}/file <<<lower",
        "layered-stores remount scratch",
        f"sleep 60 <{MERGED}/{name}/file >/dev/null 2>&1 &",
    )
    machine.succeed(f"rm -r {DIRECTORY}/upper/{name}", "layered-stores remount scratch")
    assert text("scratch", "swap-count") == "1"
    assert "noatime" in machine.succeed(f"{options} {MERGED}")
    machine.succeed(f"rm -r /nix/store/{name}")

with subtest("Stopped and started, restarted and crashed, it keeps what it has"):
    machine.succeed("pkill -x sleep; layered-stores stop scratch", "layered-stores start scratch")
    machine.succeed("systemctl restart layered-storesd")
    machine.succeed("systemctl kill --signal=KILL layered-storesd")
    # The next daemon may not have taken it over yet.
    machine.wait_until_succeeds("layered-stores wait scratch", timeout=60)
    machine.succeed("layered-stores status scratch")
    machine.succeed(f"nix-store --store {store_uri('scratch')} --check-validity {path}")

with subtest("How full it is, of how much, is told"):
    page = machine.succeed("layered-stores status scratch kept")
    t.assertRegex(page, r"(?m)^ +\d+ paths?, [\d.]+ of 64 MiB$")
    t.assertIn("\n\n● kept: active", page)

with subtest("It is given more, and what is in it stays"):
    configure('s/"64M"/"96M"/')
    machine.succeed("layered-stores reload")
    assert filesystem() == "tmpfs layered-stores 96M", filesystem()
    machine.succeed(f"nix-store --store {store_uri('scratch')} --check-validity {path}")

with subtest("Less than is in it is refused, and nothing is lost"):
    configure('s/"64M"/"1K"/')
    said = machine.fail("layered-stores reload 2>&1")
    assert 'store "scratch" is failed: ' in said, said
    assert 'ephemeral-size = "1K"' in text("scratch", "state-reason"), text(
        "scratch", "state-reason"
    )
    configure("")
    machine.succeed("layered-stores reload", "layered-stores status")
    machine.succeed(f"nix-store --store {store_uri('scratch')} --check-validity {path}")

with subtest("Ephemeral no more, it does not go on in memory unnoticed"):
    configure("/ephemeral-size/d")
    code, said = machine.execute("layered-stores reload 2>&1")
    assert code == 3 and "it goes on as it was" in said, said
    assert f"`umount {DIRECTORY}`" in text("scratch", "problems")
    machine.succeed("layered-stores stop scratch")
    said = machine.fail("layered-stores start scratch 2>&1")
    assert f"`umount {DIRECTORY}`" in said, said
    machine.succeed(f"umount {DIRECTORY}", "layered-stores start scratch")
    machine.succeed(f"test $(stat -f -c %T {DIRECTORY}) != tmpfs")
    on_disk = add("scratch", "on-disk", "on disk")

with subtest("Nor is what is on disk hidden by a filesystem in memory"):
    configure("")
    code, said = machine.execute("layered-stores reload 2>&1")
    assert code == 3 and f"{DIRECTORY} is not empty" in said, said
    machine.succeed("layered-stores stop scratch")
    said = machine.fail("layered-stores start scratch 2>&1")
    assert f"{DIRECTORY} is not empty" in said, said
    machine.succeed(
        f"mv {DIRECTORY} {DIRECTORY}.disk 2>/dev/null || "
        f"{{ chattr -i {MERGED}; mv {DIRECTORY} {DIRECTORY}.disk; }}",
        "layered-stores start scratch",
    )
    assert filesystem() == "tmpfs layered-stores 64M", filesystem()
    path = add("scratch", "small", "small")

with subtest("With the next boot it is empty, and the other one is not"):
    kept = add("kept", "kept", "kept")
    machine.reboot()
    machine.wait_for_unit("layered-storesd.service")
    machine.succeed("layered-stores status")
    assert filesystem() == "tmpfs layered-stores 64M", filesystem()
    machine.fail(f"nix-store --store {store_uri('scratch')} --check-validity {path}")
    machine.succeed(f"nix-store --store {store_uri('kept')} --check-validity {kept}")
