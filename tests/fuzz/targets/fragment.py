"""Pieces of split datagrams, from honest senders and from others, in any order: what completes is what was split, and
what is held stays within its bounds."""

from contextlib import ExitStack
from unittest import mock

from tests.fuzz.source import Source
from workers.core import fragment
from workers.core.fragment import HEADER_BYTES, MAX_DATAGRAM_BYTES, TIMEOUT_US, Reassembler, split
from workers.core.inner import PREFIX_BYTES, Fragment, is_well_formed, pack_fragment, unpack_fragment

STEPS_MAX = 300
SMALL = (("MAX_DATAGRAMS", 4), ("CONVERSATION_BYTES", 70_000))
"""Bounds that no small input reaches as they are."""
TOTAL_BYTES = 150_000
CONTENT_MAX = 16_000
"""What a record takes, about."""
KEYS = 4
ROOMS = (HEADER_BYTES + 1, 64, 300, 1232)
PLACES = (0, 2**32 - 6, 2**20, 2**31)
"""Where the numbers of datagrams begin."""


class Place:
    """One worker's reassembler. Even numbers are of honest datagrams, odd ones of anything."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.reassembler = Reassembler(TOTAL_BYTES)
        self.now_us = 0
        self.datagrams: dict[tuple[int, int], tuple[bytes, list[bytes]]] = {}
        self.completed = 0

    def split(self) -> None:
        """Receive some pieces of a datagram that was split once."""
        source = self.source
        key, number = source.number() % KEYS, self._number() & ~1
        if (key, number) not in self.datagrams:
            length, room = source.number(2), source.choose(ROOMS)
            data = bytes(at * 7 & 0xFF for at in range(length % 4000))
            self.datagrams[key, number] = data, split(key, number, data, room)
        data, pieces = self.datagrams[key, number]
        if not pieces:
            return
        first, count, backwards = source.number(), source.number(), source.flag()
        for index in range(min(count, len(pieces) + 1)):
            piece = pieces[(first - index if backwards else first + index) % len(pieces)]
            if (came := self._receive(key, piece)) is not None:
                assert came == data, "not what was split"

    def forge(self) -> None:
        """Receive a piece of the input's choice; its bytes say which piece it is."""
        source = self.source
        key, number, index, count = source.number() % KEYS, self._number() | 1, source.number(), source.number()
        content = bytes((index,)) * (source.number(2) % CONTENT_MAX if source.flag() else source.number() & 15)
        inner = pack_fragment(key, Fragment(number, index, count, content))
        well_formed = bool(content) and index < count >= 2
        assert is_well_formed(inner) == well_formed
        if well_formed and (came := self._receive(key, inner)) is not None:
            assert sorted(came) == list(came) and sorted(set(came)) == list(range(count)), "pieces in disorder"

    def _number(self) -> int:
        return (self.source.choose(PLACES) + self.source.number() % 12) % 2**32

    def _receive(self, key: int, inner: bytes) -> bytes | None:
        came = self.reassembler.receive(key, unpack_fragment(inner[PREFIX_BYTES:]), self.now_us)
        if came is not None:
            self.completed += 1
            assert len(came) <= MAX_DATAGRAM_BYTES
        return came

    def pass_time(self) -> None:
        """By up to a second."""
        self.now_us += (self.source.number() + 1) * TIMEOUT_US // 256
        self.reassembler.expire(self.now_us)
        due = self.reassembler.next_expiry_us()
        assert due is None or due > self.now_us

    def forget(self) -> None:
        """A conversation is closed; its numbers may come again."""
        self.reassembler.forget(self.source.number() % KEYS)

    def check(self) -> None:
        """The bounds, and that the sums are those of what is held."""
        held = self.reassembler
        flows = held._flows.values()
        assert held.held_bytes == sum(flow.cost for flow in flows) <= TOTAL_BYTES
        assert len(held) == sum(len(flow.partials) for flow in flows)
        for flow in flows:
            assert flow.cost == sum(partial.cost for partial in flow.partials.values()) <= fragment.CONVERSATION_BYTES
            assert len(flow.partials) <= fragment.MAX_DATAGRAMS
        assert held.completed == self.completed
        assert (held.next_expiry_us() is None) == (len(held) == 0)

    def check_end(self) -> None:
        """After a while, or without conversations, nothing is held."""
        if self.source.flag():
            for key in range(KEYS):
                self.reassembler.forget(key)
        self.reassembler.expire(self.now_us + TIMEOUT_US)
        assert (len(self.reassembler), self.reassembler.held_bytes) == (0, 0)


STEPS = (Place.split, Place.forge, Place.pass_time, Place.forget)
SPLIT, FORGE, TIME, FORGET = range(len(STEPS))


def run(data: bytes) -> None:
    """Steps."""
    with ExitStack() as stack:
        for name, value in SMALL:
            stack.enter_context(mock.patch.object(fragment, name, value))
        source = Source(data)
        place = Place(source)
        for _ in range(STEPS_MAX):
            if not len(source):
                break
            source.choose(STEPS)(place)
            place.check()
        place.check_end()


_LARGE = bytes((SPLIT, 0, 0, 2, 3, 232, 2))  # 1000 bytes in four pieces
_FORGED = bytes((FORGE, 0, 0, 1))
SEEDS = {
    "in-order": _LARGE + bytes((0, 4, 0)),
    "backwards-and-again": _LARGE + bytes((3, 5, 1)) + bytes((SPLIT, 0, 0, 2, 0, 4, 0)),
    "in-two-goes": _LARGE + bytes((0, 2, 0)) + bytes((TIME, 100, SPLIT, 0, 0, 2, 2, 2, 0)),
    "too-late": _LARGE + bytes((0, 3, 0)) + bytes((TIME, 255, SPLIT, 0, 0, 2, 3, 1, 0)),
    "closed": _LARGE + bytes((0, 3, 0)) + bytes((FORGET, 0, SPLIT, 0, 0, 2, 0, 4, 0)),
    "wrap": b"".join(bytes((SPLIT, 1, 1, at, 0, 200, 1, 0, 9, 0)) for at in range(0, 12, 2)),
    "tiny-pieces": bytes((SPLIT, 0, 0, 0, 0, 255, 0, 0, 255, 0, SPLIT, 0, 0, 2, 1, 0, 0, 0, 255, 0)),
    "many": b"".join(bytes((SPLIT, 0, 0, at, 3, 232, 2, 0, 2, 0)) for at in range(0, 12, 2)),
    "many-conversations": b"".join(bytes((SPLIT, key, 0, 0, 15, 0, 2, 0, 9, 0)) for key in range(KEYS)),
    "forged": _FORGED + bytes((0, 2, 0, 5)) + _FORGED + bytes((1, 2, 0, 3)),
    "forged-counts": _FORGED + bytes((0, 2, 0, 5)) + _FORGED + bytes((1, 3, 0, 3)) + _FORGED + bytes((1, 1, 0, 3)),
    "forged-too-long": b"".join(_FORGED + bytes((index, 6, 1, 62, 127)) for index in (0, 1, 2, 3, 4, 0)),
    "forged-much": b"".join(bytes((FORGE, at & 3, 0, at)) + bytes((0, 2, 1, 62, 127)) for at in range(12)),
    "forged-repeated": (_FORGED + bytes((0, 2, 0, 5))) * 2 + _FORGED + bytes((7, 2, 0, 0)),
}
