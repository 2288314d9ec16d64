"""The record layer under a known key: records of any plaintext, changed, repeated, left out; and lengths in clear."""

from tests.fuzz.source import Source
from workers.core.errors import RemoteProtocolError
from workers.core.noise import Suite
from workers.core.record import OVERHEAD, RECORD_HEADER, SEALED_MAX_UNPROVEN, SEALED_MIN, TAG, Opener, Sealer

KEY = bytes(range(32))
PLAINTEXT_MAX = 4096
GENUINE, CHANGED, SKIPPED, REPEATED, LENGTH_ONLY, GARBAGE = range(6)


def run(data: bytes) -> None:
    """A carrier's life: it ends with the first record that does not open, and only such a one ends it."""
    source = Source(data)
    suite = source.choose((Suite.AES256GCM, Suite.CHACHA20POLY1305))
    rekey_bytes = source.choose((1 << 36, 1, 64, 300))
    sealer, opener = Sealer(KEY, suite, rekey_bytes), Opener(KEY, suite, PLAINTEXT_MAX, rekey_bytes)
    buffer, out = bytearray(PLAINTEXT_MAX + OVERHEAD), bytearray(PLAINTEXT_MAX)
    former = b""
    while len(source):
        does = source.choose((GENUINE, CHANGED, SKIPPED, REPEATED, LENGTH_ONLY, GARBAGE))
        if does == LENGTH_ONLY:
            _check_length(opener, source.number(4))
            continue
        limit = opener.max_sealed_bytes - TAG
        plaintext = source.block() * (source.number() + 1)
        plaintext = plaintext[:limit] or b"\0"
        record = bytes(buffer[: sealer.seal_into(plaintext, memoryview(buffer))])
        genuine = True
        if does == CHANGED:
            record, genuine = _changed(source, record)
        elif does == SKIPPED:
            record, genuine = bytes(buffer[: sealer.seal_into(plaintext, memoryview(buffer))]), False
        elif does == REPEATED and former:
            record, genuine = former, False
        elif does == GARBAGE:
            record, genuine = source.take(SEALED_MIN + RECORD_HEADER).ljust(SEALED_MIN + RECORD_HEADER, b"\0"), False
        try:
            opened = opener.open_into(record[RECORD_HEADER:], record[:RECORD_HEADER], memoryview(out))
        except RemoteProtocolError:
            assert not genuine, "a genuine record did not open"
            return
        assert genuine, "a forged record opened"
        assert out[:opened] == plaintext, "other bytes than were sealed"
        assert opener.max_sealed_bytes == PLAINTEXT_MAX + TAG
        former = record


def _changed(source: Source, record: bytes) -> tuple[bytes, bool]:
    at, change = source.number(2) % len(record), source.number()
    return record[:at] + bytes((record[at] ^ change,)) + record[at + 1 :], not change


def _check_length(opener: Opener, length: int) -> None:
    allowed = SEALED_MIN <= length <= opener.max_sealed_bytes
    assert opener.max_sealed_bytes in (SEALED_MAX_UNPROVEN, PLAINTEXT_MAX + TAG)
    try:
        opener.check_length(length)
    except RemoteProtocolError:
        assert not allowed
    else:
        assert allowed


SEEDS = {
    "genuine": b"\0\0" + b"\0\5hello\0" * 3,
    "genuine-chacha-rekeyed": b"\1\1" + b"\0\5hello\x10" * 4,
    "large-once-proven": b"\0\2" + b"\0\x10" + bytes(16) + b"\xff" + b"\0\x10" + bytes(16) + b"\xff",
    "changed": b"\0\0\0\1a\0\1\3abc\0\0\6\1",
    "changed-length": b"\0\0\0\1a\0\1\3abc\0\0\3\4",
    "skipped": b"\0\0\0\1a\0\2\3abc\0",
    "repeated": b"\0\0\0\1a\0\3\3abc\0",
    "lengths": b"\0\0" + b"".join(b"\4" + n.to_bytes(4, "big") for n in (0, 16, 17, 1024, 1025, 2**32 - 1)),
    "garbage": b"\0\3\5\1x\0" + bytes(21),
}
