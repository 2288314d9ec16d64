"""The reorder buffer: pieces of a stream by offset, handed out in order, each exactly once.

Invariants: `ranges` is sorted, its ranges are disjoint, do not touch, and none lies below `next_offset`; `pieces` holds
exactly the pieces that the ranges cover. A piece arrives whole or is a duplicate: frames are never re-cut, so a partial
overlap can only be a broken or hostile peer.
"""

from bisect import bisect_right
from typing import Generic, TypeVar

from workers.core.errors import RemoteProtocolError

Piece = TypeVar("Piece")


class ReorderBuffer(Generic[Piece]):
    """Pieces with a length of at least 1. Bounded by the credit that the owner grants, not by itself."""

    __slots__ = ("_starts", "next_offset", "pieces", "ranges")

    def __init__(self) -> None:
        self.next_offset = 0
        self.pieces: dict[int, tuple[int, Piece]] = {}
        self.ranges: list[list[int]] = []
        self._starts: list[int] = []

    def __contains__(self, offset: int) -> bool:
        """Whether a piece that starts at `offset` was received."""
        return offset < self.next_offset or offset in self.pieces

    def insert(self, offset: int, length: int, piece: Piece) -> bool:
        """Take a piece; False if it was received before. Raises RemoteProtocolError on a partial overlap."""
        end = offset + length
        if offset < self.next_offset:
            if end > self.next_offset:
                raise RemoteProtocolError(f"bytes {offset}-{end} partly received up to {self.next_offset}")
            return False
        known = self.pieces.get(offset)
        if known is not None:
            if known[0] != length:
                raise RemoteProtocolError(f"bytes {offset}-{end} received with length {known[0]} before")
            return False
        self._note_range(offset, end)
        self.pieces[offset] = (length, piece)
        return True

    def _note_range(self, offset: int, end: int) -> None:
        starts, ranges = self._starts, self.ranges
        place = bisect_right(starts, offset)
        before = ranges[place - 1] if place else None
        after = ranges[place] if place < len(ranges) else None
        if (before is not None and before[1] > offset) or (after is not None and after[0] < end):
            raise RemoteProtocolError(f"bytes {offset}-{end} overlap what was received")
        joins_before = before is not None and before[1] == offset
        joins_after = after is not None and after[0] == end
        if joins_before and joins_after:
            assert before is not None and after is not None
            before[1] = after[1]
            del ranges[place], starts[place]
        elif joins_before:
            assert before is not None
            before[1] = end
        elif joins_after:
            assert after is not None
            after[0] = starts[place] = offset
        else:
            ranges.insert(place, [offset, end])
            starts.insert(place, offset)

    def take(self) -> tuple[int, Piece] | None:
        """The piece at `next_offset` as (length, piece), or None where the next byte is missing."""
        entry = self.pieces.pop(self.next_offset, None)
        if entry is None:
            return None
        self.next_offset += entry[0]
        ranges = self.ranges
        if ranges[0][1] == self.next_offset:
            del ranges[0], self._starts[0]
        else:
            ranges[0][0] = self._starts[0] = self.next_offset
        return entry

    def received(self, most: int) -> tuple[int, tuple[tuple[int, int], ...]]:
        """The first offset not received, and at most `most` ranges received above it, lowest first."""
        ranges = self.ranges
        edge = self.next_offset
        first = 0
        if ranges and ranges[0][0] == edge:
            edge, first = ranges[0][1], 1
        return edge, tuple((start, end) for start, end in ranges[first : first + most])

    def clear(self) -> list[Piece]:
        """Empty the buffer; returns what it held."""
        held = [piece for _, piece in self.pieces.values()]
        self.pieces.clear()
        self.ranges.clear()
        self._starts.clear()
        return held
