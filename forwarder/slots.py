"""A worker as the supervisor sees it, and the slot that it fills."""

import enum
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from workers.boot import FromWorker, ToWorker

PACKET_MAX = 65536
ENCODER = msgspec.msgpack.Encoder()
DECODER: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


class State(enum.Enum):
    """STARTING until it says Ready; LEAVING once it was told to go, or has closed its channel."""

    STARTING = "starting"
    READY = "up"
    LEAVING = "draining"


@dataclass(slots=True, eq=False)
class Worker:
    """One process, from fork until it is reaped. Owns the supervisor's end of its channel.

    beat: its heartbeat as last seen; missed_ticks: since when it has not moved (or, while STARTING, since its birth).
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

    def send(self, message: ToWorker, fds: list[int] | None = None) -> None:
        """Never waits. Who leaves hundreds of messages unread is hung, and is killed."""
        try:
            socket.send_fds(self.channel, [ENCODER.encode(message)], fds or [])
        except BlockingIOError:
            self.kill(signal.SIGKILL)
        except OSError:
            pass  # it is gone; reaping follows

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

    inbox: receiving and sending end of the socket pair for accepted stripes.
    restarts: processes after the first. early_deaths: in a row, before Ready. young_deaths: in a row, soon after birth.
    due_s: when to fork the next one, while `worker` is None.
    """

    index: int
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


def new_slot(index: int) -> Slot:
    inbox = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for sock in inbox:
        sock.setblocking(False)
    return Slot(index, inbox)


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def describe_exit(status: int) -> str:
    """A wait status for people."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exit {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
