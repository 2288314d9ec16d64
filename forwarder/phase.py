"""What an instance is up to."""

import enum


class Phase(enum.Enum):
    """What the instance is up to; the value is its state word in `status`."""

    STARTING = "starting"
    SERVING = "up"
    DRAINING = "draining"
    QUITTING = "down"

    @property
    def ends(self) -> bool:
        """Whether nothing new begins any more."""
        return self in (Phase.DRAINING, Phase.QUITTING)
