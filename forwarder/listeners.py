"""The sockets that outlive a worker: opened once by the supervisor, inherited by every worker, and by its replacement.

Tunnel index -> sockets. What stands where, by the tunnel's mode and role:

- stripe: listening TCP sockets, one for each address of `local` or `listen`. All workers share them, without
  SO_REUSEPORT: a worker that dies leaves its pending connections to the others.
- spray, client: UDP sockets on `local`, one group for each of its addresses with one socket for each worker, in the
  order of the seats. SO_REUSEPORT spreads applications over them by their addresses. A worker gets its own alone
  (`share_of`); what waits in them when the worker dies, its successor reads. A group grows with the number of workers
  and never shrinks, since a closed socket loses what waits in it: with fewer workers each has several.
- spray, server: for each carrier, in the order of `carriers`, its sockets, one for each address of `listen`: a UDP
  socket, or a listening TCP socket for fake TCP. Every worker has all of them, and reads those that it owns.
"""

import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, NamedTuple

from forwarder.errors import BootError
from workers.settings import (
    Address,
    Kind,
    Settings,
    SprayClientTunnel,
    SprayServerTunnel,
    StripeClientTunnel,
    Tunnel,
)

BACKLOG = 4096
NO_FAMILY = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.ENOPROTOOPT)
# Closing with this set sends a reset. Accepted sockets inherit it, so an application never reads a clean end from a
# worker that dies between accept and its first call on the socket.
LINGER_RESET = struct.pack("ii", 1, 0)
RETRY_S = 0.05
DATAGRAM_BUFFER_BYTES = 4 << 20
"""A default buffer holds 99 datagrams of 1300 bytes; this one as many as arrive while a worker is busy for 10 ms."""
UDP_GRO = 104  # linux/udp.h
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33  # asm-generic/socket.h; above net.core.*mem_max, with CAP_NET_ADMIN
PRIVILEGED_PORTS = 1024

Listeners = dict[int, list[socket.socket]]
Use = Literal["applications", "datagrams", "stripes", "port"]
"""Who comes: TCP or UDP applications at a client, stripes or a spray port's records at a server."""
Opener = Callable[[int, tuple[object, ...]], list[socket.socket]]
"""Address family and socket address -> sockets. Raises OSError, and then leaves none open."""


class End(NamedTuple):
    """One address of a host; `rest` is what follows the port in its socket address."""

    family: int
    host: str
    rest: tuple[object, ...] = ()


# All addresses of both families, or of IPv4 where IPv6 is off: the first of them that there is.
WILDCARD = (End(socket.AF_INET6, "::"), End(socket.AF_INET, "0.0.0.0"))


class Wanted(NamedTuple):
    """A port of a tunnel, and what to open there: the same one means the same sockets, whatever tunnel has it."""

    use: Use
    address: Address
    kind: Kind | None = None

    @property
    def opener(self) -> Opener:
        match self.use:
            case "applications":
                return partial(_open_stream, True)
            case "stripes":
                return partial(_open_stream, False)
            case "datagrams":
                return _open_group
            case "port":
                return _open_udp if self.kind == "udp" else _open_fake_tcp

    def __str__(self) -> str:
        return f"{self.address}/{self.kind}" if self.kind else str(self.address)


def open_wanted(name: str, wanted: Wanted, deadline: float, known: dict[str, tuple[End, ...]]) -> list[socket.socket]:
    """Opens what a tunnel wants at one port. Raises BootError, and then leaves none open.

    deadline: until when to wait for a taken port, for a predecessor that was killed and is just being cleared away.
    known: the addresses of the hosts that were looked up before.
    """
    what = f"tunnel {name!r}"
    host = wanted.address.host
    ends = known[host] = known.get(host) or _look_up(what, wanted)
    return _open_patiently(what, wanted, ends, deadline)


def open_metrics(listen: Address, patience_s: float = 0.0) -> list[socket.socket]:
    """The sockets of the metrics child. As `open_wanted`; patience_s: how long to wait for a taken port."""
    wanted = Wanted("stripes", listen)
    return _open_patiently("metrics", wanted, _look_up("metrics", wanted), time.monotonic() + patience_s)


def share_of(listeners: Listeners, settings: Settings, seat: int, workers: int) -> Listeners:
    """What the worker of that seat gets, of so many."""
    own = {tunnel.index for tunnel in settings.spray_client_tunnels}
    return {
        index: own_share(sockets, seat, workers) if index in own else sockets for index, sockets in listeners.items()
    }


def own_share(sockets: list[socket.socket], seat: int, workers: int) -> list[socket.socket]:
    """Of each group in a spray client tunnel's sockets, the seat's own."""
    return [sock for group in groups(sockets) for sock in group[seat::workers]]


def groups(sockets: list[socket.socket]) -> list[list[socket.socket]]:
    """A spray client tunnel's sockets by their address, in order."""
    found: dict[object, list[socket.socket]] = {}
    for sock in sockets:
        found.setdefault(sock.getsockname(), []).append(sock)
    return list(found.values())


def group_grown(sockets: list[socket.socket], workers: int) -> list[socket.socket]:
    """Adds sockets to every group until it has one for each worker. Raises OSError, and then leaves all as it was."""
    added: list[socket.socket] = []
    grown: list[socket.socket] = []
    try:
        for group in groups(sockets):
            grown += group
            group[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            for _ in range(workers - len(group)):
                added.append(_bind_udp(group[0].family, group[0].getsockname(), shared=True))
                grown.append(added[-1])
    except OSError:
        for sock in added:
            sock.close()
        raise
    return grown


def wanted_by(tunnel: Tunnel) -> Iterator[Wanted]:
    """The ports of a tunnel."""
    match tunnel:
        case SprayClientTunnel():
            yield Wanted("datagrams", tunnel.local, "udp")
        case SprayServerTunnel():
            for kind, port in tunnel.carriers:
                yield Wanted("port", Address(tunnel.listen, port), kind)
        case StripeClientTunnel():
            yield Wanted("applications", tunnel.local)
        case _:
            yield Wanted("stripes", tunnel.listen)


def _look_up(what: str, wanted: Wanted) -> tuple[End, ...]:
    """The addresses of a host. Raises BootError."""
    host = wanted.address.host
    if host == "::":
        return WILDCARD
    try:
        infos = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise BootError(69, f"{what}: cannot listen on {wanted}: {error.strerror}") from None
    return tuple(dict.fromkeys(End(family, str(where[0]), where[2:]) for family, _, _, _, where in infos))


def _open_patiently(what: str, wanted: Wanted, ends: tuple[End, ...], deadline: float) -> list[socket.socket]:
    while True:
        try:
            return _open_all(ends, wanted)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and time.monotonic() < deadline:
                time.sleep(RETRY_S)
                continue
            code = 77 if isinstance(error, PermissionError) else 69
            raise BootError(code, f"{what}: cannot listen on {wanted}: {_reason(error, wanted)}") from None


def _reason(error: OSError, wanted: Wanted) -> str:
    reason = os.strerror(error.errno or 0).lower()
    if error.errno == errno.EACCES and wanted.address.port < PRIVILEGED_PORTS:
        return f"{reason} (a port below {PRIVILEGED_PORTS} needs root or the capability CAP_NET_BIND_SERVICE)"
    return reason


def _open_all(ends: tuple[End, ...], wanted: Wanted) -> list[socket.socket]:
    """A name may mean several addresses: all of a family that this host has. Raises OSError."""
    opened: list[socket.socket] = []
    missing: OSError | None = None
    for end in ends:
        try:
            opened += wanted.opener(end.family, (end.host, wanted.address.port, *end.rest))
        except OSError as error:
            if error.errno not in NO_FAMILY:
                for sock in opened:
                    sock.close()
                raise
            missing = error
        else:
            if ends is WILDCARD:
                break
    if not opened:
        raise missing or OSError(errno.EADDRNOTAVAIL, "no address")
    return opened


def _open_stream(applications: bool, family: int, where: tuple[object, ...]) -> list[socket.socket]:
    return [_listen(family, where, applications)]


def _listen(family: int, where: tuple[object, ...], applications: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _take_both_families(sock, where)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited by accepted sockets
        if applications:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        sock.bind(where)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _open_udp(family: int, where: tuple[object, ...]) -> list[socket.socket]:
    return [_bind_udp(family, where)]


def _open_group(family: int, where: tuple[object, ...]) -> list[socket.socket]:
    """The first socket of a group, bound alone: no socket of another process is among those that join it."""
    return [_bind_udp(family, where)]


def _bind_udp(family: int, where: tuple[object, ...], shared: bool = False) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        _take_both_families(sock, where)
        for option, beyond in ((socket.SO_RCVBUF, SO_RCVBUFFORCE), (socket.SO_SNDBUF, SO_SNDBUFFORCE)):
            sock.setsockopt(socket.SOL_SOCKET, option, DATAGRAM_BUFFER_BYTES)
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, beyond, DATAGRAM_BUFFER_BYTES)
        with contextlib.suppress(OSError):  # Linux 5.0; without it datagrams come one by one
            sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(where)
    except OSError:
        sock.close()
        raise
    return sock


def _open_fake_tcp(family: int, where: tuple[object, ...]) -> list[socket.socket]:
    # Only a configuration that has fake TCP loads what it takes.
    from workers.io.fake_handshake import open_listener  # noqa: PLC0415

    return [open_listener(socket.AddressFamily(family), str(where[0]), int(str(where[1])))]


def _take_both_families(sock: socket.socket, where: tuple[object, ...]) -> None:
    """For the wildcard of IPv6: IPv4 as well, whatever the system's default."""
    if sock.family == socket.AF_INET6 and where[0] == "::":
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
