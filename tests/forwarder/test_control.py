"""The control socket: requests in pieces, many at once, malformed ones, and clients that leave."""

import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forwarder.control import CLIENTS_MAX, REQUEST_MAX, Client, ControlError, ControlServer, Message, request
from forwarder.instance import take_control_socket


class Office:
    """A ControlServer without an instance behind it: `echo` is answered at once, `later` when the test says so."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.selector = selectors.DefaultSelector()
        listener, _ = take_control_socket(path)
        self.server = ControlServer(path, listener, self.selector, self.handle)
        self.later: list[Client] = []

    def handle(self, client: Client, message: Message) -> None:
        match message.get("command"):
            case "later":
                self.later.append(client)
            case "stop":
                self.server.reply(client, {"stopping": True}, stay=True)
            case "large":
                self.server.reply(client, {"data": "x" * 3_000_000})
            case _:
                self.server.reply(client, {"echo": message})

    def pump(self) -> None:
        """Turns until nothing more happens."""
        while ready := self.selector.select(0):
            for key, events in ready:
                key.data(events)

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(os.fspath(self.path))
        sock.settimeout(0.2)
        self.pump()
        return sock

    def ask(self, sock: socket.socket, data: bytes) -> bytes:
        sock.sendall(data)
        self.pump()
        return sock.recv(1 << 20)


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    made = Office(tmp_path / "deep" / "er" / "control.sock")
    yield made
    if made.path.exists():
        made.server.close()
    made.selector.close()


def is_closed(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True
    except BlockingIOError:
        return False


def test_request_byte_by_byte_is_answered_once_whole(office: Office) -> None:
    sock = office.connect()
    for byte in b'{"a": 1}':
        sock.send(bytes([byte]))
        office.pump()
    assert office.ask(sock, b"\n") == b'{"echo":{"a":1}}\n'
    assert office.ask(sock, b"{}\n") == b'{"echo":{}}\n'


def test_requests_in_one_packet_are_answered_in_order(office: Office) -> None:
    sock = office.connect()
    assert office.ask(sock, b'{"n":1}\n{"n":2}\n{"n"') == b'{"echo":{"n":1}}\n{"echo":{"n":2}}\n'


def test_thousands_of_requests_at_once_are_answered_without_recursion(office: Office) -> None:
    sock = office.connect()
    sock.sendall(b"{}\n" * 20_000)
    received = bytearray()
    while len(received) < 20_000 * 12:
        office.pump()
        received += sock.recv(1 << 20)
    assert received == b'{"echo":{}}\n' * 20_000


@pytest.mark.parametrize("line", [b"", b"[]", b"1", b"\xff", b'{"a":', b"[" * 60_000])
def test_line_that_is_no_object_is_an_error_and_the_client_stays(office: Office, line: bytes) -> None:
    sock = office.connect()
    assert b"expected one JSON object a line" in office.ask(sock, line + b"\n")
    assert office.ask(sock, b"{}\n") == b'{"echo":{}}\n'


def test_endless_line_is_an_error_and_the_end(office: Office) -> None:
    sock = office.connect()
    sock.sendall(b"x" * (REQUEST_MAX + 1))
    office.pump()
    assert b"error" in sock.recv(1000)
    assert is_closed(sock)


def test_half_closed_client_still_gets_its_answer(office: Office) -> None:
    sock = office.connect()
    sock.sendall(b'{"command":"later"}\n')
    sock.shutdown(socket.SHUT_WR)
    office.pump()
    office.server.reply(office.later[0], {"late": True})
    office.pump()
    assert sock.recv(100) == b'{"late":true}\n'
    assert is_closed(sock)


def test_client_that_left_before_its_answer_is_forgotten(office: Office) -> None:
    sock = office.connect()
    sock.sendall(b'{"command":"later"}\n')
    office.pump()
    sock.close()
    office.pump()
    office.server.reply(office.later[0], {})
    office.pump()
    assert office.ask(office.connect(), b"{}\n") == b'{"echo":{}}\n'
    assert list(office.selector.get_map()) != []


def test_client_that_waits_for_an_answer_is_not_read(office: Office) -> None:
    sock = office.connect()
    sock.sendall(b'{"command":"later"}\n')
    office.pump()
    sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        for _ in range(10_000):
            sock.send(b"x" * 10_000)
    office.pump()
    assert len(office.later[0].received) == 0


def test_client_that_does_not_read_is_served_as_it_can_take_it(office: Office) -> None:
    sock = office.connect()
    sock.sendall(b'{"command":"large"}\n{"n":1}\n')
    office.pump()
    assert office.ask(office.connect(), b"{}\n") == b'{"echo":{}}\n'
    received = bytearray()
    while not received.endswith(b'{"echo":{"n":1}}\n'):
        received += sock.recv(1 << 20)
        office.pump()
    assert len(received) > 3_000_000


def test_one_client_too_many_displaces_the_idlest(office: Office) -> None:
    busy = office.connect()
    busy.sendall(b'{"command":"later"}\n')
    office.pump()
    idle = [office.connect() for _ in range(CLIENTS_MAX - 1)]
    assert office.ask(idle[0], b"{}\n")
    newcomer = office.connect()
    assert office.ask(newcomer, b"{}\n") == b'{"echo":{}}\n'
    assert is_closed(idle[1])
    assert not is_closed(idle[0]) and not is_closed(busy)


def test_when_all_clients_are_busy_a_newcomer_is_refused(office: Office) -> None:
    busy = [office.connect() for _ in range(CLIENTS_MAX)]
    for sock in busy:
        sock.sendall(b'{"command":"later"}\n')
        office.pump()
    assert is_closed(office.connect())
    assert not any(is_closed(sock) for sock in busy)


def test_close_removes_the_socket_and_leaves_who_waits_for_the_end(office: Office) -> None:
    stopping, other = office.connect(), office.connect()
    assert office.ask(stopping, b'{"command":"stop"}\n') == b'{"stopping":true}\n'
    office.server.close()
    assert not office.path.exists() and office.path.parent.is_dir()
    assert is_closed(other) and not is_closed(stopping)


def test_close_leaves_a_successors_socket(office: Office) -> None:
    office.path.unlink()
    successor = socket.socket(socket.AF_UNIX)
    successor.bind(os.fspath(office.path))
    office.server.close()
    assert office.path.exists()
    office.path.unlink()


class TestRequest:
    """The client's side, against one canned peer."""

    @staticmethod
    def serve(path: Path, answer: bytes, stay_s: float = 0.0) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(os.fspath(path))
        listener.listen()

        def once() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(1000)
                peer.sendall(answer)
                time.sleep(stay_s)

        threading.Thread(target=once, daemon=True).start()

    def ask(self, path: Path, command: str = "status", timeout_s: float = 5.0) -> dict[str, Any]:
        return request(path, {"command": command}, timeout_s)

    def test_answer_in_a_line(self, tmp_path: Path) -> None:
        self.serve(tmp_path / "s", json.dumps({"data": "x" * 300_000}).encode() + b"\n")
        assert len(self.ask(tmp_path / "s")["data"]) == 300_000

    def test_nobody_there(self, tmp_path: Path) -> None:
        with pytest.raises(ControlError, match="no instance is running"):
            self.ask(tmp_path / "s")

    def test_socket_without_a_process(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(os.fspath(tmp_path / "s"))
        with pytest.raises(ControlError, match="no instance is running"):
            self.ask(tmp_path / "s")

    @pytest.mark.parametrize("answer", [b"", b"[]\n", b'{"half"', b"\xff\n", b"[" * 9999])
    def test_answer_that_is_none(self, tmp_path: Path, answer: bytes) -> None:
        self.serve(tmp_path / "s", answer)
        with pytest.raises(ControlError, match="expected a line of JSON"):
            self.ask(tmp_path / "s")

    def test_silence(self, tmp_path: Path) -> None:
        self.serve(tmp_path / "s", b"{", stay_s=2)
        with pytest.raises(ControlError, match=r"no answer within 0\.1 s"):
            self.ask(tmp_path / "s", timeout_s=0.1)

    def test_stop_waits_for_the_end(self, tmp_path: Path) -> None:
        self.serve(tmp_path / "s", b'{"stopping":true}\n', stay_s=0.3)
        began = time.monotonic()
        assert self.ask(tmp_path / "s", "stop") == {"stopping": True}
        assert time.monotonic() - began >= 0.3
