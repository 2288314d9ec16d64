"""A port's past, over all its connections: how soon it is dialled again, and with how much data it is trusted. Sans-IO.

A port that was suspended, or that died young, comes back with a small share of what an equal port gets, and twice as
much every second: one that dies or loses again and again costs little. The same for all ports alike changes nothing.
"""

from collections.abc import Callable

PAUSE_MIN_US, PAUSE_MAX_US = 100_000, 8_000_000
YOUNG_US = 10_000_000
"""A port that dies younger is as good as one that could not be dialled."""
HOLD_US, HOLD_DOUBLINGS = 2_000_000, 5
"""How long a lossy port is suspended: twice as long each time, 64 s at the most."""
FORGET_US = 60_000_000
"""Suspensions are forgotten when none followed for so long."""
TRUST_LATE, TRUST_LOSSY = 1 / 4, 1 / 16
TRUST_DOUBLING_US = 1_000_000


class Standing:
    """`failures`: dials and connections that failed since one lasted. `jitter` gives numbers from 0.5 to 1."""

    __slots__ = ("_jitter", "_relapses", "_since_us", "_suspensions", "_trust", "failures")

    def __init__(self, jitter: Callable[[], float]) -> None:
        self._jitter = jitter
        self.failures = self._relapses = self._suspensions = self._since_us = 0
        self._trust = 1.0

    def on_established(self, now_us: int) -> None:
        """There is a new connection."""
        if now_us - self._since_us > FORGET_US:
            self._suspensions = 0
        self._trust, self._since_us = TRUST_LOSSY if self._relapses or self._suspensions else 1.0, now_us

    def on_lost(self, age_us: int | None) -> int:
        """A connection of this age is gone, or a dial failed (None). How long to wait before the next dial."""
        if age_us is not None and age_us >= YOUNG_US:
            self.failures = self._relapses = 0
        else:
            self.failures += 1
            self._relapses += age_us is not None
        return int(min(PAUSE_MIN_US << min(self.failures, 10), PAUSE_MAX_US) * self._jitter())

    def on_suspended(self, now_us: int) -> int:
        """The port loses much. How long it is suspended at the least."""
        if now_us - self._since_us > FORGET_US:
            self._suspensions = 0
        hold_us = HOLD_US << min(self._suspensions, HOLD_DOUBLINGS)
        self._suspensions += 1
        return hold_us

    def on_return(self, trust: float, now_us: int) -> None:
        """The port gets data again, no more than this share of an equal one's."""
        self._trust, self._since_us = min(trust, self.trust(now_us)), now_us

    def trust(self, now_us: int) -> float:
        """The share of an equal port's data that this one gets: up to 1."""
        if self._trust == 1:
            return 1.0
        doublings = (now_us - self._since_us) // TRUST_DOUBLING_US
        return min(self._trust * (1 << min(doublings, 10)), 1.0)
