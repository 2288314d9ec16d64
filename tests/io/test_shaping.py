"""Which stripes are limited, to what, and when."""

import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from workers.core import frame
from workers.core.shaping import BEGIN_US, FIRST, INTERVAL_US, NEWEST
from workers.io import mesh, sockets
from workers.io.exchange import Exchange
from workers.io.lineup import EXPRESS_STRIPES, FAR_US, TOGETHER_US, Lineup
from workers.io.shaping import HOLD_US, LEAST_BPS, LEAST_SHARE, LIGHT_INTERVALS, MEASURED, PROBED, Shaping
from workers.io.stripe import Stripe

LEAST_RTT_US = 50_000
QUEUED_US = 2 * BEGIN_US
LATELY = TOGETHER_US // INTERVAL_US
BEGUN = MEASURED + 1
"""Intervals until there is a limit: in the first nothing can be measured yet."""


class Carrier:
    """What shaping asks of a stripe. `limits`: those that it was given; `pings`: how many it was to send, of which each
    is answered within an interval if `answers`."""

    def __init__(self, rate_bps: float = 10e6, queue_us: int = QUEUED_US) -> None:
        self.rate_bps, self.queue_us = rate_bps, queue_us
        self.stalled, self.path, self.answers = False, None, True
        self.info: Any = SimpleNamespace(acked_bytes=0)
        self.rtt_us = LEAST_RTT_US + queue_us
        self.least_rtt_us = LEAST_RTT_US
        self.limits: list[float] = []
        self.pings = self.pinged_us = 0

    def send(self, data: bytes) -> None:
        assert frame.unpack(data).kind == frame.PING
        self.pings += 1

    def flush(self) -> None:
        pass

    def limit(self, limit_bps: float) -> None:
        self.limits.append(limit_bps)


class World:
    """A worker's stripes of one session, as time goes by. The last of `carriers` is kept for small frames, unless
    others are. `told`: what the other workers were sent."""

    def __init__(self, *carriers: Carrier, express: tuple[Carrier, ...] | None = None) -> None:
        express = (Carrier(0),) if express is None else express
        self.carriers = [*carriers, *express]
        self.stripes = cast(dict[int, Stripe], dict(enumerate(self.carriers)))
        self.lineup = Lineup(self.stripes)
        self.keep(*express)
        self.told: list[tuple[bool, bool, int | None]] = []
        self.exchange = SimpleNamespace(light_us=0, heavy_us=0, small_us=None, tell_traffic=self.tell)
        self.shaping = Shaping("t", self.stripes, cast(Any, self.exchange), self.lineup)
        self.now_us = 100 * TOGETHER_US

    def tell(self, light: bool, heavy: bool, small_us: int | None) -> None:
        self.told.append((light, heavy, small_us))

    def keep(self, *express: Carrier) -> None:
        self.lineup.express = cast(list[Stripe], list(express))

    def run(self, intervals: int, *, light: bool = True, heavy: bool = True, elsewhere_us: int | None = None) -> None:
        for _ in range(intervals):
            for carrier in self.carriers:
                if carrier.info is not None:
                    carrier.info.acked_bytes += int(carrier.rate_bps / 8 * INTERVAL_US / 1e6)
            self.now_us += INTERVAL_US
            if light:
                self.lineup.light_us = self.now_us
            if heavy:
                self.lineup.heavy_us = self.now_us
            if elsewhere_us is not None:
                self.exchange.light_us, self.exchange.small_us = self.now_us, elsewhere_us
            self.shaping.on_time(self.now_us)
            for carrier in self.carriers:
                if carrier.pinged_us and carrier.answers:
                    carrier.pinged_us = 0
                    self.shaping.on_pong(cast(Stripe, carrier), LEAST_RTT_US + carrier.queue_us)


def few(count: int) -> tuple[Carrier, ...]:
    return tuple(Carrier() for _ in range(count))


def test_each_stripe_gets_its_part_of_the_limit() -> None:
    quick, slow, unused = Carrier(30e6), Carrier(10e6), Carrier(0)
    World(quick, slow, unused).run(BEGUN)
    least_bps = LEAST_SHARE * 40e6 / 3
    limits_bps = [FIRST * 40e6 * part_bps / (40e6 + least_bps) for part_bps in (30e6, 10e6, least_bps)]
    assert [*quick.limits, *slow.limits, *unused.limits] == pytest.approx(limits_bps, rel=1e-6)


def test_limit_is_never_so_low_that_the_kernel_waits_long() -> None:
    carriers = [Carrier(1e4) for _ in range(100)]
    World(*carriers).run(BEGUN)
    assert all(each.limits == [LEAST_BPS] for each in carriers)


@pytest.mark.parametrize(("light", "heavy", "elsewhere_us", "limited"), [
    (True, True, None, True),
    (False, True, QUEUED_US, True),
    (False, True, 0, False),
    (False, True, None, False),
    (True, False, QUEUED_US, False),
])  # fmt: skip
def test_only_bulk_beside_small_frames_that_queue_is_limited(
    light: bool, heavy: bool, elsewhere_us: int | None, limited: bool
) -> None:
    carrier = Carrier()
    World(carrier).run(BEGUN, light=light, heavy=heavy, elsewhere_us=elsewhere_us)
    assert bool(carrier.limits) == limited


def test_other_workers_learn_what_is_sent_and_how_long_small_frames_queue() -> None:
    world = World(*few(5))
    world.run(3)
    assert world.told == [(False, True, None), (True, True, QUEUED_US), (True, True, QUEUED_US)]
    world.run(LATELY + 1, light=False)
    assert world.told[-1] == (False, True, None)
    world.run(LATELY, light=False, heavy=False)
    world.told.clear()
    world.run(3, light=False, heavy=False)
    assert not world.told


def test_limit_ends_with_the_small_frames() -> None:
    carriers = few(2)
    world = World(*carriers)
    world.run(BEGUN)
    for each in carriers:
        each.rtt_us = LEAST_RTT_US
    world.run(HOLD_US // INTERVAL_US, light=False)
    assert all(each.limits[-1] > 0 for each in carriers), "people and programs ask in bursts"
    world.run(1, light=False)
    assert all(each.limits[-1] == 0 for each in carriers)
    count = len(carriers[0].limits)
    world.run(5, light=False)
    assert len(carriers[0].limits) == count


def test_limit_ends_with_the_bulk() -> None:
    carriers = few(2)
    world = World(*carriers)
    world.run(BEGUN)
    world.run(LATELY, heavy=False)
    assert all(each.limits[-1] == 0 for each in carriers)


def test_what_was_measured_before_small_frames_came_counts() -> None:
    kept, others = Carrier(), few(4)
    world = World(kept, *others)
    world.run(BEGUN, light=False)
    world.keep(kept, world.carriers[-1])
    kept.rate_bps = 0.0
    world.run(LIGHT_INTERVALS)
    path_bps = 40e6 + 10e6 * (1 - NEWEST) ** LIGHT_INTERVALS
    assert others[0].limits == [pytest.approx(FIRST * path_bps / 4, rel=1e-6)]


def test_first_bytes_of_a_transfer_count_as_small_without_effect() -> None:
    carriers = few(2)
    world = World(*carriers)
    world.run(1)
    world.run(20, light=False)
    assert not any(each.limits for each in carriers)


def test_stripes_for_small_frames_are_not_limited_and_tell_whether_they_queue() -> None:
    bulk, express = Carrier(), Carrier(1e3, queue_us=0)
    world = World(bulk, *few(4), express=(express,))
    world.run(10 * BEGUN)
    assert not bulk.limits, "each connection has a queue of its own"
    express.queue_us = QUEUED_US
    world.run(2)
    assert bulk.limits == [pytest.approx(FIRST * 50e6 / 5, rel=1e-3)] and express.limits == [0]
    assert express.pings == 10 * BEGUN + 2 and not bulk.pings


def test_soonest_of_few_answers_counts() -> None:
    late, soon = Carrier(queue_us=10 * QUEUED_US), Carrier(queue_us=BEGIN_US // 2)
    world = World(*few(5), express=(late, soon, *few(PROBED)))
    world.run(4)
    assert world.told[-1][2] == BEGIN_US // 2
    assert [each.pings > 0 for each in world.carriers] == [False] * 5 + [True] * PROBED + [False] * 2


def test_nothing_is_limited_where_no_answer_comes() -> None:
    world = World(*few(5))
    world.carriers[-1].answers = False
    world.run(10)
    assert world.carriers[-1].pings == 1, "the next is sent after an answer"
    assert not any(each.limits for each in world.carriers) and world.told[-1][2] is None


def test_worker_without_bulk_asks_any_of_its_stripes_while_others_have_some() -> None:
    world = World(*few(5), express=())
    world.run(3, heavy=False)
    assert not any(each.pings for each in world.carriers)
    world.exchange.heavy_us = world.now_us + INTERVAL_US
    world.run(2, heavy=False)
    assert sum(each.pings > 0 for each in world.carriers) == PROBED
    assert world.told[-1] == (True, False, QUEUED_US)


def test_answers_to_others_do_not_count() -> None:
    world = World(*few(5))
    world.run(1)
    world.shaping.on_pong(cast(Stripe, world.carriers[0]), LEAST_RTT_US)
    world.run(1)
    assert world.told[-1][2] == QUEUED_US


def test_stripe_that_changes_its_part_is_limited_or_set_free() -> None:
    express = Carrier(1e3)
    world = World(*few(7), express=(express,))
    world.run(BEGUN)
    bulk = world.carriers[0]
    assert bulk.limits[-1] > 0 and express.limits[-1] == 0
    world.keep(bulk)
    world.run(1)
    assert bulk.limits[-1] == 0 and express.limits[-1] > 0


def test_stalled_stripes_and_such_without_meters_do_not_count() -> None:
    well, stalled, unknown = Carrier(), Carrier(90e6), Carrier()
    stalled.stalled, unknown.info = True, None
    World(well, stalled, unknown).run(BEGUN)
    assert well.limits == [pytest.approx(FIRST * 10e6, rel=1e-6)] and not stalled.limits and not unknown.limits


def test_near_end_is_not_limited() -> None:
    carrier = Carrier()
    carrier.least_rtt_us, carrier.rtt_us = FAR_US - 1, FAR_US + 10 * QUEUED_US
    World(carrier).run(2 * BEGUN)
    assert not carrier.limits


def test_few_stripes_that_carry_both_are_not_limited() -> None:
    carriers = few(EXPRESS_STRIPES - 1)
    World(*carriers, express=()).run(2 * BEGUN)
    assert not any(each.limits for each in carriers), "whose queue it is, is not known"


def test_new_stripe_is_measured_before_it_counts() -> None:
    first, second = Carrier(), Carrier()
    world = World(first)
    world.run(BEGUN)
    second.info.acked_bytes = 1 << 40
    world.carriers.append(second)
    world.stripes[2] = cast(Stripe, second)
    world.run(1)
    assert second.limits[-1] == pytest.approx(first.limits[-1] * LEAST_SHARE / 2)
    world.run(1)
    assert second.limits[-1] == pytest.approx(first.limits[-1])


@pytest.mark.parametrize("light", [False, True])
@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("small_us", [None, 0, 1234])
def test_descriptor_of_traffic_says_what_is_known(light: bool, heavy: bool, small_us: int | None) -> None:
    sent: list[tuple[int, int, int]] = []

    def send(kind: int, *, flags: int, value: int, **fields: int) -> None:
        sent.append((kind, flags, value))

    peer = cast(mesh.Peer, SimpleNamespace(slot=1, send=send))
    context = SimpleNamespace(mesh=SimpleNamespace(peers={1: peer}))
    tunnel = SimpleNamespace(index=0, frame_max_bytes=1 << 18)
    exchange = Exchange(cast(Any, context), cast(Any, tunnel), cast(Any, None), {}, 0, 0)
    exchange.tell_traffic(light, heavy, small_us)
    ((kind, flags, value),) = sent
    assert kind == mesh.TRAFFIC
    exchange.on_descriptor(peer, (kind, flags, 0, 0, 0, 0, 0, 0, 0, value, 0))
    assert (exchange.light_us > 0, exchange.heavy_us > 0) == (light, heavy)
    assert exchange.small_us == (small_us if light else None)


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
