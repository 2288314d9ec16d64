"""An acceptor whose listening sockets are replaced."""

import socket
from typing import Any

from workers.io.accept import Acceptor


class Loop:
    """Nothing becomes readable by itself."""

    def io(self, fd: int, events: int) -> "Loop":
        return self

    def start(self, callback: Any, listener: socket.socket) -> None:
        """As a watcher."""

    def stop(self) -> None:
        """As a watcher."""

    close = stop


def listener() -> socket.socket:
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setblocking(False)
    return sock


def test_who_waits_at_a_socket_that_is_replaced_during_a_pause_is_taken_after_it() -> None:
    taken: list[socket.socket] = []
    loop: Any = Loop()
    old, new = listener(), listener()
    acceptor = Acceptor(loop, "web", [old], lambda sock, address: taken.append(sock))
    acceptor.pause()
    with socket.create_connection(old.getsockname()):
        acceptor.resume()
        acceptor.replace([new])
        assert len(taken) == 1
    acceptor.close()
    taken.pop().close()


def test_who_waits_at_a_socket_that_is_replaced_is_taken() -> None:
    taken: list[socket.socket] = []
    loop: Any = Loop()
    old, new = listener(), listener()
    acceptor = Acceptor(loop, "web", [old], lambda sock, address: taken.append(sock))
    waiting = [socket.create_connection(old.getsockname()) for _ in range(3)]
    acceptor.replace([new])
    assert len(taken) == 3 and old.fileno() == -1
    later = socket.create_connection(new.getsockname())
    acceptor._on_connection(new)
    assert len(taken) == 4
    acceptor.close()
    for sock in (*taken, *waiting, later):
        sock.close()
