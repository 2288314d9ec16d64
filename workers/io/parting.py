"""Parting with stripes that work: they are replaced, or their worker goes, and nothing on the way is to be lost.

1. The end that parts sends nothing more on the stripe (`Stripe.leave`: MOVE, then the end of its direction) and goes on
   receiving. 2. The other end does the same when the MOVE comes. 3. Each reads the other's end, and closes the socket.
4. What was sent last is acknowledged elsewhere in a round trip: until then the stripe's path is not given up.
"""

from workers.core import frame
from workers.core.session import SessionShare
from workers.io import mesh
from workers.io.context import clock_us
from workers.io.exchange import Exchange
from workers.io.lineup import is_stalled
from workers.io.stripe import Stripe

END_US = 5_000_000
"""The other end has to end its direction within this."""
REPLACED_US = 200_000
"""A stripe was replaced by a client that has not said MOVE on it: unless that comes soon, it is dead there."""
PATH_US = 250_000
"""How long the path of a stripe that ended in order stays, besides two round trips."""


class Parting:
    """The stripes of one session in one worker that are on their way out. They are not in the session's `stripes`."""

    def __init__(self, share: SessionShare, exchange: Exchange) -> None:
        self._share = share
        self._exchange = exchange
        self._due_us: dict[Stripe, int] = {}

    def __len__(self) -> int:
        return sum(not stripe.closed for stripe in self._due_us)

    def part(self, stripe: Stripe) -> None:
        """Leave a stripe that works, and has just been taken out of the session's; one that stalls is closed."""
        stripe.sample(frame.MAX_PAYLOAD_BYTES)
        is_server = self._share.end == frame.SERVER
        self._due_us[stripe] = clock_us() + END_US
        if stripe.closed or is_stalled(stripe):
            stripe.fail("replaced by a new connection")
        elif is_server and not stripe.moved:
            self._due_us[stripe] = clock_us() + REPLACED_US
        else:
            stripe.leave()

    def leave(self, stripe: Stripe) -> None:
        """Leave a stripe of ours, or one on which MOVE came."""
        self._due_us[stripe] = clock_us() + END_US
        stripe.leave()

    def on_lost(self, stripe: Stripe) -> bool:
        """A stripe is closed; False if it was not on its way out. One that ended in order keeps its path a little."""
        if stripe not in self._due_us and not stripe.in_order:
            return False
        self._due_us[stripe] = clock_us() + PATH_US + 2 * self._share.rtt_us if stripe.in_order else 0
        if not stripe.in_order:
            self._lose(stripe)
        return True

    def _lose(self, stripe: Stripe) -> None:
        del self._due_us[stripe]
        assert stripe.path is not None
        self._share.lose_path(stripe.path)
        self._exchange.tell_all(mesh.LOST, carrier=stripe.index, value=stripe.path.generation)

    def on_time(self, now_us: int) -> None:
        """Every 100 ms."""
        for stripe, due_us in list(self._due_us.items()):
            if now_us < due_us:
                continue
            if stripe.closed:
                self._lose(stripe)
            else:
                stripe.fail("does not end")

    def close(self) -> None:
        """Close all at once."""
        for stripe in list(self._due_us):
            stripe.close()
        self._due_us.clear()
