"""How fast bulk may go while small frames share its path, so that no queue stands in front of them.

The bottleneck of a path has one queue for all. Loss-based congestion control keeps it full, and many of BBR's flows
together send more than it takes; what is small then waits there or is lost, however well it was scheduled here. While
small frames and bulk are sent together, and small frames are seen to queue, bulk is limited to a little less than the
path delivered. From there on the limit follows the queue: lower while there is one, higher while there is none. A queue
that stays all the same is somebody else's.
"""

from typing import NamedTuple

INTERVAL_US = 500_000
"""How often the limit is set: several round trips, after which a change is seen."""
NEWEST = 0.4
"""The weight of the latest measurement in what a path delivers: BBR's cycle of eight round trips evens out. With 0.25
the first limit was 387 where the path had 477 Mbit/s."""
BEGIN_US, QUEUE_US = 5_000, 2_500
"""Where bulk and small frames wait so long in the network it begins; what counts as a queue from then on. Without one
bulk's round trips are 0.5 to 1.5 ms above the shortest."""
JITTER = 0.1
"""Or so much of the shortest round trip: longer paths vary more."""
STEADY = 1.25
"""Before it begins, the latest measurement has to be within that of the smoothed one: TCP may still be starting."""
FALLING = 0.9
"""A queue that falls to that in an interval is on its way out: one of 1 s does if bulk takes 0.8 of the path."""
APART = 2
"""After so many intervals in which only bulk queued, each has a queue of its own."""
FIRST, LESS = 0.94, 0.97
"""500 Mbit/s with a queue of 20 ms are clear of it after 0.5 to 2 s."""
PROBE, NEARLY = 0.003, 0.975
"""Growth in an interval without a queue, from NEARLY the rate at which there was one. With 1 % and more there was one
of 10 ms in a third of the intervals."""
MORE, MORE_AGAIN, MORE_MAX = 0.01, 1.5, 0.08
"""Growth elsewhere: it begins with 1 %, and gets faster as long as there is no queue; twice the rate takes 6.5 s."""
IN_USE = 0.8
"""A limit of which less is used does not grow."""
LEAST = 0.75
"""Bulk gives way by no more than a quarter."""
AGAIN_US, AGAIN_MAX_US = 30_000_000, 480_000_000
"""An attempt that did not help is repeated so much later, twice as much each time: a path may be longer for good."""


class Queues(NamedTuple):
    """How much longer round trips take than the shortest of the path, `shortest_us`: those of bulk's carriers
    (`bulk_us`), and of those that small frames take (`small_us`, None if not known)."""

    bulk_us: float
    small_us: float | None
    shortest_us: float

    @property
    def are_one(self) -> bool:
        """Whether small frames and bulk both wait, as far as that is known."""
        allowed_us = self.allowed_us(BEGIN_US)
        return self.bulk_us > allowed_us and self.small_us is not None and self.small_us > allowed_us

    @property
    def are_apart(self) -> bool:
        """Whether only bulk waits, as far as that is known."""
        is_bulks = self.bulk_us > self.allowed_us(BEGIN_US)
        return is_bulks and self.small_us is not None and self.small_us < self.allowed_us(QUEUE_US)

    def allowed_us(self, least_us: int) -> float:
        """What does not count as a queue, of BEGIN_US or QUEUE_US."""
        return max(least_us, JITTER * self.shortest_us * least_us / BEGIN_US)


class Shaper:
    """The limit of one worker's bulk in one session: `limit_bps`, bits a second; 0 for none."""

    __slots__ = (
        "_again_us",
        "_apart",
        "_bulk_us",
        "_more",
        "_most_bps",
        "_not_before_us",
        "_queued_bps",
        "limit_bps",
    )

    def __init__(self) -> None:
        self.limit_bps = 0.0
        self._most_bps = self._queued_bps = 0.0
        self._more = MORE
        self._bulk_us = 0.0
        self._apart = self._not_before_us = 0
        self._again_us = AGAIN_US

    def release(self) -> None:
        """Small frames and bulk are not sent together any more."""
        if self.limit_bps:
            self._again_us = AGAIN_US
        self.limit_bps = 0.0

    def on_interval(self, now_us: int, smoothed_bps: float, latest_bps: float, queues: Queues) -> None:
        """Every INTERVAL_US, while small frames and bulk are sent together; what bulk delivered, smoothed with NEWEST,
        and in the last interval."""
        if not self.limit_bps:
            if queues.are_one and latest_bps < STEADY * smoothed_bps and now_us >= self._not_before_us:
                self._most_bps = max(smoothed_bps, latest_bps)
                self.limit_bps = FIRST * self._most_bps
                self._queued_bps = 0.0
                self._more, self._apart = MORE, 0
        elif queues.bulk_us > queues.allowed_us(QUEUE_US):
            if queues.bulk_us > FALLING * self._bulk_us:
                self._on_queue(max(smoothed_bps, latest_bps))
            if queues.small_us is not None:
                self._apart = self._apart + 1 if queues.are_apart else 0
            if self._apart == APART or self.limit_bps < LEAST * self._most_bps:
                self._give_up(now_us)
        elif latest_bps > IN_USE * self.limit_bps:
            self._grow()
        self._bulk_us = queues.bulk_us

    def _give_up(self, now_us: int) -> None:
        self.limit_bps = 0.0
        self._not_before_us = now_us + self._again_us
        self._again_us = min(2 * self._again_us, AGAIN_MAX_US)

    def _on_queue(self, delivered_bps: float) -> None:
        self._more = MORE
        self._queued_bps = min(self.limit_bps, delivered_bps)
        self.limit_bps = LESS * min(self.limit_bps, delivered_bps / IN_USE)

    def _grow(self) -> None:
        if NEARLY * self._queued_bps < self.limit_bps < self._queued_bps:
            self.limit_bps *= 1 + PROBE
        else:
            self.limit_bps *= 1 + self._more
            self._more = min(self._more * MORE_AGAIN, MORE_MAX)
        self._most_bps = max(self._most_bps, self.limit_bps)
