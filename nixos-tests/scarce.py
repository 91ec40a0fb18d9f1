# Something that the daemon needs is used up, full or read-only. Stores that are mounted stay as
# they are, what is wrong is said with the way out, and is right again by itself once it can be.
import json

DROP_INS = "/run/systemd/system/layered-storesd.service.d"
STATE = "/var/lib/layered-stores"
STORES = ("ci", "own")
MERGED = {"ci": "/srv/ci/root/nix/store", "own": f"{STATE}/stores/own/root/nix/store"}
# What is tried again every 30 s, on a loaded machine.
AGAIN = 100


def path(name: str) -> str:
    """What a store path may be called."""
    return f"{'0' * 32}-{name}"


def problems(store: str) -> dict[str, str]:
    """What is wrong with a store, which is active."""
    code, output = machine.execute(f"timeout 20 layered-stores status {store} --json")
    assert code in (0, 3), (code, output)
    properties = json.loads(output)
    assert properties["state"] == "active", properties
    return {problem["code"]: problem["message"] for problem in properties["problems"]}


def wait_until_well() -> None:
    for store in STORES:
        machine.wait_until_succeeds(f"timeout 20 layered-stores status {store}", timeout=AGAIN)


def restart() -> None:
    """Has another daemon take over what is mounted; it comes up at the first try."""
    machine.succeed(
        "systemctl stop layered-storesd", "systemctl reset-failed layered-storesd || true"
    )
    machine.succeed("timeout 60 systemctl start layered-storesd")
    t.assertEqual(machine.get_unit_property("layered-storesd.service", "NRestarts"), "0")


def answer(call: str, error: str) -> None:
    """Has the kernel answer a system call of the daemon with an error, until it answers again."""
    # strace needs ptrace(2), which the filter of system calls keeps away from the daemon.
    start = machine.get_unit_property("layered-storesd.service", "ExecStart")
    daemon = start.split("path=")[1].split(" ;")[0]
    strace = machine.succeed("command -v strace").strip()
    inject = f"-e trace=?{call} -e inject=?{call}:error={error}"
    machine.succeed(
        f"mkdir -p {DROP_INS}",
        f"""cat >{DROP_INS}/test.conf <<'END'
[Service]
SystemCallFilter=
NoExecPaths=
ExecStart=
ExecStart={strace} -D -I 2 -f -qq -o /dev/null {inject} {daemon}
END""",
        "systemctl daemon-reload",
    )
    restart()
    machine.succeed(f"rm {DROP_INS}/test.conf", "systemctl daemon-reload")


def answer_again() -> None:
    machine.succeed("kill $(pidof strace)")


def hooks_work() -> None:
    for store in STORES:
        machine.succeed(f"timeout 20 layered-stores-remount {MERGED[store]}")


def is_seen(name: str) -> None:
    """What appears in the lower store is seen by itself."""
    for store in STORES:
        # The kernel remembers that it was not there.
        machine.fail(f"test -e {MERGED[store]}/{path(name)}")
    machine.succeed(f"mkdir /srv/base/nix/store/{path(name)}")
    for store in STORES:
        machine.wait_until_succeeds(f"test -e {MERGED[store]}/{path(name)}", timeout=60)


def goes_unseen(name: str, sysctl: str) -> None:
    """Says so, goes on all the same, and sees to it when it can be watched."""
    for store in STORES:
        assert sysctl in problems(store)["unwatched"], problems(store)
        machine.fail(f"test -e {MERGED[store]}/{path(name)}")
    hooks_work()
    machine.succeed(f"mkdir /srv/base/nix/store/{path(name)}")
    answer_again()
    wait_until_well()
    for store in STORES:
        machine.wait_until_succeeds(f"test -e {MERGED[store]}/{path(name)}", timeout=60)
    is_seen(f"{name}-since")


def spoil_records() -> None:
    """What is on disk is not what the next daemon would have there, as after an upgrade."""
    machine.succeed(
        "systemctl stop layered-storesd",
        f'sed -i \'s/"required": true/"required": false/\' {STATE}/known/*.json',
        f"grep -q false {STATE}/known/own.json",
        f"rm {STATE}/stores/own/.upper.lock",
    )


def is_not_recorded(cause: str) -> None:
    restart()
    for store in STORES:
        message = problems(store)["unrecorded"]
        t.assertRegex(message, cause)
        t.assertIn(STATE, message)
    hooks_work()
    machine.succeed("layered-stores verify own")


def is_recorded() -> None:
    wait_until_well()
    for store in STORES:
        machine.succeed(f"grep -q '\"required\": true' {STATE}/known/{store}.json")
    machine.fail(f"flock --nonblock {STATE}/stores/own/.upper.lock true")
    t.assertEqual(machine.succeed(f"find {STATE}/known -name '*.new'"), "")


def mounts() -> list[str]:
    """Since when they are mounted. A swap, which keeps them so, is for hooks to bring about."""
    since = "systemctl show --property=Id,ActiveEnterTimestampMonotonic '*-nix-store.mount'"
    # In no order.
    return sorted(block.strip() for block in machine.succeed(since).split("\n\n"))


machine.start()
machine.wait_for_unit("layered-storesd.service")
machine.succeed(
    "systemctl stop layered-storesd",
    f"mkdir -p /srv/base/nix/store/{path('first')}",
    # A disk that can be filled without anybody else's harm.
    f"mount -t tmpfs -o mode=0755,size=4M,nr_inodes=2000 state {STATE}",
    "systemctl start layered-storesd",
)
wait_until_well()
before = mounts()

with subtest("Without an inotify instance it runs, and watches once there is one"):
    answer("inotify_init1", "EMFILE")
    goes_unseen("instance", "fs.inotify.max_user_instances")

with subtest("Without inotify watches it runs, and watches once there are some"):
    answer("inotify_add_watch", "ENOSPC")
    goes_unseen("watch", "fs.inotify.max_user_watches")

with subtest("A read-only state directory is nothing to stores whose records and locks are there"):
    machine.succeed("systemctl stop layered-storesd", f"mount -o remount,bind,ro {STATE}")
    restart()
    for store in STORES:
        # That nothing can be written into the store itself is another matter.
        t.assertNotIn("unrecorded", problems(store))
    machine.fail(f"flock --nonblock {STATE}/stores/own/.upper.lock true")
    machine.succeed("systemctl stop layered-storesd", f"mount -o remount,bind,rw {STATE}")

with subtest("Where they are not, stores are used all the same, and it is made up for"):
    spoil_records()
    machine.succeed(f"mount -o remount,bind,ro {STATE}")
    is_not_recorded("[Rr]ead-only file ?system")
    machine.succeed(f"mount -o remount,bind,rw {STATE}")
    is_recorded()

with subtest("So it is with a full state directory"):
    spoil_records()
    machine.execute(f"dd if=/dev/zero of={STATE}/filler bs=4k")
    machine.execute(
        f"mkdir {STATE}/names; cd {STATE}/names && for n in $(seq 2500); do : >$n; done"
    )
    machine.fail(f"touch {STATE}/one-more")
    is_not_recorded("No space left on device")
    machine.succeed(f"rm -r {STATE}/filler {STATE}/names")
    is_recorded()

with subtest("A record that is damaged and cannot be moved away keeps the daemon from nothing"):
    machine.succeed(
        "systemctl stop layered-storesd",
        f"echo '{{' >{STATE}/known/ci.json",
        f": >{STATE}/known/own.new",
        f"mount -o remount,bind,ro {STATE}",
    )
    restart()
    assert "ci.json" in problems("ci")["unrecorded"], problems("ci")
    t.assertNotIn("unrecorded", problems("own"))
    machine.succeed(f"mount -o remount,bind,rw {STATE}")
    is_recorded_anew = f"grep -q '\"required\": true' {STATE}/known/ci.json"
    machine.wait_until_succeeds(is_recorded_anew, timeout=AGAIN)
    restart()
    wait_until_well()
    t.assertEqual(machine.succeed(f"find {STATE}/known -name '*.new'"), "")

with subtest("None of it was mounted anew"):
    t.assertEqual(mounts(), before)
