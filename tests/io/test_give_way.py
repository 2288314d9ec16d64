"""A worker lets others run, but not those who take long."""

import pytest

from workers.io import give_way
from workers.io.give_way import LONG_NS, PAUSE_NS, GiveWay


class Machine:
    """A clock, and how long the others take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns = self.took_ns = 0
        self.yields = 0
        monkeypatch.setattr(give_way, "monotonic_ns", lambda: self.now_ns)
        monkeypatch.setattr(give_way, "sched_yield", self.sched_yield)

    def sched_yield(self) -> None:
        self.yields += 1
        self.now_ns += self.took_ns


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_others_run_first_as_long_as_they_are_quick(machine: Machine) -> None:
    way = GiveWay()
    machine.took_ns = LONG_NS
    for _ in range(5):
        way()
    assert machine.yields == 5


def test_who_has_waited_long_does_not_wait_again_for_a_while(machine: Machine) -> None:
    way = GiveWay()
    machine.took_ns = LONG_NS + 1
    way()
    for _ in range(5):
        way()
    assert machine.yields == 1
    machine.now_ns += PAUSE_NS
    way()
    way()
    assert machine.yields == 2
