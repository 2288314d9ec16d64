"""Messages 1 and 2 as they come from a stranger, or from a holder of the key who may put anything into them."""

from tests.fuzz.source import Source
from workers.core.errors import RemoteProtocolError
from workers.core.handshake import (
    LENGTH,
    MAGIC,
    MESSAGE_MAX,
    PREAMBLE,
    VERSION,
    ClientHandshake,
    Hello,
    Mode,
    ServerHandshake,
    Welcome,
    WorkerId,
)
from workers.core.noise import MESSAGE_OVERHEAD, NoiseNNpsk0, Suite

KEY_ID, PSK = "laptop", bytes(range(32))
OTHER_ID, OTHER_PSK = "phone", bytes(range(1, 33))
KEYS = {KEY_ID: (0, PSK), OTHER_ID: (1, OTHER_PSK)}
CLIENT_PRIVATE, SERVER_PRIVATE = bytes([0x11]) * 32, bytes([0x22]) * 32
ROSTER = (WorkerId(0, 0x0501), WorkerId(3, 0x0502))
HELLO = Hello(1 << 63, 2, 7, 3, "web", ROSTER)
WELCOME = Welcome(5, True, 0, ROSTER)
SUITES = (Suite.AES256GCM, Suite.CHACHA20POLY1305)


def run(data: bytes) -> None:
    """First byte: which parser, and who sends."""
    source = Source(data)
    source.choose((_stranger_at_server, _client_at_server, _stranger_at_client, _server_at_client, _payloads))(source)


def _stranger_at_server(source: Source) -> None:
    suite = source.choose(SUITES)
    message = source.take(source.number(2))
    if source.flag():
        message = PREAMBLE.pack(MAGIC, VERSION, suite, Mode.STRIPE, len(KEY_ID)) + KEY_ID.encode() + message
    _feed_server(source, suite, message)


def _client_at_server(source: Source) -> None:
    """The psk is right; key id, payload and public key are whatever the input says, and one byte may be changed."""
    suite, key_id, payload = source.choose(SUITES), source.block(), source.take(source.number(2))
    public = source.take(32) if source.flag() else None
    length = MESSAGE_OVERHEAD + len(payload)
    prologue = PREAMBLE.pack(MAGIC, VERSION, suite, Mode.STRIPE, len(key_id)) + key_id + LENGTH.pack(length & 0xFFFF)
    noise = NoiseNNpsk0(True, KEYS.get(key_id.decode(errors="replace"), (0, PSK))[1], prologue, suite)
    if public is not None and len(public) == 32:
        noise._mix_ephemeral(public)
        sealed = public + noise._aead().encrypt(noise._nonce(), payload, noise._hash)
    else:
        sealed = noise.write_message(payload, CLIENT_PRIVATE)
    message = bytearray(prologue + sealed)
    changed = source.number()
    if changed:
        message[source.number(2) % len(message)] ^= changed
    hello = _feed_server(source, suite, bytes(message) + source.block())
    if hello is not None:
        assert not changed, "a changed message was taken"
        assert hello.pack() == payload, "not what was sent"


def _feed_server(source: Source, suite: Suite, message: bytes) -> Hello | None:
    """In pieces it comes to the same as whole, bytes after the message aside: those are refused only with it."""
    server = ServerHandshake(KEYS.get, suite, Mode.STRIPE)
    hello = None
    try:
        for piece in source.pieces(message):
            hello = server.receive(piece)
            assert len(server.raw) <= MESSAGE_MAX
            if hello is not None:
                break
    except RemoteProtocolError:
        pass
    raw, twin = server.raw, ServerHandshake(KEYS.get, suite, Mode.STRIPE)
    try:
        whole = twin.receive(message)
    except RemoteProtocolError:
        whole = None
        assert hello is None or len(message) > len(raw), "whole refused, in pieces taken"
    else:
        assert whole == hello, "pieces differ from the whole"
    if hello is None:
        return None
    twin = ServerHandshake(KEYS.get, suite, Mode.STRIPE)
    assert twin.receive(raw) == hello, "another worker reads it differently"
    try:
        answer = server.welcome(WELCOME, ephemeral_private=SERVER_PRIVATE)
    except RemoteProtocolError:
        return hello  # a public key of low order
    assert len(answer) <= MESSAGE_MAX
    sending, receiving = server.split()
    assert len(sending) == len(receiving) == 32 and sending != receiving
    return hello


def _stranger_at_client(source: Source) -> None:
    suite = source.choose(SUITES)
    _feed_client(source, _client(suite), source.rest())


def _server_at_client(source: Source) -> None:
    """The psk is right; the payload is whatever the input says."""
    suite, payload = source.choose(SUITES), source.take(source.number(2))
    client = _client(suite)
    first = client.message_to_send
    start = PREAMBLE.size + len(KEY_ID) + LENGTH.size
    noise = NoiseNNpsk0(False, PSK, first[:start], suite)
    assert noise.read_message(first[start:]) == HELLO.pack()
    sealed = bytearray(noise.write_message(payload, SERVER_PRIVATE))
    changed = source.number()
    if changed:
        sealed[source.number(2) % len(sealed)] ^= changed
    tail = source.block()
    welcome = _feed_client(source, client, LENGTH.pack(len(sealed) & 0xFFFF) + bytes(sealed) + tail)
    if welcome is not None:
        assert not changed and welcome.pack() == payload, "not what was sent"
        assert noise.split() == client.split()[::-1], "the ends have different keys"


def _client(suite: Suite) -> ClientHandshake:
    return ClientHandshake(KEY_ID, PSK, suite, Mode.STRIPE, HELLO, ephemeral_private=CLIENT_PRIVATE)


def _feed_client(source: Source, client: ClientHandshake, message: bytes) -> Welcome | None:
    fed = 0
    try:
        for piece in source.pieces(message):
            fed += len(piece)
            welcome = client.receive(piece)
            if welcome is not None:
                assert message[:fed].endswith(client.leftover), "bytes of the first record are lost"
                return welcome
    except RemoteProtocolError:
        pass
    return None


def _payloads(source: Source) -> None:
    """Both notations have one form for each value."""
    kind: type[Hello | Welcome] = source.choose((Hello, Welcome))
    data = source.rest()
    try:
        value = kind.unpack(data)
    except RemoteProtocolError:
        return
    assert value.pack() == data


def _in_two(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data


_FROM_CLIENT = bytes((0, len(KEY_ID))) + KEY_ID.encode() + _in_two(HELLO.pack())
SEEDS = {
    "server-genuine": b"\1" + _FROM_CLIENT + b"\0\0\0\x0a\x20\0\xff",
    "server-changed": b"\1" + _FROM_CLIENT + b"\0\1\0\x40",
    "server-low-order": b"\1" + _FROM_CLIENT + b"\1" + bytes(32) + b"\0",
    "server-chacha-with-tail": b"\1\1" + _FROM_CLIENT[1:] + b"\0\0\4tail",
    "server-unknown-key": b"\1\0\5other" + _in_two(HELLO.pack()) + b"\0\0\0",
    "server-stranger": b"\0\0" + _in_two(b"GET / HTTP/1.1\r\n\r\n") + b"\0\0\0",
    "server-stranger-with-preamble": b"\0\0" + _in_two(b"\0\x80" + bytes(128)) + b"\1\7",
    "client-genuine": b"\3\0" + _in_two(WELCOME.pack()) + b"\0\x08leftover\0\1\2",
    "client-changed": b"\3\1" + _in_two(WELCOME.pack()) + b"\1\0\x20\0",
    "client-stranger": b"\2\0\0\x40" + bytes(64),
    "payload-hello": b"\4\0" + HELLO.pack(),
    "payload-welcome": b"\4\1" + WELCOME.pack(),
}
