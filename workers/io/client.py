"""The client's end of a stripe tunnel in one worker: applications are accepted here and become streams."""

import logging
import os
import socket
from collections import deque

from workers.core import frame
from workers.core.session import Owner
from workers.io import mesh, sockets
from workers.io.accept import Acceptor
from workers.io.autosize import AutoSize
from workers.io.context import Context, clock_us, session_number
from workers.io.dial import Dialler
from workers.io.endpoint import Endpoint
from workers.io.mesh import Descriptor, Peer
from workers.io.session import Session
from workers.io.stripe import Stripe
from workers.io.tally import add_session
from workers.settings import Key, StripeClientTunnel
from workers.shm.totals import TunnelTotals
from workers.status import TunnelStatus

MAX_WAITING = 4096
"""Applications that wait for the first stripe; more are refused."""
FULL_US = 1_000_000
"""So long after one was refused, workers without stripes accept as well."""

log = logging.getLogger("forwarder.client")


class ClientSession(Session):
    """A session whose lost stripes are dialled again."""

    dialler: Dialler | None = None
    auto: AutoSize | None = None

    def on_stripe_lost(self, stripe: Stripe, why: str) -> None:
        """See StripeOwner."""
        was_ours = self.stripes.get(stripe.index) is stripe
        super().on_stripe_lost(stripe, why)
        if was_ours and self.dialler is not None:
            if stripe.in_order:
                self.dialler.on_moved(stripe.index)
            else:
                self.dialler.on_stripe_lost(stripe.index, why)

    def _on_moved(self, stripe: Stripe) -> None:
        """See Session: a server's worker is on its way out."""
        self._on_stripes_changed()
        if self.dialler is not None:
            self.dialler.on_moved(stripe.index)

    def on_peer_joined(self, peer: Peer) -> None:
        """See Session."""
        super().on_peer_joined(peer)
        if self.auto is not None:
            self.auto.on_peer_joined(peer)

    def on_descriptor(self, peer: Peer, descriptor: Descriptor) -> None:
        """See Session."""
        kind, _, _, _, _, _, _, _, _, value, _ = descriptor
        if kind not in (mesh.LOAD, mesh.POOL):
            super().on_descriptor(peer, descriptor)
            return
        if kind == mesh.LOAD and not value:  # it has streams: the others are about bytes, those of PINGs included
            self.exchange.last_guest_us = clock_us()
        if self.auto is not None:
            self.auto.on_descriptor(kind, value)


class ClientTunnel:
    """Applications come in by `listeners`, which all workers share."""

    def __init__(
        self, context: Context, tunnel: StripeClientTunnel, key: Key, session_id: int, listeners: list[socket.socket]
    ) -> None:
        self.context = context
        self.tunnel = tunnel
        self.name = tunnel.name
        self._key = key
        number = session_number(key.key_id, tunnel.name, session_id)
        self.session = ClientSession(context, tunnel, frame.CLIENT, number, 0)
        self._dialler = Dialler(context, tunnel, key, self.session, session_id, os.urandom)
        self.session.dialler = self._dialler
        self.session.liveness.on_stale = self._dialler.on_stale
        self._size()
        self._waiting: deque[tuple[int, socket.socket]] = deque()
        self._refused = 0
        self._refused_us = -FULL_US
        self._told_busy_us = 0
        self._acceptor = Acceptor(context.loop, tunnel.name, listeners, self._on_application)
        self._departing = False

    def _size(self) -> None:
        """How many stripes there are to be, as far as that does not turn out by itself."""
        tunnel, dialler, auto = self.tunnel, self._dialler, self.session.auto
        self.session.auto = None
        if tunnel.auto:
            size = auto.wanted if auto is not None else None
            self.session.auto = AutoSize(self.context, self.session, tunnel.somaxconn, dialler.resize, size)
        else:
            dialler.resize(tunnel.somaxconn)

    def sessions(self) -> list[Session]:
        """The sessions of this tunnel."""
        return [self.session]

    def find(self, number: int) -> Session | None:
        """The session of that number."""
        return self.session if number == self.session.number else None

    def create(self, number: int, key_index: int) -> Session | None:
        """A client has its session from the start."""
        return None

    def _on_application(self, sock: socket.socket, _address: object) -> None:
        if sockets.is_of_reserve(sock):
            self._refuse(sock)
            self._acceptor.warn("few descriptors are left")
            return
        try:
            sockets.prepare_application(sock)
        except OSError:
            sock.close()
            return
        self._dialler.on_stream_opened()
        owner = None if self._waiting else self.session.choose_owner()
        if owner is not None:
            self._open(sock, owner)
        elif len(self._waiting) < MAX_WAITING:
            self._waiting.append((clock_us(), sock))
        else:
            self._refuse(sock)
            self._acceptor.warn("too many wait for a stripe")

    def _refuse(self, sock: socket.socket) -> None:
        self._refused += 1
        self._refused_us = clock_us()
        sockets.close_with_reset(sock)

    def _open(self, sock: socket.socket, owner: Owner) -> None:
        session = self.session
        stream = session.share.open_stream(owner, clock_us())
        if stream is None:
            self._refuse(sock)
            self._acceptor.warn("there is no room for more streams")
            return
        endpoint = Endpoint(session, stream, self.context.memory, self.context.watch)
        stream.endpoint = endpoint
        session.share.on_readable(stream)
        endpoint.attach(self.context.loop, sock)
        session.egress.pump()

    def on_time(self, now_us: int) -> None:
        """Every 100 ms."""
        is_short = self._acceptor.is_short or self.session.share.pool.is_short
        self.session.tell_full(is_short or now_us - self._refused_us < FULL_US)
        if self._is_others_turn:
            self._acceptor.pause()
        else:
            self._acceptor.resume()
        waiting = self._waiting
        while waiting:
            owner = self.session.choose_owner()
            if owner is None:
                break
            self._open(waiting.popleft()[1], owner)
        limit_us = self.tunnel.connect_timeout_s * 1e6
        while waiting and now_us - waiting[0][0] > limit_us:
            self._refuse(waiting.popleft()[1])
        if self.session.auto is not None:
            self.session.auto.on_time(now_us)
        if self.session.share.streams and now_us - self._told_busy_us > self.tunnel.idle_timeout_s * 1e6 / 4:
            self._told_busy_us = now_us
            self.session.exchange.tell_all(mesh.LOAD)
        self._dialler.on_time(now_us)
        self.session.on_time(now_us)
        if self.session.liveness.expired(now_us) and self.session.share.streams:
            log.warning("session lost tunnel=%s streams=%d", self.tunnel.name, len(self.session.share.streams))
            self.session.share.abandon(frame.Reason.TIMEOUT)

    @property
    def _is_others_turn(self) -> bool:
        """Whether applications are for workers that have stripes, since there are none here: a round trip across the
        mesh takes twice as long."""
        return not self.session.stripes and self.session.exchange.is_wanted_elsewhere

    def update(self, tunnel: StripeClientTunnel, key: Key, listeners: list[socket.socket]) -> None:
        """New settings, for what is opened from now on. `listeners`: in place of the former ones, if there are any."""
        before, self.tunnel = self.tunnel, tunnel
        self._key = key
        self.session.use(tunnel)
        self._dialler.use(tunnel, key)
        if (tunnel.auto, tunnel.somaxconn) != (before.auto, before.somaxconn):
            self._size()
        if listeners:
            self._acceptor.resume()  # whoever waits at the former ones is taken by this worker, too
            self._acceptor.replace(listeners)

    def depart(self) -> None:
        """The tunnel is to go: accept nothing more. Who waits is still served."""
        self._departing = True
        self._acceptor.close()

    def begin(self) -> None:
        """This worker is in charge now."""
        self._dialler.resume()

    def retire(self) -> None:
        """Others accept, and dial. Who waits here is still served."""
        self._acceptor.close()
        self._dialler.stop()

    @property
    def is_busy(self) -> bool:
        """Whether somebody waits here."""
        return bool(self._waiting)

    def stop_accepting(self) -> None:
        """Part of draining."""
        self._acceptor.close()
        while self._waiting:
            self._refuse(self._waiting.popleft()[1])

    def close(self) -> None:
        """Reset what is left and close everything."""
        self.stop_accepting()
        self._dialler.stop()
        self.session.close(frame.Reason.SHUTDOWN)

    def status(self, now_us: int) -> TunnelStatus:
        """This worker's part of the tunnel."""
        share = self.session.share
        up, wanted = len(self.session.stripes), self._dialler.wanted
        is_leaving = self._departing or self.context.is_leaving
        state = "draining" if is_leaving else "up" if up >= wanted else "degraded" if up else "connecting"
        return TunnelStatus(
            name=self.tunnel.name,
            mode="stripe",
            state=state,
            bytes_in=share.bytes_in,
            bytes_out=share.bytes_out,
            flows_open=len(share.streams),
            flows_total=share.total_streams + self._refused,
            flows_reset=share.reset_streams + self._refused,
            sessions=[self.session.status(self._key.key_id, self._dialler.wanted_of_all, now_us)],
        )

    def totals(self) -> TunnelTotals:
        """The same for statistics."""
        totals = TunnelTotals(self.tunnel.name, "stripe")
        add_session(totals, self.session)
        totals.flows_total += self._refused
        totals.flows_reset += self._refused
        totals.flows_refused += self._refused
        stripes, dialler = totals.kind("stripe"), self._dialler
        stripes.dialled, stripes.failed, stripes.wanted = dialler.dialled, dialler.failed, dialler.wanted
        return totals

    def count_open(self) -> dict[str, int]:
        """What must be level when nothing goes on."""
        return {"waiting": len(self._waiting), "dialling": self._dialler.dialling}
