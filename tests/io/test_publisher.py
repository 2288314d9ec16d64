import errno
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from workers import publisher
from workers.boot import Boot
from workers.io.context import Context
from workers.publisher import EVERY_S, LOOK_S, Publisher
from workers.shm.stats import create_pages, read_page
from workers.shm.totals import TunnelTotals, WorkerTotals


class Tunnel:
    def __init__(self, name: str, bytes_in: int) -> None:
        self.share = TunnelTotals(name, "stripe", bytes_in=bytes_in, flows_open=1)

    def totals(self) -> TunnelTotals:
        return self.share


class Place:
    """A worker's publisher on a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s, self.cost_s, self.spent_s = 50.0, 0.0, 0.0
        clock = SimpleNamespace(monotonic=lambda: self.now_s, thread_time=self.spend, process_time=lambda: 1.5)
        monkeypatch.setattr(publisher, "time", clock)
        self.memory = create_pages()
        arena = SimpleNamespace(used_bytes=lambda side: 10)
        context = SimpleNamespace(
            slot=2,
            serial=77,
            is_leaving=False,
            memory=SimpleNamespace(arena=arena, dropped_frames=3),
            mesh=SimpleNamespace(dropped_descriptors=4),
        )
        self.tunnels: dict[int, Any] = {}
        boot = SimpleNamespace(stats=self.memory, slot=2)
        self.publisher = Publisher(cast(Boot, boot), cast(Context, context), self.tunnels)

    def spend(self) -> float:
        self.spent_s += self.cost_s
        return self.spent_s

    def turn(self, late_s: float = 0.0) -> None:
        self.now_s += LOOK_S + late_s
        self.publisher.on_time()
        self.now_s -= late_s

    def report(self) -> WorkerTotals | None:
        return read_page(self.memory, 2, WorkerTotals)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    place = Place(monkeypatch)
    yield place
    os.close(place.memory)


def times(place: Place, turns: int) -> list[float]:
    """When reports were written."""
    seen: list[float] = []
    for _ in range(turns):
        place.turn()
        report = place.report()
        if report is not None and report.at_s not in seen:
            seen.append(report.at_s)
    return seen


def test_reports_once_a_second(place: Place) -> None:
    assert times(place, 12) == [50.25, 51.25, 52.25]
    report = place.report()
    assert report is not None
    assert (report.slot, report.serial, report.pid, report.state, report.cpu_s) == (2, 77, os.getpid(), "up", 1.5)
    assert (report.dropped_frames, report.dropped_descriptors, report.arena_used_bytes) == (3, 4, 20)
    assert 1 << 20 < report.shared_bytes < report.resident_bytes < 1 << 32


def test_report_that_costs_much_comes_seldom(place: Place) -> None:
    place.cost_s = 0.004
    assert times(place, 40) == [50.25, 54.25, 58.25]
    report = place.report()
    assert report is not None and report.every_s == 4.0 > EVERY_S


def test_lag_is_counted_by_its_size(place: Place) -> None:
    for late_s in (0.0, 0.0, 0.0005, 0.03, 5.0):
        place.turn(late_s)
    report = place.report()
    assert report is not None and sum(report.lags) == 5
    assert report.lags[0] == 3 and report.lags[-1] == 1 and report.lag_sum_s == pytest.approx(5.03, abs=0.01)


def test_tunnel_in_anothers_place_goes_on_with_its_counters(place: Place) -> None:
    place.tunnels |= {0: Tunnel("web", 100), 1: Tunnel("ssh", 5)}
    place.publisher.publish(50.0)
    place.tunnels[2] = Tunnel("web", 1)
    place.publisher.publish(51.0)
    report = place.report()
    assert report is not None and [(each.name, each.bytes_in, each.flows_open) for each in report.tunnels] == [
        ("web", 101, 2),
        ("ssh", 5, 1),
    ]
    del place.tunnels[0], place.tunnels[1]
    for _ in range(3):
        place.publisher.publish(52.0)
    report = place.report()
    assert report is not None
    assert [(each.name, each.bytes_in, each.flows_open) for each in report.tunnels] == [("web", 101, 1)]
    place.tunnels[3] = Tunnel("ssh", 2)
    place.publisher.publish(53.0)
    report = place.report()
    assert report is not None and {each.name: each.bytes_in for each in report.tunnels} == {"web": 101, "ssh": 7}


def test_memory_that_cannot_be_written_is_told_once(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    for _ in range(3):
        place.publisher.publish(50.0)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["no statistics reason=[Errno 28] No space left on device"]
