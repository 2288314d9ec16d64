"""Hedging: frames that are sent a second time before it is known that they are lost.

1. `copy_later`: a small frame beside a bulk transfer, where packets get lost, a moment later on a second stripe, and so
   on as far as stripes are kept for that (`Lineup.for_copy`);
2. `arm`: what waits for a slow stripe while others idle, on one of those.
"""

from collections import deque
from typing import Protocol

from workers.core.retain import SentFrame
from workers.core.session import SessionShare
from workers.io.context import Context, clock_us
from workers.io.exchange import Exchange, RemoteStripes
from workers.io.lineup import Lineup
from workers.io.stripe import Stripe

HEDGE_S = 0.01
HEDGE_FRAMES = 64
"""Frames sent again in one turn."""
COPY_S = 0.003
"""How much later the copy follows: a queue that is too full for one packet is so for the next."""
COPY_US = int(COPY_S * 1e6)
COPIES_MAX = 64
"""Frames that wait to be copied; they are small and few, or none is."""


class Sender(Protocol):
    """The session's egress, as far as hedging needs it."""

    lineup: Lineup

    def send_again(self, kept: SentFrame, stripe: Stripe) -> None:
        """Send a kept frame on another stripe."""

    def hand_kept(self, kept: SentFrame, remote: RemoteStripes) -> bool:
        """Give a kept frame to another worker's stripes."""

    def flush(self) -> None:
        """Give what was sealed to the kernel."""


class Hedging:
    """Looks every HEDGE_S while anything waits, and sends each frame again at most once."""

    def __init__(self, context: Context, share: SessionShare, exchange: Exchange, sender: Sender) -> None:
        self._share = share
        self._exchange = exchange
        self._sender = sender
        self._timer = context.loop.timer(HEDGE_S, HEDGE_S)
        self._armed = False
        self._copies: deque[tuple[int, list[Stripe], SentFrame]] = deque()
        self._copy_timer = context.loop.timer(COPY_S, COPY_S)

    def copy_later(self, kept: SentFrame, stripe: Stripe, now_us: int) -> None:
        """Send `kept`, which was sent on `stripe` just now, on the stripes for copies as well, until it is received."""
        if len(self._copies) < COPIES_MAX:
            self._copies.append((now_us + COPY_US, [stripe], kept))
            if len(self._copies) == 1:
                self._copy_timer.again(self._copy)

    def _copy(self) -> None:
        copies, now_us = self._copies, clock_us()
        while copies and copies[0][0] <= now_us:
            _, sent_on, kept = copies.popleft()
            stripe = self._sender.lineup.for_copy(sent_on)
            if stripe is not None and not kept.done and kept.sends == len(sent_on) and not kept.queued:
                self._sender.send_again(kept, stripe)
                copies.append((now_us + COPY_US, [*sent_on, stripe], kept))
        if not copies:
            self._copy_timer.stop()
        self._sender.flush()

    def arm(self) -> None:
        """Something was sent."""
        if not self._armed and len(self._share.waiting):
            self._armed = True
            self._timer.again(self._hedge)

    def _hedge(self) -> None:
        share = self._share
        if not len(share.waiting):
            self._armed = False
            self._timer.stop()
            return
        for _ in range(HEDGE_FRAMES):
            if share.has_work or self._exchange.has_guests or not self._hedge_one():
                break
        self._sender.flush()

    def _hedge_one(self) -> bool:
        waiting, now_us = self._share.waiting, clock_us()
        stripe = self._sender.lineup.quickest()
        if stripe is not None and stripe.path is not None:
            kept = waiting.frame_for(stripe.path, now_us)
            if kept is not None:
                self._sender.send_again(kept, stripe)
                return True
        remote = self._exchange.remote_with_room()
        path = remote.quickest if remote is not None else None
        kept = waiting.frame_for(path, now_us) if path is not None else None
        return kept is not None and remote is not None and self._sender.hand_kept(kept, remote)

    def close(self) -> None:
        """Send nothing more."""
        self._armed = True
        self._timer.close()
        self._copies.clear()
        self._copy_timer.close()
