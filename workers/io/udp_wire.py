"""UDP ports: a client dials them, one connected socket for each wire, and a server has one socket for each port, with
the wires of all clients. `workers.io.udp_socket` tells how payload passes.

A server's wire is found by the source of what comes. Where the socket is bound to all addresses, the one that was asked
belongs to it, too: answers leave from there.
"""

import contextlib
import errno
import socket
from typing import Any

from workers.io import sockets
from workers.io.batch import prepare_datagrams
from workers.io.capturing import Capture, CapturingSocket, CapturingWay
from workers.io.context import Context
from workers.io.port_batch import take_destinations
from workers.io.sockaddr import SocketAddress, address_of
from workers.io.sockets import address_text, plain_host
from workers.io.udp_route import UdpRoutes
from workers.io.udp_socket import PortSocket, UdpWire, Way, inbox, prepare
from workers.io.wire import DialOwner, Door
from workers.settings import Address, SprayTunnel

KEPT_MAX = 4096
"""Wires of a server tunnel that are remembered without an owner; for one more the oldest is forgotten."""

CLIENT_SEND_BYTES = 256 << 10
SERVER_SEND_BYTES = 512 << 10
"""The kernel doubles them. Runs wait in front of the socket rather than in the device's queue, where those of all ports
would add up: it takes a few runs, and 0.4 or 0.8 ms at 10 Gbit/s."""

_WILDCARDS = ("0.0.0.0", "::")


def open_socket(family: int) -> socket.socket:
    """A UDP socket, not yet bound."""
    return socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)


class _ClientSocket(PortSocket):
    """A connected socket, which lives as long as its wire."""

    __slots__ = ("_wire",)

    def connect(self, wire: UdpWire) -> None:
        """Call once."""
        self._wire = wire

    def wire_of(self, key: bytes) -> UdpWire | None:
        return self._wire

    def on_reset(self) -> None:
        self._wire.on_reset()

    def forget(self, wire: UdpWire) -> None:
        self.close()


class _CapturingClientSocket(CapturingSocket, _ClientSocket):
    """See CapturingSocket."""


class UdpDiallers:
    """See Diallers. Nothing has to travel for a wire, which therefore always comes, in the next turn of the loop."""

    def __init__(self, context: Context, tunnel: SprayTunnel, record: Capture | None = None) -> None:
        self._record = record
        self._loop = context.loop
        self.routes = UdpRoutes(tunnel.mtu)
        self._dials: dict[int, tuple[tuple[str, int], str | None, DialOwner]] = {}

    def dial(self, carrier: int, address: tuple[str, int], source: str | None, owner: DialOwner) -> None:
        """See Diallers."""
        self._dials[carrier] = address, source, owner
        self._loop.run_callback(self._make, carrier)

    def _make(self, carrier: int) -> None:
        dial = self._dials.pop(carrier, None)
        if dial is None:
            return
        address, source, owner = dial
        try:
            wire = self._connect(address, source)
        except OSError as error:
            owner.on_no_wire(carrier, error.strerror or str(error))
            return
        owner.on_wire(carrier, wire)

    def _connect(self, address: tuple[str, int], source: str | None) -> UdpWire:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        sock = open_socket(family)
        with contextlib.ExitStack() as stack:
            stack.callback(sock.close)
            if sockets.is_of_reserve(sock, sockets.LAST_DESCRIPTORS):
                raise OSError(errno.EMFILE, "few descriptors are left")
            prepare_datagrams(sock)
            prepare(sock, CLIENT_SEND_BYTES)
            if source is not None:
                sock.bind((source, 0))
            sock.connect(address)
            ends = address_text(sock, peer=False), address_text(sock, peer=True)
            route = self.routes.find(address[0])
            batch = inbox().batch(family)
            if self._record is None:
                end, way = _ClientSocket(self._loop, sock, batch), Way(sock, None, b"")
            else:
                end = _CapturingClientSocket(self._loop, sock, batch)
                end.capture = self._record
                way = CapturingWay(sock, None, b"", self._record, ends)
            wire = UdpWire(end, b"", way, ends, route)
            end.connect(wire)
            stack.pop_all()
        return wire

    @property
    def lost(self) -> int:
        """Datagrams that the own host refused."""
        return sum(self.routes.lost)

    def cancel(self, carrier: int) -> None:
        """See Diallers."""
        self._dials.pop(carrier, None)

    def close(self) -> None:
        """See Diallers."""
        self._dials.clear()


class _ServerSocket(PortSocket):
    """One port of a server, and the wires of the clients that are known there."""

    __slots__ = ("_ports", "_text", "carrier", "wires")

    def __init__(self, ports: "UdpPorts", loop: Any, carrier: int, sock: socket.socket) -> None:
        prepare(sock, SERVER_SEND_BYTES)
        is_addressed = sock.getsockname()[0] in _WILDCARDS
        if is_addressed:
            take_destinations(sock)
        self._ports = ports
        self.carrier = carrier
        self._text = address_text(sock, peer=False)
        self.wires: dict[bytes, UdpWire] = {}
        super().__init__(loop, sock, inbox().batch(sock.family, is_addressed=is_addressed))

    def wire_of(self, key: bytes) -> UdpWire | None:
        """The wire to that other end; of one that is not known, a new one, which lives in this turn."""
        return self.wires.get(key) or self._meet(key)

    def _meet(self, key: bytes) -> UdpWire:
        source_bytes = self._batch.source_bytes
        address, local = address_of(key[:source_bytes]), key[source_bytes:]
        text = self._text
        if local:
            family = socket.AF_INET if len(local) == 4 else socket.AF_INET6
            text = _text(socket.inet_ntop(family, local), self.sock.getsockname()[1])
        ends = text, _text(address[0], address[1])
        return UdpWire(self, key, self._way(address, local, ends), ends, self._ports.routes.of_stranger)

    def _way(self, address: SocketAddress, local: bytes, ends: tuple[str, str]) -> Way:
        return Way(self.sock, address, local)

    def on_stranger(self, wire: UdpWire, start: int, end: int, now_us: int) -> None:
        self._ports.door.on_stranger(wire, self.carrier, self._records, start, end, now_us)

    def keep(self, wire: UdpWire) -> None:
        if wire.is_closed or wire.key in self.wires:
            return
        self.wires[wire.key] = wire
        host = address_of(wire.key[: self._batch.source_bytes])[0]
        wire.use_route(self._ports.routes.find(plain_host(host)))
        self._ports.on_kept(wire)

    def forget(self, wire: UdpWire) -> None:
        if self.wires.get(wire.key) is wire:
            del self.wires[wire.key]
        self._ports.on_forgotten(wire)


class _CapturingServerSocket(CapturingSocket, _ServerSocket):
    """See CapturingSocket."""

    def _way(self, address: SocketAddress, local: bytes, ends: tuple[str, str]) -> Way:
        return CapturingWay(self.sock, address, local, self.capture, ends)


class UdpPorts:
    """A server tunnel's UDP ports in one worker. Owns the sockets. `forgotten`: wires for which there was no room."""

    def __init__(
        self,
        context: Context,
        tunnel: SprayTunnel,
        sockets: list[tuple[int, socket.socket]],
        door: Door,
        record: Capture | None = None,
    ) -> None:
        """`sockets`: each with the index of its carrier, bound."""
        self.door = door
        self.routes = UdpRoutes(tunnel.mtu)
        self.forgotten = 0
        self._kept: dict[UdpWire, None] = {}
        self._loop = context.loop
        self._record = record
        self._sockets: list[_ServerSocket] = []
        for carrier, sock in sockets:
            self.open(carrier, sock)

    def open(self, carrier: int, sock: socket.socket) -> None:
        """Take another socket."""
        if self._record is None:
            self._sockets.append(_ServerSocket(self, self._loop, carrier, sock))
            return
        capturing = _CapturingServerSocket(self, self._loop, carrier, sock)
        capturing.capture = self._record
        self._sockets.append(capturing)

    @property
    def remembered(self) -> int:
        """Wires that were kept and not closed."""
        return sum(len(each.wires) for each in self._sockets)

    def on_kept(self, wire: UdpWire) -> None:
        """A wire is to be remembered."""
        self._kept[wire] = None
        while len(self._kept) > KEPT_MAX:
            oldest = next(iter(self._kept))
            del self._kept[oldest]
            # With an owner, it is one of a session, whose number is bounded.
            if oldest.owner is None:
                oldest.close()
                self.forgotten += 1

    def on_forgotten(self, wire: UdpWire) -> None:
        """A wire was closed."""
        self._kept.pop(wire, None)

    @property
    def lost(self) -> int:
        """Datagrams that the own host refused."""
        return sum(self.routes.lost)

    def release(self, carrier: int) -> None:
        """Close the sockets of one port. Their wires are of no more use."""
        for each in [each for each in self._sockets if each.carrier == carrier]:
            self._sockets.remove(each)
            for wire in list(each.wires.values()):
                wire.close()
            each.close()

    def close(self) -> None:
        """Close all."""
        for carrier in {each.carrier for each in self._sockets}:
            self.release(carrier)


def _text(host: str, port: int) -> str:
    return str(Address(plain_host(host), port))
