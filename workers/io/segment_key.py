"""Names of connections as `workers.core.tcp_header.Segment` has them: both addresses and both ports, sender first."""

import socket

from workers.io.sockets import plain_host


def packed(host: str) -> bytes:
    """A numeric address as it stands in IP headers: an IPv4 one that a socket for both families shows is IPv4 there."""
    plain = host.partition("%")[0]
    if "." in plain:
        plain = plain_host(plain)
    return socket.inet_pton(socket.AF_INET6 if ":" in plain else socket.AF_INET, plain)


def connection_key(host: str, port: int, peer: str, peer_port: int) -> bytes:
    """The key of what `host` sends to `peer`. Raises OSError."""
    return packed(host) + packed(peer) + port.to_bytes(2) + peer_port.to_bytes(2)


def own_key(sock: socket.socket) -> bytes:
    """The key of what a connected socket sends. Raises OSError."""
    (host, port, *_), (peer, peer_port, *_) = sock.getsockname(), sock.getpeername()
    return connection_key(host, port, peer, peer_port)


def reversed_key(key: bytes) -> bytes:
    """The key of the other direction."""
    width = (len(key) - 4) // 2
    return key[width:-4] + key[:width] + key[-2:] + key[-4:-2]


def peer_host(sock: socket.socket) -> str:
    """The peer's address, with its zone if it has one. Raises OSError."""
    host, _, *rest = sock.getpeername()
    zone = rest[1] if rest else 0
    return f"{host}%{socket.if_indextoname(zone)}" if zone else plain_host(host)
