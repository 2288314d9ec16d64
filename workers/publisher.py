"""A worker's statistics: collected and written to its page once a second.

The cost is bounded, not only small: with very many tunnels or carriers a report takes longer, and the next one comes
the later, so that all of them together take less than COST of a core.
"""

import logging
import os
import time
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any, Protocol

from workers.boot import Boot
from workers.io.context import Context
from workers.shm.arena import Side
from workers.shm.layout import EGRESS_BYTES, INGRESS_BYTES
from workers.shm.stats import PageWriter, named
from workers.shm.totals import FORMAT, LAG_BOUNDS_S, TunnelTotals, WorkerTotals, add_by_name

LOOK_S = 0.25
"""How often the event loop's lag is measured."""
EVERY_S = 1.0
COST = 0.001

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

log = logging.getLogger("forwarder.worker")


class Reporting(Protocol):
    """A tunnel."""

    def totals(self) -> TunnelTotals:
        """This worker's part of it."""


class Publisher:
    """Owns the page of the worker's slot. `tunnels` are the worker's, by index."""

    def __init__(self, boot: Boot, context: Context, tunnels: Mapping[int, Reporting]) -> None:
        self._context = context
        self._tunnels = tunnels
        self._page = PageWriter(boot.stats, boot.slot)
        self._statm = _open_statm()
        self._due_s = time.monotonic() + LOOK_S
        self._next_s = 0.0
        self._every_s = EVERY_S
        self._lags = [0] * (len(LAG_BOUNDS_S) + 1)
        self._lag_sum_s = 0.0
        self._last: dict[int, TunnelTotals] = {}
        self._past: dict[str, TunnelTotals] = {}
        self._has_failed = False

    def on_time(self) -> None:
        """Every LOOK_S."""
        now_s = time.monotonic()
        lag_s = max(now_s - self._due_s, 0.0)
        self._lags[bisect_left(LAG_BOUNDS_S, lag_s)] += 1
        self._lag_sum_s += lag_s
        self._due_s = now_s + LOOK_S - (lag_s if lag_s < LOOK_S else 0.0)
        if now_s >= self._next_s:
            self.publish(now_s)

    def publish(self, now_s: float) -> None:
        """Write the page now."""
        began_s = time.thread_time()
        try:
            self._page.write(self._report(now_s))
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                log.warning("no statistics reason=%s", error)
        took_s = time.thread_time() - began_s
        self._every_s = max(EVERY_S, took_s / COST)
        self._next_s = now_s + self._every_s - LOOK_S / 2

    def _report(self, now_s: float) -> WorkerTotals:
        context = self._context
        arena = context.memory.arena
        resident, shared = self._memory()
        return WorkerTotals(
            format=FORMAT,
            slot=context.slot,
            serial=context.serial,
            pid=os.getpid(),
            state="draining" if context.is_leaving else "up",
            at_s=now_s,
            every_s=self._every_s,
            cpu_s=time.process_time(),
            resident_bytes=resident,
            shared_bytes=shared,
            arena_used_bytes=arena.used_bytes(Side.INGRESS) + arena.used_bytes(Side.EGRESS),
            arena_bytes=INGRESS_BYTES + EGRESS_BYTES,
            lags=self._lags,
            lag_sum_s=self._lag_sum_s,
            dropped_descriptors=context.mesh.dropped_descriptors,
            dropped_frames=context.memory.dropped_frames,
            fragments=self._fragments(),
            tunnels=named(self._shares()),
        )

    def _memory(self) -> tuple[int, int]:
        """Bytes that are resident, and of those what is of files and shared memory."""
        if self._statm is None:
            return 0, 0
        fields = os.pread(self._statm, 128, 0).split()
        return int(fields[1]) * _PAGE_BYTES, int(fields[2]) * _PAGE_BYTES

    def _fragments(self) -> dict[str, int]:
        """Spray tunnels of a worker have one reassembler."""
        for tunnel in self._tunnels.values():
            found: Any = getattr(tunnel, "reassembler", None)
            if found is not None:
                return {"expired": found.expired, "evicted": found.evicted, "rejected": found.rejected}
        return {}

    def _shares(self) -> list[TunnelTotals]:
        """The tunnels by name. One that has taken the place of another of its name goes on with that one's counters."""
        found = {index: self._tunnels[index].totals() for index in sorted(self._tunnels)}
        for index in self._last.keys() - found.keys():
            add_by_name(self._past, self._last[index].past())
        self._last = found
        shares: dict[str, TunnelTotals] = {}
        for name, share in ((each.name, each) for each in found.values()):
            before = shares.get(name) or self._past.get(name)
            if before is not None:
                whole = TunnelTotals(name, share.mode)
                whole.add(before)
                whole.add(share)
            shares[name] = share if before is None else whole
        return list(shares.values())


def _open_statm() -> int | None:
    """None where there is no /proc."""
    try:
        return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
