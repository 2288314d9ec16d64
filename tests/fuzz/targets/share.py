"""A worker's share of a session against an authenticated peer that sends any frames in any order.

Whatever it does: only RemoteProtocolError is raised, what is held stays within the credit, and at the end nothing is
left. The application, the paths and the clock do what the input says, too.
"""

from contextlib import ExitStack
from unittest import mock

from tests.fuzz.share_place import SERIAL, Place
from tests.fuzz.source import Source
from workers.core import closed, frame, sending, session

STEPS_MAX = 400

SMALL = (
    (sending, "MAX_ANSWERS", 16),
    (session, "MAX_ANSWERS", 16),
    (session, "MAX_OPENERS", 4),
    (session, "MAX_GAPS", 12),
    (closed, "MAX_GAPS", 8),
)
"""Bounds that no small input reaches as they are."""


STEPS = (
    Place.hear_frame,
    Place.hear_ack,
    Place.hear_bytes,
    Place.open,
    Place.write,
    Place.read,
    Place.send,
    Place.pass_time,
    Place.break_off,
    Place.add_path,
    Place.lose_path,
    Place.bind,
    Place.lose_peers,
)
FRAME, ACK, BYTES, OPEN, WRITE, READ, SEND, TIME, BREAK, ADD, LOSE, BIND, GONE = range(len(STEPS))


def run(data: bytes) -> None:
    """First byte: which end; then steps."""
    with ExitStack() as stack:
        for module, name, value in SMALL:
            stack.enter_context(mock.patch.object(module, name, value))
        source = Source(data)
        place = Place(source)
        for _ in range(STEPS_MAX):
            if not len(source):
                break
            source.choose(STEPS)(place)
            place.check()
        place.check_end()


_NEW, _KNOWN = 0xA0, 0
_OPEN = bytes((FRAME, 0, _NEW, 1, 0, 0, 0))
_DATA = bytes((FRAME, 1, _KNOWN, 0x80, 0, 1))
_FIN = bytes((FRAME, 4, _KNOWN, 0, 0))
_RESET = bytes((FRAME, 5, _KNOWN, 0, 1))
_SEND = bytes((SEND, 0, 15, 64, 64))
SEEDS = {
    "server-conversation": b"\0\0" + _OPEN + _DATA * 2 + _SEND + bytes((READ, 0, WRITE, 0, 0)) + _SEND + _FIN,
    "server-ends-first": b"\0\0" + _OPEN + bytes((WRITE, 0, 1)) + _SEND + _DATA + _FIN + _SEND + bytes((TIME, 4)),
    "server-reset": b"\0\0" + _OPEN + _DATA + _RESET + _SEND + _OPEN,
    "server-breaks-off": b"\0\0" + _OPEN + _DATA + bytes((BREAK, 0)) + _SEND + bytes((ACK, 0, 1, 0, 0, 0, 0, 0, 0)),
    "server-out-of-order": b"\0\0" + _OPEN + bytes((FRAME, 1, 0, 0x80, 18, 1)) + _DATA + bytes((READ, 0)),
    "server-beyond-credit": b"\0\0" + _OPEN + bytes((FRAME, 1, _KNOWN, 0xFC, 0, 0)) * 5,
    "server-too-many-frames": b"\0\0" + _OPEN + bytes((FRAME, 1, _KNOWN, 0x04, 0, 1)) * 18,
    "server-path-lost": b"\0\0" + _OPEN + bytes((WRITE, 0, 0)) + _SEND + bytes((ADD, 1, LOSE, 0)) + _SEND,
    "server-many": b"\0\0" + b"".join(bytes((FRAME, 0, _NEW + n, 1, 0, 0, 0)) for n in range(12)) + _SEND,
    "server-passed-on": b"\0\0" + _OPEN + _DATA[:-1] + b"\3" + _DATA[:-1] + b"\3" + _FIN,
    "server-opens-and-resets": b"\0\0"
    + b"".join(bytes((FRAME, 0, _NEW + n, 1, 0, 0, 0, FRAME, 5, _KNOWN, 0, 1)) for n in range(60)),
    "client-conversation": b"\1\0" + bytes((OPEN, WRITE, 0, 0)) + _SEND + bytes((ACK, 0, 0, 2, 0, 0x40, 0, 0, 16)),
    "client-opened-to": b"\1\0" + _OPEN + _DATA,
    "client-handed": b"\1\0" + bytes((OPEN, SEND, 1, 15, 32, 0, BIND, 0, 1, BIND, 0, 0)) + _SEND,
    "client-worker-gone": b"\1\0" + bytes((OPEN, SEND, 0, 15, 9, GONE, 0, GONE, 1, GONE, 2, GONE, 3)),
    "stall-and-probe": b"\1\0" + bytes((OPEN, SEND, 0, 15, 255, 255, 255, 255, 255, TIME, 3, TIME, 3)) + _SEND,
    "raw": b"\0\0" + bytes((BYTES, 24)) + frame.pack(frame.OPEN, 1, SERIAL, 0, 0) + bytes((BYTES, 3, 1, 2, 3)),
}
