"""The Noise handshake NNpsk0 over X25519 and SHA-256 (Noise Protocol Framework, revision 34).

    -> psk, e
    <- e, ee

Both messages look alike:

    +---------------------------------+----------------------+--------------+
    | ephemeral public key (32 bytes) | payload, encrypted   | tag (16)     |
    +---------------------------------+----------------------+--------------+

With a psk in the pattern every `e` goes into the key too (section 9.2), so message 1 is sealed under the psk alone: the
responder checks its tag before any X25519, and who lacks the psk costs it a few hashes.
"""

import hashlib
import hmac
from enum import Enum, IntEnum
from functools import lru_cache
from struct import Struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from workers.core.errors import LocalProtocolError, RemoteProtocolError

KEY_SIZE = 32
TAG_SIZE = 16
MESSAGE_OVERHEAD = KEY_SIZE + TAG_SIZE
MESSAGE_MAX = 65535  # Section 3.


class Suite(IntEnum):
    """The cipher, as its byte on the wire."""

    AES256GCM = 1
    CHACHA20POLY1305 = 2


Aead = AESGCM | ChaCha20Poly1305

AEADS: dict[Suite, type[AESGCM] | type[ChaCha20Poly1305]] = {
    Suite.AES256GCM: AESGCM,
    Suite.CHACHA20POLY1305: ChaCha20Poly1305,
}

# Section 12: 32 zero bits, then the counter, big-endian for AES-GCM and little-endian for ChaCha20.
NONCES = {Suite.AES256GCM: Struct(">4xQ"), Suite.CHACHA20POLY1305: Struct("<4xQ")}

# Section 4.2: no message uses this counter, so the cipher stream it makes is free for rekeying.
REKEY_COUNTER = 2**64 - 1

_PROTOCOLS = {
    Suite.AES256GCM: b"Noise_NNpsk0_25519_AESGCM_SHA256",
    Suite.CHACHA20POLY1305: b"Noise_NNpsk0_25519_ChaChaPoly_SHA256",
}


def rekeyed(key: bytes, suite: Suite) -> bytes:
    """The key that follows `key`: REKEY of section 4.2."""
    return AEADS[suite](key).encrypt(NONCES[suite].pack(REKEY_COUNTER), bytes(KEY_SIZE), None)[:KEY_SIZE]


class _Turn(Enum):
    """What an end may do next."""

    WRITE_1 = "write message 1"
    READ_1 = "read message 1"
    WRITE_2 = "write message 2"
    READ_2 = "read message 2"
    SPLIT = "split"
    FAILED = "nothing: the handshake failed"


_NEXT = {
    _Turn.WRITE_1: _Turn.READ_2,
    _Turn.READ_1: _Turn.WRITE_2,
    _Turn.WRITE_2: _Turn.SPLIT,
    _Turn.READ_2: _Turn.SPLIT,
}


class NoiseNNpsk0:
    """One end of one handshake: an initiator writes, reads and splits; a responder reads, writes and splits.

    An error ends it: every later call raises LocalProtocolError.
    """

    __slots__ = ("_chaining_key", "_ephemeral", "_hash", "_initiator", "_key", "_remote_ephemeral", "_suite", "_turn")

    def __init__(self, initiator: bool, psk: bytes, prologue: bytes, suite: Suite) -> None:
        if len(psk) != KEY_SIZE:
            raise LocalProtocolError(f"a psk has {KEY_SIZE} bytes, not {len(psk)}")
        protocol = _PROTOCOLS[suite]
        self._hash = protocol if len(protocol) <= KEY_SIZE else hashlib.sha256(protocol).digest()
        self._chaining_key = self._hash
        self._key = b""
        self._suite = suite
        self._initiator = initiator
        self._ephemeral: X25519PrivateKey | None = None
        self._remote_ephemeral = b""
        self._turn = _Turn.WRITE_1 if initiator else _Turn.READ_1
        self._mix_hash(prologue)
        self._chaining_key, mixed, self._key = _mixed_psk(self._chaining_key, psk)
        self._mix_hash(mixed)

    @property
    def handshake_hash(self) -> bytes:
        """Equal at both ends after message 2, and of this handshake only: for channel binding (section 11.2)."""
        return self._hash

    def write_message(self, payload: bytes, ephemeral_private: bytes) -> bytes:
        """The message to send. `ephemeral_private`: 32 fresh random bytes, used for this handshake only.

        Raises RemoteProtocolError if the peer's ephemeral key has low order (message 2).
        """
        turn = self._begin(_Turn.WRITE_1, _Turn.WRITE_2)
        if len(payload) > MESSAGE_MAX - MESSAGE_OVERHEAD:
            raise LocalProtocolError(f"payload of {len(payload)} bytes in a Noise message")
        self._ephemeral = X25519PrivateKey.from_private_bytes(ephemeral_private)
        public = self._ephemeral.public_key().public_bytes_raw()
        self._mix_ephemeral(public)
        if turn is _Turn.WRITE_2:
            self._mix_shared_secret()
        sealed = self._aead().encrypt(self._nonce(), payload, self._hash)
        self._mix_hash(sealed)
        self._turn = _NEXT[turn]
        return public + sealed

    def read_message(self, message: bytes) -> bytes:
        """The payload of the message received. Raises RemoteProtocolError unless the holder of the psk wrote it."""
        turn = self._begin(_Turn.READ_1, _Turn.READ_2)
        if not MESSAGE_OVERHEAD <= len(message) <= MESSAGE_MAX:
            raise RemoteProtocolError(f"Noise message of {len(message)} bytes")
        self._remote_ephemeral = message[:KEY_SIZE]
        self._mix_ephemeral(self._remote_ephemeral)
        if turn is _Turn.READ_2:
            self._mix_shared_secret()
        sealed = message[KEY_SIZE:]
        try:
            payload = self._aead().decrypt(self._nonce(), sealed, self._hash)
        except InvalidTag:
            raise RemoteProtocolError("Noise message with a bad tag") from None
        self._mix_hash(sealed)
        self._turn = _NEXT[turn]
        return payload

    def split(self) -> tuple[bytes, bytes]:
        """(key to send with, key to receive with), 32 bytes each. Once, after message 2."""
        self._begin(_Turn.SPLIT)
        initiators, responders = _hkdf(self._chaining_key, b"", 2)
        self._chaining_key = self._key = b""
        self._ephemeral = None
        return (initiators, responders) if self._initiator else (responders, initiators)

    def _begin(self, *allowed: _Turn) -> _Turn:
        turn = self._turn
        if turn not in allowed:
            raise LocalProtocolError(f"Noise: next is {turn.value}, not {' or '.join(a.value for a in allowed)}")
        self._turn = _Turn.FAILED
        return turn

    def _mix_ephemeral(self, public: bytes) -> None:
        self._mix_hash(public)
        self._mix_key(public)

    def _mix_shared_secret(self) -> None:
        assert self._ephemeral is not None
        try:
            secret = self._ephemeral.exchange(X25519PublicKey.from_public_bytes(self._remote_ephemeral))
        except ValueError:  # The secret is all zero (RFC 7748, section 6.1).
            raise RemoteProtocolError("ephemeral key of low order") from None
        self._mix_key(secret)

    def _mix_key(self, material: bytes) -> None:
        self._chaining_key, self._key = _hkdf(self._chaining_key, material, 2)

    def _mix_hash(self, data: bytes) -> None:
        self._hash = hashlib.sha256(self._hash + data).digest()

    def _aead(self) -> Aead:
        return AEADS[self._suite](self._key)

    def _nonce(self) -> bytes:
        # A fresh key is mixed before each payload, so the counter never gets beyond 0.
        return NONCES[self._suite].pack(0)


@lru_cache(maxsize=256)
def _mixed_psk(chaining_key: bytes, psk: bytes) -> tuple[bytes, bytes, bytes]:
    """MixKeyAndHash of a psk, which comes first: (chaining key, what goes into the hash, key).

    The same in every handshake with that psk, and half of what refusing a wrong one costs: it is remembered.
    """
    chaining_key, mixed, key = _hkdf(chaining_key, psk, 3)
    return chaining_key, mixed, key


def _hkdf(chaining_key: bytes, material: bytes, outputs: int) -> list[bytes]:
    """HKDF of section 4.3: `outputs` keys of 32 bytes."""
    secret = hmac.digest(chaining_key, material, "sha256")
    keys: list[bytes] = []
    block = b""
    for number in range(1, outputs + 1):
        block = hmac.digest(secret, block + bytes((number,)), "sha256")
        keys.append(block)
    return keys
