"""What can go wrong, told apart by who has to act."""


class PreconditionError(Exception):
    """This computer lacks something. The message names it and the way out."""


class MachineError(Exception):
    """The machine itself misbehaves: it does not boot, or is gone."""


class RequestedAssertionFailed(AssertionError):
    """An expectation of the scenario did not hold."""

    def __init__(self, message: str, unit: str | None = None) -> None:
        super().__init__(message)
        self.unit = unit
        """The unit whose journal tells more, if there is one."""


class Skipped(Exception):
    """A scenario has nothing to do here. The message says why, and what would change that."""
