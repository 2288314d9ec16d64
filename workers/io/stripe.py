"""A stripe: one TCP connection between the two ends, as a carrier of sealed frames.

Receiving is `workers.io.receiving`'s part. Egress: `send` seals a frame into the worker's staging buffer, `flush` gives
the staged records to the kernel in one call. A stripe owns memory only for a record that is half received or half sent.
"""

import contextlib
import socket
from typing import Any, Protocol

from workers.core import frame
from workers.core.pace import UNSENT_MAX, UNSENT_MIN, Pace
from workers.core.path import Path
from workers.core.record import OVERHEAD, Opener, Sealer
from workers.io import sockets
from workers.io.memory import FLUSH_BYTES, OUTBOUND_BYTES, Memory
from workers.io.receiving import Receiving
from workers.status import CarrierStatus

READ, WRITE = 1, 2
PENDING_MAX = OUTBOUND_BYTES + (256 << 10)
"""What may wait for the kernel: one staging buffer, and control frames that do not ask for room."""
STAGED_CLEAR_BYTES = 4 << 10
"""A stripe with more in this turn's staging buffer is not clear for what comes behind it."""


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


class Stripe(Receiving):
    """Owns `sock` (connected, non-blocking). `received_us` is when the peer last sent anything.

    `rtt_us`: the kernel's round trip. `trip_us`: that, and what the least unsent data in front takes. `least_rtt_us`:
    the shortest round trip, which the kernel forgets after minutes.
    `slow`: others bring a frame there much sooner.
    `stalled`: the kernel's retransmission timer ran out, and nothing was acknowledged since.
    `moved`: the other end leaves it (MOVE). `leaving`: we do. `in_order`: after that it ended with nothing lost.
    """

    __slots__ = (
        "_budget",
        "_owed_pong",
        "_pace",
        "_pending",
        "_read_watcher",
        "_sealer",
        "_staging",
        "_waited",
        "_write_watcher",
        "_writing",
        "bytes_out",
        "far",
        "frame_bytes",
        "gone_told",
        "in_order",
        "in_ready",
        "index",
        "info",
        "least_rtt_us",
        "leaving",
        "moved",
        "owner",
        "path",
        "pinged_us",
        "received_us",
        "rtt_us",
        "slow",
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
        super().__init__(sock, keys[1], memory)
        self.index = index
        self._sealer = keys[0]
        self._staging = staging
        self.owner: StripeOwner | None = None
        self.path: Path | None = None
        self.far: tuple[int, int, int] | None = None
        self.in_ready = self.slow = self.stalled = self.used = False
        self.moved = self.leaving = self.in_order = False
        self._waited = self._writing = False
        self._pace = Pace(frame_max_bytes)
        self.frame_bytes = self._pace.frame_bytes
        self.info: sockets.TcpInfo | None = None
        self.bytes_out = self.gone_told = self.pinged_us = self.rtt_us = self.least_rtt_us = self.trip_us = 0
        self.up_since_us = self.received_us = now_us
        sockets.set_unsent_limit(sock, self._pace.unsent_limit)
        self._budget = 0
        self._pending: memoryview | None = None
        self._owed_pong: int | None = None
        self._read_watcher = loop.io(sock.fileno(), READ)
        self._write_watcher = loop.io(sock.fileno(), WRITE)

    def _on_frame(self, slot: int, view: memoryview) -> None:
        assert self.owner is not None
        self.owner.on_frame(self, slot, view)

    def _on_turn_end(self) -> None:
        assert self.owner is not None
        self.owner.on_turn_end()

    def start(self, owner: StripeOwner, leftover: bytes = b"") -> None:
        """Begin to receive for `owner`; `leftover` came along with the handshake."""
        self.owner = owner
        if leftover:
            self._take(memoryview(leftover))
        if not self.closed:
            self._read_watcher.start(self._on_readable)

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
    def has_budget(self) -> bool:
        """Whether there was room when the kernel was asked last, and less was sent since."""
        return self._budget > 0 and not self._writing

    @property
    def takes_small(self) -> bool:
        """Whether a small frame may be sent even without room: the kernel took all that it was given."""
        return self._pending is None and not self.closed

    def is_clear(self) -> bool:
        """Whether a small frame leaves at once, with nothing missing in front of it. Asks the kernel."""
        staged = self._staging.fill if self._staging.stripe is self else 0
        return staged < STAGED_CLEAR_BYTES and self._pending is None and not self.closed and sockets.is_clear(self.sock)

    @property
    def is_fast(self) -> bool:
        """Whether it may hold as much unsent as any stripe."""
        return self._pace.unsent_limit >= UNSENT_MAX

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

    def send_now(self, frame: memoryview) -> None:
        """`send` and `flush` in one, for a small frame that has come alone. Precondition: `has_budget`."""
        staging = self._staging
        if staging.stripe is not None:
            self.send(frame)
            self.flush()
            return
        sealed = self._sealer.seal_into(frame, staging.view)
        self._budget -= sealed
        self.used = True
        self._give(staging.view[:sealed])

    def pong(self, clock: int) -> None:
        """Answer a PING, or the latest of them when the kernel takes data again."""
        if self.leaving:
            return
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
        self._give(records)

    def _give(self, records: memoryview) -> None:
        sent = self._write(records)
        if 0 <= sent < len(records):
            self._pending = memoryview(bytes(records[sent:]))
            self._await_room()

    def leave(self) -> None:
        """Say so (MOVE), and end our direction once the kernel has all. What comes is still received."""
        if self.closed or self.leaving:
            return
        self.send(frame.pack(frame.MOVE, 0, 0, 0, 0))
        self.flush()
        self.leaving = self._writing = True  # there is no room any more
        self._budget = 0
        if self._pending is None:
            self._end_direction()

    def _end_direction(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.fail(str(error))

    def _on_end(self) -> None:
        self.in_order = (self.moved or self.leaving) and self._pending is None and self._body is None
        self.fail("closed by the peer")

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
        self._write_watcher.stop()
        if self.leaving:
            self._end_direction()
            return
        self._writing = False
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
        self.rtt_us = info.rtt_us
        self.least_rtt_us = min(self.least_rtt_us or info.least_rtt_us, info.least_rtt_us)
        self.trip_us = info.rtt_us + int(self.takes_us(UNSENT_MIN))
        if changed:
            try:
                sockets.set_unsent_limit(self.sock, self._pace.unsent_limit)
            except OSError as error:
                self.fail(str(error))

    def limit(self, limit_bps: float) -> None:
        """Send no more than so many bits a second; 0 for no limit."""
        with contextlib.suppress(OSError):  # closed, or a kernel that has none
            sockets.set_pacing_limit(self.sock, limit_bps)

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
        self._drop_partial()
        self._pending = None
        if self._staging.stripe is self:
            self._staging.stripe, self._staging.fill = None, 0
        self._read_watcher.stop()
        self._read_watcher.close()
        self._write_watcher.stop()
        self._write_watcher.close()
        self.sock.close()
