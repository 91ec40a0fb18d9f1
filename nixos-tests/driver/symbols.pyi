"""What scenarios find defined, as types. `scenario.py` gives the values."""

from contextlib import AbstractContextManager
from unittest import TestCase

from .errors import Skipped as Skipped
from .log import Log
from .machine import Machine
from .polling import retry as retry

machine: Machine
log: Log
t: TestCase

def start_all() -> None: ...
def join_all() -> None: ...
def subtest(name: str) -> AbstractContextManager[None]: ...
