"""One worker's part of a session: its stripes and its streams; what both need of the other workers; what time brings.

What is sent is decided in `workers.io.egress`, what crosses between workers in `workers.io.exchange`.
"""

import logging
from typing import Any

from workers.core import frame
from workers.core.errors import RemoteProtocolError
from workers.core.path import Path
from workers.core.sending import MIN_RTT_US
from workers.core.session import Owner, SessionShare
from workers.core.stream import Stream
from workers.io import mesh, sockets
from workers.io.context import Context, clock_us
from workers.io.egress import Egress
from workers.io.endpoint import Endpoint
from workers.io.exchange import Exchange
from workers.io.memory import Piece
from workers.io.mesh import Descriptor, Peer
from workers.io.stripe import Stripe
from workers.settings import StripeTunnel
from workers.shm.arena import Side
from workers.status import SessionStatus

KEEPALIVE_US = 10_000_000
"""A stripe that heard nothing for so long is asked (PING)."""
DEAD_US = 25_000_000
"""A stripe that heard nothing for so long is dead."""
GONE_STRIPES = 3
"""A worker's death is told on so many stripes; whoever misses it learns of it in the next handshake."""
GONE_BURST = 64
"""Deaths of the other end's workers believed at once; ten a second after that."""
WARN_US = 10_000_000
PROBED = 32
"""Stripes asked at once after another one stalled."""

log = logging.getLogger("forwarder.session")


class Session:
    """Implements what the share (Shell), the stripes (StripeOwner) and the endpoints (EndpointOwner) ask for."""

    def __init__(
        self, context: Context, tunnel: StripeTunnel, end: int, number: int, key_index: int, *, max_streams: int = 65536
    ) -> None:
        self.context = context
        self.tunnel = tunnel
        self.number = number
        self.key_index = key_index
        self.peer_text = ""
        self.share = SessionShare(
            end,
            context.slot,
            context.serial,
            self,
            context.credit.for_session(),
            tunnel.window_max_bytes,
            max_streams,
        )
        self.stripes: dict[int, Stripe] = {}
        self.exchange = Exchange(context, tunnel, self.share, self.stripes, number, key_index)
        self.egress = Egress(context, self.share, self.stripes, self.exchange)
        self.resumes = 0
        self.outage_since_us: int | None = clock_us()
        self.far_roster: dict[int, int] = {}
        self.far_boot = 0
        self.far_draining = False
        self._far_gone: dict[int, int] = {}
        self._gone_left = GONE_BURST
        self._refused = self._warned_us = 0
        self._rtt_us = 0
        self._owners: list[Owner] = []
        self._next_owner = 0
        self._generation = 0
        self._dirty: list[Endpoint] = []
        context.sessions += 1

    # Stripes come and go

    @property
    def total_up(self) -> int:
        """Stripes of all workers of this end."""
        return len(self.stripes) + self.exchange.up

    def add_stripe(self, stripe: Stripe) -> None:
        """A stripe is authenticated. It replaces one of the same index, and learns of workers that died during its
        handshake."""
        former = self.stripes.get(stripe.index)
        if former is not None:
            former.fail("replaced by a new connection")
        self._generation += 1
        stripe.path = Path(self.context.slot, stripe.index, self._generation)
        self.stripes[stripe.index] = stripe
        self.share.add_path(stripe.path)
        for slot, serial in self.context.gone[stripe.gone_told :]:
            stripe.send(frame.pack(frame.GONE, 0, serial, 0, slot))
        info = stripe.info = sockets.tcp_info(stripe.sock)
        if info is not None:
            self._rtt_us = max(self._rtt_us, info.rtt_us)
        self._on_stripes_changed()
        self.egress.make_ready(stripe)
        self.egress.pump()

    def on_stripe_lost(self, stripe: Stripe, why: str) -> None:
        """See StripeOwner."""
        log.debug("stripe lost tunnel=%s index=%d reason=%s", self.tunnel.name, stripe.index, why)
        if self.stripes.get(stripe.index) is not stripe:
            return
        del self.stripes[stripe.index]
        self.egress.forget(stripe)
        assert stripe.path is not None
        self.share.lose_path(stripe.path)
        self.exchange.tell_all(mesh.LOST, carrier=stripe.index, value=stripe.path.generation)
        if not self.stripes:
            self.exchange.return_guests()
        self._on_stripes_changed()
        self.egress.arm()

    def _on_stripes_changed(self) -> None:
        owners: dict[Owner, None] = {}
        for stripe in self.stripes.values():
            if stripe.far is not None:
                owners[stripe.far] = None
        self._owners = list(owners)
        for peer in self.context.mesh.peers.values():
            self._tell_carriers(peer)
        self._update_rtt()
        self._check_outage()

    def _tell_carriers(self, peer: Peer) -> None:
        self.exchange.tell_carriers(peer, self._owners[0] if self._owners else None, self._rtt_us)

    def _update_rtt(self) -> None:
        """Windows follow the longest round trip: of our stripes, or of another worker's that carry our streams."""
        self.share.rtt_us = max(MIN_RTT_US, self._rtt_us, self.exchange.rtt_us)

    def _check_outage(self) -> None:
        if self.total_up:
            if self.outage_since_us is not None:
                self.outage_since_us = None
                if self.share.streams:
                    self.resumes += 1
        elif self.outage_since_us is None:
            self.outage_since_us = clock_us()

    # Workers of this end come and go

    def on_peer_joined(self, peer: Peer) -> None:
        """A new worker of this end: it has no stripes yet, and has to learn of ours."""
        self.exchange.remote(peer)
        self._tell_carriers(peer)

    def on_peer_lost(self, peer: Peer) -> None:
        """A worker of this end is dead: its stripes are lost, and the other end has to learn that its streams are."""
        self.exchange.on_peer_lost(peer)
        heard_last = sorted(self.stripes.values(), key=lambda each: each.received_us)[-GONE_STRIPES:]
        for stripe in heard_last:
            stripe.send(frame.pack(frame.GONE, 0, peer.serial, 0, peer.slot))
            stripe.flush()
        self._check_outage()
        self.egress.arm()

    # Ingress: from a stripe

    def on_frame(self, stripe: Stripe, slot: int, view: memoryview) -> None:
        """See StripeOwner. The frame goes to the worker that its flow id names."""
        now_us = clock_us()
        stripe.received_us = now_us
        memory = self.context.memory
        try:
            header = frame.unpack(view)
        except RemoteProtocolError:
            if slot >= 0:
                memory.arena.release(slot)
            raise
        if header.kind >= frame.GONE:
            self._on_carrier_frame(stripe, header, now_us)
            return
        worker = frame.flow_slot(header.flow, self.share.end)
        if worker == self.context.slot:
            self._receive_own(header, slot, view, now_us)
        else:
            self._hand_in(worker, header, slot, view)

    def _receive_own(self, header: frame.Header, slot: int, view: memoryview, now_us: int) -> None:
        memory = self.context.memory
        payload = view[frame.HEADER_BYTES :]
        if header.kind != frame.DATA:
            if slot >= 0:
                memory.arena.release(slot)
            self.share.receive(header, payload, None, 0, now_us)
            return
        length = len(payload)
        piece = None
        if length:
            if slot < 0:
                slot = memory.copy_in(payload, Side.INGRESS)
                if slot < 0:
                    memory.dropped_frames += 1
                    return
                payload = memory.arena.view(slot, length)
            piece = Piece(None, slot, payload)
        self._receive(header, piece, length, now_us)

    def _receive(self, header: frame.Header, piece: Piece | None, length: int, now_us: int) -> None:
        kept = False
        try:
            kept = self.share.receive(header, None, piece, length, now_us)
        finally:
            if not kept and piece is not None:
                self.context.memory.free(piece)

    def _hand_in(self, worker: int, header: frame.Header, slot: int, view: memoryview) -> None:
        memory = self.context.memory
        peer = self.context.mesh.peers.get(worker)
        if peer is None:
            if slot >= 0:
                memory.arena.release(slot)
            is_last = header.kind == frame.RESET or (header.kind == frame.ACK and header.flags & frame.RESET_SEEN)
            if not is_last:
                self.share.answer(frame.pack(frame.RESET, 0, 0, header.flow, frame.Reason.WORKER_GONE))
            return
        length = len(view)
        if slot < 0:
            slot = memory.copy_in(view, Side.INGRESS)
            if slot < 0:
                memory.dropped_frames += 1
                return
        memory.arena.lend(slot, worker)
        memory.arena.release(slot)
        peer.send(
            mesh.IN, tunnel=self.tunnel.index, slot=slot, session=self.number, length=length, carrier=self.key_index
        )

    def _on_carrier_frame(self, stripe: Stripe, header: frame.Header, now_us: int) -> None:
        kind = header.kind
        if kind == frame.PING:
            stripe.pong(header.offset)
        elif kind == frame.PONG:
            stripe.pinged_us = 0
        elif kind == frame.GONE:
            self._on_gone(header.offset, header.serial)
        elif kind == frame.DRAIN and not self.far_draining:
            self.far_draining = True
            self.exchange.tell_all(mesh.DRAIN, flow=self.far_boot)

    def _on_gone(self, slot: int, serial: int) -> None:
        """A worker of the other end is dead, as its other workers say. Raises RemoteProtocolError if too many are."""
        known = self._far_gone.get(slot)
        if known is not None and (known - serial) % (1 << 32) < 1 << 31:
            return  # the same or an older one
        if slot > 0xFF or not self._gone_left:
            raise RemoteProtocolError(f"worker {slot} of serial {serial} is gone, and too many before")
        self._gone_left -= 1
        self._far_gone[slot] = serial
        self.share.on_peer_gone(slot, serial)
        self.exchange.tell_all(mesh.GONE, value=slot << 32 | serial)

    def on_far_roster(self, roster: dict[int, int], boot_id: int) -> None:
        """What a handshake said of the other end's workers; tell the others if it is news."""
        if boot_id == self.far_boot and roster == self.far_roster:
            return
        if boot_id != self.far_boot:
            self._far_gone.clear()
        self.far_boot, self.far_roster = boot_id, dict(roster)
        self.far_draining = False
        self.share.on_roster(roster, boot_id)
        for slot, serial in roster.items():
            self.exchange.tell_all(mesh.ROSTER, flow=boot_id, value=slot << 32 | serial)

    # Ingress: from the mesh

    def on_descriptor(self, peer: Peer, descriptor: Descriptor) -> None:
        """One descriptor that names this session."""
        kind, _, _, slot, _, flow, _, length, _, value, _ = descriptor
        if kind == mesh.IN:
            self._on_handed_in(peer, slot, length)
        elif kind == mesh.GONE:
            self.share.on_peer_gone(value >> 32, value & 0xFFFFFFFF)
        elif kind == mesh.ROSTER:
            if flow != self.far_boot:
                self.far_boot, self.far_roster, self.far_draining = flow, {}, False
            self.share.on_roster({value >> 32: value & 0xFFFFFFFF}, flow)
        elif kind == mesh.DRAIN:
            self.far_draining = flow == self.far_boot
        else:
            self.exchange.on_descriptor(peer, descriptor)
            if kind == mesh.CARRIERS:
                self._update_rtt()
                self._check_outage()

    def _on_handed_in(self, peer: Peer, slot: int, length: int) -> None:
        try:
            view = peer.view(slot, length)
            header = frame.unpack(view)
            payload = view[frame.HEADER_BYTES :]
            if header.kind != frame.DATA or not payload:
                body = bytes(payload)
                peer.return_slot(slot)
                self.share.receive(header, body, None, 0, clock_us())
            else:
                self._receive(header, Piece(peer, slot, payload), len(payload), clock_us())
        except (RemoteProtocolError, ValueError) as error:
            log.debug("frame from the mesh refused tunnel=%s reason=%s", self.tunnel.name, error)

    def on_turn_end(self) -> None:
        """Give the applications what arrived, then send what that allows (StripeOwner)."""
        dirty = self._dirty
        while dirty:
            dirty.pop().flush()
        self.egress.pump()

    def on_room(self, stripe: Stripe) -> None:
        """See StripeOwner."""
        self.egress.make_ready(stripe)
        self.egress.pump()

    # Applications

    def choose_owner(self) -> Owner | None:
        """The other end's worker for a new stream: each that our own stripes lead to in turn, or one that another's
        do."""
        if self.far_draining:
            return None
        if self._owners:
            self._next_owner += 1
            return self._owners[self._next_owner % len(self._owners)]
        return self.exchange.far

    def on_readable(self, endpoint: Endpoint) -> None:
        """See EndpointOwner."""
        self.share.on_readable(endpoint.stream)
        self.egress.pump()
        if endpoint.stream.readable:
            endpoint.pause()

    def on_consumed(self, endpoint: Endpoint, length: int, frames: int) -> None:
        """See EndpointOwner."""
        self.share.on_consumed(endpoint.stream, length, frames, clock_us())
        if self.share.acks:
            self.egress.arm()

    def on_application_reset(self, endpoint: Endpoint) -> None:
        """See EndpointOwner."""
        self.share.reset_stream(endpoint.stream, frame.Reason.APPLICATION)
        endpoint.close()
        self.egress.arm()

    # Shell

    def deliver(self, stream: Stream, piece: Any, length: int) -> None:
        """See Shell."""
        endpoint: Endpoint = stream.endpoint
        endpoint.deliver(piece)
        if not endpoint.dirty:
            endpoint.dirty = True
            self._dirty.append(endpoint)

    def end_of_stream(self, stream: Stream) -> None:
        """See Shell."""
        endpoint: Endpoint = stream.endpoint
        endpoint.end()
        if not endpoint.dirty:
            endpoint.dirty = True
            self._dirty.append(endpoint)

    def opened(self, stream: Stream) -> None:
        """See Shell. Only a server's session is opened to."""
        raise RemoteProtocolError("stream opened towards a client")

    def reset(self, stream: Stream, reason: int) -> None:
        """See Shell."""
        endpoint: Endpoint | None = stream.endpoint
        if endpoint is not None:
            endpoint.close()
        self.egress.arm()

    def release(self, slot: int) -> None:
        """See Shell."""
        self.context.memory.release(slot)

    def discard(self, piece: Any) -> None:
        """See Shell."""
        self.context.memory.free(piece)

    # Time

    def on_time(self, now_us: int) -> None:
        """Every 100 ms: meters, liveness, stalls."""
        rtt_us = 0
        for stripe in list(self.stripes.values()):
            if stripe.used or (stripe.info is not None and stripe.info.unacked_bytes):
                stripe.used, was_stalled = False, stripe.stalled
                stripe.sample(self.tunnel.frame_max_bytes)
                if stripe.info is not None:
                    rtt_us = max(rtt_us, stripe.info.rtt_us)
                if stripe.stalled and not was_stalled:
                    self._on_stall(stripe, now_us)
            self._check_alive(stripe, now_us)
        if rtt_us and not 3 * self._rtt_us < 4 * rtt_us < 5 * self._rtt_us:
            self._rtt_us = rtt_us
            self._on_stripes_changed()
        self.share.on_time(now_us)
        self._gone_left = min(self._gone_left + 1, GONE_BURST)
        if self.share.refused_streams > self._refused:
            self._warn_of_refused(now_us)
        if self.share.has_work or self.exchange.guests:
            self.egress.pump()

    def _warn_of_refused(self, now_us: int) -> None:
        if now_us - self._warned_us > WARN_US:
            count = self.share.refused_streams - self._refused
            log.warning("no memory left for streams tunnel=%s refused=%d", self.tunnel.name, count)
            self._refused, self._warned_us = self.share.refused_streams, now_us

    def _check_alive(self, stripe: Stripe, now_us: int) -> None:
        silent_us = now_us - stripe.received_us
        if silent_us > DEAD_US:
            stripe.fail("silent")
        elif silent_us > KEEPALIVE_US and not stripe.pinged_us:
            self._ping(stripe, now_us)

    def _ping(self, stripe: Stripe, now_us: int) -> None:
        stripe.pinged_us = now_us
        stripe.send(frame.pack(frame.PING, 0, 0, 0, now_us))
        stripe.flush()

    def _on_stall(self, stripe: Stripe, now_us: int) -> None:
        """Its latest ACKs leave elsewhere. What stalls one stripe may stall others: those next in line are asked."""
        if stripe.path is not None:
            self.share.ack_elsewhere(stripe.path)
            self.exchange.tell_all(mesh.STALLED, carrier=stripe.index, value=stripe.path.generation)
        for other in self.egress.next_in_line(PROBED):
            if not other.pinged_us:
                self._ping(other, now_us)

    def expired(self, now_us: int) -> bool:
        """Whether no stripe has been up anywhere for longer than the resume timeout."""
        since = self.outage_since_us
        return since is not None and now_us - since > self.tunnel.resume_timeout_s * 1e6

    def send_drain(self) -> None:
        """Tell the other end that this one opens and takes no more streams."""
        self.share.draining = True
        for stripe in list(self.stripes.values()):
            stripe.send(frame.pack(frame.DRAIN, 0, 0, 0, 0))
            stripe.flush()

    def close(self, reason: int) -> None:
        """Reset what is left and close the stripes."""
        self.context.sessions -= 1
        self.share.abandon(reason)
        for stripe in list(self.stripes.values()):
            stripe.fail("session closed")
        self.exchange.return_guests()
        self.egress.close()

    # Status

    def status(self, key_id: str, wanted: int, now_us: int) -> SessionStatus:
        """This worker's part of the session."""
        return SessionStatus(
            id=f"{self.number:016x}",
            key_id=key_id,
            peer=self.peer_text,
            carriers_up=len(self.stripes),
            carriers_wanted=wanted,
            reinjected_bytes=self.share.reinjected_bytes,
            duplicate_bytes=self.share.duplicate_bytes,
            resumes=self.resumes,
            carriers=[stripe.status(self.context.slot, now_us) for stripe in self.stripes.values()],
        )
