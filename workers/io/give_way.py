"""After a small frame has left, whoever it woke goes first.

On the same processor they would wait until this worker has done its books and sleeps: 3 µs of each of the four passes
of a round trip. Where others want the processor as well, the kernel lets them have a whole slice, and so that is
noticed, and not done again for a while.
"""

from os import sched_yield
from time import monotonic_ns

LONG_NS = 200_000
"""What whoever was woken may take. A slice of the scheduler's is 3 ms."""
PAUSE_NS = 1_000_000_000
"""One slice a second is lost at most: 0.3 %."""


class GiveWay:
    """One for each worker."""

    __slots__ = ("_not_before_ns",)

    def __init__(self) -> None:
        self._not_before_ns = 0

    def __call__(self) -> None:
        """Let others run, if that has lately been short."""
        before_ns = monotonic_ns()
        if before_ns >= self._not_before_ns:
            sched_yield()
            after_ns = monotonic_ns()
            if after_ns - before_ns > LONG_NS:
                self._not_before_ns = after_ns + PAUSE_NS
