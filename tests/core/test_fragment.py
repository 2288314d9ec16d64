"""Datagrams that are split and put together again: golden bytes, every order, loss, copies, bounds and rubbish."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from workers.core import fragment
from workers.core.fragment import (
    HEADER_BYTES,
    MAX_COUNT,
    MAX_DATAGRAM_BYTES,
    PIECE_COST,
    TIMEOUT_US,
    Reassembler,
    split,
)
from workers.core.inner import PREFIX_BYTES, Fragment, is_well_formed, unpack_fragment

KEY = 7 << 32 | 0xA1A2A3A4
CONVERSATION = 0xA1A2A3A4


def piece(datagram: int, index: int, count: int, payload: bytes = b"x") -> Fragment:
    return Fragment(datagram, index, count, payload)


def opened(inners: list[bytes]) -> list[Fragment]:
    assert all(map(is_well_formed, inners))
    return [unpack_fragment(inner[PREFIX_BYTES:]) for inner in inners]


def test_pieces_have_their_golden_bytes() -> None:
    assert split(CONVERSATION, 0x01020304, memoryview(b"abcde"), HEADER_BYTES + 2) == [
        bytes.fromhex("02 a1a2a3a4 01020304 00 03 6162"),
        bytes.fromhex("02 a1a2a3a4 01020304 01 03 6364"),
        bytes.fromhex("02 a1a2a3a4 01020304 02 03 65"),
    ]


@given(st.integers(0, MAX_DATAGRAM_BYTES), st.integers(0, 2000))
def test_split_fills_no_inner_above_its_room(length: int, room: int) -> None:
    pieces = split(1, 2, bytes(length), room)
    most = room - HEADER_BYTES
    if length < 2 or most < 1 or length > MAX_COUNT * most:
        assert pieces == []
        return
    assert 2 <= len(pieces) <= MAX_COUNT
    assert max(map(len, pieces)) <= room
    assert len({len(one) for one in pieces[:-1]}) == 1 and HEADER_BYTES < len(pieces[-1]) <= len(pieces[0])
    assert sum(map(len, pieces)) == length + HEADER_BYTES * len(pieces)


@st.composite
def shuffled_pieces(draw: st.DrawFn) -> tuple[dict[int, bytes], list[Fragment]]:
    datagrams = draw(st.dictionaries(st.integers(0, 50), st.binary(min_size=2, max_size=120), min_size=1, max_size=5))
    pieces = [one for number, data in datagrams.items() for one in opened(split(CONVERSATION, number, data, 60))]
    again = draw(st.lists(st.sampled_from(pieces), max_size=10))
    return datagrams, draw(st.permutations(pieces + again))


@given(shuffled_pieces())
def test_pieces_in_any_order_and_twice_make_each_datagram_once(case: tuple[dict[int, bytes], list[Fragment]]) -> None:
    datagrams, pieces = case
    reassembler = Reassembler()
    whole = [data for one in pieces if (data := reassembler.receive(KEY, one, 0)) is not None]
    assert sorted(whole) == sorted(datagrams.values())
    assert (len(reassembler), reassembler.held_bytes, reassembler.completed) == (0, 0, len(datagrams))
    assert reassembler.repeated == len(pieces) - sum(len(split(0, 0, data, 60)) for data in datagrams.values())


def test_longest_datagram_comes_whole_from_the_most_pieces() -> None:
    data = bytes(range(255)) * 257
    assert len(data) == MAX_DATAGRAM_BYTES
    pieces = opened(split(CONVERSATION, 0, data, HEADER_BYTES + 257))
    assert len(pieces) == MAX_COUNT
    reassembler = Reassembler()
    results = [reassembler.receive(KEY, one, 0) for one in reversed(pieces)]
    assert results == [None] * 254 + [data]


def test_conversations_do_not_mix() -> None:
    reassembler = Reassembler()
    for key in (1, 2):
        assert reassembler.receive(key, piece(0, 0, 2, b"%d" % key), 0) is None
    assert reassembler.receive(2, piece(0, 1, 2, b"b"), 0) == b"2b"
    assert reassembler.receive(1, piece(0, 1, 2, b"a"), 0) == b"1a"


def test_datagram_that_misses_a_piece_is_given_up_in_time() -> None:
    reassembler = Reassembler()
    assert reassembler.next_expiry_us() is None
    reassembler.receive(KEY, piece(1, 0, 2), 100)
    reassembler.receive(KEY, piece(2, 0, 2), 200)
    assert reassembler.next_expiry_us() == 100 + TIMEOUT_US
    reassembler.expire(100 + TIMEOUT_US - 1)
    assert len(reassembler) == 2
    assert reassembler.receive(KEY, piece(1, 1, 2), 100 + TIMEOUT_US) is None
    assert (reassembler.expired, reassembler.completed, len(reassembler)) == (1, 0, 2)
    assert reassembler.receive(KEY, piece(2, 1, 2), 100 + TIMEOUT_US) == b"xx"


def test_oldest_of_a_conversation_goes_for_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fragment, "MAX_DATAGRAMS", 2)
    reassembler = Reassembler()
    reassembler.receive(KEY + 1, piece(1, 0, 2), 0)
    for datagram in (1, 2, 3):
        reassembler.receive(KEY, piece(datagram, 0, 2), 0)
    assert (len(reassembler), reassembler.evicted) == (3, 1)
    assert reassembler.receive(KEY, piece(1, 1, 2), 0) is None
    assert reassembler.evicted == 2
    assert reassembler.receive(KEY, piece(3, 1, 2), 0) == b"xx"
    assert reassembler.receive(KEY + 1, piece(1, 1, 2), 0) == b"xx"


def test_bytes_of_a_conversation_are_its_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fragment, "CONVERSATION_BYTES", 10_000)
    reassembler = Reassembler()
    reassembler.receive(KEY + 1, piece(0, 0, 2, bytes(5_000)), 0)
    for datagram in range(5):
        reassembler.receive(KEY, piece(datagram, 0, 2, bytes(4_000)), 0)
    assert (len(reassembler), reassembler.evicted) == (3, 3)
    assert reassembler.receive(KEY + 1, piece(0, 1, 2, b"y"), 0) == bytes(5_000) + b"y"


def test_tiny_pieces_of_many_conversations_are_bounded() -> None:
    reassembler = Reassembler(total_bytes=100 * PIECE_COST)
    for key in range(1_000):
        reassembler.receive(key, piece(0, 0, 255), 0)
        assert reassembler.held_bytes <= 100 * PIECE_COST
    assert len(reassembler) == 49
    assert reassembler.evicted == 951


def test_closed_conversation_leaves_nothing() -> None:
    reassembler = Reassembler()
    reassembler.receive(KEY, piece(0, 0, 2), 0)
    reassembler.forget(KEY)
    reassembler.forget(KEY)
    assert (len(reassembler), reassembler.held_bytes, reassembler.next_expiry_us()) == (0, 0, None)


def test_piece_of_another_count_or_above_the_longest_datagram_is_ignored() -> None:
    reassembler = Reassembler()
    assert reassembler.receive(KEY, piece(0, 0, 3, bytes(40_000)), 0) is None
    assert reassembler.receive(KEY, piece(0, 1, 2), 0) is None
    assert reassembler.receive(KEY, piece(0, 1, 3, bytes(MAX_DATAGRAM_BYTES - 40_000 + 1)), 0) is None
    assert reassembler.rejected == 2
    assert reassembler.receive(KEY, piece(0, 1, 3), 0) is None
    assert reassembler.receive(KEY, piece(0, 2, 3, b"y"), 0) == bytes(40_000) + b"xy"


any_piece = st.integers(2, MAX_COUNT).flatmap(
    lambda count: st.builds(piece, st.integers(0, 2), st.integers(0, count - 1), st.just(count), st.binary(min_size=1))
)


@given(st.lists(any_piece))
def test_any_well_formed_pieces_are_taken(pieces: list[Fragment]) -> None:
    reassembler = Reassembler()
    results = [reassembler.receive(KEY, one, 0) for one in pieces]
    assert len(results) - results.count(None) == reassembler.completed
    reassembler.expire(TIMEOUT_US)
    assert (len(reassembler), reassembler.held_bytes) == (0, 0)


class Reassembly(RuleBasedStateMachine):
    """Against a list of the incomplete datagrams in the order in which they began, and a set of the complete."""

    def __init__(self) -> None:
        super().__init__()
        self.reassembler = Reassembler(total_bytes=12 * PIECE_COST)
        self.partials: list[tuple[tuple[int, int], int, dict[int, bytes]]] = []
        self.complete: set[tuple[int, int]] = set()
        self.now_us = 0

    def cost(self) -> int:
        return sum(PIECE_COST * (1 + len(held)) + sum(map(len, held.values())) for _, _, held in self.partials)

    @rule(key=st.integers(0, 2), datagram=st.integers(0, 3), index=st.integers(0, 2), payload=st.binary(min_size=1))
    def receive(self, key: int, datagram: int, index: int, payload: bytes) -> None:
        result = self.reassembler.receive(key, piece(datagram, index, 3, payload), self.now_us)
        self.partials = [entry for entry in self.partials if self.now_us - entry[1] < TIMEOUT_US]
        name = key, datagram
        if name in self.complete:
            assert result is None
            return
        held = next((held for known, _, held in self.partials if known == name), None)
        if held is None:
            held = {}
            self.partials.append((name, self.now_us, held))
            self.make_room()
        held.setdefault(index, payload)
        if len(held) == 3:
            assert result == held[0] + held[1] + held[2]
            self.complete.add(name)
            self.partials = [entry for entry in self.partials if entry[0] != name]
        else:
            assert result is None
            self.make_room()

    def make_room(self) -> None:
        while self.cost() > 12 * PIECE_COST:
            del self.partials[0]

    @rule(passed_us=st.integers(0, TIMEOUT_US // 2))
    def time_passes(self, passed_us: int) -> None:
        self.now_us += passed_us

    @rule(key=st.integers(0, 2))
    def forget(self, key: int) -> None:
        self.reassembler.forget(key)
        self.partials = [entry for entry in self.partials if entry[0][0] != key]
        self.complete = {name for name in self.complete if name[0] != key}

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        assert (len(self.reassembler), self.reassembler.held_bytes) == (len(self.partials), self.cost())


TestReassembly = Reassembly.TestCase
