"""The replay window: against a set, at its edges, and over leaps."""

from hypothesis import given
from hypothesis import strategies as st

from workers.core.replay import WINDOW, ReplayWindow


class Model:
    """Every counter ever marked."""

    def __init__(self) -> None:
        self.marked: set[int] = set()
        self.highest = -1

    def is_fresh(self, counter: int) -> bool:
        return counter > self.highest - WINDOW and counter not in self.marked

    def mark(self, counter: int) -> None:
        self.marked.add(counter)
        self.highest = max(self.highest, counter)


# Counters relative to the highest so far: near it, about the window's edge, and leaps of any width.
steps = st.one_of(
    st.integers(-200, 200),
    st.integers(-WINDOW - 1100, -WINDOW + 1100),
    st.integers(WINDOW - 1100, WINDOW + 1100),
    st.integers(0, 2**40),
)
runs = st.tuples(steps, st.one_of(st.integers(1, 70), st.integers(1000, 3000)))


@given(st.lists(steps, max_size=60))
def test_single_counters_are_fresh_as_in_the_model(walk: list[int]) -> None:
    window, model = ReplayWindow(), Model()
    for step in walk:
        counter = max(model.highest + step, 0)
        fresh = model.is_fresh(counter)
        assert window.is_fresh(counter) == fresh
        if fresh:
            window.mark(counter)
            model.mark(counter)
            assert not window.is_fresh(counter)
        assert window.highest == model.highest


@given(st.lists(runs, max_size=25))
def test_runs_are_fresh_as_their_counters_are_in_the_model(walk: list[tuple[int, int]]) -> None:
    window, model = ReplayWindow(), Model()
    for step, count in walk:
        first = max(model.highest + step, 0)
        run = range(first, first + count)
        fresh = all(map(model.is_fresh, run))
        assert window.fresh_run(first, count) == fresh
        if fresh:
            window.mark_run(first, count)
            for counter in run:
                model.mark(counter)
        for counter in (first - 1, first, first + count // 2, first + count - 1, first + count, model.highest - WINDOW):
            if counter >= 0:
                assert window.is_fresh(counter) == model.is_fresh(counter)


@given(st.permutations(range(40)), st.integers(0, 2**50))
def test_any_order_within_the_window_is_taken_once(order: list[int], base: int) -> None:
    window = ReplayWindow()
    for counter in order:
        assert window.is_fresh(base + counter)
        window.mark(base + counter)
    assert not any(window.is_fresh(base + counter) for counter in order)


def test_window_reaches_65536_back_and_no_further() -> None:
    window = ReplayWindow()
    window.mark(WINDOW + 5)
    assert window.is_fresh(6)
    assert not window.is_fresh(5)
    assert window.fresh_run(6, 10)
    assert not window.fresh_run(5, 10)


def test_run_that_overlaps_a_marked_counter_is_not_fresh() -> None:
    window = ReplayWindow()
    window.mark(1030)
    assert window.fresh_run(1000, 30)
    assert not window.fresh_run(1000, 31)
    assert not window.fresh_run(1030, 2)
    assert window.fresh_run(1031, 2000)


def test_run_above_the_highest_is_fresh_where_older_bits_still_lie() -> None:
    window = ReplayWindow()
    window.mark_run(0, 64 * 1024)
    assert window.fresh_run(64 * 1024, 2048)
    window.mark_run(64 * 1024, 2048)
    assert not window.is_fresh(64 * 1024 + 2047)
    assert window.is_fresh(64 * 1024 + 2048)


def test_leap_over_everything_forgets_it_at_a_bounded_cost() -> None:
    window = ReplayWindow()
    window.mark_run(0, 5000)
    window.mark(2**63)
    assert not window.is_fresh(4999)
    assert window.is_fresh(2**63 - WINDOW + 1)
    assert window.fresh_run(2**63 - 5000, 5000)
