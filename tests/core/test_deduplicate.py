"""Numbers of datagrams, each admitted once: against a set of what came."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.core.deduplicate import BLOCK, RESTART, WINDOW, SequenceWindow

NUMBERS = 1 << 32
starts = st.one_of(st.integers(0, NUMBERS - 1), st.sampled_from((0, 1, NUMBERS - 1, NUMBERS - WINDOW)))
EDGES = [edge + near for edge in (0, BLOCK, WINDOW, RESTART) for near in (-2, -1, 0, 1, 2)]
steps = st.one_of(
    st.integers(-5, 5),
    st.integers(-BLOCK * 3, BLOCK * 3),
    st.sampled_from(EDGES),
    st.sampled_from([-edge for edge in EDGES]),
    st.integers(-RESTART - WINDOW, RESTART + WINDOW),
    st.integers(1 - NUMBERS // 2, NUMBERS // 2),
)


class Model:
    """A set of unwrapped numbers; steps are told to it unwrapped, relative to the highest."""

    def __init__(self) -> None:
        self.highest: int | None = None
        self.seen: set[int] = set()

    def admit(self, number: int) -> bool:
        if self.highest is None or self.highest - number >= RESTART:
            self.highest, self.seen = number, {number}
            return True
        if self.highest - number >= WINDOW or number in self.seen:
            return False
        self.seen.add(number)
        self.highest = max(self.highest, number)
        return True


@given(starts, st.lists(steps, max_size=60))
def test_any_order_is_as_the_model_says(start: int, walk: list[int]) -> None:
    window, model = SequenceWindow(), Model()
    number = start
    for step in (0, *walk):
        number = (start if model.highest is None else model.highest) + step
        new = model.admit(number)
        assert window.has(number % NUMBERS) is not new
        assert window.admit(number % NUMBERS) is new
        assert window.has(number % NUMBERS)
        assert len(window._blocks) <= WINDOW // BLOCK + 2


@given(starts, st.permutations(range(80)))
def test_each_number_is_admitted_once(start: int, order: list[int]) -> None:
    window = SequenceWindow()
    assert all(window.admit((start + number) % NUMBERS) for number in order)
    assert not any(window.admit((start + number) % NUMBERS) for number in order)


@given(starts, st.integers(0, 300), st.integers(500, 3000))
def test_second_path_that_lags_brings_nothing_new(start: int, lag: int, count: int) -> None:
    window = SequenceWindow()
    admitted = 0
    for place in range(count + lag):
        if place < count:
            admitted += window.admit((start + place) % NUMBERS)
        if place >= lag:
            assert not window.admit((start + place - lag) % NUMBERS)
    assert admitted == count


def test_memory_is_bounded_by_the_window_whatever_the_gaps() -> None:
    window = SequenceWindow()
    for number in range(0, 3 * WINDOW, BLOCK):
        assert window.admit(number)
        assert len(window._blocks) <= WINDOW // BLOCK + 1
    assert window.admit(NUMBERS // 2)
    assert len(window._blocks) == 1


def test_whole_window_is_remembered_and_not_more() -> None:
    window = SequenceWindow()
    oldest, later = 5, 5 + WINDOW // 2
    assert window.admit(oldest) and window.admit(later) and window.admit(oldest + WINDOW - 1)
    assert window.has(oldest) and not window.has(oldest + 1)
    assert not window.admit(oldest) and window.admit(oldest + 1)
    assert window.admit(oldest + WINDOW + 2 * BLOCK)
    assert not window.admit(oldest + 2)
    assert not window.admit(later) and window.admit(later + 1)


@pytest.mark.parametrize("first", [0, 12_345, NUMBERS - 1])
def test_sender_that_begins_anew_is_heard_at_once(first: int) -> None:
    window = SequenceWindow()
    for number in range(1_000):
        window.admit((first + number) % NUMBERS)
    anew = (first - 2 * RESTART) % NUMBERS
    assert not window.has(anew)
    assert all(window.admit((anew + number) % NUMBERS) for number in range(1_000))
    assert not window.admit(anew)
