# The daemon is killed at every step of what it does. Stores stay usable meanwhile, and the next
# daemon finds or makes everything as it should be.

CONFIG = "/etc/layered-stores/config.toml"
LOWER = "/srv/base"
UPPER = "/srv/ci/upper"
MERGED = "/srv/ci/root/nix/store"
UNIT = "srv-ci-root-nix-store.mount"


def derivation(name: str, script: str) -> str:
    """The least that Nix builds: a shell script that writes a file."""
    return (
        f'derivation {{ name = "{name}"; system = builtins.currentSystem; '
        f'builder = "/bin/sh"; args = [ "-c" "{script}" ]; }}'
    )


def build(store: str, name: str, script: str) -> str:
    """Has Nix build something, and returns its store path."""
    return machine.succeed(
        f"nix-build --no-out-link --store '{store}' -E '{derivation(name, script)}'"
    ).strip()


def merged(path: str) -> str:
    """Where a store path is to be found outside of Nix."""
    return path.replace("/nix/store", MERGED)


machine.wait_for_unit("layered-storesd.service")

with subtest("There is a store, over a lower store that Nix fills"):
    below = build(LOWER, "below", "echo below > $out")
    machine.succeed("layered-stores start ci")
    uri = machine.succeed("layered-stores uri ci").strip()
    above = build(uri, "above", "echo above > $out")
    machine.succeed(f"grep below {merged(below)}", f"grep above {merged(above)}")

# What a killed process leaves depends on how far it came. It is killed just before each call of
# these system calls, which are those that change something or hand something on to somebody else.
PREPARE = "mkdirat fchown fchmod renameat2 fsetxattr fremovexattr flock ioctl"
RECORD = "mkdir rename fsync"
THREADS = "unshare setns inotify_add_watch"
TALK = "sendmsg recvmsg"
UNIT_FILE = "linkat utimensat"
MOUNT = "fsopen fsconfig fsmount move_mount"
SWAP = f"fspick {MOUNT} umount2"

# doomed.service is the daemon as it is, hardening included, under a strace that kills it. strace
# needs ptrace(2), which the filter of system calls is there to keep away from the daemon, and does
# not reload anything.
machine.succeed(
    r"""
    sed -e '/^BusName=/d; /^SystemCallFilter=/d; /^NoExecPaths=/d' \
        -e 's/^Restart=.*/Restart=no/; s/^Type=.*/Type=notify/' \
        -e 's|^ExecStart=|&strace -f -qq -o /dev/null $KILL |' \
        -e '/^\[Service\]/a NotifyAccess=all\nEnvironmentFile=/run/doomed' \
        "$(systemctl show -P FragmentPath layered-storesd)" >/run/systemd/system/doomed.service
    sed -i "s|=strace |=$(command -v strace) |" /run/systemd/system/doomed.service
    systemctl daemon-reload
    """
)


# Where every instruction is emulated, every place would take hours. There it is about another
# kernel: of the calls of which kernels have something to say, the first of each.
EMULATED = machine.execute("systemd-detect-virt")[1].strip() == "qemu"
OF_KERNELS = ("ioctl", "renameat2", "fspick", "fsmount", "move_mount", "umount2")
PATIENCE = 10 if EMULATED else 1
# Before Linux 6.5 nothing can be put in the place of a mount that is in use.
SWAPS = tuple(map(int, machine.succeed("uname -r").split(".")[:2])) >= (6, 5)


def kill_at_every(calls: str, before: str, errand: str, after: str, meanwhile: str = "") -> int:
    """Kills the daemon at every call, has the next one take over, and looks at the result.

    Returns how often it was killed.
    """
    kills = 0
    for call in calls.split():
        if EMULATED and call not in OF_KERNELS:
            continue
        # What a slow machine has more of is what is heard and said while it waits.
        for number in range(1, 2 if EMULATED else 300):
            kill = f"-e trace=?{call} -e inject=?{call}:signal=SIGKILL:when={number}"
            result = machine.succeed(
                f"""
                systemctl stop layered-storesd
                {before}
                echo "KILL={kill}" >/run/doomed
                {{ systemctl start doomed && {errand}; }} >/dev/null 2>&1 || true
                systemctl stop doomed
                {meanwhile}
                systemctl start layered-storesd
                {after}
                systemctl show -P Result doomed
                """
            )
            if result.strip() == "success":
                break
            kills += 1
        else:
            assert EMULATED, f"there is no end of calls of {call}"
    return kills


# Up: one mount and none beneath it, of the store's layers, as Nix wants to see it in the mount
# table; directories with the owner and mode they should have, none of them half-made.
UP = f"""
test "$(layered-stores list)" = 'ci  active'
layered-stores status >/dev/null
test "$(grep -c ' {MERGED} ' /proc/self/mountinfo)" = 1
grep -q '^overlay {MERGED} .*[ ,]lowerdir={LOWER}/nix/store,upperdir={UPPER},' /proc/self/mounts
cd /srv/ci
for owned in upper:root:755 work:root:700 root:root:755 root/nix/store:root:755 \
    root/nix/var/nix:root:755 root/nix/var/log/nix:root:755
do
    test "$(stat -c %n:%U:%a "${{owned%%:*}}")" = "$owned"
done
test -z "$(find /srv/ci -name '*.new')"
for marked in upper root/nix/var/nix
do
    id=$(getfattr --only-values -n trusted.layered-stores.id $marked 2>/dev/null)
    test ${{#id}} = 32
    grep -q $id /var/lib/layered-stores/known/ci.json
done
grep -q below {merged(below)}
"""
# And nothing is lost, says Nix, which looks at the mount as well.
UP_WITH_DATA = f"""
{UP}
grep -q above {merged(above)}
nix-store --store '{uri}' --check-validity {above} {below}
"""
# What an administrator would see without the mount: a directory that takes no writes.
UNMOUNT = f"""
systemctl stop {UNIT}
lsattr -d {MERGED} | cut -d' ' -f1 | grep i >/dev/null
"""
STORE = "org.layeredstores1 /org/layeredstores1/store/ci org.layeredstores1.Store"
kills = 0

with subtest("Killed while it brings a store up for the first time"):
    # Put what there is aside, so that everything is still to be made.
    machine.succeed(
        f"systemctl stop layered-storesd\n{UNMOUNT}\nchattr -i {MERGED}",
        "mv /srv/ci /srv/kept",
    )
    nothing_there = f"""
    ! mountpoint --quiet {MERGED} || systemctl stop {UNIT}
    chattr -f -i {MERGED} || true
    rm -rf /srv/ci /var/lib/layered-stores/known /run/layered-stores/*
    """
    kills += kill_at_every(
        f"{PREPARE} {RECORD} {THREADS} {UNIT_FILE} {MOUNT}", nothing_there, "true", UP
    )
    machine.succeed(f"systemctl stop layered-storesd\n{nothing_there}\nmv /srv/kept /srv/ci")
    machine.succeed(f"systemctl start layered-storesd\n{UP_WITH_DATA}")

with subtest("Killed while it brings a store up that has data, as after a reboot"):
    as_after_a_reboot = f"{UNMOUNT}\nrm -r /run/layered-stores/*"
    kills += kill_at_every(
        f"flock rename {UNIT_FILE} {MOUNT} {TALK}", as_after_a_reboot, "true", UP_WITH_DATA
    )

with subtest("Killed while it takes a store over, and while it stops it"):
    # The bus must not start the next daemon for this call: it would do what it is asked for.
    stop = f"busctl --auto-start=no call {STORE} Stop"
    # Whether it had heard of the stop or not, the next one does not keep the store from coming up.
    up_again = f"layered-stores start ci\n{UP_WITH_DATA}"
    kills += kill_at_every(f"flock unlink {TALK}", "", stop, up_again)

if SWAPS:
    with subtest("Killed while it slides a fresh superblock under a store"):
        # A path in both layers, held open while it is deleted: a reconfigure does not help there.
        shadowed = f"{'0' * 32}-shadowed"
        machine.succeed(f"install -D /dev/stdin {LOWER}/nix/store/{shadowed}/file <<<lower")
        pinned = f"""
        install -D /dev/stdin {UPPER}/{shadowed}/file <<<upper
        systemctl start layered-storesd
        layered-stores remount ci
        systemctl stop layered-storesd
        exec 3<{MERGED}/{shadowed}/file
        sleep 1000 <&3 >/dev/null 2>&1 &
        holder=$!
        exec 3<&-
        """
        delete = f"rm -r {UPPER}/{shadowed} && busctl --auto-start=no call {STORE} Remount"
        # One that is killed as it starts was never there to delete under.
        no_gap = f"grep -q below {merged(below)}\nrm -rf {UPPER}/{shadowed}"
        seen = f"until grep -qs lower {MERGED}/{shadowed}/file; do sleep 0.02; done"
        right = f"""
        timeout {20 * PATIENCE} sh -c '{seen}'
        {UP_WITH_DATA}
        layered-stores verify ci >/dev/null
        kill $holder
        """
        kills += kill_at_every(SWAP, pinned, delete, right, meanwhile=no_gap)

with subtest("Killed while it makes a store anew whose declaration has changed"):
    change = f"""
    if grep -q /srv/ci/other-work {CONFIG}
    then sed -i s:/srv/ci/other-work:/srv/ci/work: {CONFIG}
    else sed -i s:/srv/ci/work:/srv/ci/other-work: {CONFIG}
    fi
    """
    changed = f"""
    {UP_WITH_DATA}
    wanted=$(sed -n 's/^work-dir = "\\(.*\\)"/\\1/p' {CONFIG})
    grep -q "^overlay {MERGED} .*,workdir=$wanted[, ]" /proc/self/mounts
    """
    kills += kill_at_every(
        f"ioctl rename renameat2 unlink {UNIT_FILE} {MOUNT} sendmsg", change, "true", changed
    )
    machine.succeed(f"sed -i s:/srv/ci/other-work:/srv/ci/work: {CONFIG}")
    machine.succeed(f"systemctl restart layered-storesd\n{changed}")

with subtest("Killed while it takes down a store that is declared no more"):
    undeclared = f"""
    cp {CONFIG} /srv/config.toml
    systemctl start layered-storesd
    {UP_WITH_DATA}
    systemctl stop layered-storesd
    rm {CONFIG}
    """
    gone = f"""
    test -z "$(layered-stores list)"
    test -z "$(systemctl list-units --all --plain --no-legend {UNIT})"
    test ! -e /run/systemd/system/{UNIT}
    test -z "$(ls -A /var/lib/layered-stores/known)"
    grep -q above {UPPER}/{above.removeprefix("/nix/store/")}
    touch {MERGED}/.writable
    rm {MERGED}/.writable
    cp /srv/config.toml {CONFIG}
    """
    kills += kill_at_every("ioctl unlink sendmsg", undeclared, "true", gone)
    machine.succeed(f"systemctl restart layered-storesd\n{UP_WITH_DATA}")

with subtest("Killed while it removes what is in a store"):
    machine.succeed(
        f"systemctl stop layered-storesd\n{UNMOUNT}\nchattr -i {MERGED}",
        "mv /srv/ci /srv/kept",
        f"{nothing_there}\nsystemctl start layered-storesd",
    )
    old = f"{UPPER}/{'0' * 32}-old"
    database = "/srv/ci/root/nix/var/nix/db/db.sqlite"
    filled = f"mkdir -p {old}/a/b $(dirname {database}); touch {old}/file {old}/a/b/file {database}"
    remove = f"""busctl --auto-start=no call {STORE} Stop && busctl --auto-start=no call \
        org.layeredstores1 /org/layeredstores1 org.layeredstores1.Manager RemoveData s ci"""
    # It is all there, or none of it, or the store is not up and says what to do.
    all_or_nothing = f"""
    layered-stores start ci 2>/dev/null || true
    if layered-stores status ci >/dev/null
    then
        test -e {old}/file -a -e {old}/a/b/file -a -e {database} ||
            test ! -e {old} -a ! -e {database}
    else
        {{ layered-stores status ci || true; }} | grep 'run `layered-stores remove-data' >/dev/null
        layered-stores remove-data --yes ci
        layered-stores start ci
        test ! -e {old} -a ! -e {database}
    fi
    test -z "$(find /srv/ci -name '*.removing*')"
    """
    kills += kill_at_every("unlinkat renameat2 fsync", filled, remove, all_or_nothing)
    machine.succeed(f"systemctl stop layered-storesd\n{nothing_there}\nmv /srv/kept /srv/ci")
    machine.succeed(f"systemctl start layered-storesd\n{UP_WITH_DATA}")

log.info(f"The daemon was killed at {kills} places")
assert kills > (10 if EMULATED else 100), f"only {kills} kills: has strace lost its grip?"
