"""One fake-TCP connection as a wire, and all of those that a tunnel has in one worker.

1. `RawDevice.read` finds the wire by the segment's key. 2. Payload goes to the wire's owner, or to the server's door.
3. If a record in it opens (`on_opened`), the peer's numbers are believed; the acknowledgement leaves with the next run,
or by itself when `RawWires` says that it is due. 4. What allows more wakes the owner if its run did not fit before.
"""

import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal, NamedTuple

from workers.core.cuts import Records
from workers.core.fake_tcp import FakeTcp, later
from workers.core.tcp_header import ACK, FIN, RST, SYN, Segment, Template
from workers.io.capturing import Capture, captured
from workers.io.context import Context, clock_us
from workers.io.fake_handshake import TcpFacts, close_silently, mute
from workers.io.packet import FRAME_BYTES_MAX
from workers.io.raw_device import BACKENDS, RawDevice, Receiver, Wanted
from workers.io.segment_key import peer_host
from workers.io.sockets import address_text
from workers.io.wire import WireOwner
from workers.settings import Kind, SprayTunnel

RECORD_MAX = 16_386
"""A record with its length."""
DEFAULT_MSS = 536
"""Stands for the MSS option that was not there (RFC 9293, 3.7.1): no measure of the path."""
SILENT_US = 2_000_000
"""After so long without a record, a SYN from the peer's port is taken for what it looks like."""
LINGER_US = 1_000_000
"""How long a proven wire's socket stays after the FIN, muted: what still comes is answered with nothing."""
ACK_TICK_S = 0.01
TICK_S = 0.1


class Seen(NamedTuple):
    """What the handshake's own frame taught. tsval: of that frame."""

    device: RawDevice
    template: Template
    tsval: int


class RawWire:
    """See `workers.io.wire.Wire`. Owns `sock`, the kernel's part of the connection.

    carrier: its index in the tunnel. host: the peer's address, for routes. hop: where the route led when last looked.
    window_waits: how often a run had to wait for the peer's window.
    """

    __slots__ = (
        "_fake",
        "_greeted",
        "_link",
        "_mss",
        "_needed",
        "_owing",
        "_proven",
        "_segment",
        "_sock",
        "_waiting",
        "_wires",
        "carrier",
        "device",
        "heard_us",
        "hop",
        "host",
        "key",
        "local",
        "most_bytes",
        "owner",
        "peer",
        "rtt_us",
        "run_max_bytes",
    )

    kind: Kind = "tcp"

    def __init__(
        self, wires: "RawWires", carrier: int, sock: socket.socket, seen: Seen, facts: TcpFacts, now_us: int
    ) -> None:
        self.carrier = carrier
        self.device, template, _ = seen
        self.key = template.peer_key
        self.host = peer_host(sock)
        self.hop = ""
        self.local, self.peer = address_text(sock, peer=False), address_text(sock, peer=True)
        self.owner: WireOwner | None = None
        self.rtt_us = facts.rtt_us
        self.heard_us = now_us
        self._wires = wires
        self._sock: socket.socket | None = sock
        self._link = template.link
        self._fake = fake = FakeTcp(
            template,
            own_scale=facts.receive_scale,
            peer_scale=facts.send_scale,
            with_timestamps=facts.timestamps,
            clock_ms=later(facts.timestamp, seen.tsval),
            now_us=now_us,
        )
        self._mss = facts.send_mss if facts.send_mss > DEFAULT_MSS else RECORD_MAX
        self.run_max_bytes = fake.max_run_bytes
        self.most_bytes = 0
        self.measure()
        self._segment: Segment | None = None
        self._greeted = self._proven = self._owing = self._waiting = False
        self._needed = 0

    def measure(self) -> None:
        """Take over the device's MTU, which may have changed."""
        mtu = min(self.device.port.device.mtu, self._wires.tunnel.mtu or FRAME_BYTES_MAX)
        self.most_bytes = min(mtu - self._fake.overhead_bytes, self._mss, RECORD_MAX)

    # Out

    def send_run(self, view: memoryview, size: int, now_us: int) -> int:
        """See Wire."""
        fake, device = self._fake, self.device
        total, taken = len(view), 0
        while taken < total and self._sock is not None:
            count = min(total - taken, self.run_max_bytes // size * size)
            if not fake.may_send(count):
                count = fake.room_bytes // size * size
                if not count:
                    self._needed = min(size, total - taken)
                    self._wires.window_waits += 1
                    return taken
            piece = view if count == total else view[taken : taken + count]
            sent = device.send(fake.run_to_send(count, size, now_us), piece)
            if sent >= 0:
                fake.on_sent(sent)
                taken += sent
            if sent < count:
                if not self._waiting:
                    self._waiting = True
                    device.wait(self)
                return taken
        return total  # a closed wire takes all

    def send_one(self, record: bytes | memoryview, now_us: int) -> bool:
        """See Wire."""
        if self._sock is None:
            return False
        if self._greeted and not self._proven:
            self.acknowledge(now_us)  # that of the handshake may be what was lost
        self._greeted = self._wires.wanted.side == "client"
        fake, size = self._fake, len(record)
        if fake.may_send(size):
            header = fake.run_to_send(size, size, now_us)
        else:
            header = fake.probe_to_send(size, now_us)
            size = 0
        if self.device.send(header, record) < 0:
            return False
        fake.on_sent(size)
        return True

    def acknowledge(self, now_us: int) -> None:
        """Send a bare acknowledgement."""
        if self.device.send(self._fake.ack_to_send(now_us), b"") >= 0:
            self._fake.on_sent(0)

    def on_room(self) -> None:
        """See Receiver."""
        self._waiting = False
        if self._sock is not None and self.owner is not None:
            self.owner.on_writable(self)

    # In

    def receive(self, segment: Segment, now_us: int) -> None:
        """See Receiver."""
        if segment.length:
            self._segment = segment
            owner, start = self.owner, segment.offset
            end, records = start + segment.length, self._wires.records
            if owner is not None:
                owner.on_payload(self, records, start, end, segment.gso_size, now_us)
            else:
                self._wires.on_ownerless(self, records, start, end, now_us)
            self._segment = None
        elif segment.flags & (FIN | RST | SYN):
            self._on_end(segment, now_us)
        else:
            self._fake.on_bare(segment)
        if self._needed and self._fake.may_send(self._needed):
            self._needed = 0
            self.on_room()

    def allow(self, segment: Segment) -> None:
        """Take what a segment of the handshake allows."""
        self._fake.on_bare(segment)

    def _on_end(self, segment: Segment, now_us: int) -> None:
        """FIN, RST, or a SYN: the peer has forgotten the connection, or its kernel says something twice."""
        if segment.flags & SYN:
            if segment.flags & ACK:
                self._fake.on_bare(segment)
                return
            if now_us - self.heard_us < SILENT_US:
                return
        elif not self._fake.is_plausible(segment):
            return
        if self.owner is not None:
            self.owner.on_reset(self)
        elif segment.flags & (FIN | RST):
            self.close()

    def on_opened(self, now_us: int) -> None:
        """See Wire."""
        segment = self._segment
        if segment is None or self._sock is None:
            return
        self.heard_us = now_us
        if self._fake.on_run(segment, now_us) and self._proven:
            self.acknowledge(now_us)
        elif not self._owing:
            self._owing = True
            due_us = self._fake.next_ack_us
            assert due_us is not None
            self._wires.owe(self, due_us)

    def next_ack(self, now_us: int) -> int | None:
        """Send the acknowledgement if it is due; when to ask again, None for not before it is owed anew."""
        due_us = self._fake.next_ack_us if self._proven and self._sock is not None else None
        if due_us is not None and due_us <= now_us:
            self.acknowledge(now_us)
            due_us = None
        if due_us is None:
            self._owing = False
        return due_us

    def on_proven(self) -> None:
        """See Wire."""
        if not self._proven and self._sock is not None:
            self._proven = True
            with suppress(OSError):  # the kernel has ended it already, by a reset that may be forged
                mute(self._sock)

    def keep(self) -> None:
        """See Wire."""
        self._wires.strangers.pop(self, None)

    # Changes

    def on_next_hop(self, address: bytes) -> None:
        """The next hop's link address, as the kernel knows it now."""
        if len(self._link) == 14 and len(address) == 6 and self._link[:6] != address:
            self._link = address + self._link[6:]
            self._fake.use_link(self._link)

    def close(self) -> None:
        """See Wire."""
        sock, self._sock = self._sock, None
        if sock is None:
            return
        self.owner = None
        self._wires.forget(self)
        if self._proven:
            now_us = clock_us()
            self.device.send(self._fake.fin_to_send(now_us), b"")
            self._wires.linger(sock, now_us)
        else:
            close_silently(sock)
        self._wires.close_if_unused()


class RawWires:
    """The devices of a tunnel in this worker, and the wires over them by the key of what they receive.

    strangers: those without an owner, oldest first, and since when. window_waits: runs that the other end's window held
    up.
    """

    def __init__(
        self,
        context: Context,
        tunnel: SprayTunnel,
        side: Literal["client", "server"],
        ports: tuple[int, ...],
        on_unknown: Callable[[RawDevice, Segment, memoryview, int], None],
        on_ownerless: Callable[[RawWire, Records, int, int, int], None],
        on_time: Callable[[int], None],
        record: Capture | None = None,
    ) -> None:
        """`on_unknown`, `on_ownerless`: for segments without a wire, and payload without an owner. `on_time`: called
        every TICK_S until all is closed. `record`: what passes the devices goes there, too."""
        self.context = context
        self.tunnel = tunnel
        self.wanted = Wanted(side, ports, tunnel.backend)
        self.records = Records(bytearray(FRAME_BYTES_MAX))
        self.table: dict[bytes, Receiver] = {}
        self.devices: dict[str, RawDevice] = {}
        self.strangers: dict[RawWire, int] = {}
        self.on_ownerless = on_ownerless
        self._on_unknown = on_unknown
        self._owing: deque[tuple[int, RawWire]] = deque()
        self._lingering: deque[tuple[int, socket.socket]] = deque()
        self._closing = False
        self.window_waits = 0
        self._on_time = on_time
        self._record = record
        loop: Any = context.loop
        self._ack_timer = loop.timer(ACK_TICK_S, ACK_TICK_S)
        self._timer = loop.timer(TICK_S, TICK_S)
        self._timer.start(self._on_tick)

    # Devices

    def device(self, name: str) -> RawDevice:
        """The device of that name, opened if it is not yet. Raises OSError."""
        device = self.devices.get(name)
        if device is None:
            port = captured(BACKENDS[self.tunnel.backend](name, self.wanted), self._record)
            device = RawDevice(self.context.loop, port, self.table, self.records, self._on_unknown)
            self.devices[name] = device
        return device

    def want_host(self, host: bytes) -> None:
        """See segments of that host as well. Raises OSError."""
        if host not in self.wanted.hosts:
            self.wanted.hosts.add(host)
            for device in self.devices.values():
                device.filter(self.wanted)

    def read(self) -> None:
        """Look at what has come at once: the own frame of a handshake may be among it."""
        for device in list(self.devices.values()):
            device.read()

    # Wires

    def add(self, wire: RawWire) -> None:
        old = self.table.get(wire.key)
        self.table[wire.key] = wire
        if isinstance(old, RawWire) and old.owner is not None:
            old.owner.on_reset(old)  # its peer has made another connection from the same port

    def forget(self, wire: RawWire) -> None:
        self.strangers.pop(wire, None)
        if self.table.get(wire.key) is wire:
            del self.table[wire.key]

    def owe(self, wire: RawWire, due_us: int) -> None:
        """Ask the wire at `due_us` for an acknowledgement."""
        # Later ones may be due earlier, by less than the longest delay: none waits longer than twice that.
        if not self._owing:
            self._ack_timer.start(self._on_ack_time)
        self._owing.append((due_us, wire))

    def _on_ack_time(self) -> None:
        owing = self._owing
        now_us = clock_us()
        while owing and owing[0][0] <= now_us:
            _, wire = owing.popleft()
            due_us = wire.next_ack(now_us)
            if due_us is not None:
                owing.append((due_us, wire))
        if not owing:
            self._ack_timer.stop()

    def linger(self, sock: socket.socket, now_us: int) -> None:
        """Take over the muted socket of a connection that has ended."""
        if self._closing:
            close_silently(sock)
        else:
            self._lingering.append((now_us + LINGER_US, sock))

    # Time

    def _on_tick(self) -> None:
        now_us = clock_us()
        lingering = self._lingering
        while lingering and lingering[0][0] <= now_us:
            close_silently(lingering.popleft()[1])
        self._on_time(now_us)

    # The end

    def close(self) -> None:
        """Close what no wire needs now, and the rest with the last wire."""
        self._closing = True
        while self._lingering:
            close_silently(self._lingering.popleft()[1])
        self.close_if_unused()

    def close_if_unused(self) -> None:
        if self._closing and not self.table:
            for device in self.devices.values():
                device.close()
            self.devices.clear()
            self._owing.clear()
            for timer in (self._timer, self._ack_timer):
                timer.stop()
                timer.close()
            self._closing = False
