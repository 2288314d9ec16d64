"""The first bytes on a carrier: one message each way, after which both ends have their keys.

All numbers are big-endian. Anything that the text below does not allow is rejected, and the server rejects all of it
alike: no answer. Nothing may follow message 1 before message 2 has come; records may follow message 2 at once.

Message 1, client to server, at most 1024 bytes:

     0                   1                   2                   3
     0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    +---------------------------------------------------------------+
    |                     magic: F7 46 57 44                        |
    +---------------+---------------+---------------+---------------+
    |    version    |     suite     |     mode      | key id length |
    +---------------+---------------+---------------+---------------+
    |                   key id, 1..255 bytes ...                    |
    +-------------------------------+-------------------------------+
    |     Noise message length      |       Noise message ...       |
    +-------------------------------+-------------------------------+

- Magic: its first byte starts no text protocol and no TLS, so a stray client is refused at once.
- Version: 1. Suite: `noise.Suite`. Mode: `Mode`. Each has to be what the server expects: nothing is negotiated.
- Key id: UTF-8; names the psk. An unknown one costs the server the same work as a wrong psk.
- Everything before the Noise message is the prologue of the handshake, so a change to any bit fails the tag.

Payload of its Noise message, the `Hello`:

    +---------------------------------------------------------------+
    |                     session id (64 bits)                      |
    |                                                               |
    +---------------------------------------------------------------+
    |                 boot id of the client (64 bits)               |
    |                                                               |
    +-------------------------------+---------------+---------------+
    |         carrier index         |  worker slot  |  name length  |
    +-------------------------------+---------------+---------------+
    |             name of the tunnel, UTF-8, 1..255 bytes ...       |
    +---------------------------------------------------------------+
    |                           roster ...                          |
    +---------------------------------------------------------------+

- Session id, boot id: any. Carrier index: of the carrier in its session, 0..65535.
- Worker slot: of the sender; it is in the roster.

The roster names the live workers of the end that sends it:

    +---------------+
    |     count     |  1..64, then as many times:
    +---------------+---------------+---------------+---------------+
    |     slot      |               serial (32 bits)                |
    +---------------+-----------------------------------------------+
    |               |
    +---------------+

- Slot: 0..255, each greater than the one before. Serial: of the process in that slot; not 0.

Message 2, server to client, at most 1024 bytes: the length of the Noise message (16 bits), then the Noise message. Its
payload, the `Welcome`:

    +---------------------------------------------------------------+
    |                 boot id of the server (64 bits)               |
    |                                                               |
    +---------------+---------------+-------------------------------+
    |     flags     |  worker slot  |          roster ...           |
    +---------------+---------------+-------------------------------+

- Flags: bit 0 (value 1): the server knows the session. The others are 0.
- Worker slot: of the worker that owns the carrier at the server; it is in the roster.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from struct import Struct
from struct import error as StructError
from typing import NamedTuple, Self

from workers.core.errors import LocalProtocolError, RemoteProtocolError
from workers.core.noise import KEY_SIZE, MESSAGE_OVERHEAD, NoiseNNpsk0, Suite

MESSAGE_MAX = 1024
MAGIC = b"\xf7FWD"
VERSION = 1
NAME_MAX = 255
ROSTER_MAX = 64
SESSION_KNOWN = 1

PREAMBLE = Struct(">4sBBBB")
LENGTH = Struct(">H")
HELLO = Struct(">QQHBB")
ROSTER_ENTRY = Struct(">BI")
WELCOME = Struct(">QBB")

_ROSTER_MIN = 1 + ROSTER_ENTRY.size
_NOISE_1_MIN = MESSAGE_OVERHEAD + HELLO.size + 1 + _ROSTER_MIN
_NOISE_2_MIN = MESSAGE_OVERHEAD + WELCOME.size + _ROSTER_MIN

# Stands in for the psk of an unknown key id. It opens nothing: the answer is no even if the tag is right.
_NO_PSK = bytes(KEY_SIZE)


class Mode(IntEnum):
    """What the tunnel moves, as its byte on the wire."""

    STRIPE = 1
    SPRAY = 2


class WorkerId(NamedTuple):
    """A worker process: its slot, and the serial that tells it from its predecessors there."""

    slot: int
    serial: int


Roster = tuple[WorkerId, ...]


@dataclass(frozen=True, slots=True)
class Hello:
    """What the client says of a new carrier. `roster`: the client's workers, by slot."""

    session_id: int
    boot_id: int
    carrier_index: int
    worker_slot: int
    tunnel: str
    roster: Roster

    def pack(self) -> bytes:
        """Raises LocalProtocolError for a value out of its range."""
        name = self.tunnel.encode()
        try:
            head = HELLO.pack(self.session_id, self.boot_id, self.carrier_index, self.worker_slot, len(name))
        except StructError as error:
            raise LocalProtocolError(f"Hello: {error}") from None
        if not name:
            raise LocalProtocolError("Hello: no tunnel name")
        return head + name + _pack_roster(self.roster, self.worker_slot)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Raises RemoteProtocolError unless `data` is one Hello, whole and nothing else."""
        if len(data) < HELLO.size:
            raise RemoteProtocolError("Hello: truncated")
        session_id, boot_id, carrier_index, worker_slot, name_length = HELLO.unpack_from(data)
        end = HELLO.size + name_length
        tunnel = _text(data[HELLO.size : end])
        return cls(session_id, boot_id, carrier_index, worker_slot, tunnel, _unpack_roster(data[end:], worker_slot))


@dataclass(frozen=True, slots=True)
class Welcome:
    """What the server answers. `worker_slot` owns the carrier from now on; `roster`: the server's workers, by slot."""

    boot_id: int
    session_known: bool
    worker_slot: int
    roster: Roster

    def pack(self) -> bytes:
        """Raises LocalProtocolError for a value out of its range."""
        try:
            head = WELCOME.pack(self.boot_id, SESSION_KNOWN if self.session_known else 0, self.worker_slot)
        except StructError as error:
            raise LocalProtocolError(f"Welcome: {error}") from None
        return head + _pack_roster(self.roster, self.worker_slot)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Raises RemoteProtocolError unless `data` is one Welcome, whole and nothing else."""
        if len(data) < WELCOME.size:
            raise RemoteProtocolError("Welcome: truncated")
        boot_id, flags, worker_slot = WELCOME.unpack_from(data)
        if flags & ~SESSION_KNOWN:
            raise RemoteProtocolError(f"Welcome: unknown flags {flags:#04x}")
        return cls(boot_id, flags == SESSION_KNOWN, worker_slot, _unpack_roster(data[WELCOME.size :], worker_slot))


def _pack_roster(roster: Roster, own_slot: int) -> bytes:
    fault = _roster_fault(roster, own_slot)
    if fault:
        raise LocalProtocolError(f"roster: {fault}")
    try:
        return bytes((len(roster),)) + b"".join(ROSTER_ENTRY.pack(*worker) for worker in roster)
    except StructError as error:
        raise LocalProtocolError(f"roster: {error}") from None


def _unpack_roster(data: bytes, own_slot: int) -> Roster:
    """`data` has to end with the roster."""
    if not data or len(data) != 1 + data[0] * ROSTER_ENTRY.size:
        raise RemoteProtocolError(f"roster: {len(data)} bytes, count {data[:1].hex()}")
    roster = tuple(WorkerId(slot, serial) for slot, serial in ROSTER_ENTRY.iter_unpack(data[1:]))
    fault = _roster_fault(roster, own_slot)
    if fault:
        raise RemoteProtocolError(f"roster: {fault}")
    return roster


def _roster_fault(roster: Roster, own_slot: int) -> str | None:
    slots = [worker.slot for worker in roster]
    if len(roster) > ROSTER_MAX:
        return f"{len(roster)} workers"
    if any(slot >= following for slot, following in pairwise(slots)):
        return "slots not in order"
    if not all(worker.serial for worker in roster):
        return "serial 0"
    if own_slot not in slots:
        return f"slot {own_slot} is not in it"
    return None


def _text(data: bytes) -> str:
    """A name of the peer's choice: escape it before it goes into a log."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise RemoteProtocolError("a name that is not UTF-8") from None
    if not text:
        raise RemoteProtocolError("an empty name")
    return text


class ClientHandshake:
    """The client's end: send `message_to_send`, feed `receive` until it returns the Welcome, then `split`.

    leftover: what came after message 2: the start of the first record.
    """

    __slots__ = ("_noise", "_received", "leftover", "message_to_send")

    def __init__(
        self, key_id: str, psk: bytes, suite: Suite, mode: Mode, hello: Hello, *, ephemeral_private: bytes
    ) -> None:
        """`ephemeral_private`: 32 fresh random bytes, used for this handshake only."""
        name = key_id.encode()
        if not 1 <= len(name) <= NAME_MAX:
            raise LocalProtocolError(f"key id of {len(name)} bytes")
        payload = hello.pack()
        prologue = PREAMBLE.pack(MAGIC, VERSION, suite, mode, len(name)) + name
        prologue += LENGTH.pack(len(payload) + MESSAGE_OVERHEAD)
        self._noise = NoiseNNpsk0(True, psk, prologue, suite)
        self.message_to_send = prologue + self._noise.write_message(payload, ephemeral_private)
        self._received = bytearray()
        self.leftover = b""

    def receive(self, data: bytes | bytearray | memoryview) -> Welcome | None:
        """Take what came, in pieces of any size; None: more is needed.

        Raises RemoteProtocolError as soon as the peer cannot be a server with this psk; then the carrier ends.
        """
        received = self._received
        received += data
        if len(received) < LENGTH.size:
            return None
        (length,) = LENGTH.unpack_from(received)
        end = LENGTH.size + length
        if not LENGTH.size + _NOISE_2_MIN <= end <= MESSAGE_MAX:
            raise RemoteProtocolError(f"message 2 of {end} bytes")
        if len(received) < end:
            return None
        self.leftover = bytes(received[end:])
        return Welcome.unpack(self._noise.read_message(bytes(received[LENGTH.size : end])))

    def split(self) -> tuple[bytes, bytes]:
        """(key to send with, key to receive with), once the Welcome is here."""
        return self._noise.split()


class ServerHandshake:
    """The server's end: feed `receive` until it returns the Hello, send what `welcome` returns, then `split`.

    Message 1 may be a replay: only the first record that opens proves the client.
    lookup: key id -> (index of the key, psk), None if there is no such key.
    key_id, key_index: the client's, valid after the Hello.
    """

    __slots__ = ("_expected", "_lookup", "_noise", "_received", "_suite", "key_id", "key_index")

    def __init__(self, lookup: Callable[[str], tuple[int, bytes] | None], suite: Suite, mode: Mode) -> None:
        self._lookup = lookup
        self._suite = suite
        self._expected = PREAMBLE.pack(MAGIC, VERSION, suite, mode, 0)[:-1]
        self._received = bytearray()
        self._noise: NoiseNNpsk0 | None = None
        self.key_id = ""
        self.key_index = -1

    @property
    def raw(self) -> bytes:
        """All that was received, at most MESSAGE_MAX bytes: another worker's `receive` takes it and gets as far."""
        return bytes(self._received)

    def receive(self, data: bytes | bytearray | memoryview) -> Hello | None:
        """Take what came, in pieces of any size; None: more is needed.

        Raises RemoteProtocolError at the first byte that cannot belong to an acceptable message 1; then answer nothing.
        """
        if self._noise is not None:
            raise LocalProtocolError("message 1 is complete")
        received = self._received
        received += data[: MESSAGE_MAX + 1 - len(received)]
        bounds = self._noise_bounds()
        if bounds is None:
            return None
        start, end = bounds
        return self._open(bytes(received[:start]), bytes(received[start:end]))

    def welcome(self, welcome: Welcome, *, ephemeral_private: bytes) -> bytes:
        """Message 2, after the Hello. `ephemeral_private`: 32 fresh random bytes, used for this handshake only.

        Raises RemoteProtocolError if the client's ephemeral key has low order.
        """
        if self._noise is None:
            raise LocalProtocolError("message 1 is not complete")
        message = self._noise.write_message(welcome.pack(), ephemeral_private)
        return LENGTH.pack(len(message)) + message

    def split(self) -> tuple[bytes, bytes]:
        """(key to send with, key to receive with), after `welcome`."""
        if self._noise is None:
            raise LocalProtocolError("message 1 is not complete")
        return self._noise.split()

    def _noise_bounds(self) -> tuple[int, int] | None:
        """Where the Noise message starts and ends; None if it is not whole yet. Checks all that stands before it."""
        received = self._received
        if received[: len(self._expected)] != self._expected[: len(received)]:
            raise RemoteProtocolError("not the magic, version, suite and mode of this tunnel")
        if len(received) < PREAMBLE.size:
            return None
        key_id_length = received[PREAMBLE.size - 1]
        if not key_id_length:
            raise RemoteProtocolError("no key id")
        start = PREAMBLE.size + key_id_length + LENGTH.size
        if len(received) < start:
            return None
        (length,) = LENGTH.unpack_from(received, start - LENGTH.size)
        end = start + length
        if length < _NOISE_1_MIN or end > MESSAGE_MAX:
            raise RemoteProtocolError(f"message 1 of {end} bytes")
        if len(received) > end:
            raise RemoteProtocolError("bytes after message 1")
        return (start, end) if len(received) == end else None

    def _open(self, prologue: bytes, message: bytes) -> Hello:
        key_id = _text(prologue[PREAMBLE.size : -LENGTH.size])
        entry = self._lookup(key_id)
        index, psk = entry if entry is not None else (-1, _NO_PSK)
        noise = NoiseNNpsk0(False, psk, prologue, self._suite)
        hello = Hello.unpack(noise.read_message(message))
        if entry is None:
            raise RemoteProtocolError("unknown key id")
        self._noise = noise
        self.key_id, self.key_index = key_id, index
        return hello
