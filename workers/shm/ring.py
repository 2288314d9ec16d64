"""The two ends of a descriptor ring (layout.py draws it): single producer, single consumer, no shared position.

1. push     the producer writes descriptors into entries that it holds;
2. flush    it adds their number to the eventfd `published`;
3. take     the consumer reads that number, copies so many descriptors out,
4.          and adds their number to the eventfd `freed`, once it is a quarter of the ring: push looks there only when
            it has no space left, and then finds all of what was taken but less than a quarter of the ring.

Memory ordering, with the partners by name. eventfd_write and eventfd_read (fs/eventfd.c) change the count under one
spinlock: unlocking releases what the writer did before, locking acquires it for the reader who sees that count.
  A. `eventfd_write(published)` in flush pairs with `eventfd_read(published)` in take: the descriptors stored before A
     are complete when the consumer reads them. A producer that dies before A has published nothing.
  B. `eventfd_write(freed)` in take pairs with `eventfd_read(freed)` in push: the consumer's loads before B are over
     when the producer overwrites the entries. A consumer that dies before B has freed nothing.
"""

import mmap
from os import eventfd_read, eventfd_write
from typing import Final

from workers.boot import RingFds
from workers.shm.layout import DESCRIPTOR, RING_CAPACITY, Descriptor

# Bursts of 16 are where an eventfd write and read (0.8 µs) cost less than 0.1 µs a descriptor.
FLUSH_EVERY: Final = 16

_SIZE: Final = DESCRIPTOR.size
_pack_into = DESCRIPTOR.pack_into
_iter_unpack = DESCRIPTOR.iter_unpack


class RingCorrupt(ValueError):
    """The other side counted more entries than there can be: this ring is of no more use, and that worker is broken."""


class RingProducer:
    """The writing end. The file descriptors stay the caller's, who closes them after this."""

    __slots__ = ("_at", "_capacity", "_end", "_freed", "_map", "_pending", "_published", "_space")

    def __init__(self, fds: RingFds, capacity: int = RING_CAPACITY) -> None:
        self._map = mmap.mmap(fds.memory, capacity * _SIZE)
        self._published = fds.published
        self._freed = fds.freed
        self._capacity = capacity
        self._end = capacity * _SIZE
        self._at = 0
        self._space = capacity
        self._pending = 0

    def push(
        self,
        kind: int,
        flags: int,
        tunnel: int,
        slot: int,
        session: int,
        flow: int,
        offset: int,
        length: int,
        carrier: int,
        value: int,
        value2: int,
    ) -> bool:
        """Write one descriptor, to be seen after the next flush; every 16th flushes. False: full, nothing written.

        Raises struct.error for a field out of range, which is a bug here, and RingCorrupt.
        """
        if not self._space and not self._claim():
            return False
        at = self._at
        _pack_into(self._map, at, kind, flags, tunnel, slot, session, flow, offset, length, carrier, value, value2)
        at += _SIZE
        self._at = at if at != self._end else 0
        self._space -= 1
        self._pending += 1
        if self._pending == FLUSH_EVERY:
            self.flush()
        return True

    def flush(self) -> None:
        """Publish what was pushed. Raises RingCorrupt if the eventfd was filled to its limit by somebody else."""
        pending = self._pending
        if pending:
            _add(self._published, pending)  # A
            self._pending = 0

    @property
    def pending(self) -> int:
        """Descriptors pushed and not yet published."""
        return self._pending

    @property
    def space(self) -> int:
        """Descriptors that can surely be pushed; at 0, push asks what the consumer has freed."""
        return self._space

    def close(self) -> None:
        """Unmap; what is pending is dropped."""
        self._map.close()

    def _claim(self) -> bool:
        """Take over freed entries. A full ring with pending descriptors is flushed, or nobody would ever free any."""
        freed = _take_count(self._freed)  # B
        if freed > self._capacity - self._space - self._pending:
            raise RingCorrupt(f"ring entries freed that were never published: count={freed}")
        self._space += freed
        if not self._space:
            self.flush()
        return self._space > 0


class RingConsumer:
    """The reading end; wait until `fileno()` is readable, or while `more`, then take."""

    __slots__ = (
        "_at",
        "_capacity",
        "_end",
        "_freed",
        "_map",
        "_memory",
        "_published",
        "_ready",
        "_taken",
        "_worth_freeing",
    )

    def __init__(self, fds: RingFds, capacity: int = RING_CAPACITY) -> None:
        self._map = mmap.mmap(fds.memory, capacity * _SIZE, prot=mmap.PROT_READ)
        self._memory = memoryview(self._map)
        self._published = fds.published
        self._freed = fds.freed
        self._capacity = capacity
        self._end = capacity * _SIZE
        self._at = 0
        self._ready = 0
        self._taken = 0
        self._worth_freeing = max(capacity // 4, 1)

    def fileno(self) -> int:
        """The eventfd `published`: readable when there are new descriptors."""
        return self._published

    @property
    def more(self) -> bool:
        """A limit left noticed descriptors behind; `fileno()` does not become readable for these."""
        return self._ready > 0

    def take(self, limit: int = RING_CAPACITY) -> list[Descriptor]:
        """Up to `limit` descriptors in the order pushed; [] if there are none. Their entries are free now or soon.

        The tuples are copies: a peer cannot change them any more, but it chose every value in them. Raises RingCorrupt.
        """
        if self._ready < limit:
            self._ready += _take_count(self._published)  # A
            if self._ready + self._taken > self._capacity:
                raise RingCorrupt(f"more ring entries published than exist: count={self._ready}")
        count = min(self._ready, limit)
        if not count:
            return []
        end = self._at + count * _SIZE
        if end < self._end:
            taken: list[Descriptor] = list(_iter_unpack(self._memory[self._at : end]))
        else:
            taken = list(_iter_unpack(self._memory[self._at :]))
            end -= self._end
            if end:
                taken += _iter_unpack(self._memory[:end])
        self._at = end
        self._ready -= count
        self._taken += count
        if self._taken >= self._worth_freeing:
            _add(self._freed, self._taken)  # B
            self._taken = 0
        return taken

    def close(self) -> None:
        """Unmap; what was not taken is dropped."""
        self._memory.release()
        self._map.close()


def _take_count(eventfd: int) -> int:
    try:
        return eventfd_read(eventfd)
    except BlockingIOError:
        return 0


def _add(eventfd: int, count: int) -> None:
    try:
        eventfd_write(eventfd, count)
    except BlockingIOError:
        raise RingCorrupt("ring eventfd is at its limit") from None
