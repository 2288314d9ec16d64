"""What records of a port carry: a kind, then what the kind says. Big-endian.

kind          what follows the kind (8)
1 DATA        conversation (32), payload, 0 bytes or more
2 FRAGMENT    conversation (32), datagram (32), index (8), count (8), payload
3 COPY        conversation (32), sequence (32), payload
4 PING        clock (64), padding, 0 bytes or more
5 PONG        clock (64), received (64), highest (64), size (16)
6 CLOSE       nothing

- Conversation: 32 bits that its client end chose.
- FRAGMENT: piece `index` of `count` (2 to 255, index below it) of the conversation's datagram of that number;
  payload of 1 byte or more.
- COPY: a datagram sent on two ports; the two have one conversation and sequence.
- PING, PONG: the clock is the sender's, echoed. Received: records opened so far on the port. Highest: the highest
  counter of those. Size: of the whole record that brought the PING.
- CLOSE: its sender gives the port up.

Rejected: an unknown kind, a length that does not fit the kind, an index or a count out of range.
"""

from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

from workers.core.heads import RECORD_OVERHEAD

Bytes = bytes | bytearray | memoryview

DATA, FRAGMENT, COPY, PING, PONG, CLOSE = range(1, 7)

DATA_HEAD = Struct(">BI")
FRAGMENT_HEAD = Struct(">BIIBB")
COPY_HEAD = Struct(">BII")
PING_HEAD = Struct(">BQ")
PONG_BODY = Struct(">QQQH")
FRAGMENT_BODY = Struct(">IBB")
SEQUENCE = Struct(">I")
CLOCK = Struct(">Q")

PREFIX_BYTES = DATA_HEAD.size
CLOSE_INNER = bytes((CLOSE,))

_ANY = 1 << 16
_SIZES = {
    DATA: (DATA_HEAD.size, _ANY),
    FRAGMENT: (FRAGMENT_HEAD.size + 1, _ANY),
    COPY: (COPY_HEAD.size, _ANY),
    PING: (PING_HEAD.size, _ANY),
    PONG: (1 + PONG_BODY.size, 1 + PONG_BODY.size),
    CLOSE: (1, 1),
}
_INDEX, _COUNT = 9, 10

_unpack_prefix = DATA_HEAD.unpack_from


class Fragment(NamedTuple):
    """One piece of a datagram."""

    datagram: int
    piece: int
    pieces: int
    payload: bytes


class Pong(NamedTuple):
    """The answer to a PING. `highest_counter` is the highest opened, `size` that of the PING's record."""

    clock: int
    received: int
    highest_counter: int
    size: int


class Opened(NamedTuple):
    """What came: a run of DATA, or one inner of another kind.

    conversation: 0 for PING, PONG and CLOSE.
    size: DATA: bytes of each datagram, of which the last may have fewer; 0: one datagram, empty. Others: bytes of the
    whole record.
    payload: DATA: the datagrams back to back, at most 64. Others: what follows kind and conversation, for `unpack_*`.
    """

    kind: int
    conversation: int
    size: int
    payload: bytes


def data_prefix(conversation: int) -> bytes:
    """Kind and conversation of DATA."""
    return DATA_HEAD.pack(DATA, conversation)


def pack_fragment(conversation: int, fragment: Fragment) -> bytes:
    """A FRAGMENT."""
    datagram, piece, pieces, payload = fragment
    return FRAGMENT_HEAD.pack(FRAGMENT, conversation, datagram, piece, pieces) + payload


def unpack_fragment(payload: bytes) -> Fragment:
    """The payload of an opened FRAGMENT."""
    datagram, piece, pieces = FRAGMENT_BODY.unpack_from(payload)
    return Fragment(datagram, piece, pieces, payload[FRAGMENT_BODY.size :])


def pack_copy(conversation: int, sequence: int, payload: Bytes) -> bytes:
    """A COPY."""
    return b"".join((COPY_HEAD.pack(COPY, conversation, sequence), payload))


def unpack_copy(payload: bytes) -> tuple[int, bytes]:
    """(sequence, datagram) from the payload of an opened COPY."""
    return SEQUENCE.unpack_from(payload)[0], payload[SEQUENCE.size :]


def pack_ping(clock: int, inner_bytes: int = PING_HEAD.size) -> bytes:
    """A PING, padded to `inner_bytes`, 9 or more."""
    return PING_HEAD.pack(PING, clock).ljust(inner_bytes, b"\0")


def unpack_ping(payload: bytes) -> int:
    """The clock from the payload of an opened PING."""
    clock: int = CLOCK.unpack_from(payload)[0]
    return clock


def pack_pong(pong: Pong) -> bytes:
    """A PONG."""
    return bytes((PONG,)) + PONG_BODY.pack(*pong)


def unpack_pong(payload: bytes) -> Pong:
    """The payload of an opened PONG."""
    return Pong(*PONG_BODY.unpack(payload))


def is_well_formed(inner: Bytes) -> bool:
    """Whether the kind takes what follows it. `inner`: 1 byte or more."""
    kind = inner[0]
    limits = _SIZES.get(kind)
    if limits is None or not limits[0] <= len(inner) <= limits[1]:
        return False
    return kind != FRAGMENT or (inner[_COUNT] >= 2 and inner[_INDEX] < inner[_COUNT])


def opened_of(inner: bytes, record_bytes: int) -> Opened | None:
    """What came in a record of `record_bytes`; None: it is malformed. `inner`: 1 byte or more."""
    kind = inner[0]
    if kind == DATA and len(inner) >= PREFIX_BYTES:
        return Opened(DATA, _unpack_prefix(inner)[1], len(inner) - PREFIX_BYTES, inner[PREFIX_BYTES:])
    if not is_well_formed(inner):
        return None
    if kind >= PING:
        return Opened(kind, 0, record_bytes, inner[1:])
    return Opened(kind, _unpack_prefix(inner)[1], record_bytes, inner[PREFIX_BYTES:])


class Gathered:
    """Gathers inners, in the order in which they come, into runs of one conversation and size.

    Pieces of a run are joined by `flush`; until then they may be views of memory that must not change.
    """

    __slots__ = ("_conversation", "_pieces", "_run_max", "_short", "_size", "opened")

    def __init__(self, run_max: int) -> None:
        """`run_max`: datagrams in a run at most."""
        self.opened: list[Opened] = []
        self._run_max = run_max
        self._pieces: list[Bytes] = []
        self._conversation = self._size = 0
        self._short = False

    def take_equal(
        self, inners: Sequence[memoryview], prefixes: Sequence[memoryview], payloads: Sequence[memoryview]
    ) -> int:
        """Take inners of one size, with views of the prefix and the rest of each; return how many are malformed."""
        if not inners:
            return 0
        size = len(inners[0]) - PREFIX_BYTES
        prefix = bytes(prefixes[0])
        if size > 0 and prefix[0] == DATA and b"".join(prefixes) == prefix * len(prefixes):
            self.flush()
            self._pieces = [*payloads]
            self._conversation, self._size, self._short = _unpack_prefix(prefix)[1], size, False
            return 0
        record = len(inners[0]) + RECORD_OVERHEAD
        return sum(not self.take(bytes(inner), record) for inner in inners)

    def take(self, inner: bytes, record_bytes: int) -> bool:
        """Take one inner of any kind; False: it is malformed."""
        if inner[0] == DATA and len(inner) >= PREFIX_BYTES:
            self._take_datagram(_unpack_prefix(inner)[1], inner[PREFIX_BYTES:])
            return True
        opened = opened_of(inner, record_bytes)
        if opened is not None:
            self.opened.append(opened)
        return opened is not None

    def _take_datagram(self, conversation: int, payload: bytes) -> None:
        size = len(payload)
        pieces = self._pieces
        if (
            pieces
            and self._conversation == conversation
            and 0 < size <= self._size
            and not self._short
            and len(pieces) < self._run_max
        ):
            pieces.append(payload)
            self._short = size < self._size
            return
        self.flush()
        self._pieces = [payload]
        self._conversation, self._size, self._short = conversation, size, not size

    def flush(self) -> None:
        """End the run at hand, if any."""
        if self._pieces:
            self.opened.append(Opened(DATA, self._conversation, self._size, b"".join(self._pieces)))
            self._pieces = []
