"""What the metrics child makes of the statistics pages: a snapshot, and the throughput of the last minutes."""

import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from workers.shm.stats import INSTANCE_PAGE, PAST_PAGE, read_page, read_workers
from workers.shm.totals import InstanceTotals, PastTotals, TunnelTotals, WorkerTotals, add_by_name

SAMPLE_S = 2.0
POINTS = 150
"""Of each line: five minutes."""
SILENT_S = 10.0
"""The supervisor, which says something every second, is not well."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that the pages say at one time. tunnels: whole ones, in the order of the configuration."""

    at_s: float
    instance: InstanceTotals | None
    workers: list[WorkerTotals]
    tunnels: list[TunnelTotals]

    def missing(self) -> list[str]:
        """What keeps the instance from being well, a line each."""
        instance = self.instance
        if instance is None:
            return ["the supervisor has said nothing yet"]
        lines = []
        if self.at_s - instance.at_s > SILENT_S:
            lines.append(f"the supervisor has been silent for {self.at_s - instance.at_s:.0f} s")
        if instance.state != "up":
            lines.append(f"forwarder is {instance.state}")
        lines += [f"worker {seat.slot} is {seat.state}" for seat in instance.seats if seat.state != "up"]
        return lines


def look(memory: int) -> Snapshot:
    """Reads all pages; the counters of workers that are gone last, as `workers.shm.stats` has it."""
    at_s = time.monotonic()
    instance = read_page(memory, INSTANCE_PAGE, InstanceTotals)
    found = read_workers(memory)
    past = read_page(memory, PAST_PAGE, PastTotals)
    folded = past.folded if past is not None else {}
    workers = [each for each in found if folded.get(each.slot) != each.serial]
    names = [TunnelTotals(name, mode) for name, mode in instance.tunnels] if instance is not None else []
    tunnels = {each.name: each for each in names}
    for worker in workers:
        for share in worker.tunnels:
            add_by_name(tunnels, share)
    for share in past.tunnels if past is not None else ():
        if share.name in tunnels:
            tunnels[share.name].add(share)
    return Snapshot(at_s, instance, workers, list(tunnels.values()))


class Load(NamedTuple):
    """Of a worker lately: cores in use, and how late its event loop is, on the average."""

    cpu: float
    lag_s: float


class Line:
    """The rates of a tunnel in bytes a second, POINTS of each, the newest last."""

    __slots__ = ("inward", "outward")

    def __init__(self) -> None:
        self.inward, self.outward = array("f", [0.0] * POINTS), array("f", [0.0] * POINTS)

    def add(self, inward: float, outward: float) -> None:
        for points, value in ((self.inward, inward), (self.outward, outward)):
            points.pop(0)
            points.append(value)


class History:
    """Lines of all tunnels, by name, and loads of workers, by serial.

    Rates are taken between two reports of a worker, whenever those came.
    """

    def __init__(self) -> None:
        self.lines: dict[str, Line] = {}
        self.loads: dict[int, Load] = {}
        self._before: dict[int, WorkerTotals] = {}
        self._rates: dict[int, dict[str, tuple[float, float]]] = {}

    def sample(self, seen: Snapshot) -> None:
        """Every SAMPLE_S."""
        workers = {each.serial: each for each in seen.workers}
        for serial, worker in workers.items():
            before = self._before.get(serial)
            if before is not None and worker.at_s > before.at_s:
                self._rates[serial] = dict(_rates(before, worker))
                self.loads[serial] = _load(before, worker)
            elif seen.at_s - worker.at_s > SILENT_S + worker.every_s:
                self._rates.pop(serial, None)
        self._before = workers
        for gone in self._rates.keys() - workers.keys():
            del self._rates[gone]
        self.loads = {serial: load for serial, load in self.loads.items() if serial in workers}
        self._add([tunnel.name for tunnel in seen.tunnels])

    def _add(self, names: list[str]) -> None:
        for gone in self.lines.keys() - set(names):
            del self.lines[gone]
        for name in names:
            rates = [each[name] for each in self._rates.values() if name in each]
            line = self.lines.setdefault(name, Line())
            line.add(sum(each[0] for each in rates), sum(each[1] for each in rates))


def _load(before: WorkerTotals, now: WorkerTotals) -> Load:
    looks = sum(now.lags) - sum(before.lags)
    cpu = (now.cpu_s - before.cpu_s) / (now.at_s - before.at_s)
    return Load(max(cpu, 0.0), max(now.lag_sum_s - before.lag_sum_s, 0.0) / max(looks, 1))


def _rates(before: WorkerTotals, now: WorkerTotals) -> Iterator[tuple[str, tuple[float, float]]]:
    took_s = now.at_s - before.at_s
    known = {share.name: share for share in before.tunnels}
    for share in now.tunnels:
        old = known.get(share.name)
        if old is not None:
            inward, outward = share.bytes_in - old.bytes_in, share.bytes_out - old.bytes_out
            yield share.name, (max(inward, 0) / took_s, max(outward, 0) / took_s)
