"""What changes while the instance runs: its settings, the number of its workers, the program. One thing at a time.

Whoever asks meanwhile waits for its turn, so that each change begins from what the one before has left.
"""

import math
from collections import deque
from collections.abc import Callable
from functools import partial
from logging import ERROR, WARNING
from typing import NamedTuple

from msgspec.structs import replace

from forwarder.config import WORKERS_MAX
from forwarder.control import Client, Message
from forwarder.crew import Crew
from forwarder.errors import BootError, ForwarderError
from forwarder.logs import FileOutput, log
from forwarder.reconfiguring import Reconfiguring
from forwarder.source import Source
from forwarder.succession import Succession
from forwarder.timing import Timing
from forwarder.upgrade import Program
from forwarder.upgrading import Upgrading
from workers.settings import Settings

STOPPING = {"error": "the instance is stopping", "code": 1}


class Wish(NamedTuple):
    """A change that waits; client: who is told, if anybody."""

    begin: Callable[[], None]
    client: Client | None = None


class Changes:
    """The queue, and what is at its head."""

    def __init__(
        self,
        source: Source,
        program: Program,
        crew: Crew,
        output: FileOutput,
        timing: Timing,
        reply: Callable[[Client, Message], None],
        become: Callable[[Upgrading], None],
        serve_metrics: Callable[[Settings], None],
    ) -> None:
        """become: hands this process over to the program that was found good. serve_metrics: as these settings say;
        raises BootError, and leaves all as it was."""
        self.reload = Reconfiguring(source, crew, output, serve_metrics)
        self.succession = Succession(crew, timing.drain_margin_s)
        self.upgrade = Upgrading(program, source)
        self._crew = crew
        self._reply = reply
        self._become = become
        self._wishes: deque[Wish] = deque()
        self._silent_reload = Wish(partial(self._begin_reload, None))
        self._departure = Wish(self._depart)
        self._steps = Wish(self._step)
        self._size = 0

    # What may be wished for

    def wish_reload(self, client: Client | None = None) -> None:
        """Of those that nobody waits for one is enough: it reads the file when its turn comes."""
        if client is not None:
            self._wishes.append(Wish(partial(self._begin_reload, client), client))
        elif self._silent_reload not in self._wishes:
            self._wishes.append(self._silent_reload)

    def wish_upgrade(self) -> None:
        """Nothing waits for the check; what comes of it waits for its turn."""
        if not self.upgrade.leaving and self._departure not in self._wishes:
            self.upgrade.begin()

    def wish_workers(self, more: int) -> None:
        """So many more than there are, or are to be. What waits is one change, for each takes a generation."""
        waits = self._steps in self._wishes
        size = (self._size if waits else self.succession.size) + more
        if not 1 <= size <= WORKERS_MAX:
            log(WARNING, "the number of workers stays", workers=size - more, most=WORKERS_MAX)
            return
        self._size = size
        if not waits:
            self._wishes.append(self._steps)

    # A turn

    @property
    def busy(self) -> bool:
        """Whether anything changes, or waits for that."""
        return bool(self._wishes) or self.reload.busy or self.succession.busy or self.upgrade.busy

    @property
    def deadlines(self) -> tuple[float | None, float | None]:
        """When `turn` is to be called next, if nothing happens before."""
        return self.reload.deadline_s, self.upgrade.deadline_s

    def turn(self, now: float, settled: Callable[[], bool]) -> None:
        """Ends what has come to its end, and begins what is next. settled: whether nobody waits for an answer, and no
        worker for a message."""
        self._answer(now)
        if self.upgrade.checked(now):
            self._wishes.append(self._departure)
        self._begin_next(now)
        while self.upgrade.leaving and self._wishes:  # nobody's wish is left behind
            self.upgrade.leaving = False
            self._wishes.append(self._departure)
            self._begin_next(now)
        if self.upgrade.leaving and settled():
            self._become(self.upgrade)
        elif self.upgrade.leaving:
            self.upgrade.hold(now)

    def _begin_next(self, now: float) -> None:
        while self._wishes and not (self.reload.busy or self.succession.busy or self.upgrade.leaving):
            self._wishes.popleft().begin()
            self._answer(now)

    def stop(self) -> None:
        """Nothing changes any more."""
        while self._wishes:
            client = self._wishes.popleft().client
            if client is not None:
                self._reply(client, STOPPING)
        self._answer(math.inf)
        self.succession.abandon()
        self.upgrade.close()

    def _answer(self, now: float) -> None:
        for client, answer in self.reload.finished(now):
            self._reply(client, answer)

    def _begin_reload(self, client: Client | None) -> None:
        before = self._crew.running.settings.workers
        self.reload.begin(client)
        wanted = self._crew.running.settings.workers
        if wanted != before:
            self._wishes.appendleft(Wish(partial(self._resize, wanted, before)))

    def _depart(self) -> None:
        if self._crew.has_room(self._crew.serving.size):
            self.upgrade.leave()
        else:
            self.upgrade.stay("workers of earlier generations have not left yet")

    def _step(self) -> None:
        if self._size != self._crew.serving.size:
            self._resize(self._size, self._crew.running.settings.workers)

    def _resize(self, size: int, file_before: int) -> None:
        """file_before: the file's number of workers, to compare the next file with if this fails."""
        running = self._crew.running
        before = replace(running, settings=replace(running.settings, workers=file_before))
        try:
            self._crew.doors.open_missing(running.settings, size)
        except BootError as error:
            log(ERROR, "the number of workers stays", reason=error.message)
            self._crew.running = before
            return
        if size != self._crew.serving.size:
            self.succession.begin(size, before)

    def renew(self) -> None:
        """After an upgrade: workers of this program, with the file as it is now, in place of those there are."""
        before, size = self._crew.running, self._crew.serving.size
        try:
            planned = self.reload.prepare(same_workers=False)
        except ForwarderError as error:
            log(ERROR, "the configuration stays as it was", reason=str(error))
        else:
            self._crew.running = planned.running
            wanted = planned.running.settings.workers
            size = size if wanted == before.settings.workers else wanted
        self.succession.begin(size, before)
