"""Applications for the simulator: what they write, when they end, how slowly they read, whether they break off."""

from collections import deque
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from workers.core.frame import Reason
from workers.core.state import State
from workers.core.stream import Stream

if TYPE_CHECKING:
    from tests.core.simulated_worker import Worker


@dataclass
class Plan:
    """What one application does. `starts` and `ends`: at once, or after the other's first bytes or end."""

    source: bytes
    chunk: int
    pause_us: int = 0
    starts: str = "at once"
    ends: str = "at once"
    breaks_us: int | None = None
    reason: int = Reason.APPLICATION
    read_us: int = 0
    read_bytes: int = 1 << 30

    @property
    def breaks(self) -> bool:
        return self.breaks_us is not None


def random_plans(random: Random, faults_us: int) -> tuple[Plan, Plan]:
    """Of the client's application and of the server's."""
    client, server = _random_plan(random), _random_plan(random)
    shape = random.random()
    if shape < 0.2:
        client.starts = "after bytes" if server.source else "after end"
    elif shape < 0.4:
        server.starts = random.choice(("after bytes", "after end")) if client.source else "after end"
    if random.random() < 0.3:
        waiting = server if client.starts == "at once" else client
        waiting.ends = "after end"
    if random.random() < 0.15:
        breaking = random.choice((client, server))
        breaking.breaks_us = random.choice((0, 1_000, random.randrange(faults_us)))
        if breaking is server:
            server.reason = random.choice((Reason.APPLICATION, Reason.REFUSED, Reason.UNREACHABLE))
    return client, server


def _random_plan(random: Random) -> Plan:
    size = random.choice((0, 1, random.randrange(3_000), random.randrange(30_000), random.randrange(120_000)))
    plan = Plan(random.randbytes(size), max(size // random.choice((1, 1, 2, 5)), 1))
    plan.pause_us = random.choice((0, 0, 3_000, 700_000))
    if random.random() < 0.25:
        plan.read_bytes = max(size // 8, 2_000)
        plan.read_us = random.choice((1_000, 30_000, 400_000))
    return plan


class Application:
    """The endpoint of `stream` at `worker`. `received` is what it has read, `delivered` how much the share gave."""

    def __init__(self, worker: "Worker", stream: Stream, plan: Plan, expected: bytes) -> None:
        self.worker = worker
        self.stream = stream
        self.plan = plan
        self.received = bytearray()
        self.delivered = 0
        self.reason: int | None = None
        self._expected = expected
        self._written = self._read = 0
        self._writing = False
        self._ended_reading = self._ended_writing = self._killed = False
        self._inbox: deque[Any] = deque()
        self._arrived = self._reading = False
        stream.endpoint = self
        worker.applications.append(self)

    def __repr__(self) -> str:
        return (
            f"wrote {self._read}/{self._written}/{len(self.plan.source)}"
            f" read {len(self.received)}/{len(self._expected)}"
            f" complete={self.complete} reset={self.reason}"
        )

    @property
    def complete(self) -> bool:
        """Both directions ended as they should, as far as this end knows."""
        ended = self._ended_reading and self._ended_writing and not self._inbox
        return ended and not self._killed and self.reason is None and self.stream.state is State.CLOSED

    @property
    def over(self) -> bool:
        """Nothing more will happen."""
        return self.complete or self._killed or self.reason is not None

    def start(self) -> None:
        self._later(0, self._begin)
        if self.plan.breaks_us is not None:
            self._later(self.plan.breaks_us, self._break_off)

    def _later(self, delay_us: int, call: Any) -> None:
        loop = self.worker.simulation.loop
        loop.at(loop.now_us + delay_us, call)

    # Writing

    def _begin(self) -> None:
        starts = {
            "at once": True,
            "after bytes": self.delivered > 0 or self._ended_reading,
            "after end": self._ended_reading,
        }
        if not self._writing and starts[self.plan.starts]:
            self._writing = True
            self._write()

    def _write(self) -> None:
        if self.over:
            return
        plan = self.plan
        self._written = min(self._written + plan.chunk, len(plan.source))
        if self._written < len(plan.source):
            self._later(plan.pause_us, self._write)
        self._on_readable()

    @property
    def _may_end(self) -> bool:
        plan = self.plan
        written = self._writing and self._written == len(plan.source)
        return written and (plan.ends == "at once" or self._ended_reading)

    def _on_readable(self) -> None:
        if not self.over and (self._written > self._read or self._may_end):
            self.worker.share.on_readable(self.stream)
            self.worker.pump()

    def wake(self) -> None:
        """The shell stopped asking, as if the kernel had had nothing more at that moment."""
        self._later(100, self._on_readable)

    def read(self, most: int) -> bytes | None:
        """Up to `most` bytes, b"" at the end, None for nothing now."""
        assert not self._ended_writing and not self.over
        data = self.plan.source[self._read : min(self._read + most, self._written)]
        self._read += len(data)
        if data:
            return data
        if self._may_end:
            self._ended_writing = True
            return b""
        return None

    # Reading

    def deliver(self, piece: Any) -> None:
        assert not self._ended_reading and not self.over
        self.delivered += piece.length
        self._inbox.append(piece)
        self._note_arrival()

    def end_of_stream(self) -> None:
        assert not self._ended_reading and not self.over
        assert self.delivered == len(self._expected), "end of stream with bytes missing"
        self._ended_reading = True
        self._note_arrival()

    def _note_arrival(self) -> None:
        if not self._arrived:
            self._arrived = True
            self.worker.simulation.arrivals.append(self)

    def on_turn_end(self) -> None:
        """All that came at once is there."""
        self._arrived = False
        if not self.plan.read_us:
            self._consume()
        elif self._inbox and not self._reading:
            self._reading = True
            self._later(self.plan.read_us, self._read_slowly)
        self._begin()
        self._on_readable()

    def _read_slowly(self) -> None:
        self._reading = False
        self._consume()
        if self._inbox:
            self._reading = True
            self._later(self.plan.read_us, self._read_slowly)
        self.worker.pump()

    def _consume(self) -> None:
        left, taken, frames, worker = self.plan.read_bytes, 0, 0, self.worker
        if self._killed:
            return
        while self._inbox and left:
            piece = self._inbox[0]
            count = min(piece.left, left)
            start = piece.length - piece.left
            self.received += piece.data[start : start + count]
            piece.left -= count
            left -= count
            if not piece.left:
                self._inbox.popleft()
                worker.occupied -= piece.occupied
                taken += piece.length
                frames += 1
        assert self._expected.startswith(self.received), "other bytes than were written"
        if taken:
            worker.share.on_consumed(self.stream, taken, frames, worker.simulation.loop.now_us)

    # The end

    def _break_off(self) -> None:
        if self._killed or self.reason is not None:
            return
        if self.complete:
            return
        self.worker.share.reset_stream(self.stream, self.plan.reason)
        if self.reason is None:
            self.on_reset(self.plan.reason)
        self.worker.pump()

    def on_reset(self, reason: int) -> None:
        assert self.reason is None, "reset twice"
        self.reason = reason
        self._drop_inbox()

    def on_killed(self) -> None:
        """The worker is dead, and the kernel resets the application."""
        if not self.over:
            self._killed = True
            self._inbox.clear()

    def _drop_inbox(self) -> None:
        while self._inbox:
            self.worker.occupied -= self._inbox.popleft().occupied
