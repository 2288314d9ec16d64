"""Pieces in any order make the stream, against a model; overlaps are refused."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.core.errors import RemoteProtocolError
from workers.core.reorder import ReorderBuffer


class Model:
    """Byte by byte: which piece each received byte belongs to, and how far the bytes were taken."""

    def __init__(self) -> None:
        self.owner: dict[int, tuple[int, int]] = {}
        self.taken = 0

    def insert(self, offset: int, length: int) -> bool | None:
        """As ReorderBuffer.insert; None where that raises."""
        if offset + length <= self.taken:
            return False
        covered = {self.owner.get(place) for place in range(offset, offset + length)}
        if covered == {(offset, length)}:
            return False
        if offset < self.taken or covered != {None}:
            return None
        self.owner.update((place, (offset, length)) for place in range(offset, offset + length))
        return True

    def take(self) -> tuple[int, int] | None:
        piece = self.owner.get(self.taken)
        if piece is not None:
            self.taken += piece[1]
        return piece

    def received(self, most: int) -> tuple[int, tuple[tuple[int, int], ...]]:
        edge = self.taken
        while edge in self.owner:
            edge += 1
        places = sorted(place for place in self.owner if place > edge)
        starts = [place for place in places if place - 1 not in self.owner]
        ends = [place + 1 for place in places if place + 1 not in self.owner]
        return edge, tuple(zip(starts, ends, strict=True))[:most]


insertion = st.tuples(st.just("insert"), st.integers(0, 40), st.integers(1, 6))
taking = st.tuples(st.just("take"), st.just(0), st.just(0))
operation = st.one_of(insertion, taking)


def check(buffer: ReorderBuffer[tuple[int, int]], model: Model) -> None:
    assert buffer.next_offset == model.taken
    for most in (0, 1, 2, 99):
        assert buffer.received(most) == model.received(most)
    held = {piece for place, piece in model.owner.items() if place >= model.taken}
    assert set(buffer.pieces) == {offset for offset, _ in held}
    assert buffer._starts == [start for start, _ in buffer.ranges]


@given(st.lists(operation, max_size=60))
def test_any_pieces_are_as_the_model_says(operations: list[tuple[str, int, int]]) -> None:
    buffer: ReorderBuffer[tuple[int, int]] = ReorderBuffer()
    model = Model()
    for name, offset, length in operations:
        if name == "take":
            expected = model.take()
            assert buffer.take() == (None if expected is None else (expected[1], expected))
        else:
            expected_taken = model.insert(offset, length)
            if expected_taken is None:
                with pytest.raises(RemoteProtocolError):
                    buffer.insert(offset, length, (offset, length))
            else:
                assert buffer.insert(offset, length, (offset, length)) is expected_taken
                assert offset in buffer
        check(buffer, model)
    assert sorted(buffer.clear()) == sorted({piece for place, piece in model.owner.items() if place >= model.taken})
    assert not buffer.pieces and not buffer.ranges


@st.composite
def cut_and_shuffled(draw: st.DrawFn) -> tuple[bytes, list[tuple[int, bytes]]]:
    """A stream, and its pieces in some order, some of them more than once."""
    data = draw(st.binary(max_size=80))
    cuts = draw(st.sets(st.integers(1, max(len(data) - 1, 1))))
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [(start, data[start:end]) for start, end in itertools.pairwise(edges)]
    again = draw(st.lists(st.sampled_from(pieces), max_size=10)) if pieces else []
    return data, draw(st.permutations(pieces + again))


@given(cut_and_shuffled(), st.booleans())
def test_pieces_in_any_order_make_the_stream(case: tuple[bytes, list[tuple[int, bytes]]], at_once: bool) -> None:
    data, pieces = case
    buffer: ReorderBuffer[bytes] = ReorderBuffer()
    out = bytearray()
    new = 0
    for offset, piece in pieces:
        new += buffer.insert(offset, len(piece), piece)
        while at_once and (entry := buffer.take()) is not None:
            out += entry[1]
    while (entry := buffer.take()) is not None:
        out += entry[1]
    assert bytes(out) == data
    assert new == len(set(pieces))
    assert buffer.received(8) == (len(data), ())
    assert not buffer.pieces


def test_piece_that_waits_to_be_taken_is_part_of_the_edge() -> None:
    buffer: ReorderBuffer[str] = ReorderBuffer()
    buffer.insert(0, 10, "a")
    buffer.insert(20, 10, "c")
    buffer.insert(10, 10, "b")
    assert buffer.received(8) == (30, ())


@pytest.mark.parametrize(("offset", "length"), [(5, 10), (0, 9), (0, 11), (15, 10), (21, 2), (20, 9), (15, 30)])
def test_partial_overlap_is_refused_and_changes_nothing(offset: int, length: int) -> None:
    buffer: ReorderBuffer[str] = ReorderBuffer()
    buffer.insert(0, 10, "a")
    buffer.insert(20, 10, "b")
    with pytest.raises(RemoteProtocolError):
        buffer.insert(offset, length, "x")
    assert buffer.received(8) == (10, ((20, 30),))
    assert buffer.clear() == ["a", "b"]


def test_overlap_with_what_was_taken_is_refused() -> None:
    buffer: ReorderBuffer[str] = ReorderBuffer()
    buffer.insert(0, 10, "a")
    assert buffer.take() == (10, "a")
    assert not buffer.insert(3, 7, "x")
    with pytest.raises(RemoteProtocolError, match="partly received up to 10"):
        buffer.insert(9, 2, "x")
