"""How bulk's limit follows a queue: on a link whose queue fills with what is sent beyond its rate."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.core.shaping import (
    AGAIN_MAX_US,
    AGAIN_US,
    APART,
    BEGIN_US,
    FIRST,
    INTERVAL_US,
    JITTER,
    LEAST,
    MORE_MAX,
    NEWEST,
    QUEUE_US,
    Queues,
    Shaper,
)

RTT_US = 50_000.0
QUEUE_MAX_US = 20_000.0
FOREIGN_US = 12_000.0


class World:
    """Bulk that sends `demand_bps`, limited by the shaper, over a link of `rate_bps` with `foreign_us` of somebody
    else's queue."""

    def __init__(
        self, rate_bps: float, demand_bps: float = 1e12, foreign_us: float = 0.0, most_us: float = QUEUE_MAX_US
    ) -> None:
        self.shaper = Shaper()
        self.most_us = most_us
        self.rate_bps, self.demand_bps, self.foreign_us = rate_bps, demand_bps, foreign_us
        self.now_us = 1_000_000
        self.queue_us = 0.0
        self.smoothed_bps = self.sent_bps = min(rate_bps, demand_bps)

    def step(self) -> None:
        limit_bps = self.shaper.limit_bps or 2 * self.rate_bps
        offered_bps = min(self.demand_bps, limit_bps)
        self.now_us += INTERVAL_US
        before_us = self.queue_us
        fuller_us = (offered_bps / self.rate_bps - 1) * INTERVAL_US
        self.queue_us = min(max(before_us + fuller_us, 0.0), self.most_us)
        drained_bps = (before_us - self.queue_us) / INTERVAL_US * self.rate_bps
        self.sent_bps = min(offered_bps + max(drained_bps, 0.0), self.rate_bps)
        self.smoothed_bps += NEWEST * (self.sent_bps - self.smoothed_bps)
        seen_us = max(self.queue_us, self.foreign_us)
        self.shaper.on_interval(self.now_us, self.smoothed_bps, self.sent_bps, Queues(seen_us, seen_us, RTT_US))

    def run(self, seconds: float) -> tuple[float, float]:
        """The share of the time in which there was a queue, and of the rate that was used."""
        steps = round(seconds * 1e6 / INTERVAL_US)
        queued = used = 0.0
        for _ in range(steps):
            self.step()
            queued += self.queue_us > 2 * QUEUE_US
            used += self.sent_bps / self.rate_bps
        return queued / steps, used / steps


def shaper_after(small_us: float, *, shortest_us: float = RTT_US, latest_bps: float = 100e6) -> Shaper:
    shaper = Shaper()
    shaper.on_interval(1, 100e6, latest_bps, Queues(30_000, small_us, shortest_us))
    return shaper


@given(st.floats(1e5, 1e11))
def test_queue_is_soon_gone_and_the_link_stays_in_use(rate_bps: float) -> None:
    world = World(rate_bps)
    world.run(3)
    assert world.shaper.limit_bps > 0
    queued, used = world.run(60)
    assert queued < 0.2 and used > 0.95


@pytest.mark.parametrize("most_us", [50_000, 200_000, 500_000, 1_000_000])
def test_deep_queue_is_drained_in_seconds_too(most_us: float) -> None:
    world = World(100e6, most_us=most_us)
    world.queue_us = most_us
    world.run(12)
    queued, used = world.run(60)
    assert queued < 0.2 and used > 0.95


def test_begins_where_small_frames_queue() -> None:
    for small_us, begins in ((BEGIN_US, False), (BEGIN_US + 1, True)):
        assert shaper_after(small_us).limit_bps == (FIRST * 100e6 if begins else 0)


def test_longer_paths_may_vary_more() -> None:
    assert not shaper_after(19_000, shortest_us=200_000).limit_bps
    assert shaper_after(21_000, shortest_us=200_000).limit_bps
    assert Queues(0, 0, 200_000).allowed_us(QUEUE_US) == JITTER * 100_000


def test_does_not_begin_while_the_rate_still_grows() -> None:
    assert not shaper_after(QUEUE_MAX_US, latest_bps=200e6).limit_bps


@pytest.mark.parametrize(("bulk_us", "small_us"), [(0.0, QUEUE_MAX_US), (QUEUE_MAX_US, 0.0), (QUEUE_MAX_US, None)])
def test_does_not_begin_where_it_is_not_known_that_both_queue(bulk_us: float, small_us: float | None) -> None:
    shaper = Shaper()
    shaper.on_interval(1, 100e6, 100e6, Queues(bulk_us, small_us, RTT_US))
    assert not shaper.limit_bps


def test_begins_from_the_rate_of_now_where_it_grows() -> None:
    assert shaper_after(QUEUE_MAX_US, latest_bps=120e6).limit_bps == FIRST * 120e6


def test_ends_where_only_bulk_has_a_queue() -> None:
    shaper = shaper_after(QUEUE_MAX_US)
    for _ in range(APART):
        assert shaper.limit_bps
        for small_us in (None, 0.0):
            shaper.on_interval(2, 100e6, 100e6, Queues(QUEUE_MAX_US, small_us, RTT_US))
    assert not shaper.limit_bps
    for now_us, begins in ((AGAIN_US + 1, False), (AGAIN_US + 2, True)):
        shaper.on_interval(now_us, 100e6, 100e6, Queues(QUEUE_MAX_US, QUEUE_MAX_US, RTT_US))
        assert bool(shaper.limit_bps) == begins


def test_goes_on_where_small_frames_queue_at_times() -> None:
    shaper = shaper_after(QUEUE_MAX_US)
    for small_us in (0.0, QUEUE_MAX_US, 0.0, None, QUEUE_MAX_US):
        shaper.on_interval(2, 100e6, 100e6, Queues(QUEUE_MAX_US, small_us, RTT_US))
    assert shaper.limit_bps


def test_queue_of_others_is_left_alone_after_a_try_and_tried_again_later() -> None:
    world = World(100e6, foreign_us=FOREIGN_US)
    least_bps, tries, limited = 100e6, [], False
    while world.now_us < 7 * AGAIN_US:
        world.step()
        if world.shaper.limit_bps:
            least_bps = min(least_bps, world.shaper.limit_bps)
            if not limited:
                tries.append(world.now_us)
        limited = bool(world.shaper.limit_bps)
    assert least_bps >= LEAST * 100e6
    assert len(tries) == 3 and tries[1] - tries[0] > AGAIN_US and tries[2] - tries[1] > 2 * AGAIN_US
    assert world.run(AGAIN_MAX_US / 1e6)[1] > 0.98


def test_limit_that_is_not_used_does_not_grow() -> None:
    world = World(100e6)
    world.run(10)
    world.demand_bps = 10e6
    world.run(5)
    limit_bps = world.shaper.limit_bps
    world.run(60)
    assert world.shaper.limit_bps == limit_bps


@pytest.mark.parametrize("times", [0.3, 3.0])
def test_another_rate_is_found(times: float) -> None:
    world = World(100e6)
    world.run(10)
    world.rate_bps *= times
    world.run(45)
    queued, used = world.run(60)
    assert queued < 0.2 and used > 0.95


def test_growth_is_bounded() -> None:
    world = World(100e6)
    world.run(10)
    world.rate_bps *= 10
    for _ in range(20):
        before_bps = world.shaper.limit_bps
        world.step()
        assert world.shaper.limit_bps <= before_bps * (1 + MORE_MAX) * 1.000001


def test_release_ends_it_and_it_may_begin_again_at_once() -> None:
    world = World(100e6)
    world.run(3)
    world.shaper.release()
    assert not world.shaper.limit_bps
    world.run(1)
    assert world.shaper.limit_bps > 0
