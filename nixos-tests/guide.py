# What README and the Debian guide tell a newcomer to type, run from the text of the pages on a
# machine that has never had Nix: every command works, and prints what the page says.
import difflib
import json
import re
import shlex
import time
from dataclasses import dataclass

from driver import paths
from driver.errors import RequestedAssertionFailed

SOURCE = "/srv/layered-stores"
EXECUTABLES = (
    "layered-stores",
    "layered-storesd",
    "layered-stores-remount",
    "layered-stores-index",
)
CONFIG = "/etc/layered-stores/config.toml"
BLOCK = re.compile(r"^```(sh|console|toml)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
STORE_PATH = re.compile(r"/nix/store/[0-9a-z]{32}-[\w.-]+")
# What a terminal shows and takes away again, what only a machine without a network says, and that a
# store was refreshed before a slow machine came to look at it.
NOISE = re.compile(
    r"warning: (you don't have Internet|ignoring the client-specified)"
    r"|this derivation will be built:|  /nix/store/"
    r"|building '|Created symlink |finding garbage collector roots|deleting "
    r"|note: currently hard linking"
    r"|.* layered-storesd\[\d+\]: \w+: reconfigured \("
)
# A slow machine comes to look later, when the store has been refreshed.
REFRESHED = r"-|(just now|.* ago): \w+ \(.*\)"
# What only shows something that goes on.
LOOKS = re.compile(r"(journalctl|layered-stores status)\b")
# The machine has no network, so that nothing is to be asked of a cache.
ENVIRONMENT = "export NIX_CONFIG='substituters ='"


@dataclass
class Block:
    """A fenced block of a page."""

    kind: str
    text: str
    before: str


def blocks(page: str, heading: str | None = None) -> list[Block]:
    """The blocks of a page, or of one of its sections, and the paragraph before each."""
    text = (paths.REPOSITORY / page).read_text()
    if heading is not None:
        text = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = []
    for match in BLOCK.finditer(text):
        paragraphs = text[: match.start()].rstrip().split("\n\n")
        found.append(Block(match[1], match[2], paragraphs[-1]))
    return found


def plain(text: str) -> list[str]:
    """Lines without what differs between machines and days."""
    lines = [line.rstrip() for line in text.splitlines() if not NOISE.match(line)]
    lines = [
        STORE_PATH.sub("/nix/store/…", line).replace("/nix/store/…-note", "/nix/store/…")
        for line in lines
    ]
    shown = rf"^( +refreshed  |● \S+ +active .*  )({REFRESHED})$"
    lines = [re.sub(shown, r"\1N", line) for line in lines]
    return [re.sub(r"\b[\d.]+ ([KMGT]?i?B|s|min)\b", r"N", line) for line in lines if line]


def pattern_of(lines: list[str]) -> str:
    """What matches what a page shows: `…` is left out, and a line of it is one or more lines."""
    pieces = [".*".join(map(re.escape, line.split("…"))) for line in lines]
    return "\n".join(r".+(\n.+)*" if piece == ".*" else piece for piece in pieces)


class Reader:
    """Somebody who types what a page says."""

    def __init__(self) -> None:
        self.exports: dict[str, list[str]] = {}
        self.path = ""

    def run(self, user: str, command: str) -> str:
        """What a command prints."""
        if "/nix/store/…-note" in command:
            command = command.replace("/nix/store/…-note", self.path)
        exports = self.exports.setdefault(user, [ENVIRONMENT])
        home = SOURCE if user == "root" else f"/home/{user}"
        # The journal has what was said before, as it has for somebody who types.
        sync = ["journalctl --sync"] * command.startswith("journalctl")
        script = "\n".join(["set -e", *sync, *exports, f"cd {home}", command])
        as_user = "" if user == "root" else f"runuser --login {user} -c "
        shell = f"{as_user}{shlex.quote(script)}" if as_user else f"bash -c {shlex.quote(script)}"
        code, output = machine.execute(f"{shell} 2>&1 </dev/null")
        if command.startswith("export "):
            exports.append(command)
        for found in STORE_PATH.findall(output):
            self.path = found
        # A page shows what goes wrong, too; what is printed has to be the same.
        self.code = code
        return output

    def type_console(self, block: Block) -> None:
        """Types the commands of a block, and compares what comes."""
        unprivileged = "bob" if "`bob`" in block.before else "alice"
        wanted: dict[str, list[str]] = {}
        command = ""
        for line in block.text.splitlines():
            if line.startswith(("# ", "$ ")):
                command = line
                wanted[command] = []
            else:
                wanted[command].append(line)
        for command, lines in wanted.items():
            user = "root" if command.startswith("# ") else unprivileged
            self.expect(user, command[2:], plain("\n".join(lines)))

    def expect(self, user: str, command: str, expected: list[str]) -> None:
        """Types a command, and compares what comes."""
        printed: list[str] = []

        def is_printed(_last: bool) -> bool:
            nonlocal printed
            printed = plain(self.run(user, command))
            return re.fullmatch(pattern_of(expected), "\n".join(printed)) is not None

        # Who looks at something may come too early: Nix hangs up on a user first and says so in the
        # journal then, and on a machine that has much to do nobody has counted paths so soon.
        try:
            retry(is_printed, 60 if LOOKS.match(command) else 0)
        except RequestedAssertionFailed:
            differences = "\n".join(difflib.ndiff(expected, printed))
            raise AssertionError(
                f"{command} prints something else than the page says:\n{differences}"
            ) from None

    def follow(self, block: Block) -> None:
        """Does what a block says."""
        log.log(f"following: {block.text.splitlines()[0]} …")
        match block.kind:
            case "console":
                self.type_console(block)
            case "toml":
                machine.succeed(f"cat >{CONFIG} <<'END'\n{block.text}END")
            case _:
                # A machine without a network has the packages on its disk.
                text = re.sub(r"(?m)^apt-get install nix-bin.*$", INSTALL_NIX, block.text)
                if "make deb" in text:
                    return
                said = self.run("root", text)
                t.assertEqual(self.code, 0, f"{block.text}\n{said}")


INSTALL_NIX = "dpkg --install /var/cache/packages/nix-setup-systemd_*.deb"


def make_fresh() -> None:
    """A machine with nix-bin and nothing else of ours or Nix's; and this repository, as a clone."""
    machine.succeed(
        "rm -rf /nix /etc/nix; mkdir -p /srv",
        # What the machines of all scenarios have been given.
        "! getent group nixbld",
    )
    names = [
        "Makefile",
        "README.md",
        "CHANGELOG.md",
        "LICENSE-MIT",
        "LICENSE-APACHE",
        "data",
        "docs",
    ]
    for name in names:
        if (paths.REPOSITORY / name).exists():
            machine.copy_from_host(str(paths.REPOSITORY / name), f"{SOURCE}/{name}")
    for name in EXECUTABLES:
        machine.copy_from_host(
            f"{paths.REPOSITORY}/target/release/{name}", f"{SOURCE}/target/release/{name}"
        )
    machine.copy_from_host("/usr/bin/make", "/usr/local/bin/make")
    # The driver has installed it below /usr.
    machine.succeed(f"make -C {SOURCE} uninstall PREFIX=/usr", "systemctl daemon-reload")
    machine.fail("command -v layered-stores || systemctl cat layered-storesd")
    # As for every command above.
    machine.succeed("systemctl set-environment NIX_CONFIG='substituters ='")


def installed() -> list[str]:
    """What of ours is on the machine."""
    directories = "/usr/local /etc/systemd /etc/dbus-1 /usr/lib/systemd"
    return machine.succeed(
        f"find {directories} -name '*layered*' -not -path '*/wants/x' | sort"
    ).splitlines()


make_fresh()
reader = Reader()

with subtest("Five minutes on Debian, as README has them"):
    for block in blocks("README.md", "Five minutes on Debian"):
        reader.follow(block)
        if "make install" in block.text:
            # Who is curious starts the daemon, which then runs without what comes below.
            t.assertIn("No stores are declared", machine.succeed("layered-stores status"))
        if "check-config" in block.text:
            t.assertIn("run `layered-stores reload`", machine.succeed("layered-stores status"))
            for command in ("status ci", "start ci", "uri ci", "wait ci"):
                said = machine.fail(f"layered-stores {command} 2>&1")
                t.assertIn("the daemon has not read it", said)
                t.assertIn("run `layered-stores reload`", said)

with subtest("Undone, nothing of it is left that runs"):
    machine.succeed(f"rm {CONFIG}", "layered-stores reload")
    said = machine.succeed(f"make -C {SOURCE} uninstall 2>&1")
    machine.fail("pgrep -x layered-storesd")
    t.assertEqual(installed(), [])
    # systemd forgets them when it comes to it.
    units = "systemctl list-units --all --plain --no-legend 'layered-stores*'"
    machine.wait_until_succeeds(f'test -z "$({units})"', timeout=60)
    machine.succeed("rm -rf /var/lib/layered-stores", "apt-get --help >/dev/null")
    # A socket that is on its way down when its package comes back is not started again.
    machine.succeed("systemctl stop nix-daemon.socket nix-daemon.service")
    machine.succeed("dpkg --purge nix-setup-systemd 2>&1; rm -rf /nix /etc/nix")

with subtest("Getting started on Debian"):
    reader = Reader()
    for block in blocks("docs/getting-started-debian.md"):
        reader.follow(block)

with subtest("A name that is misspelt is told"):
    for command in ("status cy", "start cl", "remount xi", "wait co", "uri cii"):
        said = machine.fail(f"layered-stores {command} 2>&1")
        t.assertIn('did you mean "ci"?', said)

with subtest("A store that did not come up is named by reload and start, with code 3"):
    machine.succeed(f'sed -i \'s#"daemon"#"/srv/nowhere"#\' {CONFIG}')
    for command in ("layered-stores reload", "layered-stores start ci"):
        code, said = machine.execute(f"{command} 2>&1")
        t.assertEqual(code, 3, said)
        t.assertRegex(said, r'store "ci" .*/srv/nowhere/nix/store is not there')

with subtest("A daemon that does not start because of its configuration says so at once"):
    machine.succeed(
        "systemctl stop layered-storesd", f"sed -i 's/lower-store/lower-stroe/' {CONFIG}"
    )
    for user in ("root", "alice"):
        # The second finds the first one's failure.
        for command in ("status", "list", "uri ci"):
            began = time.monotonic()
            code, said = machine.execute(
                f"runuser -u {user} -- layered-stores {command} 2>&1 >/dev/null"
            )
            t.assertLess(time.monotonic() - began, 20, said)
            t.assertEqual(code, 1, said)
            t.assertIn(f"{CONFIG}:2:1", said)
            t.assertIn('did you mean "lower-store"?', said)
    code, said = machine.execute("layered-stores reload 2>&1")
    t.assertEqual(code, 1, said)
    t.assertIn(f"{CONFIG}:2:1", said)
    with subtest("So does the hook, which waits for no daemon that cannot come"):
        began = time.monotonic()
        code, said = machine.execute("runuser -u alice -- layered-stores-remount /srv/nowhere 2>&1")
        t.assertLess(time.monotonic() - began, 20, said)
        t.assertEqual(code, 1, said)
        t.assertIn('did you mean "lower-store"?', said)
    with subtest("The same mistakes are there for programs"):
        code, said = machine.execute("layered-stores check-config --json")
        t.assertEqual(code, 1, said)
        mistakes = json.loads(said)
        t.assertEqual(
            [(found["file"], found["line"], found["store"]) for found in mistakes],
            [(CONFIG, 1, "ci"), (CONFIG, 2, "ci")],
        )
        t.assertEqual(mistakes[0]["key"], "lower-store")
        t.assertIn(f'unknown key "{mistakes[1]["key"]}"', mistakes[1]["message"])
        t.assertIn('did you mean "lower-store"?', mistakes[1]["message"])
        code, said = machine.execute("layered-stores check-config --json /srv/missing.toml")
        t.assertEqual(code, 1, said)
        t.assertIn("there is no configuration", json.loads(said)[0]["message"])
    machine.succeed(f"sed -i 's/lower-stroe/lower-store/' {CONFIG}", "layered-stores list")

with subtest("A daemon whose unit is masked is told of, with the way out"):
    machine.succeed("systemctl mask --runtime --now layered-storesd")
    for command in ("layered-stores list", "runuser -u alice -- layered-stores list"):
        began = time.monotonic()
        said = machine.fail(f"{command} 2>&1")
        t.assertLess(time.monotonic() - began, 20, said)
        t.assertIn("`systemctl unmask --runtime layered-storesd`", said)
    machine.succeed("systemctl unmask --runtime layered-storesd", "layered-stores list")

with subtest("A lower store that Nix has not made yet says what makes it, and that does"):
    page = (paths.REPOSITORY / "docs/getting-started-debian.md").read_text()
    [by_hand] = re.findall(r"make\s+`/nix/store` with `([^`]*)`", page)
    for url in ("daemon", "local"):
        machine.succeed(
            "layered-stores stop ci",
            "systemctl stop nix-daemon.socket nix-daemon.service",
            f"mv /nix /nix.before-{url}",
            f"printf '[stores.ci]\\nlower-store = \"{url}\"\\n' > {CONFIG}",
        )
        machine.execute("layered-stores reload")
        code, said = machine.execute("layered-stores start ci 2>&1")
        t.assertEqual(code, 3, said)
        # Broken between words, as on a terminal.
        advice = re.search(r"/nix/store is not there, .* run `(nix [^`]*)`", " ".join(said.split()))
        assert advice is not None, said
        if url == "daemon":
            # As after an installation.
            machine.succeed("systemd-tmpfiles --create", "systemctl start nix-daemon.socket")
        for command in (advice[1], by_hand) if url == "local" else (advice[1],):
            machine.succeed("rm -rf /nix/store")
            said = reader.run("root", command)
            t.assertEqual(reader.code, 0, said)
            machine.succeed("layered-stores start ci", "layered-stores status ci")
            machine.succeed("layered-stores stop ci")

with subtest("Uninstalled while a store's Nix daemon listens, nothing is left that runs"):
    machine.succeed(
        # What the page has its reader write.
        "rm -r /etc/systemd/system/layered-stores-nix-daemon@ci.service.d",
        "rm -r /etc/systemd/system/layered-stores-gc@ci.service.d",
        f"printf '[stores.ci]\\nlower-store = \"local\"\\n[stores.ci.daemon]\\n' > {CONFIG}",
        "layered-stores reload",
        "layered-stores start ci",
    )
    merged = "/var/lib/layered-stores/stores/ci/root/nix/store"
    nix_daemon = "layered-stores-nix-daemon@ci"
    machine.succeed(
        "nix store info --store unix:///run/layered-stores/ci/daemon.sock",
        f"systemctl is-active {nix_daemon}.socket {nix_daemon}.service",
    )
    machine.succeed(f"make -C {SOURCE} uninstall 2>&1")
    machine.fail("pgrep -x layered-storesd")
    for unit in (f"{nix_daemon}.socket", f"{nix_daemon}.service", "layered-storesd.service"):
        machine.fail(f"systemctl is-active {unit}")
    machine.fail("test -e /run/layered-stores/ci/daemon.sock")
    t.assertEqual(installed(), [])
    machine.succeed(f"mountpoint --quiet {merged}", f"umount {merged}")
