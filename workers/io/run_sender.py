"""Sends runs: datagrams of one size that stand back to back, many in one call where the kernel can (UDP_SEGMENT)."""

import errno
import socket
from struct import Struct

from workers.io.sockaddr import SocketAddress
from workers.io.sockets import ICMP_ERRORS

UDP_SEGMENT = 103
SEGMENTS_MAX = 64
"""Datagrams in one send: UDP_MAX_SEGMENTS of linux/udp.h before it became 128."""
DATAGRAM_MAX = 65507
"""Payload of the largest datagram over IPv4."""

_SEGMENT = Struct("=H")
_WOULD_BLOCK = frozenset({errno.EAGAIN, errno.EWOULDBLOCK, errno.ENOBUFS, errno.ENOMEM})
# What ICMP (of a datagram sent earlier), a firewall or a missing route makes of a datagram: the socket is fine.
_UNDELIVERED = ICMP_ERRORS | {errno.ENETDOWN, errno.EPERM, errno.EADDRNOTAVAIL, errno.ENODEV, errno.EINVAL, errno.EIO}
_UNSEGMENTED = frozenset({errno.EIO, errno.EINVAL, errno.EMSGSIZE})


class RunSender:
    """Sends runs on the sockets of one way: they share what was learnt about it, and the counters.

    segment_max: the largest size of datagrams that go out many in one send (UDP_SEGMENT); larger ones go one by one.
    The kernel refuses with EIO where route or device cannot do it at all, with EINVAL (6.18: EMSGSIZE) above the MTU.
    too_large: datagrams that exceed the path's MTU; undelivered: datagrams refused by ICMP, firewall or route.
    """

    __slots__ = ("_ancillary", "_ancillary_size", "segment_max", "too_large", "undelivered")

    def __init__(self) -> None:
        self.segment_max = DATAGRAM_MAX // 2
        self.too_large = self.undelivered = 0
        self._ancillary: list[tuple[int, int, bytes]] = []
        self._ancillary_size = -1

    def send_run(self, sock: socket.socket, view: memoryview, size: int, address: SocketAddress | None = None) -> int:
        """Send datagrams of `size` bytes, back to back in `view`, the last perhaps shorter; return the bytes taken.

        -1: the socket would block before the first; fewer than len(view), before a later one. Datagrams that
        cannot be delivered count as taken. An empty view is one empty datagram. `address` None: of a connected socket.
        Raises OSError when the socket is not fit for use.
        """
        total = len(view)
        if total <= size or size > self.segment_max:
            return self._send_singly(sock, view, size, address)
        if size != self._ancillary_size:
            # A control message, since a socket option would hold for all workers that share the socket.
            self._ancillary = [(socket.IPPROTO_UDP, UDP_SEGMENT, _SEGMENT.pack(size))]
            self._ancillary_size = size
        most = size * min(SEGMENTS_MAX, DATAGRAM_MAX // size)
        taken = 0
        while taken < total:
            piece = view[taken : taken + most] if total > most else view
            try:
                sock.sendmsg((piece,), self._ancillary, 0, address)
            except OSError as error:
                rest = self._on_refused(sock, piece, size, address, error)
                if rest < len(piece):
                    return taken + rest if rest > 0 else taken or -1
            taken += len(piece)
        return total

    def _on_refused(
        self, sock: socket.socket, piece: memoryview, size: int, address: SocketAddress | None, error: OSError
    ) -> int:
        """Try a piece again that could not be sent in one, and learn from what happens; as `send_run`."""
        if error.errno in _WOULD_BLOCK:
            return -1
        if error.errno not in _UNSEGMENTED:
            return self._send_again(sock, piece, size, address, error)
        lost = self.undelivered + self.too_large
        taken = self._send_singly(sock, piece, size, address)
        # The refusal was for sending many at a time only if they pass singly: another cause says nothing about that.
        if taken > 0 and self.undelivered + self.too_large == lost:
            if error.errno == errno.EIO:
                self.segment_max = 0
            elif error.errno == errno.EINVAL:
                self.segment_max = min(self.segment_max, size - 1)
        return taken

    def _send_again(
        self, sock: socket.socket, piece: memoryview, size: int, address: SocketAddress | None, error: OSError
    ) -> int:
        """The error may belong to a datagram sent earlier, and is gone once reported."""
        if error.errno not in _UNDELIVERED:
            raise error
        try:
            sock.sendmsg((piece,), self._ancillary, 0, address)
        except OSError as again:
            if again.errno in _WOULD_BLOCK or again.errno in _UNSEGMENTED:
                return self._on_refused(sock, piece, size, address, again)
            if again.errno not in _UNDELIVERED:
                raise
            self.undelivered += -(-len(piece) // size)
        return len(piece)

    def _send_singly(self, sock: socket.socket, view: memoryview, size: int, address: SocketAddress | None) -> int:
        total = len(view)
        if total <= size:
            return total if self._send_one(sock, view, address) else -1
        taken = 0
        while taken < total:
            piece = view[taken : taken + size]
            if not self._send_one(sock, piece, address):
                return taken or -1
            taken += len(piece)
        return total

    def _send_one(self, sock: socket.socket, datagram: memoryview, address: SocketAddress | None) -> bool:
        """False if it would block. A reported error may belong to a datagram sent earlier, so it is tried twice."""
        for _attempt in range(2):
            try:
                if address is None:
                    sock.send(datagram)
                else:
                    sock.sendto(datagram, address)
                return True
            except OSError as error:
                if error.errno in _WOULD_BLOCK:
                    return False
                if error.errno == errno.EMSGSIZE:
                    self.too_large += 1
                    return True
                if error.errno not in _UNDELIVERED:
                    raise
        self.undelivered += 1
        return True
