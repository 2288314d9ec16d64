"""Who is in charge when generations follow each other: workers that hear of each other by calls."""

from types import SimpleNamespace
from typing import Any

from workers.core.handshake import ROSTER_MAX
from workers.io import mesh
from workers.io.context import Context, Generation
from workers.io.succession import Succession


class Peer:
    """Another worker, as one of them sees it; `told` is what it was sent."""

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.generation: tuple[int, int] | None = None
        self.seats = 0
        self.told: list[tuple[int, int, int]] = []

    @property
    def is_retiring(self) -> bool:
        return bool(self.seats & mesh.RETIRING)

    def send(self, kind: int, *, flags: int, value: int, value2: int) -> None:
        assert kind == mesh.SEATS
        self.told.append((flags, value, value2))


class Worker:
    """Worker `slot` of the generation that begins at `base`; it was born when `others` were there."""

    def __init__(self, slot: int, base: int, workers: int, others: tuple[int, ...] = ()) -> None:
        self.peers = {other: Peer(other) for other in others}
        own = Generation(base, workers)
        self.context: Any = SimpleNamespace(
            own=own,
            home=own,
            retiring=False,
            in_charge=False,
            has_ports=False,
            mesh=SimpleNamespace(peers=self.peers, dropped_descriptors=0),
        )
        self.events: list[str] = []
        self.succession = Succession(
            self.context, lambda: self.events.append("begin"), lambda: self.events.append("ports")
        )

    def hears(self, slot: int, base: int, workers: int, flags: int = 0) -> None:
        descriptor = (mesh.SEATS, flags, 0, 0, 0, 0, 0, 0, 0, base, workers)
        self.succession.on_descriptor(self.peers[slot], descriptor)  # type: ignore[arg-type]

    def meets(self, slot: int) -> Peer:
        peer = self.peers[slot] = Peer(slot)
        self.succession.on_peer_joined(peer)  # type: ignore[arg-type]
        return peer

    def loses(self, slot: int) -> None:
        self.succession.on_peer_lost(self.peers.pop(slot))  # type: ignore[arg-type]


def test_first_generation_is_in_charge_at_once() -> None:
    worker = Worker(0, 0, 2, others=(1,))
    assert worker.context.in_charge and worker.context.has_ports and not worker.events
    assert worker.peers[1].told == [(0, 0, 2)]


def test_new_worker_begins_when_all_older_ones_retire_and_takes_ports_when_they_let_go() -> None:
    worker = Worker(2, 2, 2, others=(0, 1, 3))
    assert not worker.context.in_charge
    worker.hears(0, 0, 2, mesh.RETIRING)
    worker.hears(3, 2, 2)
    assert not worker.events
    worker.hears(1, 0, 2, mesh.RETIRING)
    assert worker.events == ["begin"] and worker.context.in_charge and not worker.context.has_ports
    worker.hears(0, 0, 2, mesh.RETIRING | mesh.LET_GO)
    worker.loses(1)
    worker.loses(0)
    assert worker.events == ["begin", "ports"] and worker.context.has_ports


def test_older_worker_that_died_is_waited_for_again_when_it_was_replaced_in_time() -> None:
    worker = Worker(2, 2, 1, others=(0, 1))
    worker.loses(0)
    assert worker.meets(0).told == [(0, 2, 1)]
    worker.loses(1)
    assert not worker.events
    worker.hears(0, 0, 2, mesh.RETIRING)
    assert worker.events == ["begin"]
    worker.loses(0)
    assert worker.events == ["begin", "ports"]
    worker.meets(0)
    assert worker.context.in_charge


def test_worker_that_retires_tells_all_and_names_the_newest_generation_home() -> None:
    worker = Worker(0, 0, 2, others=(1,))
    worker.meets(5)
    worker.hears(5, 4, 3)
    worker.succession.retire()
    worker.succession.let_go()
    worker.succession.let_go()
    assert worker.context.home == (4, 3) and worker.context.retiring
    assert worker.peers[5].told == [(0, 0, 2), (1, 0, 2), (3, 0, 2)]
    worker.meets(9)
    assert worker.peers[9].told == [(3, 0, 2)]
    worker.hears(5, 4, 3, mesh.RETIRING)
    worker.hears(9, 9, 1)
    assert worker.context.home == (9, 1) and worker.context.home.slot_of(7) == 9


def test_seats_that_cannot_be_are_dropped() -> None:
    worker = Worker(0, 0, 1, others=(1,))
    for base, workers in ((0, 0), (0, 129), (128, 1)):
        worker.hears(1, base, workers)
    assert worker.context.mesh.dropped_descriptors == 3 and worker.peers[1].generation is None


def test_roster_of_many_workers_names_the_own_generation() -> None:
    roster = {slot: slot + 1 for slot in range(100)}
    nobody: Any = None
    context = Context(
        *(nobody, 90, 91, 7, Generation(60, 40), Generation(60, 40), nobody, nobody, nobody, nobody, nobody, nobody),
        roster,
    )
    named = [worker.slot for worker in context.roster_ids()]
    assert len(named) == ROSTER_MAX and set(named) >= set(range(60, 100)) and named == sorted(named)
