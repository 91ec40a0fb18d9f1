"""Tests of the test machine: what scenarios rely on, tried for real."""

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import unittest
from contextlib import ExitStack
from pathlib import Path

from . import paths
from .boot import boot
from .cgroup import PREFIX, hierarchy
from .errors import MachineError, RequestedAssertionFailed
from .host import check_preconditions
from .image import base_image
from .machine import Machine
from .qemu import DISK_SERVER, RUN
from .scenario import Outcome, Scenario

SUITE = "trixie"


def selftest(suite: str) -> bool:
    """Whether the test machine of a suite is what scenarios expect."""
    global SUITE
    SUITE = suite
    check_preconditions()
    base_image(suite)
    tests = unittest.defaultTestLoader.loadTestsFromModule(sys.modules[__name__])
    return unittest.TextTestRunner(verbosity=2).run(tests).wasSuccessful()


def leftovers(driver: int) -> list[str]:
    """What is left on the host of the machines of a driver process."""
    found = []
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            backing = file.read_text()
        except OSError:  # detached just now
            continue
        if f"/.run-{driver}-" in backing:
            found.append(f"{file.parent.parent.name} on {backing.strip()}")
    found += [str(path) for path in paths.STATE.glob(f".run-{driver}-*")]
    for directory in hierarchy().glob(f"{PREFIX}{driver}-*"):
        for file in directory.glob("**/cgroup.procs"):
            found += [f"process {pid}" for pid in file.read_text().split()]
    return found


class OneMachine(unittest.TestCase):
    """What holds for a single machine that stays up."""

    machine: Machine
    stack: ExitStack

    @classmethod
    def setUpClass(cls) -> None:
        cls.stack = ExitStack()
        cls.machine = cls.stack.enter_context(boot(SUITE, False, name="selftest"))
        started = time.monotonic()
        cls.machine.connect()
        print(f"booted in {time.monotonic() - started:.2f} s", file=sys.stderr)
        versions = "systemctl --version | head -n1; nix --version; mount --version; uname -r"
        print(cls.machine.succeed(versions), end="", file=sys.stderr)

    @classmethod
    def tearDownClass(cls) -> None:
        cls.stack.close()

    def test_succeed_returns_stdout_only(self) -> None:
        self.assertEqual(self.machine.succeed("echo a; echo b >&2", "echo c"), "a\nc\n")

    def test_a_failure_shows_command_code_and_output(self) -> None:
        with self.assertRaises(RequestedAssertionFailed) as caught:
            self.machine.succeed("echo out; echo err >&2; exit 7")
        for part in ("exit 7", "exit code 7", "out", "err"):
            self.assertIn(part, str(caught.exception))

    def test_any_failing_part_fails_the_command(self) -> None:
        self.machine.fail("false; true", "false | true", 'echo "$unset_variable"')
        with self.assertRaises(RequestedAssertionFailed):
            self.machine.fail("true")

    def test_execute_reports_codes_and_timeouts(self) -> None:
        self.assertEqual(self.machine.execute("echo x; exit 3"), (3, "x\n"))
        self.assertEqual(self.machine.execute("echo x; exit 3", check_return=False), (-1, "x\n"))
        self.assertEqual(self.machine.execute("sleep 30", timeout=1)[0], 124)

    def test_a_detached_process_does_not_hold_a_command_up(self) -> None:
        started = time.monotonic()
        self.machine.succeed("sleep 1000 >/dev/null & echo started")
        self.assertLess(time.monotonic() - started, 2)

    def test_a_command_that_is_stopped_goes_on(self) -> None:
        # As all are on the way into a soft reboot.
        self.assertEqual(self.machine.execute("kill -STOP $PPID; echo on", timeout=60), (0, "on\n"))

    def test_commands_are_inside_and_clean(self) -> None:
        m = self.machine
        self.assertEqual(m.succeed("hostname; pwd; echo $HOME"), "machine\n/tmp\n/root\n")
        # The shell has 0 to 2, and ls opens the directory as 3.
        self.assertEqual(m.succeed("ls /proc/self/fd").split(), ["0", "1", "2", "3"])
        self.assertIn("0::/driver", m.succeed("cat /proc/self/cgroup"))
        self.assertEqual(m.succeed("cat /proc/1/comm"), "systemd\n")
        os.environ["LEAK"] = "1"
        self.addCleanup(os.environ.pop, "LEAK")
        m.fail("printenv LEAK")

    def test_nothing_has_failed_at_boot(self) -> None:
        self.assertEqual(self.machine.succeed("systemctl is-system-running --wait"), "running\n")

    def test_wait_for_unit(self) -> None:
        m = self.machine
        m.succeed("systemd-run --unit=slow --service-type=oneshot -r --no-block sleep 0.5")
        m.wait_for_unit("slow.service")
        m.require_unit_state("slow.service")
        m.execute("systemd-run --unit=broken --service-type=oneshot sh -c 'echo oops; exit 1'")
        started = time.monotonic()
        with self.assertRaisesRegex(RequestedAssertionFailed, "broken.service.*exit-code"):
            m.wait_for_unit("broken.service")
        with self.assertRaisesRegex(RequestedAssertionFailed, "no pending jobs"):
            m.wait_for_unit("no-such.service")
        self.assertLess(time.monotonic() - started, 5)
        self.assertIn("oops", m.succeed("journalctl -u broken"))
        m.succeed("systemctl reset-failed")

    def test_waiting_ends(self) -> None:
        m = self.machine
        m.succeed("(sleep 0.3; touch /tmp/late) >/dev/null 2>&1 &")
        m.wait_for_file("/tmp/late", timeout=10)
        self.assertEqual(m.wait_until_succeeds("ls /tmp/late"), "/tmp/late\n")
        m.succeed("(sleep 0.3; rm /tmp/late) >/dev/null 2>&1 &")
        m.wait_until_fails("test -e /tmp/late", timeout=10)
        m.wait_for_open_unix_socket("/run/dbus/system_bus_socket", timeout=5)
        with self.assertRaisesRegex(RequestedAssertionFailed, "timed out.*\n?.*last exit code 5"):
            m.wait_until_succeeds("exit 5", timeout=1)

    def test_overlays_mount_on_a_filesystem_of_its_own(self) -> None:
        m = self.machine
        self.assertEqual(m.succeed("stat -f -c %T /").strip(), "ext2/ext3")
        m.succeed(
            "mkdir -p /t/lower /t/upper /t/work /t/merged; echo below >/t/lower/file",
            "chattr +i /t/merged",
        )
        m.fail("touch /t/merged/x")
        options = "lowerdir=/t/lower,upperdir=/t/upper,workdir=/t/work"
        m.succeed(f"mount -t overlay -o {options} overlay /t/merged")
        m.succeed("grep -q below /t/merged/file", "umount /t/merged")
        # The same as systemd does it.
        unit = f"[Mount]\nWhat=overlay\nType=overlay\nWhere=/t/merged\nOptions={options}\n"
        m.succeed(f"printf '{unit}' >/run/systemd/system/t-merged.mount; systemctl daemon-reload")
        m.succeed("systemctl start t-merged.mount", "rm /t/merged/file", "test -c /t/upper/file")
        m.succeed("setfattr -n trusted.test -v 1 /t/upper", "systemctl stop t-merged.mount")

    def test_a_new_mount_api_call_is_let_through_to_services(self) -> None:
        # mount(8) of util-linux uses fsopen(2) and fsmount(2).
        traced = self.machine.succeed(
            "systemd-run --pipe --wait -q strace -f -e trace=fsopen,fsmount "
            "mount -t tmpfs none /mnt 2>&1",
        )
        self.assertIn("fsmount", traced)
        self.assertNotIn("EPERM", traced)

    def test_nix_builds_offline(self) -> None:
        m = self.machine
        m.succeed("echo hello >/tmp/hello")
        path = m.succeed("nix-store --add /tmp/hello").strip()
        self.assertRegex(path, "^/nix/store/[a-z0-9]{32}-hello$")
        expression = (
            'derivation { name = "built"; system = builtins.currentSystem; builder = "/bin/sh"; '
            'args = [ "-c" "echo built > $out" ]; }'
        )
        built = m.succeed(f"nix-build --no-out-link -E '{expression}'").strip()
        self.assertEqual(m.succeed(f"cat {built}"), "built\n")
        # Not through `grep -q`: it may end before all is written, which fails the writer.
        self.assertIn("local-overlay-store", m.succeed("nix show-config 2>/dev/null"))

    def test_dbus_and_polkit_answer(self) -> None:
        m = self.machine
        call = (
            "busctl call org.freedesktop.systemd1 /org/freedesktop/systemd1 "
            "org.freedesktop.systemd1.Manager"
        )
        m.succeed(f"{call} ListJobs", f"runuser -u alice -- {call} ListJobs", f"{call} Reload")
        m.fail(f"runuser -u bob -- {call} Reload")
        m.succeed("systemctl is-active polkit")
        status, _ = m.execute(
            "pkcheck --action-id org.freedesktop.systemd1.reload-daemon --process $$"
        )
        self.assertEqual(status, 0)

    def test_files_go_in_and_out(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            source = Path(name, "some dir")
            source.mkdir()
            (source / "script").write_text("#!/bin/sh\necho ran\n")
            (source / "script").chmod(0o755)
            self.machine.copy_from_host(str(source), "/srv/deep/copy")
            self.machine.copy_from_host(str(source / "script"), "/srv/script")
            self.assertEqual(
                self.machine.succeed("/srv/deep/copy/script; /srv/script"), "ran\n" * 2
            )
            self.machine.out_dir = Path(name)
            self.machine.copy_from_machine("/srv/deep", "out")
            self.assertTrue((Path(name) / "out/deep/copy/script").exists())

    def test_a_command_takes_a_few_milliseconds(self) -> None:
        started = time.monotonic()
        for _ in range(20):
            self.machine.execute("true")
        each = (time.monotonic() - started) / 20
        print(f"{each * 1000:.1f} ms each … ", end="", file=sys.stderr)
        self.assertLess(each, 0.2)


class LifeAndDeath(unittest.TestCase):
    """Reboots, power cuts, and what is left on the host."""

    def test_what_lasts(self) -> None:
        with boot(SUITE, False, name="selftest-life") as m:
            m.start(allow_reboot=True)
            m.succeed("touch /root/kept /run/volatile")
            first = m.succeed(
                "cat /proc/sys/kernel/random/boot_id; systemctl show -P InvocationID dbus"
            )
            m.reboot()
            m.succeed("test -e /root/kept; test ! -e /run/volatile")
            second = m.succeed(
                "cat /proc/sys/kernel/random/boot_id; systemctl show -P InvocationID dbus"
            )
            self.assertNotEqual(first, second)

            m.succeed("echo synced >/root/synced; chattr +i /root/synced; sync /root/synced; sync")
            m.succeed("mkdir -p /m/l /m/u /m/w /m/m; sync", "echo lost >/root/unsynced")
            m.succeed("mount -t overlay -o lowerdir=/m/l,upperdir=/m/u,workdir=/m/w o /m/m")
            m.crash()
            self.assertFalse(m.booted)
            m.succeed("grep synced /root/synced", "! mountpoint -q /m/m")
            self.assertNotIn("lost", m.execute("cat /root/unsynced")[1])

            m.shutdown()
            self.assertFalse(m.booted)
            m.start()
            with self.assertRaises(MachineError):
                m.reboot()
            m.execute("systemctl poweroff")
            m.wait_for_shutdown()
            m.succeed("test -e /root/kept")
        self.assertEqual(leftovers(os.getpid()), [])

    def test_two_machines_do_not_meet(self) -> None:
        with boot(SUITE, False, name="selftest-a") as a, boot(SUITE, False, name="selftest-b") as b:
            a.start()
            b.start()
            for machine in (a, b):
                machine.succeed(f"hostname > /root/{machine.name}")
                machine.succeed("systemd-run --unit=same sleep 1000")
            a.fail("test -e /root/selftest-b")
            a.succeed("systemctl stop same")
            b.require_unit_state("same.service")
            a.crash()
            b.require_unit_state("same.service")
            b.succeed("systemctl daemon-reexec")
            a.succeed("test -e /tmp")
        self.assertEqual(leftovers(os.getpid()), [])

    def test_nothing_outlives_a_killed_driver(self) -> None:
        # What is started in the background by a shell ignores SIGINT, and so does what it starts.
        program = (
            "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"from driver import boot\nwith boot({SUITE!r}, False, name='selftest-killed') as m:\n"
            "    m.succeed('chattr +i /home')\n    print('up', flush=True)\n    m.sleep(1000)\n"
        )
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
            with self.subTest(signal=number.name):
                process = subprocess.Popen(
                    [sys.executable, "-c", program],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": str(paths.SCENARIOS)},
                )
                self.addCleanup(process.kill)
                assert process.stdout is not None
                with process.stdout:
                    self.assertEqual(process.stdout.readline(), b"up\n")
                self.assertTrue(leftovers(process.pid))
                process.send_signal(number)
                process.wait()
                deadline = time.monotonic() + 10
                while leftovers(process.pid) and time.monotonic() < deadline:
                    time.sleep(0.02)
                self.assertEqual(leftovers(process.pid), [])

    def test_a_scenario_that_fails_says_why(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            script = Path(name, "selftest-scenario.py")
            script.write_text(
                "start_all()\nwith subtest('works'):\n    machine.succeed('true')\n"
                "t.assertEqual(1, 1)\nretry(lambda last: True)\n"
            )
            self.assertIs(Scenario(script, SUITE, install=False).run(), Outcome.PASSED)
            with script.open("a") as more:
                more.write("with subtest('does not'):\n    machine.succeed('exit 9')\n")
            self.assertIs(Scenario(script, SUITE, install=False).run(), Outcome.FAILED)
        log = (paths.LOGS / "selftest-scenario.log").read_text()
        self.assertIn("selftest-scenario.py:7: machine.succeed('exit 9')", log)
        self.assertIn("exit code 9", log)


class Nbd:
    """The least of a client of a disk's server, by the protocol's doc/proto.md."""

    WRITE, FLUSH = 1, 3
    FUA = 1

    def __init__(self, path: Path) -> None:
        """Connects, and takes the only disk there is."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(20)
        self._socket.connect(str(path))
        [flags] = struct.unpack("!16xH", self._receive(18))
        no_zeroes = 2
        assert flags & no_zeroes
        option_export_name = 1
        self._socket.sendall(
            struct.pack("!I8sII", no_zeroes | 1, b"IHAVEOPT", option_export_name, 0)
        )
        self._receive(10)

    def _receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            more = self._socket.recv(length - len(data))
            assert more, "the server is gone"
            data += more
        return data

    def request(self, command: int, flags: int = 0, data: bytes = b"") -> None:
        """Has it done; writes go to the beginning of the disk."""
        self._socket.sendall(
            struct.pack("!IHHQQI", 0x25609513, flags, command, 0, 0, len(data)) + data
        )
        [error] = struct.unpack("!4xI8x", self._receive(16))
        assert error == 0, os.strerror(error)

    def close(self) -> None:
        """Hangs up."""
        self._socket.close()


@unittest.skipUnless(shutil.which("nbdkit"), "nbdkit is not installed: tools/setup kernels")
class DiskOfAKernel(unittest.TestCase):
    """The disk of a machine in qemu, whose server is killed."""

    def left(self, *requests: tuple[int, int, bytes]) -> bytes:
        """What the device holds after these requests and a power cut."""
        with tempfile.TemporaryDirectory() as name:
            device, listens = Path(name, "device"), Path(name, "disk")
            device.write_bytes(bytes(1 << 20))
            places = {"DEVICE": str(device), f"{RUN}/disk": str(listens)}
            with subprocess.Popen([places.get(word, word) for word in DISK_SERVER]) as server:
                try:
                    while not listens.exists():
                        self.assertIsNone(server.poll())
                        time.sleep(0.01)
                    client = Nbd(listens)
                    for command, flags, data in requests:
                        client.request(command, flags, data)
                finally:
                    server.kill()
            client.close()
            return device.read_bytes()[:4]

    def test_what_was_not_flushed_is_lost_and_nothing_else(self) -> None:
        old, new = (Nbd.WRITE, 0, b"old " * 1024), (Nbd.WRITE, 0, b"new " * 1024)
        flush = (Nbd.FLUSH, 0, b"")
        self.assertEqual(self.left(old), bytes(4))
        self.assertEqual(self.left(old, flush, new), b"old ")
        self.assertEqual(self.left(old, flush, new, flush), b"new ")
        self.assertEqual(self.left(old, (Nbd.WRITE, Nbd.FUA, b"new " * 1024)), b"new ")
