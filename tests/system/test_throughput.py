"""What stripes are worth, in short: `make bench` measures the same at length, beside more, and shows the figures.

Each figure is a ratio of two measurements made one after the other, with the same congestion control. A miss is
measured again; it counts only if the machine was free for it.
FORWARDER_TEST_LONG=1 tries every combination.
"""

import os
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from tests.bench import limited, speed, ways
from tests.bench.measure import BUSY_CORES, Flow, programs_missing
from tests.netlab import Lab, RunVoid

pytestmark = pytest.mark.alone

LONG = bool(os.environ.get("FORWARDER_TEST_LONG"))
LIMITED_S, LIMITED_WARM_UP_S = 4, 4
SPEED_S = 2
OF_IPERF3 = 0.9
OF_HAPROXY = 0.6
MANY_OF_FEW = 0.6
ATTEMPTS = 2


@pytest.fixture(scope="module", autouse=True)
def needs() -> None:
    missing = programs_missing("iperf3", "ss")
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} here")


@pytest.fixture(scope="module")
def link() -> Iterator[Lab]:
    """Limits each connection."""
    with limited.lab() as made:
        yield made


@pytest.fixture(scope="module")
def wire() -> Iterator[Lab]:
    """Limits nothing."""
    with speed.lab() as made:
        ways.set_congestion(made, ways.best_congestion())
        yield made


def check_ratios(measure: Callable[[], list[Flow]], wanted: list[float]) -> None:
    """Of each measurement to the one before. Skips where the machine is not free."""
    busy = ""
    for _ in range(ATTEMPTS):
        try:
            flows = measure()
        except RunVoid as void:
            busy = str(void)
            continue
        ratios = [flow.bits_per_s / before.bits_per_s for before, flow in pairwise(flows)]
        low = [f"{ratio:.2f} < {least}" for ratio, least in zip(ratios, wanted, strict=True) if ratio < least]
        if not low:
            return
        others = max(flow.others_cores for flow in flows)
        busy = f"{', '.join(low)} while other programs used {others:.1f} cores" if others > BUSY_CORES else ""
    if busy:
        pytest.skip(f"this machine is too busy: {busy}")
    pytest.fail(", ".join(low))


@pytest.mark.parametrize(("stripes", "workers"), [(40, 2)] + LONG * [(10, 1)])
def test_stripes_reach_what_as_many_connections_do(link: Lab, stripes: int, workers: int) -> None:
    def flows() -> list[Flow]:
        bare_and_ours = (0, workers)
        return [
            limited.once(link, stripes, count, seconds=LIMITED_S, warm_up_s=LIMITED_WARM_UP_S)
            for count in bare_and_ours
        ]

    check_ratios(flows, [OF_IPERF3])


@pytest.mark.parametrize("workers", [2] + LONG * [1])
def test_ten_stripes_keep_up_with_haproxy_and_a_thousand_with_ten(wire: Lab, workers: int) -> None:
    if programs_missing("haproxy"):
        pytest.skip("no haproxy here")
    few, many = (ways.forwarder(stripes, workers, ways.best_congestion()) for stripes in (10, 1000))

    def flows() -> list[Flow]:
        return [speed.once(wire, way, seconds=SPEED_S) for way in (ways.haproxy, few, many)]

    check_ratios(flows, [OF_HAPROXY, MANY_OF_FEW])
