"""What a supervisor takes along when it becomes its successor: the same process, with another version of the program.

The state is a JSON document in memory, whose descriptor's number stands in the environment. All other descriptors of
the state are numbers in it, and stay open across the exec. Nothing here opens or closes any of them.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from forwarder.errors import ForwarderError
from forwarder.listeners import Wanted
from forwarder.reload import Running
from workers.boot import RingFds

VERSION = 1
"""Of the document. A program that does not know it says so when it is asked, before anything happens."""

FORMAT = 1
"""To be raised when workers of this version and the one before cannot share a mesh, or an old one would not understand
the new supervisor: rings, arenas, heartbeats, what descriptors mean, `workers.boot`, `workers.settings`. Generations of
different formats stand apart: the old one drains within `drain_timeout`, and hears of nothing else."""

DESCRIPTORS_SPARE = 32

VARIABLE = "FORWARDER_STATE"


class WorkerState(msgspec.Struct, frozen=True):
    """See forwarder.slots.Worker."""

    serial: int
    pid: int
    channel: int
    state: str
    served: bool
    born_s: float


class SlotState(msgspec.Struct, frozen=True):
    """See forwarder.slots.Slot."""

    index: int
    seat: int
    inbox: tuple[int, int]
    restarts: int
    due_s: float | None
    worker: WorkerState | None


class GenerationState(msgspec.Struct, frozen=True):
    """See forwarder.generation.Generation."""

    base: int
    size: int
    standing: str
    apart: bool
    kill_s: float | None
    slots: list[SlotState]


class MeshState(msgspec.Struct, frozen=True):
    """See forwarder.mesh.Mesh. rings: by producer and consumer."""

    serials: dict[int, int]
    arenas: dict[int, int]
    rings: list[tuple[int, int, RingFds]]


class State(msgspec.Struct, frozen=True):
    """Everything. Times are of the monotonic clock, which runs on; all else is in the classes that hold it."""

    running: Running
    generations: list[GenerationState]
    mesh: MeshState
    doors: list[tuple[Wanted, list[int]]]
    boot_id: int
    serial: int
    heartbeat: int
    stats: int
    lifetime: tuple[int, int]
    log_lines: tuple[int, int]
    control: int
    control_path: str
    pid_file: tuple[str, int] | None
    daemon: bool
    started_s: float
    format: int = FORMAT
    version: int = VERSION

    def descriptors(self) -> Iterator[int]:
        """All that has to be open on the other side."""
        yield from (self.heartbeat, self.stats, *self.lifetime, *self.log_lines, self.control)
        if self.pid_file is not None:
            yield self.pid_file[1]
        for _, fds in self.doors:
            yield from fds
        yield from self.mesh.arenas.values()
        for _, _, ring in self.mesh.rings:
            yield from (ring.memory, ring.published, ring.freed)
        for generation in self.generations:
            for slot in generation.slots:
                yield from slot.inbox
                if slot.worker is not None:
                    yield slot.worker.channel


class _Head(msgspec.Struct):
    version: int


def encode(state: State) -> bytes:
    """The document."""
    return msgspec.json.encode(state)


def decode(document: bytes) -> State:
    """Raises ValueError, with one line, for what is not of this version or is not complete."""
    version = msgspec.json.decode(document, type=_Head).version
    if version != VERSION:
        raise ValueError(f"expected a state of version {VERSION}, found {version}")
    state = msgspec.json.decode(document, type=State)
    for fd in state.descriptors():
        try:
            os.fstat(fd)
        except OSError:
            raise ValueError(f"descriptor {fd} is not open") from None
    return state


def inherited(environment: MutableMapping[str, str]) -> State | None:
    """What this process was in its earlier life; None if it had none. No later child finds the variable.

    Raises ForwarderError if it cannot be understood: then nothing but this process's end can help.
    """
    number = environment.pop(VARIABLE, None)
    if number is None:
        return None
    try:
        fd = int(number)
        document = os.pread(fd, os.fstat(fd).st_size, 0)
        os.close(fd)
        state = decode(document)
    except (OSError, ValueError) as error:
        raise ForwarderError(f"cannot take over from the version before: {error}") from None
    for fd in state.descriptors():
        os.set_inheritable(fd, False)
    return state


def check_upgrade(version: int) -> None:
    """Asked by the program before, whose state has that version: whether this one is whole, and can take over.

    Raises ForwarderError, or whatever is wrong with the installation.
    """
    if version != VERSION:
        raise ForwarderError(f"expected a state of version {VERSION} to take over, found {version}")
    for module in ("forwarder.launch", "workers.worker"):
        importlib.import_module(module)


@dataclass(frozen=True, slots=True)
class Program:
    """How this process was started.

    prefix: interpreter, its options and what it runs; arguments: what comes after. directory: where relative paths of
    both begin.
    """

    prefix: tuple[str, ...]
    arguments: tuple[str, ...]
    directory: str

    @classmethod
    def of_this_process(cls) -> "Program":
        """To be called before anything changes the directory."""
        arguments = sys.argv[1:]
        prefix = [sys.executable, *sys.orig_argv[1 : len(sys.orig_argv) - len(arguments)]]
        return cls(tuple(prefix), tuple(arguments), os.getcwd())

    def check(self, file: Path) -> list[str]:
        """The command that asks the program as it is now whether it can take over, and what it thinks of the file."""
        return [*self.prefix, "check", "--upgrade-from", str(VERSION), "-c", str(file)]

    def become(self, state: State) -> None:
        """Replaces the program of this process. Returns only by raising OSError; all is as before then.

        To be called with signals blocked: those that come meanwhile wait for the new program.
        """
        _check_room()
        memory = os.memfd_create("forwarder-state")
        here = os.getcwd()
        try:
            with open(os.dup(memory), "wb") as file:
                file.write(encode(state))
            os.set_inheritable(memory, True)
            for fd in state.descriptors():
                os.set_inheritable(fd, True)
            with contextlib.suppress(OSError):
                os.chdir(self.directory)
            environment: dict[str, Any] = {**os.environ, VARIABLE: str(memory)}
            os.execve(self.prefix[0], [*self.prefix, *self.arguments], environment)
        except OSError:
            os.chdir(here)
            for fd in state.descriptors():
                os.set_inheritable(fd, False)
            os.close(memory)
            raise


def _check_room() -> None:
    """A start takes some descriptors; without them the new program and all the rest would end. Raises OSError."""
    spare: list[int] = []
    try:
        for _ in range(DESCRIPTORS_SPARE):
            spare.append(os.dup(0))
    finally:
        for fd in spare:
            os.close(fd)
