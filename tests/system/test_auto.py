"""`somaxconn = "auto"`: the pool finds its size by itself, and is small where size is of no use.

FORWARDER_AUTO_S makes the test of a limited link as long as it takes on a link of 500 Mbit/s with
10 Mbit/s for each connection (40 or so); the ordinary run has a link that no machine is too busy for.
FORWARDER_TEST_LONG=1 tries every combination.
"""

import os
from collections.abc import Iterator

import pytest

from tests.netlab import Connection, Lab, Link
from tests.system.load import Bulk
from tests.system.pair import Pair

pytestmark = pytest.mark.alone

LONG = bool(os.environ.get("FORWARDER_TEST_LONG"))
FULL_S = float(os.environ.get("FORWARDER_AUTO_S", "0"))
RATE_BPS, EACH_BPS = (500e6, 10e6) if FULL_S else (40e6, 2e6)
WARM_UP_S = FULL_S or 16
MEASURED_S = 10 if FULL_S else 4
PAYLOAD = 1448 / 1514
"""Of what a link counts."""


@pytest.fixture(scope="module")
def limited() -> Iterator[Lab]:
    """A link that limits each connection."""
    with Lab(Link(delay_ms=25, rate_bps=RATE_BPS), connections=[Connection(rate_bps=EACH_BPS)]) as made:
        yield made


@pytest.fixture(scope="module")
def free() -> Iterator[Lab]:
    """A link that limits only the sum."""
    with Lab(Link(delay_ms=10, rate_bps=40e6)) as made:
        yield made


def wanted(pair: Pair) -> int:
    """How many stripes the client is after."""
    return max(int(session["carriers_wanted"]) for session in pair.tunnel("client")["sessions"])


@pytest.mark.parametrize(
    ("upwards", "workers"),
    [pytest.param(True, 2, id="upload")] + LONG * [pytest.param(False, 1, id="download")],
)
def test_pool_grows_until_the_link_is_full(limited: Lab, upwards: bool, workers: int) -> None:
    with Pair(limited, workers=(workers, workers), somaxconn="auto") as pair:
        assert wanted(pair) == 4
        with pair.listen() as listener, Bulk(pair, listener, upwards=upwards) as bulk:
            sizes = []
            for _ in range(int(WARM_UP_S * 2)):
                sizes.append((wanted(pair), round(bulk.bits_per_s(0.5) / 1e6)))
            rate_bps = bulk.bits_per_s(MEASURED_S)
            size = wanted(pair)
        print(f"{rate_bps / 1e6:.0f} Mbit/s with {size}: {sizes}")
        needed = RATE_BPS / EACH_BPS
        assert rate_bps > 0.88 * RATE_BPS * PAYLOAD, f"{sizes}{pair.logs()}"
        assert 0.8 * needed <= size <= 3.5 * needed, sizes


def test_pool_stays_small_where_more_do_not_help(free: Lab) -> None:
    with (
        Pair(free, workers=(2, 2), somaxconn="auto") as pair,
        pair.listen() as listener,
        Bulk(pair, listener) as bulk,
    ):
        sizes = []
        for _ in range(12):
            bulk.bits_per_s(1)
            sizes.append(wanted(pair))
        assert bulk.bits_per_s(1) > 0.8 * 40e6 * PAYLOAD
    assert max(sizes) <= 16 and sizes[-1] <= 8, sizes
