"""Records: bytes on the wire, limits, order, rekeying, and an attacker."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.core.errors import RemoteProtocolError
from workers.core.noise import AEADS, Suite, rekeyed
from workers.core.record import (
    OVERHEAD,
    RECORD_HEADER,
    REKEY_BYTES,
    SEALED_MAX_UNPROVEN,
    SEALED_MIN,
    TAG,
    Opener,
    Sealer,
    whole_records,
)

KEY = bytes(range(32))
MAX = 4096

# The first two records of b"hello" and b"again" under KEY.
GOLDEN = {
    Suite.AES256GCM: [
        "0000001566d9d9b2dab2f5262d8e43e11bff6ae28d7da1687a",
        "0000001574b1de952ab36028f1cb6cbeb2d701baa757ab161b",
    ],
    Suite.CHACHA20POLY1305: [
        "0000001570dd2e5dc2aa4c089a7c71c03692c96cb904874a0e",
        "00000015fe309236db9bd721eb6323641fba1e822905589afa",
    ],
}

suites = pytest.mark.parametrize("suite", Suite, ids=lambda suite: suite.name)


def seal(sealer: Sealer, plaintext: bytes) -> bytes:
    out = bytearray(len(plaintext) + OVERHEAD + 9)
    length = sealer.seal_into(plaintext, memoryview(out))
    assert length == len(plaintext) + OVERHEAD
    assert not any(out[length:])
    return bytes(out[:length])


def nonce(suite: Suite, counter: int) -> bytes:
    return bytes(4) + (counter.to_bytes(8, "big") if suite is Suite.AES256GCM else counter.to_bytes(8, "little"))


def open_(opener: Opener, record: bytes) -> bytes:
    view = memoryview(record)
    sealed_length = int.from_bytes(view[:RECORD_HEADER])
    opener.check_length(sealed_length)
    out = bytearray(len(record))
    length = opener.open_into(view[RECORD_HEADER:], view[:RECORD_HEADER], memoryview(out))
    assert not any(out[length:])
    return bytes(out[:length])


@suites
def test_records_have_the_golden_bytes(suite: Suite) -> None:
    sealer = Sealer(KEY, suite)
    assert [seal(sealer, text).hex() for text in (b"hello", b"again")] == GOLDEN[suite]


@suites
def test_record_is_length_then_plain_aead_under_a_counted_nonce(suite: Suite) -> None:
    sealer = Sealer(KEY, suite)
    for counter in range(300):
        prefix = (3 + TAG).to_bytes(4, "big")
        assert seal(sealer, b"abc") == prefix + AEADS[suite](KEY).encrypt(nonce(suite, counter), b"abc", prefix)


@given(
    suite=st.sampled_from(Suite),
    plaintexts=st.lists(st.binary(min_size=1, max_size=MAX), min_size=1, max_size=20),
    rekey_bytes=st.integers(1, 3 * MAX),
)
def test_any_records_come_out_as_they_went_in_wherever_keys_change(
    suite: Suite, plaintexts: list[bytes], rekey_bytes: int
) -> None:
    sealer, opener = Sealer(KEY, suite, rekey_bytes), Opener(KEY, suite, MAX, rekey_bytes)
    assert open_(opener, seal(sealer, b"first")) == b"first"
    assert [open_(opener, seal(sealer, plaintext)) for plaintext in plaintexts] == plaintexts


def test_sealing_in_a_larger_buffer_touches_nothing_behind_the_record() -> None:
    out = bytearray(b"\xee" * 100)
    length = Sealer(KEY, Suite.AES256GCM).seal_into(memoryview(b"abc"), memoryview(out)[10:])
    assert length == 23
    assert out[:10] == b"\xee" * 10
    assert out[33:] == b"\xee" * 67


@suites
def test_every_flipped_bit_fails(suite: Suite) -> None:
    record = seal(Sealer(KEY, suite), b"payload")
    number = int.from_bytes(record)
    for bit in range(8 * len(record)):
        damaged = (number ^ 1 << bit).to_bytes(len(record))
        opener = Opener(KEY, suite, MAX)
        with pytest.raises(RemoteProtocolError):
            opener.open_into(damaged[RECORD_HEADER:], damaged[:RECORD_HEADER], memoryview(bytearray(64)))


@suites
def test_every_truncation_and_a_tail_fail_even_with_a_matching_length(suite: Suite) -> None:
    record = seal(Sealer(KEY, suite), b"payload")
    bodies = [record[RECORD_HEADER:end] for end in range(RECORD_HEADER, len(record))] + [record[RECORD_HEADER:] + b"\0"]
    for body in bodies:
        with pytest.raises(RemoteProtocolError):
            Opener(KEY, suite, MAX).open_into(body, len(body).to_bytes(4), memoryview(bytearray(64)))


@suites
def test_repeated_skipped_and_swapped_records_fail(suite: Suite) -> None:
    sealer = Sealer(KEY, suite)
    first, second, third = (seal(sealer, text) for text in (b"first", b"second", b"third"))
    for order in ([first, first], [second], [first, third], [first, second, first]):
        opener = Opener(KEY, suite, MAX)
        for record in order[:-1]:
            open_(opener, record)
        with pytest.raises(RemoteProtocolError, match="bad tag"):
            open_(opener, order[-1])


@suites
def test_record_under_another_key_or_of_another_suite_fails(suite: Suite) -> None:
    for other in (Sealer(bytes(32), suite), Sealer(KEY, Suite(3 - suite))):
        with pytest.raises(RemoteProtocolError):
            open_(Opener(KEY, suite, MAX), seal(other, b"payload"))


def refused(opener: Opener, sealed_length: int) -> bool:
    try:
        opener.check_length(sealed_length)
    except RemoteProtocolError:
        return True
    return False


def test_length_limit_is_1024_until_a_record_opened_then_that_of_the_largest_frame() -> None:
    sealer, opener = Sealer(KEY, Suite.AES256GCM), Opener(KEY, Suite.AES256GCM, MAX)
    never = (0, 1, TAG, 2**31, 2**32 - 1)
    assert all(refused(opener, length) for length in (*never, SEALED_MAX_UNPROVEN + 1, MAX + TAG))
    assert not any(refused(opener, length) for length in (TAG + 1, SEALED_MAX_UNPROVEN))

    assert open_(opener, seal(sealer, bytes(SEALED_MAX_UNPROVEN - TAG))) == bytes(SEALED_MAX_UNPROVEN - TAG)
    assert all(refused(opener, length) for length in (*never, MAX + TAG + 1))
    assert not any(refused(opener, length) for length in (TAG + 1, SEALED_MAX_UNPROVEN + 1, MAX + TAG))
    assert open_(opener, seal(sealer, bytes(MAX))) == bytes(MAX)


def test_bad_tag_does_not_lift_the_first_limit() -> None:
    opener = Opener(KEY, Suite.AES256GCM, MAX)
    with pytest.raises(RemoteProtocolError):
        open_(opener, (20).to_bytes(4) + bytes(20))
    assert refused(opener, SEALED_MAX_UNPROVEN + 1)


def test_largest_plaintext_below_the_first_limit_is_the_limit_from_the_start() -> None:
    opener = Opener(KEY, Suite.AES256GCM, 100)
    assert refused(opener, 117)
    assert not refused(opener, 116)


@suites
def test_key_changes_with_the_record_that_reaches_the_limit_and_the_counter_goes_on(suite: Suite) -> None:
    sealed = 10 + TAG
    sealer = Sealer(KEY, suite, rekey_bytes=2 * sealed)
    records = [seal(sealer, b"0123456789") for _ in range(5)]
    second = rekeyed(KEY, suite)
    prefix = sealed.to_bytes(4)
    for counter, key in enumerate((KEY, KEY, second, second, rekeyed(second, suite))):
        body = records[counter][RECORD_HEADER:]
        assert AEADS[suite](key).decrypt(nonce(suite, counter), body, prefix) == b"0123456789"


def test_ends_that_change_keys_at_different_bytes_part() -> None:
    sealer = Sealer(KEY, Suite.AES256GCM, rekey_bytes=50)
    opener = Opener(KEY, Suite.AES256GCM, MAX, rekey_bytes=51)
    records = [seal(sealer, bytes(34)) for _ in range(2)]
    open_(opener, records[0])
    with pytest.raises(RemoteProtocolError):
        open_(opener, records[1])


def test_rekey_limit_stays_below_what_aes_gcm_allows() -> None:
    assert REKEY_BYTES <= 2**24.5 * 2**14


def test_buffer_too_small_for_the_record_is_our_bug_and_uses_no_nonce_twice() -> None:
    sealer = Sealer(KEY, Suite.AES256GCM)
    with pytest.raises(ValueError, match="buffer"):
        sealer.seal_into(b"abc", memoryview(bytearray(22)))
    opener = Opener(KEY, Suite.AES256GCM, MAX)
    with pytest.raises(RemoteProtocolError):
        open_(opener, seal(sealer, b"abc"))


sealed_lengths = st.lists(st.integers(SEALED_MIN, 60), max_size=6)


@given(sealed_lengths, st.integers(0, 3), st.integers(0, 400))
def test_whole_records_are_found_wherever_the_data_is_cut(lengths: list[int], ahead: int, size: int) -> None:
    wire = b"".join(length.to_bytes(4, "big") + bytes(length) for length in lengths)
    ends = [sum(lengths[:count]) + RECORD_HEADER * count for count in range(len(lengths) + 1)]
    ahead = min(ahead, len(wire))
    head, data = wire[:ahead], wire[ahead : ahead + size]
    whole, needed = whole_records(head, data, 60)
    there = ahead + len(data)
    reached = max(end for end in ends if end <= there)
    assert whole == max(reached - ahead, 0)
    following = next((end for end in ends if end > there), 0)
    assert needed + ahead == (following if there >= reached + RECORD_HEADER else reached + RECORD_HEADER)


@pytest.mark.parametrize("length", [0, SEALED_MIN - 1, 61, 2**32 - 1])
def test_record_of_invalid_length_ends_the_whole_ones(length: int) -> None:
    good = (20).to_bytes(4, "big") + bytes(20)
    assert whole_records(b"", good + length.to_bytes(4, "big") + bytes(9), 60) == (24, 0)
    assert whole_records(b"", length.to_bytes(4, "big"), 60) == (0, 0)
