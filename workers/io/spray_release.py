"""How a server's worker on its way out lets go of a spray tunnel."""

from typing import Protocol

from workers.io import mesh
from workers.io.context import Context
from workers.io.spray_target import Targets

FIRST_RELEASE_US, RELEASE_STEPS, RELEASE_MOST = 100_000, 8, 10
"""When the first ports are let go of, in how many steps of 100 ms all are, and the most in one: clients dial slowly."""
HAND_ON_MAX_US = 3_000_000
"""The others take conversations within this, or not at all."""


class Releasing(Protocol):
    """The tunnel. `taken`: the carriers whose ports this worker has."""

    context: Context
    targets: Targets
    taken: set[int]

    def let_go(self, carrier: int, now_us: int) -> None:
        """Close what came in by that port, which others read from now on."""


class Release:
    """How a server's worker on its way out lets go: first of its conversations, then of one port after the other, so
    that a client always has some that it need not dial."""

    def __init__(self, end: Releasing) -> None:
        self._end = end
        self._left: list[int] = []
        self._each = 1
        self._next_us = self._began_us = 0

    def begin(self, now_us: int) -> None:
        """Conversations go now, ports when all workers have done that."""
        self._left = sorted(self._end.taken)
        self._each = min(max(-(-len(self._left) // RELEASE_STEPS), 1), RELEASE_MOST)
        self._began_us, self._next_us = now_us, now_us + FIRST_RELEASE_US
        self._end.targets.hand_on(now_us)

    def _siblings_have_handed_on(self) -> bool:
        """Else the next generation would not know conversations that come by the ports released here."""
        context = self._end.context
        peers = [peer for slot, peer in context.mesh.peers.items() if slot in context.own]
        return all(peer.seats & mesh.HANDED_ON for peer in peers)

    @property
    def is_busy(self) -> bool:
        """Whether anything is left."""
        return bool(self._left) or self._end.targets.has_own

    def on_time(self, now_us: int) -> None:
        """Every 100 ms."""
        if not self.is_busy or not self._began_us:
            return
        targets = self._end.targets
        targets.hand_on(now_us)
        waits = targets.has_own or not self._siblings_have_handed_on()
        if now_us < self._next_us or (waits and now_us - self._began_us < HAND_ON_MAX_US):
            return
        now, self._left = self._left[: self._each], self._left[self._each :]
        for carrier in now:
            self._end.let_go(carrier, now_us)
        if not self._left:
            targets.drop_own()
