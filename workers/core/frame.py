"""The frame: what a flow hands to a carrier, sealed by the carrier as one record.

Network byte order. 24 bytes of header, then the payload to the end of the record:

     0                   1                   2                   3
     0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    +---------------+---------------+-------------------------------+
    |     kind      |     flags     |           zero (16)           |
    +---------------+---------------+-------------------------------+
    |                  serial of the addressed worker               |
    +---------------------------------------------------------------+
    |                                                               |
    +                          flow id (64)                         +
    |                                                               |
    +---------------------------------------------------------------+
    |                                                               |
    +                          offset (64)                          +
    |                                                               |
    +---------------------------------------------------------------+

kind     offset means                        payload
OPEN     0                                   none
DATA     stream offset of the first byte     1 byte or more; none: a probe, answered with an ACK at once
FIN      total bytes of the stream           none; occupies one offset of its own
RESET    reason (`Reason`)                   none
ACK      first offset not received           credit (64), frames allowed (64), then up to 8 ranges (start 64, end 64)
GONE     slot of a dead worker               none; the serial field holds that worker's serial
PING     sender's clock, echoed              none
PONG     as in the PING that it answers      none
DRAIN    0                                   none: the sender opens and accepts no more streams
MOVE     0                                   none: the sender leaves this carrier

A carrier rejects (closes on) an unknown kind or flag, a non-zero reserved field, a length that does not fit the kind.
Flag OPENING (1) stands on every OPEN, DATA and FIN until the peer has answered: such a frame may create the stream, so
the order in which stripes deliver does not matter. Flag BLOCKED (2) on a DATA says that another one of its size would
exceed the credit (as DATA_BLOCKED of RFC 9000, 19.13). Flag RESET_SEEN (1) on an ACK acknowledges a RESET.

MOVE: a server whose worker is on its way out asks for another carrier of this index in place of this one, and goes on
with it until then; the client opens no more streams to that worker if it knows others. At a client that has replaced
the carrier, MOVE is the last frame that it sends there, before it ends its direction; the server answers with MOVE and
does the same. Both read to the end, so nothing on the way is lost.

Flow id: end that opened (1 bit, 0 the client), slot of the worker that opened (7), slot of the worker that owns the
other end (8), low byte of the opener's serial (8), counter (40). The counters of one opener and one slot are dense,
from 0, and go on when another worker takes that slot.
"""

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from workers.core.errors import RemoteProtocolError

HEADER = struct.Struct("!BBHIQQ")
HEADER_BYTES = HEADER.size
ACK_BODY = struct.Struct("!QQ")
RANGE = struct.Struct("!QQ")
MAX_RANGES = 8
MAX_PAYLOAD_BYTES = 256 << 10
"""What every receiver takes in one frame. A sender may be set to stay below that (`frame_max`)."""

OPENING = 1
BLOCKED = 2
RESET_SEEN = 1

CLIENT, SERVER = 0, 1
"""The two ends, as they stand in a flow id."""


class Kind(IntEnum):
    """Frame kinds."""

    OPEN = 1
    DATA = 2
    FIN = 3
    RESET = 4
    ACK = 5
    GONE = 6
    PING = 7
    PONG = 8
    DRAIN = 9
    MOVE = 10


OPEN, DATA, FIN, RESET, ACK, GONE, PING, PONG, DRAIN, MOVE = (int(kind) for kind in Kind)


class Reason(IntEnum):
    """Why a stream was reset."""

    APPLICATION = 1
    REFUSED = 2
    UNREACHABLE = 3
    WORKER_GONE = 4
    UNKNOWN_FLOW = 5
    OVERLOAD = 6
    TIMEOUT = 7
    SHUTDOWN = 8


class Header(NamedTuple):
    """A frame's header. `serial` names the worker process that it is for (0: the carrier itself)."""

    kind: int
    flags: int
    serial: int
    flow: int
    offset: int


class Ack(NamedTuple):
    """What an ACK says: everything below `received` and in `ranges` was received.

    Below `credit` may be sent, in `frames` frames (both counted from the start of the stream).
    """

    received: int
    credit: int
    frames: int
    ranges: tuple[tuple[int, int], ...]


def flow_id(end: int, opener_slot: int, owner_slot: int, opener_serial: int, counter: int) -> int:
    """Compose a flow id."""
    return end << 63 | opener_slot << 56 | owner_slot << 48 | (opener_serial & 0xFF) << 40 | counter


def flow_end(flow: int) -> int:
    """The end that opened the flow."""
    return flow >> 63


def flow_slot(flow: int, end: int) -> int:
    """The slot of the flow's worker at `end`."""
    return (flow >> 56) & 0x7F if flow >> 63 == end else (flow >> 48) & 0xFF


def flow_opener(flow: int) -> int:
    """The part of a flow id within which counters are dense: everything above the counter."""
    return flow >> 40


def flow_counter(flow: int) -> int:
    """The flow's number among those of its opener and owner."""
    return flow & 0xFFFFFFFFFF


def pack(kind: int, flags: int, serial: int, flow: int, offset: int) -> bytes:
    """A frame without payload."""
    return HEADER.pack(kind, flags, 0, serial, flow, offset)


def pack_ack(flags: int, serial: int, flow: int, ack: Ack) -> bytes:
    """An ACK frame. At most MAX_RANGES ranges."""
    parts = [HEADER.pack(ACK, flags, 0, serial, flow, ack.received), ACK_BODY.pack(ack.credit, ack.frames)]
    parts.extend(RANGE.pack(start, end) for start, end in ack.ranges)
    return b"".join(parts)


def unpack(frame: bytes | bytearray | memoryview) -> Header:
    """The header of a frame. Raises RemoteProtocolError where the module's table rejects it."""
    length = len(frame)
    if length < HEADER_BYTES:
        raise RemoteProtocolError(f"frame of {length} bytes is shorter than its header")
    kind, flags, zero, serial, flow, offset = HEADER.unpack_from(frame)
    if zero or (flags > 1 and (flags > OPENING | BLOCKED or kind != DATA)) or not OPEN <= kind <= MOVE:
        raise RemoteProtocolError(f"frame kind {kind}, flags {flags}, reserved {zero}")
    if length != HEADER_BYTES and kind not in (DATA, ACK):
        raise RemoteProtocolError(f"frame kind {kind} with {length - HEADER_BYTES} bytes of payload")
    return Header(kind, flags, serial, flow, offset)


def unpack_ack(header: Header, body: bytes | bytearray | memoryview) -> Ack:
    """The body of an ACK. Raises RemoteProtocolError on a length or on ranges that do not rise."""
    count, rest = divmod(len(body) - ACK_BODY.size, RANGE.size)
    if rest or not 0 <= count <= MAX_RANGES:
        raise RemoteProtocolError(f"ACK with a body of {len(body)} bytes")
    credit, frames = ACK_BODY.unpack_from(body)
    ranges: Sequence[tuple[int, int]] = [
        RANGE.unpack_from(body, ACK_BODY.size + RANGE.size * index) for index in range(count)
    ]
    floor = header.offset
    for start, end in ranges:
        if not floor < start < end:
            raise RemoteProtocolError(f"ACK range {start}-{end} above {floor}")
        floor = end
    return Ack(header.offset, credit, frames, tuple(ranges))
