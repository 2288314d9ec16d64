"""The handshake against published vectors, an independent implementation, and an attacker."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.core import noise
from workers.core.errors import LocalProtocolError, RemoteProtocolError
from workers.core.noise import AEADS, NONCES, NoiseNNpsk0, Suite, rekeyed

PUBLISHED = Path(__file__).parents[3] / "shared" / "vectors" / "noise-NNpsk0.json"
"""Beside the checkout; the independent implementation below needs no such file."""
VECTORS = json.loads(PUBLISHED.read_text())["vectors"] if PUBLISHED.exists() else []
NAMES = {
    "Noise_NNpsk0_25519_AESGCM_SHA256": Suite.AES256GCM,
    "Noise_NNpsk0_25519_ChaChaPoly_SHA256": Suite.CHACHA20POLY1305,
}
PSK = bytes(range(32))
PROLOGUE = b"prologue"
CLIENT_EPHEMERAL = bytes([1]) * 32
SERVER_EPHEMERAL = bytes([2]) * 32

# https://cr.yp.to/ecdh.html#validate: every Montgomery u of small order, and those that reduce to them.
LOW_ORDER = [
    bytes(32),
    (1).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    (2**255 - 20).to_bytes(32, "little"),
    (2**255 - 19).to_bytes(32, "little"),
    (2**255 - 18).to_bytes(32, "little"),
]

suites = pytest.mark.parametrize("suite", Suite, ids=lambda suite: suite.name)


def pair(suite: Suite, psk: bytes = PSK, prologue: bytes = PROLOGUE) -> tuple[NoiseNNpsk0, NoiseNNpsk0]:
    return NoiseNNpsk0(True, PSK, PROLOGUE, suite), NoiseNNpsk0(False, psk, prologue, suite)


@pytest.mark.skipif(not VECTORS, reason=f"no published vectors at {PUBLISHED.name} in ../shared/vectors")
@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["protocol_name"])
def test_published_vector_is_reproduced(vector: dict[str, Any]) -> None:
    suite = NAMES[vector["protocol_name"]]
    unhex = bytes.fromhex
    initiator = NoiseNNpsk0(True, unhex(vector["init_psks"][0]), unhex(vector["init_prologue"]), suite)
    responder = NoiseNNpsk0(False, unhex(vector["resp_psks"][0]), unhex(vector["resp_prologue"]), suite)
    first, second, *transport = [(unhex(m["payload"]), unhex(m["ciphertext"])) for m in vector["messages"]]

    assert initiator.write_message(first[0], unhex(vector["init_ephemeral"])) == first[1]
    assert responder.read_message(first[1]) == first[0]
    assert responder.write_message(second[0], unhex(vector["resp_ephemeral"])) == second[1]
    assert initiator.read_message(second[1]) == second[0]
    assert initiator.handshake_hash == responder.handshake_hash == unhex(vector["handshake_hash"])

    to_responder, to_initiator = initiator.split()
    assert responder.split() == (to_initiator, to_responder)
    assert len(transport) == 4
    for number, (payload, ciphertext) in enumerate(transport):
        key = to_initiator if number % 2 else to_responder
        assert AEADS[suite](key).encrypt(NONCES[suite].pack(number // 2), payload, b"") == ciphertext


def other_end(name: str, initiator: bool) -> Any:
    """The same end of the same handshake, by somebody else."""
    connection = importlib.import_module("noise.connection").NoiseConnection.from_name(name.encode())
    connection.set_psks(PSK)
    connection.set_prologue(PROLOGUE)
    if initiator:
        connection.set_as_initiator()
    else:
        connection.set_as_responder()
    connection.start_handshake()
    return connection


def assert_transport_works(ours: NoiseNNpsk0, theirs: Any, suite: Suite) -> None:
    """Two messages each way, a rekey, and two more."""
    assert theirs.handshake_finished
    assert ours.handshake_hash == theirs.get_handshake_hash()
    send, receive = ours.split()
    for counter in range(4):
        if counter == 2:
            send, receive = rekeyed(send, suite), rekeyed(receive, suite)
            theirs.rekey_inbound_cipher()
            theirs.rekey_outbound_cipher()
        nonce = NONCES[suite].pack(counter)
        assert theirs.decrypt(AEADS[suite](send).encrypt(nonce, b"out", b"")) == b"out"
        assert AEADS[suite](receive).decrypt(nonce, bytes(theirs.encrypt(b"in")), b"") == b"in"


@pytest.mark.parametrize("name", NAMES)
def test_independent_responder_understands_our_initiator(name: str) -> None:
    ours, theirs = NoiseNNpsk0(True, PSK, PROLOGUE, NAMES[name]), other_end(name, initiator=False)
    assert theirs.read_message(ours.write_message(b"first", CLIENT_EPHEMERAL)) == b"first"
    assert ours.read_message(bytes(theirs.write_message(b"second"))) == b"second"
    assert_transport_works(ours, theirs, NAMES[name])


@pytest.mark.parametrize("name", NAMES)
def test_independent_initiator_understands_our_responder(name: str) -> None:
    ours, theirs = NoiseNNpsk0(False, PSK, PROLOGUE, NAMES[name]), other_end(name, initiator=True)
    assert ours.read_message(bytes(theirs.write_message(b"first"))) == b"first"
    assert theirs.read_message(ours.write_message(b"second", SERVER_EPHEMERAL)) == b"second"
    assert_transport_works(ours, theirs, NAMES[name])


@given(
    suite=st.sampled_from(Suite),
    psk=st.binary(min_size=32, max_size=32),
    prologue=st.binary(max_size=300),
    ephemerals=st.tuples(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32)),
    payloads=st.tuples(st.binary(max_size=2000), st.binary(max_size=2000)),
)
def test_any_payloads_arrive_and_both_ends_get_the_same_keys(
    suite: Suite, psk: bytes, prologue: bytes, ephemerals: tuple[bytes, bytes], payloads: tuple[bytes, bytes]
) -> None:
    initiator, responder = NoiseNNpsk0(True, psk, prologue, suite), NoiseNNpsk0(False, psk, prologue, suite)
    assert responder.read_message(initiator.write_message(payloads[0], ephemerals[0])) == payloads[0]
    assert initiator.read_message(responder.write_message(payloads[1], ephemerals[1])) == payloads[1]
    assert initiator.handshake_hash == responder.handshake_hash
    send, receive = initiator.split()
    assert responder.split() == (receive, send)
    assert send != receive


def test_largest_noise_message_passes_and_one_more_byte_does_not() -> None:
    initiator, responder = pair(Suite.AES256GCM)
    payload = bytes(65535 - 48)
    message = initiator.write_message(payload, CLIENT_EPHEMERAL)
    assert responder.read_message(message) == payload
    with pytest.raises(LocalProtocolError):
        pair(Suite.AES256GCM)[0].write_message(payload + b"x", CLIENT_EPHEMERAL)
    with pytest.raises(RemoteProtocolError, match="65536 bytes"):
        pair(Suite.AES256GCM)[1].read_message(message + b"x")


@suites
def test_wrong_psk_or_prologue_fails_message_1(suite: Suite) -> None:
    for psk, prologue in ((PSK[:-1] + b"x", PROLOGUE), (PSK, PROLOGUE + b"x"), (PSK, b"")):
        initiator, responder = pair(suite, psk, prologue)
        with pytest.raises(RemoteProtocolError):
            responder.read_message(initiator.write_message(b"hello", CLIENT_EPHEMERAL))


def test_other_suite_fails_message_1() -> None:
    initiator = NoiseNNpsk0(True, PSK, PROLOGUE, Suite.AES256GCM)
    with pytest.raises(RemoteProtocolError):
        NoiseNNpsk0(False, PSK, PROLOGUE, Suite.CHACHA20POLY1305).read_message(
            initiator.write_message(b"hello", CLIENT_EPHEMERAL)
        )


@suites
def test_every_flipped_bit_truncation_and_tail_fails_either_message(suite: Suite) -> None:
    initiator, responder = pair(suite)
    first = initiator.write_message(b"one", CLIENT_EPHEMERAL)
    responder.read_message(first)
    second = responder.write_message(b"two", SERVER_EPHEMERAL)
    for damaged in damages(first):
        with pytest.raises(RemoteProtocolError):
            pair(suite)[1].read_message(damaged)
    for damaged in damages(second):
        initiator = pair(suite)[0]
        initiator.write_message(b"one", CLIENT_EPHEMERAL)
        with pytest.raises(RemoteProtocolError):
            initiator.read_message(damaged)


def damages(message: bytes) -> list[bytes]:
    number = int.from_bytes(message)
    flipped = [(number ^ 1 << bit).to_bytes(len(message)) for bit in range(8 * len(message))]
    return [*flipped, *(message[:length] for length in range(len(message))), message + b"\0"]


def test_message_1_is_read_without_any_x25519(monkeypatch: pytest.MonkeyPatch) -> None:
    initiator, responder = pair(Suite.AES256GCM)
    message = initiator.write_message(b"hello", CLIENT_EPHEMERAL)
    monkeypatch.setattr(noise, "X25519PrivateKey", None)
    monkeypatch.setattr(noise, "X25519PublicKey", None)
    assert responder.read_message(message) == b"hello"
    with pytest.raises(RemoteProtocolError):
        pair(Suite.AES256GCM)[1].read_message(message[:-1] + bytes([message[-1] ^ 1]))


class LowOrderKey:
    """An ephemeral key of a cheat: its public half has low order, so the shared secret is known to be zero."""

    def __init__(self, public: bytes) -> None:
        self.public = public

    def from_private_bytes(self, _private: bytes) -> "LowOrderKey":
        return self

    def public_key(self) -> "LowOrderKey":
        return self

    def public_bytes_raw(self) -> bytes:
        return self.public

    def exchange(self, _public: Any) -> bytes:
        return bytes(32)


@pytest.mark.parametrize("public", LOW_ORDER, ids=bytes.hex)
def test_ephemeral_key_of_low_order_is_refused_by_either_end(public: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    initiator, responder = pair(Suite.AES256GCM)
    with monkeypatch.context() as cheat:
        cheat.setattr(noise, "X25519PrivateKey", LowOrderKey(public))
        message = initiator.write_message(b"hello", CLIENT_EPHEMERAL)
    assert responder.read_message(message) == b"hello"
    with pytest.raises(RemoteProtocolError, match="low order"):
        responder.write_message(b"", SERVER_EPHEMERAL)

    initiator, responder = pair(Suite.AES256GCM)
    responder.read_message(initiator.write_message(b"hello", CLIENT_EPHEMERAL))
    with monkeypatch.context() as cheat:
        cheat.setattr(noise, "X25519PrivateKey", LowOrderKey(public))
        message = responder.write_message(b"", SERVER_EPHEMERAL)
    with pytest.raises(RemoteProtocolError, match="low order"):
        initiator.read_message(message)


def test_calls_out_of_order_are_local_errors() -> None:
    initiator, responder = pair(Suite.AES256GCM)
    for call in (
        lambda: initiator.read_message(bytes(48)),
        initiator.split,
        lambda: responder.write_message(b"", SERVER_EPHEMERAL),
    ):
        with pytest.raises(LocalProtocolError, match="next is"):
            call()
    message = initiator.write_message(b"", CLIENT_EPHEMERAL)
    with pytest.raises(LocalProtocolError):
        initiator.write_message(b"", CLIENT_EPHEMERAL)
    responder.read_message(message)
    with pytest.raises(LocalProtocolError):
        responder.read_message(message)
    initiator.read_message(responder.write_message(b"", SERVER_EPHEMERAL))
    initiator.split()
    with pytest.raises(LocalProtocolError):
        initiator.split()


def test_failed_handshake_stays_failed() -> None:
    initiator, responder = pair(Suite.AES256GCM)
    message = initiator.write_message(b"", CLIENT_EPHEMERAL)
    with pytest.raises(RemoteProtocolError):
        responder.read_message(bytes(64))
    with pytest.raises(LocalProtocolError, match="failed"):
        responder.read_message(message)


def test_psk_of_another_length_is_refused() -> None:
    with pytest.raises(LocalProtocolError):
        NoiseNNpsk0(True, PSK[:-1], PROLOGUE, Suite.AES256GCM)
