"""How many records of one direction of a port were lost lately. Sans-IO.

The receiving end counts what it opened and remembers the highest counter; the records between two such reports are the
difference of the highest counters, those that came the difference of the counts. Records that overtake each other move
a loss into the next report and out of it again, since losses are summed with their sign.
"""

from collections import deque

WINDOW_US = 2_000_000
"""Reports younger than this always count."""
WINDOW_RECORDS = 256
"""Older ones count while there are fewer records: a loss of 2 % is five of them."""
WINDOW_MAX_US = 30_000_000
CHANCE = 4
"""As many losses may be chance, or records that were overtaken: they do not count against a port. Of 256 records at
0.2 % loss, five are lost once in 5,000 windows."""


class LossMeter:
    """The loss of one direction over a sliding window. `sent` and `lost`: records of the window."""

    __slots__ = ("_highest", "_received", "_reports", "lost", "sent")

    def __init__(self) -> None:
        self._reports: deque[tuple[int, int, int]] = deque()
        self._received = 0
        self._highest = -1
        self.sent = self.lost = 0

    def on_report(self, received: int, highest: int, now_us: int) -> tuple[int, int]:
        """The receiver has opened `received` records so far, the highest of them with counter `highest`.

        Returns (records sent, records lost) since the last report. One that an earlier one overtook is left out.
        """
        sent, came = highest - self._highest, received - self._received
        if sent <= 0 or came < 0:
            sent = came = 0
        else:
            self._highest, self._received = highest, received
            self._reports.append((now_us, sent, sent - came))
            self.sent += sent
            self.lost += sent - came
        self._expire(now_us)
        return sent, sent - came

    def _expire(self, now_us: int) -> None:
        reports = self._reports
        while reports:
            age_us, sent = now_us - reports[0][0], reports[0][1]
            if age_us <= WINDOW_US or (age_us <= WINDOW_MAX_US and self.sent - sent < WINDOW_RECORDS):
                return
            _, sent, lost = reports.popleft()
            self.sent -= sent
            self.lost -= lost

    def forgive(self) -> None:
        """One record was lost for a known reason: it was larger than the path's MTU."""
        if self._reports:
            at_us, sent, lost = self._reports[-1]
            self._reports[-1] = (at_us, sent, lost - 1)
            self.lost -= 1

    def forget(self) -> None:
        """Start a new window: what was lost until now says nothing about what is sent from now on."""
        self._reports.clear()
        self.sent = self.lost = 0

    @property
    def ratio(self) -> float:
        """The share that was lost, 0 to 1."""
        return max(self.lost, 0) / self.sent if self.sent else 0.0

    @property
    def credible(self) -> float:
        """The share that was lost, less what may be chance.

        What the newest report misses may have been overtaken by its PING: it counts when the next one misses it, too.
        """
        if not self._reports:
            return 0.0
        return max(self.lost - max(self._reports[-1][2], 0) - CHANCE, 0) / self.sent
