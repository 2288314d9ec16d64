"""What a record carries: each kind has one form, and the fields are what they were packed from."""

from workers.core import inner
from workers.core.heads import RECORD_OVERHEAD
from workers.core.inner import Fragment, Gathered, Opened, Pong


def run(data: bytes) -> None:
    """The inner of an authentic record."""
    if not data:
        return  # the smallest record has a byte
    record = len(data) + RECORD_OVERHEAD
    opened = inner.opened_of(data, record)
    assert (opened is not None) == inner.is_well_formed(data) == inner.is_well_formed(memoryview(data))
    _check_gathered(data, record, opened)
    if opened is None:
        return
    kind, conversation, size, payload = opened
    assert size == (len(payload) if kind == inner.DATA else record)
    match kind:
        case inner.DATA:
            assert inner.data_prefix(conversation) + payload == data
        case inner.FRAGMENT:
            fragment = inner.unpack_fragment(payload)
            assert inner.pack_fragment(conversation, fragment) == data
            assert fragment.payload and fragment.piece < fragment.pieces >= 2
        case inner.COPY:
            assert inner.pack_copy(conversation, *inner.unpack_copy(payload)) == data
        case inner.PING:
            again = inner.pack_ping(inner.unpack_ping(payload), len(data))
            assert len(again) == len(data) and inner.opened_of(again, record) is not None
            assert inner.unpack_ping(again[1:]) == inner.unpack_ping(payload)
        case inner.PONG:
            assert inner.pack_pong(inner.unpack_pong(payload)) == data
        case _:
            assert data == inner.CLOSE_INNER


def _check_gathered(data: bytes, record: int, opened: Opened | None) -> None:
    """Among others of its kind, whole and as equal pieces, it comes to the same."""
    once = [opened] if opened is not None else []
    one, many = Gathered(64), Gathered(64)
    assert one.take(data, record) is bool(once)
    one.flush()
    assert one.opened == once
    view = memoryview(data)
    count = inner.PREFIX_BYTES
    refused = many.take_equal([view] * 3, [view[:count]] * 3, [view[count:]] * 3)
    many.flush()
    assert refused == (0 if once else 3)
    if opened is not None and opened.kind == inner.DATA and opened.size:
        assert many.opened == [opened._replace(payload=opened.payload * 3)]
    else:
        assert many.opened == once * 3


SEEDS = {
    "data": inner.data_prefix(7) + b"datagram",
    "data-empty": inner.data_prefix(2**32 - 1),
    "data-short": inner.data_prefix(7)[:-1],
    "fragment": inner.pack_fragment(7, Fragment(9, 1, 3, b"piece")),
    "fragment-empty": inner.pack_fragment(7, Fragment(9, 1, 3, b"")),
    "fragment-index": inner.pack_fragment(7, Fragment(9, 3, 3, b"piece")),
    "fragment-alone": inner.pack_fragment(7, Fragment(9, 0, 1, b"piece")),
    "copy": inner.pack_copy(7, 9, b"copy"),
    "copy-empty": inner.pack_copy(7, 9, b""),
    "ping": inner.pack_ping(2**64 - 1),
    "ping-padded": inner.pack_ping(5, 60),
    "ping-short": inner.pack_ping(5)[:-1],
    "pong": inner.pack_pong(Pong(1, 2, 3, 4)),
    "pong-long": inner.pack_pong(Pong(1, 2, 3, 4)) + b"\0",
    "close": inner.CLOSE_INNER,
    "close-long": inner.CLOSE_INNER + b"\0",
    "unknown": b"\x07\0\0\0\0",
}
