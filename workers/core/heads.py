"""The heads of a run of records of one size, and their nonces: written and read with a few calls a run."""

from collections.abc import Sequence
from struct import Struct

from workers.core.noise import NONCES, TAG_SIZE, Suite

LENGTH_BYTES = 2
RUN_MAX = 64
"""Records that are sealed or opened at a time, as many as UDP_SEGMENT takes."""

HEAD = Struct(">HQ")
HEAD_BYTES = HEAD.size
RECORD_OVERHEAD = HEAD_BYTES + TAG_SIZE
_pack_head_into = HEAD.pack_into
_unpack_head = HEAD.unpack_from

_NONCE_BYTES = 12
_LOW_BYTES = bytes(range(256)) + bytes(range(RUN_MAX))
"""The low bytes of consecutive counters, from any one on."""


class NonceRows:
    """The nonces of a run: packed with one call into rows that every port of a worker shares."""

    __slots__ = ("_packs", "_view", "rows")

    def __init__(self, suite: Suite) -> None:
        form = NONCES[suite].format
        view = memoryview(bytearray(RUN_MAX * _NONCE_BYTES))
        self._packs = [Struct(form[0] + form[1:] * count).pack_into for count in range(RUN_MAX + 1)]
        self.rows = [view[at : at + _NONCE_BYTES] for at in range(0, len(view), _NONCE_BYTES)]
        self._view = view

    def pack(self, counters: Sequence[int]) -> None:
        """Make `rows` the nonces of at most RUN_MAX counters, until the next call."""
        self._packs[len(counters)](self._view, 0, *counters)


# Written and read again within one call, and a worker has one thread: the ports of all its tunnels share them.
NONCE_ROWS = {suite: NonceRows(suite) for suite in Suite}


def write_heads(view: memoryview, start: int, record: int, first: int, count: int) -> None:
    """Write the heads of `count` records of `record` bytes, with the counters from `first` on."""
    length = record - LENGTH_BYTES
    # 57 ns each; copying whole columns of bytes with strided slices is no faster below 64.
    for position in range(start, start + count * record, record):
        _pack_head_into(view, position, length, first)
        first += 1


def equal_records(view: memoryview, position: int, record: int, most: int) -> int:
    """How many records from `position` on have the length of the first, at most `most`, which there is room for."""
    end = position + most * record
    for at in (position, position + 1):
        column = view[at:end:record].tobytes()
        most = min(most, len(column) - len(column.lstrip(column[:1])))
    return most


def counters_of(view: memoryview, position: int, record: int, count: int) -> Sequence[int]:
    """The counters of `count` records of one size, a range if they are consecutive.

    Told by their low bytes and the last one: a forged counter in between fails its tag, since it is associated data.
    """
    end = position + count * record
    first = _unpack_head(view, position)[1]
    lows = view[position + HEAD_BYTES - 1 : end : record].tobytes()
    low = first & 0xFF
    if lows == _LOW_BYTES[low : low + count] and _unpack_head(view, end - record)[1] == first + count - 1:
        return range(first, first + count)
    return [_unpack_head(view, at)[1] for at in range(position, end, record)]
