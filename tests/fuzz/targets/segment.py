"""Frames that a packet socket reads: what is taken for a segment lies within them, and is what a plain reading finds.

A frame that serves as a template makes headers that are read back.
"""

from struct import pack, unpack_from

from tests.core.segments import ETHERNET6, IPV6, NO_VNET, Frame, timestamps
from workers.core.tcp_header import ACK, FIN, RST, SYN, VNET_BYTES, Header, Segment, Template, parse

LINKS = (14, 0)
EXTENSIONS = (0, 43, 60)
TCP = 6
RUN = (3001, 1400, 0xFFFFFFF0, 0x80000001, 65535, 0x01020304, 0x05060708)


def run(data: bytes) -> None:
    """First byte: the link; then the frame."""
    link, frame = LINKS[data[0] & 1 if data else 0], data[1:]
    segment = parse(frame, link)
    assert segment == parse(memoryview(bytearray(frame)), link)
    found = _read(frame, link)
    assert (segment is None) == (found is None), "taken for a segment, or not"
    if segment is not None and found is not None:
        key, options, payload = found
        assert (segment.key, frame[segment.offset :][: segment.length]) == (key, payload)
        assert segment.tsval is None or b"\x08\x0a" + pack(">I", segment.tsval) in options
    _check_template(frame, link, segment)


def _read(frame: bytes, link: int) -> tuple[bytes, bytes, bytes] | None:
    """Addresses and ports, TCP's options, the payload; None if it is no segment."""
    packet = frame[VNET_BYTES + link :]
    if len(packet) < 40:
        return None
    version = packet[0] >> 4
    if version == 4:
        start, total, protocol = (packet[0] & 15) * 4, *unpack_from(">2xH5xB", packet)
        addresses = packet[12:20]
        if start < 20 or packet[6] & 0x3F or packet[7]:
            return None
    elif version == 6:
        start, (length, protocol) = 40, unpack_from(">4xHB", packet)
        total, addresses = start + length, packet[8:40]
        while protocol in EXTENSIONS and start + 8 <= len(packet):
            protocol, start = packet[start], start + 8 + 8 * packet[start + 1]
    else:
        return None
    if protocol != TCP or start + 20 > len(packet) or total > len(packet):
        return None
    end, flags = start + (packet[start + 12] >> 4) * 4, packet[start + 13]
    ending = [bit for bit in (SYN, FIN, RST) if flags & bit]
    if not start + 20 <= end <= total or len(ending) > 1 or not (flags & ACK or ending in ([SYN], [RST])):
        return None
    return addresses + packet[start : start + 4], packet[start + 20 : end], packet[end:total]


def _check_template(frame: bytes, link: int, segment: Segment | None) -> None:
    template = Template.learn(frame, link)
    if template is None:
        return
    assert segment is not None and template.key == segment.key and len(template.link) == link
    assert Template.learn(memoryview(bytearray(frame)), link) == template
    for with_timestamps in (False, True):
        header = Header(template, with_timestamps)
        size, run_segment, sequence, acknowledged, window, tsval, _ = RUN
        built = header.for_run(*RUN)
        again = parse(built + bytes(size), link)
        assert again is not None and (again.key, again.length, again.gso_size) == (segment.key, size, run_segment)
        assert (again.sequence, again.acknowledged, again.window) == (sequence, acknowledged, window)
        assert (again.flags, again.tsval) == (ACK, tsval if with_timestamps else None)
        assert again.offset == len(built) == VNET_BYTES + link + header.overhead_bytes
        # What comes back is what the other end sends from the same template.
        answered = Template.learn(built + bytes(size), link)
        assert answered is not None and (answered.key, answered.peer_key) == (template.key, template.peer_key)


_IPV4 = Frame(payload=b"payload")
_TS = timestamps(0x11223344, 0x55667788)
_GSO = pack("=BBHHHH", 1, 1, 66, 4, 34, 16)


def _ethernet(frame: Frame, vnet: bytes = NO_VNET, tail: bytes = b"") -> bytes:
    return b"\0" + vnet + frame.built() + tail


def _plain(frame: Frame) -> bytes:
    return b"\1" + NO_VNET + frame.but(link=b"").built()


SEEDS = {
    "ipv4": _ethernet(_IPV4),
    "ipv4-timestamps": _ethernet(_IPV4.but(options=_TS), _GSO),
    "ipv4-padded": _ethernet(_IPV4.but(payload=b""), tail=bytes(6)),
    "ipv4-options": _ethernet(_IPV4.but(ip_options=b"\x01\x01\x01\0")),
    "ipv4-fragment": _ethernet(_IPV4.but(fragment=0x2000)),
    "ipv4-udp": _ethernet(_IPV4.but(next_header=17)),
    "ipv4-cut": _ethernet(_IPV4)[:-3],
    "ipv4-tun": _plain(_IPV4.but(options=_TS)),
    "ipv6": _ethernet(IPV6.but(payload=b"payload")),
    "ipv6-timestamps": _ethernet(IPV6.but(options=_TS)),
    "ipv6-extension": _ethernet(IPV6.but(link=ETHERNET6, next_header=0, extensions=bytes((6, 0)) + bytes(6))),
    "ipv6-extensions": _plain(
        IPV6.but(next_header=60, extensions=bytes((43, 0)) + bytes(6) + bytes((6, 1)) + bytes(14))
    ),
    "ipv6-tun": _plain(IPV6),
    "syn-ack": _ethernet(
        _IPV4.but(payload=b"", flags=SYN | ACK, options=b"\x02\x04\x05\xb4\x04\x02" + _TS[2:] + b"\x01\x03\x03\x0a\0\0")
    ),
    "syn": _ethernet(_IPV4.but(payload=b"", flags=SYN)),
    "fin": _ethernet(_IPV4.but(payload=b"", flags=FIN | ACK)),
    "rst": _ethernet(_IPV4.but(payload=b"", flags=RST)),
    "no-flags": _ethernet(_IPV4.but(flags=0)),
    "option-beyond-the-end": _ethernet(_IPV4.but(options=b"\x01\x01\x05\x30\0\0\0\0")),
}
