"""Strangers at a tunnel, on real sockets, with watchers that the test fires itself."""

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from workers.core import frame
from workers.core.errors import RemoteProtocolError
from workers.core.handshake import ClientHandshake, Hello, Mode, WorkerId
from workers.core.noise import Suite
from workers.core.record import Sealer
from workers.io import pending
from workers.io.context import clock_us
from workers.io.pending import Pending, Strangers

KEY_ID = "laptop"
SECRET = bytes(range(32))
TIMEOUT_S = 5.0


class Watcher:
    def start(self, callback: Callable[..., None], *arguments: object) -> None:
        pass

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass


class Loop:
    made = 0

    def io(self, fd: int, events: int) -> Watcher:
        self.made += 1
        return Watcher()


class Tunnel:
    """A door with one key, for one tunnel."""

    name = "web"

    def __init__(self) -> None:
        self.proven: list[tuple[Pending, bytes, bytes]] = []
        self.context: Any = SimpleNamespace(
            loop=Loop(),
            settings=SimpleNamespace(suite="aes256gcm"),
            boot_id=1,
            slot=0,
            gone=[],
            roster_ids=lambda: (WorkerId(0, 5),),
        )

    def find_key(self, key_id: str) -> tuple[int, bytes] | None:
        return (0, SECRET) if key_id == KEY_ID else None

    def check_hello(self, stranger: Pending, hello: Hello) -> bool | None:
        if hello.tunnel != self.name:
            raise RemoteProtocolError("another tunnel")
        return False

    def on_proven(self, stranger: Pending, hello: Hello, first: memoryview, leftover: bytes) -> None:
        self.proven.append((stranger, bytes(first), leftover))
        stranger.sock.close()


class Street:
    """Strangers and their own ends of the connections."""

    def __init__(self) -> None:
        self.tunnel = Tunnel()
        self.strangers = Strangers(self.tunnel, TIMEOUT_S)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._theirs: list[socket.socket] = []

    def arrive(self, sent: bytes = b"", address: str = "192.0.2.1") -> socket.socket:
        """A stranger's end, once the server has accepted the other and `sent` is there."""
        theirs = socket.create_connection(self._listener.getsockname())
        self._theirs.append(theirs)
        theirs.settimeout(5)
        theirs.sendall(sent)
        self.strangers.admit(self._listener.accept()[0], address)
        return theirs

    def close(self) -> None:
        self.strangers.close()
        for sock in (*self._theirs, self._listener):
            sock.close()


@pytest.fixture
def street() -> Iterator[Street]:
    made = Street()
    yield made
    made.close()


def handshake(secret: bytes = SECRET, tunnel: str = "web") -> ClientHandshake:
    hello = Hello(1, 2, 0, 0, tunnel, (WorkerId(0, 77),))
    return ClientHandshake(KEY_ID, secret, Suite.AES256GCM, Mode.STRIPE, hello, ephemeral_private=os.urandom(32))


def is_open(sock: socket.socket) -> bool:
    """And without a byte for the stranger."""
    sock.setblocking(False)
    try:
        sock.recv(1)
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False
    pytest.fail("a byte, or an end without a reset")


def test_client_who_proves_himself_is_handed_over(street: Street) -> None:
    client = handshake()
    theirs = street.arrive(client.message_to_send)
    assert client.receive(theirs.recv(1024)) is not None
    record = memoryview(bytearray(1024))
    ping = frame.pack(frame.PING, 0, 0, 0, 5)
    length = Sealer(client.split()[0], Suite.AES256GCM).seal_into(ping, record)
    stranger = street.strangers._answered.oldest
    assert stranger is not None and len(street.strangers) == 1
    theirs.sendall(bytes(record[:length]) + b"more")
    street.strangers.on_readable(stranger)
    assert street.tunnel.proven == [(stranger, ping, b"more")]
    assert not len(street.strangers) and not street.strangers.refused


@pytest.mark.parametrize(
    "sent",
    [b"GET / HTTP/1.1", handshake(bytes(32)).message_to_send, handshake(tunnel="ssh").message_to_send],
    ids=["another protocol", "a wrong key", "another tunnel"],
)
def test_refused_stranger_is_silently_held_until_the_deadline(street: Street, sent: bytes) -> None:
    theirs = street.arrive(sent)
    assert street.strangers.refused == 1 and len(street.strangers) == 1
    street.strangers.on_time(clock_us() + int(0.9 * TIMEOUT_S * 1e6))
    assert is_open(theirs)
    street.strangers.on_time(clock_us() + int(TIMEOUT_S * 1e6))
    assert not is_open(theirs) and not len(street.strangers)


def test_refused_handshakes_are_told_of_once_in_a_while(street: Street, caplog: pytest.LogCaptureFixture) -> None:
    now_us = clock_us()
    with caplog.at_level(logging.INFO, "forwarder.server"):
        street.strangers.on_time(now_us)
        assert not caplog.messages
        street.arrive(handshake(bytes(32)).message_to_send)
        street.strangers.on_time(now_us)
        (line,) = caplog.messages
        assert line.startswith("handshakes refused tunnel=web count=1 peer=") and "reason=" in line
        for _ in range(2):
            street.arrive(handshake(bytes(32)).message_to_send)
        street.strangers.on_time(now_us + pending.TELL_US - 1)
        assert len(caplog.messages) == 1
        street.strangers.on_time(now_us + pending.TELL_US)
        assert "count=2" in caplog.messages[1]
        street.strangers.on_time(now_us + 3 * pending.TELL_US)
        assert len(caplog.messages) == 2


def test_refused_strangers_make_no_watcher(street: Street) -> None:
    street.arrive(handshake(bytes(32)).message_to_send)
    assert not street.tunnel.context.loop.made
    street.arrive()
    assert street.tunnel.context.loop.made == 1


def test_message_1_is_answered_once(street: Street) -> None:
    message = handshake().message_to_send
    first, second = street.arrive(message), street.arrive(message)
    assert first.recv(1024) and is_open(second)
    assert street.strangers.refused == 1


def test_oldest_goes_when_an_address_has_too_many(street: Street, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "MAX_PENDING_PER_ADDRESS", 3)
    other = street.arrive(address="192.0.2.2")
    silent = [street.arrive() for _ in range(5)]
    assert [is_open(sock) for sock in silent] == [False, False, True, True, True] and is_open(other)


def test_oldest_goes_when_all_have_too_many(street: Street, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "MAX_PENDING", 3)
    silent = [street.arrive(address=f"192.0.2.{number}") for number in range(5)]
    assert [is_open(sock) for sock in silent] == [False, False, True, True, True]


def test_silent_and_refused_strangers_do_not_push_out_who_was_answered(
    street: Street, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cap in ("MAX_PENDING", "MAX_PENDING_PER_ADDRESS", "MAX_REFUSED"):
        monkeypatch.setattr(pending, cap, 2)
    client = handshake()
    theirs = street.arrive(client.message_to_send)
    for _ in range(5):
        street.arrive()
        street.arrive(handshake(bytes(32)).message_to_send)
    assert client.receive(theirs.recv(1024)) is not None and is_open(theirs)
    assert len(street.strangers) == 5


def test_who_dribbles_is_reset_at_the_deadline(street: Street) -> None:
    message = handshake().message_to_send
    theirs = street.arrive(message[:1])
    stranger = street.strangers._silent.oldest
    assert stranger is not None
    for place in range(1, 20):
        theirs.sendall(message[place : place + 1])
        street.strangers.on_readable(stranger)
    street.strangers.on_time(clock_us() + int(TIMEOUT_S * 1e6))
    assert not is_open(theirs)


def test_who_leaves_is_forgotten(street: Street) -> None:
    theirs = street.arrive()
    stranger = street.strangers._silent.oldest
    assert stranger is not None
    with contextlib.closing(theirs):
        pass
    street.strangers.on_readable(stranger)
    assert not len(street.strangers)


def test_time_for_strangers_is_limited_and_comes_back(street: Street, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "WORK_US", 1)
    street.strangers.on_time(clock_us())
    while street.strangers.has_time:
        street.arrive(b"x")
    for _ in range(1_000_000):
        if street.strangers.has_time:
            break
        street.strangers.on_time(clock_us())
    assert street.strangers.has_time
