"""As much of an HTTP server as a scrape takes: one request a connection, GET and HEAD, nothing that waits for a client.

One thread, since what it answers is there already. Ten scrapes a second took 10 ms of CPU time a second with
http.server and a thread for each connection, and 2 ms with this. Everything is bounded: CONNECTIONS_MAX at a time, of
which the oldest goes for a new one; REQUEST_MAX bytes of request; CONNECTION_S for the whole connection, whatever its
client does.

1. `Server.turn` accepts, or hands a connection that is ready to `_go_on`; 2. `_receive` collects the request up to its
empty line; 3. `_respond` looks at its first line and at two of its headers; 4. `_send` gives the response away.
"""

import selectors
import time
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from logging import ERROR
from socket import socket
from typing import NamedTuple, Protocol

from forwarder.logs import log

CONNECTIONS_MAX = 32
CONNECTION_S = 10.0
REQUEST_MAX = 16 << 10
ACCEPT_BURST = 16
TURN_S = 0.5
"""How exactly the end of a connection's time is noticed."""
PAUSE_S = 0.1
"""When accepting fails, for want of descriptors."""
END = b"\r\n\r\n"


class Answer(NamedTuple):
    """A body as it is and, where that pays, compressed."""

    status: HTTPStatus
    kind: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()
    small: bytes | None = None

    def response(self, is_head: bool = False, takes_gzip: bool = False) -> bytes:
        """What goes over the wire."""
        is_small = takes_gzip and self.small is not None
        body = self.small if is_small and self.small is not None else self.body
        lines = [
            f"HTTP/1.1 {self.status.value} {self.status.phrase}",
            "Server: forwarder",
            f"Date: {formatdate(usegmt=True)}",
            "Connection: close",
            "Cache-Control: no-store",
            "X-Content-Type-Options: nosniff",
            f"Content-Type: {self.kind}",
            f"Content-Length: {len(body)}",
            *(f"{name}: {value}" for name, value in self.headers),
        ]
        if is_small:
            lines.append("Content-Encoding: gzip")
        return "\r\n".join(lines).encode() + END + (b"" if is_head else body)


def refusal(status: HTTPStatus, *headers: tuple[str, str]) -> Answer:
    """An answer that has only its status."""
    return Answer(status, "text/plain; charset=utf-8", status.phrase.lower().encode() + b"\n", headers)


class Site(Protocol):
    """What there is to see."""

    def answer(self, path: str, accept: str) -> Answer:
        """What a GET of `path`, without its query, gets from a client that accepts `accept`."""


@dataclass(slots=True, eq=False)
class Connection:
    """`to_send`: what is left of the response. `watched`: for which events, 0 for none yet."""

    sock: socket
    until_s: float
    received: bytearray = field(default_factory=bytearray)
    to_send: memoryview | None = None
    watched: int = 0


class Server:
    """Serves `site` on sockets that listen already, and stay the caller's. `open`: connections at work."""

    def __init__(self, sockets: list[socket], site: Site) -> None:
        self.site = site
        self.open: dict[Connection, None] = {}
        self._sockets = sockets
        self._resume_s = 0.0
        self._selector = selectors.DefaultSelector()
        for sock in sockets:
            sock.setblocking(False)
            self._selector.register(sock, selectors.EVENT_READ)

    def turn(self, patience_s: float) -> None:
        """What has come within so many seconds, at most one wait."""
        if self.open or self._resume_s:
            patience_s = min(patience_s, TURN_S)
        for key, _ in self._selector.select(max(patience_s, 0.0)):
            if key.data is None:
                assert isinstance(key.fileobj, socket)
                self._accept(key.fileobj)
            elif key.data in self.open:
                self._go_on(key.data)
        now = time.monotonic()
        for connection in [each for each in self.open if now >= each.until_s]:
            self._close(connection)
        if self._resume_s and now >= self._resume_s:
            self._resume_s = 0.0
            for sock in self._sockets:
                self._selector.register(sock, selectors.EVENT_READ)

    def close(self) -> None:
        for connection in list(self.open):
            self._close(connection)
        self._selector.close()

    def _accept(self, listener: socket) -> None:
        for _ in range(ACCEPT_BURST):
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, ConnectionError):
                return
            except OSError:  # it would be ready again at once
                self._resume_s = time.monotonic() + PAUSE_S
                for each in self._sockets:
                    self._selector.unregister(each)
                return
            if len(self.open) >= CONNECTIONS_MAX:
                self._close(next(iter(self.open)))  # who means well is served within milliseconds
            sock.setblocking(False)
            connection = Connection(sock, time.monotonic() + CONNECTION_S)
            self.open[connection] = None
            self._go_on(connection)

    def _go_on(self, connection: Connection) -> None:
        try:
            if connection.to_send is None:
                self._receive(connection)
            if connection.to_send is not None:
                self._send(connection)
        except BlockingIOError:
            self._watch(connection)
        except OSError:
            self._close(connection)
        except Exception as error:
            log(ERROR, "a request failed", error=repr(error))
            self._close(connection)

    def _watch(self, connection: Connection) -> None:
        """Most connections never get here: their request is there when they are accepted."""
        events = selectors.EVENT_READ if connection.to_send is None else selectors.EVENT_WRITE
        if not connection.watched:
            self._selector.register(connection.sock, events, connection)
        elif connection.watched != events:
            self._selector.modify(connection.sock, events, connection)
        connection.watched = events

    def _receive(self, connection: Connection) -> None:
        """Raises OSError."""
        received = connection.received
        while connection.to_send is None:
            data = connection.sock.recv(REQUEST_MAX + 1 - len(received))
            if not data:
                raise ConnectionResetError
            received += data
            head, end, _ = bytes(received).partition(END)
            if end:
                connection.to_send = memoryview(self._respond(head))
            elif len(received) > REQUEST_MAX:
                connection.to_send = memoryview(refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE).response())

    def _respond(self, head: bytes) -> bytes:
        first, *lines = head.decode("latin-1").split("\r\n")
        words = first.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1.") or not words[1]:
            return refusal(HTTPStatus.BAD_REQUEST).response()
        method, target, _ = words
        accept = encoding = ""
        for line in lines:
            name, _, value = line.partition(":")
            if name.lower() == "accept":
                accept = value
            elif name.lower() == "accept-encoding":
                encoding = value
        if method not in ("GET", "HEAD"):
            answer = refusal(HTTPStatus.METHOD_NOT_ALLOWED, ("Allow", "GET, HEAD"))
        else:
            answer = self.site.answer(target.partition("?")[0], accept)
        return answer.response(is_head=method == "HEAD", takes_gzip="gzip" in encoding)

    def _send(self, connection: Connection) -> None:
        """Raises OSError."""
        assert connection.to_send is not None
        while connection.to_send:
            sent = connection.sock.send(connection.to_send)
            connection.to_send = connection.to_send[sent:]
        self._close(connection)

    def _close(self, connection: Connection) -> None:
        del self.open[connection]
        if connection.watched:
            self._selector.unregister(connection.sock)
        connection.sock.close()
