"""Sockets of UDP ports: payload travels in UDP datagrams that are never fragmented.

A client has a connected socket for each wire, a server one socket for each of its ports, with the wires of all clients.

1. A socket that can be read is read once (`PortSocket._on_readable`), into memory that all sockets of the worker share:
   a few runs that the kernel has merged (UDP_GRO), or up to 64 datagrams. What is left, the next turn brings.
2. Each run finds its wire: the only one, or by the source, with the address that was asked where the socket is bound to
   all of them. A server makes a wire on the fly for a source that it does not know (`Door`).
3. The wire's owner gets a merged run as a whole, for it needs no copy; until the other end has proven itself,
   and where nothing is merged, datagram by datagram.
4. `send_run` gives the kernel a whole run (UDP_SEGMENT). If the socket is full, one watcher for all of its wires waits
   until it is not.

ICMP errors are told to a client's wire, whichever call the kernel reported them to. A server's socket gets none.

Measured on the loopback interface with an owner that does nothing, µs a datagram of 1300 bytes: received in merged runs
of 44 0.06 to 0.10, 64 plain ones at a time 0.61, 16 0.77, one by itself 3.3; sent in runs of 44 0.11, one by itself
3.8. A socket bound to all addresses: 0.02 more in runs, 0.14 plainly, 1 or 2 by itself. The wire of a stranger costs
1.2, or 4 there, and 18 more if it is kept.
"""

import errno
import functools
import socket
from typing import Any, cast

from workers.io.batch import ROOM, SLOTS, Run
from workers.io.context import clock_us
from workers.io.port_batch import PortBatch, PortInbox, leave_from
from workers.io.run_sender import DATAGRAM_MAX, RunSender
from workers.io.sockaddr import SocketAddress
from workers.io.sockets import ICMP_ERRORS
from workers.io.wire import WireOwner
from workers.settings import Kind

READ, WRITE = 1, 2
MERGED_SLOTS = 8
"""Merged runs in one turn: half a megabyte, which the caches still hold and other sockets wait 0.4 ms for."""

_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE = 10, 23, 3
# What ICMP reports of a datagram sent earlier, or a route or firewall of this one.
_RESETS = ICMP_ERRORS | {errno.ENETDOWN}


@functools.cache
def inbox() -> PortInbox:
    """The worker's, for it has one thread: nothing stays there beyond a callback."""
    return PortInbox()


def prepare(sock: socket.socket, send_bytes: int) -> None:
    """Non-blocking, with so much room for what waits for the device, and no fragments. Raises OSError."""
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
    _forbid_fragments(sock)


def _forbid_fragments(sock: socket.socket) -> None:
    """Let nothing fragment: a datagram above the device's MTU is an error, and what ICMP tells of the path is not
    believed (ip(7), IP_MTU_DISCOVER). An IPv6 socket may send IPv4, too."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DONTFRAG, 1)
    sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE)


class Way:
    """A socket as `RunSender` uses it: towards one peer, from the address that the peer has asked.

    was_reset: an error was reported that `RunSender` may not have shown.
    """

    __slots__ = ("_address", "_origin", "_sendmsg", "was_reset")

    def __init__(self, sock: socket.socket, address: SocketAddress | None, local: bytes) -> None:
        """address: None of a connected socket. local: the address to leave from, empty for the socket's own."""
        self._sendmsg = sock.sendmsg
        self._address = address
        self._origin = [leave_from(local)] if local else []
        self.was_reset = False

    def sendmsg(
        self, buffers: Any, ancillary: list[tuple[int, int, bytes]], flags: int = 0, address: object = None
    ) -> int:
        """See socket.sendmsg."""
        try:
            return self._sendmsg(buffers, ancillary + self._origin, flags, self._address)
        except OSError as error:
            if error.errno in _RESETS:
                self.was_reset = True
            raise

    def send(self, data: memoryview) -> int:
        """See socket.send."""
        return self.sendmsg((data,), [])


class UdpWire:
    """See Wire. most_bytes: at a server, the least of any device until `keep`."""

    __slots__ = (
        "_sender",
        "_socket",
        "_way",
        "is_blocked",
        "is_closed",
        "is_proven",
        "key",
        "kind",
        "local",
        "most_bytes",
        "owner",
        "peer",
        "rtt_us",
        "run_max_bytes",
    )

    def __init__(
        self, sock: "PortSocket", key: bytes, way: Way, ends: tuple[str, str], route: tuple[int, RunSender]
    ) -> None:
        """`key`: of the other end, as the socket's batch has it. `ends`: local and peer. `route`: `most_bytes` and the
        sender, as `UdpRoutes` says."""
        self.kind: Kind = "udp"
        self.local, self.peer = ends
        self.most_bytes, self._sender = route
        self.run_max_bytes = DATAGRAM_MAX
        self.rtt_us = 0
        self.owner: WireOwner | None = None
        self.key = key
        self.is_proven = self.is_blocked = self.is_closed = False
        self._socket = sock
        self._way = way

    def use_route(self, route: tuple[int, RunSender]) -> None:
        """More is known than when the wire was made."""
        self.most_bytes, self._sender = route

    def send_run(self, view: memoryview, size: int, now_us: int) -> int:
        """See Wire."""
        if self.is_closed:
            return len(view)
        # It takes from a socket what a way has as well.
        taken = self._sender.send_run(cast(socket.socket, self._way), view, size)
        if self._way.was_reset:
            self._on_reported()
        if taken < len(view):
            self._socket.await_room(self)
        return max(taken, 0)

    def send_one(self, record: bytes | memoryview, now_us: int) -> bool:
        """See Wire."""
        if self.is_closed:
            return False
        taken = self._sender.send_run(cast(socket.socket, self._way), memoryview(record), len(record))
        if self._way.was_reset:
            self._on_reported()
        return taken >= 0

    def _on_reported(self) -> None:
        """The owner is told later, since it is just sending."""
        self._way.was_reset = False
        self._socket.loop.run_callback(self.on_reset)

    def on_reset(self) -> None:
        """An error was reported."""
        if self.owner is not None and not self.is_closed:
            self.owner.on_reset(self)

    def on_opened(self, now_us: int) -> None:
        """See Wire."""

    def on_proven(self) -> None:
        """See Wire."""
        self.is_proven = True

    def keep(self) -> None:
        """See Wire."""
        self._socket.keep(self)

    def close(self) -> None:
        """See Wire."""
        if not self.is_closed:
            self.is_closed = True
            self.owner = None
            self._socket.forget(self)


class PortSocket:
    """A UDP socket and its watchers. Owns `sock`."""

    __slots__ = ("_batch", "_blocked", "_most", "_reader", "_records", "_stride", "_writer", "loop", "sock")

    def __init__(self, loop: Any, sock: socket.socket, batch: PortBatch) -> None:
        self.loop = loop
        self.sock = sock
        self._batch = batch
        self._records = inbox().records
        self._stride = batch.slots.stride
        self._most = SLOTS
        self._blocked: list[UdpWire] = []
        self._writer: Any = None
        self._reader = loop.io(sock.fileno(), READ)
        self._reader.start(self._on_readable)

    # Ingress

    def _on_readable(self) -> None:
        batch = self._batch
        resets = batch.resets
        batch.receive(self.sock, self._most)
        most = SLOTS
        now_us = clock_us()
        for run in batch.runs():
            if run[3] > run[2]:
                most = MERGED_SLOTS
            elif not run[3]:
                continue  # empty datagrams
            wire = self.wire_of(run[4])
            if wire is not None:
                self._hand(wire, run, now_us)
        self._most = most
        if batch.resets > resets:
            self.on_reset()

    def _hand(self, wire: UdpWire, run: Run, now_us: int) -> None:
        """Give the owner of a wire, or the door, what came for it."""
        first, count, size, last, _ = run
        start = first * self._stride + ROOM
        if last <= size:
            for length in (*(size,) * (count - 1), last):
                self._give(wire, start, start + length, now_us)
                start += self._stride
            return
        end = start + last
        while start < end and not wire.is_proven:
            self._give(wire, start, min(start + size, end), now_us)
            start += size
        if start < end and wire.owner is not None:
            wire.owner.on_payload(wire, self._records, start, end, size, now_us)

    def _give(self, wire: UdpWire, start: int, end: int, now_us: int) -> None:
        """One datagram."""
        if wire.owner is not None:
            wire.owner.on_payload(wire, self._records, start, end, 0, now_us)
        elif not wire.is_closed:
            self.on_stranger(wire, start, end, now_us)

    def wire_of(self, key: bytes) -> UdpWire | None:
        """The wire to that other end, if what comes from there is wanted."""
        raise NotImplementedError

    def on_stranger(self, wire: UdpWire, start: int, end: int, now_us: int) -> None:
        """A datagram came by a wire that has no owner."""

    def on_reset(self) -> None:
        """An ICMP error was reported."""

    # Egress

    def await_room(self, wire: UdpWire) -> None:
        """Tell the wire's owner when the socket takes something again."""
        if wire.is_blocked:
            return
        wire.is_blocked = True
        self._blocked.append(wire)
        if self._writer is None:
            self._writer = self.loop.io(self.sock.fileno(), WRITE)
        if len(self._blocked) == 1:
            self._writer.start(self._on_writable)

    def _on_writable(self) -> None:
        self._writer.stop()
        # Whoever blocks again goes behind those that have not had their turn.
        blocked, self._blocked = self._blocked, []
        for wire in blocked:
            wire.is_blocked = False
            if wire.owner is not None:
                wire.owner.on_writable(wire)

    # The end

    def keep(self, wire: UdpWire) -> None:
        """See Wire."""

    def forget(self, wire: UdpWire) -> None:
        """The wire was closed."""

    def close(self) -> None:
        """Close the socket; the wires have no more use."""
        self._reader.stop()
        self._reader.close()
        if self._writer is not None:
            self._writer.stop()
            self._writer.close()
        self._blocked.clear()
        self.sock.close()
