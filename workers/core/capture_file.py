"""What stands in a capture file, so that Wireshark, tcpdump and others read it (pcap-savefile(5)).

All in native byte order, which readers tell from the magic number. The file's header, once:

     0                   1                   2                   3
     0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    +---------------------------------------------------------------+
    |           magic: a1b2c3d4, for times in microseconds          |
    +-------------------------------+-------------------------------+
    |        major version: 2       |        minor version: 4       |
    +-------------------------------+-------------------------------+
    |                     two words of 0, unused                    |
    +---------------------------------------------------------------+
    |            the longest packet that may stand there            |
    +---------------------------------------------------------------+
    |     link type: 101, packets that start with their IP header   |
    +---------------------------------------------------------------+

Then packets, each behind four words: seconds and microseconds of UTC, bytes of it that stand there, bytes that it had.

Packets are as on the wire. A run is cut into its segments, and a checksum that was left to the kernel or to a card is
completed. Where the size of the segments is not known, which libpcap does not tell, a received run stays one packet.
"""

from struct import Struct

from workers.core.segmenting import cut, head_bytes, is_partial
from workers.core.tcp_header import Bytes

PACKET_BYTES_MAX = 1 << 18
_HEADER = Struct("=IHHIIII")
_PACKET = Struct("=IIII")
_LINK_RAW = 101

FILE_HEADER = _HEADER.pack(0xA1B2C3D4, 2, 4, 0, 0, PACKET_BYTES_MAX, _LINK_RAW)


def entry(time_us: int, packet: Bytes) -> bytes:
    """A packet as it stands in the file. time_us: of UTC."""
    seconds, rest = divmod(time_us, 1_000_000)
    return _PACKET.pack(seconds & 0xFFFFFFFF, rest, len(packet), len(packet)) + packet


def run_entries(time_us: int, head: Bytes, payload: Bytes, size: int) -> bytes:
    """A run of TCP as its segments of `size` bytes; see `workers.core.segmenting.cut`."""
    view = memoryview(payload)
    heads, width = cut(head, view, size), len(head)
    return b"".join(
        entry(time_us, heads[at * width : (at + 1) * width] + view[at * size : (at + 1) * size])
        for at in range(len(heads) // width)
    )


def received_entries(time_us: int, packet: Bytes, gso_size: int) -> bytes:
    """What came in, a single packet or a run of segments of `gso_size` bytes, 0 if unknown."""
    width = head_bytes(packet)
    length = _stated_length(packet)
    if not width or not width <= length <= len(packet):
        return entry(time_us, bytes(packet))
    whole = bytes(packet[:length])  # without the padding of a short frame
    payload = whole[width:]
    if gso_size and len(payload) > gso_size:
        return run_entries(time_us, whole[:width], payload, gso_size)
    if is_partial(whole):
        return run_entries(time_us, whole[:width], payload, len(payload))
    return entry(time_us, whole)


def _stated_length(packet: Bytes) -> int:
    """Bytes of the packet, as its IP header has them."""
    if len(packet) and packet[0] >> 4 == 4:
        return int.from_bytes(packet[2:4])
    return int.from_bytes(packet[4:6]) + 40
