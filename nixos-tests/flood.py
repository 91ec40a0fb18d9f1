# A user without rights sends whatever the bus lets through, as fast as the bus takes it. Root and
# Nix's hook are answered meanwhile, and the daemon stays small.
import json
import shlex

MERGED = "/srv/ci/root/nix/store"
HERS = "/srv/hers/root/nix/store"
SERVICE = "layered-storesd.service"
MIB = 1024 * 1024
# How much more memory the daemon takes, at its highest, than when nobody means harm.
MORE = 16 * MIB
# How much later the daemon answers, in the middle, than the bus it is asked over, and the hook than
# a program that does nothing, which takes less than `ORDINARY` unless the machine is busy.
LATER = 0.05
ORDINARY = 0.005
# Who waits behind those that flood waits for as long as they go on, and not so long.
SOON = 2.5
# Where every instruction is emulated, all takes longer.
EMULATED = machine.execute("systemd-detect-virt")[1].strip() == "qemu"

# A client of the bus that need not be fair: busctl and its like wait for answers. It speaks the
# protocol of the D-Bus specification, as far as these messages take.
CLIENT = '''
import os, socket, struct, subprocess, sys, time

BUS = "org.freedesktop.DBus"
OURS = "org.layeredstores1"
CI = "/org/layeredstores1/store/ci"
NO_REPLY, INTERACTIVE = 1, 4

def pad(data, to):
    return data + bytes(-len(data) % to)

def string(text):
    data = text.encode()
    return struct.pack("<I", len(data)) + data + b"\\0"

def message(to, path, interface, member, signature="", body=b"", flags=0, serial=1):
    fields = b""
    for number, kind, value in [
        (1, "o", path), (2, "s", interface), (3, "s", member), (6, "s", to), (8, "g", signature)
    ]:
        if value:
            fields = pad(fields, 8) + bytes([number, 1]) + kind.encode() + b"\\0"
            if kind == "g":
                fields += bytes([len(value)]) + value.encode() + b"\\0"
            else:
                fields = pad(fields, 4) + string(value)
    start = struct.pack("<cBBBIII", b"l", 1, flags, 1, len(body), serial, len(fields))
    return pad(start + fields, 8) + body

class Bus:
    def __init__(self):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect("/run/dbus/system_bus_socket")
        uid = str(os.getuid()).encode().hex()
        self.socket.sendall(f"\\0AUTH EXTERNAL {uid}\\r\\nBEGIN\\r\\n".encode())
        self.buffer = b""
        while b"\\r\\n" not in self.buffer:
            self.buffer += self.socket.recv(4096)
        self.buffer = self.buffer.split(b"\\r\\n", 1)[1]
        self.serial = 0
        self.call(BUS, "/org/freedesktop/DBus", BUS, "Hello")

    def take(self, count):
        while len(self.buffer) < count:
            data = self.socket.recv(65536)
            if not data:
                sys.exit("the bus has hung up")
            self.buffer += data
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def call(self, to, path, interface, member, signature="", body=b""):
        """Waits for the answer; returns its type (2: good, 3: an error) and all of it."""
        self.serial += 1
        self.socket.sendall(
            message(to, path, interface, member, signature, body, serial=self.serial)
        )
        while True:
            start = self.take(16)
            _, kind, _, _, length, _, fields = struct.unpack("<cBBBIII", start)
            rest = self.take(fields + -fields % 8 + length)
            # The field REPLY_SERIAL.
            if kind in (2, 3) and b"\\x05\\x01u\\0" + struct.pack("<I", self.serial) in rest:
                return kind, rest

def remount(flags, serial, directory):
    body = string(directory)
    manager = ("/org/layeredstores1", OURS + ".Manager")
    return message(OURS, *manager, "Remount", "s", body, flags, serial)

def unanswered(seconds):
    """Calls that polkit decides about, and that want no reply."""
    bus, serial, until = Bus(), 1, time.monotonic() + seconds
    while time.monotonic() < until:
        data = bytearray()
        for _ in range(500):
            data += remount(NO_REPLY, serial, "/srv/ci/root/nix/store")
            serial += 1
        bus.socket.sendall(data)

def counted():
    """What becomes of calls that come after more that want no reply than anybody may have."""
    bus = Bus()
    calls = [remount(NO_REPLY, serial, "/srv/ci/root/nix/store") for serial in range(1000, 5000)]
    body = pad(string(OURS + ".Store"), 4) + string("State")
    for serial in range(5000, 5050):
        calls.append(message(OURS, CI, BUS + ".Properties", "Get", "ss", body, serial=serial))
    bus.socket.sendall(b"".join(calls))
    answers = 0
    while answers < 50:
        start = bus.take(16)
        _, kind, _, _, length, _, fields = struct.unpack("<cBBBIII", start)
        rest = bus.take(fields + -fields % 8 + length)
        answers += kind in (2, 3)
        if b"LimitsExceeded" in rest:
            print("refused")
            return

def unread(seconds):
    """Calls that want a large reply, which is not read."""
    bus, serial, until = Bus(), 1, time.monotonic() + seconds
    manager = ("/org/layeredstores1", BUS + ".ObjectManager", "GetManagedObjects")
    bus.socket.settimeout(1)
    while time.monotonic() < until:
        for _ in range(100):
            try:
                bus.socket.sendall(message(OURS, *manager, serial=serial))
            except TimeoutError:
                bus = Bus()
                bus.socket.settimeout(1)
            serial += 1

def large(seconds):
    """Strings of 16 MB, to be repeated in errors."""
    bus, serial, until = Bus(), 1, time.monotonic() + seconds
    while time.monotonic() < until:
        bus.socket.sendall(remount(NO_REPLY, serial, "/" + "x" * (16 << 20)))
        serial += 1

def signals(seconds):
    """Signals that nobody has asked for, to every connection of the daemon."""
    bus, until, daemon = Bus(), time.monotonic() + seconds, int(sys.argv[3])
    names = []
    for number in range(1000):
        kind, rest = bus.call(
            BUS, "/org/freedesktop/DBus", BUS, "GetConnectionUnixProcessID", "s",
            string(f":1.{number}"),
        )
        if kind == 2 and struct.unpack("<I", rest[-4:])[0] == daemon:
            names.append(f":1.{number}")
    print(len(names), "connections", flush=True)
    def signal(name, size):
        data = bytearray(
            message(name, "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager",
                    "JobRemoved", "s", string("x" * size))
        )
        data[1] = 4
        return data
    # Some are as large as the bus lets through.
    for name in names * 2:
        bus.socket.sendall(signal(name, 31 << 20))
    while time.monotonic() < until:
        bus.socket.sendall(b"".join(signal(name, 1000) for name in names * 100))

def questions(seconds):
    """Questions to a person, whose agent never answers."""
    bus = Bus()
    stat = open("/proc/self/stat").read().rsplit(")", 1)[1].split()
    def variant(signature, value):
        return bytes([len(signature)]) + signature.encode() + b"\\0" + value
    # (sa{sv}) s s: who is asked on behalf of whom, in which language, and where.
    body = string("unix-process")
    entries = b""
    at = len(pad(pad(body, 4) + bytes(4), 8))
    for key, signature, value in [
        ("pid", "u", struct.pack("<I", os.getpid())),
        ("start-time", "t", struct.pack("<Q", int(stat[19]))),
    ]:
        entries = pad(entries, 8) + string(key)
        entries += variant(signature, b"")
        entries = pad(entries, len(value)) + value
    body = pad(body, 4) + struct.pack("<I", len(entries))
    body = pad(body, 8) + entries
    body = pad(body, 4) + string("C")
    body = pad(body, 4) + string("/agent")
    authority = "org.freedesktop.PolicyKit1"
    kind, rest = bus.call(
        authority, "/org/freedesktop/PolicyKit1/Authority", authority + ".Authority",
        "RegisterAuthenticationAgent", "(sa{sv})ss", body,
    )
    if kind != 2:
        sys.exit(f"polkit takes no agent: {rest}")
    for serial in range(100, 300):
        bus.socket.sendall(
            message(OURS, CI, OURS + ".Store", "Start", flags=INTERACTIVE | NO_REPLY, serial=serial)
        )
    print("asked", flush=True)
    bus.socket.settimeout(seconds)
    until = time.monotonic() + seconds
    asked = 0
    while time.monotonic() < until:
        try:
            asked += bus.socket.recv(65536).count(b"BeginAuthentication\\0")
        except TimeoutError:
            break
        print("polkit has asked", asked, flush=True)

def unheard():
    """A client of the hook's socket that does not read. Returns when it is hung up on."""
    client = socket.socket(socket.AF_UNIX)
    client.connect("/run/layered-stores/org.layeredstores1")
    call = b'{"method":"org.varlink.service.GetInterfaceDescription",'
    call += b'"parameters":{"interface":"org.layeredstores1"}}\\0'
    try:
        while True:
            client.sendall(call * 100)
    except (BrokenPipeError, ConnectionResetError):
        print("hung up")

def names(seconds):
    """Names that come and go in the upper layer, as fast as they can. Below 0, so many."""
    until, number = time.monotonic() + seconds, 0
    while time.monotonic() < until or number < -seconds:
        number += 1
        name = f"/srv/hers/upper/{number:032d}-{'x' * 200}"
        os.symlink("x", name)
        os.unlink(name)

def measure(seconds):
    """How long root waits, at most: for calls over one connection, and for programs."""
    worst, bus, until = {}, Bus(), time.monotonic() + seconds
    def timed(what, action):
        began = time.monotonic()
        action()
        worst.setdefault(what, []).append(time.monotonic() - began)
    def run(*command):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    # Others are asked as well, to tell what is the daemon's part.
    rounds = 0
    while time.monotonic() < until or rounds < 15:
        rounds += 1
        timed("bus itself", lambda: bus.call(BUS, "/org/freedesktop/DBus", BUS, "GetId"))
        timed("call", lambda: bus.call(OURS, CI, BUS + ".Properties", "Get", "ss",
              pad(string(OURS + ".Store"), 4) + string("State")))
        timed("remount", lambda: bus.call(OURS, CI, OURS + ".Store", "Remount"))
        timed("program itself", lambda: run("true"))
        timed("hook", lambda: run("layered-stores-remount", "/srv/ci/root/nix/store"))
        if rounds % 5 != 1:
            continue
        timed("status", lambda: run("layered-stores", "status", "ci"))
        timed("stop and start", lambda: (run("layered-stores", "stop", "hers"),
                                         run("layered-stores", "start", "hers")))
    import json
    print(json.dumps({
        what: [sorted(times)[len(times) // 2], max(times), len(times)]
        for what, times in worst.items()
    }))

arguments = [float(argument) for argument in sys.argv[2:3]]
{f.__name__: f for f in [
    unanswered, counted, unread, large, signals, questions, names, unheard, measure
]}[
    sys.argv[1]
](*arguments)
'''

machine.wait_for_unit(SERVICE)
machine.succeed("mkdir -p /srv/base/nix/store", "layered-stores start ci hers")
# As if Nix had used it: an upper layer with something in it does not come up without a database.
machine.succeed(
    "install -d -o alice /srv/hers/root/nix/var/nix/db",
    "install -o alice /dev/null /srv/hers/root/nix/var/nix/db/db.sqlite",
)
machine.succeed(f"install -m 755 /dev/stdin /srv/client.py << 'END'\n{CLIENT}\nEND")


def memory() -> int:
    """The most memory the daemon has had, in bytes."""
    pid = machine.get_unit_property(SERVICE, "MainPID")
    return int(machine.succeed(f"awk '/^VmHWM/ {{ print $2 }}' /proc/{pid}/status")) * 1024


def waits(attack: str) -> dict[str, list[float]]:
    """How long root waits while something goes on: in the middle, at most, and how often."""
    said = machine.succeed("python3 /srv/client.py measure 8", timeout=300)
    times: dict[str, list[float]] = json.loads(said)
    log.info(
        f"{attack}: {memory() / MIB:.1f} MiB, and of root's "
        + "; ".join(
            f"{what} {1000 * median:.1f} ms, at most {1000 * most:.1f}"
            for what, (median, most, _) in times.items()
        )
    )
    return times


def late(times: dict[str, list[float]], later: float) -> dict[str, float]:
    """What comes too late."""
    bus, program = times["bus itself"][0], times["program itself"][0]
    # On a machine that others keep busy as well, a program that does nothing says how busy it is.
    busy = max(1.0, program / ORDINARY)
    # A call of somebody goes through the bus twice as often as one of the bus itself.
    most = dict.fromkeys(["call", "remount"], 2 * bus + later * busy)
    # These are several calls each, and systemd unmounts and mounts, which takes its time.
    most |= {"hook": program + LATER * busy, "status": SOON, "stop and start": 2 * SOON}
    return {what: times[what][0] for what in most if times[what][0] > most[what]}


def measured(attack: str, later: float = LATER) -> None:
    """Root's and the hook's part, while something goes on."""
    for _ in range(1 if EMULATED else 3):
        times = waits(attack)
        # Nobody is held up for as long as it goes on.
        assert max(most for _, most, _ in times.values()) < 10 * SOON, (attack, times)
        too_late = late(times, later)
        if EMULATED or not too_late:
            break
    else:
        raise AssertionError(f"{attack}: too late are {too_late} of {times}")
    assert memory() - ordinary < MORE, (attack, memory(), ordinary)


def attack(mode: str, clients: int = 1, more: str = "", user: str = "alice") -> None:
    """Has somebody begin: alice, as a rule."""
    one = f"python3 /srv/client.py {mode} 600 {more}"
    many = f"for _ in $(seq {clients}); do {one} & done; wait"
    machine.succeed(
        f"systemd-run --quiet --unit=attack-{user} --uid={user} --setenv=PATH=$PATH sh -c "
        + shlex.quote(many)
    )


def said_by_now(pattern: str, user: str = "alice") -> None:
    """Waits until they have said something."""
    machine.wait_until_succeeds(f"journalctl -u attack-{user} | grep '{pattern}'", timeout=120)


def enough(user: str = "alice") -> None:
    """Has them end."""
    unit = f"attack-{user}"
    machine.succeed(f"systemctl is-active --quiet {unit}")
    machine.succeed(f"systemctl kill --signal=KILL {unit}")
    machine.wait_until_fails(f"systemctl is-active --quiet {unit}", timeout=20)
    machine.succeed(f"systemctl reset-failed {unit} 2>/dev/null || true")


def swaps(store: str) -> int:
    """How often a store was swapped so far."""
    _, said = machine.execute(f"layered-stores status {store} --json")
    return int(json.loads(said)["swap-count"])


pid = machine.get_unit_property(SERVICE, "MainPID")
ordinary = memory()

with subtest("Names that get lost because an owner makes too many are lost for their stores only"):
    machine.succeed(f"mkdir {MERGED}/{'0' * 32}-path && layered-stores remount ci hers")
    swapped = swaps("ci"), swaps("hers")
    lines = "journalctl --sync; journalctl --unit=layered-storesd --output=cat"
    before = int(machine.succeed(f"{lines} | wc -l"))
    # As many as the kernel keeps, twice, while the daemon reads none of them.
    most = machine.succeed("cat /proc/sys/fs/inotify/max_queued_events").strip()
    machine.succeed(f"kill -STOP {pid}")
    machine.succeed(f"runuser -u alice -- python3 /srv/client.py names -{most}", timeout=120)
    machine.succeed(f"kill -CONT {pid}")
    machine.succeed(f"layered-stores-remount {MERGED}", f"layered-stores-remount {HERS}")
    said = machine.succeed(f"{lines} | tail -n +{before + 1}")
    # Hers is swapped: nobody knows what was taken away there. In the other there is nothing to be
    # looked at.
    t.assertEqual((swaps("ci"), swaps("hers")), (swapped[0], swapped[1] + 1), said)
    t.assertNotIn("(paths probed: 1)", said)

with subtest("Nobody means harm"):
    measured("nothing")
    ordinary = memory()

with subtest("Names that come and go as fast as an owner can make them"):
    before = swaps("ci")
    attack("names")
    measured("names that come and go")
    enough()
    t.assertEqual(swaps("ci"), before)
    # When it is over, it is.
    at_rest = f"awk '{{ print $14 + $15 }}' /proc/{pid}/stat"
    machine.wait_until_succeeds(
        f"before=$({at_rest}); sleep 1; test $(($({at_rest}) - before)) -lt 10", timeout=60
    )

with subtest("Calls that want no reply are counted all the same"):
    said = machine.succeed("runuser -u alice -- python3 /srv/client.py counted", timeout=60)
    t.assertEqual(said, "refused\n")
    attack("unanswered", clients=4)
    measured("calls that want no reply")
    enough()

with subtest("Replies that nobody reads"):
    attack("unread", clients=2)
    # dbus-daemon takes 2 KiB at a time of what is sent to it (`max_bytes_read_per_iteration`), in
    # turn with what others send. In the daemon's socket 16 large answers may be before root's.
    measured("replies that nobody reads", later=2.0)
    enough()

with subtest("Strings of 16 MB are not kept, and not repeated"):
    attack("large")
    measured("strings of 16 MB")
    enough()
    # Who waits for the answer learns the limit.
    big = "x" * 100_000
    script = f'import sys; sys.argv = ["", "unheard"]; {CLIENT.split("arguments =")[0]}'
    script += (
        f'\nkind, rest = Bus().call(OURS, "/org/layeredstores1", OURS + ".Manager", "GetStore", '
        f'"s", string("{big}"))\nprint(kind, rest)'
    )
    machine.succeed(f"cat >/tmp/long.py << 'END'\n{script}\nEND")
    said = machine.succeed("runuser -u alice -- python3 /tmp/long.py")
    assert said.startswith("3 ") and "org.freedesktop.DBus.Error.LimitsExceeded" in said, said
    assert len(said) < 1000, len(said)
    # What is short enough is repeated in part.
    said = machine.fail(
        "busctl call org.layeredstores1 /org/layeredstores1 org.layeredstores1.Manager "
        f"GetStore s {'x' * 10_000} 2>&1"
    )
    assert "xxx…" in said and len(said) < 300, said

with subtest("Signals to the daemon alone are not heard"):
    attack("signals", more=pid)
    # One for callers, one for systemd, one for polkit.
    said_by_now("3 connections")
    measured("signals")
    enough()
    # Not one of the large ones was taken in as a whole: it would be more than `MORE`.

with subtest("Questions that nobody answers are nobody else's"):
    attack("questions")
    said_by_now("polkit has asked")
    measured("questions that nobody answers")
    # Bob can have polkit asked, and it says at once that he may not.
    said = machine.fail("timeout 30 runuser -u bob -- layered-stores start ci 2>&1")
    assert "org.layeredstores1.start" in said, said
    asked = machine.succeed(
        "journalctl -u attack-alice -o cat | grep 'polkit has asked' | tail -n 1"
    )
    assert int(asked.split()[-1]) <= 4, asked
    # With her, her questions go.
    enough()

with subtest("Not even as many of them as there may be"):
    # polkit has a connection of its own: root's stores are stopped and started over another one.
    users = [f"asker{number}" for number in range(16)]
    machine.succeed(f"for user in {' '.join(users)}; do useradd $user; done")
    for user in users:
        attack("questions", user=user)
    for user in users:
        said_by_now("polkit has asked 4$", user)
    measured("64 questions that nobody answers")
    output = machine.fail("timeout 30 runuser -u bob -- layered-stores start ci 2>&1")
    assert "questions of this user are open already" in output, output
    for user in users:
        enough(user)

with subtest("A client of the hook's socket that does not read is hung up on"):
    said = machine.succeed("timeout 60 python3 /srv/client.py unheard", timeout=90)
    assert said == "hung up\n", said

with subtest("It is the same daemon all the time, and all is well"):
    assert machine.get_unit_property(SERVICE, "MainPID") == pid
    machine.succeed("layered-stores status", f"runuser -u alice -- layered-stores-remount {HERS}")
    machine.succeed(f"mountpoint --quiet {MERGED}")
    log.info(f"at most {memory() / MIB:.1f} MiB")
