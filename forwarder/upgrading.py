"""Upgrade in place: the program is asked whether it would work, then takes this one's place in the same process.

The workers notice nothing: they stay this process's children, and their descriptors stay open. The new program forks
workers of its own beside them, and the old ones retire.
"""

import os
import secrets
import subprocess
import time
from logging import ERROR, INFO
from typing import Any

from forwarder.crew import Crew
from forwarder.doors import taken_over
from forwarder.generation import Generation, Standing
from forwarder.logs import log
from forwarder.slots import Slot, State, Worker
from forwarder.source import Source
from forwarder.upgrade import FORMAT, GenerationState, MeshState, Program, SlotState, WorkerState
from forwarder.upgrade import State as Saved

CHECK_S = 60.0
PATIENCE_S = 5.0
"""How long clients of the control socket and slow readers among the workers may delay the exec."""


class Check:
    """Another process that tells, by its exit code and the last line of its standard error, what would come of it."""

    def __init__(self, program: Program, source: Source) -> None:
        """Raises OSError."""
        self._said = os.memfd_create("forwarder-check", os.MFD_CLOEXEC)
        self.deadline_s = time.monotonic() + CHECK_S
        try:
            self._process = subprocess.Popen(
                program.check(source.file),
                cwd=program.directory if os.path.isdir(program.directory) else None,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._said,
            )
        except OSError:
            os.close(self._said)
            raise

    def verdict(self, now: float) -> str | None:
        """None while it runs; nothing if all is well; else what is wrong."""
        code = self._process.poll()
        if code is None:
            return None if now < self.deadline_s else f"no answer within {CHECK_S:g} s"
        if code == 0:
            return ""
        lines = os.pread(self._said, 65536, 0).decode("utf-8", "replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return last or f"exit {code}"

    def close(self) -> None:
        """Ends it, if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._said)

    def close_in_child(self) -> None:
        os.close(self._said)


class Upgrading:
    """At most one at a time: `begin`, `checked` when the program is found good, `leave` when its turn has come, `go`.

    It ends in another program or with a line in the log.
    """

    def __init__(self, program: Program, source: Source) -> None:
        self._program = program
        self._source = source
        self._check: Check | None = None
        self._give_up_s = 0.0
        self.leaving = False

    @property
    def busy(self) -> bool:
        return self._check is not None or self.leaving

    @property
    def deadline_s(self) -> float | None:
        """When to look again, if nothing happens before."""
        return self._check.deadline_s if self._check is not None else None

    def begin(self) -> None:
        """Starts the check, unless it is under way."""
        if self._check is not None:
            return
        try:
            self._check = Check(self._program, self._source)
        except OSError as error:
            self.stay(str(error.strerror))
            return
        log(INFO, "upgrade: the program is checked", program=self._program.prefix[-1])

    def checked(self, now: float) -> bool:
        """Whether the check has just come out well."""
        verdict = self._check.verdict(now) if self._check is not None else None
        if verdict is None:
            return False
        self._end_check()
        if verdict:
            self.stay(verdict)
        return not verdict

    def leave(self) -> None:
        """From now on it goes as soon as it may."""
        self.leaving = True
        self._give_up_s = time.monotonic() + PATIENCE_S

    def hold(self, now: float) -> None:
        """It may not: somebody waits for an answer, or a worker for a message."""
        if now >= self._give_up_s:
            self.stay("a worker or a client of the control socket does not read what it is sent")

    def go(self, state: Saved) -> None:
        """Returns only if it failed, which the log tells; call it with signals blocked."""
        log(INFO, "upgrade: another program takes over", pid=os.getpid())
        try:
            self._program.become(state)
        except OSError as error:
            self.stay(str(error.strerror))

    def stay(self, reason: str) -> None:
        """The end of it."""
        self.leaving = False
        log(ERROR, "upgrade: this version goes on", reason=reason)

    def close(self) -> None:
        """Gives it up without a word."""
        self.leaving = False
        self._end_check()

    def close_in_child(self) -> None:
        if self._check is not None:
            self._check.close_in_child()

    def _end_check(self) -> None:
        if self._check is not None:
            self._check.close()
            self._check = None


# The crew as a value, and back


def state_of(crew: Crew, **rest: Any) -> Saved:
    """The crew, and the `rest` of the fields of a state."""
    return Saved(
        running=crew.running,
        generations=_generations_saved(crew),
        mesh=crew.mesh.saved(),
        doors=crew.doors.saved(),
        boot_id=crew.boot_id,
        serial=crew.serial,
        heartbeat=crew.heartbeat_memory,
        lifetime=crew.lifetime,
        **rest,
    )


def _generations_saved(crew: Crew) -> list[GenerationState]:
    """All workers, as descriptors and numbers."""
    return [
        GenerationState(
            each.base,
            each.size,
            each.standing.name,
            each.apart,
            each.kill_s,
            [_slot_saved(slot) for slot in each.slots],
        )
        for each in crew.generations
    ]


def _slot_saved(slot: Slot) -> SlotState:
    inbox = (slot.inbox[0].fileno(), slot.inbox[1].fileno())
    each, worker = slot.worker, None
    if each is not None:
        worker = WorkerState(each.serial, each.pid, each.channel.fileno(), each.state.name, each.served, each.born_s)
    return SlotState(slot.index, slot.seat, inbox, slot.restarts, slot.due_s, worker)


def restore(crew: Crew, state: Saved) -> None:
    """Gives the crew what it had. Workers whose memory has another format get to drain only."""
    apart = state.format != FORMAT
    generations = [_generation(each, apart) for each in state.generations]
    crew.adopt(generations, state.heartbeat, state.lifetime)
    crew.doors.restore(state.doors)
    if apart:
        _close_memory(state.mesh)
        if state.running.session_ids:
            fresh = {index: secrets.randbits(64) for index in state.running.session_ids}
            crew.running = type(state.running)(
                state.running.settings, state.running.order, state.running.next_index, fresh
            )
        crew.serial = secrets.randbits(32)
    else:
        crew.mesh.restore(state.mesh)
        crew.boot_id, crew.serial = state.boot_id, state.serial


def _generation(saved: GenerationState, apart: bool) -> Generation:
    slots = [_slot(each) for each in saved.slots]
    standing = Standing[saved.standing]
    return Generation(saved.base, saved.size, slots, standing, saved.apart or apart, saved.kill_s)


def _slot(saved: SlotState) -> Slot:
    receiving, sending = (taken_over(fd) for fd in saved.inbox)
    slot = Slot(saved.index, saved.seat, (receiving, sending), restarts=saved.restarts, due_s=saved.due_s)
    if saved.worker is not None:
        each = saved.worker
        channel = taken_over(each.channel)
        slot.worker = Worker(
            saved.index, each.serial, each.pid, channel, State[each.state], each.served, born_s=each.born_s
        )
    return slot


def _close_memory(mesh: MeshState) -> None:
    rings = [fd for _, _, ring in mesh.rings for fd in (ring.memory, ring.published, ring.freed)]
    for fd in (*mesh.arenas.values(), *rings):
        os.close(fd)
