"""The processes of a pair: which workers there are, whether they live, and what they hold."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.system.pair import ENDS, Pair


def is_alive(pid: int) -> bool:
    """A zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def workers(pair: Pair, end: str) -> list[dict[str, Any]]:
    """By slot."""
    found: list[dict[str, Any]] = sorted(pair.status(end)["workers"], key=lambda worker: worker["id"])
    return found


def kill_worker(pair: Pair, end: str, slot: int) -> float:
    """SIGKILL; returns when."""
    os.kill(workers(pair, end)[slot]["pid"], signal.SIGKILL)
    return time.monotonic()


def all_up(pair: Pair, end: str) -> bool:
    return all(worker["state"] == "up" for worker in workers(pair, end))


def wait_serving(pair: Pair) -> None:
    """Every worker is up, every stripe too."""
    for end in ENDS:
        pair.wait(partial(all_up, pair, end), f"workers at the {end}")
    pair.wait_carriers(int(pair.somaxconn))


def levels(pair: Pair) -> dict[str, Any]:
    """What has to be level: each worker's counts, and the supervisors' descriptors and children."""
    found: dict[str, Any] = {end: pair.open_counts(end) for end in ENDS}
    time.sleep(0.1)  # the supervisors close what they were asked through
    for end, process in pair.processes.items():
        found[f"{end} descriptors"] = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        found[f"{end} children"] = [is_alive(int(child)) for child in children]
    return found


def settled_levels(pair: Pair) -> dict[str, Any]:
    """The levels once they stay as they are."""
    deadline = time.monotonic() + 10
    last = levels(pair)
    while True:
        time.sleep(0.5)
        if (now := levels(pair)) == last:
            return now
        assert time.monotonic() < deadline, f"unsteady: {last}\n{now}"
        last = now


def wait_level(pair: Pair, before: dict[str, Any], timeout_s: float = 10.0) -> None:
    """Until the levels are what they were; soon."""
    deadline = time.monotonic() + timeout_s
    while (now := levels(pair)) != before:
        assert time.monotonic() < deadline, f"left open: {now}\nbefore: {before}"
        time.sleep(0.2)


def skip_unless_nobody_can_import() -> None:
    """For what becomes `nobody` and then looks for its modules."""
    command = [sys.executable, "-c", "import workers.worker"]
    try:
        done = subprocess.run(command, user="nobody", cwd=Path(__file__).parents[2], check=False, capture_output=True)
    except OSError:
        done = None
    if done is None or done.returncode != 0:
        pytest.skip("nobody cannot run Python on this tree")
