"""Shows a layered store from its declaration to a reboot, on a Debian of its own.

Run by `make demo`, which installs what it needs and finds the driver for it.

Every command that is printed is run in the machine, and what follows it is its
output. The machine is gone at the end; only its image stays, below target/.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import deque
from pathlib import Path
from types import FrameType

from driver import Machine, MachineError, PreconditionError, RequestedAssertionFailed, boot
from driver.host import check_preconditions
from driver.image import base_image

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
SUITE = "trixie"
PACKAGE = "layered-stores"

ON_TERMINAL = sys.stdout.isatty()
COLOURS = ON_TERMINAL and "NO_COLOR" not in os.environ
WIDTH = min(96, shutil.get_terminal_size((96, 24)).columns)
BOLD, DIM, RED, CYAN = "1", "2", "31", "36"

# How often the compiler's progress is told where it cannot be kept on one line.
TELL_EVERY = 15.0

# What a shell in the machine starts with. The store's URL is shown when it is first used.
PRELUDE = f"""
cd /root
export {"CLICOLOR_FORCE" if COLOURS else "NO_COLOR"}=1
[ ! -e /root/uri ] || ci=$(cat /root/uri)
"""


class DemoFailed(Exception):
    """Something did not come out as it should have."""


def paint(text: str, *codes: str) -> str:
    """`text` in colour, if somebody can see it."""
    return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if COLOURS else text


def say(text: str = "") -> None:
    """A line, at once: commands in the machine write to the same place."""
    print(text, flush=True)


def paragraph(text: str) -> None:
    """Words for people, wrapped."""
    say(textwrap.fill(" ".join(text.split()), WIDTH, break_on_hyphens=False))


def elapsed(since: float) -> str:
    """A duration as people say it."""
    seconds = time.monotonic() - since
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def main() -> int:
    """The exit code: 0, 1 for a failure, 130 when interrupted."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    started = time.monotonic()
    try:
        check_preconditions()
        prepare()
        with boot(SUITE, name="demo") as machine:
            machine.start(allow_reboot=True)
            demonstrate(machine)
        say(paint(f"The machine is gone. All of this took {elapsed(started)}.", DIM))
        return 0
    except (PreconditionError, MachineError, RequestedAssertionFailed, DemoFailed) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read this has seen enough, and Python's own last flush must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    """Ends the demo. A second Ctrl-C does not disturb the cleaning up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # At once and unbuffered: the machine may take some seconds to go.
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), b"\ndemo: interrupted; taking the machine away\n")
    raise KeyboardInterrupt


# What comes before the show


def prepare() -> None:
    """Makes the machine's image and the executables, where they are not there yet."""
    say(paint("layered-stores: a writable Nix store over a shared one", BOLD))
    paragraph(
        """Everything below happens in a Debian machine that is made for it and gone
        afterwards, with systemd, D-Bus and Nix as Debian ships them. The first time, it
        takes half a minute to install that machine and some minutes to compile; after that,
        seconds."""
    )
    base_image(SUITE)
    compile_project()


def compile_project() -> None:
    """Runs `make build`, and tells of cargo's progress in as few lines as possible."""
    started = time.monotonic()
    told = started
    last: deque[str] = deque(maxlen=40)
    compiled = 0
    make = subprocess.Popen(
        ["make", "--no-print-directory", "-C", str(REPOSITORY), "build"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert make.stdout is not None
    try:
        for line in make.stdout:
            last.append(line)
            compiling = re.match(r"\s+Compiling (\S+)", line)
            if compiling is None:
                continue
            compiled += 1
            text = f"compiling package {compiled}: {compiling[1]}"
            if compiling[1] == PACKAGE:
                text += ", the last one, which takes longest"
            if ON_TERMINAL:
                print(f"\r{text[: WIDTH - 1]:<{WIDTH - 1}}", end="", flush=True)
            elif time.monotonic() - told > TELL_EVERY or compiled == 1:
                told = time.monotonic()
                say(text)
    finally:
        if sys.exc_info()[0] is not None:
            make.terminate()
        status = make.wait()
        make.stdout.close()
    if ON_TERMINAL and compiled:
        print("\r" + " " * (WIDTH - 1) + "\r", end="")
    if status != 0:
        raise DemoFailed("`make build` failed; it ended with\n" + "".join(last).rstrip())
    if compiled:
        say(f"compiled in {elapsed(started)}")


# The show


class Show:
    """A running commentary on one machine."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._steps = 0

    def step(self, title: str, text: str) -> None:
        """A numbered heading and what is to be seen below it."""
        self._steps += 1
        say()
        say(paint(f"{self._steps}. {title}", BOLD, CYAN))
        paragraph(text)
        say()

    def note(self, text: str) -> None:
        """More words in the middle of a step."""
        say()
        paragraph(text)
        say()

    def run(self, command: str, expected: int = 0) -> list[str]:
        """Prints a command, runs it, streams what it prints, and returns that."""
        say(paint("# ", DIM) + paint(command, BOLD))
        # `tee` for this program, `sed` for the eye; the command's own exit code is what counts.
        shown = "tee /run/shown | sed --unbuffered 's/^/  /'"
        script = f"{PRELUDE}set +eu\n{{ {command}\n}} 2>&1 | {shown}\nexit ${{PIPESTATUS[0]}}"
        status = self._machine.stream(script)
        if status != expected:
            raise DemoFailed(f"that should have ended with exit code {expected}, not {status}")
        if status != 0:
            say(f"  exit code {status}")
        return self._machine.succeed("cat /run/shown").splitlines()

    def build(self, store: str, names: str) -> list[str]:
        """Has Nix build attributes of hello.nix, and returns their store paths."""
        options = f"--file hello.nix {names} --no-link --print-out-paths"
        lines = self.run(f"nix build --offline --store {store} {options}")
        paths = [line for line in lines if re.fullmatch(r"/nix/store/[^/ ]+", line)]
        self.expect(len(paths) == len(names.split()), "Nix should have named what it built")
        return paths

    def inodes(self, *places: str) -> list[int]:
        """Shows the inode numbers of files, in the order of the places."""
        numbers = [self.run(f"stat -Lc '%i  %n' {place}")[0].split()[0] for place in places]
        return [int(number) for number in numbers]

    def expect(self, condition: bool, what: str) -> None:
        """Stops the demo when it would tell what is not so."""
        if not condition:
            raise DemoFailed(what)

    def reboot(self) -> None:
        """Reboots the machine."""
        started = time.monotonic()
        say(paint("# ", DIM) + paint("systemctl reboot", BOLD))
        self._machine.reboot()
        self._machine.connect()
        say(f"  down and up again in {elapsed(started)}")

    def journal(self) -> None:
        """What the daemon and its mounts have logged."""
        units = "--unit=layered-storesd --unit='srv-*.mount'"
        say(paint("\nThe journal of the daemon and its mounts:", RED))
        self._machine.stream(
            f"journalctl {units} --boot --no-pager --lines=40 2>&1 | sed 's/^/  /'"
        )


def demonstrate(machine: Machine) -> None:
    """All steps; if one fails, the journal."""
    machine.copy_from_host(str(HERE / "hello.nix"), "/root/hello.nix")
    machine.copy_from_host(str(HERE / "config.toml"), "/etc/layered-stores/config.toml")
    # No network to get a compiler from: builds use the machine's own programs.
    machine.succeed("echo 'extra-sandbox-paths = /usr /lib? /lib64?' >>/etc/nix/nix.conf")
    show = Show(machine)
    try:
        steps(show)
    except DemoFailed as error:
        say(paint(f"\nThis is not what should happen: {error}.", RED, BOLD))
        show.journal()
        raise DemoFailed("stopped; see above") from None


def steps(show: Show) -> None:
    """What there is to see."""
    show.step(
        "A store to share",
        """Nix fills a store in /srv/base. Think of it as the one everybody builds on:
        read-only, on a network share, in an image. (The machine has no network, hence
        --offline.)""",
    )
    show.build("/srv/base", "greeting")
    before = show.run("ls /srv/base/nix/store")

    show.step("Six lines declare a layered store on top of it", "This is the whole configuration.")
    show.run("cat /etc/layered-stores/config.toml")

    show.step(
        "One service makes it exist",
        """It prepares the directories, has systemd mount the two layers as one directory,
        and compares the mount with the declaration before it calls the store active.""",
    )
    show.run("systemctl start layered-storesd")
    show.run("layered-stores status")

    show.step(
        "Nix builds into it",
        """The URL is all that Nix needs. Its own check of the mount stays on, and passes.
        Both programs use the greeting, which is in the lower store already.""",
    )
    show.run("layered-stores uri ci | tee uri")
    show.note("From here on, $ci is that URL.")
    hello, goodbye = show.build('"$ci"', "hello goodbye")
    show.note("What was built is in the upper layer. The lower store is as it was.")
    show.run("ls /srv/ci/upper")
    after = show.run("ls /srv/base/nix/store")
    show.expect(before == after, "the lower store should be as it was")

    show.step(
        "What was built runs",
        """Its paths begin with /nix/store, so it has to see the layered store there.
        `enter` gives one process, and its children, that view.""",
    )
    show.run(f"layered-stores enter ci -- {hello}/bin/hello")

    show.step(
        "The same path arrives in the lower store",
        """Somebody builds the same program for everybody. Now its files are in both layers.
        The inode number tells which of the two the layered store shows: that of the upper
        layer.""",
    )
    show.build("/srv/base", "hello")
    lower, upper, merged = (
        f"/srv/{layer}/*-hello/bin/hello"
        for layer in ("base/nix/store", "ci/upper", "ci/root/nix/store")
    )
    in_lower, in_upper, seen = show.inodes(lower, upper, merged)
    show.expect(seen == in_upper, "the layered store should show the file of the upper layer")

    show.step(
        "Nix deletes the copy in the upper layer, while a process has it open",
        """OverlayFS does not allow its layers to change underneath, so Nix calls a hook to
        have the merged directory remounted. The hook in Nix's manual runs mount(8), and
        with today's util-linux that fails:""",
    )
    show.run("mount -o remount /srv/ci/root/nix/store", expected=32)
    show.note(
        """And where it does work, it does not help a path that some process holds open:
        everybody goes on seeing what was deleted. So here is such a process.""",
    )
    show.run(f"sleep infinity <{merged} >/dev/null 2>&1 &")
    show.note("Nix deletes the path, and calls the hook that is in the URL.")
    show.run(f'nix store delete --offline --store "$ci" {hello}')
    show.note(
        "The process still has the file it had. Everybody else sees the one in the lower store."
    )
    held, seen = show.inodes("/proc/$(pidof sleep)/fd/0", merged)
    show.expect(held == in_upper, "the process should have the file it had")
    show.expect(seen == in_lower, "the layered store should show the file of the lower store")
    show.run(f"layered-stores enter ci -- {hello}/bin/hello")
    show.note(
        """The daemon remounted, looked, and found the old file still in the way. So it slid
        a fresh mount under the old one and took the old one off. At no moment was a path
        missing.""",
    )
    status = show.run("layered-stores status ci")
    show.expect(any("1 swap" in line for line in status), "status should tell of the swap")

    show.step(
        "Garbage is collected in the lower store",
        """Nothing there keeps the greeting that the programs in the layered store use, and a
        collector knows nothing of stores on top. The daemon keeps it there, and has the
        collector wait for some milliseconds until everything is kept that is in use.""",
    )
    show.run("nix-store --store /srv/base --add /etc/hostname")
    show.run("nix-store --store /srv/base --gc")
    left = show.run("ls /srv/base/nix/store")
    show.expect(any("-greeting" in line for line in left), "what is used should still be there")
    show.expect(not any("-hostname" in line for line in left), "what nobody uses should be gone")
    show.run(f"layered-stores enter ci -- {goodbye}/bin/goodbye")

    show.step("A reboot brings it all back", "The mount, its order at boot, and Nix's database.")
    show.run("systemctl enable layered-storesd")
    show.reboot()
    show.run("layered-stores wait ci")
    show.run("journalctl --boot --unit=layered-storesd --output=cat --no-pager")
    show.run('nix store verify --offline --store "$ci" --all --no-trust')
    show.run(f"layered-stores enter ci -- {goodbye}/bin/goodbye")

    say()
    say(paint("What you saw", BOLD, CYAN))
    paragraph(
        """Six lines and one service made a writable Nix store over another one that it
        never writes to. When Nix had deleted a path the view was right at once, although a
        process held the old file open. Garbage collected in the store underneath took nothing
        away. A reboot lost nothing."""
    )
    say()
    say(paint("Where to go next", BOLD, CYAN))
    say("  README.md                   what it is, a tour for your own machine, what is missing")
    say("  docs/configuration.md       every key, and everything that is refused")
    say("  docs/how-it-works.md        what happens underneath, and why")
    say("  make install, make test     put it on this machine; see it tested")
    say()


if __name__ == "__main__":
    sys.exit(main())
