"""A stripe's receiving side on a real socket, with watchers that the test fires itself."""

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from workers.core import frame
from workers.core.noise import Suite
from workers.core.record import LENGTH, RECORD_HEADER, TAG, Opener, Sealer
from workers.io.memory import Memory
from workers.io.stripe import Staging, Stripe
from workers.shm.arena import Arena, arena_size
from workers.shm.segments import create_arena

FRAME_MAX = 64 << 10
QUOTA = 4 << 20
KEY = bytes(32)
WAIT_S = 5.0


class Watcher:
    callback: Callable[[], None] | None = None

    def start(self, callback: Callable[[], None]) -> None:
        self.callback = callback

    def stop(self) -> None:
        self.callback = None

    def close(self) -> None:
        pass


class Loop:
    def io(self, fd: int, events: int) -> Watcher:
        return Watcher()


class Session:
    """Keeps the frames that a stripe hands over."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.frames: list[bytes] = []
        self.lost: list[str] = []

    def on_frame(self, stripe: Stripe, slot: int, view: memoryview) -> None:
        self.frames.append(bytes(view))
        if slot >= 0:
            self.memory.arena.release(slot)

    def on_turn_end(self) -> None:
        pass

    def on_room(self, stripe: Stripe) -> None:
        pass

    def on_stripe_lost(self, stripe: Stripe, why: str) -> None:
        self.lost.append(why)


class Bench:
    """A stripe and its peer: records go in at `peer`, frames come out at `session`."""

    def __init__(self, memory: Memory, sock: socket.socket, peer: socket.socket) -> None:
        self.peer = peer
        self.session = Session(memory)
        keys = (Sealer(KEY, Suite.AES256GCM), Opener(KEY, Suite.AES256GCM, FRAME_MAX))
        staging = Staging(memory.outbound)
        self.stripe = Stripe(Loop(), sock, 0, keys, memory, staging, frame_max_bytes=FRAME_MAX, now_us=0)
        self.stripe.start(self.session)
        self._sealer = Sealer(KEY, Suite.AES256GCM)
        self._opener = Opener(KEY, Suite.AES256GCM, FRAME_MAX)

    def sent(self) -> list[bytes]:
        """The frames that have come at the peer, and b"" for the end."""
        self.peer.settimeout(WAIT_S)
        found, data = [], b""
        while piece := self.peer.recv(1 << 20):
            data += piece
        self._opener.max_sealed_bytes = FRAME_MAX + TAG
        while data:
            (length,) = LENGTH.unpack_from(data)
            end = RECORD_HEADER + length
            view = memoryview(bytearray(length))
            count = self._opener.open_into(data[RECORD_HEADER:end], data[:RECORD_HEADER], view)
            found.append(bytes(view[:count]))
            data = data[end:]
        return found

    def write(self) -> None:
        """What the event loop does when the socket becomes writable."""
        watcher: Any = self.stripe._write_watcher
        watcher.callback()

    def record(self, length: int) -> tuple[bytes, bytes]:
        """A frame with so much payload, and its record."""
        content = frame.pack(frame.DATA, 0, 0, 1, 0) + os.urandom(length)
        out = bytearray(len(content) + 64)
        return content, bytes(out[: self._sealer.seal_into(content, memoryview(out))])

    def readable(self, wait_s: float) -> bool:
        return bool(select.select([self.stripe.sock], [], [], wait_s)[0])

    def read(self) -> None:
        """What the event loop does when the socket becomes readable."""
        assert self.readable(WAIT_S)
        watcher: Any = self.stripe._read_watcher
        watcher.callback()


@pytest.fixture
def bench() -> Iterator[Bench]:
    size = arena_size(QUOTA, QUOTA)
    fd = create_arena(size)
    arena = Arena(fd, size, QUOTA, QUOTA)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.create_connection(listener.getsockname())
        sock, _ = listener.accept()
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setblocking(False)
    made = Bench(Memory(arena, FRAME_MAX), sock, peer)
    yield made
    made.stripe.close()
    peer.close()
    arena.close()
    os.close(fd)


def test_stripe_sleeps_until_a_record_is_complete(bench: Bench) -> None:
    first, record = bench.record(100)
    bench.peer.sendall(record)
    bench.read()  # the first record of a stripe is small
    content, record = bench.record(30_000)
    bench.peer.sendall(record[:2000])
    bench.read()
    bench.peer.sendall(record[2000:-1])
    assert not bench.readable(0.05)
    bench.peer.sendall(record[-1:])
    bench.read()
    assert bench.session.frames == [first, content]


def test_stripe_wakes_for_a_small_record_after_a_large_one(bench: Bench) -> None:
    contents = []
    for length in (100, 30_000, 1, 20_000, 0):
        content, record = bench.record(length)
        contents.append(content)
        bench.peer.sendall(record[: len(record) // 2])
        bench.read()
        bench.peer.sendall(record[len(record) // 2 :])
        bench.read()
    assert bench.session.frames == contents


@pytest.mark.parametrize("cut", range(1, RECORD_HEADER + 1))
def test_stripe_wakes_for_the_rest_of_a_record_cut_in_its_length(bench: Bench, cut: int) -> None:
    content, record = bench.record(100)
    for part in (record[:cut], record[cut:]):
        bench.peer.sendall(part)
        bench.read()
    assert bench.session.frames == [content]


def test_stripe_that_is_woken_early_waits_for_less(bench: Bench) -> None:
    """The kernel may wake it for fewer bytes, when its buffer is full; what is still missing counts from then on."""
    first, small = bench.record(100)
    content, record = bench.record(30_000)
    bench.peer.sendall(small + record[:2000])
    bench.read()
    bench.peer.sendall(record[2000:-1])
    deadline = time.monotonic() + WAIT_S
    while bench.stripe._filled < len(record) - RECORD_HEADER - 1 and time.monotonic() < deadline:
        watcher: Any = bench.stripe._read_watcher
        watcher.callback()
    bench.peer.sendall(record[-1:])
    bench.read()
    assert bench.session.frames == [first, content]


def test_stripe_in_the_middle_of_a_record_notices_the_end(bench: Bench) -> None:
    _, small = bench.record(100)
    _, record = bench.record(30_000)
    bench.peer.sendall(small + record[:2000])
    bench.read()
    bench.peer.close()
    bench.read()
    assert bench.session.lost == ["closed by the peer"]


def test_stripe_keeps_no_partial_record_where_others_have_used_up_the_memory(bench: Bench) -> None:
    first, small = bench.record(100)
    bench.peer.sendall(small)
    bench.read()  # proven: large records may follow
    second, another = bench.record(100)
    third, large = bench.record(30_000)
    memory = bench.session.memory
    memory.partial_left = 0
    bench.peer.sendall(another + large[:2000])
    bench.read()
    assert bench.session.frames == [first, second] and bench.stripe._body is None
    assert not bench.readable(0.05), "woken before the rest is there"
    bench.peer.sendall(large[2000:])
    bench.read()
    assert bench.session.frames == [first, second, third] and memory.partial_left == 0


def test_stripe_gives_back_what_a_partial_record_took(bench: Bench) -> None:
    _, small = bench.record(100)
    _, large = bench.record(30_000)
    memory = bench.session.memory
    before = memory.partial_left
    bench.peer.sendall(small + large[:2000])
    bench.read()
    assert memory.partial_left == before - (len(large) - RECORD_HEADER)
    bench.peer.sendall(large[2000:] + bench.record(30_000)[1][:2000])
    bench.read()
    assert memory.partial_left < before
    bench.stripe.close()
    assert memory.partial_left == before


@pytest.mark.parametrize("sent", [b"", b"\0\0\0\0", b"\xff" * 4], ids=["end", "length 0", "length 2^32 - 1"])
def test_stripe_short_of_memory_notices_an_end_and_garbage(bench: Bench, sent: bytes) -> None:
    first, small = bench.record(100)
    bench.session.memory.partial_left = 0
    bench.peer.sendall(small + sent)
    if not sent:
        bench.peer.close()
    bench.read()
    if not bench.session.lost:
        bench.read()
    assert bench.session.frames == [first] and bench.session.lost


MOVE = frame.pack(frame.MOVE, 0, 0, 0, 0)


def test_stripe_that_is_left_says_so_ends_its_direction_and_still_receives(bench: Bench) -> None:
    bench.stripe.send(frame.pack(frame.PING, 0, 0, 0, 1))
    bench.stripe.leave()
    assert bench.sent() == [frame.pack(frame.PING, 0, 0, 0, 1), MOVE]
    assert not bench.stripe.has_room() and not bench.stripe.has_budget
    content, record = bench.record(100)
    bench.peer.sendall(record)
    bench.read()
    bench.stripe.pong(5)
    assert bench.session.frames == [content] and not bench.stripe.closed
    bench.peer.close()
    bench.read()
    assert bench.stripe.in_order and bench.session.lost == ["closed by the peer"]


def test_stripe_that_is_left_with_data_waiting_gives_it_to_the_kernel_first(bench: Bench) -> None:
    bench.stripe.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    content = frame.pack(frame.DATA, 0, 0, 1, 0) + os.urandom(60_000)
    frames = 0
    while bench.stripe.takes_small:
        bench.stripe.send(content)
        bench.stripe.flush()
        frames += 1
    bench.stripe.leave()
    received: list[list[bytes]] = []
    reader = threading.Thread(target=lambda: received.append(bench.sent()))
    reader.start()
    while reader.is_alive():
        if select.select([], [bench.stripe.sock], [], 0.01)[1] and bench.stripe._write_watcher.callback:  # type: ignore[attr-defined]
            bench.write()
    assert received == [[content] * frames + [MOVE]]


def test_stripe_that_ends_without_a_word_did_not_end_in_order(bench: Bench) -> None:
    bench.peer.close()
    bench.read()
    assert bench.stripe.closed and not bench.stripe.in_order
