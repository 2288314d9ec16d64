"""Datagrams that cross between the workers of one end, for one spray session (`workers.io.mesh`).

A worker without ports hands out what its conversations send (OUT), and one whose ports all lose the other workers'
share of it: where each port is limited, one conversation may need them all. Pieces and copies, and datagrams of a
conversation whose socket a worker does not have, are handed in to the conversation's owner (IN). Each is copied into a
slot, since this is not the common way.
"""

import random

from workers.core import inner
from workers.core.cuts import Datagrams
from workers.core.inner import Opened
from workers.core.port_choice import FREE_LOSS
from workers.io import mesh
from workers.io.context import Context
from workers.io.mesh import Descriptor, Peer
from workers.io.spray_waiting import COPIED_BYTES, copies_of, datagrams_in
from workers.shm.arena import Side

SPREAD_US = 10_000_000
"""For so long after a loss: with the others' ports there may be none, and that is no reason to stop."""
SPREAD_BPS = 300e6
"""Above this, what is lost is probably lost for want of CPU, and copying to other workers would cost more of it."""


class SprayExchange:
    """One session's part of the mesh. `dropped`: datagrams, for want of memory or of ports."""

    def __init__(self, context: Context, tunnel: int, number: int, key_index: int) -> None:
        self._context = context
        self._tunnel = tunnel
        self._number = number
        self._key_index = key_index
        self._elsewhere: dict[int, int] = {}
        self._told = -1
        self._spread_until_us = 0
        self._spreading = False
        self._sent_bytes = self._asked_us = 0
        self.dropped = 0

    @property
    def up(self) -> int:
        """Ports that other workers have, as far as they are fit for data."""
        return sum(self._elsewhere.values())

    @property
    def up_elsewhere(self) -> int:
        """Those of workers that do not retire."""
        peers = self._context.mesh.peers
        return sum(up for slot, up in self._elsewhere.items() if slot in peers and not peers[slot].is_retiring)

    def tell(self, peer: Peer, kind: int, **fields: int) -> None:
        """Send a worker a descriptor of this session."""
        peer.send(kind, lazy=False, tunnel=self._tunnel, session=self._number, **fields)

    def tell_all(self, kind: int, **fields: int) -> None:
        """Send every worker a descriptor of this session."""
        for peer in self._context.mesh.peers.values():
            self.tell(peer, kind, **fields)

    def tell_carriers(self, up: int) -> None:
        """Let the other workers know how many ports here are fit for data."""
        if up != self._told:
            self._told = up
            self.tell_all(mesh.CARRIERS, length=self._key_index, carrier=up)

    def on_peer_joined(self, peer: Peer) -> None:
        """A worker has taken a dead one's place."""
        self._elsewhere.pop(peer.slot, None)
        self.tell(peer, mesh.CARRIERS, length=self._key_index, carrier=max(self._told, 0))

    def on_peer_lost(self, peer: Peer) -> None:
        """A worker is dead."""
        self._elsewhere.pop(peer.slot, None)

    def hand_out(self, conversation: int, source: Datagrams, first: int, count: int, size: int, last: int) -> bool:
        """Give datagrams to another worker's ports; False if no worker has any. As `SpraySession.send`."""
        peer = self._other()
        if peer is not None:
            self._give(peer, conversation, source, first, count, size, last)
        return peer is not None

    def hand_out_numbered(self, conversation: int, number: int, datagram: bytes) -> bool:
        """The same for one that goes as pieces or copies of that number."""
        peer = self._other()
        if peer is not None:
            payload = inner.SEQUENCE.pack(number) + datagram
            self.dropped += not self._lend(peer, mesh.OUT, payload, conversation, inner.COPY, len(payload))
        return peer is not None

    def _other(self) -> Peer | None:
        """A worker that has ports, if there is none here that is fit for data."""
        peers = self._context.mesh.peers
        able = [slot for slot, up in self._elsewhere.items() if up and slot in peers]
        return peers[random.choice(able)] if able and self._told <= 0 else None

    def on_loss(self, loss: float, sent_bytes: int, now_us: int) -> None:
        """What the ports here have lost of late, all alike. `sent_bytes`: in all, to know how fast."""
        rate_bps = (sent_bytes - self._sent_bytes) * 8e6 / max(now_us - self._asked_us, 1)
        self._sent_bytes, self._asked_us = sent_bytes, now_us
        if loss > FREE_LOSS:
            self._spread_until_us = now_us + SPREAD_US
        self._spreading = now_us < self._spread_until_us and rate_bps < SPREAD_BPS

    def spread(self, conversation: int, source: Datagrams, first: int, count: int, size: int, last: int) -> bool:
        """While ports lose, give datagrams to other workers' ports by their share; False: they are for those here."""
        if not self._spreading:
            return False
        turn = random.randrange(max(self._told + self.up, 1)) - self._told
        for slot, up in self._elsewhere.items():
            peer = self._context.mesh.peers.get(slot)
            if 0 <= turn < up and peer is not None:
                self._give(peer, conversation, source, first, count, size, last)
                return True
            turn -= up
        return False

    def _give(
        self, peer: Peer, conversation: int, source: Datagrams, first: int, count: int, size: int, last: int
    ) -> None:
        for copied, payload in copies_of(source, first, count, size, last):
            if not self._lend(peer, mesh.OUT, payload, conversation, inner.DATA, size):
                self.dropped += copied

    def hand_in(self, worker: int, opened: Opened) -> bool:
        """Give what came to the worker that owns its conversation; False if there is none."""
        peer = self._context.mesh.peers.get(worker)
        if peer is None:
            return False
        kind, conversation, size, payload = opened
        if not self._lend(peer, mesh.IN, payload, conversation, kind, size):
            self.dropped += 1
        return True

    def _lend(self, peer: Peer, kind: int, payload: bytes, conversation: int, what: int, size: int) -> bool:
        memory = self._context.memory
        slot = memory.copy_in(payload or b"\0", Side.EGRESS if kind == mesh.OUT else Side.INGRESS)
        if slot < 0:
            return False
        memory.arena.lend(slot, peer.slot)
        memory.arena.release(slot)
        self.tell(
            peer,
            kind,
            slot=slot,
            flow=conversation,
            offset=what,
            length=len(payload),
            carrier=self._key_index,
            value2=size,
        )
        return True

    def on_descriptor(self, peer: Peer, descriptor: Descriptor) -> Opened | None:
        """One descriptor that names this session: what it hands over, if anything."""
        kind, _, _, slot, _, flow, what, length, carrier, _, size = descriptor
        if kind == mesh.CARRIERS:
            self._elsewhere[peer.slot] = carrier
        elif kind in (mesh.IN, mesh.OUT):
            try:
                payload = bytes(peer.view(slot, max(length, 1))[:length])
            except ValueError:
                self._context.mesh.dropped_descriptors += 1
                return None
            peer.return_slot(slot)
            if len(payload) <= COPIED_BYTES:
                return Opened(what, flow & 0xFFFFFFFF, size, payload)
            self.dropped += datagrams_in(size, payload)
        elif kind == mesh.BOUND and self._context.memory.give_back(slot, peer.slot):
            self.dropped += 1
        else:
            self._context.mesh.dropped_descriptors += 1
        return None
