"""Records of a port: sent in runs, in slots and one by one, then lost, repeated, reordered, changed, cut and forged.

Each comes out at most once and as it was sent. As long as nothing was changed, just those come out that a plain
reading of the rules takes.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from tests.fuzz.source import Source
from workers.core.cuts import Datagrams, Inners, Records
from workers.core.datagram import DatagramOpener, DatagramSealer, record_bytes
from workers.core.heads import RECORD_OVERHEAD
from workers.core.inner import (
    CLOSE_INNER,
    DATA,
    PREFIX_BYTES,
    Fragment,
    Opened,
    Pong,
    data_prefix,
    is_well_formed,
    opened_of,
    pack_copy,
    pack_fragment,
    pack_ping,
    pack_pong,
)
from workers.core.noise import Suite
from workers.core.replay import WINDOW

KEY = bytes(range(32))
SUITES = (Suite.AES256GCM, Suite.CHACHA20POLY1305)
SHIFTS = (22, 3, 4, 6)
STEPS_MAX = 60
SENT_MAX = 400
DATAGRAM_MAX = 64
STRIDE = 128
ROOM = 64
INNERS = Inners(2048)
"""Less than a worker has, so that runs are longer than that."""

OTHERS = (
    CLOSE_INNER,
    pack_ping(7),
    pack_ping(7, 40),
    pack_pong(Pong(7, 5, 9, 1300)),
    pack_copy(1, 2, b"copy"),
    pack_fragment(1, Fragment(2, 0, 2, b"piece")),
)

Item = tuple[int, int, bytes]
"""Kind, conversation, content: of one datagram, or of one inner of another kind."""


class Sent(NamedTuple):
    """One record and what is in it."""

    inner: bytes
    record: bytes


class Place:
    """Both ends of one direction, and what the receiving one is to make of what it gets."""

    def __init__(self, source: Source) -> None:
        suite, self.shift = source.choose(SUITES), source.choose(SHIFTS)
        self.source = source
        self.sealer = DatagramSealer(KEY, suite, self.shift)
        self.opener = DatagramOpener(KEY, suite, INNERS, self.shift)
        self.sent: list[Sent] = []
        self.came: Counter[Item] = Counter()
        self.unchanged = True
        self.taken: set[int] = set()
        self.generation = 0
        self.expected = Counter(opened=0, rejected=0, replayed=0)

    def send_run(self) -> None:
        """Datagrams back to back, or in slots."""
        source = self.source
        size, count = 1 + source.number() % DATAGRAM_MAX, 1 + source.number() % 100
        last, prefix = source.number() % size or size, data_prefix(source.number())
        content = [(b"%d." % (len(self.sent) + index)).ljust(size, b".")[:size] for index in range(count)]
        content[-1] = content[-1][:last]
        out = Records(bytearray(count * record_bytes(size)))
        if source.flag():
            buffer = bytearray((count + 1) * STRIDE + ROOM)
            for index, each in enumerate(content):
                at = ROOM + (index + 1) * STRIDE
                buffer[at : at + len(each)] = each
            length = self.sealer.seal_slots(prefix, Datagrams(buffer, ROOM, STRIDE), 1, count, size, last, out)
        else:
            run = Datagrams(bytearray(ROOM) + b"".join(content))
            length = self.sealer.seal_run(prefix, run, size * (count - 1) + last, size, out)
        records = bytes(out.view[:length])
        for each in content:
            self.sent.append(Sent(prefix + each, records[: record_bytes(len(each))]))
            records = records[record_bytes(len(each)) :]
        assert not records, "more records than datagrams"

    def send_other(self) -> None:
        """Another kind, or what a holder of the keys should not send."""
        inner = self.source.choose(OTHERS) if self.source.flag() else self.source.block() or b"\0"
        out = bytearray(len(inner) + RECORD_OVERHEAD)
        assert self.sealer.seal_into(inner, memoryview(out)) == len(out)
        self.sent.append(Sent(inner, bytes(out)))

    def deliver(self) -> None:
        """Some of the records, in some order, in one piece."""
        source = self.source
        if not self.sent:
            return
        first, count, stride = source.number(2), 1 + source.number() % 100, source.choose((1, 1, -1, 0, 2, 7))
        numbers = [(first + index * stride) % len(self.sent) for index in range(count)]
        sizes = [len(self.sent[number].record) for number in numbers]
        hint = source.choose((0, 0, sizes[0], source.number(2)))
        payload = bytearray(b"".join(self.sent[number].record for number in numbers))
        if self._change(payload) or (hint and (set(sizes[:-1]) - {hint} or sizes[-1] > hint)):
            self.unchanged = False
        came = self._open(payload, hint)
        if self.unchanged:
            self._compare(numbers, came)

    def _change(self, payload: bytearray) -> bool:
        """Whether there was a change that the other end may not undo."""
        before, source = bytes(payload), self.source
        match source.number() % 16:
            case 1:
                payload[source.number(2) % len(payload)] ^= 1 << (source.number() & 7)
            case 2:
                del payload[source.number(2) % len(payload) :]
            case 3:
                payload += source.block()
            case 4:
                at = source.number(2) % len(payload)
                payload[at:at] = source.block()
            case 5:
                payload[:] = source.block()
        return payload != before

    def _open(self, payload: bytearray, hint: int) -> list[Item]:
        margin = self.source.number() & 15
        records = Records(bytes(margin) + payload + bytes(margin))  # type: ignore[arg-type]
        opened = self.opener.open_run(records, margin, margin + len(payload), hint)
        items = [item for each in opened for item in _items(each)]
        self.came.update(items)
        assert self.opener.highest < len(self.sent) == self.sealer.next_counter
        return items

    def _compare(self, numbers: Sequence[int], came: list[Item]) -> None:
        """With what the rules say: DATA in its order, all others in theirs."""
        expected = [item for number in numbers if (item := self._take(number)) is not None]
        for data in (True, False):
            kinds = [[item for item in items if (item[0] == DATA) is data] for items in (expected, came)]
            assert kinds[0] == kinds[1], "not what the rules say"
        opener = self.opener
        counts = {"opened": opener.opened, "rejected": opener.rejected, "replayed": opener.replayed}
        assert counts == dict(self.expected)

    def _take(self, counter: int) -> Item | None:
        if counter in self.taken or counter <= max(self.taken, default=-1) - WINDOW:
            self.expected["replayed"] += 1
            return None
        ahead = (counter >> self.shift) - self.generation
        if ahead not in (-1, 0, 1):
            self.expected["rejected"] += 1
            return None
        self.generation += max(ahead, 0)
        self.taken.add(counter)
        self.expected["opened"] += 1
        inner = self.sent[counter].inner
        if not is_well_formed(inner):
            self.expected["rejected"] += 1
            return None
        return _item(inner)

    def check_end(self) -> None:
        """Nothing came that was not sent, and nothing twice."""
        sent = Counter(_item(each.inner) for each in self.sent if is_well_formed(each.inner))
        assert self.came <= sent, "forged, or opened twice"


def run(data: bytes) -> None:
    """First the cipher and how long a key lasts; then steps."""
    source = Source(data)
    place = Place(source)
    for _ in range(STEPS_MAX):
        if not len(source):
            break
        step = source.choose(STEPS)
        if step is Place.deliver or len(place.sent) < SENT_MAX:
            step(place)
    place.check_end()


def _item(inner: bytes) -> Item:
    opened = opened_of(inner, len(inner) + RECORD_OVERHEAD)
    assert opened is not None
    return opened.kind, opened.conversation, opened.payload


def _items(opened: Opened) -> list[Item]:
    kind, conversation, size, payload = opened
    if kind != DATA:
        assert is_well_formed(bytes((kind,)) + (b"" if kind >= 4 else bytes(PREFIX_BYTES - 1)) + payload)
        return [(kind, conversation, payload)]
    cuts = [payload[at : at + size] for at in range(0, len(payload), size)] if size else [payload]
    assert 0 < len(cuts) <= 64
    return [(kind, conversation, cut) for cut in cuts]


STEPS = (Place.deliver, Place.send_run, Place.send_other)
DELIVER, RUN, OTHER = range(len(STEPS))
_RUN = bytes((RUN, 31, 43, 20, 1, 0))
_ALL = bytes((DELIVER, 0, 0, 43, 0, 0, 0, 0, 0, 0))
SEEDS = {
    "run": bytes((0, 0)) + _RUN + _ALL,
    "slots": bytes((1, 0, RUN, 31, 43, 20, 1, 1)) + _ALL,
    "twice": bytes((0, 0)) + _RUN + _ALL * 2,
    "backwards": bytes((0, 0)) + _RUN + bytes((DELIVER, 0, 43, 43, 2, 0, 0, 0, 0, 0)),
    "same-again-and-again": bytes((0, 0)) + _RUN + bytes((DELIVER, 0, 3, 20, 3, 0, 0, 0, 0, 0)),
    "keys-change": bytes((0, 1)) + _RUN * 2 + bytes((DELIVER, 0, 0, 7, 0, 0, 0, 0, 0, 0)) + _ALL,
    "keys-left-behind": bytes((0, 1)) + _RUN * 2 + bytes((DELIVER, 0, 40, 3, 0, 0, 0, 0, 0, 0)) + _ALL,
    "keys-backwards": bytes((1, 1)) + _RUN + bytes((DELIVER, 0, 12, 12, 2, 0, 0, 0, 0, 0)) + _ALL,
    "others": bytes((0, 0)) + b"".join(bytes((OTHER, 1, each)) for each in range(len(OTHERS))) + _ALL,
    "others-within-runs": bytes((0, 0)) + (_RUN + bytes((OTHER, 1, 2))) * 2 + bytes((DELIVER, 0, 30, 50)) + bytes(6),
    "malformed": bytes((0, 0)) + bytes((OTHER, 0, 3, 9, 9, 9)) * 5 + bytes((OTHER, 0, 2, 1, 1)) * 5 + _ALL,
    "alone": bytes((0, 0, OTHER, 1, 1, DELIVER)) + bytes(9),
    "hint": bytes((0, 0)) + _RUN + bytes((DELIVER, 0, 0, 43, 0, 2, 0, 0, 0, 0)),
    "flipped": bytes((0, 0)) + _RUN + bytes((DELIVER, 0, 0, 43, 0, 2, 0, 0, 1, 0, 99, 3, 0)) + _ALL,
    "cut": bytes((0, 0)) + _RUN + bytes((DELIVER, 0, 0, 43, 0, 0, 0, 0, 2, 2, 0, 5)),
    "tail": bytes((0, 0)) + _RUN + bytes((DELIVER, 0, 0, 9, 0, 0, 0, 0, 3, 4, 0, 60, 0, 0, 0)),
    "garbage-between": bytes((0, 0)) + _RUN + bytes((DELIVER, 0, 0, 9, 0, 3, 0, 63, 4, 0, 63, 3, 0, 60, 1, 0)),
    "garbage": bytes((0, 0)) + _RUN + bytes((DELIVER, 0, 0, 9, 0, 0, 0, 0, 5, 40)) + bytes(40),
}
