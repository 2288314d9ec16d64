"""What one session sends from one worker: frames are given to stripes as long as both are there.

1. `pump`: the stripe used last among those with room, or another worker that has some (`_stripe_with_room`,
`_hand_out`); 2. then the next frame: a frame of another worker's flow, an answer, an ACK, what has to be sent again,
new data; 3. `_next_data` reads the application only now, when a stripe is there to take its bytes.
"""

from typing import Any

from workers.core import frame
from workers.core.retain import SentFrame
from workers.core.session import SessionShare
from workers.core.stream import Stream
from workers.io.context import Context, clock_us
from workers.io.endpoint import Endpoint
from workers.io.exchange import Exchange, RemoteStripes
from workers.io.stripe import Stripe
from workers.shm.arena import Side
from workers.shm.layout import EGRESS_BYTES

PUMP_FRAMES = 64
"""Frames sent in one turn of the event loop, so that reading gets its turn."""


class Egress:
    """`stripes` are this worker's, by index; they belong to the session."""

    def __init__(self, context: Context, share: SessionShare, stripes: dict[int, Stripe], exchange: Exchange) -> None:
        self._context = context
        self._share = share
        self._stripes = stripes
        self._exchange = exchange
        self._ready: list[Stripe] = []
        self._held: dict[Stripe, None] = {}
        self._guest_turn = False
        self._pumping = False
        self._armed = False
        self._ack_timer: Any = None
        self._ack_timer_active = False

    # Stripes

    def make_ready(self, stripe: Stripe) -> None:
        """`stripe` may have room."""
        if not stripe.in_ready and not stripe.closed:
            stripe.in_ready = True
            self._ready.append(stripe)

    def forget(self, stripe: Stripe) -> None:
        """`stripe` is lost."""
        if stripe.in_ready:
            self._ready.remove(stripe)
            stripe.in_ready = False
        self._held.pop(stripe, None)

    def next_in_line(self, most: int) -> list[Stripe]:
        """Up to `most` stripes that would be used next; those heard of last go first from now on."""
        self._ready.sort(key=lambda each: each.received_us)
        return self._ready[-most:]

    def _stripe_with_room(self) -> Stripe | None:
        """The own stripe used last among those with room: few stripes stay warm, and the cost does not grow with
        their number."""
        ready = self._ready
        while ready:
            stripe = ready[-1]
            if _is_stalled(stripe):
                self._held[stripe] = None
            elif stripe.has_room():
                return stripe
            if ready and ready[-1] is stripe:
                ready.pop()
                stripe.in_ready = False
        return self._held_with_room() if self._held else None

    def _held_with_room(self) -> Stripe | None:
        """Stalled stripes wait apart until that is over, unless there are no others."""
        needed = len(self._held) == len(self._stripes) and not self._exchange.up
        for stripe in list(self._held):
            if needed or not _is_stalled(stripe):
                self._held.pop(stripe, None)
                if stripe.has_room():
                    self.make_ready(stripe)
                    return stripe
        return None

    # Frames

    def arm(self) -> None:
        """Pump at the end of this turn."""
        if not self._armed:
            self._armed = True
            self._context.loop.run_callback(self._pump_later)

    def _pump_later(self) -> None:
        self._armed = False
        self.pump()

    def pump(self) -> None:
        """Send as long as there is something to send and a stripe with room."""
        if self._pumping:
            return
        self._pumping = True
        try:
            for _ in range(PUMP_FRAMES):
                stripe = self._stripe_with_room()
                if stripe is None:
                    if not self._hand_out():
                        break
                elif not self._send_on(stripe):
                    break
            else:
                self.arm()
            staging = self._context.staging
            if staging.stripe is not None:
                staging.stripe.flush()
        finally:
            self._pumping = False
        if self._share.next_due_us is not None and not self._ack_timer_active:
            self._arm_ack_timer()

    def _send_on(self, stripe: Stripe) -> bool:
        """Send one frame on `stripe`; False if there is none."""
        share = self._share
        if self._exchange.guests and (self._guest_turn or not share.has_work):
            self._guest_turn = False
            self._exchange.send_guest(stripe)
            return True
        self._guest_turn = True
        if share.answers:
            stripe.send(share.answers.popleft())
            return True
        assert stripe.path is not None
        stream = share.ack_to_send()
        if stream is not None:
            stripe.send(stream.ack_to_send())
            share.on_ack_sent(stream, stripe.path)
            return True
        kept = share.frame_to_resend()
        if kept is not None:
            stripe.send(self._frame_view(kept) if kept.slot >= 0 else share.frame_bytes(kept))
            share.on_sent(kept, stripe.path, clock_us())
            return True
        kept = self._next_data(stripe.frame_bytes)
        if kept is None:
            return share.has_work or bool(self._exchange.guests)
        stripe.send(self._frame_view(kept))
        share.on_sent(kept, stripe.path, clock_us())
        return True

    def _hand_out(self) -> bool:
        """Give one frame to another worker's stripes; False if there is none, or no worker that takes it."""
        if not self._stripes and self._exchange.guests:
            self._exchange.return_guests()
        remote = self._exchange.remote_with_room() if self._share.has_work else None
        return remote is not None and self._hand_to(remote)

    def _hand_to(self, remote: RemoteStripes) -> bool:
        share = self._share
        if share.answers:
            self._exchange.give_bytes(remote, share.answers.popleft(), 0, 0, 0)
            return True
        stream = share.ack_to_send()
        if stream is not None:
            if not self._exchange.give_bytes(remote, stream.ack_to_send(), stream.flow, 0, frame.ACK):
                share.ack_again(stream)
                return False
            share.on_ack_sent(stream, remote.handed)
            return True
        kept = share.frame_to_resend() or self._next_data(remote.frame_bytes)
        if kept is None:
            return share.has_work
        flow, offset, kind = kept.stream.flow, kept.offset, kept.kind
        if kept.slot < 0:
            if not self._exchange.give_bytes(remote, share.frame_bytes(kept), flow, offset, kind):
                share.send_again(kept)
                return False
        else:
            self._exchange.give_slot(remote, kept.slot, frame.HEADER_BYTES + kept.length, flow, offset, kind)
        share.on_sent(kept, remote.handed, clock_us())
        return True

    def _frame_view(self, kept: SentFrame) -> memoryview:
        return self._context.memory.arena.view(kept.slot, frame.HEADER_BYTES + kept.length)

    def _next_data(self, frame_bytes: int) -> SentFrame | None:
        """New bytes of the application whose turn it is, as a frame in a slot."""
        share, memory = self._share, self._context.memory
        stream = share.stream_to_send()
        if stream is None:
            return None
        endpoint: Endpoint = stream.endpoint
        size = stream.sendable(frame_bytes)
        if not size:
            share.on_blocked(stream, clock_us())
            endpoint.pause()
            return None
        slot = -1
        if share.kept_bytes < EGRESS_BYTES // (1 + self._context.sessions):
            slot = memory.arena.allocate(size + frame.HEADER_BYTES, Side.EGRESS)
        if slot < 0:
            memory.starved = True
            share.on_drained(stream)
            stream.readable = True
            endpoint.pause()
            return None
        view = memory.arena.view(slot)
        count = self._read(stream, view[frame.HEADER_BYTES : frame.HEADER_BYTES + size])
        if count <= 0:
            memory.arena.release(slot)
            return None
        used = frame.HEADER_BYTES + count
        if 4 * used <= len(view):
            slot, view = self._shrink(slot, view, used)
        kept = share.add_data(stream, count, slot, view)
        if count < size:
            share.on_drained(stream)
            endpoint.resume()
        else:
            endpoint.pause()
        return kept

    def _read(self, stream: Stream, view: memoryview) -> int:
        """Bytes that the application had; 0 or -1 if it had none, after telling the share why."""
        endpoint: Endpoint = stream.endpoint
        try:
            count = endpoint.read_into(view)
        except OSError:
            endpoint.fail()
            return -1
        if not count:
            self._share.on_fin(stream)
        elif count < 0:
            self._share.on_drained(stream)
            endpoint.resume()
        return count

    def _shrink(self, slot: int, view: memoryview, used: int) -> tuple[int, memoryview]:
        """Move a small read out of a large slot, which would be held until the peer has it."""
        arena = self._context.memory.arena
        smaller = arena.allocate(used, Side.EGRESS)
        if smaller < 0:
            return slot, view
        target = arena.view(smaller)
        target[frame.HEADER_BYTES : used] = view[frame.HEADER_BYTES : used]
        arena.release(slot)
        return smaller, target

    # Delayed ACKs

    def _arm_ack_timer(self) -> None:
        due_us = self._share.next_due_us
        if due_us is None:
            return
        if self._ack_timer is not None:
            self._ack_timer.close()
        self._ack_timer = self._context.loop.timer(max(due_us - clock_us(), 0) / 1e6)
        self._ack_timer_active = True
        self._ack_timer.start(self._on_acks_due)

    def _on_acks_due(self) -> None:
        self._ack_timer_active = False
        self._share.on_acks_due(clock_us())
        self.pump()

    def close(self) -> None:
        """Send nothing more."""
        if self._ack_timer is not None:
            self._ack_timer.close()
            self._ack_timer = None
        self._ack_timer_active = True


def _is_stalled(stripe: Stripe) -> bool:
    """By the kernel's timer or by our own."""
    return stripe.stalled or (stripe.path is not None and stripe.path.stalled)
