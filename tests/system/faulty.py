"""`forwarder start` with workers that have a fault: `python -m tests.system.faulty FAULT start -c FILE`.

orphans            the kernel does not kill them with their supervisor, as after a setuid that clears the setting
arena:IN,OUT       their arenas have quotas of so many KiB
store:SLOT,FILE    the worker in that slot dies at a store to shared memory, as FILE says (`Plan`)
"""

import ctypes
import dataclasses
import mmap
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from logging import WARNING
from pathlib import Path
from typing import Any

from forwarder import config
from forwarder.child import WorkerMain, run_worker
from forwarder.launch import run
from forwarder.logs import log
from forwarder.privileges import PR_SET_PDEATHSIG
from forwarder.source import Source
from forwarder.timing import Timing
from workers.boot import Boot

IMPATIENT = Timing(young_s=0.0)
"""Whoever dies is replaced at once, however often."""
KINDS = ("_pack_into", "eventfd_write", "eventfd_read", "read_into", "open_into", "copy_in", "heartbeat")
"""Of stores: see `patch_stores`."""
PATIENCE = 100
"""Whoever waits for a store of one kind dies after so many of others."""


class Plan:
    """A file that the test and all workers share: whether to die, how often that was done, how many were born.

    Every second process dies at its first, second, ... store since ARMED; between them, one at its first store of each
    kind in turn, then at its second.
    """

    _FIELDS = struct.Struct("=3Q")
    ARMED, DEATHS, BORN = range(3)

    def __init__(self, file: Path) -> None:
        if not file.exists():
            file.write_bytes(bytes(self._FIELDS.size))
        with open(file, "r+b") as opened:
            self._map = mmap.mmap(opened.fileno(), self._FIELDS.size)
        self._values = memoryview(self._map).cast("Q")

    def __getitem__(self, field: int) -> int:
        return self._values[field]

    def __setitem__(self, field: int, value: int) -> None:
        self._values[field] = value


class Stores:
    """Counts this process's stores to shared memory, and ends it at one of them."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        turn, is_by_kind = divmod(plan[Plan.BORN], 2)
        self._kind = KINDS[turn % len(KINDS)] if is_by_kind else None
        self._left = turn // len(KINDS) if is_by_kind else turn
        self._done = 0
        plan[Plan.BORN] += 1

    def is_last(self, kind: str) -> bool:
        """Call it before each store; True if this is the one to die at."""
        if not self._plan[Plan.ARMED]:
            return False
        self._done += 1
        self._left -= self._kind in (None, kind)
        return self._left < 0 or self._done > PATIENCE

    def die(self, kind: str) -> None:
        log(WARNING, "dies at a store", kind=kind, number=self._done)
        self._plan[Plan.DEATHS] += 1
        os.kill(os.getpid(), signal.SIGKILL)

    def torn(self, kind: str, store: Callable[..., Any], tear: Callable[..., Any]) -> Callable[..., Any]:
        """`store`, or `tear` and then death."""

        def call(*arguments: Any) -> Any:
            if self.is_last(kind):
                tear(*arguments)
                self.die(kind)
            return store(*arguments)

        return call


class Heartbeat:
    """The heartbeat page, whose stores count."""

    def __init__(self, beats: memoryview, stores: Stores) -> None:
        self._beats, self._stores = beats, stores

    def __getitem__(self, slot: int) -> int:
        return int(self._beats[slot])

    def __setitem__(self, slot: int, beat: int) -> None:
        if self._stores.is_last("heartbeat"):
            self._stores.die("heartbeat")
        self._beats[slot] = beat


def nothing(*_: Any) -> None:
    """Die before the store."""


def half_a_descriptor(memory: Any, at: int, *fields: int) -> None:
    """The first four fields are the new ones, the others what was there."""
    struct.pack_into("=BBHI", memory, at, *fields[:4])


def garbage(data: memoryview) -> None:
    """Half of what was to be written, and it is wrong."""
    data[: len(data) // 2] = b"\xa5" * (len(data) // 2)


def patch_stores(stores: Stores) -> None:
    """Every store of a worker: a ring's entries and counts, and a slot's bytes from an application or a stripe."""
    # Only now may gevent come into the process.
    from workers.core.record import Opener  # noqa: PLC0415
    from workers.io.endpoint import Endpoint  # noqa: PLC0415
    from workers.io.memory import Memory  # noqa: PLC0415
    from workers.shm import ring  # noqa: PLC0415

    patches: list[tuple[Any, str, Callable[..., Any]]] = [
        (ring, "_pack_into", half_a_descriptor),
        (ring, "eventfd_write", nothing),
        (ring, "eventfd_read", nothing),
        (Endpoint, "read_into", lambda _, view: garbage(view)),
        (Opener, "open_into", lambda _self, _body, _prefix, out: garbage(out)),
        (Memory, "copy_in", nothing),
    ]
    for owner, name, tear in patches:
        setattr(owner, name, stores.torn(name, getattr(owner, name), tear))


def orphans(boot: Boot) -> None:
    """A worker that only the lifetime pipe tells of its supervisor's end."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)
    run_worker(boot)


def dying_at_stores(slot: int, file: Path) -> WorkerMain:
    plan = Plan(file)

    def main(boot: Boot) -> None:
        if boot.slot == slot:
            stores = Stores(plan)
            patch_stores(stores)
            boot = dataclasses.replace(boot, heartbeat=Heartbeat(boot.heartbeat, stores))  # type: ignore[arg-type]
        run_worker(boot)

    return main


def with_small_arena(ingress_bytes: int, egress_bytes: int) -> WorkerMain:
    """The quotas are names in the modules that use them."""

    def main(boot: Boot) -> None:
        from workers import worker  # noqa: PLC0415
        from workers.io import egress  # noqa: PLC0415

        vars(worker).update(INGRESS_BYTES=ingress_bytes, EGRESS_BYTES=egress_bytes)
        vars(egress).update(EGRESS_BYTES=egress_bytes)
        worker.run(boot)

    return main


def worker_main(fault: str) -> WorkerMain:
    name, _, options = fault.partition(":")
    values = options.split(",")
    if name == "orphans":
        return orphans
    if name == "arena":
        return with_small_arena(int(values[0]) << 10, int(values[1]) << 10)
    if name == "descriptors":
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(values[0]), int(values[0])))
        return run_worker
    assert name == "store"
    return dying_at_stores(int(values[0]), Path(values[1]))


if __name__ == "__main__":
    _, fault, command, option, file = sys.argv
    assert (command, option) == ("start", "-c")
    settings = config.load(Path(file)).settings
    sys.exit(run(settings, Source(Path(file)), worker_main=worker_main(fault), timing=IMPATIENT))
