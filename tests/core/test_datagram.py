"""Records of a port: bytes on the wire, runs and slots, losses, replays, keys over time, and a forger."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.core.cuts import CACHED, ROOM, Datagrams, Inners, Records
from workers.core.datagram import (
    DATA_OVERHEAD,
    RECORD_MAX,
    RECORD_MIN,
    DatagramOpener,
    DatagramSealer,
    record_bytes,
)
from workers.core.heads import HEAD_BYTES, RECORD_OVERHEAD, RUN_MAX
from workers.core.inner import CLOSE, CLOSE_INNER, COPY, DATA, PING, Opened, data_prefix, pack_copy, pack_ping
from workers.core.noise import AEADS, Suite, rekeyed
from workers.core.replay import WINDOW

KEY = bytes(range(32))
SHIFT = 22
CONVERSATION = 0x01020304
PREFIX = data_prefix(CONVERSATION)
STRIDE = 2048

# The first two DATA records of b"hello" and b"again" of CONVERSATION under KEY.
GOLDEN = {
    Suite.AES256GCM: [
        "002200000000000000000fbdb7ddb144e6d164c771fe78ec43e7c86133c5faf972b86d45",
        "0022000000000000000114d7bdff4095577f674082b93a2c5f3cf11a267070557147f4fd",
    ],
    Suite.CHACHA20POLY1305: [
        "0022000000000000000019b94032a98ec3bd7f0e6883e64dbe294934f289dea99c833c22",
        "002200000000000000019e56f15cb14bc87940d89226c13ee1f3aedb44da911fadb2f52b",
    ],
}

suites = pytest.mark.parametrize("suite", Suite, ids=lambda suite: suite.name)
INNERS = Inners()


def sealer_of(suite: Suite = Suite.AES256GCM, shift: int = SHIFT) -> DatagramSealer:
    return DatagramSealer(KEY, suite, shift)


def opener_of(suite: Suite = Suite.AES256GCM, shift: int = SHIFT) -> DatagramOpener:
    return DatagramOpener(KEY, suite, INNERS, shift)


def seal(sealer: DatagramSealer, inner: bytes) -> bytes:
    out = bytearray(b"\xee" * (len(inner) + RECORD_OVERHEAD + 9))
    length = sealer.seal_into(inner, memoryview(out))
    assert length == len(inner) + RECORD_OVERHEAD
    assert out[length:] == b"\xee" * 9
    return bytes(out[:length])


def seal_run(sealer: DatagramSealer, data: bytes, size: int, start: int = 0) -> bytes:
    out = Records(bytearray(b"\xee" * (1 << 17)))
    length = sealer.seal_run(PREFIX, Datagrams(bytearray(ROOM) + data), len(data), size, out, start)
    assert out.view[:start].tobytes() == b"\xee" * start
    assert not out.view[start + length :].tobytes().strip(b"\xee")
    return out.view[start : start + length].tobytes()


def open_(opener: DatagramOpener, wire: bytes, hint: int = 0, start: int = 0) -> list[Opened]:
    records = Records(bytearray(b"\xdd" * start + wire + b"\xdd" * 40))
    return opener.open_run(records, start, start + len(wire), hint)


def payloads(opened: list[Opened]) -> list[bytes]:
    """The datagrams of the DATA runs, one by one."""
    datagrams = []
    for kind, _, size, payload in opened:
        assert kind == DATA
        datagrams += [payload[at : at + size] for at in range(0, len(payload), size)] if size else [payload]
    return datagrams


def numbered(count: int, size: int = 40) -> list[bytes]:
    return [number.to_bytes(4) + bytes(number & 0xFF for _ in range(size - 4)) for number in range(count)]


def counts(opener: DatagramOpener) -> tuple[int, int, int]:
    return opener.opened, opener.rejected, opener.replayed


def nonce(suite: Suite, counter: int) -> bytes:
    return bytes(4) + counter.to_bytes(8, "big" if suite is Suite.AES256GCM else "little")


@suites
def test_records_have_the_golden_bytes(suite: Suite) -> None:
    sealer = sealer_of(suite)
    assert [seal_run(sealer, text, 5).hex() for text in (b"hello", b"again")] == GOLDEN[suite]


@suites
@pytest.mark.parametrize("count", [1, 2, 3, 5, 44, 64, 65, 129])
def test_run_is_a_record_of_plain_aead_for_each_datagram(suite: Suite, count: int) -> None:
    sealer, datagrams = sealer_of(suite), numbered(count)
    wire = b""
    for counter, datagram in enumerate(datagrams):
        head = (8 + 5 + 40 + 16).to_bytes(2) + counter.to_bytes(8)
        wire += head + AEADS[suite](KEY).encrypt(nonce(suite, counter), PREFIX + datagram, head)
    assert seal_run(sealer, b"".join(datagrams), 40, start=3) == wire
    assert sealer.next_counter == count
    assert len(wire) == count * record_bytes(40)


@suites
@settings(max_examples=40)  # thousands of records each
@given(
    runs=st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 300)), min_size=1, max_size=8),
    shift=st.integers(1, 8),
    with_hint=st.booleans(),
    start=st.integers(0, 70),
)
def test_any_runs_come_out_as_they_went_in_wherever_keys_change(
    suite: Suite, runs: list[tuple[int, int]], shift: int, with_hint: bool, start: int
) -> None:
    sealer, opener = sealer_of(suite, shift), opener_of(suite, shift)
    for length, size in runs:
        data = random.Random(length).randbytes(length)
        wire = seal_run(sealer, data, size)
        opened = open_(opener, wire, record_bytes(size) if with_hint else 0, start)
        assert payloads(opened) == ([data[at : at + size] for at in range(0, length, size)] or [b""])
        assert all(item[:2] == (DATA, CONVERSATION) for item in opened)
    assert counts(opener) == (sealer.next_counter, 0, 0)
    assert opener.highest == sealer.next_counter - 1


def test_run_with_a_shorter_last_datagram_comes_out_as_one_run() -> None:
    data = bytes(range(256)) * 20
    opened = open_(opener_of(), seal_run(sealer_of(), data, 500))
    assert opened == [Opened(DATA, CONVERSATION, 500, data)]


@pytest.mark.parametrize("cuts", [(0, 44), (0, 1, 44), (0, 20, 21, 43, 44)])
def test_run_sealed_in_parts_has_the_same_records(cuts: tuple[int, ...]) -> None:
    data = random.Random(2).randbytes(43 * 100 + 30)
    source, out, sealer, end = Datagrams(bytearray(ROOM) + data), Records(bytearray(1 << 13)), sealer_of(), 0
    for first, stop in pairwise(cuts):
        length = len(data[100 * first : 100 * stop])
        end += sealer.seal_run(PREFIX, source, length, 100, out, end, first)
    assert out.view[:end].tobytes() == seal_run(sealer_of(), data, 100)


def test_run_longer_than_a_batch_comes_out_in_runs_of_64() -> None:
    datagrams = numbered(2 * RUN_MAX + 1)
    opened = open_(opener_of(), seal_run(sealer_of(), b"".join(datagrams), 40))
    assert [len(item.payload) // 40 for item in opened] == [RUN_MAX, RUN_MAX, 1]
    assert payloads(opened) == datagrams


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize(("count", "last"), [(1, 700), (1, 1), (2, 700), (40, 700), (40, 0), (70, 123)])
def test_slots_are_sealed_as_the_same_datagrams_back_to_back(first: int, count: int, last: int) -> None:
    slots = Datagrams(bytearray(STRIDE * (first + count)), ROOM, STRIDE)
    data = random.Random(count).randbytes(700 * (count - 1) + last)
    for index in range(count):
        piece = data[700 * index : 700 * (index + 1)]
        position = slots.position(700, first + index)
        assert position == ROOM + STRIDE * (first + index)
        slots.view[position : position + len(piece)] = piece
    out = Records(bytearray(1 << 17))
    length = sealer_of().seal_slots(PREFIX, slots, first, count, 700, last, out)
    assert payloads(open_(opener_of(), out.view[:length].tobytes())) == [
        data[700 * index : 700 * (index + 1)] for index in range(count)
    ]
    if last:
        assert out.view[:length].tobytes() == seal_run(sealer_of(), data, 700)


def test_buffers_that_are_used_again_with_other_sizes_and_starts_give_the_right_bytes() -> None:
    source, out, sealer, opener = Datagrams(bytearray(1 << 16)), Records(bytearray(1 << 17)), sealer_of(), opener_of()
    dice = random.Random(1)
    for _ in range(300):
        size, count, start = dice.randrange(1, 400), dice.randrange(1, 70), dice.choice((0, 66, 86))
        data = dice.randbytes(size * count)
        source.view[ROOM : ROOM + len(data)] = data
        length = sealer.seal_run(PREFIX, source, len(data), size, out, start)
        assert b"".join(item.payload for item in opener.open_run(out, start, start + length)) == data
    assert sum(len(columns[0]) for columns in out._columns.values()) <= CACHED


def test_empty_datagrams_stay_apart() -> None:
    sealer = sealer_of()
    wire = b"".join(seal_run(sealer, data, 40) for data in (b"", b"", b"x" * 40, b"", b"", b"", b"", b"", b"y"))
    assert payloads(open_(opener_of(), wire)) == [b"", b"", b"x" * 40, b"", b"", b"", b"", b"", b"y"]


def test_kinds_and_conversations_that_share_a_segment_are_told_apart() -> None:
    sealer, other = sealer_of(), data_prefix(9)
    inners = [PREFIX + b"one!", PREFIX + b"two!", other + b"thr!", pack_ping(7), pack_copy(5, 6, b""), CLOSE_INNER]
    inners += [other + b"four"] * 5
    wire = b"".join(seal(sealer, inner) for inner in inners)
    opened = open_(opener_of(), wire)
    assert sorted(opened) == sorted(
        [
            Opened(DATA, CONVERSATION, 4, b"one!two!"),
            Opened(DATA, 9, 4, b"thr!"),
            Opened(PING, 0, 9 + RECORD_OVERHEAD, (7).to_bytes(8)),
            Opened(COPY, 5, 9 + RECORD_OVERHEAD, (6).to_bytes(4)),
            Opened(CLOSE, 0, 1 + RECORD_OVERHEAD, b""),
            Opened(DATA, 9, 4, b"four" * 5),
        ]
    )


@suites
def test_every_flipped_bit_of_a_lone_record_is_rejected(suite: Suite) -> None:
    record = seal(sealer_of(suite), PREFIX + b"payload")
    number = int.from_bytes(record)
    opener = opener_of(suite)
    for bit in range(8 * len(record)):
        assert open_(opener, (number ^ 1 << bit).to_bytes(len(record))) == []
    assert opener.opened == 0
    assert opener.rejected >= 8 * len(record)
    assert payloads(open_(opener, record)) == [b"payload"]


@pytest.mark.parametrize("with_hint", [True, False])
def test_flipped_bit_in_a_run_costs_that_record_and_with_a_hint_no_other(with_hint: bool) -> None:
    datagrams, size = numbered(10), record_bytes(40)
    wire = seal_run(sealer_of(), b"".join(datagrams), 40)
    for bit in range(8 * 3 * size, 8 * 4 * size):
        damaged = bytearray(wire)
        damaged[bit >> 3] ^= 1 << (bit & 7)
        opener = opener_of()
        got = payloads(open_(opener, bytes(damaged), size if with_hint else 0))
        assert set(got) <= set(datagrams) - {datagrams[3]}
        if with_hint or (bit >> 3) % size >= 2:
            assert got == datagrams[:3] + datagrams[4:]
            assert opener.opened == 9
            # A length that falls short leaves a rest, which is no record either.
            assert 1 <= opener.rejected + opener.replayed <= 3


@suites
def test_every_truncation_is_rejected_and_what_stands_before_it_opens(suite: Suite) -> None:
    datagrams, size = numbered(6), record_bytes(40)
    wire = seal_run(sealer_of(suite), b"".join(datagrams), 40)
    for end in range(len(wire)):
        opener = opener_of(suite)
        whole, rest = divmod(end, size)
        assert payloads(open_(opener, wire[:end])) == datagrams[:whole]
        assert counts(opener) == (whole, int(rest > 0), 0)


def test_truncated_record_with_a_matching_length_is_rejected() -> None:
    record = seal(sealer_of(), PREFIX + b"payload")
    for end in range(HEAD_BYTES, len(record)):
        opener = opener_of()
        assert open_(opener, (end - 2).to_bytes(2) + record[2:end]) == []
        assert opener.opened == 0


@given(st.binary(min_size=1, max_size=300))
def test_tail_of_anything_is_rejected_and_takes_nothing_with_it(tail: bytes) -> None:
    datagrams = numbered(5)
    opener = opener_of()
    got = payloads(open_(opener, seal_run(sealer_of(), b"".join(datagrams), 40) + tail))
    assert got == datagrams
    assert opener.opened == 5
    assert opener.rejected + opener.replayed >= 1


@given(st.binary(max_size=600), st.integers(0, 200))
def test_garbage_is_never_opened_and_never_raises(garbage: bytes, hint: int) -> None:
    opener = opener_of()
    assert open_(opener, garbage, hint) == []
    assert opener.opened == 0


@pytest.mark.parametrize("length", [0, 1, RECORD_MIN - 3, RECORD_MAX - 1, 0xF746, 0xFFFF])
def test_invalid_length_is_rejected_and_the_next_segment_goes_on(length: int) -> None:
    datagrams, size = numbered(4), record_bytes(40)
    wire = seal_run(sealer_of(), b"".join(datagrams), 40)
    forged = length.to_bytes(2) + bytes(size - 2)
    opener = opener_of()
    assert payloads(open_(opener, wire[:size] + forged + wire[size:], size)) == datagrams
    assert counts(opener) == (4, 1, 0)


def test_forged_length_over_all_segments_costs_none_of_them() -> None:
    datagrams, size = numbered(8), record_bytes(40)
    wire = seal_run(sealer_of(), b"".join(datagrams), 40)
    forged = (len(wire) + size - 2).to_bytes(2) + (99).to_bytes(8) + bytes(size - 10)
    opener = opener_of()
    assert payloads(open_(opener, forged + wire, size)) == datagrams
    assert counts(opener) == (8, 1, 0)


@pytest.mark.parametrize("count", [1, 3, 20])
def test_replayed_records_are_dropped_alone_and_within_a_run(count: int) -> None:
    sealer, opener = sealer_of(), opener_of()
    first, second = numbered(count), numbered(2 * count)[count:]
    wire = seal_run(sealer, b"".join(first), 40)
    assert payloads(open_(opener, wire)) == first
    assert open_(opener, wire) == []
    assert counts(opener) == (count, 0, count)
    assert payloads(open_(opener, wire + seal_run(sealer, b"".join(second), 40))) == second
    assert counts(opener) == (2 * count, 0, 2 * count)


def test_record_twice_in_one_run_is_opened_once() -> None:
    datagrams, size = numbered(8), record_bytes(40)
    wire = seal_run(sealer_of(), b"".join(datagrams), 40)
    opener = opener_of()
    assert payloads(open_(opener, wire[: 5 * size] + wire[4 * size :])) == datagrams
    assert counts(opener) == (8, 0, 1)


@pytest.mark.parametrize("shift", [SHIFT, 3])
@given(order=st.permutations(range(16)), lost=st.sets(st.integers(0, 15)), cut=st.integers(0, 16))
def test_records_lost_and_reordered_are_opened_once_each_also_about_a_change_of_keys(
    shift: int, order: list[int], lost: set[int], cut: int
) -> None:
    datagrams, size = numbered(16), record_bytes(40)
    wire = seal_run(sealer_of(shift=shift), b"".join(datagrams), 40)
    kept = [index for index in order if index not in lost]
    opener = opener_of(shift=shift)
    for expected in (kept[:cut], kept[cut:]):
        run = b"".join(wire[index * size : (index + 1) * size] for index in expected)
        assert payloads(open_(opener, run)) == [datagrams[index] for index in expected]
        assert open_(opener, run) == []
    assert counts(opener) == (len(kept), 0, len(kept))


def test_record_too_far_behind_is_dropped() -> None:
    sealer = sealer_of()
    early = [seal(sealer, PREFIX + bytes([number])) for number in range(6)]
    sealer.next_counter = WINDOW + 2
    late = seal(sealer, PREFIX + b"late")
    opener = opener_of()
    assert payloads(open_(opener, late)) == [b"late"]
    assert payloads(open_(opener, b"".join(early))) == [b"\x03\x04\x05"[i : i + 1] for i in range(3)]
    assert counts(opener) == (4, 0, 3)


@suites
def test_key_changes_with_the_generation_and_the_counter_goes_on(suite: Suite) -> None:
    wire = seal_run(sealer_of(suite, shift=2), b"".join(numbered(11)), 40)
    size = record_bytes(40)
    key = KEY
    for counter, datagram in enumerate(numbered(11)):
        if counter and not counter & 3:
            key = rekeyed(key, suite)
        record = wire[counter * size : (counter + 1) * size]
        head, body = record[:HEAD_BYTES], record[HEAD_BYTES:]
        assert AEADS[suite](key).decrypt(nonce(suite, counter), body, head) == PREFIX + datagram


def test_generation_before_the_highest_opens_and_the_one_before_that_does_not() -> None:
    sealer = sealer_of(shift=2)
    records = [seal(sealer, PREFIX + bytes([number])) for number in range(16)]
    opener = opener_of(shift=2)
    assert open_(opener, records[0])
    assert open_(opener, records[4])
    assert open_(opener, records[9])
    assert open_(opener, records[7])
    assert not open_(opener, records[3])
    assert counts(opener) == (4, 1, 0)


def test_generation_after_the_next_does_not_open() -> None:
    sealer = sealer_of(shift=2)
    records = [seal(sealer, PREFIX + bytes([number])) for number in range(12)]
    opener = opener_of(shift=2)
    assert not open_(opener, records[8])
    assert open_(opener, records[4])
    assert open_(opener, records[8])


def test_forged_record_of_the_next_generation_changes_nothing() -> None:
    sealer = sealer_of(shift=3)
    opener = opener_of(shift=3)
    for number in range(20):
        forged = (40).to_bytes(2) + (sealer.next_counter + 8).to_bytes(8) + bytes(32)
        assert open_(opener, forged * 5) == []
        assert open_(opener, seal(sealer, PREFIX + bytes([number])))
    assert opener.opened == 20
    assert opener.highest == 19


@given(st.integers(1, 40), st.integers(0, 9))
def test_run_of_the_next_generation_with_forgeries_in_it_opens(forged_at: int, start: int) -> None:
    size = record_bytes(40)
    sealer, opener = sealer_of(shift=6), opener_of(shift=6)
    assert len(payloads(open_(opener, seal_run(sealer, b"".join(numbered(64)), 40)))) == 64
    wire = bytearray(seal_run(sealer, b"".join(numbered(50)), 40))
    wire[forged_at * size + size - 1] ^= 1
    expected = numbered(50)[:forged_at] + numbered(50)[forged_at + 1 :]
    assert payloads(open_(opener, bytes(wire), size, start)) == expected
    assert counts(opener) == (113, 1, 0)


@suites
def test_record_under_another_key_or_of_another_suite_is_rejected(suite: Suite) -> None:
    for other in (DatagramSealer(bytes(32), suite), sealer_of(Suite(3 - suite))):
        opener = opener_of(suite)
        assert open_(opener, seal_run(other, bytes(400), 40)) == []
        assert counts(opener) == (0, 10, 0)


def test_malformed_inners_are_opened_rejected_and_not_handed_on() -> None:
    sealer, opener = sealer_of(), opener_of()
    wire = b"".join(seal(sealer, inner) for inner in [bytes([0]) * 20] * 5 + [b"\x01\x02"] * 5 + [PREFIX + b"x"])
    assert payloads(open_(opener, wire)) == [b"x"]
    assert counts(opener) == (11, 10, 0)


def test_several_records_in_each_segment_are_found_with_and_without_a_hint() -> None:
    datagrams, size = numbered(24), record_bytes(40)
    wire = seal_run(sealer_of(), b"".join(datagrams), 40)
    for hint in (0, size, 6 * size, 4 * size + 7, 1):
        assert payloads(open_(opener_of(), wire, hint)) == datagrams


def test_largest_record_comes_through_and_a_larger_one_is_our_bug() -> None:
    data = bytes(RECORD_MAX - DATA_OVERHEAD)
    sealer, opener = sealer_of(), opener_of()
    wire = seal_run(sealer, data, len(data)) + seal_run(sealer, data * 5, len(data))
    assert payloads(open_(opener, wire)) == [data] * 6
    with pytest.raises(AssertionError):
        seal(sealer, bytes(RECORD_MAX - RECORD_OVERHEAD + 1))
    with pytest.raises(AssertionError):
        seal_run(sealer, data * 2 + b"ab", len(data) + 1)


def test_out_too_small_is_our_bug_and_uses_no_nonce_twice() -> None:
    sealer = sealer_of()
    with pytest.raises(ValueError, match="buffer"):
        sealer.seal_into(b"abc", memoryview(bytearray(28)))
    assert sealer.next_counter == 1
    with pytest.raises(AssertionError):
        sealer.seal_run(PREFIX, Datagrams(bytearray(1000)), 400, 40, Records(bytearray(700)))
    assert sealer.next_counter == 1
