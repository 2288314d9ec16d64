"""Stripes that are not alike: a slow one costs nothing, and two together do what both can.

`pytest -s` shows the figures. FORWARDER_TEST_BYTES is how many bytes a transfer over two stripes moves (default
12 MB), FORWARDER_TEST_SECONDS how long a rate is measured (default 5),
FORWARDER_TEST_LONG=1 tries every combination.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import mean

import pytest

from tests.netlab import Connection, Lab, Link, rerun_if_void
from tests.system.load import Bulk, judged, transfer_s
from tests.system.pair import Pair

pytestmark = pytest.mark.alone

TOTAL_BYTES = int(os.environ.get("FORWARDER_TEST_BYTES", "0")) or 12_000_000
SECONDS = int(os.environ.get("FORWARDER_TEST_SECONDS", "0")) or 5
LONG = bool(os.environ.get("FORWARDER_TEST_LONG"))
WARM_UP_S = 3
DELAY_MS = 10
FAST = Connection(rate_bps=30e6)
SLOW = Connection(rate_bps=0.5e6)
OF_THE_OTHERS = 0.9
OF_BOTH = 0.9
START_S = 0.5
OF_THE_BETTER = 1.05
"""The better one's own time varies by so much."""
LATE_MS = 5.0

COMBINATIONS = pytest.mark.parametrize(
    ("workers", "upwards"),
    [
        pytest.param(workers, upwards, id=f"{workers}-{'upload' if upwards else 'download'}")
        for workers in (1, 2)
        for upwards in (True, False)
        if LONG or upwards == (workers == 1)
    ],
)
OTHERS = {"1-50ms": (1, 50), "10-200ms": (10, 200)} | ({"0.5-20ms": (0.5, 20)} if LONG else {})
"""Mbit/s and round trip of the worse one of two."""

ALL_PORT, BETTER_PORT = 9001, 9002


@contextmanager
def two_pools(stripes: Sequence[Connection], better: Sequence[Connection], delay_ms: float = DELAY_MS) -> Iterator[Lab]:
    """A link where the stripes to ALL_PORT are all of them, and those to BETTER_PORT only the better ones."""
    rules = [replace(each, port=ALL_PORT) for each in stripes] + [replace(each, port=BETTER_PORT) for each in better]
    with Lab(Link(delay_ms=delay_ms), connections=rules) as lab:
        yield lab


@contextmanager
def pool(lab: Lab, port: int, stripes: int, workers: int, congestion: str = "cubic") -> Iterator[Pair]:
    """A tunnel over that many stripes to one of the ports."""
    with Pair(lab, workers=(workers, workers), somaxconn=stripes, congestion=congestion, host_port=port) as pair:
        lab.clear_report()
        yield pair


def goodput_bps(pair: Pair, *, upwards: bool, seconds: int) -> list[float]:
    """Of one connection, second by second, in the steady state."""
    with pair.listen() as listener, Bulk(pair, listener, upwards=upwards) as bulk:
        time.sleep(WARM_UP_S)
        rates = [sum(bulk.measure(1)) for _ in range(seconds)]
        pair.lab.check(p99_ms=LATE_MS)
    return rates


@rerun_if_void()
def beside_a_slow_stripe(
    workers: int, *, upwards: bool, fast: Connection = FAST, slow: Connection = SLOW, seconds: int = SECONDS
) -> float:
    """The goodput of ten stripes, one of them slow, as a share of what the nine others give alone."""
    others = [fast] * 9
    with two_pools([slow, *others], others) as lab:
        with pool(lab, BETTER_PORT, 9, workers) as pair:
            alone = goodput_bps(pair, upwards=upwards, seconds=seconds)
        with pool(lab, ALL_PORT, 10, workers) as pair:
            together = goodput_bps(pair, upwards=upwards, seconds=seconds)
    share = mean(together) / mean(alone)
    print(f"\nnine {_each_second(alone)}; with a slow tenth {_each_second(together)}: {share:.3f}")
    return share


def _each_second(rates: Sequence[float]) -> str:
    return f"{mean(rates) / 1e6:.1f} Mbit/s ({' '.join(f'{rate / 1e6:.0f}' for rate in rates)})"


@rerun_if_void()
def over_two(
    better: Connection,
    other: Connection,
    workers: int,
    *,
    upwards: bool,
    total_bytes: int = TOTAL_BYTES,
    congestion: str = "cubic",
) -> tuple[float, float]:
    """Seconds that a transfer takes over both stripes, and over the better one alone."""
    with two_pools([better, other], [better]) as lab:
        took_s = []
        for port, stripes in ((ALL_PORT, 2), (BETTER_PORT, 1)):
            with pool(lab, port, stripes, workers, congestion) as pair, pair.listen() as listener:
                took_s.append(transfer_s(pair, listener, total_bytes, upwards=upwards))
            lab.check(p99_ms=LATE_MS)
    both_s, better_s = took_s
    bound_s = bound_of_both_s(better, other, total_bytes)
    print(f"\n{total_bytes / 1e6:g} MB: both {both_s:.2f} s (bound {bound_s:.2f}), better alone {better_s:.2f} s")
    return both_s, better_s


def bound_of_both_s(better: Connection, other: Connection, total_bytes: int) -> float:
    """At 0.9 of the sum of both rates, and a start of half a second."""
    rate_bps = 0.0
    for each in (better, other):
        assert isinstance(each.rate_bps, float)
        rate_bps += each.rate_bps
    return 8 * total_bytes / (OF_BOTH * rate_bps) + START_S


def stripe(rate_mbps: float, rtt_ms: float) -> Connection:
    """A stripe of that rate and round trip."""
    return Connection(rate_bps=rate_mbps * 1e6, delay_ms=rtt_ms / 2)


@COMBINATIONS
def test_one_slow_stripe_of_ten_leaves_what_the_other_nine_give(workers: int, upwards: bool) -> None:
    with judged() as require:
        share = beside_a_slow_stripe(workers, upwards=upwards)
        require(share >= OF_THE_OTHERS, f"{share:.3f} of the other nine")


@COMBINATIONS
def test_two_unequal_stripes_finish_in_the_time_of_both(workers: int, upwards: bool) -> None:
    better, other = stripe(30, 1), stripe(10, 50)
    bound_s = bound_of_both_s(better, other, TOTAL_BYTES)
    with judged() as require:
        both_s, _ = over_two(better, other, workers, upwards=upwards)
        require(both_s <= bound_s, f"{both_s:.2f} s, not {bound_s:.2f}")


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("workers", [1, 2] if LONG else [1])
def test_two_stripes_are_not_slower_than_the_better_one_alone(workers: int, other: tuple[float, float]) -> None:
    with judged() as require:
        both_s, better_s = over_two(stripe(30, 1), stripe(*other), workers, upwards=True)
        require(both_s <= OF_THE_BETTER * better_s, f"{both_s:.2f} s, the better one alone {better_s:.2f}")
