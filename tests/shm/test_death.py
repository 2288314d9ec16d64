"""A worker dies at each single store of a dialogue with another: what that one sees is whole, and it gets all back.

The survivor has lent slots. The other one reads and returns them, and lends slots of its own with payload in them.
"""

import os
import random
import signal
import zlib
from collections.abc import Callable
from typing import Any, NoReturn
from unittest.mock import patch

from workers.shm import ring
from workers.shm.arena import Arena, ArenaView, Side, arena_size
from workers.shm.layout import DESCRIPTOR, Descriptor
from workers.shm.ring import RingConsumer, RingProducer
from workers.shm.segments import close_ring, create_arena, create_ring

QUOTA_BYTES = 1 << 20
ARENA_BYTES = arena_size(QUOTA_BYTES, QUOTA_BYTES)
SURVIVOR, VICTIM = 0, 1
OUT, FREE, IN = 1, 2, 3
LENT = 20
"""More than one flush publishes."""
PAYLOADS = [random.Random(number).randbytes(100 + 1000 * number) for number in range(LENT)]
WORD = 8
STEPS_MAX = 1000


class Worker:
    """One of the two: its arena, the other's, and its ends of both rings."""

    def __init__(self, slot: int, arenas: list[int], rings: dict[int, Any]) -> None:
        self.slot, self.other = slot, 1 - slot
        self.arena = Arena(arenas[slot], ARENA_BYTES, QUOTA_BYTES, QUOTA_BYTES)
        self.view = ArenaView(arenas[self.other], ARENA_BYTES)
        self.producer = RingProducer(rings[slot])
        self.consumer = RingConsumer(rings[self.other])

    def tell(self, kind: int, slot: int, length: int = 0, checksum: int = 0) -> None:
        assert self.producer.push(kind, 0, 0, slot, 0, 0, 0, length, 0, checksum, 0)

    def lend(self, number: int, write: Callable[[memoryview, bytes], None]) -> int:
        """A slot with payload of its own kind."""
        payload = PAYLOADS[number]
        slot = self.arena.allocate(len(payload), Side.EGRESS)
        write(self.arena.view(slot, len(payload)), payload)
        self.arena.lend(slot, self.other)
        self.tell(OUT if self.slot == SURVIVOR else IN, slot, len(payload), zlib.crc32(payload))
        self.arena.release(slot)
        return slot

    def close(self) -> None:
        for each in (self.producer, self.consumer, self.view, self.arena):
            each.close()


def whole_write(view: memoryview, payload: bytes) -> None:
    view[:] = payload


def live_and_die(victim: Worker, step: int) -> NoReturn:
    """Take what was lent, return it, lend as much; SIGKILL in front of the given store, if there are so many."""
    steps = iter(range(step))

    def count() -> None:
        if next(steps, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    def pack_by_words(memory: Any, at: int, *fields: int) -> None:
        packed = DESCRIPTOR.pack(*fields)
        for word in range(0, DESCRIPTOR.size - WORD, WORD):
            count()
            memory[at + word : at + word + WORD] = packed[word : word + WORD]

    def write_by_halves(view: memoryview, payload: bytes) -> None:
        half = len(payload) // 2
        for part in (slice(0, half), slice(half, None)):
            count()
            view[part] = payload[part]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: int) -> Any:
            count()
            return call(*arguments)

        return counting

    patch.object(ring, "_pack_into", pack_by_words).start()
    patch.object(ring, "eventfd_write", counted(os.eventfd_write)).start()
    patch.object(ring, "eventfd_read", counted(os.eventfd_read)).start()
    for number, descriptor in enumerate(victim.consumer.take()):
        kind, _, _, slot, _, _, _, length, _, checksum, _ = descriptor
        assert kind == OUT and zlib.crc32(victim.view.view(slot, length)) == checksum
        victim.tell(FREE, slot)
        if number % 2:
            victim.lend(number, write_by_halves)
    victim.producer.flush()
    os._exit(0)


def check_survivor(survivor: Worker, lent: list[int], published_max: int) -> int:
    """As the mesh parts with a worker that was reaped: take, then reclaim. Returns how much it had published."""
    seen: list[Descriptor] = []
    while taken := survivor.consumer.take(7):
        seen += taken
    assert len(seen) <= published_max
    returned = []
    for kind, _, _, slot, _, _, _, length, _, checksum, _ in seen:
        if kind == FREE:
            assert survivor.arena.give_back(slot, VICTIM)
            returned.append(slot)
        else:
            assert kind == IN and zlib.crc32(survivor.view.view(slot, length)) == checksum
    assert returned == lent[: len(returned)]
    assert survivor.arena.slots_lent == len(lent) - len(returned)
    assert survivor.arena.reclaim(VICTIM) == len(lent) - len(returned)
    assert (survivor.arena.slots_lent, survivor.arena.slots_in_use) == (0, 0)
    assert survivor.arena.used_bytes(Side.EGRESS) == 0
    again = [survivor.arena.allocate(4096, Side.EGRESS) for _ in range(LENT)]
    assert -1 not in again and len(set(again)) == LENT
    return len(seen)


def die_at(step: int) -> tuple[int, int]:
    """The victim's wait status, and how many descriptors the survivor saw."""
    arenas = [create_arena(ARENA_BYTES) for _ in range(2)]
    rings = {slot: create_ring() for slot in (SURVIVOR, VICTIM)}
    survivor = Worker(SURVIVOR, arenas, rings)
    lent = [survivor.lend(number, whole_write) for number in range(LENT)]
    survivor.producer.flush()
    pid = os.fork()
    if not pid:
        live_and_die(Worker(VICTIM, arenas, rings), step)
    status = os.waitpid(pid, 0)[1]
    seen = check_survivor(survivor, lent, LENT * 3 // 2)
    survivor.close()
    for fds in rings.values():
        close_ring(fds)
    for fd in arenas:
        os.close(fd)
    return status, seen


def test_worker_that_dies_at_any_store_leaves_whole_descriptors_and_everything_lent_comes_back() -> None:
    seen = [0]
    for step in range(STEPS_MAX):
        status, count = die_at(step)
        assert count >= seen[-1], "less is seen of one who did more"
        seen.append(count)
        if status == 0:
            break
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    else:
        raise AssertionError("it never lives to the end")
    assert seen[-1] == LENT * 3 // 2 and sorted(set(seen)) == [0, 16, LENT * 3 // 2]
