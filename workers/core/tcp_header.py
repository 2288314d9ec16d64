"""Headers of fake TCP: what stands in front of the payload of a run, sent or received.

A run is a number of TCP segments that cross the packet socket in one piece; the kernel or the network card cuts it.

     0         10            10 + link          + 20 or 40         + 20 or 32
    +----------+-------------+------------------+------------------+-----------------------+
    | vnet_hdr | link header | IPv4 or IPv6     | TCP              | payload of the run    |
    +----------+-------------+------------------+------------------+-----------------------+

- vnet_hdr (PACKET_VNET_HDR, linux/virtio_net.h), in native byte order. A backend that has none leaves 10 zero bytes:
    flags u8 | gso_type u8 | hdr_len u16 | gso_size u16 | csum_start u16 | csum_offset u16
  Sent: flags NEEDS_CSUM; gso_type NONE for a single segment, since the kernel refuses a run of one, else TCPV4 or TCPV6
  with the size of all segments but the last; hdr_len and csum_start count from the link header. Received: gso_size is a
  hint, nothing more.
- Link header: 14 bytes of Ethernet, or none (tun: the frame starts with the IP header). Copied from the template.
- IPv4 without options and with DF, or IPv6 without extension headers. Length, identification and header checksum are
  those of the whole run: the kernel writes them anew for each segment.
- TCP with the sum over the pseudo header in place of the checksum, which the kernel completes (NEEDS_CSUM). Options:
  none, or NOP NOP timestamps (RFC 7323, appendix A).

Checksums of received segments are not looked at: on virtual devices they are partial, and the records have tags.
"""

from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple

Bytes = bytes | bytearray | memoryview

VNET_BYTES = 10
ETHERNET_BYTES = 14

FIN = 0x01
SYN = 0x02
RST = 0x04
ACK = 0x10

NEEDS_CSUM = 1
GSO_NONE = 0
GSO_TCPV4 = 1
GSO_TCPV6 = 4
GSO_ECN = 0x80

# A frame of GSO_LEGACY_MAX_SIZE (65,536 bytes, link header included) or more is cut by the kernel in software, whatever
# the device could do (net/core/dev.c, gso_features_check).
FRAME_MAX = 65_535

_TCP = 6
_CHECKSUM_OFFSET = 16
_DONT_FRAGMENT = 0x4000
_MORE_OR_OFFSET = 0x3FFF
_PLAIN_IPV4 = 0x45  # version 4, five words: no options
_IPV4_BYTES = 20
_IPV6_BYTES = 40
_TCP_BYTES = 20
_TIMESTAMPS_BYTES = 12
_TIMESTAMPS = 0x0101080A  # NOP, NOP, kind 8, 10 bytes

# Hop-by-hop options, routing and destination options: each names the next header and its own length in 8 bytes.
_EXTENSIONS = (0, 43, 60)

# What one TCP may send: at most one of SYN, FIN and RST, and no ACK only with SYN or RST.
_SANE = frozenset(
    flags for flags in range(256) if flags & (FIN | SYN | RST) in ((0, FIN, SYN, RST) if flags & ACK else (SYN, RST))
)

_VNET = Struct("=BBHHHH")
_GSO = Struct("=xBxxH")
# From the IP header on: length, [fragment,] protocol, addresses and ports, sequence, acknowledgement, offset, window.
_IPV4_AND_TCP = Struct(">2xH2xHxB2x12sIIHH")
_IPV6_AND_TCP = Struct(">4xHBx36sIIHH")
_TCP_HEAD = Struct(">4sIIHH")
_TWO = Struct(">II")
_OPTIONS = Struct(">III")
_SEND_IPV4 = Struct(">HHHHH12sIIHHHH")
_SEND_IPV6 = Struct(">HH36sIIHHHH")

_gso_of = _GSO.unpack_from
_ipv4_and_tcp = _IPV4_AND_TCP.unpack_from
_ipv6_and_tcp = _IPV6_AND_TCP.unpack_from
_new = tuple.__new__


class Segment(NamedTuple):
    """A received segment, or a run of them that the kernel handed over in one piece.

    key: source address, destination address, source port, destination port as on the wire: 12 bytes for IPv4, 36 for
    IPv6. window: not scaled. tsval: None without the timestamps option. offset, length: where in the frame the payload
    stands. gso_size: bytes of payload of all its segments but the last, 0 where the kernel did not say.
    """

    key: bytes
    sequence: int
    acknowledged: int
    window: int
    flags: int
    tsval: int | None
    offset: int
    length: int
    gso_size: int


def parse(frame: Bytes, link_bytes: int) -> Segment | None:
    """Read the headers of a received frame; None for all that is not a whole, sane TCP segment.

    frame: all that was read and nothing more, vnet_hdr first. link_bytes: 14 for Ethernet, 0 for none.
    """
    start = VNET_BYTES + link_bytes
    size = len(frame) - start
    if size < _IPV4_BYTES + _TCP_BYTES:
        return None
    if frame[start] == _PLAIN_IPV4:
        end, fragment, protocol, key, sequence, acknowledged, word, window = _ipv4_and_tcp(frame, start)
        if protocol != _TCP or fragment & _MORE_OR_OFFSET:
            return None
        tcp = start + _IPV4_BYTES
    elif frame[start] >> 4 == 6 and frame[start + 6] == _TCP and size >= _IPV6_BYTES + _TCP_BYTES:
        end, protocol, key, sequence, acknowledged, word, window = _ipv6_and_tcp(frame, start)
        end += _IPV6_BYTES
        tcp = start + _IPV6_BYTES
    else:
        found = _find_tcp(frame, start)
        if found is None:
            return None
        tcp, end, addresses = found
        ports, sequence, acknowledged, word, window = _TCP_HEAD.unpack_from(frame, tcp)
        key = addresses + ports
    offset = tcp + (word >> 12 << 2)
    length = start + end - offset
    flags = word & 0xFF
    if end > size or length < 0 or offset < tcp + _TCP_BYTES or flags not in _SANE:
        return None
    tsval = None if offset == tcp + _TCP_BYTES else _timestamps(frame, tcp + _TCP_BYTES, offset)[0]
    gso_type, gso_size = _gso_of(frame)
    if gso_type & ~GSO_ECN not in (GSO_TCPV4, GSO_TCPV6):
        gso_size = 0
    fields = (key, sequence, acknowledged, window, flags, tsval, offset, length, gso_size)
    return _new(Segment, fields)  # half the time of Segment(*fields)


def _find_tcp(frame: Bytes, start: int) -> tuple[int, int, bytes] | None:
    """Where TCP starts behind options or extension headers, the packet's length, and its addresses."""
    if frame[start] >> 4 == 4:
        tcp = start + (frame[start] & 15) * 4
        end = int.from_bytes(frame[start + 2 : start + 4])
        fragment = int.from_bytes(frame[start + 6 : start + 8])
        protocol = frame[start + 9]
        if tcp < start + _IPV4_BYTES or fragment & _MORE_OR_OFFSET:
            return None
        addresses = bytes(frame[start + 12 : start + _IPV4_BYTES])
    elif frame[start] >> 4 == 6:
        tcp = start + _IPV6_BYTES
        end = int.from_bytes(frame[start + 4 : start + 6]) + _IPV6_BYTES
        protocol = frame[start + 6]
        while protocol in _EXTENSIONS and tcp + 8 <= len(frame):
            protocol = frame[tcp]
            tcp += (frame[tcp + 1] + 1) * 8
        addresses = bytes(frame[start + 8 : start + _IPV6_BYTES])
    else:
        return None
    if protocol != _TCP or tcp + _TCP_BYTES > len(frame):
        return None
    return tcp, end, addresses


def _timestamps(frame: Bytes, at: int, end: int) -> tuple[int, int] | tuple[None, None]:
    """TSval and TSecr among TCP's options (RFC 7323, 3.2), those from `at` to `end`; what is malformed holds none."""
    if end - at == _TIMESTAMPS_BYTES:
        kind, tsval, tsecr = _OPTIONS.unpack_from(frame, at)
        if kind == _TIMESTAMPS:
            return tsval, tsecr
    while at + 1 < end and frame[at]:
        if frame[at] == 1:  # NOP, the one option but the end that has no length
            at += 1
            continue
        length = frame[at + 1]
        if length < 2 or at + length > end:
            break
        if frame[at] == 8 and length == 10:
            tsval, tsecr = _TWO.unpack_from(frame, at + 2)
            return tsval, tsecr
        at += length
    return None, None


@dataclass(frozen=True, slots=True)
class Template:
    """What one captured frame of the own kernel says about a connection.

    link: header with the next hop, or nothing. key: as `Segment.key` of what is sent; peer_key: of what is received.
    next_sequence, acknowledged: the numbers that the next segment sent takes. tsecr: the peer's last TSval, 0 without.
    """

    link: bytes
    key: bytes
    hop_limit: int
    traffic_class: int
    flow_label: int
    identification: int
    next_sequence: int
    acknowledged: int
    tsecr: int

    @property
    def is_ipv4(self) -> bool:
        """Whether the connection is one over IPv4."""
        return len(self.key) == 12

    @property
    def peer_key(self) -> bytes:
        """`Segment.key` of what this connection receives."""
        key = self.key
        width = (len(key) - 4) // 2
        return key[width:-4] + key[:width] + key[-2:] + key[-4:-2]

    @classmethod
    def learn(cls, frame: Bytes, link_bytes: int) -> "Template | None":
        """Take the template from a frame of our own: the client's handshake ACK or the server's SYN-ACK.

        frame: vnet_hdr first. None for a frame that has no ACK, ends the connection, or has IPv4 options or IPv6
        extension headers.
        """
        segment = parse(frame, link_bytes)
        if segment is None or segment.flags & (ACK | FIN | RST) != ACK:
            return None
        start = VNET_BYTES + link_bytes
        head = bytes(frame[start : start + _IPV6_BYTES])
        is_ipv4 = head[0] == _PLAIN_IPV4
        if not is_ipv4 and (head[0] >> 4 != 6 or head[6] != _TCP):
            return None
        tcp = start + (_IPV4_BYTES if is_ipv4 else _IPV6_BYTES)
        first = int.from_bytes(head[:4])
        length = segment.length + (segment.flags & SYN != 0)
        return cls(
            link=bytes(frame[VNET_BYTES:start]),
            key=segment.key,
            hop_limit=head[8] if is_ipv4 else head[7],
            # Without the two bits of ECN: we would not react to a mark.
            traffic_class=(head[1] if is_ipv4 else first >> 20) & 0xFC,
            flow_label=0 if is_ipv4 else first & 0xFFFFF,
            identification=int.from_bytes(head[4:6]) if is_ipv4 else 0,
            next_sequence=(segment.sequence + length) & 0xFFFFFFFF,
            acknowledged=segment.acknowledged,
            tsecr=_timestamps(frame, tcp + _TCP_BYTES, segment.offset)[1] or 0,
        )


def _sum_of(data: bytes) -> int:
    """Sum of the 16-bit words of `data`, an even number of bytes, not folded (RFC 1071)."""
    return sum(int.from_bytes(data[at : at + 2]) for at in range(0, len(data), 2))


class Header:
    """Builds the headers of one connection's runs.

    overhead_bytes: IP and TCP header, what a segment's payload leaves of the path MTU.
    max_run_bytes: the most payload of one run.
    """

    __slots__ = (
        "_first",
        "_gso_size",
        "_gso_type",
        "_identification",
        "_ip_sum",
        "_is_ipv4",
        "_key",
        "_link",
        "_offset",
        "_pseudo_sum",
        "_run_prefix",
        "_single_prefix",
        "_tcp_bytes",
        "_with_timestamps",
        "_word",
        "max_run_bytes",
        "overhead_bytes",
    )

    def __init__(self, template: Template, with_timestamps: bool) -> None:
        key = template.key
        self._key = key
        self._with_timestamps = with_timestamps
        self._is_ipv4 = template.is_ipv4
        self._tcp_bytes = _TCP_BYTES + (_TIMESTAMPS_BYTES if with_timestamps else 0)
        self._offset = self._tcp_bytes >> 2 << 12
        self._pseudo_sum = _sum_of(key[:-4]) + _TCP
        # The SYN-ACK of Linux has the identification 0, its other segments have any.
        self._identification = template.identification or template.next_sequence & 0xFFFF
        if self._is_ipv4:
            self._first = bytes((_PLAIN_IPV4, template.traffic_class))
            self._word = template.hop_limit << 8 | _TCP
            self._ip_sum = _sum_of(self._first) + _DONT_FRAGMENT + self._word + _sum_of(key[:-4])
            self._gso_type = GSO_TCPV4
        else:
            self._first = (6 << 28 | template.traffic_class << 20 | template.flow_label).to_bytes(4)
            self._word = _TCP << 8 | template.hop_limit
            self._ip_sum = 0
            self._gso_type = GSO_TCPV6
        self.overhead_bytes = (_IPV4_BYTES if self._is_ipv4 else _IPV6_BYTES) + self._tcp_bytes
        self.use_link(template.link)

    def use_link(self, link: bytes) -> None:
        """Send to another next hop from now on: `link` is the new link header."""
        self._link = link
        self.max_run_bytes = FRAME_MAX - len(link) - self.overhead_bytes
        self._single_prefix = self._prefix(GSO_NONE, 0)
        self._gso_size = 0
        self._run_prefix = b""

    def _prefix(self, gso_type: int, gso_size: int) -> bytes:
        """All that comes before the first field that changes from run to run."""
        headers = len(self._link) + self.overhead_bytes
        vnet = _VNET.pack(NEEDS_CSUM, gso_type, headers, gso_size, headers - self._tcp_bytes, _CHECKSUM_OFFSET)
        return vnet + self._link + self._first

    def _prefix_of(self, segment: int) -> bytes:
        """The prefix of a run of segments of `segment` bytes: mostly that of the run before."""
        if segment != self._gso_size:
            self._gso_size = segment
            self._run_prefix = self._prefix(self._gso_type, segment)
        return self._run_prefix

    def for_run(
        self,
        size: int,
        segment: int,
        sequence: int,
        acknowledged: int,
        window: int,
        tsval: int,
        tsecr: int,
        flags: int = ACK,
    ) -> bytes:
        """What goes in front of `size` bytes of payload in segments of `segment` bytes; the last may be shorter.

        size: 0 to `max_run_bytes`. tsval, tsecr: not used without timestamps. All numbers are wrapped already.
        """
        assert size <= self.max_run_bytes
        prefix = self._single_prefix if size <= segment else self._prefix_of(segment)
        key = self._key
        word = self._offset | flags
        length = size + self._tcp_bytes
        # Of the sums in one's complement of the same value, the one that folding gives: 1 to 65535.
        partial = (self._pseudo_sum + length - 1) % 0xFFFF + 1
        options = _OPTIONS.pack(_TIMESTAMPS, tsval, tsecr) if self._with_timestamps else b""
        if not self._is_ipv4:
            fields = _SEND_IPV6.pack(length, self._word, key, sequence, acknowledged, word, window, partial, 0)
            return prefix + fields + options
        length = size + self.overhead_bytes
        number = self._identification
        self._identification = (number + (1 if size <= segment else -(-size // segment))) & 0xFFFF
        check = -(self._ip_sum + length + number) % 0xFFFF
        head = (length, number, _DONT_FRAGMENT, self._word, check)
        return prefix + _SEND_IPV4.pack(*head, key, sequence, acknowledged, word, window, partial, 0) + options
