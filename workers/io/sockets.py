"""Socket options, and what the kernel tells of a TCP connection."""

import contextlib
import errno
import fcntl
import resource
import socket
import struct
import sys
from typing import NamedTuple

TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)
TCP_USER_TIMEOUT = getattr(socket, "TCP_USER_TIMEOUT", 18)
SO_MAX_PACING_RATE = 47
"""Bytes a second (asm-generic/socket.h)."""
PACING_MAX, UNLIMITED = (1 << 31) - 1, -1
SIOCOUTQNSD = 0x894B
"""Bytes of a TCP socket not yet sent (linux/sockios.h)."""
RESERVED_DESCRIPTORS = 32
"""Left free by connections of applications and to targets, for stripes that are dialled again and what follows."""
LAST_DESCRIPTORS = 16
"""Left free by dials, too, for what must not fail: meeting a worker, which takes 7, and reports."""
USER_TIMEOUT_MS = 20_000
"""A stripe whose data stays unacknowledged for so long is dead."""

KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 120, 30, 6
"""An application or a target that vanished without a word is noticed after five minutes. Its stream would last for ever
otherwise, and a worker that has followers with it."""

ICMP_ERRORS = frozenset(
    {
        errno.ECONNREFUSED,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.ENONET,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
        errno.EPROTO,
        errno.EACCES,
    }
)
"""What ICMP makes of a datagram sent earlier (icmp_err_convert of net/ipv4/icmp.c, tab_unreach of net/ipv6/icmp.c)."""

_INT = struct.Struct("=i")
_RESET_ON_CLOSE = struct.pack("=ii", 1, 0)
_CLOSE_NORMALLY = struct.pack("=ii", 0, 0)

# struct tcp_info of linux/tcp.h, at least up to tcpi_delivery_rate (Linux 4.9).
_TCP_INFO_BYTES = 168
_U32 = struct.Struct("=I")
_RTT_AT, _MSS_AT, _CWND_AT, _UNACKED_AT, _RETRANS_AT, _SEGS_OUT_AT = 68, 16, 80, 24, 100, 136
_DELIVERY_RATE_AT, _APP_LIMITED_AT = 160, 7
_TIMEOUTS_AT = 2
_CA_STATE_AT, _NOT_SENT_AT = 1, 144
_BYTES_ACKED_AT, _MIN_RTT_AT = 120, 148
_CA_OPEN = 0
"""TCP_CA_Open: no ACK speaks of a hole."""
_U64 = struct.Struct("=Q")


class TcpInfo(NamedTuple):
    """A few fields of TCP_INFO. `loss`: retransmitted share of all segments. `*_rate_bps`: bits a second.

    `timeouts`: retransmission timeouts in a row, since something was acknowledged. `least_rtt_us`: the shortest round
    trip of the last minutes (net.ipv4.tcp_min_rtt_wlen).
    """

    rtt_us: int
    least_rtt_us: int
    unacked_bytes: int
    acked_bytes: int
    window_rate_bps: float
    delivery_rate_bps: float
    app_limited: bool
    timeouts: int
    loss: float


def _raw_tcp_info(sock: socket.socket) -> bytes:
    """struct tcp_info; empty where the kernel does not tell. Raises OSError on a closed socket."""
    if not sys.platform.startswith("linux"):
        return b""
    raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    return raw if len(raw) == _TCP_INFO_BYTES else b""


def tcp_info(sock: socket.socket) -> TcpInfo | None:
    """What the kernel knows of the connection; None where it does not tell (not Linux, or closed)."""
    try:
        raw = _raw_tcp_info(sock)
    except OSError:
        return None
    if not raw:
        return None
    (rtt_us,) = _U32.unpack_from(raw, _RTT_AT)
    (mss,) = _U32.unpack_from(raw, _MSS_AT)
    (cwnd,) = _U32.unpack_from(raw, _CWND_AT)
    (unacked,) = _U32.unpack_from(raw, _UNACKED_AT)
    (retrans,) = _U32.unpack_from(raw, _RETRANS_AT)
    (segments,) = _U32.unpack_from(raw, _SEGS_OUT_AT)
    (delivery,) = _U64.unpack_from(raw, _DELIVERY_RATE_AT)
    return TcpInfo(
        rtt_us=rtt_us,
        least_rtt_us=_U32.unpack_from(raw, _MIN_RTT_AT)[0],
        unacked_bytes=unacked * mss,
        acked_bytes=_U64.unpack_from(raw, _BYTES_ACKED_AT)[0],
        window_rate_bps=8e6 * cwnd * mss / max(rtt_us, 1),
        delivery_rate_bps=8.0 * delivery,
        app_limited=bool(raw[_APP_LIMITED_AT] & 1),
        timeouts=raw[_TIMEOUTS_AT],
        loss=retrans / max(segments, 1),
    )


def unsent_bytes(sock: socket.socket) -> int:
    """Bytes that wait in the kernel and were not sent once. Raises OSError on a dead socket."""
    return int(_INT.unpack(fcntl.ioctl(sock.fileno(), SIOCOUTQNSD, b"\0\0\0\0"))[0])


def is_clear(sock: socket.socket) -> bool:
    """Whether what is written now leaves at once and nothing is known to be missing in front of it: nothing waits in
    the kernel, the window has room, and no hole is seen. True where the kernel does not tell."""
    try:
        raw = _raw_tcp_info(sock)
    except OSError:
        return False
    if not raw:
        return True
    (unacked,) = _U32.unpack_from(raw, _UNACKED_AT)
    (cwnd,) = _U32.unpack_from(raw, _CWND_AT)
    (unsent,) = _U32.unpack_from(raw, _NOT_SENT_AT)
    return raw[_CA_STATE_AT] == _CA_OPEN and unacked < cwnd and not unsent


def set_unsent_limit(sock: socket.socket, limit: int) -> None:
    """Let the socket be writable while less than half of `limit` bytes are unsent (TCP_NOTSENT_LOWAT)."""
    sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, limit)


def set_pacing_limit(sock: socket.socket, limit_bps: float) -> None:
    """Let the socket send no more than so many bits a second; 0 for no limit. Raises OSError on a closed socket."""
    limit = min(max(int(limit_bps / 8), 1), PACING_MAX) if limit_bps else UNLIMITED
    sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, limit)


def is_of_reserve(sock: socket.socket, reserve: int = RESERVED_DESCRIPTORS) -> bool:
    """Whether so few descriptors are left that they are needed for something else than more connections.

    The kernel gives the lowest number that is free, so the number says how many are taken.
    """
    return sock.fileno() >= resource.getrlimit(resource.RLIMIT_NOFILE)[0] - reserve


def stripes_allowed(tunnels: int) -> int:
    """How many stripes a worker may have for each of its tunnels: half of its descriptors are for streams."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max((limit // 2 - RESERVED_DESCRIPTORS) // tunnels, 1)


def reset_on_close(sock: socket.socket) -> None:
    """However the process ends from now on, the kernel sends RST: the peer never takes it for an end of stream."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)


def close_normally(sock: socket.socket) -> None:
    """Undo `reset_on_close`: both directions have finished."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _CLOSE_NORMALLY)


def prepare_application(sock: socket.socket) -> None:
    """Options of an application's connection, or of one to a target. Raises OSError."""
    sock.setblocking(False)
    reset_on_close(sock)
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform.startswith("linux"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


def set_congestion(sock: socket.socket, algorithm: str | None) -> None:
    """Choose the congestion control by name; None leaves the system's. Raises OSError if there is none of that name."""
    if algorithm is not None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, algorithm.encode())
        except OSError as error:
            raise OSError(error.errno, f"congestion {algorithm!r}: {error.strerror}") from None


def prepare_stripe(sock: socket.socket, congestion: str | None) -> None:
    """Options of a stripe. Raises OSError."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
    set_congestion(sock, congestion)


def close_with_reset(sock: socket.socket) -> None:
    """Close at once; the peer reads a reset."""
    with contextlib.suppress(OSError):
        reset_on_close(sock)
    sock.close()


def plain_host(host: str) -> str:
    """An address as people write it: an IPv4 client of a listener for both families comes as ::ffff:a.b.c.d."""
    return host.removeprefix("::ffff:")


def address_text(sock: socket.socket, *, peer: bool) -> str:
    """The socket's own or its peer's address as text; empty when it is not connected."""
    try:
        name = sock.getpeername() if peer else sock.getsockname()
    except OSError:
        return ""
    if not isinstance(name, tuple):
        return str(name)
    host = plain_host(name[0])
    return f"[{host}]:{name[1]}" if ":" in host else f"{host}:{name[1]}"
