"""One stream's two halves: what it sends within its credit, and what it takes."""

import pytest

from workers.core import frame
from workers.core.credit import INITIAL_FRAMES, INITIAL_WINDOW, CreditPool, reserve_bytes
from workers.core.errors import LocalProtocolError, RemoteProtocolError
from workers.core.frame import Ack
from workers.core.state import Input, State
from workers.core.stream import ACK_FRAMES, Stream

FLOW = 0xF


@pytest.fixture
def stream() -> Stream:
    pool = CreditPool(1 << 30)
    assert pool.reserve(reserve_bytes(INITIAL_WINDOW))
    return Stream(FLOW, 3, pool, 1 << 20, 0)


def acked(stream: Stream) -> Ack:
    packed = stream.ack_to_send()
    header = frame.unpack(packed)
    assert header == (frame.ACK, 0, 3, FLOW, header.offset)
    return frame.unpack_ack(header, packed[frame.HEADER_BYTES :])


def test_frame_is_as_large_as_the_path_wants_while_credit_lasts(stream: Stream) -> None:
    assert stream.sendable(1000) == 1000
    assert stream.sendable(1 << 20) == INITIAL_WINDOW
    stream.add_data(INITIAL_WINDOW - 10_000, 0)
    assert stream.sendable(1 << 20) == 10_000


def test_small_remainder_of_credit_waits_while_something_is_in_flight(stream: Stream) -> None:
    stream.add_data(INITIAL_WINDOW - 100, 0)
    assert stream.sendable(1000) == 0
    assert stream.sendable(100) == 100
    stream.sent.acknowledge(INITIAL_WINDOW - 100, ())
    assert stream.sendable(1000) == 100


def test_nothing_is_sent_beyond_the_credit(stream: Stream) -> None:
    stream.add_data(INITIAL_WINDOW, 0)
    stream.sent.acknowledge(INITIAL_WINDOW, ())
    assert stream.sendable(1) == 0
    assert stream.take_credit(Ack(INITIAL_WINDOW, INITIAL_WINDOW + 1, INITIAL_FRAMES, ()))
    assert stream.sendable(1000) == 1


def test_nothing_is_sent_beyond_the_frames_allowed(stream: Stream) -> None:
    for slot in range(INITIAL_FRAMES):
        assert stream.sendable(1) == 1
        stream.add_data(1, slot)
    assert stream.sendable(1) == 0
    assert stream.take_credit(Ack(0, 0, INITIAL_FRAMES + 1, ()))
    assert stream.sendable(1) == 1


def test_credit_of_an_overtaken_ack_takes_nothing_back(stream: Stream) -> None:
    assert stream.take_credit(Ack(0, 1 << 20, 99, ()))
    assert not stream.take_credit(Ack(0, INITIAL_WINDOW, 16, ()))
    assert (stream.credit, stream.frames_allowed) == (1 << 20, 99)


def test_nothing_is_sent_after_the_fin(stream: Stream) -> None:
    stream.add_data(5, 0)
    kept = stream.add_fin()
    assert (kept.kind, kept.offset, kept.length) == (frame.FIN, 5, 1)
    assert stream.sendable(1000) == 0
    with pytest.raises(LocalProtocolError):
        stream.add_fin()


def test_data_up_to_the_credit_is_taken_and_one_byte_more_is_not(stream: Stream) -> None:
    with pytest.raises(RemoteProtocolError, match="credit 16384"):
        stream.take_data(1, INITIAL_WINDOW, "x")
    assert stream.take_data(0, INITIAL_WINDOW, "a")
    assert not stream.take_data(0, INITIAL_WINDOW, "a")


def test_more_frames_than_allowed_are_refused_and_duplicates_are_none(stream: Stream) -> None:
    for offset in range(INITIAL_FRAMES):
        assert stream.take_data(offset, 1, "a")
    assert not stream.take_data(3, 1, "a")
    with pytest.raises(RemoteProtocolError, match="more frames than 16"):
        stream.take_data(INITIAL_FRAMES, 1, "x")
    assert acked(stream).received == INITIAL_FRAMES, "what was refused is not acknowledged"


def test_duplicate_is_known_also_when_its_bytes_were_taken(stream: Stream) -> None:
    for offset in range(INITIAL_FRAMES):
        stream.take_data(offset, 1, "a")
        stream.received.take()
    assert not stream.take_data(3, 1, "a")


def test_ack_says_what_was_received_and_what_is_allowed(stream: Stream) -> None:
    stream.take_data(0, 10, "a")
    stream.take_data(20, 10, "c")
    assert acked(stream) == (10, INITIAL_WINDOW, INITIAL_FRAMES, ((20, 30),))
    stream.window.on_consumed(10, 1, 10, 1)
    assert acked(stream) == (10, INITIAL_WINDOW + 10, INITIAL_FRAMES + 1, ((20, 30),))


def test_ack_is_due_after_an_eighth_of_the_window_or_many_frames(stream: Stream) -> None:
    stream.take_data(0, (INITIAL_WINDOW >> 3) - 1, "a")
    assert not stream.ack_due()
    stream.take_data((INITIAL_WINDOW >> 3) - 1, 1, "b")
    assert stream.ack_due()
    stream.ack_to_send()
    assert not stream.ack_due()
    stream.window.frames = 1000
    for number in range(ACK_FRAMES):
        assert not stream.ack_due()
        stream.take_data(4000 + 2 * number, 1, "c")
    assert stream.ack_due()


@pytest.mark.parametrize("total", [9, 0, INITIAL_WINDOW + 1, (1 << 64) - 1])
def test_fin_below_what_was_received_or_beyond_the_credit_is_refused(stream: Stream, total: int) -> None:
    stream.take_data(5, 5, "b")
    with pytest.raises(RemoteProtocolError, match=f"FIN of {total}, received 10, credit 16384"):
        stream.take_fin(total)
    assert stream.fin_total is None


def test_second_fin_must_say_the_same(stream: Stream) -> None:
    assert stream.take_fin(10)
    assert not stream.take_fin(10)
    with pytest.raises(RemoteProtocolError, match="FIN of 11 after one of 10"):
        stream.take_fin(11)


def test_data_beyond_the_fin_is_refused(stream: Stream) -> None:
    stream.take_fin(10)
    for offset, length in ((10, 1), (9, 2), (11, 5)):
        with pytest.raises(RemoteProtocolError, match="total 10"):
            stream.take_data(offset, length, "x")
    assert stream.take_data(0, 10, "a")


def test_fin_at_the_very_end_of_the_credit_fits(stream: Stream) -> None:
    assert stream.take_data(0, INITIAL_WINDOW, "a")
    assert stream.take_fin(INITIAL_WINDOW)
    assert acked(stream).received == INITIAL_WINDOW + 1


def test_credit_goes_back_once(stream: Stream) -> None:
    pool = stream.window._pool
    stream.close_window()
    stream.close_window()
    assert pool.reserved == 0
    assert acked(stream).credit == INITIAL_WINDOW


def test_window_of_a_finished_stream_closes_with_its_last_byte(stream: Stream) -> None:
    pool = stream.window._pool
    stream.take_data(0, 10, "a")
    stream.take_fin(10)
    stream.close_window_if_consumed()
    assert pool.reserved
    stream.window.on_consumed(10, 1, 10, 1)
    stream.close_window_if_consumed()
    assert not pool.reserved


def test_wrong_move_is_an_error_of_whose_fault_it_is(stream: Stream) -> None:
    with pytest.raises(RemoteProtocolError):
        stream.on(Input.FIN_ACKED)
    stream.on(Input.SEND_RESET)
    with pytest.raises(LocalProtocolError):
        stream.on(Input.SEND_FIN)
    assert stream.state is State.RESETTING
