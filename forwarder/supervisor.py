"""The supervisor: opens what needs rights, forks the workers, replaces those that die, and carries no traffic.

Its policy, in the order of `Supervisor`: start; a turn (what has come in, then what is due); replace the dead; kill
the hung; stop. One thread and no gevent: a worker imports that after the fork.
"""

import enum
import os
import random
import selectors
import signal
import time
import traceback
from dataclasses import dataclass
from logging import CRITICAL, ERROR, INFO, WARNING
from pathlib import Path

from setproctitle import setproctitle

from forwarder import __version__, logs
from forwarder.child import WorkerMain, run_worker
from forwarder.control import Client, ControlServer, Message
from forwarder.crew import Crew
from forwarder.daemon import Announcement, detach
from forwarder.errors import BootError
from forwarder.instance import PidFile, take_control_socket
from forwarder.listeners import close_listeners, open_listeners
from forwarder.logs import log
from forwarder.privileges import descriptors_wanted, identity_wanted, raise_descriptor_limit
from forwarder.raw import check_raw
from forwarder.signals import SignalQueue
from forwarder.slots import Slot, State, Worker, describe_exit
from forwarder.status import StatusDesk
from workers.boot import Drain, Drained, Failed, FromWorker, Quit, Ready, StatusReply
from workers.settings import Settings


@dataclass(frozen=True, slots=True)
class Timing:
    """How patient the supervisor is. A worker beats once a tick; one that dies before `young_s` delays the next."""

    tick_s: float = 0.5
    hung_ticks: int = 4
    start_ticks: int = 60
    young_s: float = 10.0
    backoff_first_s: float = 0.25
    backoff_max_s: float = 5.0
    early_deaths_max: int = 5
    drain_margin_s: float = 5.0
    quit_grace_s: float = 1.0
    status_s: float = 2.0
    predecessor_s: float = 2.0  # for the ports of an instance that was killed a moment ago

    def respawn_delay_s(self, young_deaths: int) -> float:
        """How long a slot stays empty: not at all after the first death, then longer while they keep dying young."""
        if young_deaths < 2:
            return 0.0
        return min(self.backoff_max_s, self.backoff_first_s * 2.0 ** min(young_deaths - 2, 32))


class Phase(enum.Enum):
    """What the instance is up to; the value is its state word in `status`."""

    STARTING = "starting"
    SERVING = "up"
    DRAINING = "draining"
    QUITTING = "down"


def run(
    settings: Settings,
    config_path: Path,
    pid_file: Path | None = None,
    daemon: bool = False,
    *,
    worker_main: WorkerMain = run_worker,
    timing: Timing | None = None,
) -> int:
    """Runs the instance to its end or, with `daemon`, until it serves in the background. Returns the exit code.

    What went wrong is one line on standard error. worker_main: what a worker runs after the fork.
    """
    announcement = Announcement()
    output: logs.FileOutput | None = None
    try:
        if daemon and settings.log.file is None:
            raise BootError(78, f"{config_path}: log.file: expected a file for --daemon, found none")
        control_path = Path(settings.control_socket).absolute()
        pid = PidFile(pid_file) if pid_file is not None else None
        output = logs.FileOutput(settings.log.file)
        if daemon:
            outcome = detach()
            if isinstance(outcome, int):
                return outcome
            announcement = outcome
            output.take_standard_error()
        logs.set_up(settings.log, output, "supervisor")
        setproctitle(f"forwarder: supervisor {config_path.name}")
        timing = timing or Timing()
        return Supervisor(settings, control_path, announcement, output, pid, worker_main, timing).run()
    except BootError as error:
        announcement.failed(error.code, error.message)
        return error.code
    finally:
        announcement.close()
        if output is not None:
            output.close()


class Supervisor:
    """One running instance."""

    def __init__(
        self,
        settings: Settings,
        control_path: Path,
        announcement: Announcement,
        output: logs.FileOutput,
        pid_file: PidFile | None,
        worker_main: WorkerMain,
        timing: Timing,
    ) -> None:
        """`announcement` and `output` stay the caller's."""
        self._settings = settings
        self._control_path = control_path
        self._announcement = announcement
        self._output = output
        self._pid_file = pid_file
        self._timing = timing
        self._phase = Phase.STARTING
        self._opened = False
        self._exit_code = 0
        self._next_tick_s = time.monotonic()
        self._kill_s: float | None = None
        self._control: ControlServer | None = None
        self._selector = selectors.DefaultSelector()
        self._signals = SignalQueue()
        self._worker_lines = logs.WorkerLines()
        self._crew = Crew(settings, self._selector, self._on_message, worker_main)
        self._desk = StatusDesk(settings, self._crew, self._timing.status_s)

    # Start

    def run(self) -> int:
        """From nothing to nothing: whatever happens, no process, socket or file is left. Returns the exit code."""
        try:
            self._open()
            while self._phase in (Phase.STARTING, Phase.SERVING) or self._crew.workers():
                self._turn()
        except BootError as error:
            self._give_up(error.code, error.message)
        except Exception:
            log(CRITICAL, "the supervisor failed", error=traceback.format_exc())
            self._give_up(1, "the supervisor failed")
        finally:
            self._close()
        if self._opened:
            log(INFO, "forwarder has stopped", pid=os.getpid(), exit=self._exit_code)
        return self._exit_code

    def _open(self) -> None:
        """First everything that may be refused, then the workers."""
        identity = identity_wanted(self._settings.user, self._settings.group)
        limit, wanted = raise_descriptor_limit(), descriptors_wanted(self._settings)
        if self._pid_file is not None:
            self._pid_file.take()
        listener, stale = take_control_socket(self._control_path)
        self._control = ControlServer(self._control_path, listener, self._selector, self._on_command)
        check_raw(self._settings)
        self._crew.listeners = open_listeners(self._settings, self._timing.predecessor_s if stale else 0.0)
        self._selector.register(self._signals, selectors.EVENT_READ, lambda _: self._on_signals())
        self._selector.register(
            self._worker_lines, selectors.EVENT_READ, lambda _: self._worker_lines.pass_on(self._output)
        )
        self._opened, workers = True, self._settings.workers
        log(INFO, "forwarder starts", version=__version__, role=self._settings.role, pid=os.getpid(), workers=workers)
        if limit < wanted:
            log(WARNING, "the limit of open files is low", limit=limit, wanted=wanted)
        try:
            self._crew.start(self._worker_lines.sender, identity, self._close_in_child)
        except OSError as error:
            raise BootError(69, f"cannot start {workers} workers: {error.strerror}") from None

    def _close_in_child(self) -> None:
        self._selector.close()
        self._signals.close_in_child()
        self._worker_lines.close_in_child()
        self._output.close()
        self._announcement.close()
        if self._control is not None:
            self._control.close_in_child()
        if self._pid_file is not None:
            self._pid_file.close()

    # A turn: what has come in, then what is due

    def _turn(self) -> None:
        due = [self._next_tick_s, self._kill_s, self._desk.deadline_s, *(slot.due_s for slot in self._crew.slots)]
        next_s = min(at for at in due if at is not None)
        for key, events in self._selector.select(max(0.0, next_s - time.monotonic())):
            key.data(events)
        now = time.monotonic()
        for slot, worker, status in self._crew.reap():
            self._on_death(slot, worker, status, now)
        self._tick(now)
        self._replace(now)
        for client, answer in self._desk.answers(now, self._phase.value):
            self._reply(client, answer)
        if self._kill_s is not None and now >= self._kill_s:
            self._crew.kill()
            self._kill_s = now + self._timing.quit_grace_s

    def _on_signals(self) -> None:
        for number in self._signals.take():
            if number in (signal.SIGTERM, signal.SIGINT) and self._phase is Phase.DRAINING:
                self._quit()
            elif number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                self._drain()
            elif number == signal.SIGQUIT:
                self._quit()
            elif number == signal.SIGHUP:
                self._reopen_log()

    def _reopen_log(self) -> None:
        try:
            self._output.reopen()
        except OSError as error:
            log(ERROR, "the log file cannot be opened again", reason=error.strerror)

    def _on_message(self, slot: Slot, worker: Worker, message: FromWorker, fds: list[int]) -> None:
        match message:
            case Ready() if worker.state is State.STARTING:
                worker.state, worker.served = State.READY, True
                slot.early_deaths = worker.missed_ticks = 0
                log(INFO, "a worker is ready", worker=slot.index, serial=worker.serial, pid=worker.pid)
                if self._phase is Phase.STARTING and all(slot.ready for slot in self._crew.slots):
                    self._phase = Phase.SERVING
                    log(INFO, "forwarder is ready", pid=os.getpid())
                    self._announcement.ready()
            case Failed(code, line) if worker.state is State.STARTING:
                self._give_up(code, line)
            case StatusReply(request):
                self._desk.on_reply(slot.index, request, fds)
            case Drained():
                worker.state = State.LEAVING

    def _on_command(self, client: Client, message: Message) -> None:
        match message.get("command"):
            case "status":
                self._desk.ask(client, counts=bool(message.get("counts")))
            case "stop":
                self._reply(client, {"stopping": True, "pid": os.getpid()}, stay=True)
                if message.get("now"):
                    self._quit()
                else:
                    self._drain()
            case other:
                self._reply(client, {"error": f"unknown command {other!r}"})

    def _reply(self, client: Client, message: Message, stay: bool = False) -> None:
        if self._control is not None:
            self._control.reply(client, message, stay)

    # Replace the dead

    def _on_death(self, slot: Slot, worker: Worker, status: int, now: float) -> None:
        self._desk.on_death(slot.index)
        if self._phase in (Phase.DRAINING, Phase.QUITTING):
            return
        slot.young_deaths = slot.young_deaths + 1 if now - worker.born_s < self._timing.young_s else 0
        delay_s = self._count_death(slot, early=not worker.served)
        slot.due_s = now + delay_s
        dead = {"worker": slot.index, "serial": worker.serial, "pid": worker.pid, "exit": describe_exit(status)}
        log(WARNING, "a worker died and is replaced", **dead, delay_s=round(delay_s, 2))

    def _count_death(self, slot: Slot, early: bool) -> float:
        """Seconds until the next one. Raises BootError if workers cannot even start and no other one serves."""
        slot.early_deaths = slot.early_deaths + 1 if early else 0
        serving = self._phase is Phase.SERVING and any(slot.ready for slot in self._crew.slots)
        if slot.early_deaths >= self._timing.early_deaths_max and not serving:
            raise BootError(1, f"worker {slot.index} died {slot.early_deaths} times in a row before it was ready")
        return self._timing.respawn_delay_s(slot.young_deaths) * random.uniform(0.75, 1.25)

    def _replace(self, now: float) -> None:
        for slot in self._crew.slots:
            if slot.due_s is None or now < slot.due_s:
                continue
            try:
                self._crew.replace(slot)
            except OSError as error:
                slot.young_deaths += 1
                slot.due_s = now + max(self._timing.backoff_first_s, self._count_death(slot, early=True))
                log(ERROR, "a worker cannot be started", worker=slot.index, reason=error.strerror)

    # Kill the hung

    def _tick(self, now: float) -> None:
        """A tick that comes late was no tick: a paused or overloaded machine kills nobody."""
        if now < self._next_tick_s:
            return
        on_time = now - self._next_tick_s < self._timing.tick_s / 2
        self._next_tick_s = now + self._timing.tick_s
        for worker in self._crew.count_beats(on_time, self._timing.hung_ticks, self._timing.start_ticks):
            log(ERROR, "a worker is hung and is killed", worker=worker.slot, pid=worker.pid)
            worker.kill(signal.SIGKILL)

    # Stop

    def _drain(self) -> None:
        """Nothing new is accepted, here or by the workers; whoever has not started yet has nothing to finish."""
        if self._phase not in (Phase.STARTING, Phase.SERVING):
            return
        log(INFO, "forwarder drains", timeout_s=self._settings.drain_timeout_s)
        self._end(Phase.DRAINING, self._settings.drain_timeout_s + self._timing.drain_margin_s)
        for worker in self._crew.workers():
            if worker.state is State.STARTING:
                worker.kill(signal.SIGKILL)
            else:
                worker.send(Drain(self._settings.drain_timeout_s))

    def _quit(self) -> None:
        if self._phase is not Phase.QUITTING:
            if self._exit_code == 0:
                log(INFO, "forwarder quits", pid=os.getpid())
            self._end(Phase.QUITTING, self._timing.quit_grace_s)
            self._crew.tell(Quit())

    def _end(self, phase: Phase, patience_s: float) -> None:
        self._phase = phase
        self._kill_s = time.monotonic() + patience_s
        close_listeners(self._crew.listeners)
        for slot in self._crew.slots:
            slot.due_s = None

    def _give_up(self, code: int, line: str) -> None:
        """Ends with an exit code other than 0, for the first reason that there was."""
        if self._exit_code == 0:
            self._exit_code = code
            if self._settings.log.file is not None and self._control is not None:  # else it is another instance's log
                log(ERROR, line)
            self._announcement.failed(code, line)
        self._quit()

    def _close(self) -> None:
        self._crew.close()
        self._worker_lines.pass_on(self._output)
        if self._control is not None:
            self._control.close()
        if self._pid_file is not None:
            self._pid_file.release()
        self._worker_lines.close()
        self._signals.close()
        self._selector.close()
