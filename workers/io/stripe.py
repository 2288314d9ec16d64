"""A stripe: one TCP connection between the two ends, as a carrier of sealed frames.

Ingress: `_on_readable` receives what there is, cuts it into records, opens each into a slot and hands it to the
session. Egress: `send` seals a frame into the worker's staging buffer, `flush` gives the staged records to the kernel
in one call. A stripe owns memory only for a record that is half received or half sent.
"""

import socket
from typing import Any, Protocol

from workers.core import frame
from workers.core.errors import RemoteProtocolError
from workers.core.pace import Pace
from workers.core.path import Path
from workers.core.record import LENGTH, OVERHEAD, RECORD_HEADER, TAG, Opener, Sealer, whole_records
from workers.io import sockets
from workers.io.memory import FLUSH_BYTES, OUTBOUND_BYTES, SCRATCH_BYTES, Memory
from workers.shm.arena import Side
from workers.status import CarrierStatus

READ, WRITE = 1, 2
PENDING_MAX = OUTBOUND_BYTES + (256 << 10)
"""What may wait for the kernel: one staging buffer, and control frames that do not ask for room."""


class StripeOwner(Protocol):
    """The session that a stripe belongs to."""

    def on_frame(self, stripe: "Stripe", slot: int, view: memoryview) -> None:
        """A frame was opened, into `slot` or (-1) into a buffer that the next record overwrites. Raises
        RemoteProtocolError."""

    def on_turn_end(self) -> None:
        """All that could be received in this turn was handed over."""

    def on_room(self, stripe: "Stripe") -> None:
        """The stripe takes data again."""

    def on_stripe_lost(self, stripe: "Stripe", why: str) -> None:
        """The stripe is closed."""


class Staging:
    """Sealed records of one stripe that wait for the end of the turn. Shared by all stripes of a worker, one at a
    time."""

    __slots__ = ("fill", "stripe", "view")

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.fill = 0
        self.stripe: Stripe | None = None


class Stripe:
    """Owns `sock` (connected, non-blocking). `received_us` is when the peer last sent anything.

    `more`: behind the frame that was opened last, there is more of what was received.
    `trip_us`: the kernel's round trip, and what the unsent data in front takes, at most.
    `slow`: others bring a frame there much sooner.
    `stalled`: the kernel's retransmission timer ran out, and nothing was acknowledged since.
    """

    __slots__ = (
        "_body",
        "_budget",
        "_filled",
        "_head",
        "_low_water",
        "_memory",
        "_opener",
        "_owed_pong",
        "_pace",
        "_pending",
        "_read_watcher",
        "_sealer",
        "_staging",
        "_waited",
        "_write_watcher",
        "_writing",
        "bytes_in",
        "bytes_out",
        "closed",
        "far",
        "frame_bytes",
        "gone_told",
        "in_ready",
        "index",
        "info",
        "more",
        "owner",
        "path",
        "pinged_us",
        "received_us",
        "slow",
        "sock",
        "stalled",
        "trip_us",
        "up_since_us",
        "used",
    )

    def __init__(
        self,
        loop: Any,
        sock: socket.socket,
        index: int,
        keys: tuple[Sealer, Opener],
        memory: Memory,
        staging: Staging,
        *,
        frame_max_bytes: int,
        now_us: int,
    ) -> None:
        self.sock = sock
        self.index = index
        self._sealer, self._opener = keys
        self._memory, self._staging = memory, staging
        self.owner: StripeOwner | None = None
        self.path: Path | None = None
        self.far: tuple[int, int, int] | None = None
        self.closed = self.in_ready = self.more = self.slow = self.stalled = self.used = False
        self._waited = self._writing = False
        self._pace = Pace(frame_max_bytes)
        self.frame_bytes = self._pace.frame_bytes
        self.info: sockets.TcpInfo | None = None
        self.bytes_in = self.bytes_out = self.gone_told = self.pinged_us = self.trip_us = 0
        self.up_since_us = self.received_us = now_us
        self._low_water = 1
        sockets.set_unsent_limit(sock, self._pace.unsent_limit)
        self._budget = self._filled = 0
        self._head = b""
        self._body: memoryview | None = None
        self._pending: memoryview | None = None
        self._owed_pong: int | None = None
        self._read_watcher = loop.io(sock.fileno(), READ)
        self._write_watcher = loop.io(sock.fileno(), WRITE)

    def start(self, owner: StripeOwner, leftover: bytes = b"") -> None:
        """Begin to receive for `owner`; `leftover` came along with the handshake."""
        self.owner = owner
        if leftover:
            self._take(memoryview(leftover))
        if not self.closed:
            self._read_watcher.start(self._on_readable)

    # Ingress

    def _on_readable(self) -> None:
        inbound = self._memory.inbound
        body = self._body
        if body is None and self._memory.partial_left <= 0 and self._read_whole_records():
            return
        try:
            if body is None:
                count = self.sock.recv_into(inbound)
            else:
                count = self.sock.recvmsg_into((body[self._filled :], inbound))[0]
        except BlockingIOError:
            return
        except OSError as error:
            self.fail(str(error))
            return
        if not count:
            self.fail("closed by the peer")
            return
        self.bytes_in += count
        if body is not None:
            missing = len(body) - self._filled
            if count < missing:
                self._filled += count
                self._await_bytes(missing - count)
                return
            self._body = None
            self._memory.partial_left += len(body)
            count -= missing
        self._take(inbound[:count], body)

    def _read_whole_records(self) -> bool:
        """Leave a record in the kernel until it is whole; False if the kernel cannot, or it has ended."""
        inbound = self._memory.inbound
        try:
            count = self.sock.recv_into(inbound, 0, socket.MSG_PEEK)
        except OSError:
            return False
        whole, needed = whole_records(self._head, inbound[:count], self._opener.max_sealed_bytes)
        if whole:
            self.bytes_in += self.sock.recv_into(inbound[:whole])
            self._take(inbound[:whole])
        elif not count or not needed or needed == self._low_water:
            return False
        if not self.closed:
            self._await_bytes(max(needed - whole, 1))
        return True

    def _take(self, data: memoryview, body: memoryview | None = None) -> None:
        """Open all whole records: `body`, which is complete, then those in `data`; keep what is left."""
        assert self.owner is not None
        try:
            if body is not None:
                self.more = True
                self._open(body, self._head)
                self._head = b""
            self._take_records(data)
        except RemoteProtocolError as error:
            self.fail(str(error))
        self.owner.on_turn_end()

    def _take_records(self, data: memoryview) -> None:
        position, count = 0, len(data)
        head, self._head = self._head, b""
        while not self.closed:
            if position == count and not head:
                self._await_bytes(1)
                return
            if len(head) < RECORD_HEADER:
                need = RECORD_HEADER - len(head)
                head += bytes(data[position : position + need])
                position += need
                if len(head) < RECORD_HEADER:
                    self._head = head
                    self._await_bytes(1)
                    return
            (length,) = LENGTH.unpack(head)
            self._opener.check_length(length)
            end = position + length
            if end > count:
                self._head = head
                self._body = memoryview(bytearray(length))
                self._memory.partial_left -= length
                self._filled = count - position
                self._body[: self._filled] = data[position:]
                self._await_bytes(end - count)
                return
            self.more = end < count
            self._open(data[position:end], head)
            position, head = end, b""

    def _await_bytes(self, missing: int) -> None:
        """Wake up for what completes a record, not for every segment of it: a third less CPU on a slow stripe."""
        if missing != self._low_water:
            self._low_water = missing
            try:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, missing)
            except OSError as error:
                self.fail(str(error))

    def _open(self, body: memoryview, head: bytes) -> None:
        memory = self._memory
        length = len(body) - TAG
        slot = -1
        if length <= SCRATCH_BYTES:
            view = memory.scratch[:length]
        else:
            slot = memory.arena.allocate(length, Side.INGRESS)
            view = memory.arena.view(slot, length) if slot >= 0 else memory.spare[:length]
        try:
            self._opener.open_into(body, head, view)
        except RemoteProtocolError:
            if slot >= 0:
                memory.arena.release(slot)
            raise
        assert self.owner is not None
        if slot < 0 and length > SCRATCH_BYTES:
            memory.dropped_frames += 1  # no slot: the sender keeps the frame and sends it again
            return
        self.owner.on_frame(self, slot, view)

    # Egress

    def has_room(self) -> bool:
        """Whether the stripe should be given another frame; if not, `StripeOwner.on_room` follows."""
        if self._budget > 0:
            return not self._writing
        if self.closed or self._writing:
            return False
        try:
            unsent = sockets.unsent_bytes(self.sock)
        except OSError as error:
            self.fail(str(error))
            return False
        if self._staging.stripe is self:
            unsent += self._staging.fill
        if self._waited:
            self._waited = False
            self._pace.on_turn(unsent)
        self._budget = self._pace.unsent_limit - unsent
        if self._budget > 0:
            return True
        self._await_room()
        return False

    @property
    def takes_small(self) -> bool:
        """Whether a small frame may be sent even without room: the kernel took all that it was given."""
        return self._pending is None and not self.closed

    @property
    def rate_bps(self) -> float:
        """What it is measured to carry."""
        return self._pace.rate_bps

    def takes_us(self, length: int) -> float:
        """How long `length` bytes take at the rate of the stripe; 0 while that is not known."""
        rate_bps = self._pace.rate_bps
        return length * 8e6 / rate_bps if rate_bps else 0.0

    def unsent_us(self) -> float:
        """How long what is not sent yet will take; without end on a dead socket."""
        try:
            return self.takes_us(sockets.unsent_bytes(self.sock))
        except OSError:
            return float("inf")

    def send(self, frame: memoryview | bytes) -> None:
        """Seal a frame; it leaves at the next `flush`. Precondition: `has_room`, or `takes_small`, or a frame of at
        most SCRATCH_BYTES."""
        staging = self._staging
        record_bytes = len(frame) + OVERHEAD
        if staging.stripe is not self:
            if staging.stripe is not None:
                staging.stripe.flush()
            staging.stripe = self
        elif staging.fill + record_bytes > len(staging.view):
            self.flush()
            staging.stripe = self
        staging.fill += self._sealer.seal_into(frame, staging.view[staging.fill :])
        self._budget -= record_bytes
        self.used = True
        if staging.fill >= FLUSH_BYTES:
            self.flush()

    def pong(self, clock: int) -> None:
        """Answer a PING, or the latest of them when the kernel takes data again."""
        if self._pending is None:
            self.send(frame.pack(frame.PONG, 0, 0, 0, clock))
        else:
            self._owed_pong = clock

    def flush(self) -> None:
        """Give all staged records to the kernel; keep what it does not take."""
        staging = self._staging
        if staging.stripe is not self:
            return
        records = staging.view[: staging.fill]
        staging.stripe, staging.fill = None, 0
        if self.closed:
            return
        if self._pending is not None:
            self._pending = memoryview(bytes(self._pending) + bytes(records))
            if len(self._pending) > PENDING_MAX:
                self.fail("the peer reads nothing")
            return
        sent = self._write(records)
        if 0 <= sent < len(records):
            self._pending = memoryview(bytes(records[sent:]))
            self._await_room()

    def _write(self, data: memoryview) -> int:
        """How much the kernel took; -1 after a failure."""
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            self.fail(str(error))
            return -1
        self.bytes_out += sent
        return sent

    def _await_room(self) -> None:
        if not self._writing:
            self._writing = True
            self._write_watcher.start(self._on_writable)

    def _on_writable(self) -> None:
        pending = self._pending
        if pending is not None:
            sent = self._write(pending)
            if sent < 0:
                return
            if sent < len(pending):
                self._pending = pending[sent:]
                return
            self._pending = None
            if self._owed_pong is not None:
                owed, self._owed_pong = self._owed_pong, None
                self.pong(owed)
        self._writing = False
        self._write_watcher.stop()
        self._budget = 0
        self._waited = True
        assert self.owner is not None
        self.owner.on_room(self)

    # Meters

    def sample(self, frame_max_bytes: int) -> None:
        """Read the kernel's meters; fit frame size and unsent limit to the stripe's rate."""
        info = self.info = sockets.tcp_info(self.sock)
        if info is None:
            return
        self.stalled = info.timeouts > 0
        app_limited = info.app_limited or not info.delivery_rate_bps
        changed = self._pace.on_sample(info.delivery_rate_bps, info.window_rate_bps, app_limited, frame_max_bytes)
        self.frame_bytes = self._pace.frame_bytes
        self.trip_us = info.rtt_us + int(self.takes_us(self._pace.unsent_limit))
        if changed:
            try:
                sockets.set_unsent_limit(self.sock, self._pace.unsent_limit)
            except OSError as error:
                self.fail(str(error))

    def status(self, worker: int, now_us: int) -> CarrierStatus:
        """The stripe as `forwarder status` shows it."""
        info = sockets.tcp_info(self.sock) or self.info
        return CarrierStatus(
            id=self.index,
            worker=worker,
            kind="stripe",
            local=sockets.address_text(self.sock, peer=False),
            peer=sockets.address_text(self.sock, peer=True),
            state="up",
            rtt_ms=info.rtt_us / 1000 if info else 0.0,
            loss=info.loss if info else 0.0,
            rate_bps=self._pace.rate_bps,
            in_flight_bytes=info.unacked_bytes if info else 0,
            age_s=(now_us - self.up_since_us) / 1e6,
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
        )

    def fail(self, why: str) -> None:
        """Close, because the peer or the network made it so."""
        if not self.closed:
            self.close()
            if self.owner is not None:
                self.owner.on_stripe_lost(self, why)

    def close(self) -> None:
        """Close the socket and stop the watchers. Nothing is told to anybody."""
        if self.closed:
            return
        self.closed = True
        self._budget = 0
        self._writing = False
        if self._body is not None:
            self._memory.partial_left += len(self._body)
        self._pending = self._body = None
        if self._staging.stripe is self:
            self._staging.stripe, self._staging.fill = None, 0
        self._read_watcher.stop()
        self._read_watcher.close()
        self._write_watcher.stop()
        self._write_watcher.close()
        self.sock.close()
