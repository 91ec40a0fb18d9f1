"""A machine for a while, for scenarios and for other Python programs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import paths
from .hardware import Hardware
from .host import check_preconditions
from .image import base_image
from .install import configure, install_project
from .kernel import kernel_files
from .log import Log
from .machine import Machine
from .nspawn import Nspawn
from .qemu import Qemu, check_qemu


@contextmanager
def boot(
    suite: str = "trixie",
    install: bool = True,
    configuration: Path | None = None,
    name: str = "machine",
    log: Log | None = None,
    kernel: str | None = None,
) -> Iterator[Machine]:
    """Makes a machine that starts at its first command and is gone at the end.

    With `configuration` the daemon starts at boot with it. Without `log` its log
    is target/machine/logs/NAME.log. With `kernel` it is a computer of its own in qemu.
    """
    check_preconditions()
    image = base_image(suite)
    own_log = log if log is not None else Log(paths.LOGS / f"{name}.log")
    try:
        with own_log.nested(f"making a machine from {image.name}"):
            hardware = _hardware(image, kernel, own_log)
        try:
            if install:
                with own_log.nested("installing the project"):
                    install_project(hardware)
            if configuration is not None:
                configure(hardware, configuration)
            yield Machine(name, hardware, own_log, paths.STATE / "out" / name)
        finally:
            hardware.close()
    finally:
        if log is None:
            own_log.close()


def _hardware(image: Path, kernel: str | None, log: Log) -> Hardware:
    if kernel is None:
        return Nspawn(image, log)
    check_qemu()
    return Qemu(image, kernel_files(kernel), log)
