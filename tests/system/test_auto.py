"""`somaxconn = "auto"`: the pool finds its size by itself, and is small where size is of no use.

FORWARDER_AUTO_S makes the test of a limited link as long as it takes on the link of the issue, 500 Mbit/s with
10 Mbit/s for each connection (40 or so); the ordinary run has a link that no machine is too busy for.
"""

import os
import threading
import time
from collections.abc import Iterator

import pytest

from tests.netlab import Connection, Lab, LabUnavailable, Link
from tests.system.pair import Pair

FULL_S = float(os.environ.get("FORWARDER_AUTO_S", "0"))
RATE_BPS, EACH_BPS = (500e6, 10e6) if FULL_S else (40e6, 2e6)
WARM_UP_S = FULL_S or 16
MEASURED_S = 10 if FULL_S else 4
PAYLOAD = 1448 / 1514
"""Of what a link counts."""


@pytest.fixture(scope="module")
def limited() -> Iterator[Lab]:
    """A link that limits each connection."""
    try:
        with Lab(Link(delay_ms=25, rate_bps=RATE_BPS), connections=[Connection(rate_bps=EACH_BPS)]) as made:
            yield made
    except LabUnavailable as why:
        pytest.skip(str(why))


@pytest.fixture(scope="module")
def free() -> Iterator[Lab]:
    """A link that limits only the sum."""
    try:
        with Lab(Link(delay_ms=10, rate_bps=40e6)) as made:
            yield made
    except LabUnavailable as why:
        pytest.skip(str(why))


class Bulk:
    """One connection that transfers all it can, within the block. `received`: bytes so far."""

    def __init__(self, pair: Pair, *, upwards: bool) -> None:
        self.received = 0
        self._listener = pair.listen()
        application = pair.connect()
        target = self._listener.accept()[0]
        self._source, self._sink = (application, target) if upwards else (target, application)
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._send, self._receive)]

    def __enter__(self) -> "Bulk":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for sock in (self._source, self._sink, self._listener):
            sock.close()
        for thread in self._threads:
            thread.join(5)

    def _send(self) -> None:
        block = os.urandom(1 << 18)
        try:
            while True:
                self._source.sendall(block)
        except OSError:
            pass

    def _receive(self) -> None:
        try:
            while data := self._sink.recv(1 << 18):
                self.received += len(data)
        except OSError:
            pass

    def rate_bps(self, seconds: float) -> float:
        """Goodput over some time from now."""
        before, began_s = self.received, time.monotonic()
        time.sleep(seconds)
        return (self.received - before) * 8 / (time.monotonic() - began_s)


def wanted(pair: Pair) -> int:
    """How many stripes the client is after."""
    return max(int(session["carriers_wanted"]) for session in pair.tunnel("client")["sessions"])


@pytest.mark.parametrize(("upwards", "workers"), [(True, 2), (False, 1)], ids=["upload", "download"])
def test_pool_grows_until_the_link_is_full(limited: Lab, upwards: bool, workers: int) -> None:
    with Pair(limited, workers=(workers, workers), somaxconn="auto") as pair:
        assert wanted(pair) == 4
        with Bulk(pair, upwards=upwards) as bulk:
            sizes = []
            for _ in range(int(WARM_UP_S * 2)):
                sizes.append((wanted(pair), round(bulk.rate_bps(0.5) / 1e6)))
            rate_bps = bulk.rate_bps(MEASURED_S)
            size = wanted(pair)
        print(f"{rate_bps / 1e6:.0f} Mbit/s with {size}: {sizes}")
        needed = RATE_BPS / EACH_BPS
        assert rate_bps > 0.88 * RATE_BPS * PAYLOAD, f"{sizes}{pair.logs()}"
        assert 0.8 * needed <= size <= 3.5 * needed, sizes


def test_pool_stays_small_where_more_do_not_help(free: Lab) -> None:
    with Pair(free, workers=(2, 2), somaxconn="auto") as pair, Bulk(pair, upwards=True) as bulk:
        sizes = []
        for _ in range(12):
            bulk.rate_bps(1)
            sizes.append(wanted(pair))
        assert bulk.rate_bps(1) > 0.8 * 40e6 * PAYLOAD
    assert max(sizes) <= 16 and sizes[-1] <= 8, sizes
