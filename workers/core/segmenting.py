"""Cuts a run of fake TCP into its segments, as the kernel or a network card does where they get it in one piece.

What goes out through a raw socket, and what stands in a capture file, are segments as on the wire: each with its own
length, identification (IPv4), sequence number and checksums; FIN and PSH stay with the last. Here a packet starts with
its IP header, IPv4 without options or IPv6 without extension headers.

Checksums (RFC 1071) are sums in ones' complement, that is modulo 2^16 - 1: any number of words is summed by dividing
the whole as one large integer. That takes 3.2 us for 1448 bytes, sum() over words 6 to 11.
"""

from struct import Struct

from workers.core.tcp_header import FIN, Bytes

IPV4_BYTES, IPV6_BYTES = 20, 40
TCP, UDP = 6, 17
PSH = 0x08

_ENDS = FIN | PSH
_DATA_OFFSET_AT, _FLAGS_AT, _CHECKSUM_AT, _LEAST_TCP_BYTES = 12, 13, 16, 20
_MODULUS = 0xFFFF
_HALF, _WORD = Struct(">H"), Struct(">I")
_LENGTH_AND_NUMBER = Struct(">HH")
_UDP = Struct(">HHHH")
_IPV4 = Struct(">BBHHHBBH8s")
_IPV6 = Struct(">IHBB32s")
_DONT_FRAGMENT = 0x4000
_HOP_LIMIT = 64

_from_bytes = int.from_bytes


def cut(head: Bytes, payload: memoryview, size: int) -> bytearray:
    """The headers of all segments of a run, back to back, each as long as `head`.

    head: IP and TCP header of the run, whose length fields and checksums do not matter. size: bytes of payload in each
    segment but the last, which may have fewer; 0 for a segment without payload.
    """
    is_ipv4 = head[0] >> 4 == 4
    tcp = IPV4_BYTES if is_ipv4 else IPV6_BYTES
    total, width = len(payload), len(head)
    count = -(-total // size) if total else 1
    blank = bytearray(head)
    _HALF.pack_into(blank, tcp + _CHECKSUM_AT, 0)
    (sequence,), (number,) = _WORD.unpack_from(blank, tcp + 4), _HALF.unpack_from(blank, 4)
    last_flags = blank[tcp + _FLAGS_AT]
    blank[tcp + _FLAGS_AT] = flags = last_flags & ~_ENDS
    _WORD.pack_into(blank, tcp + 4, 0)
    if is_ipv4:
        _LENGTH_AND_NUMBER.pack_into(blank, 2, 0, 0)
        _HALF.pack_into(blank, 10, 0)
    ip_sum = _from_bytes(blank[:tcp]) % _MODULUS
    tcp_sum = (_from_bytes(blank[tcp:]) + _from_bytes(blank[tcp - (8 if is_ipv4 else 32) : tcp]) + TCP) % _MODULUS
    heads = blank * count
    for index in range(count):
        at = index * width
        part = payload[index * size : (index + 1) * size] if count > 1 else payload
        length = len(part) + width
        own = (sequence + index * size) & 0xFFFFFFFF
        if index == count - 1 and flags != last_flags:
            heads[at + tcp + _FLAGS_AT] = last_flags
            tcp_sum += last_flags - flags
        if is_ipv4:
            name = (number + index) & 0xFFFF
            _LENGTH_AND_NUMBER.pack_into(heads, at + 2, length, name)
            _HALF.pack_into(heads, at + 10, -(ip_sum + length + name) % _MODULUS)
        else:
            _HALF.pack_into(heads, at + 4, length - IPV6_BYTES)
        _WORD.pack_into(heads, at + tcp + 4, own)
        check = -(tcp_sum + length - tcp + own + sum_of(part)) % _MODULUS
        _HALF.pack_into(heads, at + tcp + _CHECKSUM_AT, check)
    return heads


def sum_of(data: Bytes) -> int:
    """The sum of the 16-bit words of `data`, congruent to the one in ones' complement; an odd end counts as padded."""
    whole = _from_bytes(data)
    return (whole << 8 if len(data) & 1 else whole) % _MODULUS


def head_bytes(packet: Bytes) -> int:
    """Length of the IP and TCP header of a packet that `cut` takes; 0 for any other."""
    version = packet[0] >> 4 if len(packet) else 0
    if version == 4 and packet[0] == 0x45 and len(packet) >= IPV4_BYTES + _LEAST_TCP_BYTES:
        tcp, protocol = IPV4_BYTES, packet[9]
    elif version == 6 and len(packet) >= IPV6_BYTES + _LEAST_TCP_BYTES:
        tcp, protocol = IPV6_BYTES, packet[6]
    else:
        return 0
    end = tcp + (packet[tcp + _DATA_OFFSET_AT] >> 4) * 4
    return end if protocol == TCP and tcp + _LEAST_TCP_BYTES <= end <= len(packet) else 0


def is_partial(packet: Bytes) -> bool:
    """Whether the TCP checksum is only the sum over the pseudo header, which the kernel leaves for a card to complete.

    `packet` is one for which `head_bytes` is not 0, and has no padding behind it.
    """
    is_ipv4 = packet[0] >> 4 == 4
    tcp = IPV4_BYTES if is_ipv4 else IPV6_BYTES
    (check,) = _HALF.unpack_from(packet, tcp + _CHECKSUM_AT)
    pseudo = _from_bytes(packet[tcp - (8 if is_ipv4 else 32) : tcp]) + TCP + len(packet) - tcp
    return bool((pseudo - check) % _MODULUS == 0)


def udp_head(source: bytes, target: bytes, ports: tuple[int, int], payload: Bytes) -> bytes:
    """IP and UDP header of one datagram. source, target: addresses of 4 or 16 bytes; ports: of both in that order."""
    length = len(payload) + _UDP.size
    pseudo = _from_bytes(source) + _from_bytes(target) + UDP + length
    blank = _UDP.pack(*ports, length, 0)
    # A checksum of 0 would say that there is none (RFC 768).
    check = -(pseudo + _from_bytes(blank) + sum_of(payload)) % _MODULUS or _MODULUS
    datagram = _UDP.pack(*ports, length, check)
    if len(source) == 16:
        return _IPV6.pack(6 << 28, length, UDP, _HOP_LIMIT, source + target) + datagram
    fields = (0x45, 0, IPV4_BYTES + length, 0, _DONT_FRAGMENT, _HOP_LIMIT, UDP)
    check = -_from_bytes(_IPV4.pack(*fields, 0, source + target)) % _MODULUS
    return _IPV4.pack(*fields, check, source + target) + datagram
