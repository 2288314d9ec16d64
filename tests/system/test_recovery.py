"""Stripes that go black while a transfer runs: one 4-tuple, all of them for a while; and stripes replaced by age.

FORWARDER_BLACKOUT_S makes the black-out of all stripes longer (20 s and more in a full run).
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator

import pytest

from tests.netlab import Connection, Lab, Link, LiveConnection
from tests.system.pair import Pair
from tests.system.traffic import WHOLE, Exchange, Traffic

BLACKOUT_S = float(os.environ.get("FORWARDER_BLACKOUT_S", "6"))
BACK_S = 2.0
"""How long after the link's return both directions of the transfer go on."""
STALL_S = 2.0
"""The longest time in which a transfer may bring no byte while one 4-tuple is black."""


@pytest.fixture(scope="module")
def link() -> Iterator[Lab]:
    """A link of 100 Mbit/s and 50 ms where each connection gets 10 Mbit/s."""
    with Lab(Link(delay_ms=25, rate_bps=100e6), connections=[Connection(rate_bps=10e6)]) as made:
        yield made


class Progress:
    """Looks at both ends of an exchange all the time: the longest pause of each, within the block."""

    def __init__(self, exchange: Exchange, sides: tuple[int, ...] = (0, 1)) -> None:
        self.longest_s = 0.0
        self._ends = [exchange.ends[side] for side in sides]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        seen = [(end.received, time.monotonic()) for end in self._ends]
        while not self._over.wait(0.02):
            now_s = time.monotonic()
            for place, end in enumerate(self._ends):
                if end.received != seen[place][0]:
                    seen[place] = (end.received, now_s)
                elif end.received < end.total_bytes:
                    self.longest_s = max(self.longest_s, now_s - seen[place][1])


def stripes(link: Lab, pair: Pair) -> list[LiveConnection]:
    """Open stripes."""
    return [each for each in link.connections() if each.server[1] == pair.host_port]


def local_ends(pair: Pair) -> set[str]:
    """The client's ends of its stripes."""
    return {carrier["local"] for session in pair.tunnel("client")["sessions"] for carrier in session["carriers"]}


def local_end(stripe: LiveConnection) -> str:
    return f"{stripe.client[0]}:{stripe.client[1]}"


@contextlib.contextmanager
def one_way(pair: Pair, *, upwards: bool, total_bytes: int) -> Iterator[Exchange]:
    """An exchange whose other direction is empty: one end only receives."""
    with Traffic(pair) as traffic:
        exchange = traffic.open(1, total_bytes, rate_bps=0)[0]
        exchange.ends[0 if upwards else 1].rate_bps = 1e12
        yield exchange


@pytest.mark.parametrize(
    ("upwards", "direction"),
    [(True, "both"), (True, "down"), (False, "both"), (False, "up"), (False, "down")],
    ids=lambda value: {True: "upload", False: "download"}.get(value, value),
)
def test_black_stripe_stalls_nothing_and_is_replaced(link: Lab, upwards: bool, direction: str) -> None:
    with Pair(link, workers=(1, 1)) as pair, one_way(pair, upwards=upwards, total_bytes=1 << 30) as exchange:
        receiver = 1 if upwards else 0
        pair.wait(lambda: exchange.ends[receiver].received > 4 << 20, "start of the transfer")
        black = stripes(link, pair)[3]
        before = local_ends(pair)
        assert local_end(black) in before
        with Progress(exchange, (receiver,)) as progress:
            began_s = time.monotonic()
            assert link.blackhole(black, direction=direction) == 1
            pair.wait(lambda: local_end(black) not in local_ends(pair), "replacement", 4)
            replaced_s = time.monotonic() - began_s
            time.sleep(1)
        assert progress.longest_s < STALL_S, pair.logs()
        after = local_ends(pair)
        assert replaced_s < 3 and len(after) == 10 and len(after - before) == 1, f"{replaced_s:.1f} s: {after - before}"
        print(f"replaced after {replaced_s:.2f} s, longest pause {progress.longest_s:.2f} s")


@pytest.mark.parametrize("count", [1, 2])
def test_all_stripes_black_and_back_cost_two_seconds_and_no_byte(link: Lab, count: int) -> None:
    tunnel = f'resume_timeout = "{int(BLACKOUT_S) + 30}s"'
    with (
        Pair(link, workers=(count, count), client_tunnel=tunnel, server_tunnel=tunnel) as pair,
        Traffic(pair) as traffic,
    ):
        exchanges = traffic.open(2, total_bytes=16 << 20)
        traffic.wait_received(exchanges, 2 << 20)
        attempts = len(link.connections(closed=True))
        link.blackhole()
        try:
            time.sleep(1)
            seen = [end.received for exchange in exchanges for end in exchange.ends]
            time.sleep(BLACKOUT_S - 1)
            tried = len(link.connections(closed=True)) - attempts
        finally:
            link.restore()
        back_s = time.monotonic()
        assert None in {exchange.outcome for exchange in exchanges}
        goes_on_s = wait_for_more(exchanges, seen, 10) - back_s
        traffic.wait(exchanges, 30)
        assert [exchange.outcome for exchange in exchanges] == [WHOLE] * 2, f"{exchanges}{pair.logs()}"
        print(f"goes on after {goes_on_s:.2f} s, {tried} attempts in {BLACKOUT_S:g} s")
        assert goes_on_s < BACK_S, f"{goes_on_s:.1f} s{pair.logs()}"
        assert BLACKOUT_S / 2 < tried < 5 * count * BLACKOUT_S, tried


def wait_for_more(exchanges: list[Exchange], seen: list[int], timeout_s: float) -> float:
    """Until every end that has not got everything has more than before; returns when."""
    deadline = time.monotonic() + timeout_s
    while True:
        ends = [end for exchange in exchanges for end in exchange.ends]
        pairs = zip(ends, seen, strict=True)
        if all(end.received > before or end.received == end.total_bytes for end, before in pairs):
            return time.monotonic()
        assert time.monotonic() < deadline, f"still {exchanges}"
        time.sleep(0.01)


@pytest.mark.alone
def test_rotation_under_load_changes_every_stripe_and_stops_nothing(link: Lab) -> None:
    with Pair(link, workers=(2, 2), client_tunnel='rotate_after = "1s"') as pair, Traffic(pair) as traffic:
        before = local_ends(pair)
        exchange = traffic.open(1, total_bytes=24 << 20)[0]
        traffic.wait_received([exchange], 1 << 20)
        with Progress(exchange) as progress:
            traffic.wait([exchange], 30)
        assert exchange.outcome == WHOLE, f"{exchange}{pair.logs()}"
        print(f"longest pause {progress.longest_s:.2f} s")
        assert progress.longest_s < STALL_S / 2
        assert not before & local_ends(pair)
