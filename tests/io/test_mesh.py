"""When descriptors between two workers are published: lazy ones go along with others, or a little later."""

import os
from collections.abc import Iterator

import gevent
import pytest

from workers.boot import PeerFds
from workers.core import frame
from workers.io import mesh
from workers.io.memory import Memory
from workers.io.mesh import LAZY_S, Descriptor, Mesh, Peer
from workers.shm.arena import Arena, arena_size
from workers.shm.segments import close_ring, create_arena, create_ring

QUOTA_BYTES = 1 << 20
ARENA_BYTES = arena_size(QUOTA_BYTES, QUOTA_BYTES)


class Worker:
    """One end: a mesh, and the kinds of the descriptors that it was given."""

    def __init__(self, arena: int) -> None:
        self.taken: list[int] = []
        self.turns = 0
        memory = Memory(Arena(arena, ARENA_BYTES, QUOTA_BYTES, QUOTA_BYTES), frame.MAX_PAYLOAD_BYTES)
        self.mesh = Mesh(gevent.get_hub().loop, memory, ARENA_BYTES)
        self.mesh.handler = self

    def on_descriptor(self, peer: Peer, descriptor: Descriptor) -> None:
        self.taken.append(descriptor[0])

    def on_turn_end(self) -> None:
        self.turns += 1


@pytest.fixture
def ends() -> Iterator[tuple[Worker, Peer]]:
    """A worker, and another as the first one's peer sees it: what that sends, the worker gets."""
    arenas = [create_arena(ARENA_BYTES) for _ in range(2)]
    there, back = create_ring(), create_ring()
    receiver, sender = (Worker(arena) for arena in arenas)
    receiver.mesh.add_peer(PeerFds(1, 8, arenas[1], back, there))
    peer = sender.mesh.add_peer(PeerFds(0, 7, arenas[0], there, back))
    yield receiver, peer
    receiver.mesh.remove_peer(1, 8)
    sender.mesh.remove_peer(0, 7)
    for ring in (there, back):
        close_ring(ring)
    for arena in arenas:
        os.close(arena)


def test_lazy_descriptor_goes_along_with_the_next_that_is_not(ends: tuple[Worker, Peer]) -> None:
    worker, peer = ends
    peer.send(mesh.FREE, lazy=True)
    peer.send(mesh.LOST)
    gevent.sleep(20 * LAZY_S)
    assert worker.taken == [mesh.FREE, mesh.LOST] and worker.turns == 1


def test_lazy_descriptor_alone_is_published_after_a_while(ends: tuple[Worker, Peer]) -> None:
    worker, peer = ends
    for number in range(1, 3):
        peer.send(mesh.FREE, lazy=True)
        gevent.sleep(0)
        assert len(worker.taken) == number - 1
        gevent.sleep(20 * LAZY_S)
        assert len(worker.taken) == number
