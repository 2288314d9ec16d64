"""The server's end of a stripe tunnel in one worker: stripes are accepted here, streams go to the target.

Who is accepted is a stranger (`workers.io.pending`) until he has proven himself.
"""

import errno
import logging
import socket
import struct
from collections.abc import Callable

import gevent

from workers.core import frame
from workers.core.errors import RemoteProtocolError
from workers.core.frame import Reason
from workers.core.handshake import Hello
from workers.core.stream import Stream
from workers.io import sockets, target
from workers.io.accept import SHORTAGES, Acceptor
from workers.io.context import Context, session_number
from workers.io.endpoint import Endpoint
from workers.io.establish import make_stripe
from workers.io.pending import Pending, Strangers
from workers.io.session import Session
from workers.io.stripe import Stripe
from workers.io.tally import add_session
from workers.settings import StripeServerTunnel
from workers.shm.totals import TunnelTotals
from workers.status import TunnelStatus

ACCEPT_BURST = 8
"""Strangers taken in one turn: many share its cost, and stripes wait for half a millisecond at most."""
REASONS = {errno.ECONNREFUSED: Reason.REFUSED, errno.EMFILE: Reason.OVERLOAD}
MAX_STRIPES = 4096
"""What a session may have: the most that a client's somaxconn can be."""
HANDOVER = struct.Struct("=H")
"""In front of the bytes of message 1 in an inbox: the tunnel's index. The connection comes along as SCM_RIGHTS."""

log = logging.getLogger("forwarder.server")


class ServerSession(Session):
    """A session whose streams are connected to the target. `warn` logs, now and then, why that is not possible."""

    warn: Callable[[str], None]

    def opened(self, stream: Stream) -> None:
        """See Shell."""
        endpoint = Endpoint(self, stream, self.context.memory, self.context.watch)
        stream.endpoint = endpoint
        gevent.spawn(self._connect, stream, endpoint)

    def _connect(self, stream: Stream, endpoint: Endpoint) -> None:
        tunnel = self.tunnel
        assert isinstance(tunnel, StripeServerTunnel)
        try:
            sock = target.connect(tunnel.target, tunnel.connect_timeout_s)
        except OSError as error:
            if error.errno in SHORTAGES:
                self.warn(f"no connection to the target: {error.strerror}")
            else:
                log.info("target refuses tunnel=%s target=%s reason=%s", tunnel.name, tunnel.target, error)
            self.share.reset_stream(stream, REASONS.get(error.errno or 0, Reason.UNREACHABLE))
            self.egress.pump()
            return
        if endpoint.closed:
            sock.close()
            return
        endpoint.attach(self.context.loop, sock)
        self.on_turn_end()


class ServerTunnel:
    """Stripes come in by `listeners`, which all workers share, and go to the worker of their index."""

    def __init__(
        self,
        context: Context,
        tunnel: StripeServerTunnel,
        listeners: list[socket.socket],
        inboxes: dict[int, socket.socket],
    ) -> None:
        self.context = context
        self.tunnel = tunnel
        self.name = tunnel.name
        self.by_number: dict[int, ServerSession] = {}
        self._inboxes = inboxes
        self._departing = False
        self._strangers = Strangers(self, tunnel.handshake_timeout_s)
        self._past = TunnelTotals(tunnel.name, "stripe")
        self._acceptor = Acceptor(context.loop, tunnel.name, listeners, self._on_connection, burst=ACCEPT_BURST)

    def sessions(self) -> list[Session]:
        """The sessions of this tunnel."""
        return list(self.by_number.values())

    def find(self, number: int) -> Session | None:
        """The session of that number."""
        return self.by_number.get(number)

    # Unauthenticated

    def _on_connection(self, sock: socket.socket, address: tuple[str, int]) -> None:
        if sockets.is_of_reserve(sock):
            self._acceptor.warn("few descriptors are left")
            if not self._strangers.forget_oldest():
                sockets.close_with_reset(sock)
                return
            reserved, sock = sock, sock.dup()  # to the number just freed: numbers tell what is left
            reserved.close()
        self._strangers.admit(sock, sockets.plain_host(address[0]))
        if not self._strangers.has_time:
            self._acceptor.pause()

    def find_key(self, key_id: str) -> tuple[int, bytes] | None:
        """The index and secret of a key."""
        for index, key in enumerate(self.context.settings.keys):
            if key.key_id == key_id and not key.revoked:
                return index, key.secret
        return None

    def check_hello(self, pending: Pending, hello: Hello) -> bool | None:
        """See Door."""
        handshake = pending.handshake
        self._check_permission(handshake.key_index, hello)
        owner = self.context.own.slot_of(hello.carrier_index)
        if owner != self.context.slot and not self.context.retiring and self._hand_over(pending, owner):
            return None
        return session_number(handshake.key_id, self.tunnel.name, hello.session_id) in self.by_number

    def _check_permission(self, key_index: int, hello: Hello) -> None:
        allowed = self.context.settings.keys[key_index].tunnels
        if hello.tunnel != self.tunnel.name or (allowed is not None and hello.tunnel not in allowed):
            raise RemoteProtocolError(f"tunnel {hello.tunnel!r} is not for this key here")
        if hello.carrier_index >= MAX_STRIPES:
            raise RemoteProtocolError(f"stripe {hello.carrier_index} of at most {MAX_STRIPES}")

    def _hand_over(self, pending: Pending, worker: int) -> bool:
        """Give the connection and its first bytes to the worker that owns it; False if that fails."""
        inbox = self._inboxes.get(worker)
        if inbox is None:
            return False
        message = HANDOVER.pack(self.tunnel.index) + pending.handshake.raw
        try:
            socket.send_fds(inbox, [message], [pending.sock.fileno()])
        except OSError as error:
            self._acceptor.warn(f"worker {worker} takes no stripe that is handed over: {error}")
            return False
        self._strangers.release(pending)
        pending.sock.close()
        return True

    def take_over(self, sock: socket.socket, received: bytes) -> None:
        """A connection that another worker accepted for us, and its first bytes."""
        try:
            address = sockets.plain_host(sock.getpeername()[0])
        except OSError:
            sock.close()
            return
        if sockets.is_of_reserve(sock):
            self._acceptor.warn("few descriptors are left")
            sockets.close_with_reset(sock)
            return
        self._strangers.admit(sock, address, received)

    # Authenticated

    def on_proven(self, pending: Pending, hello: Hello, first: memoryview, leftover: bytes) -> None:
        """See Door. The connection is a stripe of its session."""
        handshake = pending.handshake
        number = session_number(handshake.key_id, self.tunnel.name, hello.session_id)
        session = self.create(number, handshake.key_index)
        if session is None:
            if not self._departing and not self.context.draining:
                self._acceptor.warn(f"too many sessions, {pending.address} is refused")
            sockets.close_with_reset(pending.sock)
            return
        if hello.carrier_index not in session.stripes and self._is_full():
            self._acceptor.warn("few descriptors are left for stripes")
            sockets.close_with_reset(pending.sock)
            return
        stripe = self._make_stripe(pending, hello.carrier_index)
        if stripe is None:
            return
        stripe.owner, stripe.gone_told = session, pending.gone_told
        session.peer_text = pending.address
        session.far_end.on_roster(
            {int(slot): serial for slot, serial in hello.roster}, hello.boot_id, is_first=not session.liveness.total_up
        )
        try:
            session.on_frame(stripe, -1, first)  # its answer goes first: a larger record would not be believed yet
        except RemoteProtocolError as error:
            stripe.fail(str(error))
            return
        session.add_stripe(stripe)
        stripe.start(session, leftover)
        session.on_turn_end()

    def _is_full(self) -> bool:
        most = sockets.stripes_allowed(len(self.context.settings.server_tunnels))
        return sum(len(session.stripes) for session in self.by_number.values()) >= most

    def _make_stripe(self, pending: Pending, index: int) -> Stripe | None:
        """None, and the connection is closed, if the peer has broken it."""
        assert pending.keys is not None
        try:
            return make_stripe(self.context, self.tunnel, pending.sock, index, pending.keys)
        except OSError as error:
            self._acceptor.warn(f"cannot set up a stripe: {error}")
            pending.sock.close()
            return None

    def create(self, number: int, key_index: int) -> ServerSession | None:
        """The session of that number, new if need be; None if there are too many."""
        session = self.by_number.get(number)
        is_closed = self._departing or self.context.draining
        if session is None and self._has_place(key_index) and not is_closed:
            session = ServerSession(
                self.context, self.tunnel, frame.SERVER, number, key_index, max_streams=self.tunnel.max_streams
            )
            session.warn = self._acceptor.warn
            self.by_number[number] = session
            if self.context.retiring:
                session.send_move()
        return session

    def _has_place(self, key_index: int) -> bool:
        """Where there are several keys, none gets more sessions than it leaves free: one cannot take all."""
        left = self.tunnel.max_sessions - len(self.by_number)
        keys = len(self.context.settings.keys)
        if keys == 1 or key_index >= keys:
            return left > 0 and key_index < keys
        held = sum(session.key_index == key_index for session in self.by_number.values())
        return left > held

    def on_time(self, now_us: int) -> None:
        """Every 100 ms."""
        self._strangers.on_time(now_us)
        if self._strangers.has_time:
            self._acceptor.resume()
        for number, session in list(self.by_number.items()):
            session.on_time(now_us)
            if session.liveness.expired(now_us):
                self._end_session(number, session)

    def _end_session(self, number: int, session: ServerSession) -> None:
        if session.share.streams:
            log.warning("session lost tunnel=%s streams=%d", self.tunnel.name, len(session.share.streams))
        session.close(Reason.TIMEOUT)
        del self.by_number[number]
        add_session(self._past, session)
        self._past = self._past.past()

    def update(self, tunnel: StripeServerTunnel, listeners: list[socket.socket]) -> None:
        """New settings, for what is opened from now on. `listeners`: in place of the former ones, if there are any."""
        self.tunnel = tunnel
        self._strangers.use(tunnel.handshake_timeout_s)
        for session in self.by_number.values():
            session.use(tunnel)
            session.share.max_streams = tunnel.max_streams
        if listeners:
            self._acceptor.replace(listeners)

    def depart(self) -> None:
        """The tunnel is to go: accept nothing more, and have the clients open nothing more."""
        self._departing = True
        self.stop_accepting()

    def begin(self) -> None:
        """This worker is in charge now; it has accepted all along."""

    def retire(self) -> None:
        """Others accept; clients are asked to replace the stripes here."""
        self._acceptor.close()
        for session in self.by_number.values():
            session.send_move()

    @property
    def is_busy(self) -> bool:
        """Whether somebody has come who is not served yet."""
        return len(self._strangers) > 0

    def stop_accepting(self) -> None:
        """Part of draining."""
        self._acceptor.close()
        for session in self.by_number.values():
            session.send_drain()

    def close(self) -> None:
        """Reset what is left and close everything."""
        self._acceptor.close()
        self._strangers.close()
        for number, session in list(self.by_number.items()):
            session.close(Reason.SHUTDOWN)
            del self.by_number[number]
            add_session(self._past, session)

    def status(self, now_us: int) -> TunnelStatus:
        """This worker's part of the tunnel."""
        shares = [session.share for session in self.by_number.values()]
        refused = sum(share.refused_streams for share in shares)
        keys = self.context.settings.keys
        return TunnelStatus(
            name=self.tunnel.name,
            mode="stripe",
            state="draining" if self._departing or self.context.is_leaving else "up",
            bytes_in=self._past.bytes_in + sum(share.bytes_in for share in shares),
            bytes_out=self._past.bytes_out + sum(share.bytes_out for share in shares),
            flows_open=sum(len(share.streams) for share in shares),
            flows_total=self._past.flows_total + refused + sum(share.total_streams for share in shares),
            flows_reset=self._past.flows_reset + refused + sum(share.reset_streams for share in shares),
            sessions=[
                session.status(keys[session.key_index].key_id, session.liveness.total_up, now_us)
                for session in self.by_number.values()
            ],
        )

    def totals(self) -> TunnelTotals:
        """The same for statistics."""
        totals = self._past.past()
        for session in self.by_number.values():
            add_session(totals, session)
        totals.handshakes_refused = self._strangers.refused
        totals.strangers = len(self._strangers)
        return totals

    def count_open(self) -> dict[str, int]:
        """What must be level when nothing goes on."""
        return {"pending": len(self._strangers), "refused": self._strangers.refused}
