"""What is remembered of streams that are over: late frames of theirs must be answered, and never open them again.

The counters of an opener are dense, so it is enough to keep the highest one seen and the gaps below it: every other
counter was open once. The first counter seen need not be 0 (the opener may have used others before this memory began):
up to EARLIER below it count as a gap, since they may arrive late, and all before as used.
"""

from bisect import bisect_right

from workers.core.errors import RemoteProtocolError

MAX_GAPS = 8192
EARLIER = 1024
TOMBSTONE_US = 60_000_000
"""How long a finished stream is remembered, to answer a FIN whose ACK was lost. After that the answer is RESET."""
MAX_TOMBSTONES = 16384
"""Of one session and worker; the oldest goes: its peer has had time to hear the last ACK."""


class SeenCounters:
    """The counters that one opener has used, in any order of arrival; `_gaps`: (first, end), disjoint, rising."""

    __slots__ = ("_gaps", "_next")

    def __init__(self) -> None:
        self._next = -1
        self._gaps: list[tuple[int, int]] = []

    @property
    def gaps(self) -> int:
        """How many gaps there are: they are what this memory costs."""
        return len(self._gaps)

    def admit(self, counter: int) -> bool:
        """Whether `counter` is new; from now on it is not. RemoteProtocolError where that leaves too many gaps."""
        if self._next < 0:
            self._next = max(counter - EARLIER, 0)
        gaps = self._gaps
        if counter >= self._next:
            if counter > self._next:
                self._check_room(counter)
                gaps.append((self._next, counter))
            self._next = counter + 1
            return True
        place = bisect_right(gaps, counter, key=_first) - 1
        if place < 0 or counter >= gaps[place][1]:
            return False
        first, end = gaps[place]
        if first < counter < end - 1:
            self._check_room(counter)
        gaps[place : place + 1] = [gap for gap in ((first, counter), (counter + 1, end)) if gap[0] < gap[1]]
        return True

    def _check_room(self, counter: int) -> None:
        if len(self._gaps) >= MAX_GAPS:
            raise RemoteProtocolError(f"stream counter {counter} leaves more than {MAX_GAPS} gaps")


def _first(gap: tuple[int, int]) -> int:
    return gap[0]


class Finished:
    """The streams that have ended, each with all that was received of it, the end itself included."""

    __slots__ = ("_totals",)

    def __init__(self) -> None:
        self._totals: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._totals)

    def add(self, flow: int, total: int, now_us: int) -> None:
        """That stream has ended."""
        if len(self._totals) >= MAX_TOMBSTONES:
            del self._totals[next(iter(self._totals))]
        self._totals[flow] = total, now_us

    def total(self, flow: int) -> int | None:
        """What to acknowledge of that stream; None if it is not known (any more)."""
        known = self._totals.get(flow)
        return None if known is None else known[0]

    def expire(self, now_us: int) -> None:
        """Forget what is older than TOMBSTONE_US."""
        totals = self._totals
        while totals:
            flow = next(iter(totals))
            if now_us - totals[flow][1] <= TOMBSTONE_US:
                break
            del totals[flow]
