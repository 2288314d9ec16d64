"""One worker in the simulator: a share, and a shell that pumps it as the real one does."""

from typing import TYPE_CHECKING

from tests.core.application import Application
from tests.core.simulated_link import Stripe
from workers.core import frame
from workers.core.credit import CreditPool
from workers.core.frame import HEADER_BYTES
from workers.core.path import Path
from workers.core.retain import SentFrame
from workers.core.session import SessionShare
from workers.core.stream import Stream

if TYPE_CHECKING:
    from tests.core.simulation import Simulation

TICK_US = 250_000
MIN_SLOT = 4096
PASSED_ON = 0.3
"""How often a piece that could be passed on at once is."""
HANDED = 4


class Piece:
    """A received payload. `left` bytes are not yet consumed."""

    __slots__ = ("data", "handed", "left", "length")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.length = self.left = len(data)
        self.handed = False

    @property
    def occupied(self) -> int:
        """The worst-case slot."""
        return max(2 * self.length, MIN_SLOT)


class Worker:
    """One worker's share and its shell."""

    def __init__(self, simulation: "Simulation", end: int, slot: int, serial: int) -> None:
        self.simulation = simulation
        self.end = end
        self.slot = slot
        self.serial = serial
        self.alive = True
        self.share = SessionShare(
            end, slot, serial, self, CreditPool(simulation.pool_bytes), simulation.window_cap, simulation.max_streams
        )
        self.share.rtt_us = simulation.rtt_us
        self.paths: dict[Stripe, Path] = {}
        self.handed: dict[int, Path] = {}
        self.outstanding: dict[int, int] = {}
        self.slots: dict[int, bytes] = {}
        self.next_slot = 0
        self.applications: list[Application] = []
        self.taken = self.given = self.discarded = 0
        self.passed_on = self.hedged = 0
        self.occupied = 0
        self.timer_us = 0

    # Shell

    def deliver(self, stream: Stream, piece: Piece, length: int) -> None:
        assert not piece.handed and piece.length == length
        piece.handed = True
        self.given += 1
        stream.endpoint.deliver(piece)

    def end_of_stream(self, stream: Stream) -> None:
        stream.endpoint.end_of_stream()

    def opened(self, stream: Stream) -> None:
        flow = self.simulation.flows[stream.flow]
        assert flow.server is None, "opened twice"
        flow.server = Application(self, stream, flow.server_plan, flow.client.plan.source)
        flow.server.start()

    def reset(self, stream: Stream, reason: int) -> None:
        stream.endpoint.on_reset(reason)

    def release(self, slot: int) -> None:
        del self.slots[slot]

    def discard(self, piece: Piece) -> None:
        assert not piece.handed
        piece.handed = True
        self.discarded += 1
        self.occupied -= piece.occupied

    # Receiving

    def receive(self, header: frame.Header, data: bytes) -> None:
        simulation = self.simulation
        length, piece = 0, None
        if header.kind == frame.DATA:
            length = len(data) - HEADER_BYTES
            piece = Piece(data[HEADER_BYTES:]) if length else None
        now_us, stream, kept = simulation.loop.now_us, None, False
        if piece is not None and simulation.random.random() < PASSED_ON:
            stream = self.share.stream_of_next(header, length)
            if stream is not None:
                self.share.on_next(stream, length, now_us)
        if stream is None:
            kept = self.share.receive(header, data[HEADER_BYTES:], piece, length, now_us)
        if piece is not None and (kept or stream is not None):
            self.taken += 1
            self.occupied += piece.occupied
            assert self.occupied <= self.share.pool.reserved, "more received than credit reserves"
            if stream is not None:
                self.passed_on += 1
                self.deliver(stream, piece, length)
        for application in simulation.arrivals:
            application.on_turn_end()
        simulation.arrivals.clear()
        self.pump()

    # Sending

    def pump(self) -> None:
        share = self.share
        while share.has_work and self.alive:
            stripe = self._stripe_with_room()
            if stripe is None:
                break
            self._send_one(stripe)
        self._arm_timer()

    def _stripe_with_room(self) -> Stripe | None:
        ready, soonest, waits = [], 0, None
        for stripe, path in self.paths.items():
            if path.stalled:
                continue
            pipe = stripe.pipes[self.end]
            if not pipe.has_room:
                if waits is None or pipe.room_us < soonest:
                    soonest, waits = pipe.room_us, pipe
            elif not self._is_foreign(stripe) or self.outstanding.get(self._owner(stripe), 0) < HANDED:
                ready.append(stripe)
        if ready:
            return ready[0] if len(ready) == 1 else self.simulation.random.choice(ready)
        if waits is not None and self.timer_us != soonest:
            # Not all workers at the same moment, or the first would take all the room.
            self.simulation.loop.at(soonest + self.simulation.random.randrange(1, 2_000), self.pump)
            self.timer_us = soonest
        return None

    def _owner(self, stripe: Stripe) -> int:
        return stripe.index % self.simulation.workers_per_end[self.end]

    def _is_foreign(self, stripe: Stripe) -> bool:
        return self.simulation.mesh_us > 0 and self._owner(stripe) != self.slot

    def _send_one(self, stripe: Stripe) -> None:
        share, now_us = self.share, self.simulation.loop.now_us
        if share.answers:
            stripe.pipes[self.end].send(share.answers.popleft())
            return
        stream = share.ack_to_send()
        if stream is not None:
            data = stream.ack_to_send()
            if self._is_foreign(stripe):
                share.on_ack_sent(stream, self._hand_over(stripe, data, stream.flow, frame.ACK, 0))
            else:
                stripe.pipes[self.end].send(data)
                share.on_ack_sent(stream, self.paths[stripe])
            return
        kept = share.frame_to_resend() or self._next_data()
        if kept is None:
            return
        data = share.frame_bytes(kept) if kept.slot == -1 else self.slots[kept.slot]
        if self._is_foreign(stripe):
            path = self._hand_over(stripe, data, kept.stream.flow, kept.kind, kept.offset)
        else:
            stripe.pipes[self.end].send(data)
            path = self.paths[stripe]
        share.on_sent(kept, path, now_us)

    def _next_data(self) -> SentFrame | None:
        share, simulation = self.share, self.simulation
        stream = share.stream_to_send()
        if stream is None:
            return None
        size = stream.sendable(simulation.random.choice(simulation.frame_sizes))
        if not size:
            share.on_blocked(stream, simulation.loop.now_us)
            return None
        application: Application = stream.endpoint
        payload = application.read(size)
        if not payload:
            if payload is None:
                share.on_drained(stream)
            else:
                share.on_fin(stream)
            return None
        buffer = bytearray(HEADER_BYTES) + payload
        self.next_slot += 1
        kept = share.add_data(stream, len(payload), self.next_slot, memoryview(buffer))
        self.slots[self.next_slot] = bytes(buffer)
        if len(payload) < size and simulation.random.random() < 0.5:
            share.on_drained(stream)
            application.wake()
        return kept

    # The mesh: frames for stripes of other workers of this end

    def _hand_over(self, stripe: Stripe, data: bytes, flow: int, kind: int, offset: int) -> Path:
        owner = self._owner(stripe)
        path = self.handed.get(owner)
        if path is None:
            path = self.handed[owner] = Path(owner, -1, 0)
        self.outstanding[owner] = self.outstanding.get(owner, 0) + 1
        loop = self.simulation.loop
        loop.at(loop.now_us + self.simulation.mesh_us, self._bound, stripe, path, data, flow, kind, offset)
        return path

    def _bound(self, stripe: Stripe, handed: Path, data: bytes, flow: int, kind: int, offset: int) -> None:
        share = self.share
        if handed.lost or not self.alive:
            return
        self.outstanding[handed.worker] -= 1
        path = self.paths.get(stripe)
        if path is not None:
            stripe.pipes[self.end].send(data)
        if kind == frame.ACK:
            stream = share.streams.get(flow)
            if stream is not None and path is not None:
                share.on_ack_sent(stream, path)
            elif stream is not None:
                share.ack_again(stream)
        else:
            kept = share.find_kept(flow, kind, offset)
            if kept is not None and kept.path is handed:
                if path is not None:
                    share.on_bound(kept, path, self.simulation.loop.now_us)
                else:
                    share.send_again(kept)
        self.pump()

    def lose_worker(self, slot: int) -> None:
        """Another worker of this end was killed."""
        path = self.handed.pop(slot, None)
        self.outstanding.pop(slot, None)
        if path is not None:
            self.share.lose_path(path)
        self.pump()

    # Stripes and time

    def add_stripe(self, stripe: Stripe) -> None:
        path = self.paths[stripe] = Path(self._owner(stripe), stripe.index, stripe.generation)
        self.share.add_path(path)
        self.pump()

    def lose_stripe(self, stripe: Stripe) -> None:
        path = self.paths.pop(stripe, None)
        if path is not None:
            self.share.lose_path(path)
            self.pump()

    def _arm_timer(self) -> None:
        due_us = self.share.next_due_us
        if due_us is not None and self.alive:
            self.simulation.loop.at(due_us, self._on_acks_due)

    def _on_acks_due(self) -> None:
        self.share.on_acks_due(self.simulation.loop.now_us)
        self.pump()

    def tick(self) -> None:
        if self.alive:
            self.share.on_time(self.simulation.loop.now_us)
            self.simulation.loop.at(self.simulation.loop.now_us + TICK_US, self.tick)
            self.pump()
            self._hedge()

    def _hedge(self) -> None:
        share, now_us = self.share, self.simulation.loop.now_us
        for stripe, path in self.paths.items():
            while not share.has_work and not self._is_foreign(stripe) and stripe.pipes[self.end].has_room:
                kept = share.waiting.frame_for(path, now_us)
                if kept is None:
                    break
                self.hedged += 1
                stripe.pipes[self.end].send(share.frame_bytes(kept) if kept.slot == -1 else self.slots[kept.slot])
                share.on_sent(kept, path, now_us)

    # The end

    @property
    def idle(self) -> bool:
        share = self.share
        return not (share.streams or share.has_work or share.pool.reserved)

    def check_empty(self) -> None:
        """Nothing is left of all that passed."""
        share = self.share
        assert not share.streams and not share.acks and not share.resends and not share.answers and not share.turns
        assert not share._blocked and not share._busy and not share._delayed
        assert share.pool.reserved == 0 and self.occupied == 0
        assert not self.slots and self.taken == self.given + self.discarded
        assert not any(path.stalled for path in self.paths.values())
        assert len(share._finished) <= share.total_streams
