"""One generation of workers follows another: the new one starts beside the old, which retires once all of it is ready.

If the new one does not come up it is given up, and the old one stays as it was.
"""

import signal
import time
from logging import ERROR, INFO

from forwarder.crew import Crew
from forwarder.generation import Generation, Standing
from forwarder.logs import log
from forwarder.reload import Running
from forwarder.slots import Slot, State
from workers.boot import Drain, Retire


class Succession:
    """At most one change at a time."""

    def __init__(self, crew: Crew, apart_margin_s: float) -> None:
        """apart_margin_s: how long a generation of another format may overstay `drain_timeout`."""
        self._crew = crew
        self._apart_margin_s = apart_margin_s
        self._next: Generation | None = None
        self._before: Running | None = None

    @property
    def busy(self) -> bool:
        return self._next is not None

    @property
    def size(self) -> int:
        """How many workers serve, or are to serve next."""
        return (self._next or self._crew.serving).size

    def begin(self, size: int, before: Running) -> None:
        """Forks the next generation. before: what was in effect, and is again if this fails."""
        self._before = before
        old = self._crew.serving.size
        try:
            self._next = self._crew.start(size)
            reason = "workers of earlier generations have not left yet" if self._next is None else ""
        except OSError as error:
            reason = str(error.strerror)
        if reason:
            self._go_back(f"cannot start {size} workers", reason)
            return
        log(INFO, "another generation of workers starts", workers=size, before=old)

    def on_ready(self) -> None:
        """A worker is ready. With the last one of the next generation that one serves, and the others retire."""
        if self._next is None or not self._next.ready:
            return
        for generation in list(self._crew.generations):
            if generation is not self._next and generation.standing is not Standing.RETIRING:
                self._retire(generation)
        self._next.standing, self._next, self._before = Standing.SERVING, None, None
        self._crew.doors.close_unwanted(self._crew.running.settings)
        log(INFO, "another generation of workers serves", workers=self._crew.serving.size)

    def has(self, slot: Slot) -> bool:
        """Whether that slot is one of the next generation's."""
        return self._next is not None and slot in self._next.slots

    def holds_back(self, slot: Slot) -> bool:
        """Whether a worker in that slot would be forked in vain: its generation is about to retire."""
        return self._next is not None and slot not in self._next.slots

    def give_up(self, reason: str) -> None:
        """Ends the next generation; the old one goes on."""
        if self._next is None:
            return
        failed, self._next = self._next, None
        failed.standing = Standing.RETIRING
        for slot in list(failed.slots):
            self._dismiss(slot)
        self._go_back("the new generation of workers is given up", reason)

    def abandon(self) -> None:
        """Nothing follows any more: all of them are about to end."""
        self._next = self._before = None

    def _go_back(self, what: str, reason: str) -> None:
        log(ERROR, what, reason=reason, workers=self._crew.serving.size)
        if self._before is not None:
            self._crew.running, self._before = self._before, None
            self._crew.doors.close_unwanted(self._crew.running.settings)

    def _retire(self, generation: Generation) -> None:
        generation.standing = Standing.RETIRING
        drain_timeout_s = self._crew.running.settings.drain_timeout_s
        if generation.apart:
            generation.kill_s = time.monotonic() + drain_timeout_s + self._apart_margin_s
        for slot in list(generation.slots):
            worker = slot.worker
            if worker is not None and worker.state is State.READY:
                worker.state = State.LEAVING
                worker.send(Drain(drain_timeout_s) if generation.apart else Retire())
            elif worker is None or worker.state is State.STARTING:
                self._dismiss(slot)

    def _dismiss(self, slot: Slot) -> None:
        """Who has not started has nothing to finish."""
        slot.due_s = None
        if slot.worker is None:
            self._crew.drop(slot)
        else:
            slot.worker.kill(signal.SIGKILL)
