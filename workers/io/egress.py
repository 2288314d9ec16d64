"""What one session sends from one worker: frames are given to stripes as long as both are there.

1. `pump`: a stripe with room (`workers.io.lineup`), or another worker that has some (`_hand_out`); 2. then the next
frame: a frame of another worker's flow, an answer, an ACK, what has to be sent again, new data; but what is small comes
first where a stripe is kept for it, or clear; 3. `_next_data` reads the application only now, when a stripe is there to
take its bytes; 4. what waits for a slow stripe while others idle is sent again (`workers.io.hedging`). What comes alone
has a shorter way (`workers.io.alone`).
"""

from typing import Any

from workers.core import frame
from workers.core.retain import SentFrame
from workers.core.session import SessionShare
from workers.core.stream import Stream
from workers.io.alone import PIGGYBACK_FRAMES, SMALL_BYTES, Alone
from workers.io.context import Context, clock_us
from workers.io.endpoint import Endpoint
from workers.io.exchange import Exchange, RemoteStripes
from workers.io.hedging import Hedging
from workers.io.lineup import Lineup
from workers.io.stripe import Stripe
from workers.shm.arena import Side
from workers.shm.layout import EGRESS_BYTES, SLOT_BYTES

LARGE_US = 250_000
"""Another worker's frame is too large for a stripe that would take so long to send it."""
URGENT_BYTES = 16 << 10
"""The most that is sent where no stripe has room."""
PUMP_FRAMES, PUMP_BYTES = 64, 2 << 20
"""Frames, and bytes of ours, sent in one turn of the event loop, so that reading gets its turn."""


class Egress:
    """`stripes` are this worker's, by index; they belong to the session."""

    def __init__(self, context: Context, share: SessionShare, stripes: dict[int, Stripe], exchange: Exchange) -> None:
        self._context = context
        self._share = share
        self._stripes = stripes
        self._exchange = exchange
        self.lineup = Lineup(stripes)
        self.pumping = False
        self._armed = False
        self._ack_timer: Any = None
        self._ack_timer_active = False
        self.hedging = Hedging(context, share, exchange, self)
        self._next_turn = context.loop.timer(0)
        self.alone = Alone(context, share, exchange, self)
        exchange.pass_guest = self.alone.pass_guest

    # Frames

    def arm(self) -> None:
        """Pump at the end of this turn."""
        if not self._armed:
            self._armed = True
            self._context.loop.run_callback(self._pump_later)

    def _pump_later(self) -> None:
        self._armed = False
        self.pump()

    def pump_if_needed(self) -> None:
        """`pump`, but for a turn in which nothing was received that asks for an answer."""
        share, exchange, is_staged = self._share, self._exchange, self._context.staging.stripe is not None
        if is_staged or share.has_work or exchange.guests or exchange.small_guests or not self._ack_timer_active:
            self.pump()

    def pump(self) -> None:
        """Send as long as there is something to send and a stripe with room."""
        if self.pumping:
            return
        self.pumping = True
        share, exchange = self._share, self._exchange
        most = share.bytes_out + PUMP_BYTES
        try:
            for _ in range(PUMP_FRAMES):
                if not share.has_work and not exchange.has_guests:
                    break
                if share.bytes_out > most:
                    self._go_on()
                    break
                if not self._send_next():
                    break
            else:
                self._go_on()
            self.flush()
        finally:
            self.pumping = False
        if not self._ack_timer_active and share.next_due_us is not None:
            self._arm_ack_timer()
        self.hedging.arm()

    def _send_next(self) -> bool:
        """Send one frame where it is best off; False if there is none, or nowhere to send it."""
        is_urgent = self._share.has_urgent
        small = self.lineup.for_small() if is_urgent or self._exchange.small_guests else None
        if small is not None and not is_urgent:
            self._exchange.send_guest(self._exchange.next_guest(), small)
            return True
        if small is None:
            stripe = self._stripe_with_room()
            if stripe is None and is_urgent:
                small = self.lineup.without_room(slow=False)
            if small is None and (stripe is None or stripe.slow) and self._hand_out():
                return True
            if stripe is not None:
                return self._send_on(stripe)
        return self._send_small(small or self.lineup.without_room(slow=True)) if is_urgent else False

    def _send_small(self, stripe: Stripe | None) -> bool:
        """Send a small frame, room or not."""
        if stripe is None:
            return False
        if not self._send_control(stripe):
            self._send_data(stripe, URGENT_BYTES)
        return True

    def _go_on(self) -> None:
        """Pump again after what else there is to do. A callback would not wait for that: they run for 5 ms on end."""
        self._next_turn.start(self.pump)

    def flush(self) -> None:
        """Give what was sealed to the kernel."""
        staging = self._context.staging
        if staging.stripe is not None:
            staging.stripe.flush()

    def _stripe_with_room(self) -> Stripe | None:
        stripe = self.lineup.with_room(needed=not self._share.usable_elsewhere)
        if stripe is not None and stripe.slow and self._is_too_far(stripe.trip_us):
            return None
        return stripe

    def _is_too_far(self, rtt_us: int) -> bool:
        """Whether the next frame, of ours, should rather wait for a carrier of a shorter round trip than this.

        There has to be one, from which an event will come.
        """
        stream = self._share.turns.next()
        if stream is None or stream.credit - stream.sent.next_offset >= self.lineup.meanwhile_bytes(rtt_us):
            return False
        return self.lineup.is_quick_busy or self._exchange.is_quicker_busy(rtt_us)

    def _send_on(self, stripe: Stripe) -> bool:
        """Send one frame on `stripe`; False if there is none."""
        share, exchange = self._share, self._exchange
        assert stripe.path is not None
        if exchange.has_guests and (not share.has_work or exchange.is_guests_turn(share.virtual)):
            is_large = not exchange.small_guests and stripe.takes_us(exchange.guests[0].length) > LARGE_US
            if is_large and self.lineup.put_aside(stripe):
                return True  # its size is for faster stripes
            if not exchange.small_guests:
                self.lineup.on_heavy(clock_us())
            exchange.send_guest(exchange.next_guest(), stripe)
            return True
        if self._send_control(stripe):
            return True
        kept = share.frame_to_resend()
        if kept is not None:
            self.send_again(kept, stripe)
            return True
        return self._send_data(stripe, stripe.frame_bytes) or share.has_work or exchange.has_guests

    def _send_control(self, stripe: Stripe) -> bool:
        share = self._share
        if share.answers:
            stripe.send(share.answers.popleft())
            return True
        stream = share.ack_to_send()
        if stream is None:
            return False
        self._send_ack(stream, stripe)
        return True

    def _send_ack(self, stream: Stream, stripe: Stripe) -> None:
        assert stripe.path is not None
        stripe.send(stream.ack_to_send())
        self._share.on_ack_sent(stream, stripe.path)

    def send_again(self, kept: SentFrame, stripe: Stripe) -> None:
        """Send a kept frame on another stripe."""
        assert stripe.path is not None
        stripe.send(self._frame_view(kept) if kept.slot >= 0 else self._share.frame_bytes(kept))
        self._share.on_sent(kept, stripe.path, clock_us())

    def _send_data(self, stripe: Stripe, frame_bytes: int) -> bool:
        """Send new data of whose turn it is; False if it had none."""
        share = self._share
        is_light = bool(share.turns.light)
        kept = self._next_data(frame_bytes)
        if kept is None:
            return False
        if kept.stream.unacked_frames >= PIGGYBACK_FRAMES:
            self._send_ack(kept.stream, stripe)
        stripe.send(self._frame_view(kept))
        if not share.has_work:
            stripe.flush()  # it is on its way before it is entered in the books
        assert stripe.path is not None
        now_us = clock_us()
        share.on_sent(kept, stripe.path, now_us)
        if not is_light:
            self.lineup.on_heavy(now_us)
            return True
        self.lineup.on_light(now_us)
        if self.lineup.for_copy((stripe,)) is not None:
            self.hedging.copy_later(kept, stripe, now_us)
        return True

    def _hand_out(self) -> bool:
        """Give one frame to another worker's stripes; False if there is none, or no worker that takes it."""
        if self._exchange.has_guests and (not self._stripes or (self.lineup.held_all and self._exchange.usable)):
            self._exchange.return_guests()
        remote = self._exchange.remote_with_room() if self._share.has_work else None
        return remote is not None and not self._is_too_far(remote.least_us) and self._hand_to(remote)

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
        return share.has_work if kept is None else self.hand_kept(kept, remote)

    def hand_kept(self, kept: SentFrame, remote: RemoteStripes) -> bool:
        """Give a kept frame to another worker's stripes; False, and it waits again, if there is no memory for that."""
        share = self._share
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
        size = stream.sendable(min(frame_bytes, max(endpoint.expected_bytes, SMALL_BYTES)))
        if not size:
            share.on_blocked(stream, clock_us())
            endpoint.pause()
            return None
        slot = self.allocate(size)
        if slot < 0:
            memory.starved = True
            share.on_drained(stream)
            stream.readable = True
            endpoint.pause()
            return None
        view = memory.arena.view(slot)
        count = self.read(stream, view[frame.HEADER_BYTES : frame.HEADER_BYTES + size])
        if count <= 0:
            memory.arena.release(slot)
            return None
        endpoint.expected_bytes = 4 * count
        used = frame.HEADER_BYTES + count
        if 4 * used <= len(view) and len(view) > SLOT_BYTES[0]:
            slot, view = self._shrink(slot, view, used)
        kept = share.add_data(stream, count, slot, view)
        if count < size:
            share.on_drained(stream)
            endpoint.resume()
        else:
            endpoint.pause()
        return kept

    def allocate(self, size: int) -> int:
        """A slot for a frame with `size` bytes of payload; -1 if the session has had its part, or none is left."""
        if self._share.kept_bytes >= EGRESS_BYTES // (1 + self._context.sessions):
            return -1
        return self._context.memory.arena.allocate(size + frame.HEADER_BYTES, Side.EGRESS)

    def read(self, stream: Stream, view: memoryview) -> int:
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
        self.alone.give_back()
        self.hedging.close()
        self._next_turn.close()
        if self._ack_timer is not None:
            self._ack_timer.close()
            self._ack_timer = None
        self._ack_timer_active = True
