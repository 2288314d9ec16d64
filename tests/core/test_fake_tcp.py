"""Fake TCP: sequence numbers, windows, acknowledgements and timestamps of one end."""

import pytest

from tests.core.segments import IPV6, NO_VNET, Frame, timestamps
from workers.core.fake_tcp import ACK_IDLE_US, ACK_MOST_US, INITIAL_PEER_WINDOW, WINDOW, FakeTcp
from workers.core.tcp_header import ACK, FIN, RST, SYN, Segment, Template, parse

MASK = 2**32 - 1
NOW = 5_000_000


def made(
    frame: Frame, own_scale: int = 7, peer_scale: int = 10, with_timestamps: bool = True, clock_ms: int = 1000
) -> FakeTcp:
    template = Template.learn(NO_VNET + frame.built(), 14)
    assert template is not None
    return FakeTcp(
        template,
        own_scale=own_scale,
        peer_scale=peer_scale,
        with_timestamps=with_timestamps,
        clock_ms=clock_ms,
        now_us=NOW,
    )


def client(sequence: int = 1001, acknowledged: int = 9001, **rest: int) -> FakeTcp:
    options = timestamps(990, 77)
    return made(Frame(sequence=sequence, acknowledged=acknowledged, options=options), **rest)


def from_peer(
    sequence: int, length: int, acknowledged: int, window: int = 100, flags: int = ACK, tsval: int | None = None
) -> Segment:
    return Segment(b"", sequence & MASK, acknowledged & MASK, window, flags, tsval, 0, length, 0)


def read(frame: bytes, payload: bytes = b"") -> Segment:
    segment = parse(frame + payload, 14)
    assert segment is not None
    return segment


def tsecr(frame: bytes) -> int:
    return int.from_bytes(frame[-4:])


def test_run_takes_the_next_numbers_and_they_count_once_it_is_sent() -> None:
    tcp = client()
    for _ in range(2):
        frame = tcp.run_to_send(3000, 1400, NOW + 2_999)
        segment = read(frame, bytes(3000))
        assert segment[1:] == (1001, 9001, WINDOW, ACK, 1002, len(frame), 3000, 1400)
        assert tsecr(frame) == 77
    tcp.on_sent(3000)
    assert read(tcp.run_to_send(10, 1400, NOW), bytes(10))[1:] == (4001, 9001, WINDOW, ACK, 1000, len(frame), 10, 0)


def test_numbers_wrap() -> None:
    tcp = client(sequence=MASK, acknowledged=MASK - 1, clock_ms=MASK)
    tcp.on_sent(10)
    tcp.on_run(from_peer(MASK - 1, 4, 9), NOW)
    segment = read(tcp.ack_to_send(NOW + 2_000))
    assert (segment.sequence, segment.acknowledged, segment.tsval) == (9, 2, 1)
    assert tcp.room_bytes == 100 << 10


def test_without_timestamps_none_are_sent() -> None:
    tcp = client(with_timestamps=False)
    assert read(tcp.ack_to_send(NOW)).tsval is None
    assert tcp.overhead_bytes == 40
    assert client().overhead_bytes == 52
    assert tcp.max_run_bytes == 65535 - 14 - 40


def test_client_goes_on_after_its_handshake_ack_and_server_after_its_syn_ack() -> None:
    assert read(client().ack_to_send(NOW)).sequence == 1001
    server = made(IPV6.but(flags=SYN | ACK, sequence=MASK, acknowledged=5), with_timestamps=False)
    segment = read(server.ack_to_send(NOW))
    assert (segment.sequence, segment.acknowledged, segment.flags) == (0, 5, ACK)


def test_room_is_what_the_peer_last_allowed_less_what_was_sent() -> None:
    tcp = client()
    assert tcp.room_bytes == INITIAL_PEER_WINDOW
    tcp.on_sent(600)
    assert tcp.may_send(14_000)
    assert not tcp.may_send(14_001)
    tcp.on_bare(from_peer(9001, 0, 1001 + 400))
    assert tcp.room_bytes == (100 << 10) - 200
    with pytest.raises(AssertionError):
        tcp.run_to_send(tcp.room_bytes + 1, 1400, NOW)


def test_window_of_a_syn_is_not_scaled() -> None:
    tcp = client()
    tcp.on_bare(from_peer(9000, 0, 1001, window=64_240, flags=SYN | ACK))
    assert tcp.room_bytes == 64_240


def test_what_was_allowed_is_never_taken_back() -> None:
    tcp = client()
    tcp.on_bare(from_peer(9001, 0, 1001))
    for window, acknowledged in ((0, 1001), (99, 1001), (100, 1000), (65535, 1001 - 2**30)):
        tcp.on_bare(from_peer(9001, 0, acknowledged, window))
    assert tcp.room_bytes == 100 << 10


def test_segment_that_acknowledges_what_was_never_sent_allows_nothing() -> None:
    tcp = client()
    tcp.on_sent(500)
    for acknowledged in (1502, 2**20, 2**30, 1001 + 2**31):
        tcp.on_bare(from_peer(9001, 0, acknowledged, 65535))
    for flags in (SYN, RST, RST | ACK):
        tcp.on_bare(from_peer(9001, 0, 1501, 65535, flags))
    assert tcp.room_bytes == INITIAL_PEER_WINDOW - 500


def test_highest_end_is_acknowledged_whatever_the_order() -> None:
    tcp = client()
    for sequence, length, expected in (
        (9001, 10, 9011),
        (9021, 10, 9031),
        (9011, 10, 9031),
        (9001, 31, 9032),
        (9032 - 2**31, 100, 9032),
    ):
        tcp.on_run(from_peer(sequence, length, 1001), NOW)
        assert read(tcp.ack_to_send(NOW)).acknowledged == expected


def test_forged_segment_without_an_authentic_record_moves_no_acknowledgement() -> None:
    tcp = client()
    tcp.on_bare(from_peer(9001 + 10_000, 1000, 1001, tsval=MASK // 2))
    frame = tcp.ack_to_send(NOW)
    assert (read(frame).acknowledged, tsecr(frame)) == (9001, 77)
    assert tcp.next_ack_us is None


def test_latest_timestamp_is_echoed() -> None:
    tcp = client()
    for tsval, expected in ((80, 80), (79, 80), (None, 80), (2**31 + 70, 2**31 + 70), (3, 3), (MASK, 3)):
        tcp.on_run(from_peer(9001, 1, 1001, tsval=tsval), NOW)
        assert tsecr(tcp.ack_to_send(NOW)) == expected


def test_acknowledgement_is_due_at_once_after_a_quarter_of_the_own_window() -> None:
    tcp = client()
    quarter = (WINDOW << 7) // 4
    assert not tcp.on_run(from_peer(9001, quarter - 1, 1001), NOW)
    assert tcp.on_run(from_peer(9001 + quarter - 1, 1, 1001), NOW + 1)
    assert tcp.next_ack_us == NOW + 1
    tcp.on_sent(0)
    assert tcp.next_ack_us is None
    assert not tcp.on_run(from_peer(9001 + quarter, quarter - 1, 1001), NOW + 2)


def test_acknowledgement_follows_silence_and_waits_no_longer_than_half_a_second() -> None:
    tcp = client()
    assert tcp.next_ack_us is None
    for now in range(NOW, NOW + 450_000, 30_000):
        tcp.on_run(from_peer(9001, 1, 1001), now)
        assert tcp.next_ack_us == now + ACK_IDLE_US
    for now in range(NOW + 480_000, NOW + 600_000, 30_000):
        tcp.on_run(from_peer(9001, 1, 1001), now)
        assert tcp.next_ack_us == NOW + ACK_MOST_US


def test_run_carries_the_acknowledgement() -> None:
    tcp = client()
    tcp.on_run(from_peer(9001, 10, 1001), NOW)
    assert read(tcp.run_to_send(5, 5, NOW), bytes(5)).acknowledged == 9011
    assert tcp.next_ack_us is not None
    tcp.on_sent(5)
    assert tcp.next_ack_us is None


def test_repeated_run_is_acknowledged_too() -> None:
    tcp = client()
    tcp.on_run(from_peer(9001, 10, 1001), NOW)
    tcp.on_sent(0)
    tcp.on_run(from_peer(9001, 10, 1001), NOW + 9)
    assert tcp.next_ack_us == NOW + 9 + ACK_IDLE_US


def test_probe_ends_where_the_last_run_ended_and_takes_no_numbers() -> None:
    tcp = client()
    tcp.on_sent(INITIAL_PEER_WINDOW)
    assert not tcp.may_send(1)
    segment = read(tcp.probe_to_send(90, NOW), bytes(90))
    assert (segment.sequence, segment.length, segment.gso_size) == (1001 + INITIAL_PEER_WINDOW - 90, 90, 0)
    tcp.on_sent(0)
    assert read(tcp.ack_to_send(NOW)).sequence == 1001 + INITIAL_PEER_WINDOW


def test_fin_has_the_right_numbers_each_time() -> None:
    tcp = client()
    tcp.on_sent(100)
    tcp.on_run(from_peer(9001, 10, 1001), NOW)
    for _ in range(2):
        segment = read(tcp.fin_to_send(NOW))
        assert segment[1:6] == (1101, 9011, WINDOW, ACK | FIN, 1000)
        assert segment.length == 0


def test_fin_or_rst_far_from_the_window_is_implausible() -> None:
    tcp = client()
    window = WINDOW << 7
    for ahead, expected in ((0, True), (-window + 9, True), (window - 9, True), (window + 1, False), (-(2**31), False)):
        assert tcp.is_plausible(from_peer(9001 + ahead, 0, 0, flags=RST)) == expected


def test_next_hop_changes_and_the_numbers_go_on() -> None:
    tcp = client()
    tcp.on_sent(100)
    tcp.use_link(bytes(range(14)))
    frame = tcp.ack_to_send(NOW)
    assert frame[10:24] == bytes(range(14))
    assert read(frame).sequence == 1101
