"""The arena: slots are handed out, borrowed and returned as a model says, and a double release is found."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from workers.shm.arena import Arena, ArenaView, Side, arena_size
from workers.shm.layout import CLASS_OF_PAGES, PAGE_BYTES, SLOT_BYTES, SLOT_MAX_BYTES
from workers.shm.segments import create_arena

INGRESS_BYTES = 700 << 10
EGRESS_BYTES = 300 << 10
IDLE_S = 10.0


def slot_bytes(nbytes: int) -> int:
    return SLOT_BYTES[CLASS_OF_PAGES[-(-nbytes // PAGE_BYTES)]]


def resident_bytes(fd: int) -> int:
    """What the kernel has really allocated."""
    return os.fstat(fd).st_blocks * 512


def stamp(view: memoryview, number: int) -> None:
    """Write `number` at the start of every page and at the very end, so that any overlap shows."""
    for at in (*range(0, len(view), PAGE_BYTES), len(view) - 8):
        view[at : at + 8] = number.to_bytes(8)


def stamped(view: memoryview, number: int) -> bool:
    places = (*range(0, len(view), PAGE_BYTES), len(view) - 8)
    return all(view[at : at + 8] == number.to_bytes(8) for at in places)


class Owned:
    """An arena with its descriptor and a second worker's mapping."""

    def __init__(self, ingress_bytes: int = INGRESS_BYTES, egress_bytes: int = EGRESS_BYTES) -> None:
        self.size = arena_size(ingress_bytes, egress_bytes)
        self.fd = create_arena(self.size)
        self.arena = Arena(self.fd, self.size, ingress_bytes, egress_bytes, idle_s=IDLE_S)
        self.other = ArenaView(self.fd, self.size)

    def close(self) -> None:
        self.arena.close()
        self.other.close()
        os.close(self.fd)


@pytest.fixture
def owned() -> Iterator[Owned]:
    owned = Owned()
    yield owned
    owned.close()


class ModelSlot:
    def __init__(self, number: int, side: Side, size: int) -> None:
        self.number = number
        self.side = side
        self.size = size
        self.released = False
        self.lent: dict[int, int] = {}


class ArenaMachine(RuleBasedStateMachine):
    """Against a dict of what is in use; every slot in use keeps what was written into it, seen from both mappings."""

    def __init__(self) -> None:
        super().__init__()
        self.owned = Owned()
        self.arena = self.owned.arena
        self.model: dict[int, ModelSlot] = {}
        self.stamps = 0
        self.now = 0.0

    def used(self, side: Side) -> int:
        return sum(slot.size for slot in self.model.values() if slot.side is side)

    def settle(self, handle: int) -> None:
        slot = self.model[handle]
        if slot.released and not slot.lent:
            del self.model[handle]

    def held(self) -> list[int]:
        return sorted(handle for handle, slot in self.model.items() if not slot.released)

    @rule(
        nbytes=st.one_of(st.integers(0, SLOT_MAX_BYTES), st.sampled_from(SLOT_BYTES), st.integers(0, 3 * PAGE_BYTES)),
        side=st.sampled_from(Side),
        count=st.integers(1, 12),
    )
    def allocate(self, nbytes: int, side: Side, count: int) -> None:
        size = slot_bytes(nbytes)
        quota = (INGRESS_BYTES, EGRESS_BYTES)[side]
        for _ in range(count):
            handle = self.arena.allocate(nbytes, side)
            if self.used(side) + size > quota:
                assert handle == -1
                return
            assert handle >= 0, "within quota"
            assert handle not in self.model
            view = self.arena.view(handle)
            assert len(view) == size
            self.stamps += 1
            stamp(view, self.stamps)
            self.model[handle] = ModelSlot(self.stamps, side, size)

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        for handle in data.draw(st.lists(st.sampled_from(self.held()), min_size=1, max_size=8, unique=True)):
            self.arena.release(handle)
            self.model[handle].released = True
            self.settle(handle)

    @precondition(lambda self: self.held())
    @rule(data=st.data(), borrower=st.integers(0, 2), times=st.integers(1, 2))
    def lend(self, data: st.DataObject, borrower: int, times: int) -> None:
        handle = data.draw(st.sampled_from(self.held()))
        for _ in range(times):
            self.arena.lend(handle, borrower)
        lent = self.model[handle].lent
        lent[borrower] = lent.get(borrower, 0) + times

    @rule(data=st.data(), borrower=st.integers(0, 3), anything=st.integers(0, 2**32 - 1))
    def give_back(self, data: st.DataObject, borrower: int, anything: int) -> None:
        handle = data.draw(st.sampled_from([*sorted(self.model), anything]))
        count = self.model[handle].lent.get(borrower, 0) if handle in self.model else 0
        assert self.arena.give_back(handle, borrower) is (count > 0)
        if count:
            lent = self.model[handle].lent
            lent[borrower] = count - 1
            if count == 1:
                del lent[borrower]
            self.settle(handle)

    @rule(borrower=st.integers(0, 2))
    def reclaim(self, borrower: int) -> None:
        counts = [slot.lent.pop(borrower, 0) for slot in self.model.values()]
        assert self.arena.reclaim(borrower) == sum(counts)
        for handle in list(self.model):
            self.settle(handle)

    @rule(later=st.floats(0, 2 * IDLE_S), limit=st.sampled_from([0, PAGE_BYTES, 1 << 20]))
    def trim(self, later: float, limit: int) -> None:
        self.now += later
        assert self.arena.trim(self.now, limit) <= max(limit + SLOT_MAX_BYTES - PAGE_BYTES, 0)

    @invariant()
    def counts_agree(self) -> None:
        assert self.arena.slots_in_use == len(self.model)
        assert self.arena.slots_lent == sum(bool(slot.lent) for slot in self.model.values())
        for side in Side:
            assert self.arena.used_bytes(side) == self.used(side)

    @invariant()
    def slots_in_use_keep_their_bytes_and_do_not_overlap(self) -> None:
        end = 0
        for handle, slot in sorted(self.model.items()):
            assert handle * PAGE_BYTES >= end
            end = handle * PAGE_BYTES + slot.size
            assert stamped(self.arena.view(handle), slot.number)
            assert stamped(self.owned.other.view(handle, slot.size), slot.number)

    @invariant()
    def memory_stays_within_the_quotas(self) -> None:
        assert resident_bytes(self.owned.fd) <= self.arena.resident_bytes <= INGRESS_BYTES + EGRESS_BYTES

    def teardown(self) -> None:
        self.owned.close()


ArenaMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestArenaModel = ArenaMachine.TestCase


def fill(arena: Arena, nbytes: int, side: Side) -> list[int]:
    handles = []
    while (handle := arena.allocate(nbytes, side)) >= 0:
        handles.append(handle)
        stamp(arena.view(handle), handle)
    return handles


def test_last_freed_is_allocated_first(owned: Owned) -> None:
    first, second = (owned.arena.allocate(100, Side.INGRESS) for _ in range(2))
    owned.arena.release(first)
    owned.arena.release(second)
    assert [owned.arena.allocate(100, Side.EGRESS) for _ in range(2)] == [second, first]


def test_full_side_leaves_the_other_alone(owned: Owned) -> None:
    assert len(fill(owned.arena, 1, Side.INGRESS)) == INGRESS_BYTES // PAGE_BYTES
    assert len(fill(owned.arena, 1, Side.EGRESS)) == EGRESS_BYTES // PAGE_BYTES


@pytest.mark.parametrize("first", SLOT_BYTES)
@pytest.mark.parametrize("second", SLOT_BYTES)
def test_no_history_makes_an_allocation_within_quota_fail(owned: Owned, first: int, second: int) -> None:
    held = fill(owned.arena, first, Side.INGRESS) + fill(owned.arena, first, Side.EGRESS)
    for handle in held[::2]:
        owned.arena.release(handle)
    for side, quota in ((Side.INGRESS, INGRESS_BYTES), (Side.EGRESS, EGRESS_BYTES)):
        free = quota - owned.arena.used_bytes(side)
        assert len(fill(owned.arena, second, side)) == free // second
    assert all(stamped(owned.arena.view(handle), handle) for handle in held[1::2])
    assert resident_bytes(owned.fd) <= INGRESS_BYTES + EGRESS_BYTES


def test_larger_than_a_slot_is_an_error(owned: Owned) -> None:
    assert owned.arena.allocate(SLOT_MAX_BYTES, Side.INGRESS) >= 0
    with pytest.raises(IndexError):
        owned.arena.allocate(SLOT_MAX_BYTES + 1, Side.INGRESS)


def test_view_with_length_is_the_start_of_the_slot(owned: Owned) -> None:
    handle = owned.arena.allocate(5000, Side.INGRESS)
    owned.arena.view(handle, 5)[:] = b"hello"
    assert bytes(owned.other.view(handle, 5)) == b"hello"
    assert owned.arena.view(handle) is owned.arena.view(handle)


def test_double_release_is_our_bug(owned: Owned) -> None:
    handle = owned.arena.allocate(1, Side.INGRESS)
    owned.arena.release(handle)
    with pytest.raises(AssertionError):
        owned.arena.release(handle)
    with pytest.raises(AssertionError):
        owned.arena.lend(handle, 1)


def test_released_slot_stays_until_its_last_borrower_returns_it(owned: Owned) -> None:
    handle = owned.arena.allocate(1, Side.EGRESS)
    for borrower in (1, 1, 2):
        owned.arena.lend(handle, borrower)
    owned.arena.release(handle)
    for borrower in (1, 2):
        assert owned.arena.give_back(handle, borrower)
        assert owned.arena.used_bytes(Side.EGRESS) == PAGE_BYTES
    assert not owned.arena.give_back(handle, 2)
    assert owned.arena.give_back(handle, 1)
    assert owned.arena.used_bytes(Side.EGRESS) == 0
    assert owned.arena.allocate(1, Side.EGRESS) == handle


def test_trim_punches_only_what_was_idle(owned: Owned) -> None:
    arena = owned.arena
    handles = fill(arena, 20 << 10, Side.INGRESS)
    kept = handles.pop()
    for handle in handles:
        arena.release(handle)
    assert arena.trim(100.0) == 0
    busy = [arena.allocate(20 << 10, Side.INGRESS) for _ in range(3)]
    for handle in busy:
        arena.release(handle)
    assert arena.trim(100.0 + IDLE_S - 0.1) == 0
    before = resident_bytes(owned.fd)
    idle = len(handles) - len(busy)
    assert arena.trim(100.0 + IDLE_S) == idle * (20 << 10)
    assert before - resident_bytes(owned.fd) == idle * (20 << 10)
    assert stamped(arena.view(kept), kept)
    assert arena.allocate(20 << 10, Side.INGRESS) == busy[-1]
    assert arena.trim(100.0 + 2 * IDLE_S) == 2 * (20 << 10)


def test_punching_for_another_class_does_not_make_the_rest_look_idle(owned: Owned) -> None:
    owned.arena.trim(0.0)
    for handle in fill(owned.arena, 1, Side.INGRESS) + fill(owned.arena, 1, Side.EGRESS):
        owned.arena.release(handle)
    assert owned.arena.allocate(SLOT_MAX_BYTES, Side.INGRESS) >= 0
    assert owned.arena.resident_bytes == INGRESS_BYTES + EGRESS_BYTES
    assert owned.arena.trim(IDLE_S) == 0


def test_trim_goes_on_where_its_limit_stopped_it(owned: Owned) -> None:
    handles = fill(owned.arena, 1, Side.INGRESS)
    for handle in handles:
        owned.arena.release(handle)
    owned.arena.trim(0.0)
    punched = 0
    calls = 0
    while count := owned.arena.trim(IDLE_S, limit_bytes=10 * PAGE_BYTES):
        assert count <= 10 * PAGE_BYTES
        punched += count
        calls += 1
    assert punched == len(handles) * PAGE_BYTES
    assert calls == -(-len(handles) // 10)
    assert resident_bytes(owned.fd) == owned.arena.resident_bytes == 0


def test_punched_slot_is_used_again_before_new_ones(owned: Owned) -> None:
    handle = owned.arena.allocate(1, Side.INGRESS)
    owned.arena.release(handle)
    owned.arena.trim(0.0)
    owned.arena.trim(IDLE_S)
    assert owned.arena.allocate(1, Side.INGRESS) == handle
    stamp(owned.arena.view(handle), 7)
    assert stamped(owned.other.view(handle, PAGE_BYTES), 7)


def test_memory_too_small_for_every_mixture_is_refused() -> None:
    size = arena_size(INGRESS_BYTES, EGRESS_BYTES)
    fd = create_arena(size)
    try:
        with pytest.raises(ValueError, match="cannot hold its quotas"):
            Arena(fd, size - PAGE_BYTES, INGRESS_BYTES, EGRESS_BYTES)
        with pytest.raises(ValueError, match="cannot hold its quotas"):
            Arena(fd, size, INGRESS_BYTES, -PAGE_BYTES)
        with pytest.raises(ValueError, match="greater than file size"):
            ArenaView(fd, size + PAGE_BYTES)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size - PAGE_BYTES)
    finally:
        os.close(fd)


@pytest.mark.parametrize("side", ["slot", "length"])
@pytest.mark.parametrize("value", [-1, 2**16, 2**31, 2**32 - 1])
def test_view_of_corrupted_numbers_is_refused(owned: Owned, side: str, value: int) -> None:
    value = value * PAGE_BYTES if side == "length" and value > 0 else value
    slot, length = (value, 1) if side == "slot" else (0, value)
    with pytest.raises(ValueError, match="outside the arena"):
        owned.other.view(slot, length)


def test_view_up_to_the_very_end_is_allowed_and_not_beyond(owned: Owned) -> None:
    last = owned.size // PAGE_BYTES - 1
    assert len(owned.other.view(last, PAGE_BYTES)) == PAGE_BYTES
    assert len(owned.other.view(last + 1, 0)) == 0
    with pytest.raises(ValueError, match="outside the arena"):
        owned.other.view(last, PAGE_BYTES + 1)
    with pytest.raises(ValueError, match="outside the arena"):
        owned.other.view(0, SLOT_MAX_BYTES + 1)


def test_borrower_cannot_write(owned: Owned) -> None:
    with pytest.raises(TypeError, match="read-only"):
        owned.other.view(0, 1)[0] = 1


def mappings(fd: int) -> int:
    inode = f" {os.fstat(fd).st_ino} "
    return sum(inode in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_closed_view_unmaps_when_its_last_bytes_are_gone(owned: Owned) -> None:
    handle = owned.arena.allocate(8, Side.INGRESS)
    stamp(owned.arena.view(handle), 99)
    other = ArenaView(owned.fd, owned.size)
    before = mappings(owned.fd)
    borrowed = other.view(handle, 8)
    other.close()
    with pytest.raises(ValueError, match="released"):
        other.view(handle, 8)
    del other
    gc.collect()
    assert mappings(owned.fd) == before
    assert borrowed == (99).to_bytes(8)
    del borrowed
    gc.collect()
    assert mappings(owned.fd) == before - 1
