"""An event loop as far as sockets of ports need it, which the test turns by hand."""

import select
from collections import deque
from collections.abc import Callable
from typing import Any

READ, WRITE = 1, 2
EVENTS = {READ: select.POLLIN, WRITE: select.POLLOUT}


class Watcher:
    def __init__(self, loop: "SmallLoop", fd: int, events: int) -> None:
        self.loop, self.fd, self.events = loop, fd, events
        self.callback: Callable[[], None] | None = None

    def start(self, callback: Callable[[], None]) -> None:
        self.callback = callback

    def stop(self) -> None:
        self.callback = None

    def close(self) -> None:
        self.stop()
        self.loop.watchers.remove(self)


class SmallLoop:
    """Level-triggered, as libev is: an error on a descriptor is for readers and writers."""

    def __init__(self) -> None:
        self.watchers: list[Watcher] = []
        self.callbacks: deque[Callable[[], None]] = deque()

    def io(self, fd: int, events: int) -> Watcher:
        self.watchers.append(Watcher(self, fd, events))
        return self.watchers[-1]

    def run_callback(self, function: Callable[..., None], *arguments: Any) -> None:
        self.callbacks.append(lambda: function(*arguments))

    def active(self, events: int) -> int:
        """How many watchers of that sort are started."""
        return sum(each.callback is not None and each.events == events for each in self.watchers)

    def turn(self, timeout_ms: int = 0) -> bool:
        """Call what is due; whether there was anything."""
        busy = bool(self.callbacks)
        for _ in range(len(self.callbacks)):
            self.callbacks.popleft()()
        poll = select.poll()
        wanted: dict[int, int] = {}
        for each in self.watchers:
            if each.callback is not None:
                wanted[each.fd] = wanted.get(each.fd, 0) | EVENTS[each.events]
        for fd, events in wanted.items():
            poll.register(fd, events)
        for fd, seen in poll.poll(timeout_ms):
            for each in list(self.watchers):
                if each.fd == fd and each.callback is not None and seen & (EVENTS[each.events] | select.POLLERR):
                    busy = True
                    each.callback()
        return busy

    def settle(self, timeout_ms: int = 20) -> None:
        """Turn until nothing is due any more."""
        while self.turn(timeout_ms):
            pass
