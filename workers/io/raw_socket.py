"""Sends runs of TCP segments through a raw socket, whose packets bring their own IP header (raw(7), ipv6(7)).

The kernel finds the next hop, and neither cuts nor sums: a run is cut here (`workers.core.segmenting`), and its
segments leave many in one call (sendmmsg).
"""

import ctypes
import errno
import os
import socket
from collections.abc import Callable
from struct import Struct

from workers.core.bpf import DROP_ALL
from workers.core.segmenting import IPV4_BYTES, IPV6_BYTES, cut
from workers.io.batch import enlarge_buffers
from workers.io.packet import SEND_BUFFER_BYTES
from workers.io.socket_filter import attach_filter

SEGMENTS = 64
"""In one call."""

SO_BINDTODEVICE = 25
_IP_RECVERR, _IPV6_RECVERR = 11, 25
_IPV6_HDRINCL = 36

# struct mmsghdr of socket.h: name, its length, iovec, count, control, its length, flags; then the sent length.
_HEADER = Struct("@PIPNPNi0PI0P")
_IOVEC = Struct("@PN")
_PAIR = Struct("@PNPN")
_ADDRESS4, _ADDRESS6 = Struct("=H2x4s8x"), Struct("=HHI16sI")
_NAME_BYTES = 28
_MUST_WAIT = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM})


def _at(buffer: bytearray | memoryview) -> int:
    """Where a buffer stands in memory. The caller keeps the buffer for as long as it uses the address."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


class RawSocket:
    """Segments of one IP version to anybody. It receives nothing."""

    __slots__ = ("_headers", "_iovecs", "_is_ipv4", "_name", "_scope", "_send", "_sock")

    def __init__(self, family: socket.AddressFamily, device: str, number: int) -> None:
        """device, number: those by which packets leave; an empty name: as the routes say. Raises OSError."""
        self._sock = socket.socket(
            family, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW
        )
        self._is_ipv4 = family == socket.AF_INET
        self._scope = number
        try:
            attach_filter(self._sock, DROP_ALL)
            enlarge_buffers(self._sock, 0, SEND_BUFFER_BYTES)
            if device:
                self._sock.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, device.encode() + b"\0")
            # So that a full queue behind the socket is told.
            if self._is_ipv4:
                self._sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
            else:
                self._sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_HDRINCL, 1)
                self._sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)
        except OSError:
            self._sock.close()
            raise
        # PyDLL keeps the interpreter's lock: these calls do not block.
        send = ctypes.PyDLL(None, use_errno=True).sendmmsg
        send.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int]
        self._send: Callable[[int, int, int, int], int] = send
        self._lay_out()

    def _lay_out(self) -> None:
        """One header and two buffers for each segment, and one name for all."""
        self._name = bytearray(_NAME_BYTES)
        self._iovecs = bytearray(2 * _IOVEC.size * SEGMENTS)
        self._headers = bytearray(_HEADER.size * SEGMENTS)
        name, iovecs = _at(self._name), _at(self._iovecs)
        name_bytes = (_ADDRESS4 if self._is_ipv4 else _ADDRESS6).size
        for index in range(SEGMENTS):
            header = (name, name_bytes, iovecs + 2 * _IOVEC.size * index, 2, 0, 0, 0, 0)
            _HEADER.pack_into(self._headers, _HEADER.size * index, *header)

    def send(self, head: bytes, payload: bytes | memoryview, size: int) -> int:
        """Send a run with that IP and TCP header, in segments of `size` bytes; return the bytes of payload that were
        taken, -1 if it would block before the first segment. Raises OSError when the first one is refused."""
        view = memoryview(payload)
        if view.readonly:
            view = memoryview(bytearray(view))
        heads = cut(head, view, size)
        self._address(head)
        total, width = len(view), len(head)
        heads_at, payload_at = _at(heads), _at(view) if total else 0
        count = len(heads) // width
        taken = 0
        while taken < count:
            most = min(count - taken, SEGMENTS)
            for index in range(most):
                start = (taken + index) * size
                piece = (heads_at + (taken + index) * width, width, payload_at + start, min(size, total - start))
                _PAIR.pack_into(self._iovecs, _PAIR.size * index, *piece)
            sent = self._send(self._sock.fileno(), _at(self._headers), most, socket.MSG_DONTWAIT)
            if sent < 0:
                return self._on_refused(taken, size)
            taken += sent
        return total

    def _address(self, head: bytes) -> None:
        if self._is_ipv4:
            _ADDRESS4.pack_into(self._name, 0, socket.AF_INET, head[IPV4_BYTES - 4 : IPV4_BYTES])
        else:
            _ADDRESS6.pack_into(self._name, 0, socket.AF_INET6, 0, 0, head[IPV6_BYTES - 16 : IPV6_BYTES], self._scope)

    def _on_refused(self, taken: int, size: int) -> int:
        number = ctypes.get_errno()
        if number in _MUST_WAIT or taken:  # an error that stays is told for the rest, which comes again
            return taken * size or -1
        raise OSError(number, os.strerror(number))

    def close(self) -> None:
        self._sock.close()
