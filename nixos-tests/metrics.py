# What Prometheus is told about stores: over a node exporter and over a socket, by units that can do
# no more than that, whatever clients, daemon and filesystems do; and what it makes of it.
import json
import re
import shlex

MERGED = "/srv/ci/root/nix/store"
TEXTFILE = "/var/lib/prometheus/node-exporter/layered-stores.prom"
TIMER = "/run/systemd/system/layered-stores-metrics.timer"
SOCKET = "/run/layered-stores-metrics.sock"
DOCUMENTS = "/etc/prometheus/layered-stores"
DAEMON = "layered-storesd.service"
NAME = re.compile(r"\blayered_stores_\w+")

# Sends what is given to it and prints what comes back, with how long that took in the first line.
CLIENT = r"""
import socket, sys, time
began = time.monotonic()
client = socket.socket(socket.AF_UNIX)
client.settimeout(60)
client.connect(sys.argv[1])
answer = b""
try:
    client.sendall(sys.argv[2].encode().decode("unicode_escape").encode() * int(sys.argv[3]))
    while more := client.recv(65536):
        answer += more
except (BrokenPipeError, ConnectionResetError):
    pass
print(time.monotonic() - began)
print(answer.decode())
"""

# A FUSE server (linux/fuse.h) of an empty directory that answers nothing once it is mounted.
DEAF = r"""
import os, struct, sys, time
device = os.open("/dev/fuse", os.O_RDWR)
os.set_inheritable(device, True)
options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
if os.system(f"mount -i -t fuse -o {options} deaf {sys.argv[1]}") != 0:
    sys.exit("cannot mount")
question = os.read(device, 1 << 20)
unique = struct.unpack_from("<IIQ", question)[2]
answer = struct.pack("<IIIIHHIIHH8I", 7, 31, 65536, 0, 16, 12, 65536, 1, *[0] * 10)
os.write(device, struct.pack("<IiQ", 16 + len(answer), 0, unique) + answer)
while True:
    os.read(device, 1 << 20)
"""


def ask(request: str, times: int = 1, user: str = "alice") -> tuple[float, str]:
    """How long an answer of the socket takes, and the answer."""
    said = machine.succeed(
        f"runuser -u {user} -- python3 /srv/client.py {SOCKET} {shlex.quote(request)} {times}",
        timeout=120,
    )
    took, _, answer = said.partition("\n")
    return float(took), answer


def get() -> str:
    """The figures over the socket."""
    _, answer = ask(r"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    head, _, body = answer.replace("\r\n", "\n").partition("\n\n")
    assert head.startswith("HTTP/1.1 200 OK\n"), head
    assert "content-type: text/plain; version=0.0.4" in head, head
    return body


def value(text: str, sample: str) -> float | None:
    """The value of a sample, if it is there."""
    for line in text.splitlines():
        if line.startswith(f"{sample} "):
            return float(line.rpartition(" ")[2])
    return None


def query(expression: str) -> list[dict[str, str]]:
    """The labels of what Prometheus finds, with the value."""
    said = machine.succeed(
        "promtool query instant --format=json http://localhost:9090 " + shlex.quote(expression)
    )
    return [{**found["metric"], "value": found["value"][1]} for found in json.loads(said)]


def wait_for(expression: str, timeout: int = 120) -> None:
    """Waits until Prometheus finds something."""
    asked = f"promtool query instant http://localhost:9090 {shlex.quote(expression)}"
    command = f'test -n "$({asked})"'
    machine.wait_until_succeeds(command, timeout=timeout)


machine.wait_for_unit(DAEMON)
machine.succeed(
    "mkdir -p /srv/base/nix/store /srv/room",
    "mount -t tmpfs -o size=64M,nr_inodes=1000,mode=0755 x /srv/room",
    "layered-stores start ci other",
    f"cat >/srv/client.py <<'END'\n{CLIENT}\nEND",
    f"cat >/srv/deaf.py <<'END'\n{DEAF}\nEND",
    "test -e /dev/fuse || mknod /dev/fuse c 10 229",
)

with subtest("Prometheus' own tools have nothing to say against figures and rules"):
    text = machine.succeed("layered-stores metrics")
    said = machine.succeed("layered-stores metrics | promtool check metrics 2>&1")
    t.assertEqual(said, "")
    machine.succeed(
        f"promtool check rules {DOCUMENTS}/alerts.yaml",
        f"promtool test rules {DOCUMENTS}/alerts.test.yaml",
    )

with subtest("What the dashboard and the rules name is there"):
    machine.succeed("layered-stores remount ci")
    text = machine.succeed("layered-stores metrics")
    there = set(NAME.findall("\n".join(x for x in text.splitlines() if not x.startswith("#"))))
    for file in ("dashboard.json", "alerts.yaml"):
        named = set(NAME.findall(machine.succeed(f"cat {DOCUMENTS}/{file}")))
        assert len(named) > 5, named
        t.assertEqual(named - there, set(), file)

with subtest("It is what status and df say"):
    t.assertEqual(value(text, 'layered_stores_store_state{store="ci",state="active"}'), 1)
    t.assertEqual(value(text, 'layered_stores_store_state{store="ci",state="failed"}'), 0)
    t.assertEqual(value(text, 'layered_stores_store_problem{store="ci",code="stale"}'), 0)
    refreshes = 'layered_stores_store_refreshes_total{store="ci",kind="reconfigured"}'
    count = value(text, refreshes)
    assert count is not None and count >= 1, text
    for figure, column in (
        ("upper_size_bytes", "size --block-size=1"),
        ("upper_free_bytes", "avail --block-size=1"),
        ("upper_inodes", "itotal"),
        ("upper_free_inodes", "iavail"),
    ):
        free = int(machine.succeed(f"df --output={column} /srv/room | tail -n 1"))
        t.assertEqual(value(text, f'layered_stores_store_{figure}{{store="other"}}'), free)
    machine.succeed("layered-stores remount ci")
    t.assertEqual(value(machine.succeed("layered-stores metrics"), refreshes), count + 1)

with subtest("A node exporter shows them"):
    machine.wait_until_succeeds(f"grep -F store_state {TEXTFILE}", timeout=60)
    t.assertEqual(machine.succeed(f"stat --format '%a %U' {TEXTFILE}"), "644 root\n")
    wait_for('layered_stores_store_state{store="ci",state="active"} == 1')
    t.assertEqual(query("node_textfile_scrape_error")[0]["value"], "0")
    [found] = query('layered_stores_store_upper_size_bytes{store="other"}')
    t.assertEqual((found["job"], found["value"]), ("node", str(64 << 20)))
    t.assertEqual(query("ALERTS"), [])
    # From here on more often, so that nobody waits for half a minute each time.
    machine.succeed(
        f"install -D -m 644 /dev/stdin {TIMER}.d/often.conf <<'END'\n[Timer]\nOnActiveSec=\n"
        "OnActiveSec=1s\nOnUnitInactiveSec=1s\nEND",
        "systemctl daemon-reload; systemctl restart layered-stores-metrics.timer",
    )

with subtest("A problem is in the journal and in the figures, and an alert follows"):
    machine.succeed(f"mount -t tmpfs none {MERGED}")
    problem = 'layered_stores_store_problem{store="ci",code="covered"} == 1'
    machine.wait_until_succeeds(
        f"layered-stores metrics | grep -F {shlex.quote(problem.replace(' ==', ''))}", timeout=30
    )
    wait_for(problem)
    wait_for('ALERTS{alertname="LayeredStoreProblem",store="ci",alertstate="pending"}', 30)

with subtest("Everybody is told over the socket, and of nothing else"):
    t.assertEqual(value(get(), 'layered_stores_store_problem{store="ci",code="covered"}'), 1)
    t.assertEqual(value(get(), 'layered_stores_store_upper_size_bytes{store="other"}'), 64 << 20)
    t.assertIn(" 404 ", ask(r"GET / HTTP/1.1\r\nHost: x\r\n\r\n")[1])
    t.assertIn(" 405 ", ask(r"POST /metrics HTTP/1.1\r\nHost: x\r\n\r\n")[1])
    head = ask(r"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n")[1].replace("\r\n", "\n")
    assert head.startswith("HTTP/1.1 200 OK\n") and head.rstrip().count("\n") < 6, head

with subtest("Clients that are slow, or say too much or something else, are sent away"):
    took, answer = ask(r"GET /metrics HTTP/1.1\r\n")
    assert 4 < took < 15, (took, answer)
    # With what it has not read the kernel throws away what it has answered.
    took, answer = ask(r"GET /metrics HTTP/1.1\r\nX: " + "x" * 1000, 1000)
    assert took < 4 and "200" not in answer, (took, answer)
    t.assertIn(" 400 ", ask(r"what is this\r\n\r\n")[1])
    silent = "import socket, time; all = [socket.socket(socket.AF_UNIX) for _ in range(30)]; "
    silent += f"[one.connect('{SOCKET}') for one in all]; time.sleep(600)"
    machine.succeed(
        f'systemd-run --quiet -E PATH --unit=silent --uid=bob "$(command -v python3)" -c "{silent}"'
    )
    machine.wait_until_succeeds("pgrep -f serve-metrics")
    running = machine.succeed("systemctl list-units --plain --no-legend 'layered-stores-metrics@*'")
    assert len(running.splitlines()) <= 8, running
    # Those go within seconds, and others come to their turn.
    machine.wait_until_succeeds(
        f"runuser -u alice -- python3 /srv/client.py {SOCKET} "
        r"'GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n' 1 | grep -F store_state",
        timeout=60,
    )
    machine.succeed("systemctl stop silent", "systemctl is-active layered-stores-metrics.socket")
    failed = "systemctl list-units --state=failed --plain --no-legend 'layered-stores-metrics*'"
    t.assertEqual(machine.succeed(failed), "")

with subtest("The units can do what they have to, and little else"):
    for unit, most in (
        ("layered-stores-metrics.service", 2.5),
        ("layered-stores-metrics@x.service", 2.5),
    ):
        said = machine.succeed(f"systemd-analyze security --no-pager {unit} | tail -n 1")
        exposure = re.search(r"([0-9.]+) [A-Z]+", said)
        assert exposure is not None and float(exposure[1]) < most, said
    warnings = "journalctl -b -q -o cat -p warning -u 'layered-stores-metrics*.service'"
    t.assertEqual(
        machine.succeed(f"{warnings} || true"),
        "",
    )

with subtest("The alert fires, and is over when the problem is"):
    wait_for('ALERTS{alertname="LayeredStoreProblem",code="covered",alertstate="firing"}')
    machine.succeed(f"umount {MERGED}")
    wait_for('absent(ALERTS{alertname="LayeredStoreProblem"})')

with subtest("The journal has both ends of it, by the store and the code"):
    machine.succeed("journalctl --sync")
    told = machine.succeed("journalctl -b -q -o cat STORE=ci PROBLEM=covered").splitlines()
    assert len(told) == 2, told
    assert f"is mounted on top of {MERGED}" in told[0] and told[0].startswith("ci: "), told
    t.assertEqual(told[1], "ci: the problem [covered] is over")
    # What is about a store says so, in words and in the field.
    entries = machine.succeed(f"journalctl -b -q -o json -u {DAEMON}").splitlines()
    for entry in map(json.loads, entries):
        message = str(entry["MESSAGE"])
        if message.startswith(("ci: ", "other: ")):
            t.assertEqual(entry["STORE"], message.partition(":")[0], str(entry))

with subtest("log shows what the daemon has said, and no forgery"):
    forged = "printf 'MESSAGE=forged\\nSTORE=ci\\n' | runuser -u alice -- logger --journald"
    machine.succeed(forged, "journalctl --sync", "journalctl -b -q STORE=ci | grep forged")
    said = machine.succeed("layered-stores log ci")
    t.assertIn("ci: the problem [covered] is over", said)
    t.assertNotIn("forged", said)
    t.assertNotIn("other: ", said)
    t.assertNotIn("forged", machine.succeed("layered-stores status ci"))
    [entry] = machine.succeed("layered-stores log ci --json -n 1").splitlines()
    t.assertEqual(json.loads(entry)["STORE"], "ci")
    t.assertEqual(machine.succeed("layered-stores log ci --since +1h -n 5 2>&1").count("ci: "), 0)
    machine.succeed(
        "systemd-run --quiet -E PATH --unit=follow --property=StandardOutput=file:/srv/followed "
        '"$(command -v layered-stores)" log ci --follow'
    )
    machine.wait_until_succeeds("grep -F 'is over' /srv/followed", timeout=30)
    machine.succeed(f"mount -t tmpfs none {MERGED}")
    machine.wait_until_succeeds("test $(grep -c 'is mounted on top' /srv/followed) = 2", timeout=30)
    machine.succeed(f"umount {MERGED}", "systemctl stop follow")

with subtest("Who may not read the journal is told what to do, and who may is not"):
    said = " ".join(machine.fail("runuser -u alice -- layered-stores log ci 2>&1").split())
    t.assertIn("you may not read the machine's journal", said)
    t.assertIn("`sudo layered-stores log ci`", said)
    t.assertIn("group systemd-journal", said)
    machine.succeed("usermod --append --groups systemd-journal bob")
    t.assertIn("ci: ", machine.succeed("runuser -u bob -- layered-stores log ci 2>&1"))
    t.assertIn('did you mean "ci"?', machine.succeed("layered-stores log cii 2>&1"))

with subtest("A filesystem that does not answer keeps its own figures away, and no other"):
    machine.succeed(
        'systemd-run --quiet -E PATH --unit=deaf "$(command -v python3)" '
        "/srv/deaf.py /srv/room/upper"
    )
    machine.wait_until_succeeds("findmnt /srv/room/upper", timeout=30)
    for command in (
        "layered-stores metrics",
        f"systemctl start layered-stores-metrics && cat {TEXTFILE}",
    ):
        text = machine.succeed(f"timeout 15 sh -c '{command}'")
        t.assertEqual(value(text, 'layered_stores_store_upper_free_bytes{store="other"}'), None)
        assert value(text, 'layered_stores_store_upper_free_bytes{store="ci"}'), text
    assert value(get(), 'layered_stores_store_upper_free_bytes{store="ci"}'), text
    machine.succeed("umount --force --lazy /srv/room/upper; systemctl stop deaf")

with subtest("A daemon that does not run is a figure, is not started for it, and an alert"):
    machine.succeed(f"systemctl stop {DAEMON}")
    text = machine.succeed("layered-stores metrics")
    t.assertEqual(NAME.findall(re.sub("(?m)^#.*\n", "", text)), ["layered_stores_up"])
    t.assertEqual(value(text, "layered_stores_up"), 0)
    t.assertEqual(value(get(), "layered_stores_up"), 0)
    wait_for('ALERTS{alertname="LayeredStoresDaemonDown",alertstate="pending"}')
    machine.fail(f"systemctl is-active {DAEMON}")
    machine.succeed(f"systemctl start {DAEMON}")

with subtest("A daemon that hangs is one that is down, and holds nobody up for long"):
    machine.succeed(f"systemctl kill --signal=STOP {DAEMON}")
    text = machine.succeed("timeout 15 layered-stores metrics")
    t.assertEqual(value(text, "layered_stores_up"), 0)
    machine.succeed(f"systemctl kill --signal=CONT {DAEMON}")
    machine.wait_until_succeeds("layered-stores metrics | grep -F 'layered_stores_up 1'")
    assert 'store="ci"' in machine.succeed("layered-stores metrics")

with subtest("The file is whole whenever somebody looks, and what is in the way is not followed"):
    machine.succeed(
        "for n in $(seq 200); do layered-stores metrics --textfile /srv/figures.prom; done & "
        "while kill -0 $! 2>/dev/null; do "
        "test ! -e /srv/figures.prom || "
        "tail -n 1 /srv/figures.prom | grep ^layered_stores_jobs >/dev/null || exit 1; done",
        timeout=300,
    )
    machine.succeed("mkdir /srv/aim; ln -s /srv/aim /srv/way")
    said = machine.fail("layered-stores metrics --textfile /srv/way/x.prom 2>&1")
    t.assertIn("no symbolic link on the way", " ".join(said.split()))
    t.assertEqual(machine.succeed("ls -A /srv/aim"), "")
