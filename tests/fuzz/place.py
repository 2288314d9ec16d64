"""Where a stripe, a session and a worker run under a fuzzer: a loop that is turned by hand, wires in memory."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from workers.io import memory
from workers.io.memory import Memory
from workers.shm.arena import Arena, arena_size
from workers.shm.segments import create_arena

READ, WRITE = 1, 2
QUOTA = 1 << 20
FRAME_MAX = 256 << 10


class Watcher:
    """A watcher of any kind; `fire` is what the event loop would do."""

    def __init__(self, once: bool = False) -> None:
        self.closed = False
        self._once = once
        self._callback: Callable[..., None] | None = None
        self._arguments: tuple[Any, ...] = ()

    @property
    def active(self) -> bool:
        """Whether it is started."""
        return self._callback is not None

    def start(self, callback: Callable[..., None], *arguments: Any) -> None:
        """As gevent."""
        self._callback, self._arguments = callback, arguments

    again = start

    def stop(self) -> None:
        """As gevent."""
        self._callback = None

    def close(self) -> None:
        """As gevent."""
        self.stop()
        self.closed = True

    def fire(self) -> None:
        """Call back, if it is started."""
        callback = self._callback
        if self._once:
            self._callback = None
        if callback is not None:
            callback(*self._arguments)


class Loop:
    """As much of gevent's loop as the data path uses."""

    def __init__(self) -> None:
        self.callbacks: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self.activecnt = 0
        self._timers: list[Watcher] = []
        self._watchers: dict[tuple[int, int], Watcher] = {}

    def io(self, fd: int, events: int) -> Watcher:
        """As gevent."""
        watcher = self._watchers[fd, events] = Watcher()
        return watcher

    def fire(self, fd: int, events: int) -> bool:
        """`fd` is ready; False if nobody waits for that."""
        watcher = self._watchers.get((fd, events))
        if watcher is None or not watcher.active:
            return False
        watcher.fire()
        return True

    def timer(self, _after: float, repeat: float = 0.0) -> Watcher:
        """As gevent."""
        timer = Watcher(once=not repeat)
        self._timers.append(timer)
        return timer

    def fire_timers(self) -> None:
        """All that are started are due."""
        self._timers = [timer for timer in self._timers if not timer.closed]
        for timer in list(self._timers):
            timer.fire()

    def run_callback(self, callback: Callable[..., None], *arguments: Any) -> None:
        """As gevent."""
        self.callbacks.append((callback, arguments))

    def now(self) -> float:
        """As gevent."""
        return 0.0

    def turn(self, most: int = 100) -> None:
        """Run what is due, and what that makes due."""
        for _ in range(most):
            if not self.callbacks:
                return
            due, self.callbacks = self.callbacks, []
            for callback, arguments in due:
                callback(*arguments)
        raise AssertionError("the loop never comes to rest")


class Wire:
    """A stripe's socket: `arrived` is what the peer has sent, `sent` what was sent to it, if it reads (`room`)."""

    family = 0

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.arrived = bytearray()
        self.sent = bytearray()
        self.ended = self.closed = self.broken = False
        self.room = 1 << 30

    def recv_into(self, buffer: memoryview) -> int:
        """As socket."""
        return self.recvmsg_into((buffer,))[0]

    def recvmsg_into(self, buffers: tuple[memoryview, ...]) -> tuple[int, None, None, None]:
        """As socket."""
        count = 0
        for buffer in buffers:
            part = self.arrived[: len(buffer)]
            buffer[: len(part)] = part
            del self.arrived[: len(part)]
            count += len(part)
        if not count and not self.ended:
            raise BlockingIOError
        return count, None, None, None

    def recv(self, most: int, _flags: int = 0) -> bytes:
        """As socket."""
        buffer = memoryview(bytearray(most))
        return bytes(buffer[: self.recv_into(buffer)])

    def send(self, data: memoryview) -> int:
        """As socket."""
        if self.broken:
            raise ConnectionResetError(errno.ECONNRESET, "reset")
        count = min(len(data), self.room)
        if not count:
            raise BlockingIOError
        self.room -= count
        self.sent += data[:count]
        return count

    def shutdown(self, _how: int) -> None:
        """As socket: nothing is sent after it."""
        if self.closed:
            raise OSError(errno.ENOTCONN, "not connected")

    def setsockopt(self, *_arguments: Any) -> None:
        """Fails on a closed socket only."""
        if self.closed:
            raise OSError(errno.EBADF, "closed")

    def getsockopt(self, _level: int, _option: int, size: int = 0) -> Any:
        """TCP_INFO of a connection on which nothing happened."""
        return bytes(size) if size else 0

    def setblocking(self, _flag: bool) -> None:
        """It never blocks."""

    def getpeername(self) -> tuple[str, int]:
        """As socket."""
        return ("192.0.2.1", 40000)

    getsockname = getpeername

    def fileno(self) -> int:
        """A number that no descriptor has."""
        return -1 - self.number

    def close(self) -> None:
        """As socket."""
        self.closed = True


@contextmanager
def buffers(inbound_bytes: int) -> Iterator[Memory]:
    """A worker's memory with a small arena, and a small buffer to receive into."""
    size = arena_size(QUOTA, QUOTA)
    fd = create_arena(size)
    arena = Arena(fd, size, QUOTA, QUOTA)
    try:
        with mock.patch.object(memory, "INBOUND_BYTES", inbound_bytes):
            own = Memory(arena, FRAME_MAX)
        yield own
    finally:
        arena.close()
        os.close(fd)
