"""The path MTU search against a model of a path: it ends at what passes, and leaves what does not."""

import random

from hypothesis import given
from hypothesis import strategies as st

from workers.core.path_mtu import (
    BASE,
    CONFIRM_US,
    LEAST,
    PROBE_LIFE_US,
    RAISE_US,
    STEP,
    TRIES,
    PathMtu,
)

SECOND = 1_000_000
PROBE_US = 200_000


class Path:
    """Lets records of up to `mtu` through, and loses any with a chance of `loss`; a small PING follows each probe."""

    def __init__(self, search: PathMtu, mtu: int, loss: float = 0.0, seed: int = 0) -> None:
        self.search, self.mtu, self.loss = search, mtu, loss
        self.random = random.Random(seed)
        self.now_us = SECOND
        self.probes: list[int] = []

    def run(self, seconds: float, *, is_busy: bool = False) -> None:
        end_us = self.now_us + int(seconds * SECOND)
        while self.now_us < end_us:
            self.now_us += PROBE_US
            size = self.search.next_probe(self.now_us, is_busy)
            if size:
                self.probes.append(size)
                self.search.on_probe_sent(size, self.now_us)
                if size <= self.mtu and self.random.random() >= self.loss:
                    self.search.on_probe_answered(size, self.now_us)
            if self.random.random() >= self.loss:
                self.search.on_small_answered(self.now_us + 1)


def test_link_that_carries_everything_takes_two_probes() -> None:
    search = PathMtu(1472)
    path = Path(search, 1472)
    path.run(60)
    assert path.probes == [BASE, 1472]
    assert search.size == 1472


def test_own_link_below_the_base_is_the_base() -> None:
    search = PathMtu(1000)
    path = Path(search, 1500)
    path.run(60)
    assert (search.size, path.probes) == (1000, [1000])


@given(mtu=st.integers(LEAST, 9000), most=st.integers(LEAST, 9000), seed=st.integers(0, 99))
def test_search_ends_within_a_step_below_the_mtu(mtu: int, most: int, seed: int) -> None:
    search = PathMtu(most)
    path = Path(search, mtu, seed=seed)
    path.run(20)
    reachable = min(mtu, most)
    assert reachable - STEP <= search.size <= reachable
    assert len(path.probes) <= TRIES * 14
    count = len(path.probes)
    path.run(500)
    assert len(path.probes) == count


@given(mtu=st.integers(700, 1500), seed=st.integers(0, 999))
def test_random_loss_never_leads_above_the_mtu_and_is_mended(mtu: int, seed: int) -> None:
    search = PathMtu(1472)
    path = Path(search, mtu, 0.1, seed)
    path.run(60)
    assert LEAST <= search.size <= mtu or search.size == BASE
    path.loss = 0
    path.run(RAISE_US / SECOND + 30)
    reachable = min(mtu, 1472)
    assert search.size <= reachable
    assert search.size >= reachable - STEP


def test_search_starts_again_when_the_raise_timer_ends() -> None:
    search = PathMtu(1472)
    path = Path(search, 1300)
    path.run(20)
    path.mtu = 1472
    path.run(RAISE_US / SECOND - 60)
    assert search.size <= 1300
    path.run(60)
    assert search.size == 1472


def test_current_size_is_confirmed_while_data_is_sent_and_a_black_hole_left() -> None:
    search = PathMtu(1472)
    path = Path(search, 1472)
    path.run(2)
    path.probes.clear()
    path.run(2 * CONFIRM_US / SECOND + 1, is_busy=True)
    assert path.probes == [1472] * 2
    path.mtu = 1350
    path.run(CONFIRM_US / SECOND + 4, is_busy=True)
    assert 1350 - STEP <= search.size <= 1350


def test_trouble_confirms_at_once_and_changes_nothing_when_the_size_passes() -> None:
    search = PathMtu(1472)
    path = Path(search, 1472)
    path.run(2)
    path.probes.clear()
    search.on_trouble()
    path.run(1)
    assert (path.probes, search.size) == ([1472], 1472)


def test_lost_with_everything_else_a_probe_says_nothing() -> None:
    search = PathMtu(1472)
    path = Path(search, 1472, loss=1.0)
    path.run(10 * PROBE_LIFE_US / SECOND)
    assert search.size == BASE
    path.loss = 0
    path.run(2 * PROBE_LIFE_US / SECOND)
    assert search.size == 1472


def test_small_answer_from_before_the_probe_says_nothing() -> None:
    search = PathMtu(1472)
    search.on_probe_sent(search.next_probe(SECOND, False), SECOND)
    assert search.is_waiting
    assert not search.on_small_answered(SECOND)
    assert search.on_small_answered(SECOND + 1)
    assert not search.is_waiting


def test_new_connection_has_the_size_confirmed_and_the_old_probe_forgotten() -> None:
    search = PathMtu(1472)
    path = Path(search, 1472)
    path.run(2)
    search.on_trouble()
    search.on_probe_sent(search.next_probe(path.now_us, False), path.now_us)
    search.on_reconnected()
    assert not search.on_small_answered(path.now_us + 1)
    assert search.next_probe(path.now_us, False) == search.size == 1472


def test_size_that_the_kernel_refuses_is_given_up_at_once() -> None:
    search = PathMtu(1472)
    path = Path(search, 1472)
    path.run(2)
    search.on_too_large(1372)
    assert search.size == 1372
    search.on_too_large(100)
    assert search.size == LEAST
    search.on_too_large(1472)
    path.run(3)
    assert search.size == 1472
