"""`somaxconn = "auto"` over all workers: the one in the lowest slot of those that do not retire decides
(`workers.core.pool`), the others follow.

Every worker tells the decider what it has moved (LOAD); the decider tells all how many stripes there are to be (POOL).
"""

from collections.abc import Callable

from workers.core.pool import Pool
from workers.io import mesh
from workers.io.context import Context
from workers.io.mesh import Peer
from workers.io.session import Session
from workers.io.stripe import Stripe

LEAST = 4


class AutoSize:
    """`resize` is told how many stripes all workers together are to have, at most `most`. `size`: how many they had."""

    def __init__(
        self, context: Context, session: Session, most: int, resize: Callable[[int], None], size: int | None = None
    ) -> None:
        self._context = context
        self._session = session
        self._resize = resize
        self._pool = Pool(max(LEAST, context.workers), most)
        if size is not None:
            self._pool.adopt(size)
        self._moved_bytes = 0
        self._counted: dict[Stripe, int] = {}
        self._wasted_bytes = 0
        resize(self._pool.wanted)

    @property
    def wanted(self) -> int:
        """Stripes of all workers together."""
        return self._pool.wanted

    def on_time(self, now_us: int) -> None:
        """Every 100 ms."""
        share, live = self._session.share, self._session.liveness
        fresh_bytes = self._fresh_bytes()
        decider = self._decider()
        if decider == self._context.slot:
            self._moved_bytes += fresh_bytes
            before = self._pool.wanted
            self._pool.on_sample(now_us, self._moved_bytes, live.total_up, share.rtt_us)
            if self._pool.wanted != before:
                self._session.exchange.tell_all(mesh.POOL, value=self._pool.wanted)
                self._resize(self._pool.wanted)
        elif fresh_bytes > 0 and decider in self._context.mesh.peers:
            self._session.exchange.tell(self._context.mesh.peers[decider], mesh.LOAD, value=fresh_bytes)

    def _decider(self) -> int:
        context = self._context
        staying = [slot for slot, peer in context.mesh.peers.items() if not peer.is_retiring]
        return min(staying if context.retiring else [context.slot, *staying], default=context.slot)

    def _fresh_bytes(self) -> int:
        """What this worker's stripes have moved since the last call, less what was moved twice.

        Not what applications got: that comes in bursts, whenever a gap is closed.
        """
        share, before = self._session.share, self._counted
        self._counted = {stripe: stripe.bytes_in + stripe.bytes_out for stripe in self._session.stripes.values()}
        wasted_bytes = share.reinjected_bytes + share.duplicate_bytes
        fresh_bytes = sum(count - before.get(stripe, 0) for stripe, count in self._counted.items())
        fresh_bytes -= wasted_bytes - self._wasted_bytes
        self._wasted_bytes = wasted_bytes
        return fresh_bytes

    def on_peer_joined(self, peer: Peer) -> None:
        """A new worker, which may have to decide from now on, takes over what was decided."""
        self._session.exchange.tell(peer, mesh.POOL, value=self._pool.wanted)

    def on_descriptor(self, kind: int, value: int) -> None:
        """LOAD or POOL, and its value."""
        if kind == mesh.LOAD:
            self._moved_bytes += value
            return
        self._pool.adopt(value)
        self._resize(self._pool.wanted)
