"""Credit: how much a peer may send on one stream, and how the window follows the bandwidth-delay product.

A stream's window starts at INITIAL_WINDOW and doubles while the application takes more than half a window in one round
trip (dynamic right-sizing, as TCP's receive buffer does), and while it keeps up with a sender that is blocked, up to a
cap. Where the pool is short, a window that is hardly used halves: what was announced stays, and credit runs down to it.
The credit pool of a worker bounds the sum: a frame of n bytes may occupy a slot of up to 2n bytes and at least
4 KiB, so a window reserves what its worst case occupies. The sum of all pools stays below the ingress quota of any one
arena, so whatever arrives finds a slot.
"""

INITIAL_WINDOW = 16 << 10
INITIAL_FRAMES = 16
MIN_SLOT = 4 << 10


def frames_allowed(window: int) -> int:
    """Frames that may be outstanding within a window of bytes: a tiny frame costs a slot, too."""
    return INITIAL_FRAMES + (window - INITIAL_WINDOW) // (8 << 10)


def reserve_bytes(window: int) -> int:
    """The most arena that a window can occupy."""
    return 2 * window + MIN_SLOT * frames_allowed(window)


class CreditPool:
    """What may be promised to all peers together, in bytes of arena; a session's pool takes it from its worker's.

    Windows grow only into three quarters of a pool: the rest is for new streams.
    """

    __slots__ = ("_worker", "reserved", "total")

    def __init__(self, total: int, worker: "CreditPool | None" = None) -> None:
        self.total = total
        self.reserved = 0
        self._worker = worker

    def for_session(self) -> "CreditPool":
        """A session's part: at most two thirds, so that no session takes everything."""
        return CreditPool(self.total * 2 // 3, self)

    def reserve(self, amount: int) -> bool:
        """Take `amount`; False and nothing taken if the pool is short."""
        if self.reserved + amount > self.total or (self._worker is not None and not self._worker.reserve(amount)):
            return False
        self.reserved += amount
        return True

    def reserve_growth(self, amount: int) -> bool:
        """Take `amount` for a larger window; False and nothing taken where that would leave too little."""
        if 4 * (self.reserved + amount) > 3 * self.total:
            return False
        if self._worker is not None and not self._worker.reserve_growth(amount):
            return False
        self.reserved += amount
        return True

    @property
    def is_short(self) -> bool:
        """Whether windows can soon not grow any more, so that those that are hardly used should shrink."""
        return 8 * self.reserved > 5 * self.total or (self._worker is not None and self._worker.is_short)

    def give_back(self, amount: int) -> None:
        """Return what `reserve` and `reserve_growth` took."""
        self.reserved -= amount
        assert self.reserved >= 0
        if self._worker is not None:
            self._worker.give_back(amount)


class ReceiveWindow:
    """One stream's credit, as its receiver grants it. Reserves from the pool; `close` gives back.

    Invariant: `_reserved` is what the window can occupy, and what the announced credit can.
    """

    __slots__ = (
        "_grown_at",
        "_mark",
        "_mark_us",
        "_pool",
        "_reserved",
        "_shrunk",
        "cap",
        "consumed",
        "consumed_frames",
        "credit",
        "frames",
        "window",
    )

    def __init__(self, pool: CreditPool, cap: int, now_us: int) -> None:
        """The caller has reserved reserve_bytes(INITIAL_WINDOW) from the pool."""
        self._pool = pool
        self._reserved = reserve_bytes(INITIAL_WINDOW)
        self._shrunk = False
        self.cap = cap
        self._grown_at = 0
        self._mark = 0
        self._mark_us = now_us
        self.window = INITIAL_WINDOW
        self.consumed = 0
        self.consumed_frames = 0
        self.credit = INITIAL_WINDOW
        self.frames = INITIAL_FRAMES

    def on_consumed(self, length: int, frames: int, now_us: int, rtt_us: int) -> None:
        """The application took `frames` frames of `length` bytes together.

        Grows the window where a round trip of `rtt_us` filled half of it.
        """
        self.consumed += length
        self.consumed_frames += frames
        elapsed = now_us - self._mark_us
        taken = self.consumed - self._mark
        if elapsed <= rtt_us:
            if 2 * taken > self.window:
                self._grow()
                self._mark, self._mark_us = self.consumed, now_us
        else:
            if 2 * taken * rtt_us > self.window * elapsed:
                self._grow()
            elif self.window > INITIAL_WINDOW and 8 * taken * rtt_us < self.window * elapsed and self._pool.is_short:
                self.window = max(self.window >> 1, INITIAL_WINDOW)
                self._shrunk = True
            self._mark, self._mark_us = self.consumed, now_us
        if self._shrunk:
            self._return_surplus()

    def _return_surplus(self) -> None:
        """The window has shrunk, and some of what had been announced before is used up."""
        most = max(self.credit - self.consumed, self.window)
        most_frames = max(self.frames - self.consumed_frames, frames_allowed(self.window))
        surplus = self._reserved - (2 * most + MIN_SLOT * most_frames)
        if surplus > 0:
            self._reserved -= surplus
            self._pool.give_back(surplus)
        self._shrunk = self._reserved > reserve_bytes(self.window)

    def on_blocked(self, end: int, delivered: int) -> bool:
        """The sender was out of credit at `end`, where the application had been given all below `delivered`.

        True if that grew the window: while the application keeps up, once each time that the sender used up what the
        last growth allowed. The round trip need not be known, and it is not where data queues on the way.
        """
        if end <= self._grown_at or 2 * (delivered - self.consumed) > self.window:
            return False
        self._grown_at = self.credit
        return self._grow()

    def _grow(self) -> bool:
        window = min(2 * self.window, self.cap)
        missing = reserve_bytes(window) - self._reserved
        if window <= self.window or (missing > 0 and not self._pool.reserve_growth(missing)):
            return False
        self._reserved += max(missing, 0)
        self.window = window
        return True

    def due(self) -> bool:
        """Whether an eighth of the window, or three quarters of its frames, was consumed and not yet announced.

        Sixteen small frames are the first window: an ACK for every other one made up a third of the work.
        """
        behind = self.consumed + self.window - self.credit
        frames = frames_allowed(self.window)
        return 8 * behind >= self.window or 4 * (self.consumed_frames + frames - self.frames) >= 3 * frames

    def announce(self) -> tuple[int, int]:
        """The credit to put into an ACK: (offset, frames). Never shrinks."""
        self.credit = max(self.credit, self.consumed + self.window)
        self.frames = max(self.frames, self.consumed_frames + frames_allowed(self.window))
        return self.credit, self.frames

    def close(self) -> None:
        """Give the reservation back. Once."""
        self._pool.give_back(self._reserved)
