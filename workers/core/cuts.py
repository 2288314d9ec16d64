"""Buffers that runs of datagrams pass through, each with the memoryviews that cut it into equal pieces.

A slice costs 40 ns and a datagram needs five of them, so they are made once per size and kept as long as the buffer.
A buffer belongs to one worker and serves all its ports. Views of at most `CACHED` pieces are kept; one more drops all.
"""

from workers.core.heads import HEAD_BYTES
from workers.core.inner import PREFIX_BYTES

ROOM = 64
"""Bytes in front of the first datagram of a `Datagrams` unless said otherwise."""

WORD_BYTES = 8
CACHED = 4096
"""Two or three views of 200 bytes each: below 3 MB a buffer."""

Columns = tuple[list[memoryview], ...]


class _Cuts:
    """Columns of views over `view`, one row per piece, by (start, size)."""

    __slots__ = ("_columns", "_rows", "view")

    def __init__(self, buffer: bytearray | memoryview) -> None:
        """`buffer`: contiguous and writable. It cannot be resized as long as this lives."""
        self.view = memoryview(buffer).cast("B")
        self._columns: dict[tuple[int, int], Columns] = {}
        self._rows = 0

    def columns(self, start: int, size: int, count: int) -> Columns:
        """The views of at least `count` pieces of `size` bytes, the first one at `start`. Not to be kept."""
        columns = self._columns.get((start, size))
        if columns is not None and len(columns[0]) >= count:
            return columns
        if self._rows + count > CACHED:
            self._columns.clear()
            self._rows = 0
            columns = None
        if columns is None:
            columns = self._columns[start, size] = tuple([] for _ in self._cut(start, size, 0))
        held = len(columns[0])
        for index in range(held, count):
            for column, view in zip(columns, self._cut(start, size, index), strict=True):
                column.append(view)
        self._rows += count - held
        return columns

    def _cut(self, start: int, size: int, index: int) -> tuple[memoryview, ...]:
        raise NotImplementedError


class Datagrams(_Cuts):
    """Datagrams to seal: back to back from `room` on, or in slots of `stride` bytes, each behind `room` bytes.

    Sealing writes into the 8 bytes in front of each: into the room, or over the end of a datagram that is sealed
    already. So a run can be sealed once.
    """

    __slots__ = ("room", "stride")

    def __init__(self, buffer: bytearray | memoryview, room: int = ROOM, stride: int = 0) -> None:
        """`stride`: from one slot to the next; 0 if there are none."""
        assert room >= WORD_BYTES
        super().__init__(buffer)
        self.room = room
        self.stride = stride

    def position(self, size: int, index: int) -> int:
        """Where datagram `index` of a run of datagrams of `size` bytes begins."""
        return self.room + index * (self.stride or size)

    def _cut(self, start: int, size: int, index: int) -> tuple[memoryview, ...]:
        """The 8 bytes in front of the datagram as one word, and the datagram with room for its prefix."""
        position = self.position(size, index)
        word = self.view[position - WORD_BYTES : position].cast("Q")
        return word, self.view[position - PREFIX_BYTES : position + size]


class Records(_Cuts):
    """Records back to back, on their way out or in. `size`: of a whole record."""

    __slots__ = ()

    def _cut(self, start: int, size: int, index: int) -> tuple[memoryview, ...]:
        """Length and counter; ciphertext and tag."""
        position = start + index * size
        end = position + size
        return self.view[position : position + HEAD_BYTES], self.view[position + HEAD_BYTES : end]


class Inners(_Cuts):
    """What comes out of records, before it is sorted. `size`: of the inner, prefix included."""

    __slots__ = ()

    def __init__(self, size: int = 1 << 17) -> None:
        super().__init__(bytearray(size))

    def _cut(self, start: int, size: int, index: int) -> tuple[memoryview, ...]:
        """The whole of it, its prefix, its payload."""
        inner = self.view[start + index * size : start + (index + 1) * size]
        return inner, inner[:PREFIX_BYTES], inner[PREFIX_BYTES:]
