"""What becomes of a session's frames that a stripe of this worker has opened, or another worker has handed in.

1. `receive`: a frame of a stream that this worker owns goes to the share; a small one that is the next of its stream
   goes to the application at once (`pass_on`);
2. `hand_in`: a frame of another worker's stream is lent to that worker in its slot;
3. `on_handed_in`: there it comes out of the mesh.
"""

import logging

from workers.core import frame
from workers.core.errors import RemoteProtocolError
from workers.core.session import SessionShare
from workers.io import mesh
from workers.io.context import Context, clock_us
from workers.io.endpoint import Endpoint
from workers.io.exchange import Exchange
from workers.io.memory import SCRATCH_BYTES, Piece
from workers.io.mesh import Peer
from workers.io.stripe import Stripe
from workers.settings import StripeTunnel
from workers.shm.arena import Side

log = logging.getLogger("forwarder.session")


class Ingress:
    """One worker's receiving part of a session."""

    def __init__(self, context: Context, tunnel: StripeTunnel, share: SessionShare, exchange: Exchange) -> None:
        self._context = context
        self._memory = context.memory
        self.tunnel = tunnel
        self._share = share
        self._exchange = exchange

    def receive(self, header: frame.Header, slot: int, view: memoryview, now_us: int) -> None:
        """Take a frame for this worker, in `slot` or (-1) in a buffer that is used again.

        Raises RemoteProtocolError.
        """
        memory = self._memory
        payload = view[frame.HEADER_BYTES :]
        if header.kind != frame.DATA:
            if slot >= 0:
                memory.arena.release(slot)
            self._share.receive(header, payload, None, 0, now_us)
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

    def pass_on(self, header: frame.Header, view: memoryview, now_us: int, alone: bool) -> bool:
        """Give the payload of a small DATA frame to the application without keeping it, if it is the next and nothing
        is queued; False, and nothing has changed, if not. alone: nothing else came along with it."""
        share, payload = self._share, view[frame.HEADER_BYTES :]
        length = len(payload)
        stream = share.stream_of_next(header, length)
        endpoint: Endpoint | None = stream.endpoint if stream is not None else None
        sent = endpoint.send_now(payload) if endpoint is not None else None
        if stream is None or endpoint is None or sent is None:
            return False
        if alone:
            self._context.give_way()  # the application has it before it is entered in the books
        share.on_next(stream, length, now_us)
        if sent < 0:
            endpoint.fail()
            return True
        if sent == length:
            share.on_consumed(stream, length, 1, now_us)
            return True
        slot = self._memory.copy_in(payload, Side.INGRESS)
        if slot < 0:
            endpoint.fail()  # credit had set memory aside for it: cannot be
            return True
        piece = Piece(None, slot, self._memory.arena.view(slot, length))
        piece.view = piece.view[sent:]
        endpoint.deliver(piece)
        endpoint.flush()
        return True

    def _receive(self, header: frame.Header, piece: Piece | None, length: int, now_us: int) -> None:
        kept = False
        try:
            kept = self._share.receive(header, None, piece, length, now_us)
        finally:
            if not kept and piece is not None:
                self._memory.free(piece)

    def hand_in(
        self, stripe: Stripe, worker: int, header: frame.Header, slot: int, view: memoryview, now_us: int
    ) -> None:
        """Give a frame to the worker that owns its stream."""
        self._exchange.last_guest_us = now_us
        memory = self._memory
        peer = self._context.mesh.peers.get(worker)
        if peer is None:
            if slot >= 0:
                memory.arena.release(slot)
            is_last = header.kind == frame.RESET or (header.kind == frame.ACK and header.flags & frame.RESET_SEEN)
            if not is_last:
                self._share.answer(frame.pack(frame.RESET, 0, 0, header.flow, frame.Reason.WORKER_GONE))
            return
        length = len(view)
        if slot < 0:
            slot = memory.copy_in(view, Side.INGRESS)
            if slot < 0:
                memory.dropped_frames += 1
                return
        generation = stripe.path.generation if stripe.path is not None else 0
        origin = stripe.index << 32 | generation
        self._exchange.hand_in(peer, slot, length, origin, now=not stripe.more)
        memory.arena.release(slot)

    def on_handed_in(self, peer: Peer, slot: int, length: int, origin: int) -> None:
        """A frame of ours comes from another worker. `origin`: the index and generation of its stripe, which is closed
        if the frame breaks the protocol.
        """
        try:
            view = peer.view(slot, length)
            try:
                header = frame.unpack(view)
            except RemoteProtocolError:
                peer.return_slot(slot)
                raise
            payload = view[frame.HEADER_BYTES :]
            if header.kind == frame.DATA and length <= SCRATCH_BYTES and self.pass_on(header, view, clock_us(), False):
                peer.return_slot(slot, lazy=True)
            elif header.kind != frame.DATA or not payload:
                body = bytes(payload)
                peer.return_slot(slot, lazy=True)
                self._share.receive(header, body, None, 0, clock_us())
            else:
                self._receive(header, Piece(peer, slot, payload), len(payload), clock_us())
        except RemoteProtocolError as error:
            log.debug("frame from the mesh refused tunnel=%s reason=%s", self.tunnel.name, error)
            self._exchange.tell(peer, mesh.BROKEN, carrier=origin >> 32, value=origin & 0xFFFFFFFF)
        except ValueError as error:
            log.debug("descriptor refused tunnel=%s reason=%s", self.tunnel.name, error)
