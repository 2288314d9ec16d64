"""One worker's part of a session: its stripes, its streams, and the other workers' stripes that it may use.

`pump` is the one place where something is sent: it gives frames to stripes as long as both are there, own stripes
first, then those of other workers, a few frames at a time.
"""

import logging
from collections import deque
from typing import Any

from workers.core import frame
from workers.core.errors import RemoteProtocolError
from workers.core.path import Path
from workers.core.retain import SentFrame
from workers.core.session import MIN_RTT_US, Owner, SessionShare
from workers.core.stream import Stream
from workers.io import mesh, sockets
from workers.io.context import Context, clock_us
from workers.io.endpoint import Endpoint
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
PUMP_FRAMES = 64
"""Frames sent in one turn of the event loop, so that reading gets its turn."""
HANDED_MIN, HANDED_MAX = 2, 8
"""How many frames another worker may hold unsent: enough for its stripes not to wait for the mesh, few for late
binding."""

log = logging.getLogger("forwarder.session")


class RemoteStripes:
    """The stripes of this session that another worker owns. `handed` is the path of frames that it has not sent yet."""

    __slots__ = ("far", "frame_bytes", "handed", "outstanding", "paths", "peer", "up")

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.up = 0
        self.outstanding = 0
        self.far: Owner | None = None
        self.frame_bytes = frame_initial()
        self.handed = Path(peer.slot, -1, 0)
        self.paths: dict[tuple[int, int], Path] = {}

    @property
    def has_room(self) -> bool:
        """Whether another frame may be handed over."""
        return self.outstanding < min(max(self.up, HANDED_MIN), HANDED_MAX) and self.up > 0


def frame_initial() -> int:
    """Frame size for stripes of unknown rate."""
    return 16 << 10


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
            context.credit,
            tunnel.window_max_bytes,
            max_streams,
        )
        self.stripes: dict[int, Stripe] = {}
        self.remotes: dict[int, RemoteStripes] = {}
        self.resumes = 0
        self.outage_since_us: int | None = clock_us()
        self.far_roster: dict[int, int] = {}
        self.far_boot = 0
        self.far_draining = False
        self._ready: list[Stripe] = []
        self._guests: deque[tuple[Peer, int, int, int, int, int]] = deque()
        self._guest_turn = False
        self._owners: list[Owner] = []
        self._next_owner = 0
        self._generation = 0
        self._dirty: list[Endpoint] = []
        self._pumping = False
        self._pump_armed = False
        self._ack_timer: Any = None
        self._ack_timer_active = False
        for peer in context.mesh.peers.values():
            self._remote(peer)

    # Stripes come and go

    @property
    def total_up(self) -> int:
        """Stripes of all workers of this end."""
        return len(self.stripes) + sum(remote.up for remote in self.remotes.values())

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
            self.share.rtt_us = max(self.share.rtt_us, info.rtt_us)
        self._on_stripes_changed()
        self._make_ready(stripe)
        self.pump()

    def on_stripe_lost(self, stripe: Stripe, why: str) -> None:
        """See StripeOwner."""
        log.debug("stripe lost tunnel=%s index=%d reason=%s", self.tunnel.name, stripe.index, why)
        if self.stripes.get(stripe.index) is not stripe:
            return
        del self.stripes[stripe.index]
        if stripe.in_ready:
            self._ready.remove(stripe)
            stripe.in_ready = False
        assert stripe.path is not None
        self.share.lose_path(stripe.path)
        self._tell_all(mesh.LOST, carrier=stripe.index, value=stripe.path.generation)
        if not self.stripes:
            self._return_guests()
        self._on_stripes_changed()
        self.arm_pump()

    def _on_stripes_changed(self) -> None:
        owners: dict[Owner, None] = {}
        for stripe in self.stripes.values():
            if stripe.far is not None:
                owners[stripe.far] = None
        self._owners = list(owners)
        for peer in self.context.mesh.peers.values():
            self._tell_carriers(peer)
        self._check_outage()

    def _check_outage(self) -> None:
        if self.total_up:
            if self.outage_since_us is not None:
                self.outage_since_us = None
                if self.share.streams:
                    self.resumes += 1
        elif self.outage_since_us is None:
            self.outage_since_us = clock_us()

    def _tell_carriers(self, peer: Peer) -> None:
        far = self._owners[0] if self._owners else (0, 0, 0)
        peer.send(
            mesh.CARRIERS,
            tunnel=self.tunnel.index,
            session=self.number,
            flow=far[2],
            length=self.key_index,
            carrier=len(self.stripes),
            value=far[0] << 32 | far[1],
        )

    def _tell_all(self, kind: int, **fields: int) -> None:
        for peer in self.context.mesh.peers.values():
            peer.send(kind, tunnel=self.tunnel.index, session=self.number, **fields)

    def _remote(self, peer: Peer) -> RemoteStripes:
        remote = self.remotes.get(peer.slot)
        if remote is None or remote.peer is not peer:
            remote = self.remotes[peer.slot] = RemoteStripes(peer)
        return remote

    # Workers of this end come and go

    def on_peer_joined(self, peer: Peer) -> None:
        """A new worker of this end: it has no stripes yet, and has to learn of ours."""
        self._remote(peer)
        self._tell_carriers(peer)

    def on_peer_lost(self, peer: Peer) -> None:
        """A worker of this end is dead: its stripes are lost, and the other end has to learn that its streams are."""
        remote = self.remotes.pop(peer.slot, None)
        if remote is not None:
            for path in [remote.handed, *remote.paths.values()]:
                self.share.lose_path(path)
        self._guests = deque(guest for guest in self._guests if guest[0] is not peer)
        for stripe in self.stripes.values():
            stripe.send(frame.pack(frame.GONE, 0, peer.serial, 0, peer.slot))
            stripe.flush()
            break
        self._check_outage()
        self.arm_pump()

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
            if header.kind != frame.RESET:
                self.share.answers.append(frame.pack(frame.RESET, 0, 0, header.flow, frame.Reason.WORKER_GONE))
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
            stripe.send(frame.pack(frame.PONG, 0, 0, 0, header.offset))
        elif kind == frame.PONG:
            stripe.pinged_us = 0
        elif kind == frame.GONE:
            self.on_far_worker_gone(header.offset & 0xFF, header.serial)
            self._tell_all(mesh.GONE, value=(header.offset & 0xFF) << 32 | header.serial)
        elif kind == frame.DRAIN:
            self.far_draining = True
            self._tell_all(mesh.DRAIN)

    def on_far_worker_gone(self, slot: int, serial: int) -> None:
        """A worker of the other end is dead."""
        self.share.on_peer_gone(slot, serial)

    def on_far_roster(self, roster: dict[int, int], boot_id: int) -> None:
        """What a handshake said of the other end's workers; tell the others if it is news."""
        if boot_id == self.far_boot and roster == self.far_roster:
            return
        self.far_boot, self.far_roster = boot_id, dict(roster)
        self.far_draining = False
        self.share.on_roster(roster, boot_id)
        for slot, serial in roster.items():
            self._tell_all(mesh.ROSTER, flow=boot_id, value=slot << 32 | serial)

    # Ingress: from the mesh

    def on_descriptor(self, peer: Peer, descriptor: Descriptor) -> None:
        """One descriptor that names this session."""
        kind, flags, _, slot, _, flow, offset, length, carrier, value, value2 = descriptor
        if kind == mesh.IN:
            self._on_handed_in(peer, slot, length)
        elif kind == mesh.OUT:
            self._guests.append((peer, slot, length, flow, offset, value))
        elif kind == mesh.BOUND:
            self._on_bound(peer, flags, slot, flow, offset, length, carrier, value, value2)
        elif kind == mesh.LOST:
            path = self._remote(peer).paths.pop((carrier, value), None)
            if path is not None:
                self.share.lose_path(path)
        elif kind == mesh.CARRIERS:
            remote = self._remote(peer)
            remote.up = carrier
            remote.far = (value >> 32, value & 0xFFFFFFFF, flow) if carrier else None
            self._check_outage()
        elif kind == mesh.GONE:
            self.on_far_worker_gone(value >> 32, value & 0xFFFFFFFF)
        elif kind == mesh.ROSTER:
            if flow != self.far_boot:
                self.far_boot, self.far_roster, self.far_draining = flow, {}, False
            self.share.on_roster({value >> 32: value & 0xFFFFFFFF}, flow)
        elif kind == mesh.DRAIN:
            self.far_draining = True

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
            log.warning("frame from the mesh refused tunnel=%s reason=%s", self.tunnel.name, error)

    def _on_bound(
        self,
        peer: Peer,
        sent: int,
        slot: int,
        flow: int,
        offset: int,
        size: int,
        carrier: int,
        generation: int,
        kind: int,
    ) -> None:
        """A frame that was handed to `peer` was sent on one of its stripes, or comes back."""
        remote = self._remote(peer)
        remote.outstanding = max(remote.outstanding - 1, 0)
        if not self.context.memory.arena.give_back(slot, peer.slot):
            self.context.mesh.dropped_descriptors += 1
            return
        path = None
        if sent:
            remote.frame_bytes = min(max(size, frame_initial() >> 2), self.tunnel.frame_max_bytes)
            path = remote.paths.get((carrier, generation))
            if path is None:
                path = remote.paths[carrier, generation] = Path(peer.slot, carrier, generation)
                self.share.add_path(path)
        if kind == frame.ACK:
            stream = self.share.streams.get(flow)
            if stream is not None:
                if path is not None:
                    self.share.on_ack_sent(stream, path)
                else:
                    self.share.ack_again(stream)
            return
        kept = self.share.find_kept(flow, kind, offset)
        if kept is None or kept.path is not remote.handed:
            return
        if path is not None:
            self.share.on_bound(kept, path, clock_us())
        else:
            self.share.send_again(kept)

    def on_turn_end(self) -> None:
        """Give the applications what arrived, then send what that allows (StripeOwner)."""
        dirty = self._dirty
        while dirty:
            dirty.pop().flush()
        self.pump()

    # Egress

    def arm_pump(self) -> None:
        """Pump at the end of this turn."""
        if not self._pump_armed:
            self._pump_armed = True
            self.context.loop.run_callback(self._pump_later)

    def _pump_later(self) -> None:
        self._pump_armed = False
        self.pump()

    def on_room(self, stripe: Stripe) -> None:
        """See StripeOwner."""
        self._make_ready(stripe)
        self.pump()

    def _make_ready(self, stripe: Stripe) -> None:
        if not stripe.in_ready and not stripe.closed:
            stripe.in_ready = True
            self._ready.append(stripe)

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
                self.arm_pump()
            staging = self.context.staging
            if staging.stripe is not None:
                staging.stripe.flush()
        finally:
            self._pumping = False
        if self.share.next_due_us is not None and not self._ack_timer_active:
            self._arm_ack_timer()

    def _stripe_with_room(self) -> Stripe | None:
        """The own stripe used last among those with room: few stripes stay warm, and the cost does not grow with
        their number."""
        ready = self._ready
        while ready:
            stripe = ready[-1]
            if not stripe.stalled and stripe.has_room():
                return stripe
            if ready and ready[-1] is stripe:
                ready.pop()
                stripe.in_ready = False
        return None

    def _send_on(self, stripe: Stripe) -> bool:
        """Send one frame on `stripe`; False if there is none."""
        share = self.share
        if self._guests and (self._guest_turn or not share.has_work):
            self._guest_turn = False
            self._send_guest(stripe)
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
            return share.has_work or bool(self._guests)
        stripe.send(self._frame_view(kept))
        share.on_sent(kept, stripe.path, clock_us())
        return True

    def _frame_view(self, kept: SentFrame) -> memoryview:
        return self.context.memory.arena.view(kept.slot, frame.HEADER_BYTES + kept.length)

    def _next_data(self, frame_bytes: int) -> SentFrame | None:
        """New bytes of the application whose turn it is, as a frame in a slot."""
        share, memory = self.share, self.context.memory
        stream = share.stream_to_send()
        if stream is None:
            return None
        endpoint: Endpoint = stream.endpoint
        size = stream.sendable(frame_bytes)
        if not size:
            share.on_blocked(stream, clock_us())
            endpoint.pause()
            return None
        arena = memory.arena
        slot = arena.allocate(size + frame.HEADER_BYTES, Side.EGRESS)
        if slot < 0:
            memory.starved = True
            share.on_drained(stream)
            stream.readable = True
            endpoint.pause()
            return None
        view = arena.view(slot)
        try:
            count = endpoint.read_into(view[frame.HEADER_BYTES : frame.HEADER_BYTES + size])
        except OSError:
            arena.release(slot)
            self.on_application_reset(endpoint)
            return None
        if count <= 0:
            arena.release(slot)
            if count:
                share.on_drained(stream)
                endpoint.resume()
            else:
                share.on_fin(stream)
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

    def _shrink(self, slot: int, view: memoryview, used: int) -> tuple[int, memoryview]:
        """Move a small read out of a large slot, which would be held until the peer has it."""
        arena = self.context.memory.arena
        smaller = arena.allocate(used, Side.EGRESS)
        if smaller < 0:
            return slot, view
        target = arena.view(smaller)
        target[frame.HEADER_BYTES : used] = view[frame.HEADER_BYTES : used]
        arena.release(slot)
        return smaller, target

    def _send_guest(self, stripe: Stripe) -> None:
        """Send a frame of another worker's flow."""
        peer, slot, length, flow, offset, kind = self._guests.popleft()
        assert stripe.path is not None
        try:
            view = peer.view(slot, length)
        except ValueError:
            self.context.mesh.dropped_descriptors += 1
            return
        stripe.send(view)
        peer.send(
            mesh.BOUND,
            flags=1,
            tunnel=self.tunnel.index,
            slot=slot,
            session=self.number,
            flow=flow,
            offset=offset,
            length=stripe.frame_bytes,
            carrier=stripe.index,
            value=stripe.path.generation,
            value2=kind,
        )

    def _return_guests(self) -> None:
        """No stripe left: the frames of other workers go back to them."""
        guests = self._guests
        while guests:
            peer, slot, _, flow, offset, kind = guests.popleft()
            peer.send(
                mesh.BOUND,
                tunnel=self.tunnel.index,
                slot=slot,
                session=self.number,
                flow=flow,
                offset=offset,
                value2=kind,
            )

    def _hand_out(self) -> bool:
        """Give one frame to another worker's stripes; False if there is none, or no worker that takes it."""
        share = self.share
        if not self.stripes and self._guests:
            self._return_guests()
        if not share.has_work:
            return False
        remote = max(
            (remote for remote in self.remotes.values() if remote.has_room),
            key=lambda each: -each.outstanding,
            default=None,
        )
        if remote is None:
            return False
        if share.answers:
            self._hand_out_bytes(remote, share.answers.popleft(), 0, 0, 0)
            return True
        stream = share.ack_to_send()
        if stream is not None:
            if not self._hand_out_bytes(remote, stream.ack_to_send(), stream.flow, 0, frame.ACK):
                share.ack_again(stream)
                return False
            share.on_ack_sent(stream, remote.handed)
            return True
        kept = share.frame_to_resend() or self._next_data(remote.frame_bytes)
        if kept is None:
            return share.has_work
        flow, offset, kind = kept.stream.flow, kept.offset, kept.kind
        if kept.slot < 0:
            if not self._hand_out_bytes(remote, share.frame_bytes(kept), flow, offset, kind):
                share.send_again(kept)
                return False
        else:
            self._hand_out_slot(remote, kept.slot, frame.HEADER_BYTES + kept.length, flow, offset, kind)
        share.on_sent(kept, remote.handed, clock_us())
        return True

    def _hand_out_bytes(self, remote: RemoteStripes, data: bytes, flow: int, offset: int, kind: int) -> bool:
        memory = self.context.memory
        slot = memory.copy_in(data, Side.EGRESS)
        if slot < 0:
            memory.starved = True
            return False
        self._hand_out_slot(remote, slot, len(data), flow, offset, kind)
        memory.arena.release(slot)
        return True

    def _hand_out_slot(self, remote: RemoteStripes, slot: int, length: int, flow: int, offset: int, kind: int) -> None:
        self.context.memory.arena.lend(slot, remote.peer.slot)
        remote.outstanding += 1
        remote.peer.send(
            mesh.OUT,
            tunnel=self.tunnel.index,
            slot=slot,
            session=self.number,
            flow=flow,
            offset=offset,
            length=length,
            carrier=self.key_index,
            value=kind,
        )

    # Applications

    def choose_owner(self) -> Owner | None:
        """The other end's worker for a new stream: each that our own stripes lead to in turn, or one that another's
        do."""
        if self.far_draining:
            return None
        if self._owners:
            self._next_owner += 1
            return self._owners[self._next_owner % len(self._owners)]
        for remote in self.remotes.values():
            if remote.far is not None:
                return remote.far
        return None

    def on_readable(self, endpoint: Endpoint) -> None:
        """See EndpointOwner."""
        self.share.on_readable(endpoint.stream)
        self.pump()
        if endpoint.stream.readable:
            endpoint.pause()

    def on_consumed(self, endpoint: Endpoint, length: int, frames: int) -> None:
        """See EndpointOwner."""
        self.share.on_consumed(endpoint.stream, length, frames, clock_us())
        if self.share.acks:
            self.arm_pump()

    def on_application_reset(self, endpoint: Endpoint) -> None:
        """See EndpointOwner."""
        self.share.reset_stream(endpoint.stream, frame.Reason.APPLICATION)
        endpoint.close()
        self.arm_pump()

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
        self.arm_pump()

    def release(self, slot: int) -> None:
        """See Shell."""
        self.context.memory.release(slot)

    def discard(self, piece: Any) -> None:
        """See Shell."""
        self.context.memory.free(piece)

    # Time

    def _arm_ack_timer(self) -> None:
        due_us = self.share.next_due_us
        if due_us is None:
            return
        if self._ack_timer is not None:
            self._ack_timer.close()
        self._ack_timer = self.context.loop.timer(max(due_us - clock_us(), 0) / 1e6)
        self._ack_timer_active = True
        self._ack_timer.start(self._on_acks_due)

    def _on_acks_due(self) -> None:
        self._ack_timer_active = False
        self.share.on_acks_due(clock_us())
        self.pump()

    def on_time(self, now_us: int) -> None:
        """Every 100 ms: meters, liveness, stalls."""
        rtt_us = MIN_RTT_US
        for stripe in list(self.stripes.values()):
            if stripe.used:
                stripe.used = False
                stripe.sample(self.tunnel.frame_max_bytes)
                if stripe.info is not None:
                    rtt_us = max(rtt_us, stripe.info.rtt_us)
            self._check_alive(stripe, now_us)
        if rtt_us > MIN_RTT_US:
            self.share.rtt_us = rtt_us
        self.share.on_time(now_us)
        if self.share.has_work or self._guests:
            self.pump()

    def _check_alive(self, stripe: Stripe, now_us: int) -> None:
        silent_us = now_us - stripe.received_us
        if silent_us > DEAD_US:
            stripe.fail("silent")
        elif silent_us > KEEPALIVE_US and not stripe.pinged_us:
            stripe.pinged_us = now_us
            stripe.send(frame.pack(frame.PING, 0, 0, 0, now_us))
            stripe.flush()

    def expired(self, now_us: int) -> bool:
        """Whether no stripe has been up anywhere for longer than the resume timeout."""
        since = self.outage_since_us
        return since is not None and now_us - since > self.tunnel.resume_timeout_s * 1e6

    def send_drain(self) -> None:
        """Tell the other end that this one opens and takes no more streams."""
        self.share.draining = True
        for stripe in self.stripes.values():
            stripe.send(frame.pack(frame.DRAIN, 0, 0, 0, 0))
            stripe.flush()

    def close(self, reason: int) -> None:
        """Reset what is left and close the stripes."""
        self.share.abandon(reason)
        for stripe in list(self.stripes.values()):
            stripe.fail("session closed")
        self._return_guests()
        if self._ack_timer is not None:
            self._ack_timer.close()
            self._ack_timer = None
            self._ack_timer_active = True

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
