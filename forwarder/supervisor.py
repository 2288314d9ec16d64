"""The supervisor: opens what needs rights, forks the workers, replaces those that die, and carries no traffic.

Its policy, in the order of `Supervisor`: start; a turn (what has come in, then what is due); another program;
replace the dead; kill the hung; stop. What may change meanwhile is in `forwarder.changes`.

One thread and no gevent: a worker imports that after the fork.
"""

import os
import random
import selectors
import signal
import time
import traceback
from logging import CRITICAL, ERROR, INFO, WARNING
from pathlib import Path

from forwarder import __version__, logs
from forwarder.changes import STOPPING, Changes
from forwarder.child import WorkerMain
from forwarder.control import Client, ControlServer, Message
from forwarder.crew import Crew
from forwarder.daemon import Announcement
from forwarder.doors import taken_over
from forwarder.errors import BootError
from forwarder.generation import Standing
from forwarder.instance import PidFile, take_control_socket
from forwarder.logs import log
from forwarder.metrics import MetricsChild
from forwarder.notify import ServiceManager
from forwarder.phase import Phase
from forwarder.privileges import Identity, descriptors_wanted, identity_wanted, raise_descriptor_limit
from forwarder.raw import check_raw
from forwarder.reload import Running
from forwarder.signals import SignalQueue, blocked, let_come
from forwarder.slots import Slot, State, Worker, describe_exit, died_too_often
from forwarder.source import Source
from forwarder.status import StatusDesk
from forwarder.timing import Timing
from forwarder.upgrade import Program
from forwarder.upgrade import State as Saved
from forwarder.upgrading import Upgrading, restore, state_of
from workers.boot import Drain, Drained, Failed, FromWorker, Quit, Ready, Reconfigured, StatusReply
from workers.settings import Settings


class Supervisor:
    """One running instance."""

    def __init__(
        self,
        running: Running,
        source: Source,
        program: Program,
        announcement: Announcement,
        output: logs.FileOutput,
        pid_file: PidFile | None,
        worker_main: WorkerMain,
        timing: Timing,
        saved: Saved | None = None,
    ) -> None:
        """`announcement` and `output` stay the caller's. saved: what this process was under another program."""
        self._announcement = announcement
        self._output = output
        self._pid_file = pid_file
        self._timing = timing
        self._saved = saved
        self._phase = Phase.STARTING
        self._opened = False
        self._exit_code = 0
        self._next_tick_s = time.monotonic()
        self._kill_s: float | None = None
        self._control: ControlServer | None = None
        self._selector = selectors.DefaultSelector()
        self._signals = SignalQueue()
        self._manager = ServiceManager()
        stats, started_s = (saved.stats, saved.started_s) if saved is not None else (None, time.monotonic())
        self._metrics = MetricsChild(running.settings, started_s, stats)
        self._worker_lines = logs.WorkerLines(saved.log_lines if saved is not None else None)
        self._crew = Crew(running, self._selector, self._on_message, worker_main)
        self._crew.stats = self._metrics.memory
        self._desk = StatusDesk(self._crew, self._timing.status_s, started_s)
        self._changes = Changes(
            source, program, self._crew, output, timing, self._reply, self._become_another, self._metrics.reconfigure
        )

    @property
    def _settings(self) -> Settings:
        return self._crew.running.settings

    # Start

    def run(self) -> int:
        """From nothing to nothing: whatever happens, no process, socket or file is left. Returns the exit code."""
        try:
            self._open()
            while not self._phase.ends or self._crew.workers():
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
        self._selector.register(self._signals, selectors.EVENT_READ, lambda _: self._on_signals(self._signals.take()))
        self._selector.register(
            self._worker_lines, selectors.EVENT_READ, lambda _: self._worker_lines.pass_on(self._output)
        )
        self._crew.set_up(self._worker_lines.sender, identity, self._close_in_child)
        if self._saved is not None:
            self._take_over(self._saved, identity)
            return
        if self._pid_file is not None:
            self._pid_file.take()
        path = Path(self._settings.control_socket).absolute()
        listener, stale = take_control_socket(path)
        self._control = ControlServer(path, listener, self._selector, self._on_command)
        check_raw(self._settings)
        workers = self._settings.workers
        patience_s = self._timing.predecessor_s if stale else 0.0
        self._crew.doors.open_missing(self._settings, workers, patience_s)
        self._metrics.open(patience_s)
        self._opened = True
        log(INFO, "forwarder starts", version=__version__, role=self._settings.role, pid=os.getpid(), workers=workers)
        if limit < wanted:
            log(WARNING, "the limit of open files is low", limit=limit, wanted=wanted)
        try:
            self._crew.start(workers)
        except OSError as error:
            raise BootError(69, f"cannot start {workers} workers: {error.strerror}") from None
        self._metrics.start(self._worker_lines.sender, identity)

    def _take_over(self, saved: Saved, identity: Identity | None) -> None:
        """The workers first: whatever is wrong with the file or this host, they go on."""
        self._opened, self._phase = True, Phase.SERVING
        path, listener = Path(saved.control_path), taken_over(saved.control)
        self._control = ControlServer(path, listener, self._selector, self._on_command)
        restore(self._crew, saved)
        let_come()
        log(INFO, "upgrade: this version has taken over", version=__version__, pid=os.getpid())
        self._metrics.begin_again(self._timing.predecessor_s, self._worker_lines.sender, identity)
        self._changes.renew()
        self._tell_ready()

    def _close_in_child(self) -> None:
        self._selector.close()
        self._signals.close_in_child()
        self._worker_lines.close_in_child()
        self._output.close()
        self._announcement.close()
        self._changes.upgrade.close_in_child()
        self._metrics.close_in_child()
        if self._control is not None:
            self._control.close_in_child()
        if self._pid_file is not None:
            self._pid_file.close()

    # A turn: what has come in, then what is due

    def _turn(self) -> None:
        self._crew.flush()
        due = [self._next_tick_s, self._kill_s, self._desk.deadline_s, self._metrics.due_s, *self._changes.deadlines]
        due += (slot.due_s for slot in self._crew.slots if not self._changes.succession.holds_back(slot))
        next_s = min(at for at in due if at is not None)
        for key, events in self._selector.select(max(0.0, next_s - time.monotonic())):
            key.data(events)
        now = time.monotonic()
        for slot, worker, status in self._crew.reap():
            self._on_death(slot, worker, status, now)
        self._tick(now)
        self._replace(now)
        self._metrics.turn(now, self._phase.value, self._crew.serving.slots)
        for client, answer in self._desk.answers(now, self._phase.value):
            self._reply(client, answer)
        if self._phase is Phase.SERVING:
            self._changes.turn(now, self._is_settled)
            if self._manager.waits and not self._changes.busy:
                self._tell_ready()
        if self._kill_s is not None and now >= self._kill_s:
            self._crew.kill()
            self._kill_s = now + self._timing.quit_grace_s

    def _on_signals(self, numbers: list[int]) -> None:
        for number in numbers:
            self._on_signal(number)

    def _on_signal(self, number: int) -> None:
        is_end = number in (signal.SIGTERM, signal.SIGINT)
        if number == signal.SIGQUIT or (is_end and self._phase is Phase.DRAINING):
            self._quit()
        elif is_end or number == signal.SIGUSR1:
            self._drain()
        elif number == signal.SIGHUP:
            self._reopen_log()
            if not self._phase.ends:
                self._manager.reloading()
                self._changes.wish_reload()
        elif number == signal.SIGUSR2 and not self._phase.ends:
            self._changes.wish_upgrade()
        elif number in (signal.SIGTTIN, signal.SIGTTOU):
            self._changes.wish_workers(1 if number == signal.SIGTTIN else -1)

    def _tell_ready(self) -> None:
        if self._phase is Phase.SERVING:
            self._manager.ready(f"serves (workers: {self._crew.serving.size})")

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
                if self._phase is Phase.STARTING and self._crew.serving.ready:
                    self._phase, self._crew.serving.standing = Phase.SERVING, Standing.SERVING
                    log(INFO, "forwarder is ready", pid=os.getpid())
                    self._announcement.ready()
                    self._tell_ready()
                self._changes.succession.on_ready()
            case Failed(_, line) if worker.state is State.STARTING and self._changes.succession.has(slot):
                self._changes.succession.give_up(line)
            case Failed(code, line) if worker.state is State.STARTING:
                self._give_up(code, line)
            case StatusReply(request):
                self._desk.on_reply(slot.index, request, fds)
            case Reconfigured(number):
                self._changes.reload.on_reconfigured(slot.index, number)
            case Drained():
                worker.state = State.LEAVING

    def _on_command(self, client: Client, message: Message) -> None:
        match message.get("command"):
            case "status":
                self._desk.ask(client, counts=bool(message.get("counts")))
            case "reload" if self._phase.ends:
                self._reply(client, STOPPING)
            case "reload":
                self._changes.wish_reload(client)
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

    # Another program

    def _become_another(self, upgrade: Upgrading) -> None:
        """Signals are held back for it; those that came before are answered first, and may change everything."""
        with blocked():
            numbers = [number for number in self._signals.take() if number not in (signal.SIGCHLD, signal.SIGUSR2)]
            if not numbers and self._control is not None:
                self._metrics.pause()
                upgrade.go(self._save(self._control))
                self._metrics.resume()
        self._on_signals(numbers)

    def _is_settled(self) -> bool:
        return self._crew.flush() and self._control is not None and self._control.idle

    def _save(self, control: ControlServer) -> Saved:
        return state_of(
            self._crew,
            stats=self._metrics.memory,
            log_lines=self._worker_lines.saved(),
            control=control.fileno(),
            control_path=str(control.path),
            pid_file=self._pid_file.saved() if self._pid_file is not None else None,
            daemon=self._output.has_standard_error,
            started_s=self._desk.started_s,
        )

    # Replace the dead

    def _on_death(self, slot: Slot, worker: Worker, status: int, now: float) -> None:
        self._desk.on_death(slot.index)
        self._changes.reload.on_death(slot.index)
        self._metrics.fold(slot.index)
        if self._phase.ends:
            return
        dead = {"worker": slot.index, "serial": worker.serial, "pid": worker.pid, "exit": describe_exit(status)}
        if self._crew.generation_of(slot).standing is Standing.RETIRING:
            log(INFO if status == 0 else WARNING, "a worker of an earlier generation has ended", **dead)
            self._crew.drop(slot)
            return
        slot.young_deaths = slot.young_deaths + 1 if now - worker.born_s < self._timing.young_s else 0
        delay_s = self._count_death(slot, early=not worker.served)
        slot.due_s = now + delay_s
        log(WARNING, "a worker died and is replaced", **dead, delay_s=round(delay_s, 2))
        if self._changes.succession.has(slot) and slot.early_deaths >= self._timing.early_deaths_max:
            self._changes.succession.give_up(died_too_often(slot))

    def _count_death(self, slot: Slot, early: bool) -> float:
        """Seconds until the next one. Raises BootError if workers cannot even start and no other one serves."""
        slot.early_deaths = slot.early_deaths + 1 if early else 0
        serving = self._phase is Phase.SERVING and any(slot.ready for slot in self._crew.slots)
        if slot.early_deaths >= self._timing.early_deaths_max and not (serving or self._changes.succession.busy):
            raise BootError(1, died_too_often(slot))
        return self._timing.respawn_delay_s(slot.young_deaths) * random.uniform(0.75, 1.25)

    def _replace(self, now: float) -> None:
        for slot in self._crew.slots:
            if slot.due_s is None or now < slot.due_s or self._changes.succession.holds_back(slot):
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
        for worker in self._crew.overstaying(now):
            log(WARNING, "a worker of an earlier generation is killed", worker=worker.slot, pid=worker.pid)
            worker.kill(signal.SIGKILL)
        if self._phase is not Phase.SERVING or any(slot.ready for slot in self._crew.slots):
            self._manager.feed(now)

    # Stop

    def _drain(self) -> None:
        """Nothing new is accepted, here or by the workers; whoever has not started yet has nothing to finish."""
        if self._phase.ends:
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
        self._manager.stopping(patience_s + self._timing.drain_margin_s)
        self._changes.stop()
        self._crew.doors.close()
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
        self._changes.stop()
        self._metrics.close()
        self._worker_lines.pass_on(self._output)
        if self._control is not None:
            self._control.close()
        if self._pid_file is not None:
            self._pid_file.release()
        self._worker_lines.close()
        self._signals.close()
        self._selector.close()
