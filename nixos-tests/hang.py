# A filesystem that does not answer stops the stores on it, and nothing else: not the other stores,
# not a daemon that starts or stops. When it answers, or is there anew, all is well by itself.
import json
import statistics
import time
from typing import Any

LOWER = "/srv/fuse/nix/store"
MERGED = "/srv/hung/root/nix/store"
PROBLEMS = "org.layeredstores1 /org/layeredstores1/store/hung org.layeredstores1.Store Problems"
STATE = "/var/lib/layered-stores"
OTHERS = [f"other-{number}" for number in range(1, 9)]
PATH = f"{'0' * 32}-path"
LATER = f"{'1' * 32}-later"

# A read-only FUSE server (linux/fuse.h) that lets the kernel keep nothing. After SIGUSR1 it goes on
# reading questions and answers none, until SIGUSR2. So two kinds of waiting are had: for a server
# that has not read the question, which a signal can end, and for one that has, which nothing can.
SERVER = r"""
import os, signal, struct, sys

source, point = sys.argv[1:]
device = os.open("/dev/fuse", os.O_RDWR)
os.set_inheritable(device, True)
options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
if os.system(f"mount -i -t fuse -o {options} server {point}") != 0:
    sys.exit("cannot mount")
os.set_inheritable(device, False)
paths, numbers, files = {1: source}, {source: 1}, {}
deaf, kept = False, []

def attributes(path):
    at = os.lstat(path)
    times = [at.st_atime_ns, at.st_mtime_ns, at.st_ctime_ns]
    return struct.pack(
        "<6Q10I", at.st_ino, at.st_size, at.st_blocks, *(t // 10**9 for t in times),
        *(t % 10**9 for t in times), at.st_mode, at.st_nlink, at.st_uid, at.st_gid, 0, 4096, 0)

def listing(path):
    whole = b""
    for number, name in enumerate(sorted(os.listdir(path)), 1):
        inode, name = os.lstat(f"{path}/{name}").st_ino, name.encode()
        entry = struct.pack("<QQII", inode, number, len(name), 0) + name
        whole += entry + bytes(-len(entry) % 8)
    return whole

def answer_to(code, node, body):
    path = paths.get(node, source)
    if code == 26:  # INIT
        return struct.pack("<IIIIHHIIHH8I", 7, 31, 65536, 0, 16, 12, 65536, 1, *[0] * 10)
    if code == 1:  # LOOKUP
        path += "/" + body.rstrip(b"\0").decode()
        found = attributes(path)
        number = numbers.setdefault(path, len(numbers) + 1)
        paths[number] = path
        return struct.pack("<QQQQII", number, 0, 0, 0, 0, 0) + found
    if code == 3:  # GETATTR
        return struct.pack("<QII", 0, 0, 0) + attributes(path)
    if code == 17:  # STATFS
        return struct.pack("<5Q4I6I", 1, 0, 0, 1, 0, 4096, 255, 4096, 0, *[0] * 6)
    if code == 14 or code == 27:  # OPEN, OPENDIR
        files[len(files) + 1] = path
        return struct.pack("<QII", len(files), 0, 0)
    if code == 15:  # READ
        number, offset, size = struct.unpack_from("<QQI", body)
        with open(files[number], "rb") as file:
            file.seek(offset)
            return file.read(size)
    if code == 28:  # READDIR
        number, offset, size = struct.unpack_from("<QQI", body)
        rest, given = listing(files[number]), b""
        while rest:
            _, place, length, _ = struct.unpack_from("<QQII", rest)
            end = 24 + length + -(24 + length) % 8
            if place > offset and len(given) + end <= size:
                given += rest[:end]
            rest = rest[end:]
        return given
    if code in (18, 25, 29, 38):  # RELEASE, FLUSH, RELEASEDIR, DESTROY
        return b""
    raise OSError(38, "not implemented")

def answer(question):
    _, code, unique, node = struct.unpack_from("<IIQQ", question)
    if code in (2, 36, 42):  # FORGET, INTERRUPT, BATCH_FORGET
        return
    try:
        error, body = 0, answer_to(code, node, question[40:])
    except OSError as failed:
        error, body = -failed.errno, b""
    try:
        os.write(device, struct.pack("<IiQ", 16 + len(body), error, unique) + body)
    except OSError:  # whoever has asked does not wait any more
        pass

def be_deaf(*_):
    global deaf
    deaf = True

def hear(*_):
    global deaf
    deaf = False
    while kept:
        answer(kept.pop(0))

signal.signal(signal.SIGUSR1, be_deaf)
signal.signal(signal.SIGUSR2, hear)
while True:
    try:
        question = os.read(device, 1 << 20)
    except OSError as failed:
        if failed.errno == 2:  # cut off before it was read
            continue
        sys.exit(0)
    if deaf:
        kept.append(question)
    else:
        answer(question)
"""

# Calls the hook of each store five times, and says how many seconds each call took.
CALLER = """
import json, subprocess, sys, time
took = []
for store in sys.argv[1:] * 5:
    began = time.monotonic()
    subprocess.run(["layered-stores-remount", f"/srv/{store}/root/nix/store"], check=True)
    took.append(time.monotonic() - began)
print(json.dumps(took))
"""

# A name service (https://systemd.io/USER_GROUP_API) that knows one account, and tells of that only
# when it is let.
NAMES = r"""
import json, os, socket, threading, time

SERVICE = "org.example.Names"
GHOST = {"userName": "ghost", "uid": 61234, "gid": 61234, "disposition": "regular"}

def answer(question):
    asked = question.get("parameters", {})
    if asked.get("userName") != "ghost" or not question["method"].endswith("GetUserRecord"):
        return {"error": "io.systemd.UserDatabase.NoRecordFound", "parameters": {}}
    while not os.path.exists("/run/told"):
        time.sleep(0.1)
    return {"parameters": {"record": GHOST | {"service": SERVICE}, "incomplete": False}}

def serve(client):
    said = b""
    while more := client.recv(65536):
        said += more
        *questions, said = said.split(b"\0")
        for question in questions:
            client.sendall(json.dumps(answer(json.loads(question))).encode() + b"\0")

listener = socket.socket(socket.AF_UNIX)
listener.bind(f"/run/systemd/userdb/{SERVICE}")
os.chmod(f"/run/systemd/userdb/{SERVICE}", 0o666)
listener.listen()
while True:
    threading.Thread(target=serve, args=[listener.accept()[0]], daemon=True).start()
"""


def serve(unit: str = "server", behind: str = "/srv/behind", point: str = "/srv/fuse") -> None:
    """Starts a server, in place of one that has ended."""
    machine.succeed(
        f"systemctl reset-failed {unit} 2>/dev/null || true",
        f'systemd-run --quiet --unit={unit} --setenv=PATH="$PATH" '
        f'"$(command -v python3)" /srv/server.py {behind} {point}',
    )
    machine.wait_until_succeeds(f"mountpoint --quiet {point}", timeout=20)


def signal(name: str, unit: str = "server") -> None:
    machine.succeed(f"systemctl kill --signal={name} {unit}")


def status(store: str) -> dict[str, Any]:
    """What `layered-stores status` says of a store."""
    code, output = machine.execute(f"timeout 20 layered-stores status {store} --json")
    assert code in (0, 3), (code, output)
    properties: dict[str, Any] = json.loads(output)
    return properties


def problems(store: str) -> dict[str, str]:
    return {problem["code"]: problem["message"] for problem in status(store)["problems"]}


def wait_until_stuck() -> None:
    """The bound is what it takes, and what a loaded machine adds."""
    machine.wait_until_succeeds(f"busctl get-property {PROBLEMS} | grep -F '\"stuck\"'", timeout=90)


def wait_until_well(*stores: str) -> None:
    for store in stores:
        # What has hung may still be on its way up when nothing is wrong any more; and what has
        # failed is tried again after half a minute.
        machine.wait_until_succeeds(
            f'timeout 20 layered-stores status {store} --json | grep \'"state": "active"\'',
            timeout=120,
        )


def within(seconds: float, *commands: str) -> None:
    """Runs commands, which may not take longer."""
    began = time.monotonic()
    for command in commands:
        machine.succeed(f"timeout {seconds} sh -c '{command}'")
    took = time.monotonic() - began
    assert took < seconds, f"{commands} took {took:.1f} s"


def median_of_hooks() -> float:
    """How long a hook of the others takes, in the middle of many."""
    said = machine.succeed(f"timeout 60 python3 /srv/caller.py {' '.join(OTHERS)}")
    took: list[float] = json.loads(said)
    return statistics.median(took)


def hooks_are_as_quick_as_before() -> None:
    # What else the machine does comes and goes: it counts what is seen in one of three turns.
    for turn in range(3):
        median = median_of_hooks()
        machine.log(f"a hook takes {median * 1000:.1f} ms, and took {usual * 1000:.1f} ms before")
        if median < 3 * usual:
            break
        assert turn < 2, f"hooks take {median:.3f} s while a store hangs, and {usual:.3f} s without"
    assert median < 1, median


def others_do_not_notice() -> None:
    hooks_are_as_quick_as_before()
    within(
        40,
        "layered-stores remount other-1",
        "layered-stores verify other-2",
        "layered-stores stop other-3",
        "layered-stores start other-3",
        f"test -e /srv/other-3/root/nix/store/{PATH}",
        "layered-stores list",
    )


def fails_as_stuck(command: str) -> None:
    began = time.monotonic()
    output = machine.fail(f"timeout 60 {command} 2>&1")
    assert "is stuck: the" in output, output
    assert time.monotonic() - began < 50, command


machine.start()
machine.wait_for_unit("layered-storesd.service")
machine.succeed(
    f"mkdir -p /srv/fuse /srv/behind/nix/store/{PATH} /srv/base/nix/store/{PATH}",
    f"echo lower | tee /srv/behind/nix/store/{PATH}/file >/srv/base/nix/store/{PATH}/file",
    # A container has few devices of its own.
    "test -e /dev/fuse || mknod /dev/fuse c 10 229",
    f"cat >/srv/server.py <<'END'\n{SERVER}\nEND",
    f"cat >/srv/caller.py <<'END'\n{CALLER}\nEND",
    f"cat >/srv/names.py <<'END'\n{NAMES}\nEND",
)
serve()
machine.succeed(
    *(f"timeout 60 layered-stores start {store}" for store in ["hung", "above", *OTHERS]),
    f"grep lower {MERGED}/{PATH}/file",
    "layered-stores verify hung",
)
usual = median_of_hooks()

with subtest("A lower store that does not answer is said to be stuck, and others do not notice"):
    signal("STOP")
    remount = f"layered-stores-remount {MERGED} >/srv/remount-$n 2>&1"
    remount = f"{{ {remount} || echo failed >>/srv/remount-$n; }} >/dev/null 2>&1"
    machine.succeed(f"for n in $(seq 10); do {remount} & done")
    others_do_not_notice()
    wait_until_stuck()
    message = problems("hung")["stuck"]
    assert f"the lower store {LOWER} has not answered" in message, message
    assert "`umount --force --lazy /srv/fuse`" in message, message
    machine.succeed(
        "journalctl --sync",
        "journalctl --unit=layered-storesd | grep 'hung: the lower store .* has not answered'",
    )
    others_do_not_notice()

with subtest("Whoever waits for it, or asks now, is told so"):
    machine.wait_until_succeeds("test $(grep -lx failed /srv/remount-* | wc -l) = 10", timeout=90)
    machine.succeed("test $(grep -l 'is stuck: the' /srv/remount-* | wc -l) = 10")
    for command in ("remount", "verify", "stop", "start"):
        fails_as_stuck(f"layered-stores {command} hung")
    assert status("hung")["state"] == "active", status("hung")

with subtest("The configuration can be read anew"):
    machine.execute("timeout 60 layered-stores reload")
    within(20, "systemctl is-active layered-storesd")
    assert problems("other-1") == {}, problems("other-1")

with subtest("The daemon ends at once, and the next one becomes ready"):
    within(30, "systemctl stop layered-storesd")
    within(90, "systemctl start layered-storesd")
    assert [store for store in OTHERS if problems(store) != {}] == []
    wait_until_stuck()
    others_do_not_notice()

with subtest("When the server goes on, all is well by itself"):
    machine.succeed(f"mkdir /srv/behind/nix/store/{LATER}")
    signal("CONT")
    wait_until_well("hung", "above")
    within(
        40, f"layered-stores remount hung && test -e {MERGED}/{LATER}", "layered-stores verify hung"
    )

with subtest("A store is started while its lower store does not answer"):
    machine.succeed("layered-stores stop above", "layered-stores stop hung")
    # This time it reads what it is asked, so that not even a killed thread comes back.
    signal("USR1")
    fails_as_stuck("layered-stores start hung")
    output = machine.fail("timeout 60 layered-stores start above 2>&1")
    assert "its lower store hung is not up" in output, output
    others_do_not_notice()

with subtest("The daemon ends although a thread of it cannot, and the next one becomes ready"):
    within(60, "systemctl stop layered-storesd")
    within(90, "systemctl start layered-storesd")
    others_do_not_notice()
    signal("USR2")
    machine.succeed("timeout 60 layered-stores start above")
    wait_until_well("hung", "above")

with subtest("A server that has died is named, and one that comes in its place is found"):
    signal("KILL")
    output = machine.fail("timeout 60 layered-stores remount hung 2>&1")
    dead = f"lower-store: cannot look at {LOWER}: Transport endpoint is not connected"
    assert dead in output, output
    assert dead in problems("hung")["refresh-failed"], problems("hung")
    machine.succeed("umount /srv/fuse", f"echo other >/srv/behind/nix/store/{PATH}/file")
    serve()
    wait_until_well("hung", "above")
    machine.succeed(
        f"grep other {MERGED}/{PATH}/file", f"grep other /srv/above/root/nix/store/{PATH}/file"
    )

with subtest("A filesystem that never answers is given up as the message says"):
    signal("STOP")
    fails_as_stuck("layered-stores remount hung")
    within(20, "umount --force --lazy /srv/fuse")
    machine.wait_until_fails(f"busctl get-property {PROBLEMS} | grep -F '\"stuck\"'", timeout=60)
    signal("KILL")
    machine.wait_until_fails("systemctl is-active server", timeout=60)
    serve()
    wait_until_well("hung", "above")
    machine.succeed("layered-stores verify hung", f"grep other {MERGED}/{PATH}/file")

with subtest("A state directory that does not answer stops nothing that is mounted elsewhere"):
    machine.succeed(
        "layered-stores stop other-3", "systemctl stop layered-storesd", f"cp -a {STATE} /srv/state"
    )
    serve("state", "/srv/state", STATE)
    signal("USR1", "state")
    within(90, "systemctl start layered-storesd")
    said = machine.get_unit_property("layered-storesd.service", "StatusText")
    assert f"state directory {STATE}/known has not answered" in said, said
    assert f"`umount --force --lazy {STATE}`" in said, said
    for store in [*OTHERS[:2], *OTHERS[3:], "hung", "above"]:
        assert status(store)["state"] == "active", status(store)
        assert f"{STATE}/known has not answered" in problems(store)["unrecorded"], problems(store)
        machine.succeed(f"timeout 20 layered-stores-remount /srv/{store}/root/nix/store")
    # It may be mounted elsewhere, for all that is known.
    output = machine.fail("timeout 20 layered-stores start other-3 2>&1")
    assert f"{STATE}/known has not answered" in output, output
    signal("USR2", "state")
    wait_until_well("hung", "above", *OTHERS)
    machine.succeed("systemctl stop layered-storesd", f"umount {STATE}")
    machine.succeed("systemctl start layered-storesd")
    wait_until_well("hung", "above", *OTHERS)

with subtest("A name service that hangs holds up the store whose owner it knows, and no other"):
    machine.succeed(
        "mkdir -p /run/systemd/userdb",
        'systemd-run --quiet --unit=names --setenv=PATH="$PATH" '
        '"$(command -v python3)" /srv/names.py',
    )
    machine.wait_until_succeeds("test -S /run/systemd/userdb/org.example.Names", timeout=20)
    began = time.monotonic()
    output = machine.fail("timeout 60 layered-stores start ghosts 2>&1")
    assert "is stuck: the name service has not told for 10 s" in " ".join(output.split()), output
    assert time.monotonic() - began < 50, output
    message = problems("ghosts")["stuck"]
    assert "see to nscd, sssd or what else /etc/nsswitch.conf names, or give numbers" in message
    others_do_not_notice()
    machine.succeed("touch /run/told")
    wait_until_well("ghosts", "hung", *OTHERS)
    assert problems("ghosts") == {}, problems("ghosts")
    owner = machine.succeed("stat --format %u /srv/ghosts/upper").strip()
    assert owner == "61234", owner
