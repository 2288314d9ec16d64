"""A path: one carrier as a flow's worker sees it, be the carrier its own or another worker's.

It remembers what was sent on it and not yet received, in order, and how long that takes, so that frames of a path that
dies or stalls can be sent again elsewhere. A path knows no socket and no key.
"""

from collections import deque
from collections.abc import Iterator

from workers.core.retain import SentFrame
from workers.core.rtt import MAX_RTO_US, RttEstimator


class Path:
    """`worker` and `index` name the carrier; `generation` tells its successive connections apart.

    `stalled` paths get no new data until something that was sent on them is received, or until `retry_us`; one path
    that is not stalled is always left, if there is any path. `stalls` counts timeouts since something was received.
    `held_up`: the carrier's owner says that it stalls, and nothing was received since.
    """

    __slots__ = (
        "_in_flight",
        "_next_place",
        "acked_place",
        "generation",
        "held_up",
        "index",
        "lost",
        "retry_us",
        "rtt",
        "stalled",
        "stalls",
        "worker",
    )

    def __init__(self, worker: int, index: int, generation: int) -> None:
        self.worker = worker
        self.index = index
        self.generation = generation
        self.rtt = RttEstimator()
        self.stalled = self.held_up = False
        self.stalls = 0
        self.retry_us = 0
        self.lost = False
        self.acked_place = -1
        self._next_place = 0
        self._in_flight: deque[tuple[int, SentFrame]] = deque()

    def on_sent(self, frame: SentFrame, now_us: int) -> None:
        """`frame` left on this path."""
        frame.path = self
        frame.place = self._next_place
        frame.sent_us = now_us
        frame.sends += 1
        self._in_flight.append((frame.place, frame))
        self._next_place += 1

    def on_received(self, frame: SentFrame, now_us: int) -> None:
        """`frame`, sent last on this path, was received. Only frames sent once give a sample (Karn)."""
        if frame.sends == 1:
            self.rtt.on_sample(max(now_us - frame.sent_us, 1))
        self.acked_place = max(self.acked_place, frame.place)
        self.stalled = self.held_up = False
        self.stalls = self.retry_us = 0

    def is_late(self, frame: SentFrame, now_us: int) -> bool:
        """Whether `frame` waits longer than the timeout.

        That grows with `stalls`, up to fourfold: the path may have become slower, and only frames sent once tell how
        much.
        """
        return now_us - frame.sent_us >= min(self.rtt.rto_us << min(self.stalls, 2), MAX_RTO_US)

    def on_stall(self, now_us: int) -> None:
        """A timeout: the path is tried again at `retry_us`, each time later (RFC 6298, 5.5)."""
        self.retry_us = now_us + min(self.rtt.rto_us << min(self.stalls, 5), MAX_RTO_US)
        self.stalls += 1

    def oldest(self) -> SentFrame | None:
        """The first frame still waiting for this path."""
        in_flight = self._in_flight
        while in_flight:
            if self._waits(in_flight[0]):
                return in_flight[0][1]
            in_flight.popleft()
        return None

    def waiting(self) -> Iterator[SentFrame]:
        """All frames still waiting for this path, oldest first."""
        return (entry[1] for entry in self._in_flight if self._waits(entry))

    def _waits(self, entry: tuple[int, SentFrame]) -> bool:
        place, frame = entry
        return frame.path is self and frame.place == place and not frame.done and not frame.queued
