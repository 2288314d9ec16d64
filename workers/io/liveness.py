"""What keeps a session's stripes alive, in one worker: meters, stalls, silence, and how long an outage lasts.

A stripe *stalls* while the kernel's retransmission timer runs out without anything being acknowledged. The client
sends nothing on some stripes: those that carried something lately and fall silent are asked (PING), so that they stall
as well if they are broken. A stripe that stalls for STALE_US is *stale*: the client replaces it.
"""

import logging
from collections.abc import Callable

from workers.core import frame
from workers.core.sending import MIN_RTT_US
from workers.core.session import SessionShare
from workers.io import mesh
from workers.io.context import Context, clock_us
from workers.io.egress import Egress
from workers.io.exchange import Exchange
from workers.io.stripe import Stripe
from workers.settings import StripeTunnel

KEEPALIVE_US = 10_000_000
"""A stripe that heard nothing for so long is asked (PING)."""
DEAD_US = 25_000_000
"""A stripe that heard nothing for so long is dead."""
STALE_US = 500_000
"""On top of the kernel's first timeout (200 ms and a round trip): what is only lost is mended by then."""
UNANSWERED_US = 5_000_000
"""A PING that takes longer, although the kernel's are acknowledged: whoever acknowledges is not the other end."""
QUIET_US = 300_000
LATELY_US = 2_000_000
"""A stripe that heard something LATELY_US ago and nothing for QUIET_US, or two round trips, is asked."""
PROBED = 32
"""Stripes asked at once."""
WARN_US = 10_000_000

log = logging.getLogger("forwarder.session")


class Liveness:
    """`stripes` are this worker's, by index; they belong to the session.

    `rtt_us`: the longest round trip of a stripe in use. `outage_since_us`: since when no worker has a stripe, if so.
    `on_stale` is told the index of a stripe that is stale, or is not any more.
    """

    def __init__(
        self,
        context: Context,
        tunnel: StripeTunnel,
        share: SessionShare,
        stripes: dict[int, Stripe],
        exchange: Exchange,
        egress: Egress,
    ) -> None:
        self.rtt_us = 0
        self.resumes = 0
        self.outage_since_us: int | None = clock_us()
        self.on_stale: Callable[[int, bool], None] | None = None
        self._context = context
        self.tunnel = tunnel
        self._share = share
        self._stripes = stripes
        self._exchange = exchange
        self._egress = egress
        self._stalled_us: dict[Stripe, int] = {}
        self._stale: set[Stripe] = set()
        self._answered_us: dict[Stripe, int] = {}
        self._refused = self._warned_us = 0

    # The session as a whole

    @property
    def total_up(self) -> int:
        """Stripes of all workers of this end."""
        return len(self._stripes) + self._exchange.up

    @property
    def usable(self) -> int:
        """Stripes of this worker that do not stall."""
        return len(self._stripes) - len(self._stalled_us)

    def on_carriers_changed(self) -> None:
        """Stripes of any worker have come, gone, stalled or recovered."""
        self._share.rtt_us = max(MIN_RTT_US, self.rtt_us, self._exchange.rtt_us)
        usable = self._exchange.usable
        if usable and not self._share.usable_elsewhere:
            self._share.usable_elsewhere = usable
            self._give_up_stalled(clock_us())
        self._share.usable_elsewhere = usable
        if self.total_up:
            if self.outage_since_us is not None:
                self.outage_since_us = None
                if self._share.streams:
                    self.resumes += 1
        elif self.outage_since_us is None:
            self.outage_since_us = clock_us()

    def expired(self, now_us: int) -> bool:
        """Whether no stripe has been up anywhere for longer than the resume timeout."""
        since = self.outage_since_us
        return since is not None and now_us - since > self.tunnel.resume_timeout_s * 1e6

    # Stripes come and go

    def on_added(self, stripe: Stripe) -> None:
        """A stripe is up: what those that stall hold is better off there."""
        stripe.sample(self.tunnel.frame_max_bytes)
        if stripe.info is not None:
            self.rtt_us = max(self.rtt_us, stripe.info.rtt_us)
        self._give_up_stalled(clock_us())

    def forget(self, stripe: Stripe) -> None:
        """A stripe is lost."""
        self._stalled_us.pop(stripe, None)
        self._answered_us.pop(stripe, None)
        self._stale.discard(stripe)

    def on_pong(self, stripe: Stripe, now_us: int) -> None:
        """A PING was answered."""
        stripe.pinged_us = 0
        self._answered_us[stripe] = now_us

    # Time

    def on_time(self, now_us: int) -> bool:
        """Every 100 ms: meters, stalls, silence. Whether the other workers should be told of a change."""
        rtt_us, usable = 0, self.usable
        quiet_us = max(QUIET_US, 2 * self.rtt_us)
        asks = self._share.end == frame.CLIENT and bool(
            self._share.streams or now_us - self._exchange.last_guest_us < LATELY_US
        )
        quiet: list[Stripe] = []
        stalled: list[Stripe] = []
        for stripe in list(self._stripes.values()):
            in_flight = stripe.info is not None and stripe.info.unacked_bytes
            if stripe.used or in_flight or stripe.pinged_us or stripe in self._stalled_us:
                stripe.used = False
                stripe.sample(self.tunnel.frame_max_bytes)
                if stripe.info is not None:
                    rtt_us = max(rtt_us, stripe.info.rtt_us)
                if self._check_stall(stripe, now_us):
                    stalled.append(stripe)
            silent_us = now_us - stripe.received_us
            if silent_us > KEEPALIVE_US:
                self._check_alive(stripe, silent_us, now_us)
            elif asks and quiet_us < silent_us < quiet_us + LATELY_US and not stripe.pinged_us:
                quiet.append(stripe)
        if stalled:
            self._on_stalls(stalled, now_us)
        self._ask(quiet, now_us)
        if self._share.refused_streams > self._refused:
            self._warn_of_refused(now_us)
        if rtt_us and not 3 * self.rtt_us < 4 * rtt_us < 5 * self.rtt_us:
            self.rtt_us = rtt_us
            return True
        return usable != self.usable

    def _check_alive(self, stripe: Stripe, silent_us: int, now_us: int) -> None:
        if silent_us > DEAD_US:
            stripe.fail("silent")
        elif not stripe.pinged_us:
            ping(stripe, now_us)

    def _ask(self, quiet: list[Stripe], now_us: int) -> None:
        """One PING each time that a stripe falls silent: its answer is no reason for another."""
        asked = 0
        for stripe in quiet:
            if stripe.received_us > self._answered_us.get(stripe, 0) and asked < PROBED:
                ping(stripe, now_us)
                asked += 1

    def _check_stall(self, stripe: Stripe, now_us: int) -> bool:
        """Whether it has begun to stall."""
        if stripe.closed:
            return False
        is_late = stripe.pinged_us and now_us - stripe.pinged_us > UNANSWERED_US
        if not stripe.stalled and not is_late:
            if self._stalled_us.pop(stripe, None) is not None and stripe in self._stale:
                self._set_stale(stripe, False)
            return False
        since_us = self._stalled_us.get(stripe)
        if since_us is None:
            self._stalled_us[stripe] = now_us
            return True
        if now_us - since_us > STALE_US and stripe not in self._stale:
            self._set_stale(stripe, True)
        return False

    def _set_stale(self, stripe: Stripe, is_stale: bool) -> None:
        if is_stale:
            self._stale.add(stripe)
        else:
            self._stale.discard(stripe)
        log.debug("stripe tunnel=%s index=%d stale=%s", self.tunnel.name, stripe.index, is_stale)
        if self.on_stale is not None:
            self.on_stale(stripe.index, is_stale)

    def _on_stalls(self, stalled: list[Stripe], now_us: int) -> None:
        """Their latest ACKs leave elsewhere. What stalls some may stall others: those next in line are asked."""
        paths = [stripe.path for stripe in stalled if stripe.path is not None]
        self._share.on_held_up(paths)
        for path in paths:
            self._exchange.tell_all(mesh.STALLED, carrier=path.index, value=path.generation)
        for other in self._egress.lineup.next_in_line(PROBED):
            if not other.pinged_us:
                ping(other, now_us)

    def _give_up_stalled(self, now_us: int) -> None:
        if self._stalled_us:
            self._share.give_up([each.path for each in self._stalled_us if each.path is not None], now_us)

    def _warn_of_refused(self, now_us: int) -> None:
        if now_us - self._warned_us > WARN_US:
            count = self._share.refused_streams - self._refused
            log.warning("there is no room for more streams tunnel=%s refused=%d", self.tunnel.name, count)
            self._refused, self._warned_us = self._share.refused_streams, now_us


def ping(stripe: Stripe, now_us: int) -> None:
    """Ask for an answer. Precondition: none is awaited (`pinged_us`)."""
    stripe.pinged_us = now_us
    stripe.send(frame.pack(frame.PING, 0, 0, 0, now_us))
    stripe.flush()
