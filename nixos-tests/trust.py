# Users turn against the daemon: the owner of a store puts links and other people's directories in
# the place of what root mounts, others make beforehand what root would make, and lock what they can
# open. Somebody mounts over a store while it is refreshed, or takes its flags away. Root follows
# nothing that somebody else owns, touches no mount that is not its own, and leaves no superblock
# behind that takes writes.
import json
import shlex

CONFIG = "/etc/layered-stores/config.toml"
LOWER = "/srv/base"
HERS = "/srv/hers"
PATH = f"{'0' * 32}-path"
SECRET = "/home/bob/secret"


def by(user: str, script: str) -> str:
    """A command line that has a user run a shell script."""
    return f"runuser -u {user} -- sh -euc {shlex.quote(script)}"


def merged(store: str) -> str:
    return f"/srv/{store}/root/nix/store"


def status(store: str) -> dict[str, object]:
    _, output = machine.execute(f"layered-stores status {store} --json")
    found: dict[str, object] = json.loads(output)
    return found


def problems(store: str) -> dict[str, str]:
    found = status(store)["problems"]
    assert isinstance(found, list)
    return {problem["code"]: problem["message"] for problem in found}


def wait_for_state(store: str, state: str, timeout: int = 60) -> None:
    machine.wait_until_succeeds(
        f"busctl get-property org.layeredstores1 /org/layeredstores1/store/{store} "
        f"org.layeredstores1.Store State | grep -Fx 's \"{state}\"'",
        timeout=timeout,
    )


def mounts(store: str) -> list[str]:
    """The types of what is mounted in a store's place."""
    table = machine.succeed("cat /proc/self/mounts").splitlines()
    return [line.split()[2] for line in table if line.split()[1] == merged(store)]


def nothing_of_his_is_seen_or_gone() -> None:
    """Bob's directory is as he left it and shows nowhere, and nothing is mounted at /nix/store."""
    machine.succeed(by("bob", f"grep -q precious {SECRET}/work/precious"))
    machine.fail(f"grep -rqs precious {HERS} /srv/ci")
    machine.fail("grep ' /nix/store .* - overlay ' /proc/self/mountinfo")


def pin(store: str) -> None:
    """A path in both layers is open. Once it is deleted from the upper one, only a swap helps.

    Whoever holds it has its working directory in the store, too.
    """
    upper = f"/srv/{store}/upper"
    machine.succeed(
        f"systemctl stop holder 2>/dev/null || true; mkdir -p {upper}/{PATH}",
        f"echo upper >{upper}/{PATH}/file",
        f"layered-stores remount {store}",
        f"systemd-run --quiet -E PATH --unit=holder --property=WorkingDirectory={merged(store)} "
        f"sh -c 'exec sleep infinity <{merged(store)}/{PATH}/file'",
    )
    machine.wait_until_succeeds(
        "readlink /proc/$(systemctl show -P MainPID holder)/fd/0 | grep file"
    )


def delete(store: str) -> str:
    """A command line that deletes it. 300 ms later the daemon sees to that by itself."""
    return f"rm -r /srv/{store}/upper/{PATH}"


def wait_for_next_daemon(after: str) -> None:
    machine.wait_until_succeeds(
        "pid=$(systemctl show -P MainPID layered-storesd); "
        f"test $pid != 0 && test $pid != {after} && systemctl is-active --quiet layered-storesd",
        timeout=60,
    )


machine.wait_for_unit("layered-storesd.service")
machine.succeed(
    f"install -D /dev/stdin {LOWER}/nix/store/{PATH}/file <<<lower",
    "layered-stores start ci hers",
    by(
        "bob",
        f"mkdir -p {SECRET}/work && chmod 700 {SECRET} && echo precious >{SECRET}/work/precious",
    ),
)

# Locks

with subtest("What users can lock keeps no store down"):
    script = """
import fcntl, os, sys, time
held = []
for top in ("/srv", "/var/lib/layered-stores", "/run/layered-stores"):
    for directory, _, files in os.walk(top):
        for path in [directory, *(os.path.join(directory, file) for file in files)]:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held.append(path)
            except OSError:
                pass
open("/tmp/held-by-" + sys.argv[1], "w").write("\\n".join(held) + "\\n")
time.sleep(3600)
"""
    machine.succeed(f"cat >/srv/lock.py <<'END'\n{script}\nEND")
    machine.succeed("layered-stores stop hers ci")
    for user in ("alice", "bob"):
        machine.succeed(
            f"systemd-run --quiet -E PATH --uid={user} --unit=locks-{user} "
            f"python3 /srv/lock.py {user}"
        )
        machine.wait_for_file(f"/tmp/held-by-{user}", timeout=60)
    machine.succeed(
        f"grep -qx {HERS}/upper /tmp/held-by-alice", "grep -qx /srv/ci/upper /tmp/held-by-alice"
    )
    machine.succeed("layered-stores start ci hers", timeout=60)
    machine.succeed("systemctl restart layered-storesd", timeout=60)
    for store in ("ci", "hers"):
        assert status(store)["state"] == "active", status(store)
    machine.succeed("systemctl stop locks-alice locks-bob")

# The owner

with subtest("An owner of what is above a store puts other directories in the place of its own"):
    pin("hers")
    # A mistake of root's.
    machine.succeed(f"chown alice {HERS}", delete("hers"))
    for name, replacement in {
        "upper": f"ln -s {SECRET} {HERS}/upper",
        "work": f"ln -s {SECRET} {HERS}/work",
        "root": f"ln -s / {HERS}/root",
    }.items():
        machine.succeed(by("alice", f"mv {HERS}/{name} {HERS}/away; {replacement}"))
        said = machine.fail("layered-stores remount hers 2>&1", timeout=60)
        assert said.count("\n") == 1, said
        nothing_of_his_is_seen_or_gone()
        machine.succeed(by("alice", f"rm {HERS}/{name}; mv {HERS}/away {HERS}/{name}"))
    # A daemon that starts does not take over what she could do it again with.
    machine.succeed("systemctl restart layered-storesd", timeout=60)
    assert status("hers")["state"] == "failed", status("hers")
    said = machine.fail("layered-stores start hers 2>&1", timeout=60)
    assert f"{HERS} can be changed by others than root" in said, said
    assert mounts("ci") == ["overlay"], mounts("ci")
    nothing_of_his_is_seen_or_gone()
    machine.succeed(f"chown root {HERS}", "layered-stores start hers", timeout=60)
    machine.succeed("layered-stores remount hers", f"grep lower {merged('hers')}/{PATH}/file")
    assert problems("hers") == {}, problems("hers")
    assert mounts("hers") == ["overlay"], mounts("hers")

with subtest("Whoever owns the way to a lower store leads it elsewhere"):
    pin("hers")
    machine.succeed(f"chown alice {LOWER}", delete("hers"))
    machine.succeed(by("alice", f"mv {LOWER}/nix {LOWER}/away; mkdir {LOWER}/nix"))
    machine.succeed(by("alice", f"ln -s {SECRET} {LOWER}/nix/store"))
    machine.fail("layered-stores remount hers 2>&1", timeout=60)
    nothing_of_his_is_seen_or_gone()
    machine.succeed("layered-stores stop hers", timeout=60)
    said = machine.fail("layered-stores start hers 2>&1", timeout=60)
    assert f"lower-store: {LOWER} can be changed by others than root" in said, said
    machine.succeed(f"chown root {LOWER}")
    said = machine.fail("layered-stores start hers 2>&1", timeout=60)
    assert f"lower-store: {LOWER}/nix can be changed by others than root" in said, said
    nothing_of_his_is_seen_or_gone()
    machine.succeed(f"rm -r {LOWER}/nix", f"mv {LOWER}/away {LOWER}/nix")
    machine.succeed("layered-stores start hers", timeout=60)
    for store in ("ci", "hers"):
        machine.succeed(f"layered-stores remount {store}")
        assert problems(store) == {}, problems(store)

with subtest("What was made beforehand where everybody can make files is not taken"):
    machine.succeed("mkdir -m 1777 /srv/shared")
    machine.succeed(
        by("bob", "mkdir -p /srv/shared/.upper.new/his /srv/shared/work/work /srv/shared/mine")
    )
    before = machine.succeed("find /srv/shared -printf '%p %U %m\\n' | sort")
    machine.succeed(
        f"cp {CONFIG} /srv/config.toml; cp --remove-destination /srv/config.toml {CONFIG}"
    )
    for upper, work, said in (
        (
            "/srv/shared/upper",
            "/srv/own/work",
            "upper-layer: /srv/shared/upper would lie in /srv/sh",
        ),
        (
            "/srv/shared/mine",
            "/srv/own/work",
            "upper-layer: /srv/shared/mine would lie in /srv/shar",
        ),
        (
            "/srv/own/upper",
            "/srv/shared/work",
            "work-dir: /srv/shared/work would lie in /srv/shared",
        ),
        ("/srv/shared/mine/u", "/srv/own/work", "upper-layer: /srv/shared/mine can be changed by"),
    ):
        keys = {"lower-store": LOWER, "root": "/srv/own/root", "upper-layer": upper}
        table = "\n".join(f'{key} = "{value}"' for key, value in {**keys, "work-dir": work}.items())
        machine.succeed(
            f"{{ cat /srv/config.toml; printf '\\n[stores.own]\\n'; cat; }} >{CONFIG} "
            f"<<'END'\n{table}\nEND"
        )
        machine.execute("layered-stores reload", timeout=60)
        assert said in str(status("own")["state-reason"]), status("own")
        assert machine.succeed("find /srv/shared -printf '%p %U %m\\n' | sort") == before
    machine.succeed(f"cp /srv/config.toml {CONFIG}", "layered-stores reload", timeout=60)

# Other mounts

# As in the scenario restart: the daemon under a strace that makes it slow.
machine.succeed(
    r"""
    sed -e '/^BusName=/d; /^SystemCallFilter=/d; /^NoExecPaths=/d' \
        -e 's/^Restart=.*/Restart=no/; s/^Type=.*/Type=notify/' \
        -e 's|^ExecStart=|&strace -f -qq -o /dev/null $SLOW |' \
        -e '/^\[Service\]/a NotifyAccess=all\nEnvironmentFile=/run/slow' \
        "$(systemctl show -P FragmentPath layered-storesd)" >/run/systemd/system/slow.service
    sed -i "s|=strace |=$(command -v strace) |" /run/systemd/system/slow.service
    systemctl daemon-reload
    """
)

with subtest("What is mounted over a store during a refresh stays, and the store says so"):
    # The numbers of system calls as new as these are the same on every architecture.
    for call, number in {"fsopen": 430, "fsmount": 432, "move_mount": 429}.items():
        pin("ci")
        machine.succeed(
            "systemctl stop layered-storesd",
            delete("ci"),
            f"echo 'SLOW=-e trace={call} -e inject={call}:delay_enter=4000000:when=1' >/run/slow",
            "systemctl start slow",
            "systemd-run --quiet -E PATH --unit=refresh layered-stores remount ci",
        )
        machine.succeed(
            # In one command: it does not last long.
            f"until {{ grep -s '^{number} ' /proc/[0-9]*/task/*/syscall || true; }} | grep .; "
            f"do sleep 0.02; done; mount -t tmpfs theirs {merged('ci')}",
            f"echo theirs >{merged('ci')}/theirs",
            timeout=60,
        )
        machine.wait_until_fails("systemctl is-active --quiet refresh", timeout=60)
        wait_for_state("ci", "failed")
        assert "covered" in problems("ci"), problems("ci")
        assert "tmpfs from theirs" in problems("ci")["covered"], problems("ci")
        # Seen in time, nothing is slid under it either.
        if call != "move_mount":
            assert sorted(mounts("ci")) == ["overlay", "tmpfs"], (call, mounts("ci"))
        machine.succeed(f"grep -q theirs {merged('ci')}/theirs", f"umount {merged('ci')}")
        wait_for_state("ci", "active")
        machine.succeed("layered-stores remount ci", f"grep lower {merged('ci')}/{PATH}/file")
        assert mounts("ci") == ["overlay"], (call, mounts("ci"))
        machine.succeed("systemctl stop slow", "systemctl reset-failed refresh 2>/dev/null || true")
        machine.succeed("systemctl start layered-storesd", timeout=60)
        assert problems("ci") == {}, problems("ci")

with subtest("What takes the place of a store or its layers while it is started is seen"):
    machine.succeed(
        "systemctl stop holder; layered-stores stop ci; systemctl stop layered-storesd",
        # As at a boot, which forgets what was stopped.
        "rm /run/layered-stores/ci.asked.json",
        "echo 'SLOW=-e trace=move_mount -e inject=move_mount:delay_enter=4000000:when=1' "
        ">/run/slow",
        "systemctl start --no-block slow",
    )
    # The main thread's is none that mounts: it finds out whether the kernel can swap.
    machine.succeed(
        "until { grep -ls '^429 ' /proc/[0-9]*/task/*/syscall || true; } | "
        "awk -F/ '$3 != $5' | grep .; "
        f"do sleep 0.02; done; mount -t tmpfs theirs {merged('ci')}",
        timeout=60,
    )
    machine.wait_until_succeeds(
        "journalctl --unit=slow | grep 'ci: something else was mounted at .* in the same moment'",
        timeout=60,
    )
    wait_for_state("ci", "failed")
    assert mounts("ci") == ["tmpfs"], mounts("ci")
    machine.succeed(f"umount {merged('ci')}", "layered-stores start ci", timeout=60)
    assert mounts("ci") == ["overlay"], mounts("ci")
    # A directory that is replaced after it was looked at, here by a mistake of root's.
    for directory in ("/srv/ci/upper", "/srv/ci/work", f"{LOWER}/nix/store"):
        machine.succeed(
            "layered-stores stop ci hers; systemctl stop slow layered-storesd",
            "rm /run/layered-stores/ci.asked.json",
            "echo 'SLOW=-e trace=fsopen -e inject=fsopen:delay_enter=4000000:when=1' >/run/slow",
            "systemctl start --no-block slow",
        )
        machine.succeed(
            "until { grep -s '^430 ' /proc/[0-9]*/task/*/syscall || true; } | grep .; "
            f"do sleep 0.02; done; mv {directory} {directory}.kept; mkdir {directory}",
            "until journalctl --unit=slow | "
            f"grep 'ci: {directory} was replaced by another directory while an overlay'; "
            f"do sleep 0.02; done; rm -r {directory}; mv {directory}.kept {directory}",
            timeout=60,
        )
        machine.succeed("layered-stores start ci", timeout=60)
        assert mounts("ci") == ["overlay"], (directory, mounts("ci"))
    machine.succeed("layered-stores start hers", timeout=60)
    machine.succeed("systemctl stop slow; systemctl start layered-storesd", timeout=60)
    assert problems("ci") == {}, problems("ci")

FLAGS = f"findmnt --noheadings --first-only --output VFS-OPTIONS --mountpoint {merged('ci')}"

with subtest("A mount that lacks its flags is not taken over as it is"):
    assert "nosuid,nodev" in machine.succeed(FLAGS)
    machine.succeed(f"mount -o remount,bind,suid,dev,noexec {merged('ci')}")
    machine.wait_until_succeeds(
        "{ layered-stores status ci || true; } | grep 'without nosuid, nodev'", timeout=60
    )
    assert list(problems("ci")) == ["mount-options"], problems("ci")
    machine.succeed("systemctl restart layered-storesd", timeout=60)
    flags = machine.succeed(FLAGS)
    assert "nosuid,nodev" in flags and "noexec" not in flags, flags
    machine.wait_until_succeeds("layered-stores status ci", timeout=60)
    assert problems("ci") == {}, problems("ci")
    # One that somebody else has made is theirs to put right.
    options = f"lowerdir={LOWER}/nix/store,upperdir=/srv/ci/upper,workdir=/srv/ci/work"
    pinned = "index=off,metacopy=off,nfs_export=off,redirect_dir=off,xino=off"
    machine.succeed(
        "layered-stores stop ci",
        f"mount -t overlay overlay -o nodev,{options},{pinned} {merged('ci')}",
        "layered-stores start ci",
    )
    said = problems("ci")["mount-options"]
    assert "without nosuid, other than declared" in said and f"`umount {merged('ci')}`" in said
    machine.succeed(f"umount {merged('ci')}")
    machine.wait_until_succeeds(
        f"{FLAGS} | grep nosuid,nodev && layered-stores status ci", timeout=60
    )

# Superblocks that were swapped out

INSIDE = "/proc/$(systemctl show -P MainPID holder)/cwd/.written"
TAKES_NO_WRITES = f"{{ touch {INSIDE} || true; }} 2>&1 | grep 'Read-only file system'"

with subtest("A superblock that was swapped out takes no writes, however the daemon ends"):
    kill, stop = "systemctl kill --signal=KILL layered-storesd", "systemctl stop layered-storesd"
    # And if it does not end.
    for end in ("true", kill, stop):
        pin("ci")
        pid = machine.get_unit_property("layered-storesd", "MainPID")
        swaps = int(str(status("ci")["swap-count"]))
        machine.succeed(f"touch {INSIDE} && rm {INSIDE}")
        machine.succeed(f"{delete('ci')} && layered-stores remount ci && {end}", timeout=60)
        if end == stop:
            # It has not gone without.
            said = machine.fail(f"touch {INSIDE} 2>&1")
            assert "Read-only file system" in said, said
            machine.succeed("systemctl start layered-storesd", timeout=60)
        elif end == kill:
            wait_for_next_daemon(pid)
        machine.wait_until_succeeds(TAKES_NO_WRITES, timeout=60)
        # That of the store does.
        machine.succeed(f"touch {merged('ci')}/.written", f"rm {merged('ci')}/.written")
        machine.succeed(f"grep lower {merged('ci')}/{PATH}/file")
        assert problems("ci") == {}, problems("ci")
    assert swaps == 0, "a daemon that was started again counts from zero"

with subtest("While somebody writes through it, it is tried again until they do not"):
    machine.succeed(f"touch {merged('ci')}/.log")
    machine.succeed(
        "systemd-run --quiet -E PATH --unit=writer "
        f"sh -c 'exec sleep infinity >>{merged('ci')}/.log'"
    )
    machine.wait_until_succeeds(
        "readlink /proc/$(systemctl show -P MainPID writer)/fd/1 | grep log"
    )
    pin("ci")
    machine.succeed(delete("ci"), "layered-stores remount ci")
    machine.wait_until_succeeds(
        "journalctl --unit=layered-storesd | grep 'ci: the mount that was swapped out does not "
        "become read-only: a process goes on writing through it; it is tried again'",
        timeout=60,
    )
    machine.succeed(f"touch {INSIDE} && rm {INSIDE}")
    # Over a restart as well.
    machine.succeed("systemctl restart layered-storesd", timeout=60)
    machine.succeed(f"touch {INSIDE} && rm {INSIDE}", "systemctl stop writer")
    machine.wait_until_succeeds(TAKES_NO_WRITES, timeout=60)
    # PID 1 keeps nothing any longer but the hook's socket.
    machine.wait_until_succeeds(
        "test $(systemctl show -P NFileDescriptorStore layered-storesd) = 1", timeout=60
    )
    machine.succeed(
        "systemctl stop holder", "layered-stores verify ci", "layered-stores verify hers"
    )
