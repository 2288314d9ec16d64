"""What an application is given at once, on a socket that takes all."""

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.io.small_loop import WRITE, SmallLoop
from workers.io.endpoint import DELIVER_BYTES, Endpoint, ResetWatch
from workers.io.memory import Memory, Piece
from workers.shm.arena import Arena, Side, arena_size
from workers.shm.segments import create_arena

FRAME_MAX = 64 << 10
QUOTA = 16 << 20


class Greedy(socket.socket):
    """Takes all that it is given."""

    calls: list[bytes]

    def send(self, data: Any, flags: int = 0) -> int:
        return self.sendmsg([data])

    def sendmsg(self, buffers: Any, *rest: Any) -> int:
        self.calls.append(b"".join(buffers))
        return len(self.calls[-1])


class Owner:
    def __init__(self) -> None:
        self.consumed = self.frames = 0

    def on_readable(self, endpoint: Endpoint) -> None: ...

    def on_application_reset(self, endpoint: Endpoint) -> None: ...

    def on_consumed(self, endpoint: Endpoint, length: int, frames: int) -> None:
        self.consumed += length
        self.frames += frames


class Place:
    """An endpoint with its application."""

    def __init__(self) -> None:
        size = arena_size(QUOTA, QUOTA)
        self._fd = create_arena(size)
        self.memory = Memory(Arena(self._fd, size, QUOTA, QUOTA), FRAME_MAX)
        self.loop = SmallLoop()
        self.owner = Owner()
        near, self.far = socket.socketpair()
        self.sock = Greedy(fileno=near.detach())
        self.sock.calls = []
        stream: Any = None
        self.endpoint = Endpoint(self.owner, stream, self.memory, ResetWatch(self.loop))
        self.endpoint.attach(self.loop, self.sock)

    def deliver(self, data: bytes) -> None:
        slot = self.memory.copy_in(data, Side.INGRESS)
        assert slot >= 0
        self.endpoint.deliver(Piece(None, slot, self.memory.arena.view(slot, len(data))))

    def close(self) -> None:
        self.endpoint.close()
        self.far.close()
        self.memory.arena.close()
        os.close(self._fd)

    def given(self) -> bytes:
        """What the application got since this was asked last."""
        calls = self.sock.calls
        data = b"".join(calls)
        calls.clear()
        return data


@pytest.fixture
def place() -> Iterator[Place]:
    place = Place()
    yield place
    place.close()


@pytest.mark.parametrize("piece_bytes", [FRAME_MAX, 1000, FRAME_MAX // 3], ids=["long", "short", "odd"])
def test_what_waited_is_given_in_several_turns(place: Place, piece_bytes: int) -> None:
    whole = os.urandom(3 * DELIVER_BYTES // piece_bytes * piece_bytes)
    for start in range(0, len(whole), piece_bytes):
        place.deliver(whole[start : start + piece_bytes])
    place.endpoint.flush()
    turns = [place.given()]
    while place.loop.active(WRITE):
        place.loop.turn()
        turns.append(place.given())
    assert b"".join(turns) == whole
    assert len(turns) >= 3
    assert all(len(each) < DELIVER_BYTES + piece_bytes for each in turns)
    assert (place.owner.consumed, place.owner.frames) == (len(whole), len(whole) // piece_bytes)


def test_what_comes_meanwhile_waits_for_its_turn(place: Place) -> None:
    pieces = [os.urandom(FRAME_MAX) for _ in range(2 * DELIVER_BYTES // FRAME_MAX)]
    for each in pieces:
        place.deliver(each)
    place.endpoint.flush()
    first = place.given()
    assert place.endpoint.send_now(memoryview(b"later")) is None
    place.deliver(b"last")
    place.endpoint.flush()
    assert not place.given()
    rest = b""
    while place.loop.active(WRITE):
        place.loop.turn()
        rest += place.given()
    assert first + rest == b"".join(pieces) + b"last"
    assert place.endpoint.send_now(memoryview(b"now")) == 3


def test_small_piece_in_front_of_long_ones_makes_no_longer_turn(place: Place) -> None:
    place.deliver(b"s" * 100)
    for _ in range(3 * DELIVER_BYTES // FRAME_MAX):
        place.deliver(bytes(FRAME_MAX))
    place.endpoint.flush()
    assert len(place.given()) < DELIVER_BYTES + FRAME_MAX


def test_end_of_the_other_direction_follows_the_last_portion(place: Place) -> None:
    for _ in range(2 * DELIVER_BYTES // FRAME_MAX):
        place.deliver(bytes(FRAME_MAX))
    place.endpoint.end()
    place.endpoint.flush()
    place.far.setblocking(False)
    with pytest.raises(BlockingIOError):
        place.far.recv(1)
    while place.loop.active(WRITE):
        place.loop.turn()
    assert place.far.recv(1) == b""
    assert place.owner.consumed == 2 * DELIVER_BYTES


def test_what_waits_for_its_turn_is_freed_with_the_connection(place: Place) -> None:
    for _ in range(2 * DELIVER_BYTES // FRAME_MAX):
        place.deliver(bytes(FRAME_MAX))
    place.endpoint.flush()
    place.endpoint.close()
    assert not place.loop.active(WRITE)
    assert place.memory.arena.used_bytes(Side.INGRESS) == 0


def test_little_is_given_at_once(place: Place) -> None:
    for each in (b"a", b"bc", b"def"):
        place.deliver(each)
    place.endpoint.flush()
    assert place.sock.calls == [b"abcdef"]
    assert not place.loop.active(WRITE)
