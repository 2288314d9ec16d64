"""The listening TCP sockets of all tunnels, opened once by the supervisor and inherited by every worker.

No SO_REUSEPORT: a worker that dies leaves its pending connections to the others.
"""

import errno
import os
import socket
import struct
import time
from collections.abc import Iterator

from forwarder.errors import BootError
from workers.settings import Address, Settings

BACKLOG = 4096
NO_FAMILY = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.ENOPROTOOPT)
# Closing with this set sends a reset. Accepted sockets inherit it, so an application never reads a clean end from a
# worker that dies between accept and its first call on the socket.
LINGER_RESET = struct.pack("ii", 1, 0)
RETRY_S = 0.05

Listeners = dict[int, list[socket.socket]]


def open_listeners(settings: Settings, patience_s: float = 0.0) -> Listeners:
    """Tunnel index -> its listening sockets, non-blocking. Raises BootError, and then leaves none open.

    patience_s: how long to wait for a taken port, for a predecessor that was killed and is just being cleared away.
    """
    opened: Listeners = {}
    deadline = time.monotonic() + patience_s
    try:
        for index, name, address, applications in _wanted(settings):
            opened[index] = _open_patiently(name, address, applications, deadline)
    except BootError:
        close_listeners(opened)
        raise
    return opened


def close_listeners(listeners: Listeners) -> None:
    for sockets in listeners.values():
        for sock in sockets:
            sock.close()
    listeners.clear()


def _wanted(settings: Settings) -> Iterator[tuple[int, str, Address, bool]]:
    for client in settings.client_tunnels:
        yield client.index, client.name, client.local, True
    for server in settings.server_tunnels:
        yield server.index, server.name, server.listen, False


def _open_patiently(name: str, address: Address, applications: bool, deadline: float) -> list[socket.socket]:
    while True:
        try:
            return _open_address(address, applications)
        except socket.gaierror as error:
            raise BootError(69, f"tunnel {name!r}: cannot listen on {address}: {error.strerror}") from None
        except OSError as error:
            if error.errno == errno.EADDRINUSE and time.monotonic() < deadline:
                time.sleep(RETRY_S)
                continue
            code = 77 if isinstance(error, PermissionError) else 69
            reason = os.strerror(error.errno or 0).lower()
            raise BootError(code, f"tunnel {name!r}: cannot listen on {address}: {reason}") from None


def _open_address(address: Address, applications: bool) -> list[socket.socket]:
    """A name may mean several addresses: all of a family that this host has. Raises OSError."""
    if address.host == "::":
        return [_open_wildcard(address.port, applications)]
    infos = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    opened: list[socket.socket] = []
    missing: OSError | None = None
    for family, _, _, _, where in dict.fromkeys(infos):
        try:
            opened.append(_listen(family, where, applications))
        except OSError as error:
            if error.errno not in NO_FAMILY:
                for sock in opened:
                    sock.close()
                raise
            missing = error
    if not opened:
        raise missing or OSError(errno.EADDRNOTAVAIL, "no address")
    return opened


def _open_wildcard(port: int, applications: bool) -> socket.socket:
    """All addresses of both families, or of IPv4 where IPv6 is off."""
    try:
        return _listen(socket.AF_INET6, ("::", port), applications)
    except OSError as error:
        if error.errno not in NO_FAMILY:
            raise
    return _listen(socket.AF_INET, ("0.0.0.0", port), applications)


def _listen(family: int, where: tuple[object, ...], applications: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and where[0] == "::":
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited by accepted sockets
        if applications:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        sock.bind(where)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock
