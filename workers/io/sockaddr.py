"""Socket addresses as the kernel writes them, for use as keys: struct sockaddr_in and sockaddr_in6.

Two datagrams have equal keys exactly when they come from one address and port. A key holds, in this order:

sockaddr_in    16 bytes  family (16, native), port (16), address (32), zero (64)
sockaddr_in6   28 bytes  family (16, native), port (16), flow label (32, zero from the kernel), address (128),
                         scope (32, native): the interface of a link-local address, else 0

Ports and addresses are in network byte order.
"""

import socket
from struct import Struct

IPv4Address = tuple[str, int]
IPv6Address = tuple[str, int, int, int]
SocketAddress = IPv4Address | IPv6Address

_FAMILY = Struct("=H")
_IPV4 = Struct("!2xH4s8x")
_IPV6 = Struct("!2xHI16s4x")
_SCOPE = Struct("=I")
_SCOPE_AT = 24

IPV4_KEY_BYTES = _IPV4.size
IPV6_KEY_BYTES = _IPV6.size


def key_bytes(family: int) -> int:
    """The length of a key of AF_INET or AF_INET6. Raises ValueError for another family."""
    if family == socket.AF_INET:
        return IPV4_KEY_BYTES
    if family == socket.AF_INET6:
        return IPV6_KEY_BYTES
    raise ValueError(f"address family {family} is neither IPv4 nor IPv6")


def key_of(address: SocketAddress) -> bytes:
    """The key of an address as `socket` gives it, with a numeric host. Raises OSError on a name."""
    host, port, *more = address
    if not more and ":" not in host:
        key = bytearray(_IPV4.pack(port, socket.inet_aton(host)))
        _FAMILY.pack_into(key, 0, socket.AF_INET)
        return bytes(key)
    flow, scope = more or (0, 0)
    key = bytearray(_IPV6.pack(port, flow, socket.inet_pton(socket.AF_INET6, host.partition("%")[0])))
    _FAMILY.pack_into(key, 0, socket.AF_INET6)
    _SCOPE.pack_into(key, _SCOPE_AT, scope)
    return bytes(key)


def address_of(key: bytes) -> SocketAddress:
    """The address of a key, as `socket` takes it. Raises ValueError if it is no key."""
    family = _FAMILY.unpack_from(key)[0] if len(key) >= _FAMILY.size else 0
    if family == socket.AF_INET and len(key) == IPV4_KEY_BYTES:
        port, address = _IPV4.unpack(key)
        return socket.inet_ntoa(address), port
    if family == socket.AF_INET6 and len(key) == IPV6_KEY_BYTES:
        port, flow, address = _IPV6.unpack(key)
        return socket.inet_ntop(socket.AF_INET6, address), port, flow, _SCOPE.unpack_from(key, _SCOPE_AT)[0]
    raise ValueError(f"{len(key)} bytes of address family {family} are no key")
