"""Where things are, on the host."""

from pathlib import Path

DRIVER = Path(__file__).resolve().parent
SCENARIOS = DRIVER.parent
# What a Debian needs beforehand, where a configuration is not enough for a scenario.
PREPARATIONS = SCENARIOS / "debian"
REPOSITORY = SCENARIOS.parent
STATE = REPOSITORY / "target" / "machine"
LOGS = STATE / "logs"
