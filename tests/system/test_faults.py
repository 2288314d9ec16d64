"""What breaks, and what applications see of it: stripes, workers, whole instances and the link."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.netlab import Lab, LabUnavailable, Link
from tests.system.pair import ENDS, Pair
from tests.system.traffic import RESET, WHOLE, Traffic

SOON_S = 5.0
"""How long it may take until the far end of a dead worker's streams reads a reset."""
BACK_S = 3.0
"""How long until new connections work again."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A bare wire."""
    try:
        with Lab(emulate=False) as made:
            yield made
    except LabUnavailable as why:
        pytest.skip(str(why))


@pytest.fixture(scope="module")
def link() -> Iterator[Lab]:
    """A link of 100 Mbit/s and 20 ms, which can be broken."""
    try:
        with Lab(Link(delay_ms=10, rate_bps=100e6)) as made:
            yield made
    except LabUnavailable as why:
        pytest.skip(str(why))


def is_alive(pid: int) -> bool:
    """A zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def workers(pair: Pair, end: str) -> list[dict[str, Any]]:
    """By slot."""
    found: list[dict[str, Any]] = sorted(pair.status(end)["workers"], key=lambda worker: worker["id"])
    return found


def kill_worker(pair: Pair, end: str, slot: int) -> float:
    """SIGKILL; returns when."""
    os.kill(workers(pair, end)[slot]["pid"], signal.SIGKILL)
    return time.monotonic()


def wait_serving(pair: Pair) -> None:
    """Every worker is up, every stripe too."""
    for end in ENDS:
        pair.wait(lambda end=end: all(each["state"] == "up" for each in workers(pair, end)), f"workers at the {end}")
    pair.wait_carriers(pair.somaxconn)


def await_reset(sock: socket.socket, timeout_s: float) -> float:
    """Reads to the end, which has to be a reset and not an end of stream; returns when it came."""
    sock.settimeout(timeout_s)
    with pytest.raises(ConnectionResetError):
        while sock.recv(65536):
            pass
        pytest.fail("the stream ended as if it were complete")
    return time.monotonic()


def levels(pair: Pair) -> dict[str, Any]:
    """What has to be level: each worker's counts, and the supervisors' descriptors and children."""
    found: dict[str, Any] = {end: pair.open_counts(end) for end in ENDS}
    for end, process in pair.processes.items():
        found[f"{end} descriptors"] = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        found[f"{end} children"] = [is_alive(int(child)) for child in children]
    return found


# Workers


@pytest.mark.parametrize("count", [2, 1])
@pytest.mark.parametrize("end", ENDS)
def test_killed_worker_resets_both_ends_of_its_streams_and_no_other(lab: Lab, end: str, count: int) -> None:
    with Pair(lab, workers=(count, count)) as pair, Traffic(pair) as traffic:
        exchanges = traffic.open(12, total_bytes=3 << 20, rate_bps=4e6)
        while not all(worker["streams"] for worker in workers(pair, end)):
            assert len(exchanges) < 100, "all connections go to one worker"
            exchanges += traffic.open(4, total_bytes=3 << 20, rate_bps=4e6)
        traffic.wait_received(exchanges, 64 << 10)
        before = workers(pair, end)
        killed_s = kill_worker(pair, end, 0)
        new = traffic.open_again(1 << 20, BACK_S)
        opened_s = time.monotonic()
        traffic.wait([exchange for exchange in exchanges if exchange.outcome == RESET] + [new], 20)
        pair.wait(lambda: sum(each.outcome == RESET for each in exchanges) == before[0]["streams"], "resets", SOON_S)
        for exchange in exchanges:
            exchange.speed_up(1e12)
        traffic.wait(exchanges, 30)
        after = workers(pair, end)
    reset = [exchange for exchange in exchanges if exchange.outcome == RESET]
    assert len(reset) == before[0]["streams"], exchanges
    assert all(exchange.outcome in (WHOLE, RESET) for exchange in exchanges), exchanges
    assert max(each.ended_s for exchange in reset for each in exchange.ends) - killed_s < SOON_S
    assert new.outcome == WHOLE and opened_s - killed_s < BACK_S
    assert after[0]["serial"] != before[0]["serial"] and after[0]["restarts"] == before[0]["restarts"] + 1
    assert after[1:] == [] or after[1]["serial"] == before[1]["serial"]


def test_ten_workers_killed_in_a_row_leave_nothing_open(lab: Lab) -> None:
    with Pair(lab, workers=(2, 2)) as pair, Traffic(pair) as traffic:
        traffic.wait(traffic.open(8, total_bytes=1 << 20), 20)
        before = levels(pair)
        for number in range(10):
            exchanges = traffic.open(4, total_bytes=16 << 20, rate_bps=8e6)
            kill_worker(pair, ENDS[number % 2], number // 2 % 2)
            wait_serving(pair)
            for exchange in exchanges:
                exchange.speed_up(1e12)
            traffic.wait(exchanges, 20)
            assert all(exchange.outcome in (WHOLE, RESET) for exchange in exchanges), exchanges
        exchanges = traffic.open(8, total_bytes=1 << 20)
        traffic.wait(exchanges, 20)
        assert all(exchange.outcome == WHOLE for exchange in exchanges), exchanges
        with contextlib.suppress(AssertionError):
            pair.wait(lambda: levels(pair) == before, "levels", 10)
        assert levels(pair) == before
