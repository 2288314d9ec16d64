"""The control socket: one JSON object a line in, one JSON object a line out.

Server side: never waits for a client. Everything is bounded: clients, a request's size, one request at a time each.
"""

import contextlib
import json
import os
import selectors
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

CLIENTS_MAX = 16
REQUEST_MAX = 65536
REPLY_MAX = 256 << 20
READ_BYTES = 65536
CONNECT_RETRY_S = 0.01

Message = dict[str, Any]


class ControlError(Exception):
    """Nobody answers at that socket, or not as agreed: one line."""


class ControlRefused(ControlError):
    """The instance is another user's."""


def request(path: Path, message: Message, timeout_s: float) -> Message:
    """Sends one request to the running instance and returns its answer. Raises ControlError.

    `stop` returns when the instance has exited. The answer's key "error" says what the instance did not like.
    """
    deadline = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            _connect(sock, path, deadline)
            sock.sendall(json.dumps(message).encode() + b"\n")
            line = _read_line(sock, deadline)
            if message.get("command") == "stop" and b'"error"' not in line:
                _await_end(sock, deadline)
        except (FileNotFoundError, ConnectionRefusedError):
            raise ControlError(f"no instance is running (control socket {path})") from None
        except PermissionError:
            raise ControlRefused(f"control socket {path}: permission denied") from None
        except TimeoutError:
            raise ControlError(f"no answer within {timeout_s:g} s (control socket {path})") from None
        except OSError as error:
            raise ControlError(f"control socket {path}: {error.strerror or error}") from None
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise ControlError(f"control socket {path}: expected a line of JSON, found {line[:80]!r}")
    return answer


def _connect(sock: socket.socket, path: Path, deadline: float) -> None:
    """Waits also while the instance has not taken up those before us."""
    while True:
        sock.settimeout(_left(deadline))
        try:
            sock.connect(os.fspath(path))
            return
        except BlockingIOError:
            time.sleep(CONNECT_RETRY_S)


def _read_line(sock: socket.socket, deadline: float) -> bytes:
    data = bytearray()
    while not data.endswith(b"\n"):
        sock.settimeout(_left(deadline))
        chunk = sock.recv(READ_BYTES)
        if not chunk or len(data) > REPLY_MAX:
            break
        data += chunk
    return bytes(data)


def _await_end(sock: socket.socket, deadline: float) -> None:
    with contextlib.suppress(ConnectionError):
        while True:
            sock.settimeout(_left(deadline))
            if not sock.recv(READ_BYTES):
                return


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class Client:
    """One connection to the control socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = bytearray()
        self.to_send = b""
        self.asked = False  # a request is being worked on: nothing more is read
        self.ending = False  # close once everything is sent
        self.staying = False  # open until the process ends
        self.closed = False
        self.in_turn = False  # `_serve` is at work on it
        self.active_s = time.monotonic()

    @property
    def busy(self) -> bool:
        return self.asked or self.staying


class ControlServer:
    """Accepts clients, cuts their input into requests and gives each to `handle`, which answers now or later."""

    def __init__(
        self,
        path: Path,
        listener: socket.socket,
        selector: selectors.BaseSelector,
        handle: Callable[[Client, Message], None],
    ) -> None:
        """Owns `listener`. `handle` calls `reply` once for each request."""
        self._path = path
        self._listener = listener
        self._inode = 0
        with contextlib.suppress(FileNotFoundError):  # somebody may have removed it before an upgrade
            self._inode = path.stat().st_ino
        self._selector = selector
        self._handle = handle
        self._clients: list[Client] = []
        selector.register(listener, selectors.EVENT_READ, lambda _: self._accept())

    def reply(self, client: Client, message: Message, stay: bool = False) -> None:
        """Answers the request in work. stay: the end of the connection will tell that the process has ended."""
        if client.closed:
            return
        client.asked = False
        client.staying = client.staying or stay
        client.to_send += msgspec.json.encode(message) + b"\n"
        if not client.in_turn:
            self._serve(client)

    @property
    def path(self) -> Path:
        return self._path

    def fileno(self) -> int:
        """The listening socket's."""
        return self._listener.fileno()

    @property
    def idle(self) -> bool:
        """Whether nobody waits for an answer."""
        return not any(client.asked or client.to_send for client in self._clients)

    def close(self) -> None:
        """Removes the socket from the file system; clients that stay are left to the end of the process."""
        self._selector.unregister(self._listener)
        with contextlib.suppress(OSError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()
        self._listener.close()
        for client in list(self._clients):
            if not client.staying:
                self._close(client)

    def close_in_child(self) -> None:
        self._listener.close()
        for client in self._clients:
            client.sock.close()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        if len(self._clients) >= CLIENTS_MAX:
            idle = [client for client in self._clients if not client.busy]
            if not idle:
                sock.close()
                return
            self._close(min(idle, key=lambda client: client.active_s))
        client = Client(sock)
        self._clients.append(client)
        self._selector.register(sock, selectors.EVENT_READ, lambda events: self._on_ready(client, events))

    def _on_ready(self, client: Client, events: int) -> None:
        if client.closed:
            return
        client.active_s = time.monotonic()
        if events & selectors.EVENT_READ:
            self._read(client)
        self._serve(client)

    def _read(self, client: Client) -> None:
        try:
            data = client.sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self._close(client)
            return
        if data and not client.staying:
            client.received += data
        elif not data:
            client.ending = True

    def _serve(self, client: Client) -> None:
        """Sends what it can, and takes up the next request when the last answer has gone."""
        client.in_turn = True
        while not client.closed:
            self._send(client)
            end = client.received.find(b"\n")
            if client.closed or client.to_send or client.asked or end < 0:
                break
            line = bytes(client.received[:end])
            del client.received[: end + 1]
            client.asked = True
            self._take(client, line)
        client.in_turn = False
        if not client.closed and not client.to_send and not client.asked:
            self._finish(client)
        if not client.closed:
            self._watch(client)

    def _finish(self, client: Client) -> None:
        """No whole request is left: closes if none can follow."""
        if len(client.received) > REQUEST_MAX:
            client.ending = True
            client.to_send = b'{"error": "expected a line of at most %d bytes"}\n' % REQUEST_MAX
            client.received.clear()
            self._send(client)
        if client.ending and not client.to_send and not client.closed:
            self._close(client)

    def _take(self, client: Client, line: bytes) -> None:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if isinstance(message, dict):
            self._handle(client, message)
        else:
            self.reply(client, {"error": "expected one JSON object a line"})

    def _send(self, client: Client) -> None:
        if not client.to_send:
            return
        try:
            sent = client.sock.send(client.to_send)
        except BlockingIOError:
            return
        except OSError:
            self._close(client)
            return
        client.to_send = client.to_send[sent:]

    def _watch(self, client: Client) -> None:
        """Reads only while there is nothing to answer, so that input stays bounded."""
        events = 0
        if client.to_send:
            events |= selectors.EVENT_WRITE
        elif not client.asked and not client.ending:
            events |= selectors.EVENT_READ
        registered = client.sock.fileno() in self._selector.get_map()
        data = lambda ready: self._on_ready(client, ready)  # noqa: E731
        if events and registered:
            self._selector.modify(client.sock, events, data)
        elif events:
            self._selector.register(client.sock, events, data)
        elif registered:
            self._selector.unregister(client.sock)

    def _close(self, client: Client) -> None:
        client.closed = True
        if client.sock.fileno() in self._selector.get_map():
            self._selector.unregister(client.sock)
        client.sock.close()
        self._clients.remove(client)
