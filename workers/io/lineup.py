"""Which of a session's stripes takes the next frame, among those that this worker owns.

Frames go to the stripe used last among those with room: few stripes stay warm, and the cost does not grow with their
number. Stripes that take much longer than others come last, stalled ones wait apart. While small frames meet a bulk
transfer, one stripe is kept for them (`express`): nothing large is queued or lost in front of them there. Where packets
get lost it is more, and small frames go on each. Over a distance they take a stripe that is clear: the kernel sends at
once what it is given.
"""

from collections.abc import Container
from itertools import islice

from workers.io.stripe import Stripe

SLOW_US = 10_000
"""A stripe is slow if its round trip is so much longer than twice the shortest."""
FIRST_WINDOW_BITS = 10 * 1448 * 8
"""What TCP sends in its first round trip (RFC 6928): nothing else is known of the rate then."""
FULL_MAX = 8
"""While so many of the fastest are full, others would not help: data would lie in more of the kernel's buffers, out of
the processor's cache. With a thousand stripes that cost a fifth more CPU."""
EXPRESS_STRIPES = 4
"""From so many on, one can be spared while small frames and bulk are sent together."""
SPARED = (5, 16, 32)
"""From so many on, another can, another, and another: where 40 of BBR's flows fill a queue, two copies are both lost
once in a hundred times."""
LOSSY = 0.001
"""The share of segments sent again from which on a path loses packets. Where BBR fills a queue of 20 ms it is 0.01 to
0.05, and a request in a hundred waited 22-41 ms longer than a ping; sent on two stripes, 6-9 ms (10 stripes)."""
TOGETHER_US = 1_000_000
"""Small frames and bulk are sent together if both were, so lately."""
LOOK = 8
"""Stripes looked at for a small frame that finds no room anywhere, or none that is clear."""
FAR_US = 2_000
"""From such a round trip on it is worth a system call that a small frame does not wait in the kernel. BBR keeps 4
packets in flight for 200 ms of every 10 s (PROBE_RTT): three in a hundred answers came 20-45 ms late."""


class Lineup:
    """`stripes` are this worker's, by index; they belong to the session. `express` are those kept for small frames.

    `light_us`, `heavy_us`: when a small frame of an application was sent last, and one of a bulk transfer.
    """

    def __init__(self, stripes: dict[int, Stripe]) -> None:
        self._stripes = stripes
        self._ready: list[Stripe] = []
        self._held: dict[Stripe, None] = {}
        self._aside: list[Stripe] = []
        self._busy: dict[Stripe, None] = {}
        self._full: set[Stripe] = set()
        self.express: list[Stripe] = []
        self._is_lossy = False
        self.light_us = self.heavy_us = -TOGETHER_US
        self._least_us = 0
        self._quick_bps = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether there are no stripes here."""
        return not self._stripes

    def make_ready(self, stripe: Stripe) -> None:
        """`stripe` may have room."""
        if stripe.in_ready or stripe.closed or stripe in self.express:
            return
        stripe.in_ready = True
        self._full.discard(stripe)
        self._busy.pop(stripe, None)
        if stripe.slow:
            self._ready.insert(0, stripe)
        else:
            self._ready.append(stripe)

    def forget(self, stripe: Stripe) -> None:
        """`stripe` is lost, or on its way out."""
        if stripe.in_ready:
            self._ready.remove(stripe)
            stripe.in_ready = False
        self._held.pop(stripe, None)
        self._full.discard(stripe)
        self._busy.pop(stripe, None)
        if stripe in self._aside:
            self._aside.remove(stripe)
        if stripe in self.express:
            self.express.remove(stripe)
        if len(self._stripes) < EXPRESS_STRIPES:
            self._release()

    def next_in_line(self, most: int) -> list[Stripe]:
        """Up to `most` stripes that would be used next; those heard of last go first from now on."""
        self._ready.sort(key=lambda each: (not each.slow, each.received_us))
        return self._ready[-most:]

    def on_time(self, elsewhere_us: int, sent_bps: float) -> None:
        """Every 100 ms, and when a stripe comes: tell slow stripes from the others.

        elsewhere_us: the shortest round trip of other workers' stripes, 0 if unknown. sent_bps: what was sent lately.
        """
        known = [each for each in self._stripes.values() if each.info is not None and not is_stalled(each)]
        trips = [stripe.trip_us for stripe in known] + [elsewhere_us] * bool(elsewhere_us)
        least_us = self._least_us = min(trips, default=0)
        slow = {stripe for stripe in known if stripe.trip_us > 2 * least_us + SLOW_US}
        quick_bps = sum(stripe.rate_bps for stripe in known if stripe not in slow)
        self._is_lossy = any(stripe.info.loss > LOSSY for stripe in known if stripe.info is not None)
        self._quick_bps = max(quick_bps, sent_bps, FIRST_WINDOW_BITS * 1e6 / max(least_us, 1))
        changed = False
        for stripe in self._stripes.values():
            changed |= stripe.slow != (stripe in slow)
            stripe.slow = stripe in slow
        if changed:
            self._ready.sort(key=lambda each: not each.slow)
        self._full = {stripe for stripe in self._full if stripe.is_fast and not is_stalled(stripe)}
        while self._aside:
            self.make_ready(self._aside.pop())

    def meanwhile_bytes(self, rtt_us: int) -> float:
        """What the others bring while a carrier of that round trip has a frame on its way; 0 for one as quick.

        A stream that has no more credit than that waits for them: the frame would hold up what comes after it (BLEST,
        Ferlin and others, 2016).
        """
        least_us = self._least_us
        return self._quick_bps * (rtt_us - least_us) / 8e6 if rtt_us > 2 * least_us + SLOW_US else 0.0

    @property
    def is_quick_busy(self) -> bool:
        """Whether a stripe that is not slow will have room again."""
        return any(not each.slow and not is_stalled(each) for each in self._busy)

    def put_aside(self, stripe: Stripe) -> bool:
        """Do without `stripe` until `on_time`; False if no other would take its place."""
        if len(self._ready) <= 1 and not self._busy:
            return False
        self.forget(stripe)
        self._aside.append(stripe)
        return True

    # The next stripe

    def with_room(self, needed: bool) -> Stripe | None:
        """The stripe for any frame; stalled ones only if `needed`, as long as there are no others here."""
        ready = self._ready
        while ready and len(self._full) < FULL_MAX:
            stripe = ready[-1]
            if is_stalled(stripe):
                self._held[stripe] = None
            elif stripe.has_room():
                return stripe
            elif not stripe.closed:
                self._busy[stripe] = None
                if stripe.is_fast:
                    self._full.add(stripe)
            if ready and ready[-1] is stripe:
                ready.pop()
                stripe.in_ready = False
        if self.express and len(self._held) + len(self.express) >= len(self._stripes):
            self._release()
            return self.with_room(needed)
        return self._held_with_room(needed) if self._held else None

    def at_hand(self) -> Stripe | None:
        """The stripe that a small frame should take if it is known to have room. The kernel is asked only where the
        other end is far, and there is a choice."""
        if self.express or not self._ready:
            return None
        stripe = self._ready[-1]
        if not stripe.has_budget or stripe.slow or is_stalled(stripe):
            return None
        has_choice = len(self._ready) > 1 and stripe.rtt_us >= FAR_US
        return None if has_choice and not stripe.is_clear() else stripe

    @property
    def held_all(self) -> bool:
        """Whether all stripes here are stalled."""
        return len(self._held) == len(self._stripes)

    def _held_with_room(self, needed: bool) -> Stripe | None:
        """Stalled stripes wait apart until that is over."""
        needed = needed and self.held_all
        for stripe in list(self._held):
            if needed or not is_stalled(stripe):
                self._held.pop(stripe, None)
                if stripe.has_room():
                    self.make_ready(stripe)
                    return stripe
        return None

    def quickest(self) -> Stripe | None:
        """Of a few that would be next, the one with room whose round trip is shortest."""
        best: Stripe | None = None
        for stripe in islice(reversed(self._ready), LOOK):
            if is_stalled(stripe) or (best is not None and stripe.trip_us >= best.trip_us):
                continue
            if stripe.has_room():
                best = stripe
        return best

    # Small frames

    def for_small(self) -> Stripe | None:
        """The stripe for a small frame: one kept for them, or a clear one of those that are next soon; None for any."""
        express = self.express
        if not express:
            return self._clear(self._ready[: -LOOK - 1 : -1])
        if is_stalled(express[0]):
            self._release()
            return None
        clear = self._clear(express)
        if clear is not None and clear is not express[0]:
            express.remove(clear)
            express.insert(0, clear)
        return express[0] if express[0].takes_small else None

    def _clear(self, stripes: list[Stripe]) -> Stripe | None:
        """The first of few that is clear; None where the other end is near, or there is no choice."""
        if len(stripes) < 2 or stripes[0].rtt_us < FAR_US:
            return None
        well = (each for each in stripes[:LOOK] if not each.slow and not is_stalled(each))
        return next((each for each in well if each.is_clear()), None)

    def for_copy(self, sent_on: Container[Stripe]) -> Stripe | None:
        """A stripe for a copy of a small frame, where packets get lost: one kept for such that did not have it yet."""
        if not self._is_lossy:
            return None
        kept = (each for each in self.express if each not in sent_on)
        return next((each for each in kept if each.takes_small and not is_stalled(each)), None)

    def without_room(self, slow: bool) -> Stripe | None:
        """A stripe for a small frame although none has room: the one that holds least, of a few. `slow`: of the slow
        ones, too."""
        well = (each for each in self._stripes.values() if each.takes_small and not is_stalled(each))
        some = islice((each for each in well if slow or not each.slow), LOOK)
        return min(some, key=lambda each: each.trip_us / 2 + each.unsent_us(), default=None)

    def on_light(self, now_us: int) -> None:
        """A small frame of an application was sent."""
        self.light_us = now_us
        if now_us - self.heavy_us > TOGETHER_US:
            self._release()
            return
        count = len(self._stripes)
        spared = sum(count >= least for least in SPARED) if self._is_lossy else 0
        wanted = (count >= EXPRESS_STRIPES) + spared
        if len(self.express) > wanted:
            self.make_ready(self.express.pop())
        elif len(self.express) < wanted:
            free = [each for each in self._stripes.values() if not is_stalled(each) and each not in self.express]
            if len(free) + len(self.express) >= EXPRESS_STRIPES:
                express = min(free, key=lambda each: (each.slow, each.info.unacked_bytes if each.info else 0))
                self.forget(express)
                self.express.append(express)

    def on_heavy(self, now_us: int) -> None:
        """A frame of a bulk transfer was sent."""
        self.heavy_us = now_us
        if self.express and now_us - self.light_us > TOGETHER_US:
            self._release()

    def _release(self) -> None:
        express, self.express = self.express, []
        for stripe in express:
            self.make_ready(stripe)


def is_stalled(stripe: Stripe) -> bool:
    """By the kernel's timer or by our own."""
    return stripe.stalled or (stripe.path is not None and stripe.path.stalled)
