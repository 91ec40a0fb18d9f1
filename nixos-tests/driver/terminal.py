"""Words for people: one short line at a time, coloured on terminals only."""

import os
import sys

GREEN = "32"
RED = "31"
DIM = "2"
BOLD = "1"


def paint(text: str, colour: str) -> str:
    """`text` in a colour, if somebody can see it."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"


def say(text: str) -> None:
    """A line to the terminal, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
