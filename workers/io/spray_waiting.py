"""What waits for the ports of a spray session: copies of datagrams, and pieces of some, in order and bounded."""

from collections import deque
from collections.abc import Iterator

from workers.core.cuts import Datagrams

WAITING_BYTES = 4 << 20
"""What may wait for the ports of a session: 60 ms at 500 Mbit/s. More is dropped and counted."""
COPIED_BYTES = 1 << 16
"""The most that is copied in one piece, unless one datagram is more: a slot of another worker takes it, and
`SprayBuffers.load`."""
PIECE = -1
"""In place of a size: what waits is an inner as it is."""

Entry = tuple[int, int, bytes]
"""(conversation, bytes of each datagram, datagrams back to back, of which the last may be shorter)."""


class Waiting:
    """The queue of one session."""

    __slots__ = ("_bytes", "_entries")

    def __init__(self) -> None:
        self._entries: deque[Entry] = deque()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, entry: Entry) -> bool:
        """Let it wait; False if there is no room."""
        if self._bytes + len(entry[2]) > WAITING_BYTES:
            return False
        self._entries.append(entry)
        self._bytes += len(entry[2])
        return True

    def take_all(self) -> deque[Entry]:
        """All that waits, the oldest first; nothing does afterwards."""
        entries, self._entries, self._bytes = self._entries, deque(), 0
        return entries


def datagrams_in(size: int, payload: bytes) -> int:
    """How many datagrams an entry holds."""
    return -(-len(payload) // size) if size > 0 and payload else 1


def copies_of(source: Datagrams, first: int, count: int, size: int, last: int) -> Iterator[tuple[int, bytes]]:
    """`count` datagrams of `size` bytes, the last of `last`, from wherever they stand, back to back and in parts of at
    most COPIED_BYTES: (how many, bytes)."""
    most, end = max(COPIED_BYTES // max(size, 1), 1), first + count
    while first < end:
        taken = min(end - first, most)
        starts = [source.position(size, index) for index in range(first, first + taken)]
        first += taken
        parts = [source.view[at : at + size] for at in starts]
        if first == end:
            parts[-1] = parts[-1][:last]
        yield taken, b"".join(parts)
