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

from forwarder.child import Birth, WorkerMain, live
from forwarder.listeners import Listeners, close_listeners, close_others, share_of
from forwarder.logs import log
from forwarder.mesh import Mesh, joined_fds
from forwarder.privileges import Identity
from forwarder.signals import blocked
from forwarder.slots import Slot, State, Worker, close_all, new_slot
from workers.boot import Boot, FromWorker, PeerGone, PeerJoined, ToWorker
from workers.settings import Settings

OnMessage = Callable[[Slot, Worker, FromWorker, list[int]], None]


class Crew:
    """All slots, and what their workers share: memory, inboxes, heartbeats, the pipe that tells of our end."""

    def __init__(
        self,
        settings: Settings,
        selector: selectors.BaseSelector,
        on_message: OnMessage,
        main: WorkerMain,
    ) -> None:
        """on_message: gets what a worker said; the descriptors are closed after the call."""
        self.listeners: Listeners = {}
        self.slots = [new_slot(index) for index in range(settings.workers)]
        self._settings = settings
        self._selector = selector
        self._on_message = on_message
        self._main = main
        self._mesh = Mesh()
        self._pid = os.getpid()
        self._boot_id = secrets.randbits(64)
        self._serial = secrets.randbits(32)
        tunnels = settings.tunnels if settings.role == "client" else ()
        self._session_ids = {tunnel.index: secrets.randbits(64) for tunnel in tunnels}
        heartbeat_bytes = -(-settings.workers * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
        self._heartbeat = memoryview(mmap.mmap(-1, heartbeat_bytes)).cast("Q")
        self._lifetime = os.pipe()

    def workers(self) -> list[Worker]:
        return [slot.worker for slot in self.slots if slot.worker is not None]

    def start(self, log_sender: socket.socket, identity: Identity | None, release: Callable[[], None]) -> None:
        """Forks the first worker of every slot. Raises OSError.

        release: closes, in a child, what the rest of the supervisor has open.
        """
        self._birth = (log_sender, identity, release)
        for slot in self.slots:
            self._mesh.add(slot.index, self._next_serial())
        for slot in self.slots:
            self._fork(slot)

    def replace(self, slot: Slot) -> None:
        """Forks another worker into an empty slot and tells the others. Raises OSError, and the slot stays empty."""
        self._mesh.add(slot.index, self._next_serial())
        try:
            worker = self._fork(slot)
        except OSError:
            self._mesh.remove(slot.index)
            raise
        slot.restarts += 1
        for other in self.workers():
            if other is not worker:
                peer = self._mesh.peer(other.slot, slot.index)
                other.send(PeerJoined(slot.index, worker.serial), joined_fds(peer))

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
            self._unwatch(worker)
            worker.channel.close()
            slot.worker = None
            self._mesh.remove(slot.index)
            self.tell(PeerGone(slot.index, worker.serial))
            yield slot, worker, status

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

    def tell(self, message: ToWorker) -> None:
        """Tells every worker there is."""
        for worker in self.workers():
            worker.send(message)

    def kill(self) -> None:
        for worker in self.workers():
            worker.kill(signal.SIGKILL)

    def close(self) -> None:
        """Ends and reaps whoever is left, then drops all that they shared."""
        self.kill()
        for slot in self.slots:
            if slot.worker is not None:
                os.waitpid(slot.worker.pid, 0)
                self._unwatch(slot.worker)
                slot.worker.channel.close()
                slot.worker = None
            slot.close()
        close_listeners(self.listeners)
        self._mesh.close()
        for fd in self._lifetime:
            os.close(fd)

    def _next_serial(self) -> int:
        self._serial = (self._serial + 1) % (1 << 32) or 1
        return self._serial

    def _fork(self, slot: Slot) -> Worker:
        """The mesh has the memory of this slot already. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        theirs.setblocking(False)
        log_sender, identity, release = self._birth
        let_go = functools.partial(self._close_in_child, slot, ours, release)
        boot, birth = self._boot(slot, theirs), Birth(self._pid, identity, log_sender, self._main, let_go)
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
        worker = Worker(slot.index, self._mesh.serials[slot.index], pid, ours, beat=self._heartbeat[slot.index])
        slot.worker, slot.due_s = worker, None
        self._selector.register(ours, selectors.EVENT_READ, lambda _: self._hear(slot, worker))
        return worker

    def _boot(self, slot: Slot, channel: socket.socket) -> Boot:
        return Boot(
            slot=slot.index,
            workers=len(self.slots),
            serial=self._mesh.serials[slot.index],
            boot_id=self._boot_id,
            settings=self._settings,
            arena=self._mesh.arena(slot.index),
            arena_bytes=self._mesh.arena_bytes,
            channel=channel,
            inbox=slot.inbox[0],
            lifetime=self._lifetime[0],
            heartbeat=self._heartbeat,
            inboxes={other.index: other.inbox[1] for other in self.slots},
            session_ids=self._session_ids,
            listeners=share_of(self.listeners, self._settings, slot.index),
            peers=self._mesh.peers(slot.index),
        )

    def _close_in_child(self, slot: Slot, channel: socket.socket, release: Callable[[], None]) -> None:
        """Closes all that is not this worker's. Only closes: what a selector watches is shared with the parent."""
        release()
        channel.close()
        os.close(self._lifetime[1])
        self._mesh.close_in_child(slot.index)
        close_others(self.listeners, self._settings, slot.index)
        for other in self.slots:
            if other is not slot:
                other.inbox[0].close()
                if other.worker is not None:
                    other.worker.channel.close()

    def _hear(self, slot: Slot, worker: Worker) -> None:
        """Takes what a worker said. At the channel's end it has to end too, within the time of the hung."""
        if slot.worker is not worker:
            return
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

    def _unwatch(self, worker: Worker) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(worker.channel)
