"""The server's end of a stripe tunnel in one worker: stripes are accepted and authenticated here, streams go to the
target.

An accepted connection is `Pending` until its first sealed record opens: message 1 may be a replay, so until then
nothing is kept of it. Whoever fails gets no byte: reading stops, and the connection is reset at the handshake
deadline.
"""

import errno
import logging
import os
import socket
import struct
from collections import OrderedDict

import gevent

from workers.core import frame
from workers.core.errors import RemoteProtocolError
from workers.core.frame import Reason
from workers.core.handshake import MESSAGE_MAX, Hello, Mode, ServerHandshake, Welcome
from workers.core.record import LENGTH, RECORD_HEADER, TAG, Opener, Sealer
from workers.core.stream import Stream
from workers.io import sockets, target
from workers.io.accept import Acceptor
from workers.io.context import Context, clock_us, session_number
from workers.io.endpoint import Endpoint
from workers.io.establish import SUITES, make_stripe, record_keys
from workers.io.session import Session
from workers.io.stripe import Stripe
from workers.settings import StripeServerTunnel
from workers.status import TunnelStatus

READ = 1
MAX_PENDING = 1024
"""Unauthenticated connections a tunnel and worker; past it the oldest goes."""
MAX_PENDING_PER_ADDRESS = 256
REASONS = {errno.ECONNREFUSED: Reason.REFUSED, errno.EMFILE: Reason.OVERLOAD}
MAX_STRIPES = 4096
"""What a session may have: the most that a client's somaxconn can be."""
HANDOVER = struct.Struct("=H")
"""In front of the bytes of message 1 in an inbox: the tunnel's index. The connection comes along as SCM_RIGHTS."""

log = logging.getLogger("forwarder.server")


class Pending:
    """An accepted connection until its first sealed record opens."""

    __slots__ = (
        "_gone_told",
        "_handshake",
        "_hello",
        "_keys",
        "_received",
        "_tunnel",
        "_watcher",
        "address",
        "deadline_us",
        "sock",
    )

    def __init__(self, tunnel: "ServerTunnel", sock: socket.socket, address: str, deadline_us: int) -> None:
        self.sock = sock
        self.address = address
        self.deadline_us = deadline_us
        self._tunnel = tunnel
        self._hello: Hello | None = None
        self._keys: tuple[Sealer, Opener] | None = None
        self._gone_told = 0
        self._received = b""
        suite = SUITES[tunnel.context.settings.suite]
        self._handshake = ServerHandshake(tunnel.find_key, suite, Mode.STRIPE)
        self._watcher = tunnel.context.loop.io(sock.fileno(), READ)

    def start(self) -> None:
        """Begin to read."""
        self._watcher.start(self._on_readable)

    def _on_readable(self) -> None:
        try:
            data = self.sock.recv(MESSAGE_MAX + 1)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self.receive(data)
        else:
            self._tunnel.forget(self)

    def receive(self, data: bytes) -> None:
        """Take bytes of message 1, and after it of the first record."""
        try:
            if self._keys is not None:
                self._take_record(self._keys, data)
            else:
                hello = self._handshake.receive(data)
                if hello is not None:
                    self._on_hello(hello)
        except RemoteProtocolError as error:
            self._fail(str(error))

    def _fail(self, why: str) -> None:
        """Say nothing and read nothing more; the deadline resets the connection."""
        self._watcher.stop()
        self._tunnel.refused += 1
        log.debug("handshake refused tunnel=%s peer=%s reason=%r", self._tunnel.tunnel.name, self.address, why)

    def _on_hello(self, hello: Hello) -> None:
        tunnel = self._tunnel
        context = tunnel.context
        tunnel.check_permission(self._handshake.key_index, hello)
        owner = hello.carrier_index % context.workers
        if owner != context.slot and tunnel.hand_over(self, owner, self._handshake.raw):
            return
        number = session_number(self._handshake.key_id, tunnel.tunnel.name, hello.session_id)
        welcome = Welcome(context.boot_id, number in tunnel.by_number, context.slot, context.roster_ids())
        answer = self._handshake.welcome(welcome, ephemeral_private=os.urandom(32))
        self._hello = hello
        self._keys = record_keys(context, self._handshake.split())
        self._gone_told = len(context.gone)
        try:
            self.sock.send(answer)
        except OSError as error:
            raise RemoteProtocolError(f"cannot answer: {error}") from None

    def _take_record(self, keys: tuple[Sealer, Opener], data: bytes) -> None:
        """Until a record has opened it is at most 1 KiB long, and so is what waits here."""
        received = self._received = self._received + data
        if len(received) < RECORD_HEADER:
            return
        (length,) = LENGTH.unpack_from(received)
        keys[1].check_length(length)
        end = RECORD_HEADER + length
        if len(received) < end:
            return
        first = memoryview(bytearray(length - TAG))
        keys[1].open_into(received[RECORD_HEADER:end], received[:RECORD_HEADER], first)
        self._join(keys, first, received[end:])

    def _join(self, keys: tuple[Sealer, Opener], first: memoryview, leftover: bytes) -> None:
        """The first record opened, so the client is genuine: the connection is a stripe of its session."""
        hello, tunnel = self._hello, self._tunnel
        assert hello is not None
        tunnel.on_proven(self)
        session = tunnel.session_for(self._handshake.key_index, self._handshake.key_id, hello.session_id)
        if session is None:
            if not tunnel.context.draining:
                tunnel.warn(f"too many sessions, {self.address} is refused")
            sockets.close_with_reset(self.sock)
            return
        stripe = tunnel.make_stripe(self.sock, hello.carrier_index, keys)
        if stripe is None:
            return
        stripe.owner, stripe.gone_told = session, self._gone_told
        session.peer_text = self.address
        session.on_far_roster({int(slot): serial for slot, serial in hello.roster}, hello.boot_id)
        try:
            session.on_frame(stripe, -1, first)  # its answer goes first: a larger record would not be believed yet
        except RemoteProtocolError as error:
            stripe.fail(str(error))
            return
        session.add_stripe(stripe)
        stripe.start(session, leftover)
        session.on_turn_end()

    def part(self) -> None:
        """The socket now belongs to another."""
        self._watcher.stop()
        self._watcher.close()


class ServerSession(Session):
    """A session whose streams are connected to the target."""

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
        self.by_number: dict[int, ServerSession] = {}
        self.refused = 0
        self._inboxes = inboxes
        self._pending: OrderedDict[Pending, None] = OrderedDict()
        self._per_address: dict[str, int] = {}
        self._past: list[int] = [0, 0, 0, 0]
        self._acceptor = Acceptor(context.loop, tunnel.name, listeners, self._on_connection)

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
            if not self._pending:
                sockets.close_with_reset(sock)
                return
            self.forget(next(iter(self._pending)))
            reserved, sock = sock, sock.dup()  # to the number just freed: numbers tell what is left
            reserved.close()
        sock.setblocking(False)
        self.admit(sock, str(address[0]).removeprefix("::ffff:")).start()

    def admit(self, sock: socket.socket, address: str) -> Pending:
        """Take an accepted connection in; the oldest unauthenticated one goes if there are too many."""
        deadline_us = clock_us() + int(self.tunnel.handshake_timeout_s * 1e6)
        pending = Pending(self, sock, address, deadline_us)
        if self._per_address.get(address, 0) >= MAX_PENDING_PER_ADDRESS:
            self.forget(next(each for each in self._pending if each.address == address))
        elif len(self._pending) >= MAX_PENDING:
            self.forget(next(iter(self._pending)))
        self._pending[pending] = None
        self._per_address[address] = self._per_address.get(address, 0) + 1
        return pending

    def on_proven(self, pending: Pending) -> None:
        """`pending` is a stripe, or lost, or handed over: it counts no more."""
        if pending in self._pending:
            del self._pending[pending]
            left = self._per_address[pending.address] - 1
            if left:
                self._per_address[pending.address] = left
            else:
                del self._per_address[pending.address]
            pending.part()

    def forget(self, pending: Pending) -> None:
        """Reset an unauthenticated connection."""
        self.on_proven(pending)
        sockets.close_with_reset(pending.sock)

    def find_key(self, key_id: str) -> tuple[int, bytes] | None:
        """The index and secret of a key."""
        for index, key in enumerate(self.context.settings.keys):
            if key.key_id == key_id:
                return index, key.secret
        return None

    def check_permission(self, key_index: int, hello: Hello) -> None:
        """Raise RemoteProtocolError unless that key may use this tunnel."""
        allowed = self.context.settings.keys[key_index].tunnels
        if hello.tunnel != self.tunnel.name or (allowed is not None and hello.tunnel not in allowed):
            raise RemoteProtocolError(f"tunnel {hello.tunnel!r} is not for this key here")
        if hello.carrier_index >= MAX_STRIPES:
            raise RemoteProtocolError(f"stripe {hello.carrier_index} of at most {MAX_STRIPES}")

    def hand_over(self, pending: Pending, worker: int, received: bytes) -> bool:
        """Give the connection and its first bytes to the worker that owns it; False if that fails."""
        inbox = self._inboxes.get(worker)
        if inbox is None:
            return False
        try:
            socket.send_fds(inbox, [HANDOVER.pack(self.tunnel.index) + received], [pending.sock.fileno()])
        except OSError as error:
            log.warning("cannot hand over tunnel=%s worker=%d reason=%s", self.tunnel.name, worker, error)
            return False
        self.on_proven(pending)
        pending.sock.close()
        return True

    def take_over(self, sock: socket.socket, received: bytes) -> None:
        """A connection that another worker accepted for us, and its first bytes."""
        sock.setblocking(False)
        try:
            address = str(sock.getpeername()[0]).removeprefix("::ffff:")
        except OSError:
            sock.close()
            return
        if sockets.is_of_reserve(sock):
            self._acceptor.warn("few descriptors are left")
            sockets.close_with_reset(sock)
            return
        pending = self.admit(sock, address)
        pending.start()
        pending.receive(received)

    # Authenticated

    def make_stripe(self, sock: socket.socket, index: int, keys: tuple[Sealer, Opener]) -> Stripe | None:
        """A stripe of a genuine client's connection; None, and it is closed, if the peer has broken it."""
        try:
            return make_stripe(self.context, self.tunnel, sock, index, keys)
        except OSError as error:
            self.warn(f"cannot set up a stripe: {error}")
            sock.close()
            return None

    def warn(self, reason: str) -> None:
        """Log why genuine clients' stripes are refused, now and then."""
        self._acceptor.warn(reason)

    def session_for(self, key_index: int, key_id: str, session_id: int) -> ServerSession | None:
        """The session that a stripe belongs to, new if need be; None if there are too many."""
        return self.create(session_number(key_id, self.tunnel.name, session_id), key_index)

    def create(self, number: int, key_index: int) -> ServerSession | None:
        """The session of that number, new if need be; None if there are too many."""
        session = self.by_number.get(number)
        if session is None and len(self.by_number) < self.tunnel.max_sessions and not self.context.draining:
            session = ServerSession(
                self.context, self.tunnel, frame.SERVER, number, key_index, max_streams=self.tunnel.max_streams
            )
            self.by_number[number] = session
        return session

    def on_time(self, now_us: int) -> None:
        """Every 100 ms."""
        self._acceptor.resume()
        pending = self._pending
        while pending:
            oldest = next(iter(pending))
            if oldest.deadline_us > now_us:
                break
            self.forget(oldest)
        for number, session in list(self.by_number.items()):
            session.on_time(now_us)
            if session.expired(now_us):
                self._end_session(number, session)

    def _end_session(self, number: int, session: ServerSession) -> None:
        if session.share.streams:
            log.warning("session lost tunnel=%s streams=%d", self.tunnel.name, len(session.share.streams))
        session.close(Reason.TIMEOUT)
        del self.by_number[number]
        share = session.share
        for index, value in enumerate((share.bytes_in, share.bytes_out, share.total_streams, share.reset_streams)):
            self._past[index] += value

    def stop_accepting(self) -> None:
        """Part of draining."""
        self._acceptor.close()
        for session in self.by_number.values():
            session.send_drain()

    def close(self) -> None:
        """Reset what is left and close everything."""
        self.stop_accepting()
        while self._pending:
            self.forget(next(iter(self._pending)))
        for number, session in list(self.by_number.items()):
            session.close(Reason.SHUTDOWN)
            del self.by_number[number]

    def status(self, now_us: int) -> TunnelStatus:
        """This worker's part of the tunnel."""
        shares = [session.share for session in self.by_number.values()]
        keys = self.context.settings.keys
        return TunnelStatus(
            name=self.tunnel.name,
            mode="stripe",
            state="draining" if self.context.draining else "up",
            bytes_in=self._past[0] + sum(share.bytes_in for share in shares),
            bytes_out=self._past[1] + sum(share.bytes_out for share in shares),
            flows_open=sum(len(share.streams) for share in shares),
            flows_total=self._past[2] + sum(share.total_streams for share in shares),
            flows_reset=self._past[3] + sum(share.reset_streams for share in shares),
            sessions=[
                session.status(keys[session.key_index].key_id, session.total_up, now_us)
                for session in self.by_number.values()
            ],
        )

    def count_open(self) -> dict[str, int]:
        """What must be level when nothing goes on."""
        return {"pending": len(self._pending)}
