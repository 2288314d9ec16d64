"""A share's behaviour as transcripts: what it hears, what it says, what it tells its shell."""

import itertools

import pytest

from tests.core.transcript import (
    BOOT,
    CLIENT_SERIAL,
    FLOW,
    OWNER,
    SERVER_SERIAL,
    Said,
    Side,
    ack,
    answered,
    client,
    data,
    established,
    exchange,
    fin,
    opening,
    reset,
    said,
    server,
)
from workers.core import frame, sending, session
from workers.core.closed import TOMBSTONE_US
from workers.core.credit import INITIAL_WINDOW, reserve_bytes
from workers.core.errors import RemoteProtocolError
from workers.core.frame import Reason
from workers.core.rtt import INITIAL_RTO_US
from workers.core.state import State
from workers.core.stream import Stream

SECOND_US = 1_000_000
STALL_US = 500_000
"""The first tick after MIN_RTO_US."""


# Opening


def test_whole_conversation() -> None:
    here, there = client(), server()
    stream = here.open()
    here.write(stream, b"hello")
    lines = here.says()
    assert lines == ["OPEN opening", "DATA 0-5 opening"]
    there.hears(*lines)
    assert there.told() == ["opened", "deliver 5"]
    there.write(there.stream(), b"good day")
    there.end(there.stream())
    lines = there.says()
    assert lines == ["ACK 5", "DATA 0-8", "FIN 8"]
    here.hears(*lines)
    assert here.told() == ["deliver 8", "end"]
    here.end(stream)
    lines = here.says()
    assert lines == ["ACK 9", "FIN 5"]
    there.hears(*lines)
    assert there.told() == ["end"]
    here.hears(*there.says())
    assert (stream.state, here.delivered, there.delivered) == (State.CLOSED, b"good day", b"hello")
    assert here.empty and there.empty


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_frames_of_a_new_stream_create_it_in_any_order(order: tuple[int, ...]) -> None:
    lines = [opening(frame.OPEN), opening(frame.DATA, 0, b"abc"), opening(frame.DATA, 3, b"de"), opening(frame.FIN, 5)]
    side = server()
    for index in order:
        side.hears(lines[index])
    assert [event for event in side.told() if event[0] != "d"] == ["opened", "end"]
    assert side.delivered == b"abcde"
    assert side.says() == ["ACK 6"]
    assert side.stream().state is State.CLOSE_WAIT


def test_open_that_comes_by_two_paths_opens_once() -> None:
    side, _ = established()
    side.hears(opening(frame.OPEN))
    assert side.told() == []
    assert side.says() == ["ACK 0"]
    assert side.share.total_streams == 1


def test_probe_of_a_new_stream_opens_it() -> None:
    side = server()
    side.hears(opening(frame.DATA, 0))
    assert side.told() == ["opened"]
    assert side.says() == ["ACK 0"]


@pytest.mark.parametrize("line", [data(0, b"x"), data(0, b""), fin(0)])
def test_frame_of_an_answered_stream_that_nobody_knows_is_reset(line: Said) -> None:
    side = server()
    side.hears(line)
    assert side.says() == ["RESET UNKNOWN_FLOW"] and side.told() == []
    side.hears(ack(0, of_reset=True))
    assert side.empty and not side.says()


def test_ack_of_a_stream_that_nobody_knows_is_reset() -> None:
    """A worker that took the slot of a dead one must end what the other end still believes in."""
    side = server()
    side.hears(ack(17))
    assert side.says() == ["RESET UNKNOWN_FLOW"]
    side.hears(ack(0, of_reset=True))
    assert not side.says()


def test_frame_for_an_older_worker_in_this_slot_is_reset() -> None:
    side = server()
    side.hears(opening(frame.OPEN, serial=SERVER_SERIAL - 1))
    assert side.says() == ["RESET UNKNOWN_FLOW"] and side.told() == []


def test_client_lets_nobody_open_a_stream() -> None:
    side = client()
    flow = frame.flow_id(frame.SERVER, 0, 0, SERVER_SERIAL, 0)
    side.hears(opening(frame.OPEN, flow=flow, serial=CLIENT_SERIAL))
    assert side.says() == ["RESET UNKNOWN_FLOW"] and side.told() == []
    assert side.empty


def test_flow_ids_go_on_when_a_new_worker_takes_the_owners_slot() -> None:
    side = client()
    owners = [(0, 5, 1), (1, 6, 1), (0, 7, 1), (0, 2, 9)]
    flows = [side.open(owner).flow for owner in owners]
    assert len(set(flows)) == 4
    assert [frame.flow_counter(flow) for flow in flows] == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("side", "reason"),
    [
        (Side(frame.SERVER, max_streams=1), "OVERLOAD"),
        (Side(frame.SERVER, pool_bytes=reserve_bytes(INITIAL_WINDOW)), "OVERLOAD"),
        (server(), "SHUTDOWN"),
    ],
    ids=["streams", "credit", "draining"],
)
def test_stream_that_finds_no_place_is_reset_and_stays_so(side: Side, reason: str) -> None:
    second = FLOW + 1
    side.hears(opening(frame.OPEN))
    side.share.draining = reason == "SHUTDOWN"
    side.says(), side.told()
    side.hears(opening(frame.OPEN, flow=second))
    assert side.says() == [f"RESET {reason}"] and side.told() == []
    side.share.draining = False
    side.hears(opening(frame.DATA, 0, b"late", flow=second))
    assert side.says() == ["RESET UNKNOWN_FLOW"] and side.told() == []


def test_client_without_room_opens_nothing() -> None:
    side = Side(frame.CLIENT, max_streams=1)
    side.open()
    assert side.share.open_stream(OWNER, 0) is None
    side = Side(frame.CLIENT, pool_bytes=reserve_bytes(INITIAL_WINDOW))
    side.open()
    assert side.share.open_stream(OWNER, 0) is None


# FIN and RESET cross


def test_fin_received_before_the_data_ends_nothing() -> None:
    side, stream = established()
    side.hears(fin(5))
    assert side.told() == [] and side.says() == ["ACK 0 [5-6]"]
    side.hears(data(0, b"hello"))
    assert side.told() == ["deliver 5", "end"]
    assert stream.state is State.CLOSE_WAIT


def test_fin_acknowledged_before_the_data_keeps_the_data() -> None:
    """The FIN is acknowledged when all before it is: else what a dying stripe took would be forgotten."""
    side, stream = answered()
    other = side.new_path(1)
    side.write(stream, b"hello")
    assert side.says(other) == ["DATA 0-5"]
    side.end(stream)
    assert side.says() == ["FIN 5"]
    side.hears(ack(0, (5, 6)))
    assert stream.state.value == "fin-wait-1" and len(side.slots) == 1
    side.share.lose_path(other)
    assert side.says() == ["DATA 0-5"]
    side.hears(ack(6))
    assert stream.state.value == "fin-wait-2" and not side.slots


def test_fins_that_cross_close_both_ends() -> None:
    here, there = client(), server()
    stream = here.open()
    exchange(here, there)
    here.end(stream)
    there.end(there.stream())
    forth, back = here.says(), there.says()
    assert (forth, back) == (["FIN 0"], ["FIN 0"])
    here.hears(*back)
    there.hears(*forth)
    assert stream.state is there.stream().state is State.CLOSING
    exchange(here, there)
    assert here.empty and there.empty
    assert here.told() == ["end"] and there.told() == ["opened", "end"]


def test_resets_that_cross_close_both_ends() -> None:
    here, there = client(), server()
    stream = here.open()
    exchange(here, there)
    there.told()
    here.share.reset_stream(stream, Reason.APPLICATION)
    there.share.reset_stream(there.stream(), Reason.TIMEOUT)
    forth, back = here.says(), there.says()
    assert (forth, back) == (["RESET APPLICATION"], ["RESET TIMEOUT"])
    here.hears(*back)
    there.hears(*forth)
    assert (here.told(), there.told()) == (["reset APPLICATION"], ["reset TIMEOUT"])
    assert (here.says(), there.says()) == (["ACK of RESET"], ["ACK of RESET"])
    here.hears(ack(0, of_reset=True))
    there.hears(ack(0, of_reset=True))
    assert here.empty and there.empty
    assert here.share.reset_streams == there.share.reset_streams == 1


def test_reset_crosses_a_fin() -> None:
    here, there = client(), server()
    stream = here.open()
    exchange(here, there)
    there.told()
    here.end(stream)
    there.share.reset_stream(there.stream(), Reason.UNREACHABLE)
    forth, back = here.says(), there.says()
    assert (forth, back) == (["FIN 0"], ["RESET UNREACHABLE"])
    here.hears(*back)
    there.hears(*forth)
    exchange(here, there)
    assert (here.told(), there.told()) == (["reset UNREACHABLE"], ["reset UNREACHABLE"])
    assert here.empty and there.empty


@pytest.mark.parametrize("state", [State.FIN_WAIT_1, State.FIN_WAIT_2, State.CLOSE_WAIT, State.CLOSING, State.LAST_ACK])
@pytest.mark.parametrize("ours", [True, False])
def test_reset_ends_a_stream_in_any_state(state: State, ours: bool) -> None:
    side, stream = established()
    if state in (State.CLOSE_WAIT, State.LAST_ACK):
        side.hears(fin(0))
    if state is not State.CLOSE_WAIT:
        side.end(stream)
        side.says()
    if state is State.FIN_WAIT_2:
        side.hears(ack(1))
    if state is State.CLOSING:
        side.hears(fin(0))
    side.says(), side.told()
    assert stream.state is state
    if ours:
        side.share.reset_stream(stream, Reason.APPLICATION)
        assert side.says() == ["RESET APPLICATION"]
        side.hears(ack(0, of_reset=True))
    else:
        side.hears(reset())
        assert side.says() == ["ACK of RESET"]
    assert side.told() == ["reset APPLICATION"]
    assert side.empty and stream.state is State.CLOSED


def test_reset_before_the_open_refuses_the_open() -> None:
    side = server()
    side.hears(reset())
    assert side.says() == ["ACK of RESET"] and side.told() == []
    side.hears(opening(frame.OPEN), opening(frame.DATA, 0, b"late"))
    assert side.says() == ["RESET UNKNOWN_FLOW"] * 2 and side.told() == []
    assert side.empty


def test_stream_reset_before_it_was_sent_leaves_nothing() -> None:
    here, there = client(), server()
    stream = here.open()
    here.write(stream, b"hello")
    here.share.reset_stream(stream, Reason.APPLICATION)
    lines = here.says()
    assert lines == ["OPEN opening", "RESET APPLICATION"]
    there.hears(*reversed(lines))
    exchange(here, there)
    assert there.told() == [] and here.told() == ["reset APPLICATION"]
    assert here.empty and there.empty


def test_reset_drops_what_was_not_delivered_and_not_received() -> None:
    side, stream = established()
    side.hears(data(5, b"later"))
    side.write(stream, b"unreceived")
    side.says()
    assert side.pieces and side.slots
    side.hears(reset(Reason.OVERLOAD))
    assert side.told() == ["discard", "reset OVERLOAD"]
    side.says()
    assert side.empty


def test_reset_is_sent_until_it_is_acknowledged() -> None:
    side, stream = established()
    side.share.reset_stream(stream, Reason.TIMEOUT)
    assert side.says() == ["RESET TIMEOUT"]
    side.hears(data(0, b"late"), fin(4), ack(0))
    assert side.says() == ["ACK 0"]
    side.passes(INITIAL_RTO_US)
    assert side.says() == ["RESET TIMEOUT"]
    side.hears(ack(0, of_reset=True), ack(0, of_reset=True))
    assert side.told() == ["reset TIMEOUT"]
    assert stream.state is State.CLOSED and not side.share.streams


def test_second_reset_changes_nothing() -> None:
    side, stream = established()
    side.share.reset_stream(stream, Reason.TIMEOUT)
    side.share.reset_stream(stream, Reason.APPLICATION)
    assert side.told() == ["reset TIMEOUT"] and side.says() == ["RESET TIMEOUT"]
    side.hears(reset(), reset())
    assert side.told() == [] and side.says() == ["ACK of RESET"] * 2
    assert side.empty


# Late frames of a closed stream


def finished() -> Side:
    """A server whose stream FLOW ended in both directions, after 5 bytes from the client."""
    side, stream = established()
    side.hears(data(0, b"hello"), fin(5))
    side.end(stream)
    assert side.says() == ["ACK 6", "FIN 0"]
    side.hears(ack(1))
    assert side.told() == ["deliver 5", "end"] and side.empty
    return side


@pytest.mark.parametrize("line", [fin(5), data(0, b"hello"), opening(frame.OPEN), opening(frame.FIN, 5)])
def test_late_frame_of_a_finished_stream_is_acknowledged_whole(line: Said) -> None:
    side = finished()
    side.hears(line)
    assert side.says() == ["ACK 6"] and side.told() == []


def test_late_ack_of_a_finished_stream_is_ignored() -> None:
    side = finished()
    side.hears(ack(1))
    assert side.says() == [] and side.told() == []


def test_late_reset_of_a_finished_stream_is_acknowledged() -> None:
    side = finished()
    side.hears(reset())
    assert side.says() == ["ACK of RESET"] and side.told() == []


@pytest.mark.parametrize("start_us", [0, 10**15])
def test_finished_stream_is_forgotten_in_time_and_never_opened_again(start_us: int) -> None:
    side = Side(frame.SERVER, start_us=start_us)
    side.hears(opening(frame.FIN, 0))
    side.end(side.stream())
    side.says()
    side.hears(ack(1))
    assert not side.share.streams
    side.passes(TOMBSTONE_US)
    side.hears(opening(frame.OPEN))
    assert side.says() == ["ACK 1"]
    side.passes(SECOND_US)
    side.hears(opening(frame.OPEN))
    assert side.says() == ["RESET UNKNOWN_FLOW"] and side.told() == ["opened", "end"]


# What the peer may not do


@pytest.mark.parametrize(
    ("before", "wrong"),
    [
        ([], data(0, bytes(INITIAL_WINDOW + 1))),
        ([], data(INITIAL_WINDOW, b"x")),
        ([data(n, b"x") for n in range(0, 32, 2)], data(40, b"x")),
        ([data(0, b"abc")], fin(2)),
        ([data(5, b"abc")], fin(7)),
        ([fin(5)], fin(6)),
        ([fin(5)], data(4, b"xy")),
        ([data(0, b"abc"), fin(3)], data(3, b"x")),
        ([], fin((1 << 64) - 1)),
        ([data(5, b"abc")], data(4, b"xy")),
        ([data(0, b"abc")], data(2, b"xy")),
        ([], ack(1)),
        ([], ack(0, (1, 2))),
        ([], ack(0, of_reset=True)),
    ],
)
def test_broken_protocol_is_refused_and_harms_nothing(before: list[Said], wrong: Said) -> None:
    side, stream = established()
    side.consumes = False
    side.hears(*before)
    delivered = side.delivered
    with pytest.raises(RemoteProtocolError):
        side.hears(wrong)
    assert side.delivered == delivered
    assert stream.state is (State.CLOSE_WAIT if "end" in side.told() else State.ESTABLISHED)
    side.share.reset_stream(stream, Reason.APPLICATION)
    side.says()
    side.hears(ack(0, of_reset=True))
    assert side.empty


@pytest.mark.parametrize("wrong", [ack(2500), ack(6000), ack(0, (1000, 1500)), ack(2000, (2500, 3000))])
def test_wrong_ack_releases_nothing(wrong: Said) -> None:
    side, stream = answered()
    side.write(stream, bytes(5000))
    side.says()
    with pytest.raises(RemoteProtocolError):
        side.hears(wrong)
    assert len(side.slots) == 5
    side.hears(ack(5000))
    assert not side.slots and stream.sent.acknowledged == 5000


def test_answers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "MAX_ANSWERS", 3)
    side = server()
    side.hears(*[fin(0, flow=FLOW + number) for number in range(10)])
    assert side.says() == ["RESET UNKNOWN_FLOW"] * 3


def test_memory_of_openers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MAX_OPENERS", 3)
    side = server()
    side.hears(*[reset(flow=frame.flow_id(frame.CLIENT, 0, 0, serial, 0)) for serial in (1, 2, 3, 1, 4)])
    assert [opener & 0xFF for opener in side.share._seen] == [3, 1, 4]


# Workers of the other end die


def flows_to(*owners: session.Owner) -> tuple[Side, list[Stream]]:
    side = client()
    streams = [side.open(owner) for owner in owners]
    side.says()
    side.hears(*[ack(0, flow=stream.flow) for stream in streams])
    return side, streams


def test_client_resets_the_streams_of_a_dead_worker() -> None:
    side, (old, dead, young, elsewhere) = flows_to((0, 4, BOOT), (0, 5, BOOT), (0, 6, BOOT), (1, 5, BOOT))
    side.share.on_peer_gone(0, 5)
    assert side.told() == ["reset WORKER_GONE"] * 2
    assert list(side.share.streams.values()) == [young, elsewhere]
    assert old.state is dead.state is State.CLOSED
    side.share.on_peer_gone(0, 5)
    assert side.told() == [] and side.says() == []


@pytest.mark.parametrize(
    ("dead", "survives"), [(CLIENT_SERIAL, False), (CLIENT_SERIAL - 1, True), (CLIENT_SERIAL + 1, False)]
)
def test_server_resets_the_streams_of_a_dead_worker(dead: int, survives: bool) -> None:
    side, _ = established()
    side.share.on_peer_gone(1, dead)
    assert side.told() == []
    side.share.on_peer_gone(0, dead)
    assert side.told() == ([] if survives else ["reset WORKER_GONE"])
    assert side.empty is not survives


def test_serials_are_compared_across_their_wrap() -> None:
    side, (before, after) = flows_to((0, 0xFFFFFFFF, BOOT), (0, 1, BOOT))
    side.share.on_peer_gone(0, 0xFFFFFFFF)
    assert before.state is State.CLOSED and after.state is State.ESTABLISHED


def test_roster_ends_the_streams_of_those_it_replaced() -> None:
    side, (replaced, alive, unmentioned) = flows_to((0, 4, BOOT), (1, 5, BOOT), (2, 6, BOOT))
    side.share.on_roster({0: 7, 1: 5}, BOOT)
    assert replaced.state is State.CLOSED
    assert list(side.share.streams.values()) == [alive, unmentioned]
    side.share.on_roster({0: 7, 1: 5}, BOOT + 1)
    assert side.empty
    assert side.told() == ["reset WORKER_GONE"] * 3


def test_roster_seen_by_a_server_names_the_clients_workers() -> None:
    side, _ = established()
    side.share.on_roster({0: CLIENT_SERIAL}, 99)
    assert side.told() == []
    side.share.on_roster({0: CLIENT_SERIAL + 3}, 99)
    assert side.told() == ["reset WORKER_GONE"] and side.empty


def test_stream_that_waited_for_its_reset_ends_quietly_with_its_worker() -> None:
    side, (stream,) = flows_to(OWNER)
    side.share.reset_stream(stream, Reason.APPLICATION)
    side.says(), side.told()
    side.share.on_peer_gone(0, SERVER_SERIAL)
    assert side.told() == [] and side.empty


def test_forgotten_session_ends_the_streams_that_were_answered_before_the_outage() -> None:
    side, (before,) = flows_to(OWNER)
    waiting = side.open()
    side.now_us = 5 * SECOND_US
    later = side.open()
    side.hears(ack(0, flow=later.flow))
    side.share.on_forgotten(OWNER, 5 * SECOND_US)
    assert before.state is State.CLOSED
    assert list(side.share.streams.values()) == [waiting, later]
    side.share.on_forgotten((1, 1, 1), 9 * SECOND_US)
    assert len(side.share.streams) == 2


def test_abandoned_session_leaves_nothing() -> None:
    side, (one, two) = flows_to(OWNER, OWNER)
    side.consumes = False
    side.write(one, bytes(30_000))
    side.says()
    side.hears(data(0, b"unread", flow=one.flow), data(9, b"ahead", flow=one.flow))
    side.share.reset_stream(two, Reason.APPLICATION)
    side.told()
    side.share.abandon(Reason.TIMEOUT)
    assert side.told() == ["discard", "reset TIMEOUT"]
    assert side.empty and side.share.next_due_us is None and not side.share.has_work


def test_said_keeps_the_bytes() -> None:
    packed = frame.pack(frame.FIN, frame.OPENING, 1, 2, 3)
    assert said(packed) == "FIN 3 opening" and said(packed).data == packed
