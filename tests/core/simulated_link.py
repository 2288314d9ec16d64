"""Stripes on a virtual clock: pairs of pipes, in order and reliable like TCP, with a rate and a latency."""

import heapq
from collections import deque
from collections.abc import Callable
from typing import Any

from workers.core import frame

BACKLOG_US = 20_000
"""How far a sender may be ahead of the link."""
FROZEN_FRAMES = 16
"""What still fits into the socket of a black-holed stripe."""
MAX_EVENTS = 400_000


class Loop:
    """The virtual clock."""

    def __init__(self, now_us: int) -> None:
        self.now_us = now_us
        self.events = 0
        self._heap: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []

    def at(self, when_us: int, call: Callable[..., None], *args: Any) -> None:
        """Call at that time, not before now."""
        self.events += 1
        heapq.heappush(self._heap, (max(when_us, self.now_us), self.events, call, args))

    def run(self, until_us: int, done: Callable[[], bool]) -> bool:
        """Run until `done`, asked after every event; False if the time came first."""
        heap = self._heap
        while not done():
            if not heap or heap[0][0] > until_us:
                return False
            assert self.events < MAX_EVENTS, "livelock"
            self.now_us, _, call, args = heapq.heappop(heap)
            call(*args)
        return True


class Pipe:
    """One direction of a stripe."""

    def __init__(self, loop: Loop, latency_us: int, us_per_kib: int, arrived: Callable[[bytes], None]) -> None:
        self._loop = loop
        self._latency_us = latency_us
        self._us_per_kib = us_per_kib
        self._arrived = arrived
        self._queue: deque[tuple[int, bytes]] = deque()
        self._free_us = 0
        self.frozen_until_us = 0
        self.dead = False

    @property
    def has_room(self) -> bool:
        """Whether the sender's socket would be writable."""
        if self.frozen_until_us > self._loop.now_us and len(self._queue) >= FROZEN_FRAMES:
            return False
        return self._free_us - self._loop.now_us <= BACKLOG_US

    @property
    def room_us(self) -> int:
        """When there is room again."""
        return max(self._free_us - BACKLOG_US, self.frozen_until_us)

    def send(self, data: bytes) -> None:
        """Take a frame; into the void if the stripe is dead."""
        if self.dead:
            return
        self._free_us = max(self._free_us, self._loop.now_us) + len(data) * self._us_per_kib // 1024 + 1
        self._queue.append((self._free_us + self._latency_us, data))
        if len(self._queue) == 1:
            self._loop.at(self._queue[0][0], self._arrive)

    def _arrive(self) -> None:
        if self.dead:
            return
        if self.frozen_until_us > self._loop.now_us:
            self._loop.at(self.frozen_until_us, self._arrive)
            return
        _, data = self._queue.popleft()
        if self._queue:
            self._loop.at(self._queue[0][0], self._arrive)
        self._arrived(data)


class Stripe:
    """`pipes[end]` leads away from that end; `up[end]`: that end believes in the stripe.

    `speed` is the latency in us and the us per KiB; `arrived` is called with the end, the stripe and the bytes.
    """

    def __init__(
        self,
        loop: Loop,
        arrived: Callable[[int, "Stripe", bytes], None],
        index: int,
        generation: int,
        speed: tuple[int, int],
    ) -> None:
        self.index = index
        self.generation = generation
        self.up = [True, True]
        self.pipes = [
            Pipe(loop, *speed, lambda data: arrived(frame.SERVER, self, data)),
            Pipe(loop, *speed, lambda data: arrived(frame.CLIENT, self, data)),
        ]

    def die(self) -> None:
        """Lose what is on its way."""
        for pipe in self.pipes:
            pipe.dead = True
