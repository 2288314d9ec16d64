"""Workers that were forked together and share the carriers out among themselves; one generation follows another.

A generation has consecutive slots. While the next one starts, both are in one mesh; when all of the next one are ready,
this one retires: its workers finish what they have and end, and nobody replaces them.
"""

import enum
from collections.abc import Collection
from dataclasses import dataclass

from forwarder.slots import Slot

SLOTS = 128
"""Slots that there are: two generations of the largest size."""


class Standing(enum.Enum):
    """SERVING: it is the one that counts. RETIRING: on its way out, whatever the reason."""

    STARTING = enum.auto()
    SERVING = enum.auto()
    RETIRING = enum.auto()


@dataclass(slots=True, eq=False)
class Generation:
    """`size` workers, whose slots start at `base`; of a retiring one `slots` are those that are still occupied.

    apart: of another version, whose memory no worker of this one can read: not in the mesh. kill_s: when it has to have
    ended, if it has a deadline.
    """

    base: int
    size: int
    slots: list[Slot]
    standing: Standing = Standing.STARTING
    apart: bool = False
    kill_s: float | None = None

    @property
    def ready(self) -> bool:
        return all(slot.ready for slot in self.slots)


def free_block(taken: Collection[int], size: int) -> int | None:
    """The lowest of so many free consecutive slots; None if there are none."""
    for base in range(SLOTS - size + 1):
        if not any(slot in taken for slot in range(base, base + size)):
            return base
    return None
