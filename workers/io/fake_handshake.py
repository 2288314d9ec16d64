"""The kernel's part in a fake-TCP port: it shakes hands with genuine options, then hears and says nothing more.

1. `open_listener` or `dial`: the payload filter stands before the first SYN, so payload never reaches the kernel's TCP
   and provokes no acknowledgement and no reset. The bare segments of the handshake pass.
2. `settle`, as soon as the connection is accepted or established: where filters were not permitted (no CAP_NET_ADMIN) a
   signature that nobody knows takes their place. `tcp_facts` tells what the two kernels have agreed on.
3. `mute`, once the peer has proven itself: nothing reaches the kernel's TCP any more. Not before that, or a handshake's
   ACK that was lost would never be repeated.
4. `close_silently`, when no segment of the connection can come any more: what comes without the socket is answered with
   RST by the kernel.

No gevent here: the supervisor opens listeners.
"""

import errno
import os
import socket
import struct
import sys
from contextlib import suppress
from enum import Enum, auto
from typing import Any, NamedTuple

from workers.core.bpf import DROP_ALL, DROP_PAYLOAD
from workers.io.socket_filter import attach_filter, has_filter
from workers.io.sockets import reset_on_close

BACKLOG = 4096
WINDOW_BYTES = 64 << 20
"""Asked for as receive buffer: of it the kernel derives the window scale, 10 at least, while nothing ever fills it."""

SO_BINDTODEVICE = 25
SO_RCVBUFFORCE = 33
TCP_MD5SIG = 14
TCP_REPAIR = 19
TCP_TIMESTAMP = 24

_INT = struct.Struct("=I")
_SIGNATURE_KEY_BYTES = 16
_SIGNATURE_ADDRESS_BYTES = 128  # struct sockaddr_storage
_SIGNATURE = struct.Struct(f"={_SIGNATURE_ADDRESS_BYTES}sBBHi80s")  # struct tcp_md5sig (linux/tcp.h)

# struct tcp_info (linux/tcp.h), as far as tcpi_total_retrans (Linux 2.6).
_TCP_INFO_BYTES = 104
_STATE_AT, _OPTIONS_AT, _SCALES_AT, _SND_MSS_AT, _PMTU_AT, _RTT_AT, _ADVMSS_AT = 0, 5, 6, 16, 60, 68, 84
_OPTION_TIMESTAMPS, _OPTION_SCALES = 1, 4
_ESTABLISHED = 1


class TcpFacts(NamedTuple):
    """What the two kernels have agreed on.

    established: the handshake is done, and the connection has not ended since.
    timestamps: each segment carries them.
    timestamp: TSval of a segment sent now, in milliseconds; 0 without timestamps. It was seen a millisecond behind that
    of a frame sent before: go on from the later of the two.
    send_scale, receive_scale: shifts of the windows that the peer and we advertise; 0 where they are not scaled.
    send_mss: payload bytes of a segment of ours, options deducted; at most what the path's MTU leaves as known now.
    receive_mss: the same for what the peer sends.
    rtt_us: of the handshake.
    """

    established: bool
    timestamps: bool
    timestamp: int
    send_scale: int
    receive_scale: int
    send_mss: int
    receive_mss: int
    path_mtu: int
    rtt_us: int


class Muted(Enum):
    """What keeps segments from the kernel's TCP."""

    FILTER = auto()
    SIGNATURE = auto()


def open_listener(family: socket.AddressFamily, host: str, port: int, *, reuse_port: bool = False) -> socket.socket:
    """A listening socket, non-blocking, whose connections the kernel gives no payload to. Raises OSError.

    `host` is numeric; "::" means all addresses of both families.
    reuse_port: several may listen on one address, for `attach_socket_choice`.
    """
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        prepare(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::")
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def dial(
    family: socket.AddressFamily, address: tuple[Any, ...], *, device: str | None = None, source: str | None = None
) -> socket.socket:
    """A socket whose handshake is on its way: writable once it is done, and `handshake_error` tells how.

    `address` as connect() takes it, numeric. Raises OSError.
    """
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        prepare(sock)
        if device is not None:
            sock.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, device.encode() + b"\0")
        if source is not None:
            sock.bind((source, 0))
        started = sock.connect_ex(address)
        if started not in (0, errno.EINPROGRESS):
            raise OSError(started, os.strerror(started))
    except OSError:
        sock.close()
        raise
    return sock


def handshake_error(sock: socket.socket) -> int:
    """Why the dialled socket's handshake failed, as errno; 0 if it did not (yet)."""
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def prepare(sock: socket.socket) -> None:
    """Set what must stand before connect() or listen(). Raises OSError, but for what is not permitted: see `settle`."""
    with suppress(PermissionError):
        attach_filter(sock, DROP_PAYLOAD)
    with suppress(PermissionError):  # without it, the scale of net.ipv4.tcp_rmem
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, WINDOW_BYTES)


def settle(sock: socket.socket) -> None:
    """Make sure that an established connection's payload does not reach the kernel's TCP. Raises OSError."""
    sock.setblocking(False)
    if not has_filter(sock):
        _expect_signatures(sock)


def mute(sock: socket.socket) -> Muted:
    """Keep every segment from the kernel's TCP from now on, a reset too. Raises OSError.

    If this process dies without `close_silently`, the kernel says so with one RST instead of FINs for many seconds.
    """
    reset_on_close(sock)
    try:
        attach_filter(sock, DROP_ALL)
    except PermissionError:
        _expect_signatures(sock)
        return Muted.SIGNATURE
    return Muted.FILTER


def _expect_signatures(sock: socket.socket) -> None:
    """Make the kernel drop all that the peer sends unsigned (RFC 2385), under a key that nobody knows."""
    host, port, *rest = sock.getpeername()
    if sock.family == socket.AF_INET6:
        flow, scope = rest
        address = struct.pack("=HHI16sI", sock.family, socket.htons(port), flow, _packed(host), scope)
    else:
        address = struct.pack("=HH4s", sock.family, socket.htons(port), _packed(host))
    key = os.urandom(_SIGNATURE_KEY_BYTES)
    option = _SIGNATURE.pack(address, 0, 0, len(key), 0, key)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_MD5SIG, option)


def _packed(host: str) -> bytes:
    plain = host.partition("%")[0]
    return socket.inet_pton(socket.AF_INET6 if ":" in plain else socket.AF_INET, plain)


def close_silently(sock: socket.socket) -> None:
    """Close a socket of any state without a segment on the wire. Harmless when it is closed already.

    Only where the kernel refuses both ways to do so (before Linux 5.7, without CAP_NET_ADMIN) one RST goes out.
    """
    try:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    except OSError:
        # The reset that closing then sends is routed to the loopback device, where nobody waits for it.
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, b"lo\0")
        with suppress(OSError):
            reset_on_close(sock)
    sock.close()


def tcp_facts(sock: socket.socket) -> TcpFacts:
    """What TCP_INFO says of a connection; right also where options were stripped on the way. Raises OSError."""
    raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    send_mss, path_mtu, rtt_us, advertised_mss = (
        _INT.unpack_from(raw, at)[0] for at in (_SND_MSS_AT, _PMTU_AT, _RTT_AT, _ADVMSS_AT)
    )
    timestamps = bool(raw[_OPTIONS_AT] & _OPTION_TIMESTAMPS)
    send_scale, receive_scale = _scales(raw)
    return TcpFacts(
        established=raw[_STATE_AT] == _ESTABLISHED,
        timestamps=timestamps,
        timestamp=sock.getsockopt(socket.IPPROTO_TCP, TCP_TIMESTAMP) & 0xFFFFFFFF if timestamps else 0,
        send_scale=send_scale,
        receive_scale=receive_scale,
        send_mss=send_mss,
        receive_mss=advertised_mss,
        path_mtu=path_mtu,
        rtt_us=rtt_us,
    )


def _scales(raw: bytes) -> tuple[int, int]:
    """(the peer's, ours): two bit fields, whose order is the machine's."""
    if not raw[_OPTIONS_AT] & _OPTION_SCALES:
        return 0, 0
    low, high = raw[_SCALES_AT] & 15, raw[_SCALES_AT] >> 4
    return (low, high) if sys.byteorder == "little" else (high, low)
