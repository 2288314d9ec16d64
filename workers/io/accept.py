"""Accepting: workers watch the same listeners. Applications are taken one a wake-up, so that all workers that watch get
even shares of them; stripes, which go to the worker of their index, `burst` at a time.

What the kernel refuses for want of descriptors or memory is tried again a moment later, not at once: the connection
stays in the queue, and the watcher would fire all the time.
"""

import errno
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

READ = 1
SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
WARN_S = 10.0
"""A shortage is logged once in so many seconds."""

log = logging.getLogger("forwarder.accept")


class Acceptor:
    """Owns `listeners`. `take` gets each connection and its peer's address. `is_short`: it paused for want of
    descriptors or memory."""

    def __init__(
        self,
        loop: Any,
        tunnel: str,
        listeners: list[socket.socket],
        take: Callable[[socket.socket, Any], None],
        *,
        burst: int = 1,
    ) -> None:
        self._loop = loop
        self._tunnel = tunnel
        self._take = take
        self._burst = burst
        self._listeners = listeners
        self._watchers = [loop.io(listener.fileno(), READ) for listener in listeners]
        self._paused = True
        self.is_short = False
        self._warned_s = float("-inf")
        self.resume()

    def resume(self) -> None:
        """Watch again after a pause."""
        self.is_short = False
        if self._paused:
            self._paused = False
            for watcher, listener in zip(self._watchers, self._listeners, strict=True):
                watcher.start(self._on_connection, listener)

    def _on_connection(self, listener: socket.socket) -> None:
        for _ in range(self._burst):
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                return  # another worker was faster
            except OSError as error:
                if error.errno in SHORTAGES:
                    self.is_short = True
                    self.pause()
                    self.warn(str(error))
                return
            self._take(sock, address)
            if self._paused:
                return

    def pause(self) -> None:
        """Accept nothing until `resume`."""
        self._paused = True
        for watcher in self._watchers:
            watcher.stop()

    def replace(self, listeners: list[socket.socket]) -> None:
        """Accept at these from now on; whoever waits at the former ones is taken first."""
        for listener in self._listeners:
            while not self._paused and self._is_taken(listener):
                pass
        self.close()
        self._listeners = listeners
        self._watchers = [self._loop.io(listener.fileno(), READ) for listener in listeners]
        self._paused = True
        self.resume()

    def _is_taken(self, listener: socket.socket) -> bool:
        try:
            sock, address = listener.accept()
        except OSError:
            return False
        self._take(sock, address)
        return True

    def warn(self, reason: str) -> None:
        """Log why connections are refused, now and then."""
        now_s = time.monotonic()
        if now_s - self._warned_s >= WARN_S:
            self._warned_s = now_s
            log.warning("cannot accept tunnel=%s reason=%s", self._tunnel, reason)

    def close(self) -> None:
        """Accept no more. Whoever comes after the last worker has closed the listeners is refused by the kernel."""
        self.pause()
        self._paused = False
        for watcher in self._watchers:
            watcher.close()
        self._watchers = []
        for listener in self._listeners:
            listener.close()
        self._listeners = []
