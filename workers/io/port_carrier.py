"""A port as a carrier: its wire, its keys and its health put together.

Egress: `send_datagrams` seals a run into the worker's staging buffer and gives it to the wire; what the wire does not
take waits here, sealed, and the port gets nothing else meanwhile. Ingress: `on_payload` opens what came, answers PINGs,
feeds the meters and hands the rest to the session.
"""

from typing import Protocol

from workers.core import inner
from workers.core.cuts import Datagrams, Inners, Records
from workers.core.datagram import DATA_OVERHEAD, DatagramOpener, DatagramSealer
from workers.core.heads import RECORD_OVERHEAD, RUN_MAX
from workers.core.inner import Opened, Pong
from workers.core.port import PING_BYTES, Port
from workers.core.port_state import State, Step
from workers.io.context import clock_us
from workers.io.wire import Wire
from workers.status import CarrierStatus

STAGING_BYTES = 192 << 10
"""Room for any run: 64 KiB of quantum, or one record of the largest size."""
STATES = {
    State.DIALLING: "connecting",
    State.UP: "up",
    State.SUSPECT: "degraded",
    State.DEAD: "down",
    State.CLOSED: "down",
}


class SprayStaging:
    """Buffers of a worker that all of its ports share. `out`: sealed records; `inners`: what comes out of records."""

    __slots__ = ("inners", "out")

    def __init__(self) -> None:
        self.out = Records(bytearray(STAGING_BYTES))
        self.inners = Inners()


class CarrierOwner(Protocol):
    """The session of a carrier."""

    def on_opened(self, carrier: "PortCarrier", opened: Opened, now_us: int) -> None:
        """DATA, FRAGMENT or COPY came."""

    def on_room(self, carrier: "PortCarrier") -> None:
        """The carrier, which was blocked, takes runs again."""

    def on_up(self, carrier: "PortCarrier") -> None:
        """The first record of the other end has opened."""

    def on_lost(self, carrier: "PortCarrier") -> None:
        """The port is dead, or was given up by the other end."""

    def on_unknown(self, carrier: "PortCarrier", records: Records, start: int, end: int, now_us: int) -> None:
        """Payload came of which nothing opened."""


class PortCarrier:
    """Owns `wire` until `close`. `index`: of the carrier in its session; `port`: its health."""

    __slots__ = (
        "_blocked",
        "_opener",
        "_owner",
        "_pending",
        "_pending_record",
        "_sealer",
        "_staging",
        "bytes_in",
        "bytes_out",
        "closed",
        "index",
        "port",
        "proven",
        "refused_bytes",
        "wire",
    )

    def __init__(
        self,
        index: int,
        wire: Wire,
        port: Port,
        keys: tuple[DatagramSealer, DatagramOpener],
        staging: SprayStaging,
        owner: CarrierOwner,
    ) -> None:
        self.index = index
        self.wire = wire
        self.port = port
        self.proven = self.closed = self._blocked = False
        self.bytes_in = self.bytes_out = self.refused_bytes = 0
        self._sealer, self._opener = keys
        self._staging = staging
        self._owner = owner
        self._pending: memoryview | None = None
        self._pending_record = 0

    # Egress

    @property
    def payload_max(self) -> int:
        """The largest datagram that one record takes to the other end."""
        return min(self.port.mtu.size, self.wire.most_bytes) - DATA_OVERHEAD

    @property
    def piece_max(self) -> int:
        """The largest inner of one record."""
        return min(self.port.mtu.size, self.wire.most_bytes) - RECORD_OVERHEAD

    @property
    def is_blocked(self) -> bool:
        """Whether something waits for the wire; then nothing may be sent but by `send_control`."""
        return self._blocked

    def datagrams_max(self, size: int) -> int:
        """How many datagrams of `size` bytes go in one run now."""
        most = min(self.port.quantum_bytes, self.wire.run_max_bytes)
        return min(max(most // (size + DATA_OVERHEAD), 1), RUN_MAX)

    def send_datagrams(
        self, prefix: bytes, source: Datagrams, first: int, count: int, size: int, last: int, now_us: int
    ) -> tuple[int, int]:
        """Seal and send a run of `count` datagrams, the last of `last` bytes; what left: (records, bytes).

        Precondition: not blocked, `count <= datagrams_max(size)`, `size <= payload_max`. Afterwards the carrier may be
        blocked: what did not leave waits.
        """
        out = self._staging.out
        if source.stride:
            sealed = self._sealer.seal_slots(prefix, source, first, count, size, last, out)
        else:
            sealed = self._sealer.seal_run(prefix, source, (count - 1) * size + last, size, out, 0, first)
        self.bytes_out += (count - 1) * size + last
        return self._send(sealed, size + DATA_OVERHEAD, now_us)

    def send_inner(self, content: bytes, now_us: int) -> tuple[int, int]:
        """The same for one inner, of at most `piece_max` bytes."""
        sealed = self._sealer.seal_into(content, self._staging.out.view)
        return self._send(sealed, sealed, now_us)

    def _send(self, sealed: int, record: int, now_us: int) -> tuple[int, int]:
        view = self._staging.out.view[:sealed]
        taken = max(self.wire.send_run(view, record, now_us), 0)
        if taken < sealed and not self.closed:
            self._blocked = True
            self._pending = memoryview(bytes(view[taken:]))
            self._pending_record = record
        return -(-taken // record), taken

    def on_writable(self, wire: Wire) -> None:
        """See WireOwner."""
        pending, now_us = self._pending, clock_us()
        if pending is not None:
            taken = max(wire.send_run(pending, self._pending_record, now_us), 0)
            self.port.on_sent(-(-taken // self._pending_record), taken, now_us)
            if taken < len(pending):
                self._pending = pending[taken:]
                return
            self._pending = None
        self._blocked = False
        self._owner.on_room(self)

    def send_control(self, content: bytes, now_us: int) -> bool:
        """Send a PING, a PONG or a CLOSE, which waits for nothing; False if it could not leave."""
        out = self._staging.out.view
        sealed = self._sealer.seal_into(content, out)
        return self.wire.send_one(out[:sealed], now_us)

    def greet(self, now_us: int) -> None:
        """Send a PING, due or not: the first record tells a server that the handshake is done."""
        clock = self.port.on_ping_sent(PING_BYTES, now_us)
        self.send_control(inner.pack_ping(clock, PING_BYTES - RECORD_OVERHEAD), now_us)

    def ping(self, now_us: int) -> None:
        """Send the PINGs that are due."""
        while not self.closed and (size := self.port.next_ping(now_us)):
            clock = self.port.on_ping_sent(size, now_us)
            self.send_control(inner.pack_ping(clock, size - RECORD_OVERHEAD), now_us)

    # Ingress

    def try_open(self, records: Records, start: int, end: int) -> tuple[list[Opened], int]:
        """What opens of payload that came from another address, and how many records."""
        before = self._opener.opened
        found = self._opener.open_run(records, start, end)
        return found, self._opener.opened - before

    def on_payload(self, wire: Wire, records: Records, start: int, end: int, hint: int, now_us: int) -> None:
        """See WireOwner."""
        opener = self._opener
        before = opener.opened
        found = opener.open_run(records, start, end, hint)
        count = opener.opened - before
        if not count:
            self.refused_bytes += end - start
            self._owner.on_unknown(self, records, start, end, now_us)
            return
        self.on_found(found, count, end - start, now_us)

    def on_found(self, found: list[Opened], count: int, length: int, now_us: int) -> None:
        """`count` records of `length` bytes in all have opened."""
        wire = self.wire
        wire.on_opened(now_us)
        self.port.on_received(count, length, self._opener.highest, now_us)
        if not self.proven:
            self.proven = True
            wire.on_proven()
            self._owner.on_up(self)
        for opened in found:
            kind = opened[0]
            if kind <= inner.COPY:
                self.bytes_in += len(opened[3])
                self._owner.on_opened(self, opened, now_us)
            else:
                self._on_control(opened, now_us)

    def _on_control(self, opened: Opened, now_us: int) -> None:
        kind, _, size, payload = opened
        port = self.port
        if self.closed:
            return
        if kind == inner.PING:
            received, highest = port.pong()
            answer = inner.pack_pong(Pong(inner.unpack_ping(payload), received, max(highest, 0), size))
            self.send_control(answer, now_us)
        elif kind == inner.PONG:
            pong = inner.unpack_pong(payload)
            port.on_pong(pong.clock, pong.received, pong.highest_counter, pong.size, now_us)
        else:
            port.on_close_received(now_us)
            self._owner.on_lost(self)

    def on_reset(self, wire: Wire) -> None:
        """See WireOwner. It may be forged: a PING will tell."""
        self.port.on_reset(clock_us())

    # Time

    def on_time(self, now_us: int) -> None:
        """Call when `port.deadline_us` has come."""
        step = self.port.on_time(now_us)
        if step is Step.PING:
            self.ping(now_us)
        elif step is Step.DIED:
            self._owner.on_lost(self)

    # The end

    def move(self, wire: Wire) -> None:
        """The other end has a new address: go on there."""
        old, self.wire = self.wire, wire
        old.close()
        wire.keep()
        wire.owner = self
        wire.on_proven()
        if self._blocked:
            self.on_writable(wire)  # this one was never asked, and will not tell

    def abandon(self) -> None:
        """Another carrier has the wire now."""
        self.closed = True
        self._pending = None
        self._owner.on_lost(self)

    def close(self, now_us: int) -> None:
        """Give the port up and say so, sealed. Nothing is told to the owner."""
        if self.closed:
            return
        if self.port.state in (State.UP, State.SUSPECT):
            self.send_control(inner.CLOSE_INNER, now_us)
        self.closed = True
        self._pending = None
        self.wire.close()

    @property
    def waiting_bytes(self) -> int:
        """Sealed, and not taken by the wire yet."""
        return len(self._pending) if self._pending is not None else 0

    @property
    def counts(self) -> tuple[int, int]:
        """Records that were rejected, and those that were replayed or too old."""
        return self._opener.rejected, self._opener.replayed

    def status(self, worker: int, now_us: int) -> CarrierStatus:
        """The port as `forwarder status` shows it."""
        port = self.port
        return CarrierStatus(
            id=self.index,
            worker=worker,
            kind=self.wire.kind,
            local=self.wire.local,
            peer=self.wire.peer,
            state=STATES[port.state],
            rtt_ms=port.rtt.srtt_us / 1000,
            loss=port.outward.ratio,
            rate_bps=port.rate_bps,
            in_flight_bytes=self.waiting_bytes,
            age_s=(now_us - port.up_us) / 1e6,
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
        )
