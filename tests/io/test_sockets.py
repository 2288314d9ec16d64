"""What the kernel tells of a real connection over loopback."""

import socket
import sys
import time
from collections.abc import Iterator

import pytest

from workers.io import sockets

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells")
WAIT_S = 5.0


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 10)
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    with near, far:
        near.setblocking(False)
        yield near, far


def fill(sock: socket.socket) -> int:
    """How much the kernel took until it took no more."""
    total = 0
    try:
        while True:
            total += sock.send(bytes(64 << 10))
    except BlockingIOError:
        return total


def becomes_clear(sock: socket.socket) -> bool:
    until_s = time.monotonic() + WAIT_S
    while not (clear := sockets.is_clear(sock)) and time.monotonic() < until_s:
        time.sleep(0.01)
    return clear


def test_connection_is_clear_unless_something_waits_in_the_kernel(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    assert sockets.is_clear(near)
    total = fill(near)
    assert sockets.unsent_bytes(near) > 0
    assert not sockets.is_clear(near)
    received = 0
    while received < total:
        received += len(far.recv(1 << 20))
    assert becomes_clear(near)


def test_full_window_is_not_clear(pair: tuple[socket.socket, socket.socket]) -> None:
    """A window of BBR's PROBE_RTT that is full: what is written now waits, although nothing does yet."""
    near, _ = pair
    raw = bytearray(near.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 168))
    raw[24:28] = raw[80:84] = (4).to_bytes(4, sys.byteorder)

    class Told(socket.socket):
        def getsockopt(self, *_: object) -> bytes:  # type: ignore[override]
            return bytes(raw)

    with Told(socket.AF_INET, socket.SOCK_STREAM) as told:
        assert not sockets.is_clear(told)
        raw[24] = 3
        assert sockets.is_clear(told)
        raw[1] = 1
        assert not sockets.is_clear(told), "a hole"


def test_closed_socket_is_not_clear(pair: tuple[socket.socket, socket.socket]) -> None:
    near, _ = pair
    near.close()
    assert not sockets.is_clear(near)


def test_application_that_vanishes_is_noticed(pair: tuple[socket.socket, socket.socket]) -> None:
    near, _ = pair
    sockets.prepare_application(near)
    assert near.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    idle, interval, probes = (
        near.getsockopt(socket.IPPROTO_TCP, option)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    )
    assert idle >= 60 and idle + interval * probes == 300


def test_application_on_a_unix_socket_needs_no_keepalive() -> None:
    near, far = socket.socketpair()
    with near, far:
        sockets.prepare_application(near)
        assert not near.getblocking()
