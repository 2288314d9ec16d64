"""Records of a stripe: how a frame travels over a TCP connection once the handshake is done.

     0                   1                   2                   3
     0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    +---------------------------------------------------------------+
    |             sealed length (big-endian, in clear)              |
    +---------------------------------------------------------------+
    |        frame header and payload, encrypted, 1.. bytes         |
    |                              ...                              |
    +---------------------------------------------------------------+
    |                                                               |
    |                       tag (16 bytes)                          |
    |                                                               |
    |                                                               |
    +---------------------------------------------------------------+

- Sealed length: bytes that follow it, tag included. Authenticated as associated data. Rejected below 17 and above the
  limit in force: 1024 until the first record opened, then what a frame of the largest size needs.
- Nonce: 32 zero bits, then the record's number on this carrier in this direction, from 0, as 64 bits: big-endian for
  AES-256-GCM, little-endian for ChaCha20-Poly1305. It is not sent, so a record that is missing, repeated or out of
  order fails its tag, and the carrier ends.
- Keys: one per direction, from the handshake. After the record with which the sealed bytes under a key reach
  `REKEY_BYTES`, both ends replace it by REKEY of Noise section 4.2. The record's number goes on.
"""

from struct import Struct

from cryptography.exceptions import InvalidTag

from workers.core.errors import RemoteProtocolError
from workers.core.noise import AEADS, NONCES, TAG_SIZE, Suite, rekeyed

Bytes = bytes | bytearray | memoryview

RECORD_HEADER = 4
TAG = TAG_SIZE
OVERHEAD = RECORD_HEADER + TAG
SEALED_MIN = TAG + 1
SEALED_MAX_UNPROVEN = 1024

# At most 2^33 blocks of AES, tag masks included, under one key: an advantage of 2^-63 by the birthday bound, and well
# below the 2^24.5 records of 16 KiB of RFC 8446, section 5.5. A key lasts a minute at 9 Gbit/s.
REKEY_BYTES = 2**36

LENGTH = Struct(">I")
_pack_length = LENGTH.pack


class _Direction:
    """The key and the record number of one direction of one carrier."""

    __slots__ = ("_aead", "_bytes_left", "_counter", "_key", "_pack_nonce", "_rekey_bytes", "_suite")

    def __init__(self, key: bytes, suite: Suite, rekey_bytes: int = REKEY_BYTES) -> None:
        self._suite = suite
        self._pack_nonce = NONCES[suite].pack
        self._rekey_bytes = rekey_bytes
        self._counter = 0
        self._use(key)

    def _use(self, key: bytes) -> None:
        self._key = key
        self._aead = AEADS[self._suite](key)
        self._bytes_left = self._rekey_bytes


class Sealer(_Direction):
    """Seals the records of one direction."""

    __slots__ = ()

    def seal_into(self, plaintext: Bytes, out: memoryview) -> int:
        """Write the record of `plaintext` (1 byte or more) to the start of `out`; return its length, OVERHEAD more.

        The two may not overlap. Neither is kept.
        """
        sealed_length = len(plaintext) + TAG
        assert sealed_length >= SEALED_MIN
        prefix = _pack_length(sealed_length)
        counter = self._counter
        self._counter = counter + 1
        record_length = sealed_length + RECORD_HEADER
        out[:RECORD_HEADER] = prefix
        # The cipher wants a buffer of the exact length.
        self._aead.encrypt_into(self._pack_nonce(counter), plaintext, prefix, out[RECORD_HEADER:record_length])
        self._bytes_left -= sealed_length
        if self._bytes_left <= 0:
            self._use(rekeyed(self._key, self._suite))
        return record_length


class Opener(_Direction):
    """Opens the records of one direction.

    max_sealed_bytes: the limit in force on a record's sealed length.
    """

    __slots__ = ("_max_sealed_bytes", "max_sealed_bytes")

    def __init__(self, key: bytes, suite: Suite, max_plaintext_bytes: int, rekey_bytes: int = REKEY_BYTES) -> None:
        super().__init__(key, suite, rekey_bytes)
        self._max_sealed_bytes = max_plaintext_bytes + TAG
        self.max_sealed_bytes = min(SEALED_MAX_UNPROVEN, self._max_sealed_bytes)

    def check_length(self, sealed_length: int) -> None:
        """Raise RemoteProtocolError for a length that no record may have: before any memory is set aside for it."""
        if not SEALED_MIN <= sealed_length <= self.max_sealed_bytes:
            raise RemoteProtocolError(f"record length {sealed_length} outside {SEALED_MIN}..{self.max_sealed_bytes}")

    def open_into(self, body: Bytes, prefix: Bytes, out: memoryview) -> int:
        """Write the plaintext of a record to the start of `out`; return its length, TAG less than that of `body`.

        body: ciphertext and tag, `check_length` passed. prefix: the record's first 4 bytes, as they came. Neither is
        kept. Raises RemoteProtocolError on a bad tag; then the carrier ends, and what stands in `out` is the forger's.
        """
        length = len(body) - TAG
        counter = self._counter
        try:
            self._aead.decrypt_into(self._pack_nonce(counter), body, prefix, out[:length])
        except InvalidTag:
            raise RemoteProtocolError(f"record {counter} with a bad tag") from None
        self._counter = counter + 1
        self.max_sealed_bytes = self._max_sealed_bytes
        self._bytes_left -= length + TAG
        if self._bytes_left <= 0:
            self._use(rekeyed(self._key, self._suite))
        return length


def whole_records(head: bytes, data: Bytes, max_sealed_bytes: int) -> tuple[int, int]:
    """(where the last whole record of `data` ends, where the one behind it will; 0 where it has an invalid length).

    head: what came of the first record's length before `data`, less than all of it.
    """
    start = -len(head)
    while start + RECORD_HEADER <= len(data):
        prefix = head + bytes(data[: start + RECORD_HEADER]) if start < 0 else data[start : start + RECORD_HEADER]
        (length,) = LENGTH.unpack(prefix)
        if not SEALED_MIN <= length <= max_sealed_bytes:
            return max(start, 0), 0
        end = start + RECORD_HEADER + length
        if end > len(data):
            return max(start, 0), end
        start = end
    return max(start, 0), start + RECORD_HEADER
