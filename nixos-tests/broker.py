# On a machine whose bus is dbus-broker, everything is as with dbus-daemon; and as it hands on
# headers as they are, so is what anybody puts into one.
MERGED = "/srv/ci/root/nix/store"
SERVICE = "layered-storesd.service"

# A client of the bus that writes headers by itself (D-Bus specification, "Message Format").
CLIENT = '''
import os, socket, struct, sys

BUS = "org.freedesktop.DBus"
OURS = "org.layeredstores1"
CALL, SIGNAL = 1, 4
# By which the end of a field of one's own is known.
NUMBER, TEXT = ("u", struct.pack("<I", 7)), ("s", struct.pack("<I", 1) + b"x\\0")
DESCRIPTOR = ("h", struct.pack("<I", 0))

def pad(data, to):
    return data + bytes(-len(data) % to)

def string(text):
    data = text.encode()
    return struct.pack("<I", len(data)) + data + b"\\0"

def message(kind, to, path, interface, member, signature="", body=b"", more=(), serial=1):
    fields = b""
    known = [(1, "o", path), (2, "s", interface), (3, "s", member), (6, "s", to)]
    for number, signature_of, value in [
        *((number, kind, string(value)) for number, kind, value in known),
        *([(8, "g", bytes([len(signature)]) + signature.encode() + b"\\0")] if signature else []),
        *more,
    ]:
        fields = pad(fields, 8) + bytes([number, 1]) + signature_of.encode() + b"\\0" + value
    start = struct.pack("<cBBBIII", b"l", kind, 0, 1, len(body), serial, len(fields))
    return pad(start + fields, 8) + body

class Bus:
    def __init__(self):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect("/run/dbus/system_bus_socket")
        self.socket.settimeout(60)
        uid = str(os.getuid()).encode().hex()
        self.socket.sendall(f"\\0AUTH EXTERNAL {uid}\\r\\nBEGIN\\r\\n".encode())
        self.buffer = b""
        while b"\\r\\n" not in self.buffer:
            self.buffer += self.socket.recv(4096)
        self.buffer = self.buffer.split(b"\\r\\n", 1)[1]
        self.serial = 0
        self.ask("Hello")

    def take(self, count):
        while len(self.buffer) < count:
            data = self.socket.recv(65536)
            if not data:
                sys.exit("the bus has hung up")
            self.buffer += data
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def call(self, *call, **more):
        """Waits for the answer; returns its type (2: good, 3: an error) and all of it."""
        self.serial += 1
        self.socket.sendall(message(CALL, *call, serial=self.serial, **more))
        while True:
            _, kind, _, _, length, _, fields = struct.unpack("<cBBBIII", self.take(16))
            rest = self.take(fields + -fields % 8 + length)
            # The field REPLY_SERIAL.
            if kind in (2, 3) and b"\\x05\\x01u\\0" + struct.pack("<I", self.serial) in rest:
                return kind, rest

    def ask(self, member, signature="", body=b""):
        return self.call(BUS, "/org/freedesktop/DBus", BUS, member, signature, body)

    def get(self, **more):
        manager = ("/org/layeredstores1", OURS + ".Manager")
        return self.call(OURS, *manager, "GetStore", "s", string("ci"), **more)

bus = Bus()
if bus.get()[0] != 2:
    sys.exit("a call like any other is not answered")
kind, rest = bus.get(more=[(42, *NUMBER)])
if kind != 3 or b"org.freedesktop.DBus.Error.NotSupported" not in rest:
    sys.exit(f"a call with a field of its own is answered with {kind}, {rest}")
names = []
for number in range(1000):
    kind, rest = bus.ask("GetConnectionUnixProcessID", "s", string(f":1.{number}"))
    if kind == 2 and struct.unpack("<I", rest[-4:])[0] == int(sys.argv[1]):
        names.append(f":1.{number}")
print(len(names), "connections")
for name in names:
    for field in [NUMBER, TEXT, DESCRIPTOR]:
        manager = ("/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
        for number in 42, 255:
            bus.socket.sendall(
                message(SIGNAL, name, *manager, "Reloading", more=[(number, *field)], serial=99)
            )
if bus.get()[0] != 2:
    sys.exit("a call after these is not answered")
'''

machine.wait_for_unit(SERVICE)
machine.succeed("mkdir -p /srv/base/nix/store", "layered-stores start ci")

with subtest("The bus is dbus-broker"):
    t.assertEqual(machine.get_unit_property("dbus.service", "Id"), "dbus-broker.service")

with subtest("A store is started, stopped, refreshed and asked about"):
    machine.succeed("layered-stores stop ci")
    machine.fail(f"mountpoint --quiet {MERGED}")
    machine.succeed(
        "layered-stores start ci",
        f"mountpoint --quiet {MERGED}",
        "layered-stores remount ci",
        f"layered-stores-remount {MERGED}",
        "layered-stores status ci",
        "layered-stores verify ci",
        "layered-stores reload",
    )

with subtest("Everybody may look, and polkit is asked about the rest"):
    machine.succeed("runuser -u alice -- layered-stores status ci")
    said = machine.fail("runuser -u alice -- layered-stores stop ci 2>&1")
    t.assertIn('org.layeredstores1.stop on store "ci" ', said)
    machine.succeed(f"mountpoint --quiet {MERGED}")

with subtest("What others put into the headers of messages does not end the daemon"):
    pid = machine.get_unit_property(SERVICE, "MainPID")
    machine.succeed(f"install -m 755 /dev/stdin /srv/client.py << 'END'\n{CLIENT}\nEND")
    said = machine.succeed(f"runuser -u alice -- python3 /srv/client.py {pid} 2>&1", timeout=120)
    t.assertEqual(said, "3 connections\n")
    machine.succeed(
        "layered-stores stop ci", "layered-stores start ci", f"layered-stores-remount {MERGED}"
    )
    t.assertEqual(machine.get_unit_property(SERVICE, "MainPID"), pid)
