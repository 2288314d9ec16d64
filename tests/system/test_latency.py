"""What small requests wait beside a bulk transfer, and a new connection for its first byte.

`pytest -s` shows the figures. FORWARDER_TEST_SECONDS is how long requests are measured (default 5);
FORWARDER_TEST_LONG=1 tries every congestion control and pool.
"""

import os
import time
from dataclasses import dataclass

import pytest

from tests.netlab import Lab, Link, rerun_if_void
from tests.system.load import Bulk, answering, judged, quantile, round_trips
from tests.system.pair import Pair

pytestmark = pytest.mark.alone

SECONDS = int(os.environ.get("FORWARDER_TEST_SECONDS", "0")) or 5
LONG = bool(os.environ.get("FORWARDER_TEST_LONG"))
WARM_UP_S = 4
BUSY = Link(delay_ms=25, rate_bps=500e6, queue_ms=20)
IDLE = Link(delay_ms=50)
OVER_PING_MS = 10.0 if "FORWARDER_TEST_LONG" in os.environ else 20.0
"""What the ordinary run allows leaves room for a busy machine; without the small frames' stripe it was 27 and more."""
OVER_ROUND_TRIP_MS = 10.0
IN_USE = 0.85
"""Bulk's part of the link, beside small requests that find no queue."""
FIRST_BYTES = 10
LATE_MS = 5.0
ASKED_BEFORE_S = 1.0
"""From the first small request on, one stripe is kept free of bulk; what it had in flight is gone by then."""

WORKERS = pytest.mark.parametrize("workers", [1, 2])
COMBINATIONS = pytest.mark.parametrize(
    ("workers", "stripes", "congestion", "upwards"),
    [
        pytest.param(workers, stripes, congestion, upwards, id=f"{workers}-{stripes}-{congestion}-{way}")
        for workers in (1, 2)
        for stripes in ((1, 10, 40) if LONG else (10,))
        for congestion in (("cubic", "bbr") if LONG else ("cubic",))
        for way, upwards in (("upload", True), ("download", False))
        if LONG or upwards == (workers == 1)
    ],
)


@dataclass(frozen=True, slots=True)
class Waits:
    """Round trips in ms, and what the bulk transfer had meanwhile."""

    request_p50: float
    request_p99: float
    ping_p50: float
    ping_p99: float
    bulk_bps: float

    def __str__(self) -> str:
        return (
            f"requests {self.request_p50:.1f} p99 {self.request_p99:.1f} ms, "
            f"pings {self.ping_p50:.1f} p99 {self.ping_p99:.1f} ms, bulk {self.bulk_bps / 1e6:.0f} Mbit/s"
        )


@rerun_if_void()
def beside_bulk(
    workers: int,
    stripes: int,
    congestion: str,
    *,
    upwards: bool = True,
    link: Link = BUSY,
    seconds: float = SECONDS,
    warm_up_s: float = WARM_UP_S,
) -> Waits:
    """Small requests and pings, while one connection of the same tunnel moves all it can."""
    with (
        Lab(link) as lab,
        Pair(lab, workers=(workers, workers), somaxconn=stripes, congestion=congestion) as pair,
        pair.listen() as listener,
        Bulk(pair, listener, upwards=upwards) as bulk,
    ):
        time.sleep(warm_up_s)
        lab.clear_report()
        round_trips(pair, listener, ASKED_BEFORE_S)
        before, start_s = bulk.received_bytes, time.monotonic()
        requests, pings = round_trips(pair, listener, seconds)
        rate_bps = 8 * (bulk.received_bytes - before) / (time.monotonic() - start_s)
        lab.check(p99_ms=LATE_MS)
    waits = Waits(
        quantile(requests, 0.5), quantile(requests, 0.99), quantile(pings, 0.5), quantile(pings, 0.99), rate_bps
    )
    print(f"\n{waits}")
    return waits


@rerun_if_void()
def first_bytes_ms(workers: int, count: int = FIRST_BYTES, link: Link = IDLE) -> list[float]:
    """What new connections over an idle tunnel wait, from connecting to the first byte of the answer."""
    took_ms = []
    with (
        Lab(link) as lab,
        Pair(lab, workers=(workers, workers)) as pair,
        pair.listen() as listener,
        answering(listener),
    ):
        time.sleep(0.5)
        for _ in range(count):
            start_s = time.monotonic()
            with pair.connect() as application:
                application.send(b"?")
                application.recv(1)
                took_ms.append((time.monotonic() - start_s) * 1e3)
            time.sleep(0.1)
        lab.check(p99_ms=LATE_MS)
    took_ms.sort()
    print(f"\nfirst byte after {took_ms[0]:.1f} to {took_ms[-1]:.1f} ms, median {quantile(took_ms, 0.5):.1f}")
    return took_ms


@COMBINATIONS
def test_small_requests_beside_a_bulk_transfer_wait_little_longer_than_a_ping(
    workers: int, stripes: int, congestion: str, upwards: bool
) -> None:
    with judged() as require:
        waits = beside_bulk(workers, stripes, congestion, upwards=upwards)
        require(waits.request_p99 <= waits.ping_p99 + OVER_PING_MS, str(waits))
        if stripes > 1:
            require(waits.request_p50 <= 2 * BUSY.delay_ms + OVER_ROUND_TRIP_MS, f"no queue: {waits}")
            require(waits.bulk_bps >= IN_USE * (BUSY.rate_bps or 0), f"bulk goes on: {waits}")


@WORKERS
def test_first_byte_over_an_idle_tunnel_takes_one_round_trip(workers: int) -> None:
    with judged() as require:
        took_ms = quantile(first_bytes_ms(workers), 0.5)
        require(took_ms <= 2 * IDLE.delay_ms + OVER_ROUND_TRIP_MS, f"{took_ms:.1f} ms")
