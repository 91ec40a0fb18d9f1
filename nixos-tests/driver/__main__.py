"""The command line of the test machines."""

import argparse
import os
import signal
import sys
import threading
from types import FrameType

from . import terminal
from .boot import boot
from .check import check
from .errors import MachineError, PreconditionError
from .host import check_preconditions
from .image import SUITES, base_image
from .kernel import KERNELS
from .runner import find_scenarios, run_scenarios
from .scenario import Scenario
from .selftest import selftest


def main() -> int:
    """The exit code: 0, 1 for a failure, 2 for wrong use, 130 when interrupted."""
    options = _parser().parse_args()
    # Both ways to be told to stop clean up in the same way.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run(options)
    except (PreconditionError, MachineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("interrupted", file=sys.stderr)
        return 130


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m driver", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    suite = argparse.ArgumentParser(add_help=False)
    suite.add_argument("--suite", choices=SUITES, default="trixie", help="the Debian to use")
    common = argparse.ArgumentParser(add_help=False, parents=[suite])
    common.add_argument("--kernel", choices=KERNELS, help="another kernel, in qemu")
    common.add_argument("--no-install", action="store_true", help="leave the project out")

    commands.add_parser("image", parents=[suite], help="build the base image if need be")
    run = commands.add_parser("run", parents=[common], help="run scenarios")
    run.add_argument("--jobs", type=int, metavar="N", help="at once; 2")
    run.add_argument("--verbose", action="store_true", help="show everything that is logged")
    run.add_argument("--timeout", type=int, default=2400, help="seconds a scenario may take")
    run.add_argument("names", nargs="*", metavar="NAME", help="scenarios; all when none is named")
    # What `run` starts for each scenario.
    one = commands.add_parser("scenario", parents=[common])
    one.add_argument("--verbose", action="store_true")
    one.add_argument("--timeout", type=int, default=2400)
    one.add_argument("name")
    shell = commands.add_parser("shell", parents=[common], help="a root shell in a machine")
    shell.add_argument("--scenario", metavar="NAME", help="with that scenario's stores")
    commands.add_parser("check", help="lint and type the driver and the scenarios")
    commands.add_parser("selftest", parents=[suite], help="test the test machine")
    return parser


def _run(options: argparse.Namespace) -> int:
    match options.command:
        case "image":
            check_preconditions()
            print(os.path.relpath(base_image(options.suite)))
            return 0
        case "run":
            scenarios = find_scenarios(options.names)
            passed_on = [f"--suite={options.suite}", f"--timeout={options.timeout}"]
            passed_on += [f"--kernel={options.kernel}"] * (options.kernel is not None)
            passed_on += ["--no-install"] * options.no_install + ["--verbose"] * options.verbose
            jobs = options.jobs or min(2, os.cpu_count() or 1)
            passed = run_scenarios(scenarios, options.suite, options.kernel, jobs, passed_on)
            return int(not passed)
        case "scenario":
            threading.Thread(target=_end_with_parent, daemon=True).start()
            [path] = find_scenarios([options.name])
            scenario = Scenario(
                *(path, options.suite, not options.no_install, options.verbose),
                *(options.timeout, options.kernel),
            )
            return int(scenario.run())
        case "shell":
            return _shell(options)
        case "check":
            return int(not check())
        case _:
            return int(not selftest(options.suite))


def _end_with_parent() -> None:
    """The parent holds the other end of stdin: its end is this process's end."""
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _shell(options: argparse.Namespace) -> int:
    configuration = None
    if options.scenario is not None:
        [path] = find_scenarios([options.scenario])
        configuration = Scenario(path).configuration
    with boot(
        *(options.suite, not options.no_install, configuration, "shell"), kernel=options.kernel
    ) as machine:
        machine.connect()
        terminal.say("A Debian of your own: it is gone when you leave this shell (exit, Ctrl-D).")
        return machine.interact(os.environ.get("TERM", "linux") if sys.stdin.isatty() else None)


if __name__ == "__main__":
    sys.exit(main())
