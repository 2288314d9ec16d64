"""The metrics child as the supervisor keeps it: its listening sockets, its process, and the pages that it reads.

The child serves metrics and a web page (`forwarder.web`) and nothing else: it may be slow, hang or die, and no traffic
notices. It has the pages of `workers.shm.stats`, the listening sockets and the log; everything else is closed there.
"""

import gc
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from logging import CRITICAL, ERROR, INFO, WARNING
from typing import NoReturn

from setproctitle import setproctitle

from forwarder import __version__
from forwarder.errors import BootError
from forwarder.listeners import open_metrics
from forwarder.logs import WorkerOutput, log, set_up
from forwarder.privileges import Identity, become, die_with_parent, give_up_capabilities
from forwarder.signals import blocked, reset_in_worker
from forwarder.slots import Slot, describe_exit
from workers.settings import Address, Settings
from workers.shm.stats import INSTANCE_PAGE, NAMED_MAX, PageWriter, Past, create_pages
from workers.shm.totals import FORMAT, InstanceTotals, Seat

NICE = 5
"""Traffic comes first."""
DESCRIBE_S = 1.0
BACKOFF_FIRST_S, BACKOFF_MAX_S, YOUNG_S = 0.25, 30.0, 10.0
DESCRIPTORS_MAX = 1 << 20


class MetricsChild:
    """Owns the memory of all pages, and writes those of the supervisor."""

    def __init__(self, settings: Settings, started_s: float, memory: int | None = None) -> None:
        """started_s: when the instance did. memory: of a predecessor, whose counters go on. Raises BootError."""
        try:
            self.memory = create_pages() if memory is None else memory
        except OSError as error:
            raise BootError(69, f"no memory for statistics: {error.strerror}") from None
        self.due_s: float | None = None
        self._settings = settings
        self._past = Past(self.memory)
        self._page = PageWriter(self.memory, INSTANCE_PAGE)
        self._listen: Address | None = None
        self._sockets: list[socket.socket] = []
        self._birth: tuple[socket.socket, Identity | None] | None = None
        self._pid = 0
        self._born_s = self._described_s = 0.0
        self._started_s = started_s
        self._described: InstanceTotals | None = None
        self._young_deaths = 0

    # Opening and starting

    def open(self, patience_s: float = 0.0) -> None:
        """Opens the listening sockets, if there are to be any. Raises BootError, and leaves none open then."""
        listen = self._settings.metrics_listen
        self._sockets = open_metrics(listen, patience_s) if listen is not None else []
        self._listen = listen

    def start(self, log_sender: socket.socket, identity: Identity | None) -> None:
        """Forks the child, if it has something to listen on."""
        self._birth = log_sender, identity
        if self._sockets:
            self._fork(time.monotonic())

    def begin_again(self, patience_s: float, log_sender: socket.socket, identity: Identity | None) -> None:
        """Opens and starts in a process that was another program, whose child has ended: what fails is told, and the
        next reload tries again."""
        try:
            self.open(patience_s)
        except BootError as error:
            log(ERROR, "metrics are not served", reason=error.message)
        self.start(log_sender, identity)

    def restart(self, listen: Address | None) -> None:
        """Serve there from now on; None: not at all. Raises BootError, and then all is as it was."""
        if listen == self._listen:
            return
        sockets = open_metrics(listen) if listen is not None else []
        self.stop()
        self._sockets, self._listen = sockets, listen
        if sockets:
            self._fork(time.monotonic())

    def reconfigure(self, settings: Settings) -> None:
        """Take over new settings. Raises BootError, and then all is as it was."""
        self.restart(settings.metrics_listen)
        self._settings = settings
        self._described = None

    def _fork(self, now: float) -> None:
        assert self._birth is not None
        parent, self.due_s, self._born_s = os.getpid(), None, now
        try:
            with blocked():
                pid = os.fork()
                if pid == 0:
                    self._live(parent, *self._birth)
        except OSError as error:
            self.due_s = now + self._pause_s(True)
            log(ERROR, "the metrics child cannot be started", reason=error.strerror)
            return
        self._pid = pid
        log(INFO, "metrics are served", listen=self._listen, pid=pid)

    def _live(self, parent: int, log_sender: socket.socket, identity: Identity | None) -> NoReturn:
        """The whole life of the child's process; called with signals blocked."""
        code = 1
        try:
            _close_all_but({0, 1, 2, self.memory, log_sender.fileno(), *(each.fileno() for each in self._sockets)})
            reset_in_worker()
            gc.freeze()
            set_up(self._settings.log, WorkerOutput(log_sender), "metrics")
            setproctitle("forwarder: metrics")
            os.nice(NICE)
            if identity is not None:
                become(identity)
            give_up_capabilities()
            if die_with_parent(parent):
                serve(self.memory, self._sockets)
            code = 0
        except BaseException:
            log(CRITICAL, "the metrics child crashed", error=traceback.format_exc())
        finally:
            os._exit(code)

    # A turn of the supervisor

    def turn(self, now: float, state: str, slots: Iterable[Slot]) -> None:
        """Says how the instance is, notices that the child has died, and starts another when it is time."""
        self._describe(now, state, slots)
        if self._pid:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._pid = 0
                pause_s = self._pause_s(now - self._born_s < YOUNG_S)
                self.due_s = now + pause_s
                ended = describe_exit(status)
                log(WARNING, "the metrics child died and is replaced", exit=ended, delay_s=round(pause_s, 2))
        if self.due_s is not None and now >= self.due_s:
            self._fork(now)

    def _pause_s(self, is_young: bool) -> float:
        self._young_deaths = self._young_deaths + 1 if is_young else 0
        return min(BACKOFF_FIRST_S * 2.0 ** min(self._young_deaths, 16), BACKOFF_MAX_S)

    def _describe(self, now: float, state: str, slots: Iterable[Slot]) -> None:
        seats = [Seat(slot.index, slot.worker.state.value if slot.worker else "down", slot.restarts) for slot in slots]
        before = self._described
        changed = before is None or (before.seats, before.state) != (seats, state)
        if not changed and now - self._described_s < DESCRIBE_S:
            return
        tunnels: list[tuple[str, str]] = [(tunnel.name, tunnel.mode) for tunnel in self._settings.tunnels[:NAMED_MAX]]
        role = self._settings.role
        self._described = InstanceTotals(
            FORMAT, role, __version__, os.getpid(), state, now, self._started_s, seats, tunnels
        )
        self._described_s = now
        with suppress(OSError):
            self._page.write(self._described)

    def fold(self, slot: int) -> None:
        """The worker of that slot was reaped: its counters go on without it."""
        with suppress(OSError):
            self._past.fold(slot)

    # The end

    def stop(self) -> None:
        """Ends the child, which has nothing to lose, and lets go of the address."""
        self.pause()
        self.due_s = None
        self.close_in_child()

    def pause(self) -> None:
        """Ends the child before another program takes over, which starts one of its own; the address stays taken."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0

    def resume(self) -> None:
        """There is no other program after all."""
        if self._sockets:
            self._fork(time.monotonic())

    def close_in_child(self) -> None:
        """For a worker, which writes its page and has no part in the rest."""
        for sock in self._sockets:
            sock.close()
        self._sockets = []

    def close(self) -> None:
        self.stop()
        os.close(self.memory)


def serve(memory: int, sockets: list[socket.socket]) -> None:
    """The child's work; only it loads what that takes."""
    from forwarder.web import serve_forever  # noqa: PLC0415

    serve_forever(memory, sockets)


def _close_all_but(kept: set[int]) -> None:
    """Only closes: what a selector watches is shared with the parent."""
    sys.stdout.flush()
    low = 0
    for fd in [*sorted(kept), DESCRIPTORS_MAX]:
        if low < fd:  # an empty range is taken for all of them
            os.closerange(low, fd)
        low = fd + 1
