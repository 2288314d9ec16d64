"""A worker as the supervisor sees it, and the slot that it fills."""

import enum
import errno
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from workers.boot import FromWorker, ToWorker

PACKET_MAX = 65536
OUTBOX_MAX = 4096
LATER = (errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM)
"""The kernel holds too many descriptors in flight, or is short of memory: both pass."""
ENCODER = msgspec.msgpack.Encoder()
DECODER: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


class State(enum.Enum):
    """STARTING until it says Ready; LEAVING once it was told to go, or has closed its channel."""

    STARTING = "starting"
    READY = "up"
    LEAVING = "draining"


class Parcel:
    """A message with its descriptors, which are the sender's until `keep`."""

    def __init__(self, message: ToWorker, fds: Sequence[int] = ()) -> None:
        self.data = ENCODER.encode(message)
        self.fds = tuple(fds)
        self._kept: list[int] = []

    def keep(self) -> None:
        """From now on with descriptors of its own, until nobody has it any more; one set for all who wait for it.

        Raises OSError.
        """
        if self.fds and not self._kept:
            kept: list[int] = []
            try:
                kept.extend(os.dup(fd) for fd in self.fds)
            except OSError:
                close_all(kept)
                raise
            self.fds, self._kept = tuple(kept), kept

    def __del__(self) -> None:
        close_all(self._kept)


@dataclass(slots=True, eq=False)
class Worker:
    """One process, from fork until it is reaped. Owns the supervisor's end of its channel.

    beat: its heartbeat as last seen; missed_ticks: since when it has not moved (or, while STARTING, since its birth).
    outbox: messages that the channel has not taken; full: it takes more when it is writable, else after a while.
    """

    slot: int
    serial: int
    pid: int
    channel: socket.socket
    state: State = State.STARTING
    served: bool = False  # has said Ready
    born_s: float = field(default_factory=time.monotonic)
    beat: int = 0
    missed_ticks: int = 0
    outbox: deque["Parcel"] = field(default_factory=deque)
    full: bool = False

    def send(self, message: ToWorker, fds: Sequence[int] = ()) -> None:
        """Never waits: what the channel does not take now follows in order, by `flush`."""
        self.post(Parcel(message, fds))

    def post(self, parcel: "Parcel") -> None:
        """The same for a message that others get, too. Who leaves thousands unread is hung, and is killed."""
        self.outbox.append(parcel)
        if len(self.outbox) == 1:
            self.flush()
        try:
            if self.outbox:
                parcel.keep()
            if len(self.outbox) <= OUTBOX_MAX:
                return
        except OSError:  # nothing may be missing of what it hears
            pass
        self.outbox.clear()
        self.kill(signal.SIGKILL)

    def flush(self) -> None:
        """Sends what waits, as far as the channel takes it."""
        self.full = False
        while self.outbox:
            parcel = self.outbox[0]
            try:
                socket.send_fds(self.channel, [parcel.data], list(parcel.fds))
            except BlockingIOError:
                self.full = True
                return
            except OSError as error:
                if error.errno in LATER:
                    return
                self.outbox.clear()  # it is gone; reaping follows
                return
            self.outbox.popleft()

    def receive(self) -> Iterator[tuple[FromWorker | None, list[int]]]:
        """What has arrived, with its descriptors, which the caller closes; None is the end of the channel.

        Raises ValueError for what is no message.
        """
        while True:
            try:
                data, fds, flags, _ = socket.recv_fds(self.channel, PACKET_MAX, 1, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except OSError:
                data, fds, flags = b"", [], 0
            if flags & socket.MSG_CTRUNC:
                close_all(fds)  # there was none left for it here: as if it had not been sent
                continue
            if not data:
                yield None, fds
                return
            try:
                message = DECODER.decode(data)
            except (ValueError, RecursionError) as error:
                close_all(fds)
                raise ValueError(f"no message: {error}") from error
            yield message, fds

    def kill(self, signum: signal.Signals) -> None:
        """Safe while it has not been reaped."""
        os.kill(self.pid, signum)


@dataclass(slots=True, eq=False)
class Slot:
    """A worker's place: what outlives the process in it.

    seat: its place in its generation. inbox: receiving and sending end of the socket pair for accepted stripes.
    restarts: processes after the first, of this seat in every generation.
    early_deaths: in a row, before Ready. young_deaths: in a row, soon after birth.
    due_s: when to fork the next one, while `worker` is None.
    """

    index: int
    seat: int
    inbox: tuple[socket.socket, socket.socket]
    worker: Worker | None = None
    restarts: int = 0
    early_deaths: int = 0
    young_deaths: int = 0
    due_s: float | None = None

    @property
    def ready(self) -> bool:
        return self.worker is not None and self.worker.state is State.READY

    def close(self) -> None:
        for sock in self.inbox:
            sock.close()


def new_slot(index: int, seat: int, restarts: int = 0) -> Slot:
    inbox = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for sock in inbox:
        sock.setblocking(False)
    return Slot(index, seat, inbox, restarts=restarts)


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def died_too_often(slot: Slot) -> str:
    """Why no other worker is tried in it."""
    return f"worker {slot.index} died {slot.early_deaths} times in a row before it was ready"


def describe_exit(status: int) -> str:
    """A wait status for people."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
