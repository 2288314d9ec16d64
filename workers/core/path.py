"""A path: one carrier as a flow's worker sees it, be the carrier its own or another worker's.

It remembers what was sent on it and not yet received, in order, and how long that takes, so that frames of a path that dies
or stalls can be sent again elsewhere. A path knows no socket and no key.
"""

from collections import deque
from collections.abc import Iterator

from workers.core.retain import SentFrame
from workers.core.rtt import RttEstimator


class Path:
    """`worker` and `index` name the carrier; `generation` tells its successive connections apart.

    `stalled` paths get no new data until something that was sent on them is received.
    """

    __slots__ = ("_in_flight", "_next_place", "acked_place", "generation", "index", "lost", "rtt", "stalled", "worker")

    def __init__(self, worker: int, index: int, generation: int) -> None:
        self.worker = worker
        self.index = index
        self.generation = generation
        self.rtt = RttEstimator()
        self.stalled = False
        self.lost = False
        self.acked_place = -1
        self._next_place = 0
        self._in_flight: deque[SentFrame] = deque()

    def on_sent(self, frame: SentFrame, now_us: int) -> None:
        """`frame` left on this path."""
        frame.path = self
        frame.place = self._next_place
        frame.sent_us = now_us
        frame.sends += 1
        self._next_place += 1
        self._in_flight.append(frame)

    def on_received(self, frame: SentFrame, now_us: int) -> None:
        """`frame`, sent last on this path, was received. Only frames sent once give a sample (Karn)."""
        if frame.sends == 1:
            self.rtt.on_sample(max(now_us - frame.sent_us, 1))
        self.acked_place = max(self.acked_place, frame.place)
        self.stalled = False

    def oldest(self) -> SentFrame | None:
        """The first frame still waiting for this path."""
        in_flight = self._in_flight
        while in_flight:
            frame = in_flight[0]
            if not frame.done and frame.path is self:
                return frame
            in_flight.popleft()
        return None

    def waiting(self) -> Iterator[SentFrame]:
        """All frames still waiting for this path, oldest first."""
        return (frame for frame in self._in_flight if not frame.done and frame.path is self)

    @property
    def busy(self) -> bool:
        """Whether anything waits for this path."""
        return self.oldest() is not None
