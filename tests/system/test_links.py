"""Several server addresses and several sources: stripes over several links, and what happens when a link fails."""

import time
from collections.abc import Iterator, Sequence

import pytest

from tests.netlab import Lab, Link
from tests.system.pair import Pair
from tests.system.traffic import WHOLE, Exchange, Traffic

pytestmark = pytest.mark.alone

AWAY_S = 13.0
"""How long until the stripes of an address that fails are up by another: those that carry nothing are asked every 10 s.
"""
BACK_S = 6.0
"""How long until they are back where they belong, once it works again."""
STALL_S = 2.0


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A link of 100 Mbit/s and 20 ms between two addresses at each end."""
    with Lab(Link(delay_ms=10, rate_bps=100e6), addresses=2) as made:
        yield made


def routes(pair: Pair) -> dict[int, tuple[str, str]]:
    """Index -> the client's and the server's address of each stripe."""
    sessions = pair.tunnel("client")["sessions"]
    carriers = [carrier for session in sessions for carrier in session["carriers"]]
    return {each["id"]: (each["local"].rpartition(":")[0], each["peer"].rpartition(":")[0]) for each in carriers}


def set_address(lab: Lab, address: str, *, there: bool) -> None:
    """Take an address of the server's away, or give it back."""
    lab.run("server", ["ip", "address", "add" if there else "delete", f"{address}/16", "dev", "eth0"])


def test_stripes_take_addresses_and_sources_in_turn(lab: Lab) -> None:
    tunnel = f'source = ["{lab.client_ip4s[1]}", "{lab.client_ip4s[0]}"]'
    with Pair(lab, workers=(2, 1), address=lab.server_ip4s, client_tunnel=tunnel) as pair:
        assert routes(pair) == {i: (lab.client_ip4s[1 - i % 2], lab.server_ip4s[i % 2]) for i in range(10)}


def received(exchanges: Sequence[Exchange]) -> int:
    return sum(exchange.received for exchange in exchanges)


@pytest.mark.parametrize("workers", [1, 2])
def test_address_that_fails_and_returns_slows_nothing_down(lab: Lab, workers: int) -> None:
    good, failing = lab.server_ip4s
    homes = {index: lab.server_ip4s[index % 2] for index in range(10)}

    def peers() -> dict[int, str]:
        return {index: route[1] for index, route in routes(pair).items()}

    with Pair(lab, workers=(workers, workers), address=[good, failing]) as pair, Traffic(pair) as traffic:
        # At both workers, so that most stripes are used, and for longer than the address is away.
        exchanges = traffic.open(8, total_bytes=8 << 20, rate_bps=2.5e6)
        traffic.wait_received(exchanges, 128 << 10)
        set_address(lab, failing, there=False)
        try:
            longest_s, seen, since_s = 0.0, received(exchanges), time.monotonic()
            deadline = time.monotonic() + AWAY_S
            while set(peers().values()) != {good} or len(peers()) < 10:
                assert time.monotonic() < deadline, f"{peers()}{pair.logs()}"
                if received(exchanges) != seen:
                    seen, since_s = received(exchanges), time.monotonic()
                longest_s = max(longest_s, time.monotonic() - since_s)
                time.sleep(0.05)
            assert longest_s < STALL_S
        finally:
            set_address(lab, failing, there=True)
        pair.wait(lambda: peers() == homes, "stripes at home", BACK_S)
        for exchange in exchanges:
            exchange.speed_up(1e12)
        traffic.wait(exchanges, 20)
        assert all(exchange.outcome == WHOLE for exchange in exchanges), f"{exchanges}{pair.logs()}"


def test_address_that_never_answers_holds_up_no_stripe(lab: Lab) -> None:
    missing = "198.18.2.77"
    with Pair(lab, workers=(1, 1), address=[missing, lab.server_ip4], start=False) as pair, Traffic(pair) as traffic:
        pair.start("server")
        pair.start("client")
        pair.wait(lambda: pair.carriers_up() >= 5, "stripes by the address that works", 2)
        exchange = traffic.open(1, total_bytes=1 << 20)[0]
        traffic.wait([exchange], 5)
        assert exchange.outcome == WHOLE
        pair.wait(lambda: pair.carriers_up() == 10, "all stripes by the address that works", AWAY_S)
