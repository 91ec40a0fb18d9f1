"""Test machines: a booted Debian for a scenario, with the NixOS test driver's methods."""

from .boot import boot
from .errors import MachineError, PreconditionError, RequestedAssertionFailed
from .log import Log
from .machine import Machine

__all__ = [
    "Log",
    "Machine",
    "MachineError",
    "PreconditionError",
    "RequestedAssertionFailed",
    "boot",
]
