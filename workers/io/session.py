"""One worker's part of a session: its stripes and its streams; what both need of the other workers.

What becomes of received frames is said in `workers.io.ingress`, what is sent in `workers.io.egress`, what crosses
between workers in `workers.io.exchange`, what keeps stripes alive in `workers.io.liveness`.
"""

import logging
from typing import Any

from workers.core import frame
from workers.core.errors import RemoteProtocolError
from workers.core.path import Path
from workers.core.session import Owner, SessionShare
from workers.core.stream import Stream
from workers.io import mesh
from workers.io.context import TICK_S, Context, clock_us
from workers.io.egress import Egress
from workers.io.endpoint import Endpoint
from workers.io.exchange import Exchange
from workers.io.far_end import FarEnd
from workers.io.ingress import Ingress
from workers.io.liveness import Liveness
from workers.io.mesh import Descriptor, Peer
from workers.io.parting import Parting
from workers.io.shaping import Shaping
from workers.io.stripe import Stripe
from workers.settings import StripeTunnel
from workers.status import SessionStatus

GONE_STRIPES = 3
"""A worker's death is told on so many stripes; whoever misses it learns of it in the next handshake."""
FEW_STRIPES = 16
"""Of so many each is compared to the others when it comes, not at the next tick."""

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
            end, context.slot, context.serial, self, context.credit.for_session(), tunnel.window_max_bytes, max_streams
        )
        self.stripes: dict[int, Stripe] = {}
        self.exchange = Exchange(context, tunnel, self.share, self.stripes, number, key_index)
        self.ingress = Ingress(context, tunnel, self.share, self.exchange)
        self.egress = Egress(context, self.share, self.stripes, self.exchange)
        self.liveness = Liveness(context, tunnel, self.share, self.stripes, self.exchange, self.egress)
        self.parting = Parting(self.share, self.exchange)
        self.far_end = FarEnd(self.share, self.exchange)
        self.shaping = Shaping(tunnel.name, self.stripes, self.exchange, self.egress.lineup)
        self._owners: list[Owner] = []
        self._next_owner = 0
        self._generation = 0
        self._moving = False
        self.full = False
        self._dirty: list[Endpoint] = []
        self._sent_before = 0
        self._sent_bps = 0.0
        self.joined_stripes = self.lost_stripes = 0
        context.sessions += 1

    def use(self, tunnel: StripeTunnel) -> None:
        """New settings of the tunnel, for what is opened from now on."""
        self.tunnel = self.exchange.tunnel = self.ingress.tunnel = self.liveness.tunnel = tunnel
        self.share.window_cap = tunnel.window_max_bytes

    # Stripes come and go

    def add_stripe(self, stripe: Stripe) -> None:
        """A stripe is authenticated. It replaces one of the same index, and learns of workers that died during its
        handshake."""
        former = self.stripes.get(stripe.index)
        if former is not None:
            self._take_out(former)
            self.parting.part(former)
        self._generation += 1
        self.joined_stripes += 1
        stripe.path = Path(self.context.slot, stripe.index, self._generation)
        self.stripes[stripe.index] = stripe
        self.share.add_path(stripe.path)
        for slot, serial in self.context.gone[stripe.gone_told :]:
            stripe.send(frame.pack(frame.GONE, 0, serial, 0, slot))
        if self.share.draining:
            stripe.send(frame.pack(frame.DRAIN, 0, 0, 0, 0))
        if self._moving:
            stripe.send(frame.pack(frame.MOVE, 0, 0, 0, 0))
        self.liveness.on_added(stripe)
        self._on_stripes_changed()
        if len(self.stripes) <= FEW_STRIPES:
            self._follow_trips()
        self.egress.lineup.make_ready(stripe)
        self.egress.pump()

    def on_stripe_lost(self, stripe: Stripe, why: str) -> None:
        """See StripeOwner."""
        log.debug("stripe lost tunnel=%s index=%d reason=%s", self.tunnel.name, stripe.index, why)
        was_ours = self.stripes.get(stripe.index) is stripe
        if was_ours:
            self._take_out(stripe)
        if not self.parting.on_lost(stripe) and was_ours and stripe.path is not None:
            self.share.lose_path(stripe.path)
            self.exchange.tell_all(mesh.LOST, carrier=stripe.index, value=stripe.path.generation)
        if was_ours:
            self._on_stripes_changed()
        self.egress.arm()

    def _take_out(self, stripe: Stripe) -> None:
        """No frame goes by that stripe any more."""
        del self.stripes[stripe.index]
        self.lost_stripes += 1
        self.egress.lineup.forget(stripe)
        self.liveness.forget(stripe)
        if not self.stripes:
            self.exchange.return_guests()

    def leave(self, stripe: Stripe) -> None:
        """Part with a stripe that works, in order."""
        self._take_out(stripe)
        self.parting.leave(stripe)
        self._on_stripes_changed()

    def leave_all(self) -> None:
        """Part with every stripe here."""
        for stripe in list(self.stripes.values()):
            self.leave(stripe)

    def send_move(self) -> None:
        """Ask the other end to replace the stripes here, and those that are still to come."""
        self._moving = True
        for stripe in list(self.stripes.values()):
            stripe.send(frame.pack(frame.MOVE, 0, 0, 0, 0))
            stripe.flush()

    def _on_stripes_changed(self) -> None:
        owners: dict[Owner, None] = {}
        leaving: dict[Owner, None] = {}
        for stripe in self.stripes.values():
            if stripe.far is not None:
                (leaving if stripe.moved else owners)[stripe.far] = None
        # Who has asked for one stripe to be replaced is about to ask so for all.
        self._owners = [owner for owner in owners if owner not in leaving] or list(leaving)
        for peer in self.context.mesh.peers.values():
            self._tell_carriers(peer)
        self.liveness.on_carriers_changed()

    def _tell_carriers(self, peer: Peer) -> None:
        live = self.liveness
        self.exchange.tell_carriers(
            peer, self._owners[0] if self._owners else None, live.rtt_us, live.usable, self.full
        )

    def tell_full(self, full: bool) -> None:
        """Let the other workers know whether this one has room for more applications."""
        if full != self.full:
            self.full = full
            for peer in self.context.mesh.peers.values():
                self._tell_carriers(peer)

    # Workers of this end come and go

    def on_peer_joined(self, peer: Peer) -> None:
        """A new worker of this end: it has no stripes yet, and has to learn of ours."""
        self.exchange.remote(peer)
        self._tell_carriers(peer)

    def on_peer_lost(self, peer: Peer) -> None:
        """A worker of this end is dead: its stripes are lost, and the other end has to learn that its streams are."""
        self.exchange.on_peer_lost(peer)
        if peer.idle:  # it had no streams
            self.liveness.on_carriers_changed()
            return
        for stripe in sorted(self.stripes.values(), key=lambda each: each.received_us)[-GONE_STRIPES:]:
            stripe.send(frame.pack(frame.GONE, 0, peer.serial, 0, peer.slot))
            stripe.flush()
        self.liveness.on_carriers_changed()
        self.egress.arm()

    # Ingress: from a stripe

    def on_frame(self, stripe: Stripe, slot: int, view: memoryview) -> None:
        """See StripeOwner. The frame goes to the worker that its flow id names."""
        now_us = stripe.received_us = clock_us()
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
        if worker != self.context.slot:
            self.ingress.hand_in(stripe, worker, header, slot, view, now_us)
            return
        is_alone = slot < 0 and header.kind == frame.DATA and not stripe.more
        if not is_alone or not self.ingress.pass_on(header, view, now_us, True):
            self.ingress.receive(header, slot, view, now_us)

    def _on_carrier_frame(self, stripe: Stripe, header: frame.Header, now_us: int) -> None:
        kind = header.kind
        if kind == frame.PING:
            stripe.pong(header.offset)
        elif kind == frame.PONG:
            self.liveness.on_pong(stripe, now_us)
            self.shaping.on_pong(stripe, now_us - header.offset)
        elif kind == frame.GONE:
            self.far_end.on_gone(header.offset, header.serial)
        elif kind == frame.DRAIN:
            self.far_end.on_drain()
        elif kind == frame.MOVE and not stripe.moved:
            stripe.moved = True
            if self.stripes.get(stripe.index) is stripe:
                self._on_moved(stripe)
            else:
                self.parting.leave(stripe)

    def _on_moved(self, stripe: Stripe) -> None:
        """The other end leaves a stripe: a client that has replaced it."""
        self.leave(stripe)

    # Ingress: from the mesh

    def on_descriptor(self, peer: Peer, descriptor: Descriptor) -> None:
        """One descriptor that names this session."""
        kind, _, _, slot, _, flow, _, length, carrier, value, _ = descriptor
        if kind == mesh.OUT:
            self.exchange.on_out(peer, descriptor)
        elif kind == mesh.IN:
            self.ingress.on_handed_in(peer, slot, length, value)
        elif kind == mesh.BOUND:
            self.exchange.on_bound(peer, descriptor)
        elif kind in (mesh.GONE, mesh.ROSTER, mesh.DRAIN):
            self.far_end.on_descriptor(kind, flow, value)
        elif kind == mesh.BROKEN:
            self._on_broken(carrier, value)
        elif kind == mesh.REPLACED:
            if value in self.stripes:
                self.leave(self.stripes[value])
        else:
            self.exchange.on_descriptor(peer, descriptor)
            if kind == mesh.CARRIERS:
                self.liveness.on_carriers_changed()

    def _on_broken(self, index: int, generation: int) -> None:
        """A frame of that stripe, which was handed in, broke the protocol."""
        stripe = self.stripes.get(index)
        if stripe is not None and stripe.path is not None and stripe.path.generation == generation:
            stripe.fail("a frame for another worker broke the protocol")

    def on_turn_end(self) -> None:
        """Give the applications what arrived, then send what that allows (StripeOwner)."""
        dirty = self._dirty
        while dirty:
            dirty.pop().flush()
        self.egress.pump_if_needed()

    def on_room(self, stripe: Stripe) -> None:
        """See StripeOwner."""
        if self.stripes.get(stripe.index) is stripe:
            self.egress.lineup.make_ready(stripe)
        self.egress.pump()

    def _follow_trips(self) -> None:
        self.exchange.on_time()
        self.egress.lineup.on_time(self.exchange.least_us, self._sent_bps)

    # Applications

    def choose_owner(self) -> Owner | None:
        """The other end's worker for a new stream: each that our own stripes lead to in turn, or one that another's
        do."""
        if self.far_end.draining:
            return None
        if self._owners:
            self._next_owner += 1
            return self._owners[self._next_owner % len(self._owners)]
        return self.exchange.far

    def on_readable(self, endpoint: Endpoint) -> None:
        """See EndpointOwner."""
        if self.egress.alone.send(endpoint):
            return
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
        self._mark_dirty(endpoint)

    def end_of_stream(self, stream: Stream) -> None:
        """See Shell."""
        endpoint: Endpoint = stream.endpoint
        endpoint.end()
        self._mark_dirty(endpoint)

    def _mark_dirty(self, endpoint: Endpoint) -> None:
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
        """Every TICK_S."""
        if self.liveness.on_time(now_us):
            self._on_stripes_changed()
        self.share.on_time(now_us)
        self.parting.on_time(now_us)
        self._sent_bps = (self.share.bytes_out - self._sent_before) * 8 / TICK_S
        self._sent_before = self.share.bytes_out
        self.egress.alone.give_back()
        self._follow_trips()
        self.shaping.on_time(now_us)
        self.far_end.on_time()
        if self.share.has_work or self.exchange.has_guests:
            self.egress.pump()

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
        self.parting.close()
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
            resumes=self.liveness.resumes,
            carriers=[stripe.status(self.context.slot, now_us) for stripe in self.stripes.values()],
        )
