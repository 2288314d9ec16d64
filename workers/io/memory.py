"""A worker's memory: its arena, the staging buffers that all its carriers share, and what its pieces point to.

A `Piece` is payload in a slot, of this worker's arena or of another's. Whoever holds it frees it once.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from workers.core.frame import HEADER_BYTES
from workers.core.record import OVERHEAD
from workers.shm.arena import Arena, Side

if TYPE_CHECKING:
    from workers.io.mesh import Peer

SCRATCH_BYTES = 1024
"""Records up to this size are opened into a buffer on the side: most are control frames and need no slot."""
INBOUND_BYTES = 1 << 20
OUTBOUND_BYTES = (1 << 20) + 4096
PARTIAL_BYTES = 64 << 20
"""What all stripes together may hold of records that are half received. More stays in the kernel until it is whole."""
FLUSH_BYTES = 64 << 10
"""Staged records leave when there are so many bytes, and at the end of a turn."""

PARTIAL_LARGE, PARTIALS_KEPT = 64 << 10, 16
"""Memory for records of at least that size is used again, of so many: a new one would have to be zeroed."""


class Piece:
    """Payload of `length` bytes in `slot` of `origin` (None: this worker's arena). `view`: what is left to deliver."""

    __slots__ = ("length", "origin", "slot", "view")

    def __init__(self, origin: "Peer | None", slot: int, view: memoryview) -> None:
        self.origin = origin
        self.slot = slot
        self.view = view
        self.length = len(view)


class Memory:
    """The arena and the staging buffers. `on_room` is called when egress slots come back after `starved` was set."""

    def __init__(self, arena: Arena, frame_max_bytes: int) -> None:
        self.arena = arena
        self.inbound = memoryview(bytearray(INBOUND_BYTES))
        self.outbound = memoryview(bytearray(max(OUTBOUND_BYTES, frame_max_bytes + HEADER_BYTES + OVERHEAD)))
        self.scratch = memoryview(bytearray(SCRATCH_BYTES))
        self.spare = memoryview(bytearray(frame_max_bytes + HEADER_BYTES))
        self.partial_left = PARTIAL_BYTES
        self._partial_max = frame_max_bytes + HEADER_BYTES + OVERHEAD
        self._partials: list[bytearray] = []
        self.dropped_frames = 0
        self.starved = False
        self.on_room: Callable[[], None] | None = None

    def release(self, slot: int) -> None:
        """A slot of ours is not needed any more."""
        self.arena.release(slot)
        if self.starved and self.on_room is not None:
            self.starved = False
            self.on_room()

    def give_back(self, slot: int, borrower: int) -> bool:
        """A worker returns a slot of ours; False if it has not borrowed it."""
        if not self.arena.give_back(slot, borrower):
            return False
        if self.starved and self.on_room is not None:
            self.starved = False
            self.on_room()
        return True

    def free(self, piece: Piece) -> None:
        """The payload was used or dropped."""
        piece.view.release()
        if piece.origin is None:
            self.arena.release(piece.slot)
        else:
            piece.origin.return_slot(piece.slot)

    def take_partial(self, length: int) -> memoryview:
        """Memory for a record of which `length` bytes are to come; give it back."""
        if length < PARTIAL_LARGE:
            partial = bytearray(length)
        else:
            partial = self._partials.pop() if self._partials else bytearray(self._partial_max)
        self.partial_left -= len(partial)
        return memoryview(partial)[:length]

    def give_back_partial(self, partial: memoryview) -> None:
        """The record is opened, or will never be complete."""
        whole = partial.obj
        assert isinstance(whole, bytearray)
        partial.release()
        self.partial_left += len(whole)
        if len(whole) == self._partial_max and len(self._partials) < PARTIALS_KEPT:
            self._partials.append(whole)

    def copy_in(self, data: bytes | memoryview, side: Side) -> int:
        """A new slot that starts with `data`; -1 if there is none."""
        slot = self.arena.allocate(len(data), side)
        if slot >= 0:
            self.arena.view(slot)[: len(data)] = data
        return slot
