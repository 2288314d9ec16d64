"""A ring and an arena shared with a worker that has gone wrong: any bytes in memory, any counts in the eventfds."""

import os
from collections import Counter
from contextlib import suppress

from tests.fuzz.source import Source
from workers.shm.arena import Arena, ArenaView, Side, arena_size
from workers.shm.layout import DESCRIPTOR, SLOT_MAX_BYTES
from workers.shm.ring import RingConsumer, RingCorrupt, RingProducer
from workers.shm.segments import close_ring, create_arena, create_ring

CAPACITY = 64
QUOTA = 64 << 10
PEER = 1


def run(data: bytes) -> None:
    """First byte: our reading end, our writing end, or an arena."""
    source = Source(data)
    source.choose((_consume, _produce, _view, _give_back))(source)


def _consume(source: Source) -> None:
    """The peer writes what it likes and claims any number of descriptors."""
    fds = create_ring(CAPACITY)
    consumer = RingConsumer(fds, CAPACITY)
    taken = 0
    try:
        while len(source):
            at = source.number() % CAPACITY
            content = source.block()[: (CAPACITY - at) * DESCRIPTOR.size]
            os.pwrite(fds.memory, content, at * DESCRIPTOR.size)
            _add(fds.published, source.number(source.choose((1, 1, 2, 8))))
            limit = source.number() + 1
            descriptors = consumer.take(limit)
            assert len(descriptors) <= min(limit, CAPACITY) and all(len(each) == 11 for each in descriptors)
            taken += len(descriptors)
        withheld = taken - _count(fds.freed)
        assert 0 <= withheld < CAPACITY // 4, "not every descriptor was given back"
    except RingCorrupt:
        pass
    finally:
        consumer.close()
        close_ring(fds)


def _produce(source: Source) -> None:
    """The peer claims to have freed any number."""
    fds = create_ring(CAPACITY)
    producer = RingProducer(fds, CAPACITY)
    pushed = freed = 0
    try:
        while len(source):
            for _ in range(source.number()):
                if not producer.push(1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0):
                    break
                pushed += 1
            if source.flag():
                producer.flush()
            added = source.number(source.choose((1, 1, 1, 8)))
            _add(fds.freed, added)
            freed += added
            assert 0 <= producer.space <= CAPACITY and producer.pending <= CAPACITY
            assert pushed <= CAPACITY + freed, "written over what was not freed"
    except RingCorrupt:
        assert freed > 0
    finally:
        producer.close()
        close_ring(fds)


def _add(eventfd: int, count: int) -> None:
    with suppress(BlockingIOError):
        os.eventfd_write(eventfd, min(count, 2**64 - 2))


def _count(eventfd: int) -> int:
    try:
        return os.eventfd_read(eventfd)
    except BlockingIOError:
        return 0


def _view(source: Source) -> None:
    """Slot and length of the peer's choice: inside its arena, or ValueError."""
    size = arena_size(QUOTA, QUOTA)
    fd = create_arena(size)
    view = ArenaView(fd, size)
    try:
        while len(source):
            slot, length = source.number(source.choose((1, 4))), source.number(source.choose((1, 2, 3, 4)))
            inside = slot * 4096 + length <= size and length <= SLOT_MAX_BYTES
            try:
                seen = view.view(slot, length)
            except ValueError:
                assert not inside
            else:
                assert inside and len(seen) == length and seen.readonly
                seen.release()
    finally:
        view.close()
        os.close(fd)


def _give_back(source: Source) -> None:
    """The peer returns slots in any order, also such as it never had; the owner goes on using them."""
    size = arena_size(QUOTA, QUOTA)
    fd = create_arena(size)
    arena = Arena(fd, size, QUOTA, QUOTA)
    held: list[int] = []
    lent: Counter[int] = Counter()
    try:
        while len(source):
            does = source.choose(("allocate", "lend", "release", "return", "return any", "trim"))
            if does == "allocate":
                slot = arena.allocate(source.number(2), source.choose((Side.INGRESS, Side.EGRESS)))
                if slot >= 0:
                    assert slot not in held and not lent[slot], "given out twice"
                    held.append(slot)
            elif does == "trim":
                arena.trim(float(source.number()))
            elif does == "return any":
                slot = source.number(4)
                lent[slot] -= _check_return(arena, slot, lent[slot])
            elif does == "return" and +lent:
                slot = source.choose(sorted(+lent))
                lent[slot] -= _check_return(arena, slot, lent[slot])
            elif held and does == "lend":
                slot = source.choose(held)
                arena.lend(slot, PEER)
                lent[slot] += 1
            elif held and does == "release":
                arena.release(held.pop(source.number() % len(held)))
            assert arena.slots_in_use == len({*held, *(+lent)})
            assert arena.resident_bytes <= 2 * QUOTA
        assert arena.reclaim(PEER) == lent.total()
        for slot in held:
            arena.release(slot)
        assert not arena.slots_in_use and not arena.used_bytes(Side.INGRESS) and not arena.used_bytes(Side.EGRESS)
    finally:
        arena.close()
        os.close(fd)


def _check_return(arena: Arena, slot: int, borrowed: int) -> int:
    taken = arena.give_back(slot, PEER)
    assert taken == (borrowed > 0)
    return int(taken)


_DESCRIPTORS = DESCRIPTOR.pack(1, 0, 0, 7, 8, 9, 10, 11, 12, 13, 14) * 2
SEEDS = {
    "take": b"\0" + (b"\0" + bytes((len(_DESCRIPTORS),)) + _DESCRIPTORS + b"\0\2\xff") * 2,
    "take-with-limit": b"\0" + b"\0\0\0\x30\x0f\0\0\0\0\x0f" + b"\0\0\0\x10\xff",
    "take-around-the-end": b"\0" + b"\0\0\0\x28\xff" * 3,
    "published-too-many": b"\0\0\0\0\x41\xff",
    "published-to-the-limit": b"\0\0\0\3" + b"\xff" * 8 + b"\xff",
    "push-until-full": b"\1\xff\1\0\0",
    "push-freed-push": b"\1\x20\1\0\x10\x40\0\0\x10\xff\1\0\0",
    "freed-too-many": b"\1\x40\1\0\x41\1\0\0\0",
    "views": b"\2\0\0\0\0\0\1\1\x10\0\1" + b"\xff" * 8 + b"\0\0\2\4\x10\0\0\0\2\4\x10\1",
    "view-beyond-any-slot": b"\2" + b"\0\0\2\5\0\0",
    "return": b"\3\0\x10\0\0\1\0\2\0\3\0",
    "return-never-had": b"\3\0\x10\0\0\4\0\0\0\0\4\0\0\0\7",
    "lent-twice": b"\3\0\xff\xff\1\1\0\1\0\3\0\2\0\3\0\0\xff\xff\1\5\x20",
}
