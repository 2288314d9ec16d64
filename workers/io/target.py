"""Connecting to the service behind a tunnel, in a greenlet."""

import errno
import socket
from typing import Any

from gevent import socket as green_socket

from workers.io import sockets
from workers.settings import Address


def connect(target: Address, timeout_s: float) -> socket.socket:
    """A connection to the first address of `target` that takes one, within `timeout_s` each. Raises OSError.

    It is prepared as an application's before it is made: from its first moment, our end is a reset to the service.
    """
    failure: OSError | None = None
    for family, kind, protocol, _, where in _addresses(target):
        sock = green_socket.socket(family, kind, protocol)
        try:
            if sockets.is_of_reserve(sock):
                raise OSError(errno.EMFILE, "few descriptors are left")
            sockets.prepare_application(sock)
            sock.settimeout(timeout_s)
            sock.connect(where)
            connected = socket.socket(fileno=sock.detach())
            connected.setblocking(False)
            return connected
        except OSError as error:
            failure = error
        finally:
            sock.close()
    raise failure or OSError(f"no address of {target.host}")


def _addresses(target: Address) -> list[Any]:
    """As getaddrinfo. Only a name goes to gevent's resolver threads, which have to wait for a busy data path."""
    try:
        return socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        found: list[Any] = green_socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
        return found
