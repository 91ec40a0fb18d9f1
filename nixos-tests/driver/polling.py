"""Waiting for something to become true."""

import time
from collections.abc import Callable

from .errors import RequestedAssertionFailed

FIRST_PAUSE = 0.05
LONGEST_PAUSE = 1.0


def retry(fn: Callable[[bool], bool], timeout_seconds: float = 900) -> None:
    """Calls `fn` until it returns true, at growing intervals.

    `fn` is told whether this is its last chance, as in the NixOS driver.
    """
    started = time.monotonic()
    pause = FIRST_PAUSE
    while time.monotonic() - started < timeout_seconds:
        if fn(False):
            return
        time.sleep(pause)
        pause = min(pause * 1.3, LONGEST_PAUSE)
    if not fn(True):
        elapsed = time.monotonic() - started
        raise RequestedAssertionFailed(
            f"timed out after {elapsed:.1f} seconds (timeout {timeout_seconds:g})"
        )
