"""Counters that were seen, against a set of them; memory stays bounded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.core import closed
from workers.core.closed import EARLIER, MAX_TOMBSTONES, TOMBSTONE_US, Finished, SeenCounters
from workers.core.errors import RemoteProtocolError


class Model:
    """A set of what was seen; what lies too far below the first counts as seen."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.floor: int | None = None

    def admit(self, counter: int) -> bool:
        if self.floor is None:
            self.floor = counter - EARLIER
        new = counter >= self.floor and counter not in self.seen
        self.seen.add(counter)
        return new


near = st.integers(0, 40)
around = st.integers(3_000 - EARLIER - 3, 3_000 + EARLIER)


@given(st.lists(near))
def test_any_order_is_as_the_model_says(counters: list[int]) -> None:
    seen, model = SeenCounters(), Model()
    assert [seen.admit(counter) for counter in counters] == [model.admit(counter) for counter in counters]


@given(st.lists(st.one_of(around, st.integers(0, 1 << 40)), min_size=1))
def test_counters_that_begin_late_are_as_the_model_says(counters: list[int]) -> None:
    seen, model = SeenCounters(), Model()
    order = [3_000, *counters]
    assert [seen.admit(counter) for counter in order] == [model.admit(counter) for counter in order]


@given(st.permutations(range(60)))
def test_each_counter_is_admitted_once(order: list[int]) -> None:
    seen = SeenCounters()
    assert all(seen.admit(counter) for counter in order)
    assert not any(seen.admit(counter) for counter in order)


def test_leap_costs_no_memory() -> None:
    seen = SeenCounters()
    assert seen.admit(0)
    assert seen.admit((1 << 40) - 1)
    assert len(seen._gaps) == 1
    assert seen.admit(1 << 20)
    assert not seen.admit(1 << 20)


def test_gaps_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed, "MAX_GAPS", 3)
    seen = SeenCounters()
    for counter in (0, 10, 20):
        assert seen.admit(counter)
    assert seen.admit(5)
    for counter in (30, 15):
        with pytest.raises(RemoteProtocolError, match="more than 3 gaps"):
            seen.admit(counter)
    assert seen.admit(21)
    assert seen.admit(1)
    assert not seen.admit(5)


def test_finished_stream_is_known_for_a_while() -> None:
    finished = Finished()
    finished.add(7, 100, 0)
    finished.expire(TOMBSTONE_US)
    assert finished.total(7) == 100 and finished.total(8) is None
    finished.expire(TOMBSTONE_US + 1)
    assert finished.total(7) is None and not len(finished)


def test_oldest_finished_stream_goes_for_one_too_many() -> None:
    finished = Finished()
    for flow in range(MAX_TOMBSTONES + 1):
        finished.add(flow, 1, flow)
    assert len(finished) == MAX_TOMBSTONES
    assert finished.total(0) is None and finished.total(1) == 1
