"""Frames as they come out of a record."""

from workers.core import frame
from workers.core.errors import RemoteProtocolError
from workers.core.frame import Ack


def run(data: bytes) -> None:
    """What is taken has one form only, and the fields are what they were packed from."""
    try:
        header = frame.unpack(data)
    except RemoteProtocolError:
        return
    assert frame.unpack(memoryview(bytearray(data))) == header
    body = data[frame.HEADER_BYTES :]
    assert frame.pack(*header) + body == data
    end = frame.flow_end(header.flow)
    opens, owns = frame.flow_slot(header.flow, end), frame.flow_slot(header.flow, 1 - end)
    opener, counter = frame.flow_opener(header.flow), frame.flow_counter(header.flow)
    assert frame.flow_id(end, opens, owns, opener, counter) == header.flow
    if header.kind == frame.ACK:
        _check_ack(header, body)


def _check_ack(header: frame.Header, body: bytes) -> None:
    try:
        ack = frame.unpack_ack(header, body)
    except RemoteProtocolError:
        return
    assert frame.pack_ack(header.flags, header.serial, header.flow, ack) == frame.pack(*header) + body
    assert len(ack.ranges) <= frame.MAX_RANGES
    edges = [ack.received, *(edge for each in ack.ranges for edge in each)]
    assert edges == sorted(set(edges)), "ranges that do not rise"


_FLOW = frame.flow_id(frame.CLIENT, 1, 2, 0x0501, 77)
_RANGES = tuple((start, start + 5) for start in range(200, 280, 10))
SEEDS = {
    "open": frame.pack(frame.OPEN, frame.OPENING, 0x0901, _FLOW, 0),
    "data": frame.pack(frame.DATA, frame.OPENING | frame.BLOCKED, 0x0901, _FLOW, 1000) + b"payload",
    "probe": frame.pack(frame.DATA, 0, 0x0901, _FLOW, 1000),
    "fin": frame.pack(frame.FIN, 0, 0x0901, _FLOW, 1007),
    "reset": frame.pack(frame.RESET, 0, 0, _FLOW, frame.Reason.REFUSED),
    "ack": frame.pack_ack(0, 0x0901, _FLOW, Ack(100, 16384, 16, ())),
    "ack-ranges": frame.pack_ack(0, 0x0901, _FLOW, Ack(100, 16384, 16, _RANGES)),
    "ack-of-reset": frame.pack_ack(frame.RESET_SEEN, 0, _FLOW, Ack(0, 0, 0, ())),
    "gone": frame.pack(frame.GONE, 0, 0x0901, 0, 3),
    "ping": frame.pack(frame.PING, 0, 0, 0, 2**64 - 1),
    "pong": frame.pack(frame.PONG, 0, 0, 0, 12345),
    "drain": frame.pack(frame.DRAIN, 0, 0, 0, 0),
    "move": frame.pack(frame.MOVE, 0, 0, 0, 0),
    "ack-too-many-ranges": frame.pack_ack(0, 0, _FLOW, Ack(0, 0, 0, (*_RANGES, (400, 500)))),
    "ack-falling-ranges": frame.pack_ack(0, 0, _FLOW, Ack(0, 0, 0, ((20, 30), (10, 15)))),
}
