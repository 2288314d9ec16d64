"""The workers as a whole: forking one into its slot, introducing it to the others, noticing that one is dead or hung.

What to do about it is the supervisor's policy, not decided here.
"""

import contextlib
import functools
import mmap
import os
import secrets
import selectors
import signal
import socket
from collections.abc import Callable, Iterator
from logging import ERROR

from msgspec.structs import replace

from forwarder.child import Birth, WorkerMain, live
from forwarder.doors import Doors
from forwarder.generation import SLOTS, Generation, Standing, free_block
from forwarder.listeners import Listeners, share_of
from forwarder.logs import log
from forwarder.mesh import Mesh, joined_fds
from forwarder.privileges import Identity
from forwarder.reload import Running
from forwarder.signals import blocked
from forwarder.slots import Parcel, Slot, State, Worker, close_all, new_slot
from workers.boot import Boot, FromWorker, PeerGone, PeerJoined, ToWorker
from workers.settings import Settings

OnMessage = Callable[[Slot, Worker, FromWorker, list[int]], None]


class Crew:
    """All generations, and what their workers share: memory, inboxes, heartbeats, the pipe that tells of our end."""

    def __init__(
        self,
        running: Running,
        selector: selectors.BaseSelector,
        on_message: OnMessage,
        main: WorkerMain,
    ) -> None:
        """running: what the next worker is forked with. on_message: gets what a worker said; the descriptors are closed
        after the call."""
        self.running = running
        self.doors = Doors()
        self.generations: list[Generation] = []
        self.stats = -1  # the memfd of `Boot.stats`; set it before `start`
        self._selector = selector
        self._on_message = on_message
        self._main = main
        self.mesh = Mesh()
        self._pid = os.getpid()
        self.boot_id = secrets.randbits(64)
        self.serial = secrets.randbits(32)
        self.lifetime = os.pipe()
        self._share_heartbeats(_heartbeat_page())

    def _share_heartbeats(self, memory: int) -> None:
        self.heartbeat_memory = memory
        self._heartbeat = memoryview(mmap.mmap(memory, SLOTS * 8)).cast("Q")

    @property
    def slots(self) -> list[Slot]:
        """Those of every generation, in order."""
        slots = (slot for generation in self.generations for slot in generation.slots)
        return sorted(slots, key=lambda slot: slot.index)

    @property
    def serving(self) -> Generation:
        """The generation that counts: until the first one is ready, that one."""
        return next(
            (each for each in self.generations if each.standing is Standing.SERVING),
            self.generations[0],
        )

    def generation_of(self, slot: Slot) -> Generation:
        return next(each for each in self.generations if slot in each.slots)

    def workers(self) -> list[Worker]:
        return [slot.worker for slot in self.slots if slot.worker is not None]

    # Forking

    def set_up(self, log_sender: socket.socket, identity: Identity | None, release: Callable[[], None]) -> None:
        """What every fork takes. release: closes, in a child, what the rest of the supervisor has open."""
        self._birth = (log_sender, identity, release)

    def start(self, size: int) -> Generation | None:
        """Forks a generation and tells those there are; None if no slots are left. Raises OSError, and then leaves
        nothing of it."""
        base = self._free_block(size)
        if base is None:
            return None
        before = self.generations[-1].slots if self.generations else []
        restarts = {slot.seat: slot.restarts for slot in before}
        made = Generation(base, size, [])
        self.generations.append(made)
        try:
            for seat in range(size):
                made.slots.append(new_slot(base + seat, seat, restarts.get(seat, 0)))
                self.mesh.add(base + seat, self._next_serial())
            for slot in made.slots:
                self._fork(slot)
        except OSError:
            self._take_back(made)
            raise
        for slot in made.slots:
            self._introduce(slot, [worker for worker in self.workers() if worker.slot not in _indices(made)])
        return made

    def has_room(self, size: int) -> bool:
        """Whether slots are left for a generation of that size."""
        return self._free_block(size) is not None

    def _free_block(self, size: int) -> int | None:
        return free_block({slot.index for slot in self.slots}, size)

    def replace(self, slot: Slot) -> None:
        """Forks another worker into an empty slot and tells the others. Raises OSError, and the slot stays empty."""
        self.mesh.add(slot.index, self._next_serial())
        try:
            worker = self._fork(slot)
        except OSError:
            self.mesh.remove(slot.index)
            raise
        slot.restarts += 1
        self._introduce(slot, [other for other in self.workers() if other is not worker])

    def _introduce(self, slot: Slot, others: list[Worker]) -> None:
        for other in others:
            if other.slot in self.mesh.serials:
                peer = self.mesh.peer(other.slot, slot.index)
                other.send(PeerJoined(slot.index, peer.serial), [*joined_fds(peer), slot.inbox[1].fileno()])

    def _take_back(self, made: Generation) -> None:
        """A generation that could not be forked as a whole."""
        self.generations.remove(made)
        for slot in made.slots:
            if slot.worker is not None:
                slot.worker.kill(signal.SIGKILL)
                os.waitpid(slot.worker.pid, 0)
                self._forget(slot, slot.worker)
            self.mesh.remove(slot.index)
            slot.close()

    def _next_serial(self) -> int:
        self.serial = (self.serial + 1) % (1 << 32) or 1
        return self.serial

    def _fork(self, slot: Slot) -> Worker:
        """The mesh has the memory of this slot already. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        theirs.setblocking(False)
        log_sender, identity, release = self._birth
        listeners = self.doors.listeners(self.running.settings)
        boot = self._boot(slot, theirs, listeners)
        let_go = functools.partial(self._close_in_child, slot, ours, boot.listeners, release)
        birth = Birth(self._pid, identity, log_sender, self._main, let_go)
        try:
            with blocked():
                pid = os.fork()
                if pid == 0:
                    live(boot, birth)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        worker = Worker(slot.index, self.mesh.serials[slot.index], pid, ours, beat=self._heartbeat[slot.index])
        slot.worker, slot.due_s = worker, None
        self.watch(slot, worker)
        return worker

    def settings_for(self, generation: Generation) -> Settings:
        """What is in effect, as the workers of that generation see it."""
        return replace(self.running.settings, workers=generation.size)

    def _boot(self, slot: Slot, channel: socket.socket, listeners: Listeners) -> Boot:
        generation = self.generation_of(slot)
        settings = self.settings_for(generation)
        return Boot(
            slot=slot.index,
            workers=generation.size,
            serial=self.mesh.serials[slot.index],
            boot_id=self.boot_id,
            settings=settings,
            arena=self.mesh.arena(slot.index),
            arena_bytes=self.mesh.arena_bytes,
            channel=channel,
            inbox=slot.inbox[0],
            lifetime=self.lifetime[0],
            heartbeat=self._heartbeat,
            stats=self.stats,
            base=generation.base,
            inboxes={other.index: other.inbox[1] for other in generation.slots},
            session_ids=self.running.session_ids,
            listeners=share_of(listeners, settings, slot.seat, generation.size),
            peers=self.mesh.peers(slot.index),
        )

    def _close_in_child(
        self, slot: Slot, channel: socket.socket, listeners: Listeners, release: Callable[[], None]
    ) -> None:
        """Closes all that is not this worker's. Only closes: what a selector watches is shared with the parent."""
        release()
        channel.close()
        os.close(self.lifetime[1])
        os.close(self.heartbeat_memory)
        self.mesh.close_in_child(slot.index)
        generation = self.generation_of(slot)
        self.doors.close_in_child(listeners)
        for other in self.slots:
            if other is not slot:
                other.inbox[0].close()
                if other not in generation.slots:
                    other.inbox[1].close()
                if other.worker is not None:
                    other.worker.outbox.clear()
                    other.worker.channel.close()

    # What they say, and that they end

    def reap(self) -> Iterator[tuple[Slot, Worker, int]]:
        """Workers that have ended, with their wait status, after what they said last; their slots are empty then."""
        for slot in self.slots:
            worker = slot.worker
            if worker is None:
                continue
            pid, status = os.waitpid(worker.pid, os.WNOHANG)
            if pid == 0:
                continue
            self._hear(slot, worker)
            self._forget(slot, worker)
            if slot.index in self.mesh.serials:
                self.mesh.remove(slot.index)
                for other in self.workers():
                    if other.slot in self.mesh.serials:
                        other.send(PeerGone(slot.index, worker.serial))
            yield slot, worker, status

    def drop(self, slot: Slot) -> None:
        """Gives up an empty slot for good, and its generation with the last one."""
        generation = self.generation_of(slot)
        generation.slots.remove(slot)
        slot.close()
        if not generation.slots:
            self.generations.remove(generation)

    def watch(self, slot: Slot, worker: Worker) -> None:
        """Listens to a worker."""
        self._selector.register(worker.channel, selectors.EVENT_READ, lambda events: self._on_channel(slot, events))

    def flush(self) -> bool:
        """Before the supervisor waits: sends what workers have not taken yet; True if all of it has gone."""
        for worker in self.workers():
            if worker.outbox:
                worker.flush()
            self._watch_room(worker)
        return not any(worker.outbox for worker in self.workers())

    def _watch_room(self, worker: Worker) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.full else 0)
        key = self._selector.get_map().get(worker.channel)
        if key is not None and key.events != events:
            self._selector.modify(worker.channel, events, key.data)

    def _on_channel(self, slot: Slot, events: int) -> None:
        if events & selectors.EVENT_READ and slot.worker is not None:
            self._hear(slot, slot.worker)

    def _hear(self, slot: Slot, worker: Worker) -> None:
        """Takes what a worker said. At the channel's end it has to end too, within the time of the hung."""
        try:
            for message, fds in worker.receive():
                try:
                    if message is None:
                        worker.state = State.LEAVING
                        self._unwatch(worker)
                    else:
                        self._on_message(slot, worker, message, fds)
                finally:
                    close_all(fds)
        except ValueError as error:
            log(ERROR, "a worker sent nonsense", worker=slot.index, serial=worker.serial, error=error)
            worker.kill(signal.SIGKILL)

    def _forget(self, slot: Slot, worker: Worker) -> None:
        self._unwatch(worker)
        worker.outbox.clear()
        worker.channel.close()
        slot.worker = None

    def _unwatch(self, worker: Worker) -> None:
        worker.full = False
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(worker.channel)

    def count_beats(self, on_time: bool, hung_ticks: int, start_ticks: int) -> list[Worker]:
        """Once a tick: who has been still for too long. A tick that came late says nothing about anybody."""
        hung = []
        for worker in self.workers():
            beat = self._heartbeat[worker.slot]
            moved = beat != worker.beat and worker.state is not State.STARTING
            worker.missed_ticks = 0 if moved else worker.missed_ticks + on_time
            worker.beat = beat
            if worker.missed_ticks >= (start_ticks if worker.state is State.STARTING else hung_ticks):
                hung.append(worker)
        return hung

    def overstaying(self, now: float) -> list[Worker]:
        """Who belongs to a generation that has to have ended by now."""
        late = [each for each in self.generations if each.kill_s is not None and now >= each.kill_s]
        return [slot.worker for each in late for slot in each.slots if slot.worker is not None]

    # All at once

    def tell(self, message: ToWorker) -> None:
        """Tells every worker there is."""
        parcel = Parcel(message)
        for worker in self.workers():
            worker.post(parcel)

    def kill(self) -> None:
        for worker in self.workers():
            worker.kill(signal.SIGKILL)

    def close(self) -> None:
        """Ends and reaps whoever is left, then drops all that they shared."""
        self.kill()
        for slot in self.slots:
            if slot.worker is not None:
                os.waitpid(slot.worker.pid, 0)
                self._forget(slot, slot.worker)
            slot.close()
        self.doors.close()
        self.mesh.close()
        for fd in (*self.lifetime, self.heartbeat_memory):
            os.close(fd)

    # Upgrade in place

    def adopt(self, generations: list[Generation], heartbeat_memory: int, lifetime: tuple[int, int]) -> None:
        """Takes the workers of this process's earlier life, and what it shared with them."""
        for fd in (*self.lifetime, self.heartbeat_memory):
            os.close(fd)
        self.lifetime = lifetime
        self._share_heartbeats(heartbeat_memory)
        self.generations = generations
        for slot in self.slots:
            if slot.worker is not None:
                slot.worker.beat = self._heartbeat[slot.index]
                self.watch(slot, slot.worker)


def _heartbeat_page() -> int:
    memory = os.memfd_create("forwarder-heartbeat", os.MFD_CLOEXEC)
    os.ftruncate(memory, mmap.PAGESIZE)
    return memory


def _indices(generation: Generation) -> set[int]:
    return {slot.index for slot in generation.slots}
