"""The mesh: what workers of one end say to each other, as descriptors in shared-memory rings.

A flow's worker and a carrier's worker meet here when they are not the same. Payload stays where it is, in a slot of
the worker that received it; only descriptors cross. `session` is the session's number within this end
(`workers.io.session`).

kind      to                  slot        flow, offset    length            carrier     value          value2
OUT       carrier's worker    frame       of the frame    of the frame      -           frame kind     sent, per stream
BOUND     flow's worker       as in OUT   as in OUT       next frame size   index       generation     frame kind
IN        flow's worker       frame       -               of the frame      key index   index<<32|gen  -
FREE      the slot's owner    slot        -               -                 -           -              -
CARRIERS  all                 -           far boot, RTT   key index         number up   far slot<<32|serial  not stalled
LOST      all                 -           -               -                 index       generation     -
STALLED   all                 -           -               -                 index       generation     -
BROKEN    carrier's worker    -           -               -                 index       generation     -
GONE      all                 -           -               -                 -           far slot<<32|serial  -
ROSTER    all                 -           far boot id, -  -                 -           far slot<<32|serial  -
DRAIN     all                 -           far boot, -       -                 -           -              -
IDLE      all                 -           -               -                 -           -              -
LOAD      all                 -           -               -                 -           bytes moved    -
POOL      all                 -           -               -                 -           stripes wanted -
REPLACED  all                 -           -               -                 index       -              -
SEATS     all                 -           -               -                 -           first slot     workers
RELEASED  all                 -           -               -                 index       -              -
STARTED   all                 -           -               -                 -           -              -
TRAFFIC   all                 -           -               -                 -           queue, us      -

In a spray session a flow is a conversation, which IN names, too, and what is in a slot are datagrams of `value2` bytes
back to back, the last perhaps shorter; `offset` is the kind of the record that they came in, or will go in. Also there:

CONVERSATION  all           from the flow's owner: its source key, length `length`; bytes 0..8 of it in value, 8..16 in
                            value2, 16..20 in slot, 20..24 in carrier, 24..32 in offset
TOUCHED   flow's worker     -           flow            -                 -           -              -
CLOSED    all               -           flow            -                 -           -              -

OUT with flag 1 wants its BOUND at once, since no further frame may be handed over before. BOUND with flag 0 means that
the frame was not sent and comes back. CARRIERS with flag 1: the sender has no room for more applications. IDLE, which
names no session, means that the sender drains and has no streams left, or, with flag 1, none in that tunnel, which is
to go; LOAD, that the sender has some. REPLACED: the sender has a stripe in place of the receiver's. SEATS, which names
no session, tells the sender's generation: with flag 1 it retires, with flag 2 it has let go of all ports and of its
applications' datagram sockets, with flag 4 handed on its conversations. RELEASED, which names no session: the sender
has let go of that carrier's port. STARTED, which names no session: the sender has just begun with that tunnel, and has
to learn what a new worker learns. TRAFFIC: the sender has lately sent small frames of applications (flag 1), frames of
bulk transfers (flag 2), and knows how long the small ones queue in the network (flag 4, `workers.io.shaping`). `tunnel`
is the tunnel's index. Unknown kinds, and slots and lengths outside the arena, are counted and dropped.
"""

from collections import deque
from typing import Any, Protocol

from workers.boot import PeerFds
from workers.io.memory import Memory
from workers.shm.arena import ArenaView
from workers.shm.ring import RingConsumer, RingProducer

OUT, BOUND, IN, FREE, CARRIERS, LOST, GONE, ROSTER, DRAIN, IDLE, STALLED, LOAD, POOL, BROKEN = range(1, 15)
CONVERSATION, TOUCHED, CLOSED, REPLACED, SEATS, RELEASED, STARTED, TRAFFIC = range(15, 23)
RETIRING, LET_GO, HANDED_ON = 1, 2, 4
"""Flags of SEATS."""
LIGHT, HEAVY, KNOWN = 1, 2, 4
"""Flags of TRAFFIC."""

READ = 1
LAZY_S = 0.001
"""How long a lazy descriptor may wait for another to go along with it."""
TAKE = 256
"""Descriptors taken in one turn, so that sockets get theirs."""

Descriptor = tuple[int, int, int, int, int, int, int, int, int, int, int]


class MeshHandler(Protocol):
    """The worker, as the mesh sees it."""

    def on_descriptor(self, peer: "Peer", descriptor: Descriptor) -> None:
        """One descriptor from `peer`."""

    def on_turn_end(self) -> None:
        """All descriptors of this turn were handed over."""


class Peer:
    """Another worker of this end. `alive` is false once it was reaped; pieces in its arena stay readable.

    `idle`: it drains and has no streams left. `seats`: flags of SEATS, and `generation` its numbers, once it told.
    """

    __slots__ = (
        "_backlog",
        "_freed_watcher",
        "_mesh",
        "_view",
        "alive",
        "consumer",
        "fds",
        "generation",
        "idle",
        "producer",
        "seats",
        "serial",
        "slot",
    )

    def __init__(self, mesh: "Mesh", fds: PeerFds, arena_bytes: int) -> None:
        self.slot = fds.slot
        self.serial = fds.serial
        self.fds = fds
        self.alive = True
        self.idle = False
        self.generation: tuple[int, int] | None = None
        self.seats = 0
        self._mesh = mesh
        self._view = ArenaView(fds.arena, arena_bytes)
        self.producer = RingProducer(fds.to_peer)
        self.consumer = RingConsumer(fds.from_peer)
        self._backlog: deque[Descriptor] = deque()
        self._freed_watcher = mesh.loop.io(fds.to_peer.freed, READ)

    @property
    def is_retiring(self) -> bool:
        """Whether it is on its way out, while a newer generation serves."""
        return bool(self.seats & RETIRING)

    def view(self, slot: int, length: int) -> memoryview:
        """Bytes of a slot of the peer's arena. Raises ValueError outside of it."""
        return self._view.view(slot, length)

    def send(
        self,
        kind: int,
        *,
        flags: int = 0,
        tunnel: int = 0,
        slot: int = 0,
        session: int = 0,
        flow: int = 0,
        offset: int = 0,
        length: int = 0,
        carrier: int = 0,
        value: int = 0,
        value2: int = 0,
        lazy: bool = False,
    ) -> None:
        """Queue a descriptor; it is published at the end of the turn, or sooner.

        A `lazy` one wakes nobody up for up to LAZY_S: it goes along with the next that is not.
        """
        self._push((kind, flags, tunnel, slot, session, flow, offset, length, carrier, value, value2))
        if lazy:
            self._mesh.flush_lazily()
        else:
            self._mesh.arm_flush()

    def give(self, descriptor: Descriptor, *, now: bool) -> None:
        """`send`, for a descriptor that is made already. `now`: publish it at once, with those that wait."""
        self._push(descriptor)
        if now:
            self.producer.flush()
        else:
            self._mesh.arm_flush()

    def _push(self, descriptor: Descriptor) -> None:
        if self._backlog or not self.producer.push(*descriptor):
            if not self._backlog:
                self._freed_watcher.start(self._on_freed)
            self._backlog.append(descriptor)

    def return_slot(self, slot: int, lazy: bool = False) -> None:
        """A slot of the peer's is not needed any more. `lazy`: it is a small one, and can wait."""
        if self.alive:
            self.send(FREE, slot=slot, lazy=lazy)

    def _on_freed(self) -> None:
        backlog = self._backlog
        while backlog and self.producer.push(*backlog[0]):
            backlog.popleft()
        self.producer.flush()
        if not backlog:
            self._freed_watcher.stop()

    def close(self) -> None:
        """The peer was reaped."""
        self.alive = False
        self._backlog.clear()
        self._freed_watcher.stop()
        self._freed_watcher.close()
        self.producer.close()
        self.consumer.close()
        self._view.close()


class Mesh:
    """All peers of one worker."""

    def __init__(self, loop: Any, memory: Memory, arena_bytes: int) -> None:
        self.loop = loop
        self.handler: MeshHandler | None = None
        self.peers: dict[int, Peer] = {}
        self.dropped_descriptors = 0
        self._memory = memory
        self._arena_bytes = arena_bytes
        self._watchers: dict[int, Any] = {}
        self._armed = False
        self._lazy_timer = loop.timer(LAZY_S, LAZY_S)
        self._is_lazy = False

    def add_peer(self, fds: PeerFds) -> Peer:
        """Meet a worker. The mesh owns the descriptors from now on."""
        peer = Peer(self, fds, self._arena_bytes)
        self.peers[fds.slot] = peer
        watcher = self.loop.io(peer.consumer.fileno(), READ)
        self._watchers[fds.slot] = watcher
        watcher.start(self._on_published, peer)
        return peer

    def remove_peer(self, slot: int, serial: int) -> Peer | None:
        """A worker was reaped: take what it had published, then part with it. What it had borrowed comes back."""
        peer = self.peers.get(slot)
        if peer is None or peer.serial != serial:
            return None
        self._take(peer, everything=True)
        del self.peers[slot]
        watcher = self._watchers.pop(slot)
        watcher.stop()
        watcher.close()
        peer.close()
        self._memory.arena.reclaim(slot)
        return peer

    def arm_flush(self) -> None:
        """Publish at the end of this turn. A callback, not a prepare watcher: that one loses wake-ups."""
        if not self._armed:
            self._armed = True
            self.loop.run_callback(self.flush)

    def flush_lazily(self) -> None:
        """Publish within LAZY_S."""
        if not self._is_lazy:
            self._is_lazy = True
            self._lazy_timer.again(self._flush_lazy)

    def _flush_lazy(self) -> None:
        self._is_lazy = False
        self._lazy_timer.stop()
        self.flush()

    def flush(self) -> None:
        """Publish everything now."""
        self._armed = False
        for peer in self.peers.values():
            peer.producer.flush()

    def _on_published(self, peer: Peer) -> None:
        self._take(peer)
        if peer.alive and peer.consumer.more:
            self.loop.run_callback(self._on_published, peer)

    def _take(self, peer: Peer, everything: bool = False) -> None:
        handler = self.handler
        assert handler is not None
        if not peer.alive:
            return
        more = True
        while more:
            descriptors = peer.consumer.take(TAKE)
            for descriptor in descriptors:
                handler.on_descriptor(peer, descriptor)
            more = everything and bool(descriptors)
        handler.on_turn_end()
