"""Which worker's ports datagrams go to."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from workers.core.cuts import Datagrams
from workers.core.port_choice import FREE_LOSS
from workers.io import mesh
from workers.io.spray_exchange import SPREAD_BPS, SPREAD_US, SprayExchange

SOURCE = Datagrams(bytearray(2608), room=8)


class Peer:
    """Notes what it is told."""

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.told: Counter[int] = Counter()

    def send(self, kind: int, **fields: Any) -> None:
        self.told[kind] += 1


class Arena:
    """Slots that nobody needs."""

    def lend(self, slot: int, peer: int) -> None:
        pass

    def release(self, slot: int) -> None:
        pass


def exchange_with(peers: list[Peer], ports: dict[int, int], own: int) -> SprayExchange:
    """At a worker with so many ports of its own, and the others with theirs, by slot."""
    memory = SimpleNamespace(copy_in=lambda payload, side: 1, arena=Arena())
    context: Any = SimpleNamespace(mesh=SimpleNamespace(peers={peer.slot: peer for peer in peers}), memory=memory)
    exchange = SprayExchange(context, 0, 1, 0)
    for peer in peers:
        exchange.on_descriptor(peer, (mesh.CARRIERS, 0, 0, 0, 0, 0, 0, 0, ports[peer.slot], 0, 0))  # type: ignore[arg-type]
    exchange.tell_carriers(own)
    return exchange


def spread(exchange: SprayExchange, runs: int) -> int:
    """How many of these runs other workers got."""
    return sum(exchange.spread(7, SOURCE, 0, 2, 1300, 1300) for _ in range(runs))


def test_ports_without_loss_keep_what_their_worker_sends() -> None:
    peer = Peer(1)
    exchange = exchange_with([peer], {1: 5}, own=5)
    assert spread(exchange, 100) == 0
    exchange.on_loss(FREE_LOSS, 0, 0)
    assert spread(exchange, 100) == 0 and not peer.told[mesh.OUT]


def test_loss_on_all_ports_gives_other_workers_their_share() -> None:
    peers = [Peer(1), Peer(2), Peer(3)]
    exchange = exchange_with(peers, {1: 6, 2: 2, 3: 0}, own=2)
    exchange.on_loss(0.1, 0, 1)
    given = spread(exchange, 2000)
    assert [peer.told[mesh.OUT] for peer in peers] == [
        pytest.approx(1200, rel=0.15),
        pytest.approx(400, rel=0.3),
        0,
    ]
    assert given == sum(peer.told[mesh.OUT] for peer in peers)
    exchange.on_loss(0.0, 0, SPREAD_US)
    assert spread(exchange, 100) > 0
    exchange.on_loss(0.0, 0, SPREAD_US + 1)
    assert spread(exchange, 100) == 0


def test_share_of_a_worker_that_is_gone_stays_here() -> None:
    peer = Peer(1)
    exchange = exchange_with([peer], {1: 6}, own=0)
    exchange.on_loss(0.1, 0, 1)
    exchange.on_peer_lost(peer)  # type: ignore[arg-type]
    assert spread(exchange, 100) == 0


def test_whoever_sends_fast_keeps_to_the_ports_here() -> None:
    exchange = exchange_with([Peer(1)], {1: 5}, own=5)
    exchange.on_loss(0.1, 0, 1)
    fast_bytes = int(SPREAD_BPS / 8)
    exchange.on_loss(0.1, fast_bytes, 1_000_001)
    assert spread(exchange, 100) == 0
    exchange.on_loss(0.1, fast_bytes, 2_000_001)
    assert spread(exchange, 100) > 0
