"""Fake-TCP ports of one tunnel in one worker: dialled by the client (`TcpDiallers`), taken by the server (`TcpPorts`).

Either way the kernel shakes hands (`workers.io.fake_handshake`) while a packet socket looks on: the own frame that it
sees then, the client's ACK or the server's SYN-ACK, is the template of all that the wire will send.
"""

import errno
import logging
import os
import socket
from collections import OrderedDict
from typing import Any

from workers.core.cuts import Records
from workers.core.tcp_header import ACK, SYN, Segment, Template
from workers.io import sockets
from workers.io.accept import Acceptor
from workers.io.capturing import Capture
from workers.io.context import Context, clock_us
from workers.io.fake_handshake import close_silently, dial, handshake_error, settle, tcp_facts
from workers.io.next_hop import NextHops
from workers.io.raw_device import RawDevice
from workers.io.raw_wire import RawWire, RawWires, Seen
from workers.io.segment_key import connection_key, own_key, packed, peer_host, reversed_key
from workers.io.wire import DialOwner, Door
from workers.settings import SprayClientTunnel, SprayServerTunnel, SprayTunnel

WRITE = 2
HANDSHAKE_US = 3_000_000
STRANGERS_MAX = 4096
STRANGER_US = 10_000_000
HANDSHAKES_MAX = 8192
"""SYN-ACKs that are remembered until the connection is accepted."""
EARLY_BYTES = 2048
"""The largest frame that is kept if it comes before its connection has been accepted."""
ACCEPT_BURST = 32
NOT_YET = frozenset({errno.ENODEV, errno.ENETDOWN})
"""Why a device cannot be used that may come: it is looked for again."""

log = logging.getLogger("forwarder.raw")


def _own_ports(tunnel: SprayTunnel, context: Context) -> tuple[int, ...]:
    """The fake-TCP ports that this worker owns."""
    return tuple(
        port
        for carrier, (kind, port) in enumerate(tunnel.carriers)
        if kind == "tcp" and tunnel.owner_of(carrier, context.workers) == context.seat
    )


class _Dial:
    """One connection on its way. `answer`: the SYN-ACK, `seen`: what the own ACK taught."""

    __slots__ = ("answer", "carrier", "connected", "deadline_us", "key", "owner", "seen", "sock", "watcher")

    def __init__(self, carrier: int, owner: DialOwner, deadline_us: int) -> None:
        self.carrier = carrier
        self.owner = owner
        self.deadline_us = deadline_us
        self.sock: socket.socket | None = None
        self.watcher: Any = None
        self.key = b""
        self.answer: Segment | None = None
        self.seen: Seen | None = None
        self.connected = False

    def close_watcher(self) -> None:
        if self.watcher is not None:
            self.watcher.stop()
            self.watcher.close()
            self.watcher = None

    def close(self) -> None:
        self.close_watcher()
        if self.sock is not None:
            close_silently(self.sock)
            self.sock = None


class TcpDiallers:
    """See `workers.io.wire.Diallers`."""

    def __init__(self, context: Context, tunnel: SprayClientTunnel, record: Capture | None = None) -> None:
        """Raises OSError."""
        self._context = context
        self._tunnel = tunnel
        self._dials: dict[int, _Dial] = {}
        self._by_key: dict[bytes, _Dial] = {}
        self._closed = False
        ports = _own_ports(tunnel, context)
        self._wires = RawWires(
            context, tunnel, "client", ports, self._on_unknown, self._on_ownerless, self._on_time, record
        )
        self._hops = NextHops(self._wires)

    @property
    def lost(self) -> int:
        """Frames that the devices refused."""
        return sum(device.lost for device in self._wires.devices.values())

    @property
    def window_waits(self) -> int:
        """Runs that the other end's window held up."""
        return self._wires.window_waits

    def dial(self, carrier: int, address: tuple[str, int], source: str | None, owner: DialOwner) -> None:
        """See Diallers."""
        self.cancel(carrier)
        attempt = _Dial(carrier, owner, clock_us() + HANDSHAKE_US)
        self._dials[carrier] = attempt
        try:
            self._connect(attempt, address, source)
        except OSError as error:
            # Not from within this call: its caller is not ready for an answer.
            self._context.loop.run_callback(self._fail, attempt, _reason(error))

    def _connect(self, attempt: _Dial, address: tuple[str, int], source: str | None) -> None:
        host, port = address
        wires, tunnel = self._wires, self._tunnel
        if source is None:
            wires.device(self._hops.device_to(host))
        else:  # rules by source address may lead elsewhere than the route that the kernel tells
            self._hops.open_usual(loopback=self._hops.device_to(host) == "lo")
        wires.want_host(packed(host))
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        attempt.sock = sock = dial(family, address, device=tunnel.device, source=source)
        if sockets.is_of_reserve(sock, sockets.LAST_DESCRIPTORS):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        local, local_port, *_ = sock.getsockname()
        attempt.key = connection_key(local, local_port, host, port)
        self._by_key[attempt.key] = self._by_key[reversed_key(attempt.key)] = attempt
        attempt.watcher = self._context.loop.io(sock.fileno(), WRITE)
        attempt.watcher.start(self._on_connected, attempt)

    def _on_connected(self, attempt: _Dial) -> None:
        assert attempt.sock is not None
        attempt.close_watcher()
        number = handshake_error(attempt.sock)
        if number:
            self._fail(attempt, os.strerror(number).lower())
            return
        attempt.connected = True
        if attempt.seen is None:
            self._wires.read()
        else:
            self._finish(attempt)

    def _on_unknown(self, device: RawDevice, segment: Segment, frame: memoryview, now_us: int) -> None:
        attempt = self._by_key.get(segment.key)
        if attempt is None:
            return
        if segment.key != attempt.key:
            if segment.flags & (SYN | ACK) == SYN | ACK:
                attempt.answer = segment
        elif attempt.seen is None and not segment.flags & SYN:
            template = Template.learn(frame, device.port.link_bytes)
            if template is not None:
                attempt.seen = Seen(device, template, segment.tsval or 0)
                if attempt.connected:
                    self._finish(attempt)

    def _finish(self, attempt: _Dial) -> None:
        """The connection is there, and so is its template."""
        sock, seen = attempt.sock, attempt.seen
        assert sock is not None and seen is not None
        try:
            settle(sock)
            facts = tcp_facts(sock)
            if not facts.established:
                raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            wire = RawWire(self._wires, attempt.carrier, sock, seen, facts, clock_us())
        except OSError as error:
            self._fail(attempt, _reason(error))
            return
        if attempt.answer is not None:
            wire.allow(attempt.answer)
        attempt.sock = None
        self._forget(attempt)
        self._wires.add(wire)
        attempt.owner.on_wire(attempt.carrier, wire)

    def _on_ownerless(self, wire: RawWire, records: Records, start: int, end: int, now_us: int) -> None:
        """Nobody waits for it."""

    def _fail(self, attempt: _Dial, why: str) -> None:
        if self._dials.get(attempt.carrier) is attempt:
            self._forget(attempt)
            attempt.owner.on_no_wire(attempt.carrier, why)

    def _forget(self, attempt: _Dial) -> None:
        del self._dials[attempt.carrier]
        if attempt.key:
            for key in (attempt.key, reversed_key(attempt.key)):
                if self._by_key.get(key) is attempt:
                    del self._by_key[key]
        attempt.close()

    def cancel(self, carrier: int) -> None:
        """See Diallers."""
        attempt = self._dials.get(carrier)
        if attempt is not None:
            self._forget(attempt)

    def _on_time(self, now_us: int) -> None:
        for attempt in [each for each in self._dials.values() if each.deadline_us <= now_us]:
            self._fail(attempt, "its own frame was not seen" if attempt.connected else "timed out")
        if not self._closed:
            self._hops.on_time(now_us)

    def close(self) -> None:
        """See Diallers."""
        if self._closed:
            return
        self._closed = True
        for attempt in list(self._dials.values()):
            self._forget(attempt)
        self._hops.close()
        self._wires.close()


class _Handshake:
    """A connection that is not accepted yet. `last`: the newest segment from the peer, `early`: its frame if it had
    payload."""

    __slots__ = ("early", "last", "seen")

    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self.last: Segment | None = None
        self.early = b""


class TcpPorts:
    """A server's fake-TCP ports of one tunnel that this worker owns.

    unseen: connections whose SYN-ACK was not seen, which cannot be used.
    """

    def __init__(
        self,
        context: Context,
        tunnel: SprayServerTunnel,
        listeners: list[tuple[int, socket.socket]],
        door: Door,
        record: Capture | None = None,
    ) -> None:
        """Takes the listening sockets, each with the index of its carrier, over. Raises OSError."""
        self._context = context
        self._tunnel = tunnel
        self._door = door
        self._carriers = {sock.getsockname()[1]: carrier for carrier, sock in listeners}
        self._handshakes: OrderedDict[bytes, _Handshake] = OrderedDict()
        self._closed = False
        self.unseen = 0
        ports = tuple(self._carriers)
        self._wires = RawWires(
            context, tunnel, "server", ports, self._on_unknown, self._on_ownerless, self._on_time, record
        )
        self._hops = NextHops(self._wires)
        try:
            self._hops.open_usual(loopback=any(_is_loopback(sock) for _, sock in listeners))
        except OSError as error:
            if error.errno not in NOT_YET:
                self._hops.close()
                self._wires.close()
                raise
            log.warning("no device for fake TCP yet tunnel=%s reason=%s", tunnel.name, _reason(error))
        self._acceptor = Acceptor(
            context.loop, tunnel.name, [sock for _, sock in listeners], self._accept, burst=ACCEPT_BURST
        )

    @property
    def lost(self) -> int:
        """Frames that the devices refused."""
        return sum(device.lost for device in self._wires.devices.values())

    @property
    def window_waits(self) -> int:
        """Runs that the other end's window held up."""
        return self._wires.window_waits

    @property
    def strangers(self) -> int:
        """Connections that nobody has kept."""
        return len(self._wires.strangers)

    def _on_unknown(self, device: RawDevice, segment: Segment, frame: memoryview, now_us: int) -> None:
        """A frame of a handshake, or what comes before the connection is accepted."""
        if segment.flags & (SYN | ACK) == SYN | ACK:
            template = Template.learn(frame, device.port.link_bytes)
            if template is not None:
                self._on_answer(Seen(device, template, segment.tsval or 0))
            return
        handshake = self._handshakes.get(segment.key)
        if handshake is not None and not segment.flags & SYN:
            if segment.length == 0:
                if not handshake.early:
                    handshake.last = segment
            elif len(frame) <= EARLY_BYTES:
                handshake.last = segment
                handshake.early = bytes(frame)

    def _on_answer(self, seen: Seen) -> None:
        """The own kernel has sent a SYN-ACK, perhaps again."""
        handshakes, template = self._handshakes, seen.template
        known = handshakes.get(template.peer_key)
        if known is not None and known.seen.template.next_sequence == template.next_sequence:
            known.seen = seen
            return
        if len(handshakes) >= HANDSHAKES_MAX:
            handshakes.popitem(last=False)
        handshakes[template.peer_key] = _Handshake(seen)

    def _accept(self, sock: socket.socket, address: Any) -> None:
        now_us = clock_us()
        strangers = self._wires.strangers
        self._pass_owned()
        if strangers and (len(strangers) >= STRANGERS_MAX or sockets.is_of_reserve(sock)):
            next(iter(strangers)).close()
        try:
            wire, handshake = self._make_wire(sock, now_us)
        except OSError as error:
            log.debug("connection dropped tunnel=%s reason=%s", self._tunnel.name, _reason(error))
            close_silently(sock)
            return
        strangers[wire] = now_us + STRANGER_US
        self._wires.add(wire)
        if handshake.last is not None:
            if handshake.early:
                self._wires.records.view[: len(handshake.early)] = handshake.early
            wire.receive(handshake.last, now_us)

    def _make_wire(self, sock: socket.socket, now_us: int) -> tuple[RawWire, _Handshake]:
        """Raises OSError."""
        key = reversed_key(own_key(sock))
        if key not in self._handshakes:
            self._wires.read()
        handshake = self._handshakes.pop(key, None)
        if handshake is None:
            self.unseen += 1
            self._wires.device(self._hops.device_to(peer_host(sock)))  # so that the next one is seen
            raise OSError(errno.ENODATA, "its SYN-ACK was not seen")
        settle(sock)
        facts = tcp_facts(sock)
        carrier = self._carriers[sock.getsockname()[1]]
        return RawWire(self._wires, carrier, sock, handshake.seen, facts, now_us), handshake

    def _on_ownerless(self, wire: RawWire, records: Records, start: int, end: int, now_us: int) -> None:
        if not self._closed:
            self._door.on_stranger(wire, wire.carrier, records, start, end, now_us)

    def _on_time(self, now_us: int) -> None:
        strangers = self._wires.strangers
        self._pass_owned()
        while strangers:
            wire, until_us = next(iter(strangers.items()))
            if until_us > now_us:
                break
            wire.close()
            self._pass_owned()
        if not self._closed:
            self._hops.on_time(now_us)
            self._acceptor.resume()

    def _pass_owned(self) -> None:
        """The oldest stranger is one, if any: who has an owner is none any more."""
        strangers = self._wires.strangers
        while strangers and (wire := next(iter(strangers))).owner is not None:
            del strangers[wire]

    def retire(self) -> None:
        """Accept no more."""
        self._acceptor.close()

    def close(self) -> None:
        """Accept no more, and close what nobody owns. Wires that have an owner belong to it."""
        if self._closed:
            return
        self._closed = True
        self._acceptor.close()
        self._handshakes.clear()
        for wire in list(self._wires.strangers):
            if wire.owner is None:
                wire.close()
        self._hops.close()
        self._wires.close()


def _is_loopback(sock: socket.socket) -> bool:
    host: str = sock.getsockname()[0]
    return host.startswith("127.") or host == "::1"


def _reason(error: OSError) -> str:
    """As it stands in a line of the log."""
    return (error.strerror or str(error)).lower()
