"""Rings: what is pushed comes out in order and whole, wake-ups are not lost, and a corrupt count is refused."""

import errno
import os
import select
import signal
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NoReturn
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from workers.boot import RingFds
from workers.shm import ring
from workers.shm.arena import ArenaView
from workers.shm.layout import DESCRIPTOR, Descriptor
from workers.shm.ring import FLUSH_EVERY, RingConsumer, RingCorrupt, RingProducer
from workers.shm.segments import close_ring, create_arena, create_ring

EVENTFD_LIMIT = 2**64 - 2


def entry(number: int) -> Descriptor:
    """A descriptor whose every field depends on `number`, the last one on all others."""
    low = number & 0xFF
    mixed = (number * 0x9E3779B97F4A7C15) & (2**64 - 1)
    fields = (
        low,
        low ^ 0xFF,
        number & 0xFFFF,
        number,
        mixed,
        mixed ^ 1,
        mixed >> 3,
        mixed >> 32,
        number ^ 0xFFFF,
        number,
    )
    return (*fields, zlib.crc32(struct.pack("=10Q", *fields)))


class Pair:
    def __init__(self, capacity: int = 4096) -> None:
        self.capacity = capacity
        self.fds = create_ring(capacity)
        self.producer = RingProducer(self.fds, capacity)
        self.consumer = RingConsumer(self.fds, capacity)

    def close(self) -> None:
        self.producer.close()
        self.consumer.close()
        close_ring(self.fds)


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair(capacity=20)
    yield pair
    pair.close()


class RingMachine(RuleBasedStateMachine):
    """Against two deques: what was pushed and not published, what was published and not taken; and a number: what was
    taken and not told of, less than a quarter."""

    pair: Pair

    @initialize(capacity=st.sampled_from([1, 2, 7, 16, 40]))
    def create(self, capacity: int) -> None:
        self.pair = Pair(capacity)
        self.number = 0
        self.pushed: deque[Descriptor] = deque()
        self.published: deque[Descriptor] = deque()
        self.withheld = 0

    def publish(self) -> None:
        self.published += self.pushed
        self.pushed.clear()

    @rule(count=st.integers(1, 30))
    def push(self, count: int) -> None:
        for _ in range(count):
            room = len(self.pushed) + len(self.published) + self.withheld < self.pair.capacity
            assert self.pair.producer.push(*entry(self.number)) is room
            if not room:
                self.publish()
                return
            self.pushed.append(entry(self.number))
            self.number += 1
            if len(self.pushed) == FLUSH_EVERY:
                self.publish()

    @rule()
    def flush(self) -> None:
        self.pair.producer.flush()
        self.publish()

    @rule(limit=st.one_of(st.integers(0, 50), st.none()))
    def take(self, limit: int | None) -> None:
        taken = self.pair.consumer.take() if limit is None else self.pair.consumer.take(limit)
        expected = min(len(self.published), self.pair.capacity if limit is None else limit)
        assert taken == [self.published.popleft() for _ in range(expected)]
        self.withheld += expected
        if self.withheld >= max(self.pair.capacity // 4, 1):
            self.withheld = 0

    @invariant()
    def left_over_descriptors_can_be_waited_for(self) -> None:
        readable = bool(select.select([self.pair.consumer], [], [], 0)[0])
        assert (readable or self.pair.consumer.more) == bool(self.published)

    @invariant()
    def counts_agree(self) -> None:
        assert self.pair.producer.pending == len(self.pushed)
        assert self.pair.producer.space <= self.pair.capacity - len(self.pushed) - len(self.published)

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            self.pair.close()


RingMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestRingModel = RingMachine.TestCase


def test_nothing_pending_writes_nothing(pair: Pair) -> None:
    pair.producer.flush()
    assert not select.select([pair.consumer], [], [], 0)[0]
    assert pair.consumer.take() == []


def test_unflushed_descriptor_is_not_seen(pair: Pair) -> None:
    assert pair.producer.push(*entry(1))
    assert pair.consumer.take() == []
    pair.producer.flush()
    assert pair.consumer.take() == [entry(1)]


def test_full_ring_publishes_what_it_holds(pair: Pair) -> None:
    for number in range(20):
        assert pair.producer.push(*entry(number))
    assert not pair.producer.push(*entry(20))
    assert pair.producer.pending == 0
    assert pair.consumer.take() == [entry(number) for number in range(20)]
    assert pair.producer.push(*entry(20))


def test_field_out_of_range_publishes_nothing(pair: Pair) -> None:
    with pytest.raises(struct.error):
        pair.producer.push(256, *entry(0)[1:])
    pair.producer.flush()
    assert pair.consumer.take() == []


@pytest.mark.parametrize("count", [21, 4096, 2**32, EVENTFD_LIMIT])
def test_count_beyond_the_capacity_is_refused(pair: Pair, count: int) -> None:
    os.eventfd_write(pair.fds.published, count)
    with pytest.raises(RingCorrupt):
        pair.consumer.take()


def test_count_beyond_the_capacity_with_a_remainder_is_refused(pair: Pair) -> None:
    os.eventfd_write(pair.fds.published, 20)
    assert len(pair.consumer.take(limit=1)) == 1
    os.eventfd_write(pair.fds.published, 2)
    with pytest.raises(RingCorrupt):
        pair.consumer.take()


@pytest.mark.parametrize("count", [21, 2**32, EVENTFD_LIMIT])
def test_more_freed_than_published_is_refused(pair: Pair, count: int) -> None:
    for number in range(20):
        assert pair.producer.push(*entry(number))
    os.eventfd_write(pair.fds.freed, count)
    with pytest.raises(RingCorrupt):
        pair.producer.push(*entry(20))


def test_pending_descriptors_cannot_have_been_freed(pair: Pair) -> None:
    for number in range(20):
        assert pair.producer.push(*entry(number))
    assert pair.producer.pending == 4
    os.eventfd_write(pair.fds.freed, 17)
    with pytest.raises(RingCorrupt):
        pair.producer.push(*entry(20))


def test_eventfd_at_its_limit_is_refused_without_blocking(pair: Pair) -> None:
    os.eventfd_write(pair.fds.published, EVENTFD_LIMIT)
    for number in range(2):
        assert pair.producer.push(*entry(number))
    with pytest.raises(RingCorrupt):
        pair.producer.flush()


@given(garbage=st.binary(min_size=64, max_size=64), pages=st.integers(1, 70))
@settings(max_examples=100, deadline=None)
def test_garbage_descriptor_never_leads_outside_the_arena(garbage: bytes, pages: int) -> None:
    pair = Pair(capacity=1)
    arena = create_arena(pages * 4096)
    other = ArenaView(arena, pages * 4096)
    os.pwrite(pair.fds.memory, garbage, 0)
    os.eventfd_write(pair.fds.published, 1)
    [(_, _, _, slot, _, _, _, length, _, _, _)] = pair.consumer.take()
    for handle, nbytes in ((slot, length), (slot % 80, length % 300_000)):
        try:
            view = other.view(handle, nbytes)
        except ValueError:
            assert handle * 4096 + nbytes > pages * 4096 or nbytes > 65 * 4096
        else:
            assert len(view) == nbytes
            del view
    other.close()
    os.close(arena)
    pair.close()


# Two processes


def fork(child: Callable[[], None]) -> int:
    """Run `child` in a new process, which exits 0 if it returns."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        child()
        code = 0
    finally:
        os._exit(code)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_200_000_descriptors_cross_two_processes_whole_and_in_order() -> None:
    total = 200_000
    pair = Pair()

    def produce() -> None:
        signal.alarm(60)
        freed = select.poll()
        freed.register(pair.fds.freed, select.POLLIN)
        for number in range(total):
            while not pair.producer.push(*entry(number)):
                freed.poll()
            if number % 37 == 0:
                pair.producer.flush()
        pair.producer.flush()

    pid = fork(produce)
    published = select.poll()
    published.register(pair.consumer, select.POLLIN)
    number = 0
    while number < total:
        assert published.poll(30_000), f"nothing for 30 s after {number} descriptors"
        for taken in pair.consumer.take():
            assert taken == entry(number)
            number += 1
    assert exit_code(pid) == 0
    assert pair.consumer.take() == []
    pair.close()


STORES = DESCRIPTOR.size // 8


def die_at_step(step: int) -> Callable[[], None]:
    """A counter that ends the process in front of that step."""
    steps = iter(range(step))

    def count() -> None:
        if next(steps, None) is None:
            os._exit(9)

    return count


def produce_and_die(pair: Pair, numbers: range, step: int) -> NoReturn:
    """Push and flush with every 8-byte store and every eventfd write a step; exit in front of the given one."""
    count = die_at_step(step)
    write = os.eventfd_write

    def pack_by_stores(memory: Any, at: int, *fields: int) -> None:
        packed = DESCRIPTOR.pack(*fields)
        for store in range(0, DESCRIPTOR.size, 8):
            count()
            memory[at + store : at + store + 8] = packed[store : store + 8]

    def write_as_step(fd: int, value: int) -> None:
        count()
        write(fd, value)

    patch.object(ring, "_pack_into", pack_by_stores).start()
    patch.object(ring, "eventfd_write", write_as_step).start()
    for number in numbers:
        pair.producer.push(*entry(number))
    pair.producer.flush()
    os._exit(0)


def test_producer_that_dies_at_any_store_shows_whole_published_descriptors_only() -> None:
    before, numbers = 13, range(100, 100 + FLUSH_EVERY + 2)
    first_flush = FLUSH_EVERY * STORES
    last_flush = first_flush + 1 + 2 * STORES
    for step in range(last_flush + 2):
        pair = Pair(capacity=20)
        for number in range(before):
            assert pair.producer.push(*entry(number))
        pair.producer.flush()
        assert len(pair.consumer.take()) == before
        assert pair.producer.space == 20 - before
        pid = os.fork()
        if not pid:
            produce_and_die(pair, numbers, step)
        assert exit_code(pid) == (9 if step <= last_flush else 0)
        published = FLUSH_EVERY if step > first_flush else 0
        published = len(numbers) if step > last_flush else published
        assert pair.consumer.take() == [entry(number) for number in numbers[:published]], f"step {step}"
        pair.close()


@pytest.mark.parametrize("dies_before_freeing", [False, True])
def test_consumer_that_dies_leaves_the_producer_with_a_full_ring(pair: Pair, dies_before_freeing: bool) -> None:
    for number in range(20):
        assert pair.producer.push(*entry(number))
    pair.producer.flush()

    def consume_and_die() -> None:
        assert pair.consumer.take(limit=5) == [entry(number) for number in range(5)]
        if dies_before_freeing:
            patch.object(ring, "eventfd_write", lambda fd, value: os._exit(9)).start()
        pair.consumer.take(limit=6)
        os._exit(9)

    assert exit_code(fork(consume_and_die)) == 9
    pushed = 0
    while pair.producer.push(*entry(pushed)):
        pushed += 1
    assert pushed == (5 if dies_before_freeing else 11)
    assert not pair.producer.push(*entry(0))


# Making and closing them


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_ring_leaves_no_descriptor_behind() -> None:
    before = open_descriptors()
    pair = Pair()
    assert not any(os.get_inheritable(fd) for fd in (pair.fds.memory, pair.fds.published, pair.fds.freed))
    assert not any(os.get_blocking(fd) for fd in (pair.fds.published, pair.fds.freed))
    pair.close()
    assert open_descriptors() == before


@pytest.mark.parametrize("fails_at", [1, 2])
def test_ring_that_cannot_be_made_leaves_no_descriptor_behind(monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    create = os.eventfd
    made: list[int] = []

    def limited(value: int, flags: int) -> int:
        made.append(value)
        if len(made) == fails_at:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return create(value, flags)

    monkeypatch.setattr(os, "eventfd", limited)
    before = open_descriptors()
    with pytest.raises(OSError) as error:
        create_ring()
    assert error.value.errno == errno.EMFILE
    assert open_descriptors() == before


def test_consumer_cannot_write() -> None:
    fds = create_ring()
    consumer = RingConsumer(fds)
    with pytest.raises(TypeError):
        consumer._memory[0] = 1
    consumer.close()
    close_ring(fds)


def test_ring_of_another_size_is_refused() -> None:
    fds: RingFds = create_ring(16)
    with pytest.raises(ValueError, match="greater than file size"):
        RingConsumer(fds)
    close_ring(fds)
