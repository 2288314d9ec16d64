"""The first bytes on a carrier: golden bytes, every damage, pieces of any size, and hand-over to another worker."""

import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.core import handshake
from workers.core.errors import LocalProtocolError, RemoteProtocolError
from workers.core.handshake import ClientHandshake, Hello, Mode, ServerHandshake, Welcome, WorkerId
from workers.core.noise import NoiseNNpsk0, Suite

PSK = bytes(range(32))
KEYS = {"laptop": (0, bytes(32)), "büro": (1, PSK)}
CLIENT_EPHEMERAL = bytes([1]) * 32
SERVER_EPHEMERAL = bytes([2]) * 32

HELLO = Hello(
    session_id=0x0102030405060708,
    boot_id=0x1112131415161718,
    carrier_index=0x2122,
    worker_slot=3,
    tunnel="wéb",
    roster=(WorkerId(0, 0x31323334), WorkerId(3, 0x41424344)),
)
HELLO_BYTES = bytes.fromhex("0102030405060708 1112131415161718 2122 03 04 77c3a962 02 00 31323334 03 41424344")
WELCOME = Welcome(boot_id=0x5152535455565758, session_known=True, worker_slot=1, roster=(WorkerId(1, 0x61626364),))
WELCOME_BYTES = bytes.fromhex("5152535455565758 01 01 01 01 61626364")

# Messages 1 and 2 with HELLO and WELCOME, PSK and the ephemeral keys above; made with noiseprotocol 0.3.1.
GOLDEN_MESSAGES = {
    Suite.AES256GCM: (
        bytes.fromhex(
            "f74657440101010562c3bc726f0053a4e09292b651c278b9772c569f5fa9bb13d906b46ab68c9df9dc2b4409f8a20970"
            "1261188d24f92fa60e3a5459386773593893eb9b8a4af87b2643efc297de5705b57df7dda7660b4dea1966ae0bee7d2f"
            "2605"
        ),
        bytes.fromhex(
            "0040ce8d3ad1ccb633ec7b70c17814a5c76ecd029685050d344745ba05870e587d5981070d7a6ad53c0162287c584823"
            "f7487180339ac66de71f9c0c37160d08eeed"
        ),
    ),
    Suite.CHACHA20POLY1305: (
        bytes.fromhex(
            "f74657440102010562c3bc726f0053a4e09292b651c278b9772c569f5fa9bb13d906b46ab68c9df9dc2b4409f8a20964"
            "f861595028e0b4e5f4251b141715b3f386ad1ea77573968a09db601f05257460ff86a2ead7745fa671ee4489d0bda88f"
            "f612"
        ),
        bytes.fromhex(
            "0040ce8d3ad1ccb633ec7b70c17814a5c76ecd029685050d344745ba05870e587d5951dccae55f06c98eea5f536ec3c2"
            "7f5fe622c97e12fc912e8cd388e91aab05f1"
        ),
    ),
}

suites = pytest.mark.parametrize("suite", Suite, ids=lambda suite: suite.name)


def client(suite: Suite = Suite.AES256GCM, key_id: str = "büro", psk: bytes = PSK, **changes: Any) -> ClientHandshake:
    mode = changes.pop("mode", Mode.STRIPE)
    hello = replace(HELLO, **changes)
    return ClientHandshake(key_id, psk, suite, mode, hello, ephemeral_private=CLIENT_EPHEMERAL)


def server(suite: Suite = Suite.AES256GCM, mode: Mode = Mode.STRIPE) -> ServerHandshake:
    return ServerHandshake(KEYS.get, suite, mode)


def answer(to: ServerHandshake) -> bytes:
    return to.welcome(WELCOME, ephemeral_private=SERVER_EPHEMERAL)


def message_1(suite: Suite = Suite.AES256GCM) -> bytes:
    return client(suite).message_to_send


def message_2(suite: Suite = Suite.AES256GCM) -> bytes:
    end = server(suite)
    end.receive(message_1(suite))
    return answer(end)


def flips(message: bytes) -> Iterator[bytes]:
    number = int.from_bytes(message)
    return ((number ^ 1 << bit).to_bytes(len(message)) for bit in range(8 * len(message)))


# Payloads


def test_hello_and_welcome_have_the_golden_bytes() -> None:
    assert HELLO.pack() == HELLO_BYTES
    assert Hello.unpack(HELLO_BYTES) == HELLO
    assert WELCOME.pack() == WELCOME_BYTES
    assert Welcome.unpack(WELCOME_BYTES) == WELCOME
    assert replace(WELCOME, session_known=False).pack() == WELCOME_BYTES[:8] + b"\0" + WELCOME_BYTES[9:]


@pytest.mark.parametrize(("kind", "data"), [(Hello, HELLO_BYTES), (Welcome, WELCOME_BYTES)])
def test_every_truncation_and_any_tail_of_a_payload_is_rejected(kind: type[Hello | Welcome], data: bytes) -> None:
    for damaged in [data[:length] for length in range(len(data))] + [data + b"\0", data + data]:
        with pytest.raises(RemoteProtocolError):
            kind.unpack(damaged)


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("04 77c3a962", "00"),  # no name
        ("04 77c3a962", "04 77c3ff62"),  # no UTF-8
        ("04 77c3a962", "ff 77c3a962"),
        ("04 77c3a962", "03 77c3a962"),
        ("02 00 31323334 03 41424344", "00"),
        ("02 00 31323334", "ff 00 31323334"),
        ("00 31323334 03 41424344", "03 31323334 00 41424344"),  # not in order
        ("00 31323334 03 41424344", "03 31323334 03 41424344"),  # twice
        ("00 31323334", "00 00000000"),  # serial 0
        ("2122 03", "2122 01"),  # the sender is not in its roster
    ],
)
def test_hello_that_breaks_a_rule_is_rejected(was: str, becomes: str) -> None:
    old = bytes.fromhex(was)
    assert HELLO_BYTES.count(old) == 1
    with pytest.raises(RemoteProtocolError):
        Hello.unpack(HELLO_BYTES.replace(old, bytes.fromhex(becomes)))


def test_roster_of_64_passes_and_of_65_does_not() -> None:
    workers = tuple(WorkerId(slot, 1) for slot in range(65))
    largest = replace(HELLO, roster=workers[:64])
    assert Hello.unpack(largest.pack()) == largest
    with pytest.raises(LocalProtocolError):
        replace(HELLO, roster=workers).pack()
    too_many = b"\x41" + b"".join(struct.pack(">BI", *worker) for worker in workers)
    with pytest.raises(RemoteProtocolError):
        Hello.unpack(HELLO_BYTES[:-11] + too_many)


def test_unknown_flag_in_welcome_is_rejected() -> None:
    for flags in range(2, 256):
        with pytest.raises(RemoteProtocolError):
            Welcome.unpack(WELCOME_BYTES[:8] + bytes([flags]) + WELCOME_BYTES[9:])


@pytest.mark.parametrize(
    "changes",
    [
        {"session_id": -1},
        {"session_id": 2**64},
        {"boot_id": 2**64},
        {"carrier_index": 2**16},
        {"worker_slot": 256},
        {"worker_slot": 2},
        {"tunnel": ""},
        {"tunnel": "é" * 128},
        {"roster": ()},
        {"roster": (WorkerId(3, 2**32),)},
        {"roster": (WorkerId(3, 0),)},
        {"roster": (WorkerId(3, 1), WorkerId(0, 1))},
    ],
)
def test_hello_with_a_value_out_of_range_is_a_local_error(changes: dict[str, Any]) -> None:
    with pytest.raises(LocalProtocolError):
        replace(HELLO, **changes).pack()


rosters = st.dictionaries(st.integers(0, 255), st.integers(1, 2**32 - 1), min_size=1, max_size=64).map(
    lambda workers: tuple(WorkerId(*worker) for worker in sorted(workers.items()))
)
u64 = st.integers(0, 2**64 - 1)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=63)


@st.composite
def hellos(draw: st.DrawFn) -> Hello:
    roster = draw(rosters)
    slot = draw(st.sampled_from(roster)).slot
    return Hello(draw(u64), draw(u64), draw(st.integers(0, 2**16 - 1)), slot, draw(names), roster)


@st.composite
def welcomes(draw: st.DrawFn) -> Welcome:
    roster = draw(rosters)
    return Welcome(draw(u64), draw(st.booleans()), draw(st.sampled_from(roster)).slot, roster)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    marks = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(marks)]


@given(hello=hellos(), welcome=welcomes(), key_id=names, suite=st.sampled_from(Suite), cuts=st.lists(st.integers(0)))
def test_any_handshake_succeeds_in_pieces_of_any_size(
    hello: Hello, welcome: Welcome, key_id: str, suite: Suite, cuts: list[int]
) -> None:
    near = ClientHandshake(key_id, PSK, suite, Mode.SPRAY, hello, ephemeral_private=CLIENT_EPHEMERAL)
    far = ServerHandshake({key_id: (7, PSK)}.get, suite, Mode.SPRAY)
    assert len(near.message_to_send) <= 1024
    heard = [far.receive(piece) for piece in pieces(near.message_to_send, cuts) if piece]
    assert heard == [None] * (len(heard) - 1) + [hello]
    assert (far.key_id, far.key_index) == (key_id, 7)

    reply = far.welcome(welcome, ephemeral_private=SERVER_EPHEMERAL)
    assert len(reply) <= 1024
    said = [near.receive(piece) for piece in pieces(reply, cuts) if piece]
    assert said == [None] * (len(said) - 1) + [welcome]
    send, receive = near.split()
    assert far.split() == (receive, send)


@given(st.binary(max_size=60))
def test_random_payload_is_rejected_or_the_only_encoding_of_what_it_says(data: bytes) -> None:
    for kind in (Hello, Welcome):
        with suppress(RemoteProtocolError):
            assert kind.unpack(data).pack() == data


@given(st.binary(max_size=2000), st.integers(0, 15))
def test_random_bytes_after_any_part_of_a_preamble_are_never_accepted(data: bytes, kept: int) -> None:
    assert rejects(server(), message_1()[:kept] + data)
    assert rejects(client(), data)


# Messages


@suites
def test_messages_have_the_golden_bytes(suite: Suite) -> None:
    assert (message_1(suite), message_2(suite)) == GOLDEN_MESSAGES[suite]


@suites
def test_message_1_is_a_clear_preamble_that_is_the_prologue_then_noise(suite: Suite) -> None:
    message = message_1(suite)
    prologue = b"\xf7FWD\x01" + bytes([suite]) + b"\x01\x05b\xc3\xbcro" + struct.pack(">H", len(HELLO_BYTES) + 48)
    assert message.startswith(prologue)
    assert NoiseNNpsk0(False, PSK, prologue, suite).read_message(message[len(prologue) :]) == HELLO_BYTES


@suites
def test_byte_by_byte_both_ends_finish_at_the_last_byte(suite: Suite) -> None:
    near, far = client(suite), server(suite)
    first = near.message_to_send
    assert [far.receive(first[i : i + 1]) for i in range(len(first))] == [None] * (len(first) - 1) + [HELLO]
    second = answer(far)
    assert [near.receive(second[i : i + 1]) for i in range(len(second))] == [None] * (len(second) - 1) + [WELCOME]
    assert near.leftover == b""
    send, receive = near.split()
    assert far.split() == (receive, send)


def test_largest_message_1_fits_its_limit() -> None:
    roster = tuple(WorkerId(slot, 1) for slot in range(64))
    far = ServerHandshake({"k" * 255: (0, PSK)}.get, Suite.AES256GCM, Mode.STRIPE)
    hello = replace(HELLO, tunnel="t" * 255, roster=roster)
    near = client(key_id="k" * 255, tunnel="t" * 255, roster=roster)
    assert far.receive(near.message_to_send) == hello
    with pytest.raises(LocalProtocolError):
        client(key_id="k" * 256)
    with pytest.raises(LocalProtocolError):
        client(key_id="")


def rejects(end: ServerHandshake | ClientHandshake, data: bytes) -> bool:
    """Whether the end never accepts a stream that begins with `data`: if it waits for more, not even then."""
    try:
        return all(end.receive(more) is None for more in (data, bytes(1024), bytes(1024)))
    except RemoteProtocolError:
        return True


@suites
def test_every_flipped_bit_of_either_message_is_rejected(suite: Suite) -> None:
    assert not rejects(server(suite), message_1(suite))
    assert not rejects(client(suite), message_2(suite))
    for damaged in flips(message_1(suite)):
        assert rejects(server(suite), damaged), damaged.hex()
    for damaged in flips(message_2(suite)):
        assert rejects(client(suite), damaged), damaged.hex()


def test_every_truncation_waits_and_is_rejected_once_other_bytes_follow() -> None:
    for message, end in ((message_1(), server), (message_2(), client)):
        for length in range(len(message)):
            waiting = end()
            assert waiting.receive(message[:length]) is None
            wrong = bytes(byte ^ 1 for byte in message[length:])
            assert rejects(waiting, wrong)


def test_truncation_with_a_length_that_matches_is_rejected() -> None:
    first, second = message_1(), message_2()
    start = 8 + 5
    for length in range(len(first) - start - 2):
        damaged = first[:start] + struct.pack(">H", length) + first[start + 2 :][:length]
        assert rejects(server(), damaged)
    for length in range(len(second) - 2):
        assert rejects(client(), struct.pack(">H", length) + second[2:][:length])


def test_bytes_after_message_1_are_rejected_whole_or_later() -> None:
    with pytest.raises(RemoteProtocolError):
        server().receive(message_1() + b"\0")
    with pytest.raises(RemoteProtocolError):
        server().receive(message_1() + bytes(100_000))


def test_leftover_after_message_2_is_kept() -> None:
    for cut in (1, 40, len(message_2())):
        near = client()
        data = message_2() + b"first record" * 1000
        assert near.receive(data[:cut]) == (WELCOME if cut == len(message_2()) else None)
        if cut < len(message_2()):
            assert near.receive(data[cut:]) == WELCOME
            assert near.leftover == b"first record" * 1000


@pytest.mark.parametrize("at", range(7))
def test_wrong_preamble_byte_is_rejected_when_it_arrives(at: int) -> None:
    message = message_1()
    end = server()
    assert end.receive(message[:at]) is None
    with pytest.raises(RemoteProtocolError):
        end.receive(bytes([message[at] ^ 0x40]))


@pytest.mark.parametrize("stray", [b"GET / HTTP/1.1\r\n", b"SSH-2.0-x\r\n", b"\x16\x03\x01", b"\0", b"\xff"])
def test_stray_client_is_rejected_at_its_first_byte(stray: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        server().receive(stray[:1])


@pytest.mark.parametrize("length", [0, 74, 1024 - 15 + 1, 2**16 - 1])
def test_noise_length_out_of_range_is_rejected_before_the_noise_message(length: int) -> None:
    end = server()
    assert end.receive(message_1()[:14]) is None
    with pytest.raises(RemoteProtocolError):
        server().receive(message_1()[:13] + struct.pack(">H", length))


@pytest.mark.parametrize("length", [0, 63, 1023, 2**16 - 1])
def test_length_of_message_2_out_of_range_is_rejected_at_once(length: int) -> None:
    with pytest.raises(RemoteProtocolError):
        client().receive(struct.pack(">H", length))
    assert client().receive(struct.pack(">H", 1022)) is None


def test_empty_key_id_and_one_that_is_not_utf8_are_rejected() -> None:
    message = message_1()
    with pytest.raises(RemoteProtocolError):
        server().receive(message[:7] + b"\0")
    with pytest.raises(RemoteProtocolError, match="UTF-8"):
        server().receive(message.replace("büro".encode(), b"b\xff\xffro"))


def test_wrong_psk_is_rejected_at_either_end() -> None:
    assert rejects(server(), client(psk=bytes([9]) * 32).message_to_send)
    impostor = ServerHandshake({"büro": (0, PSK)}.get, Suite.AES256GCM, Mode.STRIPE)
    impostor.receive(message_1())
    other = client(psk=bytes([9]) * 32)
    assert rejects(other, answer(impostor))


def test_other_suite_and_mode_are_rejected() -> None:
    assert rejects(server(Suite.CHACHA20POLY1305), message_1(Suite.AES256GCM))
    assert rejects(server(mode=Mode.SPRAY), client(mode=Mode.STRIPE).message_to_send)
    assert not rejects(server(mode=Mode.SPRAY), client(mode=Mode.SPRAY).message_to_send)


def test_unknown_key_id_does_the_work_of_a_wrong_psk(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[bytes] = []

    class Watched(NoiseNNpsk0):
        def read_message(self, message: bytes) -> bytes:
            tried.append(message)
            return super().read_message(message)

    unknown, wrong = client(key_id="ghost").message_to_send, client(psk=bytes([9]) * 32).message_to_send
    monkeypatch.setattr(handshake, "NoiseNNpsk0", Watched)
    for message in (unknown, wrong):
        with pytest.raises(RemoteProtocolError):
            server().receive(message)
    assert len(tried) == 2


def test_stand_in_psk_of_an_unknown_key_id_opens_nothing() -> None:
    message = client(key_id="ghost", psk=handshake._NO_PSK).message_to_send
    with pytest.raises(RemoteProtocolError, match="unknown"):
        server().receive(message)


def test_another_worker_takes_over_from_the_raw_bytes() -> None:
    message = message_1()
    for length in range(1, len(message) + 1):
        first = server()
        first.receive(message[:length])
        assert first.raw == message[:length]
        second = server()
        heard = second.receive(first.raw) or second.receive(message[length:])
        assert heard == HELLO
    near = client()
    assert near.receive(answer(second)) == WELCOME
    assert near.split() == second.split()[::-1]


def test_message_2_answers_only_its_own_message_1() -> None:
    hello = replace(HELLO, carrier_index=9)
    other = ClientHandshake("büro", PSK, Suite.AES256GCM, Mode.STRIPE, hello, ephemeral_private=bytes([3]) * 32)
    assert rejects(other, message_2())


def test_calls_out_of_order_are_local_errors() -> None:
    end = server()
    with pytest.raises(LocalProtocolError):
        answer(end)
    with pytest.raises(LocalProtocolError):
        end.split()
    with pytest.raises(LocalProtocolError):
        client().split()
    end.receive(message_1())
    with pytest.raises(LocalProtocolError):
        end.receive(b"x")
    with pytest.raises(LocalProtocolError):
        end.split()


def test_a_rejected_end_stays_rejected() -> None:
    message = message_1()
    end = server()
    damaged = message[:-1] + bytes([message[-1] ^ 1])
    for data in (damaged, b"", b"x", message):
        with pytest.raises(RemoteProtocolError):
            end.receive(data)
