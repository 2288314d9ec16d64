"""Datagrams of several applications through a spray tunnel at a steady pace, echoed by the target, in one thread.

with Echoes(pair, per_second=2000, applications=4) as echoes:
    ...                                     # break something
    struck_s = time.monotonic()
assert echoes.lost(struck_s + 3).there <= 0.005
"""

import contextlib
import random
import select
import socket
import struct
import threading
import time
from typing import NamedTuple, Self

from tests.system.spray_pair import DATAGRAM_MAX, SprayPair

HEAD = struct.Struct("!II")
"""Number, and the application that sent it."""
SETTLE_S = 0.5
"""After the last datagram, until what has not come back is lost."""
BURST = 64
_PADDING = random.Random(9).randbytes(DATAGRAM_MAX)


class Lost(NamedTuple):
    """The share of datagrams that did not reach the target, and of their echoes that did not come back; `sent`: of how
    many."""

    there: float
    back: float
    sent: int


class Echoes:
    """Everything is running while the block does. `repeated`, `wrong`: datagrams that came twice, or not as sent."""

    def __init__(
        self, pair: SprayPair, *more: SprayPair, per_second: float, size: int = 1000, applications: int = 1
    ) -> None:
        """`more`: other clients of the pair's server. `applications`: of each client."""
        self.repeated = self.wrong = 0
        self._per_second, self._size = per_second, size
        self._sent_s: list[float] = []
        self._arrived, self._returned = bytearray(), bytearray()
        self._applications = [each.application() for each in (pair, *more) for _ in range(applications)]
        self._target = pair.target()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
        for sock in (*self._applications, self._target):
            sock.close()

    def _run(self) -> None:
        poll = select.epoll()
        by_descriptor = {sock.fileno(): sock for sock in (*self._applications, self._target)}
        for sock in by_descriptor.values():
            sock.setblocking(False)
            poll.register(sock, select.EPOLLIN)
        start_s = time.monotonic()
        end_s = None
        while end_s is None or time.monotonic() < end_s:
            due = int((time.monotonic() - start_s) * self._per_second)
            if end_s is None:
                self._send(min(due - len(self._sent_s), BURST))
                end_s = time.monotonic() + SETTLE_S if self._over.is_set() else None
            for descriptor, _ in poll.poll(0.001):
                self._receive(by_descriptor[descriptor])
        poll.close()

    def _send(self, count: int) -> None:
        for _ in range(count):
            number = len(self._sent_s)
            application = number % len(self._applications)
            self._sent_s.append(time.monotonic())
            self._arrived.append(0)
            self._returned.append(0)
            with contextlib.suppress(BlockingIOError):
                self._applications[application].send(self._content(number, application))

    def _content(self, number: int, application: int) -> bytes:
        start = number % 64
        return HEAD.pack(number, application) + _PADDING[start : start + self._size - HEAD.size]

    def _receive(self, sock: socket.socket) -> None:
        marks = self._arrived if sock is self._target else self._returned
        for _ in range(BURST):
            try:
                datagram, source = sock.recvfrom(DATAGRAM_MAX)
            except BlockingIOError:
                return
            number, application = HEAD.unpack_from(datagram)
            if number >= len(marks) or datagram != self._content(number, application):
                self.wrong += 1
                continue
            self.repeated += marks[number]
            marks[number] = 1
            if sock is self._target:
                with contextlib.suppress(BlockingIOError):
                    sock.sendto(datagram, source)

    # Afterwards

    def lost(self, since_s: float, until_s: float = float("inf"), application: int | None = None) -> Lost:
        """Of the datagrams that left in that time."""
        numbers = [
            number
            for number, sent_s in enumerate(self._sent_s)
            if since_s <= sent_s < until_s and application in (None, number % len(self._applications))
        ]
        arrived = sum(self._arrived[number] for number in numbers)
        returned = sum(self._returned[number] for number in numbers)
        there = 1 - arrived / len(numbers) if numbers else 1.0
        return Lost(there, 1 - returned / arrived if arrived else 1.0, len(numbers))

    def healed_s(self, since_s: float, quiet_s: float = 0.25) -> float:
        """How long after that moment the last datagram left that did not come back, before `quiet_s` without any such;
        chance losses of one aside."""
        last_s = since_s
        for sent_s, returned in zip(self._sent_s, self._returned, strict=True):
            if sent_s > last_s + quiet_s:
                break
            if sent_s >= since_s and not returned:
                last_s = sent_s
        return last_s - since_s
