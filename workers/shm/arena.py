"""One worker's slots: the owner's `Arena` allocates, lends and reclaims; the others read through an `ArenaView`.

A slot's life: allocate -> (lend -> give_back)* -> release -> free, where the release may come before a give_back: the
slot is free when it is both released and not lent. Until then its class's bytes count against its side's quota.

Within quota an allocation never fails. Every class has a region with `ingress // size + egress // size` slots. A side
that holds n slots of a class has n * size <= quota, so n <= quota // size; if the quota allows one more, n + 1 <=
quota // size, and one slot of that region is not held by anybody. Regions are never split or joined, so no history of
allocations can fragment them. They cost address space only, eight times the quotas.

Memory is bounded by the quotas, not by the regions: `_resident` counts slots whose pages may exist. Before a slot
without pages is used, others that are free are punched out until `_resident` fits the sum of the quotas; there are
enough, because slots in use and the new one fit by the quota check.

Free slots of a class form a stack, last freed on top, with a MARK in it: what lies under the mark has not been used
since the mark was set. Taking a slot from under the mark sinks it, so only that path pays for knowing what is idle.
"""

import mmap
from collections import deque
from contextlib import suppress
from enum import IntEnum
from typing import Final

from workers.shm.layout import (
    CLASS_OF_PAGES,
    PAGE_BYTES,
    PAGE_SHIFT,
    SLOT_BYTES,
    SLOT_MAX_BYTES,
    SLOT_PAGES,
    region_slots,
)

# Punching out 1 MiB of written slots took 0.25 ms as 260 KiB slots and 1 ms as 4 KiB slots: what a turn can spare.
TRIM_BYTES: Final = 1 << 20

_MARK: Final = -1
_ROUND_UP: Final = PAGE_BYTES - 1
_SIZE_OF_CODE: Final = tuple(size for size in SLOT_BYTES for _ in range(2))


class Side(IntEnum):
    """Whose quota pays: bytes from carriers to applications, or from applications to carriers."""

    INGRESS = 0
    EGRESS = 1


def arena_size(ingress_bytes: int, egress_bytes: int) -> int:
    """How large the memfd of an arena with these quotas has to be: virtual and sparse, about eight times their sum."""
    return sum(count * size for count, size in zip(region_slots(ingress_bytes, egress_bytes), SLOT_BYTES, strict=True))


class Arena:
    """The owner's side of an arena. `fd` stays the caller's; the mapping keeps a duplicate.

    Raises ValueError if the memory is too small to hold every mixture of slots that the quotas allow.
    """

    __slots__ = (
        "_borrowed",
        "_budget",
        "_free",
        "_free_of_code",
        "_fresh",
        "_holes",
        "_idle_s",
        "_left",
        "_lent",
        "_live",
        "_map",
        "_marked_at",
        "_parting",
        "_quota",
        "_resident",
        "_views",
        "_whole",
    )

    def __init__(self, fd: int, size_bytes: int, ingress_bytes: int, egress_bytes: int, idle_s: float = 10.0) -> None:
        needed = arena_size(ingress_bytes, egress_bytes)
        if min(ingress_bytes, egress_bytes) < 0 or not 0 < needed <= size_bytes:
            raise ValueError(f"arena of {size_bytes} bytes cannot hold its quotas, which need {needed}")
        self._map = _map_memory(fd, size_bytes, mmap.PROT_READ | mmap.PROT_WRITE)
        self._whole = memoryview(self._map)
        self._quota = (ingress_bytes, egress_bytes)
        self._left = [ingress_bytes, egress_bytes]
        self._budget = ingress_bytes + egress_bytes
        self._resident = 0
        self._idle_s = idle_s
        # Per class: free slots with pages, when their mark was set, free slots that were punched, the next never used.
        self._free = [deque((_MARK,)) for _ in SLOT_BYTES]
        self._marked_at = [float("-inf")] * len(SLOT_BYTES)
        self._holes: list[list[int]] = [[] for _ in SLOT_BYTES]
        self._fresh: list[int] = []
        start = 0
        for count, pages in zip(region_slots(ingress_bytes, egress_bytes), SLOT_PAGES, strict=True):
            self._fresh.append(start)
            start += count * pages
        # Slots in use by code (class * 2 + side): held by the owner, and released while still lent.
        self._live: dict[int, int] = {}
        self._parting: dict[int, int] = {}
        self._free_of_code = [free for free in self._free for _ in Side]
        self._lent: dict[int, int] = {}
        self._borrowed: dict[int, dict[int, int]] = {}
        self._views: dict[int, memoryview] = {}

    def allocate(self, nbytes: int, side: Side) -> int:
        """A slot of at least `nbytes` (0..SLOT_MAX_BYTES, else IndexError), content undefined; -1 beyond the quota."""
        size_class = CLASS_OF_PAGES[(nbytes + _ROUND_UP) >> PAGE_SHIFT]
        left = self._left[side] - SLOT_BYTES[size_class]
        if left < 0:
            return -1
        slot = self._free[size_class].pop()
        if slot == _MARK:
            slot = self._take_under_mark(size_class)
        self._left[side] = left
        self._live[slot] = size_class << 1 | side
        return slot

    def view(self, slot: int, length: int | None = None) -> memoryview:
        """The slot's bytes, all or the first `length`; valid until the slot is free. KeyError for what is no slot."""
        view = self._views[slot]
        return view if length is None else view[:length]

    def release(self, slot: int) -> None:
        """The owner needs the slot no more. Borrowers keep reading it."""
        assert slot in self._live, f"slot {slot} released twice or never allocated"
        code = self._live.pop(slot)
        if slot in self._lent:
            self._parting[slot] = code
            return
        self._free_of_code[code].append(slot)
        self._left[code & 1] += _SIZE_OF_CODE[code]

    def lend(self, slot: int, borrower: int) -> None:
        """Count one borrowing by the worker in that worker slot; nobody writes the slot until it is given back."""
        assert slot in self._live, f"slot {slot} lent but not held"
        self._lent[slot] = self._lent.get(slot, 0) + 1
        borrowed = self._borrowed.get(borrower)
        if borrowed is None:
            borrowed = self._borrowed[borrower] = {}
        borrowed[slot] = borrowed.get(slot, 0) + 1

    def give_back(self, slot: int, borrower: int) -> bool:
        """One borrowing ends. False, and nothing changes, if that borrower has no such slot: a peer chose it."""
        borrowed = self._borrowed.get(borrower)
        count = borrowed.get(slot) if borrowed else None
        if not borrowed or not count:
            return False
        if count == 1:
            del borrowed[slot]
        else:
            borrowed[slot] = count - 1
        self._end_borrowings(slot, 1)
        return True

    def reclaim(self, borrower: int) -> int:
        """End all borrowings of a worker that was reaped, and say how many. Not before: it may still be reading."""
        borrowed = self._borrowed.pop(borrower, {})
        for slot, count in borrowed.items():
            self._end_borrowings(slot, count)
        return sum(borrowed.values())

    def used_bytes(self, side: Side) -> int:
        """What of the side's quota is in use."""
        return self._quota[side] - self._left[side]

    @property
    def slots_in_use(self) -> int:
        """Slots that are not free."""
        return len(self._live) + len(self._parting)

    @property
    def slots_lent(self) -> int:
        """Slots that some borrower has."""
        return len(self._lent)

    @property
    def resident_bytes(self) -> int:
        """Upper bound of the memory that the arena takes; never above the sum of the quotas."""
        return self._resident

    def trim(self, now: float, limit_bytes: int = TRIM_BYTES) -> int:
        """Punch out slots that were free for `idle_s` (at most twice that), up to about `limit_bytes` a call.

        Returns the bytes punched; `limit_bytes` or more means that there may be more to do: call again in a later turn.
        """
        punched = 0
        for size_class, free in enumerate(self._free):
            if now - self._marked_at[size_class] < self._idle_s:
                continue
            while punched < limit_bytes:
                slot = free.popleft()
                if slot == _MARK:
                    free.append(_MARK)
                    self._marked_at[size_class] = now
                    break
                self._punch(slot, size_class)
                punched += SLOT_BYTES[size_class]
        return punched

    def close(self) -> None:
        """Unmap, now or when the last view of a slot is gone."""
        self._views.clear()
        _unmap(self._map, self._whole)

    def _end_borrowings(self, slot: int, count: int) -> None:
        remaining = self._lent[slot] - count
        if remaining:
            self._lent[slot] = remaining
            return
        del self._lent[slot]
        code = self._parting.pop(slot, None)
        if code is not None:
            self._free_of_code[code].append(slot)
            self._left[code & 1] += _SIZE_OF_CODE[code]

    def _take_under_mark(self, size_class: int) -> int:
        """The mark was popped: take the slot below it, or one without pages, and put the mark back."""
        free = self._free[size_class]
        slot = free.pop() if free else self._take_without_pages(size_class)
        free.append(_MARK)
        return slot

    def _take_without_pages(self, size_class: int) -> int:
        size = SLOT_BYTES[size_class]
        while self._resident + size > self._budget:
            self._punch_coldest()
        self._resident += size
        if self._holes[size_class]:
            slot = self._holes[size_class].pop()
        else:
            slot = self._fresh[size_class]
            self._fresh[size_class] += SLOT_PAGES[size_class]
        start = slot << PAGE_SHIFT
        self._views[slot] = self._whole[start : start + size]
        return slot

    def _punch_coldest(self) -> None:
        """Punch the slot that is free for longest, of the class with most free bytes."""
        size_class = max(range(len(SLOT_BYTES)), key=lambda index: (len(self._free[index]) - 1) * SLOT_BYTES[index])
        free = self._free[size_class]
        slot = free.popleft()
        if slot == _MARK:
            slot = free.popleft()
            free.appendleft(_MARK)
        self._punch(slot, size_class)

    def _punch(self, slot: int, size_class: int) -> None:
        """Give a free slot's pages back. Where pages are larger than ours, those shared with a neighbour stay."""
        del self._views[slot]
        start = slot * PAGE_BYTES
        end = start + SLOT_BYTES[size_class]
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        end = end // mmap.PAGESIZE * mmap.PAGESIZE
        if start < end:
            self._map.madvise(mmap.MADV_REMOVE, start, end - start)
        self._holes[size_class].append(slot)
        self._resident -= SLOT_BYTES[size_class]


class ArenaView:
    """Another worker's arena, read only. `fd` stays the caller's. Raises ValueError if it holds less than that size."""

    __slots__ = ("_map", "_size", "_whole")

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._map = _map_memory(fd, size_bytes, mmap.PROT_READ)
        self._whole = memoryview(self._map)
        self._size = size_bytes

    def view(self, slot: int, length: int) -> memoryview:
        """`length` bytes from the start of `slot`, valid while borrowed. ValueError outside the arena or after close.

        Both numbers come from a ring: they are held to the arena, but whose slot they name is up to the peer.
        """
        start = slot << PAGE_SHIFT
        end = start + length
        if not 0 <= start <= end <= self._size or length > SLOT_MAX_BYTES:
            raise ValueError(f"slot outside the arena: slot={slot} length={length}")
        return self._whole[start:end]

    def close(self) -> None:
        """Unmap, now or when the last view is gone."""
        _unmap(self._map, self._whole)


def _map_memory(fd: int, size_bytes: int, protection: int) -> mmap.mmap:
    memory = mmap.mmap(fd, size_bytes, prot=protection)
    # Applications' bytes do not belong in a core file.
    memory.madvise(mmap.MADV_DONTDUMP)
    return memory


def _unmap(memory: mmap.mmap, whole: memoryview) -> None:
    whole.release()
    with suppress(BufferError):  # views of slots are out: the mapping goes with the last of them
        memory.close()
