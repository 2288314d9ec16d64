"""The memory by which workers meet, as the supervisor keeps it: an arena per worker, a ring per ordered pair.

The supervisor never maps any of it. Its descriptors live as long as the worker they were made for, so that whoever is
forked meanwhile can be given them.
"""

import os

from forwarder.upgrade import MeshState
from workers.boot import PeerFds, RingFds
from workers.shm.arena import arena_size
from workers.shm.layout import EGRESS_BYTES, INGRESS_BYTES
from workers.shm.segments import close_ring, create_arena, create_ring

ARENA_BYTES = arena_size(INGRESS_BYTES, EGRESS_BYTES)


class Mesh:
    """Arenas and rings between the slots that have a worker."""

    def __init__(self, arena_bytes: int = ARENA_BYTES) -> None:
        self.arena_bytes = arena_bytes
        self.serials: dict[int, int] = {}
        self._arenas: dict[int, int] = {}
        self._rings: dict[tuple[int, int], RingFds] = {}

    def add(self, slot: int, serial: int) -> None:
        """Makes what the new worker of an empty slot needs. Raises OSError, and then leaves nothing."""
        assert slot not in self.serials
        self.serials[slot] = serial
        try:
            self._arenas[slot] = create_arena(self.arena_bytes)
            for other in self._arenas.keys() - {slot}:
                self._rings[slot, other] = create_ring()
                self._rings[other, slot] = create_ring()
        except OSError:
            self.remove(slot)
            raise

    def remove(self, slot: int) -> None:
        """Drops the supervisor's hold on a dead worker's arena and rings."""
        self.serials.pop(slot, None)
        if slot in self._arenas:
            os.close(self._arenas.pop(slot))
        for pair in [pair for pair in self._rings if slot in pair]:
            close_ring(self._rings.pop(pair))

    def arena(self, slot: int) -> int:
        return self._arenas[slot]

    def peer(self, of: int, slot: int) -> PeerFds:
        """The worker in `slot` as the one in `of` sees it."""
        return PeerFds(slot, self.serials[slot], self._arenas[slot], self._rings[of, slot], self._rings[slot, of])

    def peers(self, of: int) -> list[PeerFds]:
        return [self.peer(of, slot) for slot in sorted(self.serials) if slot != of]

    def saved(self) -> MeshState:
        """All of it, as descriptors, for `restore`."""
        rings = [(one, other, ring) for (one, other), ring in self._rings.items()]
        return MeshState(dict(self.serials), dict(self._arenas), rings)

    def restore(self, saved: MeshState) -> None:
        """Takes the descriptors over."""
        self.serials, self._arenas = dict(saved.serials), dict(saved.arenas)
        self._rings = {(one, other): ring for one, other, ring in saved.rings}

    def close_in_child(self, of: int) -> None:
        """Closes what the worker in `of` has no part in: the rings between others."""
        for pair in [pair for pair in self._rings if of not in pair]:
            close_ring(self._rings.pop(pair))

    def close(self) -> None:
        for slot in list(self.serials):
            self.remove(slot)


def joined_fds(peer: PeerFds) -> list[int]:
    """The descriptors of PeerJoined, in its order."""
    to, back = peer.to_peer, peer.from_peer
    return [peer.arena, to.memory, to.published, to.freed, back.memory, back.published, back.freed]
