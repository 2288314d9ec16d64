"""Paths that die and stall, credit, and ACKs, as transcripts."""

import itertools

from tests.core.transcript import (
    FLOW,
    Side,
    ack,
    answered,
    client,
    data,
    established,
    fin,
    opening,
    server,
)
from workers.core import frame
from workers.core.credit import INITIAL_WINDOW, reserve_bytes
from workers.core.frame import Reason
from workers.core.path import Path
from workers.core.rtt import MAX_RTO_US
from workers.core.state import State
from workers.core.stream import ACK_DELAY_US, Stream

SECOND_US = 1_000_000
STALL_US = 500_000
"""The first tick after MIN_RTO_US."""


# Paths die


def test_frames_of_a_dead_path_go_elsewhere_first_and_in_order() -> None:
    side, stream = answered()
    other = side.new_path(1)
    side.write(stream, bytes(2500))
    assert side.says(most=2) == ["DATA 0-1000", "DATA 1000-2000"]
    side.share.lose_path(side.path)
    side.end(stream)
    assert side.says(other) == ["DATA 0-1000", "DATA 1000-2000", "DATA 2000-2500", "FIN 2500"]
    assert side.share.reinjected_bytes == 2000


def test_what_was_received_is_not_sent_again() -> None:
    side, stream = answered()
    other = side.new_path(1)
    side.write(stream, bytes(3000))
    side.says()
    side.hears(ack(1000, (2000, 3000)))
    side.share.lose_path(side.path)
    assert side.says(other) == ["DATA 1000-2000"]


def test_latest_ack_is_sent_again_when_its_path_dies() -> None:
    side, _ = established()
    other, third = side.new_path(1), side.new_path(2)
    side.hears(data(0, bytes(4000)))
    assert side.says(other) == ["ACK 4000"]
    side.share.lose_path(side.path)
    assert side.says(third) == [], "an earlier ACK took that path"
    side.share.lose_path(other)
    assert side.says(third) == ["ACK 4000"]


def test_frame_and_ack_that_a_dead_path_took_are_sent_again() -> None:
    """Another worker said too late which path it used."""
    side, stream = established()
    other = side.new_path(1)
    side.share.lose_path(side.path)
    assert side.says(other) == ["ACK 0"]
    side.write(stream, b"hello")
    assert side.says(side.path, most=1) == ["DATA 0-5"]
    assert side.says(other) == ["DATA 0-5"]
    side.hears(data(0, bytes(4000)))
    assert side.says(side.path, most=1) == ["ACK 4000"]
    assert side.says(other) == ["ACK 4000"]


def test_frame_handed_to_another_worker_is_bound_to_the_path_it_took() -> None:
    side, stream = established()
    handed, other = Path(1, -1, 0), side.new_path(1)
    side.write(stream, b"hello")
    assert side.says(handed) == ["DATA 0-5"]
    kept = side.share.find_kept(FLOW, frame.DATA, 0)
    assert kept is not None and kept.path is handed
    side.share.on_bound(kept, other, side.now_us)
    assert (kept.path, kept.sends, side.share.reinjected_bytes) == (other, 1, 0)
    side.share.lose_path(handed)
    assert side.says() == []
    side.share.lose_path(other)
    assert side.says() == ["DATA 0-5"]


def test_frame_and_ack_that_come_back_are_sent_again() -> None:
    side, stream = established()
    side.write(stream, b"hello")
    side.says()
    kept = side.share.find_kept(FLOW, frame.DATA, 0)
    assert kept is not None
    side.share.send_again(kept)
    side.share.send_again(kept)
    side.share.ack_again(stream)
    assert side.says() == ["ACK 0", "DATA 0-5"]
    side.hears(ack(5))
    assert side.share.find_kept(FLOW, frame.DATA, 0) is None
    assert side.share.find_kept(FLOW + 1, frame.DATA, 0) is None


def test_new_connection_of_a_path_is_another_path() -> None:
    side, stream = answered()
    side.write(stream, b"hello")
    side.says()
    again = side.new_path(0, generation=1)
    side.share.lose_path(side.path)
    assert list(side.share.paths.values()) == [again]
    assert side.says(again) == ["DATA 0-5"]


# Paths stall


def test_stalled_path_gives_up_all_its_frames_at_once() -> None:
    side, stream = answered()
    side.write(stream, bytes(2000))
    side.says()
    other = side.new_path(1)
    side.passes(STALL_US)
    assert side.path.stalled and not other.stalled
    assert side.says(other) == ["DATA 0-1000", "DATA 1000-2000"]
    side.passes(SECOND_US // 2)
    assert side.says(other) == []


def test_stalled_carrier_is_given_up_at_once_when_another_comes() -> None:
    side, stream = answered()
    side.hears(data(0, bytes(4000)))
    side.write(stream, bytes(2000))
    assert side.says() == ["ACK 4000", "DATA 0-1000", "DATA 1000-2000"]
    side.share.give_up([side.path], side.now_us)
    assert side.says() == ["ACK 4000"], "there is no other"
    other = side.new_path(1)
    side.share.give_up([side.path], side.now_us)
    assert side.says(other) == ["ACK 4000", "DATA 0-1000", "DATA 1000-2000"]
    assert side.path.stalled and not other.stalled


def test_late_frames_wait_for_nobody_while_another_worker_has_a_carrier_that_works() -> None:
    side, stream = answered()
    remote = Path(1, 0, 0)
    side.share.add_path(remote)
    side.share.lose_path(side.path)
    side.write(stream, bytes(2000))
    side.says(remote)
    side.share.usable_elsewhere = 1
    side.passes(SECOND_US)
    assert side.says(remote) == ["DATA 0-1000"], "that carrier is the one that works"
    side.share.on_held_up([remote])
    side.passes(2 * SECOND_US)
    assert remote.stalled and side.says(Path(1, -1, 0)) == ["DATA 1000-2000", "DATA 0-1000"]


def test_only_path_is_tried_one_frame_at_a_time() -> None:
    side, stream = answered()
    side.write(stream, bytes(3000))
    side.says()
    said_us = []
    for _ in range(200):
        side.passes(SECOND_US // 10)
        lines = side.says()
        if lines:
            assert len(lines) == 1
            said_us.append(side.now_us)
    waits = [after - before for before, after in itertools.pairwise(said_us)]
    assert not side.path.stalled
    assert 5 <= len(said_us) <= 7 and waits == sorted(set(waits))


def test_last_frame_that_the_receiver_dropped_comes_again_on_the_only_path() -> None:
    here, there = client(), server()
    stream = here.open()
    here.end(stream)
    assert here.says() == ["OPEN opening", "FIN 0 opening"]
    there.hears(opening(frame.OPEN))
    here.hears(*there.says())
    here.passes(2 * SECOND_US)
    lines = here.says()
    assert lines == ["FIN 0"]
    there.hears(*lines)
    assert there.told() == ["opened", "end"]


def test_frames_that_later_ones_overtook_come_again_all_together() -> None:
    """A receiver without memory dropped them: the path is as good as ever."""
    side, stream = answered()
    side.new_path(1)
    side.write(stream, bytes(5000))
    side.says()
    side.hears(ack(0, (4000, 5000)))
    side.passes(STALL_US)
    assert not side.path.stalled
    assert side.says() == ["DATA 0-1000", "DATA 1000-2000", "DATA 2000-3000", "DATA 3000-4000"]


def test_stalled_path_that_comes_back_is_used_again() -> None:
    side, stream = answered()
    side.write(stream, b"hello")
    side.says()
    other = side.new_path(1)
    side.passes(STALL_US)
    assert side.path.stalled
    side.hears(ack(5))
    assert not side.path.stalled, "nobody else had sent it: the path is alive"
    assert side.says(other) == []


def test_stalled_path_is_tried_again_later_and_later() -> None:
    side, stream = answered()
    other = side.new_path(1)
    rests = []
    for number in range(8):
        side.write(stream, b"x")
        assert side.says() == [f"DATA {number}-{number + 1}"]
        side.passes(2 * SECOND_US)
        assert side.says(other) == [f"DATA {number}-{number + 1}"]
        side.hears(ack(number + 1))
        stalled_us = side.now_us
        while side.path.stalled and side.now_us < stalled_us + 2 * MAX_RTO_US:
            side.passes(SECOND_US // 4)
        rests.append(side.now_us - stalled_us)
    assert rests == sorted(rests)
    assert MAX_RTO_US - 2 * SECOND_US < rests[-1] <= MAX_RTO_US


def test_one_path_is_always_left() -> None:
    side, stream = answered()
    other = side.new_path(1)
    side.write(stream, b"hello")
    side.says()
    side.passes(STALL_US)
    assert side.path.stalled and side.says(other) == ["DATA 0-5"]
    side.share.lose_path(other)
    assert not side.path.stalled
    assert side.says() == ["DATA 0-5"]


def test_paths_that_all_stall_leave_one() -> None:
    side, stream = answered()
    paths = [side.path, side.new_path(1), side.new_path(2)]
    for number, path in enumerate(paths):
        side.write(stream, b"x")
        assert side.says(path) == [f"DATA {number}-{number + 1}"]
    for _ in range(8):
        side.passes(SECOND_US)
        assert not all(path.stalled for path in paths)


# Credit


def blocked() -> tuple[Side, Stream]:
    """A client that has used up its credit, all received, and has more."""
    side, stream = answered()
    side.frame_bytes = INITIAL_WINDOW
    side.write(stream, bytes(INITIAL_WINDOW + 10))
    assert side.says() == [f"DATA 0-{INITIAL_WINDOW}"]
    side.hears(ack(INITIAL_WINDOW))
    assert side.says() == []
    return side, stream


def test_stream_without_credit_goes_on_when_it_is_granted() -> None:
    side, _ = blocked()
    side.hears(ack(INITIAL_WINDOW, credit=INITIAL_WINDOW + 4))
    assert side.says() == [f"DATA {INITIAL_WINDOW}-{INITIAL_WINDOW + 4}"]


def test_stream_without_credit_probes_at_growing_intervals() -> None:
    side, _ = blocked()
    probes = []
    for second in range(60):
        side.passes(SECOND_US)
        if side.says() == [f"DATA {INITIAL_WINDOW}-{INITIAL_WINDOW}"]:
            probes.append(second + 1)
        side.hears(ack(INITIAL_WINDOW))
    waits = [after - before for before, after in itertools.pairwise(probes)]
    assert probes[0] == 1 and waits == sorted(waits)
    assert waits[-1] == MAX_RTO_US // SECOND_US


def test_probe_is_answered_with_the_credit() -> None:
    side, _ = established()
    side.hears(data(0, b""))
    lines = side.says()
    assert lines == ["ACK 0"]
    ack_frame = frame.unpack_ack(frame.unpack(lines[0].data), lines[0].data[frame.HEADER_BYTES :])
    assert ack_frame.credit == INITIAL_WINDOW


def test_remainder_of_credit_is_used_once_nothing_is_in_flight() -> None:
    """A small remainder waits for more credit (silly window), but only while something is in flight."""
    side, stream = answered()
    side.write(stream, bytes(INITIAL_WINDOW + 100))
    side.frame_bytes = INITIAL_WINDOW - 50
    assert side.says() == [f"DATA 0-{INITIAL_WINDOW - 50}"]
    side.hears(ack(INITIAL_WINDOW - 50))
    assert side.says() == [f"DATA {INITIAL_WINDOW - 50}-{INITIAL_WINDOW}"]


def test_credit_is_announced_when_the_application_reads() -> None:
    side, stream = established()
    side.consumes = False
    side.hears(data(0, bytes(INITIAL_WINDOW)))
    assert side.says() == [f"ACK {INITIAL_WINDOW}"]
    assert side.says() == []
    side.consume()
    lines = side.says()
    assert lines == [f"ACK {INITIAL_WINDOW}"]
    assert frame.ACK_BODY.unpack_from(lines[0].data, frame.HEADER_BYTES)[0] == stream.window.credit > INITIAL_WINDOW


def test_unread_bytes_of_a_finished_stream_hold_their_credit() -> None:
    """They occupy the arena until the application takes them, stream or no stream."""
    side, stream = established()
    side.consumes = False
    side.hears(data(0, bytes(3000)), fin(3000))
    side.end(stream)
    side.says()
    side.hears(ack(1))
    assert stream.state is State.CLOSED and not side.share.streams
    assert side.share.pool.reserved == reserve_bytes(INITIAL_WINDOW)
    side.consume()
    assert side.share.pool.reserved == 0


def test_unread_bytes_of_a_finished_stream_that_nobody_will_read_give_their_credit_back() -> None:
    side, stream = established()
    side.consumes = False
    side.hears(data(0, bytes(3000)), fin(3000))
    side.end(stream)
    side.says()
    side.hears(ack(1))
    side.share.reset_stream(stream, Reason.APPLICATION)
    assert side.share.pool.reserved == 0 and side.says() == []
    side.consume()
    assert side.share.pool.reserved == 0


# ACKs


def test_ack_waits_a_little_for_more() -> None:
    side, _ = established()
    side.hears(data(0, b"a"))
    assert side.says() == [] and side.share.next_due_us == ACK_DELAY_US
    side.passes(ACK_DELAY_US // 2)
    side.hears(data(1, b"b"))
    assert side.share.next_due_us == ACK_DELAY_US
    side.passes(ACK_DELAY_US // 2)
    assert side.says() == ["ACK 2"]
    assert side.share.next_due_us is None


def test_ack_that_went_early_needs_no_timer() -> None:
    side, _ = established()
    side.hears(data(0, b"a"))
    assert side.share.next_due_us == ACK_DELAY_US
    side.hears(data(0, b"a"))
    assert side.says() == ["ACK 1"]
    assert side.share.next_due_us is None


def test_duplicate_is_acknowledged_at_once() -> None:
    side, _ = established()
    side.hears(data(0, b"abc"))
    assert side.says() == []
    side.hears(data(0, b"abc"))
    assert side.says() == ["ACK 3"]
    assert side.share.duplicate_bytes == 3 and side.delivered == b"abc"


def test_fin_is_acknowledged_at_once() -> None:
    side, _ = established()
    side.hears(data(0, b"abc"), fin(3))
    assert side.says() == ["ACK 4"]


def test_ack_that_a_later_one_overtook_harms_nothing() -> None:
    side, stream = answered()
    side.write(stream, bytes(4000))
    side.says()
    side.hears(ack(3000, credit=1 << 20), ack(1000, (2000, 3000), credit=1 << 14), ack(0))
    assert (stream.sent.acknowledged, stream.credit, len(side.slots)) == (3000, 1 << 20, 1)
