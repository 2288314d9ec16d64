"""Frames kept until they are acknowledged, against a model; hostile ACKs change nothing."""

from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.core import frame
from workers.core.errors import RemoteProtocolError
from workers.core.retain import SendBuffer, SentFrame
from workers.core.stream import Stream

Ranges = tuple[tuple[int, int], ...]


def kept(offset: int, length: int) -> SentFrame:
    return SentFrame(cast(Stream, None), frame.DATA, offset, length, -1)


def filled(*lengths: int) -> SendBuffer:
    buffer = SendBuffer()
    for length in lengths:
        buffer.add(kept(buffer.next_offset, length))
    return buffer


def offsets(frames: list[SentFrame]) -> list[int]:
    return [each.offset for each in frames]


class Model:
    """Which frames were sent and which of them were received."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int]] = []
        self.received: set[int] = set()
        self.acknowledged = 0

    @property
    def end(self) -> int:
        return self.sent[-1][1] if self.sent else 0

    def acknowledge(self, received: int, ranges: Ranges) -> set[int] | None:
        """The frames newly received; None where the ACK is refused."""
        edges = {0, *(end for _, end in self.sent)}
        if any(offset > self.acknowledged and offset not in edges for offset in (received, *sum(ranges, ()))):
            return None
        self.acknowledged = max(self.acknowledged, received)
        said = {start for start, end in self.sent if end <= received}
        for low, high in ranges:
            if low >= self.acknowledged:
                said |= {start for start, end in self.sent if low <= start and end <= high}
        newly = said - self.received
        self.received |= newly
        return newly


class Receiver:
    """Receives some of the frames and says so, as a reorder buffer does."""

    def __init__(self) -> None:
        self.got: list[tuple[int, int]] = []

    def ack(self, most: int) -> tuple[int, Ranges]:
        merged: list[tuple[int, int]] = [(0, 0)]
        for start, end in sorted(self.got):
            if start == merged[-1][1]:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((start, end))
        return merged[0][1], tuple(merged[1 : 1 + most])


@given(st.data())
def test_acks_in_any_order_are_as_the_model_says(data: st.DataObject) -> None:
    buffer, model, receiver = SendBuffer(), Model(), Receiver()
    acks: list[tuple[int, Ranges]] = []
    frames: dict[int, SentFrame] = {}
    for step in data.draw(st.lists(st.sampled_from(["send", "receive", "ack", "stale"]), max_size=60)):
        missing = [each for each in model.sent if each not in receiver.got]
        if step == "send":
            start, length = buffer.next_offset, data.draw(st.integers(1, 5))
            frames[start] = kept(start, length)
            buffer.add(frames[start])
            model.sent.append((start, start + length))
        elif step == "receive" and missing:
            receiver.got.append(data.draw(st.sampled_from(missing)))
        elif step == "ack" or (step == "stale" and acks):
            if step == "ack":
                acks.append(receiver.ack(data.draw(st.integers(0, 8))))
            ack = acks[-1] if step == "ack" else data.draw(st.sampled_from(acks))
            newly = buffer.acknowledge(*ack)
            assert set(offsets(newly)) == model.acknowledge(*ack)
            assert len(newly) == len(set(offsets(newly)))
        assert (buffer.next_offset, buffer.acknowledged) == (model.end, model.acknowledged)
        assert {start for start, each in frames.items() if each.done} == model.received
        assert len(buffer) == sum(end > model.acknowledged for _, end in model.sent)
        for start, each in frames.items():
            assert buffer.find(start) is (each if start >= model.acknowledged else None)
    rest = buffer.clear()
    assert set(offsets(rest)) == {start for start, _ in model.sent} - model.received
    assert all(each.done for each in rest) and not len(buffer)


numbers = st.lists(st.integers(0, 50), min_size=1, max_size=7)


@given(st.lists(st.integers(1, 6), max_size=12), st.lists(numbers, max_size=8))
def test_hostile_acks_are_refused_whole_or_taken_as_they_read(lengths: list[int], acks: list[list[int]]) -> None:
    buffer, model = filled(*lengths), Model()
    end = 0
    for length in lengths:
        model.sent.append((end, end + length))
        end += length
    for numbers in acks:
        received, *edges = sorted(set(numbers))
        ranges = tuple(zip(edges[::2], edges[1::2], strict=False))
        before = (len(buffer), buffer.acknowledged)
        expected = model.acknowledge(received, ranges)
        if expected is None:
            with pytest.raises(RemoteProtocolError):
                buffer.acknowledge(received, ranges)
            assert (len(buffer), buffer.acknowledged) == before
        else:
            assert set(offsets(buffer.acknowledge(received, ranges))) == expected
    assert len(buffer.clear()) == len(lengths) - len(model.received)


@pytest.mark.parametrize(
    ("received", "ranges"),
    [
        (61, ()),
        (15, ()),
        (10, ((20, 61),)),
        (10, ((20, 35),)),
        (10, ((25, 40),)),
        (10, ((20, 30), (40, 45))),
        (35, ((40, 50),)),
    ],
)
def test_ack_that_cuts_a_frame_or_covers_what_was_never_sent_changes_nothing(received: int, ranges: Ranges) -> None:
    buffer = filled(*[10] * 6)
    buffer.acknowledge(10, ())
    with pytest.raises(RemoteProtocolError):
        buffer.acknowledge(received, ranges)
    assert offsets(buffer.clear()) == [10, 20, 30, 40, 50]


def test_overtaken_ack_is_taken_for_what_it_still_says() -> None:
    buffer = filled(*[10] * 6)
    assert offsets(buffer.acknowledge(40, ())) == [0, 10, 20, 30]
    assert offsets(buffer.acknowledge(10, ((20, 30), (50, 60)))) == [50]


def test_range_that_grows_is_not_walked_again() -> None:
    """A hole that stays open must not make each ACK cost as much as all that was received above it."""
    count = 4000
    buffer = filled(*[1] * count)
    walked = 0

    class Counting(dict[int, SentFrame]):
        def __getitem__(self, key: int) -> SentFrame:
            nonlocal walked
            walked += 1
            return super().__getitem__(key)

    buffer._by_offset = Counting(buffer._by_offset)
    for end in range(11, count + 1, 10):
        buffer.acknowledge(0, ((1, end),))
    assert offsets(buffer.acknowledge(count, ())) == [0, *range(count - 9, count)]
    assert walked < 3 * count


def test_frames_are_kept_without_a_gap() -> None:
    buffer = filled(3)
    with pytest.raises(AssertionError):
        buffer.add(kept(4, 1))
