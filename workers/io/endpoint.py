"""An application's connection: the socket at the end of a stream.

The socket carries SO_LINGER 0 until both directions have finished, so whatever ends it before that is a reset to the
application. It is read only when a path has room (`read_into`, called from the session's pump): data stays in the
kernel, where the application's own TCP is slowed down by it, until a path is there to take it.
"""

import select
import socket
from collections import deque
from typing import Any, Protocol

from workers.core.stream import Stream
from workers.io import sockets
from workers.io.memory import Memory, Piece

READ, WRITE = 1, 2
MAX_VIEWS = 64
"""Slots handed to one sendmsg (UIO_MAXIOV is 1024; more than these no longer lower the cost)."""
DELIVER_BYTES = 1 << 20
"""Given to the application in one turn of the event loop: 2 ms. What waited behind a lost frame may be all of the
stream's credit, and requests on other streams would wait for 13 ms."""


class EndpointOwner(Protocol):
    """The session of an endpoint's stream."""

    def on_readable(self, endpoint: "Endpoint") -> None:
        """The application sent something, or ended its direction."""

    def on_consumed(self, endpoint: "Endpoint", length: int, frames: int) -> None:
        """The application's socket took `frames` whole pieces, `length` bytes."""

    def on_application_reset(self, endpoint: "Endpoint") -> None:
        """The application's connection broke."""


class Endpoint:
    """Owns the socket from `attach` on. Pieces delivered before that wait.

    `expected_bytes`: what the application may have for the next frame, by what it had for the last.
    """

    __slots__ = (
        "_closing_gently",
        "_memory",
        "_out",
        "_owner",
        "_peer_done",
        "_read_done",
        "_read_watcher",
        "_reading",
        "_shut",
        "_watch",
        "_write_watcher",
        "_writing",
        "closed",
        "dirty",
        "expected_bytes",
        "sock",
        "stream",
    )

    def __init__(self, owner: EndpointOwner, stream: Stream, memory: Memory, watch: "ResetWatch") -> None:
        self._owner = owner
        self._memory = memory
        self._watch = watch
        self.stream = stream
        self.sock: socket.socket | None = None
        self.closed = False
        self.dirty = False
        self.expected_bytes = 0
        self._out: deque[Piece] = deque()
        self._read_watcher: Any = None
        self._write_watcher: Any = None
        self._reading = self._writing = False
        self._read_done = self._peer_done = self._shut = False

    def attach(self, loop: Any, sock: socket.socket) -> None:
        """Take over a connected socket, prepared by `sockets.prepare_application`."""
        self.sock = sock
        self._read_watcher = loop.io(sock.fileno(), READ)
        self._write_watcher = loop.io(sock.fileno(), WRITE)
        self._watch.add(self)
        self.resume()
        self.flush()

    # From the application

    def resume(self) -> None:
        """Watch for bytes."""
        if not self._reading and not self._read_done and self._read_watcher is not None:
            self._reading = True
            self._read_watcher.start(self._on_readable)

    def pause(self) -> None:
        """Bytes wait for room or credit: stop watching, since the watcher would fire all the time."""
        if self._reading:
            self._reading = False
            self._read_watcher.stop()

    def _on_readable(self) -> None:
        self._owner.on_readable(self)

    def read_into(self, view: memoryview) -> int:
        """Bytes read; 0 at the end of the application's direction, -1 for nothing now. Raises OSError."""
        assert self.sock is not None
        try:
            count = self.sock.recv_into(view)
        except BlockingIOError:
            return -1
        if not count:
            self.pause()
            self._read_done = True
            self._close_if_done()
        return count

    # To the application

    def deliver(self, piece: Piece) -> None:
        """Queue payload; `flush` sends it."""
        self._out.append(piece)

    def send_now(self, view: memoryview) -> int | None:
        """Give the socket bytes that stand in no piece; how many it took, -1 for an error. None: what came before them
        waits to be sent.

        `view` may be a buffer that is used again. What is consumed is the caller's to count.
        """
        sock = self.sock
        if self._out or self._writing or sock is None or self.closed:
            return None
        try:
            return sock.send(view)
        except BlockingIOError:
            return 0
        except OSError:
            return -1

    def end(self) -> None:
        """The peer's direction ends after what was delivered."""
        self._peer_done = True

    def flush(self) -> None:
        """Send what is queued, as far as the socket takes it."""
        self.dirty = False
        if self.sock is None or self.closed or self._writing:
            return
        out, budget = self._out, DELIVER_BYTES
        while out and budget > 0:
            views: list[memoryview] = []
            for piece in out:
                views.append(piece.view)
                budget -= len(piece.view)
                if budget <= 0 or len(views) == MAX_VIEWS:
                    break
            try:
                sent = self.sock.send(views[0]) if len(views) == 1 else self.sock.sendmsg(views)
            except BlockingIOError:
                sent = 0
            except OSError:
                self.fail()
                return
            if not self._consume(sent, len(views)):
                self._await_turn()
                return
            if self.closed:
                return
        if out:
            self._await_turn()
            return
        if self._peer_done and not self._shut:
            self._shut = True
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError:
                self.fail()
                return
            self._close_if_done()

    def _await_turn(self) -> None:
        self._writing = True
        self._write_watcher.start(self._on_writable)

    def _consume(self, sent: int, offered: int) -> bool:
        """Free what was sent of so many pieces; False if the socket took less than it was offered.

        Only whole pieces count as consumed: what is left of a piece still occupies its slot.
        """
        out, left, freed, frames = self._out, sent, 0, 0
        while frames < offered:
            piece = out[0]
            size = len(piece.view)
            if size > left:
                if left:
                    piece.view = piece.view[left:]
                break
            left -= size
            freed += piece.length
            out.popleft()
            self._memory.free(piece)
            frames += 1
        if frames:
            self._owner.on_consumed(self, freed, frames)
        return frames == offered

    def _on_writable(self) -> None:
        self._writing = False
        self._write_watcher.stop()
        self.flush()

    # The end

    def check(self) -> None:
        """The kernel reported something on the socket: find out whether it was reset."""
        if self.closed or self.sock is None:
            return
        if self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.fail()

    def fail(self) -> None:
        """The application's connection broke."""
        self._owner.on_application_reset(self)

    def _close_if_done(self) -> None:
        if self._read_done and self._shut and not self.closed:
            assert self.sock is not None
            sockets.close_normally(self.sock)
            self.close()

    def close(self) -> None:
        """Close the socket (a reset unless both directions have finished) and free what is queued."""
        if self.closed:
            return
        self.closed = True
        out = self._out
        while out:
            self._memory.free(out.popleft())
        if self.sock is not None:
            self._watch.remove(self)
            for watcher in (self._read_watcher, self._write_watcher):
                watcher.stop()
                watcher.close()
            self.sock.close()


class ResetWatch:
    """Notices resets on sockets that nobody reads: one epoll for all, edge-triggered, only errors and hang-ups.

    A watcher per socket cannot do that: it would fire for as long as unread data waits.
    """

    def __init__(self, loop: Any) -> None:
        self._epoll = select.epoll()
        self._endpoints: dict[int, Endpoint] = {}
        self._watcher = loop.io(self._epoll.fileno(), READ)
        self._watcher.start(self._on_events)

    def __len__(self) -> int:
        return len(self._endpoints)

    def add(self, endpoint: Endpoint) -> None:
        """Watch a connected endpoint until `remove`."""
        assert endpoint.sock is not None
        fd = endpoint.sock.fileno()
        self._endpoints[fd] = endpoint
        self._epoll.register(fd, select.EPOLLET | select.EPOLLHUP | select.EPOLLERR)

    def remove(self, endpoint: Endpoint) -> None:
        """Before the socket is closed."""
        assert endpoint.sock is not None
        fd = endpoint.sock.fileno()
        if self._endpoints.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def _on_events(self) -> None:
        for fd, _ in self._epoll.poll(0, 64):
            endpoint = self._endpoints.get(fd)
            if endpoint is not None:
                endpoint.check()
