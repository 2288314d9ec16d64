"""Which stripes are limited, to what, and when."""

import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from workers.core.shaping import BEGIN_US, FIRST, INTERVAL_US
from workers.io import mesh, sockets
from workers.io.lineup import FAR_US, TOGETHER_US, Lineup
from workers.io.shaping import LEAST_SHARE, Shaping
from workers.io.stripe import Stripe

LEAST_RTT_US = 50_000
QUEUED_US = 2 * BEGIN_US


class Carrier:
    """What shaping asks of a stripe. `limits`: those that it was given."""

    def __init__(self, rate_bps: float = 10e6, queue_us: int = QUEUED_US) -> None:
        self.rate_bps = rate_bps
        self.stalled, self.path = False, None
        self.info: Any = SimpleNamespace(acked_bytes=0, rtt_us=LEAST_RTT_US + queue_us, least_rtt_us=LEAST_RTT_US)
        self.limits: list[float] = []

    def limit(self, limit_bps: float) -> None:
        self.limits.append(limit_bps)


class World:
    """A worker's stripes of one session, as time goes by. `told`: what the other workers were sent."""

    def __init__(self, *carriers: Carrier) -> None:
        self.carriers = carriers
        stripes = cast(dict[int, Stripe], dict(enumerate(carriers)))
        self.lineup = Lineup(stripes)
        self.exchange = SimpleNamespace(light_us=0, tell_all=lambda kind: self.told.append(kind))
        self.told: list[int] = []
        self.shaping = Shaping("t", stripes, cast(Any, self.exchange), self.lineup)
        self.now_us = 100 * TOGETHER_US

    def run(self, intervals: int, *, light: bool = True, heavy: bool = True, elsewhere: bool = False) -> None:
        for _ in range(intervals):
            for carrier in self.carriers:
                if carrier.info is not None:
                    carrier.info.acked_bytes += int(carrier.rate_bps / 8 * INTERVAL_US / 1e6)
            self.now_us += INTERVAL_US
            if light:
                self.lineup.light_us = self.now_us
            if heavy:
                self.lineup.heavy_us = self.now_us
            if elsewhere:
                self.exchange.light_us = self.now_us
            self.shaping.on_time(self.now_us)


def test_each_stripe_gets_its_part_of_the_limit() -> None:
    quick, slow, unused = Carrier(30e6), Carrier(10e6), Carrier(0)
    World(quick, slow, unused).run(2)
    whole_bps = FIRST * 40e6
    assert quick.limits == [pytest.approx(whole_bps * 30 / 40, rel=1e-6)]
    assert slow.limits == [pytest.approx(whole_bps * 10 / 40, rel=1e-6)]
    assert unused.limits == [pytest.approx(whole_bps * LEAST_SHARE / 3, rel=1e-6)]


@pytest.mark.parametrize(("light", "heavy", "elsewhere", "limited"), [
    (True, True, False, True),
    (False, True, True, True),
    (False, True, False, False),
    (True, False, True, False),
])  # fmt: skip
def test_only_bulk_beside_small_frames_of_any_worker_is_limited(
    light: bool, heavy: bool, elsewhere: bool, limited: bool
) -> None:
    carrier = Carrier()
    world = World(carrier)
    world.run(4, light=light, heavy=heavy, elsewhere=elsewhere)
    assert bool(carrier.limits) == limited
    assert world.told == ([mesh.LIGHT] * 4 if light else [])


def test_limit_ends_with_the_small_frames() -> None:
    carriers = Carrier(), Carrier()
    world = World(*carriers)
    world.run(2)
    assert all(each.limits[-1] > 0 for each in carriers)
    world.run(1 + TOGETHER_US // INTERVAL_US, light=False)
    assert all(each.limits[-1] == 0 for each in carriers)
    count = len(carriers[0].limits)
    world.run(5, light=False)
    assert len(carriers[0].limits) == count


def test_stripes_for_small_frames_are_not_limited_and_tell_whether_they_queue() -> None:
    bulk, express = Carrier(), Carrier(1e3, queue_us=0)
    world = World(bulk, express)
    world.lineup.express.append(cast(Stripe, express))
    world.run(10)
    assert not bulk.limits, "each connection has a queue of its own"
    express.info.rtt_us = LEAST_RTT_US + QUEUED_US
    world.run(1)
    assert bulk.limits == [pytest.approx(FIRST * 10e6, rel=1e-3)] and express.limits == [0]


def test_stripe_that_changes_its_part_is_limited_or_set_free() -> None:
    bulk, express = Carrier(), Carrier(1e3)
    world = World(bulk, express, *(Carrier() for _ in range(6)))
    world.lineup.express.append(cast(Stripe, express))
    world.run(2)
    world.lineup.express[:] = [cast(Stripe, bulk)]
    world.run(1)
    assert bulk.limits[-1] == 0 and express.limits[-1] > 0


def test_stalled_stripes_and_such_without_meters_do_not_count() -> None:
    well, stalled, unknown = Carrier(), Carrier(90e6), Carrier()
    stalled.stalled, unknown.info = True, None
    World(well, stalled, unknown).run(2)
    assert well.limits == [pytest.approx(FIRST * 10e6, rel=1e-6)] and not stalled.limits and not unknown.limits


def test_near_end_is_not_limited() -> None:
    carrier = Carrier()
    carrier.info.least_rtt_us, carrier.info.rtt_us = FAR_US - 1, FAR_US + 10 * QUEUED_US
    World(carrier).run(10)
    assert not carrier.limits


def test_new_stripe_is_measured_before_it_counts() -> None:
    first, second = Carrier(), Carrier()
    world = World(first)
    world.run(2)
    second.info.acked_bytes = 1 << 40
    world.carriers = first, second
    cast(Any, world.shaping)._stripes[1] = second
    world.run(1)
    assert second.limits[-1] == pytest.approx(first.limits[-1] * LEAST_SHARE / 2)
    world.run(2)
    assert second.limits[-1] == pytest.approx(first.limits[-1])


@pytest.fixture
def connection() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sock:
        yield sock


@pytest.mark.parametrize(("limit_bps", "bytes_a_second"), [
    (8e6, 1_000_000), (1.0, 1), (1e12, (1 << 31) - 1), (0, (1 << 32) - 1),
])  # fmt: skip
def test_kernel_takes_the_limit_and_none(connection: socket.socket, limit_bps: float, bytes_a_second: int) -> None:
    sockets.set_pacing_limit(connection, 5e6)
    sockets.set_pacing_limit(connection, limit_bps)
    set_to = connection.getsockopt(socket.SOL_SOCKET, sockets.SO_MAX_PACING_RATE) & 0xFFFFFFFF
    assert set_to == bytes_a_second
