"""Workers that are killed, that hang, that lose their supervisor, or that die in the middle of a store."""

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.netlab import Lab
from tests.system.faulty import KINDS, Plan
from tests.system.pair import ENDS, Pair
from tests.system.processes import (
    is_alive,
    settled_levels,
    skip_unless_nobody_can_import,
    wait_level,
    wait_serving,
    workers,
)
from tests.system.traffic import RESET, WHOLE, Exchange, Traffic

NOTICED_S = 3.0
"""From the fault until the process is gone."""
REPLACED_S = 1.0
"""From there until the next one serves."""
ORPHAN_S = 2.0
RESET_S = 2.0
"""From a worker's end until the last application at either end reads a reset."""
MIB = 1 << 20
STORES = int(os.environ.get("FORWARDER_TEST_STORES", "14"))
"""At how many stores a worker dies, at each end."""


def open_on_all(pair: Pair, traffic: Traffic, total_bytes: int, rate_bps: float) -> list[Exchange]:
    """At least eight connections, some in every worker of either end; all of them move."""
    exchanges = traffic.open(8, total_bytes, rate_bps)
    while not all(worker["streams"] for end in ENDS for worker in workers(pair, end)):
        assert len(exchanges) < 100, "all connections go to one worker"
        exchanges += traffic.open(2, total_bytes, rate_bps)
    traffic.wait_received(exchanges, 64 << 10)
    return exchanges


def wait_until(true: Callable[[], object], what: str, timeout_s: float) -> float:
    """Returns when."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.01)
    return time.monotonic()


def count_outcomes(exchanges: list[Exchange], outcome: str) -> int:
    return sum(exchange.outcome == outcome for exchange in exchanges)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGSTOP], ids=lambda sig: sig.name)
def test_worker_that_dies_or_hangs_is_replaced_in_time_and_others_lose_nothing(
    lab: Lab, end: str, sig: signal.Signals
) -> None:
    with Pair(lab, workers=(2, 2)) as pair, Traffic(pair) as traffic:
        exchanges = open_on_all(pair, traffic, 6 * MIB, rate_bps=8e6)
        before = workers(pair, end)
        victim = before[0]["pid"]
        ready = pair.log(end).count("a worker is ready")
        os.kill(victim, sig)
        struck_s = time.monotonic()
        gone_s = wait_until(lambda: not is_alive(victim), "end of the worker", NOTICED_S + 2)
        replaced_s = wait_until(lambda: pair.log(end).count("a worker is ready") > ready, "a replacement", 10)
        wait_until(lambda: count_outcomes(exchanges, RESET) >= before[0]["streams"], f"resets{exchanges}", 10)
        wait_serving(pair)
        new = traffic.open(4, MIB)
        for exchange in exchanges:
            exchange.speed_up(1e12)
        traffic.wait(exchanges + new, 30)
        after = workers(pair, end)
    assert gone_s - struck_s < NOTICED_S
    assert replaced_s - gone_s < REPLACED_S
    assert count_outcomes(exchanges, RESET) == before[0]["streams"], exchanges
    assert count_outcomes(exchanges, WHOLE) == len(exchanges) - before[0]["streams"], exchanges
    assert max(each.ended_s for each in exchanges if each.outcome == RESET) - gone_s < RESET_S, exchanges
    assert count_outcomes(new, WHOLE) == 4, new
    assert [worker["restarts"] for worker in after] == [1, 0]
    assert after[0]["serial"] != before[0]["serial"] and after[1]["serial"] == before[1]["serial"]


def test_paused_machine_kills_nobody(lab: Lab) -> None:
    """Every process sleeps for longer than a worker may be still; the supervisors sleep last and wake first."""
    with Pair(lab, workers=(2, 2)) as pair, Traffic(pair) as traffic:
        exchanges = open_on_all(pair, traffic, 4 * MIB, rate_bps=8e6)
        pids = [pid for end in ENDS for pid in pair.worker_pids(end)]
        supervisors = [pair.processes[end].pid for end in ENDS]
        for processes, sig, pause_s in (
            (pids, signal.SIGSTOP, 0.6),
            (supervisors, signal.SIGSTOP, 3.0),
            (supervisors, signal.SIGCONT, 0.7),
            (pids, signal.SIGCONT, 0.0),
        ):
            for pid in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sig)
            time.sleep(pause_s)
        for exchange in exchanges:
            exchange.speed_up(1e12)
        traffic.wait(exchanges, 30)
        assert count_outcomes(exchanges, WHOLE) == len(exchanges), exchanges
        for end in ENDS:
            assert [worker["restarts"] for worker in workers(pair, end)] == [0, 0], pair.logs()


# Without a supervisor


def test_no_worker_outlives_a_killed_supervisor(lab: Lab) -> None:
    """Not a busy one, nor one that cannot run at all."""
    with Pair(lab, workers=(2, 2)) as pair, Traffic(pair) as traffic:
        exchanges = open_on_all(pair, traffic, 1024 * MIB, rate_bps=1e12)
        assert_no_orphans(pair, stopped=True)
        traffic.wait(exchanges, 5)
        assert count_outcomes(exchanges, RESET) == len(exchanges), exchanges


def test_no_worker_that_gave_up_its_rights_outlives_a_killed_supervisor(lab: Lab) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may become another user")
    skip_unless_nobody_can_import()
    nobody = {"client": 'user = "nobody"', "server": 'user = "nobody"', "congestion": None}
    with Pair(lab, workers=(2, 2), **nobody) as pair, Traffic(pair) as traffic:  # type: ignore[arg-type]
        exchanges = open_on_all(pair, traffic, 1024 * MIB, rate_bps=1e12)
        for pid in [pid for end in ENDS for pid in pair.worker_pids(end)]:
            assert "\nUid:\t0" not in Path(f"/proc/{pid}/status").read_text()
        assert_no_orphans(pair, stopped=True)
        traffic.wait(exchanges, 5)
        assert count_outcomes(exchanges, RESET) == len(exchanges), exchanges


def test_worker_that_the_kernel_does_not_kill_notices_the_end_of_its_supervisor(lab: Lab) -> None:
    with Pair(lab, workers=(2, 2), start=False) as pair, Traffic(pair) as traffic:
        for end in ENDS:
            pair.modules[end] = ["tests.system.faulty", "orphans"]
            pair.start(end)
        pair.wait_carriers(10)
        exchanges = open_on_all(pair, traffic, 1024 * MIB, rate_bps=1e12)
        assert_no_orphans(pair, stopped=False)
        traffic.wait(exchanges, 5)
        assert count_outcomes(exchanges, RESET) == len(exchanges), exchanges


def assert_no_orphans(pair: Pair, *, stopped: bool) -> None:
    """Kill both supervisors; all workers end. stopped: also one of each that is stopped by then."""
    pids = {end: pair.worker_pids(end) for end in ENDS}
    for end in ENDS:
        if stopped:
            os.kill(pids[end][0], signal.SIGSTOP)
        assert pair.stop(end, signal.SIGKILL) == -signal.SIGKILL
    killed_s = time.monotonic()
    try:
        wait_until(lambda: not any(map(is_alive, pids["client"] + pids["server"])), "end of all workers", ORPHAN_S)
    except AssertionError:
        for pid in filter(is_alive, pids["client"] + pids["server"]):
            os.kill(pid, signal.SIGKILL)
        raise
    assert time.monotonic() - killed_s < ORPHAN_S


# In the middle of a store


@pytest.mark.deadline(60 + 4 * STORES)
@pytest.mark.parametrize("end", ENDS)
def test_worker_that_dies_at_any_store_to_shared_memory_harms_no_other(lab: Lab, end: str, tmp_path: Path) -> None:
    """A worker dies at a store, its successor at the next one, and so on; the other worker's streams are whole and
    what it had lent comes back."""
    plan = Plan(tmp_path / "plan")
    with Pair(lab, workers=(2, 2), start=False) as pair, Traffic(pair) as traffic:
        pair.modules[end] = ["tests.system.faulty", f"store:0,{tmp_path}/plan"]
        pair.start("server")
        pair.start("client")
        pair.wait_carriers(10)
        traffic.wait(traffic.open(8, MIB), 20)
        before = settled_levels(pair)
        exchanges = open_on_all(pair, traffic, 32 * MIB, rate_bps=4e6)
        doomed = workers(pair, end)[0]["streams"]
        plan[Plan.ARMED] = 1
        extra = die_often(pair, traffic, plan)
        plan[Plan.ARMED] = 0
        wait_serving(pair)
        for exchange in exchanges + extra:
            exchange.speed_up(1e12)
        traffic.wait(exchanges + extra, 30)
        assert count_outcomes(exchanges, RESET) == doomed, exchanges
        assert count_outcomes(exchanges, WHOLE) == len(exchanges) - doomed, exchanges
        # One end may have everything when the worker of the other dies.
        assert {each.outcome for exchange in extra for each in exchange.ends} <= {WHOLE, RESET}, extra
        kinds = set(re.findall(r"dies at a store kind=(\w+)", pair.log(end)))
        assert len(kinds) >= len(KINDS) - 2, kinds
        assert workers(pair, end)[0]["restarts"] == plan[Plan.DEATHS] >= STORES
        assert workers(pair, end)[1]["restarts"] == 0
        wait_level(pair, before)


def die_often(pair: Pair, traffic: Traffic, plan: Plan) -> list[Exchange]:
    """New connections, so that the next worker has something to store, until enough of them have died."""
    opened: list[Exchange] = []
    deadline = time.monotonic() + 20 + 3 * STORES
    while plan[Plan.DEATHS] < STORES:
        assert time.monotonic() < deadline, f"only {plan[Plan.DEATHS]} deaths{pair.logs()}"
        opened.append(traffic.open_again(128 << 10, 5))
        time.sleep(0.1)
    return opened
