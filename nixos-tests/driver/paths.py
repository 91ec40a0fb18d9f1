"""Where things are, on the host."""

from pathlib import Path

DRIVER = Path(__file__).resolve().parent
SCENARIOS = DRIVER.parent
REPOSITORY = SCENARIOS.parent
STATE = REPOSITORY / "target" / "machine"
LOGS = STATE / "logs"
