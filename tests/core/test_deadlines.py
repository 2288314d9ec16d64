"""Which of many are due: against a loop over all of them."""

from hypothesis import given
from hypothesis import strategies as st

from workers.core.deadlines import Deadlines, Watched

COUNT = 5
STEPS = st.lists(
    st.tuples(st.sampled_from(("move", "watch", "forget", "due")), st.integers(0, COUNT - 1), st.integers(0, 50))
)


@given(STEPS)
def test_those_that_are_due_are_those_whose_deadline_has_come(steps: list[tuple[str, int, int]]) -> None:
    deadlines: Deadlines[Watched] = Deadlines()
    every = [Watched(0) for _ in range(COUNT)]
    watched: set[Watched] = set()
    for what, index, time_us in steps:
        each = every[index]
        if what == "move":
            each.set_deadline(time_us)
        elif what == "watch" and each not in watched:
            deadlines.watch(each)
            watched.add(each)
        elif what == "forget":
            deadlines.forget(each)
            watched.discard(each)
        elif what == "due":
            due = deadlines.due(time_us)
            assert len(due) == len(set(due))
            assert set(due) == {one for one in watched if one.deadline_us <= time_us}


def test_deadline_that_moves_away_costs_one_entry_however_often_it_moves() -> None:
    deadlines: Deadlines[Watched] = Deadlines()
    each = Watched(0)
    deadlines.watch(each)
    for time_us in range(1, 1000):
        each.set_deadline(time_us + 1)
        assert deadlines.due(time_us) == []
    assert len(deadlines._heap) == 1
