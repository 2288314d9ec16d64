"""Large transfers over a bad link, and the ways to name ends: families, names, tunnels, clients and sessions.

FORWARDER_TEST_BYTES is how many bytes go each way in the transfers (default 64 MiB).
"""

import os
import socket
from collections.abc import Iterator

import pytest

from tests.netlab import Lab, Link
from tests.system.instances import Instance, Instances
from tests.system.pair import Pair
from tests.system.payload import congestion_control, exchange, receive

TOTAL_BYTES = int(os.environ.get("FORWARDER_TEST_BYTES", 64 << 20))
STRIPES = 10
LOSS = Link(delay_ms=25, loss=0.01)
EVERYTHING = Link(delay_ms=25, loss=0.01, reorder=0.01, duplicate=0.01, corrupt=0.01)
OPERATION_S = 30.0
"""How long a single read or write of an application may take: no stall is longer."""


@pytest.mark.deadline(60 + 60 * TOTAL_BYTES / (256 << 20))
@pytest.mark.parametrize(
    ("link", "family", "workers"),
    [
        pytest.param(LOSS, 4, (1, 1), id="loss-ipv4-1x1"),
        pytest.param(LOSS, 6, (1, 2), id="loss-ipv6-1x2"),
        pytest.param(LOSS, 4, (3, 2), id="loss-ipv4-3x2"),
        pytest.param(EVERYTHING, 6, (1, 1), id="everything-ipv6-1x1"),
        pytest.param(EVERYTHING, 4, (1, 2), id="everything-ipv4-1x2"),
        pytest.param(EVERYTHING, 6, (3, 2), id="everything-ipv6-3x2"),
    ],
)
def test_transfer_both_ways_over_a_bad_link_is_whole(link: Link, family: int, workers: tuple[int, int]) -> None:
    with Lab(link, seed=family + workers[0]) as lab:
        address = lab.server_ip4 if family == 4 else lab.server_ip6
        with (
            Pair(lab, workers=workers, somaxconn=STRIPES, congestion=congestion_control(), address=address) as pair,
            pair.listen() as listener,
            pair.connect(timeout=OPERATION_S) as application,
        ):
            service, _ = listener.accept()
            with service:
                service.settimeout(OPERATION_S)
                exchange(application, service, TOTAL_BYTES)
            carriers = pair.status("client")["tunnels"][0]["sessions"][0]["carriers"]
        report = lab.report()
    assert len(carriers) == STRIPES
    assert all(min(carrier["bytes_in"], carrier["bytes_out"]) > TOTAL_BYTES / STRIPES / 20 for carrier in carriers)
    for way in (report.up, report.down):
        assert way.dropped["lost"]
        if link is EVERYTHING:
            assert way.reordered
            assert way.duplicated
            assert way.corrupted


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(emulate=False) as lab:
        yield lab


@pytest.fixture
def instances(lab: Lab) -> Iterator[Instances]:
    with Instances(lab) as instances:
        yield instances


def client_text(key: str, *tunnels: str, workers: int = 1) -> str:
    return f'role = "client"\nworkers = {workers}\n[auth]\n{key}' + "".join(map(tunnel_text, tunnels))


def server_text(keys: list[str], *tunnels: str, workers: int = 1) -> str:
    clients = "".join(f"[[client]]\n{key}\n" for key in keys)
    return f'role = "server"\nworkers = {workers}\n{clients}' + "".join(map(tunnel_text, tunnels))


def tunnel_text(lines: str) -> str:
    return f'[[tunnel]]\nmode = "stripe"\n{lines}\n'


def check_tunnel(lab: Lab, namespace: str, local: tuple[str, int], target: tuple[str, int], total: int = 1 << 20) -> None:
    """An application at `local` in `namespace` reaches the service at `target` at the server, and only that."""
    server = namespace if target[0] != "127.0.0.1" or namespace == "client_only" else "server"
    with lab.listen(server, *target) as listener:
        listener.settimeout(10)
        with lab.connect(namespace, *local) as application:
            service, _ = listener.accept()
            with service:
                service.settimeout(10)
                exchange(application, service, total, seed=local[1])
