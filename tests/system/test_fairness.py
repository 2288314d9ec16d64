"""Many connections that all want the same get the same.

`pytest -s` shows the figures. FORWARDER_TEST_SECONDS is how long shares are measured (default 12).
FORWARDER_TEST_LONG=1 tries every combination.
"""

import os
import time
from statistics import mean

import pytest

from tests.netlab import Lab, Link, rerun_if_void
from tests.system.load import Bulk, judged
from tests.system.pair import Pair

pytestmark = pytest.mark.alone

SECONDS = int(os.environ.get("FORWARDER_TEST_SECONDS", "0")) or 12
LONG = bool(os.environ.get("FORWARDER_TEST_LONG"))
WARM_UP_S = 3
STREAMS = 100
LINK = Link(delay_ms=10, rate_bps=100e6)
WITHIN = 0.15 if "FORWARDER_TEST_SECONDS" in os.environ else 0.25
LATE_MS = 5.0
COMBINATIONS = pytest.mark.parametrize(
    ("workers", "upwards"),
    [
        pytest.param(workers, upwards, id=f"{'upload' if upwards else 'download'}-{workers}")
        for workers in (1, 2)
        for upwards in (True, False)
        if LONG or upwards == (workers == 2)
    ],
)


@rerun_if_void()
def shares(
    workers: int,
    *,
    upwards: bool,
    streams: int = STREAMS,
    stripes: int = 10,
    congestion: str = "cubic",
    link: Link = LINK,
    seconds: float = SECONDS,
) -> list[float]:
    """What each stream got, sorted, where the mean is 1."""
    with (
        Lab(link) as lab,
        Pair(lab, workers=(workers, workers), somaxconn=stripes, congestion=congestion) as pair,
        pair.listen() as listener,
        Bulk(pair, listener, streams, upwards=upwards) as bulk,
    ):
        time.sleep(WARM_UP_S)
        lab.clear_report()
        rates = bulk.measure(seconds)
        lab.check(p99_ms=LATE_MS)
    result = sorted(rate / mean(rates) for rate in rates)
    outside = sum(abs(share - 1) > WITHIN for share in result)
    print(
        f"\n{streams} streams, {sum(rates) / 1e6:.0f} Mbit/s: shares {result[0]:.3f} to {result[-1]:.3f} of the mean, "
        f"10th {result[streams // 10]:.3f}, 90th {result[-streams // 10]:.3f}; {outside} beyond {WITHIN:.0%}"
    )
    return result


@COMBINATIONS
def test_streams_of_equal_demand_get_equal_shares(workers: int, upwards: bool) -> None:
    with judged() as require:
        least, *_, most = shares(workers, upwards=upwards)
        require(least >= 1 - WITHIN and most <= 1 + WITHIN, f"shares from {least:.3f} to {most:.3f} of the mean")
