"""What a worker reports of itself when it is asked: for `forwarder status`, and for tests what it has open."""

import gc
import os
from collections.abc import Iterable
from typing import Protocol

import gevent

from workers.io.context import Context, clock_us
from workers.shm.arena import Side
from workers.shm.layout import EGRESS_BYTES, INGRESS_BYTES
from workers.status import TunnelStatus, WorkerReport, WorkerStatus


class Reporting(Protocol):
    """A tunnel's part in this worker."""

    def status(self, now_us: int) -> TunnelStatus:
        """As `forwarder status` shows it."""

    def count_open(self) -> dict[str, int]:
        """What must be level when nothing goes on."""


def report(context: Context, tunnels: Iterable[Reporting], *, counts: bool) -> WorkerReport:
    """Everything; `counts`: and what is open, which takes looking at every object of the process."""
    now_us, ends = clock_us(), list(tunnels)
    found = [end.status(now_us) for end in ends]
    return WorkerReport(
        worker=_worker(context, found), tunnels=found, open=_count_open(context, ends) if counts else {}
    )


def _worker(context: Context, tunnels: list[TunnelStatus]) -> WorkerStatus:
    arena = context.memory.arena
    return WorkerStatus(
        id=context.slot,
        serial=context.serial,
        pid=os.getpid(),
        state="draining" if context.is_leaving else "up",
        streams=sum(tunnel.flows_open for tunnel in tunnels if tunnel.mode == "stripe"),
        conversations=sum(tunnel.flows_open for tunnel in tunnels if tunnel.mode == "spray"),
        carriers=sum(len(session.carriers) for tunnel in tunnels for session in tunnel.sessions),
        restarts=0,
        arena_used_bytes=arena.used_bytes(Side.INGRESS) + arena.used_bytes(Side.EGRESS),
        arena_bytes=INGRESS_BYTES + EGRESS_BYTES,
    )


def _count_open(context: Context, tunnels: list[Reporting]) -> dict[str, int]:
    counts = {
        "descriptors": len(os.listdir("/proc/self/fd")) - 1,
        "watchers": context.loop.activecnt,
        "greenlets": sum(isinstance(each, gevent.Greenlet) and not each.dead for each in gc.get_objects()),
        "slots": context.memory.arena.slots_in_use,
        "slots_lent": context.memory.arena.slots_lent,
        "credit_reserved_bytes": context.credit.reserved,
        "endpoints": len(context.watch),
        "dropped_frames": context.memory.dropped_frames,
        "dropped_descriptors": context.mesh.dropped_descriptors,
    }
    for tunnel in tunnels:
        for name, value in tunnel.count_open().items():
            counts[name] = counts.get(name, 0) + value
    return counts
