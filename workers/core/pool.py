"""How many stripes a session has with `somaxconn = "auto"`: as many as make it faster. Sans-IO.

1. While the session moves data, its rate is measured in slices; WINDOW of them that agree are the rate of today's size.
2. Then another size is tried: twice as many stripes; if that was faster, but not clearly, a third more; where that is
   in vain, every other time a third fewer.
3. A larger size stays if it is clearly faster, a smaller one if it is not slower; else the former size returns, and the
   next try waits twice as long as the last.
4. A session that moves nothing shrinks by half every IDLE_US.

"Clearly": more than noise explains, and more than a share of what so many more stripes would bring if each got as much.
"""

from collections.abc import Sequence
from math import ceil, sqrt

SLICE_US = 200_000
"""The shortest slice; at least two round trips."""
WINDOW = 8
ENOUGH = 4
"""Slices that suffice for a great difference."""
SETTLE_US = 500_000
"""The least time from a change to the first slice; at least ten round trips (slow start)."""
PATIENCE_US = 5_000_000
"""How long stripes may take to come up, or a rate to become level, before it is taken as it is."""
LEVEL = 0.1
"""A rate is level if the two halves of a window differ by less."""
GREAT, CLEAR, SAME = 0.3, 0.05, 0.02
"""Differences of rates: that a few slices show; that is worth more stripes; that is none."""
SHARE = 0.15
"""Of the gain that would be in proportion to the number of stripes."""
BUSY_BYTES_S = 125_000
IDLE_US = 10_000_000
WAIT_MIN_US, WAIT_MAX_US = 10_000_000, 300_000_000
FASTER, FAST, SLOW = 2.0, 4 / 3, 2 / 3
"""Sizes that are tried, as factors of today's."""


class Pool:
    """`wanted` stripes, from `least` to `most`."""

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = min(least, most), most
        self.wanted = self.least
        self._size = self.least
        self._base: tuple[float, float] | None = None
        self._factor = FASTER
        self._slices: list[float] = []
        self._moved_bytes = 0
        self._slice_from_us: int | None = None
        self._changed_us = self._busy_us = self._next_try_us = 0
        self._wait_us = WAIT_MIN_US
        self._in_vain = 0

    def adopt(self, wanted: int) -> None:
        """Another has decided."""
        if wanted != self.wanted:
            self.wanted = self._size = min(max(wanted, self.least), self.most)
            self._start_over()

    def on_sample(self, now_us: int, moved_bytes: int, up: int, rtt_us: int) -> None:
        """Every 100 ms or so: bytes moved since the start, stripes that are up, and their round trip."""
        since_us = now_us - self._changed_us
        is_settled = since_us >= max(SETTLE_US, 10 * rtt_us) and (up >= self.wanted or since_us > PATIENCE_US)
        if self._slice_from_us is None or not is_settled:
            self._slice_from_us, self._moved_bytes = now_us, moved_bytes
            return
        elapsed_us = now_us - self._slice_from_us
        if elapsed_us < max(SLICE_US, 2 * rtt_us):
            return
        rate = (moved_bytes - self._moved_bytes) * 1e6 / elapsed_us
        self._slice_from_us, self._moved_bytes = now_us, moved_bytes
        if rate >= BUSY_BYTES_S:
            self._busy_us = now_us
        elif now_us - self._busy_us > IDLE_US:
            self._on_idle(now_us)
            return
        self._slices.append(rate)
        if self._base is None:
            self._on_steady_slice(now_us)
        else:
            self._on_trial_slice(now_us, self._base)

    def _start_over(self) -> None:
        self._slices.clear()
        self._base = None
        self._slice_from_us = None

    def _resize(self, wanted: int, now_us: int) -> None:
        self.wanted = wanted
        self._changed_us = now_us
        self._slices.clear()
        self._slice_from_us = None

    def _on_idle(self, now_us: int) -> None:
        self._start_over()
        self._busy_us = now_us
        self._size = max(self.least, self._size // 2)
        self._wait_us, self._factor, self._next_try_us, self._in_vain = WAIT_MIN_US, FASTER, now_us, 0
        self._resize(self._size, now_us)

    def _on_steady_slice(self, now_us: int) -> None:
        """Once the rate is level, try another size."""
        slices = self._slices
        if len(slices) < WINDOW:
            return
        del slices[:-WINDOW]
        mean, error = _measure(slices)
        half = _measure(slices[: WINDOW // 2])[0]
        is_level = abs(half - mean) * 2 < LEVEL * mean or now_us - self._changed_us > 2 * PATIENCE_US
        if mean >= BUSY_BYTES_S and is_level and now_us >= self._next_try_us:
            self._try(now_us, mean, error)

    def _try(self, now_us: int, mean: float, error: float) -> None:
        size = min(max(ceil(self._size * self._factor), self.least), self.most)
        if size == self._size:
            self._on_no_better(now_us, 0.0)
        else:
            self._base = mean, error
            self._resize(size, now_us)

    def _on_trial_slice(self, now_us: int, base: tuple[float, float]) -> None:
        """Judge the size that is being tried: after a few slices if the difference is great, else after WINDOW."""
        slices = self._slices
        if len(slices) < ENOUGH:
            return
        mean, error = _measure(slices)
        gain = mean / base[0] - 1
        noise = sqrt(error**2 + base[1] ** 2) / base[0]
        if len(slices) < WINDOW and abs(gain) < max(GREAT, 4 * noise):
            return
        if self.wanted > self._size:
            is_kept = gain > max(CLEAR, SHARE * (self.wanted / self._size - 1), 3 * noise)
        else:
            is_kept = gain > -SAME
        if is_kept:
            self._keep(now_us, mean, error)
        else:
            self._base = None
            self._resize(self._size, now_us)
            self._on_no_better(now_us, gain)

    def _keep(self, now_us: int, mean: float, error: float) -> None:
        """The new size stays; another try in the same direction follows at once."""
        self._size = self.wanted
        self._wait_us, self._in_vain = WAIT_MIN_US, 0
        self._try(now_us, mean, error)

    def _on_no_better(self, now_us: int, gain: float) -> None:
        """That step did not help: next a smaller one, if it helped a little, then after a pause the other direction."""
        self._base = None
        if self._factor == FASTER and gain > SAME:
            self._factor = FAST
            return
        self._in_vain += 1
        self._factor = SLOW if self._in_vain % 2 == 0 and self._size > self.least else FASTER
        self._next_try_us = now_us + self._wait_us
        self._wait_us = min(2 * self._wait_us, WAIT_MAX_US)


def _measure(rates: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error."""
    mean = sum(rates) / len(rates)
    return mean, sqrt(sum((rate - mean) ** 2 for rate in rates) / (len(rates) - 1) / len(rates))
