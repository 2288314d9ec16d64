"""The largest record that a path carries: packetization layer path MTU discovery (RFC 8899). Sans-IO.

All sizes are whole records in bytes, from the length to the tag: the payload of a UDP datagram or of a segment.

1. Data starts at the base size, which is confirmed. Then the most that the own link carries is probed, and then the
   middle between what passed and what failed, until the two are within STEP.
2. A size has failed when TRIES probes of it in succession were lost. A probe is lost when a small PING that left after
   it was answered: loss of everything says nothing about size.
3. After RAISE_US the search starts again, upwards.
4. While data is sent, and at once when much of it is lost, the current size is probed; when that fails, the path has
   become a black hole for it (section 4.3): back to the base, and from there to the least.

RFC 8899, section 5.2, names the states: the base, searching, search complete, error.
"""

BASE = 1208
"""What IPv6's least MTU of 1280 leaves for TCP with timestamps, the longest of the headers here."""
LEAST = 508
"""What IPv4's 576 leaves for UDP with the longest IP header: the floor when the base does not pass."""
STEP = 16
TRIES = 3
RAISE_US = 600_000_000
CONFIRM_US = 5_000_000
PROBE_LIFE_US = 3_000_000
"""A probe without a verdict is forgotten after so long: the port itself is in trouble."""
NEVER_US = 1 << 62


class PathMtu:
    """The search for the path MTU of one port. `size`: what a record may have now."""

    __slots__ = (
        "_base",
        "_confirm_us",
        "_failed",
        "_is_confirming",
        "_most",
        "_probe_size",
        "_raise_us",
        "_tried",
        "_tries",
        "probe_clock",
        "size",
    )

    def __init__(self, most: int, base: int = BASE) -> None:
        """`most`: what the own link lets through, LEAST or more."""
        assert most >= LEAST
        self._most = most
        self._base = self.size = min(base, most)
        self._failed = most + 1
        self._tried = self._tries = 0
        self._is_confirming = True
        self._confirm_us = self._raise_us = 0
        self._probe_size = self.probe_clock = 0

    @property
    def is_waiting(self) -> bool:
        """Whether a probe is on its way; it left at `probe_clock`. A small PING has to follow it."""
        return self._probe_size != 0

    def next_us(self, is_busy: bool) -> int:
        """When a probe is due; NEVER_US while one is on its way. `is_busy`: data is sent."""
        if self._probe_size:
            return NEVER_US
        if self._is_confirming or self._candidate():
            return 0
        if self.size == self._most or not self._raise_us:
            return self._confirm_us if is_busy else NEVER_US
        return min(self._raise_us, self._confirm_us) if is_busy else self._raise_us

    def next_probe(self, now_us: int, is_busy: bool) -> int:
        """The size of the PING to send now; 0: none."""
        if self._probe_size and now_us - self.probe_clock >= PROBE_LIFE_US:
            self._probe_size = 0
        if now_us < self.next_us(is_busy):
            return 0
        if self._is_confirming:
            return self.size
        if not self._candidate() and self._raise_us and now_us >= self._raise_us:
            self._failed, self._raise_us = self._most + 1, 0
        return self._candidate() or self.size

    def _candidate(self) -> int:
        """The next size to try; 0: the search is complete."""
        if self.size == self._most or self._failed - self.size <= STEP:
            return 0
        return self._most if self._failed > self._most else (self.size + self._failed) // 2

    def on_probe_sent(self, size: int, clock: int) -> None:
        """A PING of `size` left with this clock."""
        if size != self._tried:
            self._tried, self._tries = size, 0
        self._probe_size, self.probe_clock = size, clock
        self._confirm_us = clock + CONFIRM_US

    def on_probe_answered(self, size: int, clock: int) -> None:
        """The other end has received a PING of `size`. A late answer is as good."""
        if self._probe_size and self.probe_clock == clock:
            self._probe_size = self._tries = 0
            self._is_confirming = False
        if self.size < size <= self._most:
            self.size = size
            self._failed = max(self._failed, size + 1)
        self._complete(clock)

    def on_small_answered(self, clock: int) -> bool:
        """A small PING that left at `clock` was answered. Whether that shows that the probe was lost."""
        if not self._probe_size or self.probe_clock >= clock:
            return False
        size, self._probe_size = self._probe_size, 0
        self._tries += 1
        if size <= self.size:
            self._is_confirming = True
        if self._tries == TRIES:
            self._tries = 0
            self._fail(size)
            self._complete(clock)
        return True

    def _fail(self, size: int) -> None:
        self._failed = min(self._failed, size)
        if size > self.size:
            return
        self._is_confirming = False
        if self.size > self._base:
            self.size = self._base
        elif self.size > LEAST:
            self.size = LEAST
        self._failed = max(size, self.size + 1)

    def _complete(self, now_us: int) -> None:
        """Set the raise timer when there is nothing left to search."""
        if not self._candidate():
            self._raise_us = now_us + RAISE_US

    def on_trouble(self) -> None:
        """Much of the data is lost while PINGs are answered: the current size may not pass any more."""
        if self.size > LEAST:
            self._is_confirming = True

    def on_reconnected(self) -> None:
        """The port has a new connection, maybe by another path: the current size has to be confirmed."""
        self._probe_size = self._tries = 0
        self._is_confirming = True

    def on_too_large(self, most: int) -> None:
        """The own link lets no more than `most` through: the kernel refused a record (EMSGSIZE), or its MTU changed."""
        self._most = max(most, LEAST)
        self._base = min(self._base, self._most)
        self.size = min(self.size, self._most)
        self._failed = self._most + 1
        self._probe_size = self._tries = 0
