"""Which way and to which next hop the kernel sends: asked by route netlink (RFC 3549, linux/rtnetlink.h)."""

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, sender
_ROUTE = struct.Struct("=BBBBBBBBI")  # struct rtmsg
_NEIGHBOUR = struct.Struct("=B3xiHBB")  # struct ndmsg
_ATTRIBUTE = struct.Struct("=HH")  # struct rtattr: length, type
_INT = struct.Struct("=I")
_ERROR = struct.Struct("=i")

_NLMSG_ERROR, _RTM_NEWROUTE, _RTM_GETROUTE, _RTM_NEWNEIGH, _RTM_GETNEIGH = 2, 24, 26, 28, 30
_NLM_F_REQUEST = 1
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PREFSRC, _RTA_METRICS = 1, 4, 5, 7, 8
_RTAX_MTU = 2
_NDA_DST, _NDA_LLADDR = 1, 2
_NESTED = 0x8000
_GROUPS = 0x01 | 0x04 | 0x10 | 0x40 | 0x100 | 0x400  # RTMGRP_: link, neigh, IPv4 and IPv6 addresses and routes
_ANSWER_BYTES = 65536
_SIOCGIFNAME = 0x8910
_REQUEST = struct.Struct("=16si20x")  # struct ifreq


class Route(NamedTuple):
    """device: its name. mtu: what is known of the route beyond the device's own, 0 for nothing.

    source: the address that the kernel would send from. gateway: the next hop; empty when the peer itself is.
    """

    device: str
    mtu: int
    source: str
    gateway: str


def open_netlink(*, watch: bool = False) -> socket.socket:
    """A socket to ask on, or (`watch`) one that becomes readable when links, neighbours, addresses or routes change."""
    flags = socket.SOCK_CLOEXEC | (socket.SOCK_NONBLOCK if watch else 0)
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | flags, socket.NETLINK_ROUTE)
    sock.bind((0, _GROUPS if watch else 0))
    return sock


def drain(sock: socket.socket) -> bool:
    """Read what a watching socket has; return whether there was anything, changes that did not fit into it too."""
    changed = False
    while True:
        try:
            sock.recv(_ANSWER_BYTES)
        except BlockingIOError:
            return changed
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
        changed = True


def route_to(sock: socket.socket, host: str) -> Route:
    """How packets to `host` (numeric) leave. Raises OSError: ENETUNREACH and its like if there is no way.

    The answer comes from this kernel at once, so a socket of `open_netlink` that blocks does not block for long.
    """
    plain, _, zone = host.partition("%")
    family, packed = _packed(plain)
    body = _ROUTE.pack(family, 8 * len(packed), 0, 0, 0, 0, 0, 0, 0) + _attribute(_RTA_DST, packed)
    if zone:
        body += _attribute(_RTA_OIF, _INT.pack(socket.if_nametoindex(zone)))
    try:
        answer = _ask(sock, _RTM_GETROUTE, _RTM_NEWROUTE, body)
    except OSError as error:
        raise OSError(error.errno, f"no route to {host}: {error.strerror}") from None
    return _route(sock, family, dict(_attributes(answer[_ROUTE.size :])))


def neighbour(sock: socket.socket, device: int, host: str) -> bytes:
    """The link address of a next hop on the device of that number; empty while none is known. Raises OSError."""
    family, packed = _packed(host)
    body = _NEIGHBOUR.pack(family, device, 0, 0, 0) + _attribute(_NDA_DST, packed)
    try:
        answer = _ask(sock, _RTM_GETNEIGH, _RTM_NEWNEIGH, body)
    except FileNotFoundError:
        return b""
    return dict(_attributes(answer[_NEIGHBOUR.size :])).get(_NDA_LLADDR, b"")


def _packed(host: str) -> tuple[socket.AddressFamily, bytes]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return family, socket.inet_pton(family, host)


def _ask(sock: socket.socket, question: int, expected: int, body: bytes) -> bytes:
    """The body of the one message that answers. Raises OSError."""
    sock.send(_HEADER.pack(_HEADER.size + len(body), question, _NLM_F_REQUEST, 1, 0) + body)
    answer = sock.recv(_ANSWER_BYTES)
    kind = _HEADER.unpack_from(answer)[1]
    if kind == _NLMSG_ERROR:
        number = -_ERROR.unpack_from(answer, _HEADER.size)[0]
        raise OSError(number, os.strerror(number))
    if kind != expected:
        raise OSError(errno.EPROTO, f"netlink answered {question} with {kind}")
    return answer[_HEADER.size :]


def _route(sock: socket.socket, family: socket.AddressFamily, found: dict[int, bytes]) -> Route:
    if _RTA_OIF not in found:
        raise OSError(errno.ENETUNREACH, "the route names no device")
    metrics = dict(_attributes(found.get(_RTA_METRICS, b"")))
    return Route(
        device=_name(sock, _INT.unpack(found[_RTA_OIF])[0]),
        mtu=_INT.unpack(metrics[_RTAX_MTU])[0] if _RTAX_MTU in metrics else 0,
        source=_text(family, found.get(_RTA_PREFSRC)),
        gateway=_text(family, found.get(_RTA_GATEWAY)),
    )


def _name(sock: socket.socket, number: int) -> str:
    """A device's name, in the network namespace of `sock`."""
    answer = fcntl.ioctl(sock.fileno(), _SIOCGIFNAME, _REQUEST.pack(b"", number))
    return os.fsdecode(_REQUEST.unpack(answer)[0].rstrip(b"\0"))


def _text(family: socket.AddressFamily, packed: bytes | None) -> str:
    return "" if packed is None else socket.inet_ntop(family, packed)


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind & ~_NESTED, data[at + _ATTRIBUTE.size : at + length]
        at += -(-length // 4) * 4
