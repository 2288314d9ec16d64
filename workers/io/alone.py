"""A small frame where nothing else is to be sent: a request, an answer or a keystroke, and those of other workers.

What `Egress.pump` would do in twice the time. The frame leaves before it is entered in the books, from a slot that was
set aside for it.
"""

from typing import Protocol

from workers.core import frame
from workers.core.retain import SentFrame
from workers.core.session import SessionShare
from workers.core.stream import Stream
from workers.io.context import Context, clock_us
from workers.io.endpoint import Endpoint
from workers.io.exchange import Exchange, Guest
from workers.io.hedging import Hedging
from workers.io.lineup import Lineup
from workers.io.stripe import Stripe
from workers.shm.layout import SLOT_BYTES

SMALL_BYTES = SLOT_BYTES[0] - frame.HEADER_BYTES
"""What is read of an application at first: a whole frame's slot would be too much for a request."""
PIGGYBACK_FRAMES = 8
"""An ACK of so many frames leaves along with data, before it is due: alone it costs a send and a wake-up."""


class Sender(Protocol):
    """The session's egress, as far as this needs it. `pumping`: it is sending just now."""

    lineup: Lineup
    hedging: Hedging
    pumping: bool

    def pump(self) -> None:
        """Send as long as there is something to send and a stripe with room."""

    def allocate(self, size: int) -> int:
        """A slot for a frame with `size` bytes of payload; -1 if there is none."""

    def read(self, stream: Stream, view: memoryview) -> int:
        """Bytes that the application had; 0 or -1 if it had none."""


class Alone:
    """`_spare`: the slot for the next such frame, -1 if there is none."""

    def __init__(self, context: Context, share: SessionShare, exchange: Exchange, sender: Sender) -> None:
        self._context = context
        self._share = share
        self._exchange = exchange
        self._sender = sender
        self._lineup = sender.lineup
        self._spare = -1
        self._spare_view = memoryview(b"")

    def send(self, endpoint: Endpoint) -> bool:
        """Send the few bytes that an application has just written; False if anything else is to be sent, or more may
        come."""
        share, exchange, sender, stream = self._share, self._exchange, self._sender, endpoint.stream
        if endpoint.expected_bytes > SMALL_BYTES or sender.pumping or exchange.guests or exchange.small_guests:
            return False
        stripe = self._lineup.at_hand()
        remote = exchange.remote_with_room() if self._lineup.is_empty else None
        if (stripe is None and remote is None) or not share.may_send_alone(stream):
            return False
        size = stream.sendable(SMALL_BYTES) if stream.unacked_frames < PIGGYBACK_FRAMES else 0
        if not size or (self._spare < 0 and not self._take_spare()):
            return False
        view = self._spare_view
        count = sender.read(stream, view[frame.HEADER_BYTES : frame.HEADER_BYTES + size])
        if count <= 0:
            sender.pump()
            return True
        slot, self._spare = self._spare, -1
        share.write_header(stream, count, view)
        if stripe is not None:
            stripe.send_now(view[: frame.HEADER_BYTES + count])
            self._context.give_way()
            self._on_sent(share.add_alone(stream, count, slot), stripe)
        elif remote is not None:
            kept = share.add_alone(stream, count, slot)
            length = frame.HEADER_BYTES + count
            exchange.give_slot(remote, slot, length, stream.flow, kept.offset, kept.kind, now=True)
            share.on_sent(kept, remote.handed, clock_us())
        endpoint.expected_bytes = 4 * count
        sender.hedging.arm()
        self._take_spare()
        return True

    def _on_sent(self, kept: SentFrame, stripe: Stripe) -> None:
        share, now_us = self._share, clock_us()
        assert stripe.path is not None
        share.on_sent(kept, stripe.path, now_us)
        if share.turns.pass_alone(kept.stream, kept.length, now_us):
            self._lineup.on_light(now_us)
        else:
            self._lineup.on_heavy(now_us)

    def pass_guest(self, guest: Guest) -> bool:
        """Send a small frame of another worker's at once; False if anything else is to be sent."""
        if self._sender.pumping or self._exchange.has_guests or self._share.has_work:
            return False
        stripe = self._lineup.at_hand()
        if stripe is None:
            return False
        self._exchange.send_guest(guest, stripe, now=True)
        return True

    def _take_spare(self) -> bool:
        self._spare = self._sender.allocate(SMALL_BYTES)
        if self._spare >= 0:
            self._spare_view = self._context.memory.arena.view(self._spare)
        return self._spare >= 0

    def give_back(self) -> None:
        """Part with the slot that was set aside."""
        if self._spare >= 0:
            self._context.memory.arena.release(self._spare)
            self._spare = -1
