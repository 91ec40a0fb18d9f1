# What takes long is a job: everybody sees how far it is, who has asked for it and root may cancel
# it, nobody who waits is forgotten, and there are only so many.
import json
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PATHS = 300
JOBS = "/org/layeredstores1/job"
JOB = "org.layeredstores1.Job"
RULES = "/run/polkit-1/rules.d"
# How many jobs a user may wait for.
EACH = 8

# Runs a command on a terminal of 80 columns, presses Ctrl-C once it has shown what it is to show,
# and says what there was on the terminal, how the command has ended, and how soon after Ctrl-C.
TERMINAL = r"""
import json, os, sys, time
shows, presses, command = sys.argv[1], int(sys.argv[2]), sys.argv[3]
child, terminal = os.forkpty()
if child == 0:
    os.environ["TERM"] = "xterm"
    os.execlp("sh", "sh", "-c", f"stty cols 80 rows 24; exec {command}")
seen, pressed = b"", None
while True:
    try:
        read = os.read(terminal, 4096)
    except OSError:
        break
    if not read:
        break
    seen += read
    if pressed is None and shows and shows.encode() in seen:
        pressed = time.monotonic()
        for _ in range(presses):
            os.write(terminal, b"\x03")
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
took = time.monotonic() - pressed if pressed else None
print(json.dumps({"seen": seen.decode(), "code": code, "took": took}))
"""


def by(user: str, command: str) -> str:
    """The command, run by that user."""
    return f"runuser -u {user} -- {command}"


def daemon() -> str:
    return machine.get_unit_property("layered-storesd.service", "MainPID")


@contextmanager
def slow(delay: str) -> Iterator[None]:
    """The daemon waits that long whenever it asks a filesystem for a file."""
    pid = daemon()
    machine.succeed(
        "systemd-run --quiet --collect --unit=slow --property=KillMode=mixed "
        f'--setenv=PATH="$PATH" "$(command -v strace)" -f -qq -o /dev/null -p {pid} '
        f"-e trace=newfstatat -e inject=newfstatat:delay_enter={delay}"
    )
    machine.wait_until_fails(f"grep -qx 'TracerPid:\t0' /proc/{pid}/status", timeout=30)
    try:
        yield
    finally:
        machine.succeed("systemctl stop slow 2>/dev/null || true")


def jobs() -> list[str]:
    """The objects of all jobs."""
    tree = machine.succeed("busctl --list tree org.layeredstores1")
    return [line for line in tree.splitlines() if line.startswith(f"{JOBS}/")]


def wait_for_jobs(number: int) -> list[str]:
    """Waits until there are so many."""
    machine.wait_until_succeeds(
        f"test $(busctl --list tree org.layeredstores1 | grep -c ^{JOBS}/) = {number}", timeout=60
    )
    return jobs()


def read(job: str, name: str, user: str = "alice") -> str:
    """A property of a job, as that user is told."""
    said = machine.succeed(by(user, f"busctl get-property org.layeredstores1 {job} {JOB} {name}"))
    return said.split(maxsplit=1)[1].strip().strip('"')


def wait_until_it_gets_on(job: str) -> None:
    machine.wait_until_succeeds(
        f"test $(busctl get-property org.layeredstores1 {job} {JOB} Done | cut -c3-) -gt 0",
        timeout=60,
    )


def begin(unit: str, user: str = "root") -> None:
    """Has somebody wait for a look at all paths."""
    verify = "exec layered-stores verify ci"
    if user != "root":
        # Who asks too much of polkit at a time is sent away for that.
        verify = (
            "while :; do said=$(layered-stores verify ci 2>&1); code=$?; "
            'case $said in *questions*) ;; *) echo "$said"; exit $code;; esac; done'
        )
    machine.succeed(
        f"systemd-run --quiet --unit={unit} --uid={user} -p RemainAfterExit=yes "
        f"-p StandardOutput=truncate:/run/{unit}.said -p StandardError=inherit "
        f'--setenv=PATH="$PATH" "$(command -v sh)" -c {shlex.quote(verify)}'
    )


def end_of(unit: str) -> tuple[int, str]:
    """How that has ended, and what was said."""
    machine.wait_until_succeeds(
        f"systemctl show -P SubState {unit} | grep -xE 'exited|failed'", timeout=60
    )
    code = int(machine.get_unit_property(f"{unit}.service", "ExecMainStatus"))
    machine.succeed(f"systemctl stop {unit}; systemctl reset-failed {unit} 2>/dev/null || true")
    return code, machine.succeed(f"cat /run/{unit}.said")


def on_a_terminal(shows: str, presses: int, command: str) -> dict[str, Any]:
    arguments = shlex.join([shows, str(presses), command])
    said = machine.succeed(f"python3 /srv/terminal.py {arguments}", timeout=120)
    seen: dict[str, Any] = json.loads(said)
    return seen


machine.wait_for_unit("layered-storesd.service")
machine.succeed(
    f"for n in $(seq {PATHS}); do mkdir -p /srv/base/nix/store/$(printf %032d $n)-path; done",
    f"cat >/srv/terminal.py <<'END'\n{TERMINAL}\nEND",
    "layered-stores start ci",
)
RIGHT = "ci: every path of the merged directory is what its layers say\n"

with subtest("Whoever waits for its end sees nothing of it, and nothing is left"):
    for command in ["verify ci", "verify ci --json"]:
        said = machine.succeed(f"layered-stores {command} 2>&1")
        assert said == ("[]\n" if "--json" in command else RIGHT), said
    wait_for_jobs(0)

# Without being cancelled, these would take minutes.
with subtest("Everybody sees what it is about and how far it is"), slow("100ms"):
    begin("first")
    [first] = wait_for_jobs(1)
    wait_until_it_gets_on(first)
    assert [read(first, name) for name in ("Kind", "Store", "State")] == ["verify", "ci", "running"]
    assert int(read(first, "Total")) == PATHS and int(read(first, "Done")) < PATHS
    live = machine.succeed(f"busctl introspect --xml-interface org.layeredstores1 {first}")
    found = re.search(rf'^ *<interface name="{JOB}">.*?</interface>$', live, re.M | re.S)
    assert found is not None, live
    lines = found.group().splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    live = "\n".join("  " + line[indent:].rstrip() for line in lines)
    shipped = machine.succeed(
        'program=$(readlink -f "$(command -v layered-stores)"); '
        f'cat "${{program%/bin/*}}/share/dbus-1/interfaces/{JOB}.xml"',
    )
    assert live in shipped, f"data/{JOB}.xml is not what the daemon says:\n{live}"

    with subtest("Who asks later than it began waits for the next one, which is shared"):
        begin("second")
        begin("third")
        [_, second] = wait_for_jobs(2)
        assert read(second, "State") == "waiting"
        # What else is asked meanwhile is answered.
        machine.succeed("layered-stores status ci", "layered-stores remount ci")

    with subtest("Somebody else may look and no more"):
        for member in ("Cancel", "GetResult"):
            call = f"--print-reply --dest=org.layeredstores1 {first} {JOB}.{member} 2>&1"
            said = machine.fail(by("alice", f"dbus-send --system {call}"))
            assert "somebody else" in said, said
        assert read(first, "State") == "running"

    with subtest("Who leaves the bus takes the job along, unless somebody else waits for it"):
        machine.succeed("systemctl kill --signal=KILL second")
        machine.succeed("systemctl kill --signal=KILL first")
        assert wait_for_jobs(1) == [second]
        wait_until_it_gets_on(second)
        end_of("first")
        end_of("second")

    with subtest("Root ends what others wait for, and they are told"):
        machine.succeed(f"busctl call org.layeredstores1 {second} {JOB} Cancel")
        code, said = end_of("third")
        assert (code, said) == (1, 'layered-stores: verify of store "ci" was cancelled\n'), said
        wait_for_jobs(0)

with subtest("On a terminal there is a bar, and it is gone in the end"):
    with slow("2ms"):
        there = on_a_terminal("", 0, "layered-stores verify ci")
    shown = {int(done) for done in re.findall(rf"(\d+)/{PATHS} paths", there["seen"])}
    assert there["code"] == 0 and shown - {0, PATHS}, there
    # What moves the cursor is no text.
    lines = re.split(r"[\r\n]|\x1b\[[0-9;?]*[A-Za-z]", there["seen"])
    assert max(map(len, lines)) <= 80, lines
    assert [line for line in lines if line][-1] == RIGHT.strip(), lines

with subtest("Ctrl-C cancels"), slow("20ms"):
    there = on_a_terminal("verify ci: ", 1, "layered-stores verify ci")
    assert (there["code"], "verify ci: cancelled" in there["seen"]) == (130, True), there
    assert there["took"] < 5, there
    wait_for_jobs(0)

with subtest("What hangs is over at once for who cancels it, and others are not held up"):
    with slow("100s"):
        begin("hung")
        [hung] = wait_for_jobs(1)
        machine.wait_until_succeeds(
            f"busctl get-property org.layeredstores1 {hung} {JOB} State | grep running", timeout=60
        )
        began = time.monotonic()
        machine.succeed(f"busctl call org.layeredstores1 {hung} {JOB} Cancel")
        assert end_of("hung")[0] == 1
        assert time.monotonic() - began < 8, "that is before it counts as stuck"
        wait_for_jobs(0)
        machine.succeed("timeout 10 layered-stores list")
    machine.wait_until_succeeds("layered-stores verify ci", timeout=60)

with subtest("When the daemon ends, nobody goes on waiting"):
    for how, words in [
        ("systemctl kill --signal=KILL layered-storesd", "layered-storesd has ended meanwhile"),
        ("systemctl restart layered-storesd", "the daemon is shutting down"),
    ]:
        with slow("20ms"):
            begin("left")
            wait_until_it_gets_on(wait_for_jobs(1)[0])
            began = time.monotonic()
            machine.succeed(how)
            code, said = end_of("left")
            assert code == 1 and words in said, (code, said)
        machine.wait_until_succeeds("layered-stores wait ci", timeout=60)
        assert jobs() == [], jobs()
    machine.succeed("layered-stores verify ci")

with subtest("A user waits for so many, and cancels them from elsewhere"):
    rule = (
        "polkit.addRule(function(action, subject) {\n"
        '  if (action.id == "org.layeredstores1.verify" && subject.user == "alice")\n'
        "    return polkit.Result.YES;\n"
        "});"
    )
    machine.succeed(
        f"mkdir -p {RULES}",
        f"cat >{RULES}/10-alice.rules <<'END'\n{rule}\nEND",
        "systemctl restart polkit",
    )
    with slow("20ms"):
        for number in range(EACH + 1):
            begin(f"hers-{number}", "alice")
            # The first is under way before the others ask, so that they share the second.
            wait_for_jobs(min(number + 1, 2))
        # The last to ask, whichever it is.
        refused = f"grep -l '{EACH} jobs of this user are under way' /run/hers-*.said"
        machine.wait_until_succeeds(f"test $({refused} | wc -l) = 1", timeout=60)
        for job in jobs():
            machine.succeed(by("alice", f"busctl call org.layeredstores1 {job} {JOB} Cancel"))
        told = [end_of(f"hers-{number}")[1] for number in range(EACH + 1)]
        assert sum("was cancelled" in each for each in told) == EACH, told
        wait_for_jobs(0)
    machine.succeed(by("alice", "layered-stores verify ci"), f"rm {RULES}/10-alice.rules")
