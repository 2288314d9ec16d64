"""Which ports want to be looked at, by the time that each has set itself. Sans-IO.

Most ports are idle, and a loop over a thousand of them every 20 ms took a quarter of what a gigabyte cost. Invariant:
a port that is watched stands in the heap at its deadline or earlier. So a port whose deadline moves away does nothing,
and one whose deadline comes nearer than where it stands is put there anew; the older entry is passed over.
"""

from heapq import heappop, heappush
from typing import Any, Generic, TypeVar


class Watched:
    """What has a deadline. Watched by one `Deadlines` at most."""

    __slots__ = ("_deadlines", "_entry", "_stands_us", "deadline_us")

    def __init__(self, deadline_us: int) -> None:
        self.deadline_us = self._stands_us = deadline_us
        self._entry = 0
        self._deadlines: Deadlines[Any] | None = None

    def set_deadline(self, deadline_us: int) -> None:
        """Want to be looked at then."""
        self.deadline_us = deadline_us
        if deadline_us < self._stands_us and self._deadlines is not None:
            self._deadlines.put(self)


Each = TypeVar("Each", bound=Watched)


class Deadlines(Generic[Each]):
    """The ports of one session at one worker."""

    __slots__ = ("_heap", "_serial")

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Each]] = []
        self._serial = 0

    def watch(self, each: Each) -> None:
        """Tell of it until `forget`."""
        each._deadlines = self
        self.put(each)

    def put(self, each: Each) -> None:
        """Let it stand at its deadline."""
        self._serial = each._entry = self._serial + 1
        each._stands_us = each.deadline_us
        heappush(self._heap, (each.deadline_us, self._serial, each))

    def forget(self, each: Each) -> None:
        """Tell of it no more."""
        if each._deadlines is self:
            each._deadlines = None

    def due(self, now_us: int) -> list[Each]:
        """Those whose deadline has come. They are told of again until they have moved it."""
        heap = self._heap
        taken: list[Each] = []
        while heap and heap[0][0] <= now_us:
            _, entry, each = heappop(heap)
            if each._deadlines is self and each._entry == entry:
                taken.append(each)
        for each in taken:
            self.put(each)
        return [each for each in taken if each.deadline_us <= now_us]
