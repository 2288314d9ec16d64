"""Pages of statistics as an instance of two workers would write them."""

import os
import time

import msgspec

from workers.shm.stats import INSTANCE_PAGE, PageWriter, create_pages
from workers.shm.totals import FORMAT, LAG_BOUNDS_S, InstanceTotals, Seat, TunnelTotals, WorkerTotals

NAMES = (("web", "stripe"), ("kcp", "spray"))


class Pages:
    """`memory` closes with the block. A worker's totals grow with its `beat`."""

    def __init__(self, names: tuple[tuple[str, str], ...] = NAMES) -> None:
        self.memory = create_pages()
        self.names = names
        self._writers = {page: PageWriter(self.memory, page) for page in (0, 1, INSTANCE_PAGE)}

    def __enter__(self) -> "Pages":
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self.memory)

    def instance(self, states: tuple[str, ...] = ("up", "up"), state: str = "up", age_s: float = 0.0) -> None:
        now = time.monotonic() - age_s
        seats = [Seat(slot, each, slot) for slot, each in enumerate(states)]
        about = ("client", "1.2.3", os.getpid())
        self._writers[INSTANCE_PAGE].write(
            InstanceTotals(FORMAT, *about, state, now, now - 90, seats, [(name, mode) for name, mode in self.names])
        )

    def tunnel(self, name: str, mode: str, beat: int) -> TunnelTotals:
        share = TunnelTotals(name, mode, bytes_in=1000 * beat, bytes_out=10 * beat, flows_total=beat, flows_open=1)
        kind = share.kind("stripe" if mode == "stripe" else "udp")
        kind.wanted, kind.dialled = 5, 6
        kind.see(20_000, 0.01, 3000)
        kind.see(40_000, 0.03, 0)
        if mode == "spray":
            share.drop("no_port", 4)
            share.records_rejected = 2
        return share

    def worker(self, slot: int, beat: int = 1, serial: int = 0, at_s: float | None = None) -> WorkerTotals:
        lags = [4 * beat] + [0] * len(LAG_BOUNDS_S)
        report = WorkerTotals(
            format=FORMAT,
            slot=slot,
            serial=serial or 50 + slot,
            pid=4000 + slot,
            state="up",
            at_s=time.monotonic() if at_s is None else at_s,
            every_s=1.0,
            cpu_s=0.25 * beat,
            resident_bytes=40 << 20,
            shared_bytes=10 << 20,
            arena_used_bytes=1 << 20,
            arena_bytes=1 << 30,
            lags=lags,
            lag_sum_s=0.002 * beat,
            dropped_descriptors=0,
            dropped_frames=1,
            fragments={"expired": 3},
            tunnels=[self.tunnel(name, mode, beat) for name, mode in self.names],
        )
        self._writers[slot].write(report)
        return msgspec.structs.replace(report)
