"""The record stream of a stripe, cut anywhere: every frame comes out once, in order, whatever the pieces."""

from typing import Any
from unittest import mock

from tests.fuzz.place import READ, Loop, Wire, buffers
from tests.fuzz.source import Source
from workers.core.noise import Suite
from workers.core.record import OVERHEAD, TAG, Opener, Sealer
from workers.io import memory, sockets
from workers.io.stripe import Staging, Stripe
from workers.shm.arena import Side

KEY = bytes(range(32))
FRAME_MAX = 8192
INBOUND = 2048
"""Less than the product reads at once, so that small inputs reach every cut."""


class Owner:
    """Keeps the frames that a stripe hands over, and gives their slots back."""

    def __init__(self, own: memory.Memory) -> None:
        self.memory = own
        self.frames: list[bytes] = []
        self.lost = 0

    def on_frame(self, _stripe: Stripe, slot: int, view: memoryview) -> None:
        """See StripeOwner."""
        self.frames.append(bytes(view))
        if slot >= 0:
            self.memory.arena.release(slot)

    def on_turn_end(self) -> None:
        """See StripeOwner."""

    def on_room(self, _stripe: Stripe) -> None:
        """See StripeOwner."""

    def on_stripe_lost(self, _stripe: Stripe, _why: str) -> None:
        """See StripeOwner."""
        self.lost += 1


def run(data: bytes) -> None:
    """Records of the input's choice, then perhaps garbage; then how they are cut."""
    source = Source(data)
    sealer, keys = Sealer(KEY, Suite.AES256GCM), (Sealer(KEY, Suite.AES256GCM), Opener(KEY, Suite.AES256GCM, FRAME_MAX))
    sent: list[bytes] = []
    stream = bytearray()
    for _ in range(source.number() & 15):
        content = _content(source, proven=bool(sent))
        out = bytearray(len(content) + OVERHEAD)
        sealer.seal_into(content, memoryview(out))
        sent.append(content)
        stream += out
    garbage = source.block()
    stream += garbage
    leftover = source.number(2) if source.flag() else 0
    with buffers(INBOUND) as own, mock.patch.object(sockets, "unsent_bytes", lambda _sock: 0):
        wire, owner, loop = Wire(), Owner(own), Loop()
        carrier = Stripe(
            loop, wire, 0, keys, own, Staging(own.outbound), frame_max_bytes=FRAME_MAX, now_us=0  # type: ignore[arg-type]
        )  # fmt: skip
        carrier.start(owner, bytes(stream[:leftover]))
        for piece in _cut(source, bytes(stream[leftover:])):
            _receive(loop, carrier, wire, piece)
            assert carrier._body is None or len(carrier._body) <= FRAME_MAX + TAG
        assert owner.frames[: len(sent)] == sent, "other frames than were sent"
        assert len(owner.frames) <= len(sent), "garbage opened"
        assert bool(garbage) or not owner.lost, "a good stripe was closed"
        wire.ended = True
        _receive(loop, carrier, wire, b"")
        assert carrier.closed and owner.lost == 1 and wire.closed
        assert not own.arena.slots_in_use and own.arena.used_bytes(Side.INGRESS) == 0


def _content(source: Source, proven: bool) -> bytes:
    most = FRAME_MAX if proven else memory.SCRATCH_BYTES - TAG
    size = min(source.number(2), most)
    return (source.take(4) or b"\0").ljust(size, b"\0")[: max(size, 1)]


def _cut(source: Source, stream: bytes) -> Any:
    """Pieces of 1 byte to 64 KiB."""
    while stream:
        size = (source.number() + 1) * source.choose((1, 1, 16, 256)) if len(source) else len(stream)
        yield stream[:size]
        stream = stream[size:]


def _receive(loop: Loop, carrier: Stripe, wire: Wire, piece: bytes) -> None:
    wire.arrived += piece
    while not carrier.closed and (wire.arrived or wire.ended):
        assert loop.fire(wire.fileno(), READ), "a stripe that does not listen"


def _records(*sizes: int) -> bytes:
    return bytes((len(sizes),)) + b"".join(size.to_bytes(2, "big") + b"abcd" for size in sizes)


SEEDS = {
    "whole": _records(24, 100, 40) + b"\0\0",
    "byte-by-byte": _records(24, 30) + b"\0\0" + b"\0\0" * 120,
    "large-in-pieces": _records(24, 8192, 4000) + b"\0\0" + b"\xff\1\x7f\2\x10\3\x03\0",
    "leftover": _records(24, 100, 2000) + b"\0\1\0\x50" + b"\x10\0",
    "leftover-half-a-prefix": _records(24, 100) + b"\0\1\0\x2e\0\0\0\0",
    "garbage": _records(24) + b"\x14" + b"\0\0\0\x11" + bytes(16) + b"\0",
    "garbage-length": _records(24, 24) + b"\5\xff\xff\xff\xff\0\0",
    "unproven-too-large": b"\0\6\0\0\x04\1\0\0\0",
    "scratch-and-slot": _records(24, 1023, 1024, 1025) + b"\0\0\xff\0\xff\1\xff\2",
}
